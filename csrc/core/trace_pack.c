/*
 * trace_pack.c: events on their way from a writer process to its trainer, who records them as if
 * they were its own.
 *
 * Both read one monotonic clock, so times need no translation, and threads of all processes of a
 * host have different numbers.  Names are static in the process that recorded them; the trainer
 * keeps a copy of each different one for ever.  There are a few dozen; what comes beyond the room
 * for them is named so.
 *
 * Threads: packing by the taking thread; unpacking by any: `lock` guards the names.
 */
#include "trace.h"

#include <pthread.h>
#include <string.h>

enum { MOST_NAMES = 64 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char names[MOST_NAMES][DCP_TRACE_NAME_BYTES];
static uint32_t names_count;

/* ---- packing ---- */

static void
put_text(struct dcp_buf *buf, const char *text, size_t room)
{
    size_t len = strnlen(text, room - 1);

    dcp_buf_put_u8(buf, (uint8_t)len);
    dcp_buf_put(buf, text, len);
}

uint32_t
dcp_trace_pack(struct dcp_buf *buf)
{
    const struct dcp_trace_slot *slot;
    uint32_t count = 0;

    while (count < DCP_TRACE_TAKE_EVENTS && (slot = dcp_trace_next()) != NULL) {
        const struct dcp_trace_event *event = &slot->event;
        put_text(buf, event->category, DCP_TRACE_NAME_BYTES);
        put_text(buf, event->name, DCP_TRACE_NAME_BYTES);
        put_text(buf, slot->file, DCP_TRACE_FILE_BYTES);
        dcp_buf_put_u8(buf, event->beside);
        dcp_buf_put_u32(buf, slot->thread);
        dcp_buf_put_u64(buf, event->begin_ns);
        dcp_buf_put_u64(buf, event->end_ns);
        dcp_buf_put_u64(buf, event->offset_bytes);
        dcp_buf_put_u64(buf, event->bytes);
        dcp_trace_release();
        count++;
    }
    return count;
}

/* ---- unpacking ---- */

/* What can stand in a JSON string as it is. */
static bool
get_text(struct dcp_cursor *c, char *ret_text, size_t room)
{
    size_t len = dcp_cursor_u8(c);
    const uint8_t *text = len < room ? dcp_cursor_bytes(c, len) : NULL;

    for (size_t i = 0; text != NULL && i < len; i++) {
        if (text[i] < ' ' || text[i] > '~' || text[i] == '"' || text[i] == '\\') {
            return false;
        }
    }
    if (text == NULL) {
        return false;
    }
    memcpy(ret_text, text, len);
    ret_text[len] = '\0';
    return true;
}

static const char *
kept_name(const char *name)
{
    const char *kept = "other";
    uint32_t i = 0;

    pthread_mutex_lock(&lock);
    while (i < names_count && strcmp(names[i], name) != 0) {
        i++;
    }
    if (i < MOST_NAMES) {
        if (i == names_count) {
            memcpy(names[names_count++], name, strlen(name) + 1);
        }
        kept = names[i];
    }
    pthread_mutex_unlock(&lock);
    return kept;
}

static bool
unpack_one(struct dcp_cursor *c)
{
    char category[DCP_TRACE_NAME_BYTES], name[DCP_TRACE_NAME_BYTES], file[DCP_TRACE_FILE_BYTES];
    struct dcp_trace_event event = {0};

    if (!get_text(c, category, sizeof category) || !get_text(c, name, sizeof name) ||
        !get_text(c, file, sizeof file)) {
        return false;
    }
    event.beside = dcp_cursor_u8(c) != 0;
    uint32_t thread = dcp_cursor_u32(c);
    event.begin_ns = dcp_cursor_u64(c);
    event.end_ns = dcp_cursor_u64(c);
    event.offset_bytes = dcp_cursor_u64(c);
    event.bytes = dcp_cursor_u64(c);
    if (c->failed || event.end_ns < event.begin_ns) {
        return false;
    }
    event.category = kept_name(category);
    event.name = kept_name(name);
    event.file = file[0] == '\0' ? NULL : file; /* copied */
    if (dcp_trace_on()) {
        dcp_trace_record_of(&event, thread);
    }
    return true;
}

bool
dcp_trace_unpack(struct dcp_span packed)
{
    struct dcp_cursor c = {.data = packed.data, .len = packed.len};

    while (c.pos < c.len) {
        if (!unpack_one(&c)) {
            return false;
        }
    }
    return true;
}

void
dcp_trace_forget_names(void)
{
    /* In a forked child nobody has it, whatever it says. */
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

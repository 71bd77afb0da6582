/*
 * trace_lines.c: recorded events as lines of JSON, in the trace event format.
 *
 * A busy save makes thousands of them while the trainer computes, so numbers are written digit by
 * digit: printf takes ten times as long.
 *
 * Invariant: no line is longer than LINE_BYTES: of texts at most their own room is copied.
 * Threads: of the taking thread.
 */
#include "trace.h"

#include <string.h>

enum {
    LINE_BYTES = 1024, /* twice: head 80, four texts, ten numbers of 20 digits */
    DIGITS_MOST = 20,
};

struct line {
    char text[LINE_BYTES];
    size_t len;
};

static void
put(struct line *line, const char *text, size_t len)
{
    DCP_ASSERT(len <= LINE_BYTES - line->len);
    memcpy(line->text + line->len, text, len);
    line->len += len;
}

#define PUT(line, literal) put((line), "" literal, sizeof(literal) - 1)

/* A category, name or file, of which static ones are shorter than all others may be. */
static void
put_text(struct line *line, const char *text)
{
    put(line, text, strnlen(text, DCP_TRACE_NAME_BYTES));
}

static void
put_u64(struct line *line, uint64_t v)
{
    char digits[DIGITS_MOST];
    size_t at = DIGITS_MOST;

    do {
        digits[--at] = (char)('0' + v % 10);
        v /= 10;
    } while (v != 0);
    put(line, digits + at, DIGITS_MOST - at);
}

/* Nanoseconds as microseconds with three decimals. */
static void
put_us(struct line *line, uint64_t ns)
{
    unsigned rest = (unsigned)(ns % 1000);
    const char decimals[] = {'.', (char)('0' + rest / 100), (char)('0' + rest / 10 % 10),
                             (char)('0' + rest % 10)};

    put_u64(line, ns / 1000);
    put(line, decimals, sizeof decimals);
}

/* Events from before the base are at 0. */
static uint64_t
since(uint64_t ns, uint64_t base_ns)
{
    return ns > base_ns ? ns - base_ns : 0;
}

static void
put_args(struct line *line, const struct dcp_trace_slot *slot)
{
    if (slot->file[0] != '\0') {
        PUT(line, ",\"args\":{\"file\":\"");
        put_text(line, slot->file);
        PUT(line, "\",\"offset\":");
        put_u64(line, slot->event.offset_bytes);
        PUT(line, ",\"bytes\":");
        put_u64(line, slot->event.bytes);
        PUT(line, "}");
    } else if (slot->event.bytes != 0) {
        PUT(line, ",\"args\":{\"bytes\":");
        put_u64(line, slot->event.bytes);
        PUT(line, "}");
    }
}

/* The fields that all events have. */
static void
put_head(struct line *line, const struct dcp_trace_slot *slot, char kind, uint32_t pid,
         uint64_t at_ns)
{
    PUT(line, ",\n{\"ph\":\"");
    put(line, &kind, 1);
    PUT(line, "\",\"pid\":");
    put_u64(line, pid);
    PUT(line, ",\"tid\":");
    put_u64(line, slot->thread);
    PUT(line, ",\"cat\":\"");
    put_text(line, slot->event.category);
    PUT(line, "\",\"name\":\"");
    put_text(line, slot->event.name);
    PUT(line, "\",\"ts\":");
    put_us(line, at_ns);
}

static void
put_id(struct line *line, uint64_t place)
{
    PUT(line, ",\"id2\":{\"local\":\"");
    put_u64(line, place);
    PUT(line, "\"}");
}

static void
put_thread(struct line *line, const struct dcp_trace_slot *slot, uint32_t pid)
{
    PUT(line, ",\n{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":");
    put_u64(line, pid);
    PUT(line, ",\"tid\":");
    put_u64(line, slot->thread);
    PUT(line, ",\"args\":{\"name\":\"");
    put_text(line, slot->event.name);
    PUT(line, "\"}}");
}

/* What overlaps others of its thread begins and ends by two events with an id, `place`. */
static void
put_span(struct line *line, const struct dcp_trace_slot *slot, uint64_t base_ns, uint32_t pid,
         uint64_t place)
{
    uint64_t begin_ns = since(slot->event.begin_ns, base_ns);
    uint64_t end_ns = since(slot->event.end_ns, base_ns);

    if (slot->event.beside) {
        put_head(line, slot, 'b', pid, begin_ns);
        put_id(line, place);
        put_args(line, slot);
        PUT(line, "}");
        put_head(line, slot, 'e', pid, end_ns);
        put_id(line, place);
    } else {
        put_head(line, slot, 'X', pid, begin_ns);
        PUT(line, ",\"dur\":");
        put_us(line, end_ns - begin_ns);
        put_args(line, slot);
    }
    PUT(line, "}");
}

int
dcp_trace_take(struct dcp_buf *buf, uint64_t base_ns, uint32_t pid, uint64_t *ret_count,
               struct dcp_error *err)
{
    uint64_t count = 0;
    const struct dcp_trace_slot *slot;
    struct line line;

    while (count < DCP_TRACE_TAKE_EVENTS && (slot = dcp_trace_next()) != NULL) {
        line.len = 0;
        if (strcmp(slot->event.category, "thread") == 0) {
            put_thread(&line, slot, pid);
        } else {
            put_span(&line, slot, base_ns, pid, dcp_trace_taken());
        }
        dcp_buf_put(buf, line.text, line.len);
        dcp_trace_release();
        count++;
    }
    *ret_count = count;
    return dcp_buf_check(buf, err);
}

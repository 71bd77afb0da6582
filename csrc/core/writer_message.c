/*
 * writer_message.c: what a trainer and its writer process tell each other, as bytes.
 *
 * Both are built from one source, and the hello says so: a hash of the build, so that an executable
 * left over from another installation is found out before it is given anything.  Still every body
 * is checked as if it came from a stranger: a process that holds a trainer's directory open must
 * not follow a damaged number out of its memory.
 *
 * Threads: no state.
 */
#include "writer_message.h"

#include <string.h>

#include "dcp_hash.h"
#include "dcp_limits.h"
#include "le_bytes.h"
#include "writer_frame.h"

/* The build passes a hash of the core's sources; builds for tests have one of each. */
#ifndef DCP_BUILD_ID
#define DCP_BUILD_ID "development"
#endif

enum { STATS_COUNT = sizeof(struct dcp_write_stats) / sizeof(uint64_t), MOST_NICE = 19 };

_Static_assert(sizeof(struct dcp_write_stats) == STATS_COUNT * sizeof(uint64_t),
               "the numbers of a write are 64 bits each");

/* ---- frames ---- */

static size_t
begin(struct dcp_buf *buf, enum dcp_writer_kind kind)
{
    size_t at = buf->len;

    dcp_buf_put_u32(buf, DCP_WRITER_MAGIC);
    dcp_buf_put_u16(buf, DCP_WRITER_VERSION);
    dcp_buf_put_u16(buf, (uint16_t)kind);
    dcp_buf_put_u64(buf, 0);
    return at;
}

static void
end(struct dcp_buf *buf, size_t at)
{
    if (!buf->failed) {
        le_put64(buf->data + at + DCP_WRITER_LENGTH_AT, buf->len - at - DCP_WRITER_HEADER_BYTES);
    }
}

static bool
is_whole(const struct dcp_cursor *c)
{
    return !c->failed && c->pos == c->len;
}

static void
put_text(struct dcp_buf *buf, const char *text, size_t most)
{
    size_t len = text == NULL ? 0 : strnlen(text, most);

    dcp_buf_put_u32(buf, (uint32_t)len);
    dcp_buf_put(buf, text, len);
}

/* Borrowed, without its terminator; NULL when it is too long or not text. */
static const uint8_t *
get_text(struct dcp_cursor *c, size_t most, size_t *ret_len)
{
    uint32_t len = dcp_cursor_u32(c);
    const uint8_t *text = len <= most ? dcp_cursor_bytes(c, len) : NULL;

    *ret_len = len;
    return text == NULL || memchr(text, 0, len) != NULL ? NULL : text;
}

/* A body of one number. */
static void
put_number(struct dcp_buf *buf, enum dcp_writer_kind kind, uint64_t number)
{
    size_t at = begin(buf, kind);

    dcp_buf_put_u64(buf, number);
    end(buf, at);
}

static bool
get_number(struct dcp_span body, uint64_t *ret_number)
{
    struct dcp_cursor c = {.data = body.data, .len = body.len};

    *ret_number = dcp_cursor_u64(&c);
    return is_whole(&c);
}

/* ---- hello ---- */

static uint64_t
build_hash(void)
{
    return dcp_hash64(DCP_BUILD_ID, sizeof DCP_BUILD_ID - 1, DCP_WRITER_VERSION);
}

void
dcp_writer_put_hello(struct dcp_buf *buf)
{
    put_number(buf, DCP_WRITER_HELLO, build_hash());
}

bool
dcp_writer_get_hello(struct dcp_span body)
{
    uint64_t hash;

    return get_number(body, &hash) && hash == build_hash();
}

/* ---- a write ---- */

static void
put_options(struct dcp_buf *buf, const struct dcp_engine_options *options)
{
    dcp_buf_put_u8(buf, (uint8_t)options->direct);
    dcp_buf_put_u8(buf, (uint8_t)options->tuning.queue);
    dcp_buf_put_u8(buf, options->sync);
    dcp_buf_put_u8(buf, (uint8_t)options->tuning.nice);
    dcp_buf_put_u32(buf, options->tuning.io_priority);
    dcp_buf_put_u64(buf, options->tuning.limit_bytes_s);
    dcp_buf_put_u32(buf, options->ring_buffers);
    dcp_buf_put_u32(buf, options->ring_buffer_bytes);
}

static bool
get_options(struct dcp_cursor *c, struct dcp_engine_options *ret_options)
{
    uint32_t direct = dcp_cursor_u8(c), queue = dcp_cursor_u8(c), sync = dcp_cursor_u8(c),
             nice = dcp_cursor_u8(c);

    *ret_options = (struct dcp_engine_options){
        .direct = (enum dcp_direct)direct,
        .sync = sync != 0,
        .tuning = {.queue = (enum dcp_queue_use)queue,
                   .nice = (int)nice,
                   .io_priority = dcp_cursor_u32(c),
                   .limit_bytes_s = dcp_cursor_u64(c)},
    };
    ret_options->ring_buffers = dcp_cursor_u32(c);
    ret_options->ring_buffer_bytes = dcp_cursor_u32(c);
    return direct <= DCP_DIRECT_ON && queue <= DCP_QUEUE_ON && sync <= 1 && nice <= MOST_NICE;
}

static void
put_survival(struct dcp_buf *buf, const struct dcp_writer_request *request)
{
    const struct dcp_writer_survival *survival = &request->survival;

    dcp_buf_put_u8(buf, request->survives);
    if (request->survives) {
        dcp_buf_put_u32(buf, (uint32_t)survival->claim_rank);
        dcp_buf_put_u64(buf, survival->n0);
        dcp_buf_put_u64(buf, survival->metadata.len);
        dcp_buf_put(buf, survival->metadata.data, survival->metadata.len);
    }
}

/* The metadata is still the message's. */
static bool
get_survival(struct dcp_cursor *c, struct dcp_writer_request *request)
{
    struct dcp_writer_survival *survival = &request->survival;
    uint32_t survives = dcp_cursor_u8(c);

    request->survives = survives == 1;
    if (survives == 1) {
        survival->claim_rank = (int32_t)dcp_cursor_u32(c);
        survival->n0 = dcp_cursor_u64(c);
        survival->metadata.len = dcp_cursor_u64(c);
        survival->metadata.data = dcp_cursor_bytes(c, survival->metadata.len);
    }
    return !c->failed && survives <= 1 && survival->claim_rank >= -1 &&
           survival->claim_rank < DCP_MAX_RANKS && survival->n0 <= UINT32_MAX &&
           survival->metadata.len <= DCP_MAX_METADATA_BYTES;
}

void
dcp_writer_put_request(struct dcp_buf *buf, const struct dcp_writer_request *request)
{
    const struct dcp_image *image = &request->image;
    size_t at = begin(buf, DCP_WRITER_WRITE);

    dcp_buf_put(buf, request->save_id.bytes, sizeof request->save_id.bytes);
    put_options(buf, &request->options);
    dcp_buf_put_u8(buf, request->traced);
    put_survival(buf, request);
    put_text(buf, request->dir_path, DCP_MAX_WRITER_PATH_BYTES);
    dcp_buf_put_u32(buf, image->rank);
    dcp_buf_put_u64(buf, image->bytes);
    dcp_buf_put_u64(buf, image->payload_bytes);
    dcp_buf_put_u32(buf, image->files_count);
    for (uint32_t i = 0; i < image->files_count; i++) {
        dcp_buf_put_u64(buf, image->files[i].offset_bytes);
        dcp_buf_put_u64(buf, image->files[i].length_bytes);
        dcp_buf_put_u64(buf, image->files[i].n);
    }
    end(buf, at);
}

/* NULL, or what is wrong with a file that was read. */
static const char *
file_fault(const struct dcp_image_file *file, uint64_t image_bytes)
{
    uint64_t end_bytes;

    if (file->offset_bytes % DCP_DIRECT_ALIGN_BYTES != 0) {
        return "a file does not start on a block";
    }
    if (file->length_bytes > DCP_MAX_FILE_BYTES ||
        dcp_add_overflows_u64(file->offset_bytes,
                              dcp_align_up(file->length_bytes, DCP_DIRECT_ALIGN_BYTES),
                              &end_bytes) ||
        end_bytes > image_bytes) {
        return "a file ends behind the image";
    }
    return file->n > UINT32_MAX ? "a file's number is over 32 bits" : NULL;
}

static const char *
get_files(struct dcp_cursor *c, struct dcp_image *image)
{
    for (uint32_t i = 0; i < image->files_count; i++) {
        struct dcp_image_file *file = &image->files[i];
        file->offset_bytes = dcp_cursor_u64(c);
        file->length_bytes = dcp_cursor_u64(c);
        file->n = dcp_cursor_u64(c);
        const char *fault = file_fault(file, image->bytes);
        if (fault != NULL) {
            return fault;
        }
        if (dcp_add_overflows_u64(image->total_bytes, file->length_bytes, &image->total_bytes) ||
            image->total_bytes > image->bytes) {
            return "the files are longer than the image";
        }
    }
    return is_whole(c) && image->payload_bytes <= image->total_bytes ? NULL : "a length";
}

static int
refuse(struct dcp_error *err, const char *fault)
{
    return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                         "a writer process was asked for what can not be: %s", fault);
}

int
dcp_writer_get_request(struct dcp_span body, struct dcp_writer_request *ret_request,
                       struct dcp_error *err)
{
    struct dcp_cursor c = {.data = body.data, .len = body.len};
    struct dcp_writer_request request = {0};
    size_t path_len;

    const uint8_t *id = dcp_cursor_bytes(&c, sizeof request.save_id.bytes);
    bool options_hold = get_options(&c, &request.options);
    uint32_t traced = dcp_cursor_u8(&c);
    request.traced = traced == 1;
    options_hold = options_hold && traced <= 1 && get_survival(&c, &request);
    const uint8_t *path = get_text(&c, DCP_MAX_WRITER_PATH_BYTES, &path_len);
    request.image.rank = dcp_cursor_u32(&c);
    request.image.bytes = dcp_cursor_u64(&c);
    request.image.payload_bytes = dcp_cursor_u64(&c);
    request.image.files_count = dcp_cursor_u32(&c);
    /* The count is believed once the body is as long as it says. */
    if (c.failed || id == NULL || path == NULL || !options_hold ||
        request.image.rank >= DCP_MAX_RANKS || request.image.files_count > DCP_MAX_FILES_PER_RANK ||
        c.len - c.pos != (uint64_t)request.image.files_count * DCP_WRITER_FILE_BYTES) {
        return refuse(err, "its options, path or counts");
    }
    struct dcp_span metadata = request.survival.metadata;
    uint8_t *image = dcp_malloc(metadata.len);
    request.survival.metadata.data = image;
    memcpy(request.save_id.bytes, id, sizeof request.save_id.bytes);
    request.dir_path = dcp_malloc(path_len + 1);
    request.image.files = dcp_malloc_array(request.image.files_count, sizeof *request.image.files);
    if (request.dir_path == NULL || request.image.files == NULL || image == NULL) {
        dcp_writer_request_clean_up(&request);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the places of %u files",
                             request.image.files_count);
    }
    if (metadata.len != 0) {
        memcpy(image, metadata.data, metadata.len);
    }
    memcpy(request.dir_path, path, path_len);
    request.dir_path[path_len] = '\0';
    const char *fault = get_files(&c, &request.image);
    if (fault != NULL) {
        dcp_writer_request_clean_up(&request);
        return refuse(err, fault);
    }
    *ret_request = request;
    return 0;
}

/* What the process was asked for must be what lies in the arena. */
int
dcp_writer_check_image(const struct dcp_writer_request *request, const uint8_t *memory,
                       struct dcp_error *err)
{
    for (uint32_t i = 0; i < request->image.files_count; i++) {
        const struct dcp_image_file *file = &request->image.files[i];
        struct dcp_file_header header;

        if (file->length_bytes < DCP_FILE_HEADER_BYTES) {
            return refuse(err, "a file without a header");
        }
        int rc = dcp_file_parse_header(memory + file->offset_bytes, &header, err);
        if (rc != 0) {
            return rc;
        }
        if (memcmp(&header.save_id, &request->save_id, sizeof header.save_id) != 0 ||
            header.rank != request->image.rank || header.n != file->n ||
            header.length_bytes != file->length_bytes) {
            return refuse(err, "the arena holds another save");
        }
    }
    return 0;
}

void
dcp_writer_request_clean_up(struct dcp_writer_request *request)
{
    dcp_free(request->dir_path);
    dcp_free((void *)(uintptr_t)request->survival.metadata.data);
    dcp_image_clean_up(&request->image);
    *request = (struct dcp_writer_request){0};
}

void
dcp_writer_put_word(struct dcp_buf *buf, enum dcp_writer_kind kind)
{
    end(buf, begin(buf, kind));
}

/* ---- a preparation ---- */

void
dcp_writer_put_prepare(struct dcp_buf *buf, uint64_t bytes)
{
    put_number(buf, DCP_WRITER_PREPARE, bytes);
}

bool
dcp_writer_get_prepare(struct dcp_span body, uint64_t *ret_bytes)
{
    return get_number(body, ret_bytes) && *ret_bytes != 0;
}

/* ---- answers ---- */

void
dcp_writer_put_progress(struct dcp_buf *buf, const struct dcp_writer_progress *progress)
{
    put_number(buf, DCP_WRITER_PROGRESS, progress->payload_bytes);
}

bool
dcp_writer_get_progress(struct dcp_span body, struct dcp_writer_progress *ret_progress)
{
    return get_number(body, &ret_progress->payload_bytes);
}

static void
put_error(struct dcp_buf *buf, const struct dcp_error *err)
{
    dcp_buf_put_u32(buf, (uint32_t)err->sys_errno);
    dcp_buf_put_u32(buf, (uint32_t)err->rank);
    dcp_buf_put_u64(buf, err->offset_bytes);
    put_text(buf, err->path, sizeof err->path);
    put_text(buf, err->message, sizeof err->message);
}

static bool
get_error_text(struct dcp_cursor *c, char *ret_text, size_t size)
{
    size_t len;
    const uint8_t *text = get_text(c, size - 1, &len);

    if (text == NULL) {
        return false;
    }
    memcpy(ret_text, text, len);
    ret_text[len] = '\0';
    return true;
}

bool
dcp_writer_put_trace(struct dcp_buf *buf)
{
    size_t at = begin(buf, DCP_WRITER_TRACE);
    bool any = dcp_trace_pack(buf) != 0;

    end(buf, at);
    return any;
}

void
dcp_writer_put_result(struct dcp_buf *buf, const struct dcp_writer_result *result)
{
    size_t at = begin(buf, DCP_WRITER_DONE);
    uint64_t stats[STATS_COUNT];

    memcpy(stats, &result->stats, sizeof stats);
    dcp_buf_put_u32(buf, (uint32_t)result->code);
    put_error(buf, &result->err);
    dcp_buf_put_u32(buf, result->created_files);
    dcp_buf_put_u64(buf, result->payload_bytes);
    for (uint32_t i = 0; i < STATS_COUNT; i++) {
        dcp_buf_put_u64(buf, stats[i]);
    }
    end(buf, at);
}

bool
dcp_writer_get_result(struct dcp_span body, struct dcp_writer_result *ret_result)
{
    struct dcp_cursor c = {.data = body.data, .len = body.len};
    struct dcp_writer_result result = {.code = (int32_t)dcp_cursor_u32(&c)};
    struct dcp_error *err = &result.err;
    uint64_t stats[STATS_COUNT];

    err->code = result.code;
    err->sys_errno = (int32_t)dcp_cursor_u32(&c);
    err->rank = (int32_t)dcp_cursor_u32(&c);
    err->offset_bytes = dcp_cursor_u64(&c);
    if (!get_error_text(&c, err->path, sizeof err->path) ||
        !get_error_text(&c, err->message, sizeof err->message)) {
        return false;
    }
    result.created_files = dcp_cursor_u32(&c);
    result.payload_bytes = dcp_cursor_u64(&c);
    for (uint32_t i = 0; i < STATS_COUNT; i++) {
        stats[i] = dcp_cursor_u64(&c);
    }
    memcpy(&result.stats, stats, sizeof stats);
    if (!is_whole(&c) || result.code > 0) {
        return false;
    }
    *ret_result = result;
    return true;
}

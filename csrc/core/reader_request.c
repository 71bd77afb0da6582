/*
 * reader_request.c: requests of a load: filled, read ahead, delivered in order.
 *
 * There is one request per ring buffer, used in turn: filling the next one first settles what it
 * brought the last time.  A request holds one or more spans of its file, packed in its buffer:
 * neighbouring uses share a span where the gap between them costs less than another read, else each
 * gets a span of its own, and all of them are read side by side.  A request of a mapped file has
 * one span, a window, and is delivered where it is pushed; only if mapping is refused it takes a
 * buffer and is read like any other, and so is the rest of that file.
 *
 * Invariants: requests of a file are pushed and delivered in the same order; a request holds its
 * file and the parts of its uses until it is cleared.
 * Threads: the calling thread; the pool's threads see spans of pushed requests only.
 */
#include "reader.h"

#include <errno.h>
#include <inttypes.h>

#include "dcp_trace.h"

/* Of a mapping: the more, the fewer; and little enough to be mapped only while it is used. */
#define WINDOW_BYTES (8u << 20)
/* Pieces that are still in the cache when they are checked and moved. */
#define HOT_REQUEST_BYTES (1u << 20)
/* Read-ahead of the kernel does the rest. */
#define BUFFERED_REQUEST_BYTES (2u << 20)
/* Spans that need no other alignment begin with a cache line. */
#define SPAN_ALIGN_BYTES 64u

void
dcp_read_request_clear(struct dcp_reader *reader, struct dcp_read_request *request)
{
    for (uint32_t i = 0; i < request->uses_count; i++) {
        dcp_read_part_release(request->uses[i].part);
    }
    request->uses_count = 0;
    request->spans_count = 0;
    request->used_bytes = 0;
    dcp_read_file_release(reader, request->file);
    request->file = NULL;
    if (request->big != NULL) {
        dcp_unmap_huge(request->big, request->big_bytes);
        request->big = NULL;
    }
    request->pushed = false;
    request->in_place = false;
}

static int
deliver_uses(struct dcp_reader *reader, const struct dcp_read_request *request, const uint8_t *data,
             struct dcp_error *err)
{
    uint64_t traced = dcp_trace_begin();
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < request->uses_count; i++) {
        const struct dcp_read_use *use = &request->uses[i];
        rc = dcp_read_deliver(reader, request->file, use, data + use->data_bytes, request->in_place,
                              err);
    }
    dcp_trace_end(traced, "cpu", "verify and deliver", request->used_bytes);
    return rc == 0 ? dcp_read_check_cancel(reader, err) : rc;
}

/* Waits for a request and delivers what it brought. */
static int
request_settle(struct dcp_reader *reader, struct dcp_read_request *request, struct dcp_error *err)
{
    if (!request->pushed) {
        return 0;
    }
    /* The pool keeps the error; it is fetched when the pool is cleaned up. */
    uint64_t waiting = dcp_trace_begin();
    int rc = dcp_read_pool_wait(&reader->pool, request);
    dcp_trace_end(waiting, "wait", "wait for a read", 0);
    if (rc == 0) {
        rc = deliver_uses(reader, request, request->data, err);
    }
    if (rc == 0) {
        dcp_read_request_clear(reader, request);
    }
    return rc;
}

/* ---- mapped files ---- */

void
dcp_read_count(struct dcp_reader *reader, const struct dcp_read_file *file, uint64_t bytes,
               uint32_t requests)
{
    reader->stats.read_bytes += bytes;
    reader->stats.hot_bytes += file->hot ? bytes : 0;
    reader->stats.requests_count += requests;
}

/* Delivers a request from a mapping.  *ret_mapped false: it has to be read. */
static int
deliver_mapped(struct dcp_reader *reader, struct dcp_read_request *request, bool *ret_mapped,
               struct dcp_error *err)
{
    const struct dcp_io *io = reader->io;
    const struct dcp_read_span *span = &request->spans[0];
    size_t len = (size_t)(span->to_bytes - span->from_bytes);
    const uint8_t *bytes = NULL;
    *ret_mapped = false;
    int rc = dcp_read_check_cancel(reader, err);
    if (rc != 0 || io->map == NULL ||
        io->map(io->ctx, request->file->fd, span->from_bytes, len, &bytes) != 0) {
        return rc;
    }
    *ret_mapped = true;
    dcp_read_count(reader, request->file, request->used_bytes, 1);
    rc = deliver_uses(reader, request, bytes, err);
    /* Behind a new end of the file, but in its last page, are zeros and no fault. */
    struct dcp_stat now;
    bool cut = io->fstat(io->ctx, request->file->fd, &now) == 0 && now.size_bytes < span->to_bytes;
    if (io->unmap(io->ctx, bytes, len) != 0 || cut) {
        /* What seemed to be there was not: the file's state, not a checksum, is the cause. */
        dcp_error_clear(err);
        rc = dcp_error_set(err, DCP_E_IO, EIO, request->file->path,
                           "%s could not be read between bytes %" PRIu64 " and %" PRIu64
                           ": it was cut short while it was loaded, or its device failed",
                           request->file->path, span->from_bytes, span->to_bytes);
        err->offset_bytes = span->from_bytes;
        for (uint32_t i = 0; i < request->uses_count; i++) {
            dcp_target_spoil(reader->plan, request->uses[i].item->target);
        }
    }
    return rc;
}

/* ---- filling ---- */

static int
take_ring(struct dcp_reader *reader, struct dcp_error *err)
{
    const struct dcp_engine_options *options = reader->options;
    if (reader->ring != NULL) {
        return 0;
    }
    /* That of the last save or load, of which this one may use less. */
    bool usual = options->ring_buffers == 0 && options->ring_buffer_bytes == 0;
    return dcp_ring_acquire(usual ? 0 : reader->buffers_count, usual ? 0 : reader->buffer_bytes,
                            &reader->ring, err);
}

/* A mapped file that cannot be: read it from now on. */
static int
fall_back(struct dcp_reader *reader, struct dcp_read_request *request, struct dcp_error *err)
{
    int rc = take_ring(reader, err);
    if (rc == 0) {
        request->file->mode = DCP_READ_HOT;
        request->data = dcp_ring_buffer(reader->ring, reader->open_request);
    }
    return rc;
}

int
dcp_read_request_push(struct dcp_reader *reader, struct dcp_error *err)
{
    struct dcp_read_request *request = dcp_read_current(reader);
    if (request->pushed || request->uses_count == 0) {
        return 0;
    }
    if (request->data == NULL) {
        bool mapped;
        int rc = deliver_mapped(reader, request, &mapped, err);
        if (rc != 0) {
            return rc;
        }
        if (mapped) {
            dcp_read_request_clear(reader, request);
            return 0;
        }
        rc = fall_back(reader, request, err);
        if (rc != 0) {
            return rc;
        }
    }
    const struct dcp_read_file *file = request->file;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < request->spans_count; i++) {
        const struct dcp_read_span *span = &request->spans[i];
        uint64_t end = dcp_align_up(span->to_bytes, file->align_bytes);
        bytes += dcp_min_u64(end, file->size_bytes) - span->from_bytes;
    }
    dcp_read_count(reader, file, bytes, request->spans_count);
    request->pushed = true;
    dcp_read_pool_push(reader, request, reader->ahead && file->mode != DCP_READ_HOT);
    reader->open_request = (reader->open_request + 1) % reader->buffers_count;
    return 0;
}

uint64_t
dcp_read_request_bytes(const struct dcp_reader *reader)
{
    switch (reader->file->mode) {
    case DCP_READ_DIRECT:
        return reader->buffer_bytes;
    case DCP_READ_BUFFERED:
        return dcp_min_u64(reader->buffer_bytes, BUFFERED_REQUEST_BYTES);
    case DCP_READ_HOT:
        return dcp_min_u64(reader->buffer_bytes, HOT_REQUEST_BYTES);
    case DCP_READ_MAPPED:
        break;
    }
    /* No more than a buffer holds, should it have to be read after all. */
    return dcp_min_u64(reader->buffer_bytes, WINDOW_BYTES);
}

/* Starts a new request of the current file. */
static int
request_begin(struct dcp_reader *reader, struct dcp_error *err)
{
    int rc = dcp_read_request_push(reader, err);
    struct dcp_read_request *request = dcp_read_current(reader);
    if (rc == 0) {
        rc = request_settle(reader, request, err);
    }
    bool mapped = reader->file->mode == DCP_READ_MAPPED;
    if (rc == 0 && !mapped) {
        rc = take_ring(reader, err);
    }
    if (rc != 0) {
        return rc;
    }
    request->file = reader->file;
    request->file->users++;
    request->data = mapped ? NULL : dcp_ring_buffer(reader->ring, reader->open_request);
    request->capacity_bytes = dcp_read_request_bytes(reader);
    return 0;
}

uint64_t
dcp_read_gap_bytes(const struct dcp_reader *reader)
{
    bool hot = reader->file->mode == DCP_READ_HOT || reader->file->mode == DCP_READ_MAPPED;
    return hot ? DCP_READ_HOT_GAP_BYTES : DCP_READ_GAP_BYTES;
}

/* Whether bytes at `at_bytes` belong to the last span of a request. */
static bool
extends_span(const struct dcp_reader *reader, const struct dcp_read_request *request,
             uint64_t at_bytes)
{
    const struct dcp_read_span *last = &request->spans[request->spans_count - 1];
    uint64_t gap = request->data == NULL ? DCP_READ_MAP_GAP_BYTES : dcp_read_gap_bytes(reader);
    return at_bytes >= last->from_bytes && at_bytes <= last->to_bytes + gap;
}

/* Where the span behind the last one goes in a request's data. */
static uint64_t
next_data(const struct dcp_read_request *request)
{
    if (request->spans_count == 0) {
        return 0;
    }
    const struct dcp_read_span *last = &request->spans[request->spans_count - 1];
    const struct dcp_read_file *file = request->file;
    uint64_t align =
        dcp_max_u64(SPAN_ALIGN_BYTES, dcp_max_u64(file->align_bytes, file->mem_align_bytes));
    return dcp_align_up(last->data_bytes + (last->to_bytes - last->from_bytes), align);
}

uint64_t
dcp_read_request_room(struct dcp_reader *reader, uint64_t at_bytes)
{
    const struct dcp_read_request *request = dcp_read_current(reader);
    if (request->pushed || request->uses_count == 0 || request->file != reader->file) {
        return 0;
    }
    const struct dcp_read_span *last = &request->spans[request->spans_count - 1];
    uint64_t data;
    if (extends_span(reader, request, at_bytes)) {
        data = last->data_bytes + (at_bytes - last->from_bytes);
    } else if (request->data != NULL && at_bytes > last->to_bytes) {
        data = next_data(request) + (at_bytes & (request->file->align_bytes - 1));
    } else {
        return 0;
    }
    return data < request->capacity_bytes ? request->capacity_bytes - data : 0;
}

/* Room for one more item in an array; NULL when there is no memory. */
static void *
grown(void *array, uint32_t *cap, uint32_t count, size_t item_bytes, struct dcp_error *err)
{
    if (count < *cap) {
        return array;
    }
    uint32_t more = *cap > 0 ? *cap * 2 : 16;
    void *larger = dcp_realloc(array, more * item_bytes);
    if (larger == NULL) {
        dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a read request");
        return NULL;
    }
    *cap = more;
    return larger;
}

/* Puts a use into the request that is being filled, which has room for it. */
static int
request_append(struct dcp_reader *reader, const struct dcp_read_use *use, struct dcp_error *err)
{
    struct dcp_read_request *request = dcp_read_current(reader);
    uint64_t end = use->at_bytes + use->len_bytes;
    struct dcp_read_use *uses =
        grown(request->uses, &request->uses_cap, request->uses_count, sizeof *uses, err);
    if (uses == NULL) {
        return DCP_E_NOMEM;
    }
    request->uses = uses;
    struct dcp_read_span *spans =
        grown(request->spans, &request->spans_cap, request->spans_count, sizeof *spans, err);
    if (spans == NULL) {
        return DCP_E_NOMEM;
    }
    request->spans = spans;
    if (request->spans_count == 0 || !extends_span(reader, request, use->at_bytes)) {
        uint64_t from = use->at_bytes & ~(request->file->align_bytes - 1);
        request->spans[request->spans_count] =
            (struct dcp_read_span){from, use->at_bytes, next_data(request)};
        request->spans_count++;
    }
    struct dcp_read_span *span = &request->spans[request->spans_count - 1];
    uint64_t known = dcp_max_u64(span->to_bytes, use->at_bytes);
    request->used_bytes += end > known ? end - known : 0;
    span->to_bytes = dcp_max_u64(span->to_bytes, end);
    struct dcp_read_use *mine = &request->uses[request->uses_count++];
    *mine = *use;
    mine->data_bytes = span->data_bytes + (use->at_bytes - span->from_bytes);
    if (use->part != NULL) {
        use->part->users++;
    }
    return 0;
}

/* ---- what the walk asks for ---- */

int
dcp_read_through_ring(struct dcp_reader *reader, const struct dcp_read_use *use,
                      struct dcp_error *err)
{
    uint64_t room = dcp_read_request_room(reader, use->at_bytes);
    if (room == 0 || room < use->len_bytes) {
        int rc = request_begin(reader, err);
        if (rc != 0) {
            return rc;
        }
        struct dcp_read_request *request = dcp_read_current(reader);
        uint64_t need = (use->at_bytes & (request->file->align_bytes - 1)) + use->len_bytes;
        if (need > request->capacity_bytes) {
            request->capacity_bytes = reader->buffer_bytes;
        }
        DCP_ASSERT(need <= request->capacity_bytes);
    }
    return request_append(reader, use, err);
}

int
dcp_read_in_place(struct dcp_reader *reader, const struct dcp_read_use *use, uint8_t *target,
                  struct dcp_error *err)
{
    int rc = request_begin(reader, err);
    if (rc != 0) {
        return rc;
    }
    struct dcp_read_request *request = dcp_read_current(reader);
    dcp_target_touch(reader->plan, use->item->target);
    request->in_place = true;
    request->data = target;
    request->capacity_bytes = use->len_bytes;
    rc = request_append(reader, use, err);
    return rc == 0 ? dcp_read_request_push(reader, err) : rc;
}

int
dcp_read_settle_all(struct dcp_reader *reader, struct dcp_error *err)
{
    int rc = dcp_read_request_push(reader, err);
    for (uint32_t i = 0; rc == 0 && i < reader->buffers_count; i++) {
        uint32_t at = (reader->open_request + i) % reader->buffers_count;
        rc = request_settle(reader, &reader->requests[at], err);
    }
    return rc;
}

int
dcp_read_big(struct dcp_reader *reader, const struct dcp_read_use *use, struct dcp_error *err)
{
    /* Everything is delivered first: at no time is there a second record of this size. */
    int rc = dcp_read_settle_all(reader, err);
    if (rc == 0) {
        rc = request_begin(reader, err);
    }
    if (rc != 0) {
        return rc;
    }
    struct dcp_read_request *request = dcp_read_current(reader);
    request->capacity_bytes = UINT64_MAX;
    rc = request_append(reader, use, err);
    if (rc != 0) {
        return rc;
    }
    bool mapped;
    rc = deliver_mapped(reader, request, &mapped, err);
    if (rc != 0 || mapped) {
        if (rc == 0) {
            dcp_read_request_clear(reader, request);
        }
        return rc;
    }
    const struct dcp_read_span *span = &request->spans[0];
    uint64_t bytes = dcp_align_up(span->to_bytes - span->from_bytes, DCP_DIRECT_ALIGN_BYTES);
    request->big = dcp_map_huge((size_t)bytes, err);
    if (request->big == NULL) {
        return DCP_E_NOMEM;
    }
    request->big_bytes = bytes;
    request->data = request->big;
    return dcp_read_settle_all(reader, err);
}

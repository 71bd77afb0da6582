/*
 * reader_request.c: requests of a load: filled, read ahead, delivered in order.
 *
 * There is one request per ring buffer, used in turn: filling the next one first settles what it
 * brought the last time.  Neighbouring uses share a request as long as they fit and the gap between
 * them costs less than another request.
 *
 * Invariants: requests are pushed and delivered in the same order; a request holds its file and the
 * parts of its uses until it is cleared.
 * Threads: the calling thread; the pump's thread sees jobs only.
 */
#include "reader.h"

void
dcp_read_request_clear(struct dcp_reader *reader, struct dcp_read_request *request)
{
    for (uint32_t i = 0; i < request->uses_count; i++) {
        dcp_read_part_release(request->uses[i].part);
    }
    request->uses_count = 0;
    dcp_read_file_release(reader, request->file);
    request->file = NULL;
    if (request->big != NULL) {
        dcp_unmap_huge(request->big, request->big_bytes);
        request->big = NULL;
    }
    request->pushed = false;
    request->in_place = false;
}

/* Waits for a request and delivers what it brought. */
static int
request_settle(struct dcp_reader *reader, struct dcp_read_request *request, struct dcp_error *err)
{
    if (!request->pushed) {
        return 0;
    }
    /* The pump keeps the error; it is fetched when the pump is cleaned up. */
    int rc = dcp_pump_wait(&reader->pump, request->job);
    for (uint32_t i = 0; rc == 0 && i < request->uses_count; i++) {
        const struct dcp_read_use *use = &request->uses[i];
        DCP_ASSERT(use->at_bytes >= request->from_bytes &&
                   use->at_bytes + use->len_bytes <= request->to_bytes);
        rc = dcp_read_deliver(reader, request, use,
                              request->data + (use->at_bytes - request->from_bytes), err);
    }
    if (rc == 0) {
        rc = dcp_read_check_cancel(reader, err);
    }
    if (rc == 0) {
        dcp_read_request_clear(reader, request);
    }
    return rc;
}

void
dcp_read_request_push(struct dcp_reader *reader)
{
    struct dcp_read_request *request = dcp_read_current(reader);
    if (request->pushed || request->uses_count == 0) {
        return;
    }
    uint64_t align = request->in_place ? 1 : request->file->align_bytes;
    uint64_t end = dcp_align_up(request->to_bytes, align);
    struct dcp_job job = {.file = request->file,
                          .data = request->data,
                          .offset_bytes = request->from_bytes,
                          .len_bytes = end - request->from_bytes,
                          .flags = (uint32_t)(end - request->to_bytes)};
    reader->stats.read_bytes += request->to_bytes - request->from_bytes;
    reader->stats.requests_count++;
    if (request->in_place) {
        dcp_target_touch(reader->plan, request->uses[0].item->target);
    }
    request->job = dcp_pump_push(&reader->pump, &job);
    request->pushed = true;
    reader->open_request = (reader->open_request + 1) % reader->ring->buffers_count;
}

int
dcp_read_request_begin(struct dcp_reader *reader, uint64_t from_bytes, struct dcp_error *err)
{
    dcp_read_request_push(reader);
    struct dcp_read_request *request = dcp_read_current(reader);
    int rc = request_settle(reader, request, err);
    if (rc != 0) {
        return rc;
    }
    request->file = reader->file;
    request->file->users++;
    request->data = dcp_ring_buffer(reader->ring, reader->open_request);
    request->from_bytes = from_bytes & ~(reader->file->align_bytes - 1);
    request->to_bytes = from_bytes;
    request->capacity_bytes = reader->ring->buffer_bytes;
    if (!reader->file->direct) {
        request->capacity_bytes = dcp_min_u64(request->capacity_bytes, DCP_READ_HOT_REQUEST_BYTES);
    }
    return 0;
}

int
dcp_read_request_append(struct dcp_reader *reader, const struct dcp_read_use *use,
                        struct dcp_error *err)
{
    struct dcp_read_request *request = dcp_read_current(reader);
    if (request->uses_count == request->uses_cap) {
        uint32_t cap = request->uses_cap > 0 ? request->uses_cap * 2 : 16;
        struct dcp_read_use *uses = dcp_realloc(request->uses, cap * sizeof *uses);
        if (uses == NULL) {
            return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a read request");
        }
        request->uses = uses;
        request->uses_cap = cap;
    }
    request->uses[request->uses_count++] = *use;
    request->to_bytes = dcp_max_u64(request->to_bytes, use->at_bytes + use->len_bytes);
    if (use->part != NULL) {
        use->part->users++;
    }
    return 0;
}

uint64_t
dcp_read_gap_bytes(const struct dcp_reader *reader)
{
    return reader->file->direct ? DCP_READ_GAP_BYTES : DCP_READ_HOT_GAP_BYTES;
}

bool
dcp_read_request_takes(struct dcp_reader *reader, uint64_t at_bytes, uint64_t len_bytes)
{
    const struct dcp_read_request *request = dcp_read_current(reader);
    return !request->pushed && request->uses_count > 0 && request->file == reader->file &&
           at_bytes >= request->from_bytes &&
           at_bytes <= request->to_bytes + dcp_read_gap_bytes(reader) &&
           at_bytes + len_bytes <= request->from_bytes + request->capacity_bytes;
}

int
dcp_read_through_ring(struct dcp_reader *reader, const struct dcp_read_use *use,
                      struct dcp_error *err)
{
    if (!dcp_read_request_takes(reader, use->at_bytes, use->len_bytes)) {
        int rc = dcp_read_request_begin(reader, use->at_bytes, err);
        if (rc != 0) {
            return rc;
        }
        struct dcp_read_request *request = dcp_read_current(reader);
        if (use->at_bytes + use->len_bytes > request->from_bytes + request->capacity_bytes) {
            request->capacity_bytes = reader->ring->buffer_bytes;
        }
        DCP_ASSERT(use->at_bytes + use->len_bytes <= request->from_bytes + request->capacity_bytes);
    }
    return dcp_read_request_append(reader, use, err);
}

int
dcp_read_settle_all(struct dcp_reader *reader, struct dcp_error *err)
{
    dcp_read_request_push(reader);
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < reader->ring->buffers_count; i++) {
        uint32_t at = (reader->open_request + i) % reader->ring->buffers_count;
        rc = request_settle(reader, &reader->requests[at], err);
    }
    return rc;
}

int
dcp_read_big(struct dcp_reader *reader, const struct dcp_read_use *use, struct dcp_error *err)
{
    int rc = dcp_read_settle_all(reader, err);
    if (rc == 0) {
        rc = dcp_read_request_begin(reader, use->at_bytes, err);
    }
    if (rc != 0) {
        return rc;
    }
    struct dcp_read_request *request = dcp_read_current(reader);
    uint64_t bytes =
        dcp_align_up(use->at_bytes + use->len_bytes - request->from_bytes, DCP_DIRECT_ALIGN_BYTES);
    request->big = dcp_map_huge((size_t)bytes, err);
    if (request->big == NULL) {
        return DCP_E_NOMEM;
    }
    request->big_bytes = bytes;
    request->data = request->big;
    request->capacity_bytes = bytes;
    rc = dcp_read_request_append(reader, use, err);
    return rc == 0 ? dcp_read_settle_all(reader, err) : rc;
}

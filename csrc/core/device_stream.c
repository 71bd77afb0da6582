/*
 * device_stream.c: payloads on devices, brought through a few pinned segments of the host ahead of
 * whoever takes them one after another.
 *
 * What will be taken is known from the start, so copies run ahead of it across the borders of
 * payloads: a segment is filled with the bytes of the next payloads, back to back, in the order in
 * which they will be taken, large ones by plain copies, small and strided ones packed (see
 * device_bring.c).  A segment that was taken to its end is filled again.  So a payload's bytes go
 *     device (-> slab) -> segment -> the writer's ring, by the fused copy and CRC, or the kernel
 * and the device is copying while the host does that.
 *
 * A payload that only the host can gather takes no part in it: it is gathered when its turn comes,
 * into memory of its size.
 *
 * Memory: a ring of the default shape, 32 MiB, pinned and kept between saves, and a slab on each
 * device of at most DCP_DEVICE_SLAB_BYTES.
 * Threads: one at a time.
 */
#include "device.h"

#include <string.h>

struct segment {
    uint8_t *memory;
    const struct dcp_device *device; /* whose bytes are in it */
    dcp_device_event *event;         /* NULL once it has happened */
    uint64_t filled_bytes, taken_bytes;
};

/* A walk over the payloads: one fills, one takes. */
struct walk {
    uint64_t cursor;
    bool has; /* `payload`, of which done_bytes are done */
    struct dcp_device_payload payload;
    struct dcp_device_form form;
    uint64_t done_bytes;
};

struct dcp_device_stream {
    const struct dcp_device_list *devices;
    dcp_device_next_fn next;
    const void *next_ctx;
    struct dcp_device_stats *stats;
    struct dcp_device_bring **brings; /* owned; one per device, NULL until it is needed */
    struct dcp_ring *ring;
    struct segment segments[DCP_RING_MOST_BUFFERS];
    uint32_t segments_count, head; /* `head` is being taken; the others follow it in turn */
    struct walk fill, take;
    uint8_t *gathered; /* owned: the payload that is taken, when the host gathers it */
    bool running;      /* something was put on a stream and not waited for */
};

/* ---- payloads ---- */

static uint32_t
index_of(const struct dcp_device_stream *stream, const struct dcp_device *device)
{
    uint32_t index = 0;
    while (stream->devices->items[index] != device) {
        index++;
    }
    return index;
}

/* Goes on to the next payload when the last one is done. */
static int
walk_on(struct dcp_device_stream *stream, struct walk *walk, struct dcp_error *err)
{
    if (walk->has && walk->done_bytes < walk->payload.bytes) {
        return 0;
    }
    walk->done_bytes = 0;
    walk->has = stream->next(stream->next_ctx, &walk->cursor, &walk->payload);
    if (!walk->has) {
        return 0;
    }
    struct dcp_device_bring **bring = &stream->brings[index_of(stream, walk->payload.device)];
    int rc = 0;
    if (*bring == NULL) {
        rc = dcp_device_bring_new(walk->payload.device, DCP_DEVICE_SLAB_BYTES, stream->stats, bring,
                                  err);
    }
    return rc == 0 ? dcp_device_bring_form(*bring, &walk->payload, &walk->form, err) : rc;
}

/* ---- segments ---- */

/* Fills an empty segment with what comes next of one device, and records the event behind it. */
static int
fill_segment(struct dcp_device_stream *stream, struct segment *segment, struct dcp_error *err)
{
    struct walk *fill = &stream->fill;
    uint64_t room = stream->ring->buffer_bytes;
    int rc = walk_on(stream, fill, err);
    segment->filled_bytes = segment->taken_bytes = 0;
    while (rc == 0 && fill->has) {
        uint64_t n = dcp_min_u64(room, fill->payload.bytes - fill->done_bytes);
        n -= n % fill->payload.item_bytes;
        if (fill->form.way == DCP_DEVICE_GATHER) {
            fill->done_bytes = fill->payload.bytes;
        } else if (n == 0 ||
                   (segment->filled_bytes > 0 && segment->device != fill->payload.device)) {
            break;
        } else {
            segment->device = fill->payload.device;
            stream->running = true;
            rc = dcp_device_bring_put(stream->brings[index_of(stream, segment->device)],
                                      &fill->form, fill->done_bytes, n,
                                      segment->memory + segment->filled_bytes, err);
            segment->filled_bytes += n;
            fill->done_bytes += n;
            room -= n;
        }
        rc = rc == 0 ? walk_on(stream, fill, err) : rc;
    }
    if (rc != 0 || segment->filled_bytes == 0) {
        return rc;
    }
    rc = dcp_device_bring_flush(stream->brings[index_of(stream, segment->device)], err);
    return rc == 0 ? segment->device->record(segment->device->ctx, &segment->event, err) : rc;
}

/* The segment with the next bytes to take; it has arrived. */
static int
need_segment(struct dcp_device_stream *stream, atomic_int *cancel, struct segment **ret_segment,
             struct dcp_error *err)
{
    struct segment *head = &stream->segments[stream->head];
    int rc = 0;
    if (head->taken_bytes == head->filled_bytes) {
        rc = fill_segment(stream, head, err);
        stream->head = (stream->head + 1) % stream->segments_count;
        head = &stream->segments[stream->head];
    }
    if (rc == 0 && head->event != NULL) {
        rc = dcp_device_await(head->device, head->event, cancel, stream->stats, err);
        if (rc == 0) {
            head->device->forget(head->device->ctx, head->event);
            head->event = NULL;
        }
    }
    if (rc == 0 && head->taken_bytes == head->filled_bytes) {
        rc = dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                           "more was taken of the payloads on devices than was brought");
    }
    *ret_segment = head;
    return rc;
}

/* ---- taking ---- */

static int
gather(struct dcp_device_stream *stream, atomic_int *cancel, struct dcp_error *err)
{
    const struct walk *take = &stream->take;
    stream->gathered = dcp_map_huge(take->payload.bytes, err);
    if (stream->gathered == NULL) {
        return DCP_E_NOMEM;
    }
    stream->running = true;
    return dcp_device_gather(take->payload.device, &take->form, stream->gathered, cancel,
                             stream->stats, err);
}

int
dcp_device_stream_peek(struct dcp_device_stream *stream, uint64_t address, uint64_t most,
                       atomic_int *cancel, const uint8_t **ret_at, uint64_t *ret_len,
                       struct dcp_error *err)
{
    struct walk *take = &stream->take;
    struct segment *segment;
    int rc = walk_on(stream, take, err);
    if (rc != 0) {
        return rc;
    }
    if (!take->has || take->payload.address != address) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                             "payloads on devices were taken in another order than they came");
    }
    uint64_t left = dcp_min_u64(take->payload.bytes - take->done_bytes, most);
    if (take->form.way == DCP_DEVICE_GATHER) {
        rc = stream->gathered == NULL ? gather(stream, cancel, err) : 0;
        *ret_at = stream->gathered + take->done_bytes;
        *ret_len = left;
        return rc;
    }
    rc = need_segment(stream, cancel, &segment, err);
    if (rc == 0) {
        *ret_at = segment->memory + segment->taken_bytes;
        *ret_len = dcp_min_u64(left, segment->filled_bytes - segment->taken_bytes);
    }
    return rc;
}

void
dcp_device_stream_take(struct dcp_device_stream *stream, uint64_t len)
{
    struct walk *take = &stream->take;
    DCP_ASSERT(take->has && len <= take->payload.bytes - take->done_bytes);
    take->done_bytes += len;
    if (take->form.way != DCP_DEVICE_GATHER) {
        stream->segments[stream->head].taken_bytes += len;
    } else if (take->done_bytes == take->payload.bytes) {
        dcp_unmap_huge(stream->gathered, take->payload.bytes);
        stream->gathered = NULL;
    }
}

/* ---- begin and end ---- */

int
dcp_device_stream_new(const struct dcp_device_list *devices, dcp_device_next_fn next,
                      const void *ctx, struct dcp_device_stats *stats,
                      struct dcp_device_stream **ret_stream, struct dcp_error *err)
{
    struct dcp_device_stream *stream = dcp_calloc(1, sizeof *stream);
    int rc = 0;
    if (stream != NULL) {
        stream->devices = devices;
        stream->next = next;
        stream->next_ctx = ctx;
        stream->stats = stats;
        stream->brings = dcp_calloc(dcp_max_u64(devices->count, 1), sizeof *stream->brings);
    }
    if (stream == NULL || stream->brings == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the copies of a save");
    }
    rc = rc == 0 ? walk_on(stream, &stream->fill, err) : rc;
    if (rc == 0 && stream->fill.has) {
        rc = dcp_ring_acquire_pinned(devices->items[0], stats, &stream->ring, err);
    }
    if (rc == 0 && stream->fill.has) {
        stream->segments_count = stream->ring->buffers_count;
        for (uint32_t i = 0; rc == 0 && i < stream->segments_count; i++) {
            stream->segments[i].memory = dcp_ring_buffer(stream->ring, i);
            rc = fill_segment(stream, &stream->segments[i], err);
        }
    }
    if (rc != 0) {
        dcp_device_stream_destroy(stream);
        return rc;
    }
    *ret_stream = stream;
    return 0;
}

void
dcp_device_stream_destroy(struct dcp_device_stream *stream)
{
    bool idle = true;
    if (stream == NULL) {
        return;
    }
    if (stream->running) {
        idle = dcp_device_all_idle(stream->devices, NULL);
    }
    for (uint32_t i = 0; i < stream->segments_count; i++) {
        const struct segment *segment = &stream->segments[i];
        if (segment->event != NULL) {
            segment->device->forget(segment->device->ctx, segment->event);
        }
    }
    for (uint32_t i = 0; stream->brings != NULL && i < stream->devices->count; i++) {
        dcp_device_bring_destroy(stream->brings[i]);
    }
    if (idle) {
        /* Else a copy may still write to them, and they are never used again. */
        dcp_unmap_huge(stream->gathered, stream->take.payload.bytes);
        dcp_ring_release(stream->ring);
    }
    dcp_free(stream->brings);
    dcp_free(stream);
}

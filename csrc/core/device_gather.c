/*
 * device_gather.c: payloads that only the host can gather: strided in short runs, on a device
 * without kernels or without memory for a slab, or of more dims than a kernel takes.
 *
 * The memory between the first and the last element is what is copied: boxes whose extent fits one
 * pinned segment, cut along the longest stride, gathered from there.  It brings more than the
 * payload where the tensor has holes, but never one element at a time.  Copies and gathering take
 * turns: this is the way of last resort, and its reason is in the stats.
 *
 * Threads: as struct dcp_device.
 */
#include "device.h"

#include "box.h"

struct gathering {
    const struct dcp_device *device;
    const struct dcp_device_form *form;
    atomic_int *cancel;
    struct dcp_device_stats *stats;
    uint8_t *segment;
    uint64_t segment_bytes;
    int64_t dense[DCP_MAX_DIMS]; /* strides of the row-major image */
};

static uint64_t
magnitude(int64_t v)
{
    return v < 0 ? 0 - (uint64_t)v : (uint64_t)v;
}

/* Of the memory between the first and the last element of a box. */
static uint64_t
extent_bytes(const struct gathering *g, const uint64_t *lengths)
{
    uint64_t bytes = g->form->item_bytes;
    for (uint32_t d = 0; d < g->form->ndim; d++) {
        bytes += (lengths[d] - 1) * magnitude(g->form->strides_bytes[d]);
    }
    return bytes;
}

/* A box that fits the segment; `address` is of its element 0. */
static int
gather_box(const struct gathering *g, const uint64_t *lengths, uint64_t address, uint8_t *host,
           struct dcp_error *err)
{
    const struct dcp_device *device = g->device;
    const struct dcp_device_form *form = g->form;
    uint64_t below = 0, bytes = extent_bytes(g, lengths);
    dcp_device_event *event = NULL;
    for (uint32_t d = 0; d < form->ndim; d++) {
        if (form->strides_bytes[d] < 0) {
            below += (lengths[d] - 1) * magnitude(form->strides_bytes[d]);
        }
    }
    int rc = device->to_host(device->ctx, g->segment, address - below, bytes, err);
    g->stats->copies_count++;
    g->stats->copied_bytes += bytes;
    rc = rc == 0 ? device->record(device->ctx, &event, err) : rc;
    rc = rc == 0 ? dcp_device_await(device, event, g->cancel, g->stats, err) : rc;
    device->forget(device->ctx, event);
    if (rc == 0) {
        dcp_box_copy(host, g->dense, g->segment + below, form->strides_bytes, form->ndim, lengths,
                     form->item_bytes);
    }
    return rc;
}

/* Cuts a box along the dim that spreads it most until its parts fit the segment. */
static int
gather_cut(const struct gathering *g, const uint64_t *lengths, uint64_t address, uint8_t *host,
           struct dcp_error *err)
{
    const struct dcp_device_form *form = g->form;
    uint64_t part[DCP_MAX_DIMS], extent = extent_bytes(g, lengths);
    uint32_t widest = 0;
    int rc = 0;
    if (extent <= g->segment_bytes) {
        return gather_box(g, lengths, address, host, err);
    }
    for (uint32_t d = 0; d < form->ndim; d++) {
        part[d] = lengths[d];
        if ((lengths[d] - 1) * magnitude(form->strides_bytes[d]) >
            (lengths[widest] - 1) * magnitude(form->strides_bytes[widest])) {
            widest = d;
        }
    }
    uint64_t stride = magnitude(form->strides_bytes[widest]);
    uint64_t inner = extent - (lengths[widest] - 1) * stride; /* of one index */
    uint64_t step = inner >= g->segment_bytes ? 1 : (g->segment_bytes - inner) / stride + 1;
    for (uint64_t i = 0; rc == 0 && i < lengths[widest]; i += step) {
        part[widest] = dcp_min_u64(step, lengths[widest] - i);
        rc = gather_cut(g, part, address + i * (uint64_t)form->strides_bytes[widest],
                        host + i * (uint64_t)g->dense[widest], err);
    }
    return rc;
}

int
dcp_device_gather(const struct dcp_device *device, const struct dcp_device_form *form,
                  uint8_t *host, atomic_int *cancel, struct dcp_device_stats *stats,
                  struct dcp_error *err)
{
    struct gathering g = {.device = device, .form = form, .cancel = cancel, .stats = stats};
    struct dcp_ring *ring;
    int rc = dcp_ring_acquire_pinned(device, stats, &ring, err);
    if (rc != 0) {
        return rc;
    }
    g.segment = ring->memory;
    g.segment_bytes = ring->buffer_bytes;
    dcp_box_row_major(form->ndim, form->sizes, form->item_bytes, g.dense);
    rc = gather_cut(&g, form->sizes, form->address, host, err);
    if (rc == 0 || device->wait_idle(device->ctx, NULL) == 0) {
        dcp_ring_release(ring); /* else a copy may still write to it, and it is never used again */
    }
    return rc;
}

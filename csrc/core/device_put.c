/*
 * device_put.c: the pieces of a load, on their way to targets on devices.
 *
 * A piece is made dense, and of the target's element type, in a pinned slot; the slot's memory goes
 * to the device when it is full:
 *     piece -> slot -> target              where the piece is one run of the target: neighbours in
 *                                          the slot that are neighbours there are one copy
 *     piece -> slot -> slab -> target      strided pieces and small ones: the slab mirrors the
 *                                          slot, one copy fills it, a kernel unpacks hundreds
 *     piece -> slot -> runs of the target  without kernels, or without memory for a slab: in the
 *                                          order of the target's memory
 * The host waits only for a slot that it wants to fill again, so reading, converting and copying go
 * on side by side.  A range of a file that a device reads by itself passes by all of this.
 *
 * Bytes are put when the reader delivers them, as into memory of the host.  What is delivered
 * counts before it has arrived; dcp_device_put_finish waits for it, and when anything failed it
 * spoils every target on a device that was touched: which of them the lost copies belonged to
 * nobody knows, and a device that failed holds nothing any more.
 *
 * Memory: a ring of the default shape, 32 MiB, pinned and kept; on each device at most one slab as
 * large as a slot.
 * Threads: one at a time.
 */
#include "device_put.h"

#include <unistd.h>

#include "dcp_convert.h"

/* ---- failures ---- */

void
dcp_put_fail(struct dcp_device_put *put, int code, const struct dcp_error *error)
{
    if (put->code == 0) {
        put->code = code;
        put->error = *error;
    }
}

/* Once nothing is delivered any more. */
static void
spoil_all(const struct dcp_device_put *put)
{
    const struct dcp_read_plan *plan = put->plan;
    for (uint64_t i = 0; plan->delivered != NULL && i < plan->targets_count; i++) {
        if (plan->targets[i].device != 0 &&
            (atomic_load(&plan->delivered[i]) & DCP_TARGET_TOUCHED) != 0) {
            dcp_target_spoil(plan, i);
        }
    }
}

/* ---- pieces ---- */

/* The next elements of a piece: as many as fit the slot, and the slab where a kernel puts them. */
static int
put_some(struct dcp_device_put *put, const struct dcp_put_aim *aim, uint64_t first,
         uint64_t *ret_count, struct dcp_error *err)
{
    bool boxed = aim->form.way == DCP_DEVICE_PACK;
    int rc = 0;
    for (;;) {
        uint64_t align = boxed ? DCP_PUT_ALIGN_BYTES : 1;
        uint64_t from = dcp_align_up(put->used_bytes, align), to = put->ring->buffer_bytes;
        if (boxed && put->boxes_count > 0) {
            to = dcp_min_u64(to, put->packed_from_bytes + put->lane->slab.bytes);
        } else if (boxed) {
            to = dcp_min_u64(to, from + put->lane->slab.bytes);
        }
        uint64_t n = from >= to ? 0 : (to - from) / aim->to_bytes;
        n = dcp_min_u64(n, aim->piece.count - first);
        if (boxed && put->boxes_count == DCP_DEVICE_BOXES) {
            rc = dcp_put_flush_boxes(put, err);
        } else if (n > 0) {
            dcp_put_make_dense(aim, first, n, put->slots[put->current].memory + from);
            put->used_bytes = from + n * aim->to_bytes;
            *ret_count = n;
            if (boxed) {
                dcp_put_box(put, aim, from, first, n);
                return 0;
            }
            return dcp_put_runs(put, aim, from, first, n, err);
        } else if (boxed && put->boxes_count > 0 && to < put->ring->buffer_bytes) {
            rc = dcp_put_flush_boxes(put, err);
        } else {
            struct dcp_put_lane *lane = put->lane;
            rc = dcp_put_end_slot(put, err);
            put->lane = lane;
        }
        if (rc != 0) {
            return rc;
        }
    }
}

static int
put_piece(struct dcp_device_put *put, const struct dcp_piece *piece, struct dcp_put_lane *lane,
          struct dcp_error *err)
{
    struct dcp_put_aim aim;
    int rc = dcp_put_aim_at(put, piece, lane, &aim, err);
    if (rc == 0 && put->lane != lane && put->lane != NULL) {
        rc = dcp_put_end_slot(put, err);
    }
    put->lane = lane;
    for (uint64_t first = 0, n = 0; rc == 0 && first < piece->count; first += n) {
        rc = put_some(put, &aim, first, &n, err);
    }
    return rc;
}

void
dcp_device_put_piece(void *ctx, const struct dcp_piece *piece)
{
    struct dcp_device_put *put = ctx;
    uint64_t index = piece->item->target;
    const struct dcp_target *target = &put->plan->targets[index];
    if (target->device == 0) {
        DCP_ASSERT(put->host != NULL);
        put->host(put->host_ctx, piece);
        return;
    }
    struct dcp_put_lane *lane = &put->lanes[target->device - 1];
    if (put->code == 0) {
        struct dcp_error error;
        dcp_error_clear(&error);
        int rc = put_piece(put, piece, lane, &error);
        if (rc != 0) {
            dcp_put_fail(put, rc, &error);
        }
    }
    if (put->code != 0) {
        dcp_target_spoil(put->plan, index);
    }
}

/* ---- begin and end ---- */

bool
dcp_device_put_can(const struct dcp_device *device, uint8_t from, uint8_t to, uint32_t ndim,
                   const uint64_t *sizes, const int64_t *strides)
{
    struct dcp_device_form form;
    int64_t strides_bytes[DCP_MAX_DIMS];
    uint32_t item_bytes = dcp_dtype_bytes(to);
    uint64_t bytes = item_bytes;
    if (from != to && !dcp_can_convert(from, to)) {
        return false;
    }
    for (uint32_t d = 0; d < ndim; d++) {
        bytes *= sizes[d];
        strides_bytes[d] = strides != NULL ? strides[d] * (int64_t)item_bytes : 0;
    }
    if (bytes == 0) {
        return true;
    }
    struct dcp_device_payload payload = {.device = device,
                                         .bytes = bytes,
                                         .item_bytes = item_bytes,
                                         .ndim = ndim,
                                         .sizes = sizes,
                                         .strides_bytes = strides != NULL ? strides_bytes : NULL};
    dcp_device_form_of(&payload, (device->features & DCP_DEVICE_PACKS) != 0, &form);
    return form.way != DCP_DEVICE_GATHER;
}

static int
check_targets(const struct dcp_read_plan *plan, dcp_piece_fn host,
              const struct dcp_device **ret_any, struct dcp_error *err)
{
    for (uint64_t i = 0; i < plan->targets_count; i++) {
        const struct dcp_target *target = &plan->targets[i];
        uint32_t count = plan->devices == NULL ? 0 : plan->devices->count;
        bool on_device = target->device != 0;
        if ((on_device && (target->device > count || target->kind != DCP_TARGET_PIECES)) ||
            (!on_device && target->kind != DCP_TARGET_MEMORY && host == NULL)) {
            return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                                 "target %llu of a load lies on device %u of %u, and nobody takes "
                                 "its pieces; this is a bug, please report it",
                                 (unsigned long long)i, target->device, count);
        }
        if (on_device) {
            *ret_any = plan->devices->items[target->device - 1];
        }
    }
    return 0;
}

int
dcp_device_put_new(const struct dcp_read_plan *plan, dcp_piece_fn host, void *host_ctx,
                   struct dcp_device_put **ret_put, struct dcp_error *err)
{
    static const struct dcp_device_list none = {NULL, 0};
    const struct dcp_device *any = NULL;
    struct dcp_device_put *put = NULL;
    int rc = check_targets(plan, host, &any, err);
    if (rc != 0) {
        return rc;
    }
    put = dcp_calloc(1, sizeof *put);
    if (put != NULL) {
        dcp_error_clear(&put->error);
        put->pid = (int64_t)getpid();
        put->plan = plan;
        put->host = host;
        put->host_ctx = host_ctx;
        put->devices = plan->devices != NULL ? plan->devices : &none;
        put->lanes = dcp_calloc(dcp_max_u64(put->devices->count, 1), sizeof *put->lanes);
    }
    if (put == NULL || put->lanes == NULL) {
        dcp_free(put);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the copies of a load");
    }
    for (uint32_t i = 0; i < put->devices->count; i++) {
        put->lanes[i].device = put->devices->items[i];
    }
    rc = any == NULL ? 0 : dcp_ring_acquire_pinned(any, &put->stats, &put->ring, err);
    if (rc != 0) {
        dcp_device_put_destroy(put);
        return rc;
    }
    put->slots_count = any == NULL ? 0 : put->ring->buffers_count;
    for (uint32_t i = 0; i < put->slots_count; i++) {
        put->slots[i].memory = dcp_ring_buffer(put->ring, i);
    }
    *ret_put = put;
    return 0;
}

void
dcp_device_put_set_cancel(struct dcp_device_put *put, atomic_int *cancel)
{
    put->cancel = cancel;
}

int
dcp_device_put_finish(struct dcp_device_put *put, atomic_int *cancel, struct dcp_error *err)
{
    struct dcp_error error;
    int rc = put->code;
    put->cancel = cancel;
    dcp_error_clear(&error);
    /* Every slot in turn, the one that is being filled first. */
    for (uint32_t i = 0; rc == 0 && i < put->slots_count; i++) {
        put->current = i == 0 ? put->current : (put->current + 1) % put->slots_count;
        rc = dcp_put_end_slot(put, &error);
    }
    if (rc == 0) {
        put->running = false;
        return 0;
    }
    dcp_put_fail(put, rc, &error);
    spoil_all(put);
    if (err != NULL && err->code == 0) {
        *err = put->error;
    }
    return put->code;
}

void
dcp_device_put_get_stats(const struct dcp_device_put *put, struct dcp_device_stats *ret)
{
    *ret = put->stats;
}

void
dcp_device_put_destroy(struct dcp_device_put *put)
{
    if (put == NULL) {
        return;
    }
    bool ours = put->pid == (int64_t)getpid();
    bool idle = !ours || !put->running || dcp_device_all_idle(put->devices, NULL);
    for (uint32_t i = 0; ours && i < put->slots_count; i++) {
        const struct dcp_put_slot *slot = &put->slots[i];
        if (slot->event != NULL) {
            slot->device->forget(slot->device->ctx, slot->event);
        }
    }
    for (uint32_t i = 0; ours && i < put->devices->count; i++) {
        dcp_device_slab_release(put->lanes[i].device, &put->lanes[i].slab);
    }
    if (idle) {
        dcp_ring_release(put->ring); /* else a copy may still read it, and it is never used again */
    }
    dcp_free(put->lanes);
    dcp_free(put);
}

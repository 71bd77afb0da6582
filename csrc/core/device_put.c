/*
 * device_put.c: the pieces of a load, on their way to targets on devices.
 *
 * A piece is made dense, and of the target's element type, in a pinned slot; the slot's memory goes
 * to the device when it is full:
 *     piece -> slot -> target              where the piece is one run of the target: neighbours in
 *                                          the slot that are neighbours there are one copy
 *     piece -> slot -> slab -> target      strided pieces and small ones: the slab mirrors the
 *                                          slot, one copy fills it, a kernel unpacks hundreds
 *     piece -> slot -> runs of the target  without kernels, or without memory for a slab
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
#include "device.h"

#include <string.h>

#include "box.h"
#include "dcp_convert.h"

/* Where pieces begin in a slot. */
#define PLACE_ALIGN_BYTES 16u
/* Strided and of another dtype: gathered in parts that stay in the cache, then converted. */
enum { CONVERT_BYTES = 32 << 10 };

struct slot {
    uint8_t *memory;
    const struct dcp_device *device;
    dcp_device_event *event; /* of the copies out of it; NULL: it is free */
};

/* What is kept of one device. */
struct lane {
    const struct dcp_device *device;
    struct dcp_device_slab slab;
};

struct dcp_device_put {
    const struct dcp_read_plan *plan; /* borrows */
    dcp_piece_fn host;
    void *host_ctx;
    const struct dcp_device_list *devices;
    atomic_int *cancel;
    struct lane *lanes; /* owned; one per device */
    struct dcp_ring *ring;
    struct slot slots[DCP_RING_MOST_BUFFERS];
    uint32_t slots_count, current; /* the slot that is being filled */
    struct lane *lane;             /* whose pieces are in it; NULL while it is empty */
    uint64_t used_bytes;           /* of the slot */
    /* A run of the slot that goes to a run of the target; 0 bytes: there is none. */
    uint64_t run_from_bytes, run_bytes, run_address;
    /* A range of the slot that is unpacked from the slab: what the boxes lie in. */
    uint64_t packed_from_bytes, packed_to_bytes;
    uint32_t boxes_count;
    struct dcp_device_box boxes[DCP_DEVICE_BOXES];
    int code; /* of the first failure */
    struct dcp_error error;
    struct dcp_device_stats stats;
    bool running; /* something was put on a stream and not waited for */
};

/* Where the elements of a piece go. */
struct aim {
    uint64_t address; /* of the piece's first element */
    uint8_t from, to; /* dtypes */
    uint32_t from_bytes, to_bytes;
    struct dcp_device_form form; /* of the target's memory */
};

/* ---- failures ---- */

static void
fail(struct dcp_device_put *put, int code, const struct dcp_error *error)
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

/* ---- slots ---- */

static int
copy_to_device(struct dcp_device_put *put, uint64_t address, uint64_t from, uint64_t bytes,
               struct dcp_error *err)
{
    const struct dcp_device *device = put->lane->device;
    put->running = true;
    put->stats.copies_count++;
    put->stats.copied_bytes += bytes;
    return device->to_device(device->ctx, address, put->slots[put->current].memory + from, bytes,
                             err);
}

static int
flush_run(struct dcp_device_put *put, struct dcp_error *err)
{
    uint64_t bytes = put->run_bytes;
    put->run_bytes = 0;
    return bytes == 0 ? 0 : copy_to_device(put, put->run_address, put->run_from_bytes, bytes, err);
}

static int
flush_boxes(struct dcp_device_put *put, struct dcp_error *err)
{
    const struct dcp_device *device;
    uint64_t bytes = put->packed_to_bytes - put->packed_from_bytes;
    uint32_t count = put->boxes_count;
    put->boxes_count = 0;
    if (count == 0) {
        return 0;
    }
    device = put->lane->device;
    put->stats.packed_count += count;
    for (uint32_t i = 0; i < count; i++) {
        put->stats.packed_bytes += put->boxes[i].count * put->boxes[i].item_bytes;
    }
    int rc = copy_to_device(put, put->lane->slab.address, put->packed_from_bytes, bytes, err);
    return rc == 0 ? device->unpack(device->ctx, put->boxes, count, err) : rc;
}

/* All of the slot is on its way; goes on to the next one, once that is free. */
static int
end_slot(struct dcp_device_put *put, struct dcp_error *err)
{
    struct slot *slot = &put->slots[put->current];
    int rc = 0;
    if (put->used_bytes > 0) {
        const struct dcp_device *device = put->lane->device;
        rc = flush_run(put, err);
        rc = rc == 0 ? flush_boxes(put, err) : rc;
        slot->device = device;
        rc = rc == 0 ? device->record(device->ctx, &slot->event, err) : rc;
        put->current = (put->current + 1) % put->slots_count;
        put->lane = NULL;
        put->used_bytes = 0;
        slot = &put->slots[put->current];
    }
    if (rc == 0 && slot->event != NULL) {
        rc = dcp_device_await(slot->device, slot->event, put->cancel, &put->stats, err);
        slot->device->forget(slot->device->ctx, slot->event);
        slot->event = NULL;
    }
    return rc;
}

/* ---- pieces ---- */

/* Elements [first, first + count) of the piece's row-major image, dense and of the target's dtype,
 * to `to`. */
static void
make_dense(const struct dcp_piece *piece, const struct aim *aim, uint64_t first, uint64_t count,
           uint8_t *to)
{
    int64_t dense[DCP_MAX_DIMS];
    if (dcp_box_is_row_major(piece->ndim, piece->lengths, aim->from_bytes, piece->bytes_strides)) {
        const uint8_t *from = piece->bytes + first * aim->from_bytes;
        if (aim->from == aim->to) {
            memcpy(to, from, count * aim->to_bytes);
        } else {
            dcp_convert(to, aim->to, from, aim->from, count);
        }
        return;
    }
    dcp_box_row_major(piece->ndim, piece->lengths, aim->from_bytes, dense);
    struct dcp_box_side source = {0, piece->bytes_strides};
    uint8_t part[CONVERT_BYTES];
    uint64_t step = aim->from == aim->to ? count : CONVERT_BYTES / aim->from_bytes;
    for (uint64_t done = 0; done < count; done += step) {
        uint64_t n = dcp_min_u64(step, count - done), at = first + done;
        struct dcp_box_side side = {-(int64_t)(at * aim->from_bytes), dense};
        dcp_box_copy_range(aim->from == aim->to ? to : part, &side, piece->bytes, &source,
                           piece->ndim, piece->lengths, aim->from_bytes, at, n);
        if (aim->from != aim->to) {
            dcp_convert(to + done * aim->to_bytes, aim->to, part, aim->from, n);
        }
    }
}

/* A run of the target, at `from` of the slot. */
static int
put_run(struct dcp_device_put *put, uint64_t from, uint64_t bytes, uint64_t address,
        struct dcp_error *err)
{
    if (put->run_bytes > 0 && from == put->run_from_bytes + put->run_bytes &&
        address == put->run_address + put->run_bytes) {
        put->run_bytes += bytes;
        return 0;
    }
    int rc = flush_run(put, err);
    put->run_from_bytes = from;
    put->run_bytes = bytes;
    put->run_address = address;
    return rc;
}

/* Elements that lie at `from` of the slot, run by run of the target. */
static int
put_runs(struct dcp_device_put *put, const struct aim *aim, uint64_t from, uint64_t first,
         uint64_t count, struct dcp_error *err)
{
    uint64_t at = first * aim->to_bytes, left = count * aim->to_bytes;
    int rc = 0;
    while (rc == 0 && left > 0) {
        uint64_t skip = at % aim->form.run_bytes;
        uint64_t n = dcp_min_u64(left, aim->form.run_bytes - skip);
        rc = put_run(put, from, n, dcp_device_form_run(&aim->form, at / aim->form.run_bytes) + skip,
                     err);
        from += n;
        at += n;
        left -= n;
    }
    return rc;
}

/* Elements that lie at `from` of the slot, by a kernel.  The slab has room. */
static void
put_box(struct dcp_device_put *put, const struct aim *aim, uint64_t from, uint64_t first,
        uint64_t count)
{
    if (put->boxes_count == 0) {
        put->packed_from_bytes = from;
    }
    put->boxes[put->boxes_count++] = dcp_device_form_box(
        &aim->form, put->lane->slab.address + (from - put->packed_from_bytes), first, count);
    put->packed_to_bytes = from + count * aim->to_bytes;
}

/* The next elements of a piece: as many as fit the slot, and the slab where a kernel puts them. */
static int
put_some(struct dcp_device_put *put, const struct dcp_piece *piece, const struct aim *aim,
         uint64_t first, uint64_t *ret_count, struct dcp_error *err)
{
    bool boxed = aim->form.way == DCP_DEVICE_PACK;
    int rc = 0;
    for (;;) {
        uint64_t align = boxed ? PLACE_ALIGN_BYTES : 1;
        uint64_t from = dcp_align_up(put->used_bytes, align), to = put->ring->buffer_bytes;
        if (boxed && put->boxes_count > 0) {
            to = dcp_min_u64(to, put->packed_from_bytes + put->lane->slab.bytes);
        } else if (boxed) {
            to = dcp_min_u64(to, from + put->lane->slab.bytes);
        }
        uint64_t n = from >= to ? 0 : (to - from) / aim->to_bytes;
        n = dcp_min_u64(n, piece->count - first);
        if (boxed && put->boxes_count == DCP_DEVICE_BOXES) {
            rc = flush_boxes(put, err);
        } else if (n > 0) {
            make_dense(piece, aim, first, n, put->slots[put->current].memory + from);
            put->used_bytes = from + n * aim->to_bytes;
            *ret_count = n;
            if (boxed) {
                put_box(put, aim, from, first, n);
                return 0;
            }
            return put_runs(put, aim, from, first, n, err);
        } else if (boxed && put->boxes_count > 0 && to < put->ring->buffer_bytes) {
            rc = flush_boxes(put, err);
        } else {
            struct lane *lane = put->lane;
            rc = end_slot(put, err);
            put->lane = lane;
        }
        if (rc != 0) {
            return rc;
        }
    }
}

static int
aim_at(struct dcp_device_put *put, const struct dcp_piece *piece, struct lane *lane,
       struct aim *aim, struct dcp_error *err)
{
    const struct dcp_target *target = &put->plan->targets[piece->item->target];
    int64_t strides_bytes[DCP_MAX_DIMS];
    aim->from = put->plan->md->entries[target->entry].dtype;
    aim->to = target->dtype != DCP_DTYPE_NONE ? target->dtype : aim->from;
    aim->from_bytes = dcp_dtype_bytes(aim->from);
    aim->to_bytes = dcp_dtype_bytes(aim->to);
    for (uint32_t d = 0; d < piece->ndim; d++) {
        strides_bytes[d] = piece->strides[d] * (int64_t)aim->to_bytes;
    }
    struct dcp_device_payload payload = {.device = lane->device,
                                         .address = (uint64_t)(uintptr_t)target->data +
                                                    (uint64_t)(piece->at * aim->to_bytes),
                                         .bytes = piece->count * aim->to_bytes,
                                         .item_bytes = aim->to_bytes,
                                         .ndim = piece->ndim,
                                         .sizes = piece->lengths,
                                         .strides_bytes = piece->ndim == 0 ? NULL : strides_bytes};
    dcp_device_form_of(&payload, true, &aim->form);
    int rc = aim->form.way != DCP_DEVICE_PACK
                 ? 0
                 : dcp_device_slab_need(lane->device, put->ring->buffer_bytes, &lane->slab,
                                        &put->stats, err);
    /* Without a slab runs are copied however short they are: whether they are worth it was asked
     * when the load was planned. */
    if (aim->form.way == DCP_DEVICE_GATHER || lane->slab.bytes == 0) {
        aim->form.way = DCP_DEVICE_RUNS;
    }
    return rc;
}

static int
put_piece(struct dcp_device_put *put, const struct dcp_piece *piece, struct lane *lane,
          struct dcp_error *err)
{
    struct aim aim;
    int rc = aim_at(put, piece, lane, &aim, err);
    if (rc == 0 && put->lane != lane && put->lane != NULL) {
        rc = end_slot(put, err);
    }
    put->lane = lane;
    for (uint64_t first = 0, n = 0; rc == 0 && first < piece->count; first += n) {
        rc = put_some(put, piece, &aim, first, &n, err);
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
    struct lane *lane = &put->lanes[target->device - 1];
    if (put->code == 0) {
        struct dcp_error error;
        dcp_error_clear(&error);
        int rc = put_piece(put, piece, lane, &error);
        if (rc != 0) {
            fail(put, rc, &error);
        }
    }
    if (put->code != 0) {
        dcp_target_spoil(put->plan, index);
    }
}

/* ---- ranges of files ---- */

/* Until all that was put on the device's stream so far has run. */
static int
wait_for_stream(struct dcp_device_put *put, const struct dcp_device *device, struct dcp_error *err)
{
    dcp_device_event *event = NULL;
    int rc = device->record(device->ctx, &event, err);
    rc = rc == 0 ? dcp_device_await(device, event, put->cancel, &put->stats, err) : rc;
    device->forget(device->ctx, event);
    return rc;
}

/* The CRCs of the blocks at `address`, to the slot that is being filled, behind what is in it. */
static int
sum_blocks(struct dcp_device_put *put, const struct dcp_device *device, uint64_t address,
           uint64_t bytes, const uint32_t **ret_crcs, struct dcp_error *err)
{
    uint64_t blocks = bytes / DCP_BLOCK_BYTES + (bytes % DCP_BLOCK_BYTES != 0);
    uint64_t need = blocks * sizeof(uint32_t), room = put->ring->buffer_bytes;
    uint64_t at = dcp_align_up(put->used_bytes, PLACE_ALIGN_BYTES);
    int rc = 0;
    DCP_ASSERT(need <= room);
    if (at > room - need) {
        at = 0;
        rc = end_slot(put, err);
    }
    uint32_t *crcs = (uint32_t *)(void *)(put->slots[put->current].memory + at);
    put->running = true;
    rc = rc == 0 ? device->checksum(device->ctx, address, bytes, crcs, err) : rc;
    rc = rc == 0 ? wait_for_stream(put, device, err) : rc;
    *ret_crcs = crcs;
    return rc;
}

static int
read_range(struct dcp_device_put *put, const struct dcp_device *device,
           const struct dcp_file_range *range, const uint32_t **ret_crcs, struct dcp_error *err)
{
    const struct dcp_target *target = &put->plan->targets[range->item->target];
    uint64_t address = (uint64_t)(uintptr_t)target->data + range->at_bytes;
    bool sums = (device->features & DCP_DEVICE_CHECKSUMS) != 0 && put->ring->pinned_by != NULL;
    bool reads = (device->features & DCP_DEVICE_READS_FILES) != 0;
    if (!reads || (ret_crcs != NULL && !sums)) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL, "%s:%d cannot %s", device->kind,
                             (int)device->index,
                             reads ? "verify what it reads from files" : "read files");
    }
    /* What the caller's streams hold comes first.  This wait can be cancelled, the one in read_file
     * cannot. */
    int rc = wait_for_stream(put, device, err);
    rc = rc == 0 ? device->read_file(device->ctx, range->fd, range->offset_bytes, address,
                                     range->bytes, err)
                 : rc;
    return rc == 0 && ret_crcs != NULL
               ? sum_blocks(put, device, address, range->bytes, ret_crcs, err)
               : rc;
}

int
dcp_device_put_range(void *ctx, const struct dcp_file_range *range, const uint32_t **ret_crcs,
                     struct dcp_error *err)
{
    struct dcp_device_put *put = ctx;
    const struct dcp_target *target = &put->plan->targets[range->item->target];
    if (put->code != 0) {
        *err = put->error;
        return put->code;
    }
    int rc = read_range(put, put->lanes[target->device - 1].device, range, ret_crcs, err);
    if (rc == DCP_E_UNSUPPORTED) {
        dcp_device_because(&put->stats, "%s", err->message);
    } else if (rc != 0) {
        fail(put, rc, err);
    }
    return rc;
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
        rc = end_slot(put, &error);
    }
    if (rc == 0) {
        put->running = false;
        return 0;
    }
    fail(put, rc, &error);
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
    bool idle = !put->running || dcp_device_all_idle(put->devices, NULL);
    for (uint32_t i = 0; i < put->slots_count; i++) {
        const struct slot *slot = &put->slots[i];
        if (slot->event != NULL) {
            slot->device->forget(slot->device->ctx, slot->event);
        }
    }
    for (uint32_t i = 0; i < put->devices->count; i++) {
        dcp_device_slab_release(put->lanes[i].device, &put->lanes[i].slab);
    }
    if (idle) {
        dcp_ring_release(put->ring); /* else a copy may still read it, and it is never used again */
    }
    dcp_free(put->lanes);
    dcp_free(put);
}

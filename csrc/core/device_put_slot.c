/*
 * device_put_slot.c: slots of a load, on their way to targets on devices.
 *
 * A slot holds dense elements.  They go in copies of runs, neighbours in the slot that are
 * neighbours in the target as one; in copies of many short rows that lie evenly apart; or, as one
 * copy to the slab, to a kernel that takes hundreds of boxes apart.
 *
 * Threads: as device_put.c.
 */
#include "device_put.h"

/* Longer runs are worth a copy each. */
#define ROW_MOST_BYTES (16u << 10)

/* Before each copy: of a target in short runs there may be many. */
static int
begin_copy(struct dcp_device_put *put, uint64_t bytes, struct dcp_error *err)
{
    if (put->cancel != NULL && atomic_load_explicit(put->cancel, memory_order_relaxed) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the load was cancelled");
    }
    put->running = true;
    put->stats.copies_count++;
    put->stats.copied_bytes += bytes;
    return 0;
}

static int
copy_to_device(struct dcp_device_put *put, uint64_t address, uint64_t from, uint64_t bytes,
               struct dcp_error *err)
{
    const struct dcp_device *device = put->lane->device;
    int rc = begin_copy(put, bytes, err);
    return rc == 0 ? device->to_device(device->ctx, address, put->slots[put->current].memory + from,
                                       bytes, err)
                   : rc;
}

static int
flush_run(struct dcp_device_put *put, struct dcp_error *err)
{
    uint64_t bytes = put->run_bytes;
    put->run_bytes = 0;
    return bytes == 0 ? 0 : copy_to_device(put, put->run_address, put->run_from_bytes, bytes, err);
}

int
dcp_put_flush_boxes(struct dcp_device_put *put, struct dcp_error *err)
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

/* `rows` rows of the slot, dense there and `pitch_bytes` apart in the target. */
static int
put_rows(struct dcp_device_put *put, uint64_t from, uint64_t row_bytes, uint64_t rows,
         uint64_t address, uint64_t pitch_bytes, struct dcp_error *err)
{
    const struct dcp_device *device = put->lane->device;
    int rc = flush_run(put, err);
    rc = rc == 0 ? begin_copy(put, rows * row_bytes, err) : rc;
    return rc == 0 ? device->to_device_rows(device->ctx, address, pitch_bytes,
                                            put->slots[put->current].memory + from, row_bytes, rows,
                                            err)
                   : rc;
}

/* How many runs from number `index` on are rows of one copy, at most `most`; 1: they are copied one
 * by one. */
static uint64_t
rows_from(const struct dcp_device_form *form, uint64_t index, uint64_t most, uint64_t *ret_pitch)
{
    uint32_t outer = form->run_bytes > form->item_bytes ? 1 : 0;
    if (form->run_bytes >= ROW_MOST_BYTES || form->ndim <= outer) {
        return 1;
    }
    uint64_t size = form->sizes[form->ndim - 1 - outer];
    int64_t pitch = form->strides_bytes[form->ndim - 1 - outer];
    if (pitch < (int64_t)form->run_bytes || pitch > DCP_DEVICE_PITCH_BYTES) {
        return 1;
    }
    *ret_pitch = (uint64_t)pitch;
    return dcp_min_u64(most, size - index % size);
}

int
dcp_put_runs(struct dcp_device_put *put, const struct dcp_put_aim *aim, uint64_t from_bytes,
             uint64_t first, uint64_t count, struct dcp_error *err)
{
    const struct dcp_device_form *form = &aim->form;
    uint64_t at = first * aim->to_bytes, left = count * aim->to_bytes;
    int rc = 0;
    while (rc == 0 && left > 0) {
        uint64_t run = form->run_bytes, index = at / run, skip = at % run, pitch = 0, n;
        uint64_t address = dcp_device_form_run(form, index) + skip;
        uint64_t rows = skip == 0 && left >= run ? rows_from(form, index, left / run, &pitch) : 1;
        if (rows > 1) {
            n = rows * run;
            rc = put_rows(put, from_bytes, run, rows, address, pitch, err);
        } else {
            n = dcp_min_u64(left, run - skip);
            rc = put_run(put, from_bytes, n, address, err);
        }
        from_bytes += n;
        at += n;
        left -= n;
    }
    return rc;
}

void
dcp_put_box(struct dcp_device_put *put, const struct dcp_put_aim *aim, uint64_t from,
            uint64_t first, uint64_t count)
{
    if (put->boxes_count == 0) {
        put->packed_from_bytes = from;
    }
    put->boxes[put->boxes_count++] = dcp_device_form_box(
        &aim->form, put->lane->slab.address + (from - put->packed_from_bytes), first, count);
    put->packed_to_bytes = from + count * aim->to_bytes;
}

int
dcp_put_end_slot(struct dcp_device_put *put, struct dcp_error *err)
{
    struct dcp_put_slot *slot = &put->slots[put->current];
    int rc = 0;
    if (put->used_bytes > 0) {
        const struct dcp_device *device = put->lane->device;
        rc = flush_run(put, err);
        rc = rc == 0 ? dcp_put_flush_boxes(put, err) : rc;
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

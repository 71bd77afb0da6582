/*
 * device_put_aim.c: in which order the elements of a piece go to their target, and how.
 *
 * A kernel takes them in the order of the piece.  Without one, or without memory for its slab, the
 * host turns them into the order of the target's memory first: then a target that is transposed is
 * one run, as it lies there, and what stays in short runs has as many of them evenly apart as can
 * be, which are one copy.  So no target is copied element by element.
 *
 * Threads: as device_put.c.
 */
#include "device_put.h"

#include <string.h>

#include "box.h"
#include "dcp_convert.h"

/* Strided and of another dtype: gathered in parts that stay in the cache, then converted. */
enum { CONVERT_BYTES = 32 << 10 };

/* ---- order ---- */

static uint64_t
distance(const struct dcp_piece *piece, uint32_t dim)
{
    int64_t stride = piece->strides[dim];
    if (piece->lengths[dim] == 1) {
        return UINT64_MAX; /* whatever it is; first of all it is in nobody's way */
    }
    return stride < 0 ? 0 - (uint64_t)stride : (uint64_t)stride;
}

/* Where the run at the end of the dims begins. */
static uint32_t
find_run(const struct dcp_piece *piece, const uint32_t *order)
{
    uint64_t next = 1;
    uint32_t run = piece->ndim;
    while (run > 0 && distance(piece, order[run - 1]) == next) {
        next *= piece->lengths[order[--run]];
    }
    return run;
}

/* Where the dims that lie evenly apart with dim `from` end: as one they are rows. */
static uint32_t
find_even(const struct dcp_piece *piece, const uint32_t *order, uint32_t from, uint32_t end)
{
    uint32_t to = from + 1;
    while (to < end && piece->strides[order[to - 1]] ==
                           piece->strides[order[to]] * (int64_t)piece->lengths[order[to]]) {
        to++;
    }
    return to;
}

/* By falling strides of the target; before the run the dims that make the most rows. */
static void
order_dims(const struct dcp_piece *piece, uint32_t *order)
{
    uint32_t from = 0, to = 0, kept[DCP_MAX_DIMS];
    uint64_t most = 0;
    for (uint32_t d = 0; d < piece->ndim; d++) {
        uint32_t at = d;
        for (; at > 0 && distance(piece, order[at - 1]) < distance(piece, d); at--) {
            order[at] = order[at - 1];
        }
        order[at] = d;
    }
    uint32_t run = find_run(piece, order);
    for (uint32_t d = 0, end; d < run; d = end) {
        uint64_t rows = 1;
        end = find_even(piece, order, d, run);
        for (uint32_t i = d; i < end; i++) {
            rows *= piece->lengths[order[i]];
        }
        if (rows >= most) {
            most = rows;
            from = d;
            to = end;
        }
    }
    memcpy(kept, order + from, (to - from) * sizeof *order);
    memmove(order + from, order + to, (run - to) * sizeof *order);
    memcpy(order + run - (to - from), kept, (to - from) * sizeof *order);
}

/* ---- aims ---- */

static void
set_order(struct dcp_put_aim *aim, const struct dcp_piece *piece, const uint32_t *order)
{
    aim->piece = *piece;
    for (uint32_t d = 0; d < piece->ndim; d++) {
        uint32_t from = order == NULL ? d : order[d];
        aim->lengths[d] = piece->lengths[from];
        aim->bytes_strides[d] = piece->bytes_strides[from];
        aim->strides[d] = piece->strides[from];
    }
    aim->piece.lengths = aim->lengths;
    aim->piece.bytes_strides = aim->bytes_strides;
    aim->piece.strides = aim->strides;
}

static void
set_form(struct dcp_put_aim *aim, const struct dcp_target *target, const struct dcp_device *device)
{
    int64_t strides_bytes[DCP_MAX_DIMS];
    for (uint32_t d = 0; d < aim->piece.ndim; d++) {
        strides_bytes[d] = aim->strides[d] * (int64_t)aim->to_bytes;
    }
    struct dcp_device_payload payload = {
        .device = device,
        .address = (uint64_t)(uintptr_t)target->data + (uint64_t)(aim->piece.at * aim->to_bytes),
        .bytes = aim->piece.count * aim->to_bytes,
        .item_bytes = aim->to_bytes,
        .ndim = aim->piece.ndim,
        .sizes = aim->lengths,
        .strides_bytes = aim->piece.ndim == 0 ? NULL : strides_bytes};
    dcp_device_form_of(&payload, true, &aim->form);
}

int
dcp_put_aim_at(struct dcp_device_put *put, const struct dcp_piece *piece, struct dcp_put_lane *lane,
               struct dcp_put_aim *aim, struct dcp_error *err)
{
    const struct dcp_target *target = &put->plan->targets[piece->item->target];
    uint32_t order[DCP_MAX_DIMS];
    aim->from = put->plan->md->entries[target->entry].dtype;
    aim->to = target->dtype != DCP_DTYPE_NONE ? target->dtype : aim->from;
    aim->from_bytes = dcp_dtype_bytes(aim->from);
    aim->to_bytes = dcp_dtype_bytes(aim->to);
    set_order(aim, piece, NULL);
    set_form(aim, target, lane->device);
    int rc = aim->form.way != DCP_DEVICE_PACK
                 ? 0
                 : dcp_device_slab_need(lane->device, put->ring->buffer_bytes, &lane->slab,
                                        &put->stats, err);
    if (aim->form.way != DCP_DEVICE_PACK || lane->slab.bytes == 0) {
        order_dims(piece, order);
        set_order(aim, piece, order);
        set_form(aim, target, lane->device);
        aim->form.way = DCP_DEVICE_RUNS;
    }
    return rc;
}

/* ---- elements ---- */

void
dcp_put_make_dense(const struct dcp_put_aim *aim, uint64_t first, uint64_t count, uint8_t *to)
{
    const struct dcp_piece *piece = &aim->piece;
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

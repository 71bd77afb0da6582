/*
 * read_put.c: puts what was read of a payload where it belongs.
 *
 * Three ways.  Memory of the saved dtype gets a strided copy.  Memory of another dtype gets it with
 * a conversion between: straight from the payload into the target where both are one run, else
 * through two small buffers that stay in the cache.  What only torch can write (other devices,
 * subclasses, lazy conjugates, dtypes that dcp_convert.h does not know) is cut into boxes and
 * handed over; no buffer is needed, for a piece says where its elements lie in the payload.
 *
 * Threads: no state; on_piece is called on the calling thread.
 */
#include <string.h>

#include "box.h"
#include "dcp_convert.h"
#include "read_box.h"

/* Each of two buffers on the stack, for when one side is no run.  Several rows fit, so that a
 * transposed target is written in runs; both stay in the second level of the cache. */
enum { CONVERT_BYTES = 32 << 10 };

/* Where the elements of an overlap come from. */
struct source {
    const uint8_t *base;
    struct dcp_box_side side;
    const uint8_t *run; /* the first element that is put, when all of them are one run; or NULL */
};

/* ---- conversion ---- */

static void
convert_elements(const struct dcp_read_box *box, const struct source *source, uint64_t first,
                 uint64_t count)
{
    uint8_t *run = dcp_read_box_target_run(box, first, count);
    if (run != NULL && source->run != NULL) {
        dcp_convert(run, box->target_dtype, source->run, box->dtype, count);
        return;
    }
    uint8_t saved[CONVERT_BYTES], made[CONVERT_BYTES];
    uint64_t step = CONVERT_BYTES / dcp_max_u64(source->run != NULL ? 1 : box->item_bytes,
                                                run != NULL ? 1 : box->target_item_bytes);
    int64_t dense[DCP_MAX_DIMS];
    for (uint64_t done = 0; done < count; done += step) {
        uint64_t n = dcp_min_u64(step, count - done), at = first + done;
        const uint8_t *from = saved;
        uint8_t *to = run != NULL ? run + done * box->target_item_bytes : made;
        if (source->run != NULL) {
            from = source->run + done * box->item_bytes;
        } else {
            dcp_box_row_major(box->ndim, box->lengths, box->item_bytes, dense);
            struct dcp_box_side side = {-(int64_t)(at * box->item_bytes), dense};
            dcp_box_copy_range(saved, &side, source->base, &source->side, box->ndim, box->lengths,
                               box->item_bytes, at, n);
        }
        dcp_convert(to, box->target_dtype, from, box->dtype, n);
        if (run == NULL) {
            dcp_box_row_major(box->ndim, box->lengths, box->target_item_bytes, dense);
            struct dcp_box_side target = {0, box->target_strides};
            struct dcp_box_side side = {-(int64_t)(at * box->target_item_bytes), dense};
            dcp_box_copy_range(box->target, &target, made, &side, box->ndim, box->lengths,
                               box->target_item_bytes, at, n);
        }
    }
}

/* ---- handing over ---- */

struct hand_over {
    const struct dcp_read_box *box;
    const struct source *source;
    uint64_t inner[DCP_MAX_DIMS]; /* elements of one index of each dim */
};

/* `n` whole indices of dim `d`; of the last dim's inside, one element. */
static void
hand_box(const struct hand_over *h, uint32_t d, uint64_t n, int64_t at, int64_t bytes_at)
{
    const struct dcp_read_box *box = h->box;
    uint64_t lengths[DCP_MAX_DIMS];
    uint32_t ndim = box->ndim - d;
    struct dcp_piece piece = {
        .item = box->item,
        .ndim = ndim,
        .lengths = lengths,
        .bytes = h->source->base + bytes_at,
        .bytes_strides = h->source->side.strides_bytes + d,
        .at = at,
        .strides = box->target_strides + d,
        .count = ndim > 0 ? n * h->inner[d] : 1,
    };
    for (uint32_t i = 0; i < ndim; i++) {
        lengths[i] = i == 0 ? n : box->lengths[d + i];
    }
    box->plan->on_piece(box->plan->on_piece_ctx, &piece);
}

/* Elements [from, from + count) of what lies inside dims `d` and below: partial indices at both
 * ends, whole ones between, as many at a time as a piece may hold. */
static void
hand_range(const struct hand_over *h, uint32_t d, uint64_t from, uint64_t count, int64_t at,
           int64_t bytes_at)
{
    if (d == h->box->ndim) {
        hand_box(h, d, 1, at, bytes_at);
        return;
    }
    uint64_t inner = h->inner[d];
    uint64_t most = DCP_PIECE_BYTES / (inner * h->box->item_bytes);
    int64_t stride = h->box->target_strides[d], bytes_stride = h->source->side.strides_bytes[d];
    for (uint64_t end = from + count, n; from < end; from += n) {
        uint64_t index = from / inner, skip = from % inner, whole = (end - from) / inner;
        int64_t to = at + (int64_t)index * stride, src = bytes_at + (int64_t)index * bytes_stride;
        if (skip != 0 || whole == 0 || most == 0) {
            n = dcp_min_u64(inner - skip, end - from);
            hand_range(h, d + 1, skip, n, to, src);
        } else {
            whole = dcp_min_u64(whole, most);
            n = whole * inner;
            hand_box(h, d, whole, to, src);
        }
    }
}

static void
hand_over_elements(const struct dcp_read_box *box, const struct source *source, uint64_t first,
                   uint64_t count)
{
    struct hand_over h = {.box = box, .source = source};
    uint64_t inner = 1;
    for (uint32_t d = box->ndim; d > 0; d--) {
        h.inner[d - 1] = inner;
        inner *= box->lengths[d - 1];
    }
    DCP_ASSERT(box->plan->on_piece != NULL && first + count <= inner);
    hand_range(&h, 0, first, count, box->target_at, source->side.origin_bytes);
}

/* ---- all ways ---- */

/* Elements [first, first + count) of the overlap's image. */
static void
put_elements(const struct dcp_read_box *box, const struct source *source, uint64_t first,
             uint64_t count)
{
    if (count == 0) {
        return;
    }
    if (box->handed_over) {
        hand_over_elements(box, source, first, count);
    } else if (box->dtype != box->target_dtype) {
        convert_elements(box, source, first, count);
    } else {
        struct dcp_box_side target = {0, box->target_strides};
        dcp_box_copy_range(box->target, &target, source->base, &source->side, box->ndim,
                           box->lengths, box->item_bytes, first, count);
    }
}

void
dcp_read_box_put(const struct dcp_read_box *box, const uint8_t *bytes, uint64_t from, uint64_t to)
{
    uint8_t *run = from < to ? dcp_read_box_run(box, from, to) : NULL;
    if (run != NULL) {
        memcpy(run, bytes, to - from);
        return;
    }
    uint64_t first = dcp_read_box_below(box, from);
    uint64_t count = dcp_read_box_below(box, to) - first;
    DCP_ASSERT(first % box->item_bytes == 0 && count % box->item_bytes == 0);
    int64_t strides[DCP_MAX_DIMS];
    struct source source = {.base = bytes, .side = {-(int64_t)from, strides}};
    for (uint32_t d = 0; d < box->ndim; d++) {
        strides[d] = (int64_t)box->pitch[d];
        source.side.origin_bytes += (int64_t)(box->offsets[d] * box->pitch[d]);
    }
    source.run = count == to - from ? bytes : NULL;
    put_elements(box, &source, first / box->item_bytes, count / box->item_bytes);
}

void
dcp_read_put_strided(const struct dcp_read_plan *plan, const struct dcp_read_item *item,
                     const struct dcp_record_view *view, const uint8_t *payload)
{
    struct dcp_read_box box;
    int64_t strides[DCP_MAX_DIMS];
    struct source source = {.base = payload, .side = {0, strides}};
    const uint64_t *dims = plan->dims + item->dims;
    dcp_read_box_aim(&box, plan, item, box.target_strides);
    box.ndim = view->ndim;
    source.side.origin_bytes = (int64_t)(view->storage_offset * box.item_bytes);
    uint64_t inner = box.item_bytes;
    for (uint32_t d = box.ndim; d > 0; d--) {
        uint32_t i = d - 1;
        strides[i] = view->strides[i] * (int64_t)box.item_bytes;
        source.side.origin_bytes += (int64_t)dims[i] * strides[i];
        box.lengths[i] = dims[2 * view->ndim + i];
        box.inner[i] = inner;
        inner *= box.lengths[i];
    }
    put_elements(&box, &source, 0, inner / box.item_bytes);
}

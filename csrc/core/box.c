/*
 * box.c: gather, scatter and copy of strided boxes.
 *
 * Every copy becomes a list of dims with two strides each.  Dims of size 1 go, neighbours that are
 * one run on both sides merge, a dim that is dense on both sides joins the element.  What is left
 * is a memcpy, rows, or a transpose (box_transpose.c) under an odometer of outer dims.  A range of
 * the row-major image is cut into at most two partial and one full box per dim.
 *
 * Invariants: the regions do not overlap; no address outside the range's elements is formed.
 * Threads: pure functions of their arguments.
 */
#include "dcp_engine.h"

#include <string.h>

#include "box.h"

struct box_dim {
    uint64_t n;
    int64_t dst, src; /* strides, bytes */
};

struct box {
    struct box_dim dims[DCP_MAX_DIMS];
    uint32_t ndim;
    uint64_t item_bytes; /* grows when dense dims join the element */
    uint8_t *dst;
    const uint8_t *src;
};

static uint64_t
magnitude(int64_t v)
{
    return v < 0 ? 0 - (uint64_t)v : (uint64_t)v;
}

static void
append_dim(struct box *box, uint64_t n, int64_t dst, int64_t src)
{
    if (n == 1) {
        return;
    }
    box->dims[box->ndim++] = (struct box_dim){n, dst, src};
}

/* Neighbours that are one run on both sides become one dim. */
static void
merge_dims(struct box *box)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < box->ndim; i++) {
        const struct box_dim *inner = &box->dims[i];
        struct box_dim *outer = kept > 0 ? &box->dims[kept - 1] : NULL;
        if (outer != NULL && outer->dst == inner->dst * (int64_t)inner->n &&
            outer->src == inner->src * (int64_t)inner->n) {
            *outer = (struct box_dim){outer->n * inner->n, inner->dst, inner->src};
        } else {
            box->dims[kept++] = *inner;
        }
    }
    box->ndim = kept;
}

/* Outer dims first by the destination's stride: a whole box may be copied in any order. */
static void
sort_dims(struct box *box)
{
    for (uint32_t i = 1; i < box->ndim; i++) {
        struct box_dim dim = box->dims[i];
        uint32_t at = i;
        while (at > 0 && magnitude(box->dims[at - 1].dst) < magnitude(dim.dst)) {
            box->dims[at] = box->dims[at - 1];
            at--;
        }
        box->dims[at] = dim;
    }
}

static void
fold_dense(struct box *box)
{
    while (box->ndim > 0) {
        const struct box_dim *last = &box->dims[box->ndim - 1];
        if (last->dst != (int64_t)box->item_bytes || last->src != (int64_t)box->item_bytes) {
            return;
        }
        box->item_bytes *= last->n;
        box->ndim--;
    }
}

#define COPY_ROW(type)                                                                             \
    for (uint64_t i = 0; i < n; i++) {                                                             \
        type v;                                                                                    \
        memcpy(&v, src + (int64_t)i * dim->src, sizeof v);                                         \
        memcpy(dst + (int64_t)i * dim->dst, &v, sizeof v);                                         \
    }                                                                                              \
    return

/* One dim of elements that are not dense on both sides. */
static void
copy_row(uint8_t *dst, const uint8_t *src, const struct box_dim *dim, uint64_t item_bytes)
{
    typedef struct {
        uint64_t lo, hi;
    } item16;
    uint64_t n = dim->n;
    switch (item_bytes) {
    case 1:
        COPY_ROW(uint8_t);
    case 2:
        COPY_ROW(uint16_t);
    case 4:
        COPY_ROW(uint32_t);
    case 8:
        COPY_ROW(uint64_t);
    case 16:
        COPY_ROW(item16);
    default:
        for (uint64_t i = 0; i < n; i++) {
            memcpy(dst + (int64_t)i * dim->dst, src + (int64_t)i * dim->src, item_bytes);
        }
    }
}

/* The dim along which the source is dense while the last dim is dense in the destination; ndim when
 * the copy is no transpose. */
static uint32_t
transposed_dim(const struct box *box)
{
    uint64_t item = box->item_bytes;
    uint32_t last = box->ndim - 1;
    if (item > 16 || (item & (item - 1)) != 0 || box->dims[last].dst != (int64_t)item) {
        return box->ndim;
    }
    for (uint32_t d = 0; d < last; d++) {
        if (box->dims[d].src == (int64_t)item) {
            return d;
        }
    }
    return box->ndim;
}

/* Copies the innermost one or two dims (`row`, and `across` where it is a transpose) for every
 * index of the others. */
static void
copy_odometer(const struct box *box, uint32_t across)
{
    const struct box_dim *row = &box->dims[box->ndim - 1];
    uint64_t at[DCP_MAX_DIMS] = {0};
    uint8_t *dst = box->dst;
    const uint8_t *src = box->src;
    for (;;) {
        if (across < box->ndim) {
            const struct box_dim *col = &box->dims[across];
            dcp_box_transpose(dst, col->dst, src, row->src, row->n, col->n,
                              (uint32_t)box->item_bytes);
        } else {
            copy_row(dst, src, row, box->item_bytes);
        }
        uint32_t d = box->ndim - 1;
        for (;;) {
            if (d == 0) {
                return;
            }
            d--;
            if (d == across) {
                continue;
            }
            const struct box_dim *dim = &box->dims[d];
            if (++at[d] < dim->n) {
                dst += dim->dst;
                src += dim->src;
                break;
            }
            at[d] = 0;
            dst -= (int64_t)(dim->n - 1) * dim->dst;
            src -= (int64_t)(dim->n - 1) * dim->src;
        }
    }
}

/* A whole box in any order.  Takes `box` apart. */
static void
copy_whole(struct box *box)
{
    sort_dims(box);
    merge_dims(box);
    fold_dense(box);
    if (box->ndim == 0) {
        memcpy(box->dst, box->src, box->item_bytes);
        return;
    }
    copy_odometer(box, transposed_dim(box));
}

struct range_copy {
    struct box box;               /* dims in logical order; its pointers are the bases */
    uint64_t inner[DCP_MAX_DIMS]; /* elements of one index of each dim */
};

/* All of dims `d` and below, `n` indices of `d`. */
static void
range_full(const struct range_copy *range, uint32_t d, uint64_t n, int64_t dst_at, int64_t src_at)
{
    struct box part;
    part.ndim = 0;
    part.item_bytes = range->box.item_bytes;
    part.dst = range->box.dst + dst_at;
    part.src = range->box.src + src_at;
    for (uint32_t i = d; i < range->box.ndim; i++) {
        const struct box_dim *dim = &range->box.dims[i];
        append_dim(&part, i == d ? n : dim->n, dim->dst, dim->src);
    }
    copy_whole(&part);
}

static void
range_part(const struct range_copy *range, uint32_t d, uint64_t from, uint64_t count,
           int64_t dst_at, int64_t src_at)
{
    if (d == range->box.ndim) {
        DCP_ASSERT(from == 0 && count == 1);
        range_full(range, d, 1, dst_at, src_at);
        return;
    }
    const struct box_dim *dim = &range->box.dims[d];
    uint64_t inner = range->inner[d];
    uint64_t first = from / inner;
    uint64_t skip = from % inner;
    dst_at += (int64_t)first * dim->dst;
    src_at += (int64_t)first * dim->src;
    if (skip != 0) {
        uint64_t n = dcp_min_u64(inner - skip, count);
        range_part(range, d + 1, skip, n, dst_at, src_at);
        count -= n;
        dst_at += dim->dst;
        src_at += dim->src;
    }
    uint64_t full = count / inner;
    if (full != 0) {
        range_full(range, d, full, dst_at, src_at);
        dst_at += (int64_t)full * dim->dst;
        src_at += (int64_t)full * dim->src;
    }
    if (count % inner != 0) {
        range_part(range, d + 1, 0, count % inner, dst_at, src_at);
    }
}

void
dcp_box_copy_range(uint8_t *dst, const struct dcp_box_side *dst_side, const uint8_t *src,
                   const struct dcp_box_side *src_side, uint32_t ndim, const uint64_t *lengths,
                   uint32_t item_bytes, uint64_t from, uint64_t count)
{
    DCP_ASSERT(ndim <= DCP_MAX_DIMS && item_bytes > 0);
    if (count == 0) {
        return;
    }
    struct range_copy range;
    range.box.ndim = 0;
    range.box.item_bytes = item_bytes;
    range.box.dst = dst;
    range.box.src = src;
    for (uint32_t d = 0; d < ndim; d++) {
        append_dim(&range.box, lengths[d], dst_side->strides_bytes[d], src_side->strides_bytes[d]);
    }
    merge_dims(&range.box);
    uint64_t inner = 1;
    for (uint32_t d = range.box.ndim; d > 0; d--) {
        range.inner[d - 1] = inner;
        inner *= range.box.dims[d - 1].n;
    }
    DCP_ASSERT(from <= inner && count <= inner - from);
    range_part(&range, 0, from, count, dst_side->origin_bytes, src_side->origin_bytes);
}

void
dcp_box_row_major(uint32_t ndim, const uint64_t *sizes, uint32_t item_bytes,
                  int64_t *ret_strides_bytes)
{
    int64_t stride = (int64_t)item_bytes;
    for (uint32_t d = ndim; d > 0; d--) {
        ret_strides_bytes[d - 1] = stride;
        stride *= (int64_t)dcp_max_u64(sizes[d - 1], 1);
    }
}

bool
dcp_box_is_row_major(uint32_t ndim, const uint64_t *sizes, uint32_t item_bytes,
                     const int64_t *strides_bytes)
{
    int64_t dense = (int64_t)item_bytes;
    for (uint32_t d = ndim; strides_bytes != NULL && d > 0; d--) {
        if (sizes[d - 1] != 1 && strides_bytes[d - 1] != dense) {
            return false;
        }
        dense *= (int64_t)dcp_max_u64(sizes[d - 1], 1);
    }
    return true;
}

/* Where element `index` of the row-major image lies. */
static int64_t
element_at(uint32_t ndim, const uint64_t *sizes, const int64_t *strides_bytes, uint64_t index)
{
    int64_t at = 0;
    for (uint32_t d = ndim; d > 0; d--) {
        at += (int64_t)(index % sizes[d - 1]) * strides_bytes[d - 1];
        index /= sizes[d - 1];
    }
    return at;
}

/* Gather (strided -> image) or scatter (image -> strided) of bytes [from, from + len).  Elements
 * that the range cuts are copied by hand. */
static void
copy_image(uint8_t *strided, uint8_t *image, bool gather, uint32_t ndim, const uint64_t *sizes,
           const int64_t *strides_bytes, uint32_t item_bytes, uint64_t from, uint64_t len)
{
    uint64_t done = 0;
    while (done < len) {
        uint64_t element = (from + done) / item_bytes;
        uint64_t skip = (from + done) % item_bytes;
        uint64_t n = (len - done) / item_bytes * item_bytes;
        if (skip != 0 || n == 0) {
            n = dcp_min_u64(item_bytes - skip, len - done);
            uint8_t *at = strided + element_at(ndim, sizes, strides_bytes, element) + (int64_t)skip;
            memcpy(gather ? image + done : at, gather ? at : image + done, n);
        } else {
            int64_t dense[DCP_MAX_DIMS];
            dcp_box_row_major(ndim, sizes, item_bytes, dense);
            struct dcp_box_side image_side = {-(int64_t)from, dense};
            struct dcp_box_side strided_side = {0, strides_bytes};
            dcp_box_copy_range(gather ? image : strided, gather ? &image_side : &strided_side,
                               gather ? strided : image, gather ? &strided_side : &image_side, ndim,
                               sizes, item_bytes, element, n / item_bytes);
        }
        done += n;
    }
}

void
dcp_box_gather(uint8_t *dst, const uint8_t *src, uint32_t ndim, const uint64_t *sizes,
               const int64_t *strides_bytes, uint32_t item_bytes, uint64_t from, uint64_t len)
{
    if (len == 0) {
        return;
    }
    if (strides_bytes == NULL) {
        memcpy(dst, src + from, len);
        return;
    }
    copy_image((uint8_t *)(uintptr_t)src, dst, true, ndim, sizes, strides_bytes, item_bytes, from,
               len);
}

void
dcp_box_scatter(uint8_t *dst, const uint8_t *src, uint32_t ndim, const uint64_t *sizes,
                const int64_t *strides_bytes, uint32_t item_bytes, uint64_t from, uint64_t len)
{
    if (len == 0) {
        return;
    }
    if (strides_bytes == NULL) {
        memcpy(dst + from, src, len);
        return;
    }
    copy_image(dst, (uint8_t *)(uintptr_t)src, false, ndim, sizes, strides_bytes, item_bytes, from,
               len);
}

void
dcp_box_copy(uint8_t *dst, const int64_t *dst_strides_bytes, const uint8_t *src,
             const int64_t *src_strides_bytes, uint32_t ndim, const uint64_t *lengths,
             uint32_t item_bytes)
{
    DCP_ASSERT(ndim <= DCP_MAX_DIMS && item_bytes > 0);
    struct box box;
    box.ndim = 0;
    box.item_bytes = item_bytes;
    box.dst = dst;
    box.src = src;
    for (uint32_t d = 0; d < ndim; d++) {
        if (lengths[d] == 0) {
            return;
        }
        append_dim(&box, lengths[d], dst_strides_bytes[d], src_strides_bytes[d]);
    }
    copy_whole(&box);
}

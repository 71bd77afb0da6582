/*
 * box_cover.h: private: how much of a box a set of smaller boxes in it covers.
 */
#ifndef DCP_BOX_COVER_H
#define DCP_BOX_COVER_H

#include "dcp_common.h"
#include "dcp_error.h"
#include "dcp_limits.h"

/* Boxes that come one by one: do they tile a box, slab by slab, as a grid does in its order?  Each
 * has to begin where the one before it left off. */
struct dcp_tiling {
    const uint64_t *sizes; /* borrows: of the box to tile, no dim of it empty */
    uint32_t ndim;
    bool is_broken;              /* some box was not where it had to be */
    bool is_full;                /* the box is tiled */
    uint64_t at[DCP_MAX_DIMS];   /* where the next one has to begin */
    uint64_t slab[DCP_MAX_DIMS]; /* thickness of the slab in work */
};

static inline void
dcp_tiling_init(struct dcp_tiling *tiling, uint32_t ndim, const uint64_t *sizes)
{
    tiling->sizes = sizes;
    tiling->ndim = ndim;
    tiling->is_broken = tiling->is_full = false;
    for (uint32_t d = 0; d < ndim; d++) {
        tiling->at[d] = 0;
    }
}

/* A box that lies in the one to tile and is not empty. */
static inline void
dcp_tiling_add(struct dcp_tiling *tiling, const uint64_t *offsets, const uint64_t *lengths)
{
    bool begins_slab = true;
    bool fits = !tiling->is_broken && !tiling->is_full;
    for (uint32_t d = tiling->ndim; fits && d-- > 0;) {
        if (begins_slab) {
            tiling->slab[d] = lengths[d];
        }
        fits = offsets[d] == tiling->at[d] && lengths[d] == tiling->slab[d];
        begins_slab = begins_slab && tiling->at[d] == 0;
    }
    tiling->is_broken = !fits;
    tiling->is_full = fits;
    for (uint32_t d = tiling->ndim; tiling->is_full && d-- > 0;) {
        tiling->at[d] += tiling->slab[d];
        if (tiling->at[d] < tiling->sizes[d]) {
            tiling->is_full = false;
        } else {
            tiling->at[d] = 0;
        }
    }
}

/* The boxes tile the box: they meet nowhere and leave no hole.  False: not, or not in this order.
 */
static inline bool
dcp_tiling_holds(const struct dcp_tiling *tiling)
{
    return tiling->is_full && !tiling->is_broken;
}

/* `boxes_count` boxes of 2 * ndim numbers each: offsets, then sizes; none is empty, no end
 * overflows. */
struct dcp_box_list {
    const uint64_t *numbers;
    uint64_t boxes_count;
    uint32_t ndim;
};

/* Elements that lie in at least one of the boxes; they are no more than 2^64. */
int dcp_boxes_union_volume(const struct dcp_box_list *list, uint64_t *ret_volume,
                           struct dcp_error *err) DCP_MUST_CHECK;

#endif

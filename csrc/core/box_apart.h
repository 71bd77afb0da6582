/*
 * box_apart.h: do boxes of one tensor overlap? (private to the core)
 */
#ifndef DCP_CORE_BOX_APART_H
#define DCP_CORE_BOX_APART_H

#include "dcp_common.h"

/* One box, and how it lies along the dimension that is looked at. */
struct dcp_box_row {
    const uint64_t *box; /* borrows: offsets, then sizes */
    uint64_t start, end; /* set by dcp_boxes_look_along */
    uint32_t index;      /* the caller's; breaks ties */
};

/* As torch tells it: an empty box strictly inside another one overlaps it. */
static inline bool
dcp_boxes_overlap(const uint64_t *a, const uint64_t *b, uint32_t ndim)
{
    for (uint32_t d = 0; d < ndim; d++) {
        if (a[d] >= b[d] + b[ndim + d] || b[d] >= a[d] + a[ndim + d]) {
            return false;
        }
    }
    return true;
}

/* Sets start and end of all rows for dimension `d`; true when a plane across it may part them. */
bool dcp_boxes_look_along(struct dcp_box_row *rows, uint32_t count, uint32_t ndim, uint32_t d);

/* True when planes part all boxes from each other, so no two overlap.  False when two overlap, or
 * when this way does not tell.  Reorders the rows; only `box` must be set. */
bool dcp_boxes_fall_apart(struct dcp_box_row *rows, uint32_t count, uint32_t ndim);

#endif

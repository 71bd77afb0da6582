/*
 * box_apart.c: tells that the boxes of a tensor do not overlap, by cutting them apart.
 *
 * Boxes are cut along a dimension into groups that do not reach into each other, each group along
 * another dimension, and so on, until single boxes are left.  Boxes that fall apart do not overlap,
 * and what sharding makes does fall apart: grids, uneven grids, bricks, meshes inside meshes, in
 * any order, in O(dims * n log n).  A pinwheel does not, nor do boxes that overlap: there the
 * caller has to compare pairs.
 *
 * Threads: no state.
 */
#include "box_apart.h"

#include <stdlib.h>

/* Cuts inside cuts before we give up; real meshes have a handful of dimensions. */
enum { MAX_CUTS = 64 };

static int
compare_starts(const void *left, const void *right)
{
    const struct dcp_box_row *a = left, *b = right;
    if (a->start != b->start) {
        return a->start < b->start ? -1 : 1;
    }
    return a->end < b->end ? -1 : a->end > b->end;
}

bool
dcp_boxes_look_along(struct dcp_box_row *rows, uint32_t count, uint32_t ndim, uint32_t d)
{
    uint64_t last_start = 0, first_end = UINT64_MAX;
    for (uint32_t i = 0; i < count; i++) {
        rows[i].start = rows[i].box[d];
        rows[i].end = rows[i].box[d] + rows[i].box[ndim + d];
        last_start = dcp_max_u64(last_start, rows[i].start);
        first_end = dcp_min_u64(first_end, rows[i].end);
    }
    return first_end <= last_start;
}

/* Rows (sorted along a dimension) that no plane across it parts from the first one. */
static uint32_t
group_length(const struct dcp_box_row *rows, uint32_t count)
{
    uint64_t end = rows[0].end;
    uint32_t n = 1;
    while (n < count && rows[n].start < end) {
        end = dcp_max_u64(end, rows[n].end);
        n++;
    }
    return n;
}

static bool
fall_apart(struct dcp_box_row *rows, uint32_t count, uint32_t ndim, uint32_t cuts)
{
    if (count == 1) {
        return true;
    }
    if (count == 2) {
        return !dcp_boxes_overlap(rows[0].box, rows[1].box, ndim);
    }
    for (uint32_t d = 0; d < ndim && cuts < MAX_CUTS; d++) {
        if (!dcp_boxes_look_along(rows, count, ndim, d)) {
            continue;
        }
        qsort(rows, count, sizeof *rows, compare_starts);
        uint32_t first = group_length(rows, count);
        if (first == count) {
            continue;
        }
        if (!fall_apart(rows, first, ndim, cuts + 1)) {
            return false;
        }
        for (uint32_t at = first, n; at < count; at += n) {
            n = group_length(rows + at, count - at);
            if (!fall_apart(rows + at, n, ndim, cuts + 1)) {
                return false;
            }
        }
        return true;
    }
    return false;
}

bool
dcp_boxes_fall_apart(struct dcp_box_row *rows, uint32_t count, uint32_t ndim)
{
    return count == 0 || fall_apart(rows, count, ndim, 0);
}

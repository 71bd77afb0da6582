/*
 * box_cover.c: the volume of a union of boxes, which may overlap and leave holes.
 *
 * A plane sweeps along one dim and stops where boxes begin or end; between two stops the same boxes
 * are cut, and what they cover there is the same question in one dim less.  In the last dim it is
 * the length of a union of intervals.  Dims with the fewest stops come first: bricks that are
 * irregular along one dim only cost no more than grids do.  A dim in which all boxes are alike is a
 * factor and no sweep.
 *
 * With n boxes of which a plane cuts c this takes O(stops * c log c) per swept dim: n log n for
 * what sharding makes, n^2 log n for two-dimensional boxes that all overlap.
 *
 * Threads: no state.
 */
#include "box_cover.h"

#include <stdlib.h>

#include "dcp_alloc.h"

/* A box, and how it lies along the dim of the sweep that it is a member of. */
struct member {
    const uint64_t *box;
    uint64_t start, end;
};

struct sweep {
    uint32_t dims[DCP_MAX_DIMS]; /* in which boxes differ, in the order of the sweeps */
    uint32_t dims_count, ndim;
    uint64_t boxes_count;
    struct member
        *members;    /* boxes_count per swept dim, then one list of those that a plane cuts */
    uint64_t *stops; /* 2 * boxes_count per swept dim */
};

static int
compare_members(const void *left, const void *right)
{
    const struct member *a = left, *b = right;
    return a->start < b->start ? -1 : a->start > b->start;
}

static int
compare_u64(const void *left, const void *right)
{
    const uint64_t *a = left, *b = right;
    return *a < *b ? -1 : *a > *b;
}

static uint64_t
intervals_length(const struct member *members, uint64_t count)
{
    uint64_t length = 0, end = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t start = dcp_max_u64(members[i].start, end);
        if (members[i].end > start) {
            length += members[i].end - start;
            end = members[i].end;
        }
    }
    return length;
}

/* Where members begin and end, ascending, each once. */
static uint64_t
fill_stops(const struct member *members, uint64_t count, uint64_t *stops)
{
    uint64_t distinct = 0;
    for (uint64_t i = 0; i < count; i++) {
        stops[2 * i] = members[i].start;
        stops[2 * i + 1] = members[i].end;
    }
    qsort(stops, 2 * count, sizeof *stops, compare_u64);
    for (uint64_t i = 0; i < 2 * count; i++) {
        if (i == 0 || stops[i] != stops[distinct - 1]) {
            stops[distinct++] = stops[i];
        }
    }
    return distinct;
}

static void
look_along(struct member *members, uint64_t count, uint32_t ndim, uint32_t dim)
{
    for (uint64_t i = 0; i < count; i++) {
        members[i].start = members[i].box[dim];
        members[i].end = members[i].box[dim] + members[i].box[ndim + dim];
    }
}

/* Volume, in the swept dims from number `at` on, of the union of the members of that dim. */
static uint64_t
union_volume(const struct sweep *sweep, uint32_t at, uint64_t count)
{
    struct member *members = sweep->members + at * sweep->boxes_count;
    struct member *inner = members + sweep->boxes_count;
    uint64_t *stops = sweep->stops + at * 2 * sweep->boxes_count;
    look_along(members, count, sweep->ndim, sweep->dims[at]);
    qsort(members, count, sizeof *members, compare_members);
    if (at + 1 == sweep->dims_count) {
        return intervals_length(members, count);
    }
    /* Members before `seen` that have not ended are moved to the front as the plane passes. */
    uint64_t stops_count = fill_stops(members, count, stops), cut = 0, seen = 0, volume = 0;
    for (uint64_t s = 0; s + 1 < stops_count; s++) {
        uint64_t kept = 0;
        for (uint64_t i = 0; i < cut; i++) {
            if (members[i].end > stops[s]) {
                members[kept++] = members[i];
            }
        }
        while (seen < count && members[seen].start <= stops[s]) {
            members[kept++] = members[seen++];
        }
        cut = kept;
        for (uint64_t i = 0; i < cut; i++) {
            inner[i].box = members[i].box;
        }
        if (cut > 0) {
            volume += (stops[s + 1] - stops[s]) * union_volume(sweep, at + 1, cut);
        }
    }
    return volume;
}

/* The dims to sweep, those with the fewest stops first; returns the product of the others. */
static uint64_t
choose_dims(struct sweep *sweep)
{
    uint64_t stops_counts[DCP_MAX_DIMS], factor = 1;
    for (uint32_t d = 0; d < sweep->ndim; d++) {
        look_along(sweep->members, sweep->boxes_count, sweep->ndim, d);
        uint64_t stops = fill_stops(sweep->members, sweep->boxes_count, sweep->stops);
        if (stops == 2) {
            factor *= sweep->stops[1] - sweep->stops[0];
            continue;
        }
        uint32_t at = sweep->dims_count++;
        while (at > 0 && stops_counts[at - 1] > stops) {
            stops_counts[at] = stops_counts[at - 1];
            sweep->dims[at] = sweep->dims[at - 1];
            at--;
        }
        stops_counts[at] = stops;
        sweep->dims[at] = d;
    }
    return factor;
}

int
dcp_boxes_union_volume(const struct dcp_box_list *list, uint64_t *ret_volume, struct dcp_error *err)
{
    struct sweep sweep = {.ndim = list->ndim, .boxes_count = list->boxes_count};
    uint64_t lists = (uint64_t)list->ndim + 1, members, stops;
    int rc = 0;
    if (list->boxes_count == 0) {
        *ret_volume = 0;
        return 0;
    }
    if (!dcp_mul_overflows_u64(lists, list->boxes_count, &members) &&
        !dcp_mul_overflows_u64(members, 2, &stops)) {
        sweep.members = dcp_malloc_array(members, sizeof *sweep.members);
        sweep.stops = dcp_malloc_array(stops, sizeof *sweep.stops);
    }
    if (sweep.members == NULL || sweep.stops == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for the union of %llu chunks",
                           (unsigned long long)list->boxes_count);
        goto done;
    }
    for (uint64_t i = 0; i < list->boxes_count; i++) {
        sweep.members[i].box = list->numbers + i * 2 * list->ndim;
    }
    uint64_t factor = choose_dims(&sweep);
    *ret_volume = factor * (sweep.dims_count > 0 ? union_volume(&sweep, 0, list->boxes_count) : 1);
done:
    dcp_free(sweep.members);
    dcp_free(sweep.stops);
    return rc;
}

/*
 * box_cover.c: the volume of a union of boxes, which may overlap and leave holes, and where a hole
 * is.
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

/* Sorts, each once; returns how many are left. */
static uint64_t
sort_stops(uint64_t *stops, uint64_t count)
{
    uint64_t distinct = 0;
    qsort(stops, count, sizeof *stops, compare_u64);
    for (uint64_t i = 0; i < count; i++) {
        if (i == 0 || stops[i] != stops[distinct - 1]) {
            stops[distinct++] = stops[i];
        }
    }
    return distinct;
}

/* Where members begin and end. */
static void
fill_stops(const struct member *members, uint64_t count, uint64_t *stops)
{
    for (uint64_t i = 0; i < count; i++) {
        stops[2 * i] = members[i].start;
        stops[2 * i + 1] = members[i].end;
    }
}

static void
look_along(struct member *members, uint64_t count, uint32_t ndim, uint32_t dim)
{
    for (uint64_t i = 0; i < count; i++) {
        members[i].start = members[i].box[dim];
        members[i].end = members[i].box[dim] + members[i].box[ndim + dim];
    }
}

/* The plane's way along one dim. */
struct way {
    struct member *members, *inner;
    uint64_t count, seen;
    const uint64_t *stops; /* the next ones */
    uint64_t stops_left;
    uint64_t start, end; /* of the slab between two stops */
    uint64_t cut;        /* members that the slab cuts: inner holds them */
};

/* Members of swept dim number `at`; `extent` more than 0: from 0 to there, else from the first box
 * to the last. */
static struct way
way_begin(const struct sweep *sweep, uint32_t at, uint64_t count, uint64_t extent)
{
    struct member *members = sweep->members + at * sweep->boxes_count;
    uint64_t *stops = sweep->stops + at * 2 * (sweep->boxes_count + 1);
    look_along(members, count, sweep->ndim, sweep->dims[at]);
    qsort(members, count, sizeof *members, compare_members);
    fill_stops(members, count, stops);
    uint64_t stops_count = 2 * count;
    if (extent > 0) {
        stops[stops_count++] = 0;
        stops[stops_count++] = extent;
    }
    return (struct way){.members = members,
                        .inner = members + sweep->boxes_count,
                        .count = count,
                        .stops = stops,
                        .stops_left = sort_stops(stops, stops_count)};
}

/* To the next slab; false at the end. */
static bool
way_next(struct way *way)
{
    if (way->stops_left < 2) {
        return false;
    }
    way->start = way->stops[0];
    way->end = way->stops[1];
    way->stops++;
    way->stops_left--;
    /* Members before `seen` that have not ended are kept in front. */
    uint64_t kept = 0;
    for (uint64_t i = 0; i < way->cut; i++) {
        if (way->members[i].end > way->start) {
            way->members[kept++] = way->members[i];
        }
    }
    while (way->seen < way->count && way->members[way->seen].start <= way->start) {
        way->members[kept++] = way->members[way->seen++];
    }
    way->cut = kept;
    for (uint64_t i = 0; i < kept; i++) {
        way->inner[i].box = way->members[i].box;
    }
    return true;
}

/* Volume, in the swept dims from number `at` on, of the union of the members of that dim. */
static uint64_t
union_volume(const struct sweep *sweep, uint32_t at, uint64_t count)
{
    if (at + 1 == sweep->dims_count) {
        struct member *members = sweep->members + at * sweep->boxes_count;
        look_along(members, count, sweep->ndim, sweep->dims[at]);
        qsort(members, count, sizeof *members, compare_members);
        return intervals_length(members, count);
    }
    struct way way = way_begin(sweep, at, count, 0);
    uint64_t volume = 0;
    while (way_next(&way)) {
        if (way.cut > 0) {
            volume += (way.end - way.start) * union_volume(sweep, at + 1, way.cut);
        }
    }
    return volume;
}

/* Sets in `hole`, which is the whole box at first, the swept dims from number `at` on. */
static bool
find_hole(const struct sweep *sweep, uint32_t at, uint64_t count, const uint64_t *sizes,
          uint64_t *hole)
{
    uint32_t dim = sweep->dims[at];
    struct way way = way_begin(sweep, at, count, sizes[dim]);
    while (way_next(&way)) {
        bool is_last = at + 1 == sweep->dims_count;
        if (way.cut == 0 || (!is_last && find_hole(sweep, at + 1, way.cut, sizes, hole))) {
            hole[dim] = way.start;
            hole[sweep->ndim + dim] = way.end - way.start;
            return true;
        }
    }
    return false;
}

/* Room for all boxes, which are the members of the first swept dim. */
static int
sweep_init(struct sweep *sweep, const struct dcp_box_list *list, struct dcp_error *err)
{
    uint64_t members, stops, lists = (uint64_t)list->ndim + 1;
    *sweep = (struct sweep){.ndim = list->ndim, .boxes_count = list->boxes_count};
    if (!dcp_mul_overflows_u64(lists, list->boxes_count + 1, &members) &&
        !dcp_mul_overflows_u64(members, 2, &stops)) {
        sweep->members = dcp_malloc_array(members, sizeof *sweep->members);
        sweep->stops = dcp_malloc_array(stops, sizeof *sweep->stops);
    }
    if (sweep->members == NULL || sweep->stops == NULL) {
        dcp_free(sweep->members);
        dcp_free(sweep->stops);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "out of memory for the union of %llu chunks",
                             (unsigned long long)list->boxes_count);
    }
    for (uint64_t i = 0; i < list->boxes_count; i++) {
        sweep->members[i].box = list->numbers + i * 2 * list->ndim;
    }
    return 0;
}

static void
sweep_clean_up(struct sweep *sweep)
{
    dcp_free(sweep->members);
    dcp_free(sweep->stops);
}

/* The dims to sweep, those with the fewest stops first; returns the product of the others. */
static uint64_t
choose_dims(struct sweep *sweep)
{
    uint64_t stops_counts[DCP_MAX_DIMS], factor = 1;
    for (uint32_t d = 0; d < sweep->ndim; d++) {
        look_along(sweep->members, sweep->boxes_count, sweep->ndim, d);
        fill_stops(sweep->members, sweep->boxes_count, sweep->stops);
        uint64_t stops = sort_stops(sweep->stops, 2 * sweep->boxes_count);
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
    struct sweep sweep;
    if (list->boxes_count == 0) {
        *ret_volume = 0;
        return 0;
    }
    int rc = sweep_init(&sweep, list, err);
    if (rc != 0) {
        return rc;
    }
    uint64_t factor = choose_dims(&sweep);
    *ret_volume = factor * (sweep.dims_count > 0 ? union_volume(&sweep, 0, list->boxes_count) : 1);
    sweep_clean_up(&sweep);
    return 0;
}

int
dcp_boxes_find_hole(const struct dcp_box_list *list, const uint64_t *sizes, uint64_t *ret_hole,
                    struct dcp_error *err)
{
    struct sweep sweep;
    int rc = sweep_init(&sweep, list, err);
    if (rc != 0) {
        return rc;
    }
    for (uint32_t d = 0; d < list->ndim; d++) {
        ret_hole[d] = 0;
        ret_hole[list->ndim + d] = sizes[d];
        sweep.dims[sweep.dims_count++] = d;
    }
    if (list->ndim > 0) {
        bool found = find_hole(&sweep, 0, list->boxes_count, sizes, ret_hole);
        DCP_ASSERT(found);
        (void)found;
    }
    sweep_clean_up(&sweep);
    return 0;
}

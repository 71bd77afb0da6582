/*
 * interval.c: a one-dimensional index over the chunks of a tensor, and the volume of unions.
 *
 * Chunks of one tensor form a grid, mostly along one dim.  Sorted by their start in the dim with
 * the most distinct starts, with the running maximum of their ends, two binary searches bound the
 * chunks that can meet a target: O(log n + hits) for the usual grids, still right for any other.
 *
 * Threads: an index belongs to its caller; no state.
 */
#include "interval.h"

#include <stdlib.h>
#include <string.h>

static int
compare_keys(const void *left, const void *right)
{
    const struct dcp_interval_key *a = left, *b = right;
    if (a->start != b->start) {
        return a->start < b->start ? -1 : 1;
    }
    return a->chunk < b->chunk ? -1 : a->chunk > b->chunk;
}

static int
compare_u64(const void *left, const void *right)
{
    const uint64_t *a = left, *b = right;
    return *a < *b ? -1 : *a > *b;
}

/* Sorts unless it is sorted, as written checkpoints mostly are. */
static void
sort_keys(struct dcp_interval_key *keys, uint64_t count)
{
    for (uint64_t i = 1; i < count; i++) {
        if (compare_keys(&keys[i - 1], &keys[i]) > 0) {
            qsort(keys, count, sizeof *keys, compare_keys);
            return;
        }
    }
}

static void
fill_keys(struct dcp_interval_index *index, const struct dcp_metadata *md,
          const struct dcp_md_entry *entry, uint32_t dim)
{
    for (uint64_t i = 0; i < entry->chunks_count; i++) {
        uint64_t chunk = entry->first_chunk + i;
        uint64_t start = entry->ndim > 0 ? md->dims[md->chunks[chunk].dims + dim] : 0;
        index->keys[i] = (struct dcp_interval_key){.start = start, .chunk = chunk};
    }
    sort_keys(index->keys, entry->chunks_count);
}

static uint64_t
count_distinct(const struct dcp_interval_index *index, uint64_t count)
{
    uint64_t distinct = 1;
    for (uint64_t i = 1; i < count; i++) {
        distinct += index->keys[i].start != index->keys[i - 1].start;
    }
    return distinct;
}

static bool
starts_differ(const struct dcp_metadata *md, const struct dcp_md_entry *entry, uint32_t dim)
{
    const struct dcp_md_chunk *chunks = md->chunks + entry->first_chunk;
    for (uint64_t i = 1; i < entry->chunks_count; i++) {
        if (md->dims[chunks[i].dims + dim] != md->dims[chunks[0].dims + dim]) {
            return true;
        }
    }
    return false;
}

/* Leaves the keys sorted along the dim with the most distinct starts. */
static void
choose_dim(struct dcp_interval_index *index, const struct dcp_metadata *md,
           const struct dcp_md_entry *entry)
{
    uint64_t best_distinct = 0;
    uint32_t best = 0, filled = UINT32_MAX;
    for (uint32_t d = 0; d < entry->ndim; d++) {
        if (!starts_differ(md, entry, d)) {
            continue;
        }
        fill_keys(index, md, entry, d);
        filled = d;
        uint64_t distinct = count_distinct(index, entry->chunks_count);
        if (distinct > best_distinct) {
            best_distinct = distinct;
            best = d;
        }
        if (distinct == entry->chunks_count) {
            break;
        }
    }
    index->dim = best;
    if (filled != best) {
        fill_keys(index, md, entry, best);
    }
}

int
dcp_interval_build(struct dcp_interval_index *index, const struct dcp_metadata *md,
                   uint64_t entry_index, struct dcp_error *err)
{
    if (index->built && index->entry == entry_index) {
        return 0;
    }
    const struct dcp_md_entry *entry = &md->entries[entry_index];
    index->built = false;
    if (entry->chunks_count > index->keys_cap) {
        dcp_free(index->keys);
        index->keys_cap = 0;
        index->keys = dcp_malloc_array(entry->chunks_count, sizeof *index->keys);
        if (index->keys == NULL) {
            return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                                 "out of memory for an index of %llu chunks",
                                 (unsigned long long)entry->chunks_count);
        }
        index->keys_cap = entry->chunks_count;
    }
    choose_dim(index, md, entry);
    uint64_t max_end = 0;
    for (uint64_t i = 0; i < entry->chunks_count; i++) {
        const uint64_t *dims = md->dims + md->chunks[index->keys[i].chunk].dims;
        uint64_t end = 1;
        if (entry->ndim > 0 &&
            dcp_add_overflows_u64(dims[index->dim], dims[entry->ndim + index->dim], &end)) {
            return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                                 "a chunk of %.*s ends behind 2^64 elements",
                                 (int)dcp_min_u64(entry->name_len, 256), md->strings + entry->name);
        }
        max_end = dcp_max_u64(max_end, end);
        index->keys[i].max_end = max_end;
    }
    index->keys_count = entry->chunks_count;
    index->entry = entry_index;
    index->built = true;
    return 0;
}

void
dcp_interval_query(const struct dcp_interval_index *index, uint64_t start, uint64_t end,
                   uint64_t *ret_first, uint64_t *ret_last)
{
    DCP_ASSERT(index->built);
    uint64_t lo = 0, hi = index->keys_count;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (index->keys[mid].max_end > start) {
            hi = mid;
        } else {
            lo = mid + 1;
        }
    }
    *ret_first = lo;
    hi = index->keys_count;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (index->keys[mid].start >= end) {
            hi = mid;
        } else {
            lo = mid + 1;
        }
    }
    *ret_last = lo;
}

void
dcp_interval_clean_up(struct dcp_interval_index *index)
{
    dcp_free(index->keys);
    memset(index, 0, sizeof *index);
}

static bool
boxes_meet(const uint64_t *a, const uint64_t *b, uint32_t ndim)
{
    for (uint32_t d = 0; d < ndim; d++) {
        if (a[d] >= b[d] + b[ndim + d] || b[d] >= a[d] + a[ndim + d]) {
            return false;
        }
    }
    return true;
}

bool
dcp_boxes_are_disjoint(const struct dcp_box_list *list, uint32_t dim)
{
    uint32_t ndim = list->ndim;
    if (ndim == 0) {
        return list->boxes_count <= 1;
    }
    for (uint64_t i = 0; i < list->boxes_count; i++) {
        const uint64_t *a = list->numbers + i * 2 * ndim;
        uint64_t end = a[dim] + a[ndim + dim];
        for (uint64_t j = i + 1; j < list->boxes_count; j++) {
            const uint64_t *b = list->numbers + j * 2 * ndim;
            if (b[dim] >= end) {
                break;
            }
            if (boxes_meet(a, b, ndim)) {
                return false;
            }
        }
    }
    return true;
}

struct union_scratch {
    const uint64_t *numbers;
    uint32_t ndim;
    uint64_t *bounds;  /* per dim: 2 * boxes_count */
    uint64_t *members; /* per dim: boxes_count */
    uint64_t boxes_count;
};

/* Volume, in dims from `d` on, of the union of the boxes that `members` lists. */
static uint64_t
union_volume(const struct union_scratch *scratch, uint32_t d, const uint64_t *members,
             uint64_t members_count)
{
    uint32_t ndim = scratch->ndim;
    if (members_count == 0) {
        return 0;
    }
    if (d == ndim) {
        return 1;
    }
    uint64_t *bounds = scratch->bounds + (uint64_t)d * 2 * scratch->boxes_count;
    uint64_t *inside = scratch->members + (uint64_t)d * scratch->boxes_count;
    for (uint64_t i = 0; i < members_count; i++) {
        const uint64_t *box = scratch->numbers + members[i] * 2 * ndim;
        bounds[2 * i] = box[d];
        bounds[2 * i + 1] = box[d] + box[ndim + d];
    }
    qsort(bounds, 2 * members_count, sizeof *bounds, compare_u64);
    uint64_t volume = 0;
    for (uint64_t i = 0; i + 1 < 2 * members_count; i++) {
        if (bounds[i] == bounds[i + 1]) {
            continue;
        }
        uint64_t count = 0;
        for (uint64_t m = 0; m < members_count; m++) {
            const uint64_t *box = scratch->numbers + members[m] * 2 * ndim;
            if (box[d] <= bounds[i] && bounds[i + 1] <= box[d] + box[ndim + d]) {
                inside[count++] = members[m];
            }
        }
        volume += (bounds[i + 1] - bounds[i]) * union_volume(scratch, d + 1, inside, count);
    }
    return volume;
}

int
dcp_boxes_union_volume(const struct dcp_box_list *list, uint64_t *ret_volume, struct dcp_error *err)
{
    uint64_t count = list->boxes_count;
    uint64_t levels = (uint64_t)list->ndim + 1;
    struct union_scratch scratch = {
        .numbers = list->numbers, .ndim = list->ndim, .boxes_count = count};
    uint64_t cells;
    int rc = 0;
    if (!dcp_mul_overflows_u64(levels, count, &cells)) {
        scratch.bounds = dcp_malloc_array(cells, 2 * sizeof *scratch.bounds);
        scratch.members = dcp_malloc_array(cells, sizeof *scratch.members);
    }
    if (scratch.bounds == NULL || scratch.members == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                           "out of memory for the union of %llu overlapping chunks",
                           (unsigned long long)count);
        goto done;
    }
    uint64_t *all = scratch.members + (uint64_t)list->ndim * count;
    for (uint64_t i = 0; i < count; i++) {
        all[i] = i;
    }
    *ret_volume = union_volume(&scratch, 0, all, count);
done:
    dcp_free(scratch.bounds);
    dcp_free(scratch.members);
    return rc;
}

/*
 * chunk_index.c: a tree of bounding boxes over the chunks of a tensor.
 *
 * Sorted by where they start, neighbours in a list of chunks are mostly neighbours in the tensor.
 * So every eight of them, and every eight of those groups, and so on, share a bounding box, and a
 * search passes over whole groups that lie elsewhere.  Along the first dim of a grid that costs
 * O(log n + hits); across it, where a sorted list alone would look at every chunk, a group per row
 * of the grid and a group's chunks per row that hits.  The first search in a tensor looks at every
 * chunk: that costs less than the tree, and mostly there is no second.  Nothing is assumed of the
 * chunks: they may overlap, leave holes, be empty; a bad order makes a search slow, at worst
 * linear, never wrong.
 *
 * Threads: an index belongs to its caller; no state.
 */
#include "chunk_index.h"

#include <stdlib.h>
#include <string.h>

static int
compare_boxes(const uint64_t *a, const uint64_t *b, uint64_t ndim)
{
    for (uint64_t d = 0; d < ndim; d++) {
        if (a[d] != b[d]) {
            return a[d] < b[d] ? -1 : 1;
        }
    }
    return 0;
}

static int
compare_keys(const void *left, const void *right)
{
    const struct dcp_chunk_key *a = left, *b = right;
    int order = compare_boxes(a->box, b->box, a->ndim);
    return order != 0 ? order : a->chunk < b->chunk ? -1 : a->chunk > b->chunk;
}

static const uint64_t *
box_at(const struct dcp_chunk_index *index, uint64_t position)
{
    return index->sorted ? index->md->dims + index->md->chunks[index->first_chunk + position].dims
                         : index->keys[position].box;
}

static int
out_of_memory(const struct dcp_chunk_index *index, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for an index of %llu chunks",
                         (unsigned long long)index->chunks_count);
}

/* Whether all ends can be counted; finds out on the way whether the chunks are sorted, as those of
 * written checkpoints mostly are. */
static int
look_through(struct dcp_chunk_index *index, struct dcp_error *err)
{
    uint64_t ndim = index->ndim;
    const uint64_t *last = NULL;
    index->sorted = true;
    for (uint64_t i = 0; i < index->chunks_count; i++) {
        const uint64_t *box = index->md->dims + index->md->chunks[index->first_chunk + i].dims;
        for (uint64_t d = 0; d < ndim; d++) {
            if (box[ndim + d] > UINT64_MAX - box[d]) {
                const struct dcp_md_entry *entry = &index->md->entries[index->entry];
                return dcp_error_set(
                    err, DCP_E_CORRUPT, 0, NULL, "a chunk of %.*s ends behind 2^64 elements",
                    (int)dcp_min_u64(entry->name_len, 256), index->md->strings + entry->name);
            }
        }
        index->sorted = index->sorted && (last == NULL || compare_boxes(last, box, ndim) <= 0);
        last = box;
    }
    return 0;
}

static int
sort_chunks(struct dcp_chunk_index *index, struct dcp_error *err)
{
    if (index->chunks_count > index->keys_cap) {
        dcp_free(index->keys);
        index->keys_cap = 0;
        index->keys = dcp_malloc_array(index->chunks_count, sizeof *index->keys);
        if (index->keys == NULL) {
            return out_of_memory(index, err);
        }
        index->keys_cap = index->chunks_count;
    }
    for (uint64_t i = 0; i < index->chunks_count; i++) {
        uint64_t chunk = index->first_chunk + i;
        index->keys[i] =
            (struct dcp_chunk_key){.box = index->md->dims + index->md->chunks[chunk].dims,
                                   .chunk = chunk,
                                   .ndim = index->ndim};
    }
    qsort(index->keys, index->chunks_count, sizeof *index->keys, compare_keys);
    return 0;
}

/* Nodes of all levels; a level ends with a node that may have fewer children. */
static uint64_t
lay_out_levels(struct dcp_chunk_index *index)
{
    uint64_t nodes = 0, count = index->chunks_count;
    index->levels_count = 0;
    while (count > 1u << DCP_CHUNK_FANOUT_BITS) {
        count = ((count - 1) >> DCP_CHUNK_FANOUT_BITS) + 1;
        index->levels[index->levels_count++] = nodes * 2 * index->ndim;
        nodes += count;
    }
    return nodes;
}

/* Widens the node [starts, ends) by another box. */
static void
node_add(uint64_t *node, const uint64_t *starts, const uint64_t *ends, uint64_t ndim, bool is_first)
{
    for (uint64_t d = 0; d < ndim; d++) {
        node[d] = is_first ? starts[d] : dcp_min_u64(node[d], starts[d]);
        node[ndim + d] = is_first ? ends[d] : dcp_max_u64(node[ndim + d], ends[d]);
    }
}

static void
fill_levels(struct dcp_chunk_index *index)
{
    const uint64_t ndim = index->ndim, mask = (1u << DCP_CHUNK_FANOUT_BITS) - 1;
    uint64_t ends[DCP_MAX_DIMS], count = index->chunks_count;
    for (uint32_t level = 0; level < index->levels_count; level++) {
        uint64_t *nodes = index->bounds + index->levels[level];
        for (uint64_t i = 0; i < count; i++) {
            uint64_t *node = nodes + (i >> DCP_CHUNK_FANOUT_BITS) * 2 * ndim;
            const uint64_t *box;
            if (level == 0) {
                box = box_at(index, i);
                for (uint64_t d = 0; d < ndim; d++) {
                    ends[d] = box[d] + box[ndim + d];
                }
                node_add(node, box, ends, ndim, (i & mask) == 0);
            } else {
                box = index->bounds + index->levels[level - 1] + i * 2 * ndim;
                node_add(node, box, box + ndim, ndim, (i & mask) == 0);
            }
        }
        count = ((count - 1) >> DCP_CHUNK_FANOUT_BITS) + 1;
    }
}

static int
build_tree(struct dcp_chunk_index *index, struct dcp_error *err)
{
    uint64_t numbers;
    index->has_tree = true;
    if (dcp_mul_overflows_u64(lay_out_levels(index), 2 * index->ndim, &numbers)) {
        return out_of_memory(index, err);
    }
    if (numbers > index->bounds_cap) {
        dcp_free(index->bounds);
        index->bounds_cap = 0;
        index->bounds = dcp_malloc_array(numbers, sizeof *index->bounds);
        if (index->bounds == NULL) {
            return out_of_memory(index, err);
        }
        index->bounds_cap = numbers;
    }
    if (index->ndim > 0) {
        fill_levels(index);
    }
    return 0;
}

int
dcp_chunk_index_build(struct dcp_chunk_index *index, const struct dcp_metadata *md,
                      uint64_t entry_index, struct dcp_error *err)
{
    const struct dcp_md_entry *entry = &md->entries[entry_index];
    DCP_ASSERT(entry->kind == DCP_ITEM_TENSOR && entry->ndim <= DCP_MAX_DIMS);
    int rc = 0;
    if (index->md != md || index->entry != entry_index) {
        index->md = md;
        index->entry = entry_index;
        index->first_chunk = entry->first_chunk;
        index->chunks_count = entry->chunks_count;
        index->ndim = entry->ndim;
        index->levels_count = 0;
        index->has_tree = false;
        rc = look_through(index, err);
        if (rc == 0 && !index->sorted) {
            rc = sort_chunks(index, err);
        }
    } else if (!index->has_tree) {
        rc = build_tree(index, err);
    }
    if (rc != 0) {
        index->md = NULL;
    }
    return rc;
}

static bool
node_meets(const uint64_t *node, const uint64_t *starts, const uint64_t *ends, uint64_t ndim)
{
    for (uint64_t d = 0; d < ndim; d++) {
        if (node[d] >= ends[d] || node[ndim + d] <= starts[d]) {
            return false;
        }
    }
    return true;
}

uint64_t
dcp_chunk_index_skip(const struct dcp_chunk_index *index, const uint64_t *starts,
                     const uint64_t *ends, uint64_t at)
{
    DCP_ASSERT(index->md != NULL);
    const uint64_t ndim = index->ndim, mask = (1u << DCP_CHUNK_FANOUT_BITS) - 1;
    while (at < index->chunks_count) {
        /* The largest group that begins here. */
        uint32_t height = 0;
        while (height < index->levels_count && (at >> height * DCP_CHUNK_FANOUT_BITS & mask) == 0) {
            height++;
        }
        while (height > 0 && node_meets(index->bounds + index->levels[height - 1] +
                                            (at >> height * DCP_CHUNK_FANOUT_BITS) * 2 * ndim,
                                        starts, ends, ndim)) {
            height--;
        }
        if (height == 0) {
            return at;
        }
        at += (uint64_t)1 << height * DCP_CHUNK_FANOUT_BITS;
    }
    return index->chunks_count;
}

void
dcp_chunk_index_clean_up(struct dcp_chunk_index *index)
{
    dcp_free(index->keys);
    dcp_free(index->bounds);
    memset(index, 0, sizeof *index);
}

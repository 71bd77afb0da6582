/*
 * chunk_index.h: private: which chunks of one saved tensor may meet a box.
 *
 * Chunks are numbered by position: sorted by where they start, dim 0 first.
 */
#ifndef DCP_CHUNK_INDEX_H
#define DCP_CHUNK_INDEX_H

#include "dcp_metadata.h"

enum {
    DCP_CHUNK_FANOUT_BITS = 3,
    /* Enough for 2^64 chunks. */
    DCP_CHUNK_LEVELS = 64 / DCP_CHUNK_FANOUT_BITS + 1
};

/* Zero-initialised is valid and belongs to no entry. */
struct dcp_chunk_index {
    const struct dcp_metadata *md; /* borrows; NULL: not built */
    uint64_t entry;                /* index in metadata entries */
    uint64_t first_chunk, chunks_count;
    uint32_t ndim, levels_count;
    bool sorted;   /* the metadata has them in order; keys are not used */
    bool has_tree; /* else levels_count is 0 */
    struct dcp_chunk_key {
        const uint64_t *box; /* in metadata dims */
        uint64_t chunk;      /* index in metadata chunks */
        uint64_t ndim;
    } *keys; /* owned; by position */
    uint64_t keys_cap;
    uint64_t *bounds;                  /* owned; boxes of nodes: ndim starts, ndim ends */
    uint64_t bounds_cap;               /* numbers */
    uint64_t levels[DCP_CHUNK_LEVELS]; /* index in bounds of the first node, lowest level first */
};

/* Before each search: makes the index that of an entry that is a tensor, without a tree the first
 * time, with one from the second time on.  DCP_E_CORRUPT when a chunk's end overflows. */
int dcp_chunk_index_build(struct dcp_chunk_index *index, const struct dcp_metadata *md,
                          uint64_t entry, struct dcp_error *err) DCP_MUST_CHECK;
/* As dcp_chunk_index_next, where `at` may begin a node. */
uint64_t dcp_chunk_index_skip(const struct dcp_chunk_index *index, const uint64_t *starts,
                              const uint64_t *ends, uint64_t at);
/* Idempotent. */
void dcp_chunk_index_clean_up(struct dcp_chunk_index *index);

/* The next position at or behind `at` whose chunk may meet the box [starts, ends); chunks_count
 * when there is none. */
static inline uint64_t
dcp_chunk_index_next(const struct dcp_chunk_index *index, const uint64_t *starts,
                     const uint64_t *ends, uint64_t at)
{
    bool inside_node = (at & ((1u << DCP_CHUNK_FANOUT_BITS) - 1)) != 0;
    return inside_node ? at : dcp_chunk_index_skip(index, starts, ends, at);
}

/* Index in metadata chunks of the chunk at a position. */
static inline uint64_t
dcp_chunk_index_at(const struct dcp_chunk_index *index, uint64_t position)
{
    return index->sorted ? index->first_chunk + position : index->keys[position].chunk;
}

#endif

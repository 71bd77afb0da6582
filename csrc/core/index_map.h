/*
 * index_map.h: an open-addressing map from hashes to 32-bit indices.
 *
 * The caller owns what the indices stand for and compares; the map keeps 32 bits of each hash, so
 * that most comparisons are saved and growing needs no keys.  A chain of probes is bounded: names
 * made to collide give an error instead of quadratic time.
 *
 * Zero-initialised is a valid empty map.  Threads: belongs to one thread.
 */
#ifndef DCP_INDEX_MAP_H
#define DCP_INDEX_MAP_H

#include "dcp_alloc.h"

enum {
    DCP_INDEX_NONE = 0xFFFFFFFFu,
    /* With a load of at most a half the longest chain of a good hash stays below 100. */
    DCP_INDEX_MAX_PROBES = 1024,
};

struct dcp_index_slot {
    uint32_t hash;
    uint32_t index_plus_1; /* 0: empty */
};

struct dcp_index_map {
    struct dcp_index_slot *slots; /* owned */
    uint64_t cap;                 /* power of two, or 0 */
    uint64_t count;
};

/* Room for `count` indices without growing. */
int dcp_index_map_reserve(struct dcp_index_map *map, uint64_t count,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* Adds without looking for an equal key.  `index` is below DCP_INDEX_NONE.  DCP_E_UNSUPPORTED when
 * too many hashes collide. */
int dcp_index_map_add(struct dcp_index_map *map, uint64_t hash, uint32_t index,
                      struct dcp_error *err) DCP_MUST_CHECK;
void dcp_index_map_clean_up(struct dcp_index_map *map);

/* Gives the indices that may have this hash, in order of insertion while nothing grew; then
 * DCP_INDEX_NONE.  *probe starts at 0. */
static inline uint32_t
dcp_index_map_next(const struct dcp_index_map *map, uint64_t hash, uint32_t *probe)
{
    if (map->cap == 0) {
        return DCP_INDEX_NONE;
    }
    uint32_t half = (uint32_t)(hash >> 32);
    uint64_t home = ((uint64_t)half * map->cap) >> 32;
    while (*probe < DCP_INDEX_MAX_PROBES) {
        const struct dcp_index_slot *slot = &map->slots[(home + *probe) & (map->cap - 1)];
        if (slot->index_plus_1 == 0) {
            break;
        }
        (*probe)++;
        if (slot->hash == half) {
            return slot->index_plus_1 - 1;
        }
    }
    return DCP_INDEX_NONE;
}

#endif

/*
 * index_map.c: growing and filling of the map.
 *
 * The home of a hash is its upper 32 bits scaled to the capacity, so a larger table is filled in
 * the same order as the smaller one and growing walks memory forwards.
 *
 * Threads: a map belongs to one thread.
 */
#include "index_map.h"

enum { FIRST_CAP = 64 };

static int
insert(struct dcp_index_map *map, uint32_t half, uint32_t index, struct dcp_error *err)
{
    uint64_t home = ((uint64_t)half * map->cap) >> 32;
    for (uint32_t probe = 0; probe < DCP_INDEX_MAX_PROBES; probe++) {
        struct dcp_index_slot *slot = &map->slots[(home + probe) & (map->cap - 1)];
        if (slot->index_plus_1 == 0) {
            slot->hash = half;
            slot->index_plus_1 = index + 1;
            map->count++;
            return 0;
        }
    }
    return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                         "indexing names: more than %d of them share a hash, which only a file "
                         "made for the purpose does",
                         DCP_INDEX_MAX_PROBES);
}

static int
resize(struct dcp_index_map *map, uint64_t cap, struct dcp_error *err)
{
    struct dcp_index_map grown = {.cap = cap};
    grown.slots = dcp_calloc((size_t)cap, sizeof *grown.slots);
    if (grown.slots == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "an index of %llu names: out of memory",
                             (unsigned long long)cap);
    }
    for (uint64_t i = 0; i < map->cap; i++) {
        const struct dcp_index_slot *slot = &map->slots[i];
        if (slot->index_plus_1 == 0) {
            continue;
        }
        int rc = insert(&grown, slot->hash, slot->index_plus_1 - 1, err);
        if (rc != 0) {
            dcp_free(grown.slots);
            return rc;
        }
    }
    dcp_free(map->slots);
    *map = grown;
    return 0;
}

int
dcp_index_map_reserve(struct dcp_index_map *map, uint64_t count, struct dcp_error *err)
{
    uint64_t cap = map->cap == 0 ? FIRST_CAP : map->cap;
    while (cap / 2 < count) {
        cap *= 2;
    }
    return cap == map->cap ? 0 : resize(map, cap, err);
}

int
dcp_index_map_add(struct dcp_index_map *map, uint64_t hash, uint32_t index, struct dcp_error *err)
{
    DCP_ASSERT(index < DCP_INDEX_NONE);
    int rc = dcp_index_map_reserve(map, map->count + 1, err);
    return rc != 0 ? rc : insert(map, (uint32_t)(hash >> 32), index, err);
}

void
dcp_index_map_clean_up(struct dcp_index_map *map)
{
    if (map == NULL) {
        return;
    }
    dcp_free(map->slots);
    *map = (struct dcp_index_map){0};
}

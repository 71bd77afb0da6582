/*
 * arena_map.h: private: the mapping of an arena.
 */
#ifndef DCP_ARENA_MAP_H
#define DCP_ARENA_MAP_H

#include "dcp_arena.h"

/* Maps arena->bytes, a multiple of the page size, of arena->kind: zeros, no page taken yet, not
 * inherited by a fork as memory and not dumped.  Sets memory, fd and room_bytes. */
int dcp_arena_map(struct dcp_arena *arena, struct dcp_error *err) DCP_MUST_CHECK;
/* Makes it `bytes` long, at most arena->room_bytes: it stays where it is, touched pages and what
 * they hold too.  On failure all is as it was. */
int dcp_arena_map_grow(struct dcp_arena *arena, uint64_t bytes,
                       struct dcp_error *err) DCP_MUST_CHECK;
/* Gives the memory back, whoever else still holds the descriptor or a mapping. */
void dcp_arena_unmap(struct dcp_arena *arena);

/* Touches [memory, memory + bytes), a multiple of the page size, for writing; what is there stays.
 * 0 or -errno. */
int dcp_memory_populate(uint8_t *memory, uint64_t bytes) DCP_MUST_CHECK;
/* The same, page by page, for kernels that have no call for it (before 5.14). */
void dcp_memory_touch(uint8_t *memory, uint64_t bytes);

#endif

/*
 * memfd.h: private: memory with a descriptor, which other processes can be given.
 */
#ifndef DCP_MEMFD_H
#define DCP_MEMFD_H

#include "dcp_alloc.h"

/* A memfd of `bytes`, a multiple of the page size, mapped shared: zeros, no page taken yet.  It is
 * closed by exec, can't shrink, is not inherited by a fork as memory, and not dumped. */
int dcp_memfd_make(uint64_t bytes, int *ret_fd, uint8_t **ret_memory,
                   struct dcp_error *err) DCP_MUST_CHECK;
/* Makes it and its mapping longer, which may move; pages that were touched stay so.  On failure
 * all is as it was. */
int dcp_memfd_grow(int fd, uint8_t *memory, uint64_t old_bytes, uint64_t bytes,
                   uint8_t **ret_memory, struct dcp_error *err) DCP_MUST_CHECK;
/* Gives its memory back, whoever else still holds the descriptor or a mapping. */
void dcp_memfd_free(int fd, uint8_t *memory, uint64_t bytes);

/* Touches [memory, memory + bytes), a multiple of the page size, for writing; what is there stays.
 * 0 or -errno. */
int dcp_memory_populate(uint8_t *memory, uint64_t bytes) DCP_MUST_CHECK;
/* The same, page by page, for kernels that have no call for it (before 5.14). */
void dcp_memory_touch(uint8_t *memory, uint64_t bytes);

#endif

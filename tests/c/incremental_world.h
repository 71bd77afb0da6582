/*
 * incremental_world.h: one process that saves a handful of tensors, each in a version of its own,
 * with and without a base, and loads them again.
 */
#ifndef INCREMENTAL_WORLD_H
#define INCREMENTAL_WORLD_H

#include "dcp_transfer.h"
#include "io_memory.h"

enum { TENSORS_MOST = 16 };

/* Tensor i is float32 of `lengths[i]` elements; two versions of it differ in one element. */
struct tensors {
    uint32_t count;
    uint64_t lengths[TENSORS_MOST];
    int versions[TENSORS_MOST];
    int dtype;         /* 0: float32 */
    uint8_t props;     /* of all of them */
    uint64_t two_rows; /* bit i: the tensor has two rows */
    uint64_t strided;  /* bit i: every second element of its memory is its own */
    bool file_per_item;
    uint32_t thread_count; /* 0: 1 */
};

struct saving {
    const char *dir, *base;
    enum dcp_link_mode mode;
    bool content_hash, independent;
};

/* Fails the test program unless it is committed.  `group` NULL: a new one. */
void tensors_save(struct dcp_group *group, struct io_memory *fs, const struct tensors *tensors,
                  const struct saving *saving, struct dcp_save_info *ret_info);
/* A save that the caller has cancelled by the time it compares: what the comparison returns.  Given
 * up after that. */
int tensors_cancel(struct io_memory *fs, const struct tensors *tensors, const struct saving *saving,
                   struct dcp_failure_list *ret_failures);
/* True when every tensor loads in its version, checksums verified. */
bool tensors_load(struct io_memory *fs, const struct tensors *tensors, const char *dir,
                  bool independent);

struct dcp_group *tensors_group(void);
/* Removes every file of a directory. */
void tensors_remove(struct io_memory *fs, const char *dir);

#endif

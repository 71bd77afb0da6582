/*
 * engine_world.h: a small checkpoint for tests of the engine: a plan with its memory, what its
 * files must hold, and the metadata that describes them.  Failures end the test program.
 */
#ifndef ENGINE_WORLD_H
#define ENGINE_WORLD_H

#include "dcp_engine.h"
#include "plan_maker.h"

enum { WORLD_TENSORS = 24, WORLD_MAX_CHUNKS = 64 };

struct world_tensor {
    uint32_t ndim, item_bytes;
    uint64_t size[DCP_MAX_DIMS];
    uint64_t bytes;
    uint8_t *image; /* row major: what the whole tensor holds */
    bool opaque;    /* its record is an object's: only Python can read it */
};

struct world {
    struct maker_rng rng;
    struct dcp_plan plan;
    struct dcp_layout layout;
    struct dcp_source *sources; /* like plan.items */
    uint8_t **memory;           /* owned blocks behind the sources */
    int64_t (*strides)[DCP_MAX_DIMS];
    uint8_t **records; /* of ready-made items; else NULL */
    struct world_tensor tensors[WORLD_TENSORS];
    uint32_t tensors_count;
    uint32_t *item_tensor; /* index in tensors; UINT32_MAX for objects */
    struct dcp_save_id save_id;
    uint64_t n0;
    struct dcp_metadata md; /* owned by the world, not by dcp_metadata_clean_up */
};

struct world_options {
    uint64_t seed;
    uint32_t tensors, objects;
    uint32_t thread_count;
    bool file_per_item;
    uint64_t large_bytes; /* one tensor of about this size; 0: none */
    bool content_hash;
};

void world_make(struct world *world, const struct world_options *options);
void world_clean_up(struct world *world);

/* A tensor of a given shape, saved as a grid of chunks: `parts[d]` along dim d. */
uint32_t world_add_tensor(struct world *world, int dtype, uint32_t ndim, const uint64_t *size,
                          const uint64_t *parts);
void world_add_object(struct world *world, size_t pickle_bytes);
/* An object as a planner of the program's own may write it: `len` bytes, no zip. */
void world_add_bytes(struct world *world, size_t len);
/* Lays it out and makes the metadata.  After the last add. */
void world_finish(struct world *world, uint32_t thread_count, bool file_per_item);

/* The bytes that file `index` of the layout must hold; appends. */
void world_file_image(const struct world *world, uint32_t index, struct dcp_buf *buf);
void world_file_name(const struct world *world, uint32_t index, char *name, size_t cap);
/* Runs the writer. */
int world_write(const struct dcp_io *io, int dirfd, const struct world *world,
                const struct dcp_engine_options *options, uint32_t *crcs,
                struct dcp_write_stats *stats, struct dcp_error *err);
/* Reads each file back, compares it with the naive image, removes it; says what is wrong. */
bool world_check_files(const struct dcp_io *io, int dirfd, const struct world *world);
/* CRC32 by the definition, bit by bit. */
uint32_t world_crc32(const uint8_t *data, uint64_t len);
/* The row-major bytes of a box of a tensor. */
void world_cut(const struct world_tensor *tensor, const uint64_t *offsets, const uint64_t *sizes,
               uint8_t *ret);

#endif

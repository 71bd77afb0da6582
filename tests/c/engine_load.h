/*
 * engine_load.h: a world on a simulated disk, and loads of it into targets of any strides.
 *
 * Included after ctest.h by the tests of the reader, so that CHECK counts in theirs.
 */
#ifndef ENGINE_LOAD_H
#define ENGINE_LOAD_H

#include "box.h"
#include "engine_world.h"
#include "io_memory.h"

/* ---- a world on a simulated disk ---- */

struct disk {
    struct io_memory *fs;
    struct dcp_io *io;
    int dirfd;
};

static inline void
disk_make(struct disk *disk, const struct world *world, uint32_t dio_bytes)
{
    struct dcp_error err = {0};
    struct dcp_engine_options engine = {0};
    disk->fs = io_memory_new(7);
    disk->io = &io_memory_process(disk->fs, 0)->io;
    io_memory_set_dio(disk->fs, (struct dcp_dio_align){dio_bytes, dio_bytes, false});
    disk->io->mkdirs(disk->io->ctx, "/d");
    disk->dirfd = disk->io->open_dir(disk->io->ctx, "/d");
    CHECK_OK(dcp_writer_run(disk->io, disk->dirfd, "/d", &world->plan, &world->layout,
                            world->sources, &world->save_id, world->n0, &engine, NULL, NULL, &err),
             &err);
}

static inline void
disk_clean_up(struct disk *disk)
{
    disk->io->close(disk->io->ctx, disk->dirfd);
    CHECK_EQ(io_memory_open_files(disk->fs), 0);
    CHECK_EQ(io_memory_lent_maps(disk->fs), 0);
    io_memory_free(disk->fs);
    dcp_engine_trim();
}

/* Changes bytes of a file, from outside. */
static inline void
disk_damage(struct disk *disk, const struct world *world, uint32_t file, uint64_t offset,
            uint8_t flip, uint64_t cut_to)
{
    char name[64];
    size_t len;
    world_file_name(world, file, name, sizeof name);
    const uint8_t *old = io_memory_file(disk->fs, "/d", name, &len);
    uint8_t *bytes = dcp_malloc(len);
    memcpy(bytes, old, len);
    bytes[offset] = (uint8_t)(bytes[offset] ^ flip);
    io_memory_put_file(disk->fs, "/d", name, bytes, cut_to < len ? cut_to : len);
    dcp_free(bytes);
}

/* ---- targets ---- */

struct wish {
    struct world_tensor *tensor;
    uint64_t offsets[DCP_MAX_DIMS], sizes[DCP_MAX_DIMS];
    int64_t strides[DCP_MAX_DIMS];
    uint64_t bytes;
    uint8_t *memory; /* owned */
    uint8_t *data;
};

struct load {
    struct dcp_read_plan plan;
    struct wish *wishes;
    uint64_t wishes_count;
    const struct world *world;
    uint64_t records_seen;
};

/* Entry of a tensor: names are "tensor.<index>". */
static inline uint64_t
entry_of(const struct world *world, uint32_t tensor)
{
    char fqn[32];
    int len = snprintf(fqn, sizeof fqn, "tensor.%u", tensor);
    for (uint64_t e = 0; e < world->md.entries_count; e++) {
        const struct dcp_md_entry *entry = &world->md.entries[e];
        if (entry->name_len == (uint32_t)len &&
            memcmp(world->md.strings + entry->name, fqn, (size_t)len) == 0) {
            return e;
        }
    }
    CHECK(!"no such entry");
    return 0;
}

static inline void
load_init(struct load *load, struct world *world)
{
    *load = (struct load){.plan = {.md = &world->md}, .world = world};
    load->wishes = dcp_calloc(256, sizeof *load->wishes);
}

/* Strides of the target: row major (NULL) or dims in a random order. */
static inline void
load_add(struct load *load, struct maker_rng *rng, uint32_t tensor, const uint64_t *offsets,
         const uint64_t *sizes, bool strided, size_t shift)
{
    struct dcp_error err = {0};
    struct wish *wish = &load->wishes[load->wishes_count++];
    wish->tensor = (struct world_tensor *)(uintptr_t)&load->world->tensors[tensor];
    uint32_t ndim = wish->tensor->ndim;
    uint32_t order[DCP_MAX_DIMS];
    int64_t stride = wish->tensor->item_bytes;
    for (uint32_t d = 0; d < ndim; d++) {
        wish->offsets[d] = offsets[d];
        wish->sizes[d] = sizes[d];
        order[d] = ndim - 1 - d;
    }
    for (uint32_t d = ndim; strided && d > 1; d--) {
        uint32_t other = (uint32_t)maker_below(rng, d), keep = order[d - 1];
        order[d - 1] = order[other];
        order[other] = keep;
    }
    wish->bytes = wish->tensor->item_bytes;
    for (uint32_t i = 0; i < ndim; i++) {
        wish->strides[order[i]] = stride;
        stride *= (int64_t)(sizes[order[i]] + (strided ? maker_below(rng, 2) : 0));
        wish->bytes *= sizes[order[i]];
    }
    wish->memory = dcp_calloc(1, (size_t)stride + 8192);
    wish->data = (uint8_t *)dcp_align_up((uintptr_t)wish->memory, 4096) + shift;
    CHECK_OK(dcp_read_plan_add(&load->plan, entry_of(load->world, tensor), wish->data,
                               strided ? wish->strides : NULL, offsets, sizes, NULL, &err),
             &err);
}

static inline void
load_add_objects(struct load *load)
{
    struct dcp_error err = {0};
    for (uint64_t e = 0; e < load->world->md.entries_count; e++) {
        if (load->world->md.entries[e].kind == DCP_ITEM_BYTES) {
            CHECK_OK(dcp_read_plan_add(&load->plan, e, NULL, NULL, NULL, NULL, NULL, &err), &err);
        }
    }
}

static inline int
on_record(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
          const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    struct load *load = ctx;
    (void)plan;
    (void)err;
    load->records_seen++;
    /* Chunks of this metadata are numbered like the plan's items. */
    const uint8_t *want = load->world->records[item->chunk];
    CHECK(want != NULL && len == load->world->md.chunks[item->chunk].length_bytes);
    CHECK(want != NULL && memcmp(bytes, want, len) == 0);
    return 0;
}

static inline int
load_run(struct load *load, const struct dcp_io *io, int dirfd,
         const struct dcp_engine_options *engine, struct dcp_read_stats *stats,
         struct dcp_error *err)
{
    CHECK_OK(dcp_read_plan_build(&load->plan, true, NULL, err), err);
    return dcp_reader_run(io, dirfd, "/d", &load->plan, engine, on_record, load, stats, err);
}

static inline void
load_check(const struct load *load)
{
    for (uint64_t w = 0; w < load->wishes_count; w++) {
        const struct wish *wish = &load->wishes[w];
        if (wish->tensor->opaque || wish->bytes == 0) {
            continue;
        }
        uint8_t *want = dcp_malloc(wish->bytes), *got = dcp_malloc(wish->bytes);
        world_cut(wish->tensor, wish->offsets, wish->sizes, want);
        dcp_box_gather(got, wish->data, wish->tensor->ndim, wish->sizes, wish->strides,
                       wish->tensor->item_bytes, 0, wish->bytes);
        CHECK(memcmp(want, got, wish->bytes) == 0);
        dcp_free(want);
        dcp_free(got);
    }
}

static inline void
load_clean_up(struct load *load)
{
    for (uint64_t w = 0; w < load->wishes_count; w++) {
        dcp_free(load->wishes[w].memory);
    }
    dcp_free(load->wishes);
    dcp_read_plan_clean_up(&load->plan);
}

/* Random boxes of every tensor. */
static inline void
load_add_random(struct load *load, struct maker_rng *rng, uint32_t per_tensor)
{
    for (uint32_t t = 0; t < load->world->tensors_count; t++) {
        const struct world_tensor *tensor = &load->world->tensors[t];
        for (uint32_t n = 0; n < per_tensor; n++) {
            uint64_t offsets[DCP_MAX_DIMS] = {0}, sizes[DCP_MAX_DIMS];
            bool whole = maker_below(rng, 3) == 0;
            for (uint32_t d = 0; d < tensor->ndim; d++) {
                offsets[d] = whole ? 0 : maker_below(rng, tensor->size[d] + 1);
                sizes[d] =
                    whole ? tensor->size[d] : maker_below(rng, tensor->size[d] - offsets[d] + 1);
            }
            load_add(load, rng, t, offsets, sizes, maker_below(rng, 2) == 0,
                     maker_below(rng, 2) == 0 ? 0 : 64);
        }
    }
}

/* A world without anything, to be added to. */
static inline void
world_begin(struct world *world)
{
    static const struct world_options empty = {.seed = 3, .thread_count = 1};
    world_make(world, &empty);
    dcp_layout_clean_up(&world->layout);
    dcp_free(world->md.strings);
    dcp_free(world->md.entries);
    dcp_free(world->md.chunks);
    dcp_free(world->md.dims);
    dcp_free(world->md.files);
}

/* Tensors and an object that ranks want together: of several chunks, whole ones of more than one
 * checksum block, small ones.  `large`: 9 MB, else 6. */
static inline void
world_to_share(struct world *world, uint64_t seed, uint32_t files, bool large)
{
    static const uint64_t most[][3] = {
        {1700, 1000, 0}, {256, 300, 33}, {400, 200, 0}, {512, 512, 0}, {50, 3, 0}};
    static const uint64_t least[][3] = {
        {900, 1000, 0}, {64, 20, 33}, {400, 200, 0}, {512, 512, 0}, {50, 3, 0}};
    static const uint64_t parts[][3] = {{3, 1, 0}, {1, 2, 1}, {4, 1, 0}, {1, 1, 0}, {1, 1, 0}};
    static const int dtypes[] = {DCP_DTYPE_FLOAT32, DCP_DTYPE_BFLOAT16, DCP_DTYPE_FLOAT32,
                                 DCP_DTYPE_FLOAT32, DCP_DTYPE_INT64};
    world_begin(world);
    world->rng.state = seed;
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        world_add_tensor(world, dtypes[i], i == 1 ? 3 : 2, large ? most[i] : least[i], parts[i]);
    }
    world_add_object(world, 700);
    world_finish(world, files, false);
}

/* All of the world, whole. */
static inline void
load_add_all(struct load *load, struct maker_rng *rng, bool strided, size_t shift)
{
    for (uint32_t t = 0; t < load->world->tensors_count; t++) {
        uint64_t offsets[DCP_MAX_DIMS] = {0};
        load_add(load, rng, t, offsets, load->world->tensors[t].size, strided, shift);
    }
    load_add_objects(load);
}

/* One tensor of `rows` x 1000 float32 in `parts` chunks. */
static inline void
one_tensor(struct world *world, uint64_t rows, uint64_t parts)
{
    uint64_t size[2] = {rows, 1000}, split[2] = {parts, 1};
    world_begin(world);
    world_add_tensor(world, DCP_DTYPE_FLOAT32, 2, size, split);
    world_finish(world, 1, false);
}

#endif

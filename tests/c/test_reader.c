/*
 * test_reader.c: what the writer wrote comes back into any target, or the load fails by name.
 */
#include "ctest.h"

#include <errno.h>
#include <unistd.h>

#include "box.h"
#include "engine_world.h"
#include "io_memory.h"

/* ---- a world on a simulated disk ---- */

struct disk {
    struct io_memory *fs;
    struct dcp_io *io;
    int dirfd;
};

static void
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

static void
disk_clean_up(struct disk *disk)
{
    disk->io->close(disk->io->ctx, disk->dirfd);
    CHECK_EQ(io_memory_open_files(disk->fs), 0);
    io_memory_free(disk->fs);
    dcp_engine_trim();
}

/* Changes bytes of a file, from outside. */
static void
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
static uint64_t
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

static void
load_init(struct load *load, struct world *world)
{
    *load = (struct load){.plan = {.md = &world->md}, .world = world};
    load->wishes = dcp_calloc(256, sizeof *load->wishes);
}

/* Strides of the target: row major (NULL) or dims in a random order. */
static void
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

static void
load_add_objects(struct load *load)
{
    struct dcp_error err = {0};
    for (uint64_t e = 0; e < load->world->md.entries_count; e++) {
        if (load->world->md.entries[e].kind == DCP_ITEM_BYTES) {
            CHECK_OK(dcp_read_plan_add(&load->plan, e, NULL, NULL, NULL, NULL, NULL, &err), &err);
        }
    }
}

static int
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

static int
load_run(struct load *load, const struct dcp_io *io, int dirfd,
         const struct dcp_engine_options *engine, struct dcp_read_stats *stats,
         struct dcp_error *err)
{
    CHECK_OK(dcp_read_plan_build(&load->plan, true, NULL, err), err);
    return dcp_reader_run(io, dirfd, "/d", &load->plan, engine, on_record, load, stats, err);
}

static void
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

static void
load_clean_up(struct load *load)
{
    for (uint64_t w = 0; w < load->wishes_count; w++) {
        dcp_free(load->wishes[w].memory);
    }
    dcp_free(load->wishes);
    dcp_read_plan_clean_up(&load->plan);
}

/* Random boxes of every tensor. */
static void
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

/* ---- cases ---- */

static void
random_boxes_come_back_from_a_real_disk(void)
{
    const struct dcp_io *io = dcp_io_posix();
    char path[256];
    const char *base = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/dcp_reader_XXXXXX", base != NULL ? base : "/tmp");
    CHECK(mkdtemp(path) != NULL);
    int dirfd = io->open_dir(io->ctx, path);
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct world_options options = {.seed = seed,
                                        .tensors = (uint32_t)(seed * 5 % 20),
                                        .objects = (uint32_t)(seed % 3),
                                        .thread_count = 1 + (uint32_t)(seed % 3),
                                        .file_per_item = seed % 7 == 6,
                                        .large_bytes = seed % 4 == 1 ? 7000000 : 0};
        struct world world;
        struct load load;
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {.direct = (enum dcp_direct)(seed / 2 % 2),
                                            .verify = seed % 3 != 0,
                                            .verify_all = seed % 3 == 2,
                                            .ring_buffers = 2 + (uint32_t)(seed % 3)};
        world_make(&world, &options);
        CHECK_OK(dcp_writer_run(io, dirfd, path, &world.plan, &world.layout, world.sources,
                                &world.save_id, world.n0, &engine, NULL, NULL, &err),
                 &err);
        load_init(&load, &world);
        load_add_random(&load, &world.rng, 3);
        load_add_objects(&load);
        struct dcp_read_stats stats;
        CHECK_OK(load_run(&load, io, dirfd, &engine, &stats, &err), &err);
        load_check(&load);
        CHECK_EQ(stats.verified_bytes + stats.unverified_bytes, stats.wanted_bytes);
        CHECK(engine.verify || stats.verified_bytes == 0);
        CHECK(!engine.verify_all || stats.unverified_bytes == 0);
        load_clean_up(&load);
        for (uint32_t f = 0; f < world.layout.files_count; f++) {
            char name[64];
            world_file_name(&world, f, name, sizeof name);
            CHECK_EQ(io->unlink_at(io->ctx, dirfd, name), 0);
        }
        world_clean_up(&world);
    }
    CHECK_EQ(io->close(io->ctx, dirfd), 0);
    CHECK_EQ(rmdir(path), 0);
    dcp_engine_trim();
}

static void
random_boxes_come_back_through_short_reads_and_interrupts(void)
{
    for (uint64_t seed = 0; seed < 30; seed++) {
        struct world_options options = {.seed = seed,
                                        .tensors = 10,
                                        .objects = 3,
                                        .thread_count = 2,
                                        .large_bytes = seed % 3 == 0 ? 9000000 : 0};
        struct world world;
        struct disk disk;
        struct load load;
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {.direct = seed % 2 ? DCP_DIRECT_ON : DCP_DIRECT_AUTO,
                                            .verify = true};
        world_make(&world, &options);
        disk_make(&disk, &world, 512);
        load_init(&load, &world);
        load_add_random(&load, &world.rng, 4);
        load_add_objects(&load);
        io_memory_faults(disk.fs)->short_percent = 50;
        io_memory_faults(disk.fs)->eintr_percent = 20;
        CHECK_OK(load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err), &err);
        load_check(&load);
        load_clean_up(&load);
        disk_clean_up(&disk);
        world_clean_up(&world);
    }
}

/* One tensor of `rows` x 1000 float32 in `parts` chunks. */
static void
one_tensor(struct world *world, uint64_t rows, uint64_t parts)
{
    static const struct world_options empty = {.seed = 3, .thread_count = 1};
    uint64_t size[2] = {rows, 1000}, split[2] = {parts, 1};
    world_make(world, &empty);
    dcp_layout_clean_up(&world->layout);
    dcp_free(world->md.strings);
    dcp_free(world->md.entries);
    dcp_free(world->md.chunks);
    dcp_free(world->md.dims);
    dcp_free(world->md.files);
    world_add_tensor(world, DCP_DTYPE_FLOAT32, 2, size, split);
    world_finish(world, 1, false);
}

static void
whole_aligned_tensors_are_read_straight_into_place(void)
{
    struct world world;
    struct disk disk;
    one_tensor(&world, 3000, 2);
    disk_make(&disk, &world, 512);
    for (int aligned = 0; aligned < 2; aligned++) {
        struct load load;
        struct dcp_error err = {0};
        struct dcp_read_stats stats;
        struct dcp_engine_options engine = {.direct = DCP_DIRECT_ON, .verify = true};
        uint64_t offsets[2] = {0, 0}, sizes[2] = {3000, 1000};
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, sizes, false, aligned ? 0 : 64);
        CHECK_OK(load_run(&load, disk.io, disk.dirfd, &engine, &stats, &err), &err);
        load_check(&load);
        CHECK_EQ(stats.wanted_bytes, 12000000);
        CHECK_EQ(stats.verified_bytes, 12000000);
        /* The second chunk starts 6,000,000 bytes in: on no multiple of 512. */
        CHECK(aligned ? stats.straight_bytes >= (5u << 20) : stats.straight_bytes == 0);
        load_clean_up(&load);
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

static void
partial_reads_bring_in_little_more_than_is_wanted(void)
{
    struct world world;
    struct disk disk;
    one_tensor(&world, 20000, 1); /* 80 MB */
    disk_make(&disk, &world, 512);
    struct {
        uint64_t row, rows, column, columns, most_read;
        bool all_verified, none_verified;
    } cases[] = {
        {100, 1, 0, 1000, 200000, false, true},        /* one row */
        {5000, 10000, 0, 1000, 43000000, false, false}, /* half of it, blocks at the rims aside */
        {0, 20000, 0, 500, 81000000, true, false},      /* column shards: gaps are read over, */
        {0, 20000, 3, 1, 81000000, true, false},        /* so all of it can be verified */
        {19990, 10, 0, 1000, 200000, false, true},
        {0, 20000, 0, 1000, 81000000, true, false},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        struct load load;
        struct dcp_error err = {0};
        struct dcp_read_stats stats;
        struct dcp_engine_options engine = {.direct = DCP_DIRECT_ON, .verify = true};
        uint64_t offsets[2] = {cases[c].row, cases[c].column};
        uint64_t sizes[2] = {cases[c].rows, cases[c].columns};
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, sizes, c % 2 == 1, 64);
        CHECK_OK(load_run(&load, disk.io, disk.dirfd, &engine, &stats, &err), &err);
        load_check(&load);
        CHECK_EQ(stats.wanted_bytes, cases[c].rows * cases[c].columns * 4);
        CHECK(stats.read_bytes <= cases[c].most_read);
        CHECK(!cases[c].all_verified || stats.unverified_bytes == 0);
        CHECK(!cases[c].none_verified || stats.verified_bytes == 0);
        CHECK(stats.unverified_bytes <= (2u << 20));
        load_clean_up(&load);
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

static void
a_flipped_byte_is_a_checksum_error_that_names_tensor_and_file(void)
{
    static const uint64_t row_counts[] = {10, 200, 2000}; /* 40 kB, 800 kB, 8 MB */
    for (size_t c = 0; c < 3; c++) {
        struct world world;
        struct disk disk;
        one_tensor(&world, row_counts[c], 1);
        disk_make(&disk, &world, 512);
        const struct dcp_placed_record *record = &world.layout.records[0];
        for (int where = 0; where < 3; where++) {
            uint64_t at = record->payload_offset_bytes + (record->payload_bytes - 1) * where / 2;
            disk_damage(&disk, &world, 0, at, 0x10, UINT64_MAX);
            for (int verify = 0; verify < 2; verify++) {
                struct load load;
                struct dcp_error err = {0};
                struct dcp_engine_options engine = {
                    .direct = where == 1 ? DCP_DIRECT_ON : DCP_DIRECT_AUTO, .verify = verify};
                uint64_t offsets[2] = {0, 0}, sizes[2] = {row_counts[c], 1000};
                load_init(&load, &world);
                load_add(&load, &world.rng, 0, offsets, sizes, where == 2, 0);
                int rc = load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err);
                CHECK_EQ(rc, verify ? DCP_E_CHECKSUM : 0);
                if (verify) {
                    CHECK(strstr(err.message, "tensor.0") != NULL);
                    CHECK(strstr(err.path, ".distcp") != NULL);
                    CHECK(err.offset_bytes <= at && at < err.offset_bytes + DCP_BLOCK_BYTES);
                }
                load_clean_up(&load);
            }
            disk_damage(&disk, &world, 0, at, 0x10, UINT64_MAX);
        }
        disk_clean_up(&disk);
        world_clean_up(&world);
    }
}

static void
damaged_objects_and_block_tables_are_found(void)
{
    struct world_options options = {.seed = 8, .objects = 1, .thread_count = 1,
                                    .large_bytes = 4000000};
    struct world world;
    struct disk disk;
    world_make(&world, &options);
    disk_make(&disk, &world, 512);
    uint64_t at[] = {world.layout.records[0].offset_bytes + 70,
                     world.layout.files[0].table_offset_bytes + 60};
    for (int c = 0; c < 2; c++) {
        struct load load;
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {.verify = true};
        disk_damage(&disk, &world, 0, at[c], 1, UINT64_MAX);
        load_init(&load, &world);
        load_add_random(&load, &world.rng, 1);
        load_add_objects(&load);
        int rc = load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err);
        CHECK(rc == DCP_E_CHECKSUM || rc == DCP_E_CORRUPT);
        CHECK(strstr(err.path, ".distcp") != NULL);
        load_clean_up(&load);
        disk_damage(&disk, &world, 0, at[c], 1, UINT64_MAX);
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

static void
truncated_foreign_and_missing_files_are_named(void)
{
    struct world world;
    uint64_t offsets[2] = {0, 0}, sizes[2] = {600, 1000};
    one_tensor(&world, 600, 1);
    for (int c = 0; c < 4; c++) {
        static const int codes[] = {DCP_E_CORRUPT, DCP_E_STALE, DCP_E_NOENT, DCP_E_CORRUPT};
        struct disk disk;
        struct load load;
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {.verify = true};
        disk_make(&disk, &world, 512);
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, sizes, false, 0);
        char name[64];
        world_file_name(&world, 0, name, sizeof name);
        if (c == 0) {
            disk_damage(&disk, &world, 0, 0, 0, 1000000);
        } else if (c == 1) {
            world.md.save_id.bytes[3] ^= 1;
        } else if (c == 2) {
            CHECK_EQ(disk.io->unlink_at(disk.io->ctx, disk.dirfd, name), 0);
        } else {
            disk_damage(&disk, &world, 0, 20, 1, UINT64_MAX); /* the header */
        }
        CHECK_EQ(load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err), codes[c]);
        CHECK(strstr(err.message, name) != NULL);
        if (c == 1) {
            world.md.save_id.bytes[3] ^= 1;
        }
        load_clean_up(&load);
        disk_clean_up(&disk);
    }
    world_clean_up(&world);
}

static void
file_names_that_leave_the_directory_are_refused(void)
{
    static const char *const names[] = {"/etc/hostname", "../x", "a/../../x", ".."};
    struct world world;
    struct disk disk;
    one_tensor(&world, 10, 1);
    disk_make(&disk, &world, 512);
    char *kept = world.md.strings;
    struct dcp_md_file kept_file = world.md.files[0];
    for (int c = 0; c < 4; c++) {
        struct load load;
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {0};
        uint64_t offsets[2] = {0, 0}, sizes[2] = {10, 1000};
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, sizes, false, 0);
        char strings[256];
        memcpy(strings, kept, world.md.strings_len);
        strcpy(strings + world.md.strings_len, names[c]);
        world.md.strings = strings;
        world.md.files[0].name = world.md.strings_len;
        world.md.files[0].name_len = (uint32_t)strlen(names[c]);
        CHECK_EQ(load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err), DCP_E_CORRUPT);
        world.md.strings = kept;
        world.md.files[0] = kept_file;
        load_clean_up(&load);
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

/* ---- records as stock torch writes them: no header, no table, any strides ---- */

static void
replace_all(uint8_t *bytes, uint64_t len, const void *from, const void *to, size_t n)
{
    for (uint64_t i = 0; i + n <= len; i++) {
        if (memcmp(bytes + i, from, n) == 0) {
            memcpy(bytes + i, to, n);
        }
    }
}

/* The record of a (rows, 1000) tensor, stored transposed: strides (1, rows). */
static void
put_transposed(struct disk *disk, struct world *world, uint64_t rows)
{
    const struct world_tensor *tensor = &world->tensors[0];
    uint64_t sizes[2] = {rows, 1000};
    struct dcp_tensor_shape shape = {
        .dtype = DCP_DTYPE_FLOAT32, .ndim = 2, .sizes = sizes, .payload_bytes = rows * 4000};
    struct dcp_buf file = {0}, pickle = {0};
    uint8_t *stored = dcp_malloc(tensor->bytes);
    for (uint64_t r = 0; r < rows; r++) {
        for (uint64_t c = 0; c < 1000; c++) {
            memcpy(stored + (c * rows + r) * 4, tensor->image + (r * 1000 + c) * 4, 4);
        }
    }
    uint32_t blocks[64];
    for (uint64_t b = 0; b * DCP_BLOCK_BYTES < tensor->bytes; b++) {
        blocks[b] = world_crc32(stored + b * DCP_BLOCK_BYTES,
                                dcp_min_u64(DCP_BLOCK_BYTES, tensor->bytes - b * DCP_BLOCK_BYTES));
    }
    dcp_record_put_head(&file, tensor->bytes);
    dcp_buf_put(&file, stored, tensor->bytes);
    size_t tail = file.len;
    dcp_record_put_tail(&file, &shape, world_crc32(stored, tensor->bytes), blocks);
    /* Its pickle says (1000, 1): swap to (1, rows), and mend the pickle's CRC. */
    uint8_t row_major[] = {'M', 0xe8, 3, 'K', 1, 0x86};
    uint8_t transposed[] = {'K', 1, 'M', (uint8_t)rows, (uint8_t)(rows >> 8), 0x86};
    dcp_pickle_put_tensor(&pickle, DCP_DTYPE_FLOAT32, 2, sizes);
    uint32_t old_crc = world_crc32(pickle.data, pickle.len);
    replace_all(pickle.data, pickle.len, row_major, transposed, 6);
    uint32_t new_crc = world_crc32(pickle.data, pickle.len);
    CHECK(old_crc != new_crc);
    replace_all(file.data + tail, file.len - tail, row_major, transposed, 6);
    replace_all(file.data + tail, file.len - tail, &old_crc, &new_crc, 4);
    char name[64];
    world_file_name(world, 0, name, sizeof name);
    io_memory_put_file(disk->fs, "/d", name, file.data, file.len);
    world->md.chunks[0].offset_bytes = 0;
    world->md.chunks[0].length_bytes = file.len;
    world->md.is_native = false;
    dcp_buf_clean_up(&file);
    dcp_buf_clean_up(&pickle);
    dcp_free(stored);
}

static void
foreign_records_are_parsed_and_their_strides_honoured(void)
{
    static const uint64_t row_counts[] = {260, 300, 3000}; /* whole, then in windows */
    for (int c = 0; c < 12; c++) {
        uint64_t rows = row_counts[c % 3];
        struct world world;
        struct disk disk;
        struct load load;
        struct dcp_error err = {0};
        struct dcp_read_stats stats;
        struct dcp_engine_options engine = {.direct = c % 2 ? DCP_DIRECT_ON : DCP_DIRECT_AUTO,
                                            .verify = true};
        one_tensor(&world, rows, 1);
        disk_make(&disk, &world, 512);
        if (c >= 6) {
            put_transposed(&disk, &world, rows);
        } else {
            world.md.is_native = false; /* our record, unknown as ours */
        }
        load_init(&load, &world);
        uint64_t offsets[2] = {0, 0}, sizes[2] = {rows, 1000};
        load_add(&load, &world.rng, 0, offsets, sizes, c % 3 == 1, 0);
        CHECK_OK(load_run(&load, disk.io, disk.dirfd, &engine, &stats, &err), &err);
        load_check(&load);
        CHECK_EQ(stats.verified_bytes, rows * 4000);
        load_clean_up(&load);

        load_init(&load, &world);
        load_add_random(&load, &world.rng, 6);
        CHECK_OK(load_run(&load, disk.io, disk.dirfd, &engine, &stats, &err), &err);
        load_check(&load);
        load_clean_up(&load);

        disk_damage(&disk, &world, 0, world.md.chunks[0].offset_bytes + 2000, 1, UINT64_MAX);
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, sizes, false, 0);
        CHECK_EQ(load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err), DCP_E_CHECKSUM);
        CHECK(strstr(err.message, "tensor.0") != NULL);
        load_clean_up(&load);
        disk_clean_up(&disk);
        world_clean_up(&world);
    }
}

static void
objects_larger_than_any_buffer_are_handed_over_whole(void)
{
    struct world_options options = {.seed = 8, .thread_count = 1};
    struct world world;
    struct disk disk;
    struct load load;
    struct dcp_error err = {0};
    world_make(&world, &options);
    dcp_layout_clean_up(&world.layout);
    dcp_free(world.md.strings);
    dcp_free(world.md.entries);
    dcp_free(world.md.chunks);
    dcp_free(world.md.dims);
    dcp_free(world.md.files);
    world_add_object(&world, 10);
    world_add_object(&world, 5000000);
    world_add_object(&world, 3000000);
    world_finish(&world, 1, false);
    for (int direct = 0; direct < 2; direct++) {
        struct dcp_engine_options engine = {.direct = direct ? DCP_DIRECT_ON : DCP_DIRECT_OFF,
                                            .verify = true,
                                            .ring_buffer_bytes = 4096};
        disk_make(&disk, &world, 512);
        load_init(&load, &world);
        load_add_objects(&load);
        CHECK_OK(load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err), &err);
        CHECK_EQ(load.records_seen, 3);
        load_clean_up(&load);
        disk_clean_up(&disk);
    }
    world_clean_up(&world);
}

static void
any_failing_call_fails_the_load_cleanly(void)
{
    static const int calls[] = {IO_OPEN_AT, IO_PREAD, IO_FSTAT};
    struct world_options options = {
        .seed = 4, .tensors = 6, .objects = 2, .thread_count = 3, .large_bytes = 6000000};
    struct world world;
    struct disk disk;
    world_make(&world, &options);
    disk_make(&disk, &world, 512);
    for (size_t c = 0; c < sizeof calls / sizeof calls[0]; c++) {
        for (uint64_t nth = 1; nth < 8; nth++) {
            struct load load;
            struct dcp_error err = {0};
            struct dcp_engine_options engine = {.direct = nth % 2 ? DCP_DIRECT_ON : DCP_DIRECT_OFF,
                                                .verify = true};
            load_init(&load, &world);
            load_add_random(&load, &world.rng, 1);
            load_add_objects(&load);
            io_memory_faults(disk.fs)->fail_call = calls[c];
            io_memory_faults(disk.fs)->fail_nth = nth;
            io_memory_faults(disk.fs)->fail_errno = EIO;
            int rc = load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err);
            if (io_memory_faults(disk.fs)->fail_nth == 0) {
                CHECK(rc == DCP_E_IO ||
                      (rc == DCP_E_UNSUPPORTED && calls[c] == IO_OPEN_AT)); /* the direct one */
                CHECK(strstr(err.path, ".distcp") != NULL);
            } else {
                CHECK_EQ(rc, 0);
            }
            io_memory_faults(disk.fs)->fail_nth = 0;
            CHECK_EQ(io_memory_open_files(disk.fs), 1);
            load_clean_up(&load);
        }
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

static void
cancel_stops_it_and_progress_counts_what_is_wanted(void)
{
    struct world world;
    struct disk disk;
    atomic_int cancel = 1;
    _Atomic uint64_t progress = 0;
    uint64_t offsets[2] = {0, 0}, sizes[2] = {2000, 1000};
    one_tensor(&world, 2000, 1);
    disk_make(&disk, &world, 512);
    for (int c = 0; c < 2; c++) {
        struct load load;
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {
            .verify = true, .cancel = &cancel, .progress_bytes = &progress};
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, sizes, false, 64);
        CHECK_EQ(load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err),
                 c == 0 ? DCP_E_CANCELLED : 0);
        load_clean_up(&load);
        cancel = 0;
    }
    CHECK_EQ(progress, 8000000);
    disk_clean_up(&disk);
    world_clean_up(&world);
}

CTEST_MAIN(RUN(random_boxes_come_back_from_a_real_disk);
           RUN(random_boxes_come_back_through_short_reads_and_interrupts);
           RUN(whole_aligned_tensors_are_read_straight_into_place);
           RUN(partial_reads_bring_in_little_more_than_is_wanted);
           RUN(a_flipped_byte_is_a_checksum_error_that_names_tensor_and_file);
           RUN(damaged_objects_and_block_tables_are_found);
           RUN(truncated_foreign_and_missing_files_are_named);
           RUN(file_names_that_leave_the_directory_are_refused);
           RUN(foreign_records_are_parsed_and_their_strides_honoured);
           RUN(objects_larger_than_any_buffer_are_handed_over_whole);
           RUN(any_failing_call_fails_the_load_cleanly);
           RUN(cancel_stops_it_and_progress_counts_what_is_wanted);)

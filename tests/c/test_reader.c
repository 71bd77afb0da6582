/*
 * test_reader.c: what the writer wrote comes back into any target.
 */
#include "ctest.h"

#include <unistd.h>

#include "engine_load.h"

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
        {100, 1, 0, 1000, 200000, false, true},         /* one row */
        {5000, 10000, 0, 1000, 43000000, false, false}, /* half of it, blocks at the rims aside */
        {0, 20000, 0, 500, 81000000, true, false},      /* column shards: gaps are read over, */
        {0, 20000, 3, 1, 81000000, true, false},        /* so all of it can be verified */
        {19990, 10, 0, 1000, 200000, false, true},      {0, 20000, 0, 1000, 81000000, true, false},
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

static int
count_record(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
             const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    uint64_t *count = ctx;
    (void)err;
    CHECK(bytes != NULL && len == plan->md->chunks[item->chunk].length_bytes);
    ++*count;
    return 0;
}

/* The metadata's words about the one chunk: as many elements in another shape. */
static void
reshape_metadata(struct world *world, uint64_t rows)
{
    uint64_t *size = world->md.dims + world->md.entries[0].size;
    uint64_t *chunk = world->md.dims + world->md.chunks[0].dims + 2;
    size[0] = chunk[0] = 2 * rows;
    size[1] = chunk[1] = 500;
}

static void
records_that_are_not_what_the_metadata_says_are_damage_or_handed_over(void)
{
    static const uint64_t row_counts[] = {2, 3000}; /* read whole, and in windows first */
    for (int c = 0; c < 8; c++) {
        uint64_t rows = row_counts[c % 2], records = 0;
        bool decide = c % 4 >= 2, other_shape = c >= 4;
        struct world world;
        struct disk disk;
        struct load load;
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {.verify = true};
        uint64_t offsets[2] = {0, 0}, sizes[2] = {rows, 1000}, reshaped[2] = {2 * rows, 500};
        one_tensor(&world, rows, 1);
        disk_make(&disk, &world, 512);
        world.md.is_native = false;
        if (other_shape) {
            reshape_metadata(&world, rows);
        } else {
            world.md.entries[0].dtype = DCP_DTYPE_INT32; /* its record says float32 */
        }
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, other_shape ? reshaped : sizes, false, 0);
        load.plan.records_decide = decide;
        CHECK_OK(dcp_read_plan_build(&load.plan, true, NULL, &err), &err);
        int rc = dcp_reader_run(disk.io, disk.dirfd, "/d", &load.plan, &engine, count_record,
                                &records, NULL, &err);
        bool handed_over = decide || !other_shape;
        CHECK_EQ(rc, handed_over ? 0 : DCP_E_CORRUPT);
        CHECK_EQ(records, handed_over ? 1 : 0);
        CHECK(handed_over || strstr(err.message, "another shape or dtype") != NULL);
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

CTEST_MAIN(RUN(random_boxes_come_back_from_a_real_disk);
           RUN(random_boxes_come_back_through_short_reads_and_interrupts);
           RUN(whole_aligned_tensors_are_read_straight_into_place);
           RUN(partial_reads_bring_in_little_more_than_is_wanted);
           RUN(foreign_records_are_parsed_and_their_strides_honoured);
           RUN(records_that_are_not_what_the_metadata_says_are_damage_or_handed_over);
           RUN(objects_larger_than_any_buffer_are_handed_over_whole);)

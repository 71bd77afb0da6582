/*
 * test_image.c: an image holds, byte for byte, the files that the writer would have made.
 */
#include "ctest.h"

#include "image_world.h"
#include "io_memory.h"

static const struct world_options small_mix = {
    .seed = 5, .tensors = 12, .objects = 4, .thread_count = 2};

/* Every kind of layout: several files, one per item, empty ones, blocks, hashes; sources of every
 * shape, order and stride. */
static struct world_options
layout_of(uint64_t seed)
{
    return (struct world_options){.seed = seed,
                                  .tensors = (uint32_t)(seed * 7 % 20),
                                  .objects = (uint32_t)(seed % 4),
                                  .thread_count = 1 + (uint32_t)(seed % 4),
                                  .file_per_item = seed % 5 == 4,
                                  .large_bytes = seed % 6 == 1 ? 3000000 + 4096 * seed : 0,
                                  .content_hash = seed / 2 % 2 == 0};
}

static void
images_equal_naive_files_whatever_the_memory_held(void)
{
    for (uint64_t seed = 0; seed < 120; seed++) {
        struct world_options options = layout_of(seed);
        struct dcp_engine_options engine = {0};
        struct world world;
        struct world_image image = {0};
        struct dcp_error err = {0};
        world_make(&world, &options);
        CHECK_OK(world_image_make(&world, &engine, NULL, &image, &err), &err);
        CHECK(world_image_check(&world, &image));
        world_image_clean_up(&image);
        world_clean_up(&world);
    }
}

static void
the_writer_makes_the_same_files_and_checksums(void)
{
    for (uint64_t seed = 0; seed < 60; seed++) {
        struct world_options options = layout_of(seed);
        struct io_memory *fs = io_memory_new(seed);
        struct dcp_io *io = &io_memory_process(fs, 0)->io;
        struct dcp_engine_options engine = {.ring_buffer_bytes = 4096u << (seed % 8)};
        struct world world;
        struct world_image image = {0};
        struct dcp_error err = {0};
        if (seed % 3 != 0) {
            io_memory_set_dio(fs, (struct dcp_dio_align){512, 512, false});
        }
        CHECK_EQ(io->mkdirs(io->ctx, "/d"), 0);
        int dirfd = io->open_dir(io->ctx, "/d");
        world_make(&world, &options);
        size_t crcs_bytes = (world.layout.records_count + 1) * sizeof(uint32_t);
        uint32_t *written = dcp_calloc(1, crcs_bytes), *filled = dcp_calloc(1, crcs_bytes);
        CHECK_OK(world_write(io, dirfd, &world, &engine, written, NULL, &err), &err);
        CHECK_OK(world_image_make(&world, &engine, filled, &image, &err), &err);
        CHECK(memcmp(written, filled, crcs_bytes) == 0);
        for (uint32_t f = 0; f < image.image.files_count; f++) {
            char name[64];
            size_t len = 0;
            world_file_name(&world, f, name, sizeof name);
            const uint8_t *file = io_memory_file(fs, "/d", name, &len);
            CHECK(file != NULL && len == image.image.files[f].length_bytes &&
                  memcmp(file, image.memory + image.image.files[f].offset_bytes, len) == 0);
        }
        io->close(io->ctx, dirfd);
        dcp_free(written);
        dcp_free(filled);
        world_image_clean_up(&image);
        world_clean_up(&world);
        io_memory_free(fs);
    }
    dcp_engine_trim();
}

static void
places_are_apart_and_their_sums_are_those_of_the_layout(void)
{
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct world_options options = layout_of(seed);
        struct world world;
        struct dcp_image image;
        struct dcp_error err = {0};
        world_make(&world, &options);
        CHECK_OK(dcp_image_place(&world.layout, 77, world.n0, &image, &err), &err);
        uint64_t at = 0, payload = 0;
        for (uint32_t f = 0; f < image.files_count; f++) {
            CHECK_EQ(image.files[f].offset_bytes, at);
            CHECK_EQ(image.files[f].n, world.n0 + f);
            at += dcp_align_up(image.files[f].length_bytes, DCP_DIRECT_ALIGN_BYTES);
        }
        for (uint32_t r = 0; r < world.layout.records_count; r++) {
            payload += world.layout.records[r].payload_bytes;
        }
        CHECK_EQ(image.bytes, at);
        CHECK_EQ(image.rank, 77);
        CHECK_EQ(image.total_bytes, world.layout.total_bytes);
        CHECK_EQ(image.payload_bytes, payload);
        dcp_image_clean_up(&image);
        dcp_image_clean_up(&image);
        world_clean_up(&world);
    }
}

static void
what_cannot_be_placed_is_refused(void)
{
    struct dcp_placed_file files[] = {{.length_bytes = DCP_MAX_FILE_BYTES},
                                      {.length_bytes = DCP_MAX_FILE_BYTES, .index = 1},
                                      {.length_bytes = DCP_MAX_FILE_BYTES, .index = 2}};
    struct dcp_layout layout = {.files = files, .files_count = 3};
    struct dcp_image image;
    struct dcp_error err = {0};
    CHECK_EQ(dcp_image_place(&layout, 0, 0, &image, &err), DCP_E_LIMIT);
    layout.files_count = 1;
    dcp_error_clear(&err);
    CHECK_OK(dcp_image_place(&layout, 0, UINT32_MAX - 1, &image, &err), &err);
    dcp_image_clean_up(&image);
    CHECK_EQ(dcp_image_place(&layout, 0, UINT32_MAX, &image, &err), DCP_E_LIMIT);
    CHECK_EQ(dcp_image_place(&layout, 0, UINT64_MAX, &image, &err), DCP_E_LIMIT);
}

static void
hashes_that_are_given_are_kept_as_they_are(void)
{
    struct world_options options = small_mix;
    struct world world;
    struct world_image image = {0};
    struct dcp_error err = {0};
    uint32_t seen = 0;
    options.content_hash = true;
    world_make(&world, &options);
    struct dcp_hash128 *hashes = dcp_malloc_array(world.plan.items_count, sizeof *hashes);
    for (uint32_t i = 0; i < world.plan.items_count; i++) {
        hashes[i] = (struct dcp_hash128){1000 + i, ~(uint64_t)i};
    }
    struct dcp_engine_options engine = {.hashes = hashes};
    CHECK_OK(world_image_make(&world, &engine, NULL, &image, &err), &err);
    for (uint32_t f = 0; f < world.layout.files_count; f++) {
        const struct dcp_placed_file *placed = &world.layout.files[f];
        const uint8_t *file = image.memory + image.image.files[f].offset_bytes;
        struct dcp_hash_table table;
        CHECK_OK(dcp_hash_table_parse(file + placed->hash_offset_bytes, placed->hash_bytes,
                                      &world.save_id, &table, &err),
                 &err);
        for (uint32_t i = 0; i < placed->records_count; i++, seen++) {
            const struct dcp_placed_record *record = &world.layout.records[seen];
            const struct dcp_hash_entry *found = dcp_hash_table_find(&table, record->offset_bytes);
            CHECK(found != NULL && dcp_hash128_equal(found->hash, hashes[record->item]));
        }
        dcp_hash_table_clean_up(&table);
    }
    CHECK(seen > 4);
    dcp_free(hashes);
    world_image_clean_up(&image);
    world_clean_up(&world);
}

static void
cancel_stops_it_and_progress_counts_payload(void)
{
    struct world world;
    struct world_image image = {0};
    struct dcp_error err = {0};
    atomic_int cancel = 1;
    _Atomic uint64_t progress = 0;
    struct dcp_engine_options engine = {.cancel = &cancel, .progress_bytes = &progress};
    world_make(&world, &small_mix);
    CHECK_EQ(world_image_make(&world, &engine, NULL, &image, &err), DCP_E_CANCELLED);
    CHECK_EQ(progress, 0);
    cancel = 0;
    dcp_error_clear(&err);
    CHECK_OK(world_image_make(&world, &engine, NULL, &image, &err), &err);
    CHECK_EQ(progress, image.image.payload_bytes);
    world_image_clean_up(&image);
    world_clean_up(&world);
}

static void
an_item_without_memory_is_named(void)
{
    struct world world;
    struct world_image image;
    struct dcp_error err = {0};
    struct dcp_engine_options engine = {0};
    world_make(&world, &small_mix);
    world.sources[world.layout.records[0].item].data = NULL;
    CHECK_EQ(world_image_make(&world, &engine, NULL, &image, &err), DCP_E_INVALID);
    CHECK(strstr(err.message, "object.0") != NULL);
    world_clean_up(&world);
}

/* A layout that says less than its records take: found out, and nothing lies behind the place. */
static void
nothing_is_put_behind_the_place_of_a_file(void)
{
    struct dcp_engine_options engine = {0};
    struct world world;
    struct dcp_image image;
    struct dcp_error err = {0};
    uint64_t size[] = {100000}, parts[] = {1};
    world_make(&world, &(struct world_options){.seed = 3, .thread_count = 1});
    world_add_tensor(&world, DCP_DTYPE_UINT8, 1, size, parts);
    dcp_layout_clean_up(&world.layout);
    CHECK_OK(dcp_layout_build(&world.plan, NULL, &world.layout, &err), &err);
    CHECK_OK(dcp_image_place(&world.layout, world.plan.rank, world.n0, &image, &err), &err);
    uint8_t *memory = dcp_malloc(image.bytes);
    for (uint64_t length = 0; length < image.total_bytes; length += 4001) {
        image.files[0].length_bytes = length;
        memset(memory, WORLD_IMAGE_GARBAGE, image.bytes);
        dcp_error_clear(&err);
        CHECK_EQ(dcp_image_fill(&image, memory, &world.plan, &world.layout, world.sources,
                                &world.save_id, world.n0, &engine, NULL, &err),
                 DCP_E_INTERNAL);
        bool touched = false;
        for (uint64_t at = length; at < image.bytes; at++) {
            touched = touched || memory[at] != WORLD_IMAGE_GARBAGE;
        }
        CHECK(!touched);
    }
    dcp_free(memory);
    dcp_image_clean_up(&image);
    world_clean_up(&world);
}

static void
running_out_of_memory_anywhere_is_an_error_without_a_leak(void)
{
    struct world_options options = {
        .seed = 1, .tensors = 7, .objects = 1, .thread_count = 2, .large_bytes = 3000000};
    struct dcp_engine_options engine = {0};
    struct world world;
    options.content_hash = true;
    world_make(&world, &options);
    int rc = DCP_E_NOMEM;
    for (uint64_t nth = 1; rc != 0 && nth < 1000; nth++) {
        struct world_image image;
        struct dcp_error err = {0};
        uint64_t live = dcp_alloc_live_bytes();
        dcp_alloc_fail_after(nth);
        rc = world_image_make(&world, &engine, NULL, &image, &err);
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        if (rc == 0) {
            CHECK(nth > 5);
            world_image_clean_up(&image);
        }
        CHECK_EQ(dcp_alloc_live_bytes(), live);
    }
    CHECK_EQ(rc, 0);
    world_clean_up(&world);
}

CTEST_MAIN(RUN(images_equal_naive_files_whatever_the_memory_held);
           RUN(the_writer_makes_the_same_files_and_checksums);
           RUN(places_are_apart_and_their_sums_are_those_of_the_layout);
           RUN(what_cannot_be_placed_is_refused); RUN(hashes_that_are_given_are_kept_as_they_are);
           RUN(cancel_stops_it_and_progress_counts_payload); RUN(an_item_without_memory_is_named);
           RUN(nothing_is_put_behind_the_place_of_a_file);
           RUN(running_out_of_memory_anywhere_is_an_error_without_a_leak);)

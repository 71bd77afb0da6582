/*
 * test_reader_damage.c: damaged, foreign and missing files fail a load by name, and cleanly.
 */
#include "ctest.h"

#include <errno.h>

#include "engine_load.h"

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
    struct world_options options = {
        .seed = 8, .objects = 1, .thread_count = 1, .large_bytes = 4000000};
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

/* A linked file keeps the header and the block table of the save that wrote it. */
static void
files_of_saves_that_the_metadata_accepts_are_read_and_verified(void)
{
    struct world world;
    struct disk disk;
    char name[64];
    one_tensor(&world, 2000, 1); /* 8 blocks */
    disk_make(&disk, &world, 512);
    world_file_name(&world, 0, name, sizeof name);
    world.md.save_id.bytes[0] ^= 1;
    /* The writer's id below, between and above two others, then not among them. */
    for (int at = 0; at < 4; at++) {
        struct dcp_save_id accepted[3] = {world.save_id, world.save_id, world.save_id};
        struct load load;
        struct dcp_error err = {0};
        struct dcp_read_stats stats = {0};
        struct dcp_engine_options engine = {.verify = true};
        uint64_t offsets[2] = {262, 0}, sizes[2] = {1500, 1000};
        for (int i = 0; i < 3; i++) {
            accepted[i].bytes[15] = (uint8_t)(world.save_id.bytes[15] + i - at);
        }
        world.md.accepted = accepted;
        world.md.accepted_count = 3;
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, sizes, false, 64);
        CHECK_EQ(load_run(&load, disk.io, disk.dirfd, &engine, &stats, &err),
                 at < 3 ? 0 : DCP_E_STALE);
        if (at < 3) {
            load_check(&load);
            CHECK(stats.verified_bytes > 4u << 20); /* by the checksums of blocks */
        } else {
            CHECK(strstr(err.message, name) != NULL);
        }
        load_clean_up(&load);
    }
    world.md.accepted = NULL;
    world.md.accepted_count = 0;
    disk_clean_up(&disk);
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

CTEST_MAIN(RUN(a_flipped_byte_is_a_checksum_error_that_names_tensor_and_file);
           RUN(damaged_objects_and_block_tables_are_found);
           RUN(truncated_foreign_and_missing_files_are_named);
           RUN(files_of_saves_that_the_metadata_accepts_are_read_and_verified);
           RUN(file_names_that_leave_the_directory_are_refused);
           RUN(any_failing_call_fails_the_load_cleanly);
           RUN(cancel_stops_it_and_progress_counts_what_is_wanted);)

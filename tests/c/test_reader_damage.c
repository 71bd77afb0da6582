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

/* ---- files that lie in the page cache ---- */

/* Of a window that is lost in the end: there is nothing to compare. */
static int
on_lost_record(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
               const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    (void)ctx;
    (void)plan;
    (void)item;
    (void)bytes;
    (void)len;
    (void)err;
    return 0;
}

static void
cached_files_are_verified_and_never_believed_when_a_page_is_lost(void)
{
    struct world_options options = {
        .seed = 9, .tensors = 8, .objects = 2, .large_bytes = 9000000, .thread_count = 2};
    struct world world;
    struct disk disk;
    world_make(&world, &options);
    disk_make(&disk, &world, 512);
    io_memory_faults(disk.fs)->cached_percent = 100;
    for (uint64_t lost = 0; lost < 6; lost++) {
        for (int verify = 0; verify < 2; verify++) {
            struct load load;
            struct dcp_error err = {0};
            struct dcp_read_stats stats = {0};
            struct dcp_engine_options engine = {.verify = verify};
            load_init(&load, &world);
            load_add_random(&load, &world.rng, 2);
            load_add_objects(&load);
            io_memory_faults(disk.fs)->lose_map = lost;
            uint64_t maps = io_memory_calls_of(disk.fs, IO_MAP);
            /* A lost object would fail its comparison before the load does. */
            CHECK_OK(dcp_read_plan_build(&load.plan, true, NULL, &err), &err);
            int rc = dcp_reader_run(disk.io, disk.dirfd, "/d", &load.plan, &engine,
                                    lost > 0 ? on_lost_record : on_record, &load, &stats, &err);
            CHECK(io_memory_calls_of(disk.fs, IO_MAP) > maps);
            if (lost > 0 && io_memory_faults(disk.fs)->lose_map == 0) {
                CHECK_EQ(rc, DCP_E_IO);
                CHECK(strstr(err.message, ".distcp could not be read between bytes") != NULL);
            } else {
                CHECK_OK(rc, &err);
                load_check(&load);
                CHECK(stats.hot_bytes > 0 && stats.hot_bytes <= stats.read_bytes);
                CHECK(!verify || lost > 0 || stats.verified_bytes > 0);
            }
            io_memory_faults(disk.fs)->lose_map = 0;
            CHECK_EQ(io_memory_lent_maps(disk.fs), 0);
            load_clean_up(&load);
        }
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

static void
what_cannot_be_mapped_is_read(void)
{
    struct world_options options = {
        .seed = 10, .tensors = 8, .objects = 2, .large_bytes = 9000000, .thread_count = 2};
    struct world world;
    struct disk disk;
    world_make(&world, &options);
    disk_make(&disk, &world, 512);
    io_memory_faults(disk.fs)->cached_percent = 100;
    for (uint64_t nth = 0; nth < 5; nth++) {
        struct load load;
        struct dcp_error err = {0};
        struct dcp_read_stats stats = {0};
        struct dcp_engine_options engine = {.verify = true};
        struct dcp_io without = *disk.io;
        without.map = NULL;
        without.unmap = NULL;
        load_init(&load, &world);
        load_add_random(&load, &world.rng, 2);
        load_add_objects(&load);
        io_memory_faults(disk.fs)->fail_call = IO_MAP;
        io_memory_faults(disk.fs)->fail_nth = nth;
        io_memory_faults(disk.fs)->fail_errno = nth % 2 ? ENODEV : EIO;
        CHECK_OK(load_run(&load, nth == 0 ? &without : disk.io, disk.dirfd, &engine, &stats, &err),
                 &err);
        /* There may be as few as one window: what was refused once is not asked for again. */
        CHECK(nth > 1 || io_memory_faults(disk.fs)->fail_nth == 0);
        io_memory_faults(disk.fs)->fail_nth = 0;
        load_check(&load);
        CHECK_EQ(stats.unverified_bytes + stats.verified_bytes, stats.wanted_bytes);
        CHECK(stats.hot_bytes > 0);
        load_clean_up(&load);
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

static void
a_flipped_byte_of_a_cached_file_is_a_checksum_error(void)
{
    struct world world;
    struct disk disk;
    one_tensor(&world, 6000, 1); /* 24 MB: several windows */
    disk_make(&disk, &world, 512);
    const struct dcp_placed_record *record = &world.layout.records[0];
    uint64_t offsets[2] = {0, 0}, sizes[2] = {6000, 1000};
    for (int mode = 0; mode < 2; mode++) {
        for (int where = 0; where < 3; where++) {
            struct load load;
            struct dcp_error err = {0};
            struct dcp_engine_options engine = {.verify = true};
            struct dcp_io io = *disk.io;
            uint64_t at = record->payload_offset_bytes + (record->payload_bytes - 1) * where / 2;
            io_memory_faults(disk.fs)->cached_percent = 100;
            if (mode == 1) {
                io.map = NULL;
            }
            disk_damage(&disk, &world, 0, at, 4, UINT64_MAX);
            load_init(&load, &world);
            load_add(&load, &world.rng, 0, offsets, sizes, where == 1, 64);
            CHECK_EQ(load_run(&load, &io, disk.dirfd, &engine, NULL, &err), DCP_E_CHECKSUM);
            CHECK(strstr(err.message, "tensor.0") != NULL);
            CHECK(err.offset_bytes <= at && at < err.offset_bytes + DCP_BLOCK_BYTES);
            load_clean_up(&load);
            disk_damage(&disk, &world, 0, at, 4, UINT64_MAX);
        }
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

/* ---- many reads in flight ---- */

/* Half of each of 300 rows of 128 KiB: every row is a read of its own. */
static void
columns_make(struct world *world, struct disk *disk)
{
    uint64_t size[2] = {300, 32768}, split[2] = {1, 1};
    world_begin(world);
    world_add_tensor(world, DCP_DTYPE_FLOAT32, 2, size, split);
    world_finish(world, 1, false);
    disk_make(disk, world, 512);
}

static void
a_failure_amid_many_reads_in_flight_ends_them_all(void)
{
    struct world world;
    struct disk disk;
    columns_make(&world, &disk);
    uint64_t offsets[2] = {0, 16384}, sizes[2] = {300, 16384};
    for (uint64_t nth = 0; nth < 240; nth += nth < 8 ? 1 : 29) {
        struct load load;
        struct dcp_error err = {0};
        struct dcp_read_stats stats;
        struct dcp_engine_options engine = {.verify = true, .direct = DCP_DIRECT_ON};
        load_init(&load, &world);
        load_add(&load, &world.rng, 0, offsets, sizes, nth % 2 == 1, 64);
        io_memory_faults(disk.fs)->fail_call = IO_PREAD;
        io_memory_faults(disk.fs)->fail_nth = nth;
        io_memory_faults(disk.fs)->fail_errno = EIO;
        io_memory_faults(disk.fs)->short_percent = 20;
        io_memory_faults(disk.fs)->eintr_percent = 10;
        int rc = load_run(&load, disk.io, disk.dirfd, &engine, &stats, &err);
        CHECK_EQ(rc, nth == 0 ? 0 : DCP_E_IO);
        if (nth == 0) {
            load_check(&load);
            CHECK(stats.read_bytes < stats.wanted_bytes * 11 / 10);
            CHECK(stats.requests_count >= 300);
        } else {
            CHECK(strstr(err.path, ".distcp") != NULL);
        }
        io_memory_faults(disk.fs)->fail_nth = 0;
        CHECK_EQ(io_memory_open_files(disk.fs), 1);
        load_clean_up(&load); /* frees the target: no read is in flight any more */
    }
    disk_clean_up(&disk);
    world_clean_up(&world);
}

struct canceller {
    atomic_int cancel;
    atomic_int reads;
};

static void
cancel_after_some_reads(struct io_memory_process *process, enum io_call call, const char *name)
{
    struct canceller *canceller = process->hook_ctx;
    (void)name;
    if (call == IO_PREAD && atomic_fetch_add(&canceller->reads, 1) == 40) {
        atomic_store(&canceller->cancel, 1);
    }
}

static void
cancel_with_reads_in_flight_starts_no_more_of_them(void)
{
    struct world world;
    struct disk disk;
    columns_make(&world, &disk);
    struct io_memory_process *process = io_memory_process(disk.fs, 0);
    struct canceller canceller = {0};
    uint64_t offsets[2] = {0, 0}, sizes[2] = {300, 16384};
    struct load load;
    struct dcp_error err = {0};
    struct dcp_engine_options engine = {
        .verify = true, .direct = DCP_DIRECT_ON, .cancel = &canceller.cancel};
    load_init(&load, &world);
    load_add(&load, &world.rng, 0, offsets, sizes, false, 64);
    process->before = cancel_after_some_reads;
    process->hook_ctx = &canceller;
    CHECK_EQ(load_run(&load, disk.io, disk.dirfd, &engine, NULL, &err), DCP_E_CANCELLED);
    /* One per thread may have been on its way. */
    CHECK(atomic_load(&canceller.reads) <= 41 + 8);
    process->before = NULL;
    load_clean_up(&load);
    disk_clean_up(&disk);
    world_clean_up(&world);
}

CTEST_MAIN(RUN(a_flipped_byte_is_a_checksum_error_that_names_tensor_and_file);
           RUN(damaged_objects_and_block_tables_are_found);
           RUN(truncated_foreign_and_missing_files_are_named);
           RUN(files_of_saves_that_the_metadata_accepts_are_read_and_verified);
           RUN(file_names_that_leave_the_directory_are_refused);
           RUN(any_failing_call_fails_the_load_cleanly);
           RUN(cancel_stops_it_and_progress_counts_what_is_wanted);
           RUN(cached_files_are_verified_and_never_believed_when_a_page_is_lost);
           RUN(what_cannot_be_mapped_is_read);
           RUN(a_flipped_byte_of_a_cached_file_is_a_checksum_error);
           RUN(a_failure_amid_many_reads_in_flight_ends_them_all);
           RUN(cancel_with_reads_in_flight_starts_no_more_of_them);)

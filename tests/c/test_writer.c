/*
 * test_writer.c: the files that the writer makes, and how it fails.
 */
#include "ctest.h"

#include <errno.h>
#include <unistd.h>

#include "engine_world.h"
#include "io_memory.h"

static const struct world_options small_mix = {
    .seed = 5, .tensors = 12, .objects = 4, .thread_count = 2};

/* The two ways of requests, for tests that go both. */
static const enum dcp_queue_use ways[] = {DCP_QUEUE_OFF, DCP_QUEUE_ON};
enum { WAYS = 2 };

static char temp_path[256];

static const char *
temp_dir(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(temp_path, sizeof temp_path, "%s/dcp_writer_XXXXXX", base != NULL ? base : "/tmp");
    if (mkdtemp(temp_path) == NULL) {
        perror("mkdtemp");
        exit(1);
    }
    return temp_path;
}

static void
files_equal_a_naive_image_for_random_plans(void)
{
    const struct dcp_io *io = dcp_io_posix();
    const char *path = temp_dir();
    int dirfd = io->open_dir(io->ctx, path);
    CHECK(dirfd >= 0);
    struct dcp_io_queue *probe = NULL;
    bool queues = io->queue_open(io->ctx, 4, &probe) == 0;
    if (queues) {
        io->queue_close(io->ctx, probe);
    }
    for (uint64_t seed = 0; seed < 60; seed++) {
        struct world_options options = {.seed = seed,
                                        .tensors = (uint32_t)(seed * 7 % 20),
                                        .objects = (uint32_t)(seed % 4),
                                        .thread_count = 1 + (uint32_t)(seed % 4),
                                        .file_per_item = seed % 5 == 4,
                                        .large_bytes = seed % 6 == 1 ? 3000000 : 0,
                                        .content_hash = seed / 2 % 2 == 0};
        struct dcp_engine_options engine = {.direct = (enum dcp_direct)(seed % 3),
                                            .tuning.queue = seed % 4 >= 2 && queues ? DCP_QUEUE_ON
                                                                                    : DCP_QUEUE_OFF,
                                            .sync = seed % 2 == 0,
                                            .ring_buffers = 2 + (uint32_t)(seed % 3),
                                            .ring_buffer_bytes = 4096u << (seed % 8)};
        struct world world;
        struct dcp_error err = {0};
        struct dcp_write_stats stats;
        world_make(&world, &options);
        uint32_t *crcs = dcp_calloc(world.layout.records_count + 1, sizeof *crcs);
        int rc = world_write(io, dirfd, &world, &engine, crcs, &stats, &err);
        if (rc == DCP_E_UNSUPPORTED && engine.direct == DCP_DIRECT_ON) {
            engine.direct = DCP_DIRECT_AUTO; /* this file system has none */
            char name[64];
            world_file_name(&world, 0, name, sizeof name);
            CHECK_EQ(io->unlink_at(io->ctx, dirfd, name), 0);
            dcp_error_clear(&err);
            rc = world_write(io, dirfd, &world, &engine, crcs, &stats, &err);
        }
        CHECK_OK(rc, &err);
        CHECK_EQ(stats.files_count, world.layout.files_count);
        CHECK(stats.direct_files_count == 0 ||
              (stats.queue_writes_count > 0) == (engine.tuning.queue == DCP_QUEUE_ON));
        CHECK_EQ(stats.file_bytes, world.layout.total_bytes);
        CHECK(world_check_files(io, dirfd, &world));
        for (uint32_t r = 0; r < world.layout.records_count; r++) {
            uint32_t item = world.layout.records[r].item;
            if (world.records[item] != NULL) {
                CHECK_EQ(crcs[r],
                         world_crc32(world.records[item], world.layout.records[r].length_bytes));
            }
        }
        dcp_free(crcs);
        world_clean_up(&world);
    }
    CHECK_EQ(io->close(io->ctx, dirfd), 0);
    CHECK_EQ(rmdir(path), 0);
    dcp_engine_trim();
}

/* Some hashes are known before the save: they are believed, not computed again. */
static void
hashes_that_are_given_are_written_as_they_are(void)
{
    struct io_memory *fs = io_memory_new(1);
    struct dcp_io *io = &io_memory_process(fs, 0)->io;
    CHECK_EQ(io->mkdirs(io->ctx, "/d"), 0);
    int dirfd = io->open_dir(io->ctx, "/d");
    struct world_options options = small_mix;
    struct world world;
    struct dcp_error err = {0};
    uint32_t seen = 0;
    options.content_hash = true;
    world_make(&world, &options);
    uint32_t items_count = world.plan.items_count;
    struct dcp_hash128 *hashes = dcp_malloc_array(items_count, sizeof *hashes);
    for (uint32_t i = 0; i < items_count; i++) {
        hashes[i] = (struct dcp_hash128){1000 + i, ~(uint64_t)i};
    }
    struct dcp_engine_options engine = {.hashes = hashes};
    CHECK_OK(world_write(io, dirfd, &world, &engine, NULL, NULL, &err), &err);
    for (uint32_t f = 0; f < world.layout.files_count; f++) {
        struct dcp_buf bytes = {0};
        struct dcp_file_header header;
        struct dcp_hash_table table;
        char name[64];
        world_file_name(&world, f, name, sizeof name);
        CHECK_OK(dcp_io_read_file(io, dirfd, name, 1u << 30, &bytes, &err), &err);
        CHECK_OK(dcp_file_parse_header(bytes.data, &header, &err), &err);
        CHECK_EQ(header.hash_offset_bytes + header.hash_bytes, bytes.len);
        CHECK_OK(dcp_hash_table_parse(bytes.data + header.hash_offset_bytes, header.hash_bytes,
                                      &world.save_id, &table, &err),
                 &err);
        for (uint32_t i = 0; i < world.layout.files[f].records_count; i++, seen++) {
            const struct dcp_placed_record *record = &world.layout.records[seen];
            const struct dcp_hash_entry *found = dcp_hash_table_find(&table, record->offset_bytes);
            CHECK(found != NULL && found->record_bytes == record->length_bytes);
            CHECK(found != NULL && dcp_hash128_equal(found->hash, hashes[record->item]));
        }
        dcp_hash_table_clean_up(&table);
        dcp_buf_clean_up(&bytes);
    }
    CHECK(seen > 4);
    dcp_free(hashes);
    io->close(io->ctx, dirfd);
    world_clean_up(&world);
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
short_writes_and_interrupts_change_nothing(void)
{
    for (uint64_t seed = 0; seed < 48; seed++) {
        struct io_memory *fs = io_memory_new(seed);
        struct dcp_io *io = &io_memory_process(fs, 0)->io;
        if (seed % 3 != 0) {
            io_memory_set_dio(fs, (struct dcp_dio_align){512, seed % 3 == 1 ? 512u : 4096u, false});
        }
        CHECK_EQ(io->mkdirs(io->ctx, "/d"), 0);
        int dirfd = io->open_dir(io->ctx, "/d");
        struct world_options options = small_mix;
        options.seed = seed;
        options.large_bytes = seed % 4 == 0 ? 2500000 : 200000;
        struct dcp_engine_options engine = {
            .sync = true, .ring_buffer_bytes = 1u << 16, .tuning.queue = ways[seed / 24]};
        struct world world;
        struct dcp_error err = {0};
        world_make(&world, &options);
        io_memory_faults(fs)->short_percent = 50;
        io_memory_faults(fs)->eintr_percent = 20;
        io_memory_faults(fs)->delay_percent = 30;
        CHECK_OK(world_write(io, dirfd, &world, &engine, NULL, NULL, &err), &err);
        io_memory_faults(fs)->short_percent = 0;
        io_memory_faults(fs)->eintr_percent = 0;
        CHECK(world_check_files(io, dirfd, &world));
        io->close(io->ctx, dirfd);
        CHECK_EQ(io_memory_open_files(fs), 0);
        world_clean_up(&world);
        io_memory_free(fs);
    }
    dcp_engine_trim();
}

static void
bytes_are_durable(enum dcp_queue_use way, bool file_per_item)
{
    struct world_options options = small_mix;
    options.file_per_item = file_per_item;
    options.large_bytes = 300000;
    struct io_memory *fs = io_memory_new(1);
    struct dcp_io *io = &io_memory_process(fs, 0)->io;
    io_memory_set_dio(fs, (struct dcp_dio_align){512, 512, false});
    CHECK_EQ(io->mkdirs(io->ctx, "/d"), 0);
    int dirfd = io->open_dir(io->ctx, "/d");
    struct world world;
    struct dcp_error err = {0};
    struct dcp_engine_options engine = {.sync = true, .tuning.queue = way};
    world_make(&world, &options);
    CHECK_OK(world_write(io, dirfd, &world, &engine, NULL, NULL, &err), &err);
    CHECK_EQ(io->fsync(io->ctx, dirfd), 0);
    io_memory_reboot(fs, true, 9);
    dirfd = io->open_dir(io->ctx, "/d");
    CHECK(world_check_files(io, dirfd, &world));
    world_clean_up(&world);
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
bytes_are_durable_when_it_returns(void)
{
    for (int way = 0; way < 2 * WAYS; way++) {
        bytes_are_durable(ways[way % WAYS], way >= WAYS);
    }
}

/* Every call fails once: the code is right, nothing stays open, nothing leaks. */
static void
any_failing_call_fails_the_save_cleanly(void)
{
    static const int calls[] = {IO_OPEN_AT, IO_PWRITE, IO_TRUNCATE, IO_FDATASYNC, IO_CLOSE};
    for (int round = 0; round < 2 * WAYS; round++) {
        struct world_options options = small_mix;
        options.large_bytes = round % 2 ? 9u << 20 : 300000;
        options.file_per_item = round % 2 == 0;
        struct world world;
        world_make(&world, &options);
        for (size_t c = 0; c < sizeof calls / sizeof calls[0]; c++) {
            for (uint64_t nth = 1; nth < 4; nth++) {
                struct io_memory *fs = io_memory_new(nth);
                struct dcp_io *io = &io_memory_process(fs, 0)->io;
                io_memory_set_dio(fs, (struct dcp_dio_align){512, 512, false});
                io->mkdirs(io->ctx, "/d");
                int dirfd = io->open_dir(io->ctx, "/d");
                struct dcp_error err = {0};
                struct dcp_engine_options engine = {
                    .sync = true, .ring_buffer_bytes = 1u << 20, .tuning.queue = ways[round / 2]};
                io_memory_faults(fs)->fail_call = calls[c];
                io_memory_faults(fs)->fail_nth = nth;
                io_memory_faults(fs)->fail_errno = EIO;
                int rc = world_write(io, dirfd, &world, &engine, NULL, NULL, &err);
                if (io_memory_faults(fs)->fail_nth == 0) {
                    CHECK_EQ(rc, DCP_E_IO);
                    CHECK_EQ(err.sys_errno, EIO);
                    CHECK(strstr(err.path, ".distcp") != NULL);
                    CHECK(calls[c] != IO_PWRITE || err.offset_bytes != UINT64_MAX);
                } else {
                    CHECK_EQ(rc, 0);
                }
                io->close(io->ctx, dirfd);
                CHECK_EQ(io_memory_open_files(fs), 0);
                CHECK_EQ(io_memory_open_queues(fs), 0);
                io_memory_free(fs);
            }
        }
        world_clean_up(&world);
    }
    dcp_engine_trim();
}

static void
a_full_disk_is_named(void)
{
    struct world_options options = small_mix;
    options.large_bytes = 12u << 20;
    struct world world;
    world_make(&world, &options);
    for (int round = 0; round < 2 * WAYS; round++) {
        int direct = round % 2;
        struct io_memory *fs = io_memory_new(3);
        struct dcp_io *io = &io_memory_process(fs, 0)->io;
        io_memory_set_dio(fs, (struct dcp_dio_align){direct ? 512 : 0, 512, false});
        io->mkdirs(io->ctx, "/d");
        int dirfd = io->open_dir(io->ctx, "/d");
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {.sync = true, .tuning.queue = ways[round / 2]};
        io_memory_faults(fs)->space_bytes = 5u << 20;
        CHECK_EQ(world_write(io, dirfd, &world, &engine, NULL, NULL, &err), DCP_E_IO);
        CHECK_EQ(err.sys_errno, ENOSPC);
        CHECK(strstr(err.message, "full") != NULL);
        io->close(io->ctx, dirfd);
        CHECK_EQ(io_memory_open_files(fs), 0);
        io_memory_free(fs);
    }
    world_clean_up(&world);
    dcp_engine_trim();
}

/* The kernel tells a lost write-back once: who waits for it early has heard it, and fdatasync says
 * yes afterwards.  That it can't start one early is no loss. */
static void
a_write_back_that_was_lost_while_waiting_fails_the_save(void)
{
    struct world_options options = small_mix;
    options.large_bytes = 2 * DCP_MAX_DIRTY_BYTES;
    struct world world;
    world_make(&world, &options);
    for (uint64_t nth = 1; nth <= 3; nth++) { /* start, start, wait for the first */
        struct io_memory *fs = io_memory_new(nth);
        struct dcp_io *io = &io_memory_process(fs, 0)->io;
        io->mkdirs(io->ctx, "/d");
        int dirfd = io->open_dir(io->ctx, "/d");
        struct dcp_error err = {0};
        struct dcp_engine_options engine = {.sync = true, .direct = DCP_DIRECT_OFF};
        io_memory_faults(fs)->fail_call = IO_FLUSH_RANGE;
        io_memory_faults(fs)->fail_nth = nth;
        io_memory_faults(fs)->fail_errno = ETIMEDOUT;
        int rc = world_write(io, dirfd, &world, &engine, NULL, NULL, &err);
        CHECK_EQ(io_memory_faults(fs)->fail_nth, 0);
        CHECK_EQ(rc, nth == 3 ? DCP_E_IO : 0);
        CHECK_EQ(err.sys_errno, nth == 3 ? ETIMEDOUT : 0);
        io->close(io->ctx, dirfd);
        CHECK_EQ(io_memory_open_files(fs), 0);
        io_memory_free(fs);
    }
    world_clean_up(&world);
    dcp_engine_trim();
}

static void
an_existing_name_is_never_touched(void)
{
    struct io_memory *fs = io_memory_new(3);
    struct dcp_io *io = &io_memory_process(fs, 0)->io;
    io->mkdirs(io->ctx, "/d");
    int dirfd = io->open_dir(io->ctx, "/d");
    struct world world;
    struct dcp_error err = {0};
    struct dcp_engine_options engine = {0};
    char name[64];
    world_make(&world, &small_mix);
    world_file_name(&world, 1, name, sizeof name);
    io_memory_put_file(fs, "/d", name, "theirs", 6);
    CHECK_EQ(world_write(io, dirfd, &world, &engine, NULL, NULL, &err), DCP_E_EXISTS);
    CHECK(strstr(err.path, name) != NULL);
    size_t len = 0;
    const uint8_t *theirs = io_memory_file(fs, "/d", name, &len);
    CHECK(len == 6 && theirs != NULL && memcmp(theirs, "theirs", 6) == 0);
    io->close(io->ctx, dirfd);
    CHECK_EQ(io_memory_open_files(fs), 0);
    world_clean_up(&world);
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
a_removed_directory_is_named(void)
{
    struct io_memory *fs = io_memory_new(3);
    struct dcp_io *io = &io_memory_process(fs, 0)->io;
    io->mkdirs(io->ctx, "/d");
    int dirfd = io->open_dir(io->ctx, "/d");
    struct world world;
    struct dcp_error err = {0};
    struct dcp_engine_options engine = {0};
    world_make(&world, &small_mix);
    CHECK_EQ(io_memory_rmdir(io_memory_process(fs, 0), "/d"), 0);
    CHECK_EQ(world_write(io, dirfd, &world, &engine, NULL, NULL, &err), DCP_E_REMOVED);
    io->close(io->ctx, dirfd);
    world_clean_up(&world);
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
cancel_stops_it_and_progress_counts_payload(void)
{
    struct io_memory *fs = io_memory_new(3);
    struct dcp_io *io = &io_memory_process(fs, 0)->io;
    io->mkdirs(io->ctx, "/d");
    int dirfd = io->open_dir(io->ctx, "/d");
    struct world world;
    struct dcp_error err = {0};
    atomic_int cancel = 1;
    _Atomic uint64_t progress = 0;
    struct dcp_engine_options engine = {.cancel = &cancel, .progress_bytes = &progress};
    struct dcp_write_stats stats;
    world_make(&world, &small_mix);
    CHECK_EQ(world_write(io, dirfd, &world, &engine, NULL, NULL, &err), DCP_E_CANCELLED);
    CHECK_EQ(io_memory_open_files(fs), 0 + 1); /* the directory */
    world.n0 += 50; /* what the first left behind is its claim's to discard */
    cancel = 0;
    progress = 0;
    dcp_error_clear(&err);
    CHECK_OK(world_write(io, dirfd, &world, &engine, NULL, &stats, &err), &err);
    uint64_t payload = 0;
    for (uint32_t r = 0; r < world.layout.records_count; r++) {
        payload += world.layout.records[r].payload_bytes;
    }
    CHECK_EQ(progress, payload);
    CHECK_EQ(stats.payload_bytes, payload);
    io->close(io->ctx, dirfd);
    world_clean_up(&world);
    io_memory_free(fs);
    dcp_engine_trim();
}

CTEST_MAIN(RUN(files_equal_a_naive_image_for_random_plans);
           RUN(hashes_that_are_given_are_written_as_they_are);
           RUN(short_writes_and_interrupts_change_nothing); RUN(bytes_are_durable_when_it_returns);
           RUN(any_failing_call_fails_the_save_cleanly); RUN(a_full_disk_is_named);
           RUN(a_write_back_that_was_lost_while_waiting_fails_the_save);
           RUN(an_existing_name_is_never_touched); RUN(a_removed_directory_is_named);
           RUN(cancel_stops_it_and_progress_counts_payload);)

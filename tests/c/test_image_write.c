/*
 * test_image_write.c: a ready image becomes the files that it holds, on every way that requests
 * take, and fails as a save does.  What holds of requests alike (the queue, the rate) is in
 * test_writer_queue.c.
 */
#include "ctest.h"

#include <errno.h>
#include <unistd.h>

#include "image_world.h"
#include "io_memory.h"

static const struct world_options small_mix = {
    .seed = 5, .tensors = 12, .objects = 4, .thread_count = 2};

enum way { QUEUE, THREAD, BUFFERED, IN_MEMORY, WAYS };

/* A file system with its directory, and an image to write into it. */
struct bench {
    struct io_memory *fs;
    struct dcp_io *io;
    int dirfd;
    struct world world;
    struct world_image image;
    struct dcp_engine_options engine;
    struct dcp_write_stats stats;
    struct dcp_error err;
};

static void
disk_make(struct bench *bench, uint64_t seed, enum way way)
{
    bench->fs = io_memory_new(seed);
    bench->io = &io_memory_process(bench->fs, 0)->io;
    io_memory_set_dio(bench->fs, (struct dcp_dio_align){.mem_bytes = way <= THREAD ? 512 : 0,
                                                        .offset_bytes = 512,
                                                        .in_memory = way == IN_MEMORY});
    CHECK_EQ(bench->io->mkdirs(bench->io->ctx, "/d"), 0);
    bench->dirfd = bench->io->open_dir(bench->io->ctx, "/d");
    bench->engine.tuning.queue = way == QUEUE ? DCP_QUEUE_ON : DCP_QUEUE_OFF;
}

static void
disk_clean_up(struct bench *bench)
{
    bench->io->close(bench->io->ctx, bench->dirfd);
    CHECK_EQ(io_memory_open_files(bench->fs), 0);
    CHECK_EQ(io_memory_open_queues(bench->fs), 0);
    io_memory_free(bench->fs);
}

static void
bench_make(struct bench *bench, uint64_t seed, enum way way, const struct world_options *options)
{
    memset(bench, 0, sizeof *bench);
    bench->engine = (struct dcp_engine_options){.sync = true, .ring_buffer_bytes = 1u << 20};
    disk_make(bench, seed, way);
    world_make(&bench->world, options);
    struct dcp_engine_options filling = {0};
    CHECK_OK(world_image_make(&bench->world, &filling, NULL, &bench->image, &bench->err),
             &bench->err);
}

/* The same image, an empty disk. */
static void
bench_new_disk(struct bench *bench, uint64_t seed, enum way way)
{
    disk_clean_up(bench);
    disk_make(bench, seed, way);
}

static void
bench_make_large(struct bench *bench, uint64_t seed, enum way way, uint64_t large_bytes)
{
    struct world_options options = small_mix;
    options.seed = seed;
    options.large_bytes = large_bytes;
    bench_make(bench, seed, way, &options);
}

static int
bench_write(struct bench *bench)
{
    dcp_error_clear(&bench->err);
    return world_image_write(bench->io, bench->dirfd, &bench->image, &bench->engine, &bench->stats,
                             &bench->err);
}

static bool
bench_check_files(struct bench *bench)
{
    return world_image_check_files(bench->io, bench->dirfd, &bench->world, &bench->image);
}

static void
bench_clean_up(struct bench *bench)
{
    disk_clean_up(bench);
    world_image_clean_up(&bench->image);
    world_clean_up(&bench->world);
}

/* ---- the files ---- */

static void
files_equal_the_image_on_every_way_and_layout(void)
{
    for (uint64_t seed = 0; seed < 80; seed++) {
        struct world_options options = {.seed = seed,
                                        .tensors = (uint32_t)(seed * 7 % 20),
                                        .objects = (uint32_t)(seed % 4),
                                        .thread_count = 1 + (uint32_t)(seed % 4),
                                        .file_per_item = seed % 5 == 4,
                                        .large_bytes = seed % 3 == 1 ? 3000000 : 0,
                                        .content_hash = seed / 2 % 2 == 0};
        struct bench bench;
        _Atomic uint64_t progress = 5;
        _Atomic uint32_t created = 0;
        enum way way = (enum way)(seed % WAYS);
        bench_make(&bench, seed, way, &options);
        bench.engine.progress_bytes = &progress;
        bench.engine.created_files = &created;
        bench.engine.ring_buffers = 2 + (uint32_t)(seed % 7);
        bench.engine.ring_buffer_bytes = 4096u << (seed % 9);
        CHECK_OK(bench_write(&bench), &bench.err);
        CHECK(bench_check_files(&bench));
        CHECK_EQ(progress, 5 + bench.image.image.payload_bytes);
        CHECK_EQ(created, bench.image.image.files_count);
        CHECK_EQ(bench.stats.files_count, bench.image.image.files_count);
        CHECK_EQ(bench.stats.file_bytes, bench.world.layout.total_bytes);
        CHECK_EQ(bench.stats.payload_bytes, bench.image.image.payload_bytes);
        CHECK_EQ(bench.stats.queue_writes_count > 0,
                 way == QUEUE && bench.stats.direct_files_count > 0);
        CHECK_EQ(bench.stats.ring_bytes, 0);
        bench_clean_up(&bench);
    }
}

static void
a_real_disk_gets_the_same_files(void)
{
    const struct dcp_io *io = dcp_io_posix();
    const char *base = getenv("TMPDIR");
    char path[256];
    snprintf(path, sizeof path, "%s/dcp_image_XXXXXX", base != NULL ? base : "/tmp");
    CHECK(mkdtemp(path) != NULL);
    int dirfd = io->open_dir(io->ctx, path);
    CHECK(dirfd >= 0);
    for (uint64_t seed = 0; seed < 6; seed++) {
        struct world_options options = small_mix;
        struct dcp_engine_options engine = {
            .direct = seed % 3 == 0 ? DCP_DIRECT_OFF : DCP_DIRECT_AUTO,
            .tuning.queue = seed % 2 == 0 ? DCP_QUEUE_AUTO : DCP_QUEUE_OFF,
            .ring_buffer_bytes = seed % 4 == 3 ? 1u << 20 : 0,
            .sync = true};
        struct world world;
        struct world_image image = {0};
        struct dcp_error err = {0};
        options.seed = seed;
        options.large_bytes = 20u << 20;
        world_make(&world, &options);
        CHECK_OK(world_image_make(&world, &engine, NULL, &image, &err), &err);
        CHECK_OK(world_image_write(io, dirfd, &image, &engine, NULL, &err), &err);
        CHECK(world_image_check_files(io, dirfd, &world, &image));
        world_image_clean_up(&image);
        world_clean_up(&world);
    }
    CHECK_EQ(io->close(io->ctx, dirfd), 0);
    CHECK_EQ(rmdir(path), 0);
}

static void
an_image_of_no_files_is_written(void)
{
    struct bench bench;
    struct world_options options = {.seed = 1, .thread_count = 1, .file_per_item = true};
    bench_make(&bench, 1, QUEUE, &options);
    CHECK_EQ(bench.image.image.files_count, 0);
    CHECK_OK(bench_write(&bench), &bench.err);
    CHECK_EQ(io_memory_names_count(bench.fs, "/d"), 0);
    bench_clean_up(&bench);
}

static void
short_writes_and_interrupts_change_nothing(void)
{
    for (uint64_t seed = 0; seed < 64; seed++) {
        struct bench bench;
        _Atomic uint64_t progress = 0;
        bench_make_large(&bench, seed, (enum way)(seed % WAYS),
                         seed / WAYS % 2 == 0 ? 2500000 : 200000);
        bench.engine.ring_buffer_bytes = 1u << 16;
        bench.engine.progress_bytes = &progress;
        io_memory_faults(bench.fs)->short_percent = 50;
        io_memory_faults(bench.fs)->eintr_percent = 20;
        io_memory_faults(bench.fs)->delay_percent = 30;
        CHECK_OK(bench_write(&bench), &bench.err);
        io_memory_faults(bench.fs)->short_percent = 0;
        io_memory_faults(bench.fs)->eintr_percent = 0;
        CHECK_EQ(progress, bench.image.image.payload_bytes);
        CHECK(bench_check_files(&bench));
        bench_clean_up(&bench);
    }
}

static void
bytes_are_durable_when_it_returns(void)
{
    for (int way = 0; way < 2 * WAYS; way++) {
        struct world_options options = small_mix;
        struct bench bench;
        options.file_per_item = way >= WAYS;
        options.large_bytes = 3000000;
        bench_make(&bench, 1, (enum way)(way % WAYS), &options);
        CHECK_OK(bench_write(&bench), &bench.err);
        CHECK_EQ(bench.io->fsync(bench.io->ctx, bench.dirfd), 0);
        io_memory_reboot(bench.fs, true, 9);
        bench.dirfd = bench.io->open_dir(bench.io->ctx, "/d");
        CHECK(bench_check_files(&bench));
        bench_clean_up(&bench);
    }
}

/* Of a step of offsets that is larger than what images are padded to, nothing may be asked. */
static void
an_alignment_above_that_of_images_is_left_to_the_page_cache(void)
{
    struct bench bench;
    bench_make_large(&bench, 3, THREAD, 3000000);
    io_memory_set_dio(bench.fs, (struct dcp_dio_align){512, 65536, false});
    CHECK_OK(bench_write(&bench), &bench.err);
    CHECK_EQ(bench.stats.direct_files_count, 0);
    CHECK(bench_check_files(&bench));
    bench_clean_up(&bench);
}

/* ---- failures ---- */

/* Every call fails once, of every kind: it is told, nothing stays open, nothing leaks. */
static void
any_failing_call_fails_the_write_cleanly(void)
{
    static const int calls[] = {IO_OPEN_AT, IO_PWRITE, IO_TRUNCATE, IO_FDATASYNC, IO_CLOSE};
    for (int round = 0; round < 2 * WAYS; round++) {
        struct world_options options = small_mix;
        struct bench bench;
        enum way way = (enum way)(round % WAYS);
        options.large_bytes = round < WAYS ? 9u << 20 : 300000;
        options.file_per_item = round >= WAYS;
        bench_make(&bench, 1, way, &options);
        for (size_t c = 0; c < sizeof calls / sizeof calls[0]; c++) {
            int rc = -1;
            for (uint64_t nth = 1; rc != 0 && nth < 60; nth += nth < 8 ? 1 : 7) {
                bench_new_disk(&bench, nth, way);
                io_memory_faults(bench.fs)->fail_call = calls[c];
                io_memory_faults(bench.fs)->fail_nth = nth;
                io_memory_faults(bench.fs)->fail_errno = EIO;
                rc = bench_write(&bench);
                CHECK_EQ(rc, io_memory_faults(bench.fs)->fail_nth == 0 ? DCP_E_IO : 0);
                if (rc != 0) {
                    CHECK_EQ(bench.err.sys_errno, EIO);
                    CHECK(strstr(bench.err.path, ".distcp") != NULL);
                    CHECK(calls[c] != IO_PWRITE || bench.err.offset_bytes != UINT64_MAX);
                }
            }
        }
        bench_clean_up(&bench);
    }
}

/* What a call may fail with and be mended: nobody notices. */
static void
calls_that_may_fail_do_no_harm(void)
{
    static const struct {
        int call, code;
    } cases[] = {{IO_DIO_ALIGN, ENOSYS},       {IO_SET_DIRECT, EINVAL},
                 {IO_FALLOCATE, EOPNOTSUPP},   {IO_FLUSH_RANGE, ENOSYS},
                 {IO_THREAD_PRIORITY, EPERM},  {IO_QUEUE_WRITE, EAGAIN},
                 {IO_QUEUE_WRITE, EOPNOTSUPP}, {IO_QUEUE_REAP, EINTR},
                 {IO_PWRITE, EINVAL},          {IO_OPEN_AT, EMFILE}};
    struct bench bench;
    bench_make_large(&bench, 5, QUEUE, 17u << 20);
    bench.engine.tuning.nice = 3;
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        for (uint64_t nth = 1; nth < 7; nth++) {
            bench_new_disk(&bench, nth, (enum way)(nth % 2));
            io_memory_faults(bench.fs)->fail_call = cases[c].call;
            io_memory_faults(bench.fs)->fail_nth = nth;
            io_memory_faults(bench.fs)->fail_errno = cases[c].code;
            CHECK_OK(bench_write(&bench), &bench.err);
            io_memory_faults(bench.fs)->fail_nth = 0;
            CHECK(bench_check_files(&bench));
        }
    }
    bench_clean_up(&bench);
}

static void
a_full_disk_is_named(void)
{
    for (int round = 0; round < 2 * WAYS; round++) {
        struct bench bench;
        bool preallocates = round < WAYS; /* files of 16 MiB on */
        bench_make_large(&bench, 3, (enum way)(round % WAYS), preallocates ? 18u << 20 : 9u << 20);
        io_memory_faults(bench.fs)->space_bytes = 5u << 20;
        CHECK_EQ(bench_write(&bench), DCP_E_IO);
        CHECK_EQ(bench.err.sys_errno, ENOSPC);
        CHECK(strstr(bench.err.message, "full") != NULL);
        bench_clean_up(&bench);
    }
}

static void
an_existing_name_is_never_touched(void)
{
    struct bench bench;
    char name[64];
    size_t len = 0;
    bench_make(&bench, 3, THREAD, &small_mix);
    world_file_name(&bench.world, 1, name, sizeof name);
    io_memory_put_file(bench.fs, "/d", name, "theirs", 6);
    CHECK_EQ(bench_write(&bench), DCP_E_EXISTS);
    CHECK(strstr(bench.err.path, name) != NULL);
    const uint8_t *theirs = io_memory_file(bench.fs, "/d", name, &len);
    CHECK(len == 6 && theirs != NULL && memcmp(theirs, "theirs", 6) == 0);
    bench_clean_up(&bench);
}

static void
a_removed_directory_is_named(void)
{
    struct bench bench;
    bench_make(&bench, 3, THREAD, &small_mix);
    CHECK_EQ(io_memory_rmdir(io_memory_process(bench.fs, 0), "/d"), 0);
    CHECK_EQ(bench_write(&bench), DCP_E_REMOVED);
    bench_clean_up(&bench);
}

static void
requests_of_no_shape_are_refused(void)
{
    struct bench bench;
    bench_make(&bench, 3, THREAD, &small_mix);
    bench.engine.ring_buffer_bytes = 5000;
    CHECK_EQ(bench_write(&bench), DCP_E_INVALID);
    bench.engine.ring_buffer_bytes = 0;
    bench.engine.ring_buffers = 100;
    CHECK_EQ(bench_write(&bench), DCP_E_INVALID);
    CHECK_EQ(io_memory_names_count(bench.fs, "/d"), 0);
    bench_clean_up(&bench);
}

/* ---- pressure ---- */

static atomic_int stop;

static void
stop_at_the_fifth_write(struct io_memory_process *process, enum io_call call, const char *name)
{
    (void)name;
    if ((call == IO_QUEUE_WRITE || call == IO_PWRITE) &&
        io_memory_calls_of(process->fs, call) == 4) {
        atomic_store(&stop, 1);
    }
}

/* The queue of the test aborts when it is closed with something in flight. */
static void
a_cancelled_write_stops_at_the_next_request_and_waits_for_those_in_flight(void)
{
    for (int way = 0; way < WAYS; way++) {
        struct bench bench;
        _Atomic uint64_t progress = 0;
        bench_make_large(&bench, 5, (enum way)way, 12u << 20);
        atomic_store(&stop, 0);
        bench.engine.cancel = &stop;
        bench.engine.progress_bytes = &progress;
        io_memory_faults(bench.fs)->delay_percent = 90;
        io_memory_process(bench.fs, 0)->before = stop_at_the_fifth_write;
        CHECK_EQ(bench_write(&bench), DCP_E_CANCELLED);
        CHECK_EQ(io_memory_calls_of(bench.fs, way == QUEUE ? IO_QUEUE_WRITE : IO_PWRITE), 5);
        CHECK(progress <= 5u << 20);
        bench_clean_up(&bench);
    }
}

static void
dirty_bytes_are_pushed_out_while_they_are_few(void)
{
    struct bench bench;
    bench_make_large(&bench, 5, BUFFERED, 2 * DCP_MAX_DIRTY_BYTES);
    CHECK_OK(bench_write(&bench), &bench.err);
    CHECK(io_memory_calls_of(bench.fs, IO_FLUSH_RANGE) >= 6);
    CHECK(bench_check_files(&bench));
    bench_clean_up(&bench);
}

static void
running_out_of_memory_anywhere_is_an_error_without_a_leak(void)
{
    int rc = DCP_E_NOMEM;
    for (uint64_t nth = 1; rc != 0 && nth < 100; nth++) {
        struct bench bench;
        bench_make(&bench, 5, THREAD, &small_mix);
        dcp_alloc_fail_after(nth);
        rc = bench_write(&bench);
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        bench_clean_up(&bench);
    }
    CHECK_EQ(rc, 0);
}

CTEST_MAIN(RUN(files_equal_the_image_on_every_way_and_layout); RUN(a_real_disk_gets_the_same_files);
           RUN(an_image_of_no_files_is_written); RUN(short_writes_and_interrupts_change_nothing);
           RUN(bytes_are_durable_when_it_returns);
           RUN(an_alignment_above_that_of_images_is_left_to_the_page_cache);
           RUN(any_failing_call_fails_the_write_cleanly); RUN(calls_that_may_fail_do_no_harm);
           RUN(a_full_disk_is_named); RUN(an_existing_name_is_never_touched);
           RUN(a_removed_directory_is_named); RUN(requests_of_no_shape_are_refused);
           RUN(a_cancelled_write_stops_at_the_next_request_and_waits_for_those_in_flight);
           RUN(dirty_bytes_are_pushed_out_while_they_are_few);
           RUN(running_out_of_memory_anywhere_is_an_error_without_a_leak);)

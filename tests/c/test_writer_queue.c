/*
 * test_writer_queue.c: the ways that the writer's requests take (queue, thread, neither), how they
 * are held back, and many files at once.  What holds of requests holds wherever their bytes come
 * from.
 */
#include "ctest.h"

#include <errno.h>
#include <sys/wait.h>
#include <unistd.h>

#include "image_world.h"
#include "io_memory.h"

static const struct world_options small_mix = {
    .seed = 5, .tensors = 12, .objects = 4, .thread_count = 2};

static const enum dcp_queue_use ways[] = {DCP_QUEUE_OFF, DCP_QUEUE_ON};
enum { WAYS = 2 };

/* ---- the queue ---- */

/* Where the bytes come from. */
enum sink { FROM_TENSORS, FROM_IMAGE, SINKS };

/* A file system with its directory, and a world to write into it with direct I/O. */
struct bench {
    enum sink sink;
    struct io_memory *fs;
    struct dcp_io *io;
    int dirfd;
    struct world world;
    struct world_image image; /* FROM_IMAGE */
    struct dcp_engine_options engine;
    struct dcp_write_stats stats;
    struct dcp_error err;
};

static void
bench_make_of(struct bench *bench, enum sink sink, uint64_t large_bytes, bool file_per_item)
{
    struct world_options options = small_mix;
    memset(bench, 0, sizeof *bench);
    bench->sink = sink;
    options.large_bytes = large_bytes;
    options.file_per_item = file_per_item;
    bench->fs = io_memory_new(11);
    bench->io = &io_memory_process(bench->fs, 0)->io;
    io_memory_set_dio(bench->fs, (struct dcp_dio_align){512, 512, false});
    CHECK_EQ(bench->io->mkdirs(bench->io->ctx, "/d"), 0);
    bench->dirfd = bench->io->open_dir(bench->io->ctx, "/d");
    bench->engine = (struct dcp_engine_options){.sync = true, .ring_buffer_bytes = 1u << 20};
    world_make(&bench->world, &options);
    if (sink == FROM_IMAGE) {
        const struct dcp_engine_options filling = {0};
        CHECK_OK(world_image_make(&bench->world, &filling, NULL, &bench->image, &bench->err),
                 &bench->err);
    }
}

static void
bench_make(struct bench *bench, uint64_t large_bytes, bool file_per_item)
{
    bench_make_of(bench, FROM_TENSORS, large_bytes, file_per_item);
}

static int
bench_write(struct bench *bench)
{
    dcp_error_clear(&bench->err);
    if (bench->sink == FROM_IMAGE) {
        return world_image_write(bench->io, bench->dirfd, &bench->image, &bench->engine,
                                 &bench->stats, &bench->err);
    }
    return world_write(bench->io, bench->dirfd, &bench->world, &bench->engine, NULL, &bench->stats,
                       &bench->err);
}

static bool
bench_check_files(struct bench *bench)
{
    return bench->sink == FROM_IMAGE
               ? world_image_check_files(bench->io, bench->dirfd, &bench->world, &bench->image)
               : world_check_files(bench->io, bench->dirfd, &bench->world);
}

static void
bench_clean_up(struct bench *bench)
{
    bench->io->close(bench->io->ctx, bench->dirfd);
    CHECK_EQ(io_memory_open_files(bench->fs), 0);
    CHECK_EQ(io_memory_open_queues(bench->fs), 0);
    world_image_clean_up(&bench->image);
    world_clean_up(&bench->world);
    io_memory_free(bench->fs);
    dcp_engine_trim();
}

static void
many_requests_use_the_queue_and_few_do_not(void)
{
    for (int sink = 0; sink < SINKS; sink++) {
        struct bench bench;
        bench_make_of(&bench, (enum sink)sink, 9u << 20, false);
        CHECK_OK(bench_write(&bench), &bench.err);
        CHECK(bench.stats.queue_writes_count >= 9);
        CHECK(bench_check_files(&bench));
        bench_clean_up(&bench);
        bench_make_of(&bench, (enum sink)sink, 300000, false);
        CHECK_OK(bench_write(&bench), &bench.err);
        CHECK_EQ(bench.stats.queue_writes_count, 0);
        CHECK_EQ(io_memory_calls_of(bench.fs, IO_QUEUE_OPEN), 0);
        bench_clean_up(&bench);
    }
}

static void
without_a_queue_the_thread_writes_unless_the_queue_was_asked_for(void)
{
    struct bench bench;
    bench_make(&bench, 9u << 20, false);
    io_memory_faults(bench.fs)->no_queue = true;
    CHECK_OK(bench_write(&bench), &bench.err);
    CHECK_EQ(bench.stats.queue_writes_count, 0);
    CHECK(bench.stats.direct_files_count > 0);
    CHECK(world_check_files(bench.io, bench.dirfd, &bench.world));
    bench.engine.tuning.queue = DCP_QUEUE_ON;
    CHECK_EQ(bench_write(&bench), DCP_E_UNSUPPORTED);
    CHECK(strstr(bench.err.message, "io_uring") != NULL);
    bench_clean_up(&bench);
}

/* The first writes end with `code` although pwrite does them: mended, and the thread goes on. */
static void
a_queue_that_refuses_is_left_for_the_thread(void)
{
    static const int codes[] = {EOPNOTSUPP, EINVAL, EPERM, ENOSYS};
    for (size_t i = 0; i < SINKS * sizeof codes / sizeof codes[0]; i++) {
        struct bench bench;
        bench_make_of(&bench, (enum sink)(i % SINKS), 20u << 20, false);
        io_memory_faults(bench.fs)->queue_errno = codes[i / SINKS];
        CHECK_OK(bench_write(&bench), &bench.err);
        CHECK(bench.stats.queue_writes_count >= 1 && bench.stats.queue_writes_count <= 4);
        CHECK(bench.stats.direct_files_count > 0);
        CHECK(bench_check_files(&bench));
        bench_clean_up(&bench);
    }
}

static void
writes_that_do_not_start_are_written_all_the_same(void)
{
    static const int codes[] = {EAGAIN, EBUSY, EPERM};
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        for (uint64_t nth = 1; nth < 6; nth++) {
            struct bench bench;
            bench_make(&bench, 12u << 20, false);
            io_memory_faults(bench.fs)->fail_call = IO_QUEUE_WRITE;
            io_memory_faults(bench.fs)->fail_nth = nth;
            io_memory_faults(bench.fs)->fail_errno = codes[i];
            CHECK_OK(bench_write(&bench), &bench.err);
            CHECK_EQ(bench.stats.queue_writes_count >= 6, codes[i] != EPERM);
            CHECK(world_check_files(bench.io, bench.dirfd, &bench.world));
            bench_clean_up(&bench);
        }
    }
}

static int
tell_512(void *ctx, int fd, struct dcp_dio_align *ret)
{
    (void)ctx;
    (void)fd;
    *ret = (struct dcp_dio_align){512, 512, false};
    return 0;
}

/* It asks for memory on 4 MiB and does not say so: some buffers lie right, most do not, and the
 * file leaves direct I/O. */
static void
a_file_system_that_refuses_direct_writes_gets_buffered_ones(void)
{
    for (int way = 0; way < WAYS; way++) {
        struct bench bench;
        bench_make(&bench, 9u << 20, false);
        io_memory_set_dio(bench.fs, (struct dcp_dio_align){4u << 20, 512, false});
        bench.io->dio_align = tell_512;
        bench.engine.tuning.queue = ways[way];
        CHECK_OK(bench_write(&bench), &bench.err);
        CHECK_EQ(bench.stats.direct_files_count, 0);
        CHECK(world_check_files(bench.io, bench.dirfd, &bench.world));
        bench_clean_up(&bench);
    }
}

static atomic_int stop;

static void
stop_at_the_fifth_write(struct io_memory_process *process, enum io_call call, const char *name)
{
    (void)name;
    if (call == IO_QUEUE_WRITE && io_memory_calls_of(process->fs, IO_QUEUE_WRITE) == 4) {
        atomic_store(&stop, 1);
    }
}

static void
stop_at_the_fifth_reap(struct io_memory_process *process, enum io_call call, const char *name)
{
    (void)name;
    if (call == IO_QUEUE_REAP && io_memory_calls_of(process->fs, IO_QUEUE_REAP) == 4) {
        atomic_store(&stop, 1);
    }
}

/* The queue of the test aborts when it is closed with something in flight. */
static void
a_cancelled_save_waits_for_what_is_in_flight(void)
{
    struct bench bench;
    bench_make(&bench, 12u << 20, false);
    atomic_store(&stop, 0);
    bench.engine.cancel = &stop;
    io_memory_faults(bench.fs)->delay_percent = 90;
    io_memory_process(bench.fs, 0)->before = stop_at_the_fifth_write;
    CHECK_EQ(bench_write(&bench), DCP_E_CANCELLED);
    CHECK_EQ(io_memory_calls_of(bench.fs, IO_QUEUE_WRITE), 5);
    bench_clean_up(&bench);
}

static bool
waits_for_a_minute(enum sink sink)
{
    struct bench bench;
    bool lost = false;
    bench_make_of(&bench, sink, 12u << 20, false);
    atomic_store(&stop, 0);
    bench.engine.cancel = &stop;
    bench.engine.memory_lost = &lost;
    io_memory_faults(bench.fs)->delay_percent = 100;
    io_memory_process(bench.fs, 0)->before = stop_at_the_fifth_reap;
    uint64_t start_ns = io_memory_now_ns(bench.fs);
    int rc = bench_write(&bench);
    uint64_t waited_ns = io_memory_now_ns(bench.fs) - start_ns;
    return lost && rc == DCP_E_IO && bench.err.sys_errno == ETIMEDOUT &&
           waited_ns >= DCP_QUEUE_GRACE_NS && waited_ns < 2 * DCP_QUEUE_GRACE_NS &&
           io_memory_open_files(bench.fs) == 1 && io_memory_open_queues(bench.fs) == 1;
}

/* In a child, whose memory is given up for lost, on purpose.  Time is the file system's. */
static void
after_a_failure_writes_that_never_end_are_waited_for_a_minute(void)
{
    for (int sink = 0; sink < SINKS; sink++) {
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            _exit(waits_for_a_minute((enum sink)sink) ? 0 : 1);
        }
        int status = -1;
        CHECK(child > 0 && waitpid(child, &status, 0) == child);
        CHECK_EQ(status, 0);
    }
}

/* ---- pressure ---- */

static void
the_rate_is_kept_on_every_way(void)
{
    enum { QUEUE, THREAD, BUFFERED, IN_MEMORY, CASES };
    for (int round = 0; round < SINKS * CASES; round++) {
        struct bench bench;
        int way = round / SINKS;
        bench_make_of(&bench, (enum sink)(round % SINKS), 24u << 20, false);
        if (way >= BUFFERED) {
            io_memory_set_dio(bench.fs, (struct dcp_dio_align){0, 0, way == IN_MEMORY});
        }
        const uint64_t rate = 5u << 20;
        bench.engine.tuning.queue = way == QUEUE ? DCP_QUEUE_ON : DCP_QUEUE_OFF;
        bench.engine.tuning.limit_bytes_s = rate;
        io_memory_faults(bench.fs)->oversleep_us = 20000; /* a scheduler under load */
        uint64_t start_ns = io_memory_now_ns(bench.fs);
        CHECK_OK(bench_write(&bench), &bench.err);
        uint64_t took_ns = io_memory_now_ns(bench.fs) - start_ns;
        uint64_t due_ns = bench.stats.file_bytes * 1000000000u / rate;
        uint64_t first_ns = (2u << 20) * UINT64_C(1000000000) / rate; /* starts at once, credit */
        CHECK(took_ns + first_ns >= due_ns);
        CHECK(took_ns <= due_ns + due_ns / 20);
        CHECK(bench.stats.limited_ns > 0 && bench.stats.limited_ns <= took_ns);
        CHECK(io_memory_longest_sleep_ns(bench.fs) <= 100000000);
        CHECK(bench_check_files(&bench));
        bench_clean_up(&bench);
    }
}

static void
stop_when_it_sleeps(struct io_memory_process *process, enum io_call call, const char *name)
{
    (void)name;
    if ((call == IO_QUEUE_WRITE || call == IO_PWRITE) &&
        io_memory_now_ns(process->fs) > 2000000000) {
        atomic_store(&stop, 1);
    }
}

static void
a_limited_save_notices_that_it_is_cancelled(void)
{
    struct bench bench;
    bench_make(&bench, 24u << 20, false);
    atomic_store(&stop, 0);
    bench.engine.cancel = &stop;
    bench.engine.tuning.limit_bytes_s = 1u << 20;
    io_memory_process(bench.fs, 0)->before = stop_when_it_sleeps;
    CHECK_EQ(bench_write(&bench), DCP_E_CANCELLED);
    CHECK(io_memory_now_ns(bench.fs) < UINT64_C(5000000000));
    bench_clean_up(&bench);
}

static void
only_threads_of_the_engine_change_their_priority(void)
{
    for (int own = 0; own < 2; own++) {
        for (int way = 0; way < WAYS; way++) {
            struct bench bench;
            bench_make(&bench, 9u << 20, false);
            uint64_t closers = bench.world.layout.files_count > 1;
            bench.engine.own_thread = own != 0;
            bench.engine.tuning = (struct dcp_write_tuning){.queue = ways[way], .nice = 5};
            CHECK_OK(bench_write(&bench), &bench.err);
            CHECK_EQ(io_memory_calls_of(bench.fs, IO_THREAD_PRIORITY),
                     closers + (ways[way] == DCP_QUEUE_OFF) + (uint64_t)own);
            CHECK_EQ(bench.stats.priority_failures, 0);
            bench_clean_up(&bench);
        }
    }
}

static void
a_priority_that_cannot_be_set_is_counted_not_an_error(void)
{
    struct bench bench;
    bench_make(&bench, 9u << 20, false);
    bench.engine.own_thread = true;
    bench.engine.tuning.io_priority = 3u << 13;
    io_memory_faults(bench.fs)->fail_call = IO_THREAD_PRIORITY;
    io_memory_faults(bench.fs)->fail_nth = 1;
    io_memory_faults(bench.fs)->fail_errno = EPERM;
    CHECK_OK(bench_write(&bench), &bench.err);
    CHECK_EQ(bench.stats.priority_failures, 1);
    bench_clean_up(&bench);
}

/* ---- many files ---- */

static void
running_out_of_descriptors_waits_for_files_that_are_being_synced(void)
{
    struct bench bench;
    bench_make(&bench, 0, true);
    io_memory_faults(bench.fs)->fail_call = IO_OPEN_AT;
    io_memory_faults(bench.fs)->fail_nth = 6;
    io_memory_faults(bench.fs)->fail_errno = EMFILE;
    CHECK(bench.world.layout.files_count > 6);
    CHECK_OK(bench_write(&bench), &bench.err);
    CHECK_EQ(bench.stats.files_count, bench.world.layout.files_count);
    CHECK(world_check_files(bench.io, bench.dirfd, &bench.world));
    bench_clean_up(&bench);
}

static void
a_disk_too_small_for_all_files_is_met_before_the_first_byte(void)
{
    for (int enough = 0; enough < 2; enough++) {
        struct bench bench;
        bench_make(&bench, 0, false);
        world_clean_up(&bench.world);
        world_make(&bench.world, &(struct world_options){.seed = 4, .thread_count = 2});
        const uint64_t size[] = {9u << 20}, part[] = {1}; /* of each of eight */
        for (int i = 0; i < 8; i++) {
            world_add_tensor(&bench.world, DCP_DTYPE_UINT8, 1, size, part);
        }
        dcp_layout_clean_up(&bench.world.layout);
        dcp_free(bench.world.md.strings);
        dcp_free(bench.world.md.entries);
        dcp_free(bench.world.md.chunks);
        dcp_free(bench.world.md.dims);
        dcp_free(bench.world.md.files);
        world_finish(&bench.world, 2, false);
        CHECK_EQ(bench.world.layout.files_count, 2);
        io_memory_faults(bench.fs)->space_bytes = enough ? 80u << 20 : 60u << 20;
        int rc = bench_write(&bench);
        if (enough) {
            CHECK_OK(rc, &bench.err);
        } else {
            CHECK_EQ(rc, DCP_E_IO);
            CHECK_EQ(bench.err.sys_errno, ENOSPC);
            CHECK_EQ(io_memory_calls_of(bench.fs, IO_PWRITE), 0);
        }
        bench_clean_up(&bench);
    }
}

CTEST_MAIN(RUN(many_requests_use_the_queue_and_few_do_not);
           RUN(without_a_queue_the_thread_writes_unless_the_queue_was_asked_for);
           RUN(a_queue_that_refuses_is_left_for_the_thread);
           RUN(writes_that_do_not_start_are_written_all_the_same);
           RUN(a_file_system_that_refuses_direct_writes_gets_buffered_ones);
           RUN(a_cancelled_save_waits_for_what_is_in_flight);
           RUN(after_a_failure_writes_that_never_end_are_waited_for_a_minute);
           RUN(the_rate_is_kept_on_every_way); RUN(a_limited_save_notices_that_it_is_cancelled);
           RUN(only_threads_of_the_engine_change_their_priority);
           RUN(a_priority_that_cannot_be_set_is_counted_not_an_error);
           RUN(running_out_of_descriptors_waits_for_files_that_are_being_synced);
           RUN(a_disk_too_small_for_all_files_is_met_before_the_first_byte);)

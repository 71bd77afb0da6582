/*
 * writer_limits.c: the writer, from tensors and from an image that is filled, by thread and by
 * io_uring, beside plain writes of ready bytes; and many small files beside a plain loop.
 *
 *     gcc -O2 -std=c11 -D_GNU_SOURCE -Icsrc/include -Icsrc/core benchmarks/writer_limits.c \
 *         csrc/core/[a-z]*.c -lpthread -o build/writer_limits
 *     build/writer_limits DIRECTORY [MiB per process] [processes] [rounds] [small files]
 *
 * In every round each way runs once, one after another, all processes at the same time.  Figures
 * are of all processes together: bytes by the time of the slowest, CPU seconds (user and system)
 * per GB; median, best, and the median of the share of the limit of the same round.  Every file is
 * synced; the first round compares what was written with the source.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dcp_arena.h"
#include "dcp_image.h"
#include "measure.h"

enum { REQUEST_BYTES = 8 << 20, SMALL_BYTES = 16 << 10, MOST_ROUNDS = 64, MOST_PROCESSES = 16 };

enum way {
    WAY_PLAIN,
    WAY_ALLOCATED,
    WAY_THREAD,
    WAY_QUEUE,
    WAY_IMAGE_THREAD,
    WAY_IMAGE_QUEUE,
    WAY_SMALL_PLAIN,
    WAY_SMALL,
    WAYS
};

static const char *const way_names[WAYS] = {
    "ready bytes",
    "ready bytes, allocated first",
    "writer, thread",
    "writer, io_uring",
    "image, thread",
    "image, io_uring",
    "small files, write+fdatasync",
    "small files, writer",
};

/* Between the processes. */
struct shared {
    pthread_barrier_t barrier;
    double seconds[WAYS][MOST_ROUNDS][MOST_PROCESSES], cpu[WAYS][MOST_ROUNDS][MOST_PROCESSES];
    double rates[WAYS][MOST_ROUNDS]; /* by the parent, at the end */
};

/* What a writer needs, laid out. */
struct job {
    struct dcp_plan plan;
    struct dcp_layout layout;
    struct dcp_source *sources;
};

struct bench {
    const struct dcp_io *io;
    const char *path;
    int dirfd, process, processes, rounds, round;
    uint64_t bytes, small_count;
    uint8_t *source, *check; /* `check`: one request */
    struct shared *shared;
    struct job large, small;
    struct dcp_image image; /* of the large one, filled */
    struct dcp_arena *arena;
    struct dcp_save_id save_id;
};

static void
make_job(struct bench *bench, struct job *job, uint32_t count, uint64_t bytes_each)
{
    struct dcp_error err = {0};
    job->plan.rank = (uint32_t)bench->process;
    job->plan.thread_count = 1;
    job->plan.single_file_per_rank = count == 1;
    job->sources = calloc(count, sizeof *job->sources);
    must(job->sources != NULL, "memory", NULL);
    for (uint32_t i = 0; i < count; i++) {
        char fqn[32];
        uint32_t name;
        uint64_t offset = 0;
        int len = snprintf(fqn, sizeof fqn, "w%u", i);
        must(dcp_plan_add_name(&job->plan, fqn, (size_t)len, NULL, 0, 0, &name, &err) == 0, "plan",
             &err);
        struct dcp_item item = {
            .name = name, .kind = DCP_ITEM_TENSOR, .dtype = DCP_DTYPE_UINT8, .ndim = 1};
        must(dcp_plan_add_item(&job->plan, &item, &bytes_each, &offset, &bytes_each, &err) == 0,
             "plan", &err);
        job->sources[i].data = bench->source + i * bytes_each;
    }
    must(dcp_layout_build(&job->plan, NULL, &job->layout, &err) == 0, "layout", &err);
}

static void
small_name(const struct bench *bench, uint64_t i, char name[64])
{
    snprintf(name, 64, "__%d_%" PRIu64 ".distcp", bench->process, i);
}

/* Where a payload of the writer's first file lies is the layout's to say. */
static void
check_large(struct bench *bench, const char *name, uint64_t offset)
{
    int fd = openat(bench->dirfd, name, O_RDONLY);
    must(fd >= 0, name, NULL);
    for (uint64_t at = 0; at < bench->bytes; at += REQUEST_BYTES) {
        must(pread(fd, bench->check, REQUEST_BYTES, (off_t)(offset + at)) == REQUEST_BYTES &&
                 memcmp(bench->check, bench->source + at, REQUEST_BYTES) == 0,
             "what was written differs", NULL);
    }
    close(fd);
}

static void
write_plain(struct bench *bench, bool allocated)
{
    char name[64];
    snprintf(name, sizeof name, "plain.%d", bench->process);
    int fd = openat(bench->dirfd, name, O_WRONLY | O_CREAT | O_EXCL, 0666);
    must(fd >= 0, name, NULL);
    (void)bench->io->set_direct(bench->io->ctx, fd, true); /* in memory there is none */
    if (allocated) {
        must(bench->io->fallocate(bench->io->ctx, fd, 0, bench->bytes) == 0 &&
                 ftruncate(fd, (off_t)bench->bytes) == 0,
             "allocating", NULL);
    }
    for (uint64_t at = 0; at < bench->bytes; at += REQUEST_BYTES) {
        must(pwrite(fd, bench->source + at, REQUEST_BYTES, (off_t)at) == REQUEST_BYTES, "pwrite",
             NULL);
    }
    must(fdatasync(fd) == 0 && close(fd) == 0, "sync", NULL);
}

static void
write_small(struct bench *bench)
{
    for (uint64_t i = 0; i < bench->small_count; i++) {
        char name[64];
        small_name(bench, i, name);
        int fd = openat(bench->dirfd, name, O_WRONLY | O_CREAT | O_EXCL, 0666);
        must(fd >= 0, name, NULL);
        must(pwrite(fd, bench->source + i * SMALL_BYTES, SMALL_BYTES, 0) == SMALL_BYTES &&
                 fdatasync(fd) == 0 && close(fd) == 0,
             name, NULL);
    }
}

static void
write_job(struct bench *bench, const struct job *job, enum dcp_queue_use queue)
{
    struct dcp_error err = {0};
    struct dcp_engine_options options = {.sync = true, .tuning.queue = queue};
    must(dcp_writer_run(bench->io, bench->dirfd, bench->path, &job->plan, &job->layout,
                        job->sources, &bench->save_id, 0, &options, NULL, NULL, &err) == 0,
         "writer", &err);
}

static void
fill_image(struct bench *bench)
{
    const struct job *job = &bench->large;
    struct dcp_engine_options options = {0};
    struct dcp_error err = {0};
    must(dcp_image_place(&job->layout, job->plan.rank, 0, &bench->image, &err) == 0 &&
             dcp_arena_acquire(DCP_ARENA_PRIVATE, bench->image.bytes, NULL, &bench->arena, &err) ==
                 0 &&
             dcp_image_fill(&bench->image, bench->arena->memory, &job->plan, &job->layout,
                            job->sources, &bench->save_id, 0, &options, NULL, &err) == 0,
         "image", &err);
}

static void
write_image(struct bench *bench, enum dcp_queue_use queue)
{
    struct dcp_error err = {0};
    struct dcp_engine_options options = {.sync = true, .tuning.queue = queue};
    must(dcp_image_write(bench->io, bench->dirfd, bench->path, &bench->image, bench->arena->memory,
                         &options, NULL, &err) == 0,
         "image", &err);
}

static void
clear(struct bench *bench, uint64_t files)
{
    char name[64];
    snprintf(name, sizeof name, "plain.%d", bench->process);
    unlinkat(bench->dirfd, name, 0);
    for (uint64_t i = 0; i < files; i++) {
        small_name(bench, i, name);
        unlinkat(bench->dirfd, name, 0);
    }
    must(syncfs(bench->dirfd) == 0, "syncfs", NULL); /* nobody pays for the way before */
}

static void
run_way(struct bench *bench, enum way way)
{
    pthread_barrier_wait(&bench->shared->barrier);
    double start = seconds_of(CLOCK_MONOTONIC), cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
    switch (way) {
    case WAY_PLAIN:
    case WAY_ALLOCATED:
        write_plain(bench, way == WAY_ALLOCATED);
        break;
    case WAY_THREAD:
        write_job(bench, &bench->large, DCP_QUEUE_OFF);
        break;
    case WAY_QUEUE:
        write_job(bench, &bench->large, DCP_QUEUE_AUTO);
        break;
    case WAY_IMAGE_THREAD:
    case WAY_IMAGE_QUEUE:
        write_image(bench, way == WAY_IMAGE_THREAD ? DCP_QUEUE_OFF : DCP_QUEUE_AUTO);
        break;
    case WAY_SMALL_PLAIN:
        write_small(bench);
        break;
    default:
        write_job(bench, &bench->small, DCP_QUEUE_AUTO);
        break;
    }
    bench->shared->seconds[way][bench->round][bench->process] = seconds_of(CLOCK_MONOTONIC) - start;
    bench->shared->cpu[way][bench->round][bench->process] =
        seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    pthread_barrier_wait(&bench->shared->barrier);
    if (bench->round == 0 && way >= WAY_THREAD && way <= WAY_IMAGE_QUEUE) {
        char name[64];
        small_name(bench, 0, name);
        check_large(bench, name, bench->large.layout.records[0].payload_offset_bytes);
    }
    clear(bench, way < WAY_SMALL_PLAIN ? 1 : bench->small_count);
}

static void
run_process(void *arg)
{
    struct bench *bench = arg;
    bench->dirfd = open(bench->path, O_RDONLY | O_DIRECTORY);
    must(bench->dirfd >= 0, bench->path, NULL);
    uint64_t room = dcp_max_u64(bench->bytes, bench->small_count * SMALL_BYTES);
    struct dcp_error err = {0};
    bench->source = dcp_map_huge(room, &err);
    bench->check = malloc(REQUEST_BYTES);
    must(bench->source != NULL && bench->check != NULL, "memory", &err);
    for (uint64_t i = 0; i < room / 8; i++) {
        uint64_t word = (i + 1) * 0x9E3779B97F4A7C15u;
        memcpy(bench->source + i * 8, &word, 8);
    }
    make_job(bench, &bench->large, 1, bench->bytes);
    make_job(bench, &bench->small, (uint32_t)bench->small_count, SMALL_BYTES - 4096);
    fill_image(bench);
    for (bench->round = 0; bench->round < bench->rounds; bench->round++) {
        for (int way = 0; way < WAYS; way++) {
            run_way(bench, (enum way)way);
        }
    }
}

static void
report(const struct bench *bench)
{
    struct shared *shared = bench->shared;
    printf("%d process(es) x %.2f GB, %d rounds\n%-32s %8s %8s %9s %10s\n", bench->processes,
           (double)bench->bytes / 1e9, bench->rounds, "", "GB/s", "best", "of limit", "CPU s/GB");
    for (int way = 0; way < WAYS; way++) {
        bool small = way >= WAY_SMALL_PLAIN;
        double gb = (double)(small ? bench->small_count * SMALL_BYTES : bench->bytes) *
                    bench->processes / 1e9;
        double cpu[MOST_ROUNDS], share[MOST_ROUNDS], best = 0;
        for (int round = 0; round < bench->rounds; round++) {
            double slowest = 0;
            cpu[round] = 0;
            for (int p = 0; p < bench->processes; p++) {
                double seconds = shared->seconds[way][round][p];
                slowest = seconds > slowest ? seconds : slowest;
                cpu[round] += shared->cpu[way][round][p] / gb;
            }
            shared->rates[way][round] = gb / slowest;
            best = gb / slowest > best ? gb / slowest : best;
            share[round] =
                gb / slowest / shared->rates[small ? WAY_SMALL_PLAIN : WAY_PLAIN][round] * 100;
        }
        double rate = median(shared->rates[way], bench->rounds);
        printf("%-32s %8.3f %8.3f %8.0f%% %10.3f", way_names[way], rate, best,
               median(share, bench->rounds), median(cpu, bench->rounds));
        printf(small ? "  %.3f s\n" : "\n", gb / rate);
    }
}

int
main(int argc, char **argv)
{
    static struct bench bench;
    if (argc < 2) {
        fprintf(stderr, "usage: writer_limits DIRECTORY [MiB per process] [processes] [rounds] "
                        "[small files]\n");
        return 2;
    }
    bench.path = argv[1];
    bench.bytes = (argc > 2 ? strtoull(argv[2], NULL, 10) : 64) << 20;
    bench.processes = argc > 3 ? (int)strtol(argv[3], NULL, 10) : 1;
    bench.rounds = argc > 4 ? (int)strtol(argv[4], NULL, 10) : 3;
    bench.small_count = argc > 5 ? strtoull(argv[5], NULL, 10) : 50;
    must(bench.bytes >= REQUEST_BYTES && bench.bytes % REQUEST_BYTES == 0 && bench.processes > 0 &&
             bench.processes <= MOST_PROCESSES && bench.rounds > 0 && bench.rounds <= MOST_ROUNDS &&
             bench.small_count > 1,
         "the arguments are out of range", NULL);
    bench.io = dcp_io_posix();
    must(bench.io->mkdirs(bench.io->ctx, bench.path) == 0, bench.path, NULL);
    memset(bench.save_id.bytes, 7, sizeof bench.save_id.bytes);
    bench.shared = map_shared(sizeof *bench.shared);
    run_processes(bench.processes, &bench.shared->barrier, &bench.process, run_process, &bench);
    report(&bench);
    return 0;
}

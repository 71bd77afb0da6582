/*
 * image_limits.c: filling the image of a save beside copies of the same bytes, in memory that is
 * warm and in memory that is touched for the first time.
 *
 * Usage: image_limits [MiB per process] [bytes per tensor] [processes] [rounds]
 *
 * In every round each way runs once, one after another, all processes at the same time; every
 * second round goes backwards, because what a way leaves to the kernel is the next one's fresh
 * memory.  Figures are of all processes together: payload bytes by the time of the slowest, the
 * share of the limit of the same round (one memcpy in warm memory; touching as much in fresh
 * memory) and ns per tensor; medians.  The first round compares what was filled with the source.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dcp_arena.h"
#include "dcp_image.h"
#include "measure.h"

enum { MOST_ROUNDS = 64, MOST_PROCESSES = 16 };

enum way {
    WAY_COPY,
    WAY_COPY_EACH,
    WAY_FILL,
    WAY_FILL_HASHING,
    WAY_TOUCH_PRIVATE,
    WAY_FILL_FRESH_PRIVATE,
    WAY_FILL_TOUCHED_PRIVATE,
    WAY_TOUCH_SHARED,
    WAY_FILL_FRESH_SHARED,
    WAY_FILL_TOUCHED_SHARED,
    WAYS
};

static const struct {
    const char *name;
    enum way limit;
} ways[WAYS] = {{"memcpy", WAY_COPY},
                {"memcpy, each tensor", WAY_COPY},
                {"fill", WAY_COPY},
                {"fill, hashing", WAY_COPY},
                {"touch fresh private", WAY_TOUCH_PRIVATE},
                {"fill, fresh private", WAY_TOUCH_PRIVATE},
                {"touch and fill, private", WAY_TOUCH_PRIVATE},
                {"touch fresh shared", WAY_TOUCH_SHARED},
                {"fill, fresh shared", WAY_TOUCH_SHARED},
                {"touch and fill, shared", WAY_TOUCH_SHARED}};

/* Between the processes. */
struct shared {
    pthread_barrier_t barrier;
    double seconds[WAYS][MOST_ROUNDS][MOST_PROCESSES];
};

/* One rank's save, placed. */
struct job {
    struct dcp_plan plan;
    struct dcp_layout layout;
    struct dcp_image image;
    struct dcp_source *sources;
};

struct bench {
    int process, processes, rounds, round;
    uint64_t item_bytes;
    uint32_t items_count;
    uint8_t *source;
    struct dcp_arena *warm;
    struct shared *shared;
    struct job plain, hashing;
    struct dcp_save_id save_id;
};

static void
make_job(struct bench *bench, struct job *job, bool content_hash)
{
    struct dcp_error err = {0};
    job->plan.rank = (uint32_t)bench->process;
    job->plan.thread_count = 1;
    job->plan.single_file_per_rank = true;
    job->plan.content_hash = content_hash;
    job->sources = calloc(bench->items_count, sizeof *job->sources);
    must(job->sources != NULL, "memory", NULL);
    for (uint32_t i = 0; i < bench->items_count; i++) {
        char fqn[48];
        uint32_t name;
        uint64_t offset = 0;
        int len = snprintf(fqn, sizeof fqn, "model.layers.%u.weight", i);
        struct dcp_item item = {.kind = DCP_ITEM_TENSOR, .dtype = DCP_DTYPE_UINT8, .ndim = 1};
        must(dcp_plan_add_name(&job->plan, fqn, (size_t)len, NULL, 0, 0, &name, &err) == 0, "plan",
             &err);
        item.name = name;
        must(dcp_plan_add_item(&job->plan, &item, &bench->item_bytes, &offset, &bench->item_bytes,
                               &err) == 0,
             "plan", &err);
        job->sources[i].data = bench->source + i * bench->item_bytes;
    }
    must(dcp_layout_build(&job->plan, NULL, &job->layout, &err) == 0 &&
             dcp_image_place(&job->layout, job->plan.rank, 0, &job->image, &err) == 0,
         "layout", &err);
}

static struct dcp_arena *
take(enum dcp_arena_kind kind, uint64_t bytes)
{
    struct dcp_arena *arena = NULL;
    struct dcp_error err = {0};
    must(dcp_arena_acquire(kind, bytes, NULL, &arena, &err) == 0, "arena", &err);
    return arena;
}

static void
populate(struct dcp_arena *arena, uint64_t bytes)
{
    struct dcp_error err = {0};
    must(dcp_arena_populate(arena, bytes, NULL, &err) == 0, "touching", &err);
}

static void
fill(const struct bench *bench, const struct job *job, const struct dcp_arena *arena)
{
    struct dcp_engine_options options = {0};
    struct dcp_error err = {0};
    must(dcp_image_fill(&job->image, arena->memory, &job->plan, &job->layout, job->sources,
                        &bench->save_id, 0, &options, NULL, &err) == 0,
         "filling", &err);
}

static void
check(const struct bench *bench, const struct job *job, const struct dcp_arena *arena)
{
    for (uint32_t r = 0; r < job->layout.records_count; r++) {
        const struct dcp_placed_record *record = &job->layout.records[r];
        must(memcmp(arena->memory + record->payload_offset_bytes, job->sources[record->item].data,
                    bench->item_bytes) == 0,
             "what was filled differs", NULL);
    }
}

static void
copy_each(const struct bench *bench)
{
    for (uint32_t r = 0; r < bench->items_count; r++) {
        const struct dcp_placed_record *record = &bench->plain.layout.records[r];
        memcpy(bench->warm->memory + record->payload_offset_bytes,
               bench->plain.sources[record->item].data, bench->item_bytes);
    }
}

static void
run_way(struct bench *bench, enum way way)
{
    bool fresh = way >= WAY_TOUCH_PRIVATE;
    enum dcp_arena_kind kind = way >= WAY_TOUCH_SHARED ? DCP_ARENA_SHARED : DCP_ARENA_PRIVATE;
    const struct job *job = way == WAY_FILL_HASHING ? &bench->hashing : &bench->plain;
    pthread_barrier_wait(&bench->shared->barrier);
    double start = seconds_of(CLOCK_MONOTONIC);
    struct dcp_arena *arena = fresh ? take(kind, job->image.bytes) : bench->warm;
    if (way == WAY_COPY) {
        memcpy(arena->memory, bench->source, bench->items_count * bench->item_bytes);
    } else if (way == WAY_COPY_EACH) {
        copy_each(bench);
    } else if (way == WAY_TOUCH_PRIVATE || way == WAY_TOUCH_SHARED) {
        populate(arena, job->image.bytes);
    } else {
        if (way == WAY_FILL_TOUCHED_PRIVATE || way == WAY_FILL_TOUCHED_SHARED) {
            populate(arena, job->image.bytes);
        }
        fill(bench, job, arena);
    }
    bench->shared->seconds[way][bench->round][bench->process] = seconds_of(CLOCK_MONOTONIC) - start;
    pthread_barrier_wait(&bench->shared->barrier);
    if (bench->round == 0 && way != WAY_COPY && way != WAY_TOUCH_PRIVATE &&
        way != WAY_TOUCH_SHARED) {
        check(bench, job, arena);
    }
    if (fresh) {
        dcp_arena_release(arena);
        dcp_arena_trim();
    }
}

static void
run_process(void *arg)
{
    struct bench *bench = arg;
    uint64_t bytes = bench->items_count * bench->item_bytes;
    bench->source = map_touched(bytes);
    for (uint64_t i = 0; i < bytes / 8; i++) {
        uint64_t word = (i + 1) * 0x9E3779B97F4A7C15u;
        memcpy(bench->source + i * 8, &word, 8);
    }
    make_job(bench, &bench->plain, false);
    make_job(bench, &bench->hashing, true);
    bench->warm = take(DCP_ARENA_PRIVATE, bench->hashing.image.bytes);
    populate(bench->warm, bench->hashing.image.bytes);
    for (bench->round = 0; bench->round < bench->rounds; bench->round++) {
        for (int i = 0; i < WAYS; i++) {
            run_way(bench, (enum way)(bench->round % 2 == 0 ? i : WAYS - 1 - i));
        }
    }
}

static double
slowest(const struct bench *bench, enum way way, int round)
{
    double most = 0;
    for (int p = 0; p < bench->processes; p++) {
        double seconds = bench->shared->seconds[way][round][p];
        most = seconds > most ? seconds : most;
    }
    return most;
}

static void
report(const struct bench *bench)
{
    double gb = (double)bench->items_count * (double)bench->item_bytes * bench->processes / 1e9;
    printf("%d process(es) x %u tensors of %" PRIu64 " bytes, %d rounds\n%-24s %8s %9s %10s\n",
           bench->processes, bench->items_count, bench->item_bytes, bench->rounds, "", "GB/s",
           "of limit", "ns/tensor");
    for (int way = 0; way < WAYS; way++) {
        double seconds[MOST_ROUNDS], share[MOST_ROUNDS];
        for (int round = 0; round < bench->rounds; round++) {
            seconds[round] = slowest(bench, (enum way)way, round);
            share[round] = slowest(bench, ways[way].limit, round) / seconds[round] * 100;
        }
        double middle = median(seconds, bench->rounds);
        printf("%-24s %8.2f %8.0f%% %10.0f\n", ways[way].name, gb / middle,
               median(share, bench->rounds), middle / bench->items_count * 1e9);
    }
}

int
main(int argc, char **argv)
{
    static struct bench bench;
    uint64_t bytes = (argc > 1 ? strtoull(argv[1], NULL, 10) : 64) << 20;
    bench.item_bytes = argc > 2 ? strtoull(argv[2], NULL, 10) : 1 << 20;
    bench.processes = argc > 3 ? (int)strtol(argv[3], NULL, 10) : 1;
    bench.rounds = argc > 4 ? (int)strtol(argv[4], NULL, 10) : 3;
    must(bench.item_bytes >= 8 && bench.item_bytes <= bytes && bytes / bench.item_bytes < 1 << 24 &&
             bench.processes > 0 && bench.processes <= MOST_PROCESSES && bench.rounds > 0 &&
             bench.rounds <= MOST_ROUNDS,
         "the arguments are out of range", NULL);
    bench.items_count = (uint32_t)(bytes / bench.item_bytes);
    bench.shared = map_shared(sizeof *bench.shared);
    run_processes(bench.processes, &bench.shared->barrier, &bench.process, run_process, &bench);
    report(&bench);
    return 0;
}

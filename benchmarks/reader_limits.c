/*
 * reader_limits.c: two readers at once beside what the machine can do, in one run.
 *
 * Usage: reader_limits DIRECTORY [MiB PER RANK] [ROUNDS] [SMALL RECORDS] [cold|hot|cut|small]
 *
 * Two processes do the same thing at the same time, as two ranks of a host do; a step takes as long
 * as the slower one.  Every round runs all steps, one after another, so that what else happens on
 * the machine hits all of them alike:
 *   cold   the page cache is emptied before; the limit is pread with O_DIRECT, 8 MiB at a time,
 *          into aligned memory that was touched before; ours reads the same bytes as records of a
 *          checkpoint, into memory like that of torch (64 bytes off a page), verified and not
 *   hot    the page cache is filled before; the limit is memcpy of the same bytes; pread of the
 *          same bytes, alone, says what the kernel's own copy costs
 *   cut    each rank holds rows of a tensor and wants half of the columns of all rows, cold: how
 *          many bytes are asked for, and how many the device read, per byte wanted
 *   small  records of 2 KiB, hot and cold
 * Printed are medians and minima of the rounds, their ratio to the limit, and the most memory that
 * the reader took beside its target.  What was read is compared with what was written.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dcp_engine.h"
#include "measure.h"

enum {
    RANKS = 2,
    MAX_ROUNDS = 31,
    REQUEST_BYTES = 8 << 20,
    PIECE_BYTES = 1 << 20,
    SMALL_BYTES = 2048,
    WIDTHS = 7,
    SHIFT = 64, /* of targets, as torch's allocator leaves them */
};

enum row {
    COLD_LIMIT,
    COLD_READER,
    COLD_UNVERIFIED,
    COLD_ALIGNED,
    HOT_LIMIT,
    HOT_PREAD,
    HOT_READER,
    HOT_UNVERIFIED,
    SMALL_HOT,
    SMALL_COLD,
    CUT,
    ROWS = CUT + WIDTHS,
};

static const char *const row_names[CUT] = {
    "cold: O_DIRECT, 8 MiB",
    "cold: reader",
    "cold: reader, no verify",
    "cold: reader, aligned",
    "hot: memcpy",
    "hot: pread alone",
    "hot: reader",
    "hot: reader, no verify",
    "small: hot",
    "small: cold",
};

static const uint64_t half_bytes[WIDTHS] = {1 << 10,  2 << 10,  4 << 10, 8 << 10,
                                            16 << 10, 32 << 10, 64 << 10};

/* A checkpoint in a directory of its own. */
struct world {
    char path[512];
    int dirfd;
    struct dcp_plan plans[RANKS];
    struct dcp_global_plan global;
    struct dcp_metadata md;
    struct dcp_save_id save_id;
};

/* Of a step, filled by one rank each. */
struct result {
    double seconds, cpu_seconds;
    uint64_t wanted_bytes, read_bytes, device_bytes, extra_bytes, requests;
};

struct shared {
    pthread_barrier_t barrier;
    struct result results[RANKS][ROWS][MAX_ROUNDS];
    bool failed;
};

struct bench {
    struct shared *shared;
    uint32_t rank;
    int round;
    uint64_t bytes, cut_bytes, small_count;
    uint8_t *source, *target; /* bytes + one page */
    struct world main, cut, small;
    bool in_memory;
    const char *only; /* the steps to run; NULL: all */
};

/* A number of a /proc file of this process. */
static uint64_t
proc_number(const char *name, const char *key)
{
    char line[256], path[64];
    uint64_t value = 0;
    snprintf(path, sizeof path, "/proc/self/%s", name);
    FILE *file = fopen(path, "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, key, strlen(key)) == 0) {
            value = strtoull(line + strlen(key), NULL, 10);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return value;
}

/* The peak from now on. */
static void
reset_peak(void)
{
    int fd = open("/proc/self/clear_refs", O_WRONLY);
    if (fd >= 0) {
        (void)!write(fd, "5", 1);
        close(fd);
    }
}

/* ---- checkpoints ---- */

static uint64_t
word_at(uint32_t rank, uint64_t index)
{
    return (index + 1) * 0x9E3779B97F4A7C15u ^ rank;
}

static void
add_item(struct dcp_plan *plan, const char *fqn, int dtype, const uint64_t *size,
         const uint64_t *offsets, const uint64_t *sizes)
{
    struct dcp_error err = {0};
    uint32_t name;
    must(dcp_plan_add_name(plan, fqn, strlen(fqn), NULL, 0, 0, &name, &err) == 0, "plan", &err);
    struct dcp_item item = {
        .name = name, .kind = DCP_ITEM_SHARD, .dtype = (uint8_t)dtype, .ndim = 2};
    must(dcp_plan_add_item(plan, &item, size, offsets, sizes, &err) == 0, "plan", &err);
}

/* The shards of a transformer's matrices, and its norms. */
static void
plan_main(const struct bench *bench, struct dcp_plan *plan, uint32_t rank)
{
    static const uint64_t shapes[][2] = {{2048, 4096}, {2048, 4096}, {5504, 4096},
                                         {4096, 5504}, {1, 4096},    {16000, 4096}};
    uint64_t at = 0;
    for (uint32_t i = 0; at < bench->bytes; i++) {
        uint64_t offsets[2] = {0, 0}, size[2] = {shapes[i % 6][0], shapes[i % 6][1]};
        uint64_t row = size[1] * 2;
        char fqn[64];
        size[0] = dcp_min_u64(size[0], dcp_max_u64((bench->bytes - at) / row, 1));
        snprintf(fqn, sizeof fqn, "rank%u.layers.%u.weight", rank, i);
        add_item(plan, fqn, DCP_DTYPE_BFLOAT16, size, offsets, size);
        at += dcp_align_up(size[0] * row, 4096);
    }
}

/* Tensors of rows of twice each half, rows divided over the ranks. */
static void
plan_cut(const struct bench *bench, struct dcp_plan *plan, uint32_t rank)
{
    for (int w = 0; w < WIDTHS; w++) {
        uint64_t rows = bench->cut_bytes / (2 * half_bytes[w]);
        uint64_t size[2] = {RANKS * rows, half_bytes[w] / 2}, offsets[2] = {rank * rows, 0};
        uint64_t sizes[2] = {rows, size[1]};
        char fqn[64];
        snprintf(fqn, sizeof fqn, "cut.%d", w);
        add_item(plan, fqn, DCP_DTYPE_FLOAT32, size, offsets, sizes);
    }
}

static void
plan_small(const struct bench *bench, struct dcp_plan *plan, uint32_t rank)
{
    for (uint64_t i = 0; i < bench->small_count; i++) {
        uint64_t offsets[2] = {0, 0}, size[2] = {2, SMALL_BYTES / 8};
        char fqn[64];
        snprintf(fqn, sizeof fqn, "rank%u.layers.%" PRIu64 ".bias", rank, i);
        add_item(plan, fqn, DCP_DTYPE_FLOAT32, size, offsets, size);
    }
}

typedef void (*plan_fn)(const struct bench *bench, struct dcp_plan *plan, uint32_t rank);

static uint64_t
item_bytes(const struct dcp_plan *plan, uint32_t i)
{
    const struct dcp_item *item = &plan->items[i];
    const uint64_t *sizes = plan->dims + item->dims + 4;
    return sizes[0] * sizes[1] * dcp_dtype_bytes(item->dtype);
}

/* Every rank plans for all, and writes its own file from its source, item after item. */
static void
world_make(struct bench *bench, struct world *world, const char *dir, const char *name,
           plan_fn plan_of)
{
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_engine_options options = {.sync = true};
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    struct dcp_layout layout;
    struct dcp_buf image = {0};
    struct dcp_error err = {0};
    snprintf(world->path, sizeof world->path, "%s/%s", dir, name);
    must(io->mkdirs(io->ctx, world->path) == 0, "mkdir", NULL);
    world->dirfd = io->open_dir(io->ctx, world->path);
    must(world->dirfd >= 0, "open directory", NULL);
    memset(world->save_id.bytes, 7, sizeof world->save_id.bytes);
    for (uint32_t r = 0; r < RANKS; r++) {
        world->plans[r].rank = r;
        world->plans[r].thread_count = 1;
        world->plans[r].single_file_per_rank = true;
        plan_of(bench, &world->plans[r], r);
    }
    must(dcp_global_plan_build(world->plans, RANKS, false, &world->global, &err) == 0,
         "global plan", &err);
    must(dcp_metadata_write(&world->global, &meta, &world->save_id, 0, NULL, &image, &err) == 0,
         "metadata", &err);
    must(dcp_metadata_read(image.data, image.len, &world->md, &err) == 0, "metadata", &err);
    dcp_buf_clean_up(&image);
    const struct dcp_plan *mine = &world->plans[bench->rank];
    struct dcp_source *sources = calloc(mine->items_count, sizeof *sources);
    uint64_t at = 0;
    for (uint32_t i = 0; i < mine->items_count; i++) {
        sources[i].data = bench->source + at;
        at += dcp_align_up(item_bytes(mine, i), 4096);
    }
    must(dcp_layout_build(mine, NULL, &layout, &err) == 0, "layout", &err);
    must(dcp_writer_run(io, world->dirfd, world->path, mine, &layout, sources, &world->save_id, 0,
                        &options, NULL, NULL, &err) == 0,
         "writer", &err);
    dcp_layout_clean_up(&layout);
    free(sources);
}

static int
world_open(const struct world *world, uint32_t rank)
{
    char name[64];
    snprintf(name, sizeof name, "__%u_0.distcp", rank);
    int fd = openat(world->dirfd, name, O_RDONLY);
    must(fd >= 0, name, NULL);
    return fd;
}

static void
world_remove(struct world *world, bool files)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        char name[64];
        snprintf(name, sizeof name, "__%u_0.distcp", r);
        if (files) {
            unlinkat(world->dirfd, name, 0);
        }
        dcp_plan_clean_up(&world->plans[r]);
    }
    close(world->dirfd);
    if (files) {
        rmdir(world->path);
    }
    dcp_metadata_clean_up(&world->md);
    dcp_global_plan_clean_up(&world->global);
}

/* ---- steps ---- */

/* Both ranks come here, and what they do next begins at the same time. */
static void
meet(const struct bench *bench)
{
    pthread_barrier_wait(&bench->shared->barrier);
}

/* Empties or fills the page cache with the files of a world. */
static void
set_cache(const struct bench *bench, const struct world *world, bool hot)
{
    meet(bench);
    int fd = world_open(world, bench->rank);
    if (hot) {
        while (read(fd, bench->target, REQUEST_BYTES) > 0) {
        }
    } else if (!bench->in_memory) {
        fdatasync(fd);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    }
    close(fd);
    meet(bench);
}

static struct result *
result_of(const struct bench *bench, int row)
{
    return &bench->shared->results[bench->rank][row][bench->round];
}

static void
start(const struct bench *bench, int row)
{
    struct result *result = result_of(bench, row);
    result->device_bytes = proc_number("io", "read_bytes:");
    meet(bench);
    result->cpu_seconds = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
    result->seconds = seconds_of(CLOCK_MONOTONIC);
}

static void
stop(const struct bench *bench, int row, uint64_t bytes)
{
    struct result *result = result_of(bench, row);
    result->cpu_seconds = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - result->cpu_seconds;
    meet(bench);
    result->seconds = seconds_of(CLOCK_MONOTONIC) - result->seconds;
    result->device_bytes = proc_number("io", "read_bytes:") - result->device_bytes;
    result->wanted_bytes = bytes;
}

static void
plain_read(struct bench *bench, int row, bool direct, uint64_t request_bytes)
{
    set_cache(bench, &bench->main, !direct);
    int fd = world_open(&bench->main, bench->rank);
    must(!direct || bench->in_memory || fcntl(fd, F_SETFL, O_DIRECT) == 0, "O_DIRECT", NULL);
    uint64_t len = bench->bytes / request_bytes * request_bytes;
    uint8_t *to = bench->target + (direct ? 0 : SHIFT);
    start(bench, row);
    for (uint64_t at = 0; at < len; at += request_bytes) {
        must(pread(fd, to + at, request_bytes, (off_t)at) == (ssize_t)request_bytes, "pread", NULL);
    }
    stop(bench, row, len);
    close(fd);
}

/* Loads the targets of a plan.  The peak of the reader is what it took beside them. */
static void
load(struct bench *bench, int row, struct world *world, struct dcp_read_plan *plan, bool verify)
{
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_engine_options options = {.verify = verify};
    struct dcp_read_stats stats;
    struct dcp_error err = {0};
    must(dcp_read_plan_build(plan, true, NULL, &err) == 0, "read plan", &err);
    reset_peak();
    uint64_t before = proc_number("status", "VmRSS:");
    start(bench, row);
    must(dcp_reader_run(io, world->dirfd, world->path, plan, &options, NULL, NULL, &stats, &err) ==
             0,
         "reader", &err);
    stop(bench, row, stats.wanted_bytes);
    struct result *result = result_of(bench, row);
    uint64_t peak = proc_number("status", "VmHWM:");
    result->extra_bytes = peak > before ? (peak - before) << 10 : 0;
    result->read_bytes = stats.read_bytes;
    result->requests = stats.requests_count;
    dcp_engine_trim();
}

static void
load_own(struct bench *bench, int row, struct world *world, bool hot, bool verify, uint64_t shift)
{
    const struct dcp_plan *mine = &world->plans[bench->rank];
    struct dcp_read_plan plan = {.md = &world->md};
    struct dcp_error err = {0};
    uint64_t at = 0;
    set_cache(bench, world, hot);
    for (uint32_t i = 0, e = 0; i < mine->items_count; i++) {
        const struct dcp_name *name = &mine->names[mine->items[i].name];
        const uint64_t *dims = mine->dims + mine->items[i].dims;
        for (;; e = (e + 1) % (uint32_t)world->md.entries_count) {
            const struct dcp_md_entry *entry = &world->md.entries[e];
            if (entry->name_len == name->fqn_len &&
                memcmp(world->md.strings + entry->name, name->fqn, name->fqn_len) == 0) {
                break;
            }
        }
        must(dcp_read_plan_add(&plan, e, bench->target + at + shift, NULL, dims + 2, dims + 4, NULL,
                               &err) == 0,
             "read plan", &err);
        at += dcp_align_up(item_bytes(mine, i), 4096);
    }
    load(bench, row, world, &plan, verify);
    at = 0;
    for (uint32_t i = 0; i < mine->items_count; i++) {
        must(memcmp(plan.targets[i].data, bench->source + at, item_bytes(mine, i)) == 0,
             "what was read differs", NULL);
        at += dcp_align_up(item_bytes(mine, i), 4096);
    }
    dcp_read_plan_clean_up(&plan);
}

/* Half of the columns of a tensor whose rows lie in both files. */
static void
load_cut(struct bench *bench, int width)
{
    struct world *world = &bench->cut;
    struct dcp_read_plan plan = {.md = &world->md};
    struct dcp_error err = {0};
    uint64_t half = half_bytes[width], rows = bench->cut_bytes / (2 * half);
    uint64_t offsets[2] = {0, bench->rank * (half / 4)}, sizes[2] = {RANKS * rows, half / 4};
    uint8_t *target = bench->target + SHIFT;
    uint64_t e = 0, before = 0;
    char fqn[64];
    size_t len = (size_t)snprintf(fqn, sizeof fqn, "cut.%d", width);
    while (world->md.entries[e].name_len != len ||
           memcmp(world->md.strings + world->md.entries[e].name, fqn, len) != 0) {
        e++;
    }
    set_cache(bench, world, false);
    must(dcp_read_plan_add(&plan, e, target, NULL, offsets, sizes, NULL, &err) == 0, "read plan",
         &err);
    load(bench, CUT + width, world, &plan, true);
    for (int w = 0; w < width; w++) {
        before += dcp_align_up(item_bytes(&world->plans[0], (uint32_t)w), 4096);
    }
    for (uint64_t row = 0; row < RANKS * rows; row += 31) {
        uint64_t in_source = before + row % rows * 2 * half + bench->rank * half;
        for (uint64_t i = 0; i < half; i += 8) {
            uint64_t word;
            memcpy(&word, target + row * half + i, 8);
            must(word == word_at((uint32_t)(row / rows), (in_source + i) / 8),
                 "what was read differs", NULL);
        }
    }
    dcp_read_plan_clean_up(&plan);
}

static bool
runs(const struct bench *bench, const char *steps)
{
    return bench->only == NULL || strcmp(bench->only, steps) == 0;
}

static void
run_round(struct bench *bench)
{
    if (runs(bench, "cold")) {
        plain_read(bench, COLD_LIMIT, true, REQUEST_BYTES);
        load_own(bench, COLD_READER, &bench->main, false, true, SHIFT);
        load_own(bench, COLD_UNVERIFIED, &bench->main, false, false, SHIFT);
        load_own(bench, COLD_ALIGNED, &bench->main, false, true, 0);
    }
    if (runs(bench, "hot")) {
        start(bench, HOT_LIMIT);
        memcpy(bench->target + SHIFT, bench->source, bench->bytes);
        stop(bench, HOT_LIMIT, bench->bytes);
        plain_read(bench, HOT_PREAD, false, PIECE_BYTES);
        load_own(bench, HOT_READER, &bench->main, true, true, SHIFT);
        load_own(bench, HOT_UNVERIFIED, &bench->main, true, false, SHIFT);
    }
    if (runs(bench, "small")) {
        load_own(bench, SMALL_HOT, &bench->small, true, true, SHIFT);
        load_own(bench, SMALL_COLD, &bench->small, false, true, SHIFT);
    }
    for (int w = 0; w < WIDTHS && runs(bench, "cut"); w++) {
        load_cut(bench, w);
    }
}

/* ---- the report ---- */

static double
least(const double *values, int count)
{
    double least_value = values[0];
    for (int i = 1; i < count; i++) {
        least_value = values[i] < least_value ? values[i] : least_value;
    }
    return least_value;
}

static void
report(const struct bench *bench, int rounds)
{
    double limit[2] = {0, 0};
    printf("%s, 2 readers of %.2f GB, %d rounds\n", bench->in_memory ? "in memory" : "disk",
           (double)bench->bytes / 1e9, rounds);
    printf("%-24s %7s %7s %9s %9s %9s %7s %7s %7s\n", "", "GB/s", "best", "of limit", "of best",
           "CPU s/GB", "asked", "device", "MiB");
    for (int row = 0; row < ROWS; row++) {
        double seconds[MAX_ROUNDS], cpu[MAX_ROUNDS], rate[2];
        uint64_t wanted = 0, read = 0, device = 0, extra = 0;
        for (int i = 0; i < rounds; i++) {
            const struct result *a = &bench->shared->results[0][row][i];
            const struct result *b = &bench->shared->results[1][row][i];
            seconds[i] = a->seconds > b->seconds ? a->seconds : b->seconds;
            cpu[i] = a->cpu_seconds + b->cpu_seconds;
            wanted += a->wanted_bytes + b->wanted_bytes;
            read += a->read_bytes + b->read_bytes;
            device += a->device_bytes + b->device_bytes;
            extra = dcp_max_u64(extra, dcp_max_u64(a->extra_bytes, b->extra_bytes));
        }
        if (wanted == 0) {
            continue;
        }
        double gb = (double)wanted / rounds / 1e9;
        rate[0] = gb / median(seconds, rounds);
        rate[1] = gb / least(seconds, rounds);
        if (row == COLD_LIMIT || row == HOT_LIMIT) {
            memcpy(limit, rate, sizeof limit);
        }
        char name[64];
        if (row < CUT) {
            snprintf(name, sizeof name, "%s", row_names[row]);
        } else {
            snprintf(name, sizeof name, "cut: halves of %" PRIu64 " KiB",
                     half_bytes[row - CUT] >> 10);
        }
        printf("%-24s %7.2f %7.2f %8.0f%% %8.0f%% %9.3f %7.2f %7.2f %7.1f", name, rate[0], rate[1],
               row < SMALL_HOT ? 100 * rate[0] / limit[0] : 0.0,
               row < SMALL_HOT ? 100 * rate[1] / limit[1] : 0.0, median(cpu, rounds) / gb,
               (double)read / (double)wanted, (double)device / (double)wanted,
               (double)extra / (1 << 20));
        if (row == SMALL_HOT || row == SMALL_COLD) {
            printf("  %.2f us a record",
                   least(seconds, rounds) * 1e6 / (double)dcp_max_u64(bench->small_count, 1));
        }
        printf("\n");
    }
}

static int
run_rank(struct bench *bench, const char *dir, int rounds)
{
    uint64_t room = dcp_max_u64(bench->bytes, WIDTHS * bench->cut_bytes);
    room = dcp_max_u64(room, bench->small_count * 4096) + (64u << 20);
    bench->source = map_touched(room);
    bench->target = map_touched(room);
    for (uint64_t i = 0; i < room / 8; i++) {
        uint64_t word = word_at(bench->rank, i);
        memcpy(bench->source + i * 8, &word, 8);
    }
    world_make(bench, &bench->main, dir, "main", plan_main);
    world_make(bench, &bench->cut, dir, "cut", plan_cut);
    world_make(bench, &bench->small, dir, "small", plan_small);
    struct dcp_dio_align align = {0};
    must(dcp_io_posix()->dio_align(NULL, bench->main.dirfd, &align) == 0, "probe", NULL);
    bench->in_memory = align.in_memory;
    for (bench->round = 0; bench->round < rounds; bench->round++) {
        run_round(bench);
    }
    meet(bench);
    if (bench->rank == 0) {
        report(bench, rounds);
    }
    world_remove(&bench->main, bench->rank == 0);
    world_remove(&bench->cut, bench->rank == 0);
    world_remove(&bench->small, bench->rank == 0);
    munmap(bench->source, room);
    munmap(bench->target, room);
    dcp_engine_trim();
    return dcp_alloc_live_bytes() == 0 ? 0 : 1;
}

int
main(int argc, char **argv)
{
    static struct bench bench;
    if (argc < 2) {
        fprintf(stderr, "usage: reader_limits DIRECTORY [MiB] [ROUNDS] [SMALL RECORDS] [STEPS]\n");
        return 2;
    }
    int rounds = argc > 3 ? (int)strtol(argv[3], NULL, 10) : 3;
    rounds = rounds < 1 ? 1 : rounds > MAX_ROUNDS ? MAX_ROUNDS : rounds;
    bench.bytes = (argc > 2 ? strtoull(argv[2], NULL, 10) : 64) << 20;
    bench.small_count = argc > 4 ? strtoull(argv[4], NULL, 10) : 2000;
    bench.only = argc > 5 ? argv[5] : NULL;
    must(bench.bytes >= REQUEST_BYTES, "at least 8 MiB", NULL);
    bench.cut_bytes = dcp_align_up(dcp_min_u64(bench.bytes / 8, 64u << 20), 1u << 20);
    bench.shared = map_shared(sizeof *bench.shared);
    init_shared_barrier(&bench.shared->barrier, RANKS);
    pid_t other = fork();
    must(other >= 0, "fork", NULL);
    bench.rank = other == 0 ? 1 : 0;
    if (other == 0) {
        _exit(run_rank(&bench, argv[1], rounds));
    }
    int status, rc = run_rank(&bench, argv[1], rounds);
    must(waitpid(other, &status, 0) == other, "waitpid", NULL);
    return rc != 0 || status != 0 ? 1 : 0;
}

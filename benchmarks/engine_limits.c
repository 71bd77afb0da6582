/*
 * engine_limits.c: the engine's writer and reader beside what the machine can do, in one run.
 *
 * Usage: engine_limits DIRECTORY [MiB] [ROUNDS]
 *
 * Every round runs, one after another: memcpy, the content hash of all bytes and of a cached MiB
 * as often, a plain write of the finished image (O_DIRECT on a disk, write() in memory), our
 * writer, the same with content hashes, a plain read of it, our reader into aligned and into
 * unaligned targets, with and without checksums.  Medians are printed with CPU seconds per GB (user
 * and system, of the whole process).  What was read is compared with what was written.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "dcp_engine.h"
#include "measure.h"

enum { MAX_ROUNDS = 31, REQUEST_BYTES = 8 << 20, CACHED_BYTES = 1 << 20, MOST_TENSORS = 4096 };

enum row {
    ROW_MEMCPY,
    ROW_HASH,
    ROW_HASH_CACHED,
    ROW_PLAIN_WRITE,
    ROW_WRITER,
    ROW_WRITER_HASHING,
    ROW_PLAIN_READ,
    ROW_READER_ALIGNED,
    ROW_READER_UNALIGNED,
    ROW_READER_UNVERIFIED,
    ROW_READER_HOT,
    ROWS,
};

static const char *const row_names[ROWS] = {
    "memcpy",
    "content hash",
    "content hash, cached MiB",
    "plain write of a ready image",
    "our writer",
    "our writer, content hashes",
    "plain read, 8 MiB requests",
    "our reader, aligned target",
    "our reader, target off by 64",
    "our reader, aligned, no verify",
    "our reader, page cache hot",
};

struct bench {
    const struct dcp_io *io;
    const char *path;
    int dirfd;
    bool in_memory;
    uint64_t bytes;
    uint8_t *source, *target; /* bytes + one page */
    struct dcp_plan plan;
    struct dcp_global_plan global;
    struct dcp_source *sources;
    struct dcp_metadata md;
    struct dcp_save_id save_id;
    struct dcp_error err;
    double seconds[ROWS][MAX_ROUNDS], cpu[ROWS][MAX_ROUNDS];
    int round;
    double started, cpu_started;
    struct dcp_hash128 hash; /* of the source, the same in every round */
};

static void
start(struct bench *bench)
{
    bench->started = seconds_of(CLOCK_MONOTONIC);
    bench->cpu_started = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
}

static void
stop(struct bench *bench, enum row row)
{
    bench->seconds[row][bench->round] = seconds_of(CLOCK_MONOTONIC) - bench->started;
    bench->cpu[row][bench->round] = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - bench->cpu_started;
}

/* Weights of a transformer: matrices of 32 to 128 MiB and some small vectors. */
static void
make_plan(struct bench *bench)
{
    static const uint64_t columns[] = {4096, 11008, 4096, 1024};
    uint64_t at = 0;
    bench->plan.thread_count = 1;
    bench->plan.single_file_per_rank = true;
    bench->sources = calloc(MOST_TENSORS, sizeof *bench->sources);
    for (uint32_t i = 0; at < bench->bytes && i < MOST_TENSORS; i++) {
        char fqn[64];
        uint64_t offsets[2] = {0, 0}, size[2] = {i % 5 == 4 ? 1 : 4096, columns[i % 4]};
        int dtype = i % 3 == 0 ? DCP_DTYPE_FLOAT32 : DCP_DTYPE_BFLOAT16;
        uint64_t row = size[1] * dcp_dtype_bytes(dtype);
        size[0] = dcp_min_u64(size[0], (bench->bytes - at + row - 1) / row);
        uint32_t name;
        int len = snprintf(fqn, sizeof fqn, "model.layers.%u.weight", i);
        must(dcp_plan_add_name(&bench->plan, fqn, (size_t)len, NULL, 0, 0, &name, &bench->err) == 0,
             "plan", &bench->err);
        struct dcp_item item = {
            .name = name, .kind = DCP_ITEM_TENSOR, .dtype = (uint8_t)dtype, .ndim = 2};
        must(dcp_plan_add_item(&bench->plan, &item, size, offsets, size, &bench->err) == 0, "plan",
             &bench->err);
        bench->sources[i].data = bench->source + at;
        at += dcp_align_up(size[0] * row, 4096);
    }
}

static void
make_metadata(struct bench *bench)
{
    struct dcp_buf image = {0};
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    must(dcp_global_plan_build(&bench->plan, 1, false, &bench->global, &bench->err) == 0,
         "global plan", &bench->err);
    must(dcp_metadata_write(&bench->global, &meta, &bench->save_id, 0, NULL, &image, &bench->err) ==
             0,
         "metadata", &bench->err);
    must(dcp_metadata_read(image.data, image.len, &bench->md, &bench->err) == 0, "metadata",
         &bench->err);
    dcp_buf_clean_up(&image);
}

/* Empties the page cache of a file, so that a read goes to the device. */
static void
forget(const struct bench *bench, const char *name)
{
    int fd = openat(bench->dirfd, name, O_RDONLY);
    must(fd >= 0, name, NULL);
    if (!bench->in_memory) {
        fdatasync(fd);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    }
    close(fd);
}

static void
plain_write(struct bench *bench)
{
    uint64_t len = bench->bytes / REQUEST_BYTES * REQUEST_BYTES;
    start(bench);
    int fd = openat(bench->dirfd, "plain", O_WRONLY | O_CREAT | O_EXCL, 0666);
    must(fd >= 0, "open", NULL);
    if (!bench->in_memory) {
        must(fcntl(fd, F_SETFL, O_DIRECT) == 0, "O_DIRECT", NULL);
    }
    for (uint64_t at = 0; at < len; at += REQUEST_BYTES) {
        must(pwrite(fd, bench->source + at, REQUEST_BYTES, (off_t)at) == REQUEST_BYTES, "pwrite",
             NULL);
    }
    must(fdatasync(fd) == 0 && close(fd) == 0, "sync", NULL);
    stop(bench, ROW_PLAIN_WRITE);
}

static void
plain_read(struct bench *bench)
{
    uint64_t len = bench->bytes / REQUEST_BYTES * REQUEST_BYTES;
    forget(bench, "plain");
    start(bench);
    int fd = openat(bench->dirfd, "plain", O_RDONLY);
    must(fd >= 0, "open", NULL);
    if (!bench->in_memory) {
        must(fcntl(fd, F_SETFL, O_DIRECT) == 0, "O_DIRECT", NULL);
    }
    for (uint64_t at = 0; at < len; at += REQUEST_BYTES) {
        must(pread(fd, bench->target + at, REQUEST_BYTES, (off_t)at) == REQUEST_BYTES, "pread",
             NULL);
    }
    close(fd);
    stop(bench, ROW_PLAIN_READ);
    unlinkat(bench->dirfd, "plain", 0);
}

static void
hash_all(struct bench *bench)
{
    start(bench);
    struct dcp_hash128 hash = dcp_content_hash_of(bench->source, bench->bytes);
    stop(bench, ROW_HASH);
    must(bench->round == 0 || dcp_hash128_equal(hash, bench->hash), "the hash differs", NULL);
    bench->hash = hash;
    struct dcp_hash128 cached = dcp_content_hash_of(bench->source, CACHED_BYTES);
    start(bench);
    for (uint64_t at = 0; at < bench->bytes; at += CACHED_BYTES) {
        hash = dcp_content_hash_of(bench->source, CACHED_BYTES);
        must(dcp_hash128_equal(hash, cached), "the hash differs", NULL);
    }
    stop(bench, ROW_HASH_CACHED);
}

/* With content hashes into a layout of its own, whose file is removed again. */
static void
our_write(struct bench *bench, enum row row, struct dcp_write_stats *ret_stats)
{
    struct dcp_engine_options options = {.sync = true};
    struct dcp_layout layout;
    bench->plan.content_hash = row == ROW_WRITER_HASHING;
    must(dcp_layout_build(&bench->plan, NULL, &layout, &bench->err) == 0, "layout", &bench->err);
    start(bench);
    must(dcp_writer_run(bench->io, bench->dirfd, bench->path, &bench->plan, &layout, bench->sources,
                        &bench->save_id, 0, &options, NULL, ret_stats, &bench->err) == 0,
         "writer", &bench->err);
    stop(bench, row);
    dcp_layout_clean_up(&layout);
    bench->plan.content_hash = false;
    if (row == ROW_WRITER_HASHING) {
        unlinkat(bench->dirfd, "__0_0.distcp", 0);
    }
}

static void
our_read(struct bench *bench, enum row row, uint64_t shift, bool verify, bool hot,
         struct dcp_read_stats *ret_stats)
{
    struct dcp_engine_options options = {.verify = verify,
                                         .direct = hot ? DCP_DIRECT_OFF : DCP_DIRECT_AUTO};
    struct dcp_read_plan plan = {.md = &bench->md};
    uint64_t at = 0;
    for (uint64_t e = 0; e < bench->md.entries_count; e++) {
        const struct dcp_md_entry *entry = &bench->md.entries[e];
        const uint64_t *size = bench->md.dims + entry->size;
        uint64_t zeros[2] = {0, 0};
        must(dcp_read_plan_add(&plan, e, bench->target + at + shift, NULL, zeros, size, NULL,
                               &bench->err) == 0,
             "read plan", &bench->err);
        at += dcp_align_up(size[0] * size[1] * dcp_dtype_bytes(entry->dtype), 4096);
    }
    must(dcp_read_plan_build(&plan, true, NULL, &bench->err) == 0, "read plan", &bench->err);
    if (hot) {
        int fd = openat(bench->dirfd, "__0_0.distcp", O_RDONLY);
        while (read(fd, bench->target, REQUEST_BYTES) > 0) {
        }
        close(fd);
    } else {
        forget(bench, "__0_0.distcp");
    }
    start(bench);
    must(dcp_reader_run(bench->io, bench->dirfd, bench->path, &plan, &options, NULL, NULL,
                        ret_stats, &bench->err) == 0,
         "reader", &bench->err);
    stop(bench, row);
    for (uint64_t t = 0; t < plan.targets_count; t++) {
        const struct dcp_md_entry *entry = &bench->md.entries[plan.targets[t].entry];
        const uint64_t *size = bench->md.dims + entry->size;
        must(memcmp(plan.targets[t].data, bench->sources[t].data,
                    size[0] * size[1] * dcp_dtype_bytes(entry->dtype)) == 0,
             "what was read differs", NULL);
    }
    dcp_read_plan_clean_up(&plan);
}

static void
report(const struct bench *bench, int rounds)
{
    double gb = (double)bench->bytes / 1e9;
    double limit_copy = median(bench->seconds[ROW_MEMCPY], rounds);
    double limit_write = median(bench->seconds[ROW_PLAIN_WRITE], rounds);
    double limit_read = median(bench->seconds[ROW_PLAIN_READ], rounds);
    printf("%s, %.2f GB, medians of %d\n", bench->in_memory ? "in memory" : "disk", gb, rounds);
    printf("%-32s %8s %9s %10s\n", "", "GB/s", "of limit", "CPU s/GB");
    for (int row = 0; row < ROWS; row++) {
        double seconds = median(bench->seconds[row], rounds);
        double limit = row >= ROW_PLAIN_READ    ? limit_read
                       : row >= ROW_PLAIN_WRITE ? limit_write
                                                : limit_copy;
        printf("%-32s %8.2f %8.0f%% %10.3f\n", row_names[row], gb / seconds, 100 * limit / seconds,
               median(bench->cpu[row], rounds) / gb);
    }
}

static void
run_round(struct bench *bench)
{
    struct dcp_write_stats written;
    struct dcp_read_stats got;
    start(bench);
    memcpy(bench->target, bench->source, bench->bytes);
    stop(bench, ROW_MEMCPY);
    hash_all(bench);
    plain_write(bench);
    plain_read(bench);
    our_write(bench, ROW_WRITER_HASHING, NULL);
    our_write(bench, ROW_WRITER, &written);
    our_read(bench, ROW_READER_ALIGNED, 0, true, false, &got);
    if (bench->round == 0) {
        printf("writer: direct files %" PRIu64 ", copy %.3f s, write %.3f s, wait %.3f s, sync "
               "%.3f s\nreader: %" PRIu64 " requests, %.0f%% straight\n",
               written.direct_files_count, (double)written.copy_ns / 1e9,
               (double)written.write_ns / 1e9, (double)written.wait_ns / 1e9,
               (double)written.sync_ns / 1e9, got.requests_count,
               100.0 * (double)got.straight_bytes / (double)got.wanted_bytes);
    }
    our_read(bench, ROW_READER_UNALIGNED, 64, true, false, &got);
    our_read(bench, ROW_READER_UNVERIFIED, 0, false, false, &got);
    our_read(bench, ROW_READER_HOT, 64, true, true, &got);
    unlinkat(bench->dirfd, "__0_0.distcp", 0);
}

int
main(int argc, char **argv)
{
    static struct bench bench;
    if (argc < 2) {
        fprintf(stderr, "usage: engine_limits DIRECTORY [MiB] [ROUNDS]\n");
        return 2;
    }
    int rounds = argc > 3 ? atoi(argv[3]) : 3;
    rounds = rounds < 1 ? 1 : rounds > MAX_ROUNDS ? MAX_ROUNDS : rounds;
    bench.io = dcp_io_posix();
    bench.path = argv[1];
    bench.bytes = (argc > 2 ? strtoull(argv[2], NULL, 10) : 64) << 20;
    must(bench.bytes >= REQUEST_BYTES, "at least 8 MiB", NULL);
    must(bench.io->mkdirs(bench.io->ctx, bench.path) == 0, "mkdir", NULL);
    bench.dirfd = bench.io->open_dir(bench.io->ctx, bench.path);
    must(bench.dirfd >= 0, "open directory", NULL);
    struct dcp_dio_align align = {0};
    int fd = openat(bench.dirfd, "probe", O_WRONLY | O_CREAT, 0666);
    must(fd >= 0 && bench.io->dio_align(bench.io->ctx, fd, &align) == 0, "probe", NULL);
    close(fd);
    unlinkat(bench.dirfd, "probe", 0);
    bench.in_memory = align.in_memory || align.mem_bytes == 0;
    memset(bench.save_id.bytes, 7, sizeof bench.save_id.bytes);
    uint64_t room = bench.bytes + (64u << 20);
    bench.source = map_touched(room);
    bench.target = map_touched(room);
    for (uint64_t i = 0; i < room / 8; i++) {
        uint64_t word = i * 0x9E3779B97F4A7C15u;
        memcpy(bench.source + i * 8, &word, 8);
    }
    make_plan(&bench);
    make_metadata(&bench);
    for (bench.round = 0; bench.round < rounds; bench.round++) {
        run_round(&bench);
    }
    report(&bench, rounds);
    dcp_metadata_clean_up(&bench.md);
    dcp_global_plan_clean_up(&bench.global);
    dcp_plan_clean_up(&bench.plan);
    free(bench.sources);
    dcp_engine_trim();
    munmap(bench.source, room);
    munmap(bench.target, room);
    close(bench.dirfd);
    return dcp_alloc_live_bytes() == 0 ? 0 : 1;
}

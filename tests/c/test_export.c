/*
 * test_export.c: what lands in the files of an export, whatever the boxes, the disk and the moment
 * at which the power goes.
 */
#include "ctest.h"

#include <errno.h>

#include "box.h"
#include "dcp_export.h"
#include "io_memory.h"

static const char DIR[] = "/d";

struct bench {
    struct io_memory *fs;
    struct dcp_io *io;
    struct dcp_engine_options options;
    int fail_call;            /* enum io_call */
    uint64_t fail_publish_at; /* the n-th of them while publishing fails; 0: none */
    bool fail_after_effect;   /* ... it took effect all the same */
    bool sweep_publish;       /* another export sweeps the directory while this one publishes */
    atomic_int cancel;
    struct dcp_error err;
};

static void
bench_make(struct bench *bench, uint64_t seed, bool direct)
{
    memset(bench, 0, sizeof *bench);
    bench->fs = io_memory_new(seed);
    bench->io = &io_memory_process(bench->fs, 0)->io;
    if (direct) {
        io_memory_set_dio(bench->fs, (struct dcp_dio_align){512, 512, false});
    }
    bench->options = (struct dcp_engine_options){
        .sync = true, .ring_buffers = 2, .ring_buffer_bytes = 128u << 10};
}

static void
bench_clean_up(struct bench *bench)
{
    CHECK_EQ(io_memory_open_files(bench->fs), 0);
    io_memory_free(bench->fs);
    dcp_engine_trim();
}

static uint8_t
byte_at(uint64_t i)
{
    return (uint8_t)(i * 2654435761u >> 13);
}

/* Element `i` of a tensor of two bytes each, in memory whose dims are in reverse order. */
static void
fill_reversed(uint8_t *memory, const uint64_t *sizes, const uint64_t *offsets,
              const uint64_t *lengths, int64_t *ret_strides)
{
    ret_strides[0] = 2;
    ret_strides[1] = 2 * (int64_t)lengths[0];
    ret_strides[2] = ret_strides[1] * (int64_t)lengths[1];
    for (uint64_t a = 0; a < lengths[0]; a++) {
        for (uint64_t b = 0; b < lengths[1]; b++) {
            for (uint64_t c = 0; c < lengths[2]; c++) {
                uint64_t i =
                    ((offsets[0] + a) * sizes[1] + offsets[1] + b) * sizes[2] + offsets[2] + c;
                uint8_t *at = memory + (int64_t)a * ret_strides[0] + (int64_t)b * ret_strides[1] +
                              (int64_t)c * ret_strides[2];
                at[0] = byte_at(2 * i);
                at[1] = byte_at(2 * i + 1);
            }
        }
    }
}

/* Two ranks hold the halves of a tensor along `dim`; the file has a head of odd length. */
static void
write_halves(struct bench *bench, const uint64_t *sizes, uint32_t dim, bool faults)
{
    static const uint8_t head[77] = "head";
    uint64_t volume = sizes[0] * sizes[1] * sizes[2];
    struct dcp_export_file file = {"f", sizeof head + 2 * volume, {head, sizeof head}};
    int64_t file_strides[3];
    uint8_t *memory = malloc(2 * volume + 1);
    dcp_box_row_major(3, sizes, 2, file_strides);
    CHECK_OK(dcp_export_create(bench->io, DIR, &file, 1, &bench->err), &bench->err);
    struct io_memory_faults *now = io_memory_faults(bench->fs);
    now->short_percent = now->eintr_percent = faults ? 30 : 0;
    for (unsigned rank = 0; rank < 2; rank++) {
        uint64_t offsets[3] = {0}, lengths[3] = {sizes[0], sizes[1], sizes[2]};
        int64_t strides[3];
        uint64_t half = (sizes[dim] + 1) / 2;
        offsets[dim] = rank * half;
        lengths[dim] = rank == 0 ? half : sizes[dim] - half;
        fill_reversed(memory, sizes, offsets, lengths, strides);
        struct dcp_export_piece piece = {.data = memory,
                                         .lengths = lengths,
                                         .strides_bytes = strides,
                                         .file_strides_bytes = file_strides,
                                         .offset_bytes = sizeof head,
                                         .ndim = 3,
                                         .item_bytes = 2};
        piece.offset_bytes += offsets[dim] * (uint64_t)file_strides[dim];
        CHECK_OK(dcp_export_write(&io_memory_process(bench->fs, rank)->io, DIR, &file, 1, &piece, 1,
                                  &bench->options, NULL, &bench->err),
                 &bench->err);
    }
    size_t len;
    const uint8_t *bytes = io_memory_file(bench->fs, DIR, "f", &len);
    CHECK_EQ(len, file.length_bytes);
    CHECK(memcmp(bytes, head, sizeof head) == 0);
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < 2 * volume; i++) {
        wrong += bytes[sizeof head + i] != byte_at(i);
    }
    CHECK_EQ(wrong, 0);
    const char *names[] = {"f"};
    dcp_export_discard(bench->io, DIR, names, 1);
    free(memory);
}

static void
case_shards_of_any_dim_land_where_they_belong(void)
{
    static const uint64_t shapes[][3] = {{3, 5, 7},    {2, 300, 500}, {301, 1, 601},
                                         {1, 999, 77}, {70, 64, 64},  {5, 1, 1}};
    for (unsigned direct = 0; direct < 2; direct++) {
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            for (uint32_t dim = 0; dim < 3; dim++) {
                struct bench bench;
                bench_make(&bench, 7 + s, direct != 0);
                write_halves(&bench, shapes[s], dim, s % 2 == 1);
                bench_clean_up(&bench);
            }
        }
    }
}

static void
case_a_piece_outside_of_its_file_is_refused(void)
{
    struct bench bench;
    bench_make(&bench, 1, false);
    struct dcp_export_file file = {"f", 100, {NULL, 0}};
    uint8_t memory[64] = {0};
    const uint64_t lengths[2] = {4, 4};
    const int64_t strides[2] = {4, 1}, far[2] = {1 << 20, 1}, close[2] = {2, 1}, back[2] = {-4, 1},
                  wild[2] = {INT64_MAX, 1};
    struct dcp_export_piece piece = {memory, lengths, strides, strides, 84, 0, 2, 1};
    CHECK_OK(dcp_export_create(bench.io, DIR, &file, 1, &bench.err), &bench.err);
    CHECK_OK(dcp_export_write(bench.io, DIR, &file, 1, &piece, 1, &bench.options, NULL, &bench.err),
             &bench.err);
    const int64_t *bad[] = {far, close, back, wild};
    for (int i = 0; i < 6; i++) {
        struct dcp_export_piece wrong = piece;
        if (i < 4) {
            wrong.file_strides_bytes = bad[i];
        }
        wrong.offset_bytes = i == 4 ? 85 : wrong.offset_bytes;
        wrong.file = i == 5 ? 1 : 0;
        dcp_error_clear(&bench.err);
        CHECK_EQ(
            dcp_export_write(bench.io, DIR, &file, 1, &wrong, 1, &bench.options, NULL, &bench.err),
            DCP_E_INVALID);
    }
    bench_clean_up(&bench);
}

/* ---- joining ---- */

/* Shards of a 2-d tensor of bytes in a grid, one source file each, joined into one file. */
static int
join_grid(struct bench *bench, uint64_t rows, uint64_t cols, uint64_t step_rows, uint64_t step_cols,
          uint64_t cut_bytes, int missing)
{
    enum { MOST = 16 };
    struct dcp_export_chunk chunks[MOST];
    uint64_t boxes[MOST][4];
    const char *names[MOST];
    char texts[MOST][8];
    uint32_t count = 0;
    CHECK_EQ(bench->io->mkdirs(bench->io->ctx, "/s"), 0);
    for (uint64_t r = 0; r < rows; r += step_rows) {
        for (uint64_t c = 0; c < cols; c += step_cols, count++) {
            uint64_t h = dcp_min_u64(step_rows, rows - r), w = dcp_min_u64(step_cols, cols - c);
            uint8_t *bytes = malloc(h * w + 3);
            for (uint64_t i = 0; i < h * w; i++) {
                bytes[3 + i] = byte_at((r + i / w) * cols + c + i % w);
            }
            snprintf(texts[count], sizeof texts[count], "s%u", count);
            names[count] = texts[count];
            io_memory_put_file(bench->fs, "/s", names[count], bytes,
                               3 + h * w - (count == 0 ? cut_bytes : 0));
            memcpy(boxes[count], (uint64_t[4]){r, c, h, w}, sizeof boxes[count]);
            chunks[count] = (struct dcp_export_chunk){boxes[count], 3, count};
            free(bytes);
        }
    }
    const uint64_t sizes[2] = {rows, cols};
    struct dcp_export_file file = {"f", 10 + rows * cols, {NULL, 0}};
    struct dcp_export_tensor tensor = {.name = "t",
                                       .sizes = sizes,
                                       .chunks = chunks + (missing != 0),
                                       .chunks_count = count - (missing != 0),
                                       .offset_bytes = 10,
                                       .ndim = 2,
                                       .item_bytes = 1};
    struct dcp_export_sources sources = {"/s", names, count};
    CHECK_OK(dcp_export_create(bench->io, DIR, &file, 1, &bench->err), &bench->err);
    io_memory_faults(bench->fs)->short_percent = 30;
    int rc = dcp_export_join(bench->io, &sources, DIR, &file, 1, &tensor, 1, &bench->options, NULL,
                             &bench->err);
    size_t len;
    const uint8_t *bytes = io_memory_file(bench->fs, DIR, "f", &len);
    uint64_t wrong = 0;
    for (uint64_t i = 0; rc == 0 && i < rows * cols; i++) {
        wrong += bytes[10 + i] != byte_at(i);
    }
    CHECK_EQ(wrong, 0);
    return rc;
}

static void
case_shards_of_any_grid_are_joined(void)
{
    static const uint64_t grids[][4] = {
        {8, 9, 8, 9},        {100, 333, 30, 333},      {100, 333, 100, 100},
        {101, 517, 40, 200}, {3000, 5000, 3000, 2500}, {2, 9u << 20, 2, 5u << 20}};
    for (size_t g = 0; g < sizeof grids / sizeof *grids; g++) {
        struct bench bench;
        bench_make(&bench, g, g % 2 == 0);
        CHECK_OK(join_grid(&bench, grids[g][0], grids[g][1], grids[g][2], grids[g][3], 0, 0),
                 &bench.err);
        bench_clean_up(&bench);
    }
}

static void
case_a_shard_that_is_cut_short_or_missing_is_refused(void)
{
    struct bench bench;
    bench_make(&bench, 3, false);
    CHECK_EQ(join_grid(&bench, 20, 30, 10, 30, 1, 0), DCP_E_CORRUPT);
    CHECK(strstr(bench.err.message, "s0") != NULL && strstr(bench.err.message, "cut") != NULL);
    bench_clean_up(&bench);
    bench_make(&bench, 3, false);
    CHECK_EQ(join_grid(&bench, 20, 30, 10, 15, 0, 1), DCP_E_HOLE);
    CHECK(strstr(bench.err.message, "450 of its 600") != NULL);
    bench_clean_up(&bench);
}

/* ---- crashes ---- */

static const char PATTERN[] = "model-#####-of-#####.safetensors";
static const char INDEX[] = "index";
enum { FILE_BYTES = 3000 };

static void
sweep_at_list(struct io_memory_process *process, enum io_call call, const char *name)
{
    (void)name;
    if (call == IO_LIST) {
        process->before = NULL;
        CHECK_EQ(dcp_export_sweep(&io_memory_process(process->fs, 1)->io, DIR, NULL), 0);
    }
}

static int
publish(struct bench *bench, const struct dcp_export_publication *publication)
{
    struct io_memory_faults *faults = io_memory_faults(bench->fs);
    faults->fail_call = bench->fail_call;
    faults->fail_errno = EIO;
    faults->fail_nth = bench->fail_publish_at;
    faults->fail_after_effect = bench->fail_after_effect;
    io_memory_process(bench->fs, 0)->before = bench->sweep_publish ? sweep_at_list : NULL;
    return dcp_export_publish(bench->io, DIR, publication, &bench->err);
}

/* Exports `files_count` files full of `generation`; stops where the power goes. */
static int
export_generation(struct bench *bench, uint8_t generation, uint32_t files_count)
{
    char parts[3][64], finals[3][64], index[32];
    struct dcp_export_file files[3];
    struct dcp_export_name names[3];
    uint8_t memory[FILE_BYTES];
    const uint64_t lengths[1] = {FILE_BYTES - 1};
    const int64_t strides[1] = {1};
    memset(memory, generation, sizeof memory);
    struct dcp_export_piece pieces[3];
    for (uint32_t i = 0; i < files_count; i++) {
        snprintf(finals[i], sizeof finals[i], "model-%05u-of-%05u.safetensors", i + 1, files_count);
        snprintf(parts[i], sizeof parts[i], DCP_EXPORT_PREFIX "%u-%s", generation, finals[i]);
        files[i] = (struct dcp_export_file){parts[i], FILE_BYTES, {memory, 1}};
        names[i] = (struct dcp_export_name){parts[i], finals[i]};
        pieces[i] = (struct dcp_export_piece){memory, lengths, strides, strides, 1, i, 1, 1};
    }
    snprintf(index, sizeof index, "%u", files_count);
    struct dcp_export_publication publication = {
        .names = names,
        .names_count = files_count,
        .replaced_pattern = PATTERN,
        .index_name = INDEX,
        .index_tmp_name = DCP_EXPORT_PREFIX "index",
        .index = {(const uint8_t *)index, strlen(index)},
        .sync = true,
        .cancel = &bench->cancel,
    };
    dcp_error_clear(&bench->err);
    int rc = dcp_export_create(bench->io, DIR, NULL, 0, &bench->err);
    rc = rc == 0 ? dcp_export_sweep(bench->io, DIR, &bench->err) : rc;
    rc = rc == 0 ? dcp_export_create(bench->io, DIR, files, files_count, &bench->err) : rc;
    rc = rc == 0 ? dcp_export_write(bench->io, DIR, files, files_count, pieces, files_count,
                                    &bench->options, NULL, &bench->err)
                 : rc;
    return rc == 0 ? publish(bench, &publication) : rc;
}

/* 0: there is no index; else the generation that it stands for.  CHECKs that all files under final
 * names are whole and of one generation, and those of the index all there. */
static unsigned
generation_found(const struct bench *bench)
{
    unsigned generation = 0, found = 0;
    for (size_t i = 0; i < io_memory_names_count(bench->fs, DIR); i++) {
        const char *name = io_memory_name(bench->fs, DIR, i);
        if (strncmp(name, "model-", 6) != 0) {
            continue;
        }
        size_t len;
        const uint8_t *bytes = io_memory_file(bench->fs, DIR, name, &len);
        CHECK_EQ(len, FILE_BYTES);
        for (size_t b = 1; b < len; b++) {
            if (bytes[b] != bytes[0]) {
                CHECK(!"a file is of one piece");
                break;
            }
        }
        CHECK(generation == 0 || generation == bytes[0]);
        generation = bytes[0];
        found++;
    }
    size_t len;
    const uint8_t *index = io_memory_file(bench->fs, DIR, INDEX, &len);
    if (index == NULL) {
        return 0;
    }
    CHECK_EQ(len, 1);
    CHECK_EQ(found, index[0] - '0');
    return generation;
}

/* An export of `after` files over one of `before`, stopped at every call of the system. */
static void
crash_everywhere(uint32_t before, uint32_t after, bool may_vanish, bool power_cut)
{
    unsigned seen_old = 0, seen_new = 0, seen_none = 0;
    for (uint64_t at = 1;; at++) {
        struct bench bench;
        bench_make(&bench, at, true);
        if (before > 0) {
            CHECK_OK(export_generation(&bench, 1, before), &bench.err);
        }
        io_memory_faults(bench.fs)->crash_at = at;
        bool done = export_generation(&bench, 2, after) == 0;
        io_memory_reboot(bench.fs, power_cut, at);
        unsigned found = io_memory_names_count(bench.fs, DIR) == 0 ? 0 : generation_found(&bench);
        seen_none += found == 0;
        seen_old += found == 1;
        seen_new += found == 2;
        CHECK(!done || found == 2);
        CHECK(found != 0 || before == 0 || may_vanish);
        /* The next export is not hindered by what the crash left, and leaves nothing of it. */
        CHECK_OK(export_generation(&bench, 3, after), &bench.err);
        CHECK_EQ(generation_found(&bench), 3);
        CHECK_EQ(io_memory_names_count(bench.fs, DIR), after + 1);
        bench_clean_up(&bench);
        if (done) {
            break;
        }
    }
    CHECK(seen_new > 0 && (before == 0 || seen_old > 0) && (seen_none > 0) == may_vanish);
}

static void
case_a_crash_leaves_the_old_export_the_new_one_or_no_index(void)
{
    for (unsigned power_cut = 0; power_cut < 2; power_cut++) {
        crash_everywhere(0, 2, true, power_cut != 0);
        crash_everywhere(2, 2, true, power_cut != 0);
        crash_everywhere(3, 2, true, power_cut != 0);
    }
}

static void
case_one_file_over_itself_is_loadable_at_every_instant(void)
{
    crash_everywhere(1, 1, false, false);
    crash_everywhere(1, 1, false, true);
}

static void
case_a_full_disk_is_met_before_the_data(void)
{
    struct bench bench;
    bench_make(&bench, 5, true);
    struct dcp_export_file files[2] = {{"a", 100, {NULL, 0}}, {"b", 64u << 20, {NULL, 0}}};
    io_memory_faults(bench.fs)->space_bytes = 1u << 20;
    CHECK_EQ(dcp_export_create(bench.io, DIR, files, 2, &bench.err), DCP_E_IO);
    CHECK_EQ(bench.err.sys_errno, ENOSPC);
    CHECK_EQ(io_memory_names_count(bench.fs, DIR), 0);
    bench_clean_up(&bench);
}

static void
case_an_export_whose_files_another_one_took_says_so(void)
{
    struct bench bench;
    bench_make(&bench, 5, true);
    struct dcp_export_file file = {DCP_EXPORT_PREFIX "1", 100, {NULL, 0}};
    struct dcp_export_name name = {file.name, "model-00001-of-00001.safetensors"};
    struct dcp_export_publication publication = {
        .names = &name, .names_count = 1, .replaced_pattern = PATTERN, .sync = true};
    CHECK_OK(dcp_export_create(bench.io, DIR, &file, 1, &bench.err), &bench.err);
    CHECK_OK(dcp_export_sweep(bench.io, DIR, &bench.err), &bench.err);
    CHECK_EQ(dcp_export_publish(bench.io, DIR, &publication, &bench.err), DCP_E_SUPERSEDED);
    bench_clean_up(&bench);
}

/* Whether the names are exactly those of an export of three files and an index. */
static bool
only_final_names(const struct bench *bench)
{
    size_t count = io_memory_names_count(bench->fs, DIR);
    for (size_t i = 0; i < count; i++) {
        if (strncmp(io_memory_name(bench->fs, DIR, i), DCP_EXPORT_PREFIX,
                    strlen(DCP_EXPORT_PREFIX)) == 0) {
            return false;
        }
    }
    return count == 4;
}

/* Files of the generation, whole, whatever their names. */
static unsigned
files_of(const struct bench *bench, uint8_t generation)
{
    uint8_t wanted[FILE_BYTES];
    unsigned count = 0;
    memset(wanted, generation, sizeof wanted);
    for (size_t i = 0; i < io_memory_names_count(bench->fs, DIR); i++) {
        size_t len;
        const uint8_t *bytes =
            io_memory_file(bench->fs, DIR, io_memory_name(bench->fs, DIR, i), &len);
        count += len == sizeof wanted && memcmp(bytes, wanted, len) == 0;
    }
    return count;
}

static void
fail_everywhere(int call, bool after_effect)
{
    unsigned kept_old = 0, kept_new = 0;
    for (uint64_t at = 1;; at++) {
        struct bench bench;
        bench_make(&bench, at, true);
        CHECK_OK(export_generation(&bench, 1, 3), &bench.err);
        bench.fail_call = call;
        bench.fail_publish_at = at;
        bench.fail_after_effect = after_effect;
        int rc = export_generation(&bench, 2, 2);
        bool happened = io_memory_faults(bench.fs)->fail_nth == 0;
        if (generation_found(&bench) == 1) { /* 1: a directory that is not opened is not tidied */
            CHECK(rc != 0 && (at == 1 || only_final_names(&bench) || files_of(&bench, 2) == 2));
            kept_old++;
        } else {
            CHECK_EQ(files_of(&bench, 2), 2);
            kept_new += rc != 0;
            CHECK(rc == 0 || strstr(bench.err.message, DCP_EXPORT_PREFIX) != NULL);
        }
        bench.fail_publish_at = io_memory_faults(bench.fs)->fail_nth = 0;
        CHECK_OK(export_generation(&bench, 3, 3), &bench.err);
        CHECK(only_final_names(&bench));
        bench_clean_up(&bench);
        if (!happened) {
            break;
        }
    }
    CHECK((kept_old > 5 || call != IO_CALLS) && kept_new > 2);
}

static void
case_publishing_that_fails_at_any_call_keeps_the_old_export_or_all_of_the_new(void)
{
    fail_everywhere(IO_CALLS, false);
    fail_everywhere(IO_UNLINK_AT, true);
    fail_everywhere(IO_RENAME_AT, true);
}

static void
case_an_export_that_is_swept_while_it_publishes_leaves_the_old_one(void)
{
    struct bench bench;
    bench_make(&bench, 5, true);
    CHECK_OK(export_generation(&bench, 1, 3), &bench.err);
    bench.sweep_publish = true;
    CHECK_EQ(export_generation(&bench, 2, 2), DCP_E_SUPERSEDED);
    CHECK_EQ(generation_found(&bench), 1);
    CHECK(only_final_names(&bench));
    bench_clean_up(&bench);
}

static void
case_publishing_that_is_cancelled_leaves_the_old_export(void)
{
    struct bench bench;
    bench_make(&bench, 5, true);
    CHECK_OK(export_generation(&bench, 1, 3), &bench.err);
    bench.cancel = 1;
    CHECK_EQ(export_generation(&bench, 2, 2), DCP_E_CANCELLED);
    CHECK_EQ(generation_found(&bench), 1);
    CHECK(only_final_names(&bench));
    bench_clean_up(&bench);
}

CTEST_MAIN(RUN(case_shards_of_any_dim_land_where_they_belong);
           RUN(case_a_piece_outside_of_its_file_is_refused);
           RUN(case_shards_of_any_grid_are_joined);
           RUN(case_a_shard_that_is_cut_short_or_missing_is_refused);
           RUN(case_a_crash_leaves_the_old_export_the_new_one_or_no_index);
           RUN(case_one_file_over_itself_is_loadable_at_every_instant);
           RUN(case_a_full_disk_is_met_before_the_data);
           RUN(case_an_export_whose_files_another_one_took_says_so);
           RUN(case_publishing_that_fails_at_any_call_keeps_the_old_export_or_all_of_the_new);
           RUN(case_an_export_that_is_swept_while_it_publishes_leaves_the_old_one);
           RUN(case_publishing_that_is_cancelled_leaves_the_old_export);)

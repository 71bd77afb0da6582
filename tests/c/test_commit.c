/*
 * test_commit.c: the commit protocol alone: names, numbers, what is swept and what never is, and
 * what a failing call makes of a save.  test_commit_model.c has the races, test_crash.c the power
 * cuts.
 */
#include "claim_scan.h"
#include "ctest.h"
#include "io_memory.h"
#include "dcp_record.h"
#include "metadata_maker.h"

#include <errno.h>
#include <fcntl.h>

static const char dir_path[] = "d";

struct bench {
    struct io_memory *fs;
    const struct dcp_io *io;
    int dirfd;
};

static void
bench_make(struct bench *bench)
{
    bench->fs = io_memory_new(1);
    bench->io = &io_memory_process(bench->fs, 0)->io;
    CHECK_EQ(bench->io->mkdirs(bench->io->ctx, dir_path), 0);
    bench->dirfd = bench->io->open_dir(bench->io->ctx, dir_path);
    CHECK(bench->dirfd >= 0);
}

static bool
is_there(const struct bench *bench, const char *name)
{
    size_t len;
    return io_memory_file(bench->fs, dir_path, name, &len) != NULL;
}

static void
put(const struct bench *bench, const char *name)
{
    io_memory_put_file(bench->fs, dir_path, name, "bytes", 5);
}

static int
take(const struct bench *bench, int32_t rank, int letter, struct dcp_claim *claim,
     struct dcp_error *err)
{
    struct dcp_save_id id;

    memset(&id, letter, sizeof id);
    dcp_error_clear(err);
    return dcp_claim_take(bench->io, bench->dirfd, dir_path, rank, &id, "host h, pid 7", true,
                          claim, err);
}

/* The sample's metadata with a footer of its own; its files have numbers from 300 on. */
static void
put_sample(const struct bench *bench, const char *name)
{
    struct metadata_sample sample;
    struct dcp_buf image = {0};

    metadata_sample_make(&sample, 1);
    metadata_sample_image(&sample, &image);
    io_memory_put_file(bench->fs, dir_path, name, image.data, image.len);
    dcp_buf_clean_up(&image);
    metadata_sample_clean_up(&sample);
}

/* An image of our own format for this claim: the sample, under the claim's id and number. */
static void
image_of(const struct dcp_claim *claim, struct dcp_buf *image)
{
    struct dcp_storage_meta meta = {0};
    struct metadata_sample sample;
    struct dcp_error err;

    dcp_error_clear(&err);
    metadata_sample_make(&sample, 2);
    CHECK_OK(
        dcp_metadata_write(&sample.global, &meta, &claim->save_id, claim->n0, NULL, image, &err),
        &err);
    metadata_sample_clean_up(&sample);
}

static void
only_names_exactly_as_we_write_them_are_ours(void)
{
    static const char *const foreign[] = {"__0_0.distcp ",
                                          "_0_0.distcp",
                                          "__00_0.distcp",
                                          "__0_00.distcp",
                                          "__-1_0.distcp",
                                          "__0_0",
                                          "__0_.distcp",
                                          "__0_4294967296.distcp",
                                          "__ 1_0.distcp",
                                          "__0_+1.distcp",
                                          "__4294967296_0.distcp",
                                          "__0_0.distcp2",
                                          "",
                                          "__0_0_0.distcp",
                                          "meta.pt"};
    static const char *const claims[] = {".dcp_native-claim-0-0123456789abcde",
                                         ".dcp_native-claim-0-0123456789abcdef0",
                                         ".dcp_native-claim-0-0123456789ABCDEF",
                                         ".dcp_native-claim-01-0123456789abcdef",
                                         ".dcp_native-claim-r-0-0123456789abcdef",
                                         ".dcp_native-claim-r1-0",
                                         ".dcp_native-claim-0"};
    struct dcp_claim_name parsed;
    struct dcp_save_id id;
    char name[DCP_CLAIM_NAME_BYTES];
    uint32_t rank = 9;
    uint64_t n = 9;

    for (size_t i = 0; i < sizeof foreign / sizeof foreign[0]; i++) {
        CHECK(!dcp_data_file_parse(foreign[i], &rank, &n));
    }
    CHECK(rank == 9 && n == 9);
    CHECK(dcp_data_file_parse("__12_4294967295.distcp", &rank, &n));
    CHECK(rank == 12 && n == UINT32_MAX);
    dcp_data_file_name(name, sizeof name, UINT32_MAX, 7);
    CHECK(strcmp(name, "__4294967295_7.distcp") == 0 && dcp_data_file_parse(name, &rank, &n));
    for (size_t i = 0; i < sizeof claims / sizeof claims[0]; i++) {
        CHECK(!dcp_claim_name_parse(claims[i], &parsed));
    }
    memset(&id, 0xFF, sizeof id);
    dcp_claim_name_put(name, INT32_MAX, UINT32_MAX, &id);
    CHECK(dcp_claim_name_parse(name, &parsed));
    CHECK(parsed.rank == INT32_MAX && parsed.n0 == UINT32_MAX && strcmp(parsed.text, name) == 0);
}

static void
numbers_begin_above_everything_on_disk_referenced_or_claimed(void)
{
    struct bench bench;
    struct dcp_claim claim;
    struct dcp_error err;

    bench_make(&bench);
    CHECK_OK(take(&bench, -1, 'a', &claim, &err), &err);
    CHECK_EQ(claim.n0, 0);
    CHECK_OK(take(&bench, -1, 'b', &claim, &err), &err);
    CHECK_EQ(claim.n0, 1); /* above the claim that it fenced */
    CHECK_EQ(io_memory_names_count(bench.fs, dir_path), 1);
    put(&bench, "__7_40.distcp");
    put(&bench, "__00_900.distcp");
    CHECK_OK(take(&bench, -1, 'c', &claim, &err), &err);
    CHECK_EQ(claim.n0, 41);
    put_sample(&bench, "__3.metadata"); /* none of its files is there */
    CHECK_OK(take(&bench, -1, 'd', &claim, &err), &err);
    CHECK(claim.n0 > 300 && claim.n0 < 310);
    put(&bench, "__0_4294967000.distcp");
    CHECK_EQ(take(&bench, -1, 'e', &claim, &err), DCP_E_LIMIT);
    io_memory_free(bench.fs);
}

static void
a_rank_of_its_own_numbers_and_fences_only_its_own(void)
{
    struct bench bench;
    struct dcp_claim first, second, global;
    struct dcp_error err;

    bench_make(&bench);
    put(&bench, "__0_5.distcp");
    put(&bench, "__1_9.distcp");
    CHECK_OK(take(&bench, 0, 'a', &first, &err), &err);
    CHECK_EQ(first.n0, 6);
    CHECK(strcmp(first.target, "__0.metadata") == 0);
    CHECK_OK(take(&bench, 1, 'b', &second, &err), &err);
    CHECK_EQ(second.n0, 10);
    CHECK(is_there(&bench, first.name));
    CHECK_OK(take(&bench, -1, 'c', &global, &err), &err);
    CHECK_EQ(global.n0, 11);
    CHECK(is_there(&bench, first.name) && is_there(&bench, second.name));
    CHECK_OK(take(&bench, 1, 'd', &second, &err), &err);
    CHECK_EQ(second.n0, 12); /* a global claim covers every rank's numbers */
    CHECK(is_there(&bench, global.name) && is_there(&bench, first.name));
    CHECK_EQ(io_memory_names_count(bench.fs, dir_path), 5);
    io_memory_free(bench.fs);
}

static void
the_committer_sweeps_what_nothing_needs_and_no_other_name(void)
{
    static const char *const kept[] = {"meta.pt", "__0_0.distcp.bak", "__0_00.distcp", "__x"};
    struct bench bench;
    struct dcp_claim claim, of_rank;
    struct dcp_buf image = {0};
    struct dcp_error err;
    enum dcp_outcome outcome;
    uint64_t swept = 9;

    bench_make(&bench);
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++) {
        put(&bench, kept[i]);
    }
    put_sample(&bench, ".metadata");
    put(&bench, "__0_300.distcp");
    put(&bench, "__3_2.distcp");
    CHECK_OK(take(&bench, 5, 'r', &of_rank, &err), &err);
    put(&bench, "__5_302.distcp"); /* covered by that claim, which stands */
    CHECK_EQ(of_rank.n0, 302);     /* above what the global checkpoint has of any rank */
    CHECK_OK(take(&bench, -1, 'a', &claim, &err), &err);
    CHECK_OK(dcp_claim_sweep(&claim, &swept, &err), &err); /* not committed: nothing */
    CHECK_EQ(swept, 0);
    image_of(&claim, &image);
    CHECK_OK(dcp_claim_publish(&claim, image.data, image.len, &outcome, &err), &err);
    CHECK_EQ(outcome, DCP_OUTCOME_COMMITTED);
    CHECK_OK(dcp_claim_sweep(&claim, &swept, &err), &err);
    CHECK_EQ(swept, 2);
    CHECK(is_there(&bench, "__5_302.distcp") && is_there(&bench, ".metadata"));
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++) {
        CHECK(is_there(&bench, kept[i]));
    }
    CHECK_EQ(io_memory_names_count(bench.fs, dir_path), 4 + 3);
    dcp_buf_clean_up(&image);
    io_memory_free(bench.fs);
}

/* A data file of some save of ours. */
static void
put_data_file(struct bench *bench, const char *name, char letter)
{
    struct dcp_file_header header = {.length_bytes = DCP_FILE_HEADER_BYTES};
    struct dcp_buf bytes = {0};

    memset(&header.save_id, letter, sizeof header.save_id);
    dcp_file_put_header(&bytes, &header);
    io_memory_put_file(bench->fs, dir_path, name, bytes.data, bytes.len);
    dcp_buf_clean_up(&bytes);
}

static size_t
length_of(const struct bench *bench, const char *name)
{
    size_t len = SIZE_MAX;

    (void)io_memory_file(bench->fs, dir_path, name, &len);
    return len;
}

static void
a_claim_frees_what_killed_saves_took_and_nothing_else(void)
{
    struct bench bench;
    struct dcp_claim claim, of_rank;
    struct dcp_error err;

    bench_make(&bench);
    put_sample(&bench, ".metadata"); /* of files numbered up to 300 and more */
    put_data_file(&bench, "__0_1.distcp", 'a');
    put_data_file(&bench, "__0_400.distcp", 'b');
    put_data_file(&bench, "__1_400.distcp", 'b');
    put(&bench, "__2_1.distcp"); /* of somebody else's writer, below and above */
    put(&bench, "__2_400.distcp");
    CHECK_EQ(bench.io->link_at(bench.io->ctx, bench.dirfd, "__1_400.distcp", bench.dirfd,
                               "kept.distcp"),
             0);
    CHECK_OK(take(&bench, 5, 'r', &of_rank, &err), &err);
    put_data_file(&bench, "__5_401.distcp", 'r');
    CHECK_OK(take(&bench, -1, 'c', &claim, &err), &err);
    CHECK_EQ(claim.n0, 402);
    CHECK(!is_there(&bench, "__0_1.distcp"));         /* of a checkpoint that was replaced */
    CHECK_EQ(length_of(&bench, "__0_400.distcp"), 0); /* its name keeps its number taken */
    CHECK(length_of(&bench, "__1_400.distcp") == DCP_FILE_HEADER_BYTES); /* has a second name */
    CHECK(length_of(&bench, "__5_401.distcp") == DCP_FILE_HEADER_BYTES); /* claimed */
    CHECK(is_there(&bench, "__2_1.distcp") && length_of(&bench, "__2_400.distcp") > 0);
    CHECK_EQ(dcp_claim_settle(&claim, &err), DCP_OUTCOME_ABORTED);
    CHECK_OK(take(&bench, -1, 'd', &claim, &err), &err);
    CHECK_EQ(claim.n0, 402);
    io_memory_free(bench.fs);
}

/* Metadata that only Python can read, or nobody: any file may be referenced. */
static void
nothing_is_swept_while_a_metadata_file_cannot_be_read(void)
{
    struct bench bench;
    struct dcp_claim claim;
    struct dcp_buf image = {0};
    struct dcp_error err;
    enum dcp_outcome outcome;
    uint64_t swept = 9;

    bench_make(&bench);
    put(&bench, ".metadata");
    put(&bench, "__3.metadata");
    put(&bench, "__0_4.distcp");
    CHECK_OK(take(&bench, -1, 'a', &claim, &err), &err);
    CHECK_EQ(claim.n0, 5);
    image_of(&claim, &image);
    CHECK_OK(dcp_claim_publish(&claim, image.data, image.len, &outcome, &err), &err);
    CHECK_OK(dcp_claim_sweep(&claim, &swept, &err), &err);
    CHECK_EQ(swept, 0);
    CHECK(is_there(&bench, "__0_4.distcp"));
    dcp_buf_clean_up(&image);
    io_memory_free(bench.fs);
}

static void
a_superseded_save_says_by_whom_and_touches_nothing(void)
{
    struct bench bench;
    struct dcp_claim old, new;
    struct dcp_error err;
    enum dcp_outcome outcome;

    bench_make(&bench);
    CHECK_OK(take(&bench, -1, 'a', &old, &err), &err);
    CHECK_OK(take(&bench, -1, 'b', &new, &err), &err);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_claim_publish(&old, (const uint8_t *)"image", 5, &outcome, &err),
             DCP_E_SUPERSEDED);
    CHECK_EQ(outcome, DCP_OUTCOME_SUPERSEDED);
    CHECK(strstr(err.message, "host h, pid 7") != NULL);
    CHECK_EQ(dcp_claim_settle(&old, &err), DCP_OUTCOME_SUPERSEDED);
    CHECK(is_there(&bench, new.name) && !is_there(&bench, ".metadata"));
    CHECK_EQ(dcp_claim_settle(&new, &err), DCP_OUTCOME_ABORTED);
    CHECK_EQ(io_memory_names_count(bench.fs, dir_path), 0);
    io_memory_free(bench.fs);
}

static void
a_removed_directory_is_told_as_such(void)
{
    struct bench bench;
    struct dcp_claim claim, other;
    struct dcp_error err;
    enum dcp_outcome outcome;

    bench_make(&bench);
    CHECK_OK(take(&bench, -1, 'a', &claim, &err), &err);
    CHECK_EQ(bench.io->unlink_at(bench.io->ctx, bench.dirfd, claim.name), 0);
    CHECK_EQ(io_memory_rmdir(io_memory_process(bench.fs, 0), dir_path), 0);
    CHECK_EQ(dcp_claim_publish(&claim, (const uint8_t *)"image", 5, &outcome, &err), DCP_E_REMOVED);
    CHECK_EQ(outcome, DCP_OUTCOME_ABORTED);
    CHECK_EQ(take(&bench, -1, 'b', &other, &err), DCP_E_REMOVED);
    io_memory_free(bench.fs);
}

static void
without_sync_files_nothing_is_synced(void)
{
    struct bench bench;
    struct dcp_claim claim;
    struct dcp_buf image = {0};
    struct dcp_error err;
    enum dcp_outcome outcome;
    uint64_t swept;

    for (int sync = 0; sync < 2; sync++) {
        uint64_t calls;
        bench_make(&bench);
        CHECK_OK(take(&bench, -1, 'a', &claim, &err), &err);
        claim.sync = sync != 0;
        dcp_buf_clear(&image);
        image_of(&claim, &image);
        CHECK_OK(dcp_claim_publish(&claim, image.data, image.len, &outcome, &err), &err);
        CHECK_OK(dcp_claim_sweep(&claim, &swept, &err), &err);
        calls = io_memory_calls_of(bench.fs, IO_FSYNC) + io_memory_calls_of(bench.fs, IO_FDATASYNC);
        CHECK_EQ(calls, sync ? 3 : 0); /* the new directory's parent, the image, the directory */
        io_memory_free(bench.fs);
    }
    dcp_buf_clean_up(&image);
}

/* The new checkpoint is seen by all, but a power cut may take it back: the old files must stay. */
static void
a_commit_that_is_not_durable_is_reported_and_not_swept_after(void)
{
    struct bench bench;
    struct dcp_claim claim;
    struct dcp_buf image = {0};
    struct dcp_error err;
    enum dcp_outcome outcome;
    uint64_t swept = 9;

    bench_make(&bench);
    put(&bench, "__0_0.distcp");
    CHECK_OK(take(&bench, -1, 'a', &claim, &err), &err);
    image_of(&claim, &image);
    io_memory_faults(bench.fs)->fail_call = IO_FSYNC;
    io_memory_faults(bench.fs)->fail_nth = 3; /* the parent, the image, then the directory */
    io_memory_faults(bench.fs)->fail_errno = EIO;
    CHECK_EQ(dcp_claim_publish(&claim, image.data, image.len, &outcome, &err), DCP_E_IO);
    CHECK_EQ(outcome, DCP_OUTCOME_COMMITTED);
    CHECK_EQ(dcp_claim_settle(&claim, &err), DCP_OUTCOME_COMMITTED);
    dcp_error_clear(&err);
    CHECK_OK(dcp_claim_sweep(&claim, &swept, &err), &err);
    CHECK_EQ(swept, 0);
    CHECK(is_there(&bench, "__0_0.distcp"));
    dcp_buf_clean_up(&image);
    io_memory_free(bench.fs);
}

/* One failing call, with and without its effect, at every place of a save by the protocol alone. */
static void
after_any_failing_call_what_was_told_is_true(void)
{
    for (uint64_t nth = 1, reached = true; reached; nth++) {
        for (int after = 0; after < 2; after++) {
            struct bench bench;
            struct dcp_claim claim = {0}, next;
            struct dcp_buf image = {0};
            struct dcp_error err;
            enum dcp_outcome outcome = DCP_OUTCOME_ABORTED;
            uint64_t swept, before;
            size_t len = 0;
            bool ours;

            bench_make(&bench);
            put_sample(&bench, ".metadata");
            put(&bench, "__0_300.distcp");
            io_memory_faults(bench.fs)->fail_call = IO_CALLS;
            io_memory_faults(bench.fs)->fail_nth = nth;
            io_memory_faults(bench.fs)->fail_errno = EIO;
            io_memory_faults(bench.fs)->fail_after_effect = after != 0;
            before = io_memory_calls(bench.fs);
            if (take(&bench, -1, 'a', &claim, &err) == 0) {
                image_of(&claim, &image);
                if (dcp_claim_publish(&claim, image.data, image.len, &outcome, &err) == 0) {
                    CHECK_EQ(outcome, DCP_OUTCOME_COMMITTED);
                    (void)!dcp_claim_sweep(&claim, &swept, &err);
                }
            }
            reached = io_memory_calls(bench.fs) - before >= nth;
            const uint8_t *now = io_memory_file(bench.fs, dir_path, ".metadata", &len);
            ours = image.len > 0 && len == image.len && memcmp(now, image.data, len) == 0;
            CHECK_EQ(ours, outcome == DCP_OUTCOME_COMMITTED);
            CHECK_EQ(io_memory_open_files(bench.fs), 1);
            io_memory_faults(bench.fs)->fail_nth = 0;
            CHECK_OK(take(&bench, -1, 'b', &next, &err), &err);
            CHECK_EQ(dcp_claim_settle(&next, &err), DCP_OUTCOME_ABORTED);
            for (size_t i = 0; i < io_memory_names_count(bench.fs, dir_path); i++) {
                CHECK(strstr(io_memory_name(bench.fs, dir_path, i), "claim") == NULL);
            }
            dcp_buf_clean_up(&image);
            io_memory_free(bench.fs);
        }
    }
}

static void
want_of_memory_leaves_no_claim_behind(void)
{
    struct bench bench;
    struct dcp_claim claim;
    struct dcp_error err;
    int rc = DCP_E_NOMEM;

    bench_make(&bench);
    put_sample(&bench, ".metadata");
    put(&bench, "__0_1.distcp");
    for (uint64_t n = 1; rc != 0; n++) {
        dcp_alloc_fail_after(n);
        rc = take(&bench, -1, 'a', &claim, &err);
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || (rc == DCP_E_NOMEM && io_memory_names_count(bench.fs, dir_path) == 2));
        CHECK_EQ(io_memory_open_files(bench.fs), 1);
    }
    io_memory_free(bench.fs);
}

/* Names in the list that another save's header stands in are left. */
static void
discard_removes_the_given_names_but_not_another_saves_file(void)
{
    static const char *const names[] = {"__0_0.distcp", "__0_1.distcp", "__0_2.distcp",
                                        "__0_9.distcp"};
    struct dcp_file_header header = {.rank = 0, .n = 1, .length_bytes = DCP_FILE_HEADER_BYTES};
    struct bench bench;
    struct dcp_claim claim;
    struct dcp_buf buf = {0};
    struct dcp_error err;

    bench_make(&bench);
    CHECK_OK(take(&bench, -1, 'a', &claim, &err), &err);
    put(&bench, "__0_0.distcp");
    memset(&header.save_id, 'x', sizeof header.save_id);
    dcp_file_put_header(&buf, &header);
    io_memory_put_file(bench.fs, dir_path, "__0_1.distcp", buf.data, buf.len);
    dcp_buf_clear(&buf);
    header.save_id = claim.save_id;
    dcp_file_put_header(&buf, &header);
    io_memory_put_file(bench.fs, dir_path, "__0_2.distcp", buf.data, buf.len);
    put(&bench, "__0_3.distcp");
    dcp_claim_discard(&claim, names, sizeof names / sizeof names[0]);
    CHECK(!is_there(&bench, "__0_0.distcp") && !is_there(&bench, "__0_2.distcp"));
    CHECK(is_there(&bench, "__0_1.distcp") && is_there(&bench, "__0_3.distcp"));
    dcp_buf_clean_up(&buf);
    io_memory_free(bench.fs);
}

/* A link keeps the header of the save that wrote it, which is how it is told from other files. */
static void
discard_of_links_removes_them_and_nothing_else(void)
{
    static const char *const names[] = {"__0_0.distcp", "__0_1.distcp", "__0_2.distcp",
                                        "__0_9.distcp"};
    struct dcp_save_id written_by[4];
    struct dcp_file_header header = {.length_bytes = DCP_FILE_HEADER_BYTES};
    struct bench bench;
    struct dcp_claim claim;
    struct dcp_error err;

    bench_make(&bench);
    CHECK_OK(take(&bench, -1, 'a', &claim, &err), &err);
    for (int i = 0; i < 4; i++) {
        struct dcp_buf buf = {0};
        memset(&written_by[i], 'p' + i, sizeof written_by[i]);
        header.save_id = written_by[i];
        if (i == 1) {
            header.save_id = claim.save_id; /* a file of our own that took the name */
        }
        dcp_file_put_header(&buf, &header);
        if (i < 3) {
            io_memory_put_file(bench.fs, dir_path, names[i], buf.data, buf.len);
        }
        dcp_buf_clean_up(&buf);
    }
    dcp_claim_discard(&claim, names, 1);
    CHECK(is_there(&bench, names[0])); /* to that one it is another save's file */
    dcp_claim_discard_links(&claim, names, written_by, 4);
    CHECK(!is_there(&bench, names[0]) && !is_there(&bench, names[2]));
    CHECK(is_there(&bench, names[1]));
    CHECK_EQ(io_memory_open_files(bench.fs), 1);
    io_memory_free(bench.fs);
}

CTEST_MAIN(RUN(discard_of_links_removes_them_and_nothing_else);
           RUN(only_names_exactly_as_we_write_them_are_ours);
           RUN(numbers_begin_above_everything_on_disk_referenced_or_claimed);
           RUN(a_rank_of_its_own_numbers_and_fences_only_its_own);
           RUN(the_committer_sweeps_what_nothing_needs_and_no_other_name);
           RUN(a_claim_frees_what_killed_saves_took_and_nothing_else);
           RUN(nothing_is_swept_while_a_metadata_file_cannot_be_read);
           RUN(a_superseded_save_says_by_whom_and_touches_nothing);
           RUN(a_removed_directory_is_told_as_such); RUN(without_sync_files_nothing_is_synced);
           RUN(a_commit_that_is_not_durable_is_reported_and_not_swept_after);
           RUN(after_any_failing_call_what_was_told_is_true);
           RUN(want_of_memory_leaves_no_claim_behind);
           RUN(discard_removes_the_given_names_but_not_another_saves_file);)

/*
 * test_save_metadata.c: the metadata image of many chunks, which is built beside the files.
 *
 * 5,000 tensors are more than a save builds on its own thread.
 */
#include "ctest.h"

#include "dcp_transfer.h"
#include "io_memory.h"
#include "plan_maker.h"

enum { TENSORS = 5000 };

static const uint8_t elements[8] = {1, 2, 3, 4, 5, 6, 7, 8};
static struct dcp_source sources[TENSORS];

struct one {
    struct io_memory *fs;
    struct dcp_group *group;
    struct dcp_save *save;
    struct dcp_save_info info;
    struct dcp_error err;
};

/* Up to an agreed plan. */
static void
one_start(struct one *one)
{
    struct dcp_comm comm;
    struct dcp_failure_list failures = {0};
    struct dcp_plan plan = {.thread_count = 1, .single_file_per_rank = true};
    bool exists = true;
    memset(one, 0, sizeof *one);
    dcp_error_clear(&one->err);
    one->fs = io_memory_new(1);
    struct dcp_save_params params = {.io = &io_memory_process(one->fs, 0)->io,
                                     .dir_path = "/d",
                                     .meta = {.checkpoint_id = "/d", .version = "1.0.0"},
                                     .sync = true};
    for (int i = 0; i < TENSORS; i++) {
        char fqn[32];
        const uint64_t size[] = {8};
        snprintf(fqn, sizeof fqn, "layers.%d.weight", i);
        maker_tensor(&plan, fqn, DCP_DTYPE_UINT8, 1, size);
        sources[i].data = elements;
    }
    dcp_comm_local(&comm);
    CHECK_OK(dcp_group_new(&comm, 0, &one->group, &one->err), &one->err);
    CHECK_OK(dcp_save_new(one->group, &params, &one->save, &one->err), &one->err);
    CHECK_OK(dcp_save_open(one->save, &exists, &one->err), &one->err);
    CHECK(!exists);
    CHECK_OK(dcp_save_claim(one->save, &one->err), &one->err);
    dcp_save_set_plan(one->save, &plan);
    CHECK_OK(dcp_save_agree(one->save, NULL, &failures, &one->err), &one->err);
}

static int
one_write(struct one *one)
{
    dcp_error_clear(&one->err);
    int rc = dcp_save_write(one->save, sources, NULL, NULL, &one->err);
    dcp_save_get_info(one->save, &one->info);
    return rc;
}

static void
one_end(struct one *one)
{
    dcp_save_destroy(one->save);
    dcp_group_destroy(one->group);
    CHECK_EQ(io_memory_open_files(one->fs), 0);
    io_memory_free(one->fs);
    dcp_engine_trim();
}

static void
the_image_is_whole_when_the_files_are_written(void)
{
    struct one one;
    struct dcp_metadata md = {0};
    struct dcp_failure_list failures = {0};
    one_start(&one);
    CHECK_OK(one_write(&one), &one.err);
    CHECK(one.info.metadata_ns > 0 && one.info.metadata.len > 0);
    CHECK_OK(dcp_metadata_read(one.info.metadata.data, one.info.metadata.len, &md, &one.err),
             &one.err);
    CHECK_EQ(md.entries_count, TENSORS);
    CHECK_EQ(md.chunks_count, TENSORS);
    dcp_metadata_clean_up(&md);
    CHECK_OK(dcp_save_finish(one.save, NULL, &failures, &one.err), &one.err);
    one_end(&one);
}

/* Memory runs out at every allocation in turn, of either thread. */
static void
running_out_of_memory_on_either_thread_fails_the_write(void)
{
    struct one one;
    unsigned failed = 0;
    for (uint64_t n = 1; n < 400; n += n < 40 ? 1 : 37) {
        one_start(&one);
        dcp_alloc_fail_after(n);
        int rc = one_write(&one);
        dcp_alloc_fail_after(UINT64_MAX);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        CHECK(rc == 0 || one.err.code == rc);
        CHECK(rc != 0 || one.info.metadata.len > 0);
        failed += rc != 0;
        one_end(&one);
    }
    CHECK(failed > 5);
}

CTEST_MAIN(RUN(the_image_is_whole_when_the_files_are_written);
           RUN(running_out_of_memory_on_either_thread_fails_the_write);)

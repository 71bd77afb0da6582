/*
 * verify_subject.h: a checkpoint on a simulated disk, and checks of it that must leave it as it is.
 *
 * Included after ctest.h by the tests of the check, so that CHECK counts in theirs.
 */
#ifndef VERIFY_SUBJECT_H
#define VERIFY_SUBJECT_H

#include "dcp_verify.h"
#include "engine_load.h"

#define DIR "/d"

/* ---- a checkpoint on a simulated disk ---- */

struct subject {
    struct world world;
    struct disk disk;
    struct dcp_buf image;
};

static inline void
put_metadata(struct subject *s, const char *name)
{
    struct dcp_global_plan global = {0};
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    struct dcp_error err = {0};
    CHECK_OK(dcp_global_plan_build(&s->world.plan, 1, false, &global, &err), &err);
    dcp_buf_clear(&s->image);
    CHECK_OK(
        dcp_metadata_write(&global, &meta, &s->world.save_id, s->world.n0, NULL, &s->image, &err),
        &err);
    io_memory_put_file(s->disk.fs, DIR, name, s->image.data, s->image.len);
    dcp_global_plan_clean_up(&global);
}

static inline void
make(struct subject *s, const struct world_options *options)
{
    *s = (struct subject){.image = {0}};
    world_make(&s->world, options);
    disk_make(&s->disk, &s->world, 512);
    put_metadata(s, ".metadata");
}

static inline void
clean_up(struct subject *s)
{
    dcp_buf_clean_up(&s->image);
    disk_clean_up(&s->disk);
    world_clean_up(&s->world);
}

static inline int
run(struct io_memory *fs, const char *dir, const struct dcp_verify_options *options,
    struct dcp_verify_result *ret, struct dcp_error *err)
{
    const struct dcp_io *io = &io_memory_process(fs, 0)->io;
    unsigned open_before = io_memory_open_files(fs);
    uint64_t hash = io_memory_state_hash(fs);
    dcp_error_clear(err);
    int rc = dcp_verify_run(io, dir, options, ret, err);
    CHECK_EQ(rc, err->code);
    CHECK(rc == 0 || err->message[0] != 0);
    CHECK_EQ(io_memory_open_files(fs), open_before);
    CHECK_EQ(io_memory_state_hash(fs), hash);
    return rc;
}

/* Problems of a check that runs to its end; *ret_first (may be NULL) is a copy of the first. */
static inline uint64_t
problems(struct io_memory *fs, const char *dir, enum dcp_verify_level level,
         struct dcp_verify_problem *ret_first)
{
    static char tensor[256], file[256], what[1600];
    struct dcp_verify_options options = {.level = level};
    struct dcp_verify_result result;
    struct dcp_error err;
    if (run(fs, dir, &options, &result, &err) != 0) {
        CHECK_OK(err.code, &err);
        return UINT64_MAX;
    }
    uint64_t found = result.problems_found;
    CHECK_EQ(result.problems_count, found < 100 ? found : 100);
    if (found > 0 && ret_first != NULL) {
        *ret_first = result.problems[0];
        snprintf(tensor, sizeof tensor, "%s", ret_first->tensor);
        snprintf(file, sizeof file, "%s", ret_first->file);
        snprintf(what, sizeof what, "%s", ret_first->what);
        ret_first->tensor = tensor;
        ret_first->file = file;
        ret_first->what = what;
    }
    dcp_verify_result_clean_up(&result);
    return found;
}

static const struct world_options small = {
    .seed = 5, .tensors = 6, .objects = 2, .thread_count = 2, .content_hash = true};

#endif

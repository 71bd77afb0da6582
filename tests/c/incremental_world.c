/*
 * incremental_world.c: saves and loads of incremental_world.h, in the order of calls of
 * dcp_native/_save.py and _load.py.
 */
#include "incremental_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan_maker.h"

struct memory {
    struct dcp_plan plan;
    struct dcp_source sources[TENSORS_MOST];
    int64_t strides[TENSORS_MOST][2];
    float *values[TENSORS_MOST];
};

static void
must(bool ok, const char *what, const struct dcp_error *err)
{
    if (!ok) {
        fprintf(stderr, "incremental_world: %s: %s\n", what, err == NULL ? "" : err->message);
        exit(1);
    }
}

static uint32_t
shape_of(const struct tensors *tensors, uint32_t i, uint64_t ret_sizes[2])
{
    bool rows = (tensors->two_rows >> i & 1) != 0;

    ret_sizes[0] = rows ? 2 : tensors->lengths[i];
    ret_sizes[1] = tensors->lengths[i] / 2;
    return rows ? 2 : 1;
}

static float
value_of(uint32_t i, int version, uint64_t at)
{
    float plain = (float)(i * 1000) + (float)(at % 997);

    return at == (uint64_t)version * 7 % 5 ? plain + 0.5f * (float)(version + 1) : plain;
}

static void
memory_make(struct memory *memory, const struct tensors *tensors)
{
    char fqn[32];

    *memory = (struct memory){
        .plan = {.thread_count = tensors->thread_count == 0 ? 1 : tensors->thread_count,
                 .single_file_per_rank = !tensors->file_per_item,
                 .has_paths = true}};
    for (uint32_t i = 0; i < tensors->count; i++) {
        bool strided = (tensors->strided >> i & 1) != 0;
        uint64_t sizes[2], step = strided ? 2 : 1;
        uint32_t ndim = shape_of(tensors, i, sizes);

        snprintf(fqn, sizeof fqn, "layer.%u", i);
        maker_tensor(&memory->plan, fqn, tensors->dtype == 0 ? DCP_DTYPE_FLOAT32 : tensors->dtype,
                     ndim, sizes);
        memory->plan.items[i].props = tensors->props;
        memory->values[i] = dcp_malloc_array(tensors->lengths[i] * step + 1, sizeof(float));
        for (uint64_t k = 0; k < tensors->lengths[i]; k++) {
            memory->values[i][k * step] = value_of(i, tensors->versions[i], k);
        }
        memory->strides[i][0] = (int64_t)(ndim == 2 ? sizes[1] * step : step) * 4;
        memory->strides[i][1] = (int64_t)step * 4;
        memory->sources[i] =
            (struct dcp_source){.data = (const uint8_t *)memory->values[i],
                                .strides_bytes = strided ? memory->strides[i] : NULL};
    }
}

static void
memory_clean_up(struct memory *memory)
{
    dcp_plan_clean_up(&memory->plan);
    for (size_t i = 0; i < TENSORS_MOST; i++) {
        dcp_free(memory->values[i]);
    }
}

struct dcp_group *
tensors_group(void)
{
    struct dcp_group *group = NULL;
    struct dcp_error err = {0};
    struct dcp_comm comm;

    dcp_comm_local(&comm);
    must(dcp_group_new(&comm, 0, &group, &err) == 0, "group", &err);
    return group;
}

/* Up to an agreed plan. */
static struct dcp_save *
begin(struct dcp_group *group, struct io_memory *fs, const struct saving *saving,
      struct memory *memory)
{
    struct dcp_save_params params = {.io = &io_memory_process(fs, 0)->io,
                                     .dir_path = saving->dir,
                                     .meta = {.checkpoint_id = saving->dir, .version = "1.0.0"},
                                     .independent = saving->independent,
                                     .sync = true,
                                     .direct = DCP_DIRECT_OFF,
                                     .base_path = saving->base,
                                     .link_mode = saving->mode,
                                     .content_hash = saving->content_hash};
    struct dcp_failure_list failures = {0};
    struct dcp_save *save = NULL;
    struct dcp_error err = {0};
    bool exists;

    must(dcp_save_new(group, &params, &save, &err) == 0, "new", &err);
    must(dcp_save_open(save, &exists, &err) == 0, "open", &err);
    must(dcp_save_claim(save, &err) == 0, "claim", &err);
    dcp_save_set_plan(save, &memory->plan);
    must(dcp_save_agree(save, NULL, &failures, &err) == 0, "agree", &err);
    return save;
}

void
tensors_save(struct dcp_group *group, struct io_memory *fs, const struct tensors *tensors,
             const struct saving *saving, struct dcp_save_info *ret_info)
{
    struct dcp_group *own = group == NULL ? tensors_group() : NULL;
    struct dcp_failure_list failures = {0};
    struct dcp_error err = {0};
    struct dcp_save *save;
    struct memory memory;

    memory_make(&memory, tensors);
    save = begin(group == NULL ? own : group, fs, saving, &memory);
    must(dcp_save_compare(save, NULL, memory.sources, NULL, &failures, &err) == 0, "compare", &err);
    must(dcp_save_write(save, memory.sources, NULL, NULL, &err) == 0, "write", &err);
    must(dcp_save_finish(save, NULL, &failures, &err) == 0, "finish", &err);
    dcp_save_get_info(save, ret_info);
    ret_info->metadata = (struct dcp_span){0};
    dcp_save_destroy(save);
    memory_clean_up(&memory);
    dcp_group_destroy(own);
}

int
tensors_cancel(struct io_memory *fs, const struct tensors *tensors, const struct saving *saving,
               struct dcp_failure_list *ret_failures)
{
    struct dcp_group *group = tensors_group();
    struct dcp_error err = {0};
    struct dcp_save *save;
    struct memory memory;
    atomic_int cancel = 1;
    int rc;

    memory_make(&memory, tensors);
    save = begin(group, fs, saving, &memory);
    rc = dcp_save_compare(save, NULL, memory.sources, &cancel, ret_failures, &err);
    dcp_save_destroy(save);
    memory_clean_up(&memory);
    dcp_group_destroy(group);
    return rc;
}

static int
plan_load(const struct tensors *tensors, const struct dcp_metadata *md, float *got[TENSORS_MOST],
          struct dcp_read_plan *plan, struct dcp_error *err)
{
    static const uint64_t zeros[2];
    uint64_t holes, target;
    int rc = 0;

    plan->md = md;
    for (uint32_t i = 0; i < tensors->count && rc == 0; i++) {
        const struct dcp_md_entry *entry;
        uint64_t sizes[2];
        char fqn[32];

        shape_of(tensors, i, sizes);
        snprintf(fqn, sizeof fqn, "layer.%u", i);
        entry = dcp_metadata_find(md, fqn, strlen(fqn));
        must(entry != NULL, fqn, NULL);
        got[i] = dcp_calloc(tensors->lengths[i] + 1, sizeof(float));
        rc = dcp_read_plan_add(plan, (uint64_t)(entry - md->entries), (uint8_t *)got[i], NULL,
                               zeros, sizes, &target, err);
    }
    return rc != 0 ? rc : dcp_read_plan_build(plan, true, &holes, err);
}

bool
tensors_load(struct io_memory *fs, const struct tensors *tensors, const char *dir, bool independent)
{
    struct dcp_load_params params = {.io = &io_memory_process(fs, 1)->io,
                                     .dir_path = dir,
                                     .verify = true,
                                     .direct = DCP_DIRECT_OFF};
    struct dcp_group *group = tensors_group();
    struct dcp_failure_list failures = {0};
    struct dcp_read_plan plan = {0};
    float *got[TENSORS_MOST] = {NULL};
    struct dcp_read_stats stats;
    struct dcp_load *load = NULL;
    struct dcp_error err = {0};
    int local_code = 0, rc;
    bool same;

    must(dcp_load_new(group, &params, &load, &err) == 0, "new load", &err);
    rc = dcp_load_open(load, NULL, &local_code, &failures, &err);
    rc = rc == 0 ? local_code : rc;
    rc = rc == 0 ? plan_load(tensors, dcp_load_metadata(load), got, &plan, &err) : rc;
    rc = rc == 0 ? dcp_load_status(load, NULL, &failures, &err) : rc;
    rc = rc == 0 ? dcp_load_read(load, &plan, NULL, NULL, NULL, NULL, &stats, &err) : rc;
    if (rc != 0) {
        fprintf(stderr, "incremental_world: %s does not load: %s\n", dir, err.message);
    }
    same = rc == 0 && dcp_load_rank_local(load) == independent;
    for (uint32_t i = 0; i < tensors->count; i++) {
        for (uint64_t k = 0; same && k < tensors->lengths[i]; k++) {
            same = got[i][k] == value_of(i, tensors->versions[i], k);
        }
        dcp_free(got[i]);
    }
    dcp_read_plan_clean_up(&plan);
    dcp_failure_list_clean_up(&failures);
    dcp_load_destroy(load);
    dcp_group_destroy(group);
    return same;
}

void
tensors_remove(struct io_memory *fs, const char *dir)
{
    const struct dcp_io *io = &io_memory_process(fs, 1)->io;
    int fd = io->open_dir(io->ctx, dir);

    while (io_memory_names_count(fs, dir) > 0) {
        must(io->unlink_at(io->ctx, fd, io_memory_name(fs, dir, 0)) == 0, "unlink", NULL);
    }
    io->close(io->ctx, fd);
}

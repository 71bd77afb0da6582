/*
 * save_world.c: states of ranks, their saves and loads, and what the bytes must be.
 */
#include "save_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan_maker.h"

enum { WEIGHT_COLUMNS = 5, OBJECT_BYTES = 90 };

struct save_state {
    struct dcp_plan plan;
    struct dcp_source sources[SAVE_ITEMS];
    uint8_t *memory[SAVE_ITEMS];
};

static void
must(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "save_world: %s\n", what);
        exit(1);
    }
}

struct dcp_group *
save_world_group(const struct dcp_comm *comm, uint32_t coordinator)
{
    struct dcp_group *group = NULL;
    struct dcp_error err = {0};
    struct dcp_comm copy = *comm;

    must(dcp_group_new(&copy, coordinator, &group, &err) == 0, err.message);
    return group;
}

/* Which generation an item of SAVE_PARTLY is of: large parts of each rank stay as they were. */
static int
generation_of(const char *fqn, int generation)
{
    bool changes = strcmp(fqn, "bias") == 0 || strncmp(fqn, "state.", 6) == 0;

    return generation == SAVE_PARTLY && !changes ? 1 : generation;
}

static void
fill(uint8_t *bytes, size_t len, const char *fqn, int generation, uint64_t from)
{
    unsigned tag = 0;

    generation = generation_of(fqn, generation);
    for (const char *p = fqn; *p != '\0'; p++) {
        tag = tag * 131 + (unsigned char)*p;
    }
    for (size_t i = 0; i < len; i++) {
        uint64_t at = from + i;
        bytes[i] = (uint8_t)((unsigned)generation * 31 + tag + at * 7 + (at >> 8) * 13);
    }
}

static uint64_t
weight_rows(uint32_t size)
{
    return 2 * (uint64_t)size + 1;
}

static uint8_t *
make_record(const char *fqn, int generation, bool larger, uint64_t *ret_slot_bytes)
{
    struct dcp_buf zip = {0}, record = {0};
    struct dcp_error err = {0};
    uint8_t pickle[OBJECT_BYTES];

    fill(pickle, sizeof pickle, fqn, generation, 0);
    must(dcp_record_put_object(&zip, pickle, sizeof pickle, &err) == 0, err.message);
    *ret_slot_bytes = dcp_record_slot_bytes(zip.len + (larger ? 1000 : 0));
    must(dcp_record_put_padded(&record, zip.data, zip.len, *ret_slot_bytes, &err) == 0,
         err.message);
    dcp_buf_clean_up(&zip);
    return record.data;
}

/* Memory for the item that was added last. */
static void
add_memory(struct save_state *state, const char *fqn, int generation, uint64_t from)
{
    uint32_t i = state->plan.items_count - 1;
    uint64_t len = dcp_item_payload_bytes(&state->plan, &state->plan.items[i]);

    state->memory[i] = dcp_malloc(len);
    fill(state->memory[i], len, fqn, generation, from);
    state->sources[i].data = state->memory[i];
}

static void
add_object(struct save_state *state, const char *fqn, int generation, bool larger)
{
    uint64_t slot_bytes;
    uint8_t *record = make_record(fqn, generation, larger, &slot_bytes);

    maker_object(&state->plan, fqn, slot_bytes);
    state->memory[state->plan.items_count - 1] = record;
    state->sources[state->plan.items_count - 1].data = record;
}

/* The matrix that was added last, column after column. */
static void
turn_round(struct save_state *state)
{
    static const int64_t strides_bytes[] = {8, 24};
    const uint64_t sizes[] = {3, 4};
    uint32_t i = state->plan.items_count - 1;
    uint8_t *turned = dcp_malloc(96);

    dcp_box_scatter(turned, state->memory[i], 2, sizes, strides_bytes, 8, 0, 96);
    dcp_free(state->memory[i]);
    state->memory[i] = turned;
    state->sources[i] = (struct dcp_source){.data = turned, .strides_bytes = strides_bytes};
}

static void
add_replicas(struct save_state *state, int generation, enum save_change change)
{
    const uint64_t bias[] = {7}, scale[] = {3, 4};

    if (change != CHANGE_ORDER) {
        maker_tensor(&state->plan, "bias", DCP_DTYPE_FLOAT32, 1, bias);
        add_memory(state, "bias", generation, 0);
    }
    maker_tensor(&state->plan, "scale", DCP_DTYPE_INT64, 2, scale);
    add_memory(state, "scale", generation, 0);
    if (state->plan.rank % 2 == 1) {
        turn_round(state);
    }
    if (change == CHANGE_ORDER) {
        maker_tensor(&state->plan, "bias", DCP_DTYPE_FLOAT32, 1, bias);
        add_memory(state, "bias", generation, 0);
    }
    add_object(state, "config", generation, false);
}

static void
save_state_make(struct save_state *state, uint32_t rank, uint32_t size, int generation,
                enum save_change change)
{
    const uint64_t rows = weight_rows(size), first = rows * rank / size,
                   last = rows * (rank + 1) / size;
    const uint64_t own[] = {3, change == CHANGE_BOX ? 4 : 2};
    struct dcp_plan *plan = &state->plan;
    char fqn[32];

    *state = (struct save_state){.plan = {.rank = rank,
                                          .thread_count = change == CHANGE_THREAD_COUNT ? 2 : 1,
                                          .single_file_per_rank = change != CHANGE_FILE_PER_ITEM,
                                          .has_paths = change != CHANGE_PATH}};
    maker_shard2(plan, "weight", rows, WEIGHT_COLUMNS, first, 0, last - first, WEIGHT_COLUMNS);
    add_memory(state, "weight", generation, first * WEIGHT_COLUMNS * 4);
    add_replicas(state, generation, change);
    snprintf(fqn, sizeof fqn, change == CHANGE_NAME ? "other.%u" : "state.%u", rank);
    maker_tensor(plan, fqn, change == CHANGE_DTYPE ? DCP_DTYPE_INT32 : DCP_DTYPE_FLOAT32, 2, own);
    plan->items[plan->items_count - 1].props = change == CHANGE_PROPS ? DCP_PROP_REQUIRES_GRAD : 0;
    add_memory(state, fqn, generation, 0);
    snprintf(fqn, sizeof fqn, "rng.%u", rank);
    add_object(state, fqn, generation, change == CHANGE_SLOT);
}

static void
save_state_clean_up(struct save_state *state)
{
    dcp_plan_clean_up(&state->plan);
    for (size_t i = 0; i < SAVE_ITEMS; i++) {
        dcp_free(state->memory[i]);
    }
}

/* ---- save ---- */

/* What went wrong on this rank since the last agreement. */
struct local_failure {
    bool failed;
    struct dcp_error err;
    struct dcp_failure record;
};

static const struct dcp_failure *
as_failure(struct local_failure *local, uint32_t rank)
{
    local->record = (struct dcp_failure){.rank = rank,
                                         .kind = DCP_FAILURE_CORE,
                                         .bytes = (uint8_t *)&local->err,
                                         .len = sizeof local->err};
    return local->failed ? &local->record : NULL;
}

static void
raise_here(struct local_failure *local, const char *where)
{
    (void)dcp_error_set(&local->err, DCP_E_INVALID, 0, NULL, "the caller failed before %s", where);
    local->failed = true;
}

/* Collective: all ranks run out of memory from here on. */
static void
run_out_of_memory(struct dcp_group *group, uint64_t nth)
{
    const struct dcp_comm *comm = dcp_group_comm(group);
    struct dcp_error err = {0};
    int64_t lane = 0;

    if (nth != 0) {
        must(comm->all_reduce_min(comm->ctx, &lane, 1, &err) == 0, err.message);
        if (comm->rank == 0) {
            dcp_alloc_fail_after(nth);
        }
        must(comm->all_reduce_min(comm->ctx, &lane, 1, &err) == 0, err.message);
    }
}

static int
write_items(struct dcp_save *save, const struct save_request *request, struct save_state *state,
            struct dcp_error *err)
{
    const struct dcp_stage_params params = {.kind = DCP_ARENA_PRIVATE};
    int rc;

    if (!request->stage) {
        return dcp_save_write(save, state->sources, NULL, NULL, err);
    }
    rc = dcp_save_stage(save, state->sources, &params, err);
    for (size_t i = 0; rc == 0 && i < SAVE_ITEMS; i++) {
        dcp_free(state->memory[i]); /* the caller may go on, and do what it likes */
        state->memory[i] = NULL;
    }
    return rc != 0 ? rc : dcp_save_write_staged(save, NULL, false, NULL, NULL, err);
}

/* Up to compare.  False: it has ended there. */
static bool
begin_save(struct dcp_group *group, struct dcp_save *save, const struct save_request *request,
           struct save_state *state, struct local_failure *local, struct save_result *ret)
{
    uint32_t rank = dcp_group_comm(group)->rank;
    bool exists;

    dcp_error_clear(&local->err);
    local->failed =
        dcp_save_open(save, &exists, &local->err) != 0 || dcp_save_claim(save, &local->err) != 0;
    if (!local->failed && request->fail_before_agree) {
        raise_here(local, "agree");
    }
    if (request->devices != NULL) {
        devices_take(&request->devices[rank], &state->plan, state->sources, rank, false, true);
        dcp_save_set_devices(save, &request->devices[rank].list);
    }
    dcp_save_set_plan(save, &state->plan);
    run_out_of_memory(group, request->fail_allocation_of_agree);
    if (!request->independent || !local->failed) {
        ret->rc = dcp_save_agree(save, as_failure(local, rank), &ret->failures, &ret->err);
        if (ret->rc == 0) {
            dcp_save_fit_sources(save, state->sources);
        } else if (!request->independent) {
            return false;
        } else {
            local->failed = true;
            local->err = ret->err;
        }
    }
    dcp_error_clear(&ret->err);
    if (!local->failed && request->fail_before_compare) {
        raise_here(local, "compare");
    }
    run_out_of_memory(group, request->fail_allocation_of_compare);
    if (!request->independent || !local->failed) {
        ret->rc = dcp_save_compare(save, as_failure(local, rank), state->sources, NULL,
                                   &ret->failures, &ret->err);
        if (ret->rc != 0 && !request->independent) {
            return false;
        }
        if (ret->rc != 0) {
            local->failed = true;
            local->err = ret->err;
        }
    }
    dcp_error_clear(&ret->err);
    return true;
}

static void
run_save(struct dcp_group *group, struct dcp_save *save, const struct save_request *request,
         struct save_state *state, struct save_result *ret)
{
    uint32_t rank = dcp_group_comm(group)->rank;
    struct local_failure local = {0};

    if (!begin_save(group, save, request, state, &local, ret)) {
        return;
    }
    run_out_of_memory(group, request->fail_allocation_of_write);
    if (!local.failed) {
        local.failed = write_items(save, request, state, &local.err) != 0;
    }
    if (!local.failed && request->fail_before_finish) {
        raise_here(&local, "finish");
    }
    ret->rc = dcp_save_finish(save, as_failure(&local, rank), &ret->failures, &ret->err);
}

static struct dcp_save *
make_save(struct dcp_group *group, const struct dcp_io *io, const struct save_request *request)
{
    const struct dcp_save_params params = {
        .io = io,
        .dir_path = request->dir == NULL ? SAVE_DIR : request->dir,
        .meta = {.checkpoint_id = SAVE_DIR, .version = "1.0.0"},
        .identity = "a test",
        .call_hash = 77,
        .plan_salt = request->change == CHANGE_SALT ? 1 : 0,
        .split_bytes = request->split_bytes,
        .independent = request->independent,
        .sync = true,
        .share_metadata = request->share_metadata,
        .direct = request->direct,
        .base_path = request->base,
        .link_mode = request->link_mode,
        .content_hash = request->content_hash,
    };
    struct dcp_save *save = NULL;
    struct dcp_error err = {0};

    must(dcp_save_new(group, &params, &save, &err) == 0, err.message);
    return save;
}

void
save_once(struct dcp_group *group, const struct dcp_io *io, const struct save_request *request,
          struct save_result *ret)
{
    const struct dcp_comm *comm = dcp_group_comm(group);
    struct dcp_save *save;
    struct save_state state;

    *ret = (struct save_result){0};
    dcp_error_clear(&ret->err);
    save_state_make(&state, comm->rank, comm->size, request->generation, request->change);
    save = make_save(group, io, request);
    run_save(group, save, request, &state, ret);
    dcp_save_get_info(save, &ret->info);
    if (ret->info.metadata.len != 0) {
        ret->image = dcp_hash128(ret->info.metadata.data, ret->info.metadata.len, 1);
    }
    ret->info.metadata = (struct dcp_span){0};
    ret->was_committed = request->looks && dcp_save_was_committed(save);
    dcp_save_destroy(save);
    save_state_clean_up(&state);
}

void
save_begin(struct dcp_group *group, const struct dcp_io *io, const struct save_request *request,
           struct begun_save *ret)
{
    const struct dcp_comm *comm = dcp_group_comm(group);
    struct local_failure local = {0};
    struct save_result result = {0};

    *ret = (struct begun_save){.state = dcp_calloc(1, sizeof *ret->state)};
    must(ret->state != NULL, "no memory for a state");
    save_state_make(ret->state, comm->rank, comm->size, request->generation, request->change);
    ret->sources = ret->state->sources;
    ret->save = make_save(group, io, request);
    dcp_error_clear(&result.err);
    (void)begin_save(group, ret->save, request, ret->state, &local, &result);
    ret->rc = result.rc;
    ret->err = result.err;
    ret->failures = result.failures;
}

void
begun_save_free_sources(struct begun_save *begun)
{
    for (size_t i = 0; i < SAVE_ITEMS; i++) {
        dcp_free(begun->state->memory[i]);
        begun->state->memory[i] = NULL;
    }
}

void
begun_save_end(struct begun_save *begun)
{
    dcp_save_destroy(begun->save);
    save_state_clean_up(begun->state);
    dcp_free(begun->state);
    dcp_failure_list_clean_up(&begun->failures);
}

void
save_result_clean_up(struct save_result *result)
{
    dcp_failure_list_clean_up(&result->failures);
}

/* ---- load ---- */

struct load_item {
    char fqn[32];
    uint8_t *bytes; /* tensors */
    size_t len;
    uint64_t from; /* of its bytes in the whole tensor */
};

struct load_world {
    struct dcp_read_plan plan;
    struct load_item *items; /* like plan.targets */
    size_t items_count;
    unsigned fits; /* bit per generation that all objects so far may be of */
};

static int
on_record(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
          const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    struct load_world *world = ctx;
    unsigned fits = 0;
    (void)plan;
    (void)err;

    for (int g = 1; g < SAVE_GENERATIONS; g++) {
        uint64_t slot_bytes;
        uint8_t *want = make_record(world->items[item->target].fqn, g, false, &slot_bytes);
        fits |= slot_bytes == len && memcmp(want, bytes, len) == 0 ? 1u << g : 0;
        dcp_free(want);
    }
    world->fits &= fits;
    return 0;
}

static int
add_target(struct load_world *world, const struct dcp_metadata *md, const char *fqn,
           const uint64_t *offsets, const uint64_t *sizes, size_t len, uint64_t from,
           struct dcp_error *err)
{
    static const uint64_t zeros[DCP_MAX_DIMS];
    const struct dcp_md_entry *entry = dcp_metadata_find(md, fqn, strlen(fqn));
    struct load_item *item = &world->items[world->items_count++];
    uint64_t target;

    snprintf(item->fqn, sizeof item->fqn, "%s", fqn);
    if (entry == NULL) {
        return dcp_error_set(err, DCP_E_MISSING, 0, NULL, "%s is not in the checkpoint", fqn);
    }
    item->len = len;
    item->from = from;
    item->bytes = len == 0 ? NULL : dcp_calloc(1, len);
    return dcp_read_plan_add(&world->plan, (uint64_t)(entry - md->entries), item->bytes, NULL,
                             offsets == NULL ? zeros : offsets, sizes, &target, err);
}

static int
plan_load(struct load_world *world, const struct dcp_metadata *md, const struct dcp_comm *comm,
          const struct load_request *request, struct dcp_error *err)
{
    const uint64_t rows = weight_rows(request->saved_size), first = rows * comm->rank / comm->size,
                   last = rows * (comm->rank + 1) / comm->size;
    const uint64_t at[] = {first, 0}, box[] = {last - first, WEIGHT_COLUMNS};
    const uint64_t bias[] = {7}, scale[] = {3, 4}, own[] = {3, 2};
    const size_t row_bytes = WEIGHT_COLUMNS * 4;
    uint64_t holes;
    char fqn[32];
    int rc;

    world->plan.md = md;
    world->items = dcp_calloc(2 * request->saved_size + 4, sizeof *world->items);
    rc = add_target(world, md, "weight", at, box, (last - first) * row_bytes, first * row_bytes,
                    err);
    rc = rc != 0 ? rc : add_target(world, md, "bias", NULL, bias, 28, 0, err);
    rc = rc != 0 ? rc : add_target(world, md, "scale", NULL, scale, 96, 0, err);
    rc = rc != 0 ? rc : add_target(world, md, "config", NULL, NULL, 0, 0, err);
    for (uint32_t r = 0; rc == 0 && r < request->saved_size; r++) {
        if (r == request->without_state_of || (request->own_part && r != comm->rank)) {
            continue;
        }
        snprintf(fqn, sizeof fqn, "state.%u", r);
        rc = add_target(world, md, fqn, NULL, own, 24, 0, err);
        snprintf(fqn, sizeof fqn, "rng.%u", r);
        rc = rc != 0 ? rc : add_target(world, md, fqn, NULL, NULL, 0, 0, err);
    }
    return rc != 0 ? rc : dcp_read_plan_build(&world->plan, true, &holes, err);
}

static int
find_generation(const struct load_world *world)
{
    for (int g = 1; g < SAVE_GENERATIONS; g++) {
        bool same = (world->fits >> g & 1) != 0;
        for (size_t i = 0; same && i < world->items_count; i++) {
            const struct load_item *item = &world->items[i];
            uint8_t *want = dcp_malloc(item->len + 1);
            fill(want, item->len, item->fqn, g, item->from);
            same = item->len == 0 || memcmp(want, item->bytes, item->len) == 0;
            dcp_free(want);
        }
        if (same) {
            return g;
        }
    }
    return -1;
}

static void
run_load(struct dcp_load *load, struct load_world *world, const struct dcp_comm *comm,
         const struct load_request *request, struct load_result *ret)
{
    struct local_failure local = {0};
    struct dcp_read_stats stats;
    int local_code = 0;

    if (request->fail_before[0]) {
        raise_here(&local, "open");
    }
    ret->rc =
        dcp_load_open(load, as_failure(&local, comm->rank), &local_code, &ret->failures, &ret->err);
    if (ret->rc != 0) {
        return;
    }
    ret->image_bytes = dcp_load_metadata_image(load).len;
    local.failed = local_code != 0;
    local.err = ret->err;
    dcp_error_clear(&ret->err);
    if (!local.failed) {
        local.failed = plan_load(world, dcp_load_metadata(load), comm, request, &local.err) != 0;
    }
    if (!local.failed && request->fail_before[1]) {
        raise_here(&local, "the status of planning");
    }
    ret->rc = dcp_load_status(load, as_failure(&local, comm->rank), &ret->failures, &ret->err);
    if (ret->rc != 0) {
        return;
    }
    if (request->between != NULL) {
        request->between(request->between_arg);
    }
    ret->read_code =
        dcp_load_read(load, &world->plan, NULL, NULL, on_record, world, &stats, &local.err);
    local.failed = ret->read_code != 0;
    if (!local.failed && request->fail_before[2]) {
        raise_here(&local, "the status of reading");
    }
    ret->rc = dcp_load_status(load, as_failure(&local, comm->rank), &ret->failures, &ret->err);
    if (ret->read_code == 0) {
        ret->generation = find_generation(world);
    }
}

void
load_once(struct dcp_group *group, const struct dcp_io *io, const struct load_request *request,
          struct load_result *ret)
{
    const struct dcp_comm *comm = dcp_group_comm(group);
    struct dcp_load_params params = {.io = io,
                                     .dir_path = request->dir == NULL ? SAVE_DIR : request->dir,
                                     .call_hash = 78,
                                     .rank = comm->rank,
                                     .verify = true,
                                     .direct = DCP_DIRECT_OFF};
    struct load_world world = {.fits = UINT32_MAX};
    struct dcp_load *load = NULL;

    *ret = (struct load_result){0};
    dcp_error_clear(&ret->err);
    must(dcp_load_new(group, &params, &load, &ret->err) == 0, ret->err.message);
    run_load(load, &world, comm, request, ret);
    dcp_load_destroy(load);
    dcp_read_plan_clean_up(&world.plan);
    for (size_t i = 0; i < world.items_count; i++) {
        dcp_free(world.items[i].bytes);
    }
    dcp_free(world.items);
}

void
load_result_clean_up(struct load_result *result)
{
    dcp_failure_list_clean_up(&result->failures);
}

int
save_world_generation(struct io_memory *fs, uint32_t saved_size)
{
    return save_world_generation_of(fs, SAVE_DIR, saved_size);
}

int
save_world_generation_of(struct io_memory *fs, const char *dir, uint32_t saved_size)
{
    struct load_request request = {
        .dir = dir, .saved_size = saved_size, .without_state_of = UINT32_MAX};
    struct dcp_group *group = NULL;
    struct dcp_error err = {0};
    struct load_result result;
    struct dcp_comm comm;
    int generation;

    dcp_comm_local(&comm);
    must(dcp_group_new(&comm, 0, &group, &err) == 0, err.message);
    load_once(group, &io_memory_process(fs, 1)->io, &request, &result);
    generation = result.rc == 0 ? result.generation : 0;
    if (result.failures.count > 0) {
        const struct dcp_error *why = (const struct dcp_error *)result.failures.items[0].bytes;
        fprintf(stderr, "save_world: the checkpoint does not load: %s\n", why->message);
    }
    load_result_clean_up(&result);
    dcp_group_destroy(group);
    return generation;
}

bool
failure_lists_equal(const struct dcp_failure_list *a, const struct dcp_failure_list *b)
{
    bool equal = a->count == b->count;

    for (size_t i = 0; equal && i < a->count; i++) {
        equal = a->items[i].rank == b->items[i].rank && a->items[i].kind == b->items[i].kind &&
                a->items[i].len == b->items[i].len &&
                memcmp(a->items[i].bytes, b->items[i].bytes, a->items[i].len) == 0;
    }
    return equal;
}

/*
 * upload_world.c: background saves of simulated ranks, step by step.
 */
#include "upload_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PATIENCE_S = 60 };

static void
must(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "upload_world: %s\n", what);
        exit(1);
    }
}

/* Of a cond on CLOCK_REALTIME. */
static bool
wait_ms(pthread_cond_t *cond, pthread_mutex_t *lock, unsigned ms)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)ms * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    return pthread_cond_timedwait(cond, lock, &until) == 0;
}

/* ---- gates ---- */

void
gate_init(struct gate *gate)
{
    *gate = (struct gate){.nth = 0};
    pthread_mutex_init(&gate->lock, NULL);
    pthread_cond_init(&gate->changed, NULL);
}

void
gate_close(struct gate *gate, uint32_t nth, int io_call)
{
    pthread_mutex_lock(&gate->lock);
    gate->nth = nth;
    gate->io_call = io_call;
    gate->calls = 0;
    gate->reached = false;
    pthread_mutex_unlock(&gate->lock);
}

void
gate_open(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->nth = 0;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

bool
gate_wait(struct gate *gate, bool (*ended)(void *arg), void *arg)
{
    bool reached = false;

    for (unsigned i = 0; !reached; i++) {
        must(i < PATIENCE_S * 200, "nobody comes to a gate");
        if (ended != NULL && ended(arg)) {
            return false;
        }
        pthread_mutex_lock(&gate->lock);
        if (!gate->reached) {
            (void)wait_ms(&gate->changed, &gate->lock, 5);
        }
        reached = gate->reached;
        pthread_mutex_unlock(&gate->lock);
    }
    return true;
}

static void
gate_pass(struct gate *gate, int io_call)
{
    pthread_mutex_lock(&gate->lock);
    if (gate->nth != 0 && (gate->io_call == IO_CALLS || gate->io_call == io_call) &&
        ++gate->calls == gate->nth) {
        gate->reached = true;
        pthread_cond_broadcast(&gate->changed);
        while (gate->nth != 0) {
            pthread_cond_wait(&gate->changed, &gate->lock);
        }
    }
    pthread_mutex_unlock(&gate->lock);
}

static void
before_io(struct io_memory_process *process, enum io_call call, const char *name)
{
    (void)name;
    gate_pass(process->hook_ctx, (int)call);
}

static enum store_fault
before_store(void *ctx, uint32_t client, bool behind)
{
    struct upload_world *world = ctx;

    if (!behind) {
        gate_pass(&world->ranks[client / 2].store, IO_CALLS);
    }
    return STORE_WORKS;
}

/* ---- the world ---- */

void
upload_world_init(struct upload_world *world, uint32_t size)
{
    *world = (struct upload_world){.size = size, .coordinator = size / 2};
    world->fs = io_memory_new(size);
    world->store = store_sim_new(2 * size, before_store, world);
    for (uint32_t r = 0; r < size; r++) {
        struct io_memory_process *process = io_memory_process(world->fs, r);
        gate_init(&world->ranks[r].io);
        gate_init(&world->ranks[r].store);
        process->before = before_io;
        process->hook_ctx = &world->ranks[r].io;
        io_faults_init(&world->ranks[r].faults, &process->io);
    }
}

void
upload_world_end(struct upload_world *world)
{
    must(io_memory_open_files(world->fs) == 0, "files are open");
    for (size_t i = 0; i < store_sim_keys(world->store); i++) {
        fprintf(stderr, "upload_world: %s is left\n", store_sim_key(world->store, i));
    }
    store_sim_destroy(world->store);
    io_memory_free(world->fs);
    dcp_engine_trim();
    dcp_arena_trim();
    must(dcp_arena_total_bytes() == 0, "an arena was not given back");
}

const struct dcp_io *
upload_world_io(struct upload_world *world, uint32_t rank)
{
    return &world->ranks[rank].faults.io;
}

void
upload_world_memory(struct dcp_group *group, uint64_t nth)
{
    const struct dcp_comm *comm = dcp_group_comm(group);
    struct dcp_error err = {0};
    int64_t lane = 0;

    must(comm->all_reduce_min(comm->ctx, &lane, 1, &err) == 0, err.message);
    if (comm->rank == 0) {
        dcp_alloc_fail_after(nth);
    }
    must(comm->all_reduce_min(comm->ctx, &lane, 1, &err) == 0, err.message);
}

/* ---- one upload ---- */

static void
on_notify(void *ctx)
{
    struct background *bg = ctx;

    pthread_mutex_lock(&bg->lock);
    bg->notified++;
    pthread_cond_broadcast(&bg->changed);
    pthread_mutex_unlock(&bg->lock);
}

static int
prepare_bytes(struct background *bg, const struct upload_request *request, struct dcp_error *err)
{
    const struct dcp_stage_params params = {.kind = DCP_ARENA_PRIVATE};
    int rc = 0;

    if (request->way == UPLOAD_STAGED) {
        rc = dcp_save_stage(bg->begun.save, bg->begun.sources, &params, err);
        if (rc == 0) {
            begun_save_free_sources(&bg->begun);
        }
    } else if (request->way == UPLOAD_BEGUN) {
        rc = dcp_save_stage_begin(bg->begun.save, bg->begun.sources, &params, err);
    } else if (request->way == UPLOAD_WRITTEN) {
        rc = dcp_save_write(bg->begun.save, bg->begun.sources, NULL, NULL, err);
    }
    return rc;
}

bool
background_begin(struct background *bg, struct upload_world *world, struct dcp_group *group,
                 const struct upload_request *request, struct upload_result *ret_result)
{
    uint32_t rank = dcp_group_comm(group)->rank;
    int rc;

    *bg = (struct background){.world = world, .rank = rank, .result = ret_result};
    *ret_result = (struct upload_result){0};
    pthread_mutex_init(&bg->lock, NULL);
    pthread_cond_init(&bg->changed, NULL);
    store_sim_client(world->store, rank * 2 + request->client, &bg->store);
    save_begin(group, upload_world_io(world, rank), &request->save, &bg->begun);
    ret_result->agreed = bg->begun.rc;
    if (bg->begun.rc != 0) {
        ret_result->rc = bg->begun.rc;
        ret_result->err = bg->begun.err;
        begun_save_end(&bg->begun);
        return false;
    }
    if (request->fail_allocation != 0) {
        upload_world_memory(group, request->fail_allocation);
    }
    dcp_error_clear(&bg->mine_err);
    rc = prepare_bytes(bg, request, &bg->mine_err);
    if (rc == 0 && request->fails_before) {
        rc = dcp_error_set(&bg->mine_err, DCP_E_INVALID, 0, NULL, "the caller failed before");
    }
    bg->mine = (struct dcp_failure){.rank = rank,
                                    .kind = DCP_FAILURE_CORE,
                                    .bytes = (uint8_t *)&bg->mine_err,
                                    .len = rc == 0 ? 0 : sizeof bg->mine_err};
    return true;
}

void
background_start(struct background *bg, struct dcp_group *group,
                 const struct upload_request *request)
{
    struct dcp_error err = {0};
    char prefix[32];
    struct dcp_upload_params params = {
        .save = bg->begun.save,
        .staged = request->way == UPLOAD_STAGED || request->way == UPLOAD_BEGUN,
        .staging = request->way == UPLOAD_BEGUN,
        .written = request->way == UPLOAD_WRITTEN,
        .sources = bg->begun.sources,
        .mine = bg->mine.len > 0 ? &bg->mine : NULL,
        .store = bg->world->size > 1 ? &bg->store : NULL,
        .prefix = prefix,
        .rank = bg->rank,
        .size = bg->world->size,
        .coordinator = bg->world->coordinator,
        .independent = request->save.independent,
        .peers = dcp_group_peers(group),
        .shm = dcp_group_peers(group) == NULL ? NULL : dcp_shm_posix(),
        .timeout_ns =
            request->timeout_ns != 0 ? request->timeout_ns : UINT64_C(1000000000) * PATIENCE_S,
        .host_timeout_ns = UINT64_C(1000000000) * PATIENCE_S,
        .notify = on_notify,
        .notify_ctx = bg,
    };

    snprintf(prefix, sizeof prefix, "dcp_native/%d/", request->save.generation);
    bg->result->rc = dcp_upload_start(&params, &bg->upload, &err);
    bg->result->err = err;
    memset(prefix, 'x', sizeof prefix - 1); /* it was copied */
}

void
background_await(struct background *bg, enum dcp_upload_state state)
{
    for (unsigned i = 0; dcp_upload_state(bg->upload) < state; i++) {
        must(i < PATIENCE_S * 20, "an upload does not end");
        pthread_mutex_lock(&bg->lock);
        (void)wait_ms(&bg->changed, &bg->lock, 50);
        pthread_mutex_unlock(&bg->lock);
    }
}

void
background_look(struct background *bg)
{
    struct upload_result *result = bg->result;
    const struct dcp_failure_list *failures = NULL;

    dcp_error_clear(&result->err);
    result->rc = dcp_upload_result(bg->upload, &failures, &result->err);
    if (failures->count > 0) {
        must(dcp_failure_list_copy(failures, &result->failures) == 0, "no memory for failures");
    }
    dcp_save_get_info(bg->begun.save, &result->info);
    result->info.metadata = (struct dcp_span){0};
    result->outcome = result->info.outcome;
}

void
background_end(struct background *bg)
{
    struct upload_result *result = bg->result;

    if (bg->upload != NULL) {
        struct dcp_upload_stats stats;
        struct dcp_error err;
        background_await(bg, DCP_UPLOAD_ENDED);
        if (result->failures.count == 0 && result->rc == 0) {
            background_look(bg);
        }
        dcp_upload_get_stats(bg->upload, &stats);
        must(!stats.writing, "a writer is at work behind the end");
        must(dcp_upload_staged(bg->upload, &result->staged, &err),
             "sources are read behind the end");
        result->store_calls = stats.store_calls;
        dcp_upload_destroy(bg->upload);
    }
    pthread_mutex_lock(&bg->lock);
    result->notified = bg->notified;
    pthread_mutex_unlock(&bg->lock);
    begun_save_end(&bg->begun);
    pthread_mutex_destroy(&bg->lock); /* and with it what a late call would use */
    pthread_cond_destroy(&bg->changed);
}

void
upload_result_clean_up(struct upload_result *result)
{
    dcp_failure_list_clean_up(&result->failures);
}

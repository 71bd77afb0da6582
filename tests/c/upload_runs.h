/*
 * upload_runs.h: generation 1 is saved, then generation 2 in the background with one thing going
 * wrong on one rank; and what must hold then.
 *
 * Functions, not an object of its own: CHECK counts per test program.
 */
#ifndef UPLOAD_RUNS_H
#define UPLOAD_RUNS_H

#include <errno.h>

#include "ctest.h"
#include "sim_ranks.h"
#include "upload_world.h"

enum { TIMEOUT_MS = 60000, MOST_CALLS = 300, MOST_FAILURES = 20 };

struct run {
    uint32_t size;
    struct upload_request request;
    bool meets;
    uint32_t victim;
    uint64_t victim_timeout_ns; /* 0: as the others */
    bool victim_fails_before;
    uint32_t other_fails; /* 1 + a rank that fails when the victim stands still; 0: none */
    /* The allocation of this number fails and all later ones, on all ranks, which share a heap:
     * while they stage, or, of one rank, until it has ended; 0: none. */
    uint64_t fail_allocation;
    enum fault_mode mode; /* of the system calls of the victim, from the start of its upload on */
    uint32_t nth;
    int sys_errno;
    struct gate_at {
        uint32_t nth;
        int io_call;
    } io, store; /* gates of the victim, from the start of its upload on */
    /* On the victim's thread, when its upload has been started; opens the gates. */
    void (*act)(struct run *run, struct background *bg);
    /* Filled by the run. */
    struct upload_world world;
    bool hit; /* the fault, or what `act` wanted */
    _Atomic uint32_t settled_count;
    struct save_result first[UPLOAD_MOST_RANKS];
    struct upload_result results[UPLOAD_MOST_RANKS];
};

static void
upload_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct run *run = arg;
    struct upload_world *world = &run->world;
    struct dcp_group *group = save_world_group(comm, world->coordinator);
    struct upload_request request = run->request;
    struct save_request first = {.generation = 1,
                                 .split_bytes = run->request.save.split_bytes,
                                 .independent = run->request.save.independent};
    bool is_victim = comm->rank == run->victim;
    struct background bg;
    struct dcp_error err = {0};
    (void)sim;

    if (run->meets && dcp_group_meet(group, dcp_shm_posix(), &err) != 0) {
        exit(3);
    }
    save_once(group, upload_world_io(world, comm->rank), &first, &run->first[comm->rank]);
    request.fails_before =
        (is_victim && run->victim_fails_before) || comm->rank + 1 == run->other_fails;
    request.fail_allocation = run->fail_allocation;
    if (is_victim && run->victim_timeout_ns != 0) {
        request.timeout_ns = run->victim_timeout_ns;
    }
    if (background_begin(&bg, world, group, &request, &run->results[comm->rank])) {
        if (is_victim) {
            io_faults_arm(&world->ranks[comm->rank].faults, run->mode, run->nth, run->sys_errno);
            gate_close(&world->ranks[comm->rank].io, run->io.nth, run->io.io_call);
            gate_close(&world->ranks[comm->rank].store, run->store.nth, IO_CALLS);
        }
        if (run->fail_allocation != 0 && run->size > 1) {
            upload_world_memory(group, 0);
        }
        if (comm->rank + 1 == run->other_fails) {
            (void)gate_wait(&world->ranks[run->victim].io, NULL, NULL);
        }
        background_start(&bg, group, &request);
        if (is_victim && run->act != NULL) {
            run->act(run, &bg);
        }
        if (bg.upload != NULL) {
            background_await(&bg, DCP_UPLOAD_SETTLED);
            atomic_fetch_add(&run->settled_count, 1);
        }
        if (run->fail_allocation != 0 && run->size == 1) {
            if (bg.upload != NULL) {
                background_await(&bg, DCP_UPLOAD_ENDED);
            }
            upload_world_memory(group, 0);
        }
        if (bg.upload != NULL) {
            background_look(&bg);
        }
        background_end(&bg);
    }
    dcp_group_destroy(group);
}

static void
run_uploads(struct run *run)
{
    upload_world_init(&run->world, run->size);
    atomic_store(&run->settled_count, 0);
    sim_ranks_run(run->size, TIMEOUT_MS, upload_rank, run);
    run->hit = run->hit || atomic_load(&run->world.ranks[run->victim].faults.hit);
    for (uint32_t r = 0; r < run->size; r++) {
        CHECK_OK(run->first[r].rc, &run->first[r].err);
        CHECK_EQ(run->results[r].agreed, 0);
        uint32_t notified = run->results[r].notified;
        bool staged = notified == 3 && run->request.way == UPLOAD_BEGUN;
        CHECK(notified == 2 || staged || run->fail_allocation != 0);
    }
}

static void
end_run(struct run *run)
{
    CHECK_EQ(store_sim_keys(run->world.store), 0);
    for (uint32_t r = 0; r < run->size; r++) {
        save_result_clean_up(&run->first[r]);
        upload_result_clean_up(&run->results[r]);
    }
    upload_world_end(&run->world);
    run->hit = false;
}

static void
describe(const struct run *run)
{
    fprintf(stderr, "failed: %u ranks, way %d, victim %u, mode %d call %u errno %d, gates %u %u\n",
            run->size, run->request.way, run->victim, run->mode, run->nth, run->sys_errno,
            run->io.nth, run->store.nth);
    for (uint32_t r = 0; r < run->size; r++) {
        const struct upload_result *result = &run->results[r];
        fprintf(stderr, "  rank %u: %s, outcome %d: %s\n", r, dcp_code_name(result->rc),
                result->outcome, result->err.message);
        for (size_t i = 0; i < result->failures.count; i++) {
            fprintf(stderr, "    rank %u failed: %s\n", result->failures.items[i].rank,
                    ((struct dcp_error *)result->failures.items[i].bytes)->message);
        }
    }
    for (size_t i = 0; i < io_memory_names_count(run->world.fs, SAVE_DIR); i++) {
        fprintf(stderr, "  %s\n", io_memory_name(run->world.fs, SAVE_DIR, i));
    }
}

static void
check_committed(struct run *run)
{
    for (uint32_t r = 0; r < run->size; r++) {
        CHECK_OK(run->results[r].rc, &run->results[r].err);
        CHECK_EQ(run->results[r].outcome, DCP_OUTCOME_COMMITTED);
    }
    CHECK_EQ(save_world_generation(run->world.fs, run->size), run->request.save.generation);
    CHECK_EQ(io_memory_names_count(run->world.fs, SAVE_DIR), run->size + 1);
}

/* All ranks name the victim alone; `code`: why, 0: any reason. */
static void
check_blamed(struct run *run, int code)
{
    for (uint32_t r = 0; r < run->size; r++) {
        const struct upload_result *result = &run->results[r];
        CHECK_EQ(result->rc, DCP_E_PEER);
        CHECK_EQ(result->failures.count, 1);
        if (result->failures.count == 1) {
            const struct dcp_error *why = (struct dcp_error *)result->failures.items[0].bytes;
            CHECK_EQ(result->failures.items[0].rank, run->victim);
            CHECK(code == 0 || why->code == code);
        }
    }
}

/* The old checkpoint is there, and nothing else. */
static void
check_undone(struct run *run)
{
    CHECK_EQ(save_world_generation(run->world.fs, run->size), 1);
    CHECK_EQ(io_memory_names_count(run->world.fs, SAVE_DIR), run->size + 1);
}

static struct run
make_run(uint32_t size, uint32_t victim)
{
    return (struct run){
        .size = size,
        .victim = victim,
        .request = {.save = {.generation = 2, .split_bytes = 1}},
    };
}

#endif

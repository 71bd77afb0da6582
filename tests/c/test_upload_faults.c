/*
 * test_upload_faults.c: background saves in which a disk fails, a device or the store stands still,
 * or memory ends.
 */
#include <time.h>

#include "upload_runs.h"

enum { RANKS = 3, COORDINATOR = 1 };

/* ---- the disk ---- */

/* One call of the victim failed, or none was left to fail. */
static void
check_io_fault(struct run *run)
{
    const struct upload_result *told = &run->results[COORDINATOR];

    for (uint32_t r = 0; r < run->size; r++) {
        CHECK_EQ(run->results[r].rc, told->rc);
        CHECK(failure_lists_equal(&run->results[r].failures, &told->failures));
        CHECK_EQ(run->results[r].outcome, told->outcome);
    }
    if (told->rc == 0) { /* a sweep that fails leaves files, and loses nothing */
        CHECK_EQ(told->outcome, DCP_OUTCOME_COMMITTED);
        CHECK_EQ(save_world_generation(run->world.fs, run->size), 2);
        if (!run->hit) {
            check_committed(run);
        }
        return;
    }
    check_blamed(run, 0);
    if (told->outcome == DCP_OUTCOME_ABORTED) {
        CHECK_EQ(save_world_generation(run->world.fs, run->size), 1);
        /* A file whose creation is not known of is swept by the next save. */
        CHECK(run->mode != FAULT_BEFORE ||
              io_memory_names_count(run->world.fs, SAVE_DIR) == run->size + 1);
    } else {
        int generation = save_world_generation(run->world.fs, run->size);
        CHECK(generation == 1 || generation == 2);
        CHECK(generation == 2 || told->outcome != DCP_OUTCOME_COMMITTED);
    }
}

static void
fail_each_call(enum upload_way way, enum fault_mode mode, int sys_errno)
{
    unsigned failed = 0;

    for (uint32_t victim = 0; victim < RANKS; victim++) {
        for (uint32_t nth = 1; nth < MOST_CALLS && ctest_failures < MOST_FAILURES; nth++) {
            struct run run = make_run(RANKS, victim);
            int before = ctest_failures;
            bool hit;
            run.request.way = way;
            run.mode = mode;
            run.nth = nth;
            run.sys_errno = sys_errno;
            run_uploads(&run);
            check_io_fault(&run);
            if (ctest_failures != before) {
                describe(&run);
            }
            failed += run.results[0].rc != 0;
            hit = run.hit;
            end_run(&run);
            if (!hit) {
                break;
            }
        }
    }
    CHECK(failed >= RANKS * 3);
}

static void
a_disk_that_fails_once_fails_all_ranks_and_leaves_nothing(void)
{
    fail_each_call(UPLOAD_STAGED, FAULT_BEFORE, EIO);
    fail_each_call(UPLOAD_STAGED, FAULT_AFTER, EIO);
    fail_each_call(UPLOAD_BORROWED, FAULT_BEFORE, ENOSPC);
}

static void
a_disk_that_stays_broken_leaves_the_old_checkpoint(void)
{
    fail_each_call(UPLOAD_STAGED, FAULT_FOR_EVER, ENOSPC);
}

/* ---- what stands still ---- */

#define SHORT_NS UINT64_C(600000000)

static bool
is_settled(void *arg)
{
    struct background *bg = arg;

    return dcp_upload_state(bg->upload) != DCP_UPLOAD_RUNNING;
}

static void
await_others(struct run *run)
{
    const struct timespec pause = {.tv_nsec = 5000000};

    while (atomic_load(&run->settled_count) < run->size - 1) {
        nanosleep(&pause, NULL);
    }
}

static enum dcp_upload_state state_expired;
static int rc_expired;

/* It is given up while a thread of it stands still, which goes on at once, or, when all have the
 * same time, when the others have ended. */
static void
expire_at_gate(struct run *run, struct background *bg)
{
    struct upload_rank *rank = &run->world.ranks[bg->rank];
    struct gate *gate = run->io.nth != 0 ? &rank->io : &rank->store;
    const struct dcp_failure_list *failures = NULL;
    struct dcp_error err = {0};

    run->hit = gate_wait(gate, is_settled, bg);
    if (run->hit) {
        dcp_upload_expire(bg->upload);
        state_expired = dcp_upload_state(bg->upload);
        rc_expired = dcp_upload_result(bg->upload, &failures, &err);
        dcp_upload_destroy(bg->upload); /* of one that has not ended nothing is freed */
        dcp_upload_expire(bg->upload);
        if (run->victim_timeout_ns == 0) {
            await_others(run);
        }
    }
    gate_open(gate);
}

static void
check_expired(struct run *run, bool writing)
{
    int generation = save_world_generation(run->world.fs, RANKS);

    CHECK_EQ(state_expired, DCP_UPLOAD_SETTLED);
    CHECK_EQ(rc_expired, DCP_E_TIMEOUT);
    CHECK_EQ(run->results[run->victim].rc, DCP_E_TIMEOUT);
    CHECK(generation == 1 || !writing);
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK(run->results[r].rc != 0 || generation == 2);
        CHECK(run->results[r].outcome != DCP_OUTCOME_COMMITTED || generation == 2);
        CHECK(run->results[r].outcome != DCP_OUTCOME_ABORTED || generation == 1);
    }
}

static unsigned
count_files_of(struct run *run, uint32_t rank)
{
    unsigned count = 0;
    char start[16];

    snprintf(start, sizeof start, "__%u_", rank);
    for (size_t i = 0; i < io_memory_names_count(run->world.fs, SAVE_DIR); i++) {
        count += strncmp(io_memory_name(run->world.fs, SAVE_DIR, i), start, strlen(start)) == 0;
    }
    return count;
}

static void
a_frozen_store_keeps_nobody_waiting(void)
{
    for (uint32_t victim = 0; victim < 2; victim++) {
        for (uint32_t nth = 1; nth < MOST_CALLS && ctest_failures < MOST_FAILURES; nth++) {
            struct run run = make_run(RANKS, victim);
            int before = ctest_failures;
            bool hit;
            /* Others that had given up would have the coordinator wait for their leave. */
            *(victim == COORDINATOR || nth % 2 == 0 ? &run.victim_timeout_ns
                                                    : &run.request.timeout_ns) = SHORT_NS;
            run.store = (struct gate_at){nth, IO_CALLS};
            run.act = expire_at_gate;
            state_expired = DCP_UPLOAD_RUNNING;
            run_uploads(&run);
            hit = run.hit && state_expired == DCP_UPLOAD_SETTLED && rc_expired == DCP_E_TIMEOUT;
            if (hit) {
                check_expired(&run, false);
                if (victim == COORDINATOR && run.results[victim].outcome == DCP_OUTCOME_ABORTED) {
                    CHECK_EQ(count_files_of(&run, victim), 1); /* it undid its own */
                }
            } else {
                CHECK_EQ(save_world_generation(run.world.fs, RANKS), 2);
            }
            if (ctest_failures != before) {
                describe(&run);
            }
            end_run(&run);
            if (!hit) {
                CHECK(nth > 2);
                break;
            }
        }
    }
}

static void
a_frozen_device_keeps_nobody_waiting(void)
{
    static const int calls[] = {IO_OPEN_AT, IO_PWRITE, IO_CLOSE};

    for (uint32_t victim = 0; victim < 2; victim++) {
        for (size_t c = 0; c < sizeof calls / sizeof calls[0]; c++) {
            struct run run = make_run(RANKS, victim);
            int before = ctest_failures;
            run.request.timeout_ns = SHORT_NS;
            run.io = (struct gate_at){1, calls[c]};
            run.act = expire_at_gate;
            run_uploads(&run);
            CHECK(run.hit);
            check_expired(&run, true);
            if (victim == COORDINATOR) {
                /* The claim is settled at once, and the files are the late writer's to remove. */
                CHECK_EQ(run.results[victim].outcome, DCP_OUTCOME_ABORTED);
                CHECK_EQ(count_files_of(&run, victim), 1);
            }
            if (ctest_failures != before) {
                describe(&run);
            }
            end_run(&run);
        }
    }
}

/* The rename hangs: the owner hears that it is late, and what became of it stands in the end. */
static void
a_commit_that_hangs_is_left_to_itself(void)
{
    struct run run = make_run(RANKS, COORDINATOR);

    run.victim_timeout_ns = SHORT_NS;
    run.io = (struct gate_at){1, IO_RENAME_AT};
    run.act = expire_at_gate;
    run_uploads(&run);
    CHECK(run.hit);
    CHECK_EQ(state_expired, DCP_UPLOAD_SETTLED);
    CHECK_EQ(rc_expired, DCP_E_TIMEOUT);
    CHECK_EQ(save_world_generation(run.world.fs, RANKS), 2);
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_EQ(run.results[r].rc, r == COORDINATOR ? DCP_E_TIMEOUT : 0);
    }
    end_run(&run);
}

static uint32_t settled_before, files_before;

/* The victim's writer comes back when its own rank has long given it up. */
static void
wait_out_the_grace(struct run *run, struct background *bg)
{
    struct gate *gate = &run->world.ranks[bg->rank].io;

    run->hit = gate_wait(gate, is_settled, bg);
    await_others(run);
    settled_before = atomic_load(&run->settled_count);
    background_await(bg, DCP_UPLOAD_SETTLED);
    files_before = count_files_of(run, bg->rank);
    gate_open(gate);
}

static void
a_writer_that_comes_back_late_removes_its_files(void)
{
    struct run run = make_run(RANKS, 2);

    run.io = (struct gate_at){1, IO_PWRITE};
    run.act = wait_out_the_grace;
    run.other_fails = 1;
    run_uploads(&run);
    CHECK(run.hit);
    CHECK_EQ(settled_before, RANKS - 1);
    CHECK_EQ(files_before, 2); /* the old one's, and the one that is being written */
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_EQ(run.results[r].rc, DCP_E_PEER);
        CHECK_EQ(run.results[r].outcome, DCP_OUTCOME_ABORTED);
    }
    check_undone(&run);
    end_run(&run);
}

/* ---- memory ---- */

static void
fail_each_allocation(uint32_t size)
{
    bool all_ok = false;
    unsigned failed = 0;

    for (uint64_t nth = 1; !all_ok && ctest_failures < MOST_FAILURES; nth++) {
        struct run run = make_run(size, 0);
        int before = ctest_failures, generation;
        run.fail_allocation = nth;
        run_uploads(&run);
        generation = save_world_generation(run.world.fs, size);
        all_ok = true;
        for (uint32_t r = 0; r < size; r++) {
            CHECK_EQ(run.results[r].rc == 0, generation == 2);
            all_ok = all_ok && run.results[r].rc == 0;
        }
        if (!all_ok) {
            check_undone(&run);
        }
        failed += !all_ok;
        if (ctest_failures != before) {
            describe(&run);
        }
        end_run(&run);
    }
    CHECK(failed > 4);
}

static void
without_memory_to_stage_all_ranks_fail(void)
{
    fail_each_allocation(RANKS);
}

static void
without_memory_to_write_or_to_say_why_a_save_ends(void)
{
    fail_each_allocation(1);
}

CTEST_MAIN(RUN(a_disk_that_fails_once_fails_all_ranks_and_leaves_nothing);
           RUN(a_disk_that_stays_broken_leaves_the_old_checkpoint);
           RUN(a_frozen_store_keeps_nobody_waiting); RUN(a_frozen_device_keeps_nobody_waiting);
           RUN(a_commit_that_hangs_is_left_to_itself);
           RUN(a_writer_that_comes_back_late_removes_its_files);
           RUN(without_memory_to_stage_all_ranks_fail);
           RUN(without_memory_to_write_or_to_say_why_a_save_ends);)

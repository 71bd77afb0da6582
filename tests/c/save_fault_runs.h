/*
 * save_fault_runs.h: one thing goes wrong in one call of one rank, and what must hold then.
 *
 * Each case saves generation 1, saves the second generation with the fault, and looks at what is
 * there: the new checkpoint whole if any rank was told so, else the old or the new one whole,
 * nothing in between; and the base of an incremental save as it was.  After that a new group of
 * healthy ranks must be able to save generation 3 and to leave nothing else behind.  Replicas are
 * cut in generations 1 and 2.
 *
 * Functions, not an object of its own: CHECK counts per test program.
 */
#ifndef SAVE_FAULT_RUNS_H
#define SAVE_FAULT_RUNS_H

#include <errno.h>

#include "ctest.h"
#include "save_faults.h"
#include "save_world.h"
#include "sim_ranks.h"

enum { RANKS = 3, COORDINATOR = 1, TIMEOUT_MS = 20000, SHORT_TIMEOUT_MS = 150 };

/* Collectives of one rank in a save that goes well; SHARE_CALLS come last.  COMPARE_CALLS: 3 of a
 * broadcast, 4 of a gather, the settlement. */
enum { SLOW_CALLS = 11, FAST_CALLS = 3, SHARE_CALLS = 3, COMPARE_CALLS = 3 + 4 + 1 };

/* Where the caller's own failure comes from. */
enum raise_at { RAISE_NEVER, RAISE_BEFORE_AGREE, RAISE_BEFORE_COMPARE, RAISE_BEFORE_FINISH };

/* How the second save comes by its plan.  A changed plan is gathered without the names, which the
 * coordinator has of all ranks; after a forgotten one they are sent. */
enum planning { PLAN_REUSED, PLAN_FORGOTTEN, PLAN_CHANGED, PLANNINGS };

struct fault {
    enum fault_mode mode;
    uint32_t nth, victim;
    int sys_errno; /* of system calls */
};

struct fault_case {
    struct fault comm, io;
    bool comm_spares_victim; /* the others lose the reply, and the victim alone hears it */
    enum raise_at raise_at;
    uint32_t raises; /* rank */
    /* 1 is the next; 0: none */
    uint64_t fail_allocation_of_agree, fail_allocation_of_compare, fail_allocation_of_write;
    const char *base; /* the second save is incremental to it; generation 1 is saved there first */
    enum dcp_link_mode link_mode;
    enum planning planning;
    bool stays; /* a rank that lost its connection lives on: the others wait in vain */
    bool independent, shares;
    enum dcp_direct direct;
    /* filled by the run */
    struct io_memory *fs;
    const struct dcp_io *table;
    bool comm_hit[RANKS], io_hit[RANKS];
    struct save_result first[RANKS], second[RANKS];
};

static bool
memory_ends(const struct fault_case *fault)
{
    return fault->fail_allocation_of_agree != 0 || fault->fail_allocation_of_compare != 0 ||
           fault->fail_allocation_of_write != 0;
}

static bool
any(const bool hits[RANKS])
{
    return hits[0] || hits[1] || hits[2];
}

static int
second_generation(const struct fault_case *fault)
{
    return fault->base != NULL ? SAVE_PARTLY : 2;
}

static bool
has_base_elsewhere(const struct fault_case *fault)
{
    return fault->base != NULL && strcmp(fault->base, SAVE_DIR) != 0;
}

static void
arm(const struct fault_case *fault, uint32_t rank, struct comm_faults *comm, struct io_faults *io)
{
    if ((rank == fault->comm.victim) != fault->comm_spares_victim) {
        comm_faults_arm(comm, fault->comm.mode, fault->comm.nth);
    }
    if (rank == fault->io.victim) {
        io_faults_arm(io, fault->io.mode, fault->io.nth, fault->io.sys_errno);
    }
}

static void
save_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct fault_case *fault = arg;
    uint32_t rank = comm->rank;
    struct comm_faults comm_faults;
    struct io_faults io_faults;
    struct dcp_comm table;
    struct dcp_group *group;
    struct save_request request = {.generation = 1,
                                   .direct = fault->direct,
                                   .split_bytes = 1,
                                   .independent = fault->independent,
                                   .share_metadata = fault->shares,
                                   .content_hash = fault->base != NULL,
                                   .link_mode = fault->link_mode};

    comm_faults_init(&comm_faults, sim, comm, &table);
    io_faults_init(&io_faults, fault->table);
    group = save_world_group(&table, COORDINATOR);
    if (has_base_elsewhere(fault)) {
        struct save_result based;
        request.dir = fault->base;
        save_once(group, &io_faults.io, &request, &based);
        CHECK_OK(based.rc, &based.err);
        save_result_clean_up(&based);
        request.dir = NULL;
    }
    save_once(group, &io_faults.io, &request, &fault->first[rank]);
    if (fault->planning == PLAN_FORGOTTEN) {
        dcp_group_forget_plan(group);
    }
    arm(fault, rank, &comm_faults, &io_faults);
    request.generation = second_generation(fault);
    request.base = fault->base;
    request.change = fault->planning == PLAN_CHANGED ? CHANGE_SALT : CHANGE_NONE;
    request.fail_before_compare = fault->raise_at == RAISE_BEFORE_COMPARE && rank == fault->raises;
    request.fail_allocation_of_compare = fault->fail_allocation_of_compare;
    request.fail_before_agree = fault->raise_at == RAISE_BEFORE_AGREE && rank == fault->raises;
    request.fail_before_finish = fault->raise_at == RAISE_BEFORE_FINISH && rank == fault->raises;
    request.fail_allocation_of_agree = fault->fail_allocation_of_agree;
    request.fail_allocation_of_write = fault->fail_allocation_of_write;
    save_once(group, &io_faults.io, &request, &fault->second[rank]);
    fault->comm_hit[rank] = comm_faults.failed;
    fault->io_hit[rank] = atomic_load(&io_faults.hit);
    /* Who lost its connection leaves.  Without memory all ranks must fail together: none leaves. */
    if (fault->second[rank].rc != 0 && fault->second[rank].rc != DCP_E_PEER && !fault->stays &&
        !memory_ends(fault)) {
        dcp_comm_sim_kill(sim, rank);
    }
    dcp_group_destroy(group);
}

struct healthy {
    const struct dcp_io *table;
    bool independent;
    struct save_result results[RANKS];
};

static void
save_healthy(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct healthy *healthy = arg;
    struct dcp_group *group = save_world_group(comm, COORDINATOR);
    struct save_request request = {
        .generation = 3, .direct = DCP_DIRECT_OFF, .independent = healthy->independent};
    (void)sim;

    save_once(group, healthy->table, &request, &healthy->results[comm->rank]);
    dcp_group_destroy(group);
}

/* ---- judging ---- */

static void
describe(const struct fault_case *fault)
{
    fprintf(
        stderr,
        "failed: comm mode %d call %u rank %u%s; io mode %d call %u rank %u errno %d; raise %d "
        "rank %u; planning %d%s%s%s; base %s; allocation %llu\n",
        fault->comm.mode, fault->comm.nth, fault->comm.victim,
        fault->comm_spares_victim ? " (others)" : "", fault->io.mode, fault->io.nth,
        fault->io.victim, fault->io.sys_errno, fault->raise_at, fault->raises, fault->planning,
        fault->stays ? ", stays" : "", fault->independent ? ", independent" : "",
        fault->direct == DCP_DIRECT_OFF ? "" : ", direct", fault->base == NULL ? "-" : fault->base,
        (unsigned long long)(fault->fail_allocation_of_agree + fault->fail_allocation_of_compare +
                             fault->fail_allocation_of_write));
    for (uint32_t r = 0; r < RANKS; r++) {
        const struct save_result *result = &fault->second[r];
        fprintf(stderr, "  rank %u: %s, outcome %d: %s\n", r, dcp_code_name(result->rc),
                result->info.outcome, result->err.message);
        for (size_t i = 0; i < result->failures.count; i++) {
            fprintf(stderr, "    rank %u failed: %s\n", result->failures.items[i].rank,
                    ((struct dcp_error *)result->failures.items[i].bytes)->message);
        }
    }
}

static bool
all_aborted(const struct fault_case *fault)
{
    bool aborted = true;

    for (uint32_t r = 0; r < RANKS; r++) {
        aborted = aborted && fault->second[r].info.outcome == DCP_OUTCOME_ABORTED;
    }
    return aborted;
}

/* What ranks were told fits what is on disk. */
static void
check_told(const struct fault_case *fault, int generation)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        const struct save_result *result = &fault->second[r];
        int second = second_generation(fault);
        CHECK(result->rc != 0 || generation == second);
        CHECK(result->info.outcome != DCP_OUTCOME_COMMITTED || generation == second);
        CHECK(result->info.outcome != DCP_OUTCOME_ABORTED || generation == 1);
        /* Without memory a rank knows that somebody failed, and no more. */
        CHECK(result->rc != DCP_E_PEER || result->failures.count > 0 || memory_ends(fault));
        CHECK(result->rc == DCP_E_PEER || result->failures.count == 0);
        CHECK(fault->stays || result->rc != DCP_E_TIMEOUT);
        /* Nobody is left in doubt where the coordinator knows and can tell. */
        CHECK(any(fault->comm_hit) || memory_ends(fault) ||
              fault->second[COORDINATOR].info.outcome == DCP_OUTCOME_UNKNOWN ||
              result->info.outcome == fault->second[COORDINATOR].info.outcome);
        /* What fails after the result fails nobody. */
        CHECK(!fault->shares || fault->comm.nth <= FAST_CALLS || result->rc == 0);
        CHECK(strstr(result->err.message, "where rank") == NULL); /* ranks in different calls */
    }
}

/* Ranks that were told by an exchange were all told the same, and only of ranks that failed. */
static void
check_lists(const struct fault_case *fault)
{
    const struct save_result *told = NULL;
    bool comm_failed = any(fault->comm_hit) || memory_ends(fault);

    for (uint32_t r = 0; r < RANKS; r++) {
        const struct save_result *result = &fault->second[r];
        CHECK(comm_failed || result->rc == 0 || result->rc == DCP_E_PEER);
        CHECK(comm_failed || result->rc == fault->second[0].rc);
        if (result->rc == DCP_E_PEER) {
            told = told == NULL ? result : told;
            CHECK(memory_ends(fault) || failure_lists_equal(&told->failures, &result->failures));
        }
    }
    for (size_t i = 0; told != NULL && i < told->failures.count; i++) {
        uint32_t rank = told->failures.items[i].rank;
        CHECK(memory_ends(fault) || fault->io_hit[rank] ||
              (fault->raise_at != RAISE_NEVER && rank == fault->raises));
    }
    CHECK(comm_failed || fault->raise_at == RAISE_NEVER || told != NULL);
}

static void
check_recovery(const struct fault_case *fault)
{
    struct healthy healthy = {.table = fault->table, .independent = fault->independent};

    sim_ranks_run(RANKS, TIMEOUT_MS, save_healthy, &healthy);
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_OK(healthy.results[r].rc, &healthy.results[r].err);
        save_result_clean_up(&healthy.results[r]);
    }
    CHECK_EQ(io_memory_names_count(fault->fs, SAVE_DIR),
             fault->independent ? 2 * RANKS : RANKS + 1);
    CHECK_EQ(io_memory_open_files(fault->fs), 0);
    if (!fault->independent) {
        CHECK_EQ(save_world_generation(fault->fs, RANKS), 3);
        if (has_base_elsewhere(fault)) {
            CHECK_EQ(save_world_generation_of(fault->fs, fault->base, RANKS), 1);
        }
    }
}

struct own_parts {
    const struct dcp_io *table;
    struct load_result results[RANKS];
};

static void
load_own_part(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct own_parts *parts = arg;
    struct dcp_group *group = save_world_group(comm, COORDINATOR);
    struct load_request request = {
        .saved_size = RANKS, .without_state_of = UINT32_MAX, .own_part = true};
    (void)sim;

    load_once(group, parts->table, &request, &parts->results[comm->rank]);
    dcp_group_destroy(group);
}

/* Of independent saves: what each rank finds is its own affair. */
static void
check_own_parts(const struct fault_case *fault)
{
    struct own_parts parts = {.table = fault->table};

    sim_ranks_run(RANKS, TIMEOUT_MS, load_own_part, &parts);
    for (uint32_t r = 0; r < RANKS; r++) {
        const struct save_result *saved = &fault->second[r];
        int generation = parts.results[r].generation;
        CHECK_OK(parts.results[r].rc, &parts.results[r].err);
        int second = second_generation(fault);
        CHECK(generation == 1 || generation == second);
        CHECK(saved->rc != 0 || generation == second);
        CHECK(saved->info.outcome != DCP_OUTCOME_COMMITTED || generation == second);
        CHECK(saved->info.outcome != DCP_OUTCOME_ABORTED || generation == 1);
        load_result_clean_up(&parts.results[r]);
    }
}

static void
judge(const struct fault_case *fault)
{
    if (fault->independent) {
        check_own_parts(fault);
    } else {
        int generation = save_world_generation(fault->fs, RANKS);
        CHECK(generation == 1 || generation == second_generation(fault));
        check_told(fault, generation);
        /* Where a disk works again after one failing call, an aborted save gives its space back. */
        if (fault->io.mode <= FAULT_BEFORE && !any(fault->comm_hit) && !memory_ends(fault) &&
            all_aborted(fault)) {
            CHECK_EQ(io_memory_names_count(fault->fs, SAVE_DIR), RANKS + 1);
        }
    }
    check_lists(fault);
    check_recovery(fault);
}

static void
run_case(struct fault_case *fault)
{
    int before = ctest_failures;
    bool first_ok = true;

    fault->fs = io_memory_new(fault->comm.nth + fault->io.nth);
    fault->table = &io_memory_process(fault->fs, 0)->io;
    sim_ranks_run(RANKS, fault->stays ? SHORT_TIMEOUT_MS : TIMEOUT_MS, save_rank, fault);
    dcp_alloc_fail_after(0);
    for (uint32_t r = 0; r < RANKS; r++) {
        first_ok = first_ok && fault->first[r].rc == 0;
    }
    CHECK(first_ok || fault->stays); /* a short deadline may pass on a busy machine */
    if (first_ok) {
        judge(fault);
    }
    if (ctest_failures != before) {
        describe(fault);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        save_result_clean_up(&fault->first[r]);
        save_result_clean_up(&fault->second[r]);
    }
    io_memory_free(fault->fs);
}

enum { MOST_CALLS = 500, MOST_FAILURES = 20 };

/* Fails every collective of every rank in turn, until the save is over before the fault comes.
 * Returns how many cases there were. */
static unsigned
fail_each_collective(const struct fault_case *like)
{
    unsigned cases = 0;

    for (uint32_t victim = 0; victim < RANKS; victim++) {
        for (uint32_t nth = 1; nth < MOST_CALLS && ctest_failures < MOST_FAILURES; nth++) {
            struct fault_case fault = *like;
            fault.comm.victim = victim;
            fault.comm.nth = nth;
            run_case(&fault);
            if (!any(fault.comm_hit)) {
                break;
            }
            cases++;
        }
    }
    dcp_engine_trim();
    return cases;
}

static unsigned
fail_each_system_call(const struct fault_case *like)
{
    unsigned cases = 0;

    for (uint32_t victim = 0; victim < RANKS; victim++) {
        for (uint32_t nth = 1; nth < MOST_CALLS && ctest_failures < MOST_FAILURES; nth++) {
            struct fault_case fault = *like;
            fault.io.victim = victim;
            fault.io.nth = nth;
            run_case(&fault);
            if (!any(fault.io_hit)) {
                break;
            }
            cases++;
        }
    }
    dcp_engine_trim();
    return cases;
}

/* *nth_of(case) counts allocations: the first fails, the second, ... until all ranks end well.
 * Returns how many times they did not. */
static unsigned
fail_each_allocation(const struct fault_case *like, uint64_t *(*nth_of)(struct fault_case *))
{
    unsigned failed = 0;
    bool all_ok = false;

    for (uint64_t nth = 1; !all_ok && ctest_failures < MOST_FAILURES; nth++) {
        struct fault_case fault = *like;
        *nth_of(&fault) = nth;
        run_case(&fault);
        all_ok = true;
        for (uint32_t r = 0; r < RANKS; r++) {
            all_ok = all_ok && fault.second[r].rc == 0;
        }
        failed += !all_ok;
    }
    dcp_engine_trim();
    return failed;
}

#endif

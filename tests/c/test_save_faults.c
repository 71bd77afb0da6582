/*
 * test_save_faults.c: one thing goes wrong in one call of one rank, whichever call and rank.
 */
#include "save_fault_runs.h"

static void
a_rank_that_dies_in_any_collective_leaves_one_whole_checkpoint(void)
{
    for (int p = 0; p < PLANNINGS; p++) {
        struct fault_case like = {
            .comm = {.mode = FAULT_BEFORE}, .planning = p, .direct = DCP_DIRECT_OFF};
        CHECK_EQ(fail_each_collective(&like), RANKS * (p != PLAN_REUSED ? SLOW_CALLS : FAST_CALLS));
    }
}

static void
a_lost_reply_of_any_collective_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 2 * PLANNINGS; i++) {
        struct fault_case like = {.comm = {.mode = FAULT_AFTER},
                                  .comm_spares_victim = i / PLANNINGS != 0,
                                  .planning = i % PLANNINGS,
                                  .direct = DCP_DIRECT_OFF};
        CHECK_EQ(fail_each_collective(&like),
                 RANKS * (like.planning != PLAN_REUSED ? SLOW_CALLS : FAST_CALLS));
    }
}

static void
a_committed_save_stays_good_when_the_metadata_cannot_be_shared(void)
{
    for (int mode = FAULT_BEFORE; mode <= FAULT_AFTER; mode++) {
        struct fault_case like = {
            .comm = {.mode = (enum fault_mode)mode}, .shares = true, .direct = DCP_DIRECT_OFF};
        CHECK_EQ(fail_each_collective(&like), RANKS * (FAST_CALLS + SHARE_CALLS));
    }
}

static void
a_rank_that_stays_away_is_waited_for_until_the_deadline_only(void)
{
    struct fault_case like = {
        .comm = {.mode = FAULT_AFTER}, .stays = true, .direct = DCP_DIRECT_OFF};
    (void)fail_each_collective(&like);
}

static void
a_failing_system_call_of_any_rank_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 4; i++) {
        struct fault_case like = {
            .io = {.mode = FAULT_BEFORE, .sys_errno = i / 2 == 0 ? EIO : ENOSPC},
            .planning = i % 2 != 0 ? PLAN_FORGOTTEN : PLAN_REUSED,
            .direct = i % 2 != 0 ? DCP_DIRECT_OFF : DCP_DIRECT_ON};
        CHECK(fail_each_system_call(&like) > 60);
    }
}

static void
a_system_call_whose_reply_is_lost_leaves_one_whole_checkpoint(void)
{
    struct fault_case like = {.io = {.mode = FAULT_AFTER, .sys_errno = EIO},
                              .direct = DCP_DIRECT_ON};
    CHECK(fail_each_system_call(&like) > 60);
}

static void
a_disk_that_fails_for_ever_leaves_one_whole_checkpoint(void)
{
    struct fault_case like = {.io = {.mode = FAULT_FOR_EVER, .sys_errno = EIO},
                              .direct = DCP_DIRECT_OFF};
    CHECK(fail_each_system_call(&like) > 60);
}

static void
a_caller_that_raises_on_any_rank_aborts_the_save_everywhere(void)
{
    for (int i = 0; i < 4 * RANKS; i++) {
        enum raise_at at = i % 2 == 0 ? RAISE_BEFORE_AGREE : RAISE_BEFORE_FINISH;
        struct fault_case fault = {.raise_at = at,
                                   .planning = i / 2 % 2 != 0 ? PLAN_CHANGED : PLAN_REUSED,
                                   .raises = (uint32_t)i / 4,
                                   .direct = DCP_DIRECT_OFF};
        run_case(&fault);
        CHECK(all_aborted(&fault));
    }
    dcp_engine_trim();
}

static void
a_caller_that_raises_in_an_independent_save_aborts_its_own_part_only(void)
{
    for (int i = 0; i < 2 * RANKS; i++) {
        enum raise_at at = i % 2 == 0 ? RAISE_BEFORE_AGREE : RAISE_BEFORE_FINISH;
        struct fault_case fault = {.raise_at = at,
                                   .raises = (uint32_t)i / 2,
                                   .independent = true,
                                   .direct = DCP_DIRECT_OFF};
        run_case(&fault);
        for (uint32_t r = 0; r < RANKS; r++) {
            CHECK_EQ(fault.second[r].rc, DCP_E_PEER);
            CHECK_EQ(fault.second[r].info.outcome,
                     r == fault.raises ? DCP_OUTCOME_ABORTED : DCP_OUTCOME_COMMITTED);
        }
    }
    dcp_engine_trim();
}

/* Every rank for itself: some fail before the others, in exchanges too. */
static uint64_t *
of_agree(struct fault_case *fault)
{
    return &fault->fail_allocation_of_agree;
}

static uint64_t *
of_write(struct fault_case *fault)
{
    return &fault->fail_allocation_of_write;
}

static void
running_out_of_memory_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 2 * PLANNINGS; i++) {
        struct fault_case like = {.planning = i % PLANNINGS, .direct = DCP_DIRECT_OFF};
        CHECK(fail_each_allocation(&like, i / PLANNINGS == 0 ? of_agree : of_write) > 10);
    }
}

/* The exchange of the failure fails too. */
static void
a_lost_reply_while_failures_are_told_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 12; i++) {
        struct fault_case like = {.comm = {.mode = i % 2 == 0 ? FAULT_BEFORE : FAULT_AFTER},
                                  .raise_at =
                                      i / 2 % 2 == 0 ? RAISE_BEFORE_AGREE : RAISE_BEFORE_FINISH,
                                  .raises = (uint32_t)i / 4,
                                  .direct = DCP_DIRECT_OFF};
        CHECK(fail_each_collective(&like) >= RANKS * (1 + 4));
    }
}

/* Among them: the commit fails on the coordinator, and one rank does not hear what became of it. */
static void
a_failing_coordinator_and_a_lost_reply_leave_one_whole_checkpoint(void)
{
    for (uint32_t nth = 1; nth < MOST_CALLS && ctest_failures < MOST_FAILURES; nth++) {
        struct fault_case like = {.io = {.mode = nth % 2 == 0 ? FAULT_BEFORE : FAULT_AFTER,
                                         .sys_errno = EIO,
                                         .victim = COORDINATOR,
                                         .nth = nth},
                                  .comm = {.mode = FAULT_AFTER},
                                  .direct = DCP_DIRECT_OFF};
        struct fault_case plain = like;
        plain.comm.mode = FAULT_NONE;
        run_case(&plain);
        if (!any(plain.io_hit)) {
            CHECK(nth > 20);
            break;
        }
        if (plain.second[0].rc != 0) {
            (void)fail_each_collective(&like);
        }
    }
    dcp_engine_trim();
}

static void
faults_of_independent_saves_stay_with_their_rank(void)
{
    for (int i = 0; i < 3; i++) {
        struct fault_case like = {
            .io = {.mode = (enum fault_mode)(FAULT_BEFORE + i), .sys_errno = EIO},
            .independent = true,
            .direct = DCP_DIRECT_OFF};
        CHECK(fail_each_system_call(&like) > 60);
    }
    struct fault_case like = {
        .comm = {.mode = FAULT_AFTER}, .independent = true, .direct = DCP_DIRECT_OFF};
    CHECK_EQ(fail_each_collective(&like), RANKS);
}

CTEST_MAIN(RUN(a_caller_that_raises_on_any_rank_aborts_the_save_everywhere);
           RUN(a_rank_that_dies_in_any_collective_leaves_one_whole_checkpoint);
           RUN(a_lost_reply_of_any_collective_leaves_one_whole_checkpoint);
           RUN(a_committed_save_stays_good_when_the_metadata_cannot_be_shared);
           RUN(a_rank_that_stays_away_is_waited_for_until_the_deadline_only);
           RUN(a_failing_system_call_of_any_rank_leaves_one_whole_checkpoint);
           RUN(a_system_call_whose_reply_is_lost_leaves_one_whole_checkpoint);
           RUN(a_disk_that_fails_for_ever_leaves_one_whole_checkpoint);
           RUN(a_lost_reply_while_failures_are_told_leaves_one_whole_checkpoint);
           RUN(a_failing_coordinator_and_a_lost_reply_leave_one_whole_checkpoint);
           RUN(a_caller_that_raises_in_an_independent_save_aborts_its_own_part_only);
           RUN(running_out_of_memory_leaves_one_whole_checkpoint);
           RUN(faults_of_independent_saves_stay_with_their_rank);)

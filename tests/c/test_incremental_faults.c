/*
 * test_incremental_faults.c: one thing goes wrong in a save with a base: the old checkpoint, the
 * new one and the base stay whole, no rank waits for another, and no link is left behind.
 */
#include "save_fault_runs.h"

static const char *const bases[] = {SAVE_DIR, "/base"};

static struct fault_case
like_of(int i)
{
    return (struct fault_case){.base = bases[i % 2],
                               .link_mode = i / 2 % 2 == 0 ? DCP_LINK_REFLINK : DCP_LINK_HARD,
                               .direct = DCP_DIRECT_OFF};
}

static void
a_rank_that_dies_in_any_collective_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 4; i++) {
        struct fault_case like = like_of(i);
        like.comm.mode = FAULT_BEFORE;
        CHECK_EQ(fail_each_collective(&like), RANKS * (FAST_CALLS + COMPARE_CALLS));
    }
}

static void
a_lost_reply_of_any_collective_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 4; i++) {
        struct fault_case like = like_of(i);
        like.comm.mode = FAULT_AFTER;
        like.comm_spares_victim = i / 2 != 0;
        CHECK_EQ(fail_each_collective(&like), RANKS * (FAST_CALLS + COMPARE_CALLS));
    }
}

static void
a_failing_system_call_of_any_rank_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 4; i++) {
        struct fault_case like = like_of(i);
        like.io.mode = FAULT_BEFORE;
        like.io.sys_errno = i / 2 == 0 ? EIO : ENOSPC;
        CHECK(fail_each_system_call(&like) > 100);
    }
}

static void
a_system_call_whose_reply_is_lost_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 4; i++) {
        struct fault_case like = like_of(i);
        like.io.mode = FAULT_AFTER;
        like.io.sys_errno = EIO;
        CHECK(fail_each_system_call(&like) > 100);
    }
}

static void
a_disk_that_fails_for_ever_leaves_one_whole_checkpoint(void)
{
    struct fault_case like = like_of(1);
    like.io.mode = FAULT_FOR_EVER;
    like.io.sys_errno = EIO;
    CHECK(fail_each_system_call(&like) > 100);
}

static void
a_caller_that_raises_on_any_rank_aborts_the_save_everywhere(void)
{
    for (int i = 0; i < 2 * RANKS; i++) {
        struct fault_case fault = like_of(i);
        fault.raise_at = i % 2 == 0 ? RAISE_BEFORE_COMPARE : RAISE_BEFORE_FINISH;
        fault.raises = (uint32_t)i / 2;
        run_case(&fault);
        CHECK(all_aborted(&fault));
    }
    dcp_engine_trim();
}

static void
a_lost_reply_while_failures_are_told_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 2 * RANKS; i++) {
        struct fault_case like = like_of(i);
        like.comm.mode = i % 2 == 0 ? FAULT_BEFORE : FAULT_AFTER;
        like.raise_at = RAISE_BEFORE_COMPARE;
        like.raises = (uint32_t)i / 2;
        /* A coordinator that raises has nothing to broadcast, and nobody anything to gather. */
        CHECK(fail_each_collective(&like) >= RANKS * (1 + 2 + 1 + 4));
    }
}

static uint64_t *
of_compare(struct fault_case *fault)
{
    return &fault->fail_allocation_of_compare;
}

static uint64_t *
of_write(struct fault_case *fault)
{
    return &fault->fail_allocation_of_write;
}

static void
running_out_of_memory_leaves_one_whole_checkpoint(void)
{
    for (int i = 0; i < 4; i++) {
        struct fault_case like = like_of(i);
        CHECK(fail_each_allocation(&like, i % 2 == 0 ? of_compare : of_write) > 10);
    }
}

static void
faults_of_independent_saves_stay_with_their_rank(void)
{
    for (int i = 0; i < 3; i++) {
        struct fault_case like = like_of(0);
        like.io.mode = (enum fault_mode)(FAULT_BEFORE + i);
        like.io.sys_errno = EIO;
        like.independent = true;
        CHECK(fail_each_system_call(&like) > 80);
    }
}

CTEST_MAIN(RUN(a_caller_that_raises_on_any_rank_aborts_the_save_everywhere);
           RUN(a_rank_that_dies_in_any_collective_leaves_one_whole_checkpoint);
           RUN(a_lost_reply_of_any_collective_leaves_one_whole_checkpoint);
           RUN(a_failing_system_call_of_any_rank_leaves_one_whole_checkpoint);
           RUN(a_system_call_whose_reply_is_lost_leaves_one_whole_checkpoint);
           RUN(a_disk_that_fails_for_ever_leaves_one_whole_checkpoint);
           RUN(a_lost_reply_while_failures_are_told_leaves_one_whole_checkpoint);
           RUN(running_out_of_memory_leaves_one_whole_checkpoint);
           RUN(faults_of_independent_saves_stay_with_their_rank);)

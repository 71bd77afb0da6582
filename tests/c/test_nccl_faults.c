/*
 * test_nccl_faults.c: the table of collectives over NCCL: an end of every call in time, whatever
 * becomes of ranks, communicators and devices.
 */
#include "nccl_ranks.h"

#include <signal.h>

/* A call that has to fail soon, and later ones that are refused without waiting. */
static void
check_fails(const struct dcp_comm *comm, int code, const char *text)
{
    struct dcp_error err;
    int64_t lane = 1;
    double start = now_s();
    dcp_error_clear(&err);
    int rc = comm->all_reduce_min(comm->ctx, &lane, 1, &err);
    CHECK(rc == code || (code == 0 && (rc == DCP_E_COMM || rc == DCP_E_TIMEOUT)));
    CHECK(strstr(err.message, text) != NULL);
    CHECK(now_s() - start < SOON_S);
    if (strstr(err.message, text) == NULL) {
        fprintf(stderr, "rc %d: %s\n", rc, err.message);
    }
    start = now_s();
    dcp_error_clear(&err);
    CHECK_EQ(comm->broadcast(comm->ctx, 0, &lane, sizeof lane, &err), DCP_E_COMM);
    CHECK(strstr(err.message, "refused: an earlier call on this process group failed") != NULL);
    CHECK(now_s() - start < SOON_S);
}

static void
with_fault(struct rank *self, const char *fault, int code, const char *text)
{
    struct dcp_comm comm;
    make(self, &comm);
    meet(&comm);
    self->set_faults(fault);
    check_fails(&comm, code, text);
    comm.destroy(comm.ctx);
    self->set_faults("");
    check_group_comm(self);
}

static void
refused(struct rank *self)
{
    with_fault(self, "fail=3@1", DCP_E_COMM, "internal error");
}

static void
asynchronous(struct rank *self)
{
    with_fault(self, "async=6@1", DCP_E_COMM, "remote process exited");
}

static void
hanging(struct rank *self)
{
    be_impatient(self);
    with_fault(self, "hang@1", DCP_E_TIMEOUT, "timed out");
}

static void
case_a_fault_ends_the_call_and_leaves_the_groups_communicator_alone(void)
{
    hold_on_ranks(2, refused);
    hold_on_ranks(2, asynchronous);
    hold_on_ranks(3, hanging);
}

static void
unsplit(struct rank *self)
{
    struct dcp_comm comm;
    self->set_faults("split=5");
    make(self, &comm);
    check_fails(&comm, DCP_E_COMM, "splitting the group's NCCL communicator: invalid usage");
    comm.destroy(comm.ctx);
    self->set_faults("");
    check_group_comm(self);
}

static void
case_a_split_that_is_refused_fails_the_call(void)
{
    hold_on_ranks(2, unsplit);
}

static void
absent(struct rank *self)
{
    struct dcp_comm comm;
    be_impatient(self);
    make(self, &comm);
    if (self->rank != 1) {
        check_fails(&comm, DCP_E_TIMEOUT, "splitting the group's NCCL communicator: timed out");
    } else {
        (void)sleep(4);
    }
    _exit(ctest_failures == 0 ? 0 : 1); /* a thread is still inside of NCCL */
}

static void
case_a_rank_that_never_comes_ends_the_others_first_call_in_time(void)
{
    hold_on_ranks(3, absent);
}

/* Rank 0 comes to the split when the others have given it up. */
static nccl_comm
split_late(const struct rank *self)
{
    nccl_config config = {
        .size = sizeof config, .magic = DCP_NCCL_CONFIG_MAGIC, .version = DCP_NCCL_CONFIG_VERSION};
    nccl_comm made = NULL;
    nccl_status status = 0;
    (void)sleep(4);
    status = nccl_api()->ncclCommSplit(self->group_comm, 0, 0, &made, &config);
    while (status == DCP_NCCL_IN_PROGRESS && made == NULL) {
        CHECK_EQ(nccl_api()->ncclCommGetAsyncError(self->group_comm, &status), 0);
    }
    return made;
}

static void
outlived(struct rank *self)
{
    unsigned (*aborts)(int) = (unsigned (*)(int))function_of("fake_nccl_aborts");
    struct dcp_comm comm;
    double start = now_s();
    be_impatient(self);
    self->set_faults("prompt");
    make(self, &comm);
    if (self->rank == 0) {
        CHECK(split_late(self) != NULL);
    } else {
        check_fails(&comm, DCP_E_TIMEOUT, "splitting the group's NCCL communicator: timed out");
        while (aborts(true) + aborts(false) == 0 && now_s() - start < SOON_S) {
            (void)usleep(1000);
        }
        CHECK_EQ(aborts(true), 1);
        CHECK_EQ(aborts(false), 0);
    }
    _exit(ctest_failures == 0 ? 0 : 1);
}

static void
case_a_communicator_that_is_made_too_late_is_aborted_on_its_device(void)
{
    hold_on_ranks(2, outlived);
}

/* NCCL stores into memory of the call that gave up: sanitizers would tell if it were gone. */
static void
stored_late(struct rank *self)
{
    struct dcp_comm comm;
    double start = now_s();
    nccl_status status = DCP_NCCL_IN_PROGRESS;
    be_impatient(self);
    make(self, &comm);
    if (self->rank == 0) {
        CHECK(split_late(self) != NULL);
    } else {
        check_fails(&comm, DCP_E_TIMEOUT, "splitting the group's NCCL communicator: timed out");
        while (status == DCP_NCCL_IN_PROGRESS && now_s() - start < SOON_S) {
            CHECK_EQ(nccl_api()->ncclCommGetAsyncError(self->group_comm, &status), 0);
        }
        CHECK_EQ(status, 0);
    }
    _exit(ctest_failures == 0 ? 0 : 1);
}

static void
case_a_split_that_goes_on_behind_its_deadline_keeps_its_memory(void)
{
    int status[MAX_RANKS];
    run_ranks(2, false, stored_late, status);
    CHECK_EQ(status[0], 0);
    CHECK_EQ(status[1], 0);
}

/* The table over a communicator of the group's that does not block. */
static void
unblocked(struct rank *self)
{
    struct dcp_comm comm;
    make(self, &comm);
    meet(&comm);
    comm.destroy(comm.ctx);
    check_group_comm(self);
}

static void
case_a_communicator_that_does_not_block_is_split_as_well(void)
{
    int status[MAX_RANKS];
    run_ranks(3, false, unblocked, status);
    for (int r = 0; r < 3; r++) {
        CHECK_EQ(status[r], 0);
    }
}

static void
dying(struct rank *self)
{
    struct dcp_comm comm;
    be_impatient(self);
    make(self, &comm);
    meet(&comm);
    if (self->rank == 1) {
        (void)raise(SIGKILL);
    }
    check_fails(&comm, 0, "over nccl");
    comm.destroy(comm.ctx);
}

static void
case_a_rank_that_is_killed_ends_the_others_calls_in_time(void)
{
    int status[MAX_RANKS];
    for (uint32_t size = 2; size <= 8; size += 3) {
        run_ranks(size, true, dying, status);
        for (uint32_t r = 0; r < size; r++) {
            CHECK(r == 1 ? WIFSIGNALED(status[r]) && WTERMSIG(status[r]) == SIGKILL
                         : status[r] == 0);
        }
    }
}

static void
aborted(struct rank *self)
{
    struct dcp_comm comm;
    struct dcp_error err;
    dcp_error_clear(&err);
    self->set_faults("async=6@1");
    static int64_t lanes[1];
    unsigned (*query)(void *) = (unsigned (*)(void *))function_of("cudaStreamQuery");
    CHECK_EQ(nccl_api()->ncclAllReduce(lanes, lanes, 1, DCP_NCCL_INT64, DCP_NCCL_MIN,
                                       self->group_comm, NULL),
             0);
    double start = now_s();
    nccl_status state = 0;
    while (state == 0 && now_s() - start < SOON_S) {
        CHECK_EQ(nccl_api()->ncclCommGetAsyncError(self->group_comm, &state), 0);
        (void)query(NULL);
    }
    CHECK_EQ(dcp_nccl_comm_make(&self->source, &comm, &err), DCP_E_COMM);
    CHECK(strstr(err.message, "is not well: remote process exited") != NULL);
}

static void
case_a_communicator_that_is_not_well_is_not_taken(void)
{
    hold_on_ranks(2, aborted);
}

static void
foreign(struct rank *self)
{
    struct dcp_comm comm;
    struct dcp_error err;
    dcp_error_clear(&err);
    self->source.rank = (self->rank + 1) % self->size;
    CHECK_EQ(dcp_nccl_comm_make(&self->source, &comm, &err), DCP_E_COMM);
    CHECK(strstr(err.message, "where the group is rank") != NULL);
}

static void
case_a_communicator_of_other_ranks_is_not_taken(void)
{
    hold_on_ranks(2, foreign);
}

static void
poor(struct rank *self)
{
    struct dcp_comm comm;
    struct dcp_error err;
    void (*largest)(uint64_t) = (void (*)(uint64_t))function_of("dcp_fake_largest");
    dcp_error_clear(&err);
    largest(1000);
    CHECK_EQ(dcp_nccl_comm_make(&self->source, &comm, &err), DCP_E_NOMEM);
    largest(0);
    make(self, &comm);
    meet(&comm);
    comm.destroy(comm.ctx);
}

static void
case_a_device_without_room_is_told_before_any_rank_waits(void)
{
    hold_on_ranks(2, poor);
}

CTEST_MAIN(RUN(case_a_fault_ends_the_call_and_leaves_the_groups_communicator_alone);
           RUN(case_a_split_that_is_refused_fails_the_call);
           RUN(case_a_rank_that_never_comes_ends_the_others_first_call_in_time);
           RUN(case_a_communicator_that_is_made_too_late_is_aborted_on_its_device);
           RUN(case_a_split_that_goes_on_behind_its_deadline_keeps_its_memory);
           RUN(case_a_communicator_that_does_not_block_is_split_as_well);
           RUN(case_a_rank_that_is_killed_ends_the_others_calls_in_time);
           RUN(case_a_communicator_that_is_not_well_is_not_taken);
           RUN(case_a_communicator_of_other_ranks_is_not_taken);
           RUN(case_a_device_without_room_is_told_before_any_rank_waits);)

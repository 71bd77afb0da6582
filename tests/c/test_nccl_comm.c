/*
 * test_nccl_comm.c: the table of collectives over NCCL: right bytes on every rank, in the order of
 * the caller's stream, with nothing left behind.
 */
#include "nccl_ranks.h"

#include <stdatomic.h>

/* ---- right bytes ---- */

static uint8_t
byte_of(uint32_t rank, uint64_t i)
{
    return (uint8_t)(rank * 131 + i * 7 + (i >> 8) * 13 + (i >> 16) * 29 + 5);
}

static void
fill(uint8_t *to, uint32_t rank, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        to[i] = byte_of(rank, i);
    }
}

static bool
holds(const uint8_t *from, uint32_t rank, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        if (from[i] != byte_of(rank, i)) {
            return false;
        }
    }
    return true;
}

static void
check_gathers(const struct dcp_comm *comm, uint32_t root, uint64_t bytes, uint8_t *mine,
              uint8_t *all)
{
    struct dcp_error err;
    dcp_error_clear(&err);
    fill(mine, comm->rank, bytes);
    memset(all, 0, comm->size * bytes + 1);
    CHECK_OK(comm->gather(comm->ctx, root, mine, all, bytes, &err), &err);
    for (uint32_t r = 0; r < comm->size && comm->rank == root; r++) {
        CHECK(holds(all + r * bytes, r, bytes));
    }
    memset(all, 0, comm->size * bytes + 1);
    CHECK_OK(comm->all_gather(comm->ctx, mine, all, bytes, &err), &err);
    for (uint32_t r = 0; r < comm->size; r++) {
        CHECK(holds(all + r * bytes, r, bytes));
    }
    CHECK_EQ(all[comm->size * bytes], 0);
}

static void
check_spreads(const struct dcp_comm *comm, uint32_t root, uint64_t bytes, uint8_t *mine,
              uint8_t *all)
{
    struct dcp_error err;
    dcp_error_clear(&err);
    memset(mine, 0, bytes + 1);
    for (uint32_t r = 0; r < comm->size; r++) {
        fill(all + r * bytes, r + 40, bytes);
    }
    CHECK_OK(comm->scatter(comm->ctx, root, comm->rank == root ? all : NULL, mine, bytes, &err),
             &err);
    CHECK(holds(mine, comm->rank + 40, bytes));
    memset(mine, 0, bytes + 1);
    if (comm->rank == root) {
        fill(mine, 90, bytes);
    }
    CHECK_OK(comm->broadcast(comm->ctx, root, mine, bytes, &err), &err);
    CHECK(holds(mine, 90, bytes));
    CHECK_EQ(mine[bytes], 0);
}

static void
check_reduction(const struct dcp_comm *comm, size_t count)
{
    struct dcp_error err;
    int64_t *lanes = malloc((count + 1) * sizeof *lanes);
    size_t wrong = 0;
    dcp_error_clear(&err);
    for (size_t i = 0; i < count; i++) {
        lanes[i] = (int64_t)((i * 31 + comm->rank * 17) % 101) - 50;
    }
    CHECK_OK(comm->all_reduce_min(comm->ctx, lanes, count, &err), &err);
    for (size_t i = 0; i < count; i++) {
        int64_t least = INT64_MAX;
        for (uint32_t r = 0; r < comm->size; r++) {
            int64_t lane = (int64_t)((i * 31 + r * 17) % 101) - 50;
            least = lane < least ? lane : least;
        }
        wrong += lanes[i] != least;
    }
    CHECK_EQ(wrong, 0);
    free(lanes);
}

static void
all_sizes(struct rank *self)
{
    uint64_t round = DCP_NCCL_ROUND_BYTES / self->size / 8 * 8;
    uint64_t scratch = DCP_NCCL_SCRATCH_BYTES / self->size / 8 * 8;
    uint64_t sizes[] = {
        0, 1, 13, 4096, round - 1, round, round + 1, 2 * round + 5, scratch, scratch + round + 3};
    uint8_t *mine = malloc(scratch + 2 * round + 64);
    uint8_t *all = malloc(self->size * (scratch + 2 * round + 64));
    struct dcp_comm comm;
    make(self, &comm);
    CHECK_EQ(strcmp(comm.kind, "nccl"), 0);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        uint32_t root = (uint32_t)(i % self->size);
        check_gathers(&comm, root, sizes[i], mine, all);
        check_spreads(&comm, root, sizes[i], mine, all);
    }
    check_reduction(&comm, 16);
    check_reduction(&comm, DCP_NCCL_SCRATCH_BYTES / 8 + 3);
    comm.destroy(comm.ctx);
    check_group_comm(self);
    free(all);
    free(mine);
}

static void
case_every_collective_moves_the_right_bytes_across_the_border_of_a_round(void)
{
    for (uint32_t size = 1; size <= 3; size++) {
        hold_on_ranks(size, all_sizes);
    }
}

static void
case_a_communicator_that_can_not_be_split_serves_itself(void)
{
    (void)setenv("FAKE_NCCL_VERSION", "21700", 1);
    hold_on_ranks(2, all_sizes);
    (void)unsetenv("FAKE_NCCL_VERSION");
}

static void
late_split(struct rank *self)
{
    struct dcp_comm comm;
    self->set_faults("slow=0.3");
    make(self, &comm);
    meet(&comm);
    comm.destroy(comm.ctx);
}

static void
case_a_communicator_that_is_long_in_the_making_is_waited_for(void)
{
    hold_on_ranks(2, late_split);
}

/* What a save does: a vote, then plans to the coordinator and back, then what failed where. */
static void
agree(struct rank *self)
{
    struct dcp_comm comm;
    struct dcp_error err;
    struct dcp_vote vote = {.ok = true, .call = 5, .is_coordinator = self->rank == 1, .n0 = 9};
    enum dcp_verdict verdict;
    uint8_t text[800];
    uint8_t *block = NULL;
    struct dcp_span *spans = NULL;
    struct dcp_buf mine = {0};
    struct dcp_failure_list list = {0};
    make(self, &comm);
    dcp_error_clear(&err);
    CHECK_OK(dcp_vote_run(&comm, &vote, &verdict, &err), &err);
    CHECK_EQ(verdict, DCP_VERDICT_SLOW);
    CHECK_EQ(vote.n0, 9);
    memset(text, (int)self->rank + 1, sizeof text);
    CHECK_OK(dcp_comm_gather_bytes(&comm, 1, text, 100 * self->rank, &block, &spans, &err), &err);
    for (uint32_t r = 0; r < self->size && self->rank == 1; r++) {
        CHECK_EQ(spans[r].len, 100 * r);
        CHECK(r == 0 || (spans[r].data[0] == r + 1 && spans[r].data[100 * r - 1] == r + 1));
    }
    CHECK_OK(dcp_comm_scatter_bytes(&comm, 1, spans, &mine, &err), &err);
    CHECK_EQ(mine.len, 100 * self->rank);
    struct dcp_failure failure = {self->rank, DCP_FAILURE_PYTHON, text, 3};
    CHECK_OK(dcp_failure_exchange(&comm, self->rank == 2 ? &failure : NULL, &list, &err), &err);
    CHECK_EQ(list.count, 1);
    CHECK(list.count == 1 && list.items[0].rank == 2 && list.items[0].len == 3);
    dcp_failure_list_clean_up(&list);
    dcp_buf_clean_up(&mine);
    dcp_free(block);
    dcp_free(spans);
    comm.destroy(comm.ctx);
}

static void
case_votes_plans_and_failures_go_over_it(void)
{
    hold_on_ranks(3, agree);
}

static void
case_eight_ranks_agree_as_well(void)
{
    hold_on_ranks(8, agree);
}

/* ---- beside the trainer ---- */

static atomic_int was_done;

static void
work(void *unused)
{
    struct timespec pause = {.tv_nsec = 50000000};
    (void)unused;
    (void)nanosleep(&pause, NULL);
    atomic_fetch_add(&was_done, 1);
}

/* Work of the trainer's that is long on its way when a call is made is over when it returns. */
static void
ordered(struct rank *self)
{
    unsigned (*make_stream)(void **, unsigned) =
        (unsigned (*)(void **, unsigned))function_of("cudaStreamCreateWithFlags");
    unsigned (*put)(void *, void (*)(void *), void *) =
        (unsigned (*)(void *, void (*)(void *), void *))function_of("cudaLaunchHostFunc");
    struct dcp_comm comm;
    void *streams[2] = {NULL, NULL};
    make(self, &comm);
    CHECK_EQ(comm.device_index, self->rank % 2);
    CHECK_EQ(make_stream(&streams[0], DCP_CUDA_STREAM_NON_BLOCKING), 0);
    CHECK_EQ(make_stream(&streams[1], DCP_CUDA_STREAM_NON_BLOCKING), 0);
    for (int i = 0; i < 4; i++) {
        comm.follow(comm.ctx, streams[i % 2]);
        CHECK_EQ(put(streams[i % 2], work, NULL), 0);
        meet(&comm);
        CHECK_EQ(atomic_load(&was_done), i + 1);
    }
    comm.destroy(comm.ctx);
}

static void
case_every_call_comes_after_the_callers_stream(void)
{
    hold_on_ranks(2, ordered);
    (void)setenv("FAKE_NCCL_VERSION", "21700", 1);
    hold_on_ranks(2, ordered);
    (void)unsetenv("FAKE_NCCL_VERSION");
}

/* A graph that is being captured would have our messages in it. */
static void
captured(struct rank *self)
{
    unsigned (*make_stream)(void **, unsigned) =
        (unsigned (*)(void **, unsigned))function_of("cudaStreamCreateWithFlags");
    void (*capture)(void *, int) = (void (*)(void *, int))function_of("dcp_fake_capture");
    struct dcp_comm comm;
    struct dcp_error err;
    void *stream = NULL;
    int64_t lane = 0;
    dcp_error_clear(&err);
    make(self, &comm);
    CHECK_EQ(make_stream(&stream, DCP_CUDA_STREAM_NON_BLOCKING), 0);
    comm.follow(comm.ctx, stream);
    capture(stream, 1);
    CHECK_EQ(comm.all_reduce_min(comm.ctx, &lane, 1, &err), DCP_E_COMM);
    CHECK(strstr(err.message, "while a CUDA graph is being captured") != NULL);
    capture(stream, 0);
    comm.destroy(comm.ctx);
}

static void
case_a_call_in_a_capture_is_refused(void)
{
    hold_on_ranks(2, captured);
}

static void
shared(struct rank *self)
{
    struct dcp_comm comm, other;
    make(self, &comm);
    other = comm;
    comm.acquire(comm.ctx);
    meet(&comm);
    comm.destroy(comm.ctx);
    meet(&other);
    other.destroy(other.ctx);
    CHECK_EQ(dcp_alloc_live_bytes(), 0);
}

static void
case_the_last_owner_ends_it(void)
{
    hold_on_ranks(2, shared);
}

static void
modest(struct rank *self)
{
    int (*ctas)(void) = (int (*)(void))function_of("fake_nccl_split_ctas");
    struct dcp_comm comm;
    make(self, &comm);
    meet(&comm);
    CHECK_EQ(ctas(), 1);
    comm.destroy(comm.ctx);
}

static void
case_our_communicator_leaves_the_device_to_the_trainer(void)
{
    hold_on_ranks(2, modest);
}

/* A thread's device, and what the device holds, are as before. */
static void
tidy(struct rank *self)
{
    uint64_t (*used)(int) = (uint64_t(*)(int))function_of("fake_device_used_bytes");
    unsigned (*get_device)(int *) = (unsigned (*)(int *))function_of("cudaGetDevice");
    unsigned (*set_device)(int) = (unsigned (*)(int))function_of("cudaSetDevice");
    int device = -1;
    int here = (int)self->rank % 2;
    uint64_t before = used(here);
    struct dcp_comm comm;
    CHECK_EQ(set_device((int)(self->rank + 1) % 2), 0);
    make(self, &comm);
    CHECK(used(here) >= before + DCP_NCCL_SCRATCH_BYTES);
    meet(&comm);
    CHECK_EQ(get_device(&device), 0);
    CHECK_EQ(device, (self->rank + 1) % 2);
    comm.destroy(comm.ctx);
    CHECK_EQ(used(here), before);
    CHECK_EQ(dcp_alloc_live_bytes(), 0);
}

static void
case_nothing_is_left_behind(void)
{
    hold_on_ranks(2, tidy);
}

CTEST_MAIN(RUN(case_every_collective_moves_the_right_bytes_across_the_border_of_a_round);
           RUN(case_a_communicator_that_can_not_be_split_serves_itself);
           RUN(case_a_communicator_that_is_long_in_the_making_is_waited_for);
           RUN(case_votes_plans_and_failures_go_over_it); RUN(case_eight_ranks_agree_as_well);
           RUN(case_every_call_comes_after_the_callers_stream);
           RUN(case_a_call_in_a_capture_is_refused); RUN(case_the_last_owner_ends_it);
           RUN(case_our_communicator_leaves_the_device_to_the_trainer);
           RUN(case_nothing_is_left_behind);)

/*
 * test_nccl_comm.c: the table of collectives over NCCL: right bytes on every rank, and an end of
 * every call in time, whatever becomes of ranks, communicators and devices.
 *
 * The ranks are processes with the fake libraries of tests/fake; this one stays without, for a
 * process that has used CUDA cannot fork.  A case runs on every rank and tells its failures by its
 * exit status.
 */
#include "dcp_nccl.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ctest.h"
#include "nccl_api.h"

enum { MAX_RANKS = 5, TIMEOUT_S = 100, SHORT_TIMEOUT_MS = 1500, SOON_S = 40 };

typedef struct {
    char internal[128];
} unique_id;

struct rank {
    uint32_t rank, size;
    nccl_comm group_comm; /* as torch would have it */
    void (*set_faults)(const char *text);
    struct dcp_nccl_source source;
};

typedef void case_fn(struct rank *self);

/* ---- ranks ---- */

static void *
function_of(const char *name)
{
    void *found = dlsym(RTLD_DEFAULT, name);
    if (found == NULL) {
        fprintf(stderr, "no %s\n", name);
        _exit(98);
    }
    return found;
}

static void
load_fakes(void)
{
    static const char *const names[] = {"libcuda.so.1", "libcudart.so.13", "libnccl.so.2"};
    for (int i = 0; i < 3; i++) {
        char path[64];
        (void)snprintf(path, sizeof path, "build/fake/%s", names[i]);
        if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == NULL) {
            fprintf(stderr, "%s\n", dlerror());
            _exit(98);
        }
    }
}

static void
become_rank(struct rank *self, uint32_t rank, uint32_t size, const unique_id *id)
{
    load_fakes();
    nccl_status (*init)(nccl_comm *, int, unique_id, int) =
        (nccl_status(*)(nccl_comm *, int, unique_id, int))function_of("ncclCommInitRank");
    unsigned (*set_device)(int) = (unsigned (*)(int))function_of("cudaSetDevice");
    self->rank = rank;
    self->size = size;
    self->set_faults = (void (*)(const char *))function_of("fake_nccl_set_faults");
    if (set_device((int)(rank % 2)) != 0 ||
        init(&self->group_comm, (int)size, *id, (int)rank) != 0) {
        _exit(98);
    }
    self->source = (struct dcp_nccl_source){
        .raw = self->group_comm,
        .device_index = (int32_t)(rank % 2),
        .rank = rank,
        .size = size,
        .timeout_ns = TIMEOUT_S * UINT64_C(1000000000),
    };
}

/* What each rank's process ended with. */
static void
run_ranks(uint32_t size, case_fn *fn, int *ret_status)
{
    pid_t pids[MAX_RANKS];
    unique_id id = {{0}};
    static unsigned number;
    (void)snprintf(id.internal, sizeof id.internal, "test-%d-%u", (int)getpid(), ++number);
    (void)fflush(NULL);
    for (uint32_t r = 0; r < size; r++) {
        pids[r] = fork();
        if (pids[r] == 0) {
            struct rank self;
            ctest_failures = 0;
            become_rank(&self, r, size, &id);
            fn(&self);
            _exit(ctest_failures == 0 ? 0 : 1);
        }
    }
    for (uint32_t r = 0; r < size; r++) {
        CHECK_EQ(waitpid(pids[r], &ret_status[r], 0), pids[r]);
    }
}

static void
hold_on_ranks(uint32_t size, case_fn *fn)
{
    int status[MAX_RANKS];
    run_ranks(size, fn, status);
    for (uint32_t r = 0; r < size; r++) {
        CHECK_EQ(status[r], 0);
    }
}

static double
now_s(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* For cases that wait for a call's end. */
static void
be_impatient(struct rank *self)
{
    self->source.timeout_ns = SHORT_TIMEOUT_MS * UINT64_C(1000000);
}

static void
make(struct rank *self, struct dcp_comm *ret_comm)
{
    struct dcp_error err;
    dcp_error_clear(&err);
    CHECK_OK(dcp_nccl_comm_make(&self->source, ret_comm, &err), &err);
    if (ctest_failures != 0) {
        _exit(1);
    }
}

static void
meet(const struct dcp_comm *comm)
{
    struct dcp_error err;
    int64_t lane = 0;
    dcp_error_clear(&err);
    CHECK_OK(comm->all_reduce_min(comm->ctx, &lane, 1, &err), &err);
}

/* The group's own communicator, as the trainer goes on with it. */
static void
check_group_comm(struct rank *self)
{
    const struct nccl_api *nccl = nccl_api();
    unsigned (*synchronize)(void *) = (unsigned (*)(void *))function_of("cudaStreamSynchronize");
    static int64_t lanes[2];
    nccl_status state = 0;
    lanes[0] = (int64_t)self->rank + 7;
    CHECK_EQ(
        nccl->ncclAllReduce(lanes, lanes, 1, DCP_NCCL_INT64, DCP_NCCL_MIN, self->group_comm, NULL),
        0);
    CHECK_EQ(synchronize(NULL), 0);
    CHECK_EQ(lanes[0], 7);
    CHECK_EQ(nccl->ncclCommGetAsyncError(self->group_comm, &state), 0);
    CHECK_EQ(state, 0);
}

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
    uint64_t round = DCP_NCCL_SCRATCH_BYTES / self->size / 8 * 8;
    uint64_t sizes[] = {0, 1, 13, 4096, round - 1, round, round + 1, 2 * round + 5};
    uint8_t *mine = malloc(2 * round + 64);
    uint8_t *all = malloc(self->size * (2 * round + 64));
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
    uint8_t text[300];
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

/* ---- everything that can go wrong ---- */

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
    run_ranks(3, dying, status);
    CHECK_EQ(status[0], 0);
    CHECK(WIFSIGNALED(status[1]) && WTERMSIG(status[1]) == SIGKILL);
    CHECK_EQ(status[2], 0);
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

/* A thread's device, and what the device holds, are as before. */
static void
tidy(struct rank *self)
{
    uint64_t (*used)(int) = (uint64_t(*)(int))function_of("fake_device_used_bytes");
    unsigned (*get_device)(int *) = (unsigned (*)(int *))function_of("cudaGetDevice");
    unsigned (*set_device)(int) = (unsigned (*)(int))function_of("cudaSetDevice");
    int device = -1;
    uint64_t before = used((int)self->source.device_index);
    struct dcp_comm comm;
    CHECK_EQ(set_device((int)(self->rank + 1) % 2), 0);
    make(self, &comm);
    CHECK(used((int)self->source.device_index) >= before + DCP_NCCL_SCRATCH_BYTES);
    meet(&comm);
    CHECK_EQ(get_device(&device), 0);
    CHECK_EQ(device, (self->rank + 1) % 2);
    comm.destroy(comm.ctx);
    CHECK_EQ(used((int)self->source.device_index), before);
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
           RUN(case_votes_plans_and_failures_go_over_it);
           RUN(case_a_fault_ends_the_call_and_leaves_the_groups_communicator_alone);
           RUN(case_a_split_that_is_refused_fails_the_call);
           RUN(case_a_rank_that_never_comes_ends_the_others_first_call_in_time);
           RUN(case_a_rank_that_is_killed_ends_the_others_calls_in_time);
           RUN(case_a_communicator_that_is_not_well_is_not_taken);
           RUN(case_a_communicator_of_other_ranks_is_not_taken);
           RUN(case_a_device_without_room_is_told_before_any_rank_waits);
           RUN(case_nothing_is_left_behind);)

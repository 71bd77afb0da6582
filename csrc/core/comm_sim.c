/*
 * comm_sim.c: a group of ranks in one process, one thread each, for tests and scaling.
 *
 * Each call is one round: a rank posts what it brings and waits; the last to arrive checks that all
 * ranks made the same call, moves every byte and starts the next round.  One thread does all the
 * work while the others stand still, so a result never depends on scheduling and a race in a caller
 * is the caller's.
 *
 * A real transport hangs or reads garbage when ranks disagree on the call, its root or its size;
 * here that is an error on every rank, which is what makes it useful as a judge of protocols.  A
 * killed rank, a disagreement or a passed deadline breaks the group for good: calls in progress and
 * later ones fail, except those of a round that was complete before.
 *
 * Threads: one per rank inside a call; dcp_comm_sim_kill from any thread.  destroy when all have
 * left.
 */
#include "dcp_comm.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "dcp_limits.h"

enum sim_op { SIM_ALL_REDUCE = 1, SIM_GATHER, SIM_ALL_GATHER, SIM_SCATTER, SIM_BROADCAST };

struct sim_call {
    enum sim_op op;
    uint32_t root;
    size_t bytes;     /* each rank's part; of all_reduce: of all lanes */
    const void *send; /* borrowed from the waiting caller */
    void *recv;
};

struct sim_rank {
    struct dcp_comm_sim *sim; /* borrows */
    uint32_t rank;
    struct sim_call call; /* guarded by sim->mutex; valid while this rank waits in a round */
};

struct dcp_comm_sim {
    uint32_t size;
    uint32_t timeout_ms; /* of one call */

    pthread_mutex_t mutex;
    pthread_cond_t changed; /* `round` or `cause`; waits on CLOCK_MONOTONIC */
    uint64_t round;         /* complete rounds so far */
    uint32_t arrived;       /* ranks in the current round */
    struct dcp_error cause; /* what broke the group, the first to do so; code 0 while it works */

    struct sim_rank ranks[];
};

static const char *
op_name(enum sim_op op)
{
    switch (op) {
    case SIM_ALL_REDUCE:
        return "all_reduce";
    case SIM_GATHER:
        return "gather";
    case SIM_ALL_GATHER:
        return "all_gather";
    case SIM_SCATTER:
        return "scatter";
    case SIM_BROADCAST:
        return "broadcast";
    }
    return "unknown call";
}

static int
fail_broken_locked(const struct sim_rank *self, enum sim_op op, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_COMM, 0, NULL,
                         "%s of rank %u in a simulated group of %u failed: %s", op_name(op),
                         self->rank, self->sim->size, self->sim->cause.message);
}

/* NULL when all ranks made the same call. */
static const struct sim_rank *
find_odd_call_locked(const struct dcp_comm_sim *sim)
{
    const struct sim_call *first = &sim->ranks[0].call;
    for (uint32_t i = 1; i < sim->size; i++) {
        const struct sim_call *call = &sim->ranks[i].call;
        if (call->op != first->op || call->root != first->root || call->bytes != first->bytes) {
            return &sim->ranks[i];
        }
    }
    return NULL;
}

static void
copy_part(void *dst, size_t dst_index, const void *src, size_t src_index, size_t bytes)
{
    if (bytes != 0) {
        memmove((uint8_t *)dst + dst_index * bytes, (const uint8_t *)src + src_index * bytes,
                bytes);
    }
}

static void
reduce_min_locked(struct dcp_comm_sim *sim, size_t lanes_count)
{
    int64_t *total = sim->ranks[0].call.recv;
    for (uint32_t i = 1; i < sim->size; i++) {
        const int64_t *lanes = sim->ranks[i].call.recv;
        for (size_t k = 0; k < lanes_count; k++) {
            if (lanes[k] < total[k]) {
                total[k] = lanes[k];
            }
        }
    }
    for (uint32_t i = 1; i < sim->size; i++) {
        copy_part(sim->ranks[i].call.recv, 0, total, 0, lanes_count * sizeof *total);
    }
}

static void
move_bytes_locked(struct dcp_comm_sim *sim)
{
    const struct sim_call *any = &sim->ranks[0].call;
    const struct sim_call *root = &sim->ranks[any->root].call;
    size_t bytes = any->bytes;
    switch (any->op) {
    case SIM_ALL_REDUCE:
        reduce_min_locked(sim, bytes / sizeof(int64_t));
        break;
    case SIM_GATHER:
        for (uint32_t i = 0; i < sim->size; i++) {
            copy_part(root->recv, i, sim->ranks[i].call.send, 0, bytes);
        }
        break;
    case SIM_ALL_GATHER:
        for (uint32_t to = 0; to < sim->size; to++) {
            for (uint32_t i = 0; i < sim->size; i++) {
                copy_part(sim->ranks[to].call.recv, i, sim->ranks[i].call.send, 0, bytes);
            }
        }
        break;
    case SIM_SCATTER:
        for (uint32_t i = 0; i < sim->size; i++) {
            copy_part(sim->ranks[i].call.recv, 0, root->send, i, bytes);
        }
        break;
    case SIM_BROADCAST:
        for (uint32_t i = 0; i < sim->size; i++) {
            copy_part(sim->ranks[i].call.recv, 0, root->recv, 0, bytes);
        }
        break;
    }
}

/* The last to arrive. */
static int
complete_round_locked(struct sim_rank *self, struct dcp_error *err)
{
    struct dcp_comm_sim *sim = self->sim;
    const struct sim_rank *odd = find_odd_call_locked(sim);
    if (odd != NULL) {
        const struct sim_call *a = &sim->ranks[0].call;
        const struct sim_call *b = &odd->call;
        (void)dcp_error_set(&sim->cause, DCP_E_COMM, 0, NULL,
                            "rank 0 calls %s (root %u, %zu bytes) where rank %u calls %s (root %u, "
                            "%zu bytes)",
                            op_name(a->op), a->root, a->bytes, odd->rank, op_name(b->op), b->root,
                            b->bytes);
        (void)pthread_cond_broadcast(&sim->changed);
        return fail_broken_locked(self, self->call.op, err);
    }
    move_bytes_locked(sim);
    sim->arrived = 0;
    sim->round++;
    (void)pthread_cond_broadcast(&sim->changed);
    return 0;
}

static struct timespec
deadline_in(uint32_t timeout_ms)
{
    struct timespec at = {0};
    (void)clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += timeout_ms / 1000;
    at.tv_nsec += (long)(timeout_ms % 1000) * 1000000L;
    if (at.tv_nsec >= 1000000000L) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000L;
    }
    return at;
}

static int
wait_for_round_locked(struct sim_rank *self, struct dcp_error *err)
{
    struct dcp_comm_sim *sim = self->sim;
    uint64_t mine = sim->round;
    struct timespec deadline = deadline_in(sim->timeout_ms);
    for (;;) {
        if (sim->round != mine) {
            return 0;
        }
        if (sim->cause.code != 0) {
            return fail_broken_locked(self, self->call.op, err);
        }
        int rc = pthread_cond_timedwait(&sim->changed, &sim->mutex, &deadline);
        if (rc == ETIMEDOUT && sim->round == mine && sim->cause.code == 0) {
            (void)dcp_error_set(&sim->cause, DCP_E_TIMEOUT, 0, NULL,
                                "%u of %u ranks came within %u ms, rank %u gave up waiting",
                                sim->arrived, sim->size, sim->timeout_ms, self->rank);
            (void)pthread_cond_broadcast(&sim->changed);
            return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL, "%s in a simulated group: %s",
                                 op_name(self->call.op), sim->cause.message);
        }
    }
}

static int
run_call(void *ctx, struct sim_call call, struct dcp_error *err)
{
    struct sim_rank *self = ctx;
    struct dcp_comm_sim *sim = self->sim;
    if (call.root >= sim->size) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "%s with root %u in a simulated group of %u ranks", op_name(call.op),
                             call.root, sim->size);
    }
    int rc;
    (void)pthread_mutex_lock(&sim->mutex);
    if (sim->cause.code != 0) {
        rc = fail_broken_locked(self, call.op, err);
    } else {
        self->call = call;
        sim->arrived++;
        rc = sim->arrived == sim->size ? complete_round_locked(self, err)
                                       : wait_for_round_locked(self, err);
    }
    (void)pthread_mutex_unlock(&sim->mutex);
    return rc;
}

static int
sim_all_reduce_min(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err)
{
    struct sim_call call = {
        .op = SIM_ALL_REDUCE, .bytes = count * sizeof *lanes, .send = lanes, .recv = lanes};
    return run_call(ctx, call, err);
}

static int
sim_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
           struct dcp_error *err)
{
    struct sim_call call = {
        .op = SIM_GATHER, .root = root, .bytes = bytes, .send = send, .recv = recv};
    return run_call(ctx, call, err);
}

static int
sim_all_gather(void *ctx, const void *send, void *recv, size_t bytes, struct dcp_error *err)
{
    struct sim_call call = {.op = SIM_ALL_GATHER, .bytes = bytes, .send = send, .recv = recv};
    return run_call(ctx, call, err);
}

static int
sim_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
            struct dcp_error *err)
{
    struct sim_call call = {
        .op = SIM_SCATTER, .root = root, .bytes = bytes, .send = send, .recv = recv};
    return run_call(ctx, call, err);
}

static int
sim_broadcast(void *ctx, uint32_t root, void *buf, size_t bytes, struct dcp_error *err)
{
    struct sim_call call = {
        .op = SIM_BROADCAST, .root = root, .bytes = bytes, .send = buf, .recv = buf};
    return run_call(ctx, call, err);
}

/* The ranks live in the group: dcp_comm_sim_destroy frees them. */
static void
sim_destroy_rank(void *ctx)
{
    (void)ctx;
}

static int
init_waiting(struct dcp_comm_sim *sim)
{
    pthread_condattr_t attr;
    int rc = pthread_condattr_init(&attr);
    if (rc != 0) {
        return rc;
    }
    rc = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    if (rc == 0) {
        rc = pthread_cond_init(&sim->changed, &attr);
    }
    (void)pthread_condattr_destroy(&attr);
    if (rc != 0) {
        return rc;
    }
    rc = pthread_mutex_init(&sim->mutex, NULL);
    if (rc != 0) {
        (void)pthread_cond_destroy(&sim->changed);
    }
    return rc;
}

int
dcp_comm_sim_new(uint32_t size, uint32_t timeout_ms, struct dcp_comm_sim **ret_sim,
                 struct dcp_error *err)
{
    if (size == 0 || size > DCP_MAX_RANKS) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a simulated group of %u ranks: 1 to %d are possible", size,
                             DCP_MAX_RANKS);
    }
    struct dcp_comm_sim *sim = dcp_calloc(1, sizeof *sim + size * sizeof sim->ranks[0]);
    if (sim == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "no memory for a simulated group of %u ranks", size);
    }
    sim->size = size;
    sim->timeout_ms = timeout_ms;
    for (uint32_t i = 0; i < size; i++) {
        sim->ranks[i].sim = sim;
        sim->ranks[i].rank = i;
    }
    int rc = init_waiting(sim);
    if (rc != 0) {
        dcp_free(sim);
        return dcp_error_set(err, DCP_E_INTERNAL, rc, NULL,
                             "cannot make the lock of a simulated group");
    }
    *ret_sim = sim;
    return 0;
}

void
dcp_comm_sim_rank(struct dcp_comm_sim *sim, uint32_t rank, struct dcp_comm *ret_comm)
{
    DCP_ASSERT(rank < sim->size);
    *ret_comm = (struct dcp_comm){
        .ctx = &sim->ranks[rank],
        .kind = "simulated",
        .rank = rank,
        .size = sim->size,
        .all_reduce_min = sim_all_reduce_min,
        .gather = sim_gather,
        .all_gather = sim_all_gather,
        .scatter = sim_scatter,
        .broadcast = sim_broadcast,
        .destroy = sim_destroy_rank,
    };
}

void
dcp_comm_sim_kill(struct dcp_comm_sim *sim, uint32_t rank)
{
    DCP_ASSERT(rank < sim->size);
    (void)pthread_mutex_lock(&sim->mutex);
    (void)dcp_error_set(&sim->cause, DCP_E_COMM, 0, NULL, "rank %u was killed", rank);
    (void)pthread_cond_broadcast(&sim->changed);
    (void)pthread_mutex_unlock(&sim->mutex);
}

void
dcp_comm_sim_destroy(struct dcp_comm_sim *sim)
{
    if (sim == NULL) {
        return;
    }
    (void)pthread_cond_destroy(&sim->changed);
    (void)pthread_mutex_destroy(&sim->mutex);
    dcp_free(sim);
}

/*
 * fake_nccl_comm.c: communicators of the fake NCCL: made, split, asked, ended.
 *
 * References are counted: the handle holds its communicator, and so do jobs and a thread that
 * joins, so that what still looks at one may do so after it was aborted.
 */
#include "fake_nccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { CONFIG_MAGIC = (int)0xcafebeef, NO_COLOR = -1 };

typedef struct {
    char internal[128];
} ncclUniqueId;

/* The first fields of every ncclConfig_t since 2.17; NULL name and the rest are not looked at. */
struct config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
};

static _Atomic int split_ctas;     /* at most, of the last split */
static _Atomic unsigned aborts[2]; /* by threads on another device, on the communicator's */

static int
current_device(void)
{
    int (*get)(int *) = (int (*)(int *))fake_runtime_function("cudaGetDevice");
    int device = 0;
    return get != NULL && get(&device) == 0 ? device : 0;
}

void
fake_comm_release(ncclComm_t comm)
{
    if (atomic_fetch_sub(&comm->refs, 1) == 1) {
        fake_world_leave(comm);
        (void)pthread_mutex_destroy(&comm->mutex);
        free(comm);
    }
}

static void *
join(void *argument)
{
    ncclComm_t comm = argument;
    double until = fake_now_s() + (comm->blocking ? 0 : fake_join_delay_s());
    unsigned idle = 0;
    while (fake_now_s() < until && !atomic_load(&comm->aborted)) {
        fake_pause(&idle);
    }
    atomic_store(&comm->async_error, (int)fake_world_join(comm));
    fake_comm_release(comm);
    return NULL;
}

static ncclComm_t
comm_new(const char *name, int rank, int count, int device, bool blocking)
{
    ncclComm_t comm = calloc(1, sizeof *comm);
    if (comm == NULL) {
        return NULL;
    }
    (void)snprintf(comm->name, sizeof comm->name, "%s", name);
    comm->rank = rank;
    comm->count = count;
    comm->device = device;
    comm->blocking = blocking;
    atomic_store(&comm->refs, 2); /* the caller's handle, and who joins */
    atomic_store(&comm->async_error, FAKE_IN_PROGRESS);
    (void)pthread_mutex_init(&comm->mutex, NULL);
    return comm;
}

/* -1 for a struct that is none. */
static int
is_blocking(const struct config *config, bool inherited)
{
    if (config == NULL) {
        return inherited;
    }
    if (config->size < sizeof *config || config->magic != (unsigned)CONFIG_MAGIC) {
        fake_note("a config without NCCL_CONFIG_INITIALIZER");
        return -1;
    }
    return config->version < 21400 || config->blocking != 0;
}

static ncclResult_t
start(const char *name, int rank, int count, int device, int blocking, ncclComm_t *ret_comm)
{
    if (blocking < 0 || count < 1 || count > FAKE_MAX_RANKS || rank < 0 || rank >= count) {
        fake_note("rank %d of %d: 1 to %d ranks are possible", rank, count, FAKE_MAX_RANKS);
        return FAKE_INVALID_ARGUMENT;
    }
    ncclComm_t comm = comm_new(name, rank, count, device, blocking);
    if (comm == NULL) {
        return FAKE_SYSTEM;
    }
    if (!blocking && !fake_joins_promptly()) {
        pthread_t thread;
        *ret_comm = comm;
        if (pthread_create(&thread, NULL, join, comm) != 0) {
            return FAKE_SYSTEM;
        }
        (void)pthread_detach(thread);
        return FAKE_IN_PROGRESS;
    }
    (void)join(comm);
    int rc = atomic_load(&comm->async_error);
    if (rc != 0) {
        fake_comm_release(comm);
        return rc;
    }
    *ret_comm = comm;
    return FAKE_SUCCESS;
}

/* ---- as NCCL has them ---- */

EXPORT ncclResult_t
ncclGetUniqueId(ncclUniqueId *id)
{
    uint64_t random[2] = {0};
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random) {
        return FAKE_SYSTEM;
    }
    memset(id, 0, sizeof *id);
    (void)snprintf(id->internal, sizeof id->internal, "%016llx%016llx",
                   (unsigned long long)random[0], (unsigned long long)random[1]);
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommInitRankConfig(ncclComm_t *comm, int count, ncclUniqueId id, int rank,
                       const struct config *config)
{
    id.internal[sizeof id.internal - 1] = '\0';
    return start(id.internal, rank, count, current_device(), is_blocking(config, true), comm);
}

EXPORT ncclResult_t
ncclCommInitRank(ncclComm_t *comm, int count, ncclUniqueId id, int rank)
{
    return ncclCommInitRankConfig(comm, count, id, rank, NULL);
}

EXPORT ncclResult_t
ncclCommInitRankScalable(ncclComm_t *comm, int count, int rank, int ids_count, ncclUniqueId *ids,
                         const struct config *config)
{
    (void)ids_count;
    return ncclCommInitRankConfig(comm, count, ids[0], rank, config);
}

EXPORT ncclResult_t
ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *ret_error)
{
    *ret_error = atomic_load(&comm->async_error);
    return FAKE_SUCCESS;
}

static void
wait_for_jobs(ncclComm_t comm, double patience_s)
{
    unsigned idle = 0;
    double deadline = fake_now_s() + patience_s;
    while (atomic_load(&comm->refs) > 1 && fake_now_s() < deadline) {
        fake_pause(&idle);
    }
}

EXPORT ncclResult_t
ncclCommFinalize(ncclComm_t comm)
{
    wait_for_jobs(comm, fake_patience_s());
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommDestroy(ncclComm_t comm)
{
    wait_for_jobs(comm, fake_patience_s());
    fake_comm_release(comm);
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommAbort(ncclComm_t comm)
{
    atomic_fetch_add(&aborts[current_device() == comm->device], 1);
    atomic_store(&comm->aborted, true);
    wait_for_jobs(comm, 5.0); /* a stream that died runs none any more */
    fake_comm_release(comm);
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommCount(ncclComm_t comm, int *ret)
{
    *ret = comm->count;
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommUserRank(ncclComm_t comm, int *ret)
{
    *ret = comm->rank;
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommCuDevice(ncclComm_t comm, int *ret)
{
    *ret = comm->device;
    return FAKE_SUCCESS;
}

/* ---- splitting ---- */

#ifndef FAKE_NCCL_NO_SPLIT
/* All ranks' (color, key). */
static int
exchange_colors(ncclComm_t comm, int color, int key, int (*ret_all)[2])
{
    int mine[2] = {color, key};
    struct fake_op op = {.kind = FAKE_ALL_GATHER,
                         .send = (const uint8_t *)mine,
                         .recv = (uint8_t *)ret_all,
                         .count = 2,
                         .type = 2};
    return fake_run_now(comm, &op);
}

struct splitting {
    ncclComm_t parent;
    int color, key, blocking;
    ncclComm_t *ret_comm;
};

static ncclResult_t
split(const struct splitting *splitting, ncclComm_t *ret_comm)
{
    ncclComm_t comm = splitting->parent;
    int all[FAKE_MAX_RANKS][2];
    int rc = exchange_colors(comm, splitting->color, splitting->key, all);
    if (rc != 0) {
        return rc;
    }
    char name[FAKE_NAME_BYTES];
    (void)pthread_mutex_lock(&comm->mutex);
    uint32_t number = ++comm->splits;
    (void)pthread_mutex_unlock(&comm->mutex);
    (void)snprintf(name, sizeof name, "%.60s.%u.%d", comm->name, number, splitting->color);
    if (splitting->color == NO_COLOR) {
        *ret_comm = NULL;
        return FAKE_SUCCESS;
    }
    int rank = 0;
    int count = 0;
    for (int r = 0; r < comm->count; r++) {
        if (all[r][0] == splitting->color) {
            count++;
            rank += all[r][1] < splitting->key || (all[r][1] == splitting->key && r < comm->rank);
        }
    }
    return start(name, rank, count, comm->device, splitting->blocking, ret_comm);
}

/* Of a communicator that does not block: behind the call's return.  The result goes to the caller's
 * memory by a function that sanitizers see. */
static void *
split_behind(void *argument)
{
    static void *(*volatile copy)(void *, const void *, size_t) = memcpy;
    struct splitting *splitting = argument;
    ncclComm_t parent = splitting->parent, made = NULL;
    int rc = split(splitting, &made);
    if (rc == FAKE_SUCCESS || rc == FAKE_IN_PROGRESS) {
        rc = FAKE_SUCCESS;
        copy(splitting->ret_comm, &made, sizeof made);
    }
    atomic_store(&parent->async_error, rc);
    fake_comm_release(parent);
    free(splitting);
    return NULL;
}

EXPORT ncclResult_t
ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *ret_comm,
              const struct config *config)
{
    int fault = fake_split_fault();
    if (fault != 0) {
        fake_note("ncclCommSplit refused, as asked for");
        return fault;
    }
    struct splitting splitting = {.parent = comm,
                                  .color = color,
                                  .key = key,
                                  .blocking = is_blocking(config, comm->blocking),
                                  .ret_comm = ret_comm};
    if (splitting.blocking < 0) {
        return FAKE_INVALID_ARGUMENT;
    }
    atomic_store(&split_ctas, config != NULL ? config->max_ctas : 0);
    if (comm->blocking) {
        return split(&splitting, ret_comm);
    }
    struct splitting *behind = malloc(sizeof *behind);
    pthread_t thread;
    if (behind == NULL) {
        return FAKE_SYSTEM;
    }
    *behind = splitting;
    atomic_fetch_add(&comm->refs, 1);
    atomic_store(&comm->async_error, FAKE_IN_PROGRESS);
    if (pthread_create(&thread, NULL, split_behind, behind) != 0) {
        return FAKE_SYSTEM;
    }
    (void)pthread_detach(thread);
    return FAKE_IN_PROGRESS;
}
#endif

/* ---- for tests ---- */

/* The groups of threads that the last split allowed at most. */
EXPORT int fake_nccl_split_ctas(void);
EXPORT int
fake_nccl_split_ctas(void)
{
    return atomic_load(&split_ctas);
}

/* Communicators aborted by threads that were on their device, or were not. */
EXPORT unsigned fake_nccl_aborts(int on_device);
EXPORT unsigned
fake_nccl_aborts(int on_device)
{
    return atomic_load(&aborts[on_device != 0]);
}

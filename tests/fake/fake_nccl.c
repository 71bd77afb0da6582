/*
 * fake_nccl.c: a libnccl.so.2 for tests: communicators between processes of one machine without a
 * GPU, over shared memory.
 *
 * "Device" memory is whatever the CUDA runtime in the process hands out; with the fake one beside
 * this file that is memory of the host.  Operations run in the order of their stream: they are
 * given to cudaLaunchHostFunc of that runtime, and without one they run inside the call.  It has
 * what torch's process groups need; functions of other parts of NCCL are there, for the linker, and
 * say that they are not.
 *
 * Faults, from FAKE_NCCL_FAULTS or fake_nccl_set_faults, separated by commas; operations are
 * counted from 1, in this process, since the faults were set: fail=C@N   the N-th operation is
 * refused with the result C async=C@N  the N-th operation never ends, and its communicator's
 * asynchronous error is C hang@N     the N-th operation never ends until its communicator is
 * aborted split=C    ncclCommSplit is refused with the result C slow=S     a communicator that is
 * not blocking takes S seconds more to be joined FAKE_NCCL_VERSION is what ncclGetVersion says;
 * FAKE_NCCL_DEBUG=1 prints why something failed; FAKE_NCCL_TIMEOUT_S, 120, ends what waits for
 * ever.  Compiled with FAKE_NCCL_NO_SPLIT the library has no ncclCommSplit, as before 2.18.
 */
#include "fake_nccl.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { CONFIG_MAGIC = (int)0xcafebeef, NO_COLOR = -1, FAKE_VERSION = 23007, MAX_GROUP_OPS = 1024 };

typedef struct fake_comm *ncclComm_t;
typedef int ncclResult_t;
typedef struct {
    char internal[128];
} ncclUniqueId;

/* The first fields of every ncclConfig_t since 2.14; NULL name and the rest are not looked at. */
struct config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

/* ---- faults ---- */

static pthread_mutex_t faults_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct {
    bool is_read;
    int fail, async, split; /* results */
    uint64_t fail_at, async_at, hang_at;
    double slow_s;
    uint64_t ops; /* so far */
} faults;
static _Atomic uint64_t ops_ever;

static void
read_faults_locked(const char *text)
{
    memset(&faults, 0, sizeof faults);
    faults.is_read = true;
    while (text != NULL && *text != '\0') {
        int result = 0;
        unsigned long long at = 0;
        if (sscanf(text, "fail=%d@%llu", &result, &at) == 2) {
            faults.fail = result;
            faults.fail_at = at;
        } else if (sscanf(text, "async=%d@%llu", &result, &at) == 2) {
            faults.async = result;
            faults.async_at = at;
        } else if (sscanf(text, "hang@%llu", &at) == 1) {
            faults.hang_at = at;
        } else if (sscanf(text, "slow=%lf", &faults.slow_s) != 1 &&
                   sscanf(text, "split=%d", &faults.split) != 1) {
            (void)fprintf(stderr, "fake nccl: no such fault: %s\n", text);
            _exit(97);
        }
        text = strchr(text, ',');
        text = text == NULL ? NULL : text + 1;
    }
}

static void
lock_faults(void)
{
    (void)pthread_mutex_lock(&faults_mutex);
    if (!faults.is_read) {
        read_faults_locked(getenv("FAKE_NCCL_FAULTS"));
    }
}

EXPORT void fake_nccl_set_faults(const char *text);
EXPORT void
fake_nccl_set_faults(const char *text)
{
    (void)pthread_mutex_lock(&faults_mutex);
    read_faults_locked(text);
    (void)pthread_mutex_unlock(&faults_mutex);
}

/* Operations that this process ever called: whether NCCL was used at all. */
EXPORT unsigned long long fake_nccl_operations(void);
EXPORT unsigned long long
fake_nccl_operations(void)
{
    return atomic_load(&ops_ever);
}

/* ---- the runtime that torch has ---- */

typedef int launch_fn(void *stream, void (*function)(void *), void *argument);

static void *
runtime_function(const char *name)
{
    return dlsym(RTLD_DEFAULT, name);
}

static int
current_device(void)
{
    int (*get)(int *) = (int (*)(int *))runtime_function("cudaGetDevice");
    int device = 0;
    return get != NULL && get(&device) == 0 ? device : 0;
}

/* ---- communicators ---- */

static void
release(ncclComm_t comm)
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
    lock_faults();
    double until = fake_now_s() + (comm->blocking ? 0 : faults.slow_s);
    (void)pthread_mutex_unlock(&faults_mutex);
    unsigned idle = 0;
    while (fake_now_s() < until && !atomic_load(&comm->aborted)) {
        fake_pause(&idle);
    }
    atomic_store(&comm->async_error, (int)fake_world_join(comm));
    release(comm);
    return NULL;
}

static ncclComm_t
comm_new(const char *name, int rank, int count, bool blocking)
{
    ncclComm_t comm = calloc(1, sizeof *comm);
    if (comm == NULL) {
        return NULL;
    }
    (void)snprintf(comm->name, sizeof comm->name, "%s", name);
    comm->rank = rank;
    comm->count = count;
    comm->device = current_device();
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
start(const char *name, int rank, int count, int blocking, ncclComm_t *ret_comm)
{
    if (blocking < 0 || count < 1 || count > FAKE_MAX_RANKS || rank < 0 || rank >= count) {
        fake_note("rank %d of %d: 1 to %d ranks are possible", rank, count, FAKE_MAX_RANKS);
        return FAKE_INVALID_ARGUMENT;
    }
    ncclComm_t comm = comm_new(name, rank, count, blocking);
    if (comm == NULL) {
        return FAKE_SYSTEM;
    }
    if (!blocking) {
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
        release(comm);
        return rc;
    }
    *ret_comm = comm;
    return FAKE_SUCCESS;
}

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
    return start(id.internal, rank, count, is_blocking(config, true), comm);
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
    release(comm);
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommAbort(ncclComm_t comm)
{
    atomic_store(&comm->aborted, true);
    wait_for_jobs(comm, 5.0); /* a stream that died runs none any more */
    release(comm);
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

/* ---- running operations ---- */

struct job {
    ncclComm_t comm;
    uint64_t ticket;
    int fault; /* asynchronous error to begin with; -1: hang */
    size_t count;
    struct fake_op ops[];
};

static void
wait_until_aborted(ncclComm_t comm)
{
    unsigned idle = 0;
    double deadline = fake_now_s() + fake_patience_s();
    while (!atomic_load(&comm->aborted) && fake_now_s() < deadline) {
        fake_pause(&idle);
    }
}

/* Jobs of a communicator one after another; false when it is aborted first. */
static bool
wait_for_turn(const struct job *job)
{
    unsigned idle = 0;
    double deadline = fake_now_s() + fake_patience_s();
    while (atomic_load(&job->comm->serving) != job->ticket) {
        if (atomic_load(&job->comm->aborted) || fake_now_s() > deadline) {
            return false;
        }
        fake_pause(&idle);
    }
    return true;
}

static void
run_job(void *argument)
{
    struct job *job = argument;
    ncclComm_t comm = job->comm;
    if (wait_for_turn(job)) {
        int rc = job->fault;
        if (rc > 0) {
            fake_note("asynchronous error %d, as asked for", rc);
            atomic_store(&comm->async_error, rc);
        } else if (rc == 0 && atomic_load(&comm->async_error) == 0) {
            rc = fake_run_ops(comm, job->ops, job->count);
        }
        /* A kernel of the real library whose peers are lost runs until it is aborted. */
        if (rc != 0 && runtime_function("cudaLaunchHostFunc") != NULL) {
            wait_until_aborted(comm);
        }
        atomic_store(&comm->serving, job->ticket + 1);
    }
    release(comm);
    free(job);
}

static uint64_t
next_ticket(ncclComm_t comm)
{
    (void)pthread_mutex_lock(&comm->mutex);
    uint64_t ticket = comm->next_ticket++;
    (void)pthread_mutex_unlock(&comm->mutex);
    return ticket;
}

static ncclResult_t
launch(ncclComm_t comm, void *stream, const struct fake_op *ops, size_t count, int fault)
{
    struct job *job = calloc(1, sizeof *job + count * sizeof *ops);
    if (job == NULL) {
        return FAKE_SYSTEM;
    }
    job->comm = comm;
    job->ticket = next_ticket(comm);
    job->fault = fault;
    job->count = count;
    memcpy(job->ops, ops, count * sizeof *ops);
    atomic_fetch_add(&comm->refs, 1);
    launch_fn *on_stream = (launch_fn *)runtime_function("cudaLaunchHostFunc");
    if (on_stream == NULL) {
        run_job(job);
        return atomic_load(&comm->async_error);
    }
    return on_stream(stream, run_job, job) == 0 ? FAKE_SUCCESS : FAKE_UNHANDLED_CUDA;
}

/* ---- groups: what one thread calls between start and end is one job per communicator ---- */

static _Thread_local struct {
    int depth;
    size_t count;
    struct {
        ncclComm_t comm;
        void *stream;
        int fault;
        struct fake_op op;
    } items[MAX_GROUP_OPS];
} group;

EXPORT ncclResult_t
ncclGroupStart(void)
{
    group.depth++;
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclGroupEnd(void)
{
    if (group.depth == 0) {
        fake_note("ncclGroupEnd without ncclGroupStart");
        return FAKE_INVALID_USAGE;
    }
    if (--group.depth > 0) {
        return FAKE_SUCCESS;
    }
    ncclResult_t rc = FAKE_SUCCESS;
    static _Thread_local struct fake_op ops[MAX_GROUP_OPS];
    for (size_t first = 0; first < group.count; first++) {
        ncclComm_t comm = group.items[first].comm;
        size_t count = 0;
        int fault = 0;
        for (size_t i = first; comm != NULL && i < group.count; i++) {
            if (group.items[i].comm == comm) {
                ops[count++] = group.items[i].op;
                fault = fault != 0 ? fault : group.items[i].fault;
                group.items[i].comm = NULL;
            }
        }
        if (comm != NULL && rc == FAKE_SUCCESS) {
            rc = launch(comm, group.items[first].stream, ops, count, fault);
        }
    }
    group.count = 0;
    return rc;
}

/* The result to give at once; what is to happen later goes to *ret_fault. */
static ncclResult_t
count_op(int *ret_fault)
{
    lock_faults();
    atomic_fetch_add(&ops_ever, 1);
    uint64_t at = ++faults.ops;
    ncclResult_t rc = at == faults.fail_at ? faults.fail : FAKE_SUCCESS;
    *ret_fault = at == faults.async_at ? faults.async : at == faults.hang_at ? -1 : 0;
    (void)pthread_mutex_unlock(&faults_mutex);
    if (rc != FAKE_SUCCESS) {
        fake_note("operation %llu refused, as asked for", (unsigned long long)at);
    }
    return rc;
}

static ncclResult_t
call(ncclComm_t comm, void *stream, struct fake_op op)
{
    int fault = 0;
    ncclResult_t rc = count_op(&fault);
    if (rc == FAKE_SUCCESS) {
        rc = atomic_load(&comm->async_error);
    }
    if (rc != FAKE_SUCCESS) {
        return rc == FAKE_IN_PROGRESS ? FAKE_INVALID_USAGE : rc;
    }
    bool has_root = op.kind != FAKE_ALL_REDUCE && op.kind != FAKE_REDUCE_SCATTER &&
                    op.kind != FAKE_ALL_GATHER && op.kind != FAKE_ALL_TO_ALL;
    if (fake_type_bytes(op.type) == 0 || (has_root && (op.root < 0 || op.root >= comm->count))) {
        fake_note("type %d, root or peer %d of %d ranks", op.type, op.root, comm->count);
        return FAKE_INVALID_ARGUMENT;
    }
    if (group.depth == 0) {
        return launch(comm, stream, &op, 1, fault);
    }
    if (group.count == MAX_GROUP_OPS) {
        fake_note("more than %d operations in a group", MAX_GROUP_OPS);
        return FAKE_INTERNAL;
    }
    group.items[group.count].comm = comm;
    group.items[group.count].stream = stream;
    group.items[group.count].fault = fault;
    group.items[group.count].op = op;
    group.count++;
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclAllReduce(const void *send, void *recv, size_t count, int type, int reduction, ncclComm_t comm,
              void *stream)
{
    return call(comm, stream,
                (struct fake_op){.kind = FAKE_ALL_REDUCE,
                                 .send = send,
                                 .recv = recv,
                                 .count = count,
                                 .type = type,
                                 .reduction = reduction});
}

EXPORT ncclResult_t
ncclReduce(const void *send, void *recv, size_t count, int type, int reduction, int root,
           ncclComm_t comm, void *stream)
{
    return call(comm, stream,
                (struct fake_op){.kind = FAKE_REDUCE,
                                 .send = send,
                                 .recv = recv,
                                 .count = count,
                                 .type = type,
                                 .reduction = reduction,
                                 .root = root});
}

EXPORT ncclResult_t
ncclReduceScatter(const void *send, void *recv, size_t count, int type, int reduction,
                  ncclComm_t comm, void *stream)
{
    return call(comm, stream,
                (struct fake_op){.kind = FAKE_REDUCE_SCATTER,
                                 .send = send,
                                 .recv = recv,
                                 .count = count,
                                 .type = type,
                                 .reduction = reduction});
}

EXPORT ncclResult_t
ncclAllGather(const void *send, void *recv, size_t count, int type, ncclComm_t comm, void *stream)
{
    return call(
        comm, stream,
        (struct fake_op){
            .kind = FAKE_ALL_GATHER, .send = send, .recv = recv, .count = count, .type = type});
}

EXPORT ncclResult_t
ncclBroadcast(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
              void *stream)
{
    return call(comm, stream,
                (struct fake_op){.kind = FAKE_BROADCAST,
                                 .send = send,
                                 .recv = recv,
                                 .count = count,
                                 .type = type,
                                 .root = root});
}

EXPORT ncclResult_t
ncclBcast(void *memory, size_t count, int type, int root, ncclComm_t comm, void *stream)
{
    return ncclBroadcast(memory, memory, count, type, root, comm, stream);
}

EXPORT ncclResult_t
ncclGather(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
           void *stream)
{
    return call(comm, stream,
                (struct fake_op){.kind = FAKE_GATHER,
                                 .send = send,
                                 .recv = recv,
                                 .count = count,
                                 .type = type,
                                 .root = root});
}

EXPORT ncclResult_t
ncclScatter(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
            void *stream)
{
    return call(comm, stream,
                (struct fake_op){.kind = FAKE_SCATTER,
                                 .send = send,
                                 .recv = recv,
                                 .count = count,
                                 .type = type,
                                 .root = root});
}

EXPORT ncclResult_t
ncclAlltoAll(const void *send, void *recv, size_t count, int type, ncclComm_t comm, void *stream)
{
    return call(
        comm, stream,
        (struct fake_op){
            .kind = FAKE_ALL_TO_ALL, .send = send, .recv = recv, .count = count, .type = type});
}

EXPORT ncclResult_t
ncclSend(const void *send, size_t count, int type, int peer, ncclComm_t comm, void *stream)
{
    return call(comm, stream,
                (struct fake_op){.kind = FAKE_P2P,
                                 .send = send,
                                 .count = count,
                                 .type = type,
                                 .root = peer,
                                 .is_send = true});
}

EXPORT ncclResult_t
ncclRecv(void *recv, size_t count, int type, int peer, ncclComm_t comm, void *stream)
{
    return call(comm, stream,
                (struct fake_op){
                    .kind = FAKE_P2P, .recv = recv, .count = count, .type = type, .root = peer});
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
    struct job turn = {.comm = comm, .ticket = next_ticket(comm)};
    int rc = FAKE_SYSTEM;
    if (wait_for_turn(&turn)) {
        rc = fake_run_ops(comm, &op, 1);
        atomic_store(&comm->serving, turn.ticket + 1);
    }
    return rc;
}

EXPORT ncclResult_t
ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *ret_comm,
              const struct config *config)
{
    lock_faults();
    int fault = faults.split;
    (void)pthread_mutex_unlock(&faults_mutex);
    if (fault != 0) {
        fake_note("ncclCommSplit refused, as asked for");
        return fault;
    }
    int blocking = is_blocking(config, comm->blocking);
    if (blocking < 0) {
        return FAKE_INVALID_ARGUMENT;
    }
    int all[FAKE_MAX_RANKS][2];
    int rc = exchange_colors(comm, color, key, all);
    if (rc != 0) {
        return rc;
    }
    char name[FAKE_NAME_BYTES];
    (void)pthread_mutex_lock(&comm->mutex);
    uint32_t number = ++comm->splits;
    (void)pthread_mutex_unlock(&comm->mutex);
    (void)snprintf(name, sizeof name, "%.60s.%u.%d", comm->name, number, color);
    if (color == NO_COLOR) {
        *ret_comm = NULL;
        return FAKE_SUCCESS;
    }
    int rank = 0;
    int count = 0;
    for (int r = 0; r < comm->count; r++) {
        if (all[r][0] == color) {
            count++;
            rank += all[r][1] < key || (all[r][1] == key && r < comm->rank);
        }
    }
    return start(name, rank, count, blocking, ret_comm);
}
#endif

/* ---- the rest ---- */

EXPORT ncclResult_t
ncclGetVersion(int *ret)
{
    const char *text = getenv("FAKE_NCCL_VERSION");
    *ret = text != NULL ? atoi(text) : FAKE_VERSION;
    return FAKE_SUCCESS;
}

EXPORT const char *
ncclGetErrorString(ncclResult_t result)
{
    static const char *const texts[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited or there was a network error",
                                        "NCCL operation in progress"};
    return result >= 0 && result < (int)(sizeof texts / sizeof texts[0]) ? texts[result]
                                                                         : "unknown result code";
}

EXPORT const char *
ncclGetLastError(ncclComm_t comm)
{
    (void)comm;
    return fake_noted();
}

/* torch registers memory for speed alone. */
EXPORT ncclResult_t
ncclCommRegister(ncclComm_t comm, void *memory, size_t bytes, void **ret_handle)
{
    (void)comm;
    (void)bytes;
    *ret_handle = memory;
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommDeregister(ncclComm_t comm, void *handle)
{
    (void)comm;
    (void)handle;
    return FAKE_SUCCESS;
}

#define NOT_HERE(name)                                                                             \
    EXPORT ncclResult_t name(void);                                                                \
    EXPORT ncclResult_t name(void)                                                                 \
    {                                                                                              \
        fake_note(#name " is not part of the fake");                                               \
        return FAKE_INVALID_USAGE;                                                                 \
    }

NOT_HERE(ncclCommGetUniqueId)
NOT_HERE(ncclCommGrow)
NOT_HERE(ncclCommInitAll)
NOT_HERE(ncclCommMemStats)
NOT_HERE(ncclCommResume)
NOT_HERE(ncclCommRevoke)
NOT_HERE(ncclCommShrink)
NOT_HERE(ncclCommSuspend)
NOT_HERE(ncclCommWindowDeregister)
NOT_HERE(ncclCommWindowRegister)
NOT_HERE(ncclDevCommCreate)
NOT_HERE(ncclDevCommDestroy)
NOT_HERE(ncclGetLsaMultimemDevicePointer)
NOT_HERE(ncclGetPeerDevicePointer)
NOT_HERE(ncclGroupSimulateEnd)
NOT_HERE(ncclMemAlloc)
NOT_HERE(ncclMemFree)
NOT_HERE(ncclPutSignal)
NOT_HERE(ncclRedOpCreatePreMulSum)
NOT_HERE(ncclRedOpDestroy)
NOT_HERE(ncclSignal)
NOT_HERE(ncclWaitSignal)
NOT_HERE(ncclWinGetUserPtr)

/*
 * fake_nccl_call.c: operations of the fake NCCL from their call to their run: streams, order,
 * groups.
 *
 * What is called becomes a job on its stream; jobs of one communicator run in the order of their
 * tickets, whatever their streams do.
 */
#include "fake_nccl.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_GROUP_OPS = 1024 };

typedef int launch_fn(void *stream, void (*function)(void *), void *argument);

void *
fake_runtime_function(const char *name)
{
    return dlsym(RTLD_DEFAULT, name);
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
        if (rc != 0 && fake_runtime_function("cudaLaunchHostFunc") != NULL) {
            wait_until_aborted(comm);
        }
        atomic_store(&comm->serving, job->ticket + 1);
    }
    fake_comm_release(comm);
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

int
fake_run_now(ncclComm_t comm, const struct fake_op *op)
{
    struct job turn = {.comm = comm, .ticket = next_ticket(comm)};
    int rc = FAKE_SYSTEM;
    if (wait_for_turn(&turn)) {
        rc = fake_run_ops(comm, op, 1);
        atomic_store(&comm->serving, turn.ticket + 1);
    }
    return rc;
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
    launch_fn *on_stream = (launch_fn *)fake_runtime_function("cudaLaunchHostFunc");
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

static ncclResult_t
call(ncclComm_t comm, void *stream, struct fake_op op)
{
    int fault = 0;
    ncclResult_t rc = fake_count_op(&fault);
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

/* ---- operations ---- */

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

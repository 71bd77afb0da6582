/*
 * fake_nccl.h: what the sources of the fake libnccl.so.2 share.
 *
 * Names and numbers are NCCL's own (nccl.h).  Compile all fake_nccl*.c as one libnccl.so.2:
 *   gcc -std=c11 -D_GNU_SOURCE -O1 -g -fPIC -shared -fvisibility=hidden \
 *       -Wl,-soname,libnccl.so.2 fake_nccl*.c -o libnccl.so.2 -lpthread -ldl
 */
#ifndef FAKE_NCCL_H
#define FAKE_NCCL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { FAKE_MAX_RANKS = 64, FAKE_CHANNEL_BYTES = 1 << 16, FAKE_NAME_BYTES = 96 };

enum fake_result {
    FAKE_SUCCESS = 0,
    FAKE_UNHANDLED_CUDA = 1,
    FAKE_SYSTEM = 2,
    FAKE_INTERNAL = 3,
    FAKE_INVALID_ARGUMENT = 4,
    FAKE_INVALID_USAGE = 5,
    FAKE_REMOTE = 6,
    FAKE_IN_PROGRESS = 7,
};

/* NCCL's own names for what its functions take and give. */
typedef struct fake_comm *ncclComm_t;
typedef int ncclResult_t;

enum fake_kind {
    FAKE_P2P = 1,
    FAKE_ALL_REDUCE,
    FAKE_REDUCE,
    FAKE_REDUCE_SCATTER,
    FAKE_ALL_GATHER,
    FAKE_BROADCAST,
    FAKE_GATHER,
    FAKE_SCATTER,
    FAKE_ALL_TO_ALL,
    FAKE_SPLIT,
};

/* One direction between two ranks. */
struct fake_channel {
    _Atomic uint64_t sent; /* bytes ever, by its writer */
    uint8_t apart[56];
    _Atomic uint64_t received;
    uint8_t apart_too[56];
    uint8_t data[FAKE_CHANNEL_BYTES];
};

/* One communicator, in memory that its ranks share; zeros are its first state. */
struct fake_world {
    _Atomic uint32_t ranks_count;
    _Atomic uint32_t joined;
    _Atomic int32_t pids[FAKE_MAX_RANKS];
    struct fake_channel channels[]; /* from * ranks_count + to */
};

struct fake_comm {
    struct fake_world *world; /* mapped; NULL until it is joined */
    uint64_t world_bytes;
    char name[FAKE_NAME_BYTES];
    int rank, count, device;
    bool blocking;
    _Atomic uint32_t refs;   /* the handle, jobs, a thread that joins */
    _Atomic int async_error; /* FAKE_IN_PROGRESS while it is being joined */
    atomic_bool aborted;
    pthread_mutex_t mutex; /* guards next_ticket, splits */
    uint64_t next_ticket;  /* of the jobs, which run in this order whatever their streams do */
    _Atomic uint64_t serving;
    uint32_t splits;
};

/* One rank's part of one operation: bytes to or from a peer. */
struct fake_transfer {
    int peer;
    bool sends;
    enum fake_kind kind;
    uint32_t what; /* has to be the same on both sides: type, reduction, root */
    uint8_t *data;
    uint64_t bytes;
    uint64_t done; /* bytes moved, the header's among them */
};

/* An operation that was called and not yet run. */
struct fake_op {
    enum fake_kind kind;
    const uint8_t *send;
    uint8_t *recv;
    uint64_t count;
    int type, reduction, root; /* root: or the peer of P2P */
    bool is_send;              /* of P2P */
};

/* ---- fake_nccl.c ---- */

/* Counts an operation.  The result to give at once; what is to happen later goes to *ret_fault: an
 * asynchronous error, -1 to hang, or 0. */
ncclResult_t fake_count_op(int *ret_fault);
/* The result that ncclCommSplit is to give, or 0. */
ncclResult_t fake_split_fault(void);
/* Seconds more that a communicator that is not blocking takes to be joined. */
double fake_join_delay_s(void);
/* Whether such a one is joined inside of the call that makes it. */
bool fake_joins_promptly(void);

/* ---- fake_nccl_comm.c ---- */

/* Gives back one of the references that comm->refs counts. */
void fake_comm_release(ncclComm_t comm);

/* ---- fake_nccl_call.c ---- */

/* A function of the CUDA runtime that the process has, or NULL. */
void *fake_runtime_function(const char *name);
/* Runs an operation in its turn, on the calling thread.  0, or a result. */
int fake_run_now(ncclComm_t comm, const struct fake_op *op);

/* ---- fake_nccl_world.c ---- */

/* Why the last call failed, for ncclGetLastError and for whoever looks at the test's output. */
void fake_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
const char *fake_noted(void);
double fake_now_s(void);
/* Seconds after which whatever waits gives up: no test hangs for ever. */
double fake_patience_s(void);
void fake_pause(unsigned *idle);

/* Waits for all ranks. */
enum fake_result fake_world_join(struct fake_comm *comm);
void fake_world_leave(struct fake_comm *comm);
/* Moves all of them.  0, or the communicator's asynchronous error, which it sets. */
int fake_run_transfers(struct fake_comm *comm, struct fake_transfer *items, size_t count);

/* ---- fake_nccl_op.c ---- */

uint64_t fake_type_bytes(int type);
int fake_run_ops(struct fake_comm *comm, const struct fake_op *ops, size_t count);

#endif

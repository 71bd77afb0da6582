/*
 * nccl_comm.c: the comm table over NCCL: collectives of bytes over a communicator of ours.
 *
 * All is put on a stream of ours, over a communicator that the first call splits off the group's,
 * so that no operation of ours is matched with one of the trainer's.  The device is the
 * communicator's, whatever the thread's current one is.
 *
 * Every call comes after what the caller's stream has been given by then, and ends before it
 * returns.  So kernels of two communicators, which may wait for each other where both need room on
 * a device, never run beside each other in another order than the program has on every rank, as far
 * as the trainer's stream knows of its own.
 *
 * The first call makes the connection, and ends soon if that does not come about: ranks that can
 * talk over something else find out by it.
 *
 * A failed call poisons the table: the other ranks may be anywhere.  Our communicator is aborted at
 * once, or its kernel would spin on the device until the process ends; the group's own is left to
 * torch.
 *
 * A table can have several owners, groups that differ in their coordinator alone.
 *
 * Threads: one at a time for a table, any.  Run on stand-ins for CUDA and NCCL, not on a GPU.
 */
#include <stdatomic.h>
#include <string.h>

#include "nccl_link.h"

/* Of a group without a timeout: longer than anything that comes to an end, and no overflow. */
#define MOST_TIMEOUT_NS (UINT64_C(1) << 62)

enum {
    /* Of the group's timeout, for connecting and once more for the first message: a rank that has
     * failed meanwhile waits for this one over the group's other backend, and still has to. */
    CONNECT_SHARE = 4,
};

struct nccl_table {
    struct nccl_link link;
    atomic_uint owners;
    _Atomic(cuda_stream) follows; /* the caller's; NULL is the device's default stream */
    bool connected;               /* the first call has come to a good end */
    bool poisoned;                /* the link has been ended */
    char first_failure[DCP_ERROR_MESSAGE_BYTES]; /* valid once poisoned */
};

static int
fail(struct nccl_table *table, const struct nccl_call *call, int rc, struct dcp_error *err)
{
    const struct dcp_nccl_source *source = &table->link.source;
    int code = rc == DCP_E_TIMEOUT ? DCP_E_TIMEOUT : DCP_E_COMM;
    table->poisoned = true;
    memcpy(table->first_failure, call->err.message, sizeof table->first_failure);
    return dcp_error_set(err, code, 0, NULL,
                         "%s of %llu bytes by rank %u of %u over nccl (cuda:%d) failed: %s; see "
                         "that all ranks are alive and make the same calls in the same order, then "
                         "make a new process group",
                         nccl_kind_name(call->kind), (unsigned long long)call->bytes, source->rank,
                         source->size, (int)table->link.device_index, call->err.message);
}

static int
refuse(const struct nccl_table *table, const struct nccl_call *call, struct dcp_error *err)
{
    const struct dcp_nccl_source *source = &table->link.source;
    return dcp_error_set(
        err, DCP_E_COMM, 0, NULL,
        "%s of %llu bytes by rank %u of %u over nccl (cuda:%d) refused: an earlier "
        "call on this process group failed (%s); make a new process group",
        nccl_kind_name(call->kind), (unsigned long long)call->bytes, source->rank, source->size,
        (int)table->link.device_index, table->first_failure);
}

/* On the device. */
static int
run_here(struct nccl_table *table, struct nccl_call *call)
{
    struct nccl_link *link = &table->link;
    int rc = 0;
    call->timeout_ns = link->source.timeout_ns;
    if (!table->connected) {
        call->timeout_ns = dcp_min_u64(call->timeout_ns / CONNECT_SHARE, DCP_NCCL_CONNECT_NS);
        rc = nccl_link_connect(link, nccl_now_ns() + call->timeout_ns, &call->err);
    }
    if (rc == 0) {
        rc = nccl_link_follow(link, &call->stay, atomic_load(&table->follows), &call->err);
    }
    if (rc == 0) {
        rc = nccl_rounds_run(call);
    }
    table->connected = table->connected || rc == 0;
    return rc;
}

static int
run(struct nccl_table *table, struct nccl_call call, struct dcp_error *err)
{
    struct nccl_link *link = &table->link;
    call.link = link;
    dcp_error_clear(&call.err);
    if (call.root >= link->source.size) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "%s with root %u in a group of %u ranks",
                             nccl_kind_name(call.kind), call.root, link->source.size);
    }
    if (table->poisoned) {
        return refuse(table, &call, err);
    }
    int rc = cuda_enter(link->device_index, &call.stay, &call.err);
    if (rc == 0) {
        rc = run_here(table, &call);
        cuda_leave(&call.stay);
    }
    if (rc == 0) {
        return 0;
    }
    rc = fail(table, &call, rc, err);
    nccl_link_end(link, true);
    return rc;
}

static int
nccl_all_reduce_min(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err)
{
    struct nccl_call call = {
        .kind = NCCL_ALL_REDUCE, .recv = (uint8_t *)lanes, .bytes = count * sizeof *lanes};
    return run(ctx, call, err);
}

static int
nccl_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
            struct dcp_error *err)
{
    struct nccl_call call = {
        .kind = NCCL_GATHER, .root = root, .send = send, .recv = recv, .bytes = bytes};
    return run(ctx, call, err);
}

static int
nccl_all_gather(void *ctx, const void *send, void *recv, size_t bytes, struct dcp_error *err)
{
    struct nccl_call call = {.kind = NCCL_ALL_GATHER, .send = send, .recv = recv, .bytes = bytes};
    return run(ctx, call, err);
}

static int
nccl_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
             struct dcp_error *err)
{
    struct nccl_call call = {
        .kind = NCCL_SCATTER, .root = root, .send = send, .recv = recv, .bytes = bytes};
    return run(ctx, call, err);
}

static int
nccl_broadcast(void *ctx, uint32_t root, void *buf, size_t bytes, struct dcp_error *err)
{
    struct nccl_call call = {.kind = NCCL_BROADCAST, .root = root, .recv = buf, .bytes = bytes};
    return run(ctx, call, err);
}

static void
nccl_follow(void *ctx, void *stream)
{
    atomic_store(&((struct nccl_table *)ctx)->follows, stream);
}

static void
nccl_acquire(void *ctx)
{
    atomic_fetch_add(&((struct nccl_table *)ctx)->owners, 1);
}

static void
nccl_destroy(void *ctx)
{
    struct nccl_table *table = ctx;
    if (table == NULL || atomic_fetch_sub(&table->owners, 1) != 1) {
        return;
    }
    if (!table->poisoned) {
        nccl_link_end(&table->link, false);
    }
    dcp_free(table);
}

static int
prepare(struct nccl_link *link, struct dcp_error *err)
{
    struct cuda_stay stay;
    int rc = cuda_enter(link->device_index, &stay, err);
    if (rc == 0) {
        rc = nccl_link_prepare(link, &stay, err);
        cuda_leave(&stay);
    }
    return rc;
}

int
dcp_nccl_comm_make(const struct dcp_nccl_source *source, struct dcp_comm *ret_comm,
                   struct dcp_error *err)
{
    const struct nccl_api *nccl = nccl_api();
    if (nccl == NULL) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                             "NCCL (libnccl.so.2) is not loaded in this process");
    }
    if (source->size == 0 || source->size > DCP_MAX_RANKS || source->rank >= source->size) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "rank %u of a group of %u", source->rank,
                             source->size);
    }
    int32_t device_index = -1;
    int rc = nccl_link_check_source(nccl, source, &device_index, err);
    if (rc != 0) {
        return rc;
    }
    struct nccl_table *table = dcp_calloc(1, sizeof *table);
    if (table == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a table of collectives");
    }
    table->owners = 1;
    table->link = (struct nccl_link){.nccl = nccl, .source = *source};
    table->link.device_index = device_index;
    if (source->timeout_ns == 0 || source->timeout_ns > MOST_TIMEOUT_NS) {
        table->link.source.timeout_ns = MOST_TIMEOUT_NS;
    }
    rc = prepare(&table->link, err);
    if (rc != 0) {
        nccl_destroy(table);
        return rc;
    }
    *ret_comm = (struct dcp_comm){
        .ctx = table,
        .kind = "nccl",
        .rank = source->rank,
        .size = source->size,
        .all_reduce_min = nccl_all_reduce_min,
        .gather = nccl_gather,
        .all_gather = nccl_all_gather,
        .scatter = nccl_scatter,
        .broadcast = nccl_broadcast,
        .destroy = nccl_destroy,
        .acquire = nccl_acquire,
        .follow = nccl_follow,
        .device_index = device_index,
    };
    return 0;
}

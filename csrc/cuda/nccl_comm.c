/*
 * nccl_comm.c: the comm table over NCCL: collectives of bytes in chunks of one buffer.
 *
 * Every call is a few rounds of: copy a chunk into pinned memory and on to the device, one NCCL
 * operation, copy back, wait for the end with a deadline.  All on a stream of ours, over a
 * communicator of ours that the first call splits off the group's, so that nothing of the trainer's
 * waits for us or we for it.  Planning moves kilobytes, and its cost is the number of operations:
 * there is one buffer of each kind and no overlap of rounds.
 *
 * Gather and scatter are grouped sends and receives: NCCL's own operations of that name are new.  A
 * rank's own part never leaves the host.
 *
 * A failed call poisons the table: the other ranks may be anywhere.  Our communicator is aborted at
 * once, or its kernel would spin on the device until the process ends; the group's own is left to
 * torch.
 *
 * Threads: one at a time for a table, any.  Run on stand-ins for CUDA and NCCL, not on a GPU.
 */
#include <string.h>

#include "nccl_link.h"

/* Of a group without a timeout: longer than anything that comes to an end, and no overflow. */
#define MOST_TIMEOUT_NS (UINT64_C(1) << 62)

struct nccl_table {
    struct nccl_link link;
    bool connected;
    bool poisoned;                               /* the link has been ended */
    char first_failure[DCP_ERROR_MESSAGE_BYTES]; /* valid once poisoned */
};

/* One call of the table. */
struct call {
    struct nccl_table *table;
    const char *what;
    uint64_t bytes; /* of one rank */
    uint64_t deadline_ns;
    struct cuda_stay stay;
    struct dcp_error err; /* of what went wrong below, without the call's own words */
};

static int
fail(struct call *call, int rc, struct dcp_error *err)
{
    struct nccl_table *table = call->table;
    const struct dcp_nccl_source *source = &table->link.source;
    int code = rc == DCP_E_TIMEOUT ? DCP_E_TIMEOUT : DCP_E_COMM;
    table->poisoned = true;
    memcpy(table->first_failure, call->err.message, sizeof table->first_failure);
    return dcp_error_set(err, code, 0, NULL,
                         "%s of %llu bytes by rank %u of %u over nccl (cuda:%d) failed: %s; see "
                         "that all ranks are alive and make the same calls in the same order, then "
                         "make a new process group",
                         call->what, (unsigned long long)call->bytes, source->rank, source->size,
                         (int)source->device_index, call->err.message);
}

static int
refuse(const struct call *call, struct dcp_error *err)
{
    const struct dcp_nccl_source *source = &call->table->link.source;
    return dcp_error_set(
        err, DCP_E_COMM, 0, NULL,
        "%s of %llu bytes by rank %u of %u over nccl (cuda:%d) refused: an earlier "
        "call on this process group failed (%s); make a new process group",
        call->what, (unsigned long long)call->bytes, source->rank, source->size,
        (int)source->device_index, call->table->first_failure);
}

/* ---- the steps of a round ---- */

static int
to_device(struct call *call, uint64_t offset, uint64_t bytes)
{
    struct nccl_link *link = &call->table->link;
    return cuda_check(&call->stay,
                      call->stay.runtime->cudaMemcpyAsync(
                          link->scratch + offset, link->pinned + offset, (size_t)bytes,
                          DCP_CUDA_COPY_HOST_TO_DEVICE, link->stream),
                      "copy a message to the device", &call->err);
}

static int
to_host(struct call *call, uint64_t offset, uint64_t bytes)
{
    struct nccl_link *link = &call->table->link;
    return cuda_check(&call->stay,
                      call->stay.runtime->cudaMemcpyAsync(
                          link->pinned + offset, link->scratch + offset, (size_t)bytes,
                          DCP_CUDA_COPY_DEVICE_TO_HOST, link->stream),
                      "copy a message from the device", &call->err);
}

static int
check(struct call *call, nccl_status status)
{
    return nccl_link_check(&call->table->link, status, "starting it", call->deadline_ns,
                           &call->err);
}

static int
wait_for_round(struct call *call)
{
    return nccl_link_wait(&call->table->link, &call->stay, call->deadline_ns, &call->err);
}

/* At a root: every other rank's part, one behind the other in the buffer.  A group is always ended;
 * the first thing that went wrong counts. */
static int
with_all_ranks(struct call *call, bool sends, uint64_t bytes)
{
    struct nccl_link *link = &call->table->link;
    const struct nccl_api *nccl = link->nccl;
    nccl_status status = nccl->ncclGroupStart();
    if (status != 0) {
        return check(call, status);
    }
    for (uint32_t peer = 0; peer < link->source.size && status == 0; peer++) {
        uint8_t *part = link->scratch + bytes * peer;
        if (peer != link->source.rank) {
            status = sends ? nccl->ncclSend(part, (size_t)bytes, DCP_NCCL_UINT8, (int)peer,
                                            link->comm, link->stream)
                           : nccl->ncclRecv(part, (size_t)bytes, DCP_NCCL_UINT8, (int)peer,
                                            link->comm, link->stream);
        }
        status = status == DCP_NCCL_IN_PROGRESS ? 0 : status;
    }
    nccl_status ended = nccl->ncclGroupEnd();
    return check(call, status != 0 ? status : ended);
}

/* ---- one round of each collective: bytes [offset, offset + n) of every rank's part ---- */

struct parts {
    uint32_t root;
    const uint8_t *send;
    uint8_t *recv;
};

/* The first bytes of the device's buffer to the host's: they are there when it returns. */
static int
bring(struct call *call, uint64_t bytes)
{
    int rc = to_host(call, 0, bytes);
    return rc != 0 ? rc : wait_for_round(call);
}

typedef int round_fn(struct call *call, const struct parts *parts, uint64_t offset, uint64_t n);

static int
reduce_round(struct call *call, const struct parts *parts, uint64_t offset, uint64_t n)
{
    struct nccl_link *link = &call->table->link;
    memcpy(link->pinned, parts->recv + offset, (size_t)n);
    int rc = to_device(call, 0, n);
    if (rc == 0) {
        rc = check(call, link->nccl->ncclAllReduce(link->scratch, link->scratch,
                                                   (size_t)(n / sizeof(int64_t)), DCP_NCCL_INT64,
                                                   DCP_NCCL_MIN, link->comm, link->stream));
    }
    rc = rc == 0 ? bring(call, n) : rc;
    if (rc == 0) {
        memcpy(parts->recv + offset, link->pinned, (size_t)n);
    }
    return rc;
}

static int
broadcast_round(struct call *call, const struct parts *parts, uint64_t offset, uint64_t n)
{
    struct nccl_link *link = &call->table->link;
    bool is_root = link->source.rank == parts->root;
    int rc = 0;
    if (is_root) {
        memcpy(link->pinned, parts->recv + offset, (size_t)n);
        rc = to_device(call, 0, n);
    }
    if (rc == 0) {
        rc = check(call, link->nccl->ncclBroadcast(link->scratch, link->scratch, (size_t)n,
                                                   DCP_NCCL_UINT8, (int)parts->root, link->comm,
                                                   link->stream));
    }
    if (rc == 0 && !is_root) {
        rc = to_host(call, 0, n);
    }
    if (rc == 0) {
        rc = wait_for_round(call);
    }
    if (rc == 0 && !is_root) {
        memcpy(parts->recv + offset, link->pinned, (size_t)n);
    }
    return rc;
}

/* From the buffer, which has `n` bytes of each rank, to the places in the caller's memory. */
static void
take_parts(const struct call *call, const struct parts *parts, uint64_t offset, uint64_t n)
{
    const struct nccl_link *link = &call->table->link;
    for (uint32_t r = 0; r < link->source.size; r++) {
        uint8_t *to = parts->recv + call->bytes * r + offset;
        const uint8_t *from = r == link->source.rank ? parts->send + offset : link->pinned + n * r;
        if (to != from) {
            memmove(to, from, (size_t)n);
        }
    }
}

static int
all_gather_round(struct call *call, const struct parts *parts, uint64_t offset, uint64_t n)
{
    struct nccl_link *link = &call->table->link;
    uint64_t own = n * link->source.rank;
    memcpy(link->pinned + own, parts->send + offset, (size_t)n);
    int rc = to_device(call, own, n);
    if (rc == 0) {
        rc = check(call, link->nccl->ncclAllGather(link->scratch + own, link->scratch, (size_t)n,
                                                   DCP_NCCL_UINT8, link->comm, link->stream));
    }
    rc = rc == 0 ? bring(call, n * link->source.size) : rc;
    if (rc == 0) {
        take_parts(call, parts, offset, n);
    }
    return rc;
}

static int
gather_at_root(struct call *call, const struct parts *parts, uint64_t offset, uint64_t n)
{
    int rc = with_all_ranks(call, false, n);
    rc = rc == 0 ? bring(call, n * call->table->link.source.size) : rc;
    if (rc == 0) {
        take_parts(call, parts, offset, n);
    }
    return rc;
}

static int
gather_round(struct call *call, const struct parts *parts, uint64_t offset, uint64_t n)
{
    struct nccl_link *link = &call->table->link;
    if (link->source.rank == parts->root) {
        return gather_at_root(call, parts, offset, n);
    }
    memcpy(link->pinned, parts->send + offset, (size_t)n);
    int rc = to_device(call, 0, n);
    if (rc == 0) {
        rc = check(call, link->nccl->ncclSend(link->scratch, (size_t)n, DCP_NCCL_UINT8,
                                              (int)parts->root, link->comm, link->stream));
    }
    return rc != 0 ? rc : wait_for_round(call);
}

static int
scatter_from_root(struct call *call, const struct parts *parts, uint64_t offset, uint64_t n)
{
    struct nccl_link *link = &call->table->link;
    for (uint32_t r = 0; r < link->source.size; r++) {
        memcpy(link->pinned + n * r, parts->send + call->bytes * r + offset, (size_t)n);
    }
    memcpy(parts->recv + offset, link->pinned + n * link->source.rank, (size_t)n);
    int rc = to_device(call, 0, n * link->source.size);
    if (rc == 0) {
        rc = with_all_ranks(call, true, n);
    }
    return rc != 0 ? rc : wait_for_round(call);
}

static int
scatter_round(struct call *call, const struct parts *parts, uint64_t offset, uint64_t n)
{
    struct nccl_link *link = &call->table->link;
    if (link->source.rank == parts->root) {
        return scatter_from_root(call, parts, offset, n);
    }
    int rc = check(call, link->nccl->ncclRecv(link->scratch, (size_t)n, DCP_NCCL_UINT8,
                                              (int)parts->root, link->comm, link->stream));
    rc = rc == 0 ? bring(call, n) : rc;
    if (rc == 0) {
        memcpy(parts->recv + offset, link->pinned, (size_t)n);
    }
    return rc;
}

/* ---- the table ---- */

static int
run_rounds(struct call *call, const struct parts *parts, uint32_t parts_count, round_fn *round)
{
    struct nccl_table *table = call->table;
    uint64_t timeout_ns = table->link.source.timeout_ns;
    uint64_t most = DCP_NCCL_SCRATCH_BYTES / parts_count & ~(uint64_t)(sizeof(int64_t) - 1);
    int rc = 0;
    if (!table->connected) {
        rc = nccl_link_connect(&table->link, &call->stay, nccl_now_ns() + timeout_ns, &call->err);
        table->connected = rc == 0;
    }
    for (uint64_t offset = 0; rc == 0 && offset < call->bytes; offset += most) {
        call->deadline_ns = nccl_now_ns() + timeout_ns;
        rc = round(call, parts, offset, dcp_min_u64(most, call->bytes - offset));
    }
    return rc;
}

/* `parts_count`: how many ranks' parts one operation carries. */
static int
run(void *ctx, const char *what, uint64_t bytes, const struct parts *parts, uint32_t parts_count,
    round_fn *round, struct dcp_error *err)
{
    struct nccl_table *table = ctx;
    struct call call = {.table = table, .what = what, .bytes = bytes};
    dcp_error_clear(&call.err);
    if (parts->root >= table->link.source.size) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "%s with root %u in a group of %u ranks",
                             what, parts->root, table->link.source.size);
    }
    if (table->poisoned) {
        return refuse(&call, err);
    }
    int rc = cuda_enter(table->link.source.device_index, &call.stay, &call.err);
    if (rc == 0) {
        rc = run_rounds(&call, parts, parts_count, round);
        cuda_leave(&call.stay);
    }
    if (rc == 0) {
        return 0;
    }
    rc = fail(&call, rc, err);
    nccl_link_end(&table->link, true);
    return rc;
}

static uint32_t
size_of(void *ctx)
{
    return ((const struct nccl_table *)ctx)->link.source.size;
}

static int
nccl_all_reduce_min(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err)
{
    struct parts parts = {.recv = (uint8_t *)lanes};
    return run(ctx, "all_reduce", count * sizeof *lanes, &parts, 1, reduce_round, err);
}

static int
nccl_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
            struct dcp_error *err)
{
    struct parts parts = {root, send, recv};
    return run(ctx, "gather", bytes, &parts, size_of(ctx), gather_round, err);
}

static int
nccl_all_gather(void *ctx, const void *send, void *recv, size_t bytes, struct dcp_error *err)
{
    struct parts parts = {0, send, recv};
    return run(ctx, "all_gather", bytes, &parts, size_of(ctx), all_gather_round, err);
}

static int
nccl_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
             struct dcp_error *err)
{
    struct parts parts = {root, send, recv};
    return run(ctx, "scatter", bytes, &parts, size_of(ctx), scatter_round, err);
}

static int
nccl_broadcast(void *ctx, uint32_t root, void *buf, size_t bytes, struct dcp_error *err)
{
    struct parts parts = {.root = root, .recv = buf};
    return run(ctx, "broadcast", bytes, &parts, 1, broadcast_round, err);
}

static void
nccl_destroy(void *ctx)
{
    struct nccl_table *table = ctx;
    if (table == NULL) {
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
    int rc = cuda_enter(link->source.device_index, &stay, err);
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
    struct nccl_table *table = dcp_calloc(1, sizeof *table);
    if (table == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a table of collectives");
    }
    table->link = (struct nccl_link){.nccl = nccl, .source = *source};
    if (source->timeout_ns == 0 || source->timeout_ns > MOST_TIMEOUT_NS) {
        table->link.source.timeout_ns = MOST_TIMEOUT_NS;
    }
    int rc = prepare(&table->link, err);
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
    };
    return 0;
}

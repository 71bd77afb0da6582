/*
 * nccl_rounds.c: collectives of host bytes over NCCL, a round at a time.
 *
 * A round is as many bytes of every rank as a slot has room for: into pinned memory, on to the
 * device, one NCCL operation, back, and out of pinned memory.  There are several slots, so while
 * the device works at a round the host fills the next and empties the one before: a long message
 * costs what the slower of the two does.  Slots are small enough for what was copied into one to be
 * in the processor's cache when it is copied out.  Votes are a single round.
 *
 * Gather and scatter are grouped sends and receives: NCCL's own operations of that name are new.  A
 * rank's own part never leaves the host, unless one copy with it is faster than two without.
 *
 * Rounds are waited for in their order, each with the whole of the group's timeout: other ranks may
 * come late to any.  After a failure what was put on the stream is left there.
 *
 * Threads: one at a time for a link.  Run on stand-ins for CUDA and NCCL, not on a GPU.
 */
#include <string.h>

#include "nccl_link.h"

enum {
    /* What it takes to copy fewer bytes is less than a second copy's beginning. */
    WORTH_TWO_COPIES_BYTES = 64 << 10,
};

_Static_assert(DCP_NCCL_ROUND_BYTES / DCP_MAX_RANKS >= sizeof(int64_t), "a round is not empty");

/* Bytes [offset, offset + n) of every rank's part, in a slot; part r is there at n * r. */
struct round {
    const struct nccl_slot *slot;
    uint64_t offset;
    uint64_t n;
};

static bool
is_root(const struct nccl_call *call)
{
    return call->link->source.rank == call->root;
}

/* ---- the steps of a round on the stream ---- */

static int
put_copy(struct nccl_call *call, void *to, const void *from, uint64_t bytes, int direction,
         const char *what)
{
    const struct cuda_stay *stay = &call->stay;
    return bytes == 0 ? 0
                      : cuda_check(stay,
                                   stay->runtime->cudaMemcpyAsync(to, from, (size_t)bytes,
                                                                  direction, call->link->stream),
                                   what, &call->err);
}

static int
to_device(struct nccl_call *call, const struct round *round, uint64_t at, uint64_t bytes)
{
    const struct nccl_slot *slot = round->slot;
    return put_copy(call, slot->scratch + at, slot->pinned + at, bytes,
                    DCP_CUDA_COPY_HOST_TO_DEVICE, "copy a message to the device");
}

static int
to_host(struct nccl_call *call, const struct round *round, uint64_t at, uint64_t bytes)
{
    const struct nccl_slot *slot = round->slot;
    return put_copy(call, slot->pinned + at, slot->scratch + at, bytes,
                    DCP_CUDA_COPY_DEVICE_TO_HOST, "copy a message from the device");
}

typedef int copy_fn(struct nccl_call *call, const struct round *round, uint64_t at, uint64_t bytes);

/* The parts of all ranks but this one's own. */
static int
copy_others(struct nccl_call *call, const struct round *round, copy_fn *copy)
{
    uint64_t size = call->link->source.size;
    uint64_t rank = call->link->source.rank;
    uint64_t n = round->n;
    if (n < WORTH_TWO_COPIES_BYTES) {
        return copy(call, round, 0, n * size);
    }
    int rc = copy(call, round, 0, n * rank);
    return rc != 0 ? rc : copy(call, round, n * (rank + 1), n * (size - rank - 1));
}

static int
check(struct nccl_call *call, nccl_status status)
{
    return nccl_link_check(call->link, status, "starting it", nccl_now_ns() + call->timeout_ns,
                           &call->err);
}

/* At a root.  A group is always ended; the first thing that went wrong counts. */
static int
with_others(struct nccl_call *call, const struct round *round, bool sends)
{
    const struct nccl_link *link = call->link;
    const struct nccl_api *nccl = link->nccl;
    nccl_status status = nccl->ncclGroupStart();
    if (status != 0) {
        return check(call, status);
    }
    for (uint32_t peer = 0; peer < link->source.size && status == 0; peer++) {
        uint8_t *part = round->slot->scratch + round->n * peer;
        if (peer != link->source.rank) {
            status = sends ? nccl->ncclSend(part, (size_t)round->n, DCP_NCCL_UINT8, (int)peer,
                                            link->comm, link->stream)
                           : nccl->ncclRecv(part, (size_t)round->n, DCP_NCCL_UINT8, (int)peer,
                                            link->comm, link->stream);
        }
        status = status == DCP_NCCL_IN_PROGRESS ? 0 : status;
    }
    nccl_status ended = nccl->ncclGroupEnd();
    return check(call, status != 0 ? status : ended);
}

/* ---- a round of each collective: fill a slot, put the work on the stream, take what came ---- */

typedef void host_fn(const struct nccl_call *call, const struct round *round);
typedef int stream_fn(struct nccl_call *call, const struct round *round);

static void
fill_in_place(const struct nccl_call *call, const struct round *round)
{
    memcpy(round->slot->pinned, call->recv + round->offset, (size_t)round->n);
}

static void
take_in_place(const struct nccl_call *call, const struct round *round)
{
    memcpy(call->recv + round->offset, round->slot->pinned, (size_t)round->n);
}

static void
fill_own(const struct nccl_call *call, const struct round *round)
{
    memcpy(round->slot->pinned + round->n * call->link->source.rank, call->send + round->offset,
           (size_t)round->n);
}

/* At a root. */
static void
fill_others(const struct nccl_call *call, const struct round *round)
{
    for (uint32_t r = 0; r < call->link->source.size; r++) {
        const uint8_t *from = call->send + call->bytes * r + round->offset;
        if (r != call->link->source.rank) {
            memcpy(round->slot->pinned + round->n * r, from, (size_t)round->n);
        } else if (from != call->recv + round->offset) {
            memmove(call->recv + round->offset, from, (size_t)round->n);
        }
    }
}

/* To the places in the caller's memory; its own part from where that lies already. */
static void
take_all(const struct nccl_call *call, const struct round *round)
{
    for (uint32_t r = 0; r < call->link->source.size; r++) {
        uint8_t *to = call->recv + call->bytes * r + round->offset;
        const uint8_t *from = r == call->link->source.rank ? call->send + round->offset
                                                           : round->slot->pinned + round->n * r;
        if (to != from) {
            memmove(to, from, (size_t)round->n);
        }
    }
}

static int
reduce(struct nccl_call *call, const struct round *round)
{
    const struct nccl_link *link = call->link;
    uint8_t *at = round->slot->scratch;
    int rc = to_device(call, round, 0, round->n);
    if (rc == 0) {
        rc = check(call, link->nccl->ncclAllReduce(at, at, (size_t)(round->n / sizeof(int64_t)),
                                                   DCP_NCCL_INT64, DCP_NCCL_MIN, link->comm,
                                                   link->stream));
    }
    return rc != 0 ? rc : to_host(call, round, 0, round->n);
}

static int
broadcast(struct nccl_call *call, const struct round *round)
{
    const struct nccl_link *link = call->link;
    uint8_t *at = round->slot->scratch;
    int rc = is_root(call) ? to_device(call, round, 0, round->n) : 0;
    if (rc == 0) {
        rc = check(call, link->nccl->ncclBroadcast(at, at, (size_t)round->n, DCP_NCCL_UINT8,
                                                   (int)call->root, link->comm, link->stream));
    }
    return rc != 0 || is_root(call) ? rc : to_host(call, round, 0, round->n);
}

static int
all_gather(struct nccl_call *call, const struct round *round)
{
    const struct nccl_link *link = call->link;
    uint8_t *all = round->slot->scratch;
    uint64_t own = round->n * link->source.rank;
    int rc = to_device(call, round, own, round->n);
    if (rc == 0) {
        rc = check(call, link->nccl->ncclAllGather(all + own, all, (size_t)round->n, DCP_NCCL_UINT8,
                                                   link->comm, link->stream));
    }
    return rc != 0 ? rc : copy_others(call, round, to_host);
}

static int
gather(struct nccl_call *call, const struct round *round)
{
    const struct nccl_link *link = call->link;
    uint64_t own = round->n * link->source.rank;
    if (is_root(call)) {
        int rc = with_others(call, round, false);
        return rc != 0 ? rc : copy_others(call, round, to_host);
    }
    int rc = to_device(call, round, own, round->n);
    return rc != 0 ? rc
                   : check(call, link->nccl->ncclSend(round->slot->scratch + own, (size_t)round->n,
                                                      DCP_NCCL_UINT8, (int)call->root, link->comm,
                                                      link->stream));
}

static int
scatter(struct nccl_call *call, const struct round *round)
{
    const struct nccl_link *link = call->link;
    if (is_root(call)) {
        int rc = copy_others(call, round, to_device);
        return rc != 0 ? rc : with_others(call, round, true);
    }
    int rc =
        check(call, link->nccl->ncclRecv(round->slot->scratch, (size_t)round->n, DCP_NCCL_UINT8,
                                         (int)call->root, link->comm, link->stream));
    return rc != 0 ? rc : to_host(call, round, 0, round->n);
}

/* NULL: there is nothing to do. */
struct steps {
    const char *name;
    bool all_parts; /* a slot holds a part of every rank */
    stream_fn *stream;
    struct {
        host_fn *fill, *take;
    } root, other;
};

static const struct steps steps_of[] = {
    [NCCL_ALL_REDUCE] = {"all_reduce",
                         false,
                         reduce,
                         {fill_in_place, take_in_place},
                         {fill_in_place, take_in_place}},
    [NCCL_GATHER] = {"gather", true, gather, {NULL, take_all}, {fill_own, NULL}},
    [NCCL_ALL_GATHER] =
        {"all_gather", true, all_gather, {fill_own, take_all}, {fill_own, take_all}},
    [NCCL_SCATTER] = {"scatter", true, scatter, {fill_others, NULL}, {NULL, take_in_place}},
    [NCCL_BROADCAST] =
        {"broadcast", false, broadcast, {fill_in_place, NULL}, {NULL, take_in_place}},
};

const char *
nccl_kind_name(enum nccl_kind kind)
{
    return steps_of[kind].name;
}

/* ---- the pipeline ---- */

static int
begin(struct nccl_call *call, const struct round *round)
{
    const struct steps *steps = &steps_of[call->kind];
    host_fn *fill = is_root(call) ? steps->root.fill : steps->other.fill;
    if (fill != NULL) {
        fill(call, round);
    }
    int rc = steps->stream(call, round);
    return rc != 0 ? rc
                   : cuda_check(
                         &call->stay,
                         call->stay.runtime->cudaEventRecord(round->slot->done, call->link->stream),
                         "mark the end of a message", &call->err);
}

static int
finish(struct nccl_call *call, const struct round *round)
{
    const struct steps *steps = &steps_of[call->kind];
    host_fn *take = is_root(call) ? steps->root.take : steps->other.take;
    int rc = nccl_link_wait(call->link, &call->stay, round->slot->done,
                            nccl_now_ns() + call->timeout_ns, &call->err);
    if (rc == 0 && take != NULL) {
        take(call, round);
    }
    return rc;
}

int
nccl_rounds_run(struct nccl_call *call)
{
    uint64_t parts = steps_of[call->kind].all_parts ? call->link->source.size : 1;
    uint64_t most = DCP_NCCL_ROUND_BYTES / parts & ~(uint64_t)(sizeof(int64_t) - 1);
    uint64_t rounds = call->bytes / most + (call->bytes % most != 0);
    struct round under_way[NCCL_SLOTS];
    int rc = 0;
    for (uint64_t i = 0; rc == 0 && i < rounds + NCCL_SLOTS; i++) {
        struct round *round = &under_way[i % NCCL_SLOTS];
        if (i >= NCCL_SLOTS && i - NCCL_SLOTS < rounds) {
            rc = finish(call, round);
        }
        if (rc == 0 && i < rounds) {
            *round = (struct round){.slot = &call->link->slots[i % NCCL_SLOTS],
                                    .offset = i * most,
                                    .n = dcp_min_u64(most, call->bytes - i * most)};
            rc = begin(call, round);
        }
    }
    return rc;
}

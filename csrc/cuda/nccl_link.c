/*
 * nccl_link.c: a communicator of ours with its stream and buffers: making, waiting, ending.
 *
 * Nothing waits inside CUDA or NCCL where that can be helped: our stream does not block, our
 * communicator neither, and what was put on the stream is asked after, together with the
 * communicator's asynchronous error, until the deadline.  A synchronising call would wait for a
 * dead rank for ever.
 *
 * The group's own communicator serves where it cannot be split.  It is never aborted by us.
 *
 * A communicator is ended on a thread of its own, for ncclCommAbort and ncclCommDestroy may wait
 * for ranks that never come.  That thread owns the link; it is waited for, but not for ever.
 * Buffers that the device may still use are given up for lost.
 *
 * Threads: one at a time for a link.
 */
#include "nccl_link.h"

int
nccl_error(const struct nccl_api *nccl, nccl_comm comm, nccl_status status, const char *what,
           struct dcp_error *err)
{
    const char *text = nccl->ncclGetErrorString(status);
    const char *more = nccl->ncclGetLastError != NULL ? nccl->ncclGetLastError(comm) : NULL;
    bool has_more = more != NULL && more[0] != '\0';
    return dcp_error_set(err, DCP_E_COMM, 0, NULL, "%s: %s (NCCL result %u)%s%s", what,
                         text != NULL ? text : "unknown result", status, has_more ? ": " : "",
                         has_more ? more : "");
}

/* ---- making ---- */

int
nccl_link_check_source(const struct nccl_api *nccl, const struct dcp_nccl_source *source,
                       int32_t *ret_device_index, struct dcp_error *err)
{
    nccl_comm comm = source->raw;
    nccl_status state = 0;
    int rank = -1, count = -1, device = -1;
    nccl_status rc = nccl->ncclCommGetAsyncError(comm, &state);
    if (rc == 0) {
        rc = state;
    }
    if (rc == 0) {
        rc = nccl->ncclCommUserRank(comm, &rank);
    }
    if (rc == 0) {
        rc = nccl->ncclCommCount(comm, &count);
    }
    if (rc == 0) {
        rc = nccl->ncclCommCuDevice(comm, &device);
    }
    if (rc == DCP_NCCL_IN_PROGRESS) {
        return dcp_error_set(err, DCP_E_MISSING, 0, NULL,
                             "the group's NCCL communicator is not connected yet");
    }
    if (rc != 0) {
        return nccl_error(nccl, comm, rc, "the group's NCCL communicator is not well", err);
    }
    if (rank != (int)source->rank || count != (int)source->size) {
        return dcp_error_set(err, DCP_E_COMM, 0, NULL,
                             "the group's NCCL communicator is rank %d of %d, where the group is "
                             "rank %u of %u",
                             rank, count, source->rank, source->size);
    }
    *ret_device_index = device;
    return 0;
}

static int
make_event(const struct cuda_stay *stay, cuda_event *ret_event, struct dcp_error *err)
{
    return cuda_check(stay,
                      stay->runtime->cudaEventCreateWithFlags(ret_event, DCP_CUDA_EVENT_NO_TIMING),
                      "make an event for messages", err);
}

static int
make_buffers(struct nccl_link *link, const struct cuda_stay *stay, struct dcp_error *err)
{
    const struct cudart_api *cuda = stay->runtime;
    void *pinned = NULL, *scratch = NULL;
    int rc = cuda_check(stay, cuda->cudaHostAlloc(&pinned, DCP_NCCL_SCRATCH_BYTES, 0),
                        "pin a buffer for messages", err);
    link->pinned = pinned;
    if (rc == 0) {
        rc = cuda_check(stay, cuda->cudaMallocAsync(&scratch, DCP_NCCL_SCRATCH_BYTES, link->stream),
                        "allocate a buffer for messages", err);
        link->scratch = scratch;
    }
    for (uint64_t i = 0; rc == 0 && i < NCCL_SLOTS; i++) {
        link->slots[i].pinned = link->pinned + i * DCP_NCCL_ROUND_BYTES;
        link->slots[i].scratch = link->scratch + i * DCP_NCCL_ROUND_BYTES;
    }
    return rc;
}

int
nccl_link_prepare(struct nccl_link *link, const struct cuda_stay *stay, struct dcp_error *err)
{
    const struct cudart_api *cuda = stay->runtime;
    int rc = cuda_check(
        stay, cuda->cudaStreamCreateWithFlags(&link->stream, DCP_CUDA_STREAM_NON_BLOCKING),
        "make a stream for messages", err);
    if (rc == 0) {
        rc = make_event(stay, &link->order, err);
    }
    for (int i = 0; rc == 0 && i < NCCL_SLOTS; i++) {
        rc = make_event(stay, &link->slots[i].done, err);
    }
    return rc != 0 ? rc : make_buffers(link, stay, err);
}

int
nccl_link_connect(struct nccl_link *link, uint64_t deadline_ns, struct dcp_error *err)
{
    int version = 0;
    bool can_split = link->nccl->ncclCommSplit != NULL &&
                     link->nccl->ncclGetVersion(&version) == 0 &&
                     version >= DCP_NCCL_CONFIG_VERSION;
    if (can_split) {
        int rc = nccl_split(link, deadline_ns, &link->comm, err);
        link->is_split = rc == 0;
        return rc;
    }
    link->comm = link->source.raw;
    return 0;
}

int
nccl_link_follow(const struct nccl_link *link, const struct cuda_stay *stay, cuda_stream stream,
                 struct dcp_error *err)
{
    const struct cudart_api *cuda = stay->runtime;
    int rc =
        cuda_refuse_if_capturing(stay, stream, "exchange messages behind a stream's work", err);
    cuda_status idle = rc == 0 ? cuda->cudaStreamQuery(stream) : 0;
    if (rc != 0 || idle == 0) {
        return rc; /* there is nothing to come after: mostly so, but for a save's first call */
    }
    if (idle == DCP_CUDA_ERROR_NOT_READY) {
        (void)cuda->cudaGetLastError();
        idle = cuda->cudaEventRecord(link->order, stream);
    }
    rc = cuda_check(stay, idle, "mark the end of the caller's work", err);
    if (rc == 0) {
        rc = cuda_check(stay, cuda->cudaStreamWaitEvent(link->stream, link->order, 0),
                        "have messages wait for the caller's work", err);
    }
    return rc;
}

/* ---- waiting ---- */

static int
too_late(const char *what, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL, "%s: timed out: not all ranks came in time",
                         what);
}

int
nccl_link_check(const struct nccl_link *link, nccl_status status, const char *what,
                uint64_t deadline_ns, struct dcp_error *err)
{
    uint32_t looks = 0;
    while (status == DCP_NCCL_IN_PROGRESS) {
        nccl_status asked = link->nccl->ncclCommGetAsyncError(link->comm, &status);
        if (asked != 0) {
            status = asked;
        } else if (status == DCP_NCCL_IN_PROGRESS) {
            if (nccl_now_ns() > deadline_ns) {
                return too_late(what, err);
            }
            nccl_pause(&looks);
        }
    }
    return status == 0 ? 0 : nccl_error(link->nccl, link->comm, status, what, err);
}

int
nccl_link_wait(const struct nccl_link *link, const struct cuda_stay *stay, cuda_event event,
               uint64_t deadline_ns, struct dcp_error *err)
{
    static const char what[] = "waiting for the other ranks";
    uint32_t looks = 0;
    int rc = 0;
    while (rc == 0) {
        cuda_status done = stay->runtime->cudaEventQuery(event);
        if (done != DCP_CUDA_ERROR_NOT_READY) {
            return cuda_check(stay, done, "send and receive messages", err);
        }
        nccl_status state = 0;
        nccl_status asked = link->nccl->ncclCommGetAsyncError(link->comm, &state);
        if (asked != 0 || (state != 0 && state != DCP_NCCL_IN_PROGRESS)) {
            rc = nccl_error(link->nccl, link->comm, asked != 0 ? asked : state, what, err);
        } else if (nccl_now_ns() > deadline_ns) {
            rc = too_late(what, err);
        } else {
            nccl_pause(&looks);
        }
    }
    return rc;
}

/* ---- ending ---- */

/* Peers may not have taken yet what this rank sent: destroying flushes it, aborting would not. */
static void
end_communicator(const struct nccl_link *link, bool failed, uint64_t deadline_ns)
{
    const struct nccl_api *nccl = link->nccl;
    if (!link->is_split) {
        return;
    }
    bool flushed = !failed;
    if (flushed && nccl->ncclCommFinalize != NULL) {
        struct dcp_error unused;
        dcp_error_clear(&unused);
        flushed = nccl_link_check(link, nccl->ncclCommFinalize(link->comm), "end a communicator",
                                  deadline_ns, &unused) == 0;
    }
    nccl_status rc = flushed ? nccl->ncclCommDestroy(link->comm) : nccl->ncclCommAbort(link->comm);
    (void)rc; /* there is nobody to tell, and nothing else to try */
}

/* Asks instead of synchronising, for what is on the stream may never end. */
static bool
is_idle(const struct nccl_link *link, const struct cuda_stay *stay, uint64_t deadline_ns)
{
    uint32_t looks = 0;
    for (;;) {
        cuda_status done = stay->runtime->cudaStreamQuery(link->stream);
        if (done != DCP_CUDA_ERROR_NOT_READY) {
            (void)stay->runtime->cudaGetLastError();
            return done == 0;
        }
        if (nccl_now_ns() > deadline_ns) {
            return false;
        }
        nccl_pause(&looks);
    }
}

static void
free_buffers(const struct nccl_link *link, const struct cuda_stay *stay)
{
    const struct cudart_api *cuda = stay->runtime;
    if (link->scratch != NULL) {
        (void)cuda->cudaFreeAsync(link->scratch, link->stream);
    }
    if (link->pinned != NULL) {
        (void)cuda->cudaFreeHost(link->pinned);
    }
    for (int i = 0; i < NCCL_SLOTS; i++) {
        if (link->slots[i].done != NULL) {
            (void)cuda->cudaEventDestroy(link->slots[i].done);
        }
    }
    if (link->order != NULL) {
        (void)cuda->cudaEventDestroy(link->order);
    }
    (void)cuda->cudaStreamDestroy(link->stream);
    (void)cuda->cudaGetLastError(); /* torch must not find what went wrong here */
}

struct ending {
    struct nccl_link link; /* owned */
    bool failed;
};

static void
end_link(void *self)
{
    const struct ending *ending = self;
    const struct nccl_link *link = &ending->link;
    uint64_t deadline_ns = nccl_now_ns() + DCP_NCCL_GRACE_NS;
    struct cuda_stay stay;
    struct dcp_error unused;
    dcp_error_clear(&unused);
    if (cuda_enter(link->device_index, &stay, &unused) != 0) {
        return;
    }
    end_communicator(link, ending->failed, deadline_ns);
    if (link->stream != NULL && is_idle(link, &stay, deadline_ns)) {
        free_buffers(link, &stay);
    }
    cuda_leave(&stay);
}

void
nccl_link_end(struct nccl_link *link, bool failed)
{
    struct ending *ending = dcp_malloc(sizeof *ending);
    if (ending == NULL) {
        return; /* everything is lost, and nothing is touched that may be in use */
    }
    *ending = (struct ending){*link, failed};
    *link = (struct nccl_link){
        .nccl = link->nccl, .source = link->source, .device_index = link->device_index};
    if (nccl_run_apart(end_link, dcp_free, ending, nccl_now_ns() + DCP_NCCL_GRACE_NS)) {
        dcp_free(ending);
    }
}

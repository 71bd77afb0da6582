/*
 * nccl_link.h: private: a communicator of ours with its streams and buffers, between nccl_comm.c,
 * which is the table, nccl_rounds.c, which knows the collectives, and what they stand on.
 */
#ifndef DCP_NCCL_LINK_H
#define DCP_NCCL_LINK_H

#include <stdbool.h>

#include "cuda_context.h"
#include "dcp_nccl.h"
#include "nccl_api.h"

enum { NCCL_SLOTS = DCP_NCCL_SCRATCH_BYTES / DCP_NCCL_ROUND_BYTES };

/* What one round works in.  Its memory is a part of the link's. */
struct nccl_slot {
    uint8_t *scratch; /* DCP_NCCL_ROUND_BYTES of the device */
    uint8_t *pinned;  /* as many of the host */
    cuda_event done;  /* of the round that was put on the stream last */
};

struct nccl_link {
    const struct nccl_api *nccl;
    struct dcp_nccl_source source;
    int32_t device_index; /* the communicator's */
    nccl_comm comm;       /* ours once it is split; where that is not possible the source's */
    bool is_split;        /* `comm` is ours to end */
    cuda_stream stream;   /* ours, not blocking */
    cuda_event order;     /* of the caller's stream, at the beginning of a call */
    uint8_t *scratch;     /* DCP_NCCL_SCRATCH_BYTES of the device */
    uint8_t *pinned;      /* as many of the host */
    struct nccl_slot slots[NCCL_SLOTS];
};

/* Makes stream, events and buffers on the communicator's device; communicates nothing.  What it
 * made before it failed is ended by nccl_link_end. */
int nccl_link_prepare(struct nccl_link *link, const struct cuda_stay *stay,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* Whether the source is well and of this rank; its device. */
int nccl_link_check_source(const struct nccl_api *nccl, const struct dcp_nccl_source *source,
                           int32_t *ret_device_index, struct dcp_error *err) DCP_MUST_CHECK;
/* Collective, at the first call: our own communicator, or the source's. */
int nccl_link_connect(struct nccl_link *link, uint64_t deadline_ns,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* What is put on our stream from here on comes after what `stream` has been given so far. */
int nccl_link_follow(const struct nccl_link *link, const struct cuda_stay *stay, cuda_stream stream,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* Whether an NCCL call did what it should; waits for one that goes on behind its return. */
int nccl_link_check(const struct nccl_link *link, nccl_status status, const char *what,
                    uint64_t deadline_ns, struct dcp_error *err) DCP_MUST_CHECK;
/* Waits for an event of our stream. */
int nccl_link_wait(const struct nccl_link *link, const struct cuda_stay *stay, cuda_event event,
                   uint64_t deadline_ns, struct dcp_error *err) DCP_MUST_CHECK;
/* Takes the link, which may be half made: ends the communicator if it is ours and frees what the
 * device does not use any more.  After a failure nothing may come to an end: then it is aborted. */
void nccl_link_end(struct nccl_link *link, bool failed);

/* nccl_split.c: ncclCommSplit with a deadline. */
int nccl_split(const struct nccl_link *link, uint64_t deadline_ns, nccl_comm *ret_comm,
               struct dcp_error *err) DCP_MUST_CHECK;
/* Of a status: NCCL's text for it, and for what went before it. */
int nccl_error(const struct nccl_api *nccl, nccl_comm comm, nccl_status status, const char *what,
               struct dcp_error *err);

/* nccl_rounds.c */
enum nccl_kind {
    NCCL_ALL_REDUCE,
    NCCL_GATHER,
    NCCL_ALL_GATHER,
    NCCL_SCATTER,
    NCCL_BROADCAST,
};

/* A collective of bytes of the host. */
struct nccl_call {
    const struct nccl_link *link;
    struct cuda_stay stay;
    enum nccl_kind kind;
    uint32_t root;
    const uint8_t *send;
    uint8_t *recv;  /* of a reduction and a broadcast: the bytes, in place */
    uint64_t bytes; /* of one rank */
    uint64_t timeout_ns;
    struct dcp_error err; /* of what went wrong */
};

/* The name in messages. */
const char *nccl_kind_name(enum nccl_kind kind);
/* On a device that was entered, over a link that is connected. */
int nccl_rounds_run(struct nccl_call *call) DCP_MUST_CHECK;

/* nccl_wait.c */
uint64_t nccl_now_ns(void);
/* Between two looks; *looks counts them. */
void nccl_pause(uint32_t *looks);
/* Runs run(self) on a thread of its own and waits for its return: true.  False: it has not returned
 * by the deadline; the thread owns `self` now, and calls late(self) when it does.  Where no thread
 * can be had it runs here, and there is no deadline. */
bool nccl_run_apart(void (*run)(void *self), void (*late)(void *self), void *self,
                    uint64_t deadline_ns) DCP_MUST_CHECK;

#endif

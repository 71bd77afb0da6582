/*
 * dcp_store.h: the table of a key-value store that all ranks of a group reach (torch's TCPStore and
 * its like), and the agreement by which the ranks of a background save end it together.
 *
 * A table is one client of the store, cloned for us: a call that is stuck blocks no other client.
 * Calls may block beyond any timeout when the host of the store is frozen, so whoever must not hang
 * calls from a thread that it can abandon.
 *
 * Thread rule: one thread at a time per table.
 */
#ifndef DCP_STORE_H
#define DCP_STORE_H

#include "dcp_comm.h"
#include "dcp_commit.h"
#include "dcp_shm.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dcp_store {
    void *ctx;
    const char *kind; /* "store", "simulated": for messages */
    int (*set)(void *ctx, const char *key, const void *bytes, size_t len, struct dcp_error *err);
    /* Sets the key if nobody did: the first wins. */
    int (*set_once)(void *ctx, const char *key, const void *bytes, size_t len,
                    struct dcp_error *err);
    /* Only of a key that is there.  DCP_E_LIMIT when the value is over `cap` bytes. */
    int (*get)(void *ctx, const char *key, void *buf, size_t cap, size_t *ret_len,
               struct dcp_error *err);
    /* Adds to a counter; 0 reads it (and makes it).  Not tried again: it may have counted. */
    int (*add)(void *ctx, const char *key, int64_t delta, int64_t *ret_value,
               struct dcp_error *err);
    int (*check)(void *ctx, const char *key, bool *ret_there, struct dcp_error *err);
    int (*remove)(void *ctx, const char *key, struct dcp_error *err); /* there or not */
    void (*destroy)(void *ctx); /* of the real one: needs no GIL */
};

/* ---- who is on this host ---- */

/* The processes of a group by rank, exchanged once per group. */
struct dcp_peers {
    struct dcp_shm_host *hosts; /* owned; by rank; all zero: not known */
    uint32_t *leaders; /* owned; by rank: the lowest rank of its host; its own where not known */
    uint32_t count, rank;
};

/* Collective.  A rank without memory for it stays out, and the others' call fails. */
int dcp_peers_exchange(const struct dcp_comm *comm, const struct dcp_shm *shm,
                       struct dcp_peers *ret_peers, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_peers_clean_up(struct dcp_peers *peers);

/* ---- agreement ---- */

/* What became of this rank's bytes. */
enum dcp_bytes_state {
    DCP_BYTES_WRITING = 0,
    DCP_BYTES_DURABLE = 1,
    DCP_BYTES_FAILED = 2, /* *ret_failure is filled; it is borrowed */
};

struct dcp_agreement {
    const struct dcp_store *store;
    const char *prefix; /* of the keys, the same on all ranks and of this save alone: "dcp_native/
                           <save id>/" */
    uint32_t rank, size, coordinator;
    uint64_t deadline_ns; /* dcp_now_ns() at which this rank ends; the coordinator gives up up to 5
                             s earlier, so that the others hear of it */
    uint64_t host_timeout_ns;      /* without a beat of a host: it is dead (default 10 s) */
    const struct dcp_peers *peers; /* NULL: nobody is watched */
    const struct dcp_shm *shm;     /* for peers: alive */
    bool independent; /* every rank publishes its own before it says durable; a failure of one rank
                         undoes nothing of the others */
    void *ctx;        /* of the calls below, all from the thread that runs the agreement */
    uint64_t (*now_ns)(void *ctx); /* NULL: dcp_now_ns().  Tests have a clock of their own */
    /* Waits up to `wait_ns` for a change, then tells.  After DURABLE and FAILED it only waits. */
    enum dcp_bytes_state (*bytes)(void *ctx, uint64_t wait_ns, struct dcp_failure *ret_failure);
    int (*publish)(void *ctx, struct dcp_error *err); /* coordinator, or `independent` */
    /* Both may be called while the bytes are still being written.  They wait for nothing but the
     * claim: what is left to undo is undone in `settled`, when the verdict was told. */
    enum dcp_outcome (*abandon)(void *ctx); /* coordinator, or `independent` */
    /* The others, not `independent`: the verdict.  UNKNOWN: nobody knows it, files are left. */
    void (*conclude)(void *ctx, enum dcp_outcome outcome);
    /* The outcome is certain and told (the coordinator) or known: the caller's future may end.
     * After it the agreement only takes leave.  `failures`: NULL when committed. */
    void (*settled)(void *ctx, int rc, const struct dcp_failure_list *failures,
                    const struct dcp_error *err);
};

struct dcp_agreement_stats {
    uint64_t store_calls; /* of this rank */
    bool in_touch;        /* all ranks took leave (coordinator), or this one did */
};

/* Runs the protocol to its end: from writing to leave taken.  Calls `settled` exactly once.  rc of
 * it: 0, DCP_E_PEER with `failures` (the same on all ranks that hear of them), or with `err`
 * DCP_E_TIMEOUT (no verdict), DCP_E_COMM (the store was lost), DCP_E_NOMEM or DCP_E_LIMIT.  With
 * `err`, whether the checkpoint was committed is not known, but on the coordinator. */
void dcp_agreement_run(const struct dcp_agreement *agreement,
                       struct dcp_agreement_stats *ret_stats);

#ifdef __cplusplus
}
#endif
#endif

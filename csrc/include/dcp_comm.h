/*
 * dcp_comm.h: the table of byte collectives, and the agreements built on it: vote, failure
 * exchange, variable gathers.
 *
 * A table belongs to one group; calls are collective and made by one thread at a time, in the same
 * order on all ranks. Sizes are equal on all ranks (fixed headers before anything variable:
 * bridge.md 2, 5).  A failed call poisons the group for us: later calls fail at once with
 * DCP_E_COMM.
 */
#ifndef DCP_COMM_H
#define DCP_COMM_H

#include "dcp_alloc.h"
#include "dcp_hash.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dcp_comm {
    void *ctx;
    const char *kind; /* "local", "simulated", "gloo", "nccl": for reports */
    uint32_t rank;    /* in the group */
    uint32_t size;
    int (*all_reduce_min)(void *ctx, int64_t *lanes, size_t count,
                          struct dcp_error *err); /* in place */
    int (*gather)(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
                  struct dcp_error *err);
    int (*all_gather)(void *ctx, const void *send, void *recv, size_t bytes, struct dcp_error *err);
    int (*scatter)(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
                   struct dcp_error *err);
    int (*broadcast)(void *ctx, uint32_t root, void *buf, size_t bytes, struct dcp_error *err);
    void (*destroy)(void *ctx);
    /* One more owner, who has to destroy it, too; NULL: there can be one alone. */
    void (*acquire)(void *ctx);
    /* From here on every call comes after what the caller's stream on `device_index` has been given
     * before the call; NULL: it is not about streams. */
    void (*follow)(void *ctx, void *stream);
    int32_t device_index; /* valid with `follow` */
};

/* What a group's ranks said to each other so far. */
struct dcp_comm_stats {
    uint64_t calls_count;
    uint64_t bytes;   /* of one rank's part of each call */
    uint64_t wall_ns; /* in those calls, mostly waiting for other ranks */
};

/* One rank, no communication (no_dist). */
void dcp_comm_local(struct dcp_comm *ret_comm);

/* `size` ranks in memory, one thread each: tests and scaling.  A rank that leaves early
 * (dcp_comm_sim_kill) makes the others' calls fail with DCP_E_COMM; every wait has the deadline
 * `timeout_ms`. */
struct dcp_comm_sim;
int dcp_comm_sim_new(uint32_t size, uint32_t timeout_ms, struct dcp_comm_sim **ret_sim,
                     struct dcp_error *err) DCP_MUST_CHECK;
void dcp_comm_sim_rank(struct dcp_comm_sim *sim, uint32_t rank, struct dcp_comm *ret_comm);
void dcp_comm_sim_kill(struct dcp_comm_sim *sim, uint32_t rank);
void dcp_comm_sim_destroy(struct dcp_comm_sim *sim);

/* ---- vote (design section 3): one all-reduce, MIN, 16 lanes of int64 ---- */

enum { DCP_VOTE_LANES = 16, DCP_PROTOCOL_VERSION = 4 };

enum dcp_verdict {
    DCP_VERDICT_FAST = 1,      /* every rank may reuse its installed plan */
    DCP_VERDICT_SLOW = 2,      /* gather plans */
    DCP_VERDICT_FAILED = 3,    /* some rank has ok = 0: exchange failures, then raise */
    DCP_VERDICT_OUTSIDE = 4,   /* some rank's plan is made outside of the core: so are all */
    DCP_VERDICT_ELSEWHERE = 5, /* some rank's bytes do not pass through the core: so do none */
};

struct dcp_vote {
    /* in */
    struct dcp_hash128 plan_id; /* zero when no plan is installed */
    bool reuse;                 /* fingerprint equals the one stored with the installed plan */
    bool ok;                    /* nothing failed on this rank */
    bool outside;               /* this rank's plan is made outside of the core */
    bool elsewhere;             /* this rank's bytes do not pass through the core at all */
    uint64_t call;              /* hash of checkpoint_id, kind of save, options that must agree */
    bool is_coordinator;
    bool has_base; /* in: this rank was given a base; out: every rank was.  Loads: see load.c */
    /* in on the coordinator, out elsewhere */
    struct dcp_save_id save_id;
    uint64_t n0;
    struct dcp_hash128 names_hash; /* of the coordinator's plan (dcp_plan_names_hash) */
    uint64_t held_plan; /* low half of the id of the plan that it has installed; 0: none */
    /* out */
    bool call_agrees; /* false with SLOW: ranks named different directories; warn with both */
};

/* DCP_E_COMM: write nothing, raise.  DCP_E_INVALID: ranks run different protocol versions. */
int dcp_vote_run(const struct dcp_comm *comm, struct dcp_vote *vote, enum dcp_verdict *ret_verdict,
                 struct dcp_error *err) DCP_MUST_CHECK;

/* install, status, result: all-reduce of (version, save id equal, ok).  *ret_all_ok false: some
 * rank failed. */
int dcp_status_run(const struct dcp_comm *comm, const struct dcp_save_id *save_id, bool ok,
                   bool *ret_all_ok, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- failure exchange: what failed on which rank, to every rank ---- */

enum dcp_failure_kind {
    DCP_FAILURE_NONE = 0,
    DCP_FAILURE_CORE = 1,   /* bytes are a struct dcp_error */
    DCP_FAILURE_PYTHON = 2, /* bytes are a pickled (exception, StackSummary) */
    /* With one of them, when it is sent: this rank failed only because another one did.  Such
     * records reach nobody where there is a cause. */
    DCP_FAILURE_ECHO = 0x80,
};

struct dcp_failure {
    uint32_t rank;
    uint32_t kind;  /* enum dcp_failure_kind */
    uint8_t *bytes; /* owned by the list */
    size_t len;
};

struct dcp_failure_list {
    struct dcp_failure *items; /* ascending rank */
    size_t count;
};

/* Collective.  `mine` NULL: nothing failed here.  Records over DCP_MAX_FAILURE_BYTES are cut by the
 * caller beforehand. */
int dcp_failure_exchange(const struct dcp_comm *comm, const struct dcp_failure *mine,
                         struct dcp_failure_list *ret_list, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_failure_list_clean_up(struct dcp_failure_list *list);
int dcp_failure_list_copy(const struct dcp_failure_list *list,
                          struct dcp_failure_list *ret_copy) DCP_MUST_CHECK;

/* ---- variable sizes over the fixed-size table: lengths first, then messages padded to the longest
 * ---- */

/* At the root *ret_spans gets `size` spans into *ret_block (both owned by the caller: dcp_free). */
int dcp_comm_gather_bytes(const struct dcp_comm *comm, uint32_t root, const uint8_t *data,
                          size_t len, uint8_t **ret_block, struct dcp_span **ret_spans,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* The root gives `size` spans; every rank gets its own appended to *ret. */
int dcp_comm_scatter_bytes(const struct dcp_comm *comm, uint32_t root, const struct dcp_span *spans,
                           struct dcp_buf *ret, struct dcp_error *err) DCP_MUST_CHECK;
/* The root's bytes, appended to *buf of the others. */
int dcp_comm_broadcast_bytes(const struct dcp_comm *comm, uint32_t root, struct dcp_buf *buf,
                             struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif

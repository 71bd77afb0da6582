/*
 * agreement.h: what the files of the agreement share (private to the core).
 *
 * agreement.c has the protocol, agreement_coordinator.c and agreement_member.c its two parts,
 * agreement_own.c what is common to them, agreement_store.c the keys and what is in them,
 * agreement_liveness.c who is still there.
 */
#ifndef DCP_CORE_AGREEMENT_H
#define DCP_CORE_AGREEMENT_H

#include "dcp_limits.h"
#include "dcp_store.h"

/* What is told under `f` and `d`. */
struct agreement_notice {
    bool there;
    enum dcp_outcome outcome; /* of the save; `f`: UNKNOWN */
    uint32_t by;              /* rank that tells it */
    uint32_t gone;            /* ranks that certainly will not take leave: their processes ended */
    struct dcp_failure_list failures; /* none: committed */
};

/* Somebody is not there any more. */
struct agreement_loss {
    bool there;
    uint32_t rank;         /* of the process, or of the one that beat for its host */
    bool certain;          /* the process has ended; else nothing was heard of its host */
    struct dcp_error what; /* for the list of failures */
};

/* A host whose beats are watched. */
struct watched_host {
    uint32_t leader;
    bool busy; /* the last beat announced a time without beats */
    uint32_t looks;
    int64_t value;       /* of its counter; 0: it has not begun */
    uint64_t changed_ns; /* when that was seen to change */
};

struct agreement_liveness {
    uint32_t peers[DCP_WATCHED_PEERS]; /* ranks of this host */
    uint32_t peers_count;
    struct watched_host *hosts; /* owned */
    uint32_t hosts_count;
    bool beats; /* for this host, which is one of several */
    uint64_t beat_every_ns, next_beat_ns, next_look_ns, next_hosts_ns;
};

struct agreement {
    const struct dcp_agreement *with; /* borrows: what the caller gave */
    bool is_coordinator;
    bool through; /* this rank's bytes are durable and counted, or have failed */
    bool failed;
    struct dcp_buf wire; /* of one message, to or from the store */
    struct agreement_liveness liveness;
    struct agreement_notice verdict;
    uint64_t store_calls;
};

/* Looks at the store, with pauses that grow. */
struct agreement_pauses {
    uint64_t pause_ns, most_ns;
    uint64_t next_ns; /* of the next look */
    uint64_t end_ns;  /* no longer than that */
    bool through;     /* seen at the last look */
};

/* ---- one rank ---- */

uint64_t agreement_now_ns(const struct agreement *run);
/* Waits, and tells once what became of this rank's bytes.  An error: the store is lost. */
int agreement_look_at_own(struct agreement *run, uint64_t wait_ns,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* `gone`: ranks whose end this is. */
int agreement_tell_failure(struct agreement *run, const struct dcp_failure *failure, uint32_t gone,
                           struct dcp_error *err) DCP_MUST_CHECK;
/* Adds `what` to the failures. */
int agreement_fail_by(struct agreement_notice *notice, const struct dcp_error *what, uint32_t rank,
                      struct dcp_error *err) DCP_MUST_CHECK;

struct agreement_pauses agreement_begin_pauses(const struct agreement *run, uint64_t end_ns);
/* Whether to look at the store now.  When this rank is through the verdict may be near. */
bool agreement_is_time_to_look(const struct agreement *run, struct agreement_pauses *pauses);
/* How long to wait for the next thing that is due. */
uint64_t agreement_wait_until_due_ns(const struct agreement *run,
                                     const struct agreement_pauses *pauses);

/* ---- the two parts.  True when the verdict reached the store, or came from there ---- */

bool agreement_give_verdict(struct agreement *run, struct dcp_error *err);
bool agreement_hear_verdict(struct agreement *run, struct dcp_error *err);
/* Adds to a message how the save ended. */
void agreement_explain(struct dcp_error *err, enum dcp_outcome outcome);

/* On the coordinator's host the coordinator, whose silence must mean its own; else the lowest. */
uint32_t agreement_leader_of(const struct agreement *run, uint32_t rank);

/* ---- the store: keys are `n`, `f`, `d`, `a` and `h/<leader>` under the prefix ---- */

enum agreement_key { AGREEMENT_DURABLE, AGREEMENT_FAILED, AGREEMENT_VERDICT, AGREEMENT_LEFT };

/* All but `add` of something are tried twice. */
int agreement_add(struct agreement *run, enum agreement_key key, int64_t delta, int64_t *ret_value,
                  struct dcp_error *err) DCP_MUST_CHECK;
int agreement_check(struct agreement *run, enum agreement_key key, bool *ret_there,
                    struct dcp_error *err) DCP_MUST_CHECK;
int agreement_beat(struct agreement *run, uint32_t leader, int64_t delta, int64_t *ret_value,
                   struct dcp_error *err) DCP_MUST_CHECK;
void agreement_remove(struct agreement *run, enum agreement_key key);
/* Those that this rank made, by beating or by looking. */
void agreement_remove_beats(struct agreement *run);
/* `d` first: whoever makes a key after that looks for `d`, and removes its own again. */
void agreement_remove_all(struct agreement *run);

/* `only_first`: the first to tell it wins. */
int agreement_tell(struct agreement *run, enum agreement_key key,
                   const struct agreement_notice *notice, bool only_first,
                   struct dcp_error *err) DCP_MUST_CHECK;
/* *ret_notice.there is false when nobody has told it. */
int agreement_hear(struct agreement *run, enum agreement_key key,
                   struct agreement_notice *ret_notice, struct dcp_error *err) DCP_MUST_CHECK;
/* Appends a copy, unless there is a failure of that rank already. */
int agreement_add_failure(struct agreement_notice *notice, const struct dcp_failure *failure,
                          struct dcp_error *err) DCP_MUST_CHECK;
void agreement_notice_clean_up(struct agreement_notice *notice);

/* ---- who is there ---- */

void agreement_liveness_begin(struct agreement *run);
void agreement_liveness_clean_up(struct agreement *run);
/* Beats and looks, as far as their time has come. */
void agreement_look_around(struct agreement *run, struct agreement_loss *ret_loss);
/* Whether all ranks but this one are of this host, and dead. */
bool agreement_all_others_died(const struct agreement *run);
/* When that is to be called again; UINT64_MAX: never. */
uint64_t agreement_next_look_ns(const struct agreement *run);
/* Before a call into the file system, which may take longer than a beat. */
void agreement_announce_pause(struct agreement *run);

#endif

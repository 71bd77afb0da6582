/*
 * group.h: what the transfers of one group share (private to the core).
 */
#ifndef DCP_CORE_GROUP_H
#define DCP_CORE_GROUP_H

#include <pthread.h>
#include <stdatomic.h>

#include "comm_counted.h"
#include "cut.h"
#include "dcp_transfer.h"

/* Checksums of what the last save of a plan saved. */
struct dcp_last_crcs {
    struct dcp_save_id save_id;
    uint32_t *crcs; /* owned, per item of this rank's plan; NULL: there was no such save */
    uint8_t *known; /* owned bitmap: items whose checksum is there */
};

void dcp_last_crcs_clean_up(struct dcp_last_crcs *last);

/* A plan that every rank of the group installed.  The group refers to it until another one is
 * installed, and every save that goes by it until that save is over: a background save must not
 * lose it to the next one.  Nothing in it changes but `last`. */
struct dcp_installed_plan {
    _Atomic uint32_t refs;
    struct dcp_hash128 plan_id;     /* random, the coordinator's */
    struct dcp_hash128 fingerprint; /* of this rank's plan */
    struct dcp_hash128 names_hash;  /* of its names: the coordinator of `plan_id` has them */
    uint8_t *keep;                  /* owned bitmap over this rank's items */
    struct dcp_own_cuts cuts;       /* owned: of this rank's plan */
    struct dcp_layout layout;       /* owned: this rank's files, of the cut plan */
    struct dcp_plan *plans;         /* coordinator: owned, all ranks, cut */
    uint32_t plans_count;
    struct dcp_global_plan global; /* coordinator: borrows `plans` */
    pthread_mutex_t lock;          /* guards `last` */
    struct dcp_last_crcs last;     /* owned */
    bool *sees_claim;      /* coordinator: owned, per rank: it saves to the same directory */
    uint64_t shared_bytes; /* coordinator: that those ranks write */
};

struct dcp_group {
    struct dcp_comm comm; /* owned; counts what goes through it to the table that was given */
    struct dcp_comm_counted counted;
    uint32_t coordinator;
    atomic_bool poisoned;
    struct dcp_installed_plan *installed; /* a reference; NULL: none */
    bool met;
    struct dcp_peers peers; /* owned; once they have met */
};

/* Empty, with one reference. */
int dcp_installed_plan_new(struct dcp_installed_plan **ret_plan,
                           struct dcp_error *err) DCP_MUST_CHECK;
struct dcp_installed_plan *dcp_installed_plan_acquire(struct dcp_installed_plan *plan);
/* NULL is fine. */
void dcp_installed_plan_release(struct dcp_installed_plan *plan);
int dcp_group_check(const struct dcp_group *group, struct dcp_error *err) DCP_MUST_CHECK;
uint64_t dcp_now_ns(void);

/* Turns a local error record into a failure that can be exchanged; borrows `err`. */
struct dcp_failure dcp_failure_from_error(const struct dcp_error *err, uint32_t rank);

/* An exchange failed half way, and the ranks may be anywhere in it: the group is of no more use.
 * Returns `rc`, but never DCP_E_PEER, which promises a list of failures. */
int dcp_group_give_up(struct dcp_group *group, int rc, struct dcp_error *err);

/* Collective tail of every agreement: `mine` travels to everybody.  0 when nobody failed,
 * DCP_E_PEER with the list, or what the exchange itself died of. */
int dcp_group_settle_failures(struct dcp_group *group, const struct dcp_save_id *id,
                              const struct dcp_failure *mine, struct dcp_failure_list *ret_list,
                              struct dcp_error *err) DCP_MUST_CHECK;

#endif

/*
 * agreement_world.h: the ranks of one background save in simulated time: what they write, what
 * befalls them, and what they believe in the end.
 */
#ifndef AGREEMENT_WORLD_H
#define AGREEMENT_WORLD_H

#include "store_sim.h"

#define WORLD_MS UINT64_C(1000000)
#define WORLD_S UINT64_C(1000000000)
#define WORLD_NEVER UINT64_MAX

enum world_event {
    WORLD_NOTHING = 0,
    WORLD_KILL = 1,       /* the process ends */
    WORLD_FREEZE = 2,     /* it stands still for a while, or for ever */
    WORLD_CALL_LOST = 3,  /* one call to the store fails, without effect */
    WORLD_REPLY_LOST = 4, /* one call to the store fails, with effect */
    WORLD_STORE_DOWN = 5, /* every call to the store of this rank fails from now on */
};

struct world_fault {
    uint32_t rank;
    uint64_t step;   /* of that rank, from 1 on: each store call has two, each callback one */
    uint64_t at_ns;  /* or the first step at that time; 0: not */
    uint64_t for_ns; /* of a freeze; WORLD_NEVER: it never thaws */
    enum world_event event;
};

enum { WORLD_MOST_FAULTS = 8 };

struct world_plan {
    uint32_t size, coordinator, ranks_per_host; /* 0: all on one */
    uint64_t seed;
    uint64_t deadline_ns; /* after the start */
    uint64_t publish_ns;  /* how long it takes */
    bool independent;
    bool publish_fails, publish_unsynced; /* without effect; after it */
    const uint64_t *start_ns;             /* by rank, may be NULL: when it has staged */
    const uint64_t *write_ns;             /* by rank, may be NULL: how long its write takes */
    uint64_t failing;                     /* bits: ranks whose write fails at its end */
    struct world_fault faults[WORLD_MOST_FAULTS];
};

struct world_result {
    bool dead, stuck;        /* killed; frozen for ever */
    bool fault_was_met;      /* of this rank */
    uint64_t fault_ns;       /* when the first was */
    uint64_t steps;          /* taken */
    uint32_t settled;        /* times it was told */
    uint64_t settled_ns;     /* when */
    int rc;                  /* as settled */
    uint32_t failures_count; /* as settled */
    uint32_t failed_ranks[4];
    char message[400]; /* of the first failure, or of the error */
    enum dcp_outcome concluded;
    bool has_concluded, published, abandoned;
    struct dcp_agreement_stats stats;
};

struct world {
    struct world_plan plan;
    struct world_result *ranks; /* by rank */
    bool committed, aborted;    /* of the directory */
    uint64_t committed_ns;
    size_t keys_left;
    const char *violation; /* of a rule that holds at every step; NULL: none */
    uint64_t end_ns;
};

/* Runs one save to its end.  world_end() frees. */
void world_run(const struct world_plan *plan, struct world *ret_world);
void world_end(struct world *world);

#endif

/*
 * store_sim.h: a store in memory for clients in threads, with a hook in front of every call.
 */
#ifndef STORE_SIM_H
#define STORE_SIM_H

#include "dcp_store.h"

struct store_sim;

enum store_fault {
    STORE_WORKS = 0,
    STORE_CALL_LOST = 1,  /* nothing happens, and the call fails */
    STORE_REPLY_LOST = 2, /* it happens, and the call fails */
};

/* Called before and behind what a call does; what it returns before, counts.  It may block: a slow
 * store, a frozen one. */
typedef enum store_fault (*store_sim_hook)(void *ctx, uint32_t client, bool behind);

/* Ends the test program when there is no memory.  The core's counters do not see its memory. */
struct store_sim *store_sim_new(uint32_t clients, store_sim_hook hook, void *ctx);
void store_sim_client(struct store_sim *sim, uint32_t client, struct dcp_store *ret_store);
size_t store_sim_keys(struct store_sim *sim);
/* The name of one; NULL behind the last. */
const char *store_sim_key(struct store_sim *sim, size_t index);
void store_sim_destroy(struct store_sim *sim);

#endif

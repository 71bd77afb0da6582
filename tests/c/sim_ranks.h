/*
 * sim_ranks.h: runs one function on every rank of a simulated group, a thread each.
 *
 * CHECK counts without a lock, so a rank's function writes what it saw to its own slot of `arg` and
 * the test checks after sim_ranks_run returned.
 */
#ifndef SIM_RANKS_H
#define SIM_RANKS_H

#include "dcp_comm.h"

typedef void (*sim_rank_fn)(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg);

/* Returns after all ranks did.  Ends the test program when no group or thread can be made. */
void sim_ranks_run(uint32_t size, uint32_t timeout_ms, sim_rank_fn fn, void *arg);

#endif

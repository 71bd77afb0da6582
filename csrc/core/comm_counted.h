/*
 * comm_counted.h: a comm table that counts the calls of another (private to the core).
 */
#ifndef DCP_CORE_COMM_COUNTED_H
#define DCP_CORE_COMM_COUNTED_H

#include "dcp_comm.h"

struct dcp_comm_counted {
    struct dcp_comm inner; /* owned */
    struct dcp_comm_stats stats;
};

/* Takes `inner`.  The table that is returned borrows `counted`, which must not move. */
struct dcp_comm dcp_comm_count(struct dcp_comm_counted *counted, const struct dcp_comm *inner);

#endif

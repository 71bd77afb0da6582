/*
 * share_run.h: private: one load's reading together, as share_agree.c prepares it and share_read.c
 * carries it out.
 */
#ifndef DCP_SHARE_RUN_H
#define DCP_SHARE_RUN_H

#include "reader.h"
#include "share.h"

struct dcp_share_run {
    struct dcp_share *share;
    const struct dcp_io *io;
    int dirfd;
    const char *dir_path;
    const struct dcp_read_plan *plan;
    const struct dcp_engine_options *options;
    struct dcp_share_wants wants;
    struct dcp_read_item *rest; /* owned: items that are not shared */
    uint64_t rest_count;
    bool anything_shared;      /* by whomever */
    struct dcp_ring *ring;     /* a buffer for each reading thread; NULL: this rank reads nothing */
    atomic_uint threads_count; /* that took their buffer */
    _Atomic uint64_t next_number; /* of this rank's units, the next that no thread has taken */
    atomic_int stop;
    pthread_mutex_t lock; /* guards all below */
    struct dcp_read_stats stats;
    int code; /* of the first failure */
    struct dcp_error error;
};

/* ---- share_agree.c ---- */

/* Finds the ranks of the host, and puts what this one wants into its segment.  False: it reads for
 * itself. */
bool dcp_share_prepare(struct dcp_share_run *run);
/* The two rounds.  *ret_ready: there is something to read together, and all can. */
int dcp_share_agree(struct dcp_share_run *run, bool *ret_ready,
                    struct dcp_error *err) DCP_MUST_CHECK;

#endif

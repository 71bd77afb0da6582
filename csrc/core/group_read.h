/*
 * group_read.h: private: what every rank of a group wants, read once and broadcast.
 */
#ifndef DCP_GROUP_READ_H
#define DCP_GROUP_READ_H

#include "dcp_comm.h"
#include "dcp_engine.h"
#include "share.h"

/* Lanes of one agreement: the first says whether the rank takes part, each other one whether it
 * wants all of one chunk. */
enum { DCP_GROUP_READ_LANES = 4096 };

struct dcp_group_read {
    const struct dcp_comm *comm;
    int64_t *lanes;      /* of DCP_GROUP_READ_LANES */
    uint32_t unit_bytes; /* 0: DCP_SHARE_LARGE_SLOT_BYTES; less in tests */
    /* out */
    struct dcp_read_item
        *rest; /* owned: items that every rank reads by itself; NULL: all of them */
    uint64_t rest_count;
};

/* Collective: every rank of the group calls this or dcp_group_read_decline, with metadata that is
 * the same.  Fills what all ranks want of `plan` and leaves the others in read->rest, which
 * is NULL when nothing was shared.  DCP_E_PEER: another rank failed, and will say why.  DCP_E_COMM:
 * a collective failed. */
int dcp_group_read_run(struct dcp_group_read *read, const struct dcp_io *io, int dirfd,
                       const char *dir_path, const struct dcp_read_plan *plan,
                       const struct dcp_engine_options *options, struct dcp_read_stats *ret_stats,
                       struct dcp_error *err) DCP_MUST_CHECK;
/* A rank that will not read: then nothing is read together. */
int dcp_group_read_decline(struct dcp_group_read *read, const struct dcp_metadata *md,
                           struct dcp_error *err) DCP_MUST_CHECK;

/* ---- group_agree.c ---- */

/* Chunks that can be shared, in file order; `item` is the entry.  Counted, and put to `chunks`
 * unless that is NULL; the same on every rank. */
uint64_t dcp_group_chunks(const struct dcp_metadata *md, struct dcp_share_visit *chunks);
/* Collective.  `wants` NULL: this rank takes no part; then, as when all ranks want nothing in
 * common, *ret_count is 0 everywhere.  `ret_agreed` has room for all chunks. */
int dcp_group_agree(struct dcp_group_read *read, const struct dcp_share_visit *chunks,
                    uint64_t chunks_count, const struct dcp_share_wants *wants,
                    struct dcp_share_want *ret_agreed, uint64_t *ret_count,
                    struct dcp_error *err) DCP_MUST_CHECK;

#endif

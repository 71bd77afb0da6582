/*
 * cut.h: cuts on their way from the coordinator to the rank whose plan and memory they concern
 * (private to the core).
 */
#ifndef DCP_CORE_CUT_H
#define DCP_CORE_CUT_H

#include "dcp_engine.h"

/* What a rank needs to cut its own plan and sources, any number of saves long. */
struct dcp_own_cuts {
    struct dcp_cuts list;   /* owned */
    int64_t *strides_bytes; /* owned: of each cut's box, whole and row major, one behind another */
};

void dcp_own_cuts_clean_up(struct dcp_own_cuts *own);

void dcp_cuts_put(struct dcp_buf *buf, const struct dcp_cuts *cuts);
/* Reads cuts of `plan`, which is still whole and keeps the items of `keep`, to the end of the
 * message.  Refuses all that dcp_plan_cut could not do. */
int dcp_cuts_take(struct dcp_cursor *c, const struct dcp_plan *plan, const uint8_t *keep,
                  struct dcp_own_cuts *ret_own, struct dcp_error *err) DCP_MUST_CHECK;

/* Moves the sources of cut items to their first row; `plan` is cut.  They borrow strides of
 * `own`. */
void dcp_cuts_fit_sources(const struct dcp_own_cuts *own, const struct dcp_plan *plan,
                          struct dcp_source *sources);

#endif

/*
 * save_outside.c: a save whose plans are made outside of the core, by planners of the program's
 * own.
 *
 * When one rank has such a planner the vote tells all of them (vote.c), and in place of
 * save_plan.c's exchange every rank makes these calls, in this order, whatever fails on it:
 *     gather     what its planner made, opaque bytes, to the coordinator
 *     scatter    what the coordinator's planner made of it: a part for every rank, or none for any
 *     gather     where each rank's records will lie
 *     settle     one all-reduce; the failures' exchange behind it if a rank failed
 * A rank that failed sends empty messages on the way and its reason in the last step, so nobody is
 * left waiting.
 *
 * Nothing is deduplicated, grouped or validated here: which items a rank writes and what the
 * metadata says of them is the planner's business.  A rank lays out all that it was given, and the
 * image is the pickle that the coordinator was given, with our trailer.  The plan is this save's
 * alone: it is never installed on the group, so the next save plans anew.
 *
 * Threads: dcp_transfer.h.
 */
#include "save.h"

#include <string.h>

int
dcp_save_gather(struct dcp_save *save, const struct dcp_span *mine, uint8_t **ret_block,
                struct dcp_span **ret_spans, struct dcp_error *err)
{
    struct dcp_group *group = save->group;
    int rc = dcp_group_check(group, err);

    if (rc == 0) {
        rc = dcp_comm_gather_bytes(&group->comm, group->coordinator, mine->data, mine->len,
                                   ret_block, ret_spans, err);
        rc = rc != 0 ? dcp_group_give_up(group, rc, err) : 0;
    }
    if (rc != 0) {
        dcp_save_abandon(save);
    }
    return rc;
}

int
dcp_save_scatter(struct dcp_save *save, const struct dcp_span *parts, struct dcp_buf *ret_part,
                 struct dcp_error *err)
{
    struct dcp_group *group = save->group;
    int rc = dcp_group_check(group, err);

    if (rc == 0) {
        rc = dcp_comm_scatter_bytes(&group->comm, group->coordinator, parts, ret_part, err);
        rc = rc != 0 ? dcp_group_give_up(group, rc, err) : 0;
    }
    if (rc != 0) {
        dcp_save_abandon(save);
    }
    return rc;
}

int
dcp_save_lay_out(struct dcp_save *save, struct dcp_error *err)
{
    struct dcp_installed_plan *own = save->next;
    size_t bytes = dcp_keep_bytes(save->plan.items_count);

    DCP_ASSERT(save->installed == NULL && own->keep == NULL);
    own->keep = dcp_malloc(bytes);
    if (own->keep == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a plan's bitmap");
    }
    memset(own->keep, 0xFF, bytes);
    int rc = dcp_layout_build(&save->plan, own->keep, &own->layout, err);
    if (rc != 0) {
        dcp_free(own->keep); /* it says that there is a layout */
        own->keep = NULL;
    }
    return rc;
}

const struct dcp_layout *
dcp_save_laid_out(const struct dcp_save *save)
{
    return save->next->keep != NULL ? &save->next->layout : NULL;
}

int
dcp_save_set_metadata(struct dcp_save *save, const struct dcp_span *pickle, struct dcp_error *err)
{
    uint64_t start_ns = dcp_now_ns();
    int rc;

    dcp_buf_clear(&save->metadata);
    rc = dcp_metadata_wrap(pickle, &save->info.save_id, &save->metadata, err);
    save->info.metadata_ns = dcp_now_ns() - start_ns;
    return rc;
}

int
dcp_save_install_own(struct dcp_save *save, struct dcp_error *err)
{
    if (dcp_save_laid_out(save) == NULL) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                             "a save was agreed on for which this rank has no items");
    }
    save->installed = dcp_installed_plan_acquire(save->next);
    return 0;
}

int
dcp_save_settle_plan(struct dcp_save *save, const struct dcp_failure *mine,
                     struct dcp_failure_list *ret_failures, struct dcp_error *err)
{
    int rc = dcp_group_settle_failures(save->group, &save->info.save_id, mine, ret_failures, err);

    if (rc == 0) {
        rc = dcp_save_install_own(save, err);
    }
    if (rc != 0) {
        dcp_save_abandon(save);
        return rc;
    }
    dcp_save_count_kept(save);
    return 0;
}

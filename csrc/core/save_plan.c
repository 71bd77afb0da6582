/*
 * save_plan.c: from local plans to an installed one: gather, decide, scatter, install (design
 * section 3, SLOW).
 *
 * The collectives, in the order that every rank makes them after the vote (save.c):
 *     gather of plans    longest, memory, rounds, received (comm_bytes.c, save_gather.c)
 *     scatter of answers longest, memory, rounds
 *     install            one all-reduce; the failures' exchange behind it if a rank failed
 * A rank that fails on the way sends an empty message and goes on to the install vote with its
 * failure, so that every rank makes the same calls in the same order.  The answer to a rank is {ok,
 * plan_id, bitmap of kept items, cuts}; its layout is a pure function of plan, bitmap and cuts, so
 * nothing else travels.
 */
#include "save.h"

#include <string.h>

enum { ANSWER_HEADER_BYTES = 1 + 16 };

/* Coordinator: from all plans to the global one, plan id included. */
static int
decide(struct dcp_save *save, struct dcp_installed_plan *next, struct dcp_error *err)
{
    uint32_t count = next->plans_count;
    int rc;

    if (save->to_lowest_rank) {
        rc = dcp_global_plan_build(next->plans, count, true, &next->global, err);
    } else {
        rc = dcp_global_plan_build_split(next->plans, count, save->split_bytes, &next->global, err);
    }
    if (rc == 0) {
        rc = dcp_save_check_sum(save, next, err);
    }
    if (rc == 0 && dcp_random_bytes(&next->plan_id, sizeof next->plan_id) != 0) {
        rc = dcp_error_set(err, DCP_E_IO, 0, NULL, "the system gave no random bytes for a plan id");
    }
    return rc;
}

/* Coordinator: the answers to all ranks, one after another in `block`; failed: {0}. */
static int
put_answers(const struct dcp_installed_plan *next, bool ok, uint32_t size, struct dcp_buf *block,
            struct dcp_span *ret_spans, struct dcp_error *err)
{
    const struct dcp_keep *keep = &next->global.keep;
    static const struct dcp_cuts none;
    int rc;

    for (uint32_t i = 0; i < size; i++) {
        size_t begin = block->len;
        dcp_buf_put_u8(block, ok ? 1 : 0);
        dcp_buf_put(block, &next->plan_id, sizeof next->plan_id);
        if (ok) {
            dcp_buf_put(block, keep->bits[i], dcp_keep_bytes(next->plans[i].items_count));
            dcp_cuts_put(block, keep->cuts == NULL ? &none : &keep->cuts[i]);
        }
        ret_spans[i].len = block->len - begin;
    }
    rc = dcp_buf_check(block, err);
    if (rc != 0) {
        return rc;
    }
    for (size_t i = 0, pos = 0; i < size; i++) {
        ret_spans[i].data = block->data + pos;
        pos += ret_spans[i].len;
    }
    return 0;
}

/* Sends the answers.  A coordinator that has no memory for them takes part with a failed buffer:
 * the first agreement of the scatter then fails on all ranks, and nobody waits for one that left.
 * `spans`: the coordinator's, room for one per rank. */
static int
scatter_answers(struct dcp_save *save, const struct dcp_installed_plan *next, bool ok,
                struct dcp_span *spans, struct dcp_buf *ret_answer, struct dcp_error *err)
{
    struct dcp_group *group = save->group;
    struct dcp_buf block = {0};
    int rc;

    if (group->comm.rank == group->coordinator &&
        put_answers(next, ok, group->comm.size, &block, spans, err) != 0) {
        ret_answer->failed = true;
    }
    rc = dcp_comm_scatter_bytes(&group->comm, group->coordinator, spans, ret_answer, err);
    if (rc != 0) {
        rc = dcp_group_give_up(group, rc, err);
    }
    dcp_buf_clean_up(&block);
    return rc;
}

/* This rank's part of the decision: bitmap, cuts (done to its plan) and layout. */
static int
take_answer(struct dcp_save *save, const struct dcp_buf *answer, struct dcp_installed_plan *next,
            struct dcp_error *err)
{
    size_t want = dcp_keep_bytes(save->plan.items_count);

    if (answer->len < ANSWER_HEADER_BYTES || answer->data[0] != 1) {
        return DCP_E_PEER; /* the coordinator has the reason and brings it to the install vote */
    }
    if (answer->len < ANSWER_HEADER_BYTES + want) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                             "the coordinator answered with %zu bytes, expected %zu or more",
                             answer->len, ANSWER_HEADER_BYTES + want);
    }
    memcpy(&next->plan_id, answer->data + 1, sizeof next->plan_id);
    next->keep = dcp_malloc(want);
    if (next->keep == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a plan's bitmap");
    }
    memcpy(next->keep, answer->data + ANSWER_HEADER_BYTES, want);
    next->fingerprint = save->fingerprint;
    struct dcp_cursor cuts = {
        .data = answer->data, .len = answer->len, .pos = ANSWER_HEADER_BYTES + want};
    int rc = dcp_cuts_take(&cuts, &save->plan, next->keep, &next->cuts, err);
    if (rc != 0) {
        return rc;
    }
    dcp_plan_cut(&save->plan, &next->cuts.list);
    return dcp_layout_build(&save->plan, next->keep, &next->layout, err);
}

int
dcp_save_plan_slow(struct dcp_save *save, struct dcp_failure_list *ret_failures,
                   struct dcp_error *err)
{
    struct dcp_group *group = save->group;
    bool is_coordinator = group->comm.rank == group->coordinator;
    struct dcp_installed_plan *next = save->next;
    struct dcp_buf answer = {0};
    struct dcp_span *spans = NULL;
    struct dcp_error local;
    struct dcp_failure mine;
    struct dcp_save_id id;
    int rc, local_rc;

    dcp_error_clear(&local);
    rc = dcp_save_gather_plans(save, next, &spans, &local, &local_rc, err);
    if (rc != 0) {
        goto done;
    }
    if (is_coordinator && local_rc == 0) {
        local_rc = decide(save, next, &local);
    }
    rc = scatter_answers(save, next, local_rc == 0, spans, &answer, err);
    if (rc != 0) {
        goto done;
    }
    if (local_rc == 0) {
        local_rc = take_answer(save, &answer, next, &local);
    }
    mine = dcp_failure_from_error(&local, group->comm.rank);
    memset(&id, 0, sizeof id);
    if (local_rc == 0) {
        memcpy(id.bytes, &next->plan_id, sizeof id.bytes);
    }
    /* DCP_E_PEER without a record: another rank failed, and brings its own reason. */
    rc = dcp_group_settle_failures(group, &id, local_rc == 0 || local.code == 0 ? NULL : &mine,
                                   ret_failures, err);
    if (rc == 0 && local_rc != 0) {
        rc = dcp_error_set(err, DCP_E_INTERNAL, 0, NULL, "a plan was refused without a reason");
    }
    if (rc == 0) {
        dcp_installed_plan_release(group->installed);
        group->installed = dcp_installed_plan_acquire(next);
        save->installed = dcp_installed_plan_acquire(next);
    }
done:
    dcp_buf_clean_up(&answer);
    dcp_free(spans);
    return rc;
}

int
dcp_save_plan_alone(struct dcp_save *save, struct dcp_error *err)
{
    struct dcp_installed_plan *own = save->next;
    int rc;

    /* The metadata is made from `plans`, the data from `plan`: one encode gives an equal copy. */
    struct dcp_buf image = {0};
    rc = dcp_plan_encode(&save->plan, &image, err);
    if (rc != 0) {
        goto done;
    }
    own->plans = dcp_calloc(1, sizeof *own->plans);
    if (own->plans == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a plan");
        goto done;
    }
    own->plans_count = 1;
    rc = dcp_plan_decode(image.data, image.len, &own->plans[0], err);
    if (rc == 0) {
        rc = dcp_global_plan_build(own->plans, 1, save->to_lowest_rank, &own->global, err);
    }
    if (rc == 0) {
        own->keep = dcp_malloc(dcp_keep_bytes(save->plan.items_count));
        rc = own->keep == NULL ? dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a bitmap")
                               : 0;
    }
    if (rc == 0) {
        memcpy(own->keep, own->global.keep.bits[0], dcp_keep_bytes(save->plan.items_count));
        rc = dcp_layout_build(&save->plan, own->keep, &own->layout, err);
    }
    if (rc == 0) {
        save->installed = dcp_installed_plan_acquire(own);
    }
done:
    dcp_buf_clean_up(&image);
    return rc;
}

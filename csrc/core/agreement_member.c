/*
 * agreement_member.c: the part of all ranks but the coordinator in an agreement: wait for the
 * verdict, tell whom they lost, and speak for the coordinator when that is lost.
 *
 * Threads: as agreement.c.
 */
#include "agreement.h"

#include <inttypes.h>

#include "group.h"

/* In the place of the coordinator, which is lost. */
static int
give_verdict_for(struct agreement *run, const struct agreement_loss *loss, struct dcp_error *err)
{
    struct agreement_notice verdict = {.by = run->with->rank, .gone = loss->certain};
    struct agreement_notice told;
    int rc = agreement_hear(run, AGREEMENT_FAILED, &told, err);

    if (rc == 0) {
        rc = agreement_fail_by(&verdict, &loss->what, loss->rank, err);
    }
    for (size_t i = 0; rc == 0 && i < told.failures.count; i++) {
        rc = agreement_add_failure(&verdict, &told.failures.items[i], err);
    }
    if (rc == 0) {
        verdict.gone += told.gone;
        rc = agreement_tell(run, AGREEMENT_VERDICT, &verdict, true, err);
    }
    agreement_notice_clean_up(&told);
    agreement_notice_clean_up(&verdict);
    return rc;
}

static int
look_as_member(struct agreement *run, const struct agreement_loss *loss, bool *is_told,
               struct dcp_error *err)
{
    int rc = agreement_hear(run, AGREEMENT_VERDICT, &run->verdict, err);

    if (rc != 0 || run->verdict.there || !loss->there) {
        return rc;
    }
    if (loss->rank == run->with->coordinator) {
        rc = give_verdict_for(run, loss, err);
        return rc != 0 ? rc : agreement_hear(run, AGREEMENT_VERDICT, &run->verdict, err);
    }
    if (!*is_told) {
        struct dcp_failure failure = dcp_failure_from_error(&loss->what, loss->rank);
        *is_told = true;
        rc = agreement_tell_failure(run, &failure, 1, err);
    }
    return rc;
}

static int
be_left_without_verdict(struct agreement *run, struct dcp_error *err)
{
    const struct dcp_agreement *with = run->with;

    /* In case that nobody else is there to do it.  It can only turn a commit that is late into a
     * failure. */
    agreement_remove(run, AGREEMENT_DURABLE);
    agreement_remove(run, AGREEMENT_FAILED);
    agreement_remove_beats(run);
    return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL,
                         "%s, and the coordinator (rank %" PRIu32 ") had not said what became of "
                         "the save when its time was over; whether the checkpoint was committed, "
                         "its .metadata tells",
                         run->failed    ? "this rank failed"
                         : run->through ? "this rank had written its files"
                                        : "this rank was still writing",
                         with->coordinator);
}

/* Waits for the verdict. */
static int
await_verdict(struct agreement *run, struct dcp_error *err)
{
    uint64_t end_ns = run->with->deadline_ns, wait_ns = 0;
    struct agreement_pauses pauses = agreement_begin_pauses(run, end_ns);
    bool is_told = false;

    for (;;) {
        struct agreement_loss loss = {0};
        int rc = agreement_look_at_own(run, wait_ns, err);
        bool is_over;

        if (rc != 0) {
            return rc;
        }
        agreement_look_around(run, &loss);
        is_over = agreement_now_ns(run) >= end_ns;
        if ((agreement_is_time_to_look(run, &pauses) || loss.there || is_over) &&
            (run->through || !run->with->independent)) {
            rc = look_as_member(run, &loss, &is_told, err);
        }
        if (rc != 0 || run->verdict.there) {
            return rc;
        }
        if (is_over) {
            return be_left_without_verdict(run, err);
        }
        wait_ns = agreement_wait_until_due_ns(run, &pauses);
    }
}

/* True when this rank heard the verdict. */
bool
agreement_hear_verdict(struct agreement *run, struct dcp_error *err)
{
    bool heard = await_verdict(run, err) == 0;

    if (!heard && err->code != DCP_E_TIMEOUT) {
        err->rank = (int32_t)run->with->rank;
        agreement_explain(err, DCP_OUTCOME_UNKNOWN);
    }
    if (!run->with->independent) {
        run->with->conclude(run->with->ctx, run->verdict.outcome);
    } else if (!run->through) {
        (void)run->with->abandon(run->with->ctx);
    }
    return heard;
}

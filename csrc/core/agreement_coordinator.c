/*
 * agreement_coordinator.c: the coordinator's part of an agreement: waits until it is clear how the
 * save ends, ends it, and says so.
 *
 * Threads: as agreement.c.
 */
#include "agreement.h"

#include <inttypes.h>

/* Joins what others told to the failures of the verdict. */
static int
take_notice(struct agreement *run, struct agreement_notice *notice, struct dcp_error *err)
{
    int rc = 0;

    for (size_t i = 0; i < notice->failures.count && rc == 0; i++) {
        rc = agreement_add_failure(&run->verdict, &notice->failures.items[i], err);
    }
    run->verdict.gone += notice->gone;
    agreement_notice_clean_up(notice);
    return rc;
}

static int
look_as_coordinator(struct agreement *run, const struct agreement_loss *loss, bool *ret_ended,
                    struct dcp_error *err)
{
    struct agreement_notice told;
    int64_t durable = 0;
    int rc = 0;

    if (run->through && !run->failed) {
        rc = agreement_add(run, AGREEMENT_DURABLE, 0, &durable, err);
    }
    if (rc == 0 && durable >= run->with->size) {
        *ret_ended = true;
        return 0;
    }
    if (rc == 0) {
        rc = agreement_hear(run, AGREEMENT_FAILED, &told, err);
    }
    if (rc == 0 && told.there) {
        rc = take_notice(run, &told, err);
    }
    if (rc == 0 && loss->there) {
        size_t known = run->verdict.failures.count;
        rc = agreement_fail_by(&run->verdict, &loss->what, loss->rank, err);
        run->verdict.gone += loss->certain && run->verdict.failures.count > known;
    }
    if (run->verdict.failures.count > 0) {
        *ret_ended = true;
    }
    return rc;
}

static void
be_late(struct agreement *run)
{
    struct dcp_error late, ignored;
    int64_t durable = 0;

    dcp_error_clear(&late);
    dcp_error_clear(&ignored);
    if (agreement_add(run, AGREEMENT_DURABLE, 0, &durable, &ignored) != 0) {
        durable = 0;
    }
    (void)dcp_error_set(&late, DCP_E_TIMEOUT, 0, NULL,
                        "only %" PRId64 " of %" PRIu32 " ranks had written their files when the "
                        "time of the save was over; it was given up: see what the others wait "
                        "for, or allow more time (the process group's timeout)",
                        durable, run->with->size);
    late.rank = (int32_t)run->with->rank;
    if (agreement_fail_by(&run->verdict, &late, run->with->rank, &ignored) != 0) {
        run->failed = true;
    }
}

/* Waits until it is clear how the save ends.  An error: the store is lost. */
static int
await_end(struct agreement *run, uint64_t end_ns, struct dcp_error *err)
{
    struct agreement_pauses pauses = agreement_begin_pauses(run, end_ns);
    bool ended = false;
    uint64_t wait_ns = 0;
    int rc = 0;

    while (rc == 0 && !ended) {
        struct agreement_loss loss = {0};

        rc = agreement_look_at_own(run, wait_ns, err);
        if (rc != 0) {
            break;
        }
        agreement_look_around(run, &loss);
        if ((agreement_is_time_to_look(run, &pauses) || loss.there) &&
            (run->through || !run->with->independent)) {
            rc = look_as_coordinator(run, &loss, &ended, err);
        }
        if (rc == 0 && !ended && agreement_now_ns(run) >= end_ns) {
            be_late(run);
            ended = true;
        }
        wait_ns = agreement_wait_until_due_ns(run, &pauses);
    }
    return rc;
}

/* Somebody gave the verdict for us: we were taken for lost, and must not publish any more. */
static int
was_taken_for_lost(struct agreement *run, struct dcp_error *err)
{
    struct agreement_notice theirs;
    int rc = agreement_hear(run, AGREEMENT_VERDICT, &theirs, err);

    return rc == 0 && theirs.there ? take_notice(run, &theirs, err) : rc;
}

/* Publishes or abandons.  `err` is filled when the store is lost. */
static void
decide(struct agreement *run, struct dcp_error *err)
{
    struct agreement_notice *verdict = &run->verdict;
    struct dcp_error cause, ignored;
    bool ok = err->code == DCP_OK && !run->failed && verdict->failures.count == 0;

    dcp_error_clear(&cause);
    dcp_error_clear(&ignored);
    if (run->with->independent) {
        if (!run->through) {
            (void)run->with->abandon(run->with->ctx);
        }
        verdict->outcome = ok ? DCP_OUTCOME_COMMITTED : DCP_OUTCOME_UNKNOWN;
    } else {
        agreement_announce_pause(run);
        ok = ok && was_taken_for_lost(run, err) == 0 && verdict->failures.count == 0;
        if (ok && run->with->publish(run->with->ctx, &cause) != 0) {
            ok = false;
            cause.rank = (int32_t)run->with->rank;
            (void)!agreement_fail_by(verdict, &cause, run->with->rank, err);
        }
        verdict->outcome = ok ? DCP_OUTCOME_COMMITTED : run->with->abandon(run->with->ctx);
    }
    if (err->code != DCP_OK) {
        err->rank = (int32_t)run->with->rank;
        agreement_explain(err, verdict->outcome);
        (void)!agreement_fail_by(verdict, err, run->with->rank, &ignored);
    }
}

/* The coordinator's part.  True when the others can hear of the verdict. */
bool
agreement_give_verdict(struct agreement *run, struct dcp_error *err)
{
    uint64_t now_ns = agreement_now_ns(run), end_ns = run->with->deadline_ns;
    uint64_t left_ns = end_ns > now_ns ? end_ns - now_ns : 0;
    struct dcp_error telling;
    bool told;

    end_ns -= dcp_min_u64(left_ns / 8, DCP_VERDICT_MARGIN_NS);
    (void)!await_end(run, end_ns, err);
    decide(run, err);
    dcp_error_clear(&telling);
    run->verdict.by = run->with->rank;
    run->verdict.there = true;
    told = agreement_tell(run, AGREEMENT_VERDICT, &run->verdict, false, &telling) == 0;
    if (told && run->verdict.failures.count > 0) {
        dcp_error_clear(err); /* it is in the list that everybody has */
    }
    return told;
}

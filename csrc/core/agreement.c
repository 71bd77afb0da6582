/*
 * agreement.c: how the ranks of one background save end it together, over a store and without a
 * collective.
 *
 *     n   counts the ranks whose bytes are durable      (with `independent`: and published)
 *     f   the first failure that anybody told
 *     d   the verdict: what became of the save, and the failures
 *     a   counts the ranks that read it and left
 *     h/  beats of the hosts (agreement_liveness.c)
 *
 * The coordinator decides, once, by what it sees first: all are durable, and it publishes; or
 * somebody failed or is lost, or time is up, and it abandons.  Then it gives the verdict.  All that
 * are durable wins over a failure seen at the same time: a rank that died behind its last byte
 * spoils nothing.  A loss is believed only after one more look at the verdict, since a process that
 * has read it may end.
 *
 * When the coordinator is lost, the one that notices gives the verdict in its place: that it is
 * lost, outcome UNKNOWN.  Nobody else holds the claim, and the rename may or may not have happened,
 * so no rank removes a file: the next save sweeps what nothing references.  A coordinator that
 * comes back finds that verdict before it publishes and abandons; one that was lost behind that
 * look tells its own over it, and who had read the other holds "unknown", which is no
 * contradiction.
 *
 * Keys: the last to leave removes them, `d` first; whoever gave the verdict waits for that (its
 * process may host the store), and removes what is left, at the latest when the wait is over.  A
 * rank that makes a key later finds no `d` and removes its own.  What can stay: all keys of a save
 * whose giver died after the verdict while another rank never took leave, and those of a rank that
 * was killed behind its own deadline or when all others had gone.
 *
 * Threads: one per run; no lock, no state but the caller's and this run's.
 */
#include "agreement.h"

#include <inttypes.h>

static void
settle(struct agreement *run, struct dcp_error *err)
{
    const struct dcp_agreement *with = run->with;
    const struct dcp_failure_list *failures = &run->verdict.failures;

    if (err->code == DCP_OK && failures->count == 0 &&
        run->verdict.outcome != DCP_OUTCOME_COMMITTED) {
        (void)dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                            "the save was given up, and rank %" PRIu32 " had no memory to say why",
                            run->verdict.by);
    }
    if (err->code != DCP_OK) {
        with->settled(with->ctx, err->code, NULL, err);
    } else if (failures->count > 0) {
        with->settled(with->ctx, DCP_E_PEER, failures, NULL);
    } else {
        with->settled(with->ctx, 0, NULL, NULL);
    }
}

/* Ranks that will leave: all but the one that gave the verdict and those that are gone. */
static uint32_t
leavers_of(const struct agreement *run)
{
    uint32_t others = run->with->size - 1;
    return run->verdict.gone < others ? others - run->verdict.gone : 0;
}

/* Who gave the verdict waits until the last one has removed the keys, as long as any other is known
 * to live.  It removes them too: the last one may have been killed while it did, or there is none.
 */
static bool
see_off(struct agreement *run)
{
    uint64_t end_ns = agreement_now_ns(run) + DCP_FAREWELL_NS;
    struct agreement_pauses pauses = agreement_begin_pauses(run, end_ns);
    bool there = leavers_of(run) > 0;
    struct dcp_failure ignored_failure;
    struct dcp_error ignored;

    dcp_error_clear(&ignored);
    while (there && agreement_now_ns(run) < end_ns && !agreement_all_others_died(run)) {
        (void)run->with->bytes(run->with->ctx, pauses.pause_ns, &ignored_failure);
        pauses.pause_ns = dcp_min_u64(pauses.pause_ns * 2, pauses.most_ns);
        if (agreement_check(run, AGREEMENT_VERDICT, &there, &ignored) != 0) {
            return false;
        }
    }
    agreement_remove_all(run);
    return !there;
}

static bool
take_leave(struct agreement *run)
{
    struct dcp_error ignored;
    int64_t left = 0;
    bool there = true;

    dcp_error_clear(&ignored);
    if (run->verdict.by == run->with->rank) {
        return see_off(run);
    }
    if (agreement_add(run, AGREEMENT_LEFT, 1, &left, &ignored) != 0) {
        return false;
    }
    if (left == leavers_of(run)) {
        agreement_remove_all(run);
    } else if (agreement_check(run, AGREEMENT_VERDICT, &there, &ignored) != 0) {
        return false;
    } else if (!there) {
        agreement_remove(run, AGREEMENT_LEFT); /* the others have gone without us */
    }
    return true;
}

void
dcp_agreement_run(const struct dcp_agreement *agreement, struct dcp_agreement_stats *ret_stats)
{
    struct agreement run = {
        .with = agreement,
        .is_coordinator = agreement->rank == agreement->coordinator,
    };
    struct dcp_error err;
    bool in_touch;

    DCP_ASSERT(agreement->rank < agreement->size && agreement->coordinator < agreement->size);
    dcp_error_clear(&err);
    agreement_liveness_begin(&run);
    in_touch = run.is_coordinator ? agreement_give_verdict(&run, &err)
                                  : agreement_hear_verdict(&run, &err);
    settle(&run, &err);
    if (in_touch) {
        in_touch = take_leave(&run);
    }
    *ret_stats = (struct dcp_agreement_stats){
        .store_calls = run.store_calls,
        .in_touch = in_touch,
    };
    agreement_notice_clean_up(&run.verdict);
    agreement_liveness_clean_up(&run);
    dcp_buf_clean_up(&run.wire);
}

/*
 * agreement_own.c: what one rank of an agreement does for itself: tells what became of its bytes,
 * and waits between two looks.
 *
 * Threads: as agreement.c.
 */
#include "agreement.h"

#include "group.h"

uint64_t
agreement_now_ns(const struct agreement *run)
{
    return run->with->now_ns != NULL ? run->with->now_ns(run->with->ctx) : dcp_now_ns();
}

int
agreement_fail_by(struct agreement_notice *notice, const struct dcp_error *what, uint32_t rank,
                  struct dcp_error *err)
{
    struct dcp_failure failure = dcp_failure_from_error(what, rank);
    return agreement_add_failure(notice, &failure, err);
}

int
agreement_tell_failure(struct agreement *run, const struct dcp_failure *failure, uint32_t gone,
                       struct dcp_error *err)
{
    struct agreement_notice notice = {.by = run->with->rank, .gone = gone};
    int rc = agreement_add_failure(&notice, failure, err);

    if (rc == 0) {
        rc = agreement_tell(run, AGREEMENT_FAILED, &notice, true, err);
    }
    agreement_notice_clean_up(&notice);
    return rc;
}

/* To the verdict where this rank gives it, else to the one that does. */
static int
own_failure(struct agreement *run, const struct dcp_failure *failure, struct dcp_error *err)
{
    struct dcp_failure mine = *failure;

    mine.rank = run->with->rank;
    run->failed = true;
    run->through = true;
    return run->is_coordinator ? agreement_add_failure(&run->verdict, &mine, err)
                               : agreement_tell_failure(run, &mine, 0, err);
}

static int
publish_own(struct agreement *run, struct dcp_error *err)
{
    int rc;

    agreement_announce_pause(run);
    rc = run->with->publish(run->with->ctx, err);
    if (rc != 0) {
        (void)run->with->abandon(run->with->ctx);
    }
    return rc;
}

static int
count_own(struct agreement *run, struct dcp_error *err)
{
    struct dcp_error cause;
    struct dcp_failure failure;
    int64_t value;
    int rc = 0;

    dcp_error_clear(&cause);
    if (run->with->independent) {
        rc = publish_own(run, &cause);
    }
    if (rc == 0) {
        run->through = true;
        rc = agreement_add(run, AGREEMENT_DURABLE, 1, &value, &cause);
    }
    if (rc == 0) {
        return 0;
    }
    /* Counted or not: who waits for it must not wait until the deadline. */
    cause.rank = (int32_t)run->with->rank;
    failure = dcp_failure_from_error(&cause, run->with->rank);
    rc = own_failure(run, &failure, err);
    if (rc != 0 && cause.code == DCP_E_COMM) {
        *err = cause;
    }
    return rc;
}

int
agreement_look_at_own(struct agreement *run, uint64_t wait_ns, struct dcp_error *err)
{
    struct dcp_failure failure = {0};
    enum dcp_bytes_state state = run->with->bytes(run->with->ctx, wait_ns, &failure);

    if (state == DCP_BYTES_DURABLE && !run->through) {
        return count_own(run, err);
    }
    if (state == DCP_BYTES_FAILED && !run->failed) {
        if (run->with->independent && !run->through) {
            (void)run->with->abandon(run->with->ctx);
        }
        return own_failure(run, &failure, err);
    }
    return 0;
}

static uint64_t
longest_pause_ns(const struct agreement *run)
{
    uint64_t share_ns = (uint64_t)run->with->size * DCP_STORE_PAUSE_PER_RANK_NS;

    if (run->is_coordinator) {
        return DCP_STORE_COORDINATOR_PAUSE_NS;
    }
    return dcp_min_u64(dcp_max_u64(share_ns, DCP_STORE_LEAST_PAUSE_NS), DCP_STORE_MOST_PAUSE_NS);
}

uint64_t
agreement_wait_until_due_ns(const struct agreement *run, const struct agreement_pauses *pauses)
{
    uint64_t now_ns = agreement_now_ns(run);
    uint64_t due_ns = dcp_min_u64(pauses->next_ns, agreement_next_look_ns(run));

    due_ns = dcp_min_u64(due_ns, pauses->end_ns);
    return due_ns > now_ns ? due_ns - now_ns : 0;
}

bool
agreement_is_time_to_look(const struct agreement *run, struct agreement_pauses *pauses)
{
    uint64_t now_ns = agreement_now_ns(run);

    if (run->through && !pauses->through) {
        pauses->through = true;
        pauses->pause_ns = DCP_STORE_FIRST_PAUSE_NS;
    } else if (now_ns < pauses->next_ns) {
        return false;
    }
    pauses->next_ns = now_ns + pauses->pause_ns;
    pauses->pause_ns = dcp_min_u64(pauses->pause_ns * 2, pauses->most_ns);
    return true;
}

struct agreement_pauses
agreement_begin_pauses(const struct agreement *run, uint64_t end_ns)
{
    return (struct agreement_pauses){
        .pause_ns = DCP_STORE_FIRST_PAUSE_NS,
        .most_ns = longest_pause_ns(run),
        .end_ns = end_ns,
    };
}

void
agreement_explain(struct dcp_error *err, enum dcp_outcome outcome)
{
    struct dcp_error told = *err;

    dcp_error_clear(err);
    (void)dcp_error_set(err, told.code, told.sys_errno, NULL, "%s; %s", told.message,
                        outcome == DCP_OUTCOME_ABORTED
                            ? "the save was given up"
                            : "whether the checkpoint was committed, its .metadata tells");
    err->rank = told.rank;
}

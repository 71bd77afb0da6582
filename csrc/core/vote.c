/*
 * vote.c: the two agreements that every save ends its phases with: the vote and the status.
 *
 * Each is one all-reduce of int64 lanes with MIN, the one reduction that gloo and NCCL both have on
 * a type they both have.  MIN alone answers three questions: "is it true everywhere" (a lane of 0
 * or 1), "what does the coordinator say" (the others send INT64_MAX), and "is it equal everywhere":
 * x and ~x travel in two lanes, and MIN(~x) == ~MAX(x), so MIN(x) == ~MIN(~x) exactly when all sent
 * the same.
 *
 * Every conclusion is drawn from reduced lanes alone, in one order, so all ranks draw the same one.
 * What a rank knows locally must never decide here: it goes into a lane first.
 *
 * Threads: the comm table's rule, one caller at a time.
 */
#include "dcp_comm.h"

#include <string.h>

enum vote_lane {
    VOTE_VERSION = 0,    /* and ~, as all that must be equal */
    VOTE_PLAN_ID_LO = 2, /* and ~ */
    VOTE_PLAN_ID_HI = 4, /* and ~ */
    VOTE_REUSE = 6,      /* -2: elsewhere, -1: planned outside, 0: no, 1: yes */
    VOTE_OK = 7,         /* 0: failed here, 1: ok, 2: ok and given a base */
    VOTE_CALL = 8,       /* and ~ */
    VOTE_SAVE_ID = 10,   /* two lanes */
    VOTE_N0 = 12,
    VOTE_NAMES = 13, /* two lanes */
    VOTE_HELD_PLAN = 15,
};

/* The same version lanes lead both messages, so ranks of different protocols learn of it. */
enum status_lane {
    STATUS_VERSION = 0,    /* and ~ */
    STATUS_SAVE_ID_LO = 2, /* and ~ */
    STATUS_SAVE_ID_HI = 4, /* and ~ */
    STATUS_OK = 6,
    STATUS_LANES = 8,
};

static void
put_equal(int64_t *lanes, int lane, uint64_t value)
{
    lanes[lane] = (int64_t)value;
    lanes[lane + 1] = (int64_t)~value;
}

static bool
is_equal(const int64_t *lanes, int lane)
{
    return lanes[lane] == ~lanes[lane + 1];
}

static void
split_save_id(const struct dcp_save_id *id, uint64_t ret_halves[2])
{
    memcpy(ret_halves, id->bytes, sizeof id->bytes);
}

static int
check_version(const int64_t *lanes, const struct dcp_comm *comm, const char *what,
              struct dcp_error *err)
{
    if (is_equal(lanes, VOTE_VERSION)) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                         "%s among %u ranks (%s): they run dcp_native with protocol versions from "
                         "%lld to %lld, this rank %d; install the same dcp_native on all of them",
                         what, comm->size, comm->kind, (long long)lanes[VOTE_VERSION],
                         (long long)~lanes[VOTE_VERSION + 1], DCP_PROTOCOL_VERSION);
}

static void
fill_vote(const struct dcp_vote *vote, bool ok, int64_t lanes[DCP_VOTE_LANES])
{
    memset(lanes, 0, DCP_VOTE_LANES * sizeof lanes[0]);
    put_equal(lanes, VOTE_VERSION, DCP_PROTOCOL_VERSION);
    put_equal(lanes, VOTE_PLAN_ID_LO, vote->plan_id.lo);
    put_equal(lanes, VOTE_PLAN_ID_HI, vote->plan_id.hi);
    lanes[VOTE_REUSE] = vote->elsewhere ? -2 : vote->outside ? -1 : vote->reuse;
    lanes[VOTE_OK] = !ok ? 0 : vote->has_base ? 2 : 1;
    put_equal(lanes, VOTE_CALL, vote->call);
    if (!vote->is_coordinator) {
        for (int lane = VOTE_SAVE_ID; lane < DCP_VOTE_LANES; lane++) {
            lanes[lane] = INT64_MAX;
        }
        return;
    }
    uint64_t halves[2];
    split_save_id(&vote->save_id, halves);
    lanes[VOTE_SAVE_ID] = (int64_t)halves[0];
    lanes[VOTE_SAVE_ID + 1] = (int64_t)halves[1];
    lanes[VOTE_N0] = ok ? (int64_t)vote->n0 : 0;
    lanes[VOTE_NAMES] = (int64_t)vote->names_hash.lo;
    lanes[VOTE_NAMES + 1] = (int64_t)vote->names_hash.hi;
    lanes[VOTE_HELD_PLAN] = (int64_t)vote->held_plan;
}

static enum dcp_verdict
conclude(const int64_t lanes[DCP_VOTE_LANES])
{
    if (lanes[VOTE_OK] == 0) {
        return DCP_VERDICT_FAILED;
    }
    if (lanes[VOTE_REUSE] < -1) {
        return DCP_VERDICT_ELSEWHERE;
    }
    if (lanes[VOTE_REUSE] < 0) {
        return DCP_VERDICT_OUTSIDE;
    }
    if (lanes[VOTE_REUSE] == 1 && is_equal(lanes, VOTE_PLAN_ID_LO) &&
        is_equal(lanes, VOTE_PLAN_ID_HI) && is_equal(lanes, VOTE_CALL)) {
        return DCP_VERDICT_FAST;
    }
    return DCP_VERDICT_SLOW;
}

int
dcp_vote_run(const struct dcp_comm *comm, struct dcp_vote *vote, enum dcp_verdict *ret_verdict,
             struct dcp_error *err)
{
    /* A directory can hold a file name with any number, so n0 is not ours to assert.  The rank
     * takes part all the same; its record goes into the failure exchange that FAILED leads to. */
    bool n0_fits = !vote->is_coordinator || vote->n0 < (uint64_t)INT64_MAX;
    bool ok = vote->ok && n0_fits;
    int64_t lanes[DCP_VOTE_LANES];
    fill_vote(vote, ok, lanes);

    int rc = comm->all_reduce_min(comm->ctx, lanes, DCP_VOTE_LANES, err);
    if (rc != 0) {
        return rc;
    }
    rc = check_version(lanes, comm, "vote of a save", err);
    if (rc != 0) {
        return rc;
    }
    if (!n0_fits) {
        (void)dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                            "vote of a save with first file number %llu: numbers stay below 2^63; "
                            "move the data file with the highest number out of the directory",
                            (unsigned long long)vote->n0);
    }
    enum dcp_verdict verdict = conclude(lanes);
    if (verdict != DCP_VERDICT_FAILED && lanes[VOTE_N0] == INT64_MAX) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                             "vote of a save among %u ranks (%s): no rank is the coordinator",
                             comm->size, comm->kind);
    }
    vote->call_agrees = is_equal(lanes, VOTE_CALL);
    vote->has_base = lanes[VOTE_OK] == 2;
    if (verdict != DCP_VERDICT_FAILED && !vote->is_coordinator) {
        memcpy(vote->save_id.bytes, &lanes[VOTE_SAVE_ID], sizeof vote->save_id.bytes);
        vote->n0 = (uint64_t)lanes[VOTE_N0];
        vote->names_hash.lo = (uint64_t)lanes[VOTE_NAMES];
        vote->names_hash.hi = (uint64_t)lanes[VOTE_NAMES + 1];
        vote->held_plan = (uint64_t)lanes[VOTE_HELD_PLAN];
    }
    *ret_verdict = verdict;
    return 0;
}

int
dcp_status_run(const struct dcp_comm *comm, const struct dcp_save_id *save_id, bool ok,
               bool *ret_all_ok, struct dcp_error *err)
{
    uint64_t halves[2];
    split_save_id(save_id, halves);
    int64_t lanes[STATUS_LANES] = {0};
    put_equal(lanes, STATUS_VERSION, DCP_PROTOCOL_VERSION);
    put_equal(lanes, STATUS_SAVE_ID_LO, halves[0]);
    put_equal(lanes, STATUS_SAVE_ID_HI, halves[1]);
    lanes[STATUS_OK] = ok;

    int rc = comm->all_reduce_min(comm->ctx, lanes, STATUS_LANES, err);
    if (rc != 0) {
        return rc;
    }
    rc = check_version(lanes, comm, "status of a save", err);
    if (rc != 0) {
        return rc;
    }
    /* Before the ids: a rank that failed early may never have learnt the id. */
    if (lanes[STATUS_OK] == 0) {
        *ret_all_ok = false;
        return 0;
    }
    if (!is_equal(lanes, STATUS_SAVE_ID_LO) || !is_equal(lanes, STATUS_SAVE_ID_HI)) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "status of a save among %u ranks (%s): they are in different saves; "
                             "every rank must call save() in the same order on one group",
                             comm->size, comm->kind);
    }
    *ret_all_ok = true;
    return 0;
}

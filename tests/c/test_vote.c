/*
 * test_vote.c: one rank that deviates in one field gives the verdict of design section 3, on all
 * ranks.
 */
#include "dcp_comm.h"

#include "ctest.h"
#include "sim_ranks.h"

enum { MAX_RANKS = 64, TIMEOUT_MS = 20000, COORDINATOR_N0 = 41 };

#define HELD_PLAN UINT64_C(0x8000000000000002)

static const struct dcp_hash128 names_hash = {UINT64_MAX, INT64_MAX};

enum deviation {
    NOTHING,
    PLAN_ID_LOW_BIT,
    PLAN_ID_HIGH_BIT,
    PLAN_ID_OF_HIGH_HALF,
    NO_REUSE,
    NO_BASE,
    NOT_OK,
    CALL,
    CALL_HIGH_BIT,
    NOT_OK_AND_CALL,
    PLANNED_OUTSIDE,
    PLANNED_OUTSIDE_AND_NO_REUSE,
    PLANNED_OUTSIDE_AND_NOT_OK,
    ELSEWHERE,
    ELSEWHERE_AND_OUTSIDE,
    ELSEWHERE_AND_NOT_OK,
    VERSION,
    KILLED,
    DEVIATIONS,
};

struct vote_case {
    uint32_t size;
    uint32_t coordinator;
    uint32_t odd; /* the rank that deviates */
    enum deviation deviation;
    int rc[MAX_RANKS];
    enum dcp_verdict verdict[MAX_RANKS];
    struct dcp_vote vote[MAX_RANKS];
};

static struct dcp_save_id
id_of(uint8_t seed)
{
    struct dcp_save_id id;
    for (size_t i = 0; i < sizeof id.bytes; i++) {
        id.bytes[i] = (uint8_t)(seed + i * 37);
    }
    return id;
}

/* A rank of another protocol version: what its library would send. */
static int
reduce_as_next_version(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err)
{
    struct dcp_comm *inner = ctx;
    lanes[0] = DCP_PROTOCOL_VERSION + 1;
    lanes[1] = ~lanes[0];
    return inner->all_reduce_min(inner->ctx, lanes, count, err);
}

static void
deviate(enum deviation deviation, struct dcp_vote *vote)
{
    switch (deviation) {
    case PLAN_ID_LOW_BIT:
        vote->plan_id.lo ^= 1;
        break;
    case PLAN_ID_HIGH_BIT:
        vote->plan_id.lo ^= 1ull << 63;
        break;
    case PLAN_ID_OF_HIGH_HALF:
        vote->plan_id.hi ^= 1ull << 40;
        break;
    case NO_REUSE:
        vote->reuse = false;
        break;
    case NO_BASE:
        vote->has_base = false;
        break;
    case NOT_OK:
        vote->ok = false;
        break;
    case CALL:
        vote->call += 3;
        break;
    case CALL_HIGH_BIT:
        vote->call ^= 1ull << 63;
        break;
    case NOT_OK_AND_CALL:
        vote->ok = false;
        vote->call++;
        break;
    case PLANNED_OUTSIDE:
        vote->outside = true;
        break;
    case PLANNED_OUTSIDE_AND_NO_REUSE:
        vote->outside = true;
        vote->reuse = false;
        break;
    case PLANNED_OUTSIDE_AND_NOT_OK:
        vote->outside = true;
        vote->ok = false;
        break;
    case ELSEWHERE:
        vote->elsewhere = true;
        break;
    case ELSEWHERE_AND_OUTSIDE:
        vote->elsewhere = true;
        vote->outside = true;
        break;
    case ELSEWHERE_AND_NOT_OK:
        vote->elsewhere = true;
        vote->ok = false;
        break;
    default:
        break;
    }
}

static void
run_vote(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct vote_case *c = arg;
    uint32_t rank = comm->rank;
    struct dcp_vote *vote = &c->vote[rank];
    *vote = (struct dcp_vote){
        .plan_id = {0xfedcba9876543210, 0x8000000000000001},
        .reuse = true,
        .ok = true,
        .call = 0x7fffffffffffffff,
        .has_base = true,
        .is_coordinator = rank == c->coordinator,
    };
    if (vote->is_coordinator) {
        vote->save_id = id_of(200); /* both halves negative as int64 */
        vote->n0 = COORDINATOR_N0;
        vote->names_hash = names_hash;
        vote->held_plan = HELD_PLAN;
    }
    struct dcp_comm inner = *comm;
    struct dcp_comm mine = *comm;
    if (rank == c->odd) {
        deviate(c->deviation, vote);
        if (c->deviation == VERSION) {
            mine.ctx = &inner;
            mine.all_reduce_min = reduce_as_next_version;
        }
        if (c->deviation == KILLED) {
            dcp_comm_sim_kill(sim, rank);
        }
    }
    struct dcp_error err = {0};
    c->rc[rank] = dcp_vote_run(&mine, vote, &c->verdict[rank], &err);
    if (c->rc[rank] != err.code) {
        c->rc[rank] = 1;
    }
}

static void
check_verdict(const struct vote_case *c, int rc, enum dcp_verdict verdict, bool call_agrees)
{
    struct dcp_save_id id = id_of(200);
    for (uint32_t r = 0; r < c->size; r++) {
        CHECK_EQ(c->rc[r], rc);
        if (rc != 0) {
            CHECK_EQ(c->verdict[r], 0);
            continue;
        }
        CHECK_EQ(c->verdict[r], verdict);
        CHECK_EQ(c->vote[r].call_agrees, call_agrees);
        CHECK_EQ(c->vote[r].has_base, verdict != DCP_VERDICT_FAILED && c->deviation != NO_BASE);
        if (verdict != DCP_VERDICT_FAILED) {
            CHECK(memcmp(c->vote[r].save_id.bytes, id.bytes, sizeof id.bytes) == 0);
            CHECK_EQ(c->vote[r].n0, COORDINATOR_N0);
            CHECK(c->vote[r].names_hash.lo == names_hash.lo);
            CHECK(c->vote[r].names_hash.hi == names_hash.hi);
            CHECK(c->vote[r].held_plan == HELD_PLAN);
        }
    }
}

static void
check_case(const struct vote_case *c)
{
    bool alone = c->size == 1;
    switch (c->deviation) {
    case NOTHING:
    case NO_BASE:
        check_verdict(c, 0, DCP_VERDICT_FAST, true);
        break;
    case PLAN_ID_LOW_BIT:
    case PLAN_ID_HIGH_BIT:
    case PLAN_ID_OF_HIGH_HALF:
        check_verdict(c, 0, alone ? DCP_VERDICT_FAST : DCP_VERDICT_SLOW, true);
        break;
    case NO_REUSE:
        check_verdict(c, 0, DCP_VERDICT_SLOW, true);
        break;
    case PLANNED_OUTSIDE:
    case PLANNED_OUTSIDE_AND_NO_REUSE:
        check_verdict(c, 0, DCP_VERDICT_OUTSIDE, true);
        break;
    case ELSEWHERE:
    case ELSEWHERE_AND_OUTSIDE:
        check_verdict(c, 0, DCP_VERDICT_ELSEWHERE, true);
        break;
    case NOT_OK:
    case PLANNED_OUTSIDE_AND_NOT_OK:
    case ELSEWHERE_AND_NOT_OK:
        check_verdict(c, 0, DCP_VERDICT_FAILED, true);
        break;
    case CALL:
    case CALL_HIGH_BIT:
        check_verdict(c, 0, alone ? DCP_VERDICT_FAST : DCP_VERDICT_SLOW, alone);
        break;
    case NOT_OK_AND_CALL:
        check_verdict(c, 0, DCP_VERDICT_FAILED, alone);
        break;
    case VERSION:
        check_verdict(c, alone ? 0 : DCP_E_INVALID, DCP_VERDICT_FAST, true);
        break;
    case KILLED:
        check_verdict(c, DCP_E_COMM, DCP_VERDICT_FAST, true);
        break;
    case DEVIATIONS:
        break;
    }
}

static void
a_single_deviation_gives_the_same_verdict_on_all_ranks(void)
{
    static const uint32_t sizes[] = {1, 2, 3, 4, 5, 8, 13, 64};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        uint32_t size = sizes[s];
        uint32_t step = size > 8 ? size / 4 : 1;
        for (uint32_t odd = 0; odd < size; odd += step) {
            for (int d = NOTHING; d < DEVIATIONS; d++) {
                struct vote_case c = {
                    .size = size,
                    .coordinator = size / 2,
                    .odd = odd,
                    .deviation = (enum deviation)d,
                };
                sim_ranks_run(size, TIMEOUT_MS, run_vote, &c);
                check_case(&c);
            }
        }
    }
}

struct n0_case {
    bool no_coordinator;
    uint64_t n0;
    int rc[4], code[4];
    enum dcp_verdict verdict[4];
};

static void
run_n0(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    (void)sim;
    struct n0_case *c = arg;
    struct dcp_vote vote = {
        .ok = true, .is_coordinator = !c->no_coordinator && comm->rank == 0, .n0 = c->n0};
    struct dcp_error err = {0};
    c->rc[comm->rank] = dcp_vote_run(comm, &vote, &c->verdict[comm->rank], &err);
    c->code[comm->rank] = err.code;
}

static void
a_first_file_number_that_no_lane_can_carry_fails_the_vote_everywhere(void)
{
    struct n0_case c = {.n0 = INT64_MAX};
    sim_ranks_run(4, TIMEOUT_MS, run_n0, &c);
    for (int r = 0; r < 4; r++) {
        CHECK_EQ(c.rc[r], 0);
        CHECK_EQ(c.verdict[r], DCP_VERDICT_FAILED);
        CHECK_EQ(c.code[r], r == 0 ? DCP_E_LIMIT : 0);
    }
    struct n0_case below = {.n0 = INT64_MAX - 1};
    sim_ranks_run(4, TIMEOUT_MS, run_n0, &below);
    for (int r = 0; r < 4; r++) {
        CHECK_EQ(below.rc[r], 0);
        CHECK_EQ(below.verdict[r], DCP_VERDICT_SLOW);
    }
}

static void
a_vote_without_a_coordinator_is_an_error_everywhere(void)
{
    struct n0_case c = {.no_coordinator = true};
    sim_ranks_run(4, TIMEOUT_MS, run_n0, &c);
    for (int r = 0; r < 4; r++) {
        CHECK_EQ(c.rc[r], DCP_E_INTERNAL);
    }
}

/* ---- status ---- */

struct status_case {
    uint32_t odd;
    bool odd_ok;
    bool odd_id;
    bool odd_version;
    int rc[MAX_RANKS];
    int all_ok[MAX_RANKS]; /* -1: not written */
};

static void
run_status(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    (void)sim;
    struct status_case *c = arg;
    uint32_t rank = comm->rank;
    bool odd = rank == c->odd;
    struct dcp_save_id id = id_of(1);
    if (odd && c->odd_id) {
        id.bytes[15] ^= 0x80;
    }
    struct dcp_comm inner = *comm;
    struct dcp_comm mine = *comm;
    if (odd && c->odd_version) {
        mine.ctx = &inner;
        mine.all_reduce_min = reduce_as_next_version;
    }
    struct dcp_error err = {0};
    bool all_ok = false;
    c->rc[rank] = dcp_status_run(&mine, &id, odd ? c->odd_ok : true, &all_ok, &err);
    c->all_ok[rank] = c->rc[rank] == 0 ? all_ok : -1;
}

static void
check_status(uint32_t size, struct status_case c, int rc, int all_ok)
{
    sim_ranks_run(size, TIMEOUT_MS, run_status, &c);
    for (uint32_t r = 0; r < size; r++) {
        CHECK_EQ(c.rc[r], rc);
        CHECK_EQ(c.all_ok[r], all_ok);
    }
}

static void
status_is_ok_only_where_all_ranks_are_ok_in_the_same_save(void)
{
    static const uint32_t sizes[] = {2, 3, 17, 64};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        for (uint32_t odd = 0; odd < sizes[s]; odd += 1 + sizes[s] / 8) {
            check_status(sizes[s], (struct status_case){.odd = odd, .odd_ok = true}, 0, 1);
            check_status(sizes[s], (struct status_case){.odd = odd}, 0, 0);
            check_status(sizes[s], (struct status_case){.odd = odd, .odd_id = true}, 0, 0);
            check_status(sizes[s], (struct status_case){.odd = odd, .odd_ok = true, .odd_id = true},
                         DCP_E_INVALID, -1);
            check_status(sizes[s], (struct status_case){.odd = odd, .odd_version = true},
                         DCP_E_INVALID, -1);
        }
    }
}

CTEST_MAIN(RUN(a_single_deviation_gives_the_same_verdict_on_all_ranks);
           RUN(a_first_file_number_that_no_lane_can_carry_fails_the_vote_everywhere);
           RUN(a_vote_without_a_coordinator_is_an_error_everywhere);
           RUN(status_is_ok_only_where_all_ranks_are_ok_in_the_same_save);)

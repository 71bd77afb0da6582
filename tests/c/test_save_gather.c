/*
 * test_save_gather.c: which ranks send their names in a SLOW round, and that the coordinator gets
 * every rank's plan whoever left names out, started anew, failed or was lied to.
 */
#include "name_table.h"
#include "save.h"

#include "ctest.h"
#include "plan_maker.h"
#include "save_world.h"
#include "sim_ranks.h"

enum { RANKS = 5, COORDINATOR = 1, TIMEOUT_MS = 20000, MOST_ROUNDS = 8 };

/* Where a plan's image has its flags: behind the message's length (comm_bytes.c) and the head's
 * magic and version (plan_format.h). */
enum { FLAGS_AT = 8 + 4 + 1, NAMELESS = 1 << 7 };
/* Lanes of the vote that a lie is put into (vote.c). */
enum { LANE_NAMES = 13, LANE_HELD_PLAN = 15 };

/* Names of a rank in a round. */
enum names { COMMON, OWN, SUBSET, NONE, NO_PATHS, RENAMED };

struct round {
    enum names names[RANKS];
    bool new_group[RANKS]; /* the rank starts anew */
    bool forget;           /* all ranks: planning without a cache */
    bool fails;            /* the coordinator cannot accept the plans */
    bool lies;             /* the vote claims that the coordinator has rank 0's names */
    bool lies_of_plan;     /* or that it holds a plan which nobody has */
    /* expected */
    bool sends_names[RANKS];
};

struct job {
    const struct round *rounds;
    size_t rounds_count;
    struct dcp_hash128 lie;                                /* rank 0's names */
    struct dcp_hash128 fingerprints[MOST_ROUNDS][RANKS];   /* of what a rank wanted to save */
    struct dcp_hash128 at_coordinator[MOST_ROUNDS][RANKS]; /* of what it has installed */
    uint32_t tables_count[MOST_ROUNDS];                    /* distinct ones there */
    bool sent_names[MOST_ROUNDS][RANKS];
    int rc[MOST_ROUNDS][RANKS];
    char why[MOST_ROUNDS][RANKS][DCP_ERROR_MESSAGE_BYTES]; /* first failure that was told */
    uint32_t failed_rank[MOST_ROUNDS][RANKS];
};

/* ---- a table that watches the messages and can lie ---- */

struct spy {
    struct dcp_comm inner;
    const struct job *job;
    size_t round;
    bool sent_names;
    bool voted;
};

static int
spy_all_reduce_min(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err)
{
    struct spy *spy = ctx;
    const struct round *round = &spy->job->rounds[spy->round];
    if (!spy->voted && spy->inner.rank == COORDINATOR && round->lies) {
        lanes[LANE_NAMES] = (int64_t)spy->job->lie.lo;
        lanes[LANE_NAMES + 1] = (int64_t)spy->job->lie.hi;
    }
    if (!spy->voted && spy->inner.rank == COORDINATOR && round->lies_of_plan) {
        lanes[LANE_HELD_PLAN] = 77;
    }
    spy->voted = true;
    return spy->inner.all_reduce_min(spy->inner.ctx, lanes, count, err);
}

static int
spy_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
           struct dcp_error *err)
{
    struct spy *spy = ctx;
    CHECK(bytes > FLAGS_AT);
    spy->sent_names = (((const uint8_t *)send)[FLAGS_AT] & NAMELESS) == 0;
    return spy->inner.gather(spy->inner.ctx, root, send, recv, bytes, err);
}

static int
spy_all_gather(void *ctx, const void *send, void *recv, size_t bytes, struct dcp_error *err)
{
    struct spy *spy = ctx;
    return spy->inner.all_gather(spy->inner.ctx, send, recv, bytes, err);
}

static int
spy_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
            struct dcp_error *err)
{
    struct spy *spy = ctx;
    return spy->inner.scatter(spy->inner.ctx, root, send, recv, bytes, err);
}

static void
spy_destroy(void *ctx)
{
    (void)ctx; /* sim_ranks_run destroys the inner one */
}

static struct dcp_group *
new_group(struct spy *spy)
{
    struct dcp_comm comm = spy->inner;
    comm.ctx = spy;
    comm.all_reduce_min = spy_all_reduce_min;
    comm.gather = spy_gather;
    comm.all_gather = spy_all_gather;
    comm.scatter = spy_scatter;
    comm.destroy = spy_destroy;
    return save_world_group(&comm, COORDINATOR);
}

/* ---- plans ---- */

static void
add_name(struct dcp_plan *plan, const char *fqn, bool has_path)
{
    struct dcp_error err = {0};
    uint32_t name;
    if (has_path) {
        (void)maker_name(plan, fqn);
    } else {
        CHECK_OK(dcp_plan_add_name(plan, fqn, strlen(fqn), NULL, 0, 0, &name, &err), &err);
    }
}

/* Replicas, and an object of the rank's own; not every name has an item.  `round` makes the plans
 * of a job differ from one round to the next. */
static void
make_plan(struct dcp_plan *plan, uint32_t rank, enum names names, size_t round, bool unsound)
{
    const uint32_t count = names == SUBSET ? 4 : names == NONE ? 0 : 9;
    char fqn[32];
    *plan = (struct dcp_plan){
        .rank = rank, .thread_count = 1, .single_file_per_rank = true, .has_paths = true};
    for (uint32_t i = 0; i < count; i++) {
        bool renamed = names == RENAMED && i == 6;
        snprintf(fqn, sizeof fqn, renamed ? "layers.%u.scale" : "layers.%u.weight", i);
        add_name(plan, fqn, names != NO_PATHS);
    }
    if (names == OWN) {
        snprintf(fqn, sizeof fqn, "rng.%u", rank);
        maker_object(plan, fqn, 80 + round);
    }
    const uint64_t sizes[] = {3, 8 + round};
    for (uint32_t i = 0; i < count; i += 2) {
        snprintf(fqn, sizeof fqn, "layers.%u.weight", i);
        if (names != RENAMED || i != 6) {
            maker_tensor(plan, fqn, DCP_DTYPE_FLOAT32, 2, sizes);
        }
    }
    if (unsound) {
        maker_shard2(plan, "layers.0.weight", 3, 8 + round, 1, 0, 3, 8 + round); /* leaves it */
    }
}

/* ---- ranks ---- */

static void
look_at_installed(struct job *job, size_t i, const struct dcp_group *group)
{
    const struct dcp_installed_plan *installed = group->installed;
    CHECK_EQ(installed->plans_count, RANKS);
    for (uint32_t r = 0; r < installed->plans_count; r++) {
        bool is_new = true;
        for (uint32_t q = 0; q < r; q++) {
            is_new = is_new && installed->plans[q].table != installed->plans[r].table;
        }
        job->tables_count[i] += is_new;
        job->at_coordinator[i][r] = dcp_plan_fingerprint(&installed->plans[r], 0);
    }
}

static void
plan_round(struct job *job, size_t i, struct dcp_group *group, struct spy *spy)
{
    const struct round *round = &job->rounds[i];
    uint32_t rank = spy->inner.rank;
    struct dcp_save_params params = {.io = dcp_io_posix(), .dir_path = "/nowhere"};
    struct dcp_failure_list failures = {0};
    struct dcp_save *save = NULL;
    struct dcp_plan plan;
    struct dcp_error err = {0};
    struct dcp_save_info info;

    make_plan(&plan, rank, round->names[rank], i, round->fails && rank == 2);
    job->fingerprints[i][rank] = dcp_plan_fingerprint(&plan, 0);
    CHECK_OK(dcp_save_new(group, &params, &save, &err), &err);
    dcp_save_set_plan(save, &plan);
    spy->round = i;
    spy->voted = false;
    spy->sent_names = false;
    job->rc[i][rank] = dcp_save_agree(save, NULL, &failures, &err);
    job->sent_names[i][rank] = spy->sent_names;
    dcp_save_get_info(save, &info);
    CHECK(!info.fast);
    if (failures.count > 0) {
        const struct dcp_error *first = (const struct dcp_error *)failures.items[0].bytes;
        memcpy(job->why[i][rank], first->message, sizeof first->message);
        job->failed_rank[i][rank] = failures.items[0].rank;
        CHECK_EQ(failures.count, 1);
    }
    if (job->rc[i][rank] == 0 && rank == COORDINATOR) {
        look_at_installed(job, i, group);
    }
    dcp_failure_list_clean_up(&failures);
    dcp_save_destroy(save);
}

static void
run_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct job *job = arg;
    struct spy spy = {.inner = *comm, .job = job};
    struct dcp_group *group = NULL;
    (void)sim;
    for (size_t i = 0; i < job->rounds_count; i++) {
        if (job->rounds[i].new_group[comm->rank] || group == NULL) {
            dcp_group_destroy(group);
            group = new_group(&spy);
        }
        if (job->rounds[i].forget) {
            dcp_group_forget_plan(group);
        }
        plan_round(job, i, group, &spy);
    }
    dcp_group_destroy(group);
}

static void
run(struct job *job, const struct round *rounds, size_t rounds_count)
{
    struct dcp_plan plan;
    job->rounds = rounds;
    job->rounds_count = rounds_count;
    CHECK(rounds_count <= MOST_ROUNDS);
    make_plan(&plan, 0, OWN, 0, false);
    job->lie = dcp_plan_names_hash(&plan);
    dcp_plan_clean_up(&plan);
    sim_ranks_run(RANKS, TIMEOUT_MS, run_rank, job);
}

/* Rounds that must go well: the coordinator has what every rank wanted to save. */
static void
check_round(const struct job *job, size_t i)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_EQ(job->rc[i][r], 0);
        CHECK(job->at_coordinator[i][r].lo == job->fingerprints[i][r].lo &&
              job->at_coordinator[i][r].hi == job->fingerprints[i][r].hi);
        if (job->sent_names[i][r] != job->rounds[i].sends_names[r]) {
            fprintf(stderr, "round %zu, rank %u: %s\n", i, r, job->why[i][r]);
        }
        CHECK_EQ(job->sent_names[i][r], job->rounds[i].sends_names[r]);
    }
}

static void
check_all(const struct round *rounds, size_t rounds_count)
{
    struct job *job = calloc(1, sizeof *job);
    run(job, rounds, rounds_count);
    for (size_t i = 0; i < rounds_count; i++) {
        check_round(job, i);
    }
    free(job);
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- cases ---- */

static void
ranks_with_the_coordinators_names_never_send_them(void)
{
    static const struct round rounds[] = {{.forget = true}, {.forget = false}, {.forget = true}};
    struct job *job = calloc(1, sizeof *job);
    run(job, rounds, COUNT(rounds));
    for (size_t i = 0; i < COUNT(rounds); i++) {
        check_round(job, i);
        CHECK_EQ(job->tables_count[i], 1);
    }
    free(job);
}

static void
names_that_differ_are_sent_once(void)
{
    static const struct round rounds[] = {
        {.names = {OWN, COMMON, SUBSET, NONE, NO_PATHS}, .sends_names = {1, 0, 1, 1, 1}},
        {.names = {OWN, COMMON, SUBSET, NONE, NO_PATHS}},
        {.names = {OWN, COMMON, SUBSET, NONE, NO_PATHS}},
        /* without a plan in common there is nothing to build on */
        {.names = {OWN, COMMON, SUBSET, NONE, NO_PATHS},
         .forget = true,
         .sends_names = {1, 0, 1, 1, 1}},
    };
    check_all(rounds, COUNT(rounds));
}

static void
a_changed_name_is_sent_by_the_rank_that_changed_it(void)
{
    static const struct round rounds[] = {
        {.names = {OWN, OWN, OWN, OWN, OWN}, .sends_names = {1, 0, 1, 1, 1}},
        {.names = {OWN, OWN, RENAMED, OWN, OWN}, .sends_names = {0, 0, 1, 0, 0}},
        /* back: those are not the names of the last plan */
        {.names = {OWN, OWN, OWN, OWN, OWN}, .sends_names = {0, 0, 1, 0, 0}},
        /* the coordinator's own names are never sent, and leave the others' known */
        {.names = {OWN, RENAMED, OWN, OWN, OWN}},
        {.names = {OWN, COMMON, COMMON, OWN, RENAMED}, .sends_names = {0, 0, 0, 0, 1}},
        /* of another rank that had them last */
        {.names = {RENAMED, COMMON, COMMON, OWN, RENAMED}, .sends_names = {1, 0, 0, 0, 0}},
    };
    check_all(rounds, COUNT(rounds));
}

static void
equal_names_of_several_ranks_share_one_table(void)
{
    static const struct round rounds[] = {
        {.names = {NO_PATHS, COMMON, NO_PATHS, NO_PATHS, SUBSET}, .sends_names = {1, 0, 1, 1, 1}},
        {.names = {NO_PATHS, COMMON, SUBSET, SUBSET, SUBSET}, .sends_names = {0, 0, 1, 1, 0}},
    };
    struct job *job = calloc(1, sizeof *job);
    run(job, rounds, COUNT(rounds));
    for (size_t i = 0; i < COUNT(rounds); i++) {
        check_round(job, i);
        CHECK_EQ(job->tables_count[i], 3);
    }
    free(job);
}

static void
a_restarted_rank_sends_its_names(void)
{
    static const struct round rounds[] = {
        {.names = {OWN, OWN, OWN, OWN, OWN}, .sends_names = {1, 0, 1, 1, 1}},
        {.names = {OWN, OWN, OWN, OWN, OWN},
         .new_group = {0, 0, 0, 1, 0},
         .sends_names = {0, 0, 0, 1, 0}},
        {.names = {OWN, OWN, OWN, OWN, OWN}},
    };
    check_all(rounds, COUNT(rounds));
}

static void
a_restarted_coordinator_gets_all_names_but_its_own(void)
{
    static const struct round rounds[] = {
        {.names = {OWN, OWN, OWN, COMMON, OWN}, .sends_names = {1, 0, 1, 1, 1}},
        {.names = {OWN, COMMON, OWN, COMMON, OWN},
         .new_group = {0, 1, 0, 0, 0},
         .sends_names = {1, 0, 1, 0, 1}},
        {.names = {OWN, COMMON, OWN, COMMON, OWN}},
    };
    check_all(rounds, COUNT(rounds));
}

static void
a_round_that_fails_leaves_the_names_of_the_plan_before_known(void)
{
    static const struct round rounds[] = {
        {.names = {OWN, OWN, OWN, OWN, OWN}, .sends_names = {1, 0, 1, 1, 1}},
        {.names = {RENAMED, OWN, OWN, OWN, OWN}, .fails = true},
        {.names = {OWN, OWN, OWN, OWN, OWN}},
        {.names = {RENAMED, OWN, OWN, OWN, OWN}, .sends_names = {1, 0, 0, 0, 0}},
    };
    struct job *job = calloc(1, sizeof *job);
    run(job, rounds, COUNT(rounds));
    for (size_t i = 0; i < COUNT(rounds); i++) {
        if (i != 1) {
            check_round(job, i);
            continue;
        }
        for (uint32_t r = 0; r < RANKS; r++) {
            CHECK_EQ(job->rc[i][r], DCP_E_PEER);
            CHECK_EQ(job->failed_rank[i][r], COORDINATOR);
        }
    }
    free(job);
}

/* A rank that was made to believe that its names are known gets a failure and no plan, on all ranks
 * alike, and the next save is a good one. */
static void
names_that_the_coordinator_does_not_have_fail_the_save_everywhere(void)
{
    static const struct round rounds[] = {
        {.names = {OWN, COMMON, COMMON, COMMON, COMMON}, .lies = true},
        {.names = {OWN, COMMON, COMMON, COMMON, COMMON}, .sends_names = {1, 0, 0, 0, 0}},
    };
    struct job *job = calloc(1, sizeof *job);
    run(job, rounds, COUNT(rounds));
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_EQ(job->rc[0][r], DCP_E_PEER);
        CHECK_EQ(job->failed_rank[0][r], COORDINATOR);
        CHECK(strstr(job->why[0][r], "rank 0 left out names") != NULL);
    }
    check_round(job, 1);
    free(job);
}

/* Nobody leaves names out for a plan that is not its own installed one. */
static void
a_plan_that_nobody_installed_makes_ranks_send_their_names(void)
{
    static const struct round rounds[] = {
        {.names = {OWN, COMMON, OWN, OWN, OWN},
         .lies_of_plan = true,
         .sends_names = {1, 0, 1, 1, 1}},
        {.names = {OWN, COMMON, OWN, OWN, OWN},
         .lies_of_plan = true,
         .sends_names = {1, 0, 1, 1, 1}},
    };
    check_all(rounds, COUNT(rounds));
}

CTEST_MAIN(RUN(ranks_with_the_coordinators_names_never_send_them);
           RUN(names_that_differ_are_sent_once);
           RUN(a_changed_name_is_sent_by_the_rank_that_changed_it);
           RUN(equal_names_of_several_ranks_share_one_table); RUN(a_restarted_rank_sends_its_names);
           RUN(a_restarted_coordinator_gets_all_names_but_its_own);
           RUN(a_round_that_fails_leaves_the_names_of_the_plan_before_known);
           RUN(names_that_the_coordinator_does_not_have_fail_the_save_everywhere);
           RUN(a_plan_that_nobody_installed_makes_ranks_send_their_names);)

/*
 * test_agreement.c: how a background save ends on all ranks: who hears what, how soon, at what
 * cost.
 */
#include "agreement_rules.h"
#include "ctest.h"
#include "sim_ranks.h"

static struct world_plan
plan_of(uint32_t size)
{
    return (struct world_plan){.size = size, .deadline_ns = 120 * WORLD_S, .seed = 1};
}

static void
check_rules(const struct world *world, size_t keys_left)
{
    const char *broken = agreement_broken_rule(world);

    if (broken != NULL || world->keys_left != keys_left) {
        agreement_describe(world, broken != NULL ? broken : "keys");
    }
    CHECK(broken == NULL);
    CHECK_EQ(world->keys_left, keys_left);
}

static uint64_t
last_settled_ns(const struct world *world)
{
    uint64_t last_ns = 0;
    for (uint32_t i = 0; i < world->plan.size; i++) {
        if (!world->ranks[i].dead && !world->ranks[i].stuck) {
            last_ns = dcp_max_u64(last_ns, world->ranks[i].settled_ns);
        }
    }
    return last_ns;
}

static void
a_save_that_is_durable_everywhere_commits(void)
{
    for (uint32_t size = 1; size <= 8; size++) {
        for (uint32_t coordinator = 0; coordinator < size; coordinator += 3) {
            struct world_plan plan = plan_of(size);
            struct world world;

            plan.coordinator = coordinator;
            plan.seed = size;
            world_run(&plan, &world);
            check_rules(&world, 0);
            CHECK(world.committed && agreement_all_told(&world, 0));
            for (uint32_t i = 0; i < size; i++) {
                CHECK(world.ranks[i].stats.in_touch);
                CHECK(world.ranks[i].published == (i == coordinator));
                CHECK(i == coordinator || world.ranks[i].concluded == DCP_OUTCOME_COMMITTED);
                CHECK(world.ranks[i].settled_ns < 300 * WORLD_MS);
            }
            world_end(&world);
        }
    }
}

static void
a_failed_write_is_told_to_all_within_two_seconds_and_names_its_rank(void)
{
    const uint64_t write_ns[] = {20 * WORLD_S, 20 * WORLD_S, 20 * WORLD_S, 20 * WORLD_S,
                                 20 * WORLD_S};
    for (uint32_t failing = 0; failing < 5; failing++) {
        for (uint32_t coordinator = 0; coordinator < 5; coordinator += 2) {
            struct world_plan plan = plan_of(5);
            struct world world;
            uint64_t times_ns[5];

            memcpy(times_ns, write_ns, sizeof times_ns);
            times_ns[failing] = 3 * WORLD_S;
            plan.write_ns = times_ns;
            plan.failing = UINT64_C(1) << failing;
            plan.coordinator = coordinator;
            world_run(&plan, &world);
            check_rules(&world, 0);
            CHECK(!world.committed && world.aborted && agreement_all_told(&world, DCP_E_PEER));
            for (uint32_t i = 0; i < 5; i++) {
                CHECK(agreement_names(&world.ranks[i], failing));
                CHECK(strstr(world.ranks[i].message, "no space") != NULL);
                CHECK(i == coordinator || world.ranks[i].concluded == DCP_OUTCOME_ABORTED);
            }
            CHECK(last_settled_ns(&world) < 5 * WORLD_S);
            world_end(&world);
        }
    }
}

static void
two_failures_at_once_end_as_one(void)
{
    for (uint64_t pair = 0; pair < 64; pair++) {
        struct world_plan plan = plan_of(6);
        struct world world;

        plan.failing = pair;
        plan.seed = pair;
        world_run(&plan, &world);
        check_rules(&world, 0);
        CHECK(agreement_all_told(&world, pair == 0 ? 0 : DCP_E_PEER));
        for (uint32_t i = 1; i < 6; i++) {
            CHECK_EQ(world.ranks[i].failures_count, world.ranks[0].failures_count);
            CHECK_EQ(world.ranks[i].failed_ranks[0], world.ranks[0].failed_ranks[0]);
        }
        world_end(&world);
    }
}

static void
what_cannot_be_published_fails_everywhere_and_what_is_unsynced_keeps_its_files(void)
{
    for (int unsynced = 0; unsynced < 2; unsynced++) {
        struct world_plan plan = plan_of(4);
        struct world world;

        plan.publish_fails = unsynced == 0;
        plan.publish_unsynced = unsynced == 1;
        plan.coordinator = 1;
        world_run(&plan, &world);
        check_rules(&world, 0);
        CHECK(world.committed == (unsynced == 1) && agreement_all_told(&world, DCP_E_PEER));
        for (uint32_t i = 0; i < 4; i++) {
            CHECK(agreement_names(&world.ranks[i], 1));
            CHECK(i == 1 || world.ranks[i].concluded ==
                                (unsynced ? DCP_OUTCOME_COMMITTED : DCP_OUTCOME_ABORTED));
        }
        world_end(&world);
    }
}

static void
ranks_that_stage_longer_than_a_host_may_be_silent_are_waited_for(void)
{
    const uint64_t start_ns[] = {0, 45 * WORLD_S, 5 * WORLD_S, 45 * WORLD_S};
    for (uint32_t coordinator = 0; coordinator < 4; coordinator++) {
        struct world_plan plan = plan_of(4);
        struct world world;

        plan.start_ns = start_ns;
        plan.ranks_per_host = 1;
        plan.coordinator = coordinator;
        world_run(&plan, &world);
        check_rules(&world, 0);
        CHECK(world.committed && agreement_all_told(&world, 0));
        world_end(&world);
    }
}

static void
a_coordinator_that_publishes_for_long_is_not_taken_for_dead(void)
{
    struct world_plan plan = plan_of(4);
    struct world world;

    plan.ranks_per_host = 1;
    plan.publish_ns = 40 * WORLD_S;
    world_run(&plan, &world);
    check_rules(&world, 0);
    CHECK(world.committed && agreement_all_told(&world, 0));
    world_end(&world);
}

static void
at_the_deadline_all_hear_that_the_save_was_given_up(void)
{
    for (uint32_t late = 0; late < 4; late++) {
        uint64_t write_ns[] = {WORLD_S, WORLD_S, WORLD_S, WORLD_S};
        struct world_plan plan = plan_of(4);
        struct world world;

        write_ns[late] = WORLD_NEVER;
        plan.write_ns = write_ns;
        plan.deadline_ns = 20 * WORLD_S;
        world_run(&plan, &world);
        check_rules(&world, 0);
        CHECK(world.aborted && agreement_all_told(&world, DCP_E_PEER));
        CHECK(strstr(world.ranks[3].message, "only 3 of 4 ranks had written") != NULL);
        world_end(&world);
    }
}

static void
a_verdict_just_before_the_deadline_is_heard(void)
{
    const uint64_t write_ns[] = {10 * WORLD_S, 10 * WORLD_S, 10 * WORLD_S};
    for (uint64_t publish_ms = 9500; publish_ms < 9960; publish_ms += 10) {
        struct world_plan plan = plan_of(3);
        struct world world;

        plan.write_ns = write_ns;
        plan.deadline_ns = 20 * WORLD_S;
        plan.publish_ns = publish_ms * WORLD_MS;
        world_run(&plan, &world);
        check_rules(&world, 0);
        CHECK(world.committed && agreement_all_told(&world, 0));
        CHECK(last_settled_ns(&world) < 20 * WORLD_S + WORLD_MS);
        world_end(&world);
    }
}

/* The fault of a whole host at one time. */
static void
strike_host(struct world_plan *plan, uint32_t host, uint64_t at_ns, enum world_event event,
            uint64_t for_ns)
{
    for (uint32_t i = 0; i < plan->ranks_per_host; i++) {
        plan->faults[i] = (struct world_fault){.rank = host * plan->ranks_per_host + i,
                                               .at_ns = at_ns,
                                               .for_ns = for_ns,
                                               .event = event};
    }
}

static void
a_dead_host_is_noticed_by_its_silence_and_named(void)
{
    const uint64_t write_ns[] = {60 * WORLD_S, 60 * WORLD_S, 60 * WORLD_S,
                                 60 * WORLD_S, 60 * WORLD_S, 60 * WORLD_S};
    for (uint32_t host = 0; host < 3; host++) {
        for (uint32_t coordinator = 0; coordinator < 6; coordinator++) {
            struct world_plan plan = plan_of(6);
            struct world world;
            char ranks[32];

            plan.ranks_per_host = 2;
            plan.coordinator = coordinator;
            plan.write_ns = write_ns;
            strike_host(&plan, host, 5 * WORLD_S, WORLD_KILL, 0);
            world_run(&plan, &world);
            check_rules(&world, 0);
            CHECK(!world.committed && agreement_all_told(&world, DCP_E_PEER));
            CHECK(last_settled_ns(&world) < (5 + 10 + 4 + 1) * WORLD_S);
            snprintf(ranks, sizeof ranks, "host of ranks %u, %u,", host * 2, host * 2 + 1);
            for (uint32_t i = 0; i < 6; i++) {
                struct world_result *rank = &world.ranks[i];
                bool is_coordinators = coordinator / 2 == host;
                CHECK(rank->dead || strstr(rank->message, ranks) != NULL);
                CHECK(rank->dead || i == coordinator ||
                      rank->concluded ==
                          (is_coordinators ? DCP_OUTCOME_UNKNOWN : DCP_OUTCOME_ABORTED));
            }
            world_end(&world);
        }
    }
}

/* It thaws before, in and behind the farewell, and behind everything. */
static void
a_frozen_host_that_comes_back_contradicts_nobody_and_leaves_no_key(void)
{
    const uint64_t write_ns[] = {20 * WORLD_S, 20 * WORLD_S, 20 * WORLD_S, 20 * WORLD_S};
    const uint64_t for_ns[] = {4 * WORLD_S,  9 * WORLD_S,  15 * WORLD_S,
                               30 * WORLD_S, 60 * WORLD_S, 300 * WORLD_S};
    for (uint32_t host = 0; host < 2; host++) {
        for (uint64_t at = 0; at < 24; at += 3) {
            for (size_t k = 0; k < sizeof for_ns / sizeof for_ns[0]; k++) {
                struct world_plan plan = plan_of(4);
                struct world world;

                plan.ranks_per_host = 2;
                plan.write_ns = write_ns;
                plan.seed = at;
                strike_host(&plan, host, at * WORLD_S + 1, WORLD_FREEZE, for_ns[k]);
                world_run(&plan, &world);
                check_rules(&world, 0);
                world_end(&world);
            }
        }
    }
}

/* The others were told that it is lost; all are durable when it thaws. */
static void
a_coordinator_that_was_taken_for_dead_publishes_no_more(void)
{
    const uint64_t write_ns[] = {2 * WORLD_S, 4 * WORLD_S, 8 * WORLD_S};
    struct world_plan plan = plan_of(3);
    struct world world;

    plan.ranks_per_host = 1;
    plan.write_ns = write_ns;
    strike_host(&plan, 0, 5 * WORLD_S, WORLD_FREEZE, 20 * WORLD_S);
    world_run(&plan, &world);
    check_rules(&world, 0);
    CHECK(world.aborted && agreement_all_told(&world, DCP_E_PEER));
    CHECK_EQ(world.ranks[1].concluded, DCP_OUTCOME_UNKNOWN);
    CHECK(agreement_names(&world.ranks[0], 0) && world.ranks[1].settled_ns < 20 * WORLD_S);
    world_end(&world);
}

static void
machines_that_sleep_take_nobody_for_dead(void)
{
    const uint64_t write_ns[] = {9 * WORLD_S, 8 * WORLD_S, 9 * WORLD_S};
    for (uint64_t at = 1; at < 9; at++) {
        struct world_plan plan = plan_of(3);
        struct world world;

        plan.ranks_per_host = 1;
        plan.write_ns = write_ns;
        for (uint32_t i = 0; i < 3; i++) {
            plan.faults[i] = (struct world_fault){
                .rank = i, .at_ns = at * WORLD_S, .for_ns = 60 * WORLD_S, .event = WORLD_FREEZE};
        }
        world_run(&plan, &world);
        check_rules(&world, 0);
        CHECK(world.committed && agreement_all_told(&world, 0));
        world_end(&world);
    }
}

static void
independent_ranks_publish_their_own_and_undo_nothing(void)
{
    const uint64_t write_ns[] = {WORLD_S, 3 * WORLD_S, 5 * WORLD_S, 2 * WORLD_S};
    for (uint64_t failing = 0; failing < 16; failing++) {
        struct world_plan plan = plan_of(4);
        struct world world;

        plan.independent = true;
        plan.failing = failing;
        plan.write_ns = write_ns;
        world_run(&plan, &world);
        check_rules(&world, 0);
        CHECK(agreement_all_told(&world, failing == 0 ? 0 : DCP_E_PEER));
        for (uint32_t i = 0; i < 4; i++) {
            bool fails = (failing >> i & 1) != 0;
            CHECK(world.ranks[i].published == !fails && world.ranks[i].abandoned == fails);
            CHECK(!world.ranks[i].has_concluded);
        }
        world_end(&world);
    }
}

static void
an_independent_rank_that_dies_is_told_to_all(void)
{
    const uint64_t write_ns[] = {WORLD_S, 3 * WORLD_S, 5 * WORLD_S, 2 * WORLD_S};
    for (uint32_t dead = 0; dead < 4; dead++) {
        struct world_plan plan = plan_of(4);
        struct world world;

        plan.independent = true;
        plan.write_ns = write_ns;
        plan.faults[0] =
            (struct world_fault){.rank = dead, .at_ns = 500 * WORLD_MS, .event = WORLD_KILL};
        world_run(&plan, &world);
        check_rules(&world, 0);
        CHECK(agreement_all_told(&world, DCP_E_PEER));
        for (uint32_t i = 0; i < 4; i++) {
            CHECK(i == dead ||
                  (world.ranks[i].published && agreement_names(&world.ranks[i], dead)));
        }
        world_end(&world);
    }
}

static void
without_memory_a_rank_ends_and_takes_nobody_for_committed(void)
{
    for (uint64_t n = 1; n < 40; n++) {
        struct world_plan plan = plan_of(3);
        struct world world;

        plan.deadline_ns = 10 * WORLD_S;
        plan.failing = (n & 1) << 2;
        plan.ranks_per_host = 1;
        dcp_alloc_fail_after(n);
        world_run(&plan, &world);
        dcp_alloc_fail_after(0);
        CHECK(agreement_broken_rule(&world) == NULL);
        world_end(&world);
    }
}

static void
a_thousand_ranks_of_a_host_end_and_leave_no_key(void)
{
    enum { SIZE = 1000 };
    static uint64_t write_ns[SIZE];
    for (uint32_t i = 0; i < SIZE; i++) {
        write_ns[i] = 2 * WORLD_S + i * 3 * WORLD_MS;
    }
    for (int dies = 0; dies < 2; dies++) {
        struct world_plan plan = plan_of(SIZE);
        struct world world;
        uint64_t sum = 0, most = 0;

        plan.write_ns = write_ns;
        if (dies) {
            plan.faults[0] =
                (struct world_fault){.rank = 567, .at_ns = WORLD_S, .event = WORLD_KILL};
        }
        world_run(&plan, &world);
        CHECK(agreement_broken_rule(&world) == NULL);
        CHECK_EQ(world.keys_left, 0);
        CHECK(world.committed == !dies && agreement_all_told(&world, dies ? DCP_E_PEER : 0));
        for (uint32_t i = 0; i < SIZE; i++) {
            sum += i > 0 ? world.ranks[i].stats.store_calls : 0;
            most = dcp_max_u64(most, i > 0 ? world.ranks[i].stats.store_calls : 0);
        }
        printf("  %s: %.1f calls to the store by a rank, at most %" PRIu64 ", %" PRIu64
               " by the coordinator; the last heard at %.2f s\n",
               dies ? "rank 567 dies at 1 s" : "durable at 2 to 5 s", (double)sum / (SIZE - 1),
               most, world.ranks[0].stats.store_calls, (double)last_settled_ns(&world) / 1e9);
        /* 5 s at 0.4 s a look, twice the 9 looks that the pause takes to grow, and 5 besides. */
        CHECK(most <= 40);
        CHECK(world.ranks[0].stats.store_calls <= 400);
        CHECK(last_settled_ns(&world) < (dies ? 3 : 7) * WORLD_S);
        world_end(&world);
    }
}

/* ---- peers ---- */

struct exchange {
    struct dcp_peers peers[5];
    int rc[5];
};

static int
give_host(void *ctx, struct dcp_shm_host *ret)
{
    uint32_t rank = *(uint32_t *)ctx;
    const uint8_t hosts[] = {7, 9, 7, 0, 9};

    if (hosts[rank] == 0) {
        return -95;
    }
    *ret = (struct dcp_shm_host){.pid = 1000 + (int64_t)rank};
    ret->id[3] = hosts[rank];
    return 0;
}

static void
exchange_peers(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct exchange *exchange = arg;
    uint32_t rank = comm->rank;
    struct dcp_shm shm = {.ctx = &rank, .host = give_host};
    struct dcp_error err;
    (void)sim;

    dcp_error_clear(&err);
    exchange->rc[rank] = dcp_peers_exchange(comm, &shm, &exchange->peers[rank], &err);
}

static void
ranks_learn_who_is_on_their_host(void)
{
    const uint32_t leaders[] = {0, 1, 0, 3, 1};
    struct exchange exchange = {0};

    sim_ranks_run(5, 10000, exchange_peers, &exchange);
    for (uint32_t i = 0; i < 5; i++) {
        const struct dcp_peers *peers = &exchange.peers[i];
        CHECK_EQ(exchange.rc[i], 0);
        CHECK(peers->count == 5 && peers->rank == i);
        for (uint32_t k = 0; k < 5; k++) {
            CHECK_EQ(peers->leaders[k], leaders[k]);
            CHECK_EQ(peers->hosts[k].pid, k == 3 ? 0 : 1000 + k);
        }
        dcp_peers_clean_up(&exchange.peers[i]);
        dcp_peers_clean_up(&exchange.peers[i]);
    }
}

CTEST_MAIN(RUN(a_save_that_is_durable_everywhere_commits);
           RUN(a_failed_write_is_told_to_all_within_two_seconds_and_names_its_rank);
           RUN(two_failures_at_once_end_as_one);
           RUN(what_cannot_be_published_fails_everywhere_and_what_is_unsynced_keeps_its_files);
           RUN(ranks_that_stage_longer_than_a_host_may_be_silent_are_waited_for);
           RUN(a_coordinator_that_publishes_for_long_is_not_taken_for_dead);
           RUN(at_the_deadline_all_hear_that_the_save_was_given_up);
           RUN(a_verdict_just_before_the_deadline_is_heard);
           RUN(a_dead_host_is_noticed_by_its_silence_and_named);
           RUN(a_frozen_host_that_comes_back_contradicts_nobody_and_leaves_no_key);
           RUN(a_coordinator_that_was_taken_for_dead_publishes_no_more);
           RUN(machines_that_sleep_take_nobody_for_dead);
           RUN(independent_ranks_publish_their_own_and_undo_nothing);
           RUN(an_independent_rank_that_dies_is_told_to_all);
           RUN(without_memory_a_rank_ends_and_takes_nobody_for_committed);
           RUN(a_thousand_ranks_of_a_host_end_and_leave_no_key);
           RUN(ranks_learn_who_is_on_their_host);)

/*
 * test_agreement_faults.c: an agreement to which something happens at every step of every rank:
 * deaths, freezes, lost calls, a store that goes away; alone, in pairs, and at random.
 *
 * What must hold always is in agreement_rules.h; each case adds how soon the others hear, who is
 * named, and which keys may stay.
 */
#include "agreement_rules.h"
#include "ctest.h"

static const uint64_t write_ns[] = {900 * WORLD_MS, 1100 * WORLD_MS, 700 * WORLD_MS,
                                    900 * WORLD_MS, 300 * WORLD_MS,  900 * WORLD_MS,
                                    900 * WORLD_MS, 900 * WORLD_MS};

static struct world_plan
plan_of(uint32_t size, uint32_t ranks_per_host)
{
    return (struct world_plan){.size = size,
                               .ranks_per_host = ranks_per_host,
                               .deadline_ns = 60 * WORLD_S,
                               .write_ns = write_ns,
                               .publish_ns = 20 * WORLD_MS};
}

/* What a case asks of a world besides the rules; a text when it does not hold. */
typedef const char *(*world_question)(const struct world *world, const struct world_fault *fault);

static void
look_at(const struct world *world, const struct world_fault *fault, world_question question)
{
    const char *broken = agreement_broken_rule(world);

    if (broken == NULL) {
        broken = question(world, fault);
    }
    if (broken != NULL) {
        agreement_describe(world, broken);
    }
    CHECK(broken == NULL);
}

/* The same fault at each step of each rank, until no such step comes any more.  Returns how many
 * worlds there were. */
static uint64_t
at_every_step(struct world_plan plan, struct world_fault fault, world_question question)
{
    uint64_t worlds = 0;

    for (fault.rank = 0; fault.rank < plan.size; fault.rank++) {
        bool was_met = true;
        for (fault.step = 1; was_met && ctest_failures == 0; fault.step++) {
            struct world world;

            plan.seed = fault.step;
            plan.faults[0] = fault;
            world_run(&plan, &world);
            was_met = world.ranks[fault.rank].fault_was_met;
            look_at(&world, &fault, question);
            world_end(&world);
            worlds++;
        }
    }
    return worlds;
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

/* Of a death: all hear within `most_ns` of it, or of the end that the save had anyhow. */
static const char *
ask_after_death(const struct world *world, const struct world_fault *fault, uint64_t most_ns)
{
    const struct world_result *victim = &world->ranks[fault->rank];
    uint64_t died_ns = victim->fault_was_met ? victim->fault_ns - WORLD_S : 0;
    uint64_t end_ns = dcp_max_u64(died_ns, 1300 * WORLD_MS) + most_ns;

    if (world->keys_left != 0) {
        return "keys are left";
    }
    if (last_settled_ns(world) > end_ns) {
        return "the others heard late";
    }
    for (uint32_t i = 0; i < world->plan.size; i++) {
        const struct world_result *rank = &world->ranks[i];
        if (rank->dead || rank->rc == 0) {
            continue;
        }
        if (rank->rc != DCP_E_PEER || !agreement_names(rank, fault->rank)) {
            return "a rank does not know who died";
        }
        if (world->committed && rank->has_concluded && rank->concluded != DCP_OUTCOME_UNKNOWN) {
            return "a failure of a committed save, and certain";
        }
    }
    return NULL;
}

static const char *
ask_after_death_on_one_host(const struct world *world, const struct world_fault *fault)
{
    return ask_after_death(world, fault, 2 * WORLD_S);
}

static const char *
ask_after_death_of_a_host(const struct world *world, const struct world_fault *fault)
{
    /* Its first beat is its second step: before that it may still be staging. */
    if (fault->step <= 2) {
        return world->keys_left != 0 ? "keys are left" : NULL;
    }
    /* It may have announced that it publishes, and then has six times the time. */
    return ask_after_death(world, fault,
                           fault->rank == world->plan.coordinator ? 70 * WORLD_S : 15 * WORLD_S);
}

static void
a_process_that_dies_at_any_step_is_heard_of_within_two_seconds(void)
{
    uint64_t worlds = 0;
    for (uint32_t size = 3; size <= 5; size += 2) {
        for (uint32_t coordinator = 0; coordinator < 3; coordinator += 2) {
            struct world_plan plan = plan_of(size, 0);
            plan.coordinator = coordinator;
            worlds += at_every_step(plan, (struct world_fault){.event = WORLD_KILL},
                                    ask_after_death_on_one_host);
        }
    }
    printf("  %" PRIu64 " deaths\n", worlds);
}

static void
a_host_that_dies_at_any_step_is_heard_of_by_its_silence(void)
{
    struct world_plan plan = plan_of(3, 1);
    plan.coordinator = 1;
    plan.deadline_ns = 120 * WORLD_S;
    at_every_step(plan, (struct world_fault){.event = WORLD_KILL}, ask_after_death_of_a_host);
}

static const char *
ask_after_death_beside_failure(const struct world *world, const struct world_fault *fault)
{
    (void)fault;
    if (world->keys_left != 0) {
        return "keys are left";
    }
    return world->committed || agreement_all_told(world, 0) ? "the failed write was forgotten"
                                                            : NULL;
}

static void
a_death_beside_a_failed_write_ends_once(void)
{
    for (uint32_t failing = 0; failing < 4; failing++) {
        struct world_plan plan = plan_of(4, 0);
        plan.failing = UINT64_C(1) << failing;
        at_every_step(plan, (struct world_fault){.event = WORLD_KILL},
                      ask_after_death_beside_failure);
    }
}

/* A call that fails once costs at most the save. */
static const char *
ask_after_lost_call(const struct world *world, const struct world_fault *fault)
{
    (void)fault;
    if (world->keys_left != 0) {
        return "keys are left";
    }
    if (!world->committed && !agreement_all_told(world, DCP_E_PEER)) {
        return "not all heard of the failure";
    }
    return last_settled_ns(world) > 4 * WORLD_S ? "the others heard late" : NULL;
}

static void
a_call_or_a_reply_that_is_lost_at_any_step_leaves_nobody_waiting(void)
{
    for (uint32_t per_host = 0; per_host < 2; per_host++) {
        struct world_plan plan = plan_of(3, per_host);
        at_every_step(plan, (struct world_fault){.event = WORLD_CALL_LOST}, ask_after_lost_call);
        at_every_step(plan, (struct world_fault){.event = WORLD_REPLY_LOST}, ask_after_lost_call);
    }
}

/* Whoever loses the store knows it; the others hear by the deadline. */
static const char *
ask_after_lost_store(const struct world *world, const struct world_fault *fault)
{
    const struct world_result *victim = &world->ranks[fault->rank];

    if (victim->rc == DCP_E_COMM && (strstr(victim->message, "the store was lost") == NULL ||
                                     (strstr(victim->message, ".metadata tells") == NULL &&
                                      strstr(victim->message, "given up") == NULL))) {
        return "who lost the store is not told what became of the save";
    }
    if (victim->rc != 0 && victim->rc != DCP_E_COMM && victim->rc != DCP_E_PEER) {
        return "another end than a lost store";
    }
    return fault->rank != world->plan.coordinator && world->keys_left != 0 ? "keys are left" : NULL;
}

static void
a_store_that_is_lost_at_any_step_ends_the_rank_that_lost_it(void)
{
    struct world_plan plan = plan_of(3, 0);
    plan.coordinator = 1;
    at_every_step(plan, (struct world_fault){.event = WORLD_STORE_DOWN}, ask_after_lost_store);
}

static const char *
ask_after_freeze(const struct world *world, const struct world_fault *fault)
{
    bool thaws = fault->for_ns != WORLD_NEVER;

    if (world->keys_left != 0 && (thaws || fault->rank != world->plan.coordinator)) {
        return "keys are left";
    }
    return NULL;
}

/* It blocks the calls of one client for ever: its caller abandons the thread. */
static void
a_rank_that_freezes_at_any_step_holds_the_others_until_the_deadline_only(void)
{
    const uint64_t for_ns[] = {WORLD_NEVER, 5 * WORLD_S, 58 * WORLD_S, 200 * WORLD_S};
    for (size_t i = 0; i < sizeof for_ns / sizeof for_ns[0]; i++) {
        struct world_plan plan = plan_of(3, 0);
        struct world_fault fault = {.event = WORLD_FREEZE, .for_ns = for_ns[i]};
        plan.coordinator = (uint32_t)i % 3;
        at_every_step(plan, fault, ask_after_freeze);
    }
}

/* It takes leave while the one that waited for it for 30 s removes the keys: at every 20 us of
 * that, frozen at each of the steps around that. */
static void
who_takes_leave_while_the_keys_go_leaves_none(void)
{
    struct world_plan plan = plan_of(3, 0);
    struct world_fault fault = {.rank = 2, .event = WORLD_FREEZE, .for_ns = WORLD_NEVER};
    uint64_t last_step;
    struct world world;

    world_run(&plan, &world);
    last_step = world.ranks[2].steps;
    world_end(&world);
    for (fault.step = last_step - 20; fault.step < last_step - 6; fault.step++) {
        uint64_t until_gone_ns;

        fault.for_ns = WORLD_NEVER;
        plan.faults[0] = fault;
        world_run(&plan, &world);
        until_gone_ns = world.end_ns - (world.ranks[2].fault_ns - WORLD_S);
        world_end(&world);
        for (uint64_t i = 0; i < 80; i++) {
            plan.seed = i / 20;
            plan.faults[0].for_ns = until_gone_ns - 1000000 + i % 20 * 50000;
            world_run(&plan, &world);
            look_at(&world, &fault, ask_after_freeze);
            world_end(&world);
        }
    }
}

static uint64_t
draw(uint64_t *random, uint64_t below)
{
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    return (*random >> 33) % below;
}

static bool
strikes_everybody_lives(const struct world_plan *plan)
{
    for (int i = 0; i < WORLD_MOST_FAULTS; i++) {
        const struct world_fault *fault = &plan->faults[i];
        if (fault->event == WORLD_STORE_DOWN || fault->event == WORLD_KILL ||
            (fault->event == WORLD_FREEZE && fault->for_ns == WORLD_NEVER)) {
            return false;
        }
    }
    return true;
}

/* Up to four faults of any kind in groups of up to 8 ranks on any hosts. */
static void
whatever_happens_at_random_breaks_no_rule(void)
{
    uint64_t random = 20240229, committed = 0, worlds = 2500;
    for (uint64_t seed = 1; seed <= worlds && ctest_failures == 0; seed++) {
        uint32_t size = 2 + (uint32_t)draw(&random, 7);
        struct world_plan plan = plan_of(size, (uint32_t)draw(&random, 4));
        uint64_t faults = draw(&random, 5);
        struct world world;
        const char *broken;

        plan.seed = seed;
        plan.coordinator = (uint32_t)draw(&random, size);
        plan.independent = draw(&random, 4) == 0;
        plan.failing = draw(&random, 5) == 0 ? draw(&random, 256) : 0;
        plan.publish_fails = draw(&random, 16) == 0;
        plan.publish_unsynced = draw(&random, 16) == 0;
        for (uint64_t i = 0; i < faults; i++) {
            plan.faults[i] = (struct world_fault){
                .rank = (uint32_t)draw(&random, size),
                .step = 1 + draw(&random, 160),
                .event = (enum world_event)(1 + draw(&random, 5)),
                .for_ns = draw(&random, 3) == 0 ? WORLD_NEVER : draw(&random, 90) * WORLD_S,
            };
        }
        world_run(&plan, &world);
        committed += world.committed;
        broken = agreement_broken_rule(&world);
        if (broken == NULL && strikes_everybody_lives(&plan) && world.keys_left != 0) {
            broken = "keys are left";
        }
        if (broken != NULL) {
            agreement_describe(&world, broken);
        }
        CHECK(broken == NULL);
        world_end(&world);
    }
    printf("  %" PRIu64 " worlds, %" PRIu64 " committed\n", worlds, committed);
    CHECK(committed > worlds / 5 && committed < worlds * 4 / 5);
}

CTEST_MAIN(RUN(a_process_that_dies_at_any_step_is_heard_of_within_two_seconds);
           RUN(a_host_that_dies_at_any_step_is_heard_of_by_its_silence);
           RUN(a_death_beside_a_failed_write_ends_once);
           RUN(a_call_or_a_reply_that_is_lost_at_any_step_leaves_nobody_waiting);
           RUN(a_store_that_is_lost_at_any_step_ends_the_rank_that_lost_it);
           RUN(a_rank_that_freezes_at_any_step_holds_the_others_until_the_deadline_only);
           RUN(who_takes_leave_while_the_keys_go_leaves_none);
           RUN(whatever_happens_at_random_breaks_no_rule);)

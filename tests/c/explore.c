/*
 * explore.c: depth-first search over schedules, by replay, with a table of seen states.
 */
#include "explore.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

enum { STACK_BYTES = 256 << 10, DECISIONS = 4096 };

struct actor {
    ucontext_t context;
    uint8_t *stack;
    void *fake_stack;
    bool done;
};

/* Of a run: which of `count` possibilities was taken. */
struct decision {
    uint8_t taken, count;
    int8_t actor; /* that was taken; -1: a choice among results */
};

struct seen {
    uint64_t key; /* 0: free */
    uint8_t preemptions;
};

static struct {
    struct explore *explore;
    struct actor actors[EXPLORE_ACTORS];
    ucontext_t driver;
    void *driver_fake_stack;
    const void *driver_stack;
    size_t driver_stack_bytes;
    unsigned running;
    bool abandoned;
    struct decision decisions[DECISIONS];
    unsigned depth, recorded; /* of decisions: made in this run, known from the last one */
    int last, preemptions;
    struct seen *seen;
    size_t seen_cap, seen_count;
} run;

/* ---- stacks ---- */

static void
switch_to_actor(unsigned i)
{
    struct actor *actor = &run.actors[i];

    run.running = i;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&run.driver_fake_stack, actor->stack, STACK_BYTES);
#endif
    swapcontext(&run.driver, &actor->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(run.driver_fake_stack, NULL, NULL);
#endif
}

static void
switch_to_driver(bool for_good)
{
    struct actor *actor = &run.actors[run.running];

#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? NULL : &actor->fake_stack, run.driver_stack,
                                   run.driver_stack_bytes);
#endif
    (void)for_good;
    swapcontext(&actor->context, &run.driver);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(actor->fake_stack, &run.driver_stack, &run.driver_stack_bytes);
#endif
}

static void
actor_main(void)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(NULL, &run.driver_stack, &run.driver_stack_bytes);
#endif
    run.explore->act(run.explore->ctx, run.running);
    run.actors[run.running].done = true;
    switch_to_driver(true);
}

static void
actor_start(unsigned i)
{
    struct actor *actor = &run.actors[i];

    if (actor->stack == NULL) {
        actor->stack = malloc(STACK_BYTES);
        if (actor->stack == NULL) {
            abort();
        }
    }
    actor->done = false;
    actor->fake_stack = NULL;
    getcontext(&actor->context);
    actor->context.uc_stack.ss_sp = actor->stack;
    actor->context.uc_stack.ss_size = STACK_BYTES;
    actor->context.uc_link = NULL;
    makecontext(&actor->context, actor_main, 0);
}

/* ---- seen states ---- */

static struct seen *
seen_place(struct seen *table, size_t cap, uint64_t key)
{
    size_t i = (size_t)(key * 0x9E3779B97F4A7C15u >> 20) & (cap - 1);

    while (table[i].key != 0 && table[i].key != key) {
        i = (i + 1) & (cap - 1);
    }
    return &table[i];
}

/* True when this state was entered before with as many preemptions left. */
static bool
seen_before(uint64_t key, int preemptions)
{
    struct seen *seen;

    if (2 * run.seen_count >= run.seen_cap) {
        size_t cap = run.seen_cap == 0 ? 1024 : 2 * run.seen_cap;
        struct seen *table = calloc(cap, sizeof *table);
        if (table == NULL) {
            abort();
        }
        for (size_t i = 0; i < run.seen_cap; i++) {
            if (run.seen[i].key != 0) {
                *seen_place(table, cap, run.seen[i].key) = run.seen[i];
            }
        }
        free(run.seen);
        run.seen = table;
        run.seen_cap = cap;
    }
    seen = seen_place(run.seen, run.seen_cap, key | 1);
    if (seen->key != 0 && seen->preemptions <= preemptions) {
        return true;
    }
    run.seen_count += seen->key == 0;
    seen->key = key | 1;
    seen->preemptions = (uint8_t)preemptions;
    return false;
}

/* ---- decisions ---- */

/* The possibility to take at this point of the run: as recorded, else the first. */
static int
decide(int count)
{
    struct decision *decision = &run.decisions[run.depth];

    if (run.depth == DECISIONS) {
        abort();
    }
    if (run.depth == run.recorded) {
        *decision = (struct decision){.count = (uint8_t)count, .actor = -1};
        run.recorded++;
    }
    if (decision->count != count) {
        fprintf(stderr, "explore: a replay went another way\n");
        abort();
    }
    run.depth++;
    return decision->taken;
}

/* The next schedule: the last decision that has possibilities left takes its next one. */
static bool
advance(void)
{
    run.recorded = run.depth;
    while (run.recorded > 0) {
        struct decision *decision = &run.decisions[run.recorded - 1];
        if (decision->taken + 1 < decision->count) {
            decision->taken++;
            return true;
        }
        run.recorded--;
    }
    return false;
}

static unsigned
runnable(unsigned *ret_actors)
{
    struct explore *explore = run.explore;
    unsigned count = 0;

    if (explore->preemptions != EXPLORE_UNBOUNDED && run.preemptions == explore->preemptions &&
        run.last >= 0 && !run.actors[run.last].done) {
        ret_actors[0] = (unsigned)run.last;
        return 1;
    }
    for (unsigned i = 0; i < explore->actors_count; i++) {
        if (!run.actors[i].done) {
            ret_actors[count++] = i;
        }
    }
    return count;
}

static bool
prune(void)
{
    struct explore *explore = run.explore;
    uint64_t key = explore->state(explore->ctx);

    for (unsigned i = 0; i < explore->actors_count; i++) {
        key = key * 3 + run.actors[i].done;
    }
    if (explore->preemptions != EXPLORE_UNBOUNDED) {
        key = key * 31 + (uint64_t)(run.last + 1);
    }
    return seen_before(key, run.preemptions);
}

/* One run, by the recorded decisions and then by the first possibilities.  True: all actors ended
 * by themselves. */
static bool
run_once(void)
{
    struct explore *explore = run.explore;
    unsigned actors[EXPLORE_ACTORS], count, steps = 0;

    run.depth = 0;
    run.last = -1;
    run.preemptions = 0;
    run.abandoned = false;
    explore->start(explore->ctx);
    for (unsigned i = 0; i < explore->actors_count; i++) {
        actor_start(i);
        switch_to_actor(i);
    }
    while ((count = runnable(actors)) > 0) {
        bool fresh = run.depth == run.recorded;
        unsigned actor;
        if (fresh && prune()) {
            return false;
        }
        actor = actors[decide((int)count)];
        run.decisions[run.depth - 1].actor = (int8_t)actor;
        if (run.last >= 0 && actor != (unsigned)run.last && !run.actors[run.last].done) {
            run.preemptions++;
        }
        run.last = (int)actor;
        switch_to_actor(actor);
        explore->steps++;
        if (++steps > explore->longest) {
            explore->longest = steps;
        }
        if (!explore->check(explore->ctx)) {
            explore->failed = true;
            return false;
        }
    }
    return true;
}

void
explore_run(struct explore *explore)
{
    bool more = true;

    memset(&run.seen_count, 0, sizeof run.seen_count);
    run.explore = explore;
    run.recorded = 0;
    while (more && !explore->failed) {
        bool complete = run_once();
        if (!complete) {
            run.abandoned = true;
            explore->abandon(explore->ctx);
            for (unsigned i = 0; i < explore->actors_count; i++) {
                while (!run.actors[i].done) {
                    switch_to_actor(i);
                }
            }
        }
        explore->runs++;
        explore->complete_runs += complete;
        if (!explore->finish(explore->ctx, complete)) {
            explore->failed = true;
        }
        if (explore->failed) {
            explore_print_schedule();
        }
        more = advance();
    }
    explore->states = run.seen_count;
    free(run.seen);
    run.seen = NULL;
    run.seen_cap = 0;
    for (unsigned i = 0; i < EXPLORE_ACTORS; i++) {
        free(run.actors[i].stack);
        run.actors[i].stack = NULL;
    }
}

void
explore_yield(void)
{
    if (!run.abandoned) {
        switch_to_driver(false);
    }
}

int
explore_choose(int count)
{
    return run.abandoned ? 0 : decide(count);
}

unsigned
explore_actor(void)
{
    return run.running;
}

void
explore_print_schedule(void)
{
    fprintf(stderr, "schedule:");
    for (unsigned i = 0; i < run.depth; i++) {
        if (run.decisions[i].actor >= 0) {
            fprintf(stderr, " %d", run.decisions[i].actor);
        } else {
            fprintf(stderr, " (%u)", run.decisions[i].taken);
        }
    }
    fprintf(stderr, "\n");
}

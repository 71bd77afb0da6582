/*
 * explore.h: runs a few actors through every interleaving of their steps.
 *
 * Actors are plain functions on stacks of their own.  One runs at a time, from one explore_yield()
 * to the next: that is a step.  After every step the driver may go on with any actor, and it tries
 * them all, depth first.  There are no snapshots: each run begins with a fresh world and replays
 * the decisions that led to the branch.  A state that was seen before is not gone into again, so
 * the cost is the number of states, not of schedules.
 *
 * With a bound on preemptions (switches away from an actor that could have gone on) only schedules
 * within the bound are tried.
 */
#ifndef EXPLORE_H
#define EXPLORE_H

#include <stdbool.h>
#include <stdint.h>

enum { EXPLORE_ACTORS = 8, EXPLORE_UNBOUNDED = -1 };

struct explore {
    void *ctx;
    unsigned actors_count;
    int preemptions;                          /* at most, or EXPLORE_UNBOUNDED */
    void (*start)(void *ctx);                 /* makes a fresh world: each run begins with it */
    void (*act)(void *ctx, unsigned actor);   /* the actor's body */
    uint64_t (*state)(void *ctx);             /* hash of the world and of what the actors know */
    bool (*check)(void *ctx);                 /* after every step; false: stop, it is broken */
    void (*abandon)(void *ctx);               /* from now on every call fails: actors unwind */
    bool (*finish)(void *ctx, bool complete); /* all actors returned; complete: not abandoned */
    /* results */
    uint64_t runs, steps, states, complete_runs;
    unsigned longest; /* steps of a run */
    bool failed;
};

void explore_run(struct explore *explore);

/* Called by an actor before something others could notice. */
void explore_yield(void);
/* Called by an actor where several results are possible: every one of 0 .. count - 1 is tried. */
int explore_choose(int count);
/* The actor that runs, and the steps of this run so far: for messages. */
unsigned explore_actor(void);
void explore_print_schedule(void);

#endif

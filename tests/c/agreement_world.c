/*
 * agreement_world.c: the ranks of one background save in simulated time.
 *
 * Each rank is a thread, but only one of them runs at a time: every call to the store, every
 * callback and every wait hands the turn to the rank whose time is next, and the clock leaps there.
 * So minutes pass in milliseconds, a run is a pure function of its plan and seed, and a fault at
 * step k of a rank is the same fault every time.
 *
 * A killed rank runs on as a ghost to give its memory back: its calls have no effect, its clock is
 * past every deadline, and what it believes is not looked at.  So does one that was frozen for
 * ever, when all others have ended.
 */
#include "agreement_world.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define START_NS WORLD_S
#define GHOST_NS (UINT64_MAX / 2)

enum { STACK_BYTES = 256 << 10 };

struct ground;

struct actor {
    struct ground *ground;
    struct world_result *result;
    uint32_t rank;
    pthread_t thread;
    pthread_cond_t turn;
    uint64_t wake_ns, stepped_ns;
    bool done, ghost, store_down, discarded;
    bool loses_call, loses_reply; /* the call of this step */
    uint64_t durable_ns;
    struct dcp_store store;
    struct dcp_failure failure; /* borrows failed_with */
    struct dcp_error failed_with;
};

struct ground {
    struct world *world;
    const struct world_plan *plan;
    pthread_mutex_t mutex;
    uint32_t turn; /* rank that runs */
    uint64_t now_ns, random;
    struct actor *actors;
    struct dcp_peers peers;
    struct dcp_shm shm;
    struct store_sim *store;
};

static uint64_t
draw(struct ground *ground, uint64_t below)
{
    ground->random = ground->random * 6364136223846793005u + 1442695040888963407u;
    return (ground->random >> 33) % below;
}

static void
violate(struct ground *ground, const char *what)
{
    if (ground->world->violation == NULL) {
        ground->world->violation = what;
    }
}

/* ---- turns ---- */

/* Who is next; frozen ones become ghosts when nobody else is left.  NULL: all are done. */
static struct actor *
choose_next(struct ground *ground)
{
    struct actor *best = NULL;

    for (uint32_t i = 0; i < ground->plan->size; i++) {
        struct actor *actor = &ground->actors[i];
        if (!actor->done && (best == NULL || actor->wake_ns < best->wake_ns)) {
            best = actor;
        }
    }
    if (best != NULL && best->wake_ns == WORLD_NEVER) {
        best->ghost = true;
        best->result->stuck = true;
        best->wake_ns = ground->now_ns;
    }
    return best;
}

static void
pass_turn(struct ground *ground)
{
    struct actor *next = choose_next(ground);

    if (next != NULL) {
        ground->turn = next->rank;
        if (next->wake_ns > ground->now_ns && !next->ghost) {
            ground->now_ns = next->wake_ns;
        }
        pthread_cond_signal(&next->turn);
    }
}

static void
sleep_until(struct actor *self, uint64_t wake_ns)
{
    struct ground *ground = self->ground;

    if (self->ghost) {
        return;
    }
    self->wake_ns = wake_ns;
    pass_turn(ground);
    while (ground->turn != self->rank) {
        pthread_cond_wait(&self->turn, &ground->mutex);
    }
}

/* ---- what befalls a rank ---- */

static void
meet(struct actor *self, const struct world_fault *fault)
{
    struct world_result *result = self->result;

    if (!result->fault_was_met) {
        result->fault_was_met = true;
        result->fault_ns = self->ground->now_ns;
    }
    switch (fault->event) {
    case WORLD_KILL:
        self->ghost = true;
        result->dead = true;
        break;
    case WORLD_FREEZE:
        sleep_until(self, fault->for_ns == WORLD_NEVER ? WORLD_NEVER
                                                       : self->ground->now_ns + fault->for_ns);
        break;
    case WORLD_CALL_LOST:
        self->loses_call = true;
        break;
    case WORLD_REPLY_LOST:
        self->loses_reply = true;
        break;
    case WORLD_STORE_DOWN:
        self->store_down = true;
        break;
    case WORLD_NOTHING:
        break;
    }
}

static void
step(struct actor *self)
{
    const struct world_plan *plan = self->ground->plan;
    uint64_t before_ns = self->stepped_ns;

    if (self->ghost) {
        return;
    }
    sleep_until(self, self->ground->now_ns + 20000 + draw(self->ground, 100000));
    self->stepped_ns = self->ground->now_ns;
    self->result->steps++;
    for (int i = 0; i < WORLD_MOST_FAULTS; i++) {
        const struct world_fault *fault = &plan->faults[i];
        uint64_t at_ns = START_NS + fault->at_ns;
        if (fault->event == WORLD_NOTHING || fault->rank != self->rank || self->ghost) {
            continue;
        }
        if (fault->step == self->result->steps ||
            (fault->at_ns != 0 && before_ns < at_ns && at_ns <= self->ground->now_ns)) {
            meet(self, fault);
        }
    }
}

static enum store_fault
on_store_call(void *ctx, uint32_t client, bool behind)
{
    struct ground *ground = ctx;
    struct actor *self = &ground->actors[client];
    bool call_lost, reply_lost;

    if (!behind) {
        self->loses_call = self->loses_reply = false;
    }
    step(self);
    call_lost = self->ghost || self->store_down || self->loses_call;
    reply_lost = self->loses_reply;
    if (behind) {
        return call_lost || reply_lost ? STORE_REPLY_LOST : STORE_WORKS;
    }
    return call_lost ? STORE_CALL_LOST : reply_lost ? STORE_REPLY_LOST : STORE_WORKS;
}

static bool
on_alive(void *ctx, int64_t pid)
{
    struct ground *ground = ctx;
    struct actor *actor = &ground->actors[pid - 100];
    return !(actor->ghost && actor->result->dead);
}

/* ---- what an agreement asks of its caller ---- */

static uint64_t
on_now(void *ctx)
{
    struct actor *self = ctx;
    return self->ghost ? GHOST_NS : self->ground->now_ns;
}

static enum dcp_bytes_state
on_bytes(void *ctx, uint64_t wait_ns, struct dcp_failure *ret_failure)
{
    struct actor *self = ctx;
    struct ground *ground = self->ground;
    uint64_t end_ns = ground->now_ns + wait_ns;

    step(self);
    if (ground->now_ns < self->durable_ns && self->durable_ns < end_ns) {
        end_ns = self->durable_ns;
    }
    if (end_ns > ground->now_ns) {
        sleep_until(self, end_ns);
        step(self);
    }
    if (ground->now_ns < self->durable_ns || self->ghost) {
        return DCP_BYTES_WRITING;
    }
    if (self->rank < 64 && (ground->plan->failing >> self->rank & 1) != 0) {
        *ret_failure = self->failure;
        return DCP_BYTES_FAILED;
    }
    return DCP_BYTES_DURABLE;
}

static void
check_publishing(struct actor *self)
{
    struct ground *ground = self->ground;

    if (self->result->abandoned || self->result->published) {
        violate(ground, "published behind its end");
    }
    if (ground->plan->independent) {
        return;
    }
    for (uint32_t i = 0; i < ground->plan->size; i++) {
        const struct actor *actor = &ground->actors[i];
        bool fails = i < 64 && (ground->plan->failing >> i & 1) != 0;
        if (ground->now_ns < actor->durable_ns || fails || actor->discarded) {
            violate(ground, "published what is not durable on every rank");
        }
    }
}

static int
on_publish(void *ctx, struct dcp_error *err)
{
    struct actor *self = ctx;
    struct ground *ground = self->ground;

    step(self);
    if (ground->plan->publish_ns > 0) {
        sleep_until(self, ground->now_ns + ground->plan->publish_ns);
    }
    if (self->ghost) {
        return dcp_error_set(err, DCP_E_IO, 0, NULL, "a ghost publishes nothing");
    }
    check_publishing(self);
    if (ground->plan->publish_fails) {
        return dcp_error_set(err, DCP_E_IO, 5, NULL, "publishing failed");
    }
    self->result->published = true;
    if (!ground->plan->independent) {
        ground->world->committed = true;
        ground->world->committed_ns = ground->now_ns;
    }
    step(self);
    if (ground->plan->publish_unsynced) {
        return dcp_error_set(err, DCP_E_IO, 5, NULL, "syncing the directory failed");
    }
    return 0;
}

static enum dcp_outcome
on_abandon(void *ctx)
{
    struct actor *self = ctx;
    struct ground *ground = self->ground;

    step(self);
    if (self->ghost) {
        return DCP_OUTCOME_UNKNOWN;
    }
    if (self->result->published) {
        return DCP_OUTCOME_COMMITTED;
    }
    self->result->abandoned = true;
    self->discarded = true;
    if (!ground->plan->independent) {
        ground->world->aborted = true;
    }
    return DCP_OUTCOME_ABORTED;
}

static void
on_conclude(void *ctx, enum dcp_outcome outcome)
{
    struct actor *self = ctx;
    struct world *world = self->ground->world;

    step(self);
    if (self->ghost) {
        return;
    }
    if (self->result->has_concluded || self->result->settled > 0) {
        violate(self->ground, "concluded twice, or behind the end");
    }
    if ((outcome == DCP_OUTCOME_COMMITTED && !world->committed) ||
        (outcome == DCP_OUTCOME_ABORTED && !world->aborted)) {
        violate(self->ground, "concluded what is not so");
    }
    self->result->has_concluded = true;
    self->result->concluded = outcome;
    self->discarded = outcome == DCP_OUTCOME_ABORTED;
}

static void
on_settled(void *ctx, int rc, const struct dcp_failure_list *failures, const struct dcp_error *err)
{
    struct actor *self = ctx;
    struct world_result *result = self->result;

    step(self);
    if (self->ghost) {
        return;
    }
    result->settled++;
    result->settled_ns = self->ground->now_ns - START_NS;
    result->rc = rc;
    if (err != NULL) {
        snprintf(result->message, sizeof result->message, "%.399s", err->message);
    }
    for (size_t i = 0; failures != NULL && i < failures->count && i < 4; i++) {
        struct dcp_error what;
        result->failed_ranks[result->failures_count++] = failures->items[i].rank;
        memcpy(&what, failures->items[i].bytes, sizeof what);
        if (i == 0) {
            snprintf(result->message, sizeof result->message, "%.399s", what.message);
        }
    }
    if (rc == 0 && !self->ground->plan->independent && !self->ground->world->committed) {
        violate(self->ground, "told success of what is not committed");
    }
}

/* ---- the run ---- */

static void *
run_actor(void *arg)
{
    struct actor *self = arg;
    struct ground *ground = self->ground;
    const struct world_plan *plan = ground->plan;
    struct dcp_agreement agreement = {
        .store = &self->store,
        .prefix = "dcp_native/0123456789abcdef0123456789abcdef/",
        .rank = self->rank,
        .size = plan->size,
        .coordinator = plan->coordinator,
        .deadline_ns = START_NS + plan->deadline_ns,
        .host_timeout_ns = 10 * WORLD_S,
        .peers = &ground->peers,
        .shm = &ground->shm,
        .independent = plan->independent,
        .ctx = self,
        .now_ns = on_now,
        .bytes = on_bytes,
        .publish = on_publish,
        .abandon = on_abandon,
        .conclude = on_conclude,
        .settled = on_settled,
    };

    pthread_mutex_lock(&ground->mutex);
    while (ground->turn != self->rank) {
        pthread_cond_wait(&self->turn, &ground->mutex);
    }
    dcp_agreement_run(&agreement, &self->result->stats);
    self->done = true;
    pass_turn(ground);
    pthread_mutex_unlock(&ground->mutex);
    return NULL;
}

static void *
must(void *memory)
{
    if (memory == NULL) {
        fprintf(stderr, "agreement_world: no memory\n");
        exit(2);
    }
    return memory;
}

static void
set_up_actor(struct ground *ground, uint32_t rank)
{
    const struct world_plan *plan = ground->plan;
    struct actor *actor = &ground->actors[rank];
    uint32_t host = plan->ranks_per_host == 0 ? 0 : rank / plan->ranks_per_host;

    actor->ground = ground;
    actor->result = &ground->world->ranks[rank];
    actor->rank = rank;
    actor->wake_ns = START_NS + (plan->start_ns != NULL ? plan->start_ns[rank] : 0);
    actor->durable_ns = plan->write_ns == NULL ? actor->wake_ns + 50 * WORLD_MS
                        : plan->write_ns[rank] == WORLD_NEVER
                            ? WORLD_NEVER
                            : actor->wake_ns + plan->write_ns[rank];
    dcp_error_clear(&actor->failed_with);
    (void)dcp_error_set(&actor->failed_with, DCP_E_IO, 28, NULL,
                        "rank %" PRIu32 " cannot write: no space", rank);
    actor->failure = (struct dcp_failure){.rank = rank,
                                          .kind = DCP_FAILURE_CORE,
                                          .bytes = (uint8_t *)&actor->failed_with,
                                          .len = sizeof actor->failed_with};
    store_sim_client(ground->store, rank, &actor->store);
    pthread_cond_init(&actor->turn, NULL);
    ground->peers.hosts[rank] = (struct dcp_shm_host){.pid = 100 + (int64_t)rank};
    memset(ground->peers.hosts[rank].id, (int)(host + 1), sizeof ground->peers.hosts[rank].id);
    ground->peers.leaders[rank] = host * plan->ranks_per_host;
}

static void
run_threads(struct ground *ground)
{
    pthread_attr_t attr;

    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    pthread_mutex_lock(&ground->mutex);
    for (uint32_t i = 0; i < ground->plan->size; i++) {
        if (pthread_create(&ground->actors[i].thread, &attr, run_actor, &ground->actors[i]) != 0) {
            fprintf(stderr, "agreement_world: no thread\n");
            exit(2);
        }
    }
    pass_turn(ground);
    pthread_mutex_unlock(&ground->mutex);
    for (uint32_t i = 0; i < ground->plan->size; i++) {
        pthread_join(ground->actors[i].thread, NULL);
        pthread_cond_destroy(&ground->actors[i].turn);
    }
    pthread_attr_destroy(&attr);
}

void
world_run(const struct world_plan *plan, struct world *ret_world)
{
    struct ground ground = {.world = ret_world, .plan = plan, .turn = UINT32_MAX};

    *ret_world = (struct world){.plan = *plan};
    ret_world->ranks = must(calloc(plan->size, sizeof *ret_world->ranks));
    ground.random = plan->seed * 2 + 1;
    ground.now_ns = START_NS;
    ground.actors = must(calloc(plan->size, sizeof *ground.actors));
    ground.peers.count = plan->size;
    ground.peers.hosts = must(calloc(plan->size, sizeof *ground.peers.hosts));
    ground.peers.leaders = must(calloc(plan->size, sizeof *ground.peers.leaders));
    ground.shm = (struct dcp_shm){.ctx = &ground, .alive = on_alive};
    ground.store = store_sim_new(plan->size, on_store_call, &ground);
    pthread_mutex_init(&ground.mutex, NULL);
    for (uint32_t i = 0; i < plan->size; i++) {
        set_up_actor(&ground, i);
    }
    run_threads(&ground);
    ret_world->end_ns = ground.now_ns - START_NS;
    ret_world->keys_left = store_sim_keys(ground.store);
    pthread_mutex_destroy(&ground.mutex);
    store_sim_destroy(ground.store);
    free(ground.peers.leaders);
    free(ground.peers.hosts);
    free(ground.actors);
}

void
world_end(struct world *world)
{
    free(world->ranks);
    *world = (struct world){0};
}

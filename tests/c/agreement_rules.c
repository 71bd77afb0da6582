/*
 * agreement_rules.c: what must hold of every agreement, whatever befell it.
 */
#include "agreement_rules.h"

#include <inttypes.h>
#include <stdio.h>

/* Calls take up to 0.2 ms, and a rank may be publishing when its time is over. */
#define SLACK_NS (200 * WORLD_MS)

static bool
is_asked(const struct world_result *rank)
{
    return !rank->dead && !rank->stuck;
}

/* What thawed cannot keep a deadline. */
static uint64_t
latest_end_ns(const struct world *world, uint32_t rank)
{
    uint64_t end_ns = world->plan.deadline_ns + world->plan.publish_ns + SLACK_NS;

    for (int i = 0; i < WORLD_MOST_FAULTS; i++) {
        const struct world_fault *fault = &world->plan.faults[i];
        if (fault->event == WORLD_FREEZE && fault->rank == rank && fault->for_ns != WORLD_NEVER) {
            end_ns += fault->for_ns;
        }
    }
    return end_ns;
}

const char *
agreement_broken_rule(const struct world *world)
{
    if (world->violation != NULL) {
        return world->violation;
    }
    if (world->committed && world->aborted) {
        return "committed and aborted";
    }
    for (uint32_t i = 0; i < world->plan.size; i++) {
        const struct world_result *rank = &world->ranks[i];

        if (is_asked(rank) && rank->settled != 1) {
            return "a rank was not told the end once";
        }
        if (is_asked(rank) && rank->settled_ns > latest_end_ns(world, i)) {
            return "a rank was told the end behind its deadline";
        }
        if (rank->settled > 1) {
            return "a rank was told the end twice";
        }
        if (rank->settled == 1 && rank->rc == DCP_E_PEER && rank->failures_count == 0) {
            return "a rank was told of failures and of none";
        }
        if (rank->has_concluded && rank->concluded == DCP_OUTCOME_ABORTED && world->committed) {
            return "a rank removed files of a committed save";
        }
    }
    return NULL;
}

bool
agreement_all_told(const struct world *world, int rc)
{
    for (uint32_t i = 0; i < world->plan.size; i++) {
        if (is_asked(&world->ranks[i]) && world->ranks[i].rc != rc) {
            return false;
        }
    }
    return true;
}

bool
agreement_names(const struct world_result *rank, uint32_t failed_rank)
{
    for (uint32_t i = 0; i < rank->failures_count; i++) {
        if (rank->failed_ranks[i] == failed_rank) {
            return true;
        }
    }
    return false;
}

void
agreement_describe(const struct world *world, const char *what)
{
    fprintf(stderr, "%s: size %" PRIu32 ", seed %" PRIu64 ", %s%s, %zu keys left\n", what,
            world->plan.size, world->plan.seed, world->committed ? "committed" : "not committed",
            world->aborted ? ", aborted" : "", world->keys_left);
    for (int i = 0; i < WORLD_MOST_FAULTS; i++) {
        const struct world_fault *fault = &world->plan.faults[i];
        if (fault->event != WORLD_NOTHING) {
            fprintf(stderr, "  fault %d: rank %" PRIu32 ", step %" PRIu64 ", for %" PRIu64 " ms\n",
                    (int)fault->event, fault->rank, fault->step, fault->for_ns / WORLD_MS);
        }
    }
    for (uint32_t i = 0; i < world->plan.size; i++) {
        const struct world_result *rank = &world->ranks[i];
        fprintf(stderr,
                "  rank %" PRIu32 "%s%s: %" PRIu64 " steps, told %" PRIu32 " times at %" PRIu64
                " ms: %d, %" PRIu32 " failures, outcome %d: %s\n",
                i, rank->dead ? ", dead" : "", rank->stuck ? ", stuck" : "", rank->steps,
                rank->settled, rank->settled_ns / WORLD_MS, rank->rc, rank->failures_count,
                (int)rank->concluded, rank->message);
    }
}

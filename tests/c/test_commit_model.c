/*
 * test_commit_model.c: the commit protocol under every interleaving of the calls that others can
 * notice, on the file system in memory.
 *
 * Actors (save ids are single letters): two or more committers, an old writer that publishes late,
 * a process that settles that writer's save, an earlier committer that is still sweeping, a saver
 * that gives up, a reader, and a client that deletes the directory.  After every step:
 *   - until the client deletes, `.metadata` is there, and all files it references are whole and its
 *     own;
 *   - at no time, not even then, does it reference another save's file;
 *   - no two saves with one number are ever committed, and none twice;
 *   - what publish and settle said stays true: ABORTED was never committed and never is, SUPERSEDED
 *     is not committed from then on, COMMITTED was.
 * When all have ended the next save commits, and leaves nothing but itself.
 *
 * Pairs are explored exhaustively, and so are triples of actors that make no claim; where two or
 * more actors claim, at most the number of preemptions that a scenario's last column gives (the
 * states grow tenfold with each further two).  Some run with listings that are stale or torn, and
 * with renames and unlinks whose reply is lost.
 *
 * The formats are toys: this file defines the three functions of claim_references.c itself.
 */
#include "commit_world.h"
#include "ctest.h"

bool
dcp_claim_image_save_id(const uint8_t *image, size_t len, struct dcp_save_id *ret_id)
{
    return fake_save_id(image, len, ret_id);
}

bool
dcp_claim_file_save_id(const uint8_t *bytes, size_t len, struct dcp_save_id *ret_id)
{
    if (len != sizeof *ret_id) {
        return false;
    }
    memcpy(ret_id, bytes, sizeof *ret_id);
    return true;
}

int
dcp_claim_references(const uint8_t *image, size_t len, dcp_reference_fn fn, void *fn_ctx,
                     struct dcp_error *err)
{
    struct dcp_save_id id;
    const char *name;
    size_t at = 20;
    int rc = 0;

    if (!dcp_claim_image_save_id(image, len, &id)) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL, "not a toy");
    }
    while (rc == 0 && (name = fake_next(image, len, &at)) != NULL) {
        rc = fn(fn_ctx, name, strlen(name));
    }
    return rc;
}

/* One line of a table: the actors, how they are disturbed, and the bound. */
struct scenario {
    enum role roles[EXPLORE_ACTORS];
    unsigned actors_count, files;
    bool stale;
    int torn;
    unsigned lost;
    int preemptions;
};

#define ACTORS(...) {__VA_ARGS__}, sizeof((enum role[]){__VA_ARGS__}) / sizeof(enum role)

static void
explore_all(const struct scenario *scenarios, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const struct scenario *scenario = &scenarios[i];
        struct commit_world world = {.actors_count = scenario->actors_count,
                                     .files = scenario->files,
                                     .stale = scenario->stale,
                                     .torn = scenario->torn,
                                     .lost = scenario->lost};
        memcpy(world.roles, scenario->roles, sizeof world.roles);
        CHECK(commit_world_explore(&world, scenario->preemptions));
    }
}

#define EXPLORE_ALL(scenarios) explore_all(scenarios, sizeof(scenarios) / sizeof((scenarios)[0]))

static void
no_pair_breaks_it_in_any_interleaving(void)
{
    const int all = EXPLORE_UNBOUNDED;
    const struct scenario pairs[] = {
        {ACTORS(COMMITTER, COMMITTER), 1, false, 0, 0, all},
        {ACTORS(COMMITTER, COMMITTER), 2, false, 0, 0, 3},
        {ACTORS(COMMITTER, QUITTER), 1, false, 0, 0, all},
        {ACTORS(COMMITTER, LATE_PUBLISHER), 1, false, 0, 0, all},
        {ACTORS(COMMITTER, LATE_PUBLISHER), 2, false, 0, 0, all},
        {ACTORS(COMMITTER, LATE_SETTLER), 2, false, 0, 0, all},
        {ACTORS(COMMITTER, SWEEPER), 2, false, 0, 0, all},
        {ACTORS(COMMITTER, READER), 2, false, 0, 0, all},
        {ACTORS(COMMITTER, CLIENT), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, LATE_SETTLER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, SWEEPER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, READER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, CLIENT), 2, false, 0, 0, all},
        {ACTORS(SWEEPER, READER), 2, false, 0, 0, all},
        {ACTORS(SWEEPER, CLIENT), 2, false, 0, 0, all},
        {ACTORS(SWEEPER, RESTARTER), 2, false, 0, 0, all},
        {ACTORS(RANK_COMMITTER, SWEEPER), 1, false, 0, 0, all},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, false, 0, 0, 4},
        {ACTORS(RANK_COMMITTER, RANK_COMMITTER), 1, false, 0, 0, 4},
    };
    EXPLORE_ALL(pairs);
}

static void
no_triple_breaks_it(void)
{
    const int all = EXPLORE_UNBOUNDED;
    const struct scenario triples[] = {
        {ACTORS(LATE_PUBLISHER, LATE_SETTLER, LATE_SETTLER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, LATE_SETTLER, READER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, SWEEPER, READER), 1, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, SWEEPER, CLIENT), 1, false, 0, 0, 4},
        {ACTORS(COMMITTER, LATE_PUBLISHER, LATE_SETTLER), 1, false, 0, 0, 5},
        {ACTORS(COMMITTER, LATE_PUBLISHER, READER), 1, false, 0, 0, 5},
        {ACTORS(COMMITTER, LATE_PUBLISHER, SWEEPER), 1, false, 0, 0, 3},
        {ACTORS(COMMITTER, LATE_PUBLISHER, CLIENT), 1, false, 0, 0, 3},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, false, 0, 0, 3},
        {ACTORS(COMMITTER, COMMITTER, LATE_PUBLISHER), 1, false, 0, 0, 2},
        {ACTORS(COMMITTER, COMMITTER, READER), 1, false, 0, 0, 3},
        {ACTORS(COMMITTER, COMMITTER, SWEEPER), 1, false, 0, 0, 2},
        {ACTORS(COMMITTER, COMMITTER, CLIENT), 1, false, 0, 0, 2},
        {ACTORS(RANK_COMMITTER, COMMITTER, COMMITTER), 1, false, 0, 0, 2},
        {ACTORS(RANK_COMMITTER, RANK_COMMITTER, COMMITTER), 1, false, 0, 0, 2},
    };
    EXPLORE_ALL(triples);
}

static void
stale_and_torn_listings_do_not_break_it(void)
{
    const struct scenario scenarios[] = {
        {ACTORS(COMMITTER, COMMITTER), 1, true, 0, 0, 3},
        {ACTORS(COMMITTER, COMMITTER), 1, false, 1, 0, 3},
        {ACTORS(COMMITTER, COMMITTER), 1, false, 2, 0, 3},
        {ACTORS(COMMITTER, COMMITTER), 1, true, 2, 0, 2},
        {ACTORS(COMMITTER, SWEEPER), 1, true, 1, 0, 4},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, true, 0, 0, 2},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, false, 1, 0, 2},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, false, 2, 0, 2},
        {ACTORS(COMMITTER, COMMITTER, LATE_PUBLISHER), 1, true, 0, 0, 2},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, true, 0, 0, 3},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, false, 1, 0, 4},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, false, 2, 0, 4},
        {ACTORS(SWEEPER, RESTARTER), 1, true, 1, 0, EXPLORE_UNBOUNDED},
    };
    EXPLORE_ALL(scenarios);
}

static void
lost_replies_do_not_break_it(void)
{
    const struct scenario scenarios[] = {
        {ACTORS(LATE_PUBLISHER, LATE_SETTLER, LATE_SETTLER), 1, false, 0, 2, EXPLORE_UNBOUNDED},
        {ACTORS(COMMITTER, LATE_PUBLISHER), 1, false, 0, 2, 3},
        {ACTORS(COMMITTER, COMMITTER), 1, false, 0, 1, 3},
        {ACTORS(COMMITTER, QUITTER), 1, false, 0, 2, 2},
        {ACTORS(COMMITTER, SWEEPER), 1, false, 0, 2, 3},
        {ACTORS(COMMITTER, CLIENT), 1, false, 0, 2, 2},
        {ACTORS(COMMITTER, LATE_PUBLISHER, LATE_SETTLER), 1, false, 0, 1, 3},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, true, 0, 1, 1},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, false, 0, 1, 2},
    };
    EXPLORE_ALL(scenarios);
}

static void
all_together_do_not_break_it(void)
{
    const struct scenario scenarios[] = {
        {ACTORS(COMMITTER, COMMITTER, LATE_PUBLISHER, SWEEPER, READER, CLIENT), 1, false, 0, 0, 1},
        {ACTORS(COMMITTER, COMMITTER, LATE_PUBLISHER, SWEEPER, READER), 1, true, 0, 0, 1},
    };
    EXPLORE_ALL(scenarios);
}

CTEST_MAIN(RUN(no_pair_breaks_it_in_any_interleaving); RUN(no_triple_breaks_it);
           RUN(stale_and_torn_listings_do_not_break_it); RUN(lost_replies_do_not_break_it);
           RUN(all_together_do_not_break_it);)

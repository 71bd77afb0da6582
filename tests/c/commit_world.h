/*
 * commit_world.h: the world of test_commit_model.c: a directory, its actors, and what must hold
 * after every step.
 *
 * commit_world.c makes it and checks it, commit_actors.c has what the actors do.
 */
#ifndef COMMIT_WORLD_H
#define COMMIT_WORLD_H

#include "claim_scan.h"
#include "explore.h"
#include "io_memory.h"

#define COMMIT_DIR "ckpt"

enum {
    COMMIT_FILES_MOST = 2, /* of one save */
    COMMIT_IMAGE_BYTES = 256,
    COMMIT_LATE = 'l', /* letter of the late save */
    COMMIT_OLD = 'o',  /* of the checkpoint that is there at the start */
    COMMIT_NEXT = 'z', /* of the save after all others */
};

enum role { COMMITTER, QUITTER, LATE_PUBLISHER, LATE_SETTLER, SWEEPER, READER, CLIENT,
            RESTARTER, RANK_COMMITTER };

/* What is known of a save, by the letter of its id. */
struct save_fact {
    bool committed;
    enum dcp_outcome said[EXPLORE_ACTORS]; /* by actor */
    uint64_t n0;                           /* of the commit */
};

struct commit_world {
    /* the scenario */
    enum role roles[EXPLORE_ACTORS];
    unsigned actors_count, files;
    bool stale;
    int torn;
    unsigned lost;
    /* the run */
    struct io_memory *fs;
    struct io_memory_process *processes[EXPLORE_ACTORS];
    int dirfds[EXPLORE_ACTORS];
    struct save_fact saves[128];
    unsigned claims_opened[EXPLORE_ACTORS];
    uint64_t checked_version; /* of the names, when they were looked at last; 0: look again */
    char current[2]; /* letter of each target; 0: there is none */
    bool client_began; /* to delete: the checkpoint may be incomplete, or gone */
    bool starts_anew;  /* the directory was emptied, and numbers begin again at 0 */
    bool abandoned, broken;
};

/* Explores the world's scenario, prints a line about it, and gives true when all held. */
bool commit_world_explore(struct commit_world *world, int preemptions);

/* ---- between the two files, and the test ---- */

/* The toy format: "FAKE", save id, then names, each with its terminating zero.  Returns the
 * length. */
size_t fake_metadata(uint8_t *ret, const struct dcp_save_id *id, uint64_t n0, unsigned files);
bool fake_save_id(const uint8_t *image, size_t len, struct dcp_save_id *ret_id);
/* The name at *at, which moves to the next, beginning with 20; NULL at the end. */
const char *fake_next(const uint8_t *image, size_t len, size_t *at);

struct dcp_save_id commit_id_of(char letter);
uint64_t commit_late_n0(const struct commit_world *world);
/* Something does not hold; ignored while actors unwind. */
void commit_world_broke(struct commit_world *world, const char *what, char letter);
void commit_world_act(void *ctx, unsigned actor);
/* The end of every save, for the running actor: publishes what is written, settles what is open,
 * sweeps or discards.  `made` of the files exist. */
void commit_conclude(struct commit_world *world, struct dcp_claim *claim, char letter,
                     unsigned made, bool publish);
/* Creates the claim's files; returns how many. */
unsigned commit_write_files(const struct commit_world *world, const struct dcp_claim *claim,
                            char letter);

#endif

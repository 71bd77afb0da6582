/*
 * upload_world.h: background saves of simulated ranks: a thread each, one file system, one store.
 *
 * A gate stops one kind of thread of one rank at the n-th of its calls, until the test opens it.
 */
#ifndef UPLOAD_WORLD_H
#define UPLOAD_WORLD_H

#include <pthread.h>

#include "dcp_upload.h"
#include "save_faults.h"
#include "save_world.h"
#include "store_sim.h"

enum { UPLOAD_MOST_RANKS = 5 };

struct gate {
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed;
    uint32_t nth; /* 1 is the next; 0: it is open */
    int io_call;  /* enum io_call: of that kind alone; IO_CALLS: any */
    uint32_t calls;
    bool reached;
};

void gate_init(struct gate *gate);
void gate_close(struct gate *gate, uint32_t nth, int io_call);
void gate_open(struct gate *gate);
/* False when `ended` came true before anybody reached it.  Ends the program after a minute. */
bool gate_wait(struct gate *gate, bool (*ended)(void *arg), void *arg);

struct upload_rank {
    struct gate io, store;
    struct io_faults faults; /* its table */
};

struct upload_world {
    struct io_memory *fs;
    struct store_sim *store; /* clients: 2 per rank, for two saves in flight */
    uint32_t size, coordinator;
    struct upload_rank ranks[UPLOAD_MOST_RANKS];
};

void upload_world_init(struct upload_world *world, uint32_t size);
/* Nothing is open and no key is there any more, or the program ends. */
void upload_world_end(struct upload_world *world);
const struct dcp_io *upload_world_io(struct upload_world *world, uint32_t rank);

/* Collective: the allocation of this number fails from here on, and all later ones; 0: none. */
void upload_world_memory(struct dcp_group *group, uint64_t nth);

/* How the bytes of a save get to the disk; BEGUN: staged, which the upload ends. */
enum upload_way { UPLOAD_STAGED, UPLOAD_BEGUN, UPLOAD_BORROWED, UPLOAD_WRITTEN, UPLOAD_WAYS };

struct upload_request {
    struct save_request save;
    enum upload_way way;
    uint32_t client; /* of the rank's two */
    bool fails_before;
    uint64_t fail_allocation; /* from staging on, see upload_world_memory */
    uint64_t timeout_ns;      /* 0: a minute */
};

struct upload_result {
    int agreed, rc;
    int staged; /* of way BEGUN: what became of the staging */
    struct dcp_error err;
    struct dcp_failure_list failures; /* a copy */
    struct dcp_save_info info;
    enum dcp_outcome outcome; /* as the save knew when it was settled */
    uint32_t notified;
    uint64_t store_calls;
};

/* One upload of one rank and what is borrowed for it. */
struct background {
    struct upload_world *world;
    uint32_t rank;
    struct begun_save begun;
    struct dcp_store store;
    struct dcp_failure mine;
    struct dcp_error mine_err;
    struct dcp_upload *upload;
    struct upload_result *result;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed;
    uint32_t notified;
};

/* Agrees and stages; false when it ended there. */
bool background_begin(struct background *bg, struct upload_world *world, struct dcp_group *group,
                      const struct upload_request *request, struct upload_result *ret_result);
void background_start(struct background *bg, struct dcp_group *group,
                      const struct upload_request *request);
/* Waits until it has come to `state`; ends the program after a minute. */
void background_await(struct background *bg, enum dcp_upload_state state);
/* What it says now: it is settled. */
void background_look(struct background *bg);
/* Waits for its end, looks if nobody did, and frees. */
void background_end(struct background *bg);
void upload_result_clean_up(struct upload_result *result);

#endif

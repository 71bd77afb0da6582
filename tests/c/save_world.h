/*
 * save_world.h: whole saves and loads of simulated ranks, with bytes that tell which save wrote
 * them.  One generation is special: SAVE_PARTLY is generation 1 with a few items changed, as the
 * next step of an incremental chain.
 *
 * The state of a rank mixes what jobs have: rows of a sharded tensor, replicas as under DDP, its
 * own tensors and objects.  Odd ranks hold one replica turned round in memory.  Byte i of a tensor
 * differs between any two generations, so that a load that mixes two saves, or gets nothing, cannot
 * pass for either.  Failures of the helpers themselves end the test program.
 */
#ifndef SAVE_WORLD_H
#define SAVE_WORLD_H

#include "dcp_transfer.h"
#include "device_world.h"
#include "io_memory.h"

#define SAVE_DIR "/ckpt"

enum { SAVE_ITEMS = 6, SAVE_GENERATIONS = 8, SAVE_REPLICAS = 3, SAVE_PARTLY = 7 };

/* One thing that is different about a rank's plan. */
enum save_change {
    CHANGE_NONE,
    CHANGE_NAME,
    CHANGE_DTYPE,
    CHANGE_BOX,
    CHANGE_SLOT,
    CHANGE_PROPS,
    CHANGE_THREAD_COUNT,
    CHANGE_FILE_PER_ITEM,
    CHANGE_ORDER,
    CHANGE_PATH,
    CHANGE_SALT,
    CHANGE_GROUP, /* the rank makes a new group: a restarted rank */
    CHANGES,
};

/* A group of the simulated ranks' `comm`, which is copied; ends the program when there is none. */
struct dcp_group *save_world_group(const struct dcp_comm *comm, uint32_t coordinator);

struct save_request {
    int generation;   /* 1 .. SAVE_GENERATIONS - 1 */
    const char *dir;  /* NULL: SAVE_DIR */
    const char *base; /* NULL: none */
    enum dcp_link_mode link_mode;
    bool content_hash;
    enum save_change change;
    enum dcp_direct direct;
    uint64_t split_bytes; /* dcp_save_params.split_bytes; all replicas are small */
    bool stage;           /* write from a copy, as async saves do */
    bool independent, share_metadata;
    /* Per rank: its tensors lie there, and come late; NULL: on the host. */
    const struct devices *devices;
    /* As if the caller had raised there. */
    bool fail_before_agree, fail_before_compare, fail_before_finish;
    bool looks; /* at the end, as a rank does that heard no verdict */
    /* The allocation of this number fails and all later ones, on all ranks: they share a heap.
     * From before agree, compare or write on, until the caller ends it; 0: none. */
    uint64_t fail_allocation_of_agree, fail_allocation_of_compare, fail_allocation_of_write;
};

struct save_result {
    int rc; /* of the last agreement that was reached */
    struct dcp_error err;
    struct dcp_failure_list failures; /* when rc is DCP_E_PEER */
    struct dcp_save_info info;
    bool was_committed;       /* by that look */
    struct dcp_hash128 image; /* of the metadata that this rank holds; zero: it holds none */
};

/* The whole order of calls, as dcp_native/_save.py makes them. */
void save_once(struct dcp_group *group, const struct dcp_io *io, const struct save_request *request,
               struct save_result *ret);
void save_result_clean_up(struct save_result *result);

/* A save that is agreed and compared, and whose bytes are the caller's to write. */
struct begun_save {
    struct dcp_save *save;
    struct save_state *state;
    const struct dcp_source *sources;
    int rc; /* else this is why it is not */
    struct dcp_error err;
    struct dcp_failure_list failures;
};

void save_begin(struct dcp_group *group, const struct dcp_io *io,
                const struct save_request *request, struct begun_save *ret);
/* What a trainer may do once all is staged. */
void begun_save_free_sources(struct begun_save *begun);
void begun_save_end(struct begun_save *begun);

struct load_request {
    const char *dir;            /* NULL: SAVE_DIR */
    uint32_t saved_size;        /* ranks that saved */
    uint32_t without_state_of;  /* a rank whose own tensor is not read; UINT32_MAX: none */
    bool own_part;              /* only what this rank saved by itself: its rows and its own */
    bool fail_before[3];        /* as if the caller had raised before open, planning, reading */
    void (*between)(void *arg); /* runs between planning and reading; may be NULL */
    void *between_arg;
};

struct load_result {
    int rc, read_code; /* read_code: what dcp_load_read gave on this rank */
    struct dcp_error err;
    struct dcp_failure_list failures;
    size_t image_bytes; /* of the metadata that came to this rank */
    int generation; /* that all bytes are of; -1: of none, or of several.  0: nothing was read */
};

/* Every rank reads its rows of the sharded tensor, and all of the rest. */
void load_once(struct dcp_group *group, const struct dcp_io *io, const struct load_request *request,
               struct load_result *ret);
void load_result_clean_up(struct load_result *result);

/* One rank reads everything with a table of its own: the generation, -1, or 0 when it cannot. */
int save_world_generation(struct io_memory *fs, uint32_t saved_size);
int save_world_generation_of(struct io_memory *fs, const char *dir, uint32_t saved_size);
bool failure_lists_equal(const struct dcp_failure_list *a, const struct dcp_failure_list *b);

#endif

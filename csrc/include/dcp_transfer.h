/*
 * dcp_transfer.h: one save or load in flight: the order of agreements, bytes and commit (design
 * sections 3, 5, 7).
 *
 * A group is what ranks share between saves: the comm table and the installed plan.  A save goes
 *     open -> claim (coordinator) -> agree (vote, plan) -> compare (with a base) -> write
 *          -> finish (status, commit, result)
 * or, in the background, from compare on -> stage -> upload (dcp_upload.h)
 * and a load
 *     open (vote, metadata) -> status of planning -> read -> status of reading.
 * Every step that talks to other ranks is entered by every rank exactly once, whatever failed
 * locally before it: the failure travels with it, and the same list of failures comes back on all
 * ranks.
 *
 * Thread rule: one thread at a time per object; collective steps of one group in the same order on
 * all ranks.
 */
#ifndef DCP_TRANSFER_H
#define DCP_TRANSFER_H

#include "dcp_arena.h"
#include "dcp_comm.h"
#include "dcp_commit.h"
#include "dcp_engine.h"
#include "dcp_shm.h"
#include "dcp_store.h"
#include "dcp_writer_process.h"

/* ---- group ---- */
struct dcp_group;

/* Takes `comm`.  `coordinator` is a rank of the group. */
int dcp_group_new(struct dcp_comm *comm, uint32_t coordinator, struct dcp_group **ret_group,
                  struct dcp_error *err) DCP_MUST_CHECK;
/* The same ranks over the same table, with a coordinator, plans and counts of its own.
 * DCP_E_UNSUPPORTED: the table can have one owner alone. */
int dcp_group_share(const struct dcp_group *group, uint32_t coordinator,
                    struct dcp_group **ret_group, struct dcp_error *err) DCP_MUST_CHECK;
/* The device over which the ranks talk; -1: they talk over none. */
int32_t dcp_group_device(const struct dcp_group *group);
/* From here on every call comes after what this stream of the group's device, the caller's, has
 * been given before the call.  Without a device nothing. */
void dcp_group_follow(struct dcp_group *group, void *stream);
void dcp_group_destroy(struct dcp_group *group);
const struct dcp_comm *dcp_group_comm(const struct dcp_group *group);
struct dcp_comm_stats dcp_group_comm_stats(const struct dcp_group *group);
uint32_t dcp_group_coordinator(const struct dcp_group *group);
/* Forgets the installed plan: the next save gathers plans again. */
void dcp_group_forget_plan(struct dcp_group *group);
/* Collective, once per group: which of its processes share a host.  Later calls do nothing. */
int dcp_group_meet(struct dcp_group *group, const struct dcp_shm *shm,
                   struct dcp_error *err) DCP_MUST_CHECK;
/* NULL before they have met. */
const struct dcp_peers *dcp_group_peers(const struct dcp_group *group);
/* Ranks of this host, this one included; 0 when it is not known. */
uint32_t dcp_group_host_ranks(const struct dcp_group *group);
/* After a caller left a collective early: every later call on the group is refused by name. */
void dcp_group_poison(struct dcp_group *group);

/* ---- save ---- */
struct dcp_save;

/* How a save with `base=` takes over files of an earlier checkpoint. */
enum dcp_link_mode {
    DCP_LINK_REFLINK = 0, /* a file of its own that shares blocks: nothing can reach through it */
    DCP_LINK_HARD = 1,    /* one file with two names, made read-only */
};

enum { DCP_BASE_REASON_BYTES = 192 };

struct dcp_save_params {
    const struct dcp_io *io;
    const char *dir_path;
    struct dcp_storage_meta meta; /* strings are copied */
    const char *identity;         /* for people, stored in the claim; may be NULL */
    uint64_t call_hash;           /* checkpoint_id, kind of save: must agree between ranks */
    uint64_t plan_salt;           /* planner options: part of the fingerprint */
    /* DCP_SPLIT_AUTO, DCP_SPLIT_OFF or bytes: which replicated tensors are divided; the
     * coordinator's holds.  Of no effect with `independent` or `to_lowest_rank`. */
    uint64_t split_bytes;
    bool independent;     /* use_collectives=False: plan and commit alone, one status at the end */
    bool to_lowest_rank;  /* dedup */
    bool planned_outside; /* a planner of the program's own makes this rank's plan */
    bool elsewhere;       /* a writer of the program's own writes what this rank saves: it takes
                           * part in dcp_save_agree, or independent in dcp_save_finish, alone */
    bool sync;            /* sync_files */
    bool share_metadata;  /* with the ranks that have no image, if all ask for it */
    enum dcp_direct direct;
    const char *base_path; /* an earlier checkpoint, maybe of this very directory; NULL: none */
    enum dcp_link_mode link_mode;
    bool content_hash; /* store hashes, so that a later save can name this one as its base */
    struct dcp_write_tuning tuning;
    const uint8_t *mapped_from, *mapped_to; /* as in dcp_engine_options */
};

int dcp_save_new(struct dcp_group *group, const struct dcp_save_params *params,
                 struct dcp_save **ret_save, struct dcp_error *err) DCP_MUST_CHECK;
/* Settles an unsettled claim (abort) before it frees. */
void dcp_save_destroy(struct dcp_save *save);

/* The open directory; -1 before. */
int dcp_save_dirfd(const struct dcp_save *save);
/* Makes and opens the directory.  *ret_exists: a committed checkpoint is there. */
int dcp_save_open(struct dcp_save *save, bool *ret_exists, struct dcp_error *err) DCP_MUST_CHECK;
/* Coordinator (every rank when independent): takes the claim and fences older saves.  Nothing on
 * other ranks. */
int dcp_save_claim(struct dcp_save *save, struct dcp_error *err) DCP_MUST_CHECK;

/* The plan's rank and writer options are set by the caller; `plan` is moved in. */
void dcp_save_set_plan(struct dcp_save *save, struct dcp_plan *plan);

/* Collective.  `mine`: what failed on this rank so far, or NULL.  0: go on.  DCP_E_PEER:
 * *ret_failures says what failed where (the same on all ranks), the claim is dropped.  Other codes:
 * the exchange itself failed on this rank. */
int dcp_save_agree(struct dcp_save *save, const struct dcp_failure *mine,
                   struct dcp_failure_list *ret_failures, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- plans that are made outside of the core (info.planned_outside after dcp_save_agree) ----
 * Such a save is agreed on by these calls, in this order; the collective ones by every rank,
 * whatever failed on it:
 *     dcp_save_gather, dcp_save_scatter            collective: plans, as opaque bytes
 *     dcp_save_set_plan, dcp_save_lay_out          what this rank writes
 *     dcp_save_gather                              collective: where it lies
 *     dcp_save_set_metadata                        coordinator
 *     dcp_save_settle_plan                         collective
 * A rank that has failed sends empty messages and tells why in the last call.  An independent save
 * makes the local ones alone, before dcp_save_agree.  Failures of collective calls leave the group
 * of no more use. */

/* Messages of any length to the coordinator; there *ret_spans, one per rank, point into *ret_block
 * (both the caller's, dcp_free), elsewhere nothing is set. */
int dcp_save_gather(struct dcp_save *save, const struct dcp_span *mine, uint8_t **ret_block,
                    struct dcp_span **ret_spans, struct dcp_error *err) DCP_MUST_CHECK;
/* The coordinator's `parts`, one per rank; *ret_part is this rank's. */
int dcp_save_scatter(struct dcp_save *save, const struct dcp_span *parts, struct dcp_buf *ret_part,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* Every item of the plan is kept, and has its place. */
int dcp_save_lay_out(struct dcp_save *save, struct dcp_error *err) DCP_MUST_CHECK;
/* NULL before. */
const struct dcp_layout *dcp_save_laid_out(const struct dcp_save *save);
/* The pickled Metadata that is to be published. */
int dcp_save_set_metadata(struct dcp_save *save, const struct dcp_span *pickle,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* The end of the agreement.  Return values as dcp_save_agree's. */
int dcp_save_settle_plan(struct dcp_save *save, const struct dcp_failure *mine,
                         struct dcp_failure_list *ret_failures,
                         struct dcp_error *err) DCP_MUST_CHECK;

/* Once, before compare, stage or write, for sources on devices: the list, which outlives the use of
 * the sources.  Every device's stream follows what the trainer's streams had been given by then
 * (dcp_device.follow is the caller's). */
void dcp_save_set_devices(struct dcp_save *save, const struct dcp_device_list *devices);

/* After dcp_save_agree, once: moves the sources of items that were cut (see dcp_plan_cut) to the
 * rows that this rank keeps.  They borrow from the group until the next save on it agrees. */
void dcp_save_fit_sources(struct dcp_save *save, struct dcp_source *sources);

/* Collective when every rank named a base (info.incremental, the same everywhere), else nothing.
 * Finds out what has not changed since the base and links the files that hold it; what is left is
 * written.  After dcp_save_agree, before staging; `sources` are fitted.  `mine` and return values
 * as dcp_save_agree's. */
int dcp_save_compare(struct dcp_save *save, const struct dcp_failure *mine,
                     const struct dcp_source *sources, atomic_int *cancel,
                     struct dcp_failure_list *ret_failures, struct dcp_error *err) DCP_MUST_CHECK;

/* The thread that will call dcp_save_write is not the trainer's: it takes the priority of
 * params.tuning, as the engine's own threads do. */
void dcp_save_lend_thread(struct dcp_save *save);

/* ---- staging: the files of a background save, in memory of ours ---- */

struct dcp_stage_params {
    enum dcp_arena_kind kind;
    struct dcp_arena_limits limits;
    atomic_int *cancel;                 /* may be NULL */
    struct dcp_writer_process *process; /* dcp_save_warm_up's alone: maps them as well; or NULL */
};

/* After dcp_save_compare, once: builds this rank's files in an arena; afterwards `sources` may
 * change or go away.  DCP_E_LIMIT, DCP_E_NOMEM: there is no memory for it and nothing has happened;
 * the caller writes from the sources instead. */
int dcp_save_stage(struct dcp_save *save, const struct dcp_source *sources,
                   const struct dcp_stage_params *params, struct dcp_error *err) DCP_MUST_CHECK;
/* The same in two steps, for sources on devices.  The first takes the arena and puts the first
 * copies on the devices' streams; it waits for no device.  Failures as of dcp_save_stage. */
int dcp_save_stage_begin(struct dcp_save *save, const struct dcp_source *sources,
                         const struct dcp_stage_params *params,
                         struct dcp_error *err) DCP_MUST_CHECK;
struct dcp_stage_end {
    atomic_int *cancel;         /* may be NULL */
    void (*brought)(void *ctx); /* may be NULL */
    void *ctx;
};

/* On any thread: puts the other copies, waits for them, and makes of them and of what lies on the
 * host the files.  Of a save with devices it calls how->brought once all bytes are in memory of
 * ours: from then on, or else after it, `sources` may change or go away, whatever it returns. */
int dcp_save_stage_end(struct dcp_save *save, const struct dcp_source *sources,
                       const struct dcp_stage_end *how, struct dcp_error *err) DCP_MUST_CHECK;
/* Touches arenas ahead that are as large as this save's would be; they are kept for the next.
 * DCP_E_IO: all but the process is ready. */
int dcp_save_warm_up(struct dcp_save *save, const struct dcp_stage_params *params, uint32_t arenas,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* Writes what was staged, by `process` or, where that is NULL, by this process; then the arena is
 * free for the next save, whatever happened.  `survive`: the process finishes the save if this one
 * dies; the caller tells it when the save is settled. */
int dcp_save_write_staged(struct dcp_save *save, struct dcp_writer_process *process, bool survive,
                          atomic_int *cancel, _Atomic uint64_t *progress_bytes,
                          struct dcp_error *err) DCP_MUST_CHECK;

/* ---- writing and ending ---- */

/* Writes the kept items and builds the metadata image (coordinator).  `sources`: parallel to the
 * plan's items, fitted. */
int dcp_save_write(struct dcp_save *save, const struct dcp_source *sources, atomic_int *cancel,
                   _Atomic uint64_t *progress_bytes, struct dcp_error *err) DCP_MUST_CHECK;

/* Collective: status, commit, result, share_metadata, sweep.  Return values as dcp_save_agree's. */
int dcp_save_finish(struct dcp_save *save, const struct dcp_failure *mine,
                    struct dcp_failure_list *ret_failures, struct dcp_error *err) DCP_MUST_CHECK;

/* Background saves settle without collectives: the coordinator publishes after every rank said
 * "durable". */
int dcp_save_publish(struct dcp_save *save, struct dcp_error *err) DCP_MUST_CHECK;
/* After a commit, coordinator: removes data files that nothing references any more. */
void dcp_save_sweep(struct dcp_save *save);
/* Gives the save up: drops the claim and this rank's files unless it turns out to be committed. */
enum dcp_outcome dcp_save_abandon(struct dcp_save *save);
/* The same while files of it may still be written: touches the claim alone.  dcp_save_wind_up does
 * the rest later. */
enum dcp_outcome dcp_save_settle(struct dcp_save *save);
/* Looks whether the save was committed, by whom ever: for a rank that heard no verdict.  True
 * concludes it; false says nothing. */
bool dcp_save_was_committed(struct dcp_save *save);
/* Another rank's verdict, while files may still be written. */
void dcp_save_hear(struct dcp_save *save, enum dcp_outcome outcome);
/* When nothing is written any more and the outcome is known: removes this rank's files when it is
 * aborted.  Again does nothing. */
void dcp_save_wind_up(struct dcp_save *save);
/* Both: dcp_save_hear, dcp_save_wind_up. */
void dcp_save_conclude(struct dcp_save *save, enum dcp_outcome outcome);

struct dcp_save_info {
    struct dcp_save_id save_id;
    uint64_t n0;
    enum dcp_outcome outcome;
    bool fast;        /* the installed plan was reused */
    bool call_agrees; /* false: ranks named different checkpoints */
    bool is_coordinator;
    /* Once agreed: some rank's plan is made outside of the core, and so are all. */
    bool planned_outside;
    /* Once agreed: some rank writes elsewhere, and so do all: this save is over, and undone. */
    bool elsewhere;
    uint64_t planned_bytes; /* payload that this rank is to write, after compare */
    uint64_t ranks_bytes;   /* the same of all ranks, where this one knows it; else 0 */
    uint64_t kept_items, kept_bytes, dropped_items, dropped_bytes, swept_files;
    uint64_t cut_items; /* kept items of which other ranks keep other rows */
    bool incremental;   /* every rank named a base */
    uint64_t reused_items, reused_bytes, linked_files;
    char base_reason[DCP_BASE_REASON_BYTES]; /* why nothing, or not more, is reused; "" */
    /* Since the group's last save, by checksum, where that had the same plan (and was not
     * independent); and since the base. */
    uint64_t compared_items, unchanged_items, unchanged_bytes;
    /* Of the kept items: those that require gradients; when none of the plan does, those of
     * floating point. */
    uint64_t trainable_items, trainable_bytes, trainable_unchanged;
    uint64_t vote_ns, plan_ns, hash_ns, compare_ns, metadata_ns, write_ns, commit_ns;
    uint64_t stage_ns, staged_bytes, arena_bytes; /* of a save that was staged */
    uint64_t stage_begin_ns;                      /* of stage_ns: dcp_save_stage_begin */
    struct dcp_device_stats device;               /* of comparing, staging and writing together */
    struct dcp_write_stats write;
    /* Coordinator: after dcp_save_write.  Others: after a dcp_save_finish that shared it. */
    struct dcp_span metadata;
};
void dcp_save_get_info(const struct dcp_save *save, struct dcp_save_info *ret);
/* Data file `index` of those that this rank writes: its number and its length.  False behind the
 * last one, and before there is a plan. */
bool dcp_save_get_file(const struct dcp_save *save, uint32_t index, uint64_t *ret_n,
                       uint64_t *ret_length_bytes);
const struct dcp_plan *dcp_save_plan(const struct dcp_save *save);
/* Bitmap of the items that this rank writes, after dcp_save_agree and dcp_save_compare. */
const uint8_t *dcp_save_keep(const struct dcp_save *save);

/* ---- load ---- */
struct dcp_load;

/* Which ranks share what they read of data that several of them want. */
enum dcp_read_once {
    DCP_READ_ONCE_HOST = 0,  /* those of one host, through shared memory */
    DCP_READ_ONCE_GROUP = 1, /* before that, what all ranks of the group want, by broadcasts */
    DCP_READ_ONCE_OFF = 2,
};

struct dcp_load_params {
    const struct dcp_io *io;
    const char *dir_path;
    uint64_t call_hash;
    uint32_t rank;           /* whose `__{rank}.metadata` is read when there is no `.metadata` */
    bool verify, verify_all; /* as of struct dcp_engine_options */
    enum dcp_direct direct;
    enum dcp_read_once read_once;
    const struct dcp_shm *shm; /* for what is read once; NULL: this rank reads for itself */
    bool elsewhere;            /* a planner or reader of the program's own loads on this rank */
};

int dcp_load_new(struct dcp_group *group, const struct dcp_load_params *params,
                 struct dcp_load **ret_load, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_load_destroy(struct dcp_load *load);

/* Collective: the coordinator reads `.metadata` and broadcasts it; where it is absent each rank
 * reads its own. Return values as dcp_save_agree's.  A local failure to parse is left for
 * dcp_load_status (*ret_local_code, `err`). */
int dcp_load_open(struct dcp_load *load, const struct dcp_failure *mine, int *ret_local_code,
                  struct dcp_failure_list *ret_failures, struct dcp_error *err) DCP_MUST_CHECK;
const struct dcp_metadata *dcp_load_metadata(const struct dcp_load *load);
/* What this rank read the metadata from: the file; or, on other ranks than the coordinator, maybe
 * what stands behind its pickle. */
struct dcp_span dcp_load_metadata_image(const struct dcp_load *load);
bool dcp_load_rank_local(const struct dcp_load *load);
/* Once opened: some rank loads elsewhere, and so do all: this load is over. */
bool dcp_load_is_elsewhere(const struct dcp_load *load);

/* Collective: did everybody get this far?  Return values as dcp_save_agree's. */
int dcp_load_status(struct dcp_load *load, const struct dcp_failure *mine,
                    struct dcp_failure_list *ret_failures, struct dcp_error *err) DCP_MUST_CHECK;

/* Collective when every rank asks for DCP_READ_ONCE_GROUP, and in any case ranks of one host wait
 * for each other while they read what several of them want: after the agreement on planning every
 * rank calls this or dcp_load_status.  DCP_E_PEER: it broke off because another rank did, which the
 * next dcp_load_status names. */
int dcp_load_read(struct dcp_load *load, const struct dcp_read_plan *plan, atomic_int *cancel,
                  _Atomic uint64_t *progress_bytes, dcp_record_fn on_record, void *on_record_ctx,
                  struct dcp_read_stats *ret_stats, struct dcp_error *err) DCP_MUST_CHECK;
/* Why this rank shared nothing of what it read with others of its host; "" when it did. */
const char *dcp_load_share_reason(const struct dcp_load *load);

#endif

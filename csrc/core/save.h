/*
 * save.h: one save in flight (private to the files save*.c and unchanged.c).
 */
#ifndef DCP_CORE_SAVE_H
#define DCP_CORE_SAVE_H

#include <sys/types.h>

#include "dcp_image.h"
#include "device.h"
#include "group.h"
#include "incremental.h"

struct dcp_save {
    struct dcp_group *group; /* borrows */
    const struct dcp_io *io;
    char *dir_path;      /* owned */
    char *checkpoint_id; /* owned copies of dcp_storage_meta's strings */
    char *storage_save_id;
    char *version;
    char *identity;
    struct dcp_storage_meta meta; /* points at the copies */
    uint64_t call_hash, plan_salt;
    uint64_t split_bytes;
    bool independent, to_lowest_rank, planned_outside, elsewhere, sync, share_metadata;
    enum dcp_direct direct;
    char *base_path; /* owned; NULL: none */
    enum dcp_link_mode link_mode;
    bool content_hash;
    struct dcp_write_tuning tuning;
    const uint8_t *mapped_from, *mapped_to;
    bool own_thread; /* dcp_save_lend_thread */

    pid_t pid;   /* a forked child holds a copy of a save that is its parent's to end */
    int dirfd;   /* -1 until dcp_save_open */
    bool exists; /* a committed checkpoint was there when the directory was opened */
    bool asked_space;
    uint64_t free_bytes; /* there, when it was asked; UINT64_MAX: not known */
    bool claimed;        /* this process holds `claim` */
    struct dcp_claim claim;
    struct dcp_plan plan;                       /* cut, once agreed */
    struct dcp_hash128 fingerprint, names_hash; /* of the whole plan */
    /* From the vote: which names the coordinator has (save_gather.c). */
    struct dcp_hash128 coordinator_names_hash;
    uint64_t coordinator_held_plan;
    /* A reference: the plan this save goes by, once agreed; the group's, or, of an independent
     * save, its own. */
    struct dcp_installed_plan *installed;
    /* A reference: an empty plan to fill when one has to be made.  Here from the start, for a rank
     * without memory for it could not leave the others alone. */
    struct dcp_installed_plan *next;
    struct dcp_buf metadata; /* the image, where info.metadata tells */
    struct dcp_save_info info;
    /* Of a save that was compared with a base: what is reused, and what is left to write. */
    bool compared;
    struct dcp_reuse reuse;
    struct dcp_joined_reuse joined;        /* coordinator */
    uint8_t *write;                        /* owned bitmap */
    struct dcp_layout layout;              /* of `write` */
    struct dcp_image image;                /* of a staged save */
    struct dcp_arena *arena;               /* holds it, until it is written; else NULL */
    const struct dcp_device_list *devices; /* borrows; NULL: there are none */
    struct dcp_device_stage *stage;        /* between the two steps of staging; else NULL */
    struct dcp_last_crcs crcs;             /* of this save, until it is committed */
    _Atomic uint32_t created_files;        /* by this save: the first ones of the layout */
};

/* This rank's files: of all kept items, or of those that have changed since the base. */
static inline const struct dcp_layout *
dcp_save_layout(const struct dcp_save *save)
{
    return save->compared ? &save->layout : &save->installed->layout;
}

/* Collective: every rank's plan to the coordinator.  `local`, *ret_local_rc: what failed on this
 * rank alone; it goes on to the next call.  Coordinator: plans go to `next`, and *ret_spans (the
 * caller's, dcp_free) has room for one span per rank.  Non-zero: the gather itself failed. */
int dcp_save_gather_plans(struct dcp_save *save, struct dcp_installed_plan *next,
                          struct dcp_span **ret_spans, struct dcp_error *local, int *ret_local_rc,
                          struct dcp_error *err) DCP_MUST_CHECK;

/* The SLOW way: gather plans, decide, scatter, install. */
int dcp_save_plan_slow(struct dcp_save *save, struct dcp_failure_list *ret_failures,
                       struct dcp_error *err) DCP_MUST_CHECK;
/* The same for one rank on its own. */
int dcp_save_plan_alone(struct dcp_save *save, struct dcp_error *err) DCP_MUST_CHECK;

/* Once a plan holds for this save: what it comes to. */
void dcp_save_count_kept(struct dcp_save *save);

/* ---- save_outside.c ---- */

/* This save goes by the plan that was laid out. */
int dcp_save_install_own(struct dcp_save *save, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- save_write.c ---- */

/* Room for the checksum of every record that this rank writes: the caller's, dcp_free. */
int dcp_save_new_crcs(const struct dcp_save *save, uint32_t **ret_crcs,
                      struct dcp_error *err) DCP_MUST_CHECK;

/* ---- unchanged.c ---- */

/* After the writer ran: `crcs` are of the records of dcp_save_layout.  Fills the counts of info. */
int dcp_unchanged_count(struct dcp_save *save, const uint32_t *crcs,
                        struct dcp_error *err) DCP_MUST_CHECK;
/* The save is committed: the next one of the group is compared with it. */
void dcp_unchanged_keep(struct dcp_save *save);

/* ---- save_space.c ---- */

/* After the vote: this rank's directory is the coordinator's. */
bool dcp_save_sees_claim(const struct dcp_save *save);
/* Coordinator, before the vote: false when the installed plan does not fit any more. */
bool dcp_save_fits_again(struct dcp_save *save);
/* Coordinator, before its answers: refuses what does not fit.  Sets next->shared_bytes. */
int dcp_save_check_sum(struct dcp_save *save, struct dcp_installed_plan *next,
                       struct dcp_error *err) DCP_MUST_CHECK;
/* Any rank, before it writes: its own bytes. */
int dcp_save_check_own(struct dcp_save *save, struct dcp_error *err) DCP_MUST_CHECK;

#endif

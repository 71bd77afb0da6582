/*
 * save.c: one save from an open directory to an agreed plan (design sections 3 and 5).
 *
 * The order of a whole save is its promise: vote before anything is written (here, save_plan.c),
 * with a base compare what all ranks keep (save_compare.c), data durable on every rank before the
 * status all-reduce (save_write.c), `.metadata` renamed only when every status is good, files swept
 * only after that (save_commit.c).
 */
#include "save.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "claim_scan.h"
#include "dcp_trace.h"
#include "io_explain.h"
#include "plan_private.h"

static char *
copy_text(const char *text)
{
    size_t len = text == NULL ? 0 : strlen(text) + 1;
    char *copy = len == 0 ? NULL : dcp_malloc(len);

    if (copy != NULL) {
        memcpy(copy, text, len);
    }
    return copy;
}

static bool
copy_params(struct dcp_save *save, const struct dcp_save_params *params)
{
    save->io = params->io;
    save->dir_path = copy_text(params->dir_path);
    save->checkpoint_id = copy_text(params->meta.checkpoint_id);
    save->storage_save_id = copy_text(params->meta.storage_save_id);
    save->version = copy_text(params->meta.version);
    save->identity = copy_text(params->identity);
    save->meta = params->meta;
    save->meta.checkpoint_id = save->checkpoint_id;
    save->meta.storage_save_id = save->storage_save_id;
    save->meta.version = save->version;
    /* Part of the call: where ranks differ in it the vote says so to all, and nobody shares. */
    save->call_hash = params->call_hash + (params->share_metadata ? 1 : 0);
    save->plan_salt = params->plan_salt;
    save->split_bytes = params->split_bytes;
    save->independent = params->independent;
    save->to_lowest_rank = params->to_lowest_rank;
    save->planned_outside = params->planned_outside;
    save->elsewhere = params->elsewhere;
    save->sync = params->sync;
    save->share_metadata = params->share_metadata;
    save->direct = params->direct;
    save->base_path = copy_text(params->base_path);
    save->link_mode = params->link_mode;
    /* A hash speaks for bytes that are on the device; without syncs nobody knows that they are. */
    save->content_hash = params->sync && (params->content_hash || params->base_path != NULL);
    save->tuning = params->tuning;
    save->mapped_from = params->mapped_from;
    save->mapped_to = params->mapped_to;
    return save->dir_path != NULL && (params->base_path == NULL || save->base_path != NULL) &&
           (params->meta.checkpoint_id == NULL || save->checkpoint_id != NULL) &&
           (params->meta.storage_save_id == NULL || save->storage_save_id != NULL) &&
           (params->meta.version == NULL || save->version != NULL) &&
           (params->identity == NULL || save->identity != NULL);
}

int
dcp_save_new(struct dcp_group *group, const struct dcp_save_params *params,
             struct dcp_save **ret_save, struct dcp_error *err)
{
    struct dcp_save *save = dcp_calloc(1, sizeof *save);

    if (save == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a save");
    }
    save->group = group;
    save->pid = getpid();
    save->dirfd = -1;
    save->info.is_coordinator = params->independent || group->comm.rank == group->coordinator;
    save->info.call_agrees = true;
    save->info.planned_outside = params->independent && params->planned_outside;
    if (!copy_params(save, params)) {
        dcp_save_destroy(save);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a save");
    }
    int rc = dcp_installed_plan_new(&save->next, err);
    if (rc != 0) {
        dcp_save_destroy(save);
        return rc;
    }
    *ret_save = save;
    return 0;
}

void
dcp_save_destroy(struct dcp_save *save)
{
    if (save == NULL) {
        return;
    }
    if (save->claimed && save->info.outcome == DCP_OUTCOME_UNKNOWN) {
        dcp_save_abandon(save);
    }
    if (save->dirfd >= 0) {
        save->io->close(save->io->ctx, save->dirfd);
    }
    if (save->stage != NULL &&
        (save->pid != getpid() || !dcp_device_stage_end(save->stage, NULL))) {
        save->arena = NULL; /* the parent's; or copies may still write to it */
    }
    dcp_reuse_clean_up(&save->reuse);
    dcp_joined_reuse_clean_up(&save->joined);
    dcp_layout_clean_up(&save->layout);
    dcp_image_clean_up(&save->image);
    dcp_arena_release(save->arena);
    dcp_free(save->write);
    dcp_last_crcs_clean_up(&save->crcs);
    dcp_installed_plan_release(save->installed);
    dcp_installed_plan_release(save->next);
    dcp_plan_clean_up(&save->plan);
    dcp_buf_clean_up(&save->metadata);
    dcp_free(save->dir_path);
    dcp_free(save->checkpoint_id);
    dcp_free(save->storage_save_id);
    dcp_free(save->version);
    dcp_free(save->identity);
    dcp_free(save->base_path);
    dcp_free(save);
}

/* ---- open, claim ---- */

static int
open_failed(const struct dcp_save *save, int sys_errno, const char *what, struct dcp_error *err)
{
    char why[DCP_IO_EXPLAIN_BYTES];
    const struct dcp_io_trouble trouble = {
        .io = save->io, .fd = save->dirfd, .sys_errno = sys_errno};

    return dcp_error_set(err, DCP_E_IO, sys_errno, save->dir_path, "%s %s failed: %s", what,
                         save->dir_path, dcp_io_explain(&trouble, why));
}

int
dcp_save_open(struct dcp_save *save, bool *ret_exists, struct dcp_error *err)
{
    const struct dcp_io *io = save->io;
    char name[DCP_CLAIM_NAME_BYTES];
    int rc = io->mkdirs(io->ctx, save->dir_path);

    if (rc < 0) {
        return open_failed(save, -rc, "making the checkpoint's directory", err);
    }
    rc = io->open_dir(io->ctx, save->dir_path);
    if (rc < 0) {
        return open_failed(save, -rc, "opening the checkpoint's directory", err);
    }
    save->dirfd = rc;
    /* torch looks at rank 0's file alone to tell whether a checkpoint is there */
    dcp_metadata_name(name, save->independent ? 0 : -1);
    do {
        rc = io->open_at(io->ctx, save->dirfd, name, O_RDONLY, 0);
    } while (rc == -EINTR);
    if (rc < 0 && rc != -ENOENT) {
        return open_failed(save, -rc, "opening the previous checkpoint in", err);
    }
    save->exists = rc >= 0;
    *ret_exists = save->exists;
    if (rc >= 0) {
        io->close(io->ctx, rc);
    }
    return 0;
}

int
dcp_save_dirfd(const struct dcp_save *save)
{
    return save->dirfd;
}

int
dcp_save_claim(struct dcp_save *save, struct dcp_error *err)
{
    int rc;

    if (!save->info.is_coordinator) {
        return 0;
    }
    rc = dcp_random_bytes(save->info.save_id.bytes, sizeof save->info.save_id.bytes);
    if (rc != 0) {
        return dcp_error_set(err, DCP_E_IO, -rc, NULL,
                             "the system gave no random bytes for a save id");
    }
    rc = dcp_claim_take(save->io, save->dirfd, save->dir_path,
                        save->independent ? (int32_t)save->group->comm.rank : -1,
                        &save->info.save_id, save->identity, save->sync, &save->claim, err);
    if (rc == 0) {
        save->claimed = true;
        save->info.n0 = save->claim.n0;
    }
    return rc;
}

void
dcp_save_set_plan(struct dcp_save *save, struct dcp_plan *plan)
{
    dcp_plan_clean_up(&save->plan);
    save->plan = *plan;
    memset(plan, 0, sizeof *plan);
    save->plan.content_hash = save->content_hash;
    save->names_hash = dcp_plan_names_hash(&save->plan);
    save->fingerprint = dcp_plan_fingerprint_named(&save->plan, &save->names_hash, save->plan_salt);
}

/* ---- agree ---- */

static int
vote(struct dcp_save *save, bool ok, enum dcp_verdict *ret_verdict, struct dcp_error *err)
{
    struct dcp_group *group = save->group;
    const struct dcp_installed_plan *installed = group->installed;
    struct dcp_vote ballot = {
        .outside = save->planned_outside,
        .elsewhere = save->elsewhere,
        .reuse = ok && installed != NULL && !save->planned_outside &&
                 dcp_hash128_equal(installed->fingerprint, save->fingerprint) &&
                 (!save->info.is_coordinator || dcp_save_fits_again(save)),
        .ok = ok,
        .call = save->call_hash,
        .is_coordinator = save->info.is_coordinator,
        .has_base = save->base_path != NULL,
        .save_id = save->info.save_id,
        .n0 = save->info.n0,
        .names_hash = save->names_hash,
    };
    uint64_t start_ns = dcp_now_ns();
    int rc;

    if (installed != NULL) {
        ballot.plan_id = installed->plan_id;
        ballot.held_plan = installed->plan_id.lo;
    }
    rc = dcp_group_check(group, err);
    if (rc == 0) {
        rc = dcp_vote_run(&group->comm, &ballot, ret_verdict, err);
        if (rc != 0) {
            group->poisoned = true;
        }
    }
    save->info.vote_ns = dcp_now_ns() - start_ns;
    dcp_trace_end(dcp_trace_from(start_ns), "agree", "vote", 0);
    if (rc == 0) {
        save->info.save_id = ballot.save_id;
        save->info.n0 = ballot.n0;
        save->info.call_agrees = ballot.call_agrees;
        save->info.incremental = ballot.has_base;
        save->info.planned_outside = *ret_verdict == DCP_VERDICT_OUTSIDE;
        save->info.elsewhere = *ret_verdict == DCP_VERDICT_ELSEWHERE;
        save->coordinator_names_hash = ballot.names_hash;
        save->coordinator_held_plan = ballot.held_plan;
    }
    return rc;
}

void
dcp_save_count_kept(struct dcp_save *save)
{
    const struct dcp_installed_plan *installed = save->installed;

    save->info.kept_items = installed->layout.records_count;
    save->info.kept_bytes = installed->layout.total_bytes;
    save->info.cut_items = installed->cuts.list.count;
    if (save->info.is_coordinator) {
        save->info.dropped_items = installed->global.keep.dropped_items;
        save->info.dropped_bytes = installed->global.keep.dropped_bytes;
    }
}

int
dcp_save_agree(struct dcp_save *save, const struct dcp_failure *mine,
               struct dcp_failure_list *ret_failures, struct dcp_error *err)
{
    enum dcp_verdict verdict = DCP_VERDICT_FAILED;
    uint64_t start_ns;
    int rc;

    if (save->independent) {
        rc = save->planned_outside ? dcp_save_install_own(save, err)
                                   : dcp_save_plan_alone(save, err);
        save->info.incremental = save->base_path != NULL;
    } else {
        rc = vote(save, mine == NULL, &verdict, err);
        start_ns = dcp_now_ns();
        if (rc == 0 && verdict == DCP_VERDICT_FAILED) {
            rc = dcp_failure_exchange(&save->group->comm, mine, ret_failures, err);
            if (rc == 0) {
                rc = dcp_error_set(err, DCP_E_PEER, 0, NULL, "%zu rank(s) failed",
                                   ret_failures->count);
            } else {
                rc = dcp_group_give_up(save->group, rc, err);
            }
        } else if (rc == 0 && verdict == DCP_VERDICT_SLOW) {
            rc = dcp_save_plan_slow(save, ret_failures, err);
        } else if (rc == 0 && verdict == DCP_VERDICT_FAST) {
            save->installed = dcp_installed_plan_acquire(save->group->installed);
            dcp_plan_cut(&save->plan, &save->installed->cuts.list);
        }
        save->info.plan_ns = dcp_now_ns() - start_ns;
        dcp_trace_end(dcp_trace_from(start_ns), "agree",
                      verdict == DCP_VERDICT_FAST ? "plan of before" : "plan together", 0);
    }
    if (rc != 0 || save->info.elsewhere) {
        dcp_save_abandon(save);
        return rc;
    }
    if (save->base_path != NULL && !save->info.incremental) {
        snprintf(save->info.base_reason, sizeof save->info.base_reason,
                 save->info.planned_outside ? "a planner of another rank's own plans this save"
                                            : "another rank was given no base");
    }
    save->info.fast = verdict == DCP_VERDICT_FAST;
    if (save->installed != NULL) {
        dcp_save_count_kept(save);
    }
    return 0;
}

void
dcp_save_fit_sources(struct dcp_save *save, struct dcp_source *sources)
{
    DCP_ASSERT(save->installed != NULL);
    dcp_cuts_fit_sources(&save->installed->cuts, &save->plan, sources);
}

/* Only the coordinator of a plan has those of the others. */
static uint64_t
ranks_bytes(const struct dcp_save *save)
{
    const struct dcp_installed_plan *installed = save->installed;
    const struct dcp_layout *layouts;
    uint64_t sum = 0;

    if (installed == NULL || installed->global.layouts == NULL || save->info.planned_outside) {
        return 0;
    }
    layouts = save->compared ? save->joined.layouts : installed->global.layouts;
    for (uint32_t i = 0; i < installed->global.plans_count; i++) {
        sum += layouts[i].payload_bytes;
    }
    return sum;
}

bool
dcp_save_get_file(const struct dcp_save *save, uint32_t index, uint64_t *ret_n,
                  uint64_t *ret_length_bytes)
{
    const struct dcp_layout *layout = save->installed == NULL ? NULL : dcp_save_layout(save);

    if (layout == NULL || index >= layout->files_count) {
        return false;
    }
    *ret_n = save->info.n0 + layout->files[index].index;
    *ret_length_bytes = layout->files[index].length_bytes;
    return true;
}

void
dcp_save_get_info(const struct dcp_save *save, struct dcp_save_info *ret)
{
    *ret = save->info;
    ret->planned_bytes = save->installed == NULL ? 0 : dcp_save_layout(save)->payload_bytes;
    ret->ranks_bytes = ranks_bytes(save);
}

const struct dcp_plan *
dcp_save_plan(const struct dcp_save *save)
{
    return &save->plan;
}

const uint8_t *
dcp_save_keep(const struct dcp_save *save)
{
    if (save->compared) {
        return save->write;
    }
    return save->installed->keep;
}

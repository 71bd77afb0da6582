/*
 * save.c: one save from an open directory to a committed checkpoint (design sections 3 and 5).
 *
 * The order is the promise: vote before anything is written, data durable on every rank before the
 * status all-reduce,
 * `.metadata` renamed only when every status is good, files swept only after that.  A save that
 * ends anywhere else drops its claim and leaves what was loadable before it as it was.
 */
#include "save.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

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
is_ours(const struct dcp_save *save)
{
    return save->pid == getpid();
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
    save->call_hash = params->call_hash;
    save->plan_salt = params->plan_salt;
    save->independent = params->independent;
    save->to_lowest_rank = params->to_lowest_rank;
    save->sync = params->sync;
    save->direct = params->direct;
    return save->dir_path != NULL &&
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
    if (!copy_params(save, params)) {
        dcp_save_destroy(save);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a save");
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
    dcp_installed_plan_clean_up(&save->own);
    dcp_plan_clean_up(&save->plan);
    dcp_buf_clean_up(&save->metadata);
    dcp_free(save->dir_path);
    dcp_free(save->checkpoint_id);
    dcp_free(save->storage_save_id);
    dcp_free(save->version);
    dcp_free(save->identity);
    dcp_free(save);
}

/* ---- open, claim ---- */

static void
target_name(const struct dcp_save *save, char *ret_name, size_t size)
{
    if (save->independent) {
        /* torch looks at rank 0's file alone to tell whether a checkpoint is there */
        snprintf(ret_name, size, "__0.metadata");
    } else {
        snprintf(ret_name, size, ".metadata");
    }
}

int
dcp_save_open(struct dcp_save *save, bool *ret_exists, struct dcp_error *err)
{
    const struct dcp_io *io = save->io;
    char name[DCP_CLAIM_NAME_BYTES];
    int rc = io->mkdirs(io->ctx, save->dir_path);

    if (rc < 0) {
        return dcp_error_set(err, DCP_E_IO, -rc, save->dir_path,
                             "could not make the checkpoint's directory %s", save->dir_path);
    }
    rc = io->open_dir(io->ctx, save->dir_path);
    if (rc < 0) {
        return dcp_error_set(err, DCP_E_IO, -rc, save->dir_path,
                             "could not open the checkpoint's directory %s", save->dir_path);
    }
    save->dirfd = rc;
    target_name(save, name, sizeof name);
    rc = io->open_at(io->ctx, save->dirfd, name, O_RDONLY, 0);
    if (rc < 0 && rc != -ENOENT) {
        return dcp_error_set(err, DCP_E_IO, -rc, save->dir_path, "could not open %s/%s",
                             save->dir_path, name);
    }
    *ret_exists = rc >= 0;
    if (rc >= 0) {
        io->close(io->ctx, rc);
    }
    return 0;
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
    save->names_hash = dcp_plan_names_hash(&save->plan);
    save->fingerprint =
        dcp_plan_fingerprint_named(&save->plan, &save->names_hash, save->plan_salt);
}

/* ---- agree ---- */

static int
vote(struct dcp_save *save, bool ok, enum dcp_verdict *ret_verdict, struct dcp_error *err)
{
    struct dcp_group *group = save->group;
    const struct dcp_installed_plan *installed = &group->installed;
    struct dcp_vote ballot = {
        .reuse = ok && installed->valid && installed->fingerprint.lo == save->fingerprint.lo &&
                 installed->fingerprint.hi == save->fingerprint.hi,
        .ok = ok,
        .call = save->call_hash,
        .is_coordinator = save->info.is_coordinator,
        .save_id = save->info.save_id,
        .n0 = save->info.n0,
        .names_hash = save->names_hash,
    };
    uint64_t start_ns = dcp_now_ns();
    int rc;

    if (installed->valid) {
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
    if (rc == 0) {
        save->info.save_id = ballot.save_id;
        save->info.n0 = ballot.n0;
        save->info.call_agrees = ballot.call_agrees;
        save->coordinator_names_hash = ballot.names_hash;
        save->coordinator_held_plan = ballot.held_plan;
    }
    return rc;
}

static void
count_kept(struct dcp_save *save)
{
    const struct dcp_installed_plan *installed = dcp_save_installed(save);

    save->info.kept_items = installed->layout.records_count;
    save->info.kept_bytes = installed->layout.total_bytes;
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
        rc = dcp_save_plan_alone(save, err);
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
        }
        save->info.plan_ns = dcp_now_ns() - start_ns;
    }
    if (rc != 0) {
        dcp_save_abandon(save);
        return rc;
    }
    save->info.fast = verdict == DCP_VERDICT_FAST;
    save->agreed = true;
    count_kept(save);
    return 0;
}

/* ---- write ---- */

static int
build_metadata(struct dcp_save *save, struct dcp_error *err)
{
    const struct dcp_installed_plan *installed = dcp_save_installed(save);
    uint64_t start_ns = dcp_now_ns();
    int rc;

    dcp_buf_clear(&save->metadata);
    rc = dcp_metadata_write(&installed->global, &save->meta, &save->info.save_id, save->info.n0,
                            &save->metadata, err);
    save->info.metadata_ns = dcp_now_ns() - start_ns;
    save->info.metadata = (struct dcp_span){save->metadata.data, save->metadata.len};
    return rc;
}

/* A full disk is better met before the first byte than at the last one. */
static int
check_space(struct dcp_save *save, uint64_t need_bytes, struct dcp_error *err)
{
    struct dcp_space space;
    int rc = save->io->space(save->io->ctx, save->dirfd, &space);

    if (rc == 0 && space.free_bytes < need_bytes) {
        return dcp_error_set(err, DCP_E_IO, ENOSPC, save->dir_path,
                             "not enough space in %s: this rank writes %llu bytes, %llu are free",
                             save->dir_path, (unsigned long long)need_bytes,
                             (unsigned long long)space.free_bytes);
    }
    return 0; /* where free space cannot be asked, the writes tell */
}

int
dcp_save_write(struct dcp_save *save, const struct dcp_source *sources, atomic_int *cancel,
               _Atomic uint64_t *progress_bytes, struct dcp_error *err)
{
    const struct dcp_installed_plan *installed = dcp_save_installed(save);
    struct dcp_engine_options options = {
        .direct = save->direct,
        .sync = save->sync,
        .cancel = cancel,
        .progress_bytes = progress_bytes,
        .created_files = &save->created_files,
    };
    uint64_t start_ns = dcp_now_ns();
    int rc = 0;

    if (!save->agreed) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a save was written before it was agreed");
    }
    if (save->info.is_coordinator) {
        rc = build_metadata(save, err);
    }
    if (rc == 0) {
        rc = check_space(save, installed->layout.total_bytes, err);
    }
    if (rc == 0) {
        rc = dcp_writer_run(save->io, save->dirfd, save->dir_path, &save->plan, &installed->layout,
                            sources, &save->info.save_id, save->info.n0, &options, NULL,
                            &save->info.write, err);
    }
    /* The names must be durable before this rank says so. */
    if (rc == 0 && save->sync) {
        int sync_rc = save->io->fsync(save->io->ctx, save->dirfd);
        if (sync_rc < 0) {
            rc = dcp_error_set(err, DCP_E_IO, -sync_rc, save->dir_path,
                               "could not sync the directory %s", save->dir_path);
        }
    }
    save->info.write_ns = dcp_now_ns() - start_ns;
    return rc;
}

/* ---- commit ---- */

int
dcp_save_publish(struct dcp_save *save, struct dcp_error *err)
{
    enum dcp_outcome outcome = DCP_OUTCOME_UNKNOWN;
    uint64_t start_ns = dcp_now_ns();
    int rc;

    if (!is_ours(save) || !save->claimed || save->info.outcome != DCP_OUTCOME_UNKNOWN) {
        return dcp_error_set(err, DCP_E_INVALID, 0, save->dir_path,
                             "a save of %s was to be published that has no claim in this process",
                             save->dir_path);
    }
    rc = dcp_claim_publish(&save->claim, save->metadata.data, save->metadata.len, &outcome, err);
    if (rc != 0 && outcome == DCP_OUTCOME_UNKNOWN) {
        struct dcp_error ignored;
        dcp_error_clear(&ignored);
        outcome = dcp_claim_settle(&save->claim, &ignored);
        if (outcome == DCP_OUTCOME_COMMITTED) {
            dcp_error_clear(err);
            rc = 0;
        }
    }
    dcp_save_conclude(save, rc == 0 ? DCP_OUTCOME_COMMITTED : outcome);
    save->info.commit_ns = dcp_now_ns() - start_ns;
    return rc;
}

void
dcp_save_sweep(struct dcp_save *save)
{
    struct dcp_error ignored;

    dcp_error_clear(&ignored);
    if (save->info.outcome == DCP_OUTCOME_COMMITTED && save->claimed &&
        dcp_claim_sweep(&save->claim, &save->info.swept_files, &ignored) != 0) {
        save->info.swept_files = 0; /* leftovers lose nothing; the next commit sweeps them */
    }
}

/* Collective, when the coordinator could not publish: what became of the save.  A rank that removed
 * its files on a guess could take them from a checkpoint that everybody sees already. */
static void
learn_outcome(struct dcp_save *save)
{
    struct dcp_group *group = save->group;
    uint8_t outcome = (uint8_t)save->info.outcome;
    struct dcp_error ignored;

    dcp_error_clear(&ignored);
    if (group->comm.broadcast(group->comm.ctx, group->coordinator, &outcome, sizeof outcome,
                              &ignored) != 0) {
        group->poisoned = true;
    } else if (!save->info.is_coordinator && outcome <= DCP_OUTCOME_SUPERSEDED) {
        dcp_save_conclude(save, (enum dcp_outcome)outcome);
    }
}

int
dcp_save_finish(struct dcp_save *save, const struct dcp_failure *mine,
                struct dcp_failure_list *ret_failures, struct dcp_error *err)
{
    struct dcp_save_id any = {{0}};
    const struct dcp_save_id *id = save->independent ? &any : &save->info.save_id;
    struct dcp_error local;
    struct dcp_failure publishing;
    int rc = 0;

    dcp_error_clear(&local);
    if (!save->independent) {
        rc = dcp_group_settle_failures(save->group, id, mine, ret_failures, err);
        mine = NULL;
    }
    if (rc != 0) {
        dcp_save_abandon(save);
        return rc;
    }
    if (mine == NULL && save->info.is_coordinator && dcp_save_publish(save, &local) != 0) {
        publishing = dcp_failure_from_error(&local, save->group->comm.rank);
        mine = &publishing;
    }
    rc = dcp_group_settle_failures(save->group, id, mine, ret_failures, err);
    if (rc != 0 && save->info.is_coordinator) {
        dcp_save_abandon(save); /* nothing is undone where it is committed */
    }
    if (rc == DCP_E_PEER && !save->independent) {
        learn_outcome(save);
    }
    if (rc != 0 && save->info.outcome != DCP_OUTCOME_COMMITTED) {
        return rc;
    }
    save->info.outcome = DCP_OUTCOME_COMMITTED;
    if (save->info.is_coordinator) {
        dcp_save_sweep(save);
    }
    return rc;
}

/* Removes the files that this save created, finished or not: a full disk must not stay full.  One
 * whose header tells of another save is left. */
static void
discard_files(struct dcp_save *save)
{
    const struct dcp_layout *layout = &dcp_save_installed(save)->layout;
    struct dcp_claim files = {
        .io = save->io, .dirfd = save->dirfd, .save_id = save->info.save_id};

    for (uint32_t i = 0; i < save->created_files; i++) {
        char text[DCP_CLAIM_NAME_BYTES];
        const char *name = text;

        dcp_data_file_name(text, sizeof text, save->plan.rank,
                           save->info.n0 + layout->files[i].index);
        dcp_claim_discard(&files, &name, 1);
    }
    save->created_files = 0;
}

enum dcp_outcome
dcp_save_abandon(struct dcp_save *save)
{
    struct dcp_error ignored;

    if (save->info.outcome != DCP_OUTCOME_UNKNOWN || !is_ours(save)) {
        return save->info.outcome;
    }
    dcp_error_clear(&ignored);
    if (save->claimed) {
        save->info.outcome = dcp_claim_settle(&save->claim, &ignored);
        dcp_save_conclude(save, save->info.outcome);
    } else if (!save->group->poisoned) {
        /* Everybody heard of the failure, so the coordinator commits nothing. */
        dcp_save_conclude(save, DCP_OUTCOME_ABORTED);
    }
    return save->info.outcome;
}

void
dcp_save_conclude(struct dcp_save *save, enum dcp_outcome outcome)
{
    if (!is_ours(save)) {
        return;
    }
    save->info.outcome = outcome;
    if (outcome == DCP_OUTCOME_ABORTED || outcome == DCP_OUTCOME_SUPERSEDED) {
        discard_files(save);
    }
}

void
dcp_save_get_info(const struct dcp_save *save, struct dcp_save_info *ret)
{
    *ret = save->info;
}

const struct dcp_plan *
dcp_save_plan(const struct dcp_save *save)
{
    return &save->plan;
}

const uint8_t *
dcp_save_keep(const struct dcp_save *save)
{
    return save->independent ? save->own.keep : save->group->installed.keep;
}

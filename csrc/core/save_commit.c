/*
 * save_commit.c: how one save ends: status, publish, result, share, sweep; or what is undone when
 * it fails.
 *
 * `.metadata` is renamed into place only when the data is durable on every rank, and files are
 * swept only after that.  A save that ends anywhere else drops its claim and leaves what was
 * loadable before it as it was.
 */
#include "save.h"

#include <string.h>
#include <unistd.h>

#include "claim_scan.h"
#include "dcp_trace.h"

/* A forked child holds a copy of a save that is its parent's to end. */
static bool
is_ours(const struct dcp_save *save)
{
    return save->pid == getpid();
}

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
        if (outcome == DCP_OUTCOME_COMMITTED && save->claim.durable) {
            dcp_error_clear(err);
            rc = 0;
        }
    }
    dcp_save_conclude(save, rc == 0 ? DCP_OUTCOME_COMMITTED : outcome);
    save->info.commit_ns = dcp_now_ns() - start_ns;
    dcp_trace_end(dcp_trace_from(start_ns), "phase", "publish", save->metadata.len);
    return rc;
}

void
dcp_save_sweep(struct dcp_save *save)
{
    struct dcp_error ignored;
    uint64_t traced = dcp_trace_begin();

    dcp_error_clear(&ignored);
    if (save->info.outcome == DCP_OUTCOME_COMMITTED && save->claimed &&
        dcp_claim_sweep(&save->claim, &save->info.swept_files, &ignored) != 0) {
        save->info.swept_files = 0; /* leftovers lose nothing; the next commit sweeps them */
    }
    dcp_trace_end(traced, "io", "sweep", 0);
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

/* Collective, after the result: whether it runs was agreed in the vote.  The save is committed, so
 * nothing that fails here fails it: a rank without the image can read the file. */
static void
share_metadata(struct dcp_save *save)
{
    struct dcp_group *group = save->group;
    struct dcp_error ignored;
    int rc;

    if (!save->share_metadata || !save->info.call_agrees || save->independent) {
        return;
    }
    dcp_error_clear(&ignored);
    rc = dcp_comm_broadcast_bytes(&group->comm, group->coordinator, &save->metadata, &ignored);
    if (rc != 0) {
        /* The ranks agree on lengths and memory first: after these they are still in step. */
        group->poisoned = rc != DCP_E_NOMEM && rc != DCP_E_LIMIT && rc != DCP_E_PEER;
        return;
    }
    save->info.metadata = (struct dcp_span){save->metadata.data, save->metadata.len};
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
    if (save->elsewhere) {
        return dcp_group_settle_failures(save->group, id, mine, ret_failures, err);
    }
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
    dcp_unchanged_keep(save);
    if (rc == 0) {
        share_metadata(save);
    }
    if (save->info.is_coordinator) {
        dcp_save_sweep(save);
    }
    return rc;
}

/* Removes the files that this save created, finished or not, and its links: a full disk must not
 * stay full.  One whose header tells of another save is left. */
static void
discard_files(struct dcp_save *save)
{
    struct dcp_claim files = {.io = save->io, .dirfd = save->dirfd, .save_id = save->info.save_id};

    for (uint32_t i = 0; i < save->created_files; i++) {
        char text[DCP_CLAIM_NAME_BYTES];
        const char *name = text;

        dcp_data_file_name(text, sizeof text, save->plan.rank, save->info.n0 + i);
        dcp_claim_discard(&files, &name, 1);
    }
    save->created_files = 0;
    for (uint32_t i = 0; i < save->reuse.links_count; i++) {
        const struct dcp_link *link = &save->reuse.links[i];
        char text[DCP_CLAIM_NAME_BYTES];
        const char *name = text;

        dcp_data_file_name(text, sizeof text, save->plan.rank, save->info.n0 + link->n);
        dcp_claim_discard_links(&files, &name, &link->from.written_by, 1);
    }
    save->reuse.links_count = 0;
}

enum dcp_outcome
dcp_save_settle(struct dcp_save *save)
{
    struct dcp_error ignored;

    if (save->info.outcome == DCP_OUTCOME_UNKNOWN && is_ours(save) && save->claimed) {
        dcp_error_clear(&ignored);
        save->info.outcome = dcp_claim_settle(&save->claim, &ignored);
    }
    return save->info.outcome;
}

bool
dcp_save_was_committed(struct dcp_save *save)
{
    const struct dcp_claim directory = {
        .io = save->io, .dir_path = save->dir_path, .dirfd = save->dirfd};
    struct dcp_save_id id = {{0}};
    struct dcp_error ignored;
    char name[DCP_CLAIM_NAME_BYTES];
    bool present = false;

    if (!is_ours(save) || save->dirfd < 0) {
        return false;
    }
    dcp_error_clear(&ignored);
    dcp_metadata_name(name, save->independent ? (int32_t)save->plan.rank : -1);
    if (dcp_claim_read_save_id(&directory, name, &present, &id, &ignored) != 0 || !present ||
        memcmp(&id, &save->info.save_id, sizeof id) != 0) {
        return false;
    }
    dcp_save_conclude(save, DCP_OUTCOME_COMMITTED);
    return true;
}

enum dcp_outcome
dcp_save_abandon(struct dcp_save *save)
{
    if (save->info.outcome != DCP_OUTCOME_UNKNOWN || !is_ours(save)) {
        return save->info.outcome;
    }
    if (save->claimed) {
        dcp_save_conclude(save, dcp_save_settle(save));
    } else if (!save->group->poisoned) {
        /* Everybody heard of the failure, so the coordinator commits nothing. */
        dcp_save_conclude(save, DCP_OUTCOME_ABORTED);
    }
    return save->info.outcome;
}

void
dcp_save_hear(struct dcp_save *save, enum dcp_outcome outcome)
{
    if (is_ours(save)) {
        save->info.outcome = outcome;
    }
}

void
dcp_save_wind_up(struct dcp_save *save)
{
    if (!is_ours(save)) {
        return;
    }
    if (save->info.outcome == DCP_OUTCOME_COMMITTED) {
        dcp_unchanged_keep(save);
    }
    if (save->info.outcome == DCP_OUTCOME_ABORTED || save->info.outcome == DCP_OUTCOME_SUPERSEDED) {
        discard_files(save);
    }
}

void
dcp_save_conclude(struct dcp_save *save, enum dcp_outcome outcome)
{
    dcp_save_hear(save, outcome);
    dcp_save_wind_up(save);
}

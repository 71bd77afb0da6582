/*
 * save_compare.c: the step of a save with a base between the agreed plan and the first byte.
 *
 * Collective, and only when the vote found that every rank was given a base.  In this order, on
 * every rank, whatever fails locally on the way:
 *   1. broadcast  the coordinator's state of the base and, where it is of use, its metadata.  What
 *                 is broadcast, and nothing else, says whether step 2 comes.
 *   2. gather     what each rank reuses (an empty message from one that failed)
 *   3. settle     one all-reduce; the exchange of failures after one
 * A rank links files between 1 and 2, so that the coordinator refers to nothing that is not there.
 * Links are this save's files: they go when it does.
 *
 * The installed plan stays as it is.  What is left to write is a bitmap and a layout of this save
 * alone.
 *
 * An independent save does the same with its own metadata file and without messages.
 */
#include "save.h"

#include <stdio.h>

#include "claim_scan.h"

static const char *const state_texts[DCP_BASE_STATES] = {
    [DCP_BASE_OK] = "",
    [DCP_BASE_ABSENT] = "there is no checkpoint in the base's directory",
    [DCP_BASE_UNREADABLE] = "the base's metadata can not be read",
    [DCP_BASE_FOREIGN] = "the base was not saved by dcp_native, so it has no content hashes",
    [DCP_BASE_DAMAGED] = "the base's metadata is damaged",
};

/* One comparison. */
struct comparison {
    struct dcp_save *save;
    const struct dcp_source *sources;
    atomic_int *cancel;
    struct dcp_base base;
    struct dcp_buf image;  /* message of step 1 */
    struct dcp_buf answer; /* message of step 2 */
};

static bool
is_usable(const struct comparison *c)
{
    return c->image.len > 0 && c->image.data[0] == DCP_BASE_OK;
}

/* Coordinator. */
static int
read_base(struct comparison *c, struct dcp_error *err)
{
    struct dcp_save *save = c->save;
    char name[DCP_CLAIM_NAME_BYTES];
    int rc;

    dcp_metadata_name(name, save->independent ? (int32_t)save->group->comm.rank : -1);
    rc = dcp_base_read(save->io, save->base_path, name, &c->image, err);
    if (rc != 0) {
        dcp_buf_clean_up(&c->image); /* an empty message: ask the coordinator why */
    }
    return rc;
}

/* What is left to write. */
static int
lay_out_rest(struct dcp_save *save, struct dcp_error *err)
{
    const uint8_t *keep = save->installed->keep;
    size_t bytes = dcp_keep_bytes(save->plan.items_count);

    save->write = dcp_malloc(bytes);
    if (save->write == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a plan's bitmap");
    }
    for (size_t i = 0; i < bytes; i++) {
        save->write[i] = keep[i] & (uint8_t)~save->reuse.reused[i];
    }
    return dcp_layout_build(&save->plan, save->write, &save->layout, err);
}

/* This rank's part, after step 1. */
static int
decide(struct comparison *c, struct dcp_error *err)
{
    struct dcp_save *save = c->save;
    const struct dcp_installed_plan *installed = save->installed;
    enum dcp_base_state state;
    int rc;

    if (c->image.len == 0) {
        return DCP_E_PEER; /* the coordinator has the reason and brings it to the last step */
    }
    rc = dcp_base_open(&c->base, save->io, save->base_path, &c->image, &state, err);
    if (rc != 0) {
        return rc;
    }
    if (state != DCP_BASE_OK) {
        snprintf(save->reuse.reason, sizeof save->reuse.reason, "%s", state_texts[state]);
        return 0;
    }
    struct dcp_reuse_request request = {
        .base = &c->base,
        .plan = &save->plan,
        .keep = installed->keep,
        .first_link_n = installed->layout.files_count,
        .sources = c->sources,
        .devices = save->devices,
        .device_stats = &save->info.device,
        .target = {.io = save->io,
                   .dirfd = save->dirfd,
                   .rank = save->plan.rank,
                   .n0 = save->info.n0,
                   .mode = save->link_mode,
                   .sync = save->sync},
        .cancel = c->cancel,
    };
    rc = dcp_reuse_decide(&request, &save->reuse, err);
    if (rc == 0) {
        rc = lay_out_rest(save, err);
    }
    if (rc == 0) {
        rc = dcp_reuse_encode(&save->plan, &save->reuse, &c->answer, err);
    }
    return rc;
}

/* Coordinator, after step 2. */
static int
join(struct comparison *c, const struct dcp_span *messages, struct dcp_error *err)
{
    const struct dcp_global_plan *global = &c->save->installed->global;

    for (uint32_t i = 0; i < global->plans_count; i++) {
        if (messages[i].len == 0) {
            return DCP_E_PEER; /* as above */
        }
    }
    return dcp_reuse_join(&c->base.md, global, messages, &c->save->joined, err);
}

static int
compare_together(struct comparison *c, const struct dcp_failure *mine,
                 struct dcp_failure_list *ret_failures, struct dcp_error *err)
{
    struct dcp_save *save = c->save;
    struct dcp_group *group = save->group;
    struct dcp_span *messages = NULL;
    struct dcp_failure failure;
    struct dcp_error local;
    uint8_t *block = NULL;
    int rc, local_rc = mine != NULL ? DCP_E_PEER : 0;

    dcp_error_clear(&local);
    rc = dcp_group_check(group, err);
    if (rc != 0) {
        return rc;
    }
    if (save->info.is_coordinator && local_rc == 0) {
        local_rc = read_base(c, &local);
    }
    rc = dcp_comm_broadcast_bytes(&group->comm, group->coordinator, &c->image, err);
    if (rc != 0) {
        return dcp_group_give_up(group, rc, err);
    }
    if (local_rc == 0) {
        local_rc = decide(c, &local);
    }
    if (is_usable(c)) {
        rc = dcp_comm_gather_bytes(&group->comm, group->coordinator, c->answer.data,
                                   local_rc == 0 ? c->answer.len : 0, &block, &messages, err);
        if (rc != 0) {
            return dcp_group_give_up(group, rc, err);
        }
        if (save->info.is_coordinator && local_rc == 0) {
            local_rc = join(c, messages, &local);
        }
        dcp_free(messages);
        dcp_free(block);
    }
    /* DCP_E_PEER without a record: another rank failed, and brings its own reason. */
    if (mine == NULL && local.code != 0) {
        failure = dcp_failure_from_error(&local, group->comm.rank);
        mine = &failure;
    }
    rc = dcp_group_settle_failures(group, &save->info.save_id, mine, ret_failures, err);
    if (rc == 0 && local_rc != 0) {
        rc = dcp_error_set(err, DCP_E_INTERNAL, 0, NULL, "a base was refused without a reason");
    }
    return rc;
}

static int
compare_alone(struct comparison *c, struct dcp_error *err)
{
    int rc = read_base(c, err);

    if (rc == 0) {
        rc = decide(c, err);
    }
    if (rc == 0 && is_usable(c)) {
        struct dcp_span message = {c->answer.data, c->answer.len};
        rc = join(c, &message, err);
    }
    return rc;
}

int
dcp_save_compare(struct dcp_save *save, const struct dcp_failure *mine,
                 const struct dcp_source *sources, atomic_int *cancel,
                 struct dcp_failure_list *ret_failures, struct dcp_error *err)
{
    struct comparison c = {
        .save = save, .sources = sources, .cancel = cancel, .base = {.dirfd = -1}};
    uint64_t start_ns = dcp_now_ns();
    int rc;

    if (!save->info.incremental) {
        return 0;
    }
    if (save->installed == NULL || save->compared) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a save was compared with its base before it was agreed, or twice");
    }
    rc = save->independent ? compare_alone(&c, err) : compare_together(&c, mine, ret_failures, err);
    if (rc != 0) {
        dcp_save_abandon(save);
    } else {
        save->compared = is_usable(&c);
        save->reuse.base_id = c.base.md.save_id;
        save->info.reused_items = save->reuse.items;
        save->info.reused_bytes = save->reuse.bytes;
        save->info.linked_files = save->reuse.links_count;
        save->info.hash_ns = save->reuse.hash_ns;
        snprintf(save->info.base_reason, sizeof save->info.base_reason, "%s", save->reuse.reason);
    }
    save->info.compare_ns = dcp_now_ns() - start_ns;
    dcp_base_close(&c.base);
    dcp_buf_clean_up(&c.image);
    dcp_buf_clean_up(&c.answer);
    return rc;
}

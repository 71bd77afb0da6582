/*
 * commit.c: publishing a save, or settling what became of it.
 *
 * One rename decides.  The claim's name is ours alone and is made once, so each of the three that
 * may take it away (our rename, our unlink, a newer save's unlink) happens at most once and
 * excludes the others.  Whatever reply got lost, two questions find out which it was: can the claim
 * still be unlinked (then nothing was renamed and never will be), and if it is gone, whose save id
 * does the target carry.  A request that is still on its way to a server when its caller gives up
 * cannot surprise us either: after the unlink it finds no name.
 *
 * An outcome, once known, is kept in the claim and not asked for again.
 *
 * Threads: a claim belongs to one thread at a time; several processes may settle one save.
 */
#include "claim_scan.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

/* Calls on the claim that fail for no lasting reason are tried again this often. */
enum {
    SETTLE_TRIES = 3,
    /* Of a claim's text; a larger one is a metadata image on its way. */
    CLAIM_MOST_BYTES = 4096,
    IDENTITY_MOST_BYTES = 512,
};

/* Where nothing was committed yet nobody has synced the parent: the directory's own name is then in
 * no durable place.  Files do not tell, a save that was killed may have left some. */
static int
sync_parent(const struct dcp_claim *claim, struct dcp_error *err)
{
    const struct dcp_io *io = claim->io;
    int rc, fd = io->open_at(io->ctx, claim->dirfd, "..", O_RDONLY | O_DIRECTORY, 0);

    if (fd < 0) {
        return 0; /* a parent that we may not read is not ours to sync */
    }
    rc = dcp_io_sync(io, fd);
    io->close(io->ctx, fd);
    return rc == 0 ? 0 : dcp_claim_sync_error(claim, -rc, "syncing the parent of", ".", err);
}

/* What the rename has done is committed; now it must also outlive a power cut.  Asked once: after a
 * failed fsync a second one may say yes to nothing. */
static int
make_durable(struct dcp_claim *claim, struct dcp_error *err)
{
    int rc = claim->sync ? dcp_io_sync(claim->io, claim->dirfd) : 0;

    claim->durable = rc == 0;
    return rc == 0
               ? 0
               : dcp_claim_sync_error(claim, -rc, "syncing the directory of", claim->target, err);
}

static int
write_image(const struct dcp_claim *claim, const uint8_t *metadata, size_t len,
            struct dcp_error *err)
{
    const struct dcp_io *io = claim->io;
    char path[DCP_ERROR_PATH_BYTES];
    int fd, rc, close_rc;

    do {
        fd = io->open_at(io->ctx, claim->dirfd, claim->name, O_WRONLY, 0);
    } while (fd == -EINTR);
    if (fd < 0) {
        return dcp_claim_error(claim, -fd, "opening the claim", claim->name, err);
    }
    rc = dcp_io_write_all(io, fd, metadata, len, 0, dcp_claim_path(claim, claim->name, path), err);
    if (rc == 0) {
        int sys;
        do {
            sys = io->truncate(io->ctx, fd, len);
        } while (sys == -EINTR);
        if (sys != 0) {
            rc = dcp_claim_error(claim, -sys, "writing the metadata to", claim->name, err);
        }
    }
    if (rc == 0 && claim->sync) {
        int sys = dcp_io_sync(io, fd);
        if (sys != 0) {
            rc = dcp_claim_sync_error(claim, -sys, "syncing the metadata in", claim->name, err);
        }
    }
    close_rc = io->close(io->ctx, fd);
    if (rc == 0 && close_rc != 0 && close_rc != -EINTR) {
        rc = dcp_claim_error(claim, -close_rc, "closing the metadata in", claim->name, err);
    }
    return rc;
}

/* The identity that the claim `name` gives, without its line break; false when it gives none. */
static bool
read_identity(const struct dcp_claim *claim, const char *name, char *ret_text, size_t size)
{
    static const char mark[] = "\nby: ";
    struct dcp_buf text = {0};
    struct dcp_error ignored;
    const char *from = NULL, *to = NULL;

    dcp_error_clear(&ignored);
    if (dcp_io_read_file(claim->io, claim->dirfd, name, CLAIM_MOST_BYTES, &text, &ignored) == 0) {
        from = memmem(text.data, text.len, mark, sizeof mark - 1);
    }
    if (from != NULL) {
        from += sizeof mark - 1;
        to = memchr(from, '\n', (size_t)((const char *)text.data + text.len - from));
    }
    if (to != NULL) {
        snprintf(ret_text, size, "%.*s", (int)(to - from), from);
    }
    dcp_buf_clean_up(&text);
    return to != NULL;
}

/* Says who took over, as far as the directory still tells. */
static void
explain_superseded(const struct dcp_claim *claim, struct dcp_error *err)
{
    const char *dir = claim->dir_path == NULL ? "the directory" : claim->dir_path;
    struct dcp_dir_scan scan = {0};
    struct dcp_claim_name newest = {.n0 = 0};
    struct dcp_error ignored;
    char by[IDENTITY_MOST_BYTES] = "its claim says not by whom";

    dcp_error_clear(&ignored);
    if (dcp_dir_scan_run(claim, &scan, &ignored) == 0) {
        for (size_t i = 0; i < dcp_dir_scan_claims_count(&scan); i++) {
            const struct dcp_claim_name *other = dcp_dir_scan_claim(&scan, i);
            if (other->rank == claim->rank && other->n0 > claim->n0 && other->n0 >= newest.n0) {
                newest = *other;
            }
        }
    }
    dcp_dir_scan_clean_up(&scan);
    if (newest.text[0] != '\0') {
        (void)read_identity(claim, newest.text, by, sizeof by);
        (void)dcp_error_set(err, DCP_E_SUPERSEDED, 0, claim->dir_path,
                            "this save of %s was superseded by a newer one, %s (%s): let one job "
                            "save to a directory",
                            dir, newest.text, by);
    } else {
        (void)dcp_error_set(err, DCP_E_SUPERSEDED, 0, claim->dir_path,
                            "this save of %s lost its claim %s, and the checkpoint there is not "
                            "its own: a newer save has finished since, or the claim was removed "
                            "by hand",
                            dir, claim->name);
    }
}

/* The claim is gone and this call did not remove it: the target tells the rest. */
static enum dcp_outcome
settle_by_target(struct dcp_claim *claim, struct dcp_error *err)
{
    struct dcp_save_id id;
    bool present;

    if (dcp_claim_read_save_id(claim, claim->target, &present, &id, err) != 0) {
        return DCP_OUTCOME_UNKNOWN;
    }
    if (present && memcmp(&id, &claim->save_id, sizeof id) == 0) {
        (void)make_durable(claim, err);
        return DCP_OUTCOME_COMMITTED;
    }
    if (dcp_claim_dir_removed(claim)) {
        (void)dcp_claim_error(claim, ENOENT, "looking for", claim->target, err);
        return DCP_OUTCOME_ABORTED;
    }
    explain_superseded(claim, err);
    return DCP_OUTCOME_SUPERSEDED;
}

enum dcp_outcome
dcp_claim_settle(struct dcp_claim *claim, struct dcp_error *err)
{
    int rc = 0;

    for (int i = 0; claim->outcome == DCP_OUTCOME_UNKNOWN && i < SETTLE_TRIES; i++) {
        do {
            rc = claim->io->unlink_at(claim->io->ctx, claim->dirfd, claim->name);
        } while (rc == -EINTR);
        if (rc == 0) {
            claim->outcome = DCP_OUTCOME_ABORTED;
        } else if (rc == -ENOENT || rc == -ESTALE) {
            claim->outcome = settle_by_target(claim, err);
            return claim->outcome;
        }
    }
    if (claim->outcome == DCP_OUTCOME_UNKNOWN) {
        (void)dcp_claim_error(claim, -rc, "removing the claim", claim->name, err);
    }
    return claim->outcome;
}

/* Everything up to the rename.  0: renamed, for certain. */
static int
try_to_commit(struct dcp_claim *claim, const uint8_t *metadata, size_t len, struct dcp_error *err)
{
    bool is_first = claim->sync && !dcp_io_exists(claim->io, claim->dirfd, claim->target);
    int sys, rc = is_first ? sync_parent(claim, err) : 0;

    if (rc == 0) {
        rc = write_image(claim, metadata, len, err);
    }
    if (rc != 0) {
        return rc;
    }
    do {
        sys = claim->io->rename_at(claim->io->ctx, claim->dirfd, claim->name, claim->target);
    } while (sys == -EINTR);
    return sys == 0 ? 0 : dcp_claim_error(claim, -sys, "renaming the claim to", claim->target, err);
}

int
dcp_claim_publish(struct dcp_claim *claim, const uint8_t *metadata, size_t len,
                  enum dcp_outcome *ret_outcome, struct dcp_error *err)
{
    struct dcp_error cause, settled;
    const struct dcp_error *told = &cause;

    DCP_ASSERT(claim->name[0] != '\0' && claim->outcome == DCP_OUTCOME_UNKNOWN);
    dcp_error_clear(&cause);
    dcp_error_clear(&settled);
    if (try_to_commit(claim, metadata, len, &cause) == 0) {
        claim->outcome = DCP_OUTCOME_COMMITTED;
        (void)make_durable(claim, &cause);
    } else if (dcp_claim_settle(claim, &settled) == DCP_OUTCOME_COMMITTED ||
               settled.code == DCP_E_SUPERSEDED || settled.code == DCP_E_REMOVED) {
        told = &settled; /* that the claim was gone is not the news, but why */
    }
    *ret_outcome = claim->outcome;
    if (claim->outcome == DCP_OUTCOME_COMMITTED && claim->durable) {
        return 0;
    }
    if (err != NULL && err->code == DCP_OK) {
        *err = *told;
    }
    return told->code;
}

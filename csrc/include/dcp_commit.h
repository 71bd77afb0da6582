/*
 * dcp_commit.h: claim, fence, publish, abort, sweep: how a save becomes the checkpoint of a
 * directory, or never was.
 *
 * The protocol (docs/architecture.md has the picture):
 *   claim    n0 = 0 in an empty directory, else 1 + the highest n of any __r_n.distcp on disk,
 *            referenced by a metadata file, or claimed.  Create `.dcp_native-claim-<n0>-<save id>`
 *            with O_EXCL, then look again: whoever finds a number as high as its own withdraws and
 *            claims above it.  The save id keeps the name from ever being used twice, so that a
 *            save that slept through its end cannot rename or unlink another's claim.
 *   fence    unlink every claim with a lower number: the newest save wins.
 *   publish  write the metadata INTO the claim file, fsync, close, rename claim -> `.metadata`,
 *            fsync the directory.  ENOENT on the rename: `.metadata` carries our save id (a lost
 *            reply) = committed, else superseded.
 *   abort    unlink the claim.  0 = aborted for certain; ENOENT = look at `.metadata`.
 *   sweep    by the committer: data files with n < n0 that nothing references.  If any reference
 *            file cannot be read, nothing is swept.  No other name is ever touched.
 * At no instant are there fewer loadable checkpoints than before the save.
 *
 * With use_collectives=False each rank has its own claims (`.dcp_native-claim-r<rank>-...`),
 * numbers and sweeps only its own files, and commits to `__<rank>.metadata`; a claim fences those
 * of its own rank only.
 *
 * Threads: a claim belongs to one thread at a time.
 */
#ifndef DCP_COMMIT_H
#define DCP_COMMIT_H

#include "dcp_io.h"

#ifdef __cplusplus
extern "C" {
#endif

enum dcp_outcome {
    DCP_OUTCOME_UNKNOWN = 0,
    DCP_OUTCOME_COMMITTED = 1,
    DCP_OUTCOME_ABORTED = 2,
    DCP_OUTCOME_SUPERSEDED = 3, /* a newer save fenced this one */
};

enum { DCP_CLAIM_NAME_BYTES = 64 };

struct dcp_claim {
    const struct dcp_io *io; /* borrows */
    const char *dir_path;    /* borrows; for messages only, may be NULL */
    int dirfd;               /* borrows; everything is relative to it */
    int32_t rank;            /* -1: the global claim; else a claim per rank */
    uint64_t n0;             /* first file number of this save */
    struct dcp_save_id save_id;
    char name[DCP_CLAIM_NAME_BYTES];   /* of the claim file; "" when there is none */
    char target[DCP_CLAIM_NAME_BYTES]; /* `.metadata` or `__<rank>.metadata` */
    bool sync;                         /* sync_files: fsync what must be durable */
    bool durable;             /* committed, and the directory was synced if `sync` asks for that */
    enum dcp_outcome outcome; /* UNKNOWN until publish or settle has found out; then it stays */
};

/* Claims the directory and fences older claims.  `identity` is text for people (host, pid, run)
 * that is stored in the claim; may be NULL.  `dir_path` is borrowed as long as the claim is used.
 * DCP_E_REMOVED when the directory is gone, DCP_E_SUPERSEDED when others claim again and again. */
int dcp_claim_take(const struct dcp_io *io, int dirfd, const char *dir_path, int32_t rank,
                   const struct dcp_save_id *save_id, const char *identity, bool sync,
                   struct dcp_claim *ret_claim, struct dcp_error *err) DCP_MUST_CHECK;

/* Publishes.  0: committed and (with sync) durable.  DCP_E_SUPERSEDED, DCP_E_REMOVED, DCP_E_IO: not
 * committed and the claim is gone, unless *ret_outcome is DCP_OUTCOME_UNKNOWN, which
 * dcp_claim_settle resolves, or DCP_OUTCOME_COMMITTED: everybody sees the new checkpoint, but the
 * directory could not be synced, so that a power cut may bring back the old one (which therefore is
 * not swept). */
int dcp_claim_publish(struct dcp_claim *claim, const uint8_t *metadata, size_t len,
                      enum dcp_outcome *ret_outcome, struct dcp_error *err) DCP_MUST_CHECK;

/* Drops the claim, or finds out what became of it.  Never undoes a commit.  ABORTED and COMMITTED
 * are certain; SUPERSEDED: the claim is gone and the checkpoint is not ours (any more).  *err is
 * filled with SUPERSEDED, UNKNOWN and a removed directory. */
enum dcp_outcome dcp_claim_settle(struct dcp_claim *claim, struct dcp_error *err);

/* After a durable commit; else, and when another save has committed since, nothing is done.
 * *ret_swept counts removed files.  A failure here loses nothing and is only reported. */
int dcp_claim_sweep(struct dcp_claim *claim, uint64_t *ret_swept,
                    struct dcp_error *err) DCP_MUST_CHECK;

/* Removes data files of an aborted save: exactly the given names, which this process itself created
 * (not those that were there: DCP_E_EXISTS).  Files whose header tells of another save are left. */
void dcp_claim_discard(struct dcp_claim *claim, const char *const *names, size_t count);

/* The same for links (reflinked or hard) to data files of earlier saves, which this process itself
 * created: `written_by[i]` is the save that wrote the file behind names[i], and a file whose header
 * tells of any other save is left. */
void dcp_claim_discard_links(struct dcp_claim *claim, const char *const *names,
                             const struct dcp_save_id *written_by, size_t count);

/* True and rank / n for "__<rank>_<n>.distcp"; leading zeros and other decorations are not ours. */
bool dcp_data_file_parse(const char *name, uint32_t *ret_rank, uint64_t *ret_n);
/* Writes "__<rank>_<n>.distcp". */
void dcp_data_file_name(char *ret_name, size_t size, uint32_t rank, uint64_t n);

#ifdef __cplusplus
}
#endif
#endif

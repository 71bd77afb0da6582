/*
 * claim.c: taking a directory for a save: a number above all others, and every older claim fenced.
 *
 * The claim is created first and the directory is listed after that, never the other way round
 * alone: of two saves that claim at the same time, the one whose claim came to be later then sees
 * the other's, on every file system whose listings are at least as new as the caller's own last
 * change.  The later one gives way upwards, whatever the numbers say: it withdraws its claim and
 * takes one above, and only then fences.  So
 *   - when take returns, its number is above every claim, data file and reference that was there
 *     when its claim was made, and every older claim is gone;
 *   - a save whose claim is gone can never publish (the rename finds no name), and as the name
 * holds its save id, nobody else's claim can ever stand under that name. The listing before the
 * claim only guesses a number that will do.
 *
 * What killed saves left behind is cleared here, not only by the next commit: a disk that
 * they filled would never let the next save get that far.
 *
 * Threads: no state.
 */
#include "claim_scan.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "dcp_limits.h"

enum {
    /* Each further try means that yet another save claimed within milliseconds.  Jobs that go on
     * overtaking each other are a mistake to report, not a race to win. */
    CLAIM_TRIES = 3,
    CLAIM_TEXT_BYTES = 1024,
    IDENTITY_BYTES = 400,
};

/* A number must leave room for the files of a rank: they are numbered upwards from it, in 32 bits.
 */
#define HIGHEST_N0 (UINT32_MAX - DCP_MAX_FILES_PER_RANK)

/* What a look at the directory tells a claimant. */
struct survey {
    struct dcp_dir_scan scan;
    uint64_t next;  /* one above every number in use by others; 0 when there is none */
    bool leftovers; /* there are data files that nothing references */
    bool tied;      /* another claim has our number, and its name sorts before ours */
};

/* One above every listed number that matters to the claim. */
static uint64_t
next_of(const struct dcp_claim *claim, const struct dcp_buf *files)
{
    uint64_t next = 0;

    for (size_t i = 0; i < dcp_file_keys_count(files); i++) {
        uint64_t key = dcp_file_keys_at(files, i);
        if (dcp_claim_concerns(claim, (uint32_t)(key >> 32))) {
            next = dcp_max_u64(next, (uint64_t)(uint32_t)key + 1);
        }
    }
    return next;
}

static void
note_leftovers(const struct dcp_claim *claim, struct dcp_buf *references, struct survey *survey)
{
    const struct dcp_buf *files = &survey->scan.files;

    survey->leftovers = false;
    dcp_file_keys_sort(references);
    for (size_t i = 0; i < dcp_file_keys_count(files) && !survey->leftovers; i++) {
        uint64_t key = dcp_file_keys_at(files, i);
        survey->leftovers = dcp_claim_concerns(claim, (uint32_t)(key >> 32)) &&
                            !dcp_file_keys_have(references, key);
    }
}

/* A file that is referenced but gone keeps its number too: a new file under that name would
 * complete the old checkpoint with foreign bytes. */
static int
count_references(const struct dcp_claim *claim, struct survey *survey, struct dcp_error *err)
{
    struct dcp_reference_set set = {0};
    char name[DCP_CLAIM_NAME_BYTES];
    int rc;

    dcp_metadata_name(name, -1);
    rc = dcp_reference_set_add(claim, name, &set, err);
    for (size_t i = 0; rc == 0 && i < survey->scan.metadata.len / sizeof(uint32_t); i++) {
        uint32_t rank;
        memcpy(&rank, survey->scan.metadata.data + i * sizeof rank, sizeof rank);
        if (dcp_claim_concerns(claim, rank)) {
            dcp_metadata_name(name, (int32_t)rank);
            rc = dcp_reference_set_add(claim, name, &set, err);
        }
    }
    if (rc == 0) {
        /* Of any rank: the sweep of a global save takes all lower numbers for old. */
        survey->next = dcp_max_u64(survey->next, dcp_file_keys_next(&set.files));
        note_leftovers(claim, &set.files, survey);
    }
    dcp_reference_set_clean_up(&set);
    return rc;
}

static int
look(const struct dcp_claim *claim, bool with_references, struct survey *survey,
     struct dcp_error *err)
{
    int rc = dcp_dir_scan_run(claim, &survey->scan, err);

    if (rc != 0) {
        return rc;
    }
    survey->next = next_of(claim, &survey->scan.files);
    survey->tied = false;
    for (size_t i = 0; i < dcp_dir_scan_claims_count(&survey->scan); i++) {
        const struct dcp_claim_name *other = dcp_dir_scan_claim(&survey->scan, i);
        bool is_ours = strcmp(other->text, claim->name) == 0;
        if (!is_ours && (other->rank < 0 || dcp_claim_concerns(claim, (uint32_t)other->rank))) {
            survey->next = dcp_max_u64(survey->next, (uint64_t)other->n0 + 1);
            survey->tied = survey->tied || (claim->name[0] != '\0' && other->n0 == claim->n0 &&
                                            strcmp(other->text, claim->name) < 0);
        }
    }
    return with_references ? count_references(claim, survey, err) : 0;
}

static int
write_text(const struct dcp_claim *claim, int fd, const char *identity, struct dcp_error *err)
{
    char text[CLAIM_TEXT_BYTES], who[IDENTITY_BYTES], id[2 * sizeof claim->save_id.bytes + 1];
    char path[DCP_ERROR_PATH_BYTES];
    int len;

    snprintf(who, sizeof who, "%s", identity == NULL ? "unknown" : identity);
    for (char *p = who; *p != '\0'; p++) {
        *p = (unsigned char)*p < ' ' ? ' ' : *p;
    }
    for (size_t i = 0; i < sizeof claim->save_id.bytes; i++) {
        snprintf(id + 2 * i, 3, "%02x", claim->save_id.bytes[i]);
    }
    len = snprintf(text, sizeof text,
                   "dcp_native claim\nby: %s\nsave id: %s\nn0: %" PRIu64 "\ntarget: %s\n"
                   "A save of this directory is in progress, or died.  This file becomes its "
                   "metadata when it is complete; the next save removes it otherwise.\n",
                   who, id, claim->n0, claim->target);
    DCP_ASSERT(len > 0 && (size_t)len < sizeof text);
    return dcp_io_write_all(claim->io, fd, text, (size_t)len, 0,
                            dcp_claim_path(claim, claim->name, path), err);
}

static void
withdraw(struct dcp_claim *claim)
{
    /* A claim that stays behind is lower than the next one, which fences it. */
    (void)claim->io->unlink_at(claim->io->ctx, claim->dirfd, claim->name);
    claim->name[0] = '\0';
}

static int
create(struct dcp_claim *claim, uint64_t n0, const char *identity, struct dcp_error *err)
{
    const struct dcp_io *io = claim->io;
    int fd, rc, tries = 0;

    do {
        if (n0 > HIGHEST_N0) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, claim->dir_path,
                                 "file numbers of the directory have reached %" PRIu64
                                 ": save to a fresh directory",
                                 n0);
        }
        claim->n0 = n0;
        dcp_claim_name_put(claim->name, claim->rank, n0, &claim->save_id);
        do {
            fd = io->open_at(io->ctx, claim->dirfd, claim->name, O_WRONLY | O_CREAT | O_EXCL, 0666);
        } while (fd == -EINTR);
        /* Only a lost reply makes our own name exist.  That claim is below the next, which fences
         * it. */
        n0++;
    } while (fd == -EEXIST && ++tries < CLAIM_TRIES);
    if (fd < 0) {
        rc = dcp_claim_error(claim, -fd, "creating", claim->name, err);
        claim->name[0] = '\0';
        return rc;
    }
    rc = write_text(claim, fd, identity, err);
    if (io->close(io->ctx, fd) != 0 && rc == 0) {
        rc = dcp_claim_error(claim, EIO, "closing", claim->name, err);
    }
    if (rc != 0) {
        withdraw(claim);
    }
    return rc;
}

static int
fence(const struct dcp_claim *claim, const struct survey *survey, struct dcp_error *err)
{
    for (size_t i = 0; i < dcp_dir_scan_claims_count(&survey->scan); i++) {
        const struct dcp_claim_name *other = dcp_dir_scan_claim(&survey->scan, i);
        int rc;

        if (other->rank != claim->rank || other->n0 >= claim->n0) {
            continue;
        }
        do {
            rc = claim->io->unlink_at(claim->io->ctx, claim->dirfd, other->text);
        } while (rc == -EINTR);
        if (rc != 0 && rc != -ENOENT) {
            return dcp_claim_error(claim, -rc, "removing the older claim", other->text, err);
        }
    }
    return 0;
}

/* One try under the number *next.  True in *ret_taken when it stands; else *next is the number for
 * the next try. */
static int
try_claim(struct dcp_claim *claim, uint64_t *next, const char *identity, struct survey *survey,
          bool *ret_taken, struct dcp_error *err)
{
    int rc = create(claim, *next, identity, err);

    if (rc != 0) {
        return rc;
    }
    rc = look(claim, true, survey, err);
    if (rc == 0 && survey->next <= claim->n0) {
        rc = fence(claim, survey, err);
    }
    *ret_taken = rc == 0 && survey->next <= claim->n0;
    if (!*ret_taken) {
        withdraw(claim);
        /* Two that see each other under one number must not meet again under the next. */
        *next = survey->next + (survey->tied ? 1 : 0);
    }
    return rc;
}

int
dcp_claim_take(const struct dcp_io *io, int dirfd, const char *dir_path, int32_t rank,
               const struct dcp_save_id *save_id, const char *identity, bool sync,
               struct dcp_claim *ret_claim, struct dcp_error *err)
{
    struct dcp_claim claim = {
        .io = io,
        .dir_path = dir_path,
        .dirfd = dirfd,
        .rank = rank < 0 ? -1 : rank,
        .save_id = *save_id,
        .sync = sync,
    };
    struct survey survey = {0};
    bool taken = false;
    uint64_t next;
    int rc;

    dcp_metadata_name(claim.target, claim.rank);
    rc = look(&claim, false, &survey, err);
    next = survey.next;
    for (int i = 0; rc == 0 && !taken && i < CLAIM_TRIES; i++) {
        rc = try_claim(&claim, &next, identity, &survey, &taken, err);
    }
    dcp_dir_scan_clean_up(&survey.scan);
    if (rc == 0 && taken && survey.leftovers) {
        dcp_claim_clear_leftovers(&claim);
    }
    if (rc == 0 && !taken) {
        rc = dcp_error_set(err, DCP_E_SUPERSEDED, 0, dir_path,
                           "other saves claim %s again and again: let one job save to it",
                           dir_path == NULL ? "the directory" : dir_path);
    }
    if (rc == 0) {
        *ret_claim = claim;
    }
    return rc;
}

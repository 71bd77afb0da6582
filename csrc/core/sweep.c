/*
 * sweep.c: removing data files that no checkpoint needs any more.
 *
 * The save that has just committed sweeps, and only below its own number.  A file may go when
 * nothing can need it: no metadata file references it, and no claim covers it (a claim covers every
 * number from its own upwards, of its rank or of all).  The order of the looks makes that hold
 * while other saves come and go, although a walk over a directory is not a snapshot:
 *   1. list names: candidates and claims.  A number below ours that is still alive can only belong
 *      to a rank's own save, for we fenced the global ones; and its claim is older than ours, for a
 *      later one would number above.  So the claim is listed, unless it has committed since.
 *   2. read the metadata files by name: whoever has committed by now is found here.
 *   3. `.metadata` must still be ours.  If it is not, the sweep is another save's business; and if
 *      the directory was emptied and numbers began again, this is where we learn it.
 * One thing is beyond any order of looks: a directory that somebody empties and saves to again
 * between step 3 and the unlink, which knows only names.
 *
 * A save that has just claimed needs the space that killed saves took, or was left by one that was
 * killed while it swept: a disk that they filled would never let it get as far as its commit.  The
 * steps are the same, with its claim in the place of `.metadata` in step 3, and the directory is
 * synced first: the references that we read must be those that a power cut leaves.
 *   - Numbers below the highest reference are of checkpoints that were replaced.  They go, as
 * above; who still reads one keeps what it has open.
 *   - Numbers above it are of saves that never committed.  Their files are emptied and keep their
 *     names until the commit.  Were the names to go, and this save to fail, the numbers would be
 *     given out again, and a process that is slow to learn that it lost would remove a later save's
 *     file as its own.  That the claim stands is asked after the file is open: a claim is made
 * once, so the file is no younger than it, and can be nobody's who came later.
 *
 * Threads: no state.
 */
#include "claim_scan.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "dcp_record.h"

/* Keeps of the listed files those that this claim may ever sweep, sorted by rank and number. */
static void
keep_candidates(const struct dcp_claim *claim, struct dcp_buf *files)
{
    size_t kept = 0;

    for (size_t i = 0; i < dcp_file_keys_count(files); i++) {
        uint64_t key = dcp_file_keys_at(files, i);
        if ((uint32_t)key < claim->n0 && dcp_claim_concerns(claim, (uint32_t)(key >> 32))) {
            memcpy(files->data + kept++ * sizeof key, &key, sizeof key);
        }
    }
    files->len = kept * sizeof(uint64_t);
    dcp_file_keys_sort(files);
}

static bool
is_claimed(const struct dcp_dir_scan *scan, const struct dcp_claim *claim, uint64_t key)
{
    for (size_t i = 0; i < dcp_dir_scan_claims_count(scan); i++) {
        const struct dcp_claim_name *other = dcp_dir_scan_claim(scan, i);
        if (strcmp(other->text, claim->name) != 0 && other->n0 <= (uint32_t)key &&
            (other->rank < 0 || (uint32_t)other->rank == (uint32_t)(key >> 32))) {
            return true;
        }
    }
    return false;
}

/* True while the target still is what this claim published. */
static int
check_target(const struct dcp_claim *claim, bool *ret_ours, struct dcp_error *err)
{
    struct dcp_save_id id;
    bool present;
    int rc = dcp_claim_read_save_id(claim, claim->target, &present, &id, err);

    *ret_ours = rc == 0 && present && memcmp(&id, &claim->save_id, sizeof id) == 0;
    return rc;
}

/* References of every metadata file but the claim's target: once that is ours, its files all have
 * our number or a higher one.  Files of ranks that have candidates are opened by name: a rename
 * during the walk hides both names from it. */
static int
gather_references(const struct dcp_claim *claim, const struct dcp_dir_scan *scan,
                  struct dcp_reference_set *set, struct dcp_error *err)
{
    char name[DCP_CLAIM_NAME_BYTES];
    struct dcp_buf ranks = {0};
    uint64_t last = UINT64_MAX;
    int rc = 0;

    if (claim->rank >= 0) {
        /* Other ranks' metadata never names this rank's files. */
        dcp_metadata_name(name, -1);
        return dcp_reference_set_add(claim, name, set, err);
    }
    for (size_t i = 0; i < dcp_file_keys_count(&scan->files); i++) {
        uint64_t rank = dcp_file_keys_at(&scan->files, i) >> 32;
        if (rank <= INT32_MAX) {
            dcp_buf_put(&ranks, &rank, sizeof rank);
        }
    }
    for (size_t i = 0; i < scan->metadata.len / sizeof(uint32_t); i++) {
        uint32_t listed;
        memcpy(&listed, scan->metadata.data + i * sizeof listed, sizeof listed);
        uint64_t rank = listed;
        dcp_buf_put(&ranks, &rank, sizeof rank);
    }
    rc = dcp_buf_check(&ranks, err);
    if (rc == 0) {
        dcp_file_keys_sort(&ranks);
    }
    for (size_t i = 0; rc == 0 && i < dcp_file_keys_count(&ranks) && !set->incomplete; i++) {
        if (dcp_file_keys_at(&ranks, i) != last) {
            last = dcp_file_keys_at(&ranks, i);
            dcp_metadata_name(name, (int32_t)last);
            rc = dcp_reference_set_add(claim, name, set, err);
        }
    }
    dcp_buf_clean_up(&ranks);
    return rc;
}

static int
remove_files(const struct dcp_claim *claim, const struct dcp_dir_scan *scan,
             struct dcp_reference_set *set, uint64_t *ret_swept, struct dcp_error *err)
{
    char name[DCP_CLAIM_NAME_BYTES];
    int first = 0;

    dcp_file_keys_sort(&set->files);
    for (size_t i = 0; i < dcp_file_keys_count(&scan->files); i++) {
        uint64_t key = dcp_file_keys_at(&scan->files, i);
        int rc;

        if (is_claimed(scan, claim, key) || dcp_file_keys_have(&set->files, key)) {
            continue;
        }
        dcp_data_file_name(name, sizeof name, (uint32_t)(key >> 32), (uint32_t)key);
        do {
            rc = claim->io->unlink_at(claim->io->ctx, claim->dirfd, name);
        } while (rc == -EINTR);
        if (rc == 0) {
            (*ret_swept)++;
        } else if (rc != -ENOENT && first == 0) {
            first = dcp_claim_error(claim, -rc, "removing the unused file", name, err);
        }
    }
    return first;
}

int
dcp_claim_sweep(struct dcp_claim *claim, uint64_t *ret_swept, struct dcp_error *err)
{
    struct dcp_dir_scan scan = {0};
    struct dcp_reference_set set = {0};
    bool ours = false;
    int rc;

    *ret_swept = 0;
    if (claim->outcome != DCP_OUTCOME_COMMITTED || !claim->durable) {
        return 0;
    }
    rc = dcp_dir_scan_run(claim, &scan, err);
    if (rc == 0) {
        keep_candidates(claim, &scan.files);
    }
    if (rc == 0 && scan.files.len > 0) {
        rc = gather_references(claim, &scan, &set, err);
        if (rc == 0) {
            rc = check_target(claim, &ours, err);
        }
        if (rc == 0 && ours && !set.incomplete) {
            rc = remove_files(claim, &scan, &set, ret_swept, err);
        }
    }
    dcp_dir_scan_clean_up(&scan);
    dcp_reference_set_clean_up(&set);
    return rc;
}

/* ---- what failed saves left ---- */

/* Keeps of the candidates those that nothing references and no claim covers. */
static void
keep_leftovers(const struct dcp_claim *claim, const struct dcp_dir_scan *scan,
               struct dcp_buf *references, struct dcp_buf *files)
{
    size_t kept = 0;

    dcp_file_keys_sort(references);
    for (size_t i = 0; i < dcp_file_keys_count(files); i++) {
        uint64_t key = dcp_file_keys_at(files, i);
        if (!dcp_file_keys_have(references, key) && !is_claimed(scan, claim, key)) {
            memcpy(files->data + kept++ * sizeof key, &key, sizeof key);
        }
    }
    files->len = kept * sizeof(uint64_t);
}

/* The metadata as we see it must be what a power cut leaves, before anything goes because of it. */
static bool
names_are_durable(const struct dcp_claim *claim)
{
    return !claim->sync || dcp_io_sync(claim->io, claim->dirfd) == 0;
}

/* How many bytes of a header there are; negative when they cannot be read. */
static ssize_t
read_head(const struct dcp_io *io, int fd, uint8_t bytes[DCP_FILE_HEADER_BYTES])
{
    ssize_t n;

    do {
        n = io->pread(io->ctx, fd, bytes, DCP_FILE_HEADER_BYTES, 0);
    } while (n == -EINTR);
    return n;
}

/* Whether a file that nothing references is ours to clear.  An empty one is: killed before its
 * first write, it may have its whole length reserved.  Stock torch's are left to the commit. */
static bool
is_ours(const struct dcp_io *io, int fd)
{
    uint8_t bytes[DCP_FILE_HEADER_BYTES];
    struct dcp_save_id id;
    ssize_t n = read_head(io, fd, bytes);

    return n == 0 || (n > 0 && dcp_claim_file_save_id(bytes, (size_t)n, &id));
}

/* A file with a second name is not emptied: that may be an older checkpoint's, and it takes no
 * space of its own. */
static void
clear_file(const struct dcp_claim *claim, const char *name, bool replaced)
{
    const struct dcp_io *io = claim->io;
    /* Never through a link to somebody else's file, and a pipe must not hold the claim up. */
    int flags = (replaced ? O_RDONLY : O_RDWR) | O_NOFOLLOW | O_NONBLOCK;
    int fd = io->open_at(io->ctx, claim->dirfd, name, flags, 0);
    struct dcp_stat st;

    if (fd < 0) {
        return;
    }
    if (is_ours(io, fd) && dcp_io_exists(io, claim->dirfd, claim->name)) {
        if (replaced) {
            (void)io->unlink_at(io->ctx, claim->dirfd, name);
        } else if (io->fstat(io->ctx, fd, &st) == 0 && st.links == 1) {
            (void)io->truncate(io->ctx, fd, 0);
        }
    }
    io->close(io->ctx, fd);
}

static void
clear_files(const struct dcp_claim *claim, const struct dcp_buf *references,
            const struct dcp_buf *files)
{
    uint64_t next = dcp_file_keys_next(references);

    for (size_t i = 0; i < dcp_file_keys_count(files); i++) {
        uint64_t key = dcp_file_keys_at(files, i);
        char name[DCP_CLAIM_NAME_BYTES];

        dcp_data_file_name(name, sizeof name, (uint32_t)(key >> 32), (uint32_t)key);
        clear_file(claim, name, (uint64_t)(uint32_t)key + 1 < next);
    }
}

void
dcp_claim_clear_leftovers(const struct dcp_claim *claim)
{
    struct dcp_dir_scan scan = {0};
    struct dcp_reference_set set = {0};
    struct dcp_error ignored;
    int rc;

    dcp_error_clear(&ignored);
    rc = dcp_dir_scan_run(claim, &scan, &ignored);
    if (rc == 0) {
        keep_candidates(claim, &scan.files);
        rc = gather_references(claim, &scan, &set, &ignored);
    }
    if (rc == 0) {
        rc = dcp_reference_set_add(claim, claim->target, &set, &ignored);
    }
    if (rc == 0 && !set.incomplete) {
        keep_leftovers(claim, &scan, &set.files, &scan.files);
        if (scan.files.len > 0 && names_are_durable(claim)) {
            clear_files(claim, &set.files, &scan.files);
        }
    }
    dcp_dir_scan_clean_up(&scan);
    dcp_reference_set_clean_up(&set);
}

/* ---- what this save leaves when it fails ---- */

/* Unlinks a file, unless its header says that another save than `written_by` wrote it. */
static void
discard(const struct dcp_claim *claim, const char *name, const struct dcp_save_id *written_by)
{
    const struct dcp_io *io = claim->io;
    uint8_t bytes[DCP_FILE_HEADER_BYTES];
    struct dcp_save_id id;
    bool foreign = false;
    int fd = io->open_at(io->ctx, claim->dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0);

    if (fd >= 0) {
        ssize_t n = read_head(io, fd, bytes);
        foreign = n > 0 && dcp_claim_file_save_id(bytes, (size_t)n, &id) &&
                  memcmp(&id, written_by, sizeof id) != 0;
        io->close(io->ctx, fd);
    }
    if (!foreign) {
        /* What stays behind is swept by the next save that commits. */
        (void)io->unlink_at(io->ctx, claim->dirfd, name);
    }
}

void
dcp_claim_discard(struct dcp_claim *claim, const char *const *names, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        discard(claim, names[i], &claim->save_id);
    }
}

void
dcp_claim_discard_links(struct dcp_claim *claim, const char *const *names,
                        const struct dcp_save_id *written_by, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        discard(claim, names[i], &written_by[i]);
    }
}

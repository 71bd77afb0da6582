/*
 * sweep.c: removing data files that no checkpoint needs any more.
 *
 * Only the save that has just committed sweeps, and only below its own number.  A file may go when
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
 * Threads: no state.
 */
#include "claim_scan.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "dcp_record.h"

static int
compare_keys(const void *a, const void *b)
{
    uint64_t x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return x < y ? -1 : x > y;
}

static size_t
keys_count(const struct dcp_buf *keys)
{
    return keys->len / sizeof(uint64_t);
}

static uint64_t
key_at(const struct dcp_buf *keys, size_t i)
{
    uint64_t key;
    memcpy(&key, keys->data + i * sizeof key, sizeof key);
    return key;
}

static void
sort_keys(struct dcp_buf *keys)
{
    if (keys->len > 0) {
        qsort(keys->data, keys_count(keys), sizeof(uint64_t), compare_keys);
    }
}

/* Keeps of the listed files those that this claim may ever sweep, sorted by rank and number. */
static void
keep_candidates(const struct dcp_claim *claim, struct dcp_buf *files)
{
    size_t kept = 0;

    for (size_t i = 0; i < keys_count(files); i++) {
        uint64_t key = key_at(files, i);
        if ((uint32_t)key < claim->n0 &&
            (claim->rank < 0 || (uint32_t)claim->rank == (uint32_t)(key >> 32))) {
            memcpy(files->data + kept++ * sizeof key, &key, sizeof key);
        }
    }
    files->len = kept * sizeof(uint64_t);
    sort_keys(files);
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

/* References of every metadata file but our own, whose files all have our number or a higher one.
 * Files of ranks that have candidates are opened by name: a rename during the walk hides both names
 * from it. */
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
    for (size_t i = 0; i < keys_count(&scan->files); i++) {
        uint64_t rank = key_at(&scan->files, i) >> 32;
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
        sort_keys(&ranks);
    }
    for (size_t i = 0; rc == 0 && i < keys_count(&ranks) && !set->incomplete; i++) {
        if (key_at(&ranks, i) != last) {
            last = key_at(&ranks, i);
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

    sort_keys(&set->files);
    for (size_t i = 0; i < keys_count(&scan->files); i++) {
        uint64_t key = key_at(&scan->files, i);
        int rc;

        if (is_claimed(scan, claim, key) ||
            (set->files.len > 0 && bsearch(&key, set->files.data, keys_count(&set->files),
                                           sizeof key, compare_keys) != NULL)) {
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

/* Unlinks a file, unless its header says that another save than `written_by` wrote it. */
static void
discard(const struct dcp_claim *claim, const char *name, const struct dcp_save_id *written_by)
{
    const struct dcp_io *io = claim->io;
    uint8_t bytes[DCP_FILE_HEADER_BYTES];
    struct dcp_file_header header;
    struct dcp_error ignored;
    bool foreign = false;
    int fd = io->open_at(io->ctx, claim->dirfd, name, O_RDONLY, 0);

    if (fd >= 0) {
        dcp_error_clear(&ignored);
        foreign = dcp_io_read_all(io, fd, bytes, sizeof bytes, 0, name, &ignored) == 0 &&
                  dcp_file_parse_header(bytes, &header, &ignored) == 0 &&
                  memcmp(&header.save_id, written_by, sizeof header.save_id) != 0;
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

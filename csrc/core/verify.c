/*
 * verify.c: one checkpoint, checked from its metadata down to its bytes.
 *
 * The order: names of the directory, metadata, chunks of every tensor, data files in their order.
 * A problem is noted and the check goes on.  Whatever looks like damage may also be a checkpoint
 * that a newer save replaces and sweeps while it is read: so before problems are believed, the
 * metadata is read once more, and when it has changed the check starts over with the new one.
 *
 * `.metadata` speaks for all ranks.  Only where it is absent do the files of single ranks count, as
 * for a load.
 *
 * Threads: no state; dcp_verify_run may run several times at once.
 */
#include "verify.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "claim_scan.h"

enum {
    /* How many saves in a row may replace a checkpoint under us. */
    TRIES = 10,
    /* Of a problem's text: keys may be a megabyte long. */
    TENSOR_TEXT_BYTES = 4096,
};

/* ---- problems ---- */

int
dcp_verify_check_cancel(const struct dcp_verify_options *options, struct dcp_error *err)
{
    if (options->cancel != NULL &&
        atomic_load_explicit(options->cancel, memory_order_relaxed) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the check was cancelled");
    }
    return 0;
}

static const char *
keep_text(struct dcp_verify_result *result, const char *text, size_t len)
{
    char *kept = dcp_bump_alloc(&result->strings, len + 1, 1);
    if (kept != NULL) {
        memcpy(kept, text, len);
        kept[len] = '\0';
    }
    return kept;
}

int
dcp_verify_note(struct dcp_verifier *v, uint32_t index, const char *file,
                const struct dcp_error *why, struct dcp_error *err)
{
    struct dcp_verify_result *result = v->result;
    uint32_t most =
        v->options->problems_most != 0 ? v->options->problems_most : DCP_VERIFY_PROBLEMS;
    if (dcp_verify_is_fatal(why->code)) {
        if (err->code == 0) {
            *err = *why;
        }
        return why->code;
    }
    result->problems_found++;
    if (result->problems_count == most) {
        return 0;
    }
    struct dcp_verify_problem *problems =
        dcp_realloc(result->problems, (result->problems_count + 1) * sizeof *problems);
    if (problems != NULL) {
        result->problems = problems;
        struct dcp_verify_problem *problem = &problems[result->problems_count];
        const struct dcp_md_entry *entry =
            index == DCP_VERIFY_NO_ENTRY ? NULL : &v->md->entries[index];
        *problem = (struct dcp_verify_problem){
            .code = why->code, .sys_errno = why->sys_errno, .offset_bytes = why->offset_bytes};
        problem->tensor = entry == NULL
                              ? ""
                              : keep_text(result, v->md->strings + entry->name,
                                          (size_t)dcp_min_u64(entry->name_len, TENSOR_TEXT_BYTES));
        problem->file = file == NULL ? "" : keep_text(result, file, strlen(file));
        problem->what = keep_text(result, why->message, strlen(why->message));
        if (problem->tensor != NULL && problem->file != NULL && problem->what != NULL) {
            result->problems_count++;
            return 0;
        }
    }
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a list of problems");
}

static void
forget(struct dcp_verify_result *result)
{
    uint32_t replaced_count = result->replaced_count;
    dcp_verify_result_clean_up(result);
    result->replaced_count = replaced_count;
}

void
dcp_verify_result_clean_up(struct dcp_verify_result *result)
{
    if (result == NULL) {
        return;
    }
    dcp_free(result->problems);
    dcp_free(result->ranks);
    dcp_bump_clean_up(&result->strings);
    memset(result, 0, sizeof *result);
}

/* ---- the directory ---- */

static int
compare_ranks(const void *left, const void *right)
{
    const uint32_t *a = left, *b = right;
    return *a < *b ? -1 : *a > *b;
}

static int
note_absent(struct dcp_verifier *v, const struct dcp_claim *where, const struct dcp_dir_scan *scan,
            struct dcp_error *err)
{
    struct dcp_error why;
    size_t claims_count = dcp_dir_scan_claims_count(scan);
    if (dcp_claim_dir_removed(where)) {
        return dcp_error_set(err, DCP_E_NOENT, ENOENT, v->dir_path, "%s was removed", v->dir_path);
    }
    if (v->options->part != 0) {
        return 0;
    }
    dcp_error_clear(&why);
    dcp_error_set(&why, DCP_E_NOENT, ENOENT, v->dir_path,
                  claims_count > 0 ? "there is no .metadata: the save of this checkpoint is in "
                                     "flight, or it was stopped (%s)"
                                   : "there is no .metadata: no checkpoint was saved here whole",
                  claims_count > 0 ? dcp_dir_scan_claim(scan, 0)->text : "");
    return dcp_verify_note(v, DCP_VERIFY_NO_ENTRY, ".metadata", &why, err);
}

/* Whether a data file belongs to the checkpoint although it holds no record of it: threads of the
 * writer that had nothing to write leave such files. */
static bool
is_own_file(struct dcp_verifier *v, uint64_t key)
{
    char name[DCP_CLAIM_NAME_BYTES];
    struct dcp_save_id id;
    struct dcp_buf bytes = {0};
    struct dcp_error ignored;
    dcp_data_file_name(name, sizeof name, (uint32_t)(key >> 32), (uint32_t)key);
    dcp_error_clear(&ignored);
    bool is_own =
        v->result->is_native &&
        dcp_io_read_file(v->io, v->dirfd, name, DCP_FILE_HEADER_BYTES, &bytes, &ignored) == 0 &&
        dcp_claim_file_save_id(bytes.data, bytes.len, &id) &&
        memcmp(&id, &v->result->save_id, sizeof id) == 0;
    dcp_buf_clean_up(&bytes);
    return is_own;
}

/* Data files that no metadata names. */
static int
count_leftovers(struct dcp_verifier *v, const struct dcp_claim *where,
                const struct dcp_dir_scan *scan, struct dcp_reference_set *references,
                struct dcp_error *err)
{
    size_t files_count = dcp_file_keys_count(&scan->files);
    uint32_t rank;
    int rc = 0;
    v->result->claims_count = dcp_dir_scan_claims_count(scan);
    size_t ranks_count = v->result->ranks_count > 0 ? 0 : scan->metadata.len / sizeof rank;
    for (size_t i = 0; rc == 0 && i < ranks_count; i++) {
        char name[DCP_CLAIM_NAME_BYTES];
        memcpy(&rank, scan->metadata.data + i * sizeof rank, sizeof rank);
        dcp_metadata_name(name, (int32_t)rank);
        rc = dcp_reference_set_add(where, name, references, err);
    }
    if (rc != 0 || references->incomplete) {
        return rc;
    }
    dcp_file_keys_sort(&references->files);
    for (size_t i = 0; i < files_count; i++) {
        uint64_t key = dcp_file_keys_at(&scan->files, i);
        bool is_known = dcp_file_keys_have(&references->files, key) || is_own_file(v, key);
        v->result->unreferenced_files_count += !is_known;
    }
    return 0;
}

static int
check_ranks(struct dcp_verifier *v, const struct dcp_dir_scan *scan,
            struct dcp_reference_set *references, struct dcp_error *err)
{
    struct dcp_verify_result *result = v->result;
    size_t count = scan->metadata.len / sizeof *result->ranks;
    int rc = 0;
    result->ranks = dcp_malloc_array(count, sizeof *result->ranks);
    if (result->ranks == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for %zu ranks", count);
    }
    memcpy(result->ranks, scan->metadata.data, scan->metadata.len);
    result->ranks_count = (uint32_t)count;
    qsort(result->ranks, count, sizeof *result->ranks, compare_ranks);
    for (size_t i = 0; rc == 0 && i < count; i++) {
        rc = dcp_verify_set(v, (int32_t)result->ranks[i], references, err);
    }
    return rc == DCP_E_NOENT && err->code == 0 ? DCP_E_STALE : rc;
}

static int
check_sets(struct dcp_verifier *v, const struct dcp_claim *where, struct dcp_dir_scan *scan,
           struct dcp_reference_set *references, struct dcp_error *err)
{
    int rc = dcp_dir_scan_run(where, scan, err);
    if (rc == DCP_E_REMOVED) {
        dcp_error_clear(err);
        return note_absent(v, where, scan, err);
    }
    if (rc == 0) {
        rc = dcp_verify_set(v, -1, references, err);
    }
    if (rc != DCP_E_NOENT || err->code != 0) {
        return rc;
    }
    return scan->metadata.len > 0 ? check_ranks(v, scan, references, err)
                                  : note_absent(v, where, scan, err);
}

static int
check_directory(struct dcp_verifier *v, struct dcp_error *err)
{
    struct dcp_dir_scan scan = {.claims = {0}};
    struct dcp_reference_set references = {.incomplete = false};
    v->files_seen = 0;
    v->dirfd = v->io->open_dir(v->io->ctx, v->dir_path);
    if (v->dirfd < 0) {
        return dcp_error_set(err, v->dirfd == -ENOENT ? DCP_E_NOENT : DCP_E_IO, -v->dirfd,
                             v->dir_path, "opening the checkpoint's directory %s failed: %s",
                             v->dir_path, strerror(-v->dirfd));
    }
    struct dcp_claim where = {.io = v->io, .dir_path = v->dir_path, .dirfd = v->dirfd, .rank = -1};
    int rc = check_sets(v, &where, &scan, &references, err);
    if (rc == 0) {
        rc = count_leftovers(v, &where, &scan, &references, err);
    }
    dcp_reference_set_clean_up(&references);
    dcp_dir_scan_clean_up(&scan);
    v->io->close(v->io->ctx, v->dirfd);
    return rc;
}

int
dcp_verify_run(const struct dcp_io *io, const char *dir_path,
               const struct dcp_verify_options *options, struct dcp_verify_result *ret_result,
               struct dcp_error *err)
{
    uint64_t start_ns = dcp_engine_now_ns();
    struct dcp_verify_result result = {.problems_count = 0};
    struct dcp_verifier v = {.io = io, .dir_path = dir_path, .options = options, .result = &result};
    int rc = 0;
    if (options->level == DCP_VERIFY_FULL) {
        rc = dcp_verify_stream_init(&v.stream, io, options, err);
    }
    for (int tries = 0; rc == 0; tries++) {
        rc = check_directory(&v, err);
        if (rc != DCP_E_STALE || err->code != 0) {
            break;
        }
        if (tries == TRIES) {
            rc = dcp_error_set(err, DCP_E_STALE, 0, dir_path,
                               "%s was replaced %d times while it was checked", dir_path, TRIES);
            break;
        }
        result.replaced_count++;
        forget(&result);
        rc = 0;
    }
    result.read_bytes = v.stream.read_bytes;
    result.wall_ns = dcp_engine_now_ns() - start_ns;
    dcp_verify_stream_clean_up(&v.stream);
    dcp_buf_clean_up(&v.crcs);
    dcp_buf_clean_up(&v.made);
    dcp_buf_clean_up(&v.window);
    if (rc != 0) {
        dcp_verify_result_clean_up(&result);
        return rc;
    }
    *ret_result = result;
    return 0;
}

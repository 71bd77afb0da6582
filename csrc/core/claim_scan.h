/*
 * claim_scan.h: what lies in a checkpoint directory, as the commit protocol sees it (private to
 * claim*.c, commit.c and sweep.c; save_space.c asks for the name of a claim).
 */
#ifndef DCP_CORE_CLAIM_SCAN_H
#define DCP_CORE_CLAIM_SCAN_H

#include <string.h>

#include "dcp_commit.h"

/* A claim file, from its name alone: its text may be cut short by a crash. */
struct dcp_claim_name {
    int32_t rank; /* -1: the global claim */
    uint32_t n0;
    char text[DCP_CLAIM_NAME_BYTES];
};

/* rank and n of a data file as one number, for sorting. */
static inline uint64_t
dcp_file_key(uint32_t rank, uint64_t n)
{
    return (uint64_t)rank << 32 | (uint32_t)n;
}

/* ---- arrays of keys ---- */

static inline size_t
dcp_file_keys_count(const struct dcp_buf *keys)
{
    return keys->len / sizeof(uint64_t);
}

static inline uint64_t
dcp_file_keys_at(const struct dcp_buf *keys, size_t i)
{
    uint64_t key;
    memcpy(&key, keys->data + i * sizeof key, sizeof key);
    return key;
}

/* One above every file number; 0 without any. */
uint64_t dcp_file_keys_next(const struct dcp_buf *keys);
/* Sorted once, then asked. */
void dcp_file_keys_sort(struct dcp_buf *keys);
bool dcp_file_keys_have(const struct dcp_buf *sorted_keys, uint64_t key);

/* One walk over the directory.  Zero-initialised is an empty one. */
struct dcp_dir_scan {
    struct dcp_buf claims;   /* struct dcp_claim_name */
    struct dcp_buf files;    /* uint64_t: dcp_file_key of each data file */
    struct dcp_buf metadata; /* uint32_t: rank of each __<rank>.metadata */
};

/* Forgets what *scan held and walks.  DCP_E_REMOVED when the directory is gone. */
int dcp_dir_scan_run(const struct dcp_claim *claim, struct dcp_dir_scan *scan,
                     struct dcp_error *err) DCP_MUST_CHECK;
void dcp_dir_scan_clean_up(struct dcp_dir_scan *scan);

static inline size_t
dcp_dir_scan_claims_count(const struct dcp_dir_scan *scan)
{
    return scan->claims.len / sizeof(struct dcp_claim_name);
}

static inline const struct dcp_claim_name *
dcp_dir_scan_claim(const struct dcp_dir_scan *scan, size_t i)
{
    return (const struct dcp_claim_name *)(const void *)scan->claims.data + i;
}

/* A global claim is about all files; one of a rank about that rank's. */
static inline bool
dcp_claim_concerns(const struct dcp_claim *claim, uint32_t rank)
{
    return claim->rank < 0 || (uint32_t)claim->rank == rank;
}

/* Data files that metadata files name. */
struct dcp_reference_set {
    struct dcp_buf files; /* uint64_t: dcp_file_key */
    bool incomplete;      /* some metadata file could not be read: any file may be referenced */
};

/* Adds what the metadata file `name` references; an absent one references nothing.  Fails only for
 * want of memory: what cannot be read makes the set incomplete. */
int dcp_reference_set_add(const struct dcp_claim *claim, const char *name,
                          struct dcp_reference_set *set, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_reference_set_clean_up(struct dcp_reference_set *set);

/* The save id in the footer of the metadata file `name`, zero when it has none or there is no such
 * file (then *ret_present is false). */
int dcp_claim_read_save_id(const struct dcp_claim *claim, const char *name, bool *ret_present,
                           struct dcp_save_id *ret_id, struct dcp_error *err) DCP_MUST_CHECK;

void dcp_claim_name_put(char *ret_name, int32_t rank, uint64_t n0, const struct dcp_save_id *id);
bool dcp_claim_name_parse(const char *name, struct dcp_claim_name *ret);
void dcp_metadata_name(char *ret_name, int32_t rank);

/* True when the directory itself is gone, not only a file of it. */
bool dcp_claim_dir_removed(const struct dcp_claim *claim);
/* Fills *err from a failed call on `name`: DCP_E_REMOVED when the directory is gone, else DCP_E_IO.
 * `what` says what was tried. */
int dcp_claim_error(const struct dcp_claim *claim, int sys_errno, const char *what,
                    const char *name, struct dcp_error *err);
/* The same of a failed fsync, after which nothing of the file can be relied on. */
int dcp_claim_sync_error(const struct dcp_claim *claim, int sys_errno, const char *what,
                         const char *name, struct dcp_error *err);
/* "<directory>/<name>" for messages.  Returns `path`. */
const char *dcp_claim_path(const struct dcp_claim *claim, const char *name,
                           char path[DCP_ERROR_PATH_BYTES]);

/* Once the claim stands: frees the space of data files that nothing references, so that it is there
 * for this save (sweep.c).  Whatever fails is left for the next commit. */
void dcp_claim_clear_leftovers(const struct dcp_claim *claim);

/* ---- claim_references.c, which is all that the protocol knows of our formats.  The model test
 * links its own three functions and runs on a format of a few bytes. */

/* Non-zero stops the walk and is returned. */
typedef int (*dcp_reference_fn)(void *ctx, const char *name, size_t len);

int dcp_claim_references(const uint8_t *image, size_t len, dcp_reference_fn fn, void *fn_ctx,
                         struct dcp_error *err) DCP_MUST_CHECK;
bool dcp_claim_image_save_id(const uint8_t *image, size_t len, struct dcp_save_id *ret_id);
/* Whose data file begins with `bytes`; `len`: DCP_FILE_HEADER_BYTES, or all of a shorter file.
 * False when it is none of ours. */
bool dcp_claim_file_save_id(const uint8_t *bytes, size_t len, struct dcp_save_id *ret_id);

#endif

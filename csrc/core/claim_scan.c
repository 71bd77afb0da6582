/*
 * claim_scan.c: names of the protocol, one walk over a directory, and what metadata files
 * reference.
 *
 * A name counts only if it is written exactly as we (and torch) write it: no leading zeros, no
 * signs, numbers of 32 bits.  Everything else in the directory is somebody else's and is not even
 * looked at.  A walk is not a snapshot: names that come or go while it runs may be missed or seen,
 * and a network file system may serve an old listing, though never one older than this process's
 * own last change to the directory.  commit.c is written for that.
 *
 * Threads: no state.
 */
#include "claim_scan.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dcp_limits.h"
#include "io_explain.h"

#define CLAIM_PREFIX ".dcp_native-claim-"

/* The first half of the save id: 64 random bits keep names apart, and 16 digits fit the name. */
enum { CLAIM_ID_BYTES = 8 };

/* ---- names ---- */

/* A decimal number of 32 bits without decoration; *at moves behind it. */
static bool
parse_u32(const char **at, uint32_t *ret)
{
    const char *p = *at;
    uint64_t value = 0;

    if (*p < '0' || *p > '9' || (*p == '0' && p[1] >= '0' && p[1] <= '9')) {
        return false;
    }
    for (; *p >= '0' && *p <= '9'; p++) {
        value = value * 10 + (uint64_t)(*p - '0');
        if (value > UINT32_MAX) {
            return false;
        }
    }
    *at = p;
    *ret = (uint32_t)value;
    return true;
}

static bool
parse_text(const char **at, const char *text)
{
    size_t len = strlen(text);

    if (strncmp(*at, text, len) != 0) {
        return false;
    }
    *at += len;
    return true;
}

bool
dcp_data_file_parse(const char *name, uint32_t *ret_rank, uint64_t *ret_n)
{
    uint32_t rank, n;

    if (!parse_text(&name, "__") || !parse_u32(&name, &rank) || !parse_text(&name, "_") ||
        !parse_u32(&name, &n) || strcmp(name, ".distcp") != 0) {
        return false;
    }
    *ret_rank = rank;
    *ret_n = n;
    return true;
}

void
dcp_data_file_name(char *ret_name, size_t size, uint32_t rank, uint64_t n)
{
    int len = snprintf(ret_name, size, "__%" PRIu32 "_%" PRIu64 ".distcp", rank, n);

    DCP_ASSERT(len > 0 && (size_t)len < size);
    (void)len;
}

void
dcp_metadata_name(char *ret_name, int32_t rank)
{
    if (rank < 0) {
        snprintf(ret_name, DCP_CLAIM_NAME_BYTES, ".metadata");
    } else {
        snprintf(ret_name, DCP_CLAIM_NAME_BYTES, "__%" PRId32 ".metadata", rank);
    }
}

static bool
parse_rank_metadata(const char *name, uint32_t *ret_rank)
{
    return parse_text(&name, "__") && parse_u32(&name, ret_rank) &&
           strcmp(name, ".metadata") == 0 && *ret_rank <= INT32_MAX;
}

void
dcp_claim_name_put(char *ret_name, int32_t rank, uint64_t n0, const struct dcp_save_id *id)
{
    static const char digits[] = "0123456789abcdef";
    char hex[2 * CLAIM_ID_BYTES + 1];
    char of_rank[16] = "";
    int len;

    for (size_t i = 0; i < CLAIM_ID_BYTES; i++) {
        hex[2 * i] = digits[id->bytes[i] >> 4];
        hex[2 * i + 1] = digits[id->bytes[i] & 15];
    }
    hex[sizeof hex - 1] = '\0';
    if (rank >= 0) {
        snprintf(of_rank, sizeof of_rank, "r%" PRId32 "-", rank);
    }
    len =
        snprintf(ret_name, DCP_CLAIM_NAME_BYTES, CLAIM_PREFIX "%s%" PRIu64 "-%s", of_rank, n0, hex);
    DCP_ASSERT(len > 0 && len < DCP_CLAIM_NAME_BYTES);
    (void)len;
}

bool
dcp_claim_name_parse(const char *name, struct dcp_claim_name *ret)
{
    const char *at = name;
    uint32_t rank = 0, n0;
    bool of_rank;

    if (!parse_text(&at, CLAIM_PREFIX)) {
        return false;
    }
    of_rank = parse_text(&at, "r");
    if (of_rank && (!parse_u32(&at, &rank) || rank > INT32_MAX || !parse_text(&at, "-"))) {
        return false;
    }
    if (!parse_u32(&at, &n0) || !parse_text(&at, "-") ||
        strspn(at, "0123456789abcdef") != 2 * CLAIM_ID_BYTES || at[2 * CLAIM_ID_BYTES] != '\0') {
        return false;
    }
    ret->rank = of_rank ? (int32_t)rank : -1;
    ret->n0 = n0;
    snprintf(ret->text, sizeof ret->text, "%s", name);
    return true;
}

/* ---- keys ---- */

static int
compare_keys(const void *a, const void *b)
{
    uint64_t x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return x < y ? -1 : x > y;
}

uint64_t
dcp_file_keys_next(const struct dcp_buf *keys)
{
    uint64_t next = 0;

    for (size_t i = 0; i < dcp_file_keys_count(keys); i++) {
        next = dcp_max_u64(next, (uint64_t)(uint32_t)dcp_file_keys_at(keys, i) + 1);
    }
    return next;
}

void
dcp_file_keys_sort(struct dcp_buf *keys)
{
    if (keys->len > 0) {
        qsort(keys->data, keys->len / sizeof(uint64_t), sizeof(uint64_t), compare_keys);
    }
}

bool
dcp_file_keys_have(const struct dcp_buf *sorted_keys, uint64_t key)
{
    return sorted_keys->len > 0 && bsearch(&key, sorted_keys->data, sorted_keys->len / sizeof key,
                                           sizeof key, compare_keys) != NULL;
}

/* ---- errors ---- */

bool
dcp_claim_dir_removed(const struct dcp_claim *claim)
{
    struct dcp_stat st;
    int rc;

    do {
        rc = claim->io->fstat(claim->io->ctx, claim->dirfd, &st);
    } while (rc == -EINTR);
    return rc == -ESTALE || rc == -ENOENT || (rc == 0 && st.links == 0);
}

const char *
dcp_claim_path(const struct dcp_claim *claim, const char *name, char path[DCP_ERROR_PATH_BYTES])
{
    if (claim->dir_path == NULL) {
        snprintf(path, DCP_ERROR_PATH_BYTES, "%s", name);
    } else {
        snprintf(path, DCP_ERROR_PATH_BYTES, "%s/%s", claim->dir_path, name);
    }
    return path;
}

static int
tell(const struct dcp_claim *claim, int sys_errno, bool syncing, const char *what, const char *name,
     struct dcp_error *err)
{
    char path[DCP_ERROR_PATH_BYTES], why[DCP_IO_EXPLAIN_BYTES];
    const struct dcp_io_trouble trouble = {
        .io = claim->io, .fd = claim->dirfd, .sys_errno = sys_errno, .syncing = syncing};

    if ((sys_errno == ENOENT || sys_errno == ESTALE) && dcp_claim_dir_removed(claim)) {
        return dcp_error_set(err, DCP_E_REMOVED, sys_errno, claim->dir_path,
                             "%s was removed while it was being saved to; nothing was committed",
                             claim->dir_path == NULL ? "the directory" : claim->dir_path);
    }
    dcp_claim_path(claim, name, path);
    return dcp_error_set(err, DCP_E_IO, sys_errno, path, "%s %s failed: %s", what, path,
                         dcp_io_explain(&trouble, why));
}

int
dcp_claim_error(const struct dcp_claim *claim, int sys_errno, const char *what, const char *name,
                struct dcp_error *err)
{
    return tell(claim, sys_errno, false, what, name, err);
}

int
dcp_claim_sync_error(const struct dcp_claim *claim, int sys_errno, const char *what,
                     const char *name, struct dcp_error *err)
{
    return tell(claim, sys_errno, true, what, name, err);
}

/* ---- the walk ---- */

static int
note_name(void *ctx, const char *name)
{
    struct dcp_dir_scan *scan = ctx;
    struct dcp_claim_name claim;
    uint32_t rank;
    uint64_t n;

    if (dcp_data_file_parse(name, &rank, &n)) {
        uint64_t key = dcp_file_key(rank, n);
        dcp_buf_put(&scan->files, &key, sizeof key);
    } else if (parse_rank_metadata(name, &rank)) {
        dcp_buf_put(&scan->metadata, &rank, sizeof rank);
    } else if (dcp_claim_name_parse(name, &claim)) {
        dcp_buf_put(&scan->claims, &claim, sizeof claim);
    }
    return 0;
}

int
dcp_dir_scan_run(const struct dcp_claim *claim, struct dcp_dir_scan *scan, struct dcp_error *err)
{
    int rc;

    do {
        dcp_buf_clear(&scan->claims);
        dcp_buf_clear(&scan->files);
        dcp_buf_clear(&scan->metadata);
        rc = claim->io->list(claim->io->ctx, claim->dirfd, note_name, scan);
    } while (rc == -EINTR);
    if (rc != 0) {
        return dcp_claim_error(claim, -rc, "listing", ".", err);
    }
    if (scan->claims.failed || scan->files.failed || scan->metadata.failed) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, claim->dir_path,
                             "no memory for the names of a directory");
    }
    return 0;
}

void
dcp_dir_scan_clean_up(struct dcp_dir_scan *scan)
{
    dcp_buf_clean_up(&scan->claims);
    dcp_buf_clean_up(&scan->files);
    dcp_buf_clean_up(&scan->metadata);
}

/* ---- metadata files ---- */

static int
note_reference(void *ctx, const char *name, size_t len)
{
    struct dcp_reference_set *set = ctx;
    char text[DCP_CLAIM_NAME_BYTES];
    uint32_t rank;
    uint64_t n;

    if (len >= sizeof text) {
        return 0;
    }
    memcpy(text, name, len);
    text[len] = '\0';
    if (dcp_data_file_parse(text, &rank, &n)) {
        uint64_t key = dcp_file_key(rank, n);
        dcp_buf_put(&set->files, &key, sizeof key);
    }
    return set->files.failed ? DCP_E_NOMEM : 0;
}

int
dcp_reference_set_add(const struct dcp_claim *claim, const char *name,
                      struct dcp_reference_set *set, struct dcp_error *err)
{
    struct dcp_buf image = {0};
    struct dcp_error local;
    int rc;

    dcp_error_clear(&local);
    rc = dcp_io_read_file(claim->io, claim->dirfd, name, DCP_MAX_METADATA_BYTES, &image, &local);
    if (rc == 0) {
        rc = dcp_claim_references(image.data, image.len, note_reference, set, &local);
    }
    dcp_buf_clean_up(&image);
    if (rc == DCP_E_NOMEM) {
        return dcp_error_set(err, rc, 0, name, "no memory to read %s", name);
    }
    if (rc != 0 && rc != DCP_E_NOENT) {
        set->incomplete = true;
    }
    return 0;
}

void
dcp_reference_set_clean_up(struct dcp_reference_set *set)
{
    dcp_buf_clean_up(&set->files);
}

int
dcp_claim_read_save_id(const struct dcp_claim *claim, const char *name, bool *ret_present,
                       struct dcp_save_id *ret_id, struct dcp_error *err)
{
    struct dcp_save_id id = {{0}};
    struct dcp_buf image = {0};
    struct dcp_error local;
    int rc;

    dcp_error_clear(&local);
    rc = dcp_io_read_file(claim->io, claim->dirfd, name, DCP_MAX_METADATA_BYTES, &image, &local);
    if (rc == 0 && !dcp_claim_image_save_id(image.data, image.len, &id)) {
        memset(&id, 0, sizeof id);
    }
    dcp_buf_clean_up(&image);
    if (rc == DCP_E_LIMIT) {
        rc = 0; /* whoever wrote that, it was not us */
    }
    if (rc != 0 && rc != DCP_E_NOENT) {
        if (local.sys_errno == ESTALE && dcp_claim_dir_removed(claim)) {
            rc = DCP_E_NOENT;
        } else {
            return dcp_error_set(err, rc, local.sys_errno, name, "%s", local.message);
        }
    }
    *ret_present = rc == 0;
    *ret_id = id;
    return 0;
}

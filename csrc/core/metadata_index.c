/*
 * metadata_index.c: the flat form as bytes, behind the pickle in a `.metadata` of ours.
 *
 *     entries, chunks, dims, files, strings: counts (varint each)
 *     the strings: names of all entries, then of all files, without gaps
 *     per entry: name length | kind, dtype, props, ndim (a byte each) | chunks | size
 *     per chunk: (file + 1) * 2 + transforms | offset | length | box offsets | box sizes
 *     per file: name length
 *
 * Numbers are LEB128: 256,000 chunks take about 5 MB where the arrays take 16, and decoding costs
 * less than reading the difference.  Positions (first chunk, index in dims, offset in strings) are
 * not stored; they follow from the order, so no stored number can point out of bounds, and every
 * count is checked against the bytes that are left before anything is allocated for it.
 *
 * Threads: no state.
 */
#include "metadata_private.h"

#include <string.h>

enum {
    /* The least bytes that an entry, chunk and file take: what bounds hostile counts. */
    MIN_ENTRY_BYTES = 6,
    MIN_CHUNK_BYTES = 3,
    MIN_FILE_BYTES = 1,
};

/* Varints of the hot loop: most numbers are one byte long. */
static inline void
put(struct dcp_buf *buf, uint64_t v)
{
    if (v < 0x80 && buf->len < buf->cap) {
        buf->data[buf->len++] = (uint8_t)v;
        return;
    }
    dcp_buf_put_varint(buf, v);
}

static inline uint64_t
take(struct dcp_cursor *c)
{
    if (c->pos < c->len && c->data[c->pos] < 0x80 && !c->failed) {
        return c->data[c->pos++];
    }
    return dcp_cursor_varint(c);
}

static void
encode_chunk(struct dcp_buf *buf, const struct dcp_metadata *md, const struct dcp_md_chunk *chunk,
             uint32_t ndim)
{
    uint64_t file = chunk->file == DCP_NO_FILE ? 0 : (uint64_t)chunk->file + 1;
    put(buf, file * 2 + chunk->transforms);
    put(buf, chunk->offset_bytes);
    put(buf, chunk->length_bytes);
    const uint64_t *dims = md->dims + chunk->dims;
    for (uint32_t i = 0; i < 2 * ndim; i++) {
        put(buf, dims[i]);
    }
}

int
dcp_metadata_index_encode(const struct dcp_metadata *md, struct dcp_buf *buf, struct dcp_error *err)
{
    put(buf, md->entries_count);
    put(buf, md->chunks_count);
    put(buf, md->dims_count);
    put(buf, md->files_count);
    put(buf, md->strings_len);
    dcp_buf_put(buf, md->strings, (size_t)md->strings_len);
    uint64_t next_name = 0;
    uint64_t next_chunk = 0;
    for (uint64_t e = 0; e < md->entries_count; e++) {
        const struct dcp_md_entry *entry = &md->entries[e];
        /* Entries that came from elsewhere in another order would be read back wrongly. */
        if (entry->name != next_name || entry->first_chunk != next_chunk) {
            return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                                 "writing metadata: entry %llu is out of order; this is a bug, "
                                 "please report it",
                                 (unsigned long long)e);
        }
        next_name += entry->name_len;
        next_chunk += entry->chunks_count;
        put(buf, entry->name_len);
        dcp_buf_put_u8(buf, entry->kind);
        dcp_buf_put_u8(buf, entry->dtype);
        dcp_buf_put_u8(buf, entry->props);
        dcp_buf_put_u8(buf, entry->ndim);
        put(buf, entry->chunks_count);
        for (uint32_t i = 0; i < entry->ndim; i++) {
            put(buf, md->dims[entry->size + i]);
        }
        for (uint64_t c = 0; c < entry->chunks_count; c++) {
            encode_chunk(buf, md, &md->chunks[entry->first_chunk + c], entry->ndim);
        }
    }
    for (uint32_t f = 0; f < md->files_count; f++) {
        put(buf, md->files[f].name_len);
    }
    return dcp_buf_check(buf, err);
}

/* ---- decoding ---- */

static int
damaged(const struct dcp_cursor *c, struct dcp_error *err, const char *what)
{
    return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                         "reading the metadata index: %s at byte %zu of %zu; the file is damaged, "
                         "restore it from a copy",
                         what, c->pos, c->len);
}

struct counts {
    uint64_t entries, chunks, dims, files, strings;
};

/* Everything that the counts announce must fit into the bytes that are left. */
static bool
counts_fit(const struct counts *n, uint64_t left)
{
    uint64_t needs[] = {n->strings, n->dims, 0, 0, 0};
    if (dcp_mul_overflows_u64(n->entries, MIN_ENTRY_BYTES, &needs[2]) ||
        dcp_mul_overflows_u64(n->chunks, MIN_CHUNK_BYTES, &needs[3]) ||
        dcp_mul_overflows_u64(n->files, MIN_FILE_BYTES, &needs[4])) {
        return false;
    }
    uint64_t total = 0;
    for (size_t i = 0; i < sizeof needs / sizeof needs[0]; i++) {
        if (dcp_add_overflows_u64(total, needs[i], &total)) {
            return false;
        }
    }
    return total <= left && n->entries < UINT32_MAX && n->chunks < UINT32_MAX &&
           n->files < UINT32_MAX;
}

static int
decode_chunk(struct dcp_cursor *c, struct dcp_metadata *md, struct dcp_md_chunk *chunk,
             uint32_t ndim, uint64_t *used_dims)
{
    uint64_t file = take(c);
    chunk->transforms = (uint32_t)(file & 1);
    file >>= 1;
    if (file > md->files_count || 2ull * ndim > md->dims_count - *used_dims) {
        return DCP_E_CORRUPT;
    }
    chunk->file = file == 0 ? (uint32_t)DCP_NO_FILE : (uint32_t)(file - 1);
    chunk->offset_bytes = take(c);
    chunk->length_bytes = take(c);
    chunk->dims = *used_dims;
    for (uint32_t i = 0; i < 2 * ndim; i++) {
        md->dims[(*used_dims)++] = take(c);
    }
    return 0;
}

/* Progress through the arrays whose positions are not stored. */
struct used {
    uint64_t strings, chunks, dims;
};

static int
decode_entry(struct dcp_cursor *c, struct dcp_metadata *md, struct dcp_md_entry *entry,
             struct used *used, struct dcp_error *err)
{
    uint64_t name_len = take(c);
    entry->name = used->strings;
    entry->kind = dcp_cursor_u8(c);
    entry->dtype = dcp_cursor_u8(c);
    entry->props = dcp_cursor_u8(c);
    entry->ndim = dcp_cursor_u8(c);
    entry->chunks_count = take(c);
    entry->first_chunk = used->chunks;
    entry->size = used->dims;
    if (c->failed || name_len > UINT32_MAX || name_len > md->strings_len - used->strings ||
        entry->chunks_count > md->chunks_count - used->chunks ||
        entry->ndim > md->dims_count - used->dims || entry->ndim > DCP_MAX_DIMS) {
        return damaged(c, err, "an entry out of bounds");
    }
    entry->name_len = (uint32_t)name_len;
    used->strings += name_len;
    for (uint32_t i = 0; i < entry->ndim; i++) {
        md->dims[used->dims++] = take(c);
    }
    for (uint64_t i = 0; i < entry->chunks_count; i++) {
        struct dcp_md_chunk *chunk = &md->chunks[used->chunks++];
        if (decode_chunk(c, md, chunk, entry->ndim, &used->dims) != 0 || c->failed) {
            return damaged(c, err, "a chunk out of bounds");
        }
    }
    return 0;
}

static int
decode_strings(struct dcp_cursor *c, struct dcp_metadata *md, const struct counts *n,
               struct dcp_error *err)
{
    const uint8_t *strings = dcp_cursor_bytes(c, n->strings);
    md->strings = dcp_malloc((size_t)n->strings);
    md->files = dcp_calloc((size_t)n->files, sizeof *md->files);
    if (md->strings == NULL || md->files == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "reading %llu bytes of names: out of memory",
                             (unsigned long long)n->strings);
    }
    if (strings == NULL) {
        return damaged(c, err, "cut names");
    }
    memcpy(md->strings, strings, (size_t)n->strings);
    md->strings_len = n->strings;
    md->files_count = (uint32_t)n->files;
    return 0;
}

static int
decode_files(struct dcp_cursor *c, struct dcp_metadata *md, struct used *used,
             struct dcp_error *err)
{
    for (uint32_t f = 0; f < md->files_count; f++) {
        uint64_t name_len = take(c);
        if (name_len == 0 || name_len > md->strings_len - used->strings || name_len > UINT32_MAX) {
            return damaged(c, err, "a file name out of bounds");
        }
        md->files[f].name = used->strings;
        md->files[f].name_len = (uint32_t)name_len;
        used->strings += name_len;
    }
    return 0;
}

static int
decode(struct dcp_cursor *c, struct dcp_metadata *md, struct dcp_error *err)
{
    struct counts n;
    n.entries = take(c);
    n.chunks = take(c);
    n.dims = take(c);
    n.files = take(c);
    n.strings = take(c);
    if (c->failed || !counts_fit(&n, c->len - c->pos)) {
        return damaged(c, err, "counts beyond the bytes that follow");
    }
    int rc = dcp_metadata_alloc(md, n.entries, n.chunks, n.dims, err);
    if (rc == 0) {
        rc = decode_strings(c, md, &n, err);
    }
    struct used used = {0};
    for (uint64_t e = 0; rc == 0 && e < n.entries; e++) {
        rc = decode_entry(c, md, &md->entries[e], &used, err);
    }
    if (rc == 0) {
        rc = decode_files(c, md, &used, err);
    }
    if (rc != 0) {
        return rc;
    }
    if (c->failed || c->pos != c->len || used.strings != n.strings || used.chunks != n.chunks ||
        used.dims != n.dims) {
        return damaged(c, err, "counts that do not agree with the entries");
    }
    return dcp_metadata_validate(md, err);
}

int
dcp_metadata_index_decode(const uint8_t *data, size_t len, struct dcp_metadata *ret_md,
                          struct dcp_error *err)
{
    struct dcp_cursor c = {.data = data, .len = len};
    struct dcp_metadata md = {0};
    int rc = decode(&c, &md, err);
    if (rc != 0) {
        dcp_metadata_clean_up(&md);
        return rc;
    }
    *ret_md = md;
    return 0;
}

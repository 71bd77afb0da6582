/*
 * metadata_index_decode.c: bytes into the flat form (metadata_index.h).
 *
 * Threads: no state.
 */
#include "metadata_index.h"

#include <string.h>

enum {
    /* The least bytes that an entry, chunk and file take: what bounds hostile counts. */
    MIN_ENTRY_BYTES = 6,
    MIN_CHUNK_BYTES = 2,
    MIN_FILE_BYTES = 1,
    /* A chunk of two bytes stands for 2 * SHORT_BOX_DIMS at most. */
    MAX_DIMS_PER_BYTE = SHORT_BOX_DIMS,
};

/* Varints of the hot loop: most numbers are one byte long. */
static inline uint64_t
take(struct dcp_cursor *c)
{
    if (c->pos < c->len && c->data[c->pos] < 0x80 && !c->failed) {
        return c->data[c->pos++];
    }
    return dcp_cursor_varint(c);
}

static inline uint64_t
unzigzag(uint64_t v)
{
    return v >> 1 ^ (0 - (v & 1));
}

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
    uint64_t needs[] = {n->strings, 0, 0, 0};
    if (dcp_mul_overflows_u64(n->entries, MIN_ENTRY_BYTES, &needs[1]) ||
        dcp_mul_overflows_u64(n->chunks, MIN_CHUNK_BYTES, &needs[2]) ||
        dcp_mul_overflows_u64(n->files, MIN_FILE_BYTES, &needs[3])) {
        return false;
    }
    uint64_t total = 0;
    for (size_t i = 0; i < sizeof needs / sizeof needs[0]; i++) {
        if (dcp_add_overflows_u64(total, needs[i], &total)) {
            return false;
        }
    }
    return total <= left && n->dims / MAX_DIMS_PER_BYTE <= left && n->entries < UINT32_MAX &&
           n->chunks < UINT32_MAX && n->files < UINT32_MAX;
}

/* Copies of a constant length are a few moves; a call, or the string instructions that compilers
 * put in its place, would cost more than all the rest of a chunk. */
static inline void
copy_numbers(uint64_t *to, const uint64_t *from, uint32_t count)
{
    switch (count) {
    case 1:
        memcpy(to, from, 1 * sizeof *to);
        break;
    case 2:
        memcpy(to, from, 2 * sizeof *to);
        break;
    case 3:
        memcpy(to, from, 3 * sizeof *to);
        break;
    case 4:
        memcpy(to, from, 4 * sizeof *to);
        break;
    default:
        for (uint32_t i = 0; i < count; i++) {
            to[i] = from[i];
        }
        break;
    }
}

/* Progress through the arrays whose positions are not stored. */
struct used {
    uint64_t strings, chunks, dims;
};

static void
decode_box(struct dcp_cursor *c, unsigned head, const uint64_t *size, const uint64_t *before,
           uint64_t *box, uint32_t ndim)
{
    if ((head & HEAD_WHOLE) != 0) {
        memset(box, 0, ndim * sizeof *box);
        copy_numbers(box + ndim, size, ndim);
        return;
    }
    if ((head & HEAD_NEXT_ROWS) != 0) {
        copy_numbers(box, before, ndim);
        box[0] += before[ndim];
    } else {
        for (uint32_t d = 0; d < ndim; d++) {
            box[d] = take(c);
        }
    }
    if ((head & HEAD_SAME_SIZES) != 0) {
        copy_numbers(box + ndim, before + ndim, ndim);
    } else {
        for (uint32_t d = 0; d < ndim; d++) {
            box[ndim + d] = take(c);
        }
    }
}

/* False: damaged. */
static bool
decode_file(struct dcp_cursor *c, unsigned head, const struct dcp_metadata *md,
            const struct known *known, uint32_t *ret_file)
{
    uint64_t file = known->file;
    if ((head & HEAD_SPELLED_FILE) != 0) {
        file = take(c);
        *ret_file = file == 0 ? (uint32_t)DCP_NO_FILE : (uint32_t)(file - 1);
        return file <= md->files_count;
    }
    if ((head & HEAD_NEXT_FILE) != 0 && ++file >= md->files_count) {
        return false;
    }
    *ret_file = (uint32_t)file;
    return true;
}

static int
decode_chunk(struct dcp_cursor *c, struct dcp_metadata *md, const struct dcp_md_entry *entry,
             bool is_first, struct used *used, struct known *known)
{
    struct dcp_md_chunk *chunk = &md->chunks[used->chunks++];
    uint32_t ndim = entry->ndim;
    unsigned head = dcp_cursor_u8(c);
    bool is_short = (head & (HEAD_WHOLE | HEAD_NEXT_ROWS | HEAD_SAME_SIZES)) != 0;
    bool needs_before = (head & (HEAD_NEXT_ROWS | HEAD_SAME_SIZES)) != 0;
    if ((head & ~(unsigned)HEAD_ALL) != 0 || (is_short && ndim > SHORT_BOX_DIMS) ||
        (needs_before && (is_first || ndim == 0)) || 2ull * ndim > md->dims_count - used->dims ||
        !decode_file(c, head, md, known, &chunk->file)) {
        return DCP_E_CORRUPT;
    }
    chunk->transforms = (head & HEAD_TRANSFORMS) != 0;
    chunk->offset_bytes = take(c);
    if (chunk->file != DCP_NO_FILE) {
        chunk->offset_bytes = known->ends[chunk->file] + unzigzag(chunk->offset_bytes);
    }
    chunk->length_bytes = (head & HEAD_SAME_LENGTH) != 0 ? known->length_bytes : take(c);
    chunk->dims = used->dims;
    used->dims += 2ull * ndim;
    decode_box(c, head, md->dims + entry->size, is_first ? NULL : md->dims + chunk[-1].dims,
               md->dims + chunk->dims, ndim);
    known_add(known, chunk);
    return 0;
}

static int
decode_entry(struct dcp_cursor *c, struct dcp_metadata *md, struct dcp_md_entry *entry,
             struct used *used, struct known *known, struct dcp_error *err)
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
        if (decode_chunk(c, md, entry, i == 0, used, known) != 0 || c->failed) {
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
    struct known known = {0};
    struct used used = {0};
    int rc = dcp_metadata_alloc(md, n.entries, n.chunks, n.dims, err);
    if (rc == 0) {
        rc = dcp_index_known_init(&known, n.files, err);
    }
    if (rc == 0) {
        rc = decode_strings(c, md, &n, err);
    }
    for (uint64_t e = 0; rc == 0 && e < n.entries; e++) {
        rc = decode_entry(c, md, &md->entries[e], &used, &known, err);
    }
    if (rc == 0) {
        rc = decode_files(c, md, &used, err);
    }
    dcp_free(known.ends);
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

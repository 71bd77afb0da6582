/*
 * metadata_index.c: the flat form as bytes, behind the pickle in a `.metadata` of ours.
 *
 *     entries, chunks, dims, files, strings: counts (varint each)
 *     the strings: names of all entries, then of all files, without gaps
 *     per entry: name length | kind, dtype, props, ndim (a byte each) | chunks | size
 *     per chunk: head byte | [file + 1] | where | [length] | [box offsets] | [box sizes]
 *     per file: name length
 *
 * Numbers are LEB128, and a chunk says only what is new (enum chunk_head): shards follow each other
 * along the first dimension and from file to file, records follow each other in a file.  So `where`
 * is the distance from the end of the file's record before (zigzag), or the offset itself where
 * there is no file.  256,000 chunks take 1 MB where the arrays take 16, and decoding costs less
 * than reading the difference.  Positions (first chunk, index in dims, offset in strings) are not
 * stored; they follow from the order, so no stored number can point out of bounds, and every count
 * is checked against the bytes that are left before anything is allocated for it.
 *
 * Threads: no state.
 */
#include "metadata_private.h"

#include <string.h>

enum {
    /* The least bytes that an entry, chunk and file take: what bounds hostile counts. */
    MIN_ENTRY_BYTES = 6,
    MIN_CHUNK_BYTES = 2,
    MIN_FILE_BYTES = 1,
    /* Boxes of more dimensions are spelled out, so that dims, too, are bounded by bytes: a chunk of
     * two bytes stands for 16 of them at most. */
    SHORT_BOX_DIMS = 8,
    MAX_DIMS_PER_BYTE = 8,
};

enum chunk_head {
    HEAD_TRANSFORMS = 1 << 0,
    HEAD_SPELLED_FILE = 1 << 1, /* else that of the chunk before */
    HEAD_NEXT_FILE = 1 << 2,    /* that of the chunk before, and one */
    HEAD_SAME_LENGTH = 1 << 3,  /* as the chunk before */
    HEAD_WHOLE = 1 << 4,        /* the box is the whole tensor */
    HEAD_NEXT_ROWS = 1 << 5,    /* it begins where the one before of this entry ends, along dim 0 */
    HEAD_SAME_SIZES = 1 << 6,   /* its sizes are that one's */
    HEAD_ALL = (1 << 7) - 1,
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

static inline uint64_t
zigzag(uint64_t v)
{
    return v << 1 ^ (0 - (v >> 63));
}

static inline uint64_t
unzigzag(uint64_t v)
{
    return v >> 1 ^ (0 - (v & 1));
}

static inline bool
same_numbers(const uint64_t *a, const uint64_t *b, uint32_t count)
{
    return count == 0 || memcmp(a, b, count * sizeof *a) == 0;
}

/* What both sides know when they come to a chunk. */
struct known {
    uint32_t file;         /* of the chunk before */
    uint64_t length_bytes; /* of the chunk before */
    uint64_t *ends;        /* owned, per file: where its last record so far ends */
};

static int
known_init(struct known *known, uint64_t files_count, struct dcp_error *err)
{
    *known = (struct known){.file = DCP_NO_FILE};
    known->ends = dcp_calloc((size_t)files_count, sizeof *known->ends);
    return known->ends != NULL
               ? 0
               : dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the ends of %llu files",
                               (unsigned long long)files_count);
}

static inline void
known_add(struct known *known, const struct dcp_md_chunk *chunk)
{
    known->file = chunk->file;
    known->length_bytes = chunk->length_bytes;
    if (chunk->file != DCP_NO_FILE) {
        known->ends[chunk->file] = chunk->offset_bytes + chunk->length_bytes;
    }
}

/* `before`: box offsets and sizes of the chunk before in this entry; NULL for the first. */
static unsigned
box_head(const uint64_t *size, const uint64_t *box, const uint64_t *before, uint32_t ndim)
{
    unsigned head = 0;
    bool at_origin = true;
    if (ndim > SHORT_BOX_DIMS) {
        return 0;
    }
    for (uint32_t d = 0; d < ndim; d++) {
        at_origin = at_origin && box[d] == 0;
    }
    if (at_origin && same_numbers(box + ndim, size, ndim)) {
        return HEAD_WHOLE;
    }
    if (before == NULL) {
        return 0;
    }
    if (ndim > 0 && box[0] == before[0] + before[ndim] &&
        same_numbers(box + 1, before + 1, ndim - 1)) {
        head |= HEAD_NEXT_ROWS;
    }
    return head | (same_numbers(box + ndim, before + ndim, ndim) ? HEAD_SAME_SIZES : 0u);
}

static void
encode_chunk(struct dcp_buf *buf, const struct dcp_metadata *md, const struct dcp_md_entry *entry,
             uint64_t index, struct known *known)
{
    const struct dcp_md_chunk *chunk = &md->chunks[entry->first_chunk + index];
    const uint64_t *box = md->dims + chunk->dims;
    uint32_t ndim = entry->ndim;
    unsigned head =
        box_head(md->dims + entry->size, box, index > 0 ? md->dims + chunk[-1].dims : NULL, ndim);
    head |= chunk->transforms != 0 ? HEAD_TRANSFORMS : 0u;
    head |= chunk->length_bytes == known->length_bytes ? HEAD_SAME_LENGTH : 0u;
    if (chunk->file != known->file) {
        bool next = known->file != DCP_NO_FILE && chunk->file == known->file + 1;
        head |= next ? HEAD_NEXT_FILE : HEAD_SPELLED_FILE;
    }
    dcp_buf_put_u8(buf, (uint8_t)head);
    if ((head & HEAD_SPELLED_FILE) != 0) {
        put(buf, chunk->file == DCP_NO_FILE ? 0 : (uint64_t)chunk->file + 1);
    }
    put(buf, chunk->file == DCP_NO_FILE ? chunk->offset_bytes
                                        : zigzag(chunk->offset_bytes - known->ends[chunk->file]));
    if ((head & HEAD_SAME_LENGTH) == 0) {
        put(buf, chunk->length_bytes);
    }
    for (uint32_t d = 0; d < ndim && (head & (HEAD_WHOLE | HEAD_NEXT_ROWS)) == 0; d++) {
        put(buf, box[d]);
    }
    for (uint32_t d = 0; d < ndim && (head & (HEAD_WHOLE | HEAD_SAME_SIZES)) == 0; d++) {
        put(buf, box[ndim + d]);
    }
    known_add(known, chunk);
}

static int
encode_entries(const struct dcp_metadata *md, struct dcp_buf *buf, struct known *known,
               struct dcp_error *err)
{
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
            encode_chunk(buf, md, entry, c, known);
        }
    }
    return 0;
}

int
dcp_metadata_index_encode(const struct dcp_metadata *md, struct dcp_buf *buf, struct dcp_error *err)
{
    struct known known;
    int rc = known_init(&known, md->files_count, err);
    if (rc != 0) {
        return rc;
    }
    put(buf, md->entries_count);
    put(buf, md->chunks_count);
    put(buf, md->dims_count);
    put(buf, md->files_count);
    put(buf, md->strings_len);
    dcp_buf_put(buf, md->strings, (size_t)md->strings_len);
    rc = encode_entries(md, buf, &known, err);
    dcp_free(known.ends);
    for (uint32_t f = 0; f < md->files_count; f++) {
        put(buf, md->files[f].name_len);
    }
    return rc == 0 ? dcp_buf_check(buf, err) : rc;
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
        memcpy(box + ndim, size, ndim * sizeof *box);
        return;
    }
    if ((head & HEAD_NEXT_ROWS) != 0) {
        memcpy(box, before, ndim * sizeof *box);
        box[0] += before[ndim];
    } else {
        for (uint32_t d = 0; d < ndim; d++) {
            box[d] = take(c);
        }
    }
    if ((head & HEAD_SAME_SIZES) != 0) {
        memcpy(box + ndim, before + ndim, ndim * sizeof *box);
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
        rc = known_init(&known, n.files, err);
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

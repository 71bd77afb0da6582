/*
 * metadata_index_encode.c: the flat form into its bytes (metadata_index.h).
 *
 * Threads: no state.
 */
#include "metadata_index.h"

#include <string.h>

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
zigzag(uint64_t v)
{
    return v << 1 ^ (0 - (v >> 63));
}

static inline bool
same_numbers(const uint64_t *a, const uint64_t *b, uint32_t count)
{
    return count == 0 || memcmp(a, b, count * sizeof *a) == 0;
}

int
dcp_index_known_init(struct known *known, uint64_t files_count, struct dcp_error *err)
{
    *known = (struct known){.file = DCP_NO_FILE};
    known->ends = dcp_calloc((size_t)files_count, sizeof *known->ends);
    return known->ends != NULL
               ? 0
               : dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the ends of %llu files",
                               (unsigned long long)files_count);
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
    int rc = dcp_index_known_init(&known, md->files_count, err);
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

/*
 * verify_record.c: is a record, byte for byte, what was written?
 *
 * A record of ours is a pure function of its tensor's shape and bytes.  So its payload is summed,
 * head and tail are made anew from the sums, and the file must hold exactly these: nothing of the
 * record goes unchecked.  When it does not, the file's block table (or, for small ones, the
 * descriptor) tells whether the payload or its frame is damaged, and which block.
 *
 * All other records (objects, tensors only torch.save can write, stock torch's) are zips: every
 * entry against the CRC of the directory, then the tensor's shape against the metadata.  A writer
 * with CRCs switched off leaves all of them zero; such records count as unverified.  Objects that a
 * planner of the program's own made are any bytes: the file's block table has their CRCs.
 *
 * Records of a block or less are looked at in one piece, larger ones as they stream by.
 *
 * Threads: the calling thread.
 */
#include "verify.h"

#include <inttypes.h>
#include <string.h>

#include "dcp_crc32.h"
#include "le_bytes.h"
#include "plan_private.h"
#include "zip_format.h"

enum {
    /* The end records of a zip; with the longest comment in the second try. */
    TAIL_BYTES = 4096,
    TAIL_MOST_BYTES = 68 << 10,
    /* A directory of 40,000 entries: larger ones are for torch.load to check. */
    DIRECTORY_MOST_BYTES = 4 << 20,
    HEAD_MOST_BYTES = 128,
};

/* A record of the stream. */
struct record {
    struct dcp_verifier *v;
    const struct dcp_verify_file *file;
    const struct dcp_md_entry *entry;
    const struct dcp_md_chunk *chunk;
    uint64_t at_bytes; /* of the record in the file */
    uint64_t length_bytes;
    const uint8_t *whole; /* of a small one, while it is looked at as a zip */
};

/* `why` at a byte of the record. */
static int
place(const struct record *r, uint64_t offset, struct dcp_error *why)
{
    why->offset_bytes = r->at_bytes + offset;
    return why->code;
}

static int
damaged(const struct record *r, int code, uint64_t offset, const char *what, struct dcp_error *why)
{
    dcp_error_set(why, code, 0, r->file->path, "%s", what);
    return place(r, offset, why);
}

/* CRC32 of a range of the record; with `crcs` also of every block of it, appended. */
static int
sum_range(const struct record *r, uint64_t offset, uint64_t len, struct dcp_buf *crcs,
          uint32_t *ret_crc, struct dcp_error *why)
{
    uint32_t whole = 0;
    for (uint64_t from = 0; from < len; from += DCP_BLOCK_BYTES) {
        uint64_t n = dcp_min_u64(DCP_BLOCK_BYTES, len - from), got;
        uint32_t crc = 0;
        int rc = dcp_verify_check_cancel(r->v->options, why);
        for (uint64_t done = 0; rc == 0 && done < n; done += got) {
            const uint8_t *bytes;
            rc = dcp_verify_stream_at(&r->v->stream, r->at_bytes + offset + from + done, n - done,
                                      &bytes, &got, why);
            if (rc == 0) {
                crc = dcp_crc32(crc, bytes, (size_t)got);
            }
        }
        if (rc != 0) {
            return rc;
        }
        whole = from == 0 ? crc : dcp_crc32_combine(whole, crc, n);
        if (crcs != NULL) {
            dcp_buf_put(crcs, &crc, sizeof crc);
        }
    }
    *ret_crc = whole;
    return crcs != NULL ? dcp_buf_check(crcs, why) : 0;
}

/* ---- ours ---- */

/* True when the record's length is what we write for its shape. */
static bool
may_be_own(const struct record *r, struct dcp_tensor_shape *ret_shape)
{
    const struct dcp_md_entry *entry = r->entry;
    uint32_t item_bytes = dcp_dtype_bytes(entry->dtype);
    uint64_t elements;
    const uint64_t *sizes = r->v->md->dims + r->chunk->dims + entry->ndim;
    if (!r->v->md->is_native || r->file->header.planned_outside || entry->kind != DCP_ITEM_TENSOR ||
        item_bytes == 0 || dcp_volume_overflows(sizes, entry->ndim, &elements) ||
        elements > DCP_MAX_PAYLOAD_BYTES / item_bytes) {
        return false;
    }
    *ret_shape = (struct dcp_tensor_shape){.dtype = entry->dtype,
                                           .ndim = entry->ndim,
                                           .sizes = sizes,
                                           .payload_bytes = elements * item_bytes};
    return r->length_bytes == dcp_record_head_bytes(ret_shape->payload_bytes) +
                                  ret_shape->payload_bytes + dcp_record_tail_bytes(ret_shape);
}

/* Compares a part of the record with v->made; *ret_differs is where, or the part's length. */
static int
compare_made(const struct record *r, uint64_t offset, const uint8_t **ret_bytes,
             uint64_t *ret_differs, struct dcp_error *why)
{
    const struct dcp_buf *made = &r->v->made;
    int rc = dcp_buf_check(made, why);
    if (rc == 0) {
        rc = dcp_verify_stream_gather(&r->v->stream, r->at_bytes + offset, made->len, ret_bytes,
                                      why);
    }
    if (rc != 0) {
        return rc;
    }
    uint64_t at = 0;
    while (at < made->len && (*ret_bytes)[at] == made->data[at]) {
        at++;
    }
    *ret_differs = at;
    return 0;
}

/* What the block table says of the payload, `len` bytes at `payload_at`, against what was summed.
 */
static int
compare_blocks(const struct record *r, uint64_t payload_at, uint64_t len, uint32_t crc,
               struct dcp_error *why)
{
    const struct dcp_verify_file *file = r->file;
    const struct dcp_block_entry *entry =
        dcp_block_table_find(&file->table, r->at_bytes + payload_at);
    if (entry == NULL || entry->payload_bytes != len) {
        return damaged(r, DCP_E_CORRUPT, payload_at,
                       "the file's block table does not list this record", why);
    }
    uint64_t blocks = r->v->crcs.len / sizeof(uint32_t), bad = 0, first = 0;
    for (uint64_t b = 0; b < blocks; b++) {
        uint32_t found;
        memcpy(&found, r->v->crcs.data + b * sizeof found, sizeof found);
        if (found != entry->block_crcs[b]) {
            first = bad == 0 ? b : first;
            bad++;
        }
    }
    if (bad > 0) {
        dcp_error_set(why, DCP_E_CHECKSUM, 0, file->path,
                      "the checksum of %" PRIu64 " of the record's %" PRIu64 " blocks of 1 MiB "
                      "does not match; the first is block %" PRIu64,
                      bad, blocks, first);
        return place(r, payload_at + first * DCP_BLOCK_BYTES, why);
    }
    return crc == entry->payload_crc
               ? 0
               : damaged(r, DCP_E_CORRUPT, payload_at,
                         "the checksum of the record in the block table is not that of its blocks",
                         why);
}

/* The tail is not what payload and shape make: is it the payload or the tail that is damaged? */
static int
blame(const struct record *r, const struct dcp_tensor_shape *shape, uint64_t payload_at,
      uint64_t differs, const uint8_t *tail, struct dcp_error *why)
{
    struct dcp_buf *made = &r->v->made;
    uint64_t tail_at = payload_at + shape->payload_bytes;
    /* Small tensors: with the CRC that the descriptor has, everything else fits. */
    if (shape->payload_bytes > 0 && shape->payload_bytes <= DCP_BLOCK_BYTES) {
        dcp_buf_clear(made);
        dcp_record_put_tail(made, shape, le_get32(tail + 4), NULL);
        int rc = dcp_buf_check(made, why);
        if (rc != 0) {
            return rc;
        }
        if (memcmp(tail, made->data, made->len) == 0) {
            return damaged(r, DCP_E_CHECKSUM, payload_at,
                           "the checksum of the tensor does not match", why);
        }
    }
    return damaged(r, DCP_E_CORRUPT, tail_at + differs,
                   "the end of the tensor's record (descriptor, pickle, block checksums, "
                   "directory) is damaged",
                   why);
}

/* *ret_own tells whether the record begins as ours do; else nothing was checked. */
static int
check_own(const struct record *r, const struct dcp_tensor_shape *shape, bool *ret_own,
          struct dcp_error *why)
{
    struct dcp_verifier *v = r->v;
    uint64_t head_bytes = dcp_record_head_bytes(shape->payload_bytes), differs;
    const uint8_t *bytes;
    uint32_t crc;
    DCP_ASSERT(head_bytes <= HEAD_MOST_BYTES);
    dcp_buf_clear(&v->made);
    dcp_record_put_head(&v->made, shape->payload_bytes);
    int rc = compare_made(r, 0, &bytes, &differs, why);
    *ret_own = rc == 0 && differs == head_bytes;
    if (rc != 0 || !*ret_own) {
        return rc;
    }
    dcp_buf_clear(&v->crcs);
    rc = sum_range(r, head_bytes, shape->payload_bytes, &v->crcs, &crc, why);
    if (rc == 0 && shape->payload_bytes > DCP_BLOCK_BYTES && r->file->table.entries_count > 0) {
        rc = compare_blocks(r, head_bytes, shape->payload_bytes, crc, why);
    }
    if (rc != 0) {
        return rc;
    }
    dcp_buf_clear(&v->made);
    dcp_record_put_tail(&v->made, shape, crc, (const uint32_t *)(const void *)v->crcs.data);
    rc = compare_made(r, head_bytes + shape->payload_bytes, &bytes, &differs, why);
    if (rc == 0 && differs < v->made.len) {
        rc = blame(r, shape, head_bytes, differs, bytes, why);
    }
    return rc;
}

/* ---- zips ---- */

/* Random access: from the whole record, or a window of its file. */
static int
zip_read(void *ctx, uint64_t offset, size_t len, const uint8_t **ret, struct dcp_error *err)
{
    struct record *r = ctx;
    if (offset > r->length_bytes || len > r->length_bytes - offset) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL, "the record points behind its end");
    }
    if (r->whole != NULL) {
        *ret = r->whole + offset;
        return 0;
    }
    struct dcp_buf *window = &r->v->window;
    dcp_buf_clear(window);
    uint8_t *at = dcp_buf_extend(window, len);
    if (at == NULL) {
        return dcp_buf_check(window, err);
    }
    *ret = at;
    r->v->stream.read_bytes += len;
    return dcp_io_read_all(r->v->io, r->file->fd, at, len, r->at_bytes + offset, r->file->path,
                           err);
}

static int
find_end(struct record *r, struct zip_end *ret_end, struct dcp_error *why)
{
    for (uint64_t want = TAIL_BYTES;; want = TAIL_MOST_BYTES) {
        const uint8_t *tail = NULL;
        uint64_t len = dcp_min_u64(r->length_bytes, want);
        int rc = zip_read(r, r->length_bytes - len, (size_t)len, &tail, why);
        if (rc == 0) {
            rc = zip_find_end(tail, (size_t)len, r->length_bytes, ret_end, why);
        }
        if (rc != DCP_E_MISSING) {
            return rc;
        }
        if (want == TAIL_MOST_BYTES) {
            return damaged(r, DCP_E_CORRUPT, r->length_bytes - len,
                           "the record has no zip end record", why);
        }
    }
}

/* One entry's local header, and its bytes against its CRC where the writer made any. */
static int
check_entry(struct record *r, const struct zip_end *end, const struct zip_entry *entry,
            bool has_crc, struct dcp_error *why)
{
    const uint8_t *header;
    uint64_t offset, len = (uint64_t)ZIP_LOCAL_BYTES + entry->name_len;
    uint32_t crc = 0;
    int rc = 0;
    if (r->whole != NULL) {
        header = r->whole + entry->header_offset;
    } else {
        rc = dcp_verify_stream_gather(&r->v->stream, r->at_bytes + entry->header_offset, len,
                                      &header, why);
    }
    if (rc == 0) {
        rc = zip_data_offset(header, end, entry, &offset, why);
        if (rc != 0) {
            return place(r, entry->header_offset, why);
        }
    }
    if (rc == 0 && !has_crc) {
        return 0;
    }
    if (rc == 0 && r->whole != NULL) {
        crc = dcp_crc32(0, r->whole + offset, (size_t)entry->bytes);
    } else if (rc == 0) {
        rc = sum_range(r, offset, entry->bytes, NULL, &crc, why);
    }
    if (rc != 0 || crc == entry->crc) {
        return rc;
    }
    dcp_error_set(why, DCP_E_CHECKSUM, 0, r->file->path,
                  "entry %.*s of the record has CRC %08x, its directory says %08x",
                  (int)dcp_min_u64(entry->name_len, 200), entry->name, crc, entry->crc);
    return place(r, offset, why);
}

/* Every entry; *ret_has_crc is false when the writer had CRCs switched off. */
static int
check_entries(struct record *r, const struct zip_end *end, const uint8_t *directory,
              bool *ret_has_crc, struct dcp_error *why)
{
    struct zip_entry entry;
    bool has_crc = false;
    for (int pass = 0; pass < 2; pass++) {
        size_t pos = 0;
        uint64_t previous_end = 0;
        for (uint64_t i = 0; i < end->entries_count; i++) {
            int rc = zip_next_entry(directory, end, &pos, &entry, why);
            if (rc != 0) {
                return place(r, end->directory_offset + pos, why);
            }
            has_crc = has_crc || entry.crc != 0;
            if (entry.header_offset < previous_end) {
                return damaged(r, DCP_E_CORRUPT, end->directory_offset,
                               "the entries of the record overlap or are out of order", why);
            }
            previous_end = entry.header_offset + ZIP_LOCAL_BYTES + entry.name_len + entry.bytes;
            if (pass == 1) {
                rc = check_entry(r, end, &entry, has_crc, why);
            }
            if (rc != 0) {
                return rc;
            }
        }
        if (pos != end->directory_bytes) {
            return damaged(r, DCP_E_CORRUPT, end->directory_offset + pos,
                           "the directory of the record has bytes of no entry", why);
        }
    }
    *ret_has_crc = has_crc;
    return 0;
}

/* Whether the record holds the tensor that the metadata describes.  Its dtype may be another: who
 * loads it converts it, and planners may cast what they save.  What only torch.load reads is left
 * to it. */
static int
check_shape(struct record *r, struct dcp_error *why)
{
    const struct dcp_md_entry *entry = r->entry;
    struct dcp_record_input input = {.read = zip_read, .ctx = r, .length_bytes = r->length_bytes};
    struct dcp_record_view view;
    int rc = dcp_record_parse(&input, &view, why);
    if (rc == DCP_E_UNSUPPORTED) {
        dcp_error_clear(why);
        return 0;
    }
    if (rc != 0) {
        return place(r, 0, why);
    }
    const uint64_t *sizes = r->v->md->dims + r->chunk->dims + entry->ndim;
    bool is_same =
        view.ndim == entry->ndim && memcmp(view.sizes, sizes, entry->ndim * sizeof *sizes) == 0;
    return is_same
               ? 0
               : damaged(r, DCP_E_CORRUPT, 0,
                         "the record holds a tensor of another shape than the metadata says", why);
}

static int
check_zip(struct record *r, bool *ret_has_crc, struct dcp_error *why)
{
    struct zip_end end;
    const uint8_t *directory;
    int rc = 0;
    if (r->length_bytes <= DCP_VERIFY_WHOLE_BYTES) {
        rc = dcp_verify_stream_gather(&r->v->stream, r->at_bytes, r->length_bytes, &r->whole, why);
    }
    if (rc == 0) {
        rc = find_end(r, &end, why);
    }
    if (rc != 0) {
        return rc;
    }
    if (end.directory_bytes > DIRECTORY_MOST_BYTES) {
        *ret_has_crc = false;
        return 0;
    }
    rc = zip_read(r, end.directory_offset, (size_t)end.directory_bytes, &directory, why);
    if (rc == 0) {
        rc = check_entries(r, &end, directory, ret_has_crc, why);
    }
    if (rc == 0 && r->entry->kind == DCP_ITEM_TENSOR) {
        rc = check_shape(r, why);
    }
    return rc;
}

/* A record as long as ours, which does not begin like ours: written otherwise, or damaged there? */
static int
check_head(struct record *r, const struct dcp_tensor_shape *shape, struct dcp_error *why)
{
    struct dcp_record_input input = {.read = zip_read, .ctx = r, .length_bytes = r->length_bytes};
    struct dcp_record_view view;
    struct dcp_error ignored;
    dcp_error_clear(&ignored);
    bool is_ours = dcp_record_parse(&input, &view, &ignored) == 0 &&
                   view.payload_offset_bytes == dcp_record_head_bytes(shape->payload_bytes);
    return !is_ours
               ? 0
               : damaged(r, DCP_E_CORRUPT, 0, "the head of the tensor's record is damaged", why);
}

/* ---- any bytes ---- */

/* Of a damaged table there is a problem already, and nothing to compare. */
static int
check_listed(const struct record *r, bool *ret_has_crc, struct dcp_error *why)
{
    uint32_t crc;
    *ret_has_crc = r->file->header.table_bytes == 0 || r->file->table.entries_count > 0;
    if (!*ret_has_crc) {
        return 0;
    }
    dcp_buf_clear(&r->v->crcs);
    int rc = sum_range(r, 0, r->length_bytes, &r->v->crcs, &crc, why);
    return rc == 0 ? compare_blocks(r, 0, r->length_bytes, crc, why) : rc;
}

int
dcp_verify_record(struct dcp_verifier *v, const struct dcp_verify_file *file,
                  const struct dcp_verify_ref *ref, struct dcp_error *err)
{
    struct record r = {.v = v,
                       .file = file,
                       .entry = &v->md->entries[ref->entry],
                       .chunk = &v->md->chunks[ref->chunk],
                       .at_bytes = ref->offset_bytes};
    struct dcp_tensor_shape shape;
    struct dcp_error why;
    bool is_own = false, has_crc = true;
    int rc = 0;
    r.length_bytes = r.chunk->length_bytes;
    dcp_error_clear(&why);
    bool is_listed = file->header.planned_outside && r.entry->kind == DCP_ITEM_BYTES;
    bool may_be = may_be_own(&r, &shape);
    if (is_listed) {
        rc = check_listed(&r, &has_crc, &why);
    } else if (may_be) {
        rc = check_own(&r, &shape, &is_own, &why);
    }
    if (rc == 0 && !is_own && !is_listed) {
        rc = check_zip(&r, &has_crc, &why);
        if (rc == 0 && may_be) {
            rc = check_head(&r, &shape, &why);
        }
    }
    if (v->options->progress_bytes != NULL) {
        atomic_fetch_add_explicit(v->options->progress_bytes, r.length_bytes, memory_order_relaxed);
    }
    if (rc != 0 && why.offset_bytes == UINT64_MAX) {
        why.offset_bytes = ref->offset_bytes;
    }
    if (has_crc && why.code != DCP_E_IO) {
        v->result->checked_bytes += r.length_bytes;
    } else {
        v->result->unverified_bytes += r.length_bytes;
        v->result->unverified_records_count++;
    }
    return rc == 0 ? 0 : dcp_verify_note(v, ref->entry, file->name, &why, err);
}

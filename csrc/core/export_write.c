/*
 * export_write.c: boxes of memory to their places in the files of an export.
 *
 * Pieces are taken in the order of the files.  The trailing dims of a box that lie in the file
 * without a gap are a run; a whole tensor, or a shard of dim 0, is one run and goes through the
 * buffers as a stream, as do long runs.  A shard of another dim is short rows at equal distances,
 * between which other ranks write theirs: they are gathered into a buffer in one pass, and the
 * writing thread puts them into the page cache, where the ranks' rows become whole pages again.
 *
 * Threads: one run belongs to its caller.
 */
#include "export.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "box.h"
#include "plan_private.h"

/* How a box lies in the file: `outer_ndim` dims at any distance, of rows at equal distances, of
 * bytes without a gap. */
struct shape {
    uint32_t outer_ndim;
    uint64_t rows_count, row_items;
    uint64_t row_stride_bytes;
};

static struct shape
shape_of(const struct dcp_export_piece *piece)
{
    struct shape shape = {.rows_count = 1, .row_items = 1};
    uint32_t d = piece->ndim;
    while (d > 0 && (piece->lengths[d - 1] == 1 || (uint64_t)piece->file_strides_bytes[d - 1] ==
                                                       shape.row_items * piece->item_bytes)) {
        shape.row_items *= piece->lengths[d - 1];
        d--;
    }
    if (d > 0) {
        shape.row_stride_bytes = (uint64_t)piece->file_strides_bytes[d - 1];
    }
    while (d > 0 && (piece->lengths[d - 1] == 1 || (uint64_t)piece->file_strides_bytes[d - 1] ==
                                                       shape.rows_count * shape.row_stride_bytes)) {
        shape.rows_count *= piece->lengths[d - 1];
        d--;
    }
    shape.outer_ndim = d;
    return shape;
}

/* Copies elements [from, from + count) of the box's row-major image. */
static void
gather(const struct dcp_export_piece *piece, uint64_t from, uint64_t count, uint8_t *to)
{
    int64_t dense[DCP_MAX_DIMS];
    dcp_box_row_major(piece->ndim, piece->lengths, piece->item_bytes, dense);
    struct dcp_box_side to_side = {-(int64_t)(from * piece->item_bytes), dense};
    struct dcp_box_side from_side = {0, piece->strides_bytes};
    dcp_box_copy_range(to, &to_side, piece->data, &from_side, piece->ndim, piece->lengths,
                       piece->item_bytes, from, count);
}

/* A run of the file: elements [from, from + count) of the image.  An element never straddles two
 * buffers unless the data of the file is not aligned to it. */
static int
stream_run(struct dcp_export *run, const struct dcp_export_piece *piece, uint64_t offset_bytes,
           uint64_t from, uint64_t count)
{
    uint64_t item = piece->item_bytes;
    while (count > 0) {
        uint8_t *to;
        uint64_t len;
        int rc = dcp_export_room(run, offset_bytes, count * item, &to, &len);
        if (rc != 0) {
            return rc;
        }
        uint64_t whole = len / item;
        gather(piece, from, whole, to);
        if (len % item != 0) { /* the buffer ends in the middle of one */
            uint8_t element[16];
            DCP_ASSERT(item <= sizeof element);
            gather(piece, from + whole, 1, element);
            memcpy(to + whole * item, element, len % item);
            uint64_t rest = item - len % item, room;
            offset_bytes += len;
            if ((rc = dcp_export_room(run, offset_bytes, rest, &to, &room)) != 0) {
                return rc;
            }
            DCP_ASSERT(room == rest);
            memcpy(to, element + item - rest, rest);
            len = rest;
            whole++;
        }
        offset_bytes += len;
        from += whole;
        count -= whole;
    }
    return 0;
}

static int
write_rows(struct dcp_export *run, const struct dcp_export_piece *piece, const struct shape *shape,
           uint64_t offset_bytes, uint64_t from)
{
    const struct dcp_export_rows rows = {.row_bytes = shape->row_items * piece->item_bytes,
                                         .stride_bytes = shape->row_stride_bytes};
    uint64_t most = run->ring->buffer_bytes / rows.row_bytes;
    DCP_ASSERT(most > 0);
    for (uint64_t row = 0; row < shape->rows_count;) {
        uint64_t n = dcp_min_u64(most, shape->rows_count - row);
        uint8_t *to;
        int rc = dcp_export_rows_room(run, &to);
        if (rc != 0) {
            return rc;
        }
        gather(piece, from + row * shape->row_items, n * shape->row_items, to);
        dcp_export_push_rows(run, offset_bytes + row * rows.stride_bytes, n * rows.row_bytes,
                             &rows);
        row += n;
    }
    return 0;
}

/* The rows of one position of the outer dims. */
static int
write_block(struct dcp_export *run, const struct dcp_export_piece *piece, const struct shape *shape,
            uint64_t offset_bytes, uint64_t from)
{
    uint64_t row_bytes = shape->row_items * piece->item_bytes;
    if (shape->rows_count > 1 && row_bytes < DCP_EXPORT_DIRECT_LEAST_BYTES) {
        return write_rows(run, piece, shape, offset_bytes, from);
    }
    int rc = 0;
    for (uint64_t row = 0; rc == 0 && row < shape->rows_count; row++) {
        rc = stream_run(run, piece, offset_bytes + row * shape->row_stride_bytes,
                        from + row * shape->row_items, shape->row_items);
    }
    return rc;
}

static int
write_piece(struct dcp_export *run, const struct dcp_export_piece *piece)
{
    uint64_t items = dcp_volume_of(piece->lengths, piece->ndim);
    if (items == 0) {
        return 0;
    }
    struct shape shape = shape_of(piece);
    uint64_t block_items = shape.rows_count * shape.row_items;
    uint64_t at[DCP_MAX_DIMS] = {0};
    uint64_t offset = piece->offset_bytes;
    for (uint64_t from = 0; from < items; from += block_items) {
        int rc = write_block(run, piece, &shape, offset, from);
        if (rc != 0) {
            return rc;
        }
        for (uint32_t d = shape.outer_ndim; d-- > 0;) {
            offset += (uint64_t)piece->file_strides_bytes[d];
            if (++at[d] < piece->lengths[d]) {
                break;
            }
            offset -= (uint64_t)piece->file_strides_bytes[d] * at[d];
            at[d] = 0;
        }
    }
    return 0;
}

/* The place of the last element, and all products on the way, must lie in the file. */
static int
check_piece(const struct dcp_export_piece *piece, const struct dcp_export_file *files,
            uint32_t files_count, struct dcp_error *err)
{
    uint64_t end = piece->offset_bytes, image = piece->item_bytes;
    bool bad = piece->file >= files_count || piece->ndim > DCP_MAX_DIMS || piece->item_bytes == 0 ||
               piece->item_bytes > 16,
         empty = false;
    for (uint32_t d = 0; !bad && d < piece->ndim; d++) {
        empty = empty || piece->lengths[d] == 0;
    }
    bad = bad || (!empty && dcp_add_overflows_u64(end, piece->item_bytes, &end));
    for (uint32_t d = piece->ndim; !bad && !empty && d-- > 0;) {
        uint64_t span = 0, stride = (uint64_t)piece->file_strides_bytes[d];
        bad = piece->file_strides_bytes[d] < 0 ||
              dcp_mul_overflows_u64(piece->lengths[d] - 1, stride, &span) ||
              dcp_add_overflows_u64(end, span, &end) ||
              dcp_mul_overflows_u64(image, piece->lengths[d], &image) ||
              (piece->lengths[d] > 1 && stride < image / piece->lengths[d]);
    }
    if (bad ||
        (!empty && (end > files[piece->file].length_bytes || image > DCP_MAX_PAYLOAD_BYTES))) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a piece of an export at byte %" PRIu64
                             " does not lie in its file: the plan is not one of this export",
                             piece->offset_bytes);
    }
    return 0;
}

static int
in_file_order(const void *left, const void *right)
{
    const struct dcp_export_piece *a = *(const struct dcp_export_piece *const *)left;
    const struct dcp_export_piece *b = *(const struct dcp_export_piece *const *)right;
    if (a->file != b->file) {
        return a->file < b->file ? -1 : 1;
    }
    return a->offset_bytes == b->offset_bytes ? 0 : a->offset_bytes < b->offset_bytes ? -1 : 1;
}

int
dcp_export_write(const struct dcp_io *io, const char *dir_path, const struct dcp_export_file *files,
                 uint32_t files_count, const struct dcp_export_piece *pieces, uint64_t pieces_count,
                 const struct dcp_engine_options *options, struct dcp_export_stats *ret_stats,
                 struct dcp_error *err)
{
    struct dcp_export run;
    const struct dcp_export_piece **order = dcp_malloc_array(pieces_count + 1, sizeof *order);
    if (order == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for the order of pieces");
    }
    int rc = 0;
    for (uint64_t i = 0; rc == 0 && i < pieces_count; i++) {
        order[i] = &pieces[i];
        rc = check_piece(&pieces[i], files, files_count, err);
    }
    if (rc == 0) {
        qsort(order, pieces_count, sizeof *order, in_file_order);
        rc = dcp_export_begin(&run, io, dir_path, options, err);
        if (rc == 0) {
            for (uint64_t i = 0; rc == 0 && i < pieces_count; i++) {
                if (i == 0 || order[i]->file != order[i - 1]->file) {
                    rc = dcp_export_enter(&run, &files[order[i]->file], err);
                }
                rc = rc == 0 ? write_piece(&run, order[i]) : rc;
            }
            rc = dcp_export_end(&run, rc, ret_stats, err);
        }
    }
    dcp_free(order);
    return rc;
}

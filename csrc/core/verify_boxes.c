/*
 * verify_boxes.c: do the chunks of a saved tensor lie apart and fill it?
 *
 * Chunks of real shardings fall apart by planes (box_apart.c), in O(dims * n log n); then their
 * volumes add up to the tensor's exactly when they fill it.  Only chunks that do not fall apart are
 * swept along one dimension, to find two that overlap.  Empty chunks lie nowhere: they neither
 * overlap nor fill.  That every chunk lies inside its tensor was checked when the metadata was
 * read.
 *
 * Threads: the calling thread.
 */
#include "verify.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "box_apart.h"
#include "plan_private.h"

enum { BOX_TEXT_BYTES = 200 };

/* "[0:4, 8:16]", cut where the text is full. */
static void
put_box(char text[BOX_TEXT_BYTES], const uint64_t *box, uint32_t ndim)
{
    size_t len = 0;
    text[0] = '\0';
    for (uint32_t d = 0; d < ndim && len < BOX_TEXT_BYTES; d++) {
        int n =
            snprintf(text + len, BOX_TEXT_BYTES - len, "%s%" PRIu64 ":%" PRIu64 "%s",
                     d == 0 ? "[" : ", ", box[d], box[d] + box[ndim + d], d + 1 == ndim ? "]" : "");
        len += n > 0 ? (size_t)n : BOX_TEXT_BYTES;
    }
}

static int
compare_starts(const void *left, const void *right)
{
    const struct dcp_box_row *a = left, *b = right;
    return a->start < b->start ? -1 : a->start > b->start;
}

/* The first two rows found that overlap; NULL when there are none. */
static int
find_overlap(struct dcp_verifier *v, struct dcp_box_row *rows, uint32_t count, uint32_t ndim,
             const uint64_t *ret_pair[2], struct dcp_error *err)
{
    ret_pair[0] = ret_pair[1] = NULL;
    (void)dcp_boxes_look_along(rows, count, ndim, 0);
    qsort(rows, count, sizeof *rows, compare_starts);
    for (uint32_t i = 0; i < count; i++) {
        int rc = dcp_verify_check_cancel(v->options, err);
        if (rc != 0) {
            return rc;
        }
        for (uint32_t k = i + 1; k < count && rows[k].start < rows[i].end; k++) {
            if (dcp_boxes_overlap(rows[i].box, rows[k].box, ndim)) {
                ret_pair[0] = rows[i].box;
                ret_pair[1] = rows[k].box;
                return 0;
            }
        }
    }
    return 0;
}

/* Notes the first two chunks that overlap; *ret_apart tells that none do. */
static int
check_apart(struct dcp_verifier *v, uint32_t index, struct dcp_box_row *rows, uint32_t count,
            bool *ret_apart, struct dcp_error *err)
{
    uint32_t ndim = v->md->entries[index].ndim;
    const uint64_t *pair[2];
    char texts[2][BOX_TEXT_BYTES];
    struct dcp_error why;
    *ret_apart = ndim == 0 || dcp_boxes_fall_apart(rows, count, ndim);
    if (*ret_apart) {
        return 0;
    }
    int rc = find_overlap(v, rows, count, ndim, pair, err);
    *ret_apart = rc == 0 && pair[0] == NULL;
    if (rc != 0 || *ret_apart) {
        return rc;
    }
    put_box(texts[0], pair[0], ndim);
    put_box(texts[1], pair[1], ndim);
    dcp_error_clear(&why);
    dcp_error_set(&why, DCP_E_CORRUPT, 0, NULL, "the chunks %s and %s overlap", texts[0], texts[1]);
    return dcp_verify_note(v, index, NULL, &why, err);
}

int
dcp_verify_boxes(struct dcp_verifier *v, uint32_t index, bool must_fill, bool *ret_filled,
                 struct dcp_error *err)
{
    const struct dcp_metadata *md = v->md;
    const struct dcp_md_entry *entry = &md->entries[index];
    uint32_t ndim = entry->ndim, count = 0;
    uint64_t volume = dcp_volume_of(md->dims + entry->size, ndim), covered = 0;
    bool apart = true;
    struct dcp_box_row *rows = NULL;
    int rc = 0;
    *ret_filled = true;
    if (entry->kind != DCP_ITEM_TENSOR || volume == 0) {
        return 0;
    }
    if (entry->chunks_count > 0) {
        rows = entry->chunks_count <= UINT32_MAX
                   ? dcp_malloc_array((size_t)entry->chunks_count, sizeof *rows)
                   : NULL;
        if (rows == NULL) {
            return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                                 "comparing %" PRIu64 " chunks of one tensor: out of memory",
                                 entry->chunks_count);
        }
    }
    for (uint64_t i = 0; i < entry->chunks_count; i++) {
        const uint64_t *box = md->dims + md->chunks[entry->first_chunk + i].dims;
        uint64_t part = dcp_volume_of(box + ndim, ndim);
        if (part > 0) {
            rows[count++] = (struct dcp_box_row){.box = box};
            covered = dcp_add_overflows_u64(covered, part, &covered) ? UINT64_MAX : covered;
        }
    }
    if (count > 1) {
        rc = check_apart(v, index, rows, count, &apart, err);
    }
    *ret_filled = !apart || covered >= volume;
    if (rc == 0 && !*ret_filled && must_fill) {
        struct dcp_error why;
        dcp_error_clear(&why);
        dcp_error_set(&why, DCP_E_HOLE, 0, NULL,
                      "its chunks hold %" PRIu64 " of its %" PRIu64 " elements: part of the tensor "
                      "was not saved or is lost",
                      covered, volume);
        rc = dcp_verify_note(v, index, NULL, &why, err);
    }
    dcp_free(rows);
    return rc;
}

/*
 * share_wants.c: what a rank of a load wants, as it tells the other ranks of its host.
 *
 * Only records of ours can be shared: where their payload lies follows from the metadata, so that
 * all ranks know it without a look into the file.  Of a chunk that is wanted in part, one bit per
 * checksum block says where; which rows in it are wanted is nobody else's business, because a block
 * is read whole or not at all.  With it goes what the rank would read by itself, and how much of
 * that unverified: the schedule shares a chunk only where that saves something.
 *
 * Small: 16 bytes per chunk, and for a partial one 16 bytes and a bit per MiB.
 *
 * Threads: pure functions of their arguments.
 */
#include "share.h"

#include <stdlib.h>
#include <string.h>

#include "reader.h"

static int
compare_visits(const void *left, const void *right)
{
    const struct dcp_share_visit *a = left, *b = right;
    if (a->file != b->file) {
        return a->file < b->file ? -1 : 1;
    }
    if (a->offset_bytes != b->offset_bytes) {
        return a->offset_bytes < b->offset_bytes ? -1 : 1;
    }
    if (a->chunk != b->chunk) {
        return a->chunk < b->chunk ? -1 : 1;
    }
    return a->item < b->item ? -1 : a->item > b->item;
}

void
dcp_share_sort_visits(struct dcp_share_visit *visits, uint64_t count)
{
    for (uint64_t i = 1; i < count; i++) {
        if (compare_visits(&visits[i - 1], &visits[i]) > 0) {
            qsort(visits, count, sizeof *visits, compare_visits);
            return;
        }
    }
}

bool
dcp_share_payload(const struct dcp_metadata *md, uint32_t entry, uint32_t chunk,
                  uint64_t *ret_offset_bytes, uint64_t *ret_payload_bytes)
{
    const struct dcp_md_entry *e = &md->entries[entry];
    const struct dcp_md_chunk *c = &md->chunks[chunk];
    uint64_t bytes = e->kind == DCP_ITEM_TENSOR ? dcp_dtype_bytes(e->dtype) : 0;
    uint64_t end;
    if (md->planned_outside) { /* its records are not known by their lengths */
        return false;
    }
    if (bytes == 0 || c->file == DCP_NO_FILE || c->transforms != 0) {
        return false;
    }
    const uint64_t *sizes = md->dims + c->dims + e->ndim;
    for (uint32_t d = 0; d < e->ndim; d++) {
        if (dcp_mul_overflows_u64(bytes, sizes[d], &bytes) || bytes > DCP_MAX_PAYLOAD_BYTES) {
            return false;
        }
    }
    struct dcp_tensor_shape shape = {
        .dtype = e->dtype, .ndim = e->ndim, .sizes = sizes, .payload_bytes = bytes};
    if (bytes < DCP_SHARE_LEAST_PAYLOAD_BYTES ||
        bytes > (uint64_t)DCP_SHARE_MOST_BLOCKS * DCP_BLOCK_BYTES ||
        c->length_bytes != dcp_record_head_bytes(bytes) + bytes + dcp_record_tail_bytes(&shape) ||
        dcp_add_overflows_u64(c->offset_bytes, c->length_bytes, &end) || end > DCP_MAX_FILE_BYTES) {
        return false;
    }
    *ret_offset_bytes = c->offset_bytes + dcp_record_head_bytes(bytes);
    *ret_payload_bytes = bytes;
    return true;
}

static int
find_visits(const struct dcp_read_plan *plan, struct dcp_share_wants *wants, struct dcp_error *err)
{
    uint64_t count = 0, offset, payload;

    wants->visits = dcp_malloc_array(plan->items_count, sizeof *wants->visits);
    if (wants->visits == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for what a load can share");
    }
    for (uint64_t i = 0; i < plan->items_count; i++) {
        const struct dcp_read_item *item = &plan->items[i];
        uint64_t entry = plan->targets[item->target].entry;
        if (item->chunk > UINT32_MAX || entry > UINT32_MAX ||
            !dcp_share_payload(plan->md, (uint32_t)entry, (uint32_t)item->chunk, &offset,
                               &payload)) {
            continue;
        }
        const struct dcp_md_chunk *chunk = &plan->md->chunks[item->chunk];
        wants->visits[count] = (struct dcp_share_visit){.offset_bytes = chunk->offset_bytes,
                                                        .file = chunk->file,
                                                        .chunk = (uint32_t)item->chunk,
                                                        .item = i};
        count++;
    }
    dcp_share_sort_visits(wants->visits, count);
    wants->visits_count = count;
    return 0;
}

/* Adds what one box wants to a detail. */
static void
add_box(const struct dcp_read_box *box, const struct dcp_engine_options *options, uint64_t *detail)
{
    uint64_t at = 0, from, to;
    while (dcp_read_box_next(box, at, &from, &to)) {
        uint64_t start = from - from % DCP_BLOCK_BYTES;
        at = dcp_min_u64(start + DCP_BLOCK_BYTES, box->payload_bytes);
        uint64_t read = dcp_read_box_spanned(box, at) - dcp_read_box_spanned(box, start);
        /* As the reader does: blocks of which 9/16 are read are read whole and verified. */
        bool whole = options->verify && (options->verify_all || read * 16 > (at - start) * 9);
        uint64_t block = start / DCP_BLOCK_BYTES;
        detail[DCP_SHARE_DETAIL_READ] += whole ? at - start : read;
        detail[DCP_SHARE_DETAIL_WEAK] += whole || !options->verify ? 0 : read;
        detail[DCP_SHARE_DETAIL_BITS + block / 64] |= UINT64_C(1) << (block % 64);
    }
}

/* Describes visits [from, to), which are of one chunk. */
static int
add_want(const struct dcp_read_plan *plan, const struct dcp_engine_options *options, uint64_t from,
         uint64_t to, struct dcp_share_wants *wants, struct dcp_error *err)
{
    const struct dcp_read_item *first = &plan->items[wants->visits[from].item];
    struct dcp_share_want *want = &wants->wants[wants->wants_count++];
    struct dcp_read_box box;
    uint64_t *detail = NULL;

    *want = (struct dcp_share_want){.chunk = (uint32_t)first->chunk,
                                    .entry = (uint32_t)plan->targets[first->target].entry};
    for (uint64_t i = from; i < to; i++) {
        int rc = dcp_read_box_init(&box, plan, &plan->items[wants->visits[i].item],
                                   DCP_READ_GAP_BYTES, err);
        if (rc != 0) {
            return rc;
        }
        wants->wanted_bytes += box.wanted_bytes;
        if (box.wanted_bytes == box.payload_bytes) {
            /* Several items are rare: the detail of an earlier one stays unused. */
            want->detail = 0;
            return 0;
        }
        if (detail == NULL) {
            uint64_t blocks = (box.payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
            size_t bytes = (size_t)(DCP_SHARE_DETAIL_BITS + (blocks + 63) / 64) * sizeof(uint64_t);
            uint64_t index = wants->details.len / sizeof(uint64_t);
            detail = (uint64_t *)(void *)dcp_buf_extend(&wants->details, bytes);
            if (detail == NULL || index >= UINT32_MAX) {
                return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                                     "out of memory for what a load can share");
            }
            memset(detail, 0, bytes);
            want->detail = (uint32_t)index + 1;
        }
        add_box(&box, options, detail);
    }
    detail[DCP_SHARE_DETAIL_READ] = dcp_min_u64(detail[DCP_SHARE_DETAIL_READ], box.payload_bytes);
    return 0;
}

int
dcp_share_wants_build(const struct dcp_read_plan *plan, const struct dcp_engine_options *options,
                      struct dcp_share_wants *ret, struct dcp_error *err)
{
    int rc = find_visits(plan, ret, err);
    if (rc != 0) {
        return rc;
    }
    ret->wants = dcp_malloc_array(ret->visits_count, sizeof *ret->wants);
    if (ret->wants == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for what a load can share");
    }
    for (uint64_t from = 0, to; rc == 0 && from < ret->visits_count; from = to) {
        to = from + 1;
        while (to < ret->visits_count && ret->visits[to].chunk == ret->visits[from].chunk) {
            to++;
        }
        rc = add_want(plan, options, from, to, ret, err);
    }
    return rc;
}

void
dcp_share_wants_clean_up(struct dcp_share_wants *wants)
{
    dcp_free(wants->visits);
    dcp_free(wants->wants);
    dcp_buf_clean_up(&wants->details);
    *wants = (struct dcp_share_wants){0};
}

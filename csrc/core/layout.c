/*
 * layout.c: where each kept record of a plan lies.
 *
 * Every rank computes its own layout and the coordinator computes all of them, from the same plan
 * and bitmap, so nothing about positions is ever sent.  A layout is therefore a pure function:
 * ties are broken by position, and nothing depends on addresses or time.
 *
 *     [file header][gap][record][gap][record] ... [padding][block table][padding][hash table]
 *
 * The gap that puts a payload on its alignment lies before the record, outside what metadata calls
 * the record, so readers of single records never see it.
 *
 * Threads: no state.
 */
#include "plan_private.h"

#include "file_frame.h"

#include <stdlib.h>

static int
out_of_memory(struct dcp_error *err, const struct dcp_plan *plan)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "laying out %u items of rank %u: out of memory",
                         plan->items_count, plan->rank);
}

/* ---- which record goes to which file ---- */

struct weighed {
    uint64_t bytes;
    uint32_t position; /* in layout.records */
};

struct bin {
    uint64_t bytes;
    uint32_t file;
};

/* Largest first; equal ones stay in plan order. */
static int
compare_weighed(const void *left, const void *right)
{
    const struct weighed *a = left, *b = right;
    if (a->bytes != b->bytes) {
        return a->bytes > b->bytes ? -1 : 1;
    }
    return a->position < b->position ? -1 : a->position > b->position;
}

static inline bool
bin_before(const struct bin *a, const struct bin *b)
{
    return a->bytes < b->bytes || (a->bytes == b->bytes && a->file < b->file);
}

/* Restores the heap order (lightest bin at the root) below `at`. */
static void
bins_sift_down(struct bin *bins, uint32_t count, uint32_t at)
{
    struct bin moving = bins[at];
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= count) {
            break;
        }
        if (child + 1 < count && bin_before(&bins[child + 1], &bins[child])) {
            child++;
        }
        if (!bin_before(&bins[child], &moving)) {
            break;
        }
        bins[at] = bins[child];
        at = child;
    }
    bins[at] = moving;
}

/* Objects come first in `records`; they go round robin.  Then tensors, largest first, each to the
 * lightest file.  Leaves `records` in that order, with `file` set. */
static int
spread_over_files(const struct dcp_plan *plan, struct dcp_layout *layout, uint32_t objects_count,
                  struct dcp_error *err)
{
    uint32_t files_count = layout->files_count;
    uint32_t tensors_count = layout->records_count - objects_count;
    struct dcp_placed_record *records = layout->records;
    struct weighed *tensors = dcp_malloc_array(tensors_count, sizeof *tensors);
    struct bin *bins = dcp_malloc_array(files_count, sizeof *bins);
    struct dcp_placed_record *sorted = dcp_malloc_array(tensors_count, sizeof *sorted);
    int rc = 0;
    if (tensors == NULL || bins == NULL || sorted == NULL) {
        rc = out_of_memory(err, plan);
        goto done;
    }
    for (uint32_t f = 0; f < files_count; f++) {
        bins[f] = (struct bin){.file = f};
    }
    for (uint32_t i = 0; i < objects_count; i++) {
        records[i].file = i % files_count;
        bins[records[i].file].bytes += plan->items[records[i].item].slot_bytes;
    }
    for (uint32_t at = files_count / 2; at-- > 0;) {
        bins_sift_down(bins, files_count, at);
    }
    for (uint32_t i = 0; i < tensors_count; i++) {
        const struct dcp_item *item = &plan->items[records[objects_count + i].item];
        tensors[i] = (struct weighed){.bytes = dcp_item_weight_bytes(plan, item), .position = i};
    }
    qsort(tensors, tensors_count, sizeof *tensors, compare_weighed);
    for (uint32_t i = 0; i < tensors_count; i++) {
        sorted[i] = records[objects_count + tensors[i].position];
        sorted[i].file = bins[0].file;
        bins[0].bytes += tensors[i].bytes;
        bins_sift_down(bins, files_count, 0);
    }
    for (uint32_t i = 0; i < tensors_count; i++) {
        records[objects_count + i] = sorted[i];
    }
done:
    dcp_free(tensors);
    dcp_free(bins);
    dcp_free(sorted);
    return rc;
}

/* Makes the records of each file neighbours, order within a file unchanged, and tells each file
 * which are its own. */
static int
group_by_file(const struct dcp_plan *plan, struct dcp_layout *layout, struct dcp_error *err)
{
    struct dcp_placed_record *grouped = dcp_malloc_array(layout->records_count, sizeof *grouped);
    if (grouped == NULL) {
        return out_of_memory(err, plan);
    }
    for (uint32_t i = 0; i < layout->records_count; i++) {
        layout->files[layout->records[i].file].records_count++;
    }
    uint32_t first = 0;
    for (uint32_t f = 0; f < layout->files_count; f++) {
        layout->files[f].first_record = first;
        first += layout->files[f].records_count;
        layout->files[f].records_count = 0;
    }
    for (uint32_t i = 0; i < layout->records_count; i++) {
        struct dcp_placed_file *file = &layout->files[layout->records[i].file];
        grouped[file->first_record + file->records_count++] = layout->records[i];
    }
    dcp_free(layout->records);
    layout->records = grouped;
    return 0;
}

/* ---- where in its file ---- */

static uint64_t
payload_alignment(uint64_t payload_bytes)
{
    return payload_bytes >= DCP_LARGE_PAYLOAD_BYTES    ? DCP_LARGE_ALIGN_BYTES
           : payload_bytes >= DCP_MEDIUM_PAYLOAD_BYTES ? DCP_MEDIUM_ALIGN_BYTES
                                                       : 1;
}

/* Places one record at or behind `cursor`; returns where it ends.  No overflow: `cursor` is at most
 * DCP_MAX_FILE_BYTES and a record a little over DCP_MAX_PAYLOAD_BYTES. */
static uint64_t
place_record(const struct dcp_plan *plan, struct dcp_placed_record *record, uint64_t cursor)
{
    const struct dcp_item *item = &plan->items[record->item];
    uint64_t head = 0;
    if (item->slot_bytes != 0) {
        record->payload_bytes = item->slot_bytes;
        record->length_bytes = item->slot_bytes;
    } else {
        uint64_t payload = dcp_item_payload_bytes(plan, item);
        struct dcp_tensor_shape shape = {
            .dtype = item->dtype,
            .ndim = item->ndim,
            .sizes = dcp_item_sizes(plan, item),
            .payload_bytes = payload,
        };
        head = dcp_record_head_bytes(payload);
        record->payload_bytes = payload;
        record->length_bytes = head + payload + dcp_record_tail_bytes(&shape);
    }
    uint64_t align = payload_alignment(record->payload_bytes);
    record->payload_offset_bytes = dcp_align_up(cursor + head, align);
    record->offset_bytes = record->payload_offset_bytes - head;
    return record->offset_bytes + record->length_bytes;
}

static int
place_file(const struct dcp_plan *plan, struct dcp_layout *layout, struct dcp_placed_file *file,
           struct dcp_error *err)
{
    uint64_t cursor = DCP_FILE_HEADER_BYTES;
    uint64_t blocks = 0;
    uint32_t entries = 0;
    for (uint32_t i = 0; i < file->records_count; i++) {
        struct dcp_placed_record *record = &layout->records[file->first_record + i];
        cursor = place_record(plan, record, cursor);
        layout->payload_bytes += record->payload_bytes; /* less than the files have */
        if (cursor > DCP_MAX_FILE_BYTES) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "file %u of rank %u would be longer than 2^62 bytes", file->index,
                                 plan->rank);
        }
        if (dcp_layout_lists(plan, record)) {
            entries++;
            blocks += (record->payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
        }
    }
    file->table_offset_bytes = entries == 0 ? cursor : dcp_align_up(cursor, DCP_FRAME_ALIGN_BYTES);
    file->table_bytes = entries == 0 ? 0 : dcp_block_table_bytes(entries, blocks);
    file->length_bytes = file->table_offset_bytes + file->table_bytes;
    file->hash_bytes = plan->content_hash ? dcp_hash_table_bytes(file->records_count) : 0;
    if (file->hash_bytes > 0) {
        file->length_bytes =
            dcp_align_up(file->length_bytes, DCP_FRAME_ALIGN_BYTES) + file->hash_bytes;
    }
    file->hash_offset_bytes = file->length_bytes - file->hash_bytes;
    if (dcp_add_overflows_u64(layout->total_bytes, file->length_bytes, &layout->total_bytes)) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "the files of rank %u together are longer than 2^64 bytes",
                             plan->rank);
    }
    return 0;
}

/* ---- the whole ---- */

static inline bool
is_kept(const uint8_t *keep, uint32_t item)
{
    return keep == NULL || dcp_keep_test(keep, item);
}

/* Lists the kept items: objects first within one file; plan order when each has its own. */
static uint32_t
list_kept(const struct dcp_plan *plan, const uint8_t *keep, struct dcp_layout *layout)
{
    uint32_t objects_count = 0, at = 0;
    for (int pass = plan->single_file_per_rank ? 0 : 1; pass < 2; pass++) {
        for (uint32_t i = 0; i < plan->items_count; i++) {
            bool is_object = plan->items[i].kind == DCP_ITEM_BYTES;
            if ((plan->single_file_per_rank && is_object != (pass == 0)) || !is_kept(keep, i)) {
                continue;
            }
            uint32_t file = plan->single_file_per_rank ? 0 : at;
            layout->records[at++] = (struct dcp_placed_record){.item = i, .file = file};
            objects_count += is_object;
        }
    }
    DCP_ASSERT(at == layout->records_count);
    return objects_count;
}

/* Counts the kept items and refuses what has no layout. */
static int
count_kept(const struct dcp_plan *plan, const uint8_t *keep, uint32_t *ret_count,
           struct dcp_error *err)
{
    if (plan->single_file_per_rank &&
        (plan->thread_count == 0 || plan->thread_count > DCP_MAX_FILES_PER_RANK)) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "thread_count of rank %u is %u; it must be from 1 to %u", plan->rank,
                             plan->thread_count, DCP_MAX_FILES_PER_RANK);
    }
    uint32_t count = 0;
    for (uint32_t i = 0; i < plan->items_count; i++) {
        const struct dcp_item *item = &plan->items[i];
        if (!is_kept(keep, i)) {
            continue;
        }
        if (item->kind == DCP_ITEM_BYTES && item->slot_bytes == 0) {
            const struct dcp_name *name = &plan->names[item->name];
            return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                                 "the object %.*s of rank %u has no record length",
                                 dcp_name_clip(name), name->fqn, plan->rank);
        }
        count++;
    }
    *ret_count = count;
    return 0;
}

void
dcp_layout_clean_up(struct dcp_layout *layout)
{
    if (layout == NULL) {
        return;
    }
    dcp_free(layout->files);
    dcp_free(layout->records);
    *layout = (struct dcp_layout){0};
}

int
dcp_layout_build(const struct dcp_plan *plan, const uint8_t *keep, struct dcp_layout *ret_layout,
                 struct dcp_error *err)
{
    struct dcp_layout layout = {0};
    int rc = count_kept(plan, keep, &layout.records_count, err);
    if (rc != 0) {
        return rc;
    }
    layout.files_count = plan->single_file_per_rank ? plan->thread_count : layout.records_count;
    layout.files = dcp_calloc(layout.files_count, sizeof *layout.files);
    layout.records = dcp_malloc_array(layout.records_count, sizeof *layout.records);
    if (layout.files == NULL || layout.records == NULL) {
        rc = out_of_memory(err, plan);
        goto failed;
    }
    uint32_t objects_count = list_kept(plan, keep, &layout);
    if (plan->single_file_per_rank && layout.files_count > 1) {
        rc = spread_over_files(plan, &layout, objects_count, err);
        if (rc != 0) {
            goto failed;
        }
    }
    rc = group_by_file(plan, &layout, err);
    for (uint32_t f = 0; rc == 0 && f < layout.files_count; f++) {
        layout.files[f].index = f;
        rc = place_file(plan, &layout, &layout.files[f], err);
    }
    if (rc != 0) {
        goto failed;
    }
    *ret_layout = layout;
    return 0;
failed:
    dcp_layout_clean_up(&layout);
    return rc;
}

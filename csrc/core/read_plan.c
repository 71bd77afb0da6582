/*
 * read_plan.c: which parts of which saved chunks fill which parts of which targets.
 *
 * Targets are visited grouped by tensor, so the index over a tensor's chunks is built once however
 * many targets it has, and only one exists at a time.  Overlaps come in the order in which a grid
 * is laid, so that they cover the target is mostly proven as they are found, each beginning where
 * the one before it ended.  Where they do not come so (irregular pieces, saved chunks that overlap,
 * or a hole), the volume of their union tells.
 *
 * Threads: a plan belongs to its caller.
 */
#include "dcp_engine.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "box_cover.h"
#include "chunk_index.h"

static int
out_of_memory(struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a read plan");
}

/* Makes room for `more` elements of `size` bytes. */
static int
grow(void **array, uint64_t count, uint64_t *cap, uint64_t more, size_t size, struct dcp_error *err)
{
    uint64_t need, bytes;
    if (dcp_add_overflows_u64(count, more, &need)) {
        return out_of_memory(err);
    }
    if (need <= *cap) {
        return 0;
    }
    uint64_t want = dcp_max_u64(need, *cap < UINT64_MAX / 2 ? *cap * 2 : need);
    want = dcp_max_u64(want, 64);
    if (dcp_mul_overflows_u64(want, size, &bytes) || bytes > SIZE_MAX) {
        return out_of_memory(err);
    }
    void *grown = dcp_realloc(*array, (size_t)bytes);
    if (grown == NULL) {
        return out_of_memory(err);
    }
    *array = grown;
    *cap = want;
    return 0;
}

static int
grow_dims(struct dcp_read_plan *plan, uint64_t more, struct dcp_error *err)
{
    void *dims = plan->dims;
    int rc = grow(&dims, plan->dims_count, &plan->dims_cap, more, sizeof *plan->dims, err);
    plan->dims = dims;
    return rc;
}

static int
grow_items(struct dcp_read_plan *plan, struct dcp_error *err)
{
    void *items = plan->items;
    int rc = grow(&items, plan->items_count, &plan->items_cap, 1, sizeof *plan->items, err);
    plan->items = items;
    return rc;
}

static int
name_len(const struct dcp_md_entry *entry)
{
    return (int)dcp_min_u64(entry->name_len, 256);
}

void
dcp_read_plan_clean_up(struct dcp_read_plan *plan)
{
    if (plan == NULL) {
        return;
    }
    dcp_free(plan->targets);
    dcp_free(plan->items);
    dcp_free(plan->dims);
    dcp_free(plan->delivered);
    memset(plan, 0, sizeof *plan);
}

/* The box must lie in the tensor and its bytes must be countable. */
static int
check_target(const struct dcp_metadata *md, const struct dcp_md_entry *entry,
             const uint64_t *offsets, const uint64_t *sizes, uint64_t *ret_bytes,
             struct dcp_error *err)
{
    uint64_t bytes = dcp_dtype_bytes(entry->dtype);
    const uint64_t *global = md->dims + entry->size;
    bool empty = false;
    for (uint32_t d = 0; d < entry->ndim; d++) {
        empty = empty || sizes[d] == 0;
    }
    for (uint32_t d = 0; d < entry->ndim; d++) {
        if (offsets[d] > global[d] || sizes[d] > global[d] - offsets[d]) {
            return dcp_error_set(err, DCP_E_MISMATCH, 0, NULL,
                                 "%.*s: dim %u of the target is [%" PRIu64 ", %" PRIu64
                                 " + %" PRIu64 "), the saved tensor has %" PRIu64,
                                 name_len(entry), md->strings + entry->name, d, offsets[d],
                                 offsets[d], sizes[d], global[d]);
        }
        if (!empty &&
            (dcp_mul_overflows_u64(bytes, sizes[d], &bytes) || bytes > DCP_MAX_PAYLOAD_BYTES)) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "%.*s: a target of more than 2^56 bytes", name_len(entry),
                                 md->strings + entry->name);
        }
    }
    *ret_bytes = empty ? 0 : bytes;
    return 0;
}

int
dcp_read_plan_add(struct dcp_read_plan *plan, uint64_t entry_index, uint8_t *data,
                  const int64_t *strides_bytes, const uint64_t *offsets, const uint64_t *sizes,
                  uint64_t *ret_target, struct dcp_error *err)
{
    const struct dcp_metadata *md = plan->md;
    if (entry_index >= md->entries_count) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "entry %" PRIu64 " of a checkpoint with %" PRIu64 " entries",
                             entry_index, md->entries_count);
    }
    const struct dcp_md_entry *entry = &md->entries[entry_index];
    bool is_object = entry->kind == DCP_ITEM_BYTES;
    uint32_t ndim = is_object ? 0 : entry->ndim;
    uint64_t bytes = 0;
    int rc = is_object ? 0 : check_target(md, entry, offsets, sizes, &bytes, err);
    if (rc != 0) {
        return rc;
    }
    void *targets = plan->targets;
    rc = grow(&targets, plan->targets_count, &plan->targets_cap, 1, sizeof *plan->targets, err);
    plan->targets = targets;
    if (rc == 0) {
        rc = grow_dims(plan, 2 * (uint64_t)ndim, err);
    }
    if (rc != 0) {
        return rc;
    }
    plan->targets[plan->targets_count] = (struct dcp_target){.entry = entry_index,
                                                             .data = data,
                                                             .strides_bytes = strides_bytes,
                                                             .dims = plan->dims_count};
    for (uint32_t d = 0; d < ndim; d++) {
        plan->dims[plan->dims_count++] = offsets[d];
    }
    for (uint32_t d = 0; d < ndim; d++) {
        plan->dims[plan->dims_count++] = sizes[d];
    }
    plan->wanted_bytes += bytes;
    plan->objects_count += is_object ? 1 : 0;
    if (ret_target != NULL) {
        *ret_target = plan->targets_count;
    }
    plan->targets_count++;
    return 0;
}

/* ---- overlaps ---- */

struct builder {
    struct dcp_read_plan *plan;
    struct dcp_chunk_index index;
    struct dcp_tiling tiling; /* of the current target by its overlaps */
    uint64_t *boxes;    /* of the current target: 2 * ndim numbers per overlap, in the target */
    uint64_t boxes_cap; /* numbers */
    uint64_t hole_bytes;
    bool strict;
};

/* Only a chunk that storage_data knows can be read. */
static int
check_chunk(const struct dcp_metadata *md, const struct dcp_md_entry *entry, uint64_t chunk_index,
            struct dcp_error *err)
{
    const struct dcp_md_chunk *chunk = &md->chunks[chunk_index];
    if (chunk->file == DCP_NO_FILE) {
        return dcp_error_set(err, DCP_E_MISSING, 0, NULL,
                             "%.*s: the checkpoint's storage_data does not say where chunk "
                             "%" PRIu64 " lies",
                             name_len(entry), md->strings + entry->name,
                             chunk_index - entry->first_chunk);
    }
    return 0;
}

static int
add_item(struct dcp_read_plan *plan, uint64_t target, uint64_t chunk, struct dcp_error *err)
{
    int rc = plan->items_count < plan->items_cap ? 0 : grow_items(plan, err);
    if (rc == 0) {
        plan->items[plan->items_count++] =
            (struct dcp_read_item){.chunk = chunk, .target = target, .dims = plan->dims_count};
    }
    return rc;
}

/* Adds the overlap of a chunk with a target as an item, if there is one. */
static int
add_overlap(struct builder *builder, const struct dcp_md_entry *entry, uint64_t target_index,
            uint64_t chunk_index, struct dcp_error *err)
{
    struct dcp_read_plan *plan = builder->plan;
    const struct dcp_metadata *md = plan->md;
    const uint64_t ndim = entry->ndim;
    const uint64_t *chunk = md->dims + md->chunks[chunk_index].dims;
    int rc = plan->dims_cap - plan->dims_count >= 3 * ndim ? 0 : grow_dims(plan, 3 * ndim, err);
    if (rc != 0) {
        return rc;
    }
    const uint64_t *target = plan->dims + plan->targets[target_index].dims;
    uint64_t *overlap = plan->dims + plan->dims_count;
    for (uint64_t d = 0; d < ndim; d++) {
        uint64_t start = dcp_max_u64(chunk[d], target[d]);
        uint64_t end = dcp_min_u64(chunk[d] + chunk[ndim + d], target[d] + target[ndim + d]);
        if (start >= end) {
            return 0;
        }
        overlap[d] = start - chunk[d];
        overlap[ndim + d] = start - target[d];
        overlap[2 * ndim + d] = end - start;
    }
    rc = check_chunk(md, entry, chunk_index, err);
    if (rc == 0) {
        rc = add_item(plan, target_index, chunk_index, err);
    }
    if (rc == 0) {
        plan->dims_count += 3 * ndim;
        dcp_tiling_add(&builder->tiling, overlap + ndim, overlap + 2 * ndim);
    }
    return rc;
}

static void
box_text(const uint64_t *box, uint32_t ndim, char *text, size_t cap)
{
    size_t at = (size_t)snprintf(text, cap, "[");
    for (uint32_t d = 0; d < ndim && at < cap; d++) {
        at += (size_t)snprintf(text + at, cap - at, "%s%" PRIu64 ":%" PRIu64, d > 0 ? ", " : "",
                               box[d], box[d] + box[ndim + d]);
    }
    if (at < cap) {
        snprintf(text + at, cap - at, "]");
    }
}

/* Elements of a target that the items from `first_item` on cover. */
static int
covered_volume(struct builder *builder, uint32_t ndim, uint64_t first_item, uint64_t *ret_volume,
               struct dcp_error *err)
{
    const struct dcp_read_plan *plan = builder->plan;
    uint64_t count = plan->items_count - first_item;
    void *boxes = builder->boxes;
    int rc = grow(&boxes, 0, &builder->boxes_cap, dcp_max_u64(count * 2 * ndim, 1),
                  sizeof *builder->boxes, err);
    builder->boxes = boxes;
    if (rc != 0) {
        return rc;
    }
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t *in_target = plan->dims + plan->items[first_item + i].dims + ndim;
        for (uint64_t n = 0; n < 2 * (uint64_t)ndim; n++) {
            builder->boxes[i * 2 * ndim + n] = in_target[n];
        }
    }
    struct dcp_box_list list = {builder->boxes, count, ndim};
    return dcp_boxes_union_volume(&list, ret_volume, err);
}

/* Compares what the overlaps, the items from `first_item` on, cover with what the target asks for.
 */
static int
check_coverage(struct builder *builder, const struct dcp_md_entry *entry, uint64_t target_index,
               uint64_t first_item, struct dcp_error *err)
{
    struct dcp_read_plan *plan = builder->plan;
    const uint64_t *target = plan->dims + plan->targets[target_index].dims;
    uint64_t covered, volume = 1;
    if (dcp_tiling_holds(&builder->tiling)) {
        return 0;
    }
    int rc = covered_volume(builder, entry->ndim, first_item, &covered, err);
    if (rc != 0) {
        return rc;
    }
    for (uint32_t d = 0; d < entry->ndim; d++) {
        volume *= target[entry->ndim + d];
    }
    DCP_ASSERT(covered <= volume);
    uint64_t hole_bytes = (volume - covered) * dcp_dtype_bytes(entry->dtype);
    builder->hole_bytes += hole_bytes;
    plan->targets[target_index].hole_bytes = hole_bytes;
    if (hole_bytes > 0 && builder->strict) {
        char text[256];
        box_text(target, entry->ndim, text, sizeof text);
        return dcp_error_set(err, DCP_E_HOLE, 0, NULL,
                             "%.*s: the saved chunks lack %" PRIu64 " of the %" PRIu64
                             " bytes of the target box %s; save it again, or load with "
                             "strict_coverage off to keep what is in memory there",
                             name_len(entry), plan->md->strings + entry->name, hole_bytes,
                             volume * dcp_dtype_bytes(entry->dtype), text);
    }
    return 0;
}

static int
build_target(struct builder *builder, uint64_t target_index, struct dcp_error *err)
{
    struct dcp_read_plan *plan = builder->plan;
    struct dcp_chunk_index *index = &builder->index;
    uint64_t entry_index = plan->targets[target_index].entry;
    const struct dcp_md_entry *entry = &plan->md->entries[entry_index];
    if (entry->kind == DCP_ITEM_BYTES) {
        int rc = check_chunk(plan->md, entry, entry->first_chunk, err);
        return rc == 0 ? add_item(plan, target_index, entry->first_chunk, err) : rc;
    }
    uint64_t starts[DCP_MAX_DIMS], ends[DCP_MAX_DIMS], sizes[DCP_MAX_DIMS];
    const uint64_t *box = plan->dims + plan->targets[target_index].dims;
    for (uint32_t d = 0; d < entry->ndim; d++) {
        starts[d] = box[d];
        sizes[d] = box[entry->ndim + d];
        ends[d] = starts[d] + sizes[d];
        if (sizes[d] == 0) {
            return 0;
        }
    }
    int rc = dcp_chunk_index_build(index, plan->md, entry_index, err);
    if (rc != 0) {
        return rc;
    }
    uint64_t first_item = plan->items_count;
    dcp_tiling_init(&builder->tiling, entry->ndim, sizes);
    for (uint64_t at = dcp_chunk_index_next(index, starts, ends, 0); at < index->chunks_count;
         at = dcp_chunk_index_next(index, starts, ends, at + 1)) {
        rc = add_overlap(builder, entry, target_index, dcp_chunk_index_at(index, at), err);
        if (rc != 0) {
            return rc;
        }
    }
    return check_coverage(builder, entry, target_index, first_item, err);
}

struct visit {
    uint64_t entry, target;
};

static int
compare_visits(const void *left, const void *right)
{
    const struct visit *a = left, *b = right;
    if (a->entry != b->entry) {
        return a->entry < b->entry ? -1 : 1;
    }
    return a->target < b->target ? -1 : a->target > b->target;
}

int
dcp_read_plan_build(struct dcp_read_plan *plan, bool strict, uint64_t *ret_hole_bytes,
                    struct dcp_error *err)
{
    struct builder builder = {.plan = plan, .strict = strict};
    struct visit *visits = dcp_malloc_array(plan->targets_count, sizeof *visits);
    if (visits == NULL) {
        return out_of_memory(err);
    }
    bool sorted = true;
    for (uint64_t i = 0; i < plan->targets_count; i++) {
        visits[i] = (struct visit){plan->targets[i].entry, i};
        sorted = sorted && (i == 0 || visits[i - 1].entry <= visits[i].entry);
    }
    if (!sorted) {
        qsort(visits, plan->targets_count, sizeof *visits, compare_visits);
    }
    int rc = 0;
    plan->items_count = 0;
    for (uint64_t i = 0; rc == 0 && i < plan->targets_count; i++) {
        rc = build_target(&builder, visits[i].target, err);
    }
    if (rc == 0 && ret_hole_bytes != NULL) {
        *ret_hole_bytes = builder.hole_bytes;
    }
    dcp_chunk_index_clean_up(&builder.index);
    dcp_free(builder.boxes);
    dcp_free(visits);
    return rc;
}

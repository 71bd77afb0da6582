/*
 * read_box.c: which bytes of a payload an overlap wants, in what order, and where they belong.
 *
 * Payload positions and positions in the overlap's own row-major image map to each other
 * monotonically, so one function in each direction answers everything: how much of a block is
 * wanted is a difference of two counts, what a piece of the payload fills is a range of the image.
 *
 * Threads: pure functions of their arguments.
 */
#include "read_box.h"

#include <string.h>

#include "box.h"

static const struct dcp_md_entry *
entry_of(const struct dcp_read_plan *plan, const struct dcp_read_item *item)
{
    return &plan->md->entries[plan->targets[item->target].entry];
}

void
dcp_read_box_aim(struct dcp_read_box *box, const struct dcp_read_plan *plan,
                 const struct dcp_read_item *item, int64_t *ret_strides)
{
    const struct dcp_md_entry *entry = entry_of(plan, item);
    const struct dcp_target *target = &plan->targets[item->target];
    const uint64_t *offsets = plan->dims + item->dims + entry->ndim;
    const uint64_t *lengths = offsets + entry->ndim;
    bool alone = target->kind == DCP_TARGET_OVERLAPS;
    box->plan = plan;
    box->item = item;
    box->ndim = 0;
    box->dtype = entry->dtype;
    box->target_dtype = target->dtype != DCP_DTYPE_NONE ? target->dtype : entry->dtype;
    box->item_bytes = dcp_dtype_bytes(entry->dtype);
    box->handed_over = target->kind != DCP_TARGET_MEMORY;
    box->target_item_bytes = box->handed_over ? 1 : dcp_dtype_bytes(box->target_dtype);
    if (target->strides_bytes != NULL && !alone) {
        memcpy(ret_strides, target->strides_bytes, entry->ndim * sizeof(int64_t));
    } else {
        const uint64_t *sizes = alone ? lengths : plan->dims + target->dims + entry->ndim;
        dcp_box_row_major(entry->ndim, sizes, box->target_item_bytes, ret_strides);
    }
    int64_t at = 0;
    for (uint32_t d = 0; d < entry->ndim && !alone; d++) {
        at += (int64_t)offsets[d] * ret_strides[d];
    }
    box->target = box->handed_over ? NULL : target->data + at;
    box->target_at = box->handed_over ? at : 0;
}

/* Adds a dim, outer ones first, unless it has one element. */
static void
append_dim(struct dcp_read_box *box, uint64_t size, uint64_t offset, uint64_t length,
           int64_t stride)
{
    if (size == 1) {
        return;
    }
    uint32_t last = box->ndim;
    bool full = offset == 0 && length == size;
    if (last > 0 && (box->lengths[last - 1] == 1 ||
                     (full && box->target_strides[last - 1] == stride * (int64_t)size))) {
        box->sizes[last - 1] *= size;
        box->offsets[last - 1] = box->offsets[last - 1] * size + offset;
        box->lengths[last - 1] *= length;
        box->target_strides[last - 1] = stride;
        return;
    }
    box->sizes[last] = size;
    box->offsets[last] = offset;
    box->lengths[last] = length;
    box->target_strides[last] = stride;
    box->ndim++;
}

/* Fills what follows from the dims. */
static void
derive(struct dcp_read_box *box, uint64_t gap_bytes)
{
    uint64_t pitch = box->item_bytes;
    uint64_t inner = box->item_bytes;
    box->row_bytes = box->item_bytes;
    box->row_wanted = box->item_bytes;
    bool in_row = true;
    for (uint32_t d = box->ndim; d > 0; d--) {
        uint32_t i = d - 1;
        box->pitch[i] = pitch;
        box->inner[i] = inner;
        in_row = in_row && (box->lengths[i] == 1 || pitch - box->row_bytes <= gap_bytes);
        if (in_row) {
            box->row_bytes += (box->lengths[i] - 1) * pitch;
            box->row_wanted = inner * box->lengths[i];
        }
        pitch *= box->sizes[i];
        inner *= box->lengths[i];
    }
    box->wanted_bytes = inner;
    DCP_ASSERT(pitch == box->payload_bytes);
}

/* Common part: the numbers of the chunk hold together. */
static int
check_item(const struct dcp_read_plan *plan, const struct dcp_read_item *item,
           uint64_t *ret_payload_bytes, struct dcp_error *err)
{
    const struct dcp_md_entry *entry = entry_of(plan, item);
    const uint64_t *sizes = plan->md->dims + plan->md->chunks[item->chunk].dims + entry->ndim;
    const uint64_t *dims = plan->dims + item->dims;
    uint64_t bytes = dcp_dtype_bytes(entry->dtype);
    const struct dcp_target *target = &plan->targets[item->target];
    bool fits = target->kind != DCP_TARGET_MEMORY || target->data != NULL;
    for (uint32_t d = 0; d < entry->ndim; d++) {
        fits = fits && !dcp_mul_overflows_u64(bytes, sizes[d], &bytes) &&
               bytes <= DCP_MAX_PAYLOAD_BYTES && dims[d] <= sizes[d] &&
               dims[2 * entry->ndim + d] <= sizes[d] - dims[d] && dims[2 * entry->ndim + d] > 0;
    }
    if (!fits) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                             "%.*s: chunk %llu has sizes that cannot be read",
                             (int)dcp_min_u64(entry->name_len, 256),
                             plan->md->strings + entry->name, (unsigned long long)item->chunk);
    }
    *ret_payload_bytes = bytes;
    return 0;
}

int
dcp_read_box_init(struct dcp_read_box *box, const struct dcp_read_plan *plan,
                  const struct dcp_read_item *item, uint64_t gap_bytes, struct dcp_error *err)
{
    int rc = check_item(plan, item, &box->payload_bytes, err);
    if (rc != 0) {
        return rc;
    }
    const struct dcp_md_entry *entry = entry_of(plan, item);
    uint32_t ndim = entry->ndim;
    const uint64_t *sizes = plan->md->dims + plan->md->chunks[item->chunk].dims + ndim;
    const uint64_t *dims = plan->dims + item->dims;
    int64_t strides[DCP_MAX_DIMS];
    dcp_read_box_aim(box, plan, item, strides);
    for (uint32_t d = 0; d < ndim; d++) {
        append_dim(box, sizes[d], dims[d], dims[2 * ndim + d], strides[d]);
    }
    derive(box, gap_bytes);
    return 0;
}

static bool
is_of_shape(const struct dcp_read_plan *plan, const struct dcp_read_item *item,
            const struct dcp_record_view *view)
{
    const struct dcp_md_entry *entry = entry_of(plan, item);
    const uint64_t *sizes = plan->md->dims + plan->md->chunks[item->chunk].dims + entry->ndim;
    return view->ndim == entry->ndim &&
           memcmp(view->sizes, sizes, entry->ndim * sizeof(uint64_t)) == 0;
}

bool
dcp_read_view_differs(const struct dcp_read_plan *plan, const struct dcp_read_item *item,
                      const struct dcp_record_view *view)
{
    bool has_shape = is_of_shape(plan, item, view);
    return has_shape ? view->dtype != entry_of(plan, item)->dtype : plan->records_decide;
}

/* The dims of a stored tensor from the slowest to the fastest. */
static void
sort_dims(const struct dcp_record_view *view, uint32_t *order)
{
    for (uint32_t i = 0; i < view->ndim; i++) {
        uint32_t at = i;
        while (at > 0 && view->strides[order[at - 1]] < view->strides[i]) {
            order[at] = order[at - 1];
            at--;
        }
        order[at] = i;
    }
}

int
dcp_read_box_init_view(struct dcp_read_box *box, const struct dcp_read_plan *plan,
                       const struct dcp_read_item *item, const struct dcp_record_view *view,
                       uint64_t gap_bytes, bool *ret_dense, struct dcp_error *err)
{
    int rc = check_item(plan, item, &box->payload_bytes, err);
    if (rc != 0) {
        return rc;
    }
    const struct dcp_md_entry *entry = entry_of(plan, item);
    uint32_t ndim = entry->ndim;
    const uint64_t *sizes = plan->md->dims + plan->md->chunks[item->chunk].dims + ndim;
    const uint64_t *dims = plan->dims + item->dims;
    if (view->dtype != entry->dtype || !is_of_shape(plan, item, view)) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                             "%.*s: the record of chunk %llu holds a tensor of another shape or "
                             "dtype than the metadata says",
                             (int)dcp_min_u64(entry->name_len, 256),
                             plan->md->strings + entry->name, (unsigned long long)item->chunk);
    }
    int64_t strides[DCP_MAX_DIMS];
    uint32_t order[DCP_MAX_DIMS];
    dcp_read_box_aim(box, plan, item, strides);
    sort_dims(view, order);
    bool dense = view->storage_offset == 0 && view->payload_bytes == box->payload_bytes;
    int64_t stride = 1;
    for (uint32_t i = ndim; i > 0; i--) {
        dense = dense && (sizes[order[i - 1]] == 1 || view->strides[order[i - 1]] == stride);
        stride *= (int64_t)sizes[order[i - 1]];
    }
    for (uint32_t i = 0; i < ndim; i++) {
        uint32_t d = order[i];
        append_dim(box, sizes[d], dims[d], dims[2 * ndim + d], strides[d]);
    }
    derive(box, gap_bytes);
    *ret_dense = dense;
    return 0;
}

uint64_t
dcp_read_box_below(const struct dcp_read_box *box, uint64_t at)
{
    if (at >= box->payload_bytes) {
        return box->wanted_bytes;
    }
    uint64_t count = 0;
    for (uint32_t d = 0; d < box->ndim; d++) {
        uint64_t index = at / box->pitch[d];
        at %= box->pitch[d];
        if (index < box->offsets[d]) {
            return count;
        }
        if (index - box->offsets[d] >= box->lengths[d]) {
            return count + box->lengths[d] * box->inner[d];
        }
        count += (index - box->offsets[d]) * box->inner[d];
    }
    return count + at;
}

/* Payload position of byte `wanted` of the overlap's image. */
static uint64_t
position_of(const struct dcp_read_box *box, uint64_t wanted)
{
    uint64_t at = 0;
    for (uint32_t d = 0; d < box->ndim; d++) {
        at += (box->offsets[d] + wanted / box->inner[d]) * box->pitch[d];
        wanted %= box->inner[d];
    }
    return at + wanted;
}

uint64_t
dcp_read_box_spanned(const struct dcp_read_box *box, uint64_t at)
{
    uint64_t wanted = dcp_read_box_below(box, at);
    uint64_t rest = wanted % box->row_wanted;
    uint64_t spanned = wanted / box->row_wanted * box->row_bytes;
    /* A row begins and ends with wanted bytes, so `at` is inside one exactly when some are left. */
    return rest == 0 ? spanned : spanned + (at - position_of(box, wanted - rest));
}

bool
dcp_read_box_next(const struct dcp_read_box *box, uint64_t at, uint64_t *ret_from, uint64_t *ret_to)
{
    uint64_t wanted = dcp_read_box_below(box, at);
    if (wanted >= box->wanted_bytes) {
        return false;
    }
    uint64_t row = position_of(box, wanted - wanted % box->row_wanted);
    *ret_from = position_of(box, wanted);
    *ret_to = row + box->row_bytes;
    return true;
}

uint8_t *
dcp_read_box_target_run(const struct dcp_read_box *box, uint64_t first, uint64_t count)
{
    if (box->handed_over) {
        return NULL;
    }
    uint64_t run = 1;
    if (box->ndim > 0) {
        uint32_t last = box->ndim - 1;
        if (box->target_strides[last] != (int64_t)box->target_item_bytes) {
            return NULL;
        }
        run = box->lengths[last];
    }
    if (first / run != (first + count - 1) / run) {
        return NULL;
    }
    uint8_t *target = box->target;
    for (uint32_t d = 0; d < box->ndim; d++) {
        uint64_t inner = box->inner[d] / box->item_bytes;
        target += (int64_t)(first / inner) * box->target_strides[d];
        first %= inner;
    }
    return target;
}

uint8_t *
dcp_read_box_run(const struct dcp_read_box *box, uint64_t from, uint64_t to)
{
    DCP_ASSERT(from < to);
    uint64_t first = dcp_read_box_below(box, from);
    if (box->dtype != box->target_dtype || dcp_read_box_below(box, to) - first != to - from) {
        return NULL;
    }
    /* A range may begin and end inside of elements. */
    uint64_t element = first / box->item_bytes;
    uint64_t count = (first + (to - from) - 1) / box->item_bytes + 1 - element;
    uint8_t *run = dcp_read_box_target_run(box, element, count);
    return run == NULL ? NULL : run + first % box->item_bytes;
}

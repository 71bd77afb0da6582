/*
 * validate.c: do the chunks of every tensor lie inside it, apart from each other, and fill it?
 *
 * The answer and its text are those of torch's _validate_global_plan, message by message, because
 * programs match on them.  The way to the answer is another one, since nearly every plan is valid:
 *
 * 1. One pass over a tensor's chunks checks bounds, adds volumes and notices whether the chunks
 *    ascend along some dimension.  FSDP shards do, and are done here.
 * 2. Else the boxes are cut apart (box_apart.c): O(dims * n log n) for grids and nested meshes,
 *    whatever their order.
 * 3. Only what does not fall apart (an overlap, or a pinwheel) is swept as torch does, in torch's
 *    order, to name the overlaps.  That costs n times the boxes in flight, and ends as soon as the
 *    text is full.
 *
 * Empty boxes count as torch counts them: one strictly inside another box overlaps it.
 *
 * Threads: no state.
 */
#include "box_apart.h"
#include "plan_private.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    /* torch cuts the text at this many characters. */
    REPORT_CHARS = 500,
    /* And we where the error record ends: prefix, mark of the cut and a terminator need 64. */
    REPORT_BYTES = DCP_ERROR_MESSAGE_BYTES - 64,
};

/* The joined messages. */
struct report {
    size_t len;
    uint32_t chars;
    bool full; /* something did not fit: text ends with torch's mark, nothing is added */
    char text[REPORT_BYTES];
};

struct validator {
    const struct dcp_global_plan *global;
    struct report report;
    struct dcp_box_row *rows;   /* owned: the chunks of the tensor that is looked at */
    struct dcp_box_row *active; /* owned: those that the sweep line crosses, by (end, index) */
    uint32_t rows_cap;          /* of both */
    uint32_t ndim;              /* of the tensor that is looked at */
    struct dcp_error *err;
};

/* ---- text ---- */

static void
put(struct report *report, const char *text, size_t len)
{
    for (size_t i = 0; i < len && !report->full; i++) {
        bool starts_char = ((uint8_t)text[i] & 0xC0) != 0x80;
        if (starts_char && (report->chars == REPORT_CHARS || report->len + 4 > REPORT_BYTES)) {
            report->full = true;
            return;
        }
        report->chars += starts_char;
        if (report->len < REPORT_BYTES) {
            report->text[report->len++] = text[i];
        }
    }
}

static void
put_text(struct report *report, const char *text)
{
    put(report, text, strlen(text));
}

static void
put_number(struct report *report, uint64_t number)
{
    char digits[24];
    int len = snprintf(digits, sizeof digits, "%" PRIu64, number);
    put(report, digits, (size_t)len);
}

static void
put_size(struct report *report, const uint64_t *numbers, uint32_t count)
{
    put_text(report, "torch.Size([");
    for (uint32_t i = 0; i < count; i++) {
        put_text(report, i == 0 ? "" : ", ");
        put_number(report, numbers[i]);
    }
    put_text(report, "])");
}

/* As Python prints a ChunkStorageMetadata. */
static void
put_chunk(struct report *report, const uint64_t *box, uint32_t ndim)
{
    put_text(report, "ChunkStorageMetadata(offsets=");
    put_size(report, box, ndim);
    put_text(report, ", sizes=");
    put_size(report, box + ndim, ndim);
    put_text(report, ")");
}

/* Begins a message about the entry's tensor. */
static void
put_key(struct validator *v, const struct dcp_global_entry *entry)
{
    const struct dcp_plan *plan = &v->global->plans[entry->plan];
    const struct dcp_name *name = &plan->names[plan->items[entry->item].name];
    put_text(&v->report, v->report.chars == 0 ? "key:" : "; key:");
    put(&v->report, name->fqn, name->fqn_len);
}

/* ---- boxes ---- */

static inline const uint64_t *
chunk_box(const struct dcp_global_plan *global, const struct dcp_global_chunk *chunk,
          uint32_t *ret_ndim)
{
    const struct dcp_plan *plan = &global->plans[chunk->plan];
    const struct dcp_item *item = &plan->items[chunk->item];
    *ret_ndim = item->ndim;
    return dcp_item_offsets(plan, item);
}

static inline bool
box_inside(const uint64_t *box, const uint64_t *size, uint32_t ndim)
{
    for (uint32_t d = 0; d < ndim; d++) {
        if (box[d] + box[ndim + d] > size[d]) {
            return false;
        }
    }
    return true;
}

/* ---- sweeping ---- */

static uint32_t
largest_dim(const uint64_t *size, uint32_t ndim)
{
    uint32_t largest = 0;
    for (uint32_t d = 1; d < ndim; d++) {
        largest = size[d] > size[largest] ? d : largest;
    }
    return largest;
}

struct sweep_order {
    uint32_t ndim;
};

static int
compare_sweep(const void *left, const void *right, void *ctx)
{
    const struct dcp_box_row *a = left, *b = right;
    const struct sweep_order *order = ctx;
    if (a->start != b->start) {
        return a->start < b->start ? -1 : 1;
    }
    for (uint32_t d = 0; d < order->ndim; d++) {
        if (a->box[d] != b->box[d]) {
            return a->box[d] < b->box[d] ? -1 : 1;
        }
    }
    return a->index < b->index ? -1 : a->index > b->index;
}

static inline bool
ends_before(const struct dcp_box_row *a, const struct dcp_box_row *b)
{
    return a->end < b->end || (a->end == b->end && a->index < b->index);
}

/* Puts `row` into active[first..end), which has room for one more. */
static void
activate(struct dcp_box_row *active, uint32_t first, uint32_t end, const struct dcp_box_row *row)
{
    uint32_t low = first, high = end;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (ends_before(&active[middle], row)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    memmove(&active[low + 1], &active[low], (end - low) * sizeof *active);
    active[low] = *row;
}

/* Names every pair that overlaps, in torch's order, until the report is full. */
static void
sweep(struct validator *v, const struct dcp_global_entry *entry, const uint64_t *size,
      uint32_t count)
{
    struct sweep_order order = {.ndim = v->ndim};
    (void)dcp_boxes_look_along(v->rows, count, v->ndim, largest_dim(size, v->ndim));
    qsort_r(v->rows, count, sizeof *v->rows, compare_sweep, &order);
    uint32_t first = 0, end = 0;
    for (uint32_t i = 0; i < count && !v->report.full; i++) {
        const struct dcp_box_row *current = &v->rows[i];
        while (first < end && v->active[first].end <= current->start) {
            first++;
        }
        for (uint32_t a = first; a < end && !v->report.full; a++) {
            if (dcp_boxes_overlap(current->box, v->active[a].box, v->ndim)) {
                put_key(v, entry);
                put_text(&v->report, " has overlapping chunks: ");
                put_chunk(&v->report, current->box, v->ndim);
                put_text(&v->report, " ");
                put_chunk(&v->report, v->active[a].box, v->ndim);
            }
        }
        activate(v->active, first, end++, current);
    }
}

static int
reserve_rows(struct validator *v, uint32_t count)
{
    if (count <= v->rows_cap) {
        return 0;
    }
    dcp_free(v->rows);
    dcp_free(v->active);
    v->rows_cap = 0;
    v->rows = dcp_malloc_array(count, sizeof *v->rows);
    v->active = dcp_malloc_array(count, sizeof *v->active);
    if (v->rows == NULL || v->active == NULL) {
        return dcp_error_set(v->err, DCP_E_NOMEM, 0, NULL,
                             "comparing %u chunks of one tensor: out of memory", count);
    }
    v->rows_cap = count;
    return 0;
}

static int
check_overlaps(struct validator *v, const struct dcp_global_entry *entry, const uint64_t *size)
{
    int rc = reserve_rows(v, entry->chunks_count);
    if (rc != 0) {
        return rc;
    }
    uint32_t count = 0;
    for (uint32_t i = 0; i < entry->chunks_count; i++) {
        uint32_t ndim;
        const uint64_t *box =
            chunk_box(v->global, &v->global->chunks[entry->first_chunk + i], &ndim);
        if (ndim == v->ndim) {
            v->rows[count++] = (struct dcp_box_row){.box = box, .index = i};
        }
    }
    if (count > 1 && !dcp_boxes_fall_apart(v->rows, count, v->ndim)) {
        sweep(v, entry, size, count);
    }
    return 0;
}

/* ---- one tensor ---- */

/* Dimensions (a bit each) along which `box` begins where `before` has ended. */
static inline uint64_t
ascending_dims(const uint64_t *before, const uint64_t *box, uint32_t ndim)
{
    uint64_t dims = 0;
    for (uint32_t d = 0; d < ndim; d++) {
        dims |= (uint64_t)(before[d] + before[ndim + d] <= box[d]) << d;
    }
    return dims;
}

_Static_assert(DCP_MAX_DIMS <= 64, "dimensions are bits of a uint64_t");

/* Bounds of all chunks; their volume (UINT64_MAX when it does not fit) and whether they ascend
 * along one and the same dimension all the way. */
static void
check_chunks(struct validator *v, const struct dcp_global_entry *entry, const uint64_t *size,
             uint64_t *ret_volume, bool *ret_ascend)
{
    uint64_t volume = 0;
    uint64_t ascending = UINT64_MAX;
    const uint64_t *before = NULL;
    for (uint32_t i = 0; i < entry->chunks_count; i++) {
        uint32_t ndim;
        const uint64_t *box =
            chunk_box(v->global, &v->global->chunks[entry->first_chunk + i], &ndim);
        uint64_t chunk_volume;
        bool overflow = dcp_volume_overflows(box + ndim, ndim, &chunk_volume);
        if (overflow || dcp_add_overflows_u64(volume, chunk_volume, &volume)) {
            volume = UINT64_MAX;
        }
        if (ndim != v->ndim || !box_inside(box, size, ndim)) {
            put_key(v, entry);
            put_text(&v->report, " has out of bounds chunk: tensor-size:");
            put_size(&v->report, size, v->ndim);
            put_text(&v->report, " chunk: ");
            put_chunk(&v->report, box, ndim);
        }
        if (ndim != v->ndim) {
            continue;
        }
        if (before != NULL) {
            ascending &= ascending_dims(before, box, ndim);
        }
        before = box;
    }
    *ret_volume = volume;
    *ret_ascend = ascending != 0;
}

static int
check_tensor(struct validator *v, const struct dcp_global_entry *entry)
{
    const struct dcp_plan *plan = &v->global->plans[entry->plan];
    const struct dcp_item *item = &plan->items[entry->item];
    if (item->kind == DCP_ITEM_BYTES || item->ndim == 0) {
        return 0;
    }
    const uint64_t *size = dcp_item_global_size(plan, item);
    uint64_t chunks_volume, volume;
    bool ascend;
    v->ndim = item->ndim;
    check_chunks(v, entry, size, &chunks_volume, &ascend);
    if (!ascend) {
        int rc = check_overlaps(v, entry, size);
        if (rc != 0) {
            return rc;
        }
    }
    bool overflow = dcp_volume_overflows(size, item->ndim, &volume);
    DCP_ASSERT(!overflow);
    (void)overflow;
    if (v->global->plans_count > 1 && chunks_volume != volume) {
        put_key(v, entry);
        put_text(&v->report, " invalid fill tensor-volume: ");
        put_number(&v->report, volume);
        put_text(&v->report, " chunks-volume: ");
        put_number(&v->report, chunks_volume);
    }
    return 0;
}

int
dcp_global_plan_validate(const struct dcp_global_plan *global, struct dcp_error *err)
{
    struct validator v = {.global = global, .err = err};
    int rc = 0;
    for (uint64_t e = 0; rc == 0 && e < global->entries_count && !v.report.full; e++) {
        rc = check_tensor(&v, &global->entries[e]);
    }
    if (rc == 0 && v.report.chars != 0) {
        rc =
            dcp_error_set(err, DCP_E_PLAN, 0, NULL, "Failed to validate global plan: %.*s%s",
                          (int)v.report.len, v.report.text, v.report.full ? "... (truncated)" : "");
    }
    dcp_free(v.rows);
    dcp_free(v.active);
    return rc;
}

/*
 * cut.c: what a cut does to a plan and to the memory its bytes come from.
 *
 * Which tensors are cut is the coordinator's decision (split.c).  It cuts its copies of the plans,
 * every rank cuts its own by the list in its answer, and both are the same again.  A plan that is
 * reused is made whole by the caller each time and cut by the same list, so everything that a cut
 * needs, strides of row-major sources among it, is found when the list is installed: later nothing
 * can fail.
 *
 * Threads: no state.
 */
#include "cut.h"

#include <string.h>

#include "plan_private.h"

/* ---- plans ---- */

static inline bool
fits(const struct dcp_plan *plan, const struct dcp_cut *cut)
{
    const struct dcp_item *item = &plan->items[cut->item];
    if (item->kind == DCP_ITEM_BYTES || item->slot_bytes != 0 || cut->dim >= item->ndim) {
        return false;
    }
    uint64_t rows = dcp_item_sizes(plan, item)[cut->dim];
    return cut->rows_count != 0 && cut->first_row < rows &&
           cut->rows_count <= rows - cut->first_row;
}

void
dcp_plan_cut(struct dcp_plan *plan, const struct dcp_cuts *cuts)
{
    for (uint32_t i = 0; i < cuts->count; i++) {
        const struct dcp_cut *cut = &cuts->cuts[i];
        DCP_ASSERT(cut->item < plan->items_count && fits(plan, cut));
        struct dcp_item *item = &plan->items[cut->item];
        uint64_t *offsets = plan->dims + item->dims + item->ndim;
        uint64_t *sizes = offsets + item->ndim;
        item->kind = DCP_ITEM_SHARD;
        offsets[cut->dim] += cut->first_row;
        sizes[cut->dim] = cut->rows_count;
    }
}

/* ---- messages: count, then of each cut: items since the last one, dim, first row, rows ---- */

enum { CUT_BYTES_MIN = 4 };

void
dcp_cuts_put(struct dcp_buf *buf, const struct dcp_cuts *cuts)
{
    uint32_t next_item = 0;
    dcp_buf_put_varint(buf, cuts->count);
    for (uint32_t i = 0; i < cuts->count; i++) {
        const struct dcp_cut *cut = &cuts->cuts[i];
        DCP_ASSERT(cut->item >= next_item);
        dcp_buf_put_varint(buf, cut->item - next_item);
        dcp_buf_put_varint(buf, cut->dim);
        dcp_buf_put_varint(buf, cut->first_row);
        dcp_buf_put_varint(buf, cut->rows_count);
        next_item = cut->item + 1;
    }
}

static int
refuse(const struct dcp_plan *plan, uint64_t index, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                         "the coordinator's answer to rank %u is damaged at cut %llu; this is a "
                         "bug, please report it",
                         plan->rank, (unsigned long long)index);
}

static int
take_list(struct dcp_cursor *c, const struct dcp_plan *plan, const uint8_t *keep,
          struct dcp_cuts *list, struct dcp_error *err)
{
    uint64_t count = dcp_cursor_varint(c);
    uint64_t item = 0;
    if (c->failed || count > (c->len - c->pos) / CUT_BYTES_MIN || count > plan->items_count) {
        return refuse(plan, 0, err);
    }
    list->cuts = dcp_malloc_array((size_t)count, sizeof *list->cuts);
    if (list->cuts == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for %llu cuts of a plan",
                             (unsigned long long)count);
    }
    for (uint64_t i = 0; i < count; i++, item++) {
        uint64_t skipped = dcp_cursor_varint(c), dim = dcp_cursor_varint(c);
        struct dcp_cut cut = {.dim = (uint32_t)dim, .first_row = dcp_cursor_varint(c)};
        cut.rows_count = dcp_cursor_varint(c);
        if (c->failed || item >= plan->items_count || skipped >= plan->items_count - item ||
            dim >= DCP_MAX_DIMS) {
            return refuse(plan, i, err);
        }
        item += skipped;
        cut.item = (uint32_t)item;
        if (!dcp_keep_test(keep, cut.item) || !fits(plan, &cut)) {
            return refuse(plan, i, err);
        }
        list->cuts[list->count++] = cut;
    }
    return c->pos == c->len ? 0 : refuse(plan, count, err);
}

static int
find_strides(struct dcp_own_cuts *own, const struct dcp_plan *plan, struct dcp_error *err)
{
    size_t count = 0;
    for (uint32_t i = 0; i < own->list.count; i++) {
        count += plan->items[own->list.cuts[i].item].ndim;
    }
    own->strides_bytes = dcp_malloc_array(count, sizeof *own->strides_bytes);
    if (own->strides_bytes == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the strides of %u cuts",
                             own->list.count);
    }
    int64_t *strides = own->strides_bytes;
    for (uint32_t i = 0; i < own->list.count; i++) {
        const struct dcp_item *item = &plan->items[own->list.cuts[i].item];
        const uint64_t *sizes = dcp_item_sizes(plan, item);
        uint64_t stride = dcp_dtype_bytes(item->dtype); /* times sizes: checked, at most 2^56 */
        for (uint32_t d = item->ndim; d-- > 0; stride *= sizes[d]) {
            strides[d] = (int64_t)stride;
        }
        strides += item->ndim;
    }
    return 0;
}

int
dcp_cuts_take(struct dcp_cursor *c, const struct dcp_plan *plan, const uint8_t *keep,
              struct dcp_own_cuts *ret_own, struct dcp_error *err)
{
    struct dcp_own_cuts own = {0};
    int rc = take_list(c, plan, keep, &own.list, err);
    if (rc == 0) {
        rc = find_strides(&own, plan, err);
    }
    if (rc != 0) {
        dcp_own_cuts_clean_up(&own);
        return rc;
    }
    *ret_own = own;
    return 0;
}

void
dcp_own_cuts_clean_up(struct dcp_own_cuts *own)
{
    if (own == NULL) {
        return;
    }
    dcp_free(own->list.cuts);
    dcp_free(own->strides_bytes);
    *own = (struct dcp_own_cuts){0};
}

/* ---- sources ---- */

/* Rows of a row-major box are one run of memory when no dimension before theirs counts. */
static bool
rows_are_a_run(const struct dcp_plan *plan, const struct dcp_item *item, uint32_t dim)
{
    const uint64_t *sizes = dcp_item_sizes(plan, item);
    for (uint32_t d = 0; d < dim; d++) {
        if (sizes[d] != 1) {
            return false;
        }
    }
    return true;
}

void
dcp_cuts_fit_sources(const struct dcp_own_cuts *own, const struct dcp_plan *plan,
                     struct dcp_source *sources)
{
    const int64_t *row_major = own->strides_bytes;
    for (uint32_t i = 0; i < own->list.count; i++) {
        const struct dcp_cut *cut = &own->list.cuts[i];
        const struct dcp_item *item = &plan->items[cut->item];
        struct dcp_source *source = &sources[cut->item];
        if (source->strides_bytes != NULL) {
            source->data += source->strides_bytes[cut->dim] * (int64_t)cut->first_row;
        } else {
            source->data += row_major[cut->dim] * (int64_t)cut->first_row;
            source->strides_bytes = rows_are_a_run(plan, item, cut->dim) ? NULL : row_major;
        }
        row_major += item->ndim;
    }
}

/*
 * read_delivery.c: how far the memory of each target of a read plan has come.
 *
 * A load writes into memory that a training job goes on using, so one that fails must say which
 * tensors it has overwritten and which it left half way.  One word per target serves: a bit that
 * says "may have been written to", set before the first byte can arrive, and the bytes delivered.
 * What a target should get is summed only when somebody asks, after a failure.
 *
 * Threads: whoever delivers may add; states are asked for when nobody delivers any more.
 */
#include "dcp_engine.h"

#include "dcp_alloc.h"
#include "dcp_dtype.h"

int
dcp_read_plan_track(struct dcp_read_plan *plan, struct dcp_error *err)
{
    DCP_ASSERT(plan->delivered == NULL);
    plan->delivered = dcp_calloc(dcp_max_u64(plan->targets_count, 1), sizeof *plan->delivered);
    if (plan->delivered == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a load's progress");
    }
    return 0;
}

uint64_t
dcp_read_item_bytes(const struct dcp_read_plan *plan, const struct dcp_read_item *item)
{
    const struct dcp_md_entry *entry = &plan->md->entries[plan->targets[item->target].entry];
    if (entry->kind == DCP_ITEM_BYTES) {
        return plan->md->chunks[item->chunk].length_bytes;
    }
    const uint64_t *lengths = plan->dims + item->dims + 2 * (uint64_t)entry->ndim;
    uint64_t bytes = dcp_dtype_bytes(entry->dtype);
    for (uint32_t d = 0; d < entry->ndim; d++) {
        bytes *= lengths[d];
    }
    return bytes;
}

int
dcp_read_plan_states(const struct dcp_read_plan *plan, enum dcp_target_state objects,
                     uint8_t *ret_states, struct dcp_error *err)
{
    uint64_t *wanted = dcp_calloc(dcp_max_u64(plan->targets_count, 1), sizeof *wanted);
    if (wanted == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a load's report");
    }
    for (uint64_t i = 0; i < plan->items_count; i++) {
        wanted[plan->items[i].target] += dcp_read_item_bytes(plan, &plan->items[i]);
    }
    for (uint64_t i = 0; i < plan->targets_count; i++) {
        uint64_t word = plan->delivered != NULL ? atomic_load(&plan->delivered[i]) : 0;
        uint64_t bytes = word & ~(DCP_TARGET_TOUCHED | DCP_TARGET_SPOILED);
        if (plan->md->entries[plan->targets[i].entry].kind == DCP_ITEM_BYTES) {
            ret_states[i] = (uint8_t)objects;
        } else if (!(word & DCP_TARGET_TOUCHED)) {
            ret_states[i] = DCP_TARGET_UNTOUCHED;
        } else if (word & DCP_TARGET_SPOILED || bytes < wanted[i]) {
            ret_states[i] = DCP_TARGET_PARTLY;
        } else {
            ret_states[i] = DCP_TARGET_FILLED;
        }
    }
    dcp_free(wanted);
    return 0;
}

bool
dcp_read_item_is_whole(const struct dcp_read_plan *plan, const struct dcp_read_item *item)
{
    const struct dcp_target *target = &plan->targets[item->target];
    const struct dcp_md_entry *entry = &plan->md->entries[target->entry];
    uint32_t ndim = entry->kind == DCP_ITEM_BYTES ? 0 : entry->ndim;
    const uint64_t *lengths = plan->dims + item->dims + 2 * (uint64_t)ndim;
    const uint64_t *wanted = plan->dims + target->dims + ndim;
    const uint64_t *saved = plan->md->dims + plan->md->chunks[item->chunk].dims + ndim;
    for (uint32_t d = 0; d < ndim; d++) {
        if (lengths[d] != wanted[d] || lengths[d] != saved[d]) {
            return false;
        }
    }
    return true;
}

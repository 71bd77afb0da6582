/*
 * global_plan.c: the coordinator's view of all plans: deduplicated, grouped by name, validated,
 * laid out.
 *
 * Grouping is a counting sort by name: entries in the order in which kept items first name them
 * (torch's dict order), the chunks of an entry in plan order, then item order.  The rules about
 * what may share a name are torch's, checked in torch's order, so the first contradiction is the
 * one that torch reports.
 *
 * Threads: no state.  The result is read only.
 */
#include "plan_private.h"

#include <string.h>

enum { NO_ENTRY = UINT32_MAX };

static int
out_of_memory(struct dcp_error *err, uint64_t items)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                         "grouping %llu items of all ranks: out of memory",
                         (unsigned long long)items);
}

static int
check_shares_name(const struct dcp_global_plan *global, const struct dcp_global_entry *entry,
                  uint32_t p, const struct dcp_item *item, struct dcp_error *err)
{
    if (item->kind != DCP_ITEM_SHARD) {
        return dcp_error_set(err, DCP_E_ASSERTION, 0, NULL, "item.index.fqn not in md");
    }
    const struct dcp_plan *first = &global->plans[entry->plan];
    if (first->items[entry->item].kind != DCP_ITEM_BYTES) {
        return 0;
    }
    const struct dcp_name *name = &global->plans[p].names[item->name];
    return dcp_error_set(err, DCP_E_ASSERTION, 0, NULL,
                         "%.*s is an object on rank %u and a shard of a tensor on rank %u; give "
                         "it one type on all ranks",
                         dcp_name_clip(name), name->fqn, first->rank, global->plans[p].rank);
}

/* Opens an entry for every name that a kept item has and counts its items. */
static int
open_entries(struct dcp_global_plan *global, const struct dcp_name_ids *names,
             uint32_t *entry_of_name, struct dcp_error *err)
{
    for (uint32_t p = 0; p < global->plans_count; p++) {
        const struct dcp_plan *plan = &global->plans[p];
        const uint32_t *ids = names->ids + names->first[p];
        for (uint32_t i = 0; i < plan->items_count; i++) {
            if (!dcp_keep_test(global->keep.bits[p], i)) {
                continue;
            }
            uint32_t *entry = &entry_of_name[ids[plan->items[i].name]];
            if (*entry == NO_ENTRY) {
                *entry = (uint32_t)global->entries_count++;
                global->entries[*entry] =
                    (struct dcp_global_entry){.plan = p, .item = i, .chunks_count = 1};
            } else {
                int rc =
                    check_shares_name(global, &global->entries[*entry], p, &plan->items[i], err);
                if (rc != 0) {
                    return rc;
                }
                global->entries[*entry].chunks_count++;
            }
            global->chunks_count++;
        }
    }
    return 0;
}

static void
fill_chunks(struct dcp_global_plan *global, const struct dcp_name_ids *names,
            const uint32_t *entry_of_name, uint64_t *next_chunk)
{
    uint64_t at = 0;
    for (uint64_t e = 0; e < global->entries_count; e++) {
        global->entries[e].first_chunk = at;
        next_chunk[e] = at;
        at += global->entries[e].chunks_count;
    }
    for (uint32_t p = 0; p < global->plans_count; p++) {
        const struct dcp_plan *plan = &global->plans[p];
        const uint32_t *ids = names->ids + names->first[p];
        for (uint32_t i = 0; i < plan->items_count; i++) {
            if (dcp_keep_test(global->keep.bits[p], i)) {
                uint32_t entry = entry_of_name[ids[plan->items[i].name]];
                global->chunks[next_chunk[entry]++] =
                    (struct dcp_global_chunk){.plan = p, .item = i};
            }
        }
    }
}

static int
group_by_name(struct dcp_global_plan *global, const struct dcp_name_ids *names,
              struct dcp_error *err)
{
    int rc = 0;
    uint64_t *next_chunk = NULL;
    uint32_t *entry_of_name = dcp_malloc_array(names->distinct_count, sizeof *entry_of_name);
    global->entries = dcp_malloc_array(names->distinct_count, sizeof *global->entries);
    if (entry_of_name == NULL || global->entries == NULL) {
        rc = out_of_memory(err, names->distinct_count);
        goto done;
    }
    memset(entry_of_name, 0xFF, names->distinct_count * sizeof *entry_of_name);
    rc = open_entries(global, names, entry_of_name, err);
    if (rc != 0) {
        goto done;
    }
    global->chunks = dcp_malloc_array((size_t)global->chunks_count, sizeof *global->chunks);
    next_chunk = dcp_malloc_array((size_t)global->entries_count, sizeof *next_chunk);
    if (global->chunks == NULL || next_chunk == NULL) {
        rc = out_of_memory(err, global->chunks_count);
        goto done;
    }
    fill_chunks(global, names, entry_of_name, next_chunk);
done:
    dcp_free(entry_of_name);
    dcp_free(next_chunk);
    return rc;
}

static int
lay_out(struct dcp_global_plan *global, struct dcp_error *err)
{
    global->layouts = dcp_calloc(global->plans_count, sizeof *global->layouts);
    if (global->layouts == NULL) {
        return out_of_memory(err, global->chunks_count);
    }
    for (uint32_t p = 0; p < global->plans_count; p++) {
        int rc =
            dcp_layout_build(&global->plans[p], global->keep.bits[p], &global->layouts[p], err);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

void
dcp_global_plan_clean_up(struct dcp_global_plan *global)
{
    if (global == NULL) {
        return;
    }
    for (uint32_t p = 0; global->layouts != NULL && p < global->plans_count; p++) {
        dcp_layout_clean_up(&global->layouts[p]);
    }
    dcp_free(global->layouts);
    dcp_free(global->entries);
    dcp_free(global->chunks);
    dcp_keep_clean_up(&global->keep);
    *global = (struct dcp_global_plan){0};
}

/* `cuttable`: the plans again, or NULL when nothing is cut. */
static int
build(const struct dcp_plan *plans, struct dcp_plan *cuttable, uint32_t plans_count,
      bool to_lowest_rank, uint64_t split_bytes, struct dcp_global_plan *ret_global,
      struct dcp_error *err)
{
    struct dcp_global_plan global = {.plans = plans, .plans_count = plans_count};
    struct dcp_name_ids names = {0};
    int rc = dcp_name_ids_build(plans, plans_count, &names, err);
    if (rc == 0) {
        rc = dcp_plan_dedup_named(plans, plans_count, &names, to_lowest_rank, split_bytes,
                                  &global.keep, err);
    }
    for (uint32_t p = 0; rc == 0 && global.keep.cuts != NULL && p < plans_count; p++) {
        dcp_plan_cut(&cuttable[p], &global.keep.cuts[p]);
    }
    if (rc == 0) {
        rc = group_by_name(&global, &names, err);
    }
    dcp_name_ids_clean_up(&names);
    if (rc == 0) {
        rc = dcp_global_plan_validate(&global, err);
    }
    if (rc == 0) {
        rc = lay_out(&global, err);
    }
    if (rc != 0) {
        dcp_global_plan_clean_up(&global);
        return rc;
    }
    *ret_global = global;
    return 0;
}

int
dcp_global_plan_build(const struct dcp_plan *plans, uint32_t plans_count, bool to_lowest_rank,
                      struct dcp_global_plan *ret_global, struct dcp_error *err)
{
    return build(plans, NULL, plans_count, to_lowest_rank, DCP_SPLIT_OFF, ret_global, err);
}

int
dcp_global_plan_build_split(struct dcp_plan *plans, uint32_t plans_count, uint64_t split_bytes,
                            struct dcp_global_plan *ret_global, struct dcp_error *err)
{
    return build(plans, plans, plans_count, false, split_bytes, ret_global, err);
}

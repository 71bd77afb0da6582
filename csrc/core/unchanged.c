/*
 * unchanged.c: how much of a save is what the save before it was.
 *
 * The writer computes a checksum of every payload anyway, so all that is kept is 4 bytes per item
 * of the installed plan, and all that is done is a comparison.  A 32-bit checksum is good enough to
 * count with and to warn by, and nothing else is decided by it: what is not written again is
 * decided by 128 bits (incremental.c).
 *
 * An item that is reused from a base has no checksum of its own.  It is the old one when the base
 * is the very save that the old one is of; else it is not known, and the next save is not compared
 * in this item.
 *
 * Threads: those of the save, one at a time; several saves of one plan, each on threads of its own.
 */
#include "save.h"

#include <string.h>

void
dcp_last_crcs_clean_up(struct dcp_last_crcs *last)
{
    dcp_free(last->crcs);
    dcp_free(last->known);
    memset(last, 0, sizeof *last);
}

static bool
is_floating(uint8_t dtype)
{
    switch (dtype) {
    case DCP_DTYPE_FLOAT16:
    case DCP_DTYPE_BFLOAT16:
    case DCP_DTYPE_FLOAT32:
    case DCP_DTYPE_FLOAT64:
    case DCP_DTYPE_FLOAT8_E4M3FN:
    case DCP_DTYPE_FLOAT8_E4M3FNUZ:
    case DCP_DTYPE_FLOAT8_E5M2:
    case DCP_DTYPE_FLOAT8_E5M2FNUZ:
    case DCP_DTYPE_FLOAT8_E8M0FNU:
    case DCP_DTYPE_FLOAT4_E2M1FN_X2:
        return true;
    default:
        return false;
    }
}

static bool
wants_gradients(const struct dcp_item *item)
{
    return item->kind != DCP_ITEM_BYTES && (item->props & DCP_PROP_REQUIRES_GRAD) != 0;
}

/* Most state dicts hold detached tensors, of which none says what is trained. */
static bool
any_wants_gradients(const struct dcp_plan *plan)
{
    for (uint32_t i = 0; i < plan->items_count; i++) {
        if (wants_gradients(&plan->items[i])) {
            return true;
        }
    }
    return false;
}

static bool
is_reused(const struct dcp_save *save, uint32_t item)
{
    return save->compared && dcp_keep_test(save->reuse.reused, item);
}

/* The checksums of the group's last save, if that saved this very plan. */
static const struct dcp_last_crcs *
last_of_plan(struct dcp_save *save)
{
    return save->installed->last.crcs != NULL ? &save->installed->last : NULL;
}

static bool
knows(const struct dcp_last_crcs *last, uint32_t item)
{
    return last != NULL && dcp_keep_test(last->known, item);
}

static void
remember(struct dcp_last_crcs *crcs, uint32_t item, uint32_t crc)
{
    crcs->crcs[item] = crc;
    dcp_keep_set(crcs->known, item);
}

static int
gather_crcs(struct dcp_save *save, const uint32_t *crcs, const struct dcp_last_crcs *last,
            struct dcp_error *err)
{
    const struct dcp_layout *layout = dcp_save_layout(save);
    uint32_t items_count = save->plan.items_count;

    dcp_last_crcs_clean_up(&save->crcs);
    save->crcs.save_id = save->info.save_id;
    save->crcs.crcs = dcp_malloc_array(items_count, sizeof *save->crcs.crcs);
    save->crcs.known = dcp_calloc(dcp_keep_bytes(items_count), 1);
    if (save->crcs.crcs == NULL || save->crcs.known == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the checksums of %u items",
                             items_count);
    }
    for (uint32_t i = 0; i < layout->records_count; i++) {
        remember(&save->crcs, layout->records[i].item, crcs[i]);
    }
    if (!save->compared || last == NULL ||
        memcmp(&last->save_id, &save->reuse.base_id, sizeof last->save_id) != 0) {
        return 0;
    }
    for (uint32_t i = 0; i < items_count; i++) {
        if (is_reused(save, i) && knows(last, i)) {
            remember(&save->crcs, i, last->crcs[i]);
        }
    }
    return 0;
}

static int
count_locked(struct dcp_save *save, const uint32_t *crcs, struct dcp_error *err)
{
    const struct dcp_last_crcs *last = last_of_plan(save);
    const struct dcp_plan *plan = &save->plan;
    const uint8_t *keep = save->installed->keep;
    bool by_gradients = any_wants_gradients(plan);
    struct dcp_save_info *info = &save->info;
    int rc = gather_crcs(save, crcs, last, err);

    for (uint32_t i = 0; rc == 0 && i < plan->items_count; i++) {
        const struct dcp_item *item = &plan->items[i];
        uint64_t bytes = dcp_item_weight_bytes(plan, item);
        bool compared, unchanged;

        if (!dcp_keep_test(keep, i)) {
            continue;
        }
        compared = is_reused(save, i) || (knows(last, i) && knows(&save->crcs, i));
        unchanged = compared && (is_reused(save, i) || last->crcs[i] == save->crcs.crcs[i]);
        info->compared_items += compared;
        info->unchanged_items += unchanged;
        info->unchanged_bytes += unchanged ? bytes : 0;
        if (by_gradients ? wants_gradients(item) : is_floating(item->dtype)) {
            info->trainable_items++;
            info->trainable_bytes += bytes;
            info->trainable_unchanged += unchanged;
        }
    }
    return rc;
}

int
dcp_unchanged_count(struct dcp_save *save, const uint32_t *crcs, struct dcp_error *err)
{
    int rc;

    pthread_mutex_lock(&save->installed->lock);
    rc = count_locked(save, crcs, err);
    pthread_mutex_unlock(&save->installed->lock);
    return rc;
}

void
dcp_unchanged_keep(struct dcp_save *save)
{
    struct dcp_installed_plan *installed = save->installed;

    if (save->crcs.crcs != NULL && installed != NULL) {
        pthread_mutex_lock(&installed->lock);
        dcp_last_crcs_clean_up(&installed->last);
        installed->last = save->crcs;
        memset(&save->crcs, 0, sizeof save->crcs);
        pthread_mutex_unlock(&installed->lock);
    }
}

/*
 * dedup.c: which rank writes an item that several ranks hold.
 *
 * Items are the same when name and offsets are (torch's MetadataIndex; an object, which has no
 * offsets, is another key than a 0-d tensor).  Keys are numbered in order of first appearance over
 * plans and items, which is torch's order of decision.  What only one rank holds is its own to
 * write and counts first.  The other keys follow, large ones before all others (by the power of two
 * of their bytes), else in order of appearance: the holder with the fewest bytes so far keeps the
 * key, the lowest rank on a tie.  torch goes by appearance and weighs an item by its global size;
 * we weigh by the bytes that its holder really writes, and small ones even out what large ones
 * leave.  A tensor that would unbalance the ranks even so may be divided (split.c).
 *
 * One hash table over keys, two counting sorts: linear in items.  Memory is known before the first
 * allocation: 36 bytes an item and the table.
 *
 * Threads: no state.
 */
#include "dedup.h"

#include <string.h>

#include "split.h"

enum { CLASSES = 64 };

static void
dedup_clean_up(struct dedup *d)
{
    dcp_free(d->key_of);
    dcp_free(d->keys);
    dcp_free(d->slots);
    dcp_free(d->first_holder);
    dcp_free(d->holders);
    dcp_free(d->order);
    dcp_free(d->loads_bytes);
    *d = (struct dedup){0};
}

static int
out_of_memory(struct dcp_error *err, uint64_t items)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                         "finding replicas among %llu items of all ranks: out of memory",
                         (unsigned long long)items);
}

/* ---- keys ---- */

static inline uint64_t
mix(uint64_t a, uint64_t b)
{
    unsigned __int128 product =
        (unsigned __int128)(a ^ 0x9E3779B97F4A7C15u) * (b ^ 0xD6E8FEB86659FD93u);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint32_t
hash_key(const struct dcp_plan *plan, const struct dcp_item *item, uint32_t name_id)
{
    bool is_object = item->kind == DCP_ITEM_BYTES;
    uint64_t hash = mix(name_id, (uint64_t)item->ndim << 1 | is_object);
    const uint64_t *offsets = dcp_item_offsets(plan, item);
    for (uint32_t d = 0; d < item->ndim; d++) {
        hash = mix(hash, offsets[d]);
    }
    return (uint32_t)(hash >> 32);
}

static inline bool
same_key(const struct dedup *d, const struct dedup_key *key, const struct dcp_plan *plan,
         const struct dcp_item *item, uint32_t name_id)
{
    if (key->name_id != name_id) {
        return false;
    }
    const struct dcp_plan *key_plan = &d->plans[key->plan];
    const struct dcp_item *key_item = &key_plan->items[key->item];
    return key_item->ndim == item->ndim &&
           (key_item->kind == DCP_ITEM_BYTES) == (item->kind == DCP_ITEM_BYTES) &&
           (item->ndim == 0 ||
            memcmp(dcp_item_offsets(key_plan, key_item), dcp_item_offsets(plan, item),
                   item->ndim * sizeof(uint64_t)) == 0);
}

static inline uint32_t
find_or_add_key(struct dedup *d, uint32_t p, uint32_t i, uint32_t name_id)
{
    const struct dcp_plan *plan = &d->plans[p];
    const struct dcp_item *item = &plan->items[i];
    uint32_t hash = hash_key(plan, item, name_id);
    uint64_t mask = d->slots_count - 1;
    uint64_t at = hash & mask;
    for (; d->slots[at].key != 0; at = (at + 1) & mask) {
        uint32_t key = d->slots[at].key - 1;
        if (d->slots[at].hash == hash && same_key(d, &d->keys[key], plan, item, name_id)) {
            d->keys[key].holders_count++;
            return key;
        }
    }
    uint32_t key = d->keys_count++;
    d->keys[key] = (struct dedup_key){.plan = p, .item = i, .name_id = name_id, .holders_count = 1};
    d->slots[at] = (struct dedup_slot){.hash = hash, .key = key + 1};
    return key;
}

static int
number_keys(struct dedup *d, const struct dcp_name_ids *names, struct dcp_error *err)
{
    d->slots_count = 16;
    while (d->slots_count < d->items_count + d->items_count / 2) {
        d->slots_count *= 2;
    }
    d->key_of = dcp_malloc_array((size_t)d->items_count, sizeof *d->key_of);
    d->keys = dcp_malloc_array((size_t)d->items_count, sizeof *d->keys);
    d->slots = dcp_calloc((size_t)d->slots_count, sizeof *d->slots);
    if (d->key_of == NULL || d->keys == NULL || d->slots == NULL) {
        return out_of_memory(err, d->items_count);
    }
    uint32_t *key_of = d->key_of;
    for (uint32_t p = 0; p < d->plans_count; p++) {
        const struct dcp_plan *plan = &d->plans[p];
        const uint32_t *ids = names->ids + names->first[p];
        for (uint32_t i = 0; i < plan->items_count; i++) {
            *key_of++ = find_or_add_key(d, p, i, ids[plan->items[i].name]);
        }
    }
    return 0;
}

/* ---- holders ---- */

/* Records weigh something even when they are empty, so that empties spread too (as torch's do). */
static inline uint64_t
weigh(const struct dedup *d, uint32_t plan, uint32_t item)
{
    const struct dcp_plan *of = &d->plans[plan];
    return dcp_max_u64(dcp_item_weight_bytes(of, &of->items[item]), 1);
}

/* Lists the holders of every key that has several; plan order, then item order. */
static int
list_holders(struct dedup *d, struct dcp_error *err)
{
    d->first_holder = dcp_malloc_array(d->keys_count, sizeof *d->first_holder);
    if (d->first_holder == NULL) {
        return out_of_memory(err, d->items_count);
    }
    uint32_t total = 0;
    for (uint32_t k = 0; k < d->keys_count; k++) {
        d->first_holder[k] = total;
        d->order_count += d->keys[k].holders_count > 1;
        total += d->keys[k].holders_count > 1 ? d->keys[k].holders_count : 0;
    }
    d->holders = dcp_malloc_array(total, sizeof *d->holders);
    if (d->holders == NULL) {
        return out_of_memory(err, d->items_count);
    }
    const uint32_t *key_of = d->key_of;
    for (uint32_t p = 0; p < d->plans_count; p++) {
        for (uint32_t i = 0; i < d->plans[p].items_count; i++) {
            uint32_t key = *key_of++;
            if (d->keys[key].holders_count > 1) {
                d->holders[d->first_holder[key]++] = (struct dedup_holder){.plan = p, .item = i};
            }
        }
    }
    return 0;
}

/* Power of two of a large weight, largest first; small ones are one class. */
static inline unsigned
weight_class(uint64_t weight_bytes)
{
    return weight_bytes < DCP_BALANCE_BYTES ? CLASSES - 1 : (unsigned)__builtin_clzll(weight_bytes);
}

/* Weighs the keys, and sorts those that have several holders. */
static int
order_keys(struct dedup *d, struct dcp_error *err)
{
    uint32_t first[CLASSES] = {0};
    d->order = dcp_malloc_array(d->order_count, sizeof *d->order);
    d->loads_bytes = dcp_calloc(d->plans_count, sizeof *d->loads_bytes);
    if (d->order == NULL || d->loads_bytes == NULL) {
        return out_of_memory(err, d->items_count);
    }
    for (uint32_t k = 0; k < d->keys_count; k++) {
        struct dedup_key *key = &d->keys[k];
        key->weight_bytes = weigh(d, key->plan, key->item);
        if (key->holders_count > 1) {
            d->largest_bytes = dcp_max_u64(d->largest_bytes, key->weight_bytes);
            first[weight_class(key->weight_bytes)]++;
        }
    }
    uint32_t at = 0;
    for (unsigned c = 0; c < CLASSES; c++) {
        uint32_t count = first[c];
        first[c] = at;
        at += count;
    }
    for (uint32_t k = 0; k < d->keys_count; k++) {
        if (d->keys[k].holders_count > 1) {
            d->order[first[weight_class(d->keys[k].weight_bytes)]++] = k;
        }
    }
    return 0;
}

/* ---- decisions ---- */

static void
keep_own_items(struct dedup *d, struct dcp_keep *keep)
{
    for (uint32_t k = 0; k < d->keys_count; k++) {
        const struct dedup_key *key = &d->keys[k];
        if (key->holders_count == 1) {
            struct dedup_holder own = {.plan = key->plan, .item = key->item};
            dedup_keep(d, keep, &own, key->weight_bytes);
        }
    }
}

static uint32_t
lightest_holder(const struct dedup *d, uint32_t k)
{
    const struct dedup_holder *first = dedup_holders(d, k);
    const struct dedup_holder *end = first + d->keys[k].holders_count;
    uint32_t chosen = first->plan;
    for (const struct dedup_holder *h = first; h < end; h++) {
        chosen = d->loads_bytes[h->plan] < d->loads_bytes[chosen] ? h->plan : chosen;
    }
    return chosen;
}

/* Duplicates within the chosen plan are all kept. */
static void
keep_whole(struct dedup *d, struct dcp_keep *keep, uint32_t k, uint32_t chosen)
{
    const struct dedup_holder *first = dedup_holders(d, k);
    const struct dedup_holder *end = first + d->keys[k].holders_count;
    for (const struct dedup_holder *h = first; h < end; h++) {
        if (h->plan == chosen) {
            dedup_keep(d, keep, h, weigh(d, h->plan, h->item));
        } else {
            const struct dcp_plan *plan = &d->plans[h->plan];
            keep->dropped_items++;
            keep->dropped_bytes += dcp_item_weight_bytes(plan, &plan->items[h->item]);
        }
    }
}

static void
keep_at_lowest_rank(struct dedup *d, struct dcp_keep *keep)
{
    keep_own_items(d, keep);
    for (uint32_t i = 0; i < d->order_count; i++) {
        keep_whole(d, keep, d->order[i], dedup_holders(d, d->order[i])->plan);
    }
}

/* What is to be divided comes last and is poured over the loads that the rest has left. */
static int
keep_balanced(struct dedup *d, struct dcp_keep *keep, uint64_t split_bytes, struct dcp_error *err)
{
    struct split split = {0};
    keep_own_items(d, keep);
    int rc = split_prepare(&split, d, split_bytes, err);
    for (uint32_t i = 0; rc == 0 && i < d->order_count; i++) {
        uint32_t key = d->order[i];
        uint32_t chosen = lightest_holder(d, key);
        if (!split_defers(&split, d, key, d->loads_bytes[chosen])) {
            keep_whole(d, keep, key, chosen);
        }
    }
    if (rc == 0) {
        rc = split_pour(&split, d, keep, err);
    }
    split_clean_up(&split);
    return rc;
}

/* ---- bitmaps ---- */

static int
keep_allocate(const struct dcp_plan *plans, uint32_t plans_count, struct dcp_keep *ret_keep,
              struct dcp_error *err)
{
    struct dcp_keep keep = {.count = plans_count};
    size_t bytes = 0;
    for (uint32_t p = 0; p < plans_count; p++) {
        bytes += dcp_keep_bytes(plans[p].items_count);
    }
    keep.bits = dcp_malloc_array(plans_count, sizeof *keep.bits);
    keep.block = dcp_calloc(bytes, 1);
    if (keep.bits == NULL || keep.block == NULL) {
        dcp_keep_clean_up(&keep);
        return out_of_memory(err, bytes * 8);
    }
    uint8_t *at = keep.block;
    for (uint32_t p = 0; p < plans_count; p++) {
        keep.bits[p] = at;
        at += dcp_keep_bytes(plans[p].items_count);
    }
    *ret_keep = keep;
    return 0;
}

void
dcp_keep_clean_up(struct dcp_keep *keep)
{
    if (keep == NULL) {
        return;
    }
    dcp_free(keep->bits);
    dcp_free(keep->block);
    dcp_free(keep->cuts);
    *keep = (struct dcp_keep){0};
}

int
dcp_plan_dedup_named(const struct dcp_plan *plans, uint32_t plans_count,
                     const struct dcp_name_ids *names, bool to_lowest_rank, uint64_t split_bytes,
                     struct dcp_keep *ret_keep, struct dcp_error *err)
{
    struct dedup d = {
        .plans = plans, .plans_count = plans_count, .names_count = names->distinct_count};
    struct dcp_keep keep = {0};
    for (uint32_t p = 0; p < plans_count; p++) {
        d.items_count += plans[p].items_count;
    }
    if (d.items_count > DCP_MAX_GLOBAL_ITEMS) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "the ranks want to save %llu items together, %u are allowed; save "
                             "them in parts",
                             (unsigned long long)d.items_count, DCP_MAX_GLOBAL_ITEMS);
    }
    int rc = keep_allocate(plans, plans_count, &keep, err);
    if (rc != 0) {
        return rc;
    }
    rc = number_keys(&d, names, err);
    if (rc == 0) {
        rc = list_holders(&d, err);
    }
    if (rc == 0) {
        rc = order_keys(&d, err);
    }
    if (rc == 0 && to_lowest_rank) {
        keep_at_lowest_rank(&d, &keep);
    } else if (rc == 0) {
        rc = keep_balanced(&d, &keep, split_bytes, err);
    }
    if (rc == 0) {
        *ret_keep = keep;
    } else {
        dcp_keep_clean_up(&keep);
    }
    dedup_clean_up(&d);
    return rc;
}

int
dcp_plan_dedup(const struct dcp_plan *plans, uint32_t plans_count, bool to_lowest_rank,
               struct dcp_keep *ret_keep, struct dcp_error *err)
{
    struct dcp_name_ids names;
    int rc = dcp_name_ids_build(plans, plans_count, &names, err);
    if (rc != 0) {
        return rc;
    }
    rc = dcp_plan_dedup_named(plans, plans_count, &names, to_lowest_rank, DCP_SPLIT_OFF, ret_keep,
                              err);
    dcp_name_ids_clean_up(&names);
    return rc;
}

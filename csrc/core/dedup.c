/*
 * dedup.c: which rank writes an item that several ranks hold.
 *
 * Items are the same when name and offsets are (torch's MetadataIndex; an object, which has no
 * offsets, is another key than a 0-d tensor).  Keys are numbered in order of first appearance over
 * plans and items, which is torch's order of decision, and decided one by one: the holder with the
 * fewest bytes so far keeps the key, the lowest rank on a tie.  torch weighs an item by its global
 * size; we weigh by the bytes that its holder really writes, so shards balance too.
 *
 * One hash table over keys, one counting sort of the items whose key has several holders: linear in
 * items.  Memory is known before the first allocation: 24 bytes an item and the table.
 *
 * Threads: no state.
 */
#include "plan_private.h"

#include <string.h>

/* A key that one or more items share. */
struct key {
    uint32_t plan, item; /* where it first appeared */
    uint32_t name_id;
    uint32_t holders; /* items with this key */
};

struct slot {
    uint32_t hash;
    uint32_t key; /* index + 1, 0 is empty */
};

struct holder {
    uint32_t plan, item;
};

struct dedup {
    const struct dcp_plan *plans;
    uint32_t plans_count;
    uint64_t items_count; /* of all plans, at most DCP_MAX_GLOBAL_ITEMS */
    uint32_t *key_of;     /* owned: key of every item, plan after plan */
    struct key *keys;     /* owned, by first appearance */
    uint32_t keys_count;
    struct slot *slots; /* owned, at most two thirds full */
    uint64_t slots_count;
    uint32_t *first_holder;  /* owned, by key; after filling: end of the key's holders */
    struct holder *holders;  /* owned: holders of keys that have several, grouped by key */
    uint64_t *weights_bytes; /* owned, by plan: what it keeps so far */
};

static void
dedup_clean_up(struct dedup *d)
{
    dcp_free(d->key_of);
    dcp_free(d->keys);
    dcp_free(d->slots);
    dcp_free(d->first_holder);
    dcp_free(d->holders);
    dcp_free(d->weights_bytes);
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
same_key(const struct dedup *d, const struct key *key, const struct dcp_plan *plan,
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
            d->keys[key].holders++;
            return key;
        }
    }
    uint32_t key = d->keys_count++;
    d->keys[key] = (struct key){.plan = p, .item = i, .name_id = name_id, .holders = 1};
    d->slots[at] = (struct slot){.hash = hash, .key = key + 1};
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
        total += d->keys[k].holders > 1 ? d->keys[k].holders : 0;
    }
    d->holders = dcp_malloc_array(total, sizeof *d->holders);
    if (d->holders == NULL) {
        return out_of_memory(err, d->items_count);
    }
    const uint32_t *key_of = d->key_of;
    for (uint32_t p = 0; p < d->plans_count; p++) {
        for (uint32_t i = 0; i < d->plans[p].items_count; i++) {
            uint32_t key = *key_of++;
            if (d->keys[key].holders > 1) {
                d->holders[d->first_holder[key]++] = (struct holder){.plan = p, .item = i};
            }
        }
    }
    return 0;
}

/* Records weigh something even when they are empty, so that empties spread too (as torch's do). */
static inline uint64_t
weigh(const struct dedup *d, uint32_t plan, uint32_t item)
{
    const struct dcp_plan *of = &d->plans[plan];
    return dcp_max_u64(dcp_item_weight_bytes(of, &of->items[item]), 1);
}

static void
keep_item(struct dedup *d, struct dcp_keep *keep, uint32_t plan, uint32_t item)
{
    keep->bits[plan][item >> 3] |= (uint8_t)(1u << (item & 7));
    d->weights_bytes[plan] += weigh(d, plan, item);
}

static void
decide(struct dedup *d, struct dcp_keep *keep, bool to_lowest_rank)
{
    for (uint32_t k = 0; k < d->keys_count; k++) {
        const struct key *key = &d->keys[k];
        if (key->holders == 1) {
            keep_item(d, keep, key->plan, key->item);
            continue;
        }
        const struct holder *end = d->holders + d->first_holder[k];
        const struct holder *first = end - key->holders;
        uint32_t chosen = first->plan;
        for (const struct holder *h = first; h < end && !to_lowest_rank; h++) {
            chosen = d->weights_bytes[h->plan] < d->weights_bytes[chosen] ? h->plan : chosen;
        }
        for (const struct holder *h = first; h < end; h++) {
            if (h->plan == chosen) {
                keep_item(d, keep, h->plan, h->item);
            } else {
                const struct dcp_plan *plan = &d->plans[h->plan];
                keep->dropped_items++;
                keep->dropped_bytes += dcp_item_weight_bytes(plan, &plan->items[h->item]);
            }
        }
    }
}

/* ---- bitmaps ---- */

static int
keep_allocate(const struct dcp_plan *plans, uint32_t plans_count, struct dcp_keep *ret_keep,
              struct dcp_error *err)
{
    struct dcp_keep keep = {.count = plans_count};
    size_t bytes = 0;
    for (uint32_t p = 0; p < plans_count; p++) {
        bytes += (plans[p].items_count + 7) / 8;
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
        at += (plans[p].items_count + 7) / 8;
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
    *keep = (struct dcp_keep){0};
}

int
dcp_plan_dedup_named(const struct dcp_plan *plans, uint32_t plans_count,
                     const struct dcp_name_ids *names, bool to_lowest_rank,
                     struct dcp_keep *ret_keep, struct dcp_error *err)
{
    struct dedup d = {.plans = plans, .plans_count = plans_count};
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
        d.weights_bytes = dcp_calloc(plans_count, sizeof *d.weights_bytes);
        rc = d.weights_bytes == NULL ? out_of_memory(err, d.items_count) : 0;
    }
    if (rc == 0) {
        decide(&d, &keep, to_lowest_rank);
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
    rc = dcp_plan_dedup_named(plans, plans_count, &names, to_lowest_rank, ret_keep, err);
    dcp_name_ids_clean_up(&names);
    return rc;
}

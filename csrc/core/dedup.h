/*
 * dedup.h: the keys and holders of a deduplication, which split.c looks at too (private to the
 * core).
 */
#ifndef DCP_CORE_DEDUP_H
#define DCP_CORE_DEDUP_H

#include "plan_private.h"

/* A key that one or more items share. */
struct dedup_key {
    uint32_t plan, item; /* where it first appeared */
    uint32_t name_id;
    uint32_t holders_count; /* items with this key */
    uint64_t weight_bytes;  /* of its first item, at least 1 */
};

struct dedup_holder {
    uint32_t plan, item;
};

struct dedup_slot {
    uint32_t hash;
    uint32_t key; /* index + 1, 0 is empty */
};

struct dedup {
    const struct dcp_plan *plans;
    uint32_t plans_count;
    uint32_t names_count;   /* name ids are below this */
    uint64_t items_count;   /* of all plans, at most DCP_MAX_GLOBAL_ITEMS */
    uint32_t *key_of;       /* owned: key of every item, plan after plan */
    struct dedup_key *keys; /* owned, by first appearance */
    uint32_t keys_count;
    struct dedup_slot *slots; /* owned, at most two thirds full */
    uint64_t slots_count;
    uint32_t *first_holder;       /* owned, by key; after filling: end of the key's holders */
    struct dedup_holder *holders; /* owned: holders of keys that have several, grouped by key, in
                                     order of plans */
    uint32_t *order;              /* owned: keys that have several holders, large ones first */
    uint32_t order_count;
    uint64_t largest_bytes; /* of them */
    uint64_t *loads_bytes;  /* owned, by plan: what it keeps so far */
    uint64_t most_bytes;    /* the largest load */
};

static inline const struct dedup_holder *
dedup_holders(const struct dedup *d, uint32_t key)
{
    return d->holders + d->first_holder[key] - d->keys[key].holders_count;
}

static inline void
dedup_keep(struct dedup *d, struct dcp_keep *keep, const struct dedup_holder *holder,
           uint64_t bytes)
{
    dcp_keep_set(keep->bits[holder->plan], holder->item);
    d->loads_bytes[holder->plan] += bytes;
    d->most_bytes = dcp_max_u64(d->most_bytes, d->loads_bytes[holder->plan]);
}

#endif

/*
 * name_ids.c: numbers the names of all plans, so that later steps compare numbers, not text.
 *
 * Plans that share a table of names share their numbers: a job whose ranks all have the same names
 * costs one look at each name, however many ranks there are.
 *
 * Where tables differ, they differ little: ranks of one job have nearly the same keys in the same
 * order.  So the first guess for a name is the number behind its predecessor's, checked by one
 * comparison of text that lies next to the last one; only where a rank departs from the others is a
 * name hashed.
 *
 * Linear in names.  Threads: no state.
 */
#include "plan_private.h"

#include <string.h>

#include "name_table.h"

enum { FIRST_SLOTS = 1024 };

/* A distinct name; `hash` is that of its text when it is in the table. */
struct known_name {
    const char *fqn; /* borrows */
    uint32_t len;
    uint32_t hash;
};

/* Open addressing, linear probing, at most half full. */
struct names {
    struct known_name *known; /* owned, by id */
    uint32_t known_count, known_cap;
    uint32_t *slots; /* owned: id + 1, 0 is empty */
    uint64_t slots_count;
};

static void
names_clean_up(struct names *table)
{
    dcp_free(table->known);
    dcp_free(table->slots);
    *table = (struct names){0};
}

static uint64_t
free_slot(const struct names *table, uint32_t hash)
{
    uint64_t mask = table->slots_count - 1;
    uint64_t at = hash & mask;
    while (table->slots[at] != 0) {
        at = (at + 1) & mask;
    }
    return at;
}

static int
out_of_memory(struct dcp_error *err, uint64_t names)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                         "comparing %llu names of all ranks: out of memory",
                         (unsigned long long)names);
}

/* Makes room for one more name. */
static int
names_reserve(struct names *table, struct dcp_error *err)
{
    if (table->known_count < table->known_cap) {
        return 0;
    }
    uint64_t slots_count = table->slots_count == 0 ? FIRST_SLOTS : 2 * table->slots_count;
    uint32_t cap = (uint32_t)(slots_count / 2);
    struct known_name *known = dcp_realloc(table->known, cap * sizeof *known);
    if (known == NULL) {
        return out_of_memory(err, cap);
    }
    table->known = known;
    uint32_t *slots = dcp_calloc((size_t)slots_count, sizeof *slots);
    if (slots == NULL) {
        return out_of_memory(err, cap);
    }
    dcp_free(table->slots);
    table->slots = slots;
    table->slots_count = slots_count;
    table->known_cap = cap;
    for (uint32_t id = 0; id < table->known_count; id++) {
        slots[free_slot(table, known[id].hash)] = id + 1;
    }
    return 0;
}

static inline bool
same_text(const struct known_name *known, const struct dcp_name *name)
{
    return known->len == name->fqn_len &&
           (known->fqn == name->fqn || memcmp(known->fqn, name->fqn, known->len) == 0);
}

static int
names_find_or_add(struct names *table, const struct dcp_name *name, uint32_t *ret_id,
                  struct dcp_error *err)
{
    int rc = names_reserve(table, err);
    if (rc != 0) {
        return rc;
    }
    uint32_t hash = (uint32_t)dcp_hash64(name->fqn, name->fqn_len, 0);
    uint64_t mask = table->slots_count - 1;
    uint64_t at = hash & mask;
    for (; table->slots[at] != 0; at = (at + 1) & mask) {
        uint32_t id = table->slots[at] - 1;
        if (table->known[id].hash == hash && same_text(&table->known[id], name)) {
            *ret_id = id;
            return 0;
        }
    }
    uint32_t id = table->known_count++;
    table->known[id] = (struct known_name){.fqn = name->fqn, .len = name->fqn_len, .hash = hash};
    table->slots[at] = id + 1;
    *ret_id = id;
    return 0;
}

static int
number_names(struct names *table, const struct dcp_plan *plan, uint32_t *ids, struct dcp_error *err)
{
    uint32_t guess = 0;
    for (uint32_t i = 0; i < plan->names_count; i++) {
        if (guess < table->known_count && same_text(&table->known[guess], &plan->names[i])) {
            ids[i] = guess++;
            continue;
        }
        int rc = names_find_or_add(table, &plan->names[i], &ids[i], err);
        if (rc != 0) {
            return rc;
        }
        guess = ids[i] + 1;
    }
    return 0;
}

/* ---- plans ---- */

/* The first plan whose names are those of plan `p`: itself, or one that shares its table.  `owners`
 * are the first plans of the tables met so far. */
static int
find_owner(const struct dcp_plan *plans, uint32_t p, struct dcp_index_map *owners,
           uint32_t *ret_owner, struct dcp_error *err)
{
    const struct dcp_name_table *table = plans[p].table;
    *ret_owner = p;
    if (table == NULL) {
        return 0;
    }
    uint32_t probe = 0;
    uint32_t found;
    while ((found = dcp_index_map_next(owners, table->hash.lo, &probe)) != DCP_INDEX_NONE) {
        if (plans[found].table == table) {
            *ret_owner = found;
            return 0;
        }
    }
    return dcp_index_map_add(owners, table->hash.lo, p, err);
}

/* Fills ids->first; equal places for plans that share a table. */
static int
place_plans(const struct dcp_plan *plans, uint32_t plans_count, struct dcp_name_ids *ids,
            uint64_t *ret_total, struct dcp_error *err)
{
    struct dcp_index_map owners = {0};
    uint64_t total = 0;
    int rc = 0;
    for (uint32_t p = 0; rc == 0 && p < plans_count; p++) {
        uint32_t owner = p;
        rc = find_owner(plans, p, &owners, &owner, err);
        ids->first[p] = owner == p ? total : ids->first[owner];
        total += owner == p ? plans[p].names_count : 0;
    }
    dcp_index_map_clean_up(&owners);
    *ret_total = total;
    return rc;
}

void
dcp_name_ids_clean_up(struct dcp_name_ids *ids)
{
    if (ids == NULL) {
        return;
    }
    dcp_free(ids->ids);
    dcp_free(ids->first);
    *ids = (struct dcp_name_ids){0};
}

int
dcp_name_ids_build(const struct dcp_plan *plans, uint32_t plans_count, struct dcp_name_ids *ret_ids,
                   struct dcp_error *err)
{
    struct dcp_name_ids ids = {0};
    struct names table = {0};
    uint64_t total = 0, numbered = 0;
    ids.first = dcp_malloc_array(plans_count, sizeof *ids.first);
    if (ids.first == NULL) {
        return out_of_memory(err, plans_count);
    }
    int rc = place_plans(plans, plans_count, &ids, &total, err);
    if (rc == 0 && total > DCP_MAX_GLOBAL_ITEMS) {
        rc = dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                           "the ranks' state dicts have %llu keys together, %u are allowed; save "
                           "them in parts",
                           (unsigned long long)total, DCP_MAX_GLOBAL_ITEMS);
    }
    if (rc == 0) {
        ids.ids = dcp_malloc_array((size_t)total, sizeof *ids.ids);
        rc = ids.ids == NULL ? out_of_memory(err, total) : 0;
    }
    for (uint32_t p = 0; rc == 0 && p < plans_count; p++) {
        if (ids.first[p] == numbered) {
            rc = number_names(&table, &plans[p], ids.ids + numbered, err);
            numbered += plans[p].names_count;
        }
    }
    ids.distinct_count = table.known_count;
    names_clean_up(&table);
    if (rc != 0) {
        dcp_name_ids_clean_up(&ids);
        return rc;
    }
    *ret_ids = ids;
    return 0;
}

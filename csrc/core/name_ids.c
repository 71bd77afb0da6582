/*
 * name_ids.c: numbers the names of all plans, so that later steps compare numbers, not text.
 *
 * Ranks of one job have nearly the same keys in the same order.  So the first guess for a name is
 * the number behind its predecessor's, checked by one comparison of text that lies next to the last
 * one; only where a rank departs from the others is a name hashed.  256 plans of 1000 names cost a
 * pass over their text.
 *
 * Linear in names.  Threads: no state.
 */
#include "plan_private.h"

#include <string.h>

enum { FIRST_SLOTS = 1024 };

/* A distinct name; `hash` is that of its text when it is in the table. */
struct known_name {
    const char *fqn; /* borrows */
    uint32_t len;
    uint32_t hash;
};

/* Open addressing, linear probing, at most half full. */
struct name_table {
    struct known_name *known; /* owned, by id */
    uint32_t known_count, known_cap;
    uint32_t *slots; /* owned: id + 1, 0 is empty */
    uint64_t slots_count;
};

static void
table_clean_up(struct name_table *table)
{
    dcp_free(table->known);
    dcp_free(table->slots);
    *table = (struct name_table){0};
}

static uint64_t
free_slot(const struct name_table *table, uint32_t hash)
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
table_reserve(struct name_table *table, struct dcp_error *err)
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
    return known->len == name->fqn_len && memcmp(known->fqn, name->fqn, known->len) == 0;
}

static int
table_find_or_add(struct name_table *table, const struct dcp_name *name, uint32_t *ret_id,
                  struct dcp_error *err)
{
    int rc = table_reserve(table, err);
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
number_names(struct name_table *table, const struct dcp_plan *plan, uint32_t *ids,
             struct dcp_error *err)
{
    uint32_t guess = 0;
    for (uint32_t i = 0; i < plan->names_count; i++) {
        if (guess < table->known_count && same_text(&table->known[guess], &plan->names[i])) {
            ids[i] = guess++;
            continue;
        }
        int rc = table_find_or_add(table, &plan->names[i], &ids[i], err);
        if (rc != 0) {
            return rc;
        }
        guess = ids[i] + 1;
    }
    return 0;
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
    struct name_table table = {0};
    uint64_t total = 0;
    int rc = 0;
    ids.first = dcp_malloc_array(plans_count, sizeof *ids.first);
    if (ids.first == NULL) {
        return out_of_memory(err, plans_count);
    }
    for (uint32_t p = 0; p < plans_count; p++) {
        ids.first[p] = total;
        total += plans[p].names_count;
    }
    ids.ids = dcp_malloc_array((size_t)total, sizeof *ids.ids);
    if (ids.ids == NULL) {
        rc = out_of_memory(err, total);
    } else if (total > DCP_MAX_GLOBAL_ITEMS) {
        rc = dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                           "the ranks' state dicts have %llu keys together, %u are allowed; save "
                           "them in parts",
                           (unsigned long long)total, DCP_MAX_GLOBAL_ITEMS);
    }
    for (uint32_t p = 0; rc == 0 && p < plans_count; p++) {
        rc = number_names(&table, &plans[p], ids.ids + ids.first[p], err);
    }
    ids.distinct_count = table.known_count;
    table_clean_up(&table);
    if (rc != 0) {
        dcp_name_ids_clean_up(&ids);
        return rc;
    }
    *ret_ids = ids;
    return 0;
}

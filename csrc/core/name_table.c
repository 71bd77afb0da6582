/*
 * name_table.c: tables of names that plans share, and the set of those a coordinator knows.
 *
 * Lookups are by content only.  Who says "I have the names of this hash" gets a table whose names
 * the coordinator has hashed itself, and names that were sent are compared byte by byte with those
 * decoded before; no claim of a peer is ever trusted.
 *
 * Threads: name_table.h.
 */
#include "name_table.h"

#include <string.h>

enum { FIRST_KNOWN_CAP = 4, IMAGE_SEED = 0x696d };

static int
out_of_memory(struct dcp_error *err, uint32_t names)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a table of %u names", names);
}

/* ---- tables ---- */

void
dcp_name_table_release(struct dcp_name_table *table)
{
    if (table == NULL) {
        return;
    }
    DCP_ASSERT(table->references > 0);
    if (--table->references == 0) {
        dcp_name_table_release(table->lender);
        dcp_free(table->names);
        dcp_bump_clean_up(&table->strings);
        dcp_free(table);
    }
}

void
dcp_plan_use_table(struct dcp_plan *plan, struct dcp_name_table *table)
{
    DCP_ASSERT(plan->table == NULL && plan->names == NULL && plan->strings.first == NULL);
    table->references++;
    plan->table = table;
    plan->names = table->names;
    plan->names_count = table->names_count;
    plan->names_cap = table->names_count;
}

int
dcp_plan_share_names(struct dcp_plan *plan, struct dcp_error *err)
{
    DCP_ASSERT(plan->table == NULL);
    struct dcp_name_table *table = dcp_calloc(1, sizeof *table);
    if (table == NULL) {
        return out_of_memory(err, plan->names_count);
    }
    *table = (struct dcp_name_table){
        .hash = dcp_plan_names_hash(plan),
        .names = plan->names,
        .names_count = plan->names_count,
        .strings = plan->strings,
    };
    plan->names = NULL;
    plan->strings = (struct dcp_bump){0};
    dcp_plan_use_table(plan, table);
    return 0;
}

/* ---- the set ---- */

void
dcp_name_tables_clean_up(struct dcp_name_tables *tables)
{
    if (tables == NULL) {
        return;
    }
    for (uint32_t i = 0; i < tables->known_count; i++) {
        dcp_name_table_release(tables->known[i].table);
    }
    dcp_free(tables->known);
    dcp_index_map_clean_up(&tables->by_hash);
    dcp_index_map_clean_up(&tables->by_image);
    *tables = (struct dcp_name_tables){0};
}

static uint64_t
hash_image(struct dcp_span image)
{
    return dcp_hash64(image.data, image.len, IMAGE_SEED);
}

static uint32_t
find_by_hash(const struct dcp_name_tables *tables, const struct dcp_hash128 *hash)
{
    uint32_t probe = 0;
    uint32_t found;
    while ((found = dcp_index_map_next(&tables->by_hash, hash->lo, &probe)) != DCP_INDEX_NONE) {
        const struct dcp_name_table *table = tables->known[found].table;
        if (dcp_hash128_equal(table->hash, *hash)) {
            break;
        }
    }
    return found;
}

struct dcp_name_table *
dcp_name_tables_by_hash(const struct dcp_name_tables *tables, const struct dcp_hash128 *hash)
{
    uint32_t found = find_by_hash(tables, hash);
    return found == DCP_INDEX_NONE ? NULL : tables->known[found].table;
}

struct dcp_name_table *
dcp_name_tables_by_image(const struct dcp_name_tables *tables, struct dcp_span image)
{
    uint64_t hash = hash_image(image);
    uint32_t probe = 0;
    uint32_t found;
    while ((found = dcp_index_map_next(&tables->by_image, hash, &probe)) != DCP_INDEX_NONE) {
        struct dcp_span known = tables->known[found].image;
        if (known.len == image.len && memcmp(known.data, image.data, image.len) == 0) {
            return tables->known[found].table;
        }
    }
    return NULL;
}

/* Room for one more table, so that adding it fails by colliding hashes alone. */
static int
make_room(struct dcp_name_tables *tables, struct dcp_error *err)
{
    if (tables->known_count == tables->known_cap) {
        uint32_t cap = tables->known_cap == 0 ? FIRST_KNOWN_CAP : 2 * tables->known_cap;
        struct dcp_known_table *known = dcp_realloc(tables->known, cap * sizeof *known);
        if (known == NULL) {
            return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for %u tables of names",
                                 cap);
        }
        tables->known = known;
        tables->known_cap = cap;
    }
    int rc = dcp_index_map_reserve(&tables->by_hash, tables->known_count + 1, err);
    return rc != 0 ? rc : dcp_index_map_reserve(&tables->by_image, tables->known_count + 1, err);
}

int
dcp_name_tables_add(struct dcp_name_tables *tables, struct dcp_name_table *table,
                    struct dcp_error *err)
{
    if (find_by_hash(tables, &table->hash) != DCP_INDEX_NONE) {
        return 0;
    }
    int rc = make_room(tables, err);
    if (rc == 0) {
        rc = dcp_index_map_add(&tables->by_hash, table->hash.lo, tables->known_count, err);
    }
    if (rc == 0) {
        table->references++;
        tables->known[tables->known_count++] = (struct dcp_known_table){.table = table};
    }
    return rc;
}

int
dcp_name_tables_intern(struct dcp_name_tables *tables, struct dcp_plan *plan, struct dcp_span image,
                       struct dcp_error *err)
{
    int rc = dcp_plan_share_names(plan, err);
    if (rc == 0 && tables->lender != NULL) {
        tables->lender->references++;
        plan->table->lender = tables->lender;
    }
    if (rc == 0) {
        rc = dcp_name_tables_add(tables, plan->table, err);
    }
    if (rc != 0) {
        return rc;
    }
    struct dcp_known_table *known = &tables->known[find_by_hash(tables, &plan->table->hash)];
    if (known->table != plan->table) {
        dcp_name_table_release(plan->table);
        plan->table = NULL;
        plan->names = NULL;
        dcp_plan_use_table(plan, known->table);
    }
    if (known->image.len != 0 || image.len == 0) {
        return 0;
    }
    known->image = image;
    return dcp_index_map_add(&tables->by_image, hash_image(image),
                             (uint32_t)(known - tables->known), err);
}

int
dcp_name_tables_add_copy(struct dcp_name_tables *tables, const struct dcp_plan *plan,
                         const struct dcp_hash128 *hash, struct dcp_error *err)
{
    tables->lender = dcp_name_tables_by_hash(tables, hash);
    if (tables->lender != NULL) {
        return 0;
    }
    struct dcp_plan copy = {0};
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < plan->names_count; i++) {
        const struct dcp_name *name = &plan->names[i];
        uint32_t index;
        rc = dcp_plan_add_name(&copy, name->fqn, name->fqn_len, name->path, name->path_len,
                               name->path_parts, &index, err);
    }
    if (rc == 0) {
        rc = dcp_name_tables_intern(tables, &copy, (struct dcp_span){0}, err);
    }
    if (rc == 0) {
        tables->lender = copy.table;
    }
    dcp_plan_clean_up(&copy);
    return rc;
}

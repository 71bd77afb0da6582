/*
 * metadata_paths.c: the names and paths of all plans as one planner_data.
 *
 * torch makes it as dict(ChainMap(*plans' mappings)): a key's value is that of the FIRST plan that
 * has it, but the keys come in the order of the LAST plan, then what the one before it adds, and so
 * on.  A reader that compares dicts does not see the order, one that iterates does, so it is kept.
 *
 * Of plans in a row that share a table of names, the last gives the order and the first the value;
 * those between change nothing and are left out.  Other ranks mostly have the same names in the
 * same order too: the position of a name in the plan before is tried first, and only where it
 * differs the name is hashed.
 *
 * Threads: no state.
 */
#include "metadata_private.h"

#include <string.h>

#include "dcp_hash.h"
#include "index_map.h"

enum { FIRST_PATHS_CAP = 256, PATH_SEED = 0x7061 };

struct merger {
    const struct dcp_global_plan *global;
    const struct dcp_metadata *md;
    struct dcp_md_path *paths; /* owned until done */
    uint32_t count, cap;
    struct dcp_index_map map; /* names -> paths */
    uint32_t *guess;          /* by name of the plan before: its index in paths */
    uint32_t guess_count;
    struct dcp_error *err;
};

static const struct dcp_name *
name_of(const struct merger *m, uint32_t path)
{
    const struct dcp_md_path *at = &m->paths[path];
    return &m->global->plans[at->plan].names[at->name];
}

static bool
is_same(const struct dcp_name *a, const struct dcp_name *b)
{
    return a->fqn_len == b->fqn_len && (a->fqn_len == 0 || memcmp(a->fqn, b->fqn, a->fqn_len) == 0);
}

static int
no_memory(const struct merger *m)
{
    return dcp_error_set(m->err, DCP_E_NOMEM, 0, NULL,
                         "writing the paths of %u names: out of memory", m->count);
}

static int
add_path(struct merger *m, uint64_t hash, const struct dcp_name *name, uint32_t *ret_path)
{
    if (m->count == m->cap) {
        uint32_t cap = m->cap == 0 ? FIRST_PATHS_CAP : 2 * m->cap;
        struct dcp_md_path *paths = NULL;
        if (m->cap < UINT32_MAX / 2) {
            paths = dcp_realloc(m->paths, (size_t)cap * sizeof *paths);
        }
        if (paths == NULL) {
            return no_memory(m);
        }
        m->paths = paths;
        m->cap = cap;
    }
    const struct dcp_md_entry *entry = dcp_metadata_find(m->md, name->fqn, name->fqn_len);
    m->paths[m->count].entry =
        entry == NULL ? (uint32_t)DCP_NO_FILE : (uint32_t)(entry - m->md->entries);
    *ret_path = m->count;
    return dcp_index_map_add(&m->map, hash, m->count++, m->err);
}

/* The path of name `n` of a plan: the guess, a known one, or a new one. */
static int
find_path(struct merger *m, const struct dcp_name *name, uint32_t n, uint32_t *ret_path)
{
    if (n < m->guess_count && m->guess[n] != DCP_INDEX_NONE &&
        is_same(name, name_of(m, m->guess[n]))) {
        *ret_path = m->guess[n];
        return 0;
    }
    uint64_t hash = dcp_hash64(name->fqn, name->fqn_len, PATH_SEED);
    uint32_t probe = 0;
    uint32_t found;
    while ((found = dcp_index_map_next(&m->map, hash, &probe)) != DCP_INDEX_NONE) {
        if (is_same(name, name_of(m, found))) {
            *ret_path = found;
            return 0;
        }
    }
    return add_path(m, hash, name, ret_path);
}

static int
merge_plan(struct merger *m, uint32_t p)
{
    const struct dcp_plan *plan = &m->global->plans[p];
    for (uint32_t n = 0; n < plan->names_count; n++) {
        const struct dcp_name *name = &plan->names[n];
        uint32_t path = DCP_INDEX_NONE;
        if (name->path_parts != 0) {
            int rc = find_path(m, name, n, &path);
            if (rc != 0) {
                return rc;
            }
            m->paths[path].plan = p;
            m->paths[path].name = n;
        }
        m->guess[n] = path;
    }
    m->guess_count = plan->names_count;
    return 0;
}

static bool
is_between_equals(const struct dcp_global_plan *global, uint32_t p)
{
    const struct dcp_plan *plan = &global->plans[p];
    return plan->table != NULL && p > 0 && p + 1 < global->plans_count &&
           plan[-1].table == plan->table && plan[1].table == plan->table;
}

int
dcp_metadata_merge_paths(const struct dcp_global_plan *global, const struct dcp_metadata *md,
                         struct dcp_md_path **ret_paths, uint64_t *ret_count, struct dcp_error *err)
{
    struct merger m = {.global = global, .md = md, .err = err};
    uint32_t most_names = 0;
    for (uint32_t p = 0; p < global->plans_count; p++) {
        if (global->plans[p].names_count > most_names) {
            most_names = global->plans[p].names_count;
        }
    }
    m.guess = dcp_malloc_array(most_names, sizeof *m.guess);
    int rc = m.guess == NULL ? no_memory(&m) : 0;
    for (uint32_t p = global->plans_count; rc == 0 && p > 0; p--) {
        if (!is_between_equals(global, p - 1)) {
            rc = merge_plan(&m, p - 1);
        }
    }
    dcp_free(m.guess);
    dcp_index_map_clean_up(&m.map);
    if (rc != 0) {
        dcp_free(m.paths);
        return rc;
    }
    *ret_paths = m.paths;
    *ret_count = m.count;
    return 0;
}

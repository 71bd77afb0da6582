/*
 * key_tree.c: grows the tree of keys, finds out what is alike, merges it.
 *
 * Growing finds a child by a map over (parent, name); neighbouring keys share most of their path,
 * which is tried first.  Parents come before their children, so all that is summed or compared from
 * below runs through the nodes backwards, without recursion: a key may have any number of dots.
 *
 * Two nodes are alike when their own keys look alike and their children have the same names in the
 * same order and are alike.  One of those that are alike stands for all (`look`), so children are
 * compared by one number each.
 *
 * Threads: no state.
 */
#include "dcp_key_tree.h"

#include <string.h>

#include "dcp_alloc.h"
#include "dcp_hash.h"
#include "index_map.h"

enum { FIRST_NODES = 256, PATH_MOST = 32 };

struct growth {
    struct dcp_key_tree *tree;
    uint32_t cap;
    struct dcp_index_map children; /* nodes by parent and name */
    uint32_t path[PATH_MOST];      /* nodes of the key before */
    uint32_t path_len;
};

static int
out_of_memory(struct dcp_error *err, uint64_t nodes)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "a tree of %llu parts of keys: out of memory",
                         (unsigned long long)nodes);
}

static uint64_t
mixed(uint64_t hash, uint64_t value)
{
    hash ^= value * 0x9E3779B97F4A7C15u;
    hash = (hash ^ (hash >> 29)) * 0xBF58476D1CE4E5B9u;
    return hash ^ (hash >> 32);
}

static bool
same_text(struct dcp_span a, struct dcp_span b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

/* ---- growing ---- */

static int
add_node(struct growth *g, uint32_t parent, struct dcp_span name, uint64_t name_hash,
         uint32_t *ret_node, struct dcp_error *err)
{
    struct dcp_key_tree *tree = g->tree;
    uint32_t added = tree->nodes_count;

    if (added == g->cap) {
        uint32_t cap = g->cap == 0 ? FIRST_NODES : 2 * g->cap;
        struct dcp_tree_node *nodes = NULL;

        if (added >= DCP_TREE_NODES_MOST) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "the keys have more than %d parts between their dots",
                                 DCP_TREE_NODES_MOST);
        }
        nodes = dcp_realloc(tree->nodes, cap * sizeof *nodes);
        if (nodes == NULL) {
            return out_of_memory(err, cap);
        }
        tree->nodes = nodes;
        g->cap = cap;
    }
    tree->nodes[added] = (struct dcp_tree_node){
        .name = name,
        .name_hash = name_hash,
        .key = DCP_TREE_NONE,
        .parent = parent,
        .first_child = DCP_TREE_NONE,
        .last_child = DCP_TREE_NONE,
        .next = DCP_TREE_NONE,
        .look = DCP_TREE_NONE,
        .next_alike = DCP_TREE_NONE,
        .last_alike = DCP_TREE_NONE,
    };
    tree->nodes_count++;
    *ret_node = added;
    return 0;
}

static int
child_of(struct growth *g, uint32_t parent, struct dcp_span name, uint32_t *ret_child,
         struct dcp_error *err)
{
    uint64_t name_hash = dcp_hash64(name.data, name.len, 0), hash = mixed(name_hash, parent);
    struct dcp_tree_node *above;
    uint32_t probe = 0, child;
    int rc;

    while ((child = dcp_index_map_next(&g->children, hash, &probe)) != DCP_INDEX_NONE) {
        const struct dcp_tree_node *node = &g->tree->nodes[child];
        if (node->parent == parent && same_text(node->name, name)) {
            *ret_child = child;
            return 0;
        }
    }
    rc = add_node(g, parent, name, name_hash, &child, err);
    if (rc == 0) {
        rc = dcp_index_map_add(&g->children, hash, child, err);
    }
    if (rc != 0) {
        return rc;
    }
    above = &g->tree->nodes[parent];
    if (above->last_child == DCP_TREE_NONE) {
        above->first_child = child;
    } else {
        g->tree->nodes[above->last_child].next = child;
    }
    above->last_child = child;
    above->children_count++;
    *ret_child = child;
    return 0;
}

static int
add_key(struct growth *g, const struct dcp_tree_key *key, uint32_t index, struct dcp_error *err)
{
    const uint8_t *at = key->text.data, *end = at + key->text.len;
    uint32_t node = 0, depth = 0;
    bool more = true;

    while (more) {
        const uint8_t *dot = at == end ? NULL : memchr(at, '.', (size_t)(end - at));
        struct dcp_span name = {at, (size_t)((dot == NULL ? end : dot) - at)};

        if (depth < g->path_len && same_text(g->tree->nodes[g->path[depth]].name, name)) {
            node = g->path[depth];
        } else {
            int rc = child_of(g, node, name, &node, err);
            if (rc != 0) {
                return rc;
            }
            if (depth < PATH_MOST) { /* from here on the two keys' paths part */
                g->path[depth] = node;
                g->path_len = depth + 1;
            }
        }
        depth++;
        more = dot != NULL;
        at = more ? dot + 1 : end;
    }
    g->tree->nodes[node].key = index;
    if (dcp_add_overflows_u64(g->tree->nodes[node].bytes, key->bytes,
                              &g->tree->nodes[node].bytes)) {
        g->tree->nodes[node].bytes = UINT64_MAX;
    }
    return 0;
}

static int
grow(struct dcp_key_tree *tree, const struct dcp_tree_key *keys, uint32_t keys_count,
     struct dcp_error *err)
{
    struct growth g = {.tree = tree};
    uint32_t root;
    int rc = add_node(&g, DCP_TREE_NONE, (struct dcp_span){NULL, 0}, 0, &root, err);

    for (uint32_t i = 0; rc == 0 && i < keys_count; i++) {
        rc = add_key(&g, &keys[i], i, err);
    }
    dcp_index_map_clean_up(&g.children);
    return rc;
}

static void
add_bytes(struct dcp_tree_node *to, const struct dcp_tree_node *from)
{
    if (dcp_add_overflows_u64(to->bytes, from->bytes, &to->bytes)) {
        to->bytes = UINT64_MAX;
    }
}

/* ---- what is alike ---- */

static uint32_t
own_look(const struct dcp_tree_node *node, const struct dcp_tree_key *keys)
{
    return node->key == DCP_TREE_NONE ? DCP_TREE_NONE : keys[node->key].look;
}

static bool
are_alike(const struct dcp_tree_node *nodes, uint32_t a, uint32_t b,
          const struct dcp_tree_key *keys)
{
    if (own_look(&nodes[a], keys) != own_look(&nodes[b], keys) ||
        nodes[a].children_count != nodes[b].children_count) {
        return false;
    }
    a = nodes[a].first_child;
    b = nodes[b].first_child;
    for (; a != DCP_TREE_NONE; a = nodes[a].next, b = nodes[b].next) {
        if (nodes[a].look != nodes[b].look || !same_text(nodes[a].name, nodes[b].name)) {
            return false;
        }
    }
    return true;
}

/* Of one node whose children have theirs. */
static int
find_look(struct dcp_tree_node *nodes, uint32_t node, const struct dcp_tree_key *keys,
          struct dcp_index_map *looks, struct dcp_error *err)
{
    uint64_t hash = mixed(0, own_look(&nodes[node], keys));
    uint32_t probe = 0, like;

    for (uint32_t c = nodes[node].first_child; c != DCP_TREE_NONE; c = nodes[c].next) {
        hash = mixed(mixed(hash, nodes[c].name_hash), nodes[c].look);
    }
    while ((like = dcp_index_map_next(looks, hash, &probe)) != DCP_INDEX_NONE) {
        if (are_alike(nodes, node, like, keys)) {
            nodes[node].look = like;
            return 0;
        }
    }
    nodes[node].look = node;
    return dcp_index_map_add(looks, hash, node, err);
}

static int
find_looks(struct dcp_key_tree *tree, const struct dcp_tree_key *keys, struct dcp_error *err)
{
    struct dcp_index_map looks = {0};
    int rc = 0;

    for (uint32_t i = tree->nodes_count; rc == 0 && i-- > 0;) {
        rc = find_look(tree->nodes, i, keys, &looks, err);
    }
    dcp_index_map_clean_up(&looks);
    return rc;
}

/* ---- merging ---- */

static bool
is_number(struct dcp_span name)
{
    for (size_t i = 0; i < name.len; i++) {
        if (name.data[i] < '0' || name.data[i] > '9') {
            return false;
        }
    }
    return name.len > 0;
}

/* Takes `node` out of its siblings, of which `before` is the one before it. */
static void
merge_into(struct dcp_tree_node *nodes, uint32_t first, uint32_t before, uint32_t node)
{
    struct dcp_tree_node *parent = &nodes[nodes[node].parent];

    nodes[before].next = nodes[node].next;
    if (parent->last_child == node) {
        parent->last_child = before;
    }
    parent->children_count--;
    nodes[nodes[first].last_alike].next_alike = node;
    nodes[first].last_alike = node;
    nodes[node].hidden = true;
    add_bytes(&nodes[first], &nodes[node]);
}

/* `firsts`: by look, the first child that has it and is a number, of the parent in question. */
static void
merge_children(struct dcp_tree_node *nodes, uint32_t parent, uint32_t *firsts)
{
    uint32_t before = DCP_TREE_NONE, next;

    for (uint32_t c = nodes[parent].first_child; c != DCP_TREE_NONE; c = next) {
        uint32_t first = firsts[nodes[c].look];

        next = nodes[c].next;
        if (!is_number(nodes[c].name)) {
            before = c;
        } else if (first != DCP_TREE_NONE && nodes[first].parent == parent) {
            merge_into(nodes, first, before, c);
        } else {
            firsts[nodes[c].look] = c;
            nodes[c].last_alike = c;
            before = c;
        }
    }
}

static int
merge_alike(struct dcp_key_tree *tree, const struct dcp_tree_key *keys, struct dcp_error *err)
{
    int rc = find_looks(tree, keys, err);
    uint32_t *firsts = NULL;

    if (rc != 0) {
        return rc;
    }
    firsts = dcp_malloc_array(tree->nodes_count, sizeof *firsts);
    if (firsts == NULL) {
        return out_of_memory(err, tree->nodes_count);
    }
    memset(firsts, 0xFF, tree->nodes_count * sizeof *firsts);
    for (uint32_t i = 0; i < tree->nodes_count; i++) {
        merge_children(tree->nodes, i, firsts);
    }
    dcp_free(firsts);
    return 0;
}

/* ---- together ---- */

static void
count_rows(struct dcp_key_tree *tree)
{
    for (uint32_t i = tree->nodes_count; i-- > 1;) {
        const struct dcp_tree_node *node = &tree->nodes[i];

        if (!node->hidden) {
            tree->nodes[node->parent].rows_below += node->rows_below + !dcp_tree_is_link(node);
        }
    }
}

int
dcp_key_tree_build(const struct dcp_tree_key *keys, uint32_t keys_count, bool merge,
                   struct dcp_key_tree *ret, struct dcp_error *err)
{
    struct dcp_key_tree tree = {0};
    int rc = grow(&tree, keys, keys_count, err);

    for (uint32_t i = tree.nodes_count; rc == 0 && i-- > 1;) {
        add_bytes(&tree.nodes[tree.nodes[i].parent], &tree.nodes[i]);
    }
    if (rc == 0 && merge) {
        rc = merge_alike(&tree, keys, err);
    }
    if (rc != 0) {
        dcp_key_tree_clean_up(&tree);
        return rc;
    }
    count_rows(&tree);
    *ret = tree;
    return 0;
}

void
dcp_key_tree_clean_up(struct dcp_key_tree *tree)
{
    if (tree == NULL) {
        return;
    }
    dcp_free(tree->nodes);
    *tree = (struct dcp_key_tree){0};
}

/*
 * dcp_key_tree.h: the keys of a checkpoint as a tree of what lies between their dots, where alike
 * branches are shown once: a model of a hundred layers fits a screen.
 */
#ifndef DCP_KEY_TREE_H
#define DCP_KEY_TREE_H

#include "dcp_error.h"

enum {
    DCP_TREE_NONE = 0xFFFFFFFFu,
    DCP_TREE_NODES_MOST = 1 << 24,
};

struct dcp_tree_key {
    struct dcp_span text; /* borrowed */
    uint32_t look;        /* equal for keys that look alike (type and shape), below DCP_TREE_NONE */
    uint64_t bytes;
};

/* A part of keys.  Numbers are of nodes, DCP_TREE_NONE where there is none. */
struct dcp_tree_node {
    struct dcp_span name; /* lies in a key's text */
    uint64_t name_hash;
    uint64_t bytes; /* of it, of all below it and of those that are merged into it; saturates */
    uint32_t key;   /* that ends here */
    uint32_t parent, first_child, last_child, next; /* `next`: the sibling behind it */
    uint32_t look;       /* the node that stands for all that are like it but for the name */
    uint32_t next_alike; /* the next of those that are shown with it, in the order of keys */
    uint32_t last_alike; /* of these; of the first one alone */
    uint32_t children_count;
    uint32_t rows_below; /* lines that show what is below it; a chain of single children is one */
    bool hidden;         /* it is merged into a sibling */
};

struct dcp_key_tree {
    struct dcp_tree_node *nodes; /* owned; the first is the root; parents before children */
    uint32_t nodes_count;
};

/* Linear in the keys' text.  With `merge`, children whose names are decimal numbers and which are
 * alike all the way down are merged into the first of them.  DCP_E_LIMIT: more parts than
 * DCP_TREE_NODES_MOST. */
int dcp_key_tree_build(const struct dcp_tree_key *keys, uint32_t keys_count, bool merge,
                       struct dcp_key_tree *ret, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_key_tree_clean_up(struct dcp_key_tree *tree);

/* Whether a row shows the node together with its only child. */
static inline bool
dcp_tree_is_link(const struct dcp_tree_node *node)
{
    return node->key == DCP_TREE_NONE && node->children_count == 1;
}

#endif

/*
 * load_private.h: what the two halves of load_targets share: memory (load_targets.c) and what a
 * leaf wants (load_leaf.c).
 */
#ifndef DCP_LOAD_PRIVATE_H
#define DCP_LOAD_PRIVATE_H

#include "dtensor_box.h"
#include "flatten.h"
#include "load_targets.h"
#include "name_set.h"

struct load_leaves {
    struct flatten_leaf *items; /* owned; values are owned references, text lies in strings */
    size_t count, cap;
};

/* One build. */
struct load_builder {
    const struct native_state *state;
    const struct dcp_metadata *md;
    const struct load_targets_options *options;
    struct load_targets *targets;
    struct load_leaves leaves;     /* by today's flattening */
    struct load_leaves old_leaves; /* by that of torch 2.3; only where the keys suggest it */
    struct name_set names;         /* of leaves */
    struct dcp_bump strings;
    struct mesh_cache meshes;
    /* In work. */
    const struct flatten_leaf *leaf;
    const struct dcp_md_entry *entry;
    struct dtensor_box dtensor_box;
    struct dcp_error err;
};

/* Notes for the report what becomes of the entry in work. */
static inline void
load_mark(struct load_builder *b, enum load_mark mark)
{
    b->targets->marks[b->entry - b->md->entries] |= (uint16_t)mark;
}

/* Name of the leaf in work; returns new. */
PyObject *load_fqn(const struct load_builder *b);
/* What the leaf wants of its entry. */
int load_add_leaf(struct load_builder *b);

/* Adds a target box of the entry, to be found in `tensor`.  Nothing to do without elements. */
int load_add_box(struct load_builder *b, const uint64_t *offsets, const uint64_t *sizes,
                 PyObject *tensor);
/* Adds a target for an object. */
int load_add_object(struct load_builder *b);

#endif

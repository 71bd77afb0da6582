/*
 * save_private.h: what the parts of save_items share: the native one (save_items.c), the one that
 * asks torch (save_torch.c), and where the bytes of tensors come from (save_tensor.c).
 */
#ifndef DCP_SAVE_PRIVATE_H
#define DCP_SAVE_PRIVATE_H

#include "dtensor_box.h"
#include "flatten.h"
#include "save_items.h"

/* A box of a global tensor: ndim numbers of each. */
struct save_box {
    uint64_t size[DCP_MAX_DIMS];
    uint64_t offsets[DCP_MAX_DIMS];
    uint64_t sizes[DCP_MAX_DIMS];
};

/* One build. */
struct save_builder {
    const struct native_state *state;
    const struct save_items_options *options;
    struct save_items *items;
    const struct flatten_leaf *leaf; /* in work */
    uint32_t name;                   /* of the leaf, in the plan */
    bool grad_enabled;               /* torch.is_grad_enabled() */
    bool ask_pinned;                 /* an accelerator is initialised, so memory may be pinned */
    struct mesh_cache meshes;
    /* Scratch of one leaf: too large to zero for every one. */
    struct save_box box;
    struct dtensor_box dtensor_box;
    struct dcp_error err;
};

/* Name of the leaf in work; returns new. */
PyObject *save_fqn(const struct save_builder *b);
int save_add_item(struct save_builder *b, const struct dcp_item *item, const struct save_box *box,
                  const struct dcp_source *source);
int save_add_object(struct save_builder *b, PyObject *object);
/* Keeps a record until the items are cleaned up: takes the block, also on failure. */
int save_own_block(struct save_builder *b, uint8_t *block);
/* An object whose record is given: copied. */
int save_add_bytes(struct save_builder *b, const void *bytes, size_t len);
/* Adds `item` with the bytes of `tensor`: its memory, a copy of it, or a record by torch.save.
 * item->slot_bytes is set for a record. */
int save_add_tensor(struct save_builder *b, struct dcp_item *item, const struct save_box *box,
                    PyObject *tensor, enum dcp_tensor_class tensor_class,
                    const struct dcp_tensor_view *view);

/* Items as torch's _create_write_items makes them, data as its planner would look it up. */
int save_add_through_torch(struct save_builder *b, PyObject *object);
/* Whether a plain tensor describes its own shards: 1, 0 or -1. */
int save_has_hook(const struct native_state *state, PyObject *tensor);
/* Fills grad_enabled and ask_pinned. */
int save_ask_modes(struct save_builder *b);

#endif

/*
 * save_items.c: one pass from a state dict to items and sources.
 *
 * Plain tensors and DTensors over plain tensors are described from their C++ fields; everything
 * else is described by torch's own _create_write_items, so that hooks, ShardedTensors and what a
 * later torch adds behave as there.  A plan holds numbers only; where the bytes of a tensor come
 * from is save_tensor.c's to say.
 *
 * Invariant: sources and plan.items have equal length after every leaf.  All functions need the
 * GIL; torch code runs in between, so nothing borrowed from a tensor is used after such a call
 * without its reference.
 */
#include "save_items.h"

#include <string.h>

#include "dtensor_box.h"
#include "errors.h"
#include "flatten.h"
#include "save_private.h"
#include "save_record.h"

/* ---- appending ---- */

static int
raise_core(const struct save_builder *b)
{
    native_set_error(b->state->error_class, &b->err);
    return -1;
}

int
save_add_item(struct save_builder *b, const struct dcp_item *item, const struct save_box *box,
              const struct dcp_source *source)
{
    struct save_items *items = b->items;

    if (items->sources_count == items->sources_cap) {
        uint32_t cap = items->sources_cap == 0 ? 64 : 2 * items->sources_cap;
        struct dcp_source *grown =
            dcp_realloc(items->sources, (size_t)cap * sizeof(*items->sources));

        if (grown == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        items->sources = grown;
        items->sources_cap = cap;
    }
    if (dcp_plan_add_item(&items->plan, item, box->size, box->offsets, box->sizes, &b->err) != 0) {
        return raise_core(b);
    }
    items->sources[items->sources_count++] = *source;
    return 0;
}

int
save_own_block(struct save_builder *b, uint8_t *block)
{
    struct save_items *items = b->items;

    if (items->blocks_count == items->blocks_cap) {
        uint32_t cap = items->blocks_cap == 0 ? 16 : 2 * items->blocks_cap;
        uint8_t **grown = dcp_realloc(items->blocks, (size_t)cap * sizeof(*items->blocks));

        if (grown == NULL) {
            dcp_free(block);
            PyErr_NoMemory();
            return -1;
        }
        items->blocks = grown;
        items->blocks_cap = cap;
    }
    items->blocks[items->blocks_count++] = block;
    return 0;
}

/* Adds an object whose record is `block`, which it takes. */
static int
add_object_block(struct save_builder *b, uint8_t *block, uint64_t len)
{
    struct dcp_item item = {.name = b->name, .kind = DCP_ITEM_BYTES, .slot_bytes = len};
    struct save_box box = {0};
    struct dcp_source source = {.data = block};

    if (save_own_block(b, block) != 0) {
        return -1;
    }
    b->items->objects_count++;
    b->items->objects_bytes += len;
    return save_add_item(b, &item, &box, &source);
}

int
save_add_object(struct save_builder *b, PyObject *object)
{
    uint8_t *block;
    uint64_t slot_bytes;

    return save_record_object(b->state, object, &block, &slot_bytes) != 0
               ? -1
               : add_object_block(b, block, slot_bytes);
}

int
save_add_bytes(struct save_builder *b, const void *bytes, size_t len)
{
    uint8_t *block = dcp_malloc(len);

    if (block == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(block, bytes, len);
    return add_object_block(b, block, len);
}

/* ---- native leaves ---- */

/* Adds DCP_PROP_PIN_MEMORY where the tensor is pinned. */
static int
ask_pinned(const struct save_builder *b, PyObject *tensor, const struct dcp_tensor_view *view,
           struct dcp_item *item)
{
    PyObject *pinned;
    int is;

    if (!b->ask_pinned || !(view->flags & DCP_TENSOR_CPU)) {
        return 0;
    }
    pinned = native_call(tensor, b->state->name_is_pinned);
    is = pinned == NULL ? -1 : PyObject_IsTrue(pinned);
    Py_XDECREF(pinned);
    if (is > 0) {
        item->props |= DCP_PROP_PIN_MEMORY;
    }
    return is < 0 ? -1 : 0;
}

/* 1: not for this path; 0; -1. */
static int
add_plain_tensor(struct save_builder *b, PyObject *tensor)
{
    struct dcp_item item = {.name = b->name, .kind = DCP_ITEM_TENSOR};
    struct save_box *box = &b->box;
    struct dcp_tensor_view view;
    enum dcp_tensor_class tensor_class;
    int hook = save_has_hook(b->state, tensor);

    if (hook != 0) {
        return hook;
    }
    tensor_class = (enum dcp_tensor_class)b->state->bridge->tensor_view(tensor, &view);
    if (tensor_class != DCP_PLAIN_TENSOR || !(view.flags & DCP_TENSOR_STRIDED) ||
        !(view.flags & DCP_TENSOR_HAS_TYPE) || view.ndim > DCP_MAX_DIMS) {
        return 1;
    }
    for (uint32_t d = 0; d < view.ndim; d++) {
        box->size[d] = box->sizes[d] = (uint64_t)view.sizes[d];
        box->offsets[d] = 0;
    }
    item.ndim = (uint8_t)view.ndim;
    item.dtype = (uint8_t)view.dtype;
    item.props = view.flags & DCP_TENSOR_REQUIRES_GRAD ? DCP_PROP_REQUIRES_GRAD : 0;
    if (ask_pinned(b, tensor, &view, &item) != 0) {
        return -1;
    }
    b->items->tensors_count++;
    return save_add_tensor(b, &item, box, tensor, tensor_class, &view);
}

/* requires_grad of dtensor.to_local(): 1, 0 or -1. */
static int
local_requires_grad(const struct save_builder *b, PyObject *dtensor, const struct dtensor_box *box)
{
    PyObject *is_param;
    int rc;

    if (b->grad_enabled) {
        return (box->view.flags & DCP_TENSOR_REQUIRES_GRAD) != 0;
    }
    if (!(box->local_view.flags & DCP_TENSOR_REQUIRES_GRAD)) {
        return 0;
    }
    /* Of a parameter, to_local() gives a view made without gradients. */
    rc = native_optional_attr(dtensor, b->state->name_is_param, &is_param);
    if (rc > 0) {
        rc = PyObject_IsTrue(is_param);
        Py_DECREF(is_param);
    }
    return rc < 0 ? -1 : !rc;
}

/* 1: not for this path; 0; -1. */
static int
add_dtensor(struct save_builder *b, PyObject *dtensor)
{
    struct dcp_item item = {.name = b->name, .kind = DCP_ITEM_SHARD};
    struct dtensor_box *box = &b->dtensor_box;
    int hook = native_has_hook(dtensor, b->state->name_write_hook, b->state->dtensor_write_hook);
    enum dtensor_answer answer;
    int rc;

    if (hook != 0) {
        return hook;
    }
    answer = dtensor_box_find(b->state, &b->meshes, dtensor, box);
    if (answer != DTENSOR_NATIVE) {
        return answer == DTENSOR_ASK_TORCH ? 1 : answer == DTENSOR_OUTSIDE_MESH ? 0 : -1;
    }
    rc = save_has_hook(b->state, box->local);
    if (rc == 0 && (!(box->local_view.flags & DCP_TENSOR_STRIDED) ||
                    !(box->local_view.flags & DCP_TENSOR_HAS_TYPE))) {
        rc = 1;
    }
    if (rc == 0) {
        rc = local_requires_grad(b, dtensor, box);
        item.props = rc > 0 ? DCP_PROP_REQUIRES_GRAD : 0;
        rc = rc < 0 ? -1 : ask_pinned(b, box->local, &box->local_view, &item);
    }
    if (rc == 0) {
        item.ndim = (uint8_t)box->ndim;
        item.dtype = (uint8_t)box->local_view.dtype;
        memcpy(b->box.size, box->size, box->ndim * sizeof(uint64_t));
        memcpy(b->box.offsets, box->offsets, box->ndim * sizeof(uint64_t));
        memcpy(b->box.sizes, box->sizes, box->ndim * sizeof(uint64_t));
        b->items->dtensors_count++;
        rc = save_add_tensor(b, &item, &b->box, box->local, DCP_PLAIN_TENSOR, &box->local_view);
    }
    Py_CLEAR(box->local);
    return rc;
}

/* ---- leaves ---- */

static int
add_value(struct save_builder *b, PyObject *value)
{
    const struct native_state *state = b->state;
    PyObject *type = (PyObject *)Py_TYPE(value);
    int rc = 1, is;

    if (type == state->tensor_type || type == state->parameter_type) {
        rc = add_plain_tensor(b, value);
    } else if (type == state->dtensor_type) {
        rc = add_dtensor(b, value);
    } else if (flatten_is_plain_leaf(value) || PyList_CheckExact(value) ||
               PyDict_CheckExact(value)) {
        rc = save_add_object(b, value);
    }
    if (rc != 1) {
        return rc;
    }
    is = PyObject_IsInstance(value, state->dtensor_type);
    if (is > 0) {
        is = dtensor_is_outside_mesh(state, value);
        if (is > 0) {
            return 0;
        }
    }
    return is < 0 ? -1 : save_add_through_torch(b, value);
}

static int
on_leaf(void *ctx, const struct flatten_leaf *leaf)
{
    struct save_builder *b = ctx;
    PyObject *value = Py_NewRef(leaf->value);
    int rc = 0;

    b->leaf = leaf;
    if (dcp_plan_add_name(&b->items->plan, leaf->fqn, leaf->fqn_len, leaf->path, leaf->path_len,
                          leaf->path_parts, &b->name, &b->err) != 0) {
        rc = raise_core(b);
    } else if (b->options->flatten_sharded_tensors && !flatten_is_common_leaf(b->state, value)) {
        rc = PyObject_IsInstance(value, b->state->sharded_tensor_type);
        if (rc > 0) {
            Py_CLEAR(value);
            rc = flatten_sharded_leaf(b->state, leaf, &value);
        }
    }
    if (rc == 0 && value != NULL) {
        rc = add_value(b, value);
    }
    Py_XDECREF(value);
    return rc;
}

int
save_items_build(struct native_state *state, PyObject *state_dict,
                 const struct save_items_options *options, struct save_items *ret)
{
    struct save_items items = {.keepalive = PyList_New(0)};
    struct save_builder b = {.state = state, .options = options, .items = &items};
    PyObject *root = NULL;
    int rc = items.keepalive == NULL ? -1 : save_ask_modes(&b);

    dcp_error_clear(&b.err);
    items.plan.rank = options->rank;
    items.plan.thread_count = options->thread_count;
    items.plan.single_file_per_rank = options->single_file_per_rank;
    items.plan.has_paths = options->flatten_state_dict;
    if (rc == 0 && !options->flatten_state_dict && options->flatten_sharded_tensors) {
        rc = flatten_rebuild_top_level(state, state_dict, &root);
    } else {
        root = Py_NewRef(state_dict);
    }
    if (rc == 0) {
        rc = flatten_state_dict(state, root,
                                options->flatten_state_dict ? FLATTEN_CURRENT : FLATTEN_TOP_LEVEL,
                                on_leaf, &b);
    }
    Py_XDECREF(root);
    mesh_cache_clean_up(&b.meshes);
    if (rc != 0) {
        save_items_clean_up(&items);
        return -1;
    }
    *ret = items;
    return 0;
}

void
save_items_clean_up(struct save_items *items)
{
    if (items == NULL) {
        return;
    }
    dcp_plan_clean_up(&items->plan);
    dcp_free(items->sources);
    for (uint32_t i = 0; i < items->blocks_count; i++) {
        dcp_free(items->blocks[i]);
    }
    dcp_free(items->blocks);
    dcp_bump_clean_up(&items->strides);
    Py_XDECREF(items->keepalive);
    memset(items, 0, sizeof(*items));
}

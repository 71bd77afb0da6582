/*
 * load_targets.c: one pass from a target state dict and metadata to targets.
 *
 * The checks, their order and their texts are torch's create_default_local_load_plan.  The reader
 * writes the caller's memory itself when that is plain, does not overlap itself and is of the saved
 * dtype or of one that it can convert to: on the CPU, or on a device of which a table was lent that
 * can (device_put.c).  Everything else is the work of the
 * destination's own copy_, which knows about casts, devices and subclasses: in pieces where any
 * strided view of the destination is its memory, in whole overlaps, as torch does, where that is
 * not known.
 *
 * A destination that is larger than the box torch computes for it (a padded shard) is narrowed, as
 * torch does; boxes without elements are not read.  All functions need the GIL.
 */
#include "load_targets.h"

#include <string.h>

#include "dcp_convert.h"
#include "errors.h"
#include "flatten.h"
#include "key_filter.h"
#include "load_private.h"

/* ---- leaves ---- */

static int
leaves_add(struct load_builder *b, struct load_leaves *leaves, const struct flatten_leaf *leaf,
           PyObject *value)
{
    struct flatten_leaf *copy;
    char *text;

    if (leaves->count == leaves->cap) {
        size_t cap = leaves->cap == 0 ? 64 : 2 * leaves->cap;
        struct flatten_leaf *grown = dcp_realloc(leaves->items, cap * sizeof(*grown));

        if (grown == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        leaves->items = grown;
        leaves->cap = cap;
    }
    text = dcp_bump_alloc(&b->strings, leaf->fqn_len + leaf->path_len + 1, 1);
    if (text == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    copy = &leaves->items[leaves->count++];
    *copy = *leaf;
    memcpy(text, leaf->fqn, leaf->fqn_len);
    copy->fqn = text;
    if (leaf->path != NULL) {
        memcpy(text + leaf->fqn_len, leaf->path, leaf->path_len);
        copy->path = (const uint8_t *)text + leaf->fqn_len;
    }
    copy->value = Py_NewRef(value);
    return 0;
}

static void
leaves_clean_up(struct load_leaves *leaves)
{
    for (size_t i = 0; i < leaves->count; i++) {
        Py_DECREF(leaves->items[i].value);
    }
    dcp_free(leaves->items);
    *leaves = (struct load_leaves){0};
}

static int
on_current_leaf(void *ctx, const struct flatten_leaf *leaf)
{
    struct load_builder *b = ctx;
    PyObject *value = Py_NewRef(leaf->value);
    int rc = 0;

    if (b->options->flatten_sharded_tensors && !flatten_is_common_leaf(b->state, value)) {
        rc = PyObject_IsInstance(value, b->state->sharded_tensor_type);
        if (rc > 0) {
            Py_CLEAR(value);
            rc = flatten_sharded_leaf(b->state, leaf, &value);
        }
    }
    if (rc == 0 && value != NULL) {
        rc = name_set_add(&b->names, leaf->fqn, leaf->fqn_len) < 0
                 ? -1
                 : leaves_add(b, &b->leaves, leaf, value);
    }
    Py_XDECREF(value);
    return rc;
}

static int
on_old_leaf(void *ctx, const struct flatten_leaf *leaf)
{
    struct load_builder *b = ctx;

    return leaves_add(b, &b->old_leaves, leaf, leaf->value);
}

static bool
checkpoint_has_other_keys(const struct load_builder *b)
{
    for (uint64_t i = 0; i < b->md->entries_count; i++) {
        const struct dcp_md_entry *entry = &b->md->entries[i];

        if (!name_set_has(&b->names, b->md->strings + entry->name, entry->name_len)) {
            return true;
        }
    }
    return false;
}

/* torch's rule: when keys of the checkpoint are not wanted, but would be by the flattening of torch
 * 2.3, the checkpoint was made by it. */
static int
choose_flattening(struct load_builder *b, PyObject *state_dict)
{
    if (!checkpoint_has_other_keys(b)) {
        return 0;
    }
    if (flatten_state_dict(b->state, state_dict, FLATTEN_V_2_3, on_old_leaf, b) != 0) {
        return -1;
    }
    for (size_t i = 0; i < b->old_leaves.count; i++) {
        const struct flatten_leaf *leaf = &b->old_leaves.items[i];

        if (!name_set_has(&b->names, leaf->fqn, leaf->fqn_len) &&
            dcp_metadata_find(b->md, leaf->fqn, leaf->fqn_len) != NULL) {
            b->targets->is_v_2_3 = true;
            return 0;
        }
    }
    return 0;
}

static int
collect_leaves(struct load_builder *b, PyObject *state_dict)
{
    PyObject *root = NULL;
    int rc = 0;

    if (b->options->flatten_state_dict) {
        rc = flatten_state_dict(b->state, state_dict, FLATTEN_CURRENT, on_current_leaf, b);
        return rc != 0 ? -1 : choose_flattening(b, state_dict);
    }
    if (b->options->flatten_sharded_tensors) {
        rc = flatten_rebuild_top_level(b->state, state_dict, &root);
    } else {
        root = Py_NewRef(state_dict);
    }
    if (rc == 0) {
        rc = flatten_state_dict(b->state, root, FLATTEN_TOP_LEVEL, on_current_leaf, b);
    }
    Py_XDECREF(root);
    return rc;
}

/* ---- targets ---- */

static int
raise_core(const struct load_builder *b)
{
    native_set_error(b->state->error_class, &b->err);
    return -1;
}

/* Adds the target; its memory belongs to `tensor` (or None). */
static int
add_target(struct load_builder *b, uint8_t *data, const int64_t *strides_bytes,
           const uint64_t *offsets, const uint64_t *sizes, PyObject *tensor, uint64_t *ret_target)
{
    struct load_targets *targets = b->targets;

    if (dcp_read_plan_add(&targets->plan, (uint64_t)(b->entry - b->md->entries), data,
                          strides_bytes, offsets, sizes, ret_target, &b->err) != 0) {
        return raise_core(b);
    }
    return PyList_Append(targets->tensors, tensor);
}

int
load_strides(struct dcp_bump *bump, const struct dcp_tensor_view *view, uint32_t unit_bytes,
             const int64_t **ret)
{
    int64_t *strides = NULL;

    if (!(view->flags & DCP_TENSOR_CONTIGUOUS)) {
        strides = dcp_bump_alloc(bump, view->ndim * sizeof(int64_t), sizeof(int64_t));
        if (strides == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (uint32_t d = 0; d < view->ndim; d++) {
            strides[d] = view->strides[d] * (int64_t)unit_bytes;
        }
    }
    *ret = strides;
    return 0;
}

bool
load_is_memory(enum dcp_tensor_class tensor_class, const struct dcp_tensor_view *view,
               int saved_dtype)
{
    const uint32_t wants = DCP_TENSOR_STRIDED | DCP_TENSOR_CPU | DCP_TENSOR_HAS_MEMORY;
    const uint32_t refuses = DCP_TENSOR_CONJ | DCP_TENSOR_NEG | DCP_TENSOR_OVERLAPS;

    return tensor_class == DCP_PLAIN_TENSOR && (view->flags & wants) == wants &&
           !(view->flags & refuses) &&
           (view->dtype == saved_dtype || dcp_can_convert(saved_dtype, view->dtype));
}

/* Whether every as_strided view of the tensor is its memory, on devices that are known for it. */
static bool
takes_pieces(enum dcp_tensor_class tensor_class, const struct dcp_tensor_view *view)
{
    const uint32_t wants = DCP_TENSOR_STRIDED | DCP_TENSOR_HAS_MEMORY;

    return tensor_class == DCP_PLAIN_TENSOR && (view->flags & wants) == wants &&
           (view->flags & (DCP_TENSOR_CPU | DCP_TENSOR_CUDA)) &&
           !(view->flags & DCP_TENSOR_OVERLAPS);
}

static uint64_t
tensor_bytes(const struct dcp_tensor_view *view)
{
    uint64_t bytes = view->item_bytes;

    for (uint32_t d = 0; d < view->ndim; d++) {
        bytes *= (uint64_t)view->sizes[d]; /* of memory that exists */
    }
    return bytes;
}

static int
add_memory(struct load_builder *b, const struct dcp_tensor_view *view, uint8_t *data,
           const uint64_t *offsets, const uint64_t *sizes, PyObject *tensor)
{
    const int64_t *strides;
    uint64_t target;

    if (load_strides(&b->targets->strides, view, view->item_bytes, &strides) != 0 ||
        add_target(b, data, strides, offsets, sizes, tensor, &target) != 0) {
        return -1;
    }
    if (view->dtype != b->entry->dtype) {
        b->targets->plan.targets[target].dtype = (uint8_t)view->dtype;
    } else {
        b->targets->straight_count++;
    }
    return 0;
}

/* Adds a target whose memory a device fills by itself: 1: torch has to; 0; -1. */
static int
add_device_memory(struct load_builder *b, enum dcp_tensor_class tensor_class,
                  const struct dcp_tensor_view *view, const uint64_t *offsets,
                  const uint64_t *sizes, PyObject *tensor)
{
    struct device_set **devices = b->options->devices;
    const int64_t *strides;
    uint32_t number;
    uint64_t target;
    uint8_t *data;
    int rc;

    if (devices == NULL || !takes_pieces(tensor_class, view) || !(view->flags & DCP_TENSOR_CUDA)) {
        return 1;
    }
    rc = device_set_find(devices, b->state, view->device_index, &number);
    if (rc < 0) {
        return -1;
    }
    if (rc == 0 || view->flags & (DCP_TENSOR_CONJ | DCP_TENSOR_NEG) ||
        !dcp_device_put_can((*devices)->items[number - 1], b->entry->dtype, (uint8_t)view->dtype,
                            view->ndim, sizes, view->strides)) {
        device_set_refuse(*devices, tensor_bytes(view),
                          rc == 0 ? NULL : "a target has strides or a dtype that only torch fills");
        return 1;
    }
    data = b->state->bridge->tensor_mutable_data(tensor);
    if (data == NULL) {
        return 1;
    }
    if (load_strides(&b->targets->strides, view, 1, &strides) != 0 ||
        add_target(b, data, strides, offsets, sizes, tensor, &target) != 0) {
        return -1;
    }
    b->targets->plan.targets[target].kind = DCP_TARGET_PIECES;
    b->targets->plan.targets[target].device = number;
    if (view->dtype != b->entry->dtype) {
        b->targets->plan.targets[target].dtype = (uint8_t)view->dtype;
    }
    b->targets->device_count++;
    return 0;
}

/* Adds a target that is filled by the tensor's own copy_. */
static int
add_copy(struct load_builder *b, enum dcp_tensor_class tensor_class,
         const struct dcp_tensor_view *view, const uint64_t *offsets, const uint64_t *sizes,
         PyObject *tensor)
{
    bool in_pieces = takes_pieces(tensor_class, view);
    PyObject *dest = native_call(tensor, b->state->name_detach);
    const int64_t *strides = NULL;
    uint64_t target;
    int rc = dest == NULL ? -1 : 0;

    if (rc == 0 && in_pieces) {
        rc = load_strides(&b->targets->strides, view, 1, &strides);
    }
    if (rc == 0) {
        rc = add_target(b, NULL, strides, offsets, sizes, dest, &target);
    }
    if (rc == 0) {
        b->targets->plan.targets[target].kind = in_pieces ? DCP_TARGET_PIECES : DCP_TARGET_OVERLAPS;
        b->targets->copies_count++;
    }
    Py_XDECREF(dest);
    return rc;
}

/* 1: the view has exactly these sizes. */
static bool
has_sizes(const struct load_builder *b, const struct dcp_tensor_view *view, const uint64_t *sizes)
{
    if (view->sizes == NULL || view->ndim != b->entry->ndim) {
        return false;
    }
    for (uint32_t d = 0; d < view->ndim; d++) {
        if ((uint64_t)view->sizes[d] != sizes[d]) {
            return false;
        }
    }
    return true;
}

/* The first `sizes` elements of every dimension; torch raises when there are fewer.  Returns new.
 */
static PyObject *
narrow(const struct load_builder *b, PyObject *tensor, const uint64_t *sizes)
{
    static const uint64_t zeros[DCP_MAX_DIMS];
    PyObject *offset = native_size_new(b->state, b->entry->ndim, zeros);
    PyObject *size = offset != NULL ? native_size_new(b->state, b->entry->ndim, sizes) : NULL;
    PyObject *narrowed = NULL;

    if (size != NULL) {
        narrowed = PyObject_CallFunctionObjArgs(b->state->narrow_tensor_by_index, tensor, offset,
                                                size, NULL);
    }
    Py_XDECREF(size);
    Py_XDECREF(offset);
    return narrowed;
}

int
load_add_box(struct load_builder *b, const uint64_t *offsets, const uint64_t *sizes,
             PyObject *tensor)
{
    struct dcp_tensor_view view;
    enum dcp_tensor_class tensor_class =
        (enum dcp_tensor_class)b->state->bridge->tensor_view(tensor, &view);
    uint8_t *data;
    int rc;

    for (uint32_t d = 0; d < b->entry->ndim; d++) {
        if (sizes[d] == 0) {
            return 0;
        }
    }
    if (tensor_class != DCP_NOT_A_TENSOR && !has_sizes(b, &view, sizes)) {
        PyObject *narrowed = narrow(b, tensor, sizes);

        rc = -1;
        if (narrowed != NULL && b->state->bridge->tensor_view(narrowed, &view) != 0) {
            if (has_sizes(b, &view, sizes)) {
                rc = load_add_box(b, offsets, sizes, narrowed);
            } else {
                PyErr_Format(PyExc_AssertionError, "%R does not narrow to the box it is to hold",
                             (PyObject *)Py_TYPE(tensor));
            }
        }
        Py_XDECREF(narrowed);
        return rc;
    }
    if (tensor_class != DCP_NOT_A_TENSOR && view.dtype != b->entry->dtype) {
        b->targets->cast_count++;
        load_mark(b, LOAD_CAST);
    }
    if (load_is_memory(tensor_class, &view, b->entry->dtype)) {
        data = b->state->bridge->tensor_mutable_data(tensor);
        if (data != NULL) {
            return add_memory(b, &view, data, offsets, sizes, tensor);
        }
    }
    rc = add_device_memory(b, tensor_class, &view, offsets, sizes, tensor);
    return rc <= 0 ? rc : add_copy(b, tensor_class, &view, offsets, sizes, tensor);
}

int
load_add_object(struct load_builder *b)
{
    const struct flatten_leaf *leaf = b->leaf;
    PyObject *fqn, *path, *object;
    uint64_t target;
    int rc = -1;

    if (add_target(b, NULL, NULL, NULL, NULL, Py_None, &target) != 0) {
        return -1;
    }
    fqn = load_fqn(b);
    path = leaf->path == NULL ? Py_NewRef(Py_None)
                              : flatten_path_as_tuple(leaf->path, leaf->path_len, leaf->path_parts);
    if (fqn != NULL && path != NULL) {
        object = Py_BuildValue("(KOO)", (unsigned long long)target, fqn, path);
        rc = object == NULL ? -1 : PyList_Append(b->targets->objects, object);
        Py_XDECREF(object);
    }
    Py_XDECREF(path);
    Py_XDECREF(fqn);
    return rc;
}

/* ---- building ---- */

/* 1: the leaf in work is to be loaded; 0: the filter leaves it out, or it is missing and may be;
 * -1. */
static int
is_selected(struct load_builder *b)
{
    const struct flatten_leaf *leaf = b->leaf;
    int selected = b->options->filter == NULL ? 1 : key_filter_selects(b->options->filter, leaf);
    PyObject *fqn;

    if (b->entry != NULL) {
        load_mark(b, LOAD_WANTED);
    }
    if (selected == 0) {
        load_names_note(&b->targets->skipped, leaf->fqn, leaf->fqn_len);
    }
    if (selected <= 0 || b->entry != NULL) {
        return selected;
    }
    if (b->options->allow_partial_load) {
        b->targets->missing_count++;
        load_names_note(&b->targets->missing, leaf->fqn, leaf->fqn_len);
        return 0;
    }
    fqn = load_fqn(b);
    if (fqn != NULL) {
        PyErr_Format(PyExc_RuntimeError, "Missing key in checkpoint state_dict: %U.", fqn);
        Py_DECREF(fqn);
    }
    return -1;
}

static int
add_leaves(struct load_builder *b)
{
    const struct load_leaves *leaves = b->targets->is_v_2_3 ? &b->old_leaves : &b->leaves;

    for (size_t i = 0; i < leaves->count; i++) {
        int selected;

        b->leaf = &leaves->items[i];
        b->entry = dcp_metadata_find(b->md, b->leaf->fqn, b->leaf->fqn_len);
        selected = is_selected(b);
        if (selected < 0 || (selected > 0 && load_add_leaf(b) != 0)) {
            return -1;
        }
    }
    return 0;
}

int
load_targets_build(struct native_state *state, const struct dcp_metadata *md, PyObject *state_dict,
                   const struct load_targets_options *options, struct load_targets *ret)
{
    struct load_targets targets = {
        .plan = {.md = md},
        .tensors = PyList_New(0),
        .objects = PyList_New(0),
        .marks = dcp_calloc(dcp_max_u64(md->entries_count, 1), sizeof(*targets.marks)),
    };
    struct load_builder b = {.state = state, .md = md, .options = options, .targets = &targets};
    int rc = -1;

    dcp_error_clear(&b.err);
    if (targets.marks == NULL) {
        PyErr_NoMemory();
    } else if (targets.tensors != NULL && targets.objects != NULL &&
               collect_leaves(&b, state_dict) == 0) {
        rc = add_leaves(&b);
    }
    leaves_clean_up(&b.leaves);
    leaves_clean_up(&b.old_leaves);
    dcp_bump_clean_up(&b.strings);
    name_set_clean_up(&b.names);
    mesh_cache_clean_up(&b.meshes);
    if (rc != 0) {
        load_targets_clean_up(&targets);
        return -1;
    }
    *ret = targets;
    return 0;
}

void
load_targets_clean_up(struct load_targets *targets)
{
    if (targets == NULL) {
        return;
    }
    dcp_read_plan_clean_up(&targets->plan);
    dcp_bump_clean_up(&targets->strides);
    dcp_buf_clean_up(&targets->missing.text);
    dcp_buf_clean_up(&targets->skipped.text);
    dcp_free(targets->marks);
    Py_XDECREF(targets->tensors);
    Py_XDECREF(targets->objects);
    memset(targets, 0, sizeof(*targets));
}

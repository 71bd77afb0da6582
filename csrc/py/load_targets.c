/*
 * load_targets.c: one pass from a target state dict and metadata to targets.
 *
 * The checks, their order and their texts are torch's create_default_local_load_plan.  A target is
 * read straight into the caller's memory when that memory is plain, on the CPU, of the saved dtype
 * and does not overlap itself; otherwise a temporary of the saved dtype is read and copied
 * afterwards by the destination's own copy_, which knows about casts, devices and subclasses.
 *
 * A destination that is larger than the box torch computes for it (a padded shard) is narrowed, as
 * torch does; boxes without elements are not read.  All functions need the GIL.
 */
#include "load_targets.h"

#include <string.h>

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

/* 0 and the strides (NULL when row major), or -1. */
static int
byte_strides(struct load_builder *b, const struct dcp_tensor_view *view, const int64_t **ret)
{
    int64_t *strides = NULL;

    if (!(view->flags & DCP_TENSOR_CONTIGUOUS)) {
        strides =
            dcp_bump_alloc(&b->targets->strides, view->ndim * sizeof(int64_t), sizeof(int64_t));
        if (strides == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (uint32_t d = 0; d < view->ndim; d++) {
            strides[d] = view->strides[d] * (int64_t)view->item_bytes;
        }
    }
    *ret = strides;
    return 0;
}

/* torch.empty(sizes, dtype=saved dtype, device="cpu"); returns new. */
static PyObject *
empty_tensor(const struct load_builder *b, const uint64_t *sizes)
{
    PyObject *dtype = b->state->dtypes[b->entry->dtype];
    PyObject *size, *args = NULL, *kwargs = NULL, *tensor = NULL;

    if (dtype == NULL) {
        PyErr_Format(PyExc_TypeError, "the checkpoint holds torch.%s, which this torch has not",
                     dcp_dtype_name(b->entry->dtype));
        return NULL;
    }
    size = native_size_new(b->state, b->entry->ndim, sizes);
    if (size != NULL) {
        args = PyTuple_Pack(1, size);
        kwargs = Py_BuildValue("{sOss}", "dtype", dtype, "device", "cpu");
    }
    if (args != NULL && kwargs != NULL) {
        tensor = PyObject_Call(b->state->torch_empty, args, kwargs);
    }
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    Py_XDECREF(size);
    return tensor;
}

/* Reads into a temporary and leaves (temporary, destination) for later. */
static int
add_copy(struct load_builder *b, const uint64_t *offsets, const uint64_t *sizes, PyObject *dest)
{
    struct load_targets *targets = b->targets;
    PyObject *temporary = empty_tensor(b, sizes);
    PyObject *pair = NULL;
    uint64_t target;
    uint8_t *data;
    int rc = -1;

    if (temporary != NULL) {
        data = b->state->bridge->tensor_mutable_data(temporary);
        if (data == NULL) {
            PyErr_SetString(PyExc_RuntimeError, "torch.empty gave a tensor without memory: is a "
                                                "fake tensor mode active?");
        } else {
            pair = PyTuple_Pack(2, temporary, dest);
        }
    }
    if (pair != NULL && PyList_Append(targets->copies, pair) == 0) {
        rc = add_target(b, data, NULL, offsets, sizes, temporary, &target);
        targets->copies_count++;
    }
    Py_XDECREF(pair);
    Py_XDECREF(temporary);
    return rc;
}

/* Quantised tensors: only torch reads such records, straight into the destination; the core gets
 * memory of the right size all the same. */
static int
add_scratch(struct load_builder *b, const uint64_t *offsets, const uint64_t *sizes, PyObject *dest)
{
    uint64_t bytes = dcp_dtype_bytes(b->entry->dtype), target;
    PyObject *scratch;
    int rc = -1;

    for (uint32_t d = 0; d < b->entry->ndim; d++) {
        if (dcp_mul_overflows_u64(bytes, sizes[d], &bytes) || bytes > DCP_MAX_PAYLOAD_BYTES) {
            PyErr_NoMemory();
            return -1;
        }
    }
    scratch = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)bytes);
    if (scratch != NULL && PyList_Append(b->targets->scratch, scratch) == 0) {
        rc = add_target(b, (uint8_t *)PyByteArray_AS_STRING(scratch), NULL, offsets, sizes, dest,
                        &target);
    }
    Py_XDECREF(scratch);
    return rc;
}

static bool
is_straight(const struct load_builder *b, enum dcp_tensor_class tensor_class,
            const struct dcp_tensor_view *view)
{
    const uint32_t wants = DCP_TENSOR_STRIDED | DCP_TENSOR_CPU | DCP_TENSOR_HAS_MEMORY;
    const uint32_t refuses = DCP_TENSOR_CONJ | DCP_TENSOR_NEG | DCP_TENSOR_OVERLAPS;

    return tensor_class == DCP_PLAIN_TENSOR && (view->flags & wants) == wants &&
           !(view->flags & refuses) && view->dtype == b->entry->dtype;
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
    const int64_t *strides;
    PyObject *dest;
    uint64_t target;
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
    if (is_straight(b, tensor_class, &view)) {
        data = b->state->bridge->tensor_mutable_data(tensor);
        if (data != NULL) {
            b->targets->straight_count++;
            if (byte_strides(b, &view, &strides) != 0 ||
                add_target(b, data, strides, offsets, sizes, tensor, &target) != 0) {
                return -1;
            }
            b->targets->plan.targets[target].caller_memory = true;
            return 0;
        }
    }
    dest = native_call(tensor, b->state->name_detach);
    if (dest == NULL) {
        return -1;
    }
    if (tensor_class != DCP_NOT_A_TENSOR && view.dtype != b->entry->dtype) {
        b->targets->cast_count++;
        load_mark(b, LOAD_CAST);
    }
    rc = b->entry->dtype >= DCP_DTYPE_QINT8 && b->entry->dtype <= DCP_DTYPE_QINT32
             ? add_scratch(b, offsets, sizes, dest)
             : add_copy(b, offsets, sizes, dest);
    Py_DECREF(dest);
    return rc;
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
        .copies = PyList_New(0),
        .scratch = PyList_New(0),
        .marks = dcp_calloc(dcp_max_u64(md->entries_count, 1), sizeof(*targets.marks)),
    };
    struct load_builder b = {.state = state, .md = md, .options = options, .targets = &targets};
    int rc = -1;

    dcp_error_clear(&b.err);
    if (targets.marks == NULL) {
        PyErr_NoMemory();
    } else if (targets.tensors != NULL && targets.objects != NULL && targets.copies != NULL &&
               targets.scratch != NULL && collect_leaves(&b, state_dict) == 0) {
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
    Py_XDECREF(targets->copies);
    Py_XDECREF(targets->scratch);
    memset(targets, 0, sizeof(*targets));
}

/*
 * load_leaf.c: which boxes a value of the target state dict wants, and whether it may have them.
 *
 * Order of the checks, as torch has it: size, membership in the mesh, then what kind of object
 * meets what kind of entry.  Plain tensors and native DTensors are answered here; other values by
 * torch's _create_chunk_list and find_state_dict_object.  All functions need the GIL.
 */
#include <string.h>

#include "load_private.h"

PyObject *
load_fqn(const struct load_builder *b)
{
    return PyUnicode_DecodeUTF8(b->leaf->fqn, (Py_ssize_t)b->leaf->fqn_len, NULL);
}

static const uint64_t *
saved_size(const struct load_builder *b)
{
    return b->md->dims + b->entry->size;
}

/* ---- size ---- */

static int
compare_size(const struct load_builder *b, PyObject *current)
{
    PyObject *saved = native_size_new(b->state, b->entry->ndim, saved_size(b));
    PyObject *fqn = saved != NULL ? load_fqn(b) : NULL;
    int differs = fqn != NULL ? PyObject_RichCompareBool(saved, current, Py_NE) : -1;

    if (differs > 0) {
        PyErr_Format(PyExc_ValueError, "Size mismatch between saved %S and current: %S for %U",
                     saved, current, fqn);
    }
    Py_XDECREF(fqn);
    Py_XDECREF(saved);
    return differs == 0 ? 0 : -1;
}

/* True: the sizes are equal; false: not known here. */
static bool
size_is_equal(const struct load_builder *b, const struct dcp_tensor_view *view)
{
    if (view->sizes == NULL || view->ndim != b->entry->ndim) {
        return false;
    }
    for (uint32_t d = 0; d < view->ndim; d++) {
        if ((uint64_t)view->sizes[d] != saved_size(b)[d]) {
            return false;
        }
    }
    return true;
}

/* Whether the value is a tensor that describes its own shards, where torch knows such (2.14): 1
 * with its global shape as a new torch.Size; 0; -1.  The attribute is asked for before the
 * protocol, whose own check costs more than all else of a leaf. */
static int
described_size(const struct load_builder *b, PyObject *value, PyObject **ret_size)
{
    const struct native_state *state = b->state;
    PyObject *shape;
    int rc =
        state->checkpointable_type == NULL ? 0 : PyObject_IsInstance(value, state->tensor_type);

    if (rc > 0) {
        rc = native_optional_attr(value, state->name_global_shape, &shape);
    }
    if (rc <= 0) {
        return rc;
    }
    rc = PyObject_IsInstance(value, state->checkpointable_type);
    if (rc > 0) {
        *ret_size = PyObject_CallOneArg(state->size_type, shape);
        rc = *ret_size != NULL ? 1 : -1;
    }
    Py_DECREF(shape);
    return rc;
}

static int
check_size(const struct load_builder *b, PyObject *value, const struct dcp_tensor_view *view)
{
    PyObject *size, *current;
    int rc = described_size(b, value, &current);

    if (rc > 0) {
        rc = compare_size(b, current);
        Py_DECREF(current);
        return rc;
    }
    if (rc < 0 || (view != NULL && size_is_equal(b, view))) {
        return rc;
    }
    rc = native_optional_attr(value, b->state->name_size, &size);
    if (rc <= 0 || size == Py_None) {
        if (rc > 0) {
            Py_DECREF(size);
        }
        return rc < 0 ? -1 : 0;
    }
    current = PyObject_CallNoArgs(size);
    Py_DECREF(size);
    rc = current == NULL ? -1 : compare_size(b, current);
    Py_XDECREF(current);
    return rc;
}

/* ---- boxes that torch describes ---- */

/* torch turns every ValueError of _create_chunk_list into this one. */
static int
raise_invalid_metadata(const struct load_builder *b)
{
    PyObject *type, *value, *traceback, *fqn;

    if (!PyErr_ExceptionMatches(PyExc_ValueError)) {
        return -1;
    }
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL) {
        PyException_SetTraceback(value, traceback);
    }
    fqn = load_fqn(b);
    if (fqn != NULL) {
        PyErr_Format(PyExc_ValueError,
                     "Invalid checkpoint metadata for %U, expected BytesStorageMetadata but found "
                     "%R",
                     fqn, b->state->tensor_metadata_type);
        Py_DECREF(fqn);
    }
    if (fqn != NULL && value != NULL) {
        PyObject *own_type, *own, *own_traceback;

        PyErr_Fetch(&own_type, &own, &own_traceback);
        PyErr_NormalizeException(&own_type, &own, &own_traceback);
        PyException_SetCause(own, Py_NewRef(value));
        PyException_SetContext(own, Py_NewRef(value));
        PyErr_Restore(own_type, own, own_traceback);
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return -1;
}

/* The tensor that torch's planner would look up for a chunk; returns new. */
static PyObject *
look_up(const struct load_builder *b, PyObject *fqn, PyObject *lookup, const uint64_t *offsets,
        Py_ssize_t hint)
{
    PyObject *offset = native_size_new(b->state, b->entry->ndim, offsets);
    PyObject *index = NULL, *tensor = NULL;

    if (offset != NULL) {
        index = PyObject_CallFunction(b->state->metadata_index_type, "OOn", fqn, offset, hint);
    }
    if (index != NULL) {
        tensor =
            PyObject_CallFunctionObjArgs(b->state->find_state_dict_object, lookup, index, NULL);
    }
    Py_XDECREF(index);
    Py_XDECREF(offset);
    return tensor;
}

static int
get_numbers(const struct load_builder *b, PyObject *chunk, PyObject *name, uint64_t *ret)
{
    PyObject *sequence = PyObject_GetAttr(chunk, name);
    uint32_t ndim = 0;
    int rc = sequence == NULL ? -1 : native_numbers_from(sequence, ret, &ndim);

    Py_XDECREF(sequence);
    if (rc == 0 && ndim != b->entry->ndim) {
        PyObject *fqn = load_fqn(b);

        if (fqn != NULL) {
            PyErr_Format(PyExc_ValueError,
                         "%U wants a chunk of %u dimensions of a saved tensor that has %u", fqn,
                         (unsigned)ndim, (unsigned)b->entry->ndim);
            Py_DECREF(fqn);
        }
        return -1;
    }
    return rc;
}

static int
add_chunk(struct load_builder *b, PyObject *fqn, PyObject *lookup, PyObject *chunk, Py_ssize_t hint)
{
    uint64_t offsets[DCP_MAX_DIMS], sizes[DCP_MAX_DIMS];
    PyObject *tensor;
    int rc;

    if (get_numbers(b, chunk, b->state->name_offsets, offsets) != 0 ||
        get_numbers(b, chunk, b->state->name_sizes, sizes) != 0) {
        return -1;
    }
    for (uint32_t d = 0; d < b->entry->ndim; d++) {
        if (sizes[d] == 0) {
            return 0;
        }
    }
    tensor = look_up(b, fqn, lookup, offsets, hint);
    rc = tensor == NULL ? -1 : load_add_box(b, offsets, sizes, tensor);
    Py_XDECREF(tensor);
    return rc;
}

static int
add_through_torch(struct load_builder *b, PyObject *value)
{
    PyObject *made = PyObject_CallOneArg(b->state->create_chunk_list, value);
    PyObject *chunks = NULL, *fqn = NULL, *lookup = NULL;
    int rc = -1;

    if (made == NULL) {
        return raise_invalid_metadata(b);
    }
    chunks = PySequence_Fast(made, "__create_chunk_list__ must give a list");
    fqn = chunks != NULL ? load_fqn(b) : NULL;
    lookup = fqn != NULL ? PyDict_New() : NULL;
    if (lookup != NULL && PyDict_SetItem(lookup, fqn, value) == 0) {
        rc = 0;
        for (Py_ssize_t i = 0; rc == 0 && i < PySequence_Fast_GET_SIZE(chunks); i++) {
            rc = add_chunk(b, fqn, lookup, PySequence_Fast_GET_ITEM(chunks, i), i);
        }
    }
    Py_XDECREF(lookup);
    Py_XDECREF(fqn);
    Py_XDECREF(chunks);
    Py_DECREF(made);
    return rc;
}

/* ---- native values ---- */

/* Whether a tensor chooses its own chunks: 1, 0 or -1. */
static int
has_load_hooks(const struct load_builder *b, PyObject *tensor, PyObject *stock_chunk,
               PyObject *stock_shard)
{
    int rc = native_has_hook(tensor, b->state->name_chunk_hook, stock_chunk);

    if (rc == 0) {
        rc = native_has_hook(tensor, b->state->name_shard_hook, stock_shard);
    }
    if (rc == 0 && b->state->checkpointable_type != NULL) {
        rc = native_has_hook(tensor, b->state->name_global_shape, NULL);
    }
    return rc;
}

static int
add_plain_tensor(struct load_builder *b, PyObject *tensor, const struct dcp_tensor_view *view)
{
    static const uint64_t zeros[DCP_MAX_DIMS];
    int hook = has_load_hooks(b, tensor, NULL, NULL);

    if (hook != 0 || view->sizes == NULL) {
        return hook < 0 ? -1 : add_through_torch(b, tensor);
    }
    return load_add_box(b, zeros, saved_size(b), tensor);
}

static int
add_dtensor(struct load_builder *b, PyObject *dtensor)
{
    struct dtensor_box *box = &b->dtensor_box;
    enum dtensor_answer answer = dtensor_box_find(b->state, &b->meshes, dtensor, box);
    int rc;

    if (answer == DTENSOR_ERROR || answer == DTENSOR_OUTSIDE_MESH) {
        return answer == DTENSOR_ERROR ? -1 : 0;
    }
    if (b->entry->kind == DCP_ITEM_BYTES) {
        b->targets->replaced_count++;
        load_mark(b, LOAD_REPLACED);
        rc = load_add_object(b);
    } else {
        rc = answer == DTENSOR_ASK_TORCH ? 1
                                         : has_load_hooks(b, dtensor, b->state->dtensor_chunk_hook,
                                                          b->state->dtensor_shard_hook);
        if (rc == 0) {
            rc = has_load_hooks(b, box->local, NULL, NULL);
        }
        rc = rc < 0    ? -1
             : rc == 0 ? load_add_box(b, box->offsets, box->sizes, box->local)
                       : add_through_torch(b, dtensor);
    }
    if (answer == DTENSOR_NATIVE) {
        Py_CLEAR(box->local);
    }
    return rc;
}

static int
add_other(struct load_builder *b, PyObject *value)
{
    int is = PyObject_IsInstance(value, b->state->dtensor_type);

    if (is > 0) {
        is = dtensor_is_outside_mesh(b->state, value);
        if (is > 0) {
            return 0;
        }
    }
    if (is < 0) {
        return -1;
    }
    if (b->entry->kind == DCP_ITEM_BYTES) {
        is = PyObject_IsInstance(value, b->state->tensor_type);
        if (is > 0) {
            b->targets->replaced_count++;
            load_mark(b, LOAD_REPLACED);
        }
        return is < 0 ? -1 : load_add_object(b);
    }
    return add_through_torch(b, value);
}

int
load_add_leaf(struct load_builder *b)
{
    PyObject *value = b->leaf->value, *type = (PyObject *)Py_TYPE(value);
    bool is_plain = type == b->state->tensor_type || type == b->state->parameter_type;
    bool is_dtensor = type == b->state->dtensor_type;
    struct dcp_tensor_view view;

    if (is_plain || is_dtensor) {
        b->state->bridge->tensor_view(value, &view);
    }
    if (b->entry->kind != DCP_ITEM_BYTES &&
        check_size(b, value, is_plain || is_dtensor ? &view : NULL) != 0) {
        return -1;
    }
    if (is_dtensor) {
        return add_dtensor(b, value);
    }
    if (!is_plain) {
        return add_other(b, value);
    }
    if (b->entry->kind == DCP_ITEM_BYTES) {
        b->targets->replaced_count++;
        load_mark(b, LOAD_REPLACED);
        return load_add_object(b);
    }
    return add_plain_tensor(b, value, &view);
}

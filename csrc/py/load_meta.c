/*
 * load_meta.c: whether a target state dict holds tensors without data, which are materialised
 * before targets are planned.
 *
 * That is rare and done in Python, so this look comes first.  All functions need the GIL.
 */
#include "load_targets.h"

#include "dcp_limits.h"
#include "flatten.h"

static bool
is_plain_meta(const struct native_state *state, PyObject *tensor)
{
    struct dcp_tensor_view view;

    return state->bridge->tensor_view(tensor, &view) != DCP_NOT_A_TENSOR &&
           view.flags & DCP_TENSOR_META;
}

/* A ShardedTensor's own device attribute wants CUDA; its shards know. */
static int
has_meta_shard(const struct native_state *state, PyObject *sharded)
{
    PyObject *called = native_call(sharded, state->name_local_shards);
    PyObject *shards =
        called != NULL ? PySequence_Fast(called, "local_shards() must give a list") : NULL;
    int rc = shards == NULL ? -1 : 0;

    for (Py_ssize_t i = 0; rc == 0 && i < PySequence_Fast_GET_SIZE(shards); i++) {
        PyObject *tensor =
            PyObject_GetAttr(PySequence_Fast_GET_ITEM(shards, i), state->name_tensor);

        rc = tensor == NULL ? -1 : is_plain_meta(state, tensor);
        Py_XDECREF(tensor);
    }
    Py_XDECREF(shards);
    Py_XDECREF(called);
    return rc;
}

/* Any other tensor, by what it says of itself (a FakeTensor is not where its memory is not). */
static int
is_meta(const struct native_state *state, PyObject *tensor)
{
    PyObject *device, *type = NULL;
    int rc = PyObject_IsInstance(tensor, state->sharded_tensor_type);

    if (rc != 0) {
        return rc < 0 ? -1 : has_meta_shard(state, tensor);
    }
    rc = native_optional_attr(tensor, state->name_device, &device);
    if (rc <= 0) {
        return rc;
    }
    rc = native_optional_attr(device, state->name_type, &type);
    if (rc > 0) {
        rc = PyUnicode_Check(type) && PyUnicode_CompareWithASCIIString(type, "meta") == 0;
        Py_DECREF(type);
    }
    Py_DECREF(device);
    return rc;
}

static int has_meta(const struct native_state *state, PyObject *value, int depth);

static int
mapping_has_meta(const struct native_state *state, PyObject *mapping, int depth)
{
    PyObject *values = PyMapping_Values(mapping);
    int rc = values == NULL ? -1 : 0;

    for (Py_ssize_t i = 0; rc == 0 && i < PyList_GET_SIZE(values); i++) {
        rc = has_meta(state, PyList_GET_ITEM(values, i), depth);
    }
    Py_XDECREF(values);
    return rc;
}

/* Mappings of any class, lists and tuples are descended. */
static int
has_meta(const struct native_state *state, PyObject *value, int depth)
{
    int rc = 0;

    if (depth > DCP_MAX_DEPTH) {
        return 0;
    }
    if (PyDict_Check(value)) {
        PyObject *key, *item;
        Py_ssize_t pos = 0;

        while (rc == 0 && PyDict_Next(value, &pos, &key, &item)) {
            Py_INCREF(item);
            rc = has_meta(state, item, depth + 1);
            Py_DECREF(item);
        }
        return rc;
    }
    if (PyList_Check(value) || PyTuple_Check(value)) {
        for (Py_ssize_t i = 0; rc == 0 && i < PySequence_Fast_GET_SIZE(value); i++) {
            PyObject *item = Py_NewRef(PySequence_Fast_GET_ITEM(value, i));

            rc = has_meta(state, item, depth + 1);
            Py_DECREF(item);
        }
        return rc;
    }
    if (flatten_is_plain_leaf(value)) {
        return 0;
    }
    if (flatten_is_common_leaf(state, value)) {
        return is_plain_meta(state, value);
    }
    rc = PyObject_IsInstance(value, state->tensor_type);
    if (rc != 0) {
        return rc < 0 ? -1 : is_meta(state, value);
    }
    rc = PyObject_IsInstance(value, state->mapping_type);
    return rc <= 0 ? rc : mapping_has_meta(state, value, depth + 1);
}

int
state_dict_has_meta(struct native_state *state, PyObject *state_dict)
{
    return has_meta(state, state_dict, 0);
}

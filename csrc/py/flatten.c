/*
 * flatten.c: the walk over a state dict: which values are leaves, and what each leaf is called.
 *
 * torch's rules: mappings are always descended, keys become str(key); a list is descended only if
 * it holds, at any depth of lists, a tensor or a mapping; everything else, tuples included, is a
 * leaf.  An empty mapping therefore vanishes, an empty list is a leaf.  A name is the path joined
 * by dots.
 *
 * One pass without a Python object per leaf: name and path live in two buffers that grow on the way
 * down and are cut on the way up.  Exact dicts and lists are walked directly, every other mapping
 * through its items() (an OrderedDict has an order of its own).  A container that changes size
 * meanwhile raises, as in Python.
 * All functions need the GIL.
 */
#include "flatten.h"

#include <string.h>

#include "dcp_limits.h"
#include "dcp_plan.h"
#include "name_set.h"

enum value_kind { VALUE_LEAF, VALUE_TENSOR, VALUE_MAPPING, VALUE_LIST, VALUE_ERROR };

struct walker {
    const struct native_state *state;
    enum flatten_mode mode;
    flatten_leaf_fn on_leaf;
    void *ctx;
    struct dcp_buf fqn;
    struct dcp_buf path;
    uint32_t path_parts;
    struct name_set names;
};

/* ---- what a value is ---- */

bool
flatten_is_plain_leaf(PyObject *value)
{
    return value == Py_None || PyUnicode_CheckExact(value) || PyLong_CheckExact(value) ||
           PyFloat_CheckExact(value) || PyBool_Check(value) || PyBytes_CheckExact(value) ||
           PyTuple_CheckExact(value);
}

static bool
is_common_tensor(const struct native_state *state, PyObject *value)
{
    PyObject *type = (PyObject *)Py_TYPE(value);

    return type == state->tensor_type || type == state->parameter_type ||
           type == state->dtensor_type;
}

bool
flatten_is_common_leaf(const struct native_state *state, PyObject *value)
{
    return is_common_tensor(state, value) || flatten_is_plain_leaf(value);
}

static enum value_kind
kind_of(const struct native_state *state, PyObject *value)
{
    int is;

    if (is_common_tensor(state, value)) {
        return VALUE_TENSOR;
    }
    if (PyDict_Check(value)) {
        return VALUE_MAPPING;
    }
    if (PyList_CheckExact(value)) {
        return VALUE_LIST;
    }
    if (flatten_is_plain_leaf(value)) {
        return VALUE_LEAF;
    }
    is = PyObject_IsInstance(value, state->mapping_type);
    if (is != 0) {
        return is < 0 ? VALUE_ERROR : VALUE_MAPPING;
    }
    if (PyList_Check(value)) {
        return VALUE_LIST;
    }
    is = PyObject_IsInstance(value, state->tensor_type);
    return is < 0 ? VALUE_ERROR : is ? VALUE_TENSOR : VALUE_LEAF;
}

static int
too_deep(void)
{
    PyErr_Format(PyExc_ValueError,
                 "the state dict nests containers more than %d deep (or holds itself): move the "
                 "inner part to a key of its own",
                 DCP_MAX_DEPTH);
    return -1;
}

/* ---- iterating over containers ---- */

typedef int (*item_fn)(struct walker *w, PyObject *key, PyObject *value, int depth);

static int
each_exact_item(struct walker *w, PyObject *dict, item_fn fn, int depth)
{
    Py_ssize_t pos = 0, size = PyDict_GET_SIZE(dict);
    PyObject *key, *value;
    int rc = 0;

    while (rc == 0 && PyDict_Next(dict, &pos, &key, &value)) {
        Py_INCREF(key);
        Py_INCREF(value);
        rc = fn(w, key, value, depth);
        Py_DECREF(key);
        Py_DECREF(value);
        if (rc == 0 && PyDict_GET_SIZE(dict) != size) {
            PyErr_SetString(PyExc_RuntimeError, "dictionary changed size during iteration");
            rc = -1;
        }
    }
    return rc;
}

/* Any mapping, through items(): its own order and its own idea of its content. */
static int
each_item(struct walker *w, PyObject *mapping, item_fn fn, int depth)
{
    PyObject *items, *iter, *pair;
    int rc = 0;

    if (PyDict_CheckExact(mapping)) {
        return each_exact_item(w, mapping, fn, depth);
    }
    items = native_call(mapping, w->state->name_items);
    iter = items != NULL ? PyObject_GetIter(items) : NULL;
    Py_XDECREF(items);
    if (iter == NULL) {
        return -1;
    }
    while (rc == 0 && (pair = PyIter_Next(iter)) != NULL) {
        PyObject *fast = PySequence_Fast(pair, "items() must give pairs");

        Py_DECREF(pair);
        if (fast == NULL || PySequence_Fast_GET_SIZE(fast) != 2) {
            if (fast != NULL) {
                PyErr_SetString(PyExc_ValueError, "items() of a mapping must give pairs");
            }
            rc = -1;
        } else {
            rc = fn(w, PySequence_Fast_GET_ITEM(fast, 0), PySequence_Fast_GET_ITEM(fast, 1), depth);
        }
        Py_XDECREF(fast);
    }
    Py_DECREF(iter);
    return rc != 0 || PyErr_Occurred() ? -1 : 0;
}

typedef int (*element_fn)(struct walker *w, uint64_t index, PyObject *value, int depth);

static int
each_element(struct walker *w, PyObject *list, element_fn fn, int depth)
{
    PyObject *iter, *value;
    uint64_t index = 0;
    int rc = 0;

    if (PyList_CheckExact(list)) {
        for (Py_ssize_t i = 0; rc == 0 && i < PyList_GET_SIZE(list); i++) {
            value = Py_NewRef(PyList_GET_ITEM(list, i));
            rc = fn(w, (uint64_t)i, value, depth);
            Py_DECREF(value);
        }
        return rc;
    }
    iter = PyObject_GetIter(list);
    if (iter == NULL) {
        return -1;
    }
    while (rc == 0 && (value = PyIter_Next(iter)) != NULL) {
        rc = fn(w, index++, value, depth);
        Py_DECREF(value);
    }
    Py_DECREF(iter);
    /* A positive result is an answer (see is_terminal); it ends the iteration without an error. */
    return rc != 0 ? rc : PyErr_Occurred() ? -1 : 0;
}

/* ---- terminal containers ---- */

static int is_terminal(struct walker *w, PyObject *value, enum value_kind kind, int depth);

/* 0: this element does not decide; 1: it makes its container no leaf; -1. */
static int
element_descends(struct walker *w, uint64_t index, PyObject *value, int depth)
{
    enum value_kind kind = kind_of(w->state, value);
    int terminal;

    (void)index;
    if (kind == VALUE_ERROR) {
        return -1;
    }
    if (kind == VALUE_TENSOR) {
        return 1;
    }
    if (kind == VALUE_LEAF) {
        return 0;
    }
    terminal = is_terminal(w, value, kind, depth + 1);
    return terminal < 0 ? -1 : !terminal;
}

/* 1: `value` is a leaf; 0: it is descended into; -1.  `kind` is the value's. */
static int
is_terminal(struct walker *w, PyObject *value, enum value_kind kind, int depth)
{
    PyObject *values = NULL;
    int rc;

    if (kind == VALUE_LEAF || kind == VALUE_TENSOR) {
        return 1;
    }
    if (kind == VALUE_MAPPING && w->mode == FLATTEN_CURRENT) {
        return 0;
    }
    if (depth > DCP_MAX_DEPTH) {
        return too_deep();
    }
    if (kind == VALUE_MAPPING) {
        values = native_call(value, w->state->name_values);
        if (values == NULL) {
            return -1;
        }
        value = values;
    }
    rc = each_element(w, value, element_descends, depth);
    Py_XDECREF(values);
    return rc < 0 ? -1 : !rc;
}

/* ---- the walk ---- */

static int visit(struct walker *w, PyObject *value, int depth);

static int
emit(struct walker *w, PyObject *value)
{
    struct flatten_leaf leaf = {
        .fqn = w->fqn.data != NULL ? (const char *)w->fqn.data : "",
        .fqn_len = w->fqn.len,
        .path = w->mode == FLATTEN_TOP_LEVEL ? NULL : w->path.data,
        .path_len = w->mode == FLATTEN_TOP_LEVEL ? 0 : w->path.len,
        .path_parts = w->mode == FLATTEN_TOP_LEVEL ? 0 : w->path_parts,
        .value = value,
    };
    int added = name_set_add(&w->names, leaf.fqn, leaf.fqn_len);

    if (added < 0) {
        return -1;
    }
    if (added == 0) {
        PyObject *name = PyUnicode_DecodeUTF8(leaf.fqn, (Py_ssize_t)leaf.fqn_len, NULL);

        if (name != NULL) {
            PyErr_Format(PyExc_ValueError, "duplicated flatten key %U", name);
            Py_DECREF(name);
        }
        return -1;
    }
    return w->on_leaf(w->ctx, &leaf);
}

/* Visits `value` under a name that is one part longer. */
static int
visit_part(struct walker *w, const char *text, size_t len, bool is_index, uint64_t index,
           PyObject *value, int depth)
{
    size_t fqn_len = w->fqn.len, path_len = w->path.len;
    int rc = -1;

    if (w->path_parts != 0) {
        dcp_buf_put_u8(&w->fqn, '.');
    }
    dcp_buf_put(&w->fqn, text, len);
    if (is_index) {
        dcp_path_put_int(&w->path, index);
    } else {
        dcp_path_put_str(&w->path, text, len);
    }
    w->path_parts++;
    if (w->fqn.failed || w->path.failed) {
        PyErr_NoMemory();
    } else if (w->fqn.len > DCP_MAX_FQN_BYTES) {
        PyErr_Format(PyExc_ValueError,
                     "a name of the state dict has more than %u bytes: '%.100s...'",
                     (unsigned)DCP_MAX_FQN_BYTES, text);
    } else {
        rc = visit(w, value, depth);
    }
    w->path_parts--;
    w->fqn.len = fqn_len;
    w->path.len = path_len;
    return rc;
}

static int
visit_item(struct walker *w, PyObject *key, PyObject *value, int depth)
{
    PyObject *str = PyUnicode_CheckExact(key) ? Py_NewRef(key) : PyObject_Str(key);
    Py_ssize_t len;
    const char *text = str != NULL ? PyUnicode_AsUTF8AndSize(str, &len) : NULL;
    int rc = -1;

    if (text != NULL) {
        rc = visit_part(w, text, (size_t)len, false, 0, value, depth);
    }
    Py_XDECREF(str);
    return rc;
}

static int
visit_element(struct walker *w, uint64_t index, PyObject *value, int depth)
{
    char text[24];
    int len = PyOS_snprintf(text, sizeof(text), "%llu", (unsigned long long)index);

    return visit_part(w, text, (size_t)len, true, index, value, depth);
}

static int
visit(struct walker *w, PyObject *value, int depth)
{
    enum value_kind kind;
    int terminal;

    if (w->mode == FLATTEN_TOP_LEVEL) {
        return emit(w, value);
    }
    kind = kind_of(w->state, value);
    if (kind == VALUE_ERROR) {
        return -1;
    }
    terminal = is_terminal(w, value, kind, depth);
    if (terminal != 0) {
        return terminal < 0 ? -1 : emit(w, value);
    }
    if (depth >= DCP_MAX_DEPTH) {
        return too_deep();
    }
    return kind == VALUE_MAPPING ? each_item(w, value, visit_item, depth + 1)
                                 : each_element(w, value, visit_element, depth + 1);
}

int
flatten_state_dict(const struct native_state *state, PyObject *state_dict, enum flatten_mode mode,
                   flatten_leaf_fn on_leaf, void *ctx)
{
    struct walker w = {.state = state, .mode = mode, .on_leaf = on_leaf, .ctx = ctx};
    int rc;

    if (PyDict_Check(state_dict)) {
        name_set_expect(&w.names, (size_t)PyDict_GET_SIZE(state_dict));
    }
    rc = each_item(&w, state_dict, visit_item, 1);
    dcp_buf_clean_up(&w.fqn);
    dcp_buf_clean_up(&w.path);
    name_set_clean_up(&w.names);
    return rc;
}

/* ---- sharded tensors ---- */

/* 1 ends the search: torch would rebuild something here. */
static int
item_is_rebuilt(struct walker *w, PyObject *key, PyObject *value, int depth)
{
    (void)depth;
    return !(PyUnicode_CheckExact(key) && flatten_is_common_leaf(w->state, value));
}

int
flatten_rebuild_top_level(const struct native_state *state, PyObject *state_dict, PyObject **ret)
{
    struct walker w = {.state = state};
    int rc = PyDict_CheckExact(state_dict) ? each_item(&w, state_dict, item_is_rebuilt, 1) : 1;

    if (rc < 0) {
        return -1;
    }
    *ret = rc == 0 ? Py_NewRef(state_dict)
                   : PyObject_CallOneArg(state->flatten_sharded_tensors, state_dict);
    return *ret == NULL ? -1 : 0;
}

int
flatten_sharded_leaf(const struct native_state *state, const struct flatten_leaf *leaf,
                     PyObject **ret)
{
    PyObject *name = PyUnicode_DecodeUTF8(leaf->fqn, (Py_ssize_t)leaf->fqn_len, NULL);
    PyObject *dict = name != NULL ? PyDict_New() : NULL;
    PyObject *rebuilt = NULL, *value;
    int rc = -1;

    if (dict != NULL && PyDict_SetItem(dict, name, leaf->value) == 0) {
        rebuilt = PyObject_CallOneArg(state->flatten_sharded_tensors, dict);
    }
    if (rebuilt != NULL) {
        value = PyDict_GetItemWithError(rebuilt, name);
        if (value != NULL || !PyErr_Occurred()) {
            *ret = Py_XNewRef(value);
            rc = 0;
        }
    }
    Py_XDECREF(rebuilt);
    Py_XDECREF(dict);
    Py_XDECREF(name);
    return rc;
}

PyObject *
flatten_path_as_tuple(const uint8_t *path, size_t path_len, uint32_t path_parts)
{
    struct dcp_cursor cursor = {.data = path, .len = path_len};
    PyObject *tuple = PyTuple_New((Py_ssize_t)path_parts);

    for (uint32_t i = 0; tuple != NULL && i < path_parts; i++) {
        struct dcp_span text;
        uint64_t index;
        bool is_int;
        PyObject *part;

        if (!dcp_path_next(&cursor, &is_int, &index, &text)) {
            PyErr_SetString(PyExc_SystemError, "a path of the plan has fewer parts than it says");
            part = NULL;
        } else {
            part = is_int
                       ? PyLong_FromUnsignedLongLong(index)
                       : PyUnicode_DecodeUTF8((const char *)text.data, (Py_ssize_t)text.len, NULL);
        }
        if (part == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, part);
        }
    }
    return tuple;
}

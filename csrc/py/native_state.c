/*
 * native_state.c: fills the module state: one table of what is borrowed from torch, looked up once.
 *
 * Loading is lazy because importing torch.distributed costs seconds and a program may import
 * dcp_native only to inspect a checkpoint.  A failed load leaves nothing behind and may be tried
 * again.
 */
#include "native_state.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>

#include "dcp_limits.h"

struct reference {
    size_t field_offset;
    const char *module;
    const char *path; /* dotted */
};

static const struct reference references[] = {
#define X(field, module, path) {offsetof(struct native_state, field), module, path},
    NATIVE_REFERENCES(X)
#undef X
};

struct name {
    size_t field_offset;
    const char *text;
};

static const struct name names[] = {
#define X(field, text) {offsetof(struct native_state, field), text},
    NATIVE_NAMES(X)
#undef X
};

enum {
    REFERENCES_COUNT = sizeof(references) / sizeof(references[0]),
    NAMES_COUNT = sizeof(names) / sizeof(names[0]),
};

static PyObject **
field_at(struct native_state *state, size_t offset)
{
    return (PyObject **)((char *)state + offset);
}

/* Returns new. */
static PyObject *
import_path(const char *module_name, const char *path)
{
    PyObject *object = PyImport_ImportModule(module_name);

    while (object != NULL && *path != 0) {
        const char *dot = strchr(path, '.');
        size_t len = dot != NULL ? (size_t)(dot - path) : strlen(path);
        PyObject *name = PyUnicode_FromStringAndSize(path, (Py_ssize_t)len);
        PyObject *next = name != NULL ? PyObject_GetAttr(object, name) : NULL;

        Py_XDECREF(name);
        Py_SETREF(object, next);
        path += dot != NULL ? len + 1 : len;
    }
    return object;
}

static int
load_references(struct native_state *state)
{
    for (int i = 0; i < NAMES_COUNT; i++) {
        PyObject **field = field_at(state, names[i].field_offset);

        *field = PyUnicode_InternFromString(names[i].text);
        if (*field == NULL) {
            return -1;
        }
    }
    for (int i = 0; i < REFERENCES_COUNT; i++) {
        PyObject **field = field_at(state, references[i].field_offset);

        *field = import_path(references[i].module, references[i].path);
        if (*field == NULL) {
            if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
                PyErr_Format(PyExc_ImportError,
                             "this torch has no %s.%s, which dcp_native plans with: install a "
                             "dcp_native that is built for it",
                             references[i].module, references[i].path);
            }
            return -1;
        }
    }
    return 0;
}

/* Leaves *ret NULL when the module lacks it. */
static int
import_optional(const char *module_name, const char *path, PyObject **ret)
{
    *ret = import_path(module_name, path);
    if (*ret == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
    }
    return 0;
}

/* What may be missing in an older torch, or one that is built without it. */
static int
load_optional(struct native_state *state)
{
    PyObject *torch = PyImport_ImportModule("torch");
    int rc = 0;

    if (torch == NULL) {
        return -1;
    }
    for (int dtype = 1; dtype < DCP_DTYPE_COUNT && rc >= 0; dtype++) {
        const char *text = dcp_dtype_name(dtype);
        PyObject *name = PyUnicode_FromString(text != NULL ? text : "");

        rc = name == NULL ? -1 : native_optional_attr(torch, name, &state->dtypes[dtype]);
        Py_XDECREF(name);
    }
    Py_DECREF(torch);
    if (rc < 0 ||
        import_optional("torch.distributed.checkpoint", "CheckpointableTensor",
                        &state->checkpointable_type) != 0 ||
        import_optional("torch._C", "_cuda_getCurrentRawStream", &state->current_cuda_stream) !=
            0) {
        return -1;
    }
    return 0;
}

static int
load_error_class(struct native_state *state, PyObject *module)
{
    PyObject *name = PyUnicode_FromString("NativeError");
    int rc = name == NULL ? -1 : native_optional_attr(module, name, &state->error_class);

    Py_XDECREF(name);
    if (rc == 0) {
        state->error_class = Py_NewRef(PyExc_RuntimeError);
    }
    return rc < 0 ? -1 : 0;
}

static Py_ssize_t
slot_offset(PyObject *type, PyObject *name)
{
    PyObject *descr = PyObject_GetAttr(type, name);
    Py_ssize_t offset = 0;

    if (descr == NULL) {
        PyErr_Clear();
    } else if (Py_IS_TYPE(descr, &PyMemberDescr_Type) &&
               PyDescr_TYPE(descr) == (PyTypeObject *)type &&
               ((PyMemberDescrObject *)descr)->d_member->type == T_OBJECT_EX) {
        offset = ((PyMemberDescrObject *)descr)->d_member->offset;
    }
    Py_XDECREF(descr);
    return offset;
}

static int
load_bridge(struct native_state *state)
{
    const struct dcp_bridge_table *table;

    state->bridge_module = PyImport_ImportModule("dcp_native._bridge");
    if (state->bridge_module == NULL) {
        return -1;
    }
    table = PyCapsule_Import(DCP_BRIDGE_CAPSULE, 0);
    if (table == NULL) {
        return -1;
    }
    if (table->version != DCP_BRIDGE_VERSION || table->table_bytes != sizeof(*table)) {
        PyErr_Format(PyExc_ImportError,
                     "dcp_native._bridge offers table version %u of %u bytes, dcp_native._native "
                     "wants version %d of %zu: rebuild both",
                     (unsigned)table->version, (unsigned)table->table_bytes, DCP_BRIDGE_VERSION,
                     sizeof(*table));
        return -1;
    }
    state->bridge = table;
    return 0;
}

int
native_state_load(PyObject *module)
{
    struct native_state *state = PyModule_GetState(module);

    if (state == NULL) {
        return -1;
    }
    if (state->loaded) {
        return 0;
    }
    if (load_references(state) != 0 || load_optional(state) != 0 ||
        load_error_class(state, module) != 0 || load_bridge(state) != 0) {
        native_state_clear(state);
        return -1;
    }
    state->local_tensor_offset = slot_offset(state->dtensor_type, state->name_local_tensor);
    state->spec_offset = slot_offset(state->dtensor_type, state->name_spec);
    state->loaded = true;
    return 0;
}

int
native_state_traverse(struct native_state *state, visitproc visit, void *arg)
{
    for (int i = 0; i < REFERENCES_COUNT; i++) {
        Py_VISIT(*field_at(state, references[i].field_offset));
    }
    for (int dtype = 0; dtype < DCP_DTYPE_COUNT; dtype++) {
        Py_VISIT(state->dtypes[dtype]);
    }
    Py_VISIT(state->bridge_module);
    Py_VISIT(state->error_class);
    Py_VISIT(state->checkpointable_type);
    Py_VISIT(state->current_cuda_stream);
    return 0;
}

void
native_state_clear(struct native_state *state)
{
    for (int i = 0; i < REFERENCES_COUNT; i++) {
        Py_CLEAR(*field_at(state, references[i].field_offset));
    }
    for (int i = 0; i < NAMES_COUNT; i++) {
        Py_CLEAR(*field_at(state, names[i].field_offset));
    }
    for (int dtype = 0; dtype < DCP_DTYPE_COUNT; dtype++) {
        Py_CLEAR(state->dtypes[dtype]);
    }
    state->bridge = NULL;
    Py_CLEAR(state->bridge_module);
    Py_CLEAR(state->error_class);
    Py_CLEAR(state->checkpointable_type);
    Py_CLEAR(state->current_cuda_stream);
    state->loaded = false;
}

int
native_dtype_of(const struct native_state *state, const PyObject *dtype)
{
    for (int i = 1; i < DCP_DTYPE_COUNT; i++) {
        if (state->dtypes[i] == dtype && dtype != NULL) {
            return i;
        }
    }
    return DCP_DTYPE_NONE;
}

int
native_optional_attr(PyObject *object, PyObject *name, PyObject **ret)
{
#if PY_VERSION_HEX >= 0x030D0000
    return PyObject_GetOptionalAttr(object, name, ret);
#else
    return _PyObject_LookupAttr(object, name, ret);
#endif
}

PyObject *
native_call(PyObject *object, PyObject *name)
{
    return PyObject_CallMethodNoArgs(object, name);
}

int
native_dict_put(PyObject *dict, const char *name, PyObject *value)
{
    int rc = value == NULL ? -1 : PyDict_SetItemString(dict, name, value);

    Py_XDECREF(value);
    return rc;
}

int
native_dict_put_numbers(PyObject *dict, const void *base, const struct native_number *numbers,
                        size_t count)
{
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < count; i++) {
        const uint64_t *value = (const void *)((const char *)base + numbers[i].offset);

        rc = native_dict_put(dict, numbers[i].name, PyLong_FromUnsignedLongLong(*value));
    }
    return rc;
}

PyObject *
native_size_new(const struct native_state *state, uint32_t ndim, const uint64_t *numbers)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)ndim);
    PyObject *size;

    if (tuple == NULL) {
        return NULL;
    }
    for (uint32_t d = 0; d < ndim; d++) {
        PyObject *number = PyLong_FromUnsignedLongLong(numbers[d]);

        if (number == NULL) {
            Py_DECREF(tuple);
            return NULL;
        }
        PyTuple_SET_ITEM(tuple, (Py_ssize_t)d, number);
    }
    size = PyObject_CallOneArg(state->size_type, tuple);
    Py_DECREF(tuple);
    return size;
}

int
native_numbers_from(PyObject *sequence, uint64_t *ret_numbers, uint32_t *ret_ndim)
{
    PyObject *fast = PySequence_Fast(sequence, "sizes and offsets must be sequences of ints");
    Py_ssize_t count;

    if (fast == NULL) {
        return -1;
    }
    count = PySequence_Fast_GET_SIZE(fast);
    if (count > DCP_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "a tensor of %zd dimensions: at most %d are supported",
                     count, DCP_MAX_DIMS);
        Py_DECREF(fast);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *index = PyNumber_Index(PySequence_Fast_GET_ITEM(fast, i));
        long long number = index != NULL ? PyLong_AsLongLong(index) : -1;

        Py_XDECREF(index);
        if (number < 0) {
            if (!PyErr_Occurred()) {
                PyErr_Format(PyExc_ValueError, "%R holds a negative number", sequence);
            }
            Py_DECREF(fast);
            return -1;
        }
        ret_numbers[i] = (uint64_t)number;
    }
    *ret_ndim = (uint32_t)count;
    Py_DECREF(fast);
    return 0;
}

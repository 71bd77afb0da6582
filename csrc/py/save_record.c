/*
 * save_record.c: turns Python objects into finished records.
 *
 * torch.save costs 100 us and 1.2 KB an object.  For values made of exact builtin scalars, strings
 * and containers its data.pkl is the plain protocol 2 pickle, so that is made and wrapped here;
 * whatever has a class (and so may hold a tensor, or reduce to one) goes through torch.save.
 * Values that nest deeply, are large or refer to themselves go there too: the look at them is
 * bounded, pickling is not.
 *
 * All functions need the GIL.
 */
#include "save_record.h"

#include "dcp_limits.h"
#include "dcp_record.h"
#include "errors.h"

/* How far a value is looked at before torch.save gets it. */
enum { PLAIN_MAX_DEPTH = 32, PLAIN_MAX_VALUES = 1 << 16 };

static bool
is_plain_value(PyObject *value, int depth, int *budget)
{
    if (--*budget < 0) {
        return false;
    }
    if (value == Py_None || PyLong_CheckExact(value) || PyFloat_CheckExact(value) ||
        PyUnicode_CheckExact(value) || PyBool_Check(value) || PyBytes_CheckExact(value)) {
        return true;
    }
    if (depth >= PLAIN_MAX_DEPTH) {
        return false;
    }
    if (PyDict_CheckExact(value)) {
        PyObject *key, *item;
        Py_ssize_t pos = 0;

        while (PyDict_Next(value, &pos, &key, &item)) {
            if (!is_plain_value(key, depth + 1, budget) ||
                !is_plain_value(item, depth + 1, budget)) {
                return false;
            }
        }
        return true;
    }
    if (PyList_CheckExact(value) || PyTuple_CheckExact(value)) {
        Py_ssize_t count = PySequence_Fast_GET_SIZE(value);

        for (Py_ssize_t i = 0; i < count; i++) {
            if (!is_plain_value(PySequence_Fast_GET_ITEM(value, i), depth + 1, budget)) {
                return false;
            }
        }
        return true;
    }
    return false;
}

/* Moves the bytes out of `buf`; -1 with an exception when it or the core failed. */
static int
take_block(const struct native_state *state, int rc, const struct dcp_error *err,
           struct dcp_buf *buf, uint8_t **ret_block, uint64_t *ret_bytes)
{
    if (rc != 0) {
        native_set_error(state->error_class, err);
    } else if (buf->failed) {
        PyErr_NoMemory();
    } else {
        *ret_block = buf->data;
        *ret_bytes = buf->len;
        *buf = (struct dcp_buf){0};
        return 0;
    }
    dcp_buf_clean_up(buf);
    return -1;
}

static int
pad_record(const struct native_state *state, const uint8_t *zip, size_t len, uint8_t **ret_block,
           uint64_t *ret_slot_bytes)
{
    uint64_t slot_bytes = dcp_record_slot_bytes(len);
    struct dcp_buf buf = {0};
    struct dcp_error err;
    int rc;

    dcp_error_clear(&err);
    if (dcp_buf_reserve(&buf, slot_bytes) != 0) {
        PyErr_NoMemory();
        return -1;
    }
    rc = dcp_record_put_padded(&buf, zip, len, slot_bytes, &err);
    return take_block(state, rc, &err, &buf, ret_block, ret_slot_bytes);
}

static int
record_plain_value(const struct native_state *state, PyObject *object, uint8_t **ret_block,
                   uint64_t *ret_slot_bytes)
{
    PyObject *pickle = PyObject_CallFunction(state->pickle_dumps, "Oi", object, 2);
    struct dcp_buf zip = {0};
    struct dcp_error err;
    char *bytes;
    Py_ssize_t len;
    int rc = -1;

    dcp_error_clear(&err);
    if (pickle != NULL && PyBytes_AsStringAndSize(pickle, &bytes, &len) == 0) {
        if (dcp_record_put_object(&zip, (const uint8_t *)bytes, (size_t)len, &err) != 0) {
            native_set_error(state->error_class, &err);
        } else if (zip.failed) {
            PyErr_NoMemory();
        } else {
            Py_CLEAR(pickle); /* one copy less of a large object, before the next is made */
            rc = pad_record(state, zip.data, zip.len, ret_block, ret_slot_bytes);
        }
    }
    dcp_buf_clean_up(&zip);
    Py_XDECREF(pickle);
    return rc;
}

/* torch.save into a BytesIO; fills `view` with its bytes. */
static int
save_with_torch(const struct native_state *state, PyObject *object, Py_buffer *view)
{
    PyObject *file = PyObject_CallNoArgs(state->bytes_io_type);
    PyObject *result = NULL, *buffer = NULL;
    int rc = -1;

    if (file != NULL) {
        result = PyObject_CallFunctionObjArgs(state->torch_save, object, file, NULL);
    }
    if (result != NULL) {
        buffer = native_call(file, state->name_getbuffer);
    }
    if (buffer != NULL) {
        rc = PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE);
    }
    Py_XDECREF(buffer);
    Py_XDECREF(result);
    Py_XDECREF(file);
    return rc;
}

int
save_record_object(const struct native_state *state, PyObject *object, uint8_t **ret_block,
                   uint64_t *ret_slot_bytes)
{
    int budget = PLAIN_MAX_VALUES;
    Py_buffer view;
    int rc;

    if (is_plain_value(object, 0, &budget)) {
        return record_plain_value(state, object, ret_block, ret_slot_bytes);
    }
    if (save_with_torch(state, object, &view) != 0) {
        return -1;
    }
    rc = pad_record(state, view.buf, (size_t)view.len, ret_block, ret_slot_bytes);
    PyBuffer_Release(&view);
    return rc;
}

int
save_record_tensor(const struct native_state *state, PyObject *tensor, uint8_t **ret_block,
                   uint64_t *ret_bytes)
{
    struct dcp_buf buf = {0};
    struct dcp_error err;
    Py_buffer view;

    if (save_with_torch(state, tensor, &view) != 0) {
        return -1;
    }
    dcp_error_clear(&err);
    dcp_buf_put(&buf, view.buf, (size_t)view.len);
    PyBuffer_Release(&view);
    return take_block(state, 0, &err, &buf, ret_block, ret_bytes);
}

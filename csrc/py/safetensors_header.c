/*
 * safetensors_header.c: headers of safetensors files as Python objects.
 *
 * Reading and parsing run without the GIL, so that threads read the headers of many files at once.
 */
#include "safetensors_header.h"

#include "dcp_safetensors.h"
#include "errors.h"
#include "module.h"

static PyObject *
sizes_of(const struct dcp_safetensor *tensor)
{
    PyObject *tuple = PyTuple_New(tensor->ndim);

    for (uint32_t d = 0; tuple != NULL && d < tensor->ndim; d++) {
        PyObject *number = PyLong_FromUnsignedLongLong(tensor->sizes[d]);

        if (number == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, d, number);
        }
    }
    return tuple;
}

static PyObject *
tensors_of(const struct dcp_safetensors_header *header)
{
    PyObject *list = PyList_New((Py_ssize_t)header->tensors_count);

    for (uint64_t i = 0; list != NULL && i < header->tensors_count; i++) {
        const struct dcp_safetensor *tensor = &header->tensors[i];
        PyObject *item = Py_BuildValue(
            "(s#sNKK)", tensor->name, (Py_ssize_t)tensor->name_len, tensor->type, sizes_of(tensor),
            (unsigned long long)tensor->offset_bytes, (unsigned long long)tensor->length_bytes);

        if (item == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
        }
    }
    return list;
}

/* Of keys that come twice the last one holds, as in the safetensors package. */
static PyObject *
texts_of(const struct dcp_safetensors_header *header)
{
    PyObject *dict;

    if (!header->has_texts) {
        Py_RETURN_NONE;
    }
    dict = PyDict_New();
    for (uint64_t i = 0; dict != NULL && i < header->texts_count; i++) {
        const struct dcp_safetensors_text *text = &header->texts[i];
        PyObject *key = PyUnicode_DecodeUTF8(text->key, (Py_ssize_t)text->key_len, NULL);
        PyObject *value = PyUnicode_DecodeUTF8(text->value, (Py_ssize_t)text->value_len, NULL);

        if (key == NULL || value == NULL || PyDict_SetItem(dict, key, value) != 0) {
            Py_CLEAR(dict);
        }
        Py_XDECREF(value);
        Py_XDECREF(key);
    }
    return dict;
}

static PyObject *
header_of(const struct dcp_safetensors_header *header)
{
    return Py_BuildValue("(NNKK)", tensors_of(header), texts_of(header),
                         (unsigned long long)header->header_bytes,
                         (unsigned long long)header->file_bytes);
}

static int
parse_bytes(PyObject *source, unsigned long long file_bytes, struct dcp_safetensors_header *ret,
            struct dcp_error *err)
{
    Py_buffer view;
    int rc;

    if (PyObject_GetBuffer(source, &view, PyBUF_SIMPLE) != 0) {
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS rc = dcp_safetensors_parse(
        view.buf, (size_t)view.len, file_bytes != 0 ? file_bytes : (uint64_t)view.len, "the image",
        ret, err);
    Py_END_ALLOW_THREADS PyBuffer_Release(&view);
    return rc;
}

/* The file's directory is opened on its own, as everywhere in the core. */
static int
read_file(PyObject *source, struct dcp_safetensors_header *ret, struct dcp_error *err)
{
    PyObject *path, *dir;
    const char *name;
    char *slash;
    int rc = -1;

    if (!PyUnicode_FSConverter(source, &path)) {
        return -1;
    }
    dir = PyBytes_FromString(PyBytes_AS_STRING(path));
    if (dir != NULL) {
        slash = strrchr(PyBytes_AS_STRING(dir), '/');
        name = PyBytes_AS_STRING(path);
        name += slash == NULL ? 0 : slash - PyBytes_AS_STRING(dir) + 1;
        if (slash != NULL) {
            slash[slash == PyBytes_AS_STRING(dir) ? 1 : 0] = '\0';
        }
        Py_BEGIN_ALLOW_THREADS rc = dcp_safetensors_read(
            dcp_io_posix(), slash == NULL ? "." : PyBytes_AS_STRING(dir), name, ret, err);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(dir);
    Py_DECREF(path);
    return rc;
}

PyDoc_STRVAR(
    read_header_doc,
    "read_safetensors_header(source, file_bytes=0, /)\n--\n\n"
    "Header of a safetensors file, checked: (tensors, texts, header bytes, file bytes).\n\n"
    "`tensors`: (name, dtype as in the file, shape, offset, length) by name; offset and "
    "length in bytes, from the file's start.  `texts`: `__metadata__` or None.  "
    "`source`: a path, or the file's bytes from its start on, of a file of `file_bytes` "
    "(0: these are all).  NativeError (dcp_code CORRUPT) names what is wrong; OSError.");

static PyObject *
module_read_header(PyObject *module, PyObject *args)
{
    struct module_state *state = PyModule_GetState(module);
    struct dcp_safetensors_header header = {0};
    unsigned long long file_bytes = 0;
    PyObject *source, *result;
    struct dcp_error err;
    int rc;

    if (!PyArg_ParseTuple(args, "O|K:read_safetensors_header", &source, &file_bytes)) {
        return NULL;
    }
    dcp_error_clear(&err);
    rc = PyObject_CheckBuffer(source) ? parse_bytes(source, file_bytes, &header, &err)
                                      : read_file(source, &header, &err);
    if (rc != 0) {
        return PyErr_Occurred() != NULL ? NULL : native_set_error(state->error_class, &err);
    }
    result = header_of(&header);
    dcp_safetensors_header_clean_up(&header);
    return result;
}

PyMethodDef safetensors_methods[] = {
    {"read_safetensors_header", module_read_header, METH_VARARGS, read_header_doc},
    {NULL, NULL, 0, NULL},
};

/*
 * errors.c: core errors as Python exceptions.
 *
 * The class is what a user of torch would get for the same mistake (ValueError for a plan that does
 * not add up, OSError with errno and file name for a system call); what only we know has the class
 * dcp_native.NativeError, a RuntimeError. Every exception carries `dcp_code`, the name of the
 * core's code.
 */
#include "errors.h"

#include <string.h>

static PyObject *
class_of(PyObject *error_class, int code)
{
    switch (code) {
    case DCP_E_NOMEM:
        return PyExc_MemoryError;
    case DCP_E_INVALID:
    case DCP_E_PLAN:
    case DCP_E_MISMATCH:
        return PyExc_ValueError;
    case DCP_E_ASSERTION:
        return PyExc_AssertionError;
    case DCP_E_MISSING:
        return PyExc_RuntimeError;
    case DCP_E_TIMEOUT:
        return PyExc_TimeoutError;
    default:
        return error_class;
    }
}

PyObject *
native_exception(PyObject *error_class, const struct dcp_error *err)
{
    const char *text = err->message[0] != 0 ? err->message : dcp_code_text(err->code);
    PyObject *exception, *code;

    if (err->sys_errno != 0 &&
        (err->code == DCP_E_IO || err->code == DCP_E_NOENT || err->code == DCP_E_EXISTS)) {
        const char *system = strerror(err->sys_errno);
        PyObject *message = strstr(text, system) != NULL
                                ? PyUnicode_FromString(text)
                                : PyUnicode_FromFormat("%s (%s)", text, system);
        if (message == NULL) {
            return NULL;
        }
        exception = err->path[0] != 0
                        ? PyObject_CallFunction(PyExc_OSError, "iNs", (int)err->sys_errno, message,
                                                err->path)
                        : PyObject_CallFunction(PyExc_OSError, "iN", (int)err->sys_errno, message);
    } else {
        exception = PyObject_CallFunction(class_of(error_class, err->code), "s", text);
    }
    if (exception == NULL) {
        return NULL;
    }
    code = PyUnicode_FromString(dcp_code_name(err->code));
    if (code == NULL || PyObject_SetAttrString(exception, "dcp_code", code) != 0) {
        Py_XDECREF(code);
        Py_DECREF(exception);
        return NULL;
    }
    Py_DECREF(code);
    return exception;
}

PyObject *
native_set_error(PyObject *error_class, const struct dcp_error *err)
{
    PyObject *exception = native_exception(error_class, err);

    if (exception != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_DECREF(exception);
    }
    return NULL;
}

static PyObject *
failure_payload(PyObject *error_class, const struct dcp_failure *failure)
{
    struct dcp_error err;

    if (failure->kind == DCP_FAILURE_PYTHON) {
        return PyBytes_FromStringAndSize((const char *)failure->bytes, (Py_ssize_t)failure->len);
    }
    dcp_error_clear(&err);
    if (failure->kind != DCP_FAILURE_CORE || failure->len != sizeof err) {
        dcp_error_set(&err, DCP_E_INTERNAL, 0, NULL, "rank %u sent a failure that cannot be read",
                      failure->rank);
    } else {
        memcpy(&err, failure->bytes, sizeof err);
        err.path[sizeof err.path - 1] = 0;
        err.message[sizeof err.message - 1] = 0;
    }
    return native_exception(error_class, &err);
}

PyObject *
native_failures(PyObject *error_class, const struct dcp_failure_list *list)
{
    PyObject *result = PyList_New(0);

    for (size_t i = 0; result != NULL && i < list->count; i++) {
        PyObject *payload = failure_payload(error_class, &list->items[i]);
        PyObject *pair =
            payload == NULL ? NULL : Py_BuildValue("(IN)", list->items[i].rank, payload);

        if (pair == NULL || PyList_Append(result, pair) != 0) {
            Py_CLEAR(result);
        }
        Py_XDECREF(pair);
    }
    return result;
}

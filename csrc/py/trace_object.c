/*
 * trace_object.c: recorded events as bytes for Python, which owns the files (_trace.py).
 *
 * Lines of JSON are made in C: of Python objects a busy save would need tens of thousands.
 * Taking is for one thread at a time: the GIL is kept, for the millisecond that it takes at most.
 */
#include "trace_object.h"

#include "dcp_trace.h"

const char trace_switch_doc[] = "trace_switch(on, /)\n--\n\n"
                                "Record what saves and loads do from now on, or no more.";

PyObject *
trace_switch(PyObject *module, PyObject *on)
{
    int truth = PyObject_IsTrue(on);

    (void)module;
    if (truth < 0) {
        return NULL;
    }
    dcp_trace_switch(truth != 0);
    Py_RETURN_NONE;
}

const char trace_take_doc[] =
    "trace_take(base_ns, pid, /)\n--\n\n"
    "The oldest thousand events that were recorded and not taken, or fewer: bytes of `,\\n{...}` "
    "per event, its times in microseconds since time.monotonic_ns() was `base_ns`.";

PyObject *
trace_take(PyObject *module, PyObject *args)
{
    unsigned long long base_ns;
    unsigned int pid;
    struct dcp_buf buf = {0};
    struct dcp_error err;
    uint64_t count = 0;
    PyObject *bytes;

    (void)module;
    if (!PyArg_ParseTuple(args, "KI:trace_take", &base_ns, &pid)) {
        return NULL;
    }
    dcp_error_clear(&err);
    bytes = dcp_trace_take(&buf, base_ns, pid, &count, &err) != 0
                ? PyErr_NoMemory()
                : PyBytes_FromStringAndSize((const char *)buf.data, (Py_ssize_t)buf.len);
    dcp_buf_clean_up(&buf);
    return bytes;
}

const char trace_dropped_doc[] = "trace_dropped()\n--\n\n"
                                 "Events for which there was no room, since the process began.";

PyObject *
trace_dropped(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromUnsignedLongLong(dcp_trace_dropped());
}

const char trace_forget_doc[] = "trace_forget()\n--\n\n"
                                "In a forked child: the parent's events are not the child's.";

PyObject *
trace_forget(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    dcp_trace_forget();
    Py_RETURN_NONE;
}

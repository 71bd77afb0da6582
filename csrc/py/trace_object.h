/*
 * trace_object.h: functions of `_native` for what is recorded (dcp_trace.h).
 */
#ifndef DCP_PY_TRACE_OBJECT_H
#define DCP_PY_TRACE_OBJECT_H

#include "native_state.h"

PyObject *trace_switch(PyObject *module, PyObject *on);
PyObject *trace_take(PyObject *module, PyObject *args);
PyObject *trace_dropped(PyObject *module, PyObject *unused);
PyObject *trace_forget(PyObject *module, PyObject *unused);

extern const char trace_switch_doc[], trace_take_doc[], trace_dropped_doc[], trace_forget_doc[];

/* Entries of the module's table of methods. */
#define TRACE_FUNCTIONS                                                                            \
    {"trace_switch", trace_switch, METH_O, trace_switch_doc},                                      \
        {"trace_take", trace_take, METH_VARARGS, trace_take_doc},                                  \
        {"trace_dropped", trace_dropped, METH_NOARGS, trace_dropped_doc},                          \
    {                                                                                              \
        "trace_forget", trace_forget, METH_NOARGS, trace_forget_doc                                \
    }

#endif

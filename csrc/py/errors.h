/*
 * errors.h: the one translator from core errors to Python exceptions.
 */
#ifndef DCP_PY_ERRORS_H
#define DCP_PY_ERRORS_H

#include <Python.h>

#include "dcp_comm.h"

/* Returns new: the exception that stands for `err`; NULL with an exception set when even that
 * fails. */
PyObject *native_exception(PyObject *error_class, const struct dcp_error *err);
/* Sets it as the current exception and returns NULL, so that `return native_set_error(...)` reads
 * well. */
PyObject *native_set_error(PyObject *error_class, const struct dcp_error *err);

/* A list of (rank, payload): payload is bytes (a pickled exception) or an exception.  Returns new.
 */
PyObject *native_failures(PyObject *error_class, const struct dcp_failure_list *list);

#endif

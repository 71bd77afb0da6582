/*
 * save_params.h: what _native.Save is made with.
 */
#ifndef DCP_PY_SAVE_PARAMS_H
#define DCP_PY_SAVE_PARAMS_H

#include <Python.h>

#include "dcp_transfer.h"

/* -1 with an exception.  *ret_group is borrowed; texts in `params` live as long as the arguments.
 */
int save_params_parse(PyObject *args, PyObject *kwargs, PyObject **ret_group,
                      struct dcp_save_params *params);

#endif

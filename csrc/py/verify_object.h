/*
 * verify_object.h: `verify_checkpoint`, a function of the module.
 */
#ifndef DCP_PY_VERIFY_OBJECT_H
#define DCP_PY_VERIFY_OBJECT_H

#include <Python.h>

extern PyMethodDef verify_methods[];

#endif

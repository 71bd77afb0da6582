/*
 * stage_copy.h: `copy_storages`, a function of the module.
 */
#ifndef DCP_PY_STAGE_COPY_H
#define DCP_PY_STAGE_COPY_H

#include <Python.h>

extern PyMethodDef stage_copy_methods[];

#endif

/*
 * archive_object.h: `write_archive`, a function of the module.
 */
#ifndef DCP_PY_ARCHIVE_OBJECT_H
#define DCP_PY_ARCHIVE_OBJECT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef archive_methods[];

#endif

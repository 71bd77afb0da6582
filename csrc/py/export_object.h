/*
 * export_object.h: functions of the module that write files of a known layout, several ranks at
 * once.
 */
#ifndef DCP_PY_EXPORT_OBJECT_H
#define DCP_PY_EXPORT_OBJECT_H

#include <Python.h>

extern PyMethodDef export_methods[];

#endif

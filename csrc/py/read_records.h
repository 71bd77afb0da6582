/*
 * read_records.h: functions of `_native` that read records by where they lie.
 */
#ifndef DCP_PY_READ_RECORDS_H
#define DCP_PY_READ_RECORDS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef read_records_methods[];

#endif

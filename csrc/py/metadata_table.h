/*
 * metadata_table.h: `metadata_table`, a function of the module.
 */
#ifndef DCP_PY_METADATA_TABLE_H
#define DCP_PY_METADATA_TABLE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef metadata_table_methods[];

#endif

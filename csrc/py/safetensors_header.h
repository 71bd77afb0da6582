/*
 * safetensors_header.h: headers of safetensors files as Python objects.
 */
#ifndef DCP_PY_SAFETENSORS_HEADER_H
#define DCP_PY_SAFETENSORS_HEADER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef safetensors_methods[];

#endif

/*
 * key_tree.h: `key_tree`, a function of the module.
 */
#ifndef DCP_PY_KEY_TREE_H
#define DCP_PY_KEY_TREE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef key_tree_methods[];

#endif

/*
 * save_outside.h: the methods of _native.Save that serve a planner of the program's own.
 */
#ifndef DCP_PY_SAVE_OUTSIDE_H
#define DCP_PY_SAVE_OUTSIDE_H

#include "save_object.h"

PyObject *save_gather(PyObject *object, PyObject *message);
PyObject *save_scatter(PyObject *object, PyObject *parts);
PyObject *save_add_items(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *save_places(PyObject *object, PyObject *unused);
PyObject *save_set_metadata(PyObject *object, PyObject *pickle);
PyObject *save_settle(PyObject *object, PyObject *record);
extern const char save_gather_doc[], save_scatter_doc[], save_add_items_doc[], save_places_doc[],
    save_set_metadata_doc[], save_settle_doc[];

#define SAVE_OUTSIDE_METHODS                                                                       \
    {"gather", save_gather, METH_O, save_gather_doc},                                              \
        {"scatter", save_scatter, METH_O, save_scatter_doc},                                       \
        {"add_items", (PyCFunction)(void (*)(void))save_add_items, METH_VARARGS | METH_KEYWORDS,   \
         save_add_items_doc},                                                                      \
        {"places", save_places, METH_NOARGS, save_places_doc},                                     \
        {"set_metadata", save_set_metadata, METH_O, save_set_metadata_doc},                        \
    {                                                                                              \
        "settle", save_settle, METH_O, save_settle_doc                                             \
    }

/* Whether this rank is between the vote and the end of such planning; then leave() makes what is
 * left of its collective calls. */
bool save_is_outside(const struct save_object *self);
PyObject *save_leave_outside(PyObject *object, PyObject *record);

#endif

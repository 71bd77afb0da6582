/*
 * upload_parts.h: what a background save borrows from Python objects.
 */
#ifndef DCP_PY_UPLOAD_PARTS_H
#define DCP_PY_UPLOAD_PARTS_H

#include "module.h"

#include "dcp_store.h"

const struct dcp_store *store_object_get(PyObject *object);
struct dcp_writer_process *writer_process_object_get(PyObject *object);
/* Needs no GIL. */
void watch_object_notify(void *object);

#endif

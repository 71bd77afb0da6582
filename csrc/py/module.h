/*
 * module.h: what the types of `_native` share: the module's state and how to get at it.
 *
 * Process-global state of the extension (there is no other):
 *   - the engine's ring buffers and the arenas, kept between saves (csrc/core/ring.c, arena.c), by
 * pid;
 *   - the choice of the CRC32 implementation (csrc/core/crc32.c), made once.
 */
#ifndef DCP_PY_MODULE_H
#define DCP_PY_MODULE_H

#include "native_state.h"

#include "dcp_transfer.h"

struct module_state {
    struct native_state native; /* first: native_state_load expects it there */
    PyObject *error_class;      /* dcp_native.NativeError */
    PyTypeObject *group_type, *save_type, *load_type;
    PyTypeObject *store_type, *writer_process_type, *watch_type;
};

extern struct PyModuleDef native_module;
extern PyType_Spec group_type_spec, save_type_spec, load_type_spec;
extern PyType_Spec store_type_spec, writer_process_type_spec, watch_type_spec;

/* State of the module that made `type` or a subclass of it. */
struct module_state *module_state_of(PyTypeObject *type);

/* NativeError of the module that made `object`'s type; RuntimeError when it is gone.  Borrowed. */
PyObject *module_error_class(PyObject *object);

/* Group: the comm table of a process group and what its saves share. */
struct group_object {
    PyObject_HEAD struct dcp_group *group;
    PyObject *reason; /* a string of whoever chose how its ranks talk; NULL: None */
    PyObject *error;  /* what the next call on it has to fail with; NULL: None */
    pid_t pid;        /* a forked child refuses to use it */
};
/* NULL with an exception when the group is not usable in this process. */
struct dcp_group *group_object_get(PyObject *group);

/* Borrows a bytes object. */
static inline struct dcp_span
native_span(PyObject *bytes)
{
    return (struct dcp_span){(const uint8_t *)PyBytes_AS_STRING(bytes),
                             (size_t)PyBytes_GET_SIZE(bytes)};
}

/* Fills `ret` from a bytes object or None; borrows the bytes.  -1 with an exception. */
int failure_from_python(PyObject *record, struct dcp_failure *ret, bool *ret_given);

#endif

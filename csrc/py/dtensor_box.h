/*
 * dtensor_box.h: which box of its global tensor this rank's part of a DTensor is.
 */
#ifndef DCP_DTENSOR_BOX_H
#define DCP_DTENSOR_BOX_H

#include "native_state.h"

#include "dcp_limits.h"

enum dtensor_answer {
    DTENSOR_NATIVE = 0,       /* the box is known */
    DTENSOR_OUTSIDE_MESH = 1, /* this rank has no part */
    DTENSOR_ASK_TORCH = 2,    /* anything but Shard and Replicate over a plain local tensor */
    DTENSOR_ERROR = -1,       /* a Python exception is set */
};

enum { MESH_CACHE_ENTRIES = 8, MESH_MAX_DIMS = 8 };

/* What was asked of device meshes: a state dict has few, its DTensors many.  Lives during one plan,
 * because a mesh's coordinates belong to the process group of the moment.  Zero-initialised is
 * valid. */
struct mesh_cache {
    struct mesh_entry {
        PyObject *mesh; /* owned, so that its address stays its own */
        bool inside;
        uint32_t ndim;
        int64_t shape[MESH_MAX_DIMS];
        int64_t coordinate[MESH_MAX_DIMS];
    } entries[MESH_CACHE_ENTRIES];
    uint32_t next; /* entry to replace */
};

void mesh_cache_clean_up(struct mesh_cache *cache);

struct dtensor_box {
    PyObject *local;                   /* owned: the local tensor */
    struct dcp_tensor_view view;       /* of the DTensor: global sizes, requires_grad */
    struct dcp_tensor_view local_view; /* of the local tensor */
    uint32_t ndim;
    uint64_t size[DCP_MAX_DIMS]; /* global */
    uint64_t offsets[DCP_MAX_DIMS];
    uint64_t sizes[DCP_MAX_DIMS];
};

/* For an object of exactly the type DTensor.  `box` is filled with DTENSOR_NATIVE only; the caller
 * then drops box->local. */
enum dtensor_answer dtensor_box_find(const struct native_state *state, struct mesh_cache *cache,
                                     PyObject *dtensor, struct dtensor_box *box);

/* For any DTensor, asked in Python: 1, 0 or -1. */
int dtensor_is_outside_mesh(const struct native_state *state, PyObject *dtensor);

/* Whether `object` has a checkpoint hook that torch's own class did not give it: `name` of `state`,
 * and the function that is not counted (NULL: any counts).  1, 0 or -1. */
int native_has_hook(PyObject *object, PyObject *name, PyObject *stock);

#endif

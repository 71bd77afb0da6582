/*
 * flatten.h: walks a state dict by torch's rules (torch/distributed/checkpoint/_traverse.py) and
 * names its leaves.
 */
#ifndef DCP_FLATTEN_H
#define DCP_FLATTEN_H

#include "native_state.h"

enum flatten_mode {
    FLATTEN_CURRENT = 0,   /* mappings always descended; lists that hold tensors or containers */
    FLATTEN_V_2_3 = 1,     /* torch 2.3 and before: mappings of nothing but leaves are leaves */
    FLATTEN_TOP_LEVEL = 2, /* flatten_state_dict=False: top-level values, no paths */
};

/* One leaf.  Text and path are valid during the call; `value` is borrowed, and held meanwhile. */
struct flatten_leaf {
    const char *fqn; /* UTF-8, not terminated */
    size_t fqn_len;
    const uint8_t *path; /* dcp_path_* encoded; NULL with FLATTEN_TOP_LEVEL */
    size_t path_len;
    uint32_t path_parts;
    PyObject *value;
};

/* 0 or -1 with a Python exception, which ends the walk. */
typedef int (*flatten_leaf_fn)(void *ctx, const struct flatten_leaf *leaf);

/* Calls `on_leaf` for every leaf, in torch's order.  ValueError: `duplicated flatten key X`, or
 * nesting deeper than DCP_MAX_DEPTH. */
int flatten_state_dict(const struct native_state *state, PyObject *state_dict,
                       enum flatten_mode mode, flatten_leaf_fn on_leaf, void *ctx);

/* What flatten_sharded_tensors=True does to a state dict that is not flattened: torch rebuilds its
 * containers.  *ret is a new reference to the rebuilt dict, or to `state_dict` itself where that
 * changes nothing. */
int flatten_rebuild_top_level(const struct native_state *state, PyObject *state_dict,
                              PyObject **ret);

/* The same for one leaf of a flattened state dict: a ShardedTensor of ShardedTensors becomes one.
 * *ret NULL: the leaf vanishes (no local shards). */
int flatten_sharded_leaf(const struct native_state *state, const struct flatten_leaf *leaf,
                         PyObject **ret);

/* True for a value that is certainly no container and no tensor: exact builtin scalars, tuples. */
bool flatten_is_plain_leaf(PyObject *value);
/* True also for exact tensors, parameters and DTensors. */
bool flatten_is_common_leaf(const struct native_state *state, PyObject *value);

/* Tuple of str and int from an encoded path; returns new. */
PyObject *flatten_path_as_tuple(const uint8_t *path, size_t path_len, uint32_t path_parts);

#endif

/*
 * native_state.h: the state of the `_native` module: the bridge table and what is borrowed from
 * torch.
 *
 * Everything of torch that the glue asks for is looked up once, by name, in one table
 * (native_state.c), so that a torch release that moved something fails at the first save with the
 * name of what is missing, and so that planning 20,000 tensors makes no attribute look-ups in
 * modules.
 *
 * Invariants: after native_state_load every `PyObject *` of NATIVE_REFERENCES is set; before it,
 * all are NULL.  All functions here need the GIL.
 */
#ifndef DCP_NATIVE_STATE_H
#define DCP_NATIVE_STATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dcp_bridge.h"
#include "dcp_dtype.h"

/* X(field, module, attribute path): objects that must exist. */
#define NATIVE_REFERENCES(X)                                                                       \
    X(tensor_type, "torch", "Tensor")                                                              \
    X(parameter_type, "torch.nn", "Parameter")                                                     \
    X(size_type, "torch", "Size")                                                                  \
    X(strided, "torch", "strided")                                                                 \
    X(torch_empty, "torch", "empty")                                                               \
    X(torch_save, "torch", "save")                                                                 \
    X(is_grad_enabled, "torch", "is_grad_enabled")                                                 \
    X(current_accelerator, "torch.accelerator", "current_accelerator")                             \
    X(cuda_is_initialized, "torch.cuda", "is_initialized")                                         \
    X(channels_last, "torch", "channels_last")                                                     \
    X(preserve_format, "torch", "preserve_format")                                                 \
    X(dtensor_type, "torch.distributed.tensor", "DTensor")                                         \
    X(dtensor_write_hook, "torch.distributed.tensor", "DTensor.__create_write_items__")            \
    X(dtensor_chunk_hook, "torch.distributed.tensor", "DTensor.__create_chunk_list__")             \
    X(dtensor_shard_hook, "torch.distributed.tensor", "DTensor.__get_tensor_shard__")              \
    X(shard_type, "torch.distributed.tensor", "Shard")                                             \
    X(replicate_type, "torch.distributed.tensor", "Replicate")                                     \
    X(fake_tensor_type, "torch._subclasses.fake_tensor", "FakeTensor")                             \
    X(sharded_tensor_type, "torch.distributed._shard.sharded_tensor", "ShardedTensor")             \
    X(narrow_tensor_by_index, "torch.distributed._shard._utils", "narrow_tensor_by_index")         \
    X(create_write_items, "torch.distributed.checkpoint.planner_helpers", "_create_write_items")   \
    X(create_chunk_list, "torch.distributed.checkpoint.planner_helpers", "_create_chunk_list")     \
    X(find_state_dict_object, "torch.distributed.checkpoint.utils", "find_state_dict_object")      \
    X(flatten_sharded_tensors, "torch.distributed.checkpoint._sharded_tensor_utils",               \
      "_flatten_sharded_tensors")                                                                  \
    X(metadata_index_type, "torch.distributed.checkpoint.metadata", "MetadataIndex")               \
    X(tensor_metadata_type, "torch.distributed.checkpoint.metadata", "TensorStorageMetadata")      \
    X(write_item_tensor, "torch.distributed.checkpoint.planner", "WriteItemType.TENSOR")           \
    X(write_item_bytes, "torch.distributed.checkpoint.planner", "WriteItemType.BYTE_IO")           \
    X(mapping_type, "collections.abc", "Mapping")                                                  \
    X(bytes_io_type, "io", "BytesIO")                                                              \
    X(pickle_dumps, "pickle", "dumps")

/* X(field, text): interned attribute names. */
#define NATIVE_NAMES(X)                                                                            \
    X(name_items, "items")                                                                         \
    X(name_size, "size")                                                                           \
    X(name_dim, "dim")                                                                             \
    X(name_local_shards, "local_shards")                                                           \
    X(name_tensor, "tensor")                                                                       \
    X(name_device, "device")                                                                       \
    X(name_type, "type")                                                                           \
    X(name_shape, "shape")                                                                         \
    X(name_mesh, "mesh")                                                                           \
    X(name_device_mesh, "device_mesh")                                                             \
    X(name_placements, "placements")                                                               \
    X(name_get_coordinate, "get_coordinate")                                                       \
    X(name_local_tensor, "_local_tensor")                                                          \
    X(name_spec, "_spec")                                                                          \
    X(name_is_param, "_is_param")                                                                  \
    X(name_write_hook, "__create_write_items__")                                                   \
    X(name_chunk_hook, "__create_chunk_list__")                                                    \
    X(name_shard_hook, "__get_tensor_shard__")                                                     \
    X(name_global_shape, "global_shape")                                                           \
    X(name_values, "values")                                                                       \
    X(name_index, "index")                                                                         \
    X(name_fqn, "fqn")                                                                             \
    X(name_tensor_data, "tensor_data")                                                             \
    X(name_chunk, "chunk")                                                                         \
    X(name_offsets, "offsets")                                                                     \
    X(name_sizes, "sizes")                                                                         \
    X(name_properties, "properties")                                                               \
    X(name_dtype, "dtype")                                                                         \
    X(name_layout, "layout")                                                                       \
    X(name_memory_format, "memory_format")                                                         \
    X(name_requires_grad, "requires_grad")                                                         \
    X(name_pin_memory, "pin_memory")                                                               \
    X(name_is_pinned, "is_pinned")                                                                 \
    X(name_detach, "detach")                                                                       \
    X(name_cpu, "cpu")                                                                             \
    X(name_clone, "clone")                                                                         \
    X(name_resolve_conj, "resolve_conj")                                                           \
    X(name_resolve_neg, "resolve_neg")                                                             \
    X(name_getbuffer, "getbuffer")

struct native_state {
    const struct dcp_bridge_table *bridge; /* NULL before native_state_load; static in `_bridge` */
    PyObject *bridge_module;               /* keeps the table's code loaded */
    PyObject *dtypes[DCP_DTYPE_COUNT];     /* torch.dtype by enum dcp_dtype; NULL: torch lacks it */
#define X(field, module, path) PyObject *field;
    NATIVE_REFERENCES(X)
#undef X
#define X(field, text) PyObject *field;
    NATIVE_NAMES(X)
#undef X
    PyObject *error_class;         /* dcp_native.NativeError, or RuntimeError without one */
    PyObject *checkpointable_type; /* torch's CheckpointableTensor (2.14); NULL: torch has none */
    PyObject *current_cuda_stream; /* (device index) -> handle; NULL: torch is built without CUDA */
    /* Where a DTensor keeps its slots; 0 when this torch has none and attributes are asked for. */
    Py_ssize_t local_tensor_offset, spec_offset;
    bool loaded;
};

/* Fills the module's state (which must start with a struct native_state) on the first call.
 * -1 with an exception: ImportError when torch or the bridge lack something, by name. */
int native_state_load(PyObject *module);
/* For the module's m_traverse, m_clear and m_free. */
int native_state_traverse(struct native_state *state, visitproc visit, void *arg);
void native_state_clear(struct native_state *state);

/* enum dcp_dtype of a torch.dtype object; DCP_DTYPE_NONE when it is not one of ours. */
int native_dtype_of(const struct native_state *state, const PyObject *dtype);

/* As PyObject_GetOptionalAttr of Python 3.13: 1 and a new reference, 0 without one, or -1. */
int native_optional_attr(PyObject *object, PyObject *name, PyObject **ret);

/* torch.Size from numbers; returns new. */
PyObject *native_size_new(const struct native_state *state, uint32_t ndim, const uint64_t *numbers);
/* Fills `ndim` numbers from a sequence of ints of at most DCP_MAX_DIMS; -1 with an exception. */
int native_numbers_from(PyObject *sequence, uint64_t *ret_numbers, uint32_t *ret_ndim);

/* Calls object.name(); returns new. */
PyObject *native_call(PyObject *object, PyObject *name);
/* dict[name] = value; takes `value`, which may be NULL with an exception.  0 or -1. */
int native_dict_put(PyObject *dict, const char *name, PyObject *value);

/* Where a uint64_t lies in a struct. */
struct native_number {
    const char *name;
    size_t offset;
};

/* The same for numbers of the struct at `base`. */
int native_dict_put_numbers(PyObject *dict, const void *base, const struct native_number *numbers,
                            size_t count);

#endif

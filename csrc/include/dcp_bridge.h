/*
 * dcp_bridge.h: what `_bridge` (the only C++) hands to `_native`: a table in a capsule, with a
 * version and a size.
 *
 * Objects cross as void * (PyObject *); the glue holds the GIL and a reference during every call
 * that takes one.
 */
#ifndef DCP_BRIDGE_H
#define DCP_BRIDGE_H

#include "dcp_comm.h"
#include "dcp_dtype.h"
#include "dcp_store.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DCP_BRIDGE_CAPSULE "dcp_native._bridge.table"
enum { DCP_BRIDGE_VERSION = 4 };

enum dcp_tensor_class {
    DCP_NOT_A_TENSOR = 0,
    DCP_PLAIN_TENSOR = 1, /* exactly torch.Tensor or torch.nn.Parameter */
    DCP_TENSOR_SUBCLASS = 2,
};

enum dcp_tensor_flags {
    DCP_TENSOR_STRIDED = 1 << 0,    /* layout torch.strided and not nested, quantised or sparse */
    DCP_TENSOR_CONTIGUOUS = 1 << 1, /* row major */
    DCP_TENSOR_REQUIRES_GRAD = 1 << 2,
    DCP_TENSOR_CONJ = 1 << 3, /* lazy conjugate: memory is not the value */
    DCP_TENSOR_NEG = 1 << 4,  /* lazy negative: memory is not the value */
    DCP_TENSOR_HAS_MEMORY =
        1 << 5, /* `data` can be read, or there are no elements (not meta, fake, resized to 0) */
    DCP_TENSOR_CPU = 1 << 6,
    DCP_TENSOR_CUDA = 1 << 7,
    DCP_TENSOR_META = 1 << 8,
    DCP_TENSOR_OVERLAPS = 1 << 9,  /* may alias itself (expanded): not a target */
    DCP_TENSOR_HAS_TYPE = 1 << 10, /* dtype is one of ours */
};

/* Borrows from the tensor: valid while it lives and is not resized. */
struct dcp_tensor_view {
    uint8_t *data;          /* element 0; reading only (copy-on-write is not triggered) */
    const int64_t *sizes;   /* elements */
    const int64_t *strides; /* elements */
    uint8_t *storage;       /* its first byte; NULL when it has none or is not strided memory */
    uint64_t storage_bytes;
    uint32_t ndim;
    uint32_t flags; /* enum dcp_tensor_flags */
    uint16_t dtype; /* enum dcp_dtype; NONE when HAS_TYPE is not set */
    int16_t device_index;
    uint32_t item_bytes;
};

/* A group's NCCL communicator; borrows from the group. */
struct dcp_bridge_nccl {
    void *raw; /* ncclComm_t */
    uint32_t rank;
    uint32_t size;
    uint64_t timeout_ns; /* the group's; 0: it has none */
};

struct dcp_bridge_table {
    uint32_t version;          /* DCP_BRIDGE_VERSION */
    uint32_t table_bytes;      /* sizeof(struct dcp_bridge_table) */
    const char *torch_version; /* "2.13.0": what it was compiled against */

    /* enum dcp_tensor_class; fills *ret unless it is 0.  Never raises.  Nested tensors give sizes
     * NULL. */
    int (*tensor_view)(void *object, struct dcp_tensor_view *ret);
    /* Memory that will be written: as tensor_view's data, but a copy-on-write tensor is
     * materialised.  NULL on failure. */
    uint8_t *(*tensor_mutable_data)(void *object);

    /* The CPU backend of a ProcessGroup as a comm table whose calls need no GIL.  Fails with a text
     * when the group has no CPU backend.  destroy() needs the GIL. */
    int (*comm_from_group)(void *process_group, struct dcp_comm *ret_comm, struct dcp_error *err);

    /* A client of the group's store, cloned: where the store has connections, one of our own.
     * Connecting can take seconds, and longer than any timeout when the host of the store is
     * frozen; the GIL is let go meanwhile.  The calls and destroy() need no GIL; the calls of a
     * store written in Python take it. */
    int (*store_from_group)(void *process_group, struct dcp_store *ret_store,
                            struct dcp_error *err);

    /* The communicator that torch uses for the device that is current on this thread.  Connects
     * nothing.  The error's message says of the group what is in the way: DCP_E_MISSING: it is not
     * connected yet; DCP_E_UNSUPPORTED: its backend will never have one that we can use. */
    int (*nccl_comm_of_group)(void *process_group, struct dcp_bridge_nccl *ret,
                              struct dcp_error *err);
};

#ifdef __cplusplus
}
#endif
#endif

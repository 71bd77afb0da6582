/*
 * metadata_classes.h: the classes of a `.metadata` pickle, for the dialect (metadata_classes.c) and
 * for the walk over its objects (metadata_walk.c, metadata_join.c).
 */
#ifndef DCP_METADATA_CLASSES_H
#define DCP_METADATA_CLASSES_H

#include "metadata_private.h"
#include "pickle_vm.h"

enum dcp_md_class {
    DCP_CLASS_METADATA,
    DCP_CLASS_TENSOR,
    DCP_CLASS_BYTES,
    DCP_CLASS_CHUNK,
    DCP_CLASS_PROPERTIES, /* one cell: INT dtype << 8 | enum dcp_props */
    DCP_CLASS_INDEX,
    DCP_CLASS_INFO,
    DCP_CLASS_META,
    /* Functions, and classes whose objects are custom values. */
    DCP_CLASS_SIZE,
    DCP_CLASS_DTYPE, /* argument: enum dcp_dtype */
    DCP_CLASS_LAYOUT,
    DCP_CLASS_MEM_FORMAT,
    DCP_CLASS_PATH,
    DCP_CLASSES_COUNT,
};

/* Kinds of custom values. */
enum dcp_md_custom {
    DCP_CUSTOM_SIZE, /* argument: the cell of its tuple of integers */
    DCP_CUSTOM_STRIDED,
    DCP_CUSTOM_MEM_FORMAT, /* argument: 0 contiguous, 1 channels last, 2 preserve */
    DCP_CUSTOM_PATH,
};

/* Attributes, in the order of an object's cells. */
enum {
    DCP_METADATA_STATE,
    DCP_METADATA_PLANNER,
    DCP_METADATA_STORAGE,
    DCP_METADATA_META,
    DCP_METADATA_VERSION
};
enum { DCP_TENSOR_PROPERTIES, DCP_TENSOR_SIZE, DCP_TENSOR_CHUNKS };
enum { DCP_CHUNK_OFFSETS, DCP_CHUNK_SIZES };
enum { DCP_INDEX_FQN, DCP_INDEX_INDEX, DCP_INDEX_OFFSET };
enum { DCP_INFO_PATH, DCP_INFO_OFFSET, DCP_INFO_LENGTH, DCP_INFO_TRANSFORMS };

extern const struct dcp_pdialect dcp_metadata_dialect;

/* Dimensions of a torch.Size, and number i of it. */
static inline uint32_t
dcp_md_size_ndim(const struct dcp_pickle_vm *vm, dcp_pvalue size)
{
    return (uint32_t)(vm->cells.data[dcp_p_arg(size)] >> 3);
}

static inline uint64_t
dcp_md_size_at(const struct dcp_pickle_vm *vm, dcp_pvalue size, uint32_t i)
{
    return dcp_p_payload(vm->cells.data[dcp_p_arg(size) + 1 + i]);
}

/* ---- the walk ---- */

struct dcp_md_walk {
    const struct dcp_pickle_vm *vm; /* finished */
    struct dcp_metadata md;         /* being filled; the name table exists once joining starts */
    struct dcp_md_names names;
    uint64_t used_chunks, used_dims;
    struct dcp_error *err;
};

/* `key` names the entry; it may be empty. */
int dcp_md_walk_fail(struct dcp_md_walk *walk, int code, struct dcp_span key, const char *what);
/* Joins storage_data (a DICT) to the chunks and makes the table of files. */
int dcp_md_join(struct dcp_md_walk *walk, dcp_pvalue storage_data) DCP_MUST_CHECK;
/* Root object of a finished machine -> flat form, checked, with its name table. */
int dcp_metadata_from_pickle(const struct dcp_pickle_vm *vm, dcp_pvalue root,
                             struct dcp_metadata *ret_md, struct dcp_error *err) DCP_MUST_CHECK;

#endif

/*
 * metadata_emit.h: the state of one `.metadata` pickle in the making, for metadata_values.c (values
 * that are shared) and metadata_write.c (the objects that hold them).
 */
#ifndef DCP_METADATA_EMIT_H
#define DCP_METADATA_EMIT_H

#include "index_map.h"
#include "metadata_private.h"
#include "pickle_out.h"

/* Memoised before everything else, so that the memo number is the place in this list.
 * M: module, C: class or function of the module before it, K: attribute name. */
#define DCP_MD_FIXED(X)                                                                            \
    X(MOD_METADATA, M, "torch.distributed.checkpoint.metadata")                                    \
    X(METADATA, C, "Metadata")                                                                     \
    X(TENSOR, C, "TensorStorageMetadata")                                                          \
    X(BYTES, C, "BytesStorageMetadata")                                                            \
    X(CHUNK, C, "ChunkStorageMetadata")                                                            \
    X(PROPERTIES, C, "TensorProperties")                                                           \
    X(MEM_FORMAT, C, "_MEM_FORMAT_ENCODING")                                                       \
    X(INDEX, C, "MetadataIndex")                                                                   \
    X(STORAGE_META, C, "StorageMeta")                                                              \
    X(MOD_FILESYSTEM, M, "torch.distributed.checkpoint.filesystem")                                \
    X(STORAGE_INFO, C, "_StorageInfo")                                                             \
    X(MOD_SERIALIZATION, M, "torch.serialization")                                                 \
    X(GET_LAYOUT, C, "_get_layout")                                                                \
    X(MOD_TORCH, M, "torch")                                                                       \
    X(SIZE, C, "Size")                                                                             \
    X(KEY_PROPERTIES, K, "properties")                                                             \
    X(KEY_SIZE, K, "size")                                                                         \
    X(KEY_CHUNKS, K, "chunks")                                                                     \
    X(KEY_OFFSETS, K, "offsets")                                                                   \
    X(KEY_SIZES, K, "sizes")                                                                       \
    X(KEY_FQN, K, "fqn")                                                                           \
    X(KEY_INDEX, K, "index")                                                                       \
    X(KEY_OFFSET, K, "offset")                                                                     \
    X(KEY_LENGTH, K, "length")                                                                     \
    X(KEY_RELATIVE_PATH, K, "relative_path")

enum dcp_md_fixed {
#define X(name, kind, text) DCP_MD_##name,
    DCP_MD_FIXED(X)
#undef X
};

enum {
    DCP_MD_NO_MEMO = 0xFFFFFFFFu,
    DCP_MD_PROPS_VALUES = 16, /* combinations of enum dcp_props */
};

/* A value that was memoised: a text, or the numbers of a torch.Size. */
struct dcp_md_value {
    const void *bytes; /* borrows */
    size_t len;
    uint32_t memo;
    bool is_size;
};

struct dcp_md_writer {
    struct dcp_pickle_out out;
    const struct dcp_global_plan *global;
    const struct dcp_storage_meta *meta;
    struct dcp_metadata md;
    struct dcp_md_record *records;
    uint64_t records_count;
    struct dcp_md_path *paths;
    uint64_t paths_count;
    uint32_t *entry_memo; /* of each entry's name */
    uint32_t *chunk_memo; /* of each chunk's offsets */
    uint32_t *file_memo;  /* of each file's name */
    struct dcp_index_map map;
    struct dcp_md_value *values; /* what `map` points to */
    uint32_t values_count, values_cap;
    uint32_t layout_memo;
    uint32_t format_memo[3];
    uint32_t dtype_memo[DCP_DTYPE_COUNT];
    uint32_t props_memo[DCP_DTYPE_COUNT][DCP_MD_PROPS_VALUES];
    struct dcp_error *err;
};

/* Sets the memo numbers of everything that is shared to "none yet". */
void dcp_md_writer_init(struct dcp_md_writer *w);
int dcp_md_no_memory(struct dcp_md_writer *w);
/* Memoises the list above and leaves the stack as it was. */
void dcp_md_put_fixed(struct dcp_md_writer *w);
/* Pushes a torch.Size; *ret_memo is its memo number. */
int dcp_md_put_size(struct dcp_md_writer *w, const uint64_t *dims, uint32_t ndim,
                    uint32_t *ret_memo) DCP_MUST_CHECK;
/* Pushes a text that is likely to come again. */
int dcp_md_put_text(struct dcp_md_writer *w, const void *text, size_t len) DCP_MUST_CHECK;
/* Pushes a TensorProperties. */
void dcp_md_put_properties(struct dcp_md_writer *w, uint8_t dtype, uint8_t props);

/* An object without arguments of a class of the list. */
static inline void
dcp_md_begin_object(struct dcp_pickle_out *out, enum dcp_md_fixed class_memo)
{
    dcp_pickle_out_get(out, class_memo);
    dcp_pickle_out_op(out, DCP_OP_EMPTY_TUPLE);
    dcp_pickle_out_op(out, DCP_OP_NEWOBJ);
}

#endif

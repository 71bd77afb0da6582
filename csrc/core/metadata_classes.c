/*
 * metadata_classes.c: the dialect of `.metadata`: which globals it may name, and what they mean.
 *
 * The list is what torch 2.1 to 2.14 write: the dataclasses of the checkpoint package, torch.Size,
 * torch's element types, its strided layout, memory formats and pathlib's paths.  Before 2.3 two of
 * the classes were named in the package of sharded tensors; they are the same.  Everything else
 * (a program's own planner_data, attributes that others hang onto Metadata) is foreign: stepped
 * over and noted by name.  The walk refuses it where the loader needs it.
 *
 * Threads: constant.
 */
#include "metadata_classes.h"

static const char *const metadata_fields[] = {"state_dict_metadata", "planner_data", "storage_data",
                                              "storage_meta", "version"};
static const char *const tensor_fields[] = {"properties", "size", "chunks"};
static const char *const chunk_fields[] = {"offsets", "sizes"};
static const char *const index_fields[] = {"fqn", "index", "offset"};
static const char *const info_fields[] = {"relative_path", "offset", "length",
                                          "transform_descriptors"};
static const char *const meta_fields[] = {"checkpoint_id", "save_id", "load_id", "modules"};

static const struct dcp_pclass classes[DCP_CLASSES_COUNT] = {
    [DCP_CLASS_METADATA] = {"Metadata", metadata_fields, 5, true, true},
    [DCP_CLASS_TENSOR] = {"TensorStorageMetadata", tensor_fields, 3, true, false},
    [DCP_CLASS_BYTES] = {"BytesStorageMetadata", NULL, 1, true, false},
    [DCP_CLASS_CHUNK] = {"ChunkStorageMetadata", chunk_fields, 2, true, false},
    [DCP_CLASS_PROPERTIES] = {"TensorProperties", NULL, 1, true, false},
    [DCP_CLASS_INDEX] = {"MetadataIndex", index_fields, 3, true, false},
    [DCP_CLASS_INFO] = {"_StorageInfo", info_fields, 4, true, false},
    [DCP_CLASS_META] = {"StorageMeta", meta_fields, 4, true, true},
    [DCP_CLASS_SIZE] = {"torch.Size", NULL, 0, false, false},
    [DCP_CLASS_DTYPE] = {"torch.dtype", NULL, 0, false, false},
    [DCP_CLASS_LAYOUT] = {"torch.serialization._get_layout", NULL, 0, false, false},
    [DCP_CLASS_MEM_FORMAT] = {"_MEM_FORMAT_ENCODING", NULL, 0, false, false},
    [DCP_CLASS_PATH] = {"pathlib.Path", NULL, 0, false, false},
};

#define CHECKPOINT "torch.distributed.checkpoint.metadata"
#define SHARDED "torch.distributed._shard.sharded_tensor.metadata"

static const struct {
    const char *module, *name;
    enum dcp_md_class class_id;
} globals[] = {
    {CHECKPOINT, "Metadata", DCP_CLASS_METADATA},
    {CHECKPOINT, "TensorStorageMetadata", DCP_CLASS_TENSOR},
    {CHECKPOINT, "BytesStorageMetadata", DCP_CLASS_BYTES},
    {CHECKPOINT, "ChunkStorageMetadata", DCP_CLASS_CHUNK},
    {CHECKPOINT, "TensorProperties", DCP_CLASS_PROPERTIES},
    {CHECKPOINT, "_MEM_FORMAT_ENCODING", DCP_CLASS_MEM_FORMAT},
    {CHECKPOINT, "MetadataIndex", DCP_CLASS_INDEX},
    {CHECKPOINT, "StorageMeta", DCP_CLASS_META},
    {SHARDED, "TensorProperties", DCP_CLASS_PROPERTIES},
    {SHARDED, "MEM_FORMAT_ENCODING", DCP_CLASS_MEM_FORMAT},
    {"torch.distributed.checkpoint.filesystem", "_StorageInfo", DCP_CLASS_INFO},
    {"torch", "Size", DCP_CLASS_SIZE},
    {"torch.serialization", "_get_layout", DCP_CLASS_LAYOUT},
    {"pathlib", "PosixPath", DCP_CLASS_PATH},
    {"pathlib", "PurePosixPath", DCP_CLASS_PATH},
    {"pathlib", "WindowsPath", DCP_CLASS_PATH},
    {"pathlib", "PureWindowsPath", DCP_CLASS_PATH},
    {"pathlib._local", "PosixPath", DCP_CLASS_PATH},
    {"pathlib._local", "PurePosixPath", DCP_CLASS_PATH},
    {"pathlib._local", "WindowsPath", DCP_CLASS_PATH},
    {"pathlib._local", "PureWindowsPath", DCP_CLASS_PATH},
};

static int
find_global(struct dcp_pickle_vm *vm, struct dcp_span module, struct dcp_span name, dcp_pvalue *ret)
{
    for (size_t i = 0; i < sizeof globals / sizeof globals[0]; i++) {
        if (dcp_span_is(name, globals[i].name) && dcp_span_is(module, globals[i].module)) {
            *ret = dcp_p_make_class(DCP_P_GLOBAL, globals[i].class_id, 0);
            return 0;
        }
    }
    if (dcp_span_is(module, "torch")) {
        int dtype = dcp_dtype_from_name((const char *)name.data, name.len);
        if (dtype != DCP_DTYPE_NONE) {
            *ret = dcp_p_make_class(DCP_P_GLOBAL, DCP_CLASS_DTYPE, (uint64_t)dtype);
            return 0;
        }
    }
    *ret = dcp_pickle_foreign_global(vm, module, name);
    return 0;
}

static int
foreign_call(struct dcp_pickle_vm *vm, const char *what, dcp_pvalue *ret)
{
    *ret = dcp_pickle_foreign(vm, what, (struct dcp_span){(const uint8_t *)"", 0});
    return 0;
}

static int
make_size(struct dcp_pickle_vm *vm, dcp_pvalue args, dcp_pvalue *ret)
{
    dcp_pvalue numbers =
        dcp_p_tuple_count(vm, args) == 1 ? dcp_p_tuple_at(vm, args, 0) : DCP_P_UNSET;
    if (!dcp_p_is_tuple(numbers)) {
        return foreign_call(vm, "a torch.Size of what is no tuple", ret);
    }
    if (!dcp_p_tuple_has(vm, numbers, DCP_P_ALL_UINTS)) {
        return dcp_pickle_corrupt(vm, "a torch.Size of something else than integers from 0 on");
    }
    if (dcp_p_tuple_count(vm, numbers) > DCP_MAX_DIMS) {
        return foreign_call(vm, "a torch.Size of more than 64 dimensions", ret);
    }
    *ret = dcp_p_make_class(DCP_P_CUSTOM, DCP_CUSTOM_SIZE, dcp_p_payload(numbers));
    return 0;
}

static int
reduce(struct dcp_pickle_vm *vm, dcp_pvalue callable, dcp_pvalue args, dcp_pvalue *ret)
{
    uint32_t class_id = dcp_p_class(callable);
    if (class_id == DCP_CLASS_SIZE) {
        return make_size(vm, args, ret);
    }
    dcp_pvalue arg = dcp_p_tuple_count(vm, args) == 1 ? dcp_p_tuple_at(vm, args, 0) : DCP_P_UNSET;
    switch (class_id) {
    case DCP_CLASS_LAYOUT:
        if (!dcp_p_text_is(vm, arg, "torch.strided")) {
            return foreign_call(vm, "a layout other than torch.strided", ret);
        }
        *ret = dcp_p_make_class(DCP_P_CUSTOM, DCP_CUSTOM_STRIDED, 0);
        return 0;
    case DCP_CLASS_MEM_FORMAT:
        if (dcp_p_tag(arg) != DCP_P_INT || dcp_p_int(arg) < 0 || dcp_p_int(arg) > 2) {
            return foreign_call(vm, "an unknown memory format", ret);
        }
        *ret = dcp_p_make_class(DCP_P_CUSTOM, DCP_CUSTOM_MEM_FORMAT, (uint64_t)dcp_p_int(arg));
        return 0;
    case DCP_CLASS_PATH:
        if (!dcp_p_tuple_has(vm, args, DCP_P_ALL_TEXTS)) {
            return foreign_call(vm, "a path of something else than texts", ret);
        }
        *ret = dcp_p_make_class(DCP_P_CUSTOM, DCP_CUSTOM_PATH, 0);
        return 0;
    default:
        return foreign_call(vm, "a call of a class that torch fills in another way", ret);
    }
}

static bool
is_properties(const struct dcp_pickle_vm *vm, dcp_pvalue state)
{
    if (dcp_p_tag(state) != DCP_P_TUPLE || dcp_p_tuple_count(vm, state) != 5) {
        return false;
    }
    dcp_pvalue dtype = dcp_p_tuple_at(vm, state, 0);
    return dcp_p_tag(dtype) == DCP_P_GLOBAL && dcp_p_class(dtype) == DCP_CLASS_DTYPE &&
           dcp_p_is_custom(dcp_p_tuple_at(vm, state, 1), DCP_CUSTOM_STRIDED) &&
           dcp_p_tag(dcp_p_tuple_at(vm, state, 2)) == DCP_P_BOOL &&
           dcp_p_is_custom(dcp_p_tuple_at(vm, state, 3), DCP_CUSTOM_MEM_FORMAT) &&
           dcp_p_tag(dcp_p_tuple_at(vm, state, 4)) == DCP_P_BOOL;
}

/* TensorProperties: (dtype, layout, requires_grad, memory format, pin_memory). */
static int
build(struct dcp_pickle_vm *vm, dcp_pvalue object, dcp_pvalue state)
{
    if (dcp_p_class(object) != DCP_CLASS_PROPERTIES || !is_properties(vm, state)) {
        const char *name = classes[dcp_p_class(object)].name;
        (void)dcp_pickle_foreign(vm, "a state that torch does not write",
                                 (struct dcp_span){(const uint8_t *)name, strlen(name)});
        dcp_pickle_poison(vm, object);
        return 0;
    }
    static const uint64_t formats[] = {0, DCP_PROP_CHANNELS_LAST, DCP_PROP_PRESERVE_FORMAT};
    uint64_t props = formats[dcp_p_arg(dcp_p_tuple_at(vm, state, 3))];
    props |= dcp_p_payload(dcp_p_tuple_at(vm, state, 2)) != 0 ? DCP_PROP_REQUIRES_GRAD : 0;
    props |= dcp_p_payload(dcp_p_tuple_at(vm, state, 4)) != 0 ? DCP_PROP_PIN_MEMORY : 0;
    uint64_t dtype = dcp_p_arg(dcp_p_tuple_at(vm, state, 0));
    vm->cells.data[dcp_p_arg(object)] = dcp_p_make(DCP_P_INT, dtype << 8 | props);
    return 0;
}

const struct dcp_pdialect dcp_metadata_dialect = {
    .classes = classes,
    .classes_count = DCP_CLASSES_COUNT,
    .find_global = find_global,
    .reduce = reduce,
    .build = build,
};

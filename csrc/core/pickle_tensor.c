/*
 * pickle_tensor.c: data.pkl of a record that holds one plain tensor.
 *
 * The dialect knows torch's rebuild functions for strided tensors and nothing else: quantised,
 * sparse, nested and subclassed tensors name other functions and are refused by name, as are conj
 * and neg flags, hooks and a second storage.  What the pickle says is then checked as a whole: the
 * tensor must lie inside its storage.  All numbers come from the file, so every sum is checked.
 *
 * A data.pkl is a few hundred bytes; the machine runs on the stack and allocates nothing.
 *
 * Threads: no state.
 */
#include "dcp_metadata.h"

#include <string.h>

#include "pickle_vm.h"

enum tensor_class {
    CLASS_REBUILD_V2,
    CLASS_REBUILD_V3,
    CLASS_REBUILD_PARAMETER,
    CLASS_STORAGE, /* argument: enum dcp_dtype, 0 for untyped */
    CLASS_DTYPE,   /* argument: enum dcp_dtype */
    CLASS_ORDERED_DICT,
    CLASSES_COUNT,
};

enum tensor_custom {
    CUSTOM_STORAGE,
    CUSTOM_TENSOR,
    CUSTOM_EMPTY_DICT,
};

enum { SCRATCH_COUNT = 96 };

struct reader {
    struct dcp_tensor_pickle tensor;
    uint8_t storage_dtype; /* 0: untyped, counted in bytes */
    uint64_t storage_count;
    bool has_storage, has_tensor;
};

static const struct dcp_pclass classes[CLASSES_COUNT] = {
    [CLASS_REBUILD_V2] = {.name = "torch._utils._rebuild_tensor_v2"},
    [CLASS_REBUILD_V3] = {.name = "torch._utils._rebuild_tensor_v3"},
    [CLASS_REBUILD_PARAMETER] = {.name = "torch._utils._rebuild_parameter"},
    [CLASS_STORAGE] = {.name = "torch.storage"},
    [CLASS_DTYPE] = {.name = "torch.dtype"},
    [CLASS_ORDERED_DICT] = {.name = "collections.OrderedDict"},
};

static int
global(dcp_pvalue *ret, enum tensor_class class_id, int arg)
{
    *ret = dcp_p_make_class(DCP_P_GLOBAL, class_id, (uint64_t)arg);
    return 0;
}

static int
find_global(struct dcp_pickle_vm *vm, struct dcp_span module, struct dcp_span name, dcp_pvalue *ret)
{
    if (dcp_span_is(module, "torch._utils")) {
        for (enum tensor_class c = CLASS_REBUILD_V2; c <= CLASS_REBUILD_PARAMETER; c++) {
            if (dcp_span_is(name, classes[c].name + strlen("torch._utils."))) {
                return global(ret, c, 0);
            }
        }
    }
    if (dcp_span_is(module, "collections") && dcp_span_is(name, "OrderedDict")) {
        return global(ret, CLASS_ORDERED_DICT, 0);
    }
    bool is_torch = dcp_span_is(module, "torch");
    if ((is_torch || dcp_span_is(module, "torch.storage")) && dcp_span_is(name, "UntypedStorage")) {
        return global(ret, CLASS_STORAGE, DCP_DTYPE_NONE);
    }
    if (is_torch) {
        for (int dtype = 1; dtype < DCP_DTYPE_COUNT; dtype++) {
            if (dcp_dtype_storage(dtype)[0] != 0 && dcp_span_is(name, dcp_dtype_storage(dtype))) {
                return global(ret, CLASS_STORAGE, dtype);
            }
        }
        int dtype = dcp_dtype_from_name((const char *)name.data, name.len);
        if (dtype != DCP_DTYPE_NONE) {
            return global(ret, CLASS_DTYPE, dtype);
        }
    }
    return dcp_pickle_unknown_global(vm, module, name);
}

/* ('storage', class, key, location, count) */
static int
persistent(struct dcp_pickle_vm *vm, dcp_pvalue id, dcp_pvalue *ret)
{
    struct reader *r = vm->ctx;
    if (dcp_p_tag(id) != DCP_P_TUPLE || dcp_p_tuple_count(vm, id) != 5) {
        return dcp_pickle_unsupported(vm, "a persistent id that is no storage");
    }
    dcp_pvalue class = dcp_p_tuple_at(vm, id, 1);
    dcp_pvalue key = dcp_p_tuple_at(vm, id, 2);
    dcp_pvalue count = dcp_p_tuple_at(vm, id, 4);
    if (!dcp_p_text_is(vm, dcp_p_tuple_at(vm, id, 0), "storage") ||
        dcp_p_tag(class) != DCP_P_GLOBAL || dcp_p_class(class) != CLASS_STORAGE ||
        dcp_p_tag(key) != DCP_P_TEXT || dcp_p_tag(dcp_p_tuple_at(vm, id, 3)) != DCP_P_TEXT ||
        dcp_p_tag(count) != DCP_P_INT) {
        return dcp_pickle_unsupported(vm, "a persistent id that is no storage");
    }
    if (r->has_storage) {
        return dcp_pickle_unsupported(vm, "a second storage");
    }
    struct dcp_span text = dcp_p_text(vm, key);
    if (text.len == 0 || text.len >= sizeof r->tensor.storage_key ||
        memchr(text.data, 0, text.len) != NULL) {
        return dcp_pickle_unsupported(vm, "the key of a storage is empty or too long");
    }
    r->storage_dtype = (uint8_t)dcp_p_arg(class);
    uint32_t unit = r->storage_dtype == DCP_DTYPE_NONE ? 1 : dcp_dtype_bytes(r->storage_dtype);
    if (dcp_p_int(count) < 0 ||
        dcp_mul_overflows_u64((uint64_t)dcp_p_int(count), unit, &r->tensor.storage_bytes) ||
        r->tensor.storage_bytes > DCP_MAX_PAYLOAD_BYTES) {
        return dcp_pickle_corrupt(vm, "a storage of an impossible size");
    }
    memcpy(r->tensor.storage_key, text.data, text.len);
    r->tensor.storage_key_len = (uint32_t)text.len;
    r->has_storage = true;
    *ret = dcp_p_make_class(DCP_P_CUSTOM, CUSTOM_STORAGE, 0);
    return 0;
}

/* The tensor's last element must lie in its storage. */
static bool
fits_storage(const struct dcp_tensor_pickle *t, uint32_t element_bytes)
{
    for (uint32_t i = 0; i < t->ndim; i++) {
        if (t->sizes[i] == 0) {
            /* Nothing is read; an offset past the end means nothing either. */
            return true;
        }
    }
    uint64_t last = t->storage_offset;
    uint64_t volume = 1;
    for (uint32_t i = 0; i < t->ndim; i++) {
        uint64_t reach;
        if (dcp_mul_overflows_u64(volume, t->sizes[i], &volume) || volume > DCP_MAX_PAYLOAD_BYTES ||
            dcp_mul_overflows_u64(t->sizes[i] - 1, (uint64_t)t->strides[i], &reach) ||
            dcp_add_overflows_u64(last, reach, &last)) {
            return false;
        }
    }
    return last < t->storage_bytes / element_bytes;
}

static int
set_shape(struct dcp_pickle_vm *vm, dcp_pvalue offset, dcp_pvalue size, dcp_pvalue stride)
{
    struct dcp_tensor_pickle *t = &((struct reader *)vm->ctx)->tensor;
    if (dcp_p_tag(offset) != DCP_P_INT || dcp_p_int(offset) < 0 ||
        !dcp_p_tuple_has(vm, size, DCP_P_ALL_UINTS) ||
        !dcp_p_tuple_has(vm, stride, DCP_P_ALL_UINTS)) {
        return dcp_pickle_corrupt(vm, "a tensor's offset, size or stride is no integer from 0 on");
    }
    uint64_t ndim = dcp_p_tuple_count(vm, size);
    if (ndim != dcp_p_tuple_count(vm, stride)) {
        return dcp_pickle_corrupt(vm, "a tensor with more sizes than strides, or fewer");
    }
    if (ndim > DCP_MAX_DIMS) {
        return dcp_pickle_unsupported(vm, "a tensor of more than 64 dimensions");
    }
    t->ndim = (uint8_t)ndim;
    t->storage_offset = (uint64_t)dcp_p_int(offset);
    for (uint32_t i = 0; i < ndim; i++) {
        t->sizes[i] = (uint64_t)dcp_p_int(dcp_p_tuple_at(vm, size, i));
        t->strides[i] = dcp_p_int(dcp_p_tuple_at(vm, stride, i));
        if (t->sizes[i] > DCP_MAX_PAYLOAD_BYTES) {
            return dcp_pickle_corrupt(vm, "a tensor of an impossible size");
        }
    }
    return 0;
}

/* An empty OrderedDict, an empty dict or None. */
static bool
is_empty(const struct dcp_pickle_vm *vm, dcp_pvalue v)
{
    return dcp_p_tag(v) == DCP_P_NONE || dcp_p_is_custom(v, CUSTOM_EMPTY_DICT) ||
           (dcp_p_tag(v) == DCP_P_DICT && dcp_p_sequence_count(vm, v) == 0);
}

/* v2: (storage, offset, size, stride, requires_grad, hooks[, flags]);
 * v3: (storage, offset, size, stride, requires_grad, hooks, dtype[, flags]) */
static int
rebuild(struct dcp_pickle_vm *vm, dcp_pvalue args, bool is_v3, dcp_pvalue *ret)
{
    struct reader *r = vm->ctx;
    uint64_t count = dcp_p_tuple_count(vm, args);
    uint64_t flags_at = is_v3 ? 7 : 6;
    if (dcp_p_tag(args) != DCP_P_TUPLE || count < flags_at || count > flags_at + 1 ||
        !dcp_p_is_custom(dcp_p_tuple_at(vm, args, 0), CUSTOM_STORAGE) ||
        dcp_p_tag(dcp_p_tuple_at(vm, args, 4)) != DCP_P_BOOL) {
        return dcp_pickle_unsupported(vm, "a tensor that torch did not write");
    }
    if (!is_empty(vm, dcp_p_tuple_at(vm, args, 5)) ||
        (count > flags_at && !is_empty(vm, dcp_p_tuple_at(vm, args, flags_at)))) {
        return dcp_pickle_unsupported(vm, "a tensor with hooks, or conj or neg flags");
    }
    if (r->has_tensor) {
        return dcp_pickle_unsupported(vm, "a second tensor");
    }
    r->tensor.dtype = r->storage_dtype;
    if (is_v3) {
        dcp_pvalue dtype = dcp_p_tuple_at(vm, args, 6);
        if (dcp_p_tag(dtype) != DCP_P_GLOBAL || dcp_p_class(dtype) != CLASS_DTYPE) {
            return dcp_pickle_unsupported(vm, "a tensor of an unknown element type");
        }
        r->tensor.dtype = (uint8_t)dcp_p_arg(dtype);
    }
    if (r->tensor.dtype == DCP_DTYPE_NONE) {
        return dcp_pickle_unsupported(vm, "a tensor without an element type");
    }
    int rc = set_shape(vm, dcp_p_tuple_at(vm, args, 1), dcp_p_tuple_at(vm, args, 2),
                       dcp_p_tuple_at(vm, args, 3));
    if (rc == 0 && !fits_storage(&r->tensor, dcp_dtype_bytes(r->tensor.dtype))) {
        rc = dcp_pickle_corrupt(vm, "a tensor that reaches beyond its storage");
    }
    r->has_tensor = rc == 0;
    *ret = dcp_p_make_class(DCP_P_CUSTOM, CUSTOM_TENSOR, 0);
    return rc;
}

static int
reduce(struct dcp_pickle_vm *vm, dcp_pvalue callable, dcp_pvalue args, dcp_pvalue *ret)
{
    switch (dcp_p_class(callable)) {
    case CLASS_REBUILD_V2:
    case CLASS_REBUILD_V3:
        return rebuild(vm, args, dcp_p_class(callable) == CLASS_REBUILD_V3, ret);
    case CLASS_REBUILD_PARAMETER: /* (tensor, requires_grad, hooks) */
        if (dcp_p_tuple_count(vm, args) != 3 ||
            !dcp_p_is_custom(dcp_p_tuple_at(vm, args, 0), CUSTOM_TENSOR) ||
            dcp_p_tag(dcp_p_tuple_at(vm, args, 1)) != DCP_P_BOOL ||
            !is_empty(vm, dcp_p_tuple_at(vm, args, 2))) {
            return dcp_pickle_unsupported(vm, "a parameter that torch did not write");
        }
        *ret = dcp_p_tuple_at(vm, args, 0);
        return 0;
    case CLASS_ORDERED_DICT:
        if (dcp_p_tuple_count(vm, args) != 0) {
            return dcp_pickle_unsupported(vm, "an OrderedDict that is not empty");
        }
        *ret = dcp_p_make_class(DCP_P_CUSTOM, CUSTOM_EMPTY_DICT, 0);
        return 0;
    default:
        return dcp_pickle_unsupported(vm, "a call of what torch does not call");
    }
}

static const struct dcp_pdialect tensor_dialect = {
    .classes = classes,
    .classes_count = CLASSES_COUNT,
    .find_global = find_global,
    .reduce = reduce,
    .persistent = persistent,
};

int
dcp_pickle_read_tensor(const uint8_t *data, size_t len, struct dcp_tensor_pickle *ret,
                       struct dcp_error *err)
{
    uint64_t scratch[3 * SCRATCH_COUNT];
    struct reader r = {0};
    struct dcp_pickle_vm vm;
    dcp_pickle_vm_init(&vm, data, len, &tensor_dialect, &r, scratch, SCRATCH_COUNT, err);
    dcp_pvalue value = DCP_P_UNSET;
    int rc = dcp_pickle_vm_run(&vm, &value);
    if (rc == 0 && !dcp_p_is_custom(value, CUSTOM_TENSOR)) {
        rc = dcp_pickle_unsupported(&vm, "the record holds something else than a tensor");
    }
    if (rc == 0) {
        *ret = r.tensor;
    }
    dcp_pickle_vm_clean_up(&vm);
    return rc;
}

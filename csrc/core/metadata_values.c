/*
 * metadata_values.c: the values that a `.metadata` pickle shares.
 *
 * Names, torch.Size, element types and layouts cannot be changed once made, so one object may stand
 * wherever an equal one does; of the objects that can, only TensorProperties are shared, per
 * distinct value: torch gives every chunk of a tensor the same one anyway.  Sharing is what makes
 * the file half as large, and Python's reader twice as fast.
 *
 * Threads: a writer belongs to one thread.
 */
#include "metadata_emit.h"

#include <string.h>

#include "dcp_hash.h"

enum { FIRST_VALUES_CAP = 1024, SIZE_SEED = 0x737a, TEXT_SEED = 0x7478 };

static const struct {
    char kind;
    const char *text;
} fixed_list[] = {
#define X(name, kind, text) {#kind[0], text},
    DCP_MD_FIXED(X)
#undef X
};

void
dcp_md_writer_init(struct dcp_md_writer *w)
{
    w->layout_memo = DCP_MD_NO_MEMO;
    memset(w->format_memo, 0xFF, sizeof w->format_memo);
    memset(w->dtype_memo, 0xFF, sizeof w->dtype_memo);
    memset(w->props_memo, 0xFF, sizeof w->props_memo);
}

int
dcp_md_no_memory(struct dcp_md_writer *w)
{
    return dcp_error_set(w->err, DCP_E_NOMEM, 0, NULL,
                         "writing the metadata of %llu chunks: out of memory",
                         (unsigned long long)w->md.chunks_count);
}

static uint32_t
find_value(const struct dcp_md_writer *w, uint64_t hash, const void *bytes, size_t len,
           bool is_size)
{
    uint32_t probe = 0;
    uint32_t found;
    while ((found = dcp_index_map_next(&w->map, hash, &probe)) != DCP_INDEX_NONE) {
        const struct dcp_md_value *value = &w->values[found];
        if (value->len == len && value->is_size == is_size &&
            (len == 0 || memcmp(value->bytes, bytes, len) == 0)) {
            return value->memo;
        }
    }
    return DCP_MD_NO_MEMO;
}

static int
add_value(struct dcp_md_writer *w, uint64_t hash, const struct dcp_md_value *value)
{
    if (w->values_count == w->values_cap) {
        uint32_t cap = w->values_cap == 0 ? FIRST_VALUES_CAP : 2 * w->values_cap;
        struct dcp_md_value *values = NULL;
        if (w->values_cap < UINT32_MAX / 4) {
            values = dcp_realloc(w->values, (size_t)cap * sizeof *values);
        }
        if (values == NULL) {
            return dcp_md_no_memory(w);
        }
        w->values = values;
        w->values_cap = cap;
    }
    w->values[w->values_count] = *value;
    return dcp_index_map_add(&w->map, hash, w->values_count++, w->err);
}

static void
put_new_size(struct dcp_pickle_out *out, const uint64_t *dims, uint32_t ndim)
{
    static const enum dcp_pickle_op close[] = {DCP_OP_EMPTY_TUPLE, DCP_OP_TUPLE1, DCP_OP_TUPLE2,
                                               DCP_OP_TUPLE3, DCP_OP_TUPLE};
    dcp_pickle_out_get(out, DCP_MD_SIZE);
    if (ndim > 3) {
        dcp_pickle_out_op(out, DCP_OP_MARK);
    }
    for (uint32_t i = 0; i < ndim; i++) {
        dcp_pickle_out_uint(out, dims[i]);
    }
    dcp_pickle_out_op(out, close[ndim > 3 ? 4 : ndim]);
    dcp_pickle_out_op(out, DCP_OP_TUPLE1);
    dcp_pickle_out_op(out, DCP_OP_REDUCE);
}

int
dcp_md_put_size(struct dcp_md_writer *w, const uint64_t *dims, uint32_t ndim, uint32_t *ret_memo)
{
    size_t len = ndim * sizeof *dims;
    uint64_t hash = dcp_hash64(dims, len, SIZE_SEED);
    uint32_t memo = find_value(w, hash, dims, len, true);
    if (memo != DCP_MD_NO_MEMO) {
        dcp_pickle_out_get(&w->out, memo);
        *ret_memo = memo;
        return 0;
    }
    put_new_size(&w->out, dims, ndim);
    memo = dcp_pickle_out_memoize(&w->out);
    *ret_memo = memo;
    return add_value(w, hash, &(struct dcp_md_value){dims, len, memo, true});
}

int
dcp_md_put_text(struct dcp_md_writer *w, const void *text, size_t len)
{
    uint64_t hash = dcp_hash64(text, len, TEXT_SEED);
    uint32_t memo = find_value(w, hash, text, len, false);
    if (memo != DCP_MD_NO_MEMO) {
        dcp_pickle_out_get(&w->out, memo);
        return 0;
    }
    dcp_pickle_out_text(&w->out, text, len);
    memo = dcp_pickle_out_memoize(&w->out);
    return add_value(w, hash, &(struct dcp_md_value){text, len, memo, false});
}

void
dcp_md_put_fixed(struct dcp_md_writer *w)
{
    uint32_t module = 0;
    for (uint32_t i = 0; i < sizeof fixed_list / sizeof fixed_list[0]; i++) {
        if (fixed_list[i].kind == 'C') {
            dcp_pickle_out_global(&w->out, module, fixed_list[i].text);
        } else {
            dcp_pickle_out_text(&w->out, fixed_list[i].text, strlen(fixed_list[i].text));
            module = fixed_list[i].kind == 'M' ? i : module;
        }
        uint32_t memo = dcp_pickle_out_memoize(&w->out);
        DCP_ASSERT(memo == i);
        (void)memo;
        dcp_pickle_out_op(&w->out, DCP_OP_POP);
    }
}

static void
put_key(struct dcp_pickle_out *out, const char *key)
{
    dcp_pickle_out_text(out, key, strlen(key));
}

static void
put_dtype(struct dcp_md_writer *w, uint8_t dtype)
{
    if (w->dtype_memo[dtype] != DCP_MD_NO_MEMO) {
        dcp_pickle_out_get(&w->out, w->dtype_memo[dtype]);
        return;
    }
    dcp_pickle_out_global(&w->out, DCP_MD_MOD_TORCH, dcp_dtype_name(dtype));
    w->dtype_memo[dtype] = dcp_pickle_out_memoize(&w->out);
}

static void
put_layout(struct dcp_md_writer *w)
{
    if (w->layout_memo != DCP_MD_NO_MEMO) {
        dcp_pickle_out_get(&w->out, w->layout_memo);
        return;
    }
    dcp_pickle_out_get(&w->out, DCP_MD_GET_LAYOUT);
    put_key(&w->out, "torch.strided");
    dcp_pickle_out_op(&w->out, DCP_OP_TUPLE1);
    dcp_pickle_out_op(&w->out, DCP_OP_REDUCE);
    w->layout_memo = dcp_pickle_out_memoize(&w->out);
}

static void
put_mem_format(struct dcp_md_writer *w, uint8_t props)
{
    unsigned format = props & DCP_PROP_CHANNELS_LAST ? 1 : props & DCP_PROP_PRESERVE_FORMAT ? 2 : 0;
    if (w->format_memo[format] != DCP_MD_NO_MEMO) {
        dcp_pickle_out_get(&w->out, w->format_memo[format]);
        return;
    }
    dcp_pickle_out_get(&w->out, DCP_MD_MEM_FORMAT);
    dcp_pickle_out_uint(&w->out, format);
    dcp_pickle_out_op(&w->out, DCP_OP_TUPLE1);
    dcp_pickle_out_op(&w->out, DCP_OP_REDUCE);
    w->format_memo[format] = dcp_pickle_out_memoize(&w->out);
}

void
dcp_md_put_properties(struct dcp_md_writer *w, uint8_t dtype, uint8_t props)
{
    uint32_t *memo = &w->props_memo[dtype][props % DCP_MD_PROPS_VALUES];
    if (*memo != DCP_MD_NO_MEMO) {
        dcp_pickle_out_get(&w->out, *memo);
        return;
    }
    dcp_md_begin_object(&w->out, DCP_MD_PROPERTIES);
    *memo = dcp_pickle_out_memoize(&w->out);
    dcp_pickle_out_op(&w->out, DCP_OP_MARK);
    put_dtype(w, dtype);
    put_layout(w);
    dcp_pickle_out_bool(&w->out, (props & DCP_PROP_REQUIRES_GRAD) != 0);
    put_mem_format(w, props);
    dcp_pickle_out_bool(&w->out, (props & DCP_PROP_PIN_MEMORY) != 0);
    dcp_pickle_out_op(&w->out, DCP_OP_TUPLE);
    dcp_pickle_out_op(&w->out, DCP_OP_BUILD);
}

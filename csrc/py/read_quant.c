/*
 * read_quant.c: quantised tensors whose values are made while they are read: what Python asks for,
 * checked against the memory that it gives.
 *
 * The specification is (1, values, scales, block, first row, first column) for scaled blocks and
 * (2, table, exponents, bytes of a group, values to skip) for pairs of 4-bit numbers, with tensors
 * as dcp_dequantise.h describes them.  All functions need the GIL.
 */
#include "read_quant.h"

enum { NUMBERS = 256, PAIR_NUMBERS = 16 };

static int
refuse(const char *what)
{
    PyErr_Format(PyExc_ValueError, "a quantised tensor cannot be read so: %s", what);
    return -1;
}

/* Memory of a dense tensor on the CPU. */
static int
view_of(const struct native_state *state, PyObject *tensor, struct dcp_tensor_view *ret)
{
    const uint32_t wants = DCP_TENSOR_STRIDED | DCP_TENSOR_CPU | DCP_TENSOR_HAS_MEMORY;
    const uint32_t refuses = DCP_TENSOR_CONJ | DCP_TENSOR_NEG | DCP_TENSOR_OVERLAPS;

    if (state->bridge->tensor_view(tensor, ret) != DCP_PLAIN_TENSOR ||
        (ret->flags & wants) != wants || ret->flags & refuses) {
        return refuse("one of its tensors is not plain memory");
    }
    return 0;
}

/* A contiguous table of exactly this many elements. */
static int
table_of(const struct native_state *state, PyObject *tensor, int dtype, uint64_t count,
         const uint8_t **ret)
{
    struct dcp_tensor_view view;
    uint64_t elements = 1;

    if (view_of(state, tensor, &view) != 0) {
        return -1;
    }
    for (uint32_t d = 0; d < view.ndim; d++) {
        elements *= (uint64_t)view.sizes[d];
    }
    if (!(view.flags & DCP_TENSOR_CONTIGUOUS) || view.dtype != dtype || elements != count) {
        return refuse("a table is not as large as it must be");
    }
    *ret = view.data;
    return 0;
}

static int
blocks_from(const struct native_state *state, PyObject *spec, uint64_t rows, struct dcp_quant *q)
{
    unsigned long long block, first_row, first_col;
    struct dcp_tensor_view view;
    PyObject *values, *scales;
    const uint8_t *table = NULL;
    int kind;

    if (!PyArg_ParseTuple(spec, "iOOKKK", &kind, &values, &scales, &block, &first_row,
                          &first_col) ||
        table_of(state, values, DCP_DTYPE_FLOAT32, NUMBERS, &table) != 0 ||
        view_of(state, scales, &view) != 0) {
        return -1;
    }
    if (!dcp_quant_can_make(q->dtype) || q->row_values != q->row_bytes) {
        return refuse("its values go into memory of another shape or dtype");
    }
    if (block == 0 || first_row >= block || first_col >= block || view.ndim != 2 ||
        view.dtype != DCP_DTYPE_FLOAT32 || !(view.flags & DCP_TENSOR_CONTIGUOUS) ||
        (uint64_t)view.sizes[0] < (first_row + rows - 1) / block + 1 ||
        (uint64_t)view.sizes[1] < (first_col + q->row_bytes - 1) / block + 1) {
        return refuse("its scales are not those of its blocks");
    }
    q->values = (const float *)(const void *)table;
    q->scales = (const float *)(const void *)view.data;
    q->scales_pitch = (uint64_t)view.sizes[1];
    q->block = block;
    q->first_row = first_row;
    q->first_col = first_col;
    return 0;
}

static int
fp4_from(const struct native_state *state, PyObject *spec, uint64_t rows, struct dcp_quant *q)
{
    unsigned long long group, skip;
    PyObject *table, *exponents;
    int kind;

    if (!PyArg_ParseTuple(spec, "iOOKK", &kind, &table, &exponents, &group, &skip)) {
        return -1;
    }
    if (group == 0 || q->row_bytes % group != 0 || skip > 2 * q->row_bytes ||
        q->row_values > 2 * q->row_bytes - skip ||
        (q->item_bytes != 2 && q->item_bytes != 4 && q->item_bytes != 8)) {
        return refuse("its groups do not make up its rows");
    }
    q->group_bytes = group;
    q->skip_values = skip;
    return table_of(state, table, q->dtype, NUMBERS * PAIR_NUMBERS, &q->table) != 0 ||
                   table_of(state, exponents, DCP_DTYPE_UINT8, rows * (q->row_bytes / group),
                            &q->exponents) != 0
               ? -1
               : 0;
}

int
read_quant_from(const struct native_state *state, PyObject *spec, PyObject *tensor, uint32_t ndim,
                const uint64_t *lengths, struct dcp_quant *ret)
{
    struct dcp_quant q = {0};
    struct dcp_tensor_view view;
    uint64_t rows = 1;
    long kind = PyTuple_Check(spec) && PyTuple_GET_SIZE(spec) > 0
                    ? PyLong_AsLong(PyTuple_GET_ITEM(spec, 0))
                    : 0;

    if (PyErr_Occurred() || view_of(state, tensor, &view) != 0) {
        return -1;
    }
    if ((kind == DCP_QUANT_BLOCKS && ndim != 2) || (kind == DCP_QUANT_FP4 && ndim < 2) ||
        (kind != DCP_QUANT_BLOCKS && kind != DCP_QUANT_FP4)) {
        return refuse("no known kind of quantisation has so many dimensions");
    }
    /* The last two dims of groups are one row. */
    q.row_bytes = lengths[ndim - 1] * (kind == DCP_QUANT_FP4 ? lengths[ndim - 2] : 1);
    for (uint32_t d = 0; d + (kind == DCP_QUANT_FP4 ? 2 : 1) < ndim; d++) {
        rows *= lengths[d];
    }
    if (view.ndim != 2 || (uint64_t)view.sizes[0] != rows || q.row_bytes == 0 ||
        (view.sizes[1] > 1 && view.strides[1] != 1)) {
        return refuse("its values go into memory of another shape");
    }
    q.kind = (uint8_t)kind;
    q.dtype = (uint8_t)view.dtype;
    q.item_bytes = view.item_bytes;
    q.row_values = (uint64_t)view.sizes[1];
    q.row_stride_bytes = view.strides[0] * (int64_t)view.item_bytes;
    q.data = state->bridge->tensor_mutable_data(tensor);
    if (q.data == NULL) {
        return refuse("the tensor it goes to has no memory");
    }
    if ((kind == DCP_QUANT_BLOCKS ? blocks_from : fp4_from)(state, spec, rows, &q) != 0) {
        return -1;
    }
    *ret = q;
    return 0;
}

/*
 * read_quant.h: quantised tensors whose values are made while they are read.
 */
#ifndef DCP_PY_READ_QUANT_H
#define DCP_PY_READ_QUANT_H

#include "native_state.h"

#include "dcp_dequantise.h"

/* From a tuple of Python, for an overlap of these lengths (one byte an element) that fills `tensor`
 * of two dims, rows of values.  All memory is checked to be as large as it must be; it belongs to
 * the tensors of the tuple.  -1 with an exception. */
int read_quant_from(const struct native_state *state, PyObject *spec, PyObject *tensor,
                    uint32_t ndim, const uint64_t *lengths, struct dcp_quant *ret);

#endif

/*
 * dcp_dequantise.h: elements of quantised tensors as numbers, while they are read.
 *
 * A stored element is one byte.  What it stands for is looked up: in tables that the caller makes
 * with torch's own arithmetic, so that results are torch's to the bit (the payload of a NaN apart).
 */
#ifndef DCP_DEQUANTISE_H
#define DCP_DEQUANTISE_H

#include "dcp_engine.h"

#ifdef __cplusplus
extern "C" {
#endif

enum dcp_quant_kind {
    /* value(byte) in float32, times the scale of its square block in float32, rounded to `dtype`.
     */
    DCP_QUANT_BLOCKS = 1,
    /* Two 4-bit numbers a byte, the low one first; each group of bytes has one exponent byte.
     * table[exponent][number] is the value. */
    DCP_QUANT_FP4 = 2,
};

/* One overlap, row major rows of bytes, and where its values go: rows of `dtype`, each contiguous.
 * Borrows all memory. */
struct dcp_quant {
    uint8_t kind;  /* enum dcp_quant_kind */
    uint8_t dtype; /* enum dcp_dtype of the memory; FP4: any of `item_bytes` */
    uint32_t item_bytes;
    uint8_t *data;            /* of the first row's first value */
    int64_t row_stride_bytes; /* from row to row of `data` */
    uint64_t row_bytes;       /* stored, of the overlap */
    uint64_t row_values;      /* in `data`; BLOCKS: row_bytes */
    const float *values;      /* BLOCKS: 256 */
    const float *scales;      /* BLOCKS: from the block of the first element on */
    uint64_t scales_pitch;    /* BLOCKS: scales from one row of blocks to the next */
    uint64_t block;           /* BLOCKS: rows and columns of a block */
    uint64_t first_row;       /* BLOCKS: place of the first element in its block */
    uint64_t first_col;
    const uint8_t *table;     /* FP4: 256 x 16 values */
    const uint8_t *exponents; /* FP4: of the groups of the overlap, row major */
    uint64_t group_bytes;     /* FP4: divides row_bytes */
    uint64_t skip_values;     /* FP4: of each row, that come before the first one wanted */
};

/* Whether float32 values can be rounded to this enum dcp_dtype (DCP_QUANT_BLOCKS). */
bool dcp_quant_can_make(int dtype);
/* Puts the values of a piece of the overlap (DCP_TARGET_OVERLAPS) where they belong. */
void dcp_dequantise_piece(const struct dcp_quant *quant, const struct dcp_piece *piece);

#ifdef __cplusplus
}
#endif
#endif

/*
 * dequantise.c: elements of quantised tensors as numbers, while they are read.
 *
 * The reader hands over pieces that still lie in the cache, so a weight is read once and written
 * once and there is no second tensor of quantised bytes.  A table of 256 values replaces the
 * conversion of the small types: it stays in the first level of the cache, costs one load per
 * element, and holds for every type of one byte.
 *
 * Threads: pure functions of their arguments; pieces of an overlap fill different values.
 */
#include "dcp_dequantise.h"

#include <string.h>

#include "dcp_convert.h"

/* Values that are made before they are rounded: both buffers stay in the first level of the cache.
 */
enum { STEP_VALUES = 512 };

bool
dcp_quant_can_make(int dtype)
{
    return dtype == DCP_DTYPE_FLOAT32 ||
           (dcp_can_convert(DCP_DTYPE_FLOAT32, dtype) &&
            (dtype == DCP_DTYPE_BFLOAT16 || dtype == DCP_DTYPE_FLOAT16 ||
             dtype == DCP_DTYPE_FLOAT64));
}

static void
scale_values(float *to, const float *values, const uint8_t *bytes, uint64_t count, float scale)
{
    for (uint64_t i = 0; i < count; i++) {
        to[i] = values[bytes[i]] * scale;
    }
}

/* Elements of one row, from column `col` of the overlap on. */
static void
put_blocks(const struct dcp_quant *q, uint64_t row, uint64_t col, const uint8_t *bytes,
           uint64_t count)
{
    const float *scales = q->scales + (q->first_row + row) / q->block * q->scales_pitch;
    uint8_t *to = q->data + (int64_t)row * q->row_stride_bytes + col * q->item_bytes;
    float made[STEP_VALUES];
    for (uint64_t done = 0; done < count;) {
        uint64_t n = dcp_min_u64(STEP_VALUES, count - done);
        for (uint64_t i = 0, m; i < n; i += m) {
            uint64_t at = q->first_col + col + done + i;
            m = dcp_min_u64(n - i, q->block - at % q->block);
            scale_values(made + i, q->values, bytes + done + i, m, scales[at / q->block]);
        }
        if (q->dtype == DCP_DTYPE_FLOAT32) {
            memcpy(to, made, n * sizeof made[0]);
        } else {
            dcp_convert(to, q->dtype, (const uint8_t *)made, DCP_DTYPE_FLOAT32, n);
        }
        to += n * q->item_bytes;
        done += n;
    }
}

/* Both numbers of `count` bytes of one group. */
#define DEFINE_PUT_PAIRS(name, type)                                                               \
    static void name(uint8_t *to, const uint8_t *table, const uint8_t *bytes, uint64_t count)      \
    {                                                                                              \
        type values[16], pair[2];                                                                  \
        memcpy(values, table, sizeof values);                                                      \
        for (uint64_t i = 0; i < count; i++) {                                                     \
            pair[0] = values[bytes[i] & 15];                                                       \
            pair[1] = values[bytes[i] >> 4];                                                       \
            memcpy(to + i * sizeof pair, pair, sizeof pair);                                       \
        }                                                                                          \
    }

DEFINE_PUT_PAIRS(put_pairs_16, uint16_t)
DEFINE_PUT_PAIRS(put_pairs_32, uint32_t)
DEFINE_PUT_PAIRS(put_pairs_64, uint64_t)

static void
put_pairs(const struct dcp_quant *q, uint8_t *to, const uint8_t *table, const uint8_t *bytes,
          uint64_t count)
{
    switch (q->item_bytes) {
    case 2:
        put_pairs_16(to, table, bytes, count);
        break;
    case 4:
        put_pairs_32(to, table, bytes, count);
        break;
    default:
        DCP_ASSERT(q->item_bytes == 8);
        put_pairs_64(to, table, bytes, count);
        break;
    }
}

/* Of a byte whose values are not both wanted: the row's wanted ones begin or end inside of it, or
 * before or behind it. */
static void
put_edge(const struct dcp_quant *q, uint8_t *row, uint64_t col, const uint8_t *table, uint8_t byte)
{
    for (uint64_t half = 0; half < 2; half++) {
        uint64_t value = 2 * col + half;
        if (value >= q->skip_values && value - q->skip_values < q->row_values) {
            memcpy(row + (value - q->skip_values) * q->item_bytes,
                   table + (half == 0 ? byte & 15u : (unsigned)byte >> 4) * q->item_bytes,
                   q->item_bytes);
        }
    }
}

static void
put_fp4(const struct dcp_quant *q, uint64_t row, uint64_t col, const uint8_t *bytes, uint64_t count)
{
    uint8_t *to = q->data + (int64_t)row * q->row_stride_bytes;
    const uint8_t *exponents = q->exponents + row * (q->row_bytes / q->group_bytes);
    /* Bytes [first, last) of the row have two wanted values. */
    uint64_t first = (q->skip_values + 1) / 2, last = (q->skip_values + q->row_values) / 2;
    for (uint64_t done = 0; done < count;) {
        uint64_t at = col + done;
        uint64_t n = dcp_min_u64(count - done, q->group_bytes - at % q->group_bytes);
        const uint8_t *table =
            q->table + (uint64_t)exponents[at / q->group_bytes] * 16 * q->item_bytes;
        uint64_t end = at + n;
        uint64_t from = dcp_min_u64(dcp_max_u64(at, first), end);
        uint64_t to_col = dcp_max_u64(dcp_min_u64(end, last), from);
        for (uint64_t i = at; i < from; i++) {
            put_edge(q, to, i, table, bytes[i - col]);
        }
        if (from < to_col) {
            put_pairs(q, to + (2 * from - q->skip_values) * q->item_bytes, table,
                      bytes + (from - col), to_col - from);
        }
        for (uint64_t i = to_col; i < end; i++) {
            put_edge(q, to, i, table, bytes[i - col]);
        }
        done += n;
    }
}

/* Stored elements [at, at + count) of the overlap's row major image. */
static void
put_run(const struct dcp_quant *q, uint64_t at, const uint8_t *bytes, uint64_t count)
{
    while (count > 0) {
        uint64_t row = at / q->row_bytes, col = at % q->row_bytes;
        uint64_t n = dcp_min_u64(count, q->row_bytes - col);
        if (q->kind == DCP_QUANT_BLOCKS) {
            put_blocks(q, row, col, bytes, n);
        } else {
            put_fp4(q, row, col, bytes, n);
        }
        at += n;
        bytes += n;
        count -= n;
    }
}

static void
put_box(const struct dcp_quant *q, const struct dcp_piece *piece, uint32_t d, uint64_t at,
        const uint8_t *bytes)
{
    if (d == piece->ndim) {
        put_run(q, at, bytes, 1);
        return;
    }
    bool run = d + 1 == piece->ndim && piece->strides[d] == 1 && piece->bytes_strides[d] == 1;
    if (run) {
        put_run(q, at, bytes, piece->lengths[d]);
        return;
    }
    for (uint64_t i = 0; i < piece->lengths[d]; i++) {
        put_box(q, piece, d + 1, at + i * (uint64_t)piece->strides[d],
                bytes + (int64_t)i * piece->bytes_strides[d]);
    }
}

void
dcp_dequantise_piece(const struct dcp_quant *quant, const struct dcp_piece *piece)
{
    put_box(quant, piece, 0, (uint64_t)piece->at, piece->bytes);
}

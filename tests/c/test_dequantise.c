/*
 * test_dequantise.c: values of quantised elements lie where they belong, however the overlap is cut
 * into pieces, and nothing beside them is touched.
 */
#include "ctest.h"

#include "dcp_dequantise.h"
#include "plan_maker.h"

enum { ROUNDS = 300, MOST_ROWS = 9, MOST_BYTES = 70, SPARE = 3 };

static struct maker_rng rng = {77};

static void
fill(uint8_t *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        bytes[i] = (uint8_t)maker_below(&rng, 256);
    }
}

/* Hands over a row major overlap of `count` bytes: in runs, or as boxes of `row` bytes. */
static void
hand_over(const struct dcp_quant *quant, const uint8_t *bytes, uint64_t count, uint64_t row)
{
    int64_t strides[2] = {(int64_t)row, 1};
    for (uint64_t at = 0; at < count;) {
        uint64_t left = count - at, n = 1 + maker_below(&rng, left);
        uint64_t lengths[2] = {left / row, row};
        bool boxes = at % row == 0 && left >= row && maker_below(&rng, 2) == 0;
        struct dcp_piece piece = {.ndim = boxes    ? 2
                                          : n == 1 ? 0
                                                   : 1,
                                  .lengths = boxes ? lengths : &n,
                                  .bytes = bytes + at,
                                  .bytes_strides = boxes ? strides : strides + 1,
                                  .at = (int64_t)at,
                                  .strides = boxes ? strides : strides + 1,
                                  .count = boxes ? lengths[0] * row : n};
        dcp_dequantise_piece(quant, &piece);
        at += piece.count;
    }
}

static void
case_each_block_has_its_own_scale(void)
{
    float values[256], scales[(MOST_ROWS + 1) * (MOST_BYTES + 2)];
    for (int i = 0; i < 256; i++) {
        values[i] = (float)(i - 100);
    }
    for (size_t i = 0; i < sizeof scales / sizeof scales[0]; i++) {
        scales[i] = (float)(i + 1);
    }
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t rows = 1 + maker_below(&rng, MOST_ROWS), cols = 1 + maker_below(&rng, MOST_BYTES);
        uint64_t pitch = cols + SPARE, block = 1 + maker_below(&rng, 20);
        uint8_t *bytes = malloc(rows * cols);
        float *made = malloc(rows * pitch * sizeof *made);
        fill(bytes, rows * cols);
        for (uint64_t i = 0; i < rows * pitch; i++) {
            made[i] = -7.5f;
        }
        struct dcp_quant quant = {.kind = DCP_QUANT_BLOCKS,
                                  .dtype = DCP_DTYPE_FLOAT32,
                                  .item_bytes = 4,
                                  .data = (uint8_t *)made,
                                  .row_stride_bytes = (int64_t)(pitch * sizeof *made),
                                  .row_bytes = cols,
                                  .row_values = cols,
                                  .values = values,
                                  .scales = scales,
                                  .scales_pitch = MOST_BYTES + 2,
                                  .block = block,
                                  .first_row = maker_below(&rng, block),
                                  .first_col = maker_below(&rng, block)};
        hand_over(&quant, bytes, rows * cols, cols);
        bool right = true;
        for (uint64_t r = 0; r < rows; r++) {
            for (uint64_t c = 0; c < pitch; c++) {
                uint64_t scale = (quant.first_row + r) / block * quant.scales_pitch +
                                 (quant.first_col + c) / block;
                float want = c < cols ? values[bytes[r * cols + c]] * scales[scale] : -7.5f;
                right = right && made[r * pitch + c] == want;
            }
        }
        CHECK(right);
        free(made);
        free(bytes);
    }
}

static void
check_pairs(uint32_t item_bytes, const uint8_t *table)
{
    uint64_t rows = 1 + maker_below(&rng, MOST_ROWS), group = 1 + maker_below(&rng, 8);
    uint64_t groups = 1 + maker_below(&rng, 6), row_bytes = group * groups;
    uint64_t skip = maker_below(&rng, 2 * row_bytes);
    uint64_t values = 1 + maker_below(&rng, 2 * row_bytes - skip), pitch = values + SPARE;
    uint8_t *bytes = malloc(rows * row_bytes), *exponents = malloc(rows * groups);
    uint8_t *made = malloc(rows * pitch * item_bytes), *want = malloc(rows * pitch * item_bytes);
    fill(bytes, rows * row_bytes);
    fill(exponents, rows * groups);
    memset(made, 0xA5, rows * pitch * item_bytes);
    memset(want, 0xA5, rows * pitch * item_bytes);
    for (uint64_t r = 0; r < rows; r++) {
        for (uint64_t v = 0; v < values; v++) {
            uint64_t at = skip + v;
            uint8_t byte = bytes[r * row_bytes + at / 2];
            uint64_t number = at % 2 == 0 ? byte & 15u : (uint64_t)byte >> 4;
            uint64_t exponent = exponents[r * groups + at / 2 / group];
            memcpy(want + (r * pitch + v) * item_bytes,
                   table + (exponent * 16 + number) * item_bytes, item_bytes);
        }
    }
    struct dcp_quant quant = {.kind = DCP_QUANT_FP4,
                              .item_bytes = item_bytes,
                              .data = made,
                              .row_stride_bytes = (int64_t)(pitch * item_bytes),
                              .row_bytes = row_bytes,
                              .row_values = values,
                              .table = table,
                              .exponents = exponents,
                              .group_bytes = group,
                              .skip_values = skip};
    hand_over(&quant, bytes, rows * row_bytes, row_bytes);
    CHECK(memcmp(made, want, rows * pitch * item_bytes) == 0);
    free(want);
    free(made);
    free(exponents);
    free(bytes);
}

static void
case_pairs_are_taken_apart_at_any_edge(void)
{
    uint8_t *table = malloc(256 * 16 * 8);
    fill(table, 256 * 16 * 8);
    for (int round = 0; round < ROUNDS; round++) {
        check_pairs(2u << maker_below(&rng, 3), table);
    }
    free(table);
}

CTEST_MAIN(RUN(case_each_block_has_its_own_scale); RUN(case_pairs_are_taken_apart_at_any_edge);)

/*
 * convert_loops.h: private: the loops of all conversions, included once per instruction set.
 *
 * Before including, CONVERT_TARGET is the attribute of every loop, CONVERT_TABLE the name of the
 * table that lists them and CONVERT_LINKAGE its storage class.  Elements are moved by memcpy:
 * records of stock torch lie at any address.
 */

#define LOOP(name, from_type, to_type, result)                                                     \
    static CONVERT_TARGET void name(uint8_t *restrict dst, const uint8_t *restrict src,            \
                                    size_t count)                                                  \
    {                                                                                              \
        for (size_t i = 0; i < count; i++) {                                                       \
            from_type x;                                                                           \
            memcpy(&x, src + i * sizeof x, sizeof x);                                              \
            to_type y = (to_type)(result);                                                         \
            memcpy(dst + i * sizeof y, &y, sizeof y);                                              \
        }                                                                                          \
    }

LOOP(load_float16, uint16_t, float, float16_to_float(x))
LOOP(load_bfloat16, uint16_t, float, bfloat16_to_float(x))
LOOP(load_int8, int8_t, int64_t, x)
LOOP(load_int16, int16_t, int64_t, x)
LOOP(load_int32, int32_t, int64_t, x)
LOOP(load_uint8, uint8_t, int64_t, x)
LOOP(load_bool, uint8_t, int64_t, x != 0)

LOOP(f64_to_float32, double, float, x)
LOOP(f64_to_float16, double, uint16_t, float_to_float16((float)x))
LOOP(f64_to_bfloat16, double, uint16_t, float_to_bfloat16((float)x))
LOOP(f64_to_int8, double, int8_t, double_to_int32(x))
LOOP(f64_to_int16, double, int16_t, double_to_int32(x))
LOOP(f64_to_int32, double, int32_t, double_to_int32(x))
LOOP(f64_to_int64, double, int64_t, double_to_int64(x))
LOOP(f64_to_uint8, double, uint8_t, double_to_int64(x))
LOOP(f64_to_bool, double, uint8_t, x != 0)

LOOP(f32_to_float64, float, double, x)
LOOP(f32_to_float16, float, uint16_t, float_to_float16(x))
LOOP(f32_to_bfloat16, float, uint16_t, float_to_bfloat16(x))
LOOP(f32_to_int8, float, int8_t, float_to_int32(x))
LOOP(f32_to_int16, float, int16_t, float_to_int32(x))
LOOP(f32_to_int32, float, int32_t, float_to_int32(x))
LOOP(f32_to_int64, float, int64_t, float_to_int64(x))
LOOP(f32_to_uint8, float, uint8_t, float_to_int64(x))
LOOP(f32_to_bool, float, uint8_t, x != 0)

LOOP(i64_to_float64, int64_t, double, x)
LOOP(i64_to_float32, int64_t, float, x)
LOOP(i64_to_float16, int64_t, uint16_t, float_to_float16((float)x))
LOOP(i64_to_bfloat16, int64_t, uint16_t, float_to_bfloat16((float)x))
LOOP(i64_to_int8, int64_t, int8_t, x)
LOOP(i64_to_int16, int64_t, int16_t, x)
LOOP(i64_to_int32, int64_t, int32_t, x)
LOOP(i64_to_uint8, int64_t, uint8_t, x)
LOOP(i64_to_bool, int64_t, uint8_t, x != 0)

CONVERT_LINKAGE const struct convert_impl CONVERT_TABLE = {
    .load =
        {
            [DCP_DTYPE_FLOAT16] = load_float16,
            [DCP_DTYPE_BFLOAT16] = load_bfloat16,
            [DCP_DTYPE_INT8] = load_int8,
            [DCP_DTYPE_INT16] = load_int16,
            [DCP_DTYPE_INT32] = load_int32,
            [DCP_DTYPE_UINT8] = load_uint8,
            [DCP_DTYPE_BOOL] = load_bool,
        },
    .store =
        {
            [CONVERT_VIA_F64] =
                {
                    [DCP_DTYPE_FLOAT32] = f64_to_float32,
                    [DCP_DTYPE_FLOAT16] = f64_to_float16,
                    [DCP_DTYPE_BFLOAT16] = f64_to_bfloat16,
                    [DCP_DTYPE_INT8] = f64_to_int8,
                    [DCP_DTYPE_INT16] = f64_to_int16,
                    [DCP_DTYPE_INT32] = f64_to_int32,
                    [DCP_DTYPE_INT64] = f64_to_int64,
                    [DCP_DTYPE_UINT8] = f64_to_uint8,
                    [DCP_DTYPE_BOOL] = f64_to_bool,
                },
            [CONVERT_VIA_F32] =
                {
                    [DCP_DTYPE_FLOAT64] = f32_to_float64,
                    [DCP_DTYPE_FLOAT16] = f32_to_float16,
                    [DCP_DTYPE_BFLOAT16] = f32_to_bfloat16,
                    [DCP_DTYPE_INT8] = f32_to_int8,
                    [DCP_DTYPE_INT16] = f32_to_int16,
                    [DCP_DTYPE_INT32] = f32_to_int32,
                    [DCP_DTYPE_INT64] = f32_to_int64,
                    [DCP_DTYPE_UINT8] = f32_to_uint8,
                    [DCP_DTYPE_BOOL] = f32_to_bool,
                },
            [CONVERT_VIA_I64] =
                {
                    [DCP_DTYPE_FLOAT64] = i64_to_float64,
                    [DCP_DTYPE_FLOAT32] = i64_to_float32,
                    [DCP_DTYPE_FLOAT16] = i64_to_float16,
                    [DCP_DTYPE_BFLOAT16] = i64_to_bfloat16,
                    [DCP_DTYPE_INT8] = i64_to_int8,
                    [DCP_DTYPE_INT16] = i64_to_int16,
                    [DCP_DTYPE_INT32] = i64_to_int32,
                    [DCP_DTYPE_UINT8] = i64_to_uint8,
                    [DCP_DTYPE_BOOL] = i64_to_bool,
                },
        },
};

/*
 * dcp_dtype.h: torch's element types, their sizes and how torch.save names them.
 *
 * The numbers are ours, written to disk in our index and sent between ranks: append, never
 * renumber.
 */
#ifndef DCP_DTYPE_H
#define DCP_DTYPE_H

#include "dcp_common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* X(ENUM, value, "torch name", bytes per element, "typed storage class" or "" when saved as an
 * untyped storage). Typed storages pickle as _rebuild_tensor_v2 (numel in elements), the others as
 * _rebuild_tensor_v3 (in bytes). */
#define DCP_DTYPES(X)                                                                              \
    X(UINT8, 1, "uint8", 1, "ByteStorage")                                                         \
    X(INT8, 2, "int8", 1, "CharStorage")                                                           \
    X(INT16, 3, "int16", 2, "ShortStorage")                                                        \
    X(INT32, 4, "int32", 4, "IntStorage")                                                          \
    X(INT64, 5, "int64", 8, "LongStorage")                                                         \
    X(FLOAT16, 6, "float16", 2, "HalfStorage")                                                     \
    X(FLOAT32, 7, "float32", 4, "FloatStorage")                                                    \
    X(FLOAT64, 8, "float64", 8, "DoubleStorage")                                                   \
    X(COMPLEX64, 9, "complex64", 8, "ComplexFloatStorage")                                         \
    X(COMPLEX128, 10, "complex128", 16, "ComplexDoubleStorage")                                    \
    X(BOOL, 11, "bool", 1, "BoolStorage")                                                          \
    X(BFLOAT16, 12, "bfloat16", 2, "BFloat16Storage")                                              \
    X(COMPLEX32, 13, "complex32", 4, "")                                                           \
    X(UINT16, 14, "uint16", 2, "")                                                                 \
    X(UINT32, 15, "uint32", 4, "")                                                                 \
    X(UINT64, 16, "uint64", 8, "")                                                                 \
    X(FLOAT8_E4M3FN, 17, "float8_e4m3fn", 1, "")                                                   \
    X(FLOAT8_E4M3FNUZ, 18, "float8_e4m3fnuz", 1, "")                                               \
    X(FLOAT8_E5M2, 19, "float8_e5m2", 1, "")                                                       \
    X(FLOAT8_E5M2FNUZ, 20, "float8_e5m2fnuz", 1, "")                                               \
    X(FLOAT8_E8M0FNU, 21, "float8_e8m0fnu", 1, "")                                                 \
    X(FLOAT4_E2M1FN_X2, 22, "float4_e2m1fn_x2", 1, "")                                             \
    X(BITS8, 23, "bits8", 1, "")                                                                   \
    X(BITS16, 24, "bits16", 2, "")                                                                 \
    X(BITS1X8, 25, "bits1x8", 1, "")                                                               \
    X(BITS2X4, 26, "bits2x4", 1, "")                                                               \
    X(BITS4X2, 27, "bits4x2", 1, "")                                                               \
    X(BCOMPLEX32, 28, "bcomplex32", 4, "")                                                         \
    X(QINT8, 29, "qint8", 1, "QInt8Storage")                                                       \
    X(QUINT8, 30, "quint8", 1, "QUInt8Storage")                                                    \
    X(QINT32, 31, "qint32", 4, "QInt32Storage")

enum dcp_dtype {
    DCP_DTYPE_NONE = 0, /* objects, and element types that only torch itself can save */
#define X(name, value, text, bytes, storage) DCP_DTYPE_##name = value,
    DCP_DTYPES(X)
#undef X
};

#define DCP_DTYPE_COUNT 32

const char *dcp_dtype_name(int dtype); /* "float32"; NULL when out of range */
uint32_t dcp_dtype_bytes(int dtype);   /* 0 when out of range */
const char *
dcp_dtype_storage(int dtype); /* "FloatStorage", "" for untyped; NULL when out of range */
int dcp_dtype_from_name(const char *name,
                        size_t len); /* "float32" (without "torch."); DCP_DTYPE_NONE when unknown */

#ifdef __cplusplus
}
#endif
#endif

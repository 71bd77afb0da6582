/*
 * convert_impl.h: private: what convert.c (choice, portable code) and convert_x86.c share.
 */
#ifndef DCP_CONVERT_IMPL_H
#define DCP_CONVERT_IMPL_H

#include <string.h>

#include "dcp_convert.h"

/* What an element becomes on its way: the type that holds every value of it. */
enum convert_via { CONVERT_VIA_F64, CONVERT_VIA_F32, CONVERT_VIA_I64, CONVERT_VIAS };

typedef void (*convert_fn)(uint8_t *restrict dst, const uint8_t *restrict src, size_t count);

/* NULL: not one of the types, or nothing to do, because the type is the one on the way. */
struct convert_impl {
    convert_fn load[DCP_DTYPE_COUNT];
    convert_fn store[CONVERT_VIAS][DCP_DTYPE_COUNT];
};

extern const struct convert_impl convert_portable;
/* NULL when this processor or its operating system has no AVX2. */
const struct convert_impl *convert_x86_implementation(void);

/* ---- one element; without branches, so that the compiler makes vectors of them ---- */

#define CONVERT_INLINE static inline __attribute__((always_inline))

CONVERT_INLINE uint32_t
bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

CONVERT_INLINE float
float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* By masks: of a ternary operator over floats the compiler makes a branch. */
CONVERT_INLINE uint32_t
pick(bool first, uint32_t a, uint32_t b)
{
    uint32_t mask = 0u - (uint32_t)first;
    return (a & mask) | (b & ~mask);
}

CONVERT_INLINE uint16_t
float_to_bfloat16(float value)
{
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)pick((bits & 0x7fffffff) > 0x7f800000, 0x7fc0, rounded);
}

CONVERT_INLINE float
bfloat16_to_float(uint16_t value)
{
    return float_of_bits((uint32_t)value << 16);
}

/* The exponent is moved by integer arithmetic; subnormal numbers (no exponent) by one exact
 * subtraction of floats, none of which is subnormal: it works whatever the thread does to those. */
CONVERT_INLINE float
float16_to_float(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000) << 16;
    uint32_t magnitude = (uint32_t)(value & 0x7fff) << 13;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = magnitude + (224u << 23);
    uint32_t subnormal =
        bits_of_float(float_of_bits(magnitude + (113u << 23)) - float_of_bits(113u << 23));
    uint32_t bits = pick(magnitude >= (31u << 23), special, normal);
    bits = pick(magnitude < (1u << 23), subnormal, bits);
    return float_of_bits(sign | bits);
}

/* Normal results are rounded by an integer addition that carries into the exponent, and on into
 * infinity; subnormal ones by adding the float whose last bit weighs what theirs does. */
CONVERT_INLINE uint16_t
float_to_float16(float value)
{
    uint32_t bits = bits_of_float(value);
    uint32_t sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    uint32_t nan = 0x7e00 | ((magnitude >> 13) & 0x1ff);
    uint32_t half = pick(magnitude < (113u << 23), subnormal, normal);
    half = pick(magnitude >= (143u << 23), 0x7c00, half);
    half = pick(magnitude > (255u << 23), nan, half);
    return (uint16_t)(sign | half);
}

/* The conversions of x86 with truncation, without C's undefined ones. */
CONVERT_INLINE int32_t
float_to_int32(float value)
{
    bool fits = value >= -0x1p31f && value < 0x1p31f;
    int32_t whole = (int32_t)(fits ? value : 0.0f);
    return fits ? whole : INT32_MIN;
}

CONVERT_INLINE int64_t
float_to_int64(float value)
{
    bool fits = value >= -0x1p63f && value < 0x1p63f;
    int64_t whole = (int64_t)(fits ? value : 0.0f);
    return fits ? whole : INT64_MIN;
}

CONVERT_INLINE int32_t
double_to_int32(double value)
{
    bool fits = value > -0x1p31 - 1.0 && value < 0x1p31;
    int32_t whole = (int32_t)(fits ? value : 0.0);
    return fits ? whole : INT32_MIN;
}

CONVERT_INLINE int64_t
double_to_int64(double value)
{
    bool fits = value >= -0x1p63 && value < 0x1p63;
    int64_t whole = (int64_t)(fits ? value : 0.0);
    return fits ? whole : INT64_MIN;
}

#endif

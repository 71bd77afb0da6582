/*
 * test_convert.c: conversions of elements by their definitions, in both instruction sets.
 *
 * What torch makes of the same elements is compared in tests/py/test_load_records.py.
 */
#include <math.h>

#include "convert_impl.h"
#include "ctest.h"

static const int types[] = {
    DCP_DTYPE_FLOAT64, DCP_DTYPE_FLOAT32, DCP_DTYPE_FLOAT16, DCP_DTYPE_BFLOAT16, DCP_DTYPE_INT8,
    DCP_DTYPE_INT16,   DCP_DTYPE_INT32,   DCP_DTYPE_INT64,   DCP_DTYPE_UINT8,    DCP_DTYPE_BOOL};
enum { TYPES = sizeof types / sizeof types[0], COUNT = 5003, GUARD = 16 };

static uint64_t seed = 20241;

static uint64_t
next_random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

/* The nearest of all finite values of a 16-bit type, ties to the even bit pattern. */
static uint16_t
nearest(double value, float (*widen)(uint16_t), uint16_t infinity, double least_infinite)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    double magnitude = fabs(value);
    if (magnitude >= least_infinite) {
        return sign | infinity;
    }
    uint16_t low = 0, high = infinity; /* value(low) <= magnitude < value(high) */
    while (high - low > 1) {
        uint16_t middle = (uint16_t)((low + high) / 2);
        if ((double)widen(middle) <= magnitude) {
            low = middle;
        } else {
            high = middle;
        }
    }
    if (high == infinity) {
        return sign | low;
    }
    double below = magnitude - (double)widen(low), above = (double)widen(high) - magnitude;
    bool up = above < below || (above == below && (low & 1));
    return sign | (up ? high : low);
}

static float
widen_float16(uint16_t bits)
{
    int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    double magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
    return (float)(bits & 0x8000 ? -magnitude : magnitude);
}

static float
widen_bfloat16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static void
every_float16_and_bfloat16_becomes_its_value_and_comes_back(void)
{
    for (uint32_t i = 0; i < 0x10000; i++) {
        uint16_t bits = (uint16_t)i, back;
        float value;
        dcp_convert((uint8_t *)&value, DCP_DTYPE_FLOAT32, (uint8_t *)&bits, DCP_DTYPE_FLOAT16, 1);
        dcp_convert((uint8_t *)&back, DCP_DTYPE_FLOAT16, (uint8_t *)&value, DCP_DTYPE_FLOAT32, 1);
        bool special = (bits & 0x7c00) == 0x7c00;
        CHECK(special ? (bits & 0x3ff ? isnan(value) : isinf(value))
                      : value == widen_float16(bits));
        CHECK(isnan(value) ? (back & 0x7fff) > 0x7c00 : back == bits);
        dcp_convert((uint8_t *)&value, DCP_DTYPE_FLOAT32, (uint8_t *)&bits, DCP_DTYPE_BFLOAT16, 1);
        dcp_convert((uint8_t *)&back, DCP_DTYPE_BFLOAT16, (uint8_t *)&value, DCP_DTYPE_FLOAT32, 1);
        CHECK(isnan(value) ? (back & 0x7fff) > 0x7f80 : back == bits);
    }
}

static void
floats_become_the_nearest_and_ties_the_even(void)
{
    for (int i = 0; i < 200000; i++) {
        uint32_t bits = (uint32_t)next_random();
        float value;
        if (i % 3 == 1) { /* the middle between two, and its neighbours */
            uint16_t half = (uint16_t)next_random();
            value = (widen_float16(half & 0x7bff) + widen_float16((half & 0x7bff) + 1)) / 2;
            memcpy(&bits, &value, sizeof bits);
            bits += (uint32_t)(next_random() % 3) - 1;
        } else if (i % 3 == 2) {
            bits = (bits & 0xffff0000) + 0x7fff + (uint32_t)(next_random() % 3);
        }
        memcpy(&value, &bits, sizeof value);
        uint16_t half, brain;
        dcp_convert((uint8_t *)&half, DCP_DTYPE_FLOAT16, (uint8_t *)&value, DCP_DTYPE_FLOAT32, 1);
        dcp_convert((uint8_t *)&brain, DCP_DTYPE_BFLOAT16, (uint8_t *)&value, DCP_DTYPE_FLOAT32, 1);
        if (isnan(value)) {
            CHECK((half & 0x7fff) > 0x7c00 && (brain & 0x7fff) > 0x7f80);
            continue;
        }
        CHECK_EQ(half, nearest((double)value, widen_float16, 0x7c00, 65520.0));
        CHECK_EQ(brain, nearest((double)value, widen_bfloat16, 0x7f80, ldexp(511.0 / 256.0, 127)));
    }
}

static void
integers_wrap_and_what_is_not_zero_is_true(void)
{
    int64_t wide[5] = {-1, 0, 300, INT64_MIN, 1};
    uint8_t bytes[5];
    dcp_convert(bytes, DCP_DTYPE_UINT8, (uint8_t *)wide, DCP_DTYPE_INT64, 5);
    CHECK(memcmp(bytes, "\xff\0\x2c\0\1", 5) == 0);
    dcp_convert(bytes, DCP_DTYPE_BOOL, (uint8_t *)wide, DCP_DTYPE_INT64, 5);
    CHECK(memcmp(bytes, "\1\0\1\1\1", 5) == 0);
    float floats[5] = {NAN, 0.0f, -0.0f, 1e-45f, -INFINITY};
    dcp_convert(bytes, DCP_DTYPE_BOOL, (uint8_t *)floats, DCP_DTYPE_FLOAT32, 5);
    CHECK(memcmp(bytes, "\1\0\0\1\1", 5) == 0);
    /* A byte that no bool has still counts as true, and as one. */
    uint8_t odd = 7;
    int32_t number;
    dcp_convert((uint8_t *)&number, DCP_DTYPE_INT32, &odd, DCP_DTYPE_BOOL, 1);
    CHECK_EQ(number, 1);
}

static void
floats_lose_their_fraction_and_no_integer_is_undefined(void)
{
    double values[6] = {-2.9, 2.9, 3e9, -1e300, NAN, INFINITY};
    int32_t ints[6], want[6] = {-2, 2, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
    int64_t longs[6], long_want[6] = {-2, 2, 3000000000, INT64_MIN, INT64_MIN, INT64_MIN};
    dcp_convert((uint8_t *)ints, DCP_DTYPE_INT32, (uint8_t *)values, DCP_DTYPE_FLOAT64, 6);
    CHECK(memcmp(ints, want, sizeof want) == 0);
    dcp_convert((uint8_t *)longs, DCP_DTYPE_INT64, (uint8_t *)values, DCP_DTYPE_FLOAT64, 6);
    CHECK(memcmp(longs, long_want, sizeof long_want) == 0);
}

/* Any length, any address, no byte beside the target; and the two sets of loops agree. */
static void
all_pairs_agree_whatever_the_alignment_and_stay_in_bounds(void)
{
    const struct convert_impl *x86 = convert_x86_implementation();
    uint8_t *src = dcp_malloc(COUNT * 8 + GUARD), *dst = dcp_malloc(COUNT * 8 + 2 * GUARD);
    uint8_t *one = dcp_malloc(COUNT * 8);
    for (size_t i = 0; i < COUNT * 8 + GUARD; i++) {
        src[i] = (uint8_t)next_random();
    }
    for (int p = 0; p < TYPES * TYPES; p++) {
        int from = types[p / TYPES], to = types[p % TYPES];
        CHECK_EQ(dcp_can_convert(from, to), from != to);
        if (from == to) {
            continue;
        }
        uint32_t from_bytes = dcp_dtype_bytes(from), to_bytes = dcp_dtype_bytes(to);
        size_t shift = next_random() % GUARD, count = COUNT - next_random() % 100;
        memset(dst, 0xA5, COUNT * 8 + 2 * GUARD);
        dcp_convert(dst + shift, to, src + shift, from, count);
        for (size_t i = 0; i < count; i++) {
            dcp_convert(one + i * to_bytes, to, src + shift + i * from_bytes, from, 1);
        }
        CHECK(memcmp(dst + shift, one, count * to_bytes) == 0);
        for (size_t i = 0; i < GUARD; i++) {
            CHECK(i >= shift || dst[i] == 0xA5);
            CHECK(dst[shift + count * to_bytes + i] == 0xA5);
        }
    }
    for (int via = 0; x86 != NULL && via < CONVERT_VIAS; via++) {
        for (int t = 0; t < DCP_DTYPE_COUNT; t++) {
            convert_fn fast[2] = {x86->load[t], x86->store[via][t]};
            convert_fn plain[2] = {convert_portable.load[t], convert_portable.store[via][t]};
            for (int i = 0; i < 2; i++) {
                CHECK((fast[i] == NULL) == (plain[i] == NULL));
                if (fast[i] != NULL) {
                    memset(dst, 0, COUNT * 8);
                    memset(one, 0, COUNT * 8);
                    fast[i](dst, src, COUNT);
                    plain[i](one, src, COUNT);
                    CHECK(memcmp(dst, one, COUNT * 8) == 0);
                }
            }
        }
    }
    dcp_free(src);
    dcp_free(dst);
    dcp_free(one);
}

static void
other_types_are_left_to_torch(void)
{
    for (int t = 0; t < DCP_DTYPE_COUNT; t++) {
        bool known = false;
        for (int i = 0; i < TYPES; i++) {
            known = known || types[i] == t;
        }
        CHECK_EQ(dcp_can_convert(t, DCP_DTYPE_FLOAT32), known && t != DCP_DTYPE_FLOAT32);
        CHECK_EQ(dcp_can_convert(DCP_DTYPE_FLOAT32, t), known && t != DCP_DTYPE_FLOAT32);
    }
}

CTEST_MAIN(RUN(every_float16_and_bfloat16_becomes_its_value_and_comes_back);
           RUN(floats_become_the_nearest_and_ties_the_even);
           RUN(integers_wrap_and_what_is_not_zero_is_true);
           RUN(floats_lose_their_fraction_and_no_integer_is_undefined);
           RUN(all_pairs_agree_whatever_the_alignment_and_stay_in_bounds);
           RUN(other_types_are_left_to_torch);)

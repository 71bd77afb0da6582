/*
 * crc32_x86.c: CRC32 by carry-less multiplication, with and without a copy on the way.
 *
 * A CRC is the remainder of the message, taken as a polynomial over GF(2), by P.  A 128-bit block
 * that lies D bits before another may be replaced by (its low half * x^(D+32) mod P) + (its high
 * half * x^(D-32) mod P), added to the other: two PCLMULQDQ and no table.  Several blocks are
 * folded side by side to hide the multiplier's latency, then into one, then that one is reduced to
 * 32 bits (Barrett).  Method: "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
 * Instruction", Intel 2009; bits are reflected, as zip wants them.
 *
 * The loop is crc32_fold.h, included for 128, 256 and 512 bits.  The same loop stores what it
 * loaded when a copy is asked for, so that the source crosses the memory bus once; with streaming
 * stores the destination does too.  Each function carries its target attribute, so the file
 * compiles for any x86-64 baseline.
 *
 * Long streaming copies run over four pages side by side, as memcpy's do: from memory that is a
 * tenth faster than one page after the other.
 *
 * 512 bits are worth having for checksums of bytes that are already in place: measured on a Xeon,
 * twice the rate of 256 bits inside the caches and a tenth more from memory.  Copies are bound by
 * memory and gain nothing.
 *
 * Threads: no state.
 */
#include "crc32_impl.h"

#include <string.h>

#if defined(__x86_64__)

#include <immintrin.h>

enum {
    STREAMING_MIN_BYTES = 1024,
    STREAMS = 4,
    STREAM_PAGE_BYTES = 4096,
    STREAMS_BYTES = STREAMS * STREAM_PAGE_BYTES,
};

/* x^(D+32) and x^(D-32) mod P, reflected and shifted left by one; the names say D in bytes. */
struct fold_constants {
    uint64_t low, high;
};

static const struct fold_constants over_16 = {0x1751997d0, 0x0ccaa009e};
static const struct fold_constants over_32 = {0x0f1da05aa, 0x15a546366};
static const struct fold_constants over_64 = {0x154442bd4, 0x1c6e41596};
static const struct fold_constants over_128 = {0x1e88ef372, 0x14a7fe880};
static const struct fold_constants over_256 = {0x11542778a, 0x1322d1430};
static const struct fold_constants over_512 = {0x01072db28, 0x1d741f35c};
static const struct fold_constants over_4096 = {0x05ad8a92c, 0x1b3b1a484};

#define X_64 0x163cd6124        /* x^64 mod P */
#define POLY_33 0x1db710641     /* P itself, 33 bits */
#define QUOTIENT_33 0x1f7011641 /* floor(x^64 / P) */

/* Sixteen bytes at offset 16 + n move a vector down by n bytes, at offset 16 - n up by n; bytes
 * that move in are zero (high bit set). */
static const uint8_t shift_table[48] = {
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0,    1,    2,    3,    4,    5,    6,    7,    8,    9,    10,   11,   12,   13,   14,   15,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
};

#define TARGET_128 __attribute__((target("pclmul,sse4.1")))
#define TARGET_256 __attribute__((target("pclmul,sse4.1,avx2,vpclmulqdq")))
#define TARGET_512 __attribute__((target("pclmul,sse4.1,avx2,vpclmulqdq,avx512f,avx512vl")))

static TARGET_128 inline __attribute__((always_inline)) __m128i
fold_lane(__m128i acc, __m128i data, const struct fold_constants *constants)
{
    __m128i k = _mm_loadu_si128((const __m128i *)constants);
    __m128i low = _mm_clmulepi64_si128(acc, k, 0x00);
    __m128i high = _mm_clmulepi64_si128(acc, k, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), data);
}

/* 128 bits to 32: two folds that also append the 32 zero bits of the definition, then Barrett. */
static TARGET_128 inline __attribute__((always_inline)) uint32_t
reduce(__m128i x)
{
    const __m128i low_32 = _mm_setr_epi32(-1, 0, 0, 0);
    const __m128i k16 = _mm_loadu_si128((const __m128i *)&over_16);
    const __m128i x64 = _mm_set_epi64x(0, X_64);
    const __m128i barrett = _mm_set_epi64x(QUOTIENT_33, POLY_33);

    x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, k16, 0x10));
    x = _mm_xor_si128(_mm_srli_si128(x, 4),
                      _mm_clmulepi64_si128(_mm_and_si128(x, low_32), x64, 0x00));
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low_32), barrett, 0x10);
    __m128i multiple = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_32), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(x, multiple), 1);
}

/* The bytes from `at` on, after `lane`, which stands for all before them. */
static TARGET_128 inline __attribute__((always_inline)) uint32_t
finish(__m128i lane, uint8_t *dst, const uint8_t *src, size_t at, size_t len, bool copy)
{
    for (; len - at >= 16; at += 16) {
        __m128i data = _mm_loadu_si128((const __m128i *)(src + at));
        if (copy) {
            _mm_storeu_si128((__m128i *)(dst + at), data);
        }
        lane = fold_lane(lane, data, &over_16);
    }
    size_t rest = len - at;
    if (rest != 0) {
        /* lane followed by `rest` bytes is cut again: its first `rest` bytes become a block of
         * their own, the others and the rest fill the last one. */
        __m128i last = _mm_loadu_si128((const __m128i *)(src + len - 16));
        if (copy) {
            _mm_storeu_si128((__m128i *)(dst + len - 16), last);
        }
        __m128i up = _mm_loadu_si128((const __m128i *)(shift_table + rest));
        __m128i down = _mm_loadu_si128((const __m128i *)(shift_table + 16 + rest));
        __m128i front = _mm_shuffle_epi8(lane, up);
        __m128i back = _mm_blendv_epi8(_mm_shuffle_epi8(lane, down), last, down);
        lane = fold_lane(front, back, &over_16);
    }
    return reduce(lane);
}

/* ---- 128 bits ---- */

#define FOLD_NAME(x) x##_128
#define FOLD_TARGET TARGET_128
#define VEC __m128i
#define VEC_BYTES 16
#define ACCUMULATORS 8
#define VEC_LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define VEC_STORE(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define VEC_STREAM(p, v) _mm_stream_si128((__m128i *)(p), v)
#define VEC_XOR3(a, b, c) _mm_xor_si128(_mm_xor_si128(a, b), c)
#define VEC_MUL_LOW(a, k) _mm_clmulepi64_si128(a, k, 0x00)
#define VEC_MUL_HIGH(a, k) _mm_clmulepi64_si128(a, k, 0x11)
#define VEC_CONSTANTS(k) _mm_loadu_si128((const __m128i *)&(k))
#define VEC_FIRST(block) (block)
#define VEC_TO_LANE(vec) (vec)
#define FAR over_128
#define NEAR over_16
#define TWO over_32
#include "crc32_fold.h"

/* ---- 256 bits ---- */

static TARGET_256 inline __attribute__((always_inline)) __m128i
lanes_256(__m256i vec)
{
    return fold_lane(_mm256_castsi256_si128(vec), _mm256_extracti128_si256(vec, 1), &over_16);
}

#define FOLD_NAME(x) x##_256
#define FOLD_TARGET TARGET_256
#define VEC __m256i
#define VEC_BYTES 32
#define ACCUMULATORS 8
#define VEC_LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define VEC_STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define VEC_STREAM(p, v) _mm256_stream_si256((__m256i *)(p), v)
#define VEC_XOR3(a, b, c) _mm256_xor_si256(_mm256_xor_si256(a, b), c)
#define VEC_MUL_LOW(a, k) _mm256_clmulepi64_epi128(a, k, 0x00)
#define VEC_MUL_HIGH(a, k) _mm256_clmulepi64_epi128(a, k, 0x11)
#define VEC_CONSTANTS(k) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)&(k)))
#define VEC_FIRST(block) _mm256_inserti128_si256(_mm256_setzero_si256(), block, 0)
#define VEC_TO_LANE(vec) lanes_256(vec)
#define FAR over_256
#define NEAR over_32
#define TWO over_64
#include "crc32_fold.h"

/* ---- 512 bits ---- */

static TARGET_512 inline __attribute__((always_inline)) __m128i
lanes_512(__m512i vec)
{
    __m128i lane =
        fold_lane(_mm512_castsi512_si128(vec), _mm512_extracti32x4_epi32(vec, 1), &over_16);
    lane = fold_lane(lane, _mm512_extracti32x4_epi32(vec, 2), &over_16);
    return fold_lane(lane, _mm512_extracti32x4_epi32(vec, 3), &over_16);
}

#define FOLD_NAME(x) x##_512
#define FOLD_TARGET TARGET_512
#define VEC __m512i
#define VEC_BYTES 64
#define ACCUMULATORS 8
#define VEC_LOAD(p) _mm512_loadu_si512(p)
#define VEC_STORE(p, v) _mm512_storeu_si512(p, v)
#define VEC_STREAM(p, v) _mm512_stream_si512((void *)(p), v)
#define VEC_XOR3(a, b, c) _mm512_ternarylogic_epi64(a, b, c, 0x96)
#define VEC_MUL_LOW(a, k) _mm512_clmulepi64_epi128(a, k, 0x00)
#define VEC_MUL_HIGH(a, k) _mm512_clmulepi64_epi128(a, k, 0x11)
#define VEC_CONSTANTS(k) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)&(k)))
#define VEC_FIRST(block) _mm512_inserti32x4(_mm512_setzero_si512(), block, 0)
#define VEC_TO_LANE(vec) lanes_512(vec)
#define FAR over_512
#define NEAR over_64
#define TWO over_128
#include "crc32_fold.h"

static const struct crc32_impl vpclmul_512 = {"vpclmulqdq-512", update_512, copy_512};
static const struct crc32_impl vpclmul_256 = {"vpclmulqdq", update_256, copy_256};
static const struct crc32_impl pclmul_128 = {"pclmulqdq", update_128, copy_128};

const struct crc32_impl *const *
crc32_x86_implementations(void)
{
    /* Filled again with the same values by a second caller; dcp_crc32 calls this under its once. */
    static const struct crc32_impl *found[4];
    size_t count = 0;
    /* The compiler's feature test includes the operating system's support of the registers. */
    __builtin_cpu_init();
    bool has_128 = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    bool has_256 =
        has_128 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq");
    if (has_256 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
        found[count++] = &vpclmul_512;
    }
    if (has_256) {
        found[count++] = &vpclmul_256;
    }
    if (has_128) {
        found[count++] = &pclmul_128;
    }
    return found;
}

#else

const struct crc32_impl *const *
crc32_x86_implementations(void)
{
    static const struct crc32_impl *const none[] = {NULL};
    return none;
}

#endif

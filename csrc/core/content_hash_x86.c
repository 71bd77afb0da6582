/*
 * content_hash_x86.c: the block sums of the content hash in vectors of 256 and 512 bits.
 *
 * A lane of 64 bits holds one pair of words; PMULUDQ multiplies the low halves of two lanes, so
 * one addition of keys and one shift feed it.  Pass p of stripe s uses the keys of stripe s + p:
 * with 512 bits a stripe is a vector, so each step loads one new vector of keys and keeps three.
 * Each function carries its target attribute, so the file compiles for any x86-64 baseline.
 *
 * Threads: no state.
 */
#include "content_hash_impl.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET_256 __attribute__((target("avx2")))
#define TARGET_512 __attribute__((target("avx2,avx512f")))

/* ---- 256 bits ---- */

static TARGET_256 inline __attribute__((always_inline)) __m256i
accumulate_256(__m256i sum, __m256i words, const uint64_t *keys)
{
    __m256i pairs = _mm256_add_epi32(words, _mm256_load_si256((const __m256i *)keys));
    return _mm256_add_epi64(sum, _mm256_mul_epu32(pairs, _mm256_srli_epi64(pairs, 32)));
}

static TARGET_256 uint64_t
total_256(__m256i sum)
{
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i *)lanes, sum);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

static TARGET_256 void
sums_256(const uint64_t *keys, const uint8_t *data, size_t stripes,
         uint64_t ret_sums[CONTENT_PASSES])
{
    enum { VECTOR_WORDS = 4, STRIPE = CONTENT_STRIPE_WORDS };
    __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (size_t i = 0; i < 2 * stripes; i++) {
        __m256i words = _mm256_loadu_si256((const __m256i *)data);
        sum0 = accumulate_256(sum0, words, keys);
        sum1 = accumulate_256(sum1, words, keys + STRIPE);
        sum2 = accumulate_256(sum2, words, keys + 2 * STRIPE);
        sum3 = accumulate_256(sum3, words, keys + 3 * STRIPE);
        data += sizeof words;
        keys += VECTOR_WORDS;
    }
    ret_sums[0] = total_256(sum0);
    ret_sums[1] = total_256(sum1);
    ret_sums[2] = total_256(sum2);
    ret_sums[3] = total_256(sum3);
}

/* ---- 512 bits ---- */

static TARGET_512 inline __attribute__((always_inline)) __m512i
accumulate_512(__m512i sum, __m512i words, __m512i keys)
{
    __m512i pairs = _mm512_add_epi32(words, keys);
    return _mm512_add_epi64(sum, _mm512_mul_epu32(pairs, _mm512_srli_epi64(pairs, 32)));
}

/* The compiler's own reduction adds signed numbers, which may overflow. */
static TARGET_512 uint64_t
total_512(__m512i sum)
{
    return total_256(
        _mm256_add_epi64(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1)));
}

static TARGET_512 void
sums_512(const uint64_t *keys, const uint8_t *data, size_t stripes,
         uint64_t ret_sums[CONTENT_PASSES])
{
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    __m512i keys0 = _mm512_load_si512(keys);
    __m512i keys1 = _mm512_load_si512(keys + CONTENT_STRIPE_WORDS);
    __m512i keys2 = _mm512_load_si512(keys + 2 * CONTENT_STRIPE_WORDS);
    for (size_t i = 0; i < stripes; i++) {
        __m512i words = _mm512_loadu_si512(data);
        __m512i keys3 = _mm512_load_si512(keys + 3 * CONTENT_STRIPE_WORDS);
        sum0 = accumulate_512(sum0, words, keys0);
        sum1 = accumulate_512(sum1, words, keys1);
        sum2 = accumulate_512(sum2, words, keys2);
        sum3 = accumulate_512(sum3, words, keys3);
        keys0 = keys1;
        keys1 = keys2;
        keys2 = keys3;
        data += sizeof words;
        keys += CONTENT_STRIPE_WORDS;
    }
    ret_sums[0] = total_512(sum0);
    ret_sums[1] = total_512(sum1);
    ret_sums[2] = total_512(sum2);
    ret_sums[3] = total_512(sum3);
}

static const struct content_impl avx512 = {"avx512", sums_512};
static const struct content_impl avx2 = {"avx2", sums_256};

const struct content_impl *const *
content_x86_implementations(void)
{
    /* Filled again with the same values by a second caller. */
    static const struct content_impl *found[3];
    size_t count = 0;
    /* The compiler's feature test includes the operating system's support of the registers. */
    __builtin_cpu_init();
    bool has_256 = __builtin_cpu_supports("avx2");
    if (has_256 && __builtin_cpu_supports("avx512f")) {
        found[count++] = &avx512;
    }
    if (has_256) {
        found[count++] = &avx2;
    }
    return found;
}

#else

const struct content_impl *const *
content_x86_implementations(void)
{
    static const struct content_impl *const none[] = {NULL};
    return none;
}

#endif

/*
 * crc32_fold.h: the folding loop of crc32_x86.c, written once and included per vector width.
 *
 * No include guard.  The includer defines
 *     FOLD_NAME(x)          names of this width's functions
 *     FOLD_TARGET           target attribute of this width
 *     VEC, VEC_BYTES        vector type and its size
 *     ACCUMULATORS          vectors folded side by side, to hide the multiplier's latency
 *     VEC_LOAD, VEC_STORE, VEC_STREAM, VEC_XOR3, VEC_MUL_LOW, VEC_MUL_HIGH
 *     VEC_CONSTANTS(k)      a fold_constants in every 128-bit lane
 *     VEC_FIRST(block)      the vector whose lowest lane is `block`, zero elsewhere
 *     VEC_TO_LANE(vec)      the lanes of a vector folded into one
 *     FAR, NEAR             fold_constants for ACCUMULATORS * VEC_BYTES and for VEC_BYTES
 *     TWO                   fold_constants for two vectors
 *
 * `dst` is NULL for the checksum alone.  The last partial block is read again with the bytes
 * before it, so at least 16 bytes are needed.
 */

static FOLD_TARGET inline __attribute__((always_inline)) VEC
FOLD_NAME(fold)(VEC acc, VEC data, VEC constants)
{
    return VEC_XOR3(VEC_MUL_LOW(acc, constants), VEC_MUL_HIGH(acc, constants), data);
}

static FOLD_TARGET inline __attribute__((always_inline)) VEC
FOLD_NAME(take)(const uint8_t *src, uint8_t *dst, size_t at, bool copy, bool streaming)
{
    VEC data = VEC_LOAD(src + at);
    if (copy && streaming) {
        VEC_STREAM(dst + at, data);
    } else if (copy) {
        VEC_STORE(dst + at, data);
    }
    return data;
}

static FOLD_TARGET inline __attribute__((always_inline)) uint32_t
FOLD_NAME(run)(uint32_t reg, uint8_t *dst, const uint8_t *src, size_t len, bool copy,
               bool streaming)
{
    enum { GROUP = ACCUMULATORS * VEC_BYTES };
    const VEC near = VEC_CONSTANTS(NEAR);
    const __m128i start = _mm_cvtsi32_si128((int)reg);
    size_t at = 0;
    __m128i lane;
    if (len < VEC_BYTES) {
        lane = _mm_loadu_si128((const __m128i *)src);
        if (copy) {
            _mm_storeu_si128((__m128i *)dst, lane);
        }
        lane = _mm_xor_si128(lane, start);
        at = sizeof lane;
    } else {
        VEC acc;
        if (len < 2 * GROUP) {
            acc = VEC_XOR3(FOLD_NAME(take)(src, dst, 0, copy, streaming), VEC_FIRST(start),
                           VEC_FIRST(_mm_setzero_si128()));
            at = VEC_BYTES;
        } else {
            const VEC far = VEC_CONSTANTS(FAR);
            VEC accs[ACCUMULATORS];
#pragma GCC unroll 8
            for (int i = 0; i < ACCUMULATORS; i++) {
                accs[i] = FOLD_NAME(take)(src, dst, (size_t)i * VEC_BYTES, copy, streaming);
            }
            accs[0] = VEC_XOR3(accs[0], VEC_FIRST(start), VEC_FIRST(_mm_setzero_si128()));
            for (at = GROUP; len - at >= GROUP; at += GROUP) {
#pragma GCC unroll 8
                for (int i = 0; i < ACCUMULATORS; i++) {
                    VEC data =
                        FOLD_NAME(take)(src, dst, at + (size_t)i * VEC_BYTES, copy, streaming);
                    accs[i] = FOLD_NAME(fold)(accs[i], data, far);
                }
            }
            acc = accs[0];
#pragma GCC unroll 8
            for (int i = 1; i < ACCUMULATORS; i++) {
                acc = FOLD_NAME(fold)(acc, accs[i], near);
            }
        }
        for (; len - at >= VEC_BYTES; at += VEC_BYTES) {
            acc = FOLD_NAME(fold)(acc, FOLD_NAME(take)(src, dst, at, copy, streaming), near);
        }
        lane = VEC_TO_LANE(acc);
    }
    return finish(lane, dst, src, at, len, copy);
}

/* A streaming copy of STREAMS pages side by side, two accumulators each, as memcpy does it: pages
 * of memory that are open at the same time hide each other's latency.  A page's remainder is
 * folded over the next one's, and so on.  `len` is a multiple of STREAMS_BYTES, not 0. */
static FOLD_TARGET inline __attribute__((always_inline)) uint32_t
FOLD_NAME(run_pages)(uint32_t reg, uint8_t *dst, const uint8_t *src, size_t len)
{
    const VEC two = VEC_CONSTANTS(TWO);
    const VEC page = VEC_CONSTANTS(over_4096);
    const VEC near = VEC_CONSTANTS(NEAR);
    const VEC none = VEC_FIRST(_mm_setzero_si128());
    VEC start = VEC_FIRST(_mm_cvtsi32_si128((int)reg));
    VEC accs[STREAMS][2] = {{none, none}};
    for (size_t chunk = 0; chunk < len; chunk += STREAMS_BYTES) {
        for (int s = 1; s < STREAMS; s++) {
            accs[s][0] = accs[s][1] = none;
        }
        for (size_t at = chunk; at < chunk + STREAM_PAGE_BYTES; at += 2 * VEC_BYTES) {
#pragma GCC unroll 8
            for (int i = 0; i < 2 * STREAMS; i++) {
                size_t here =
                    at + (size_t)(i / 2) * STREAM_PAGE_BYTES + (size_t)(i % 2) * VEC_BYTES;
                VEC data = FOLD_NAME(take)(src, dst, here, true, true);
                if (i == 0) {
                    data = VEC_XOR3(data, start, none);
                    start = none;
                }
                accs[i / 2][i % 2] = FOLD_NAME(fold)(accs[i / 2][i % 2], data, two);
            }
        }
        for (int i = 2; i < 2 * STREAMS; i++) {
            accs[i / 2][i % 2] = FOLD_NAME(fold)(accs[i / 2 - 1][i % 2], accs[i / 2][i % 2], page);
        }
        accs[0][0] = accs[STREAMS - 1][0];
        accs[0][1] = accs[STREAMS - 1][1];
    }
    return reduce(VEC_TO_LANE(FOLD_NAME(fold)(accs[0][0], accs[0][1], near)));
}

static FOLD_TARGET uint32_t
FOLD_NAME(update)(uint32_t reg, const uint8_t *src, size_t len)
{
    if (len < 16) {
        return crc32_portable_update(reg, src, len);
    }
    return FOLD_NAME(run)(reg, NULL, src, len, false, false);
}

static FOLD_TARGET uint32_t
FOLD_NAME(copy)(uint32_t reg, uint8_t *dst, const uint8_t *src, size_t len, bool streaming)
{
    if (streaming && len >= STREAMING_MIN_BYTES) {
        /* Streaming stores need an aligned destination. */
        size_t head = (size_t)(0 - (uintptr_t)dst) % VEC_BYTES;
        if (head != 0) {
            reg = FOLD_NAME(copy)(reg, dst, src, head, false);
        }
        size_t done = head + (len - head) / STREAMS_BYTES * STREAMS_BYTES;
        if (done > head) {
            reg = FOLD_NAME(run_pages)(reg, dst + head, src + head, done - head);
        }
        if (len - done >= 16) {
            reg = FOLD_NAME(run)(reg, dst + done, src + done, len - done, true, true);
        } else if (len > done) {
            reg = FOLD_NAME(copy)(reg, dst + done, src + done, len - done, false);
        }
        _mm_sfence();
        return reg;
    }
    if (len < 16) {
        memcpy(dst, src, len);
        return crc32_portable_update(reg, src, len);
    }
    return FOLD_NAME(run)(reg, dst, src, len, true, false);
}

#undef FOLD_NAME
#undef FOLD_TARGET
#undef VEC
#undef VEC_BYTES
#undef ACCUMULATORS
#undef VEC_LOAD
#undef VEC_STORE
#undef VEC_STREAM
#undef VEC_XOR3
#undef VEC_MUL_LOW
#undef VEC_MUL_HIGH
#undef VEC_CONSTANTS
#undef VEC_FIRST
#undef VEC_TO_LANE
#undef FAR
#undef NEAR
#undef TWO

/*
 * box_transpose.c: blocked transposes of 1, 2, 4, 8 and 16 byte elements.
 *
 * A transposed or channels-last tensor is dense along one dim in memory and along another in the
 * record.  Walking it element by element touches a cache line per element on one side; tiles of one
 * cache line by one cache line touch each line once.  Within a tile SSE2 moves 16-byte rows where
 * the compiler has it; the plain loop is the same function and the only path elsewhere.
 */
#include "box.h"

#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

typedef struct {
    uint64_t lo, hi;
} item16;

/* Elements [0, na) x [0, nb), no blocking: tiles and the rims that the fast tiles leave. */
#define DEFINE_PLAIN(size, type)                                                                   \
    static void plain_##size(uint8_t *dst, int64_t dst_pitch, const uint8_t *src,                  \
                             int64_t src_pitch, uint64_t na, uint64_t nb)                          \
    {                                                                                              \
        for (uint64_t b = 0; b < nb; b++) {                                                        \
            uint8_t *d = dst + (int64_t)b * dst_pitch;                                             \
            const uint8_t *s = src + b * sizeof(type);                                             \
            for (uint64_t a = 0; a < na; a++) {                                                    \
                type v;                                                                            \
                memcpy(&v, s, sizeof v);                                                           \
                memcpy(d, &v, sizeof v);                                                           \
                s += src_pitch;                                                                    \
                d += sizeof(type);                                                                 \
            }                                                                                      \
        }                                                                                          \
    }

DEFINE_PLAIN(1, uint8_t)
DEFINE_PLAIN(2, uint16_t)
DEFINE_PLAIN(4, uint32_t)
DEFINE_PLAIN(8, uint64_t)
DEFINE_PLAIN(16, item16)

#if defined(__SSE2__)

static __m128i
load(const uint8_t *at)
{
    return _mm_loadu_si128((const __m128i *)(const void *)at);
}

static void
store(uint8_t *at, __m128i v)
{
    _mm_storeu_si128((__m128i *)(void *)at, v);
}

static __m128i
load_half(const uint8_t *at)
{
    return _mm_loadl_epi64((const __m128i *)(const void *)at);
}

static void
store_halves(uint8_t *low, uint8_t *high, __m128i v)
{
    _mm_storel_epi64((__m128i *)(void *)low, v);
    _mm_storel_epi64((__m128i *)(void *)high, _mm_unpackhi_epi64(v, v));
}

/* 8 x 8 bytes: three rounds of interleaving row i with row i + 4; two columns end in a register. */
static void
fast_1(uint8_t *dst, int64_t dst_pitch, const uint8_t *src, int64_t src_pitch)
{
    __m128i a0 = _mm_unpacklo_epi8(load_half(src), load_half(src + 4 * src_pitch));
    __m128i a1 = _mm_unpacklo_epi8(load_half(src + src_pitch), load_half(src + 5 * src_pitch));
    __m128i a2 = _mm_unpacklo_epi8(load_half(src + 2 * src_pitch), load_half(src + 6 * src_pitch));
    __m128i a3 = _mm_unpacklo_epi8(load_half(src + 3 * src_pitch), load_half(src + 7 * src_pitch));
    __m128i b0 = _mm_unpacklo_epi8(a0, a2), b1 = _mm_unpackhi_epi8(a0, a2);
    __m128i b2 = _mm_unpacklo_epi8(a1, a3), b3 = _mm_unpackhi_epi8(a1, a3);
    store_halves(dst, dst + dst_pitch, _mm_unpacklo_epi8(b0, b2));
    store_halves(dst + 2 * dst_pitch, dst + 3 * dst_pitch, _mm_unpackhi_epi8(b0, b2));
    store_halves(dst + 4 * dst_pitch, dst + 5 * dst_pitch, _mm_unpacklo_epi8(b1, b3));
    store_halves(dst + 6 * dst_pitch, dst + 7 * dst_pitch, _mm_unpackhi_epi8(b1, b3));
}

/* 8 x 8 elements of 2 bytes, in the same way; one column ends in a register. */
static void
fast_2(uint8_t *dst, int64_t dst_pitch, const uint8_t *src, int64_t src_pitch)
{
    __m128i r0 = load(src), r1 = load(src + src_pitch);
    __m128i r2 = load(src + 2 * src_pitch), r3 = load(src + 3 * src_pitch);
    __m128i r4 = load(src + 4 * src_pitch), r5 = load(src + 5 * src_pitch);
    __m128i r6 = load(src + 6 * src_pitch), r7 = load(src + 7 * src_pitch);
    __m128i a0 = _mm_unpacklo_epi16(r0, r4), a1 = _mm_unpackhi_epi16(r0, r4);
    __m128i a2 = _mm_unpacklo_epi16(r1, r5), a3 = _mm_unpackhi_epi16(r1, r5);
    __m128i a4 = _mm_unpacklo_epi16(r2, r6), a5 = _mm_unpackhi_epi16(r2, r6);
    __m128i a6 = _mm_unpacklo_epi16(r3, r7), a7 = _mm_unpackhi_epi16(r3, r7);
    r0 = _mm_unpacklo_epi16(a0, a4), r1 = _mm_unpackhi_epi16(a0, a4);
    r2 = _mm_unpacklo_epi16(a1, a5), r3 = _mm_unpackhi_epi16(a1, a5);
    r4 = _mm_unpacklo_epi16(a2, a6), r5 = _mm_unpackhi_epi16(a2, a6);
    r6 = _mm_unpacklo_epi16(a3, a7), r7 = _mm_unpackhi_epi16(a3, a7);
    store(dst, _mm_unpacklo_epi16(r0, r4));
    store(dst + dst_pitch, _mm_unpackhi_epi16(r0, r4));
    store(dst + 2 * dst_pitch, _mm_unpacklo_epi16(r1, r5));
    store(dst + 3 * dst_pitch, _mm_unpackhi_epi16(r1, r5));
    store(dst + 4 * dst_pitch, _mm_unpacklo_epi16(r2, r6));
    store(dst + 5 * dst_pitch, _mm_unpackhi_epi16(r2, r6));
    store(dst + 6 * dst_pitch, _mm_unpacklo_epi16(r3, r7));
    store(dst + 7 * dst_pitch, _mm_unpackhi_epi16(r3, r7));
}

/* 4 x 4 elements of 4 bytes. */
static void
fast_4(uint8_t *dst, int64_t dst_pitch, const uint8_t *src, int64_t src_pitch)
{
    __m128i r0 = load(src), r1 = load(src + src_pitch);
    __m128i r2 = load(src + 2 * src_pitch), r3 = load(src + 3 * src_pitch);
    __m128i lo01 = _mm_unpacklo_epi32(r0, r1), hi01 = _mm_unpackhi_epi32(r0, r1);
    __m128i lo23 = _mm_unpacklo_epi32(r2, r3), hi23 = _mm_unpackhi_epi32(r2, r3);
    store(dst, _mm_unpacklo_epi64(lo01, lo23));
    store(dst + dst_pitch, _mm_unpackhi_epi64(lo01, lo23));
    store(dst + 2 * dst_pitch, _mm_unpacklo_epi64(hi01, hi23));
    store(dst + 3 * dst_pitch, _mm_unpackhi_epi64(hi01, hi23));
}

/* A tile made of `step` x `step` fast squares, rims by the plain loop. */
#define DEFINE_TILE(size, step)                                                                    \
    static void tile_##size(uint8_t *dst, int64_t dst_pitch, const uint8_t *src,                   \
                            int64_t src_pitch, uint64_t na, uint64_t nb)                           \
    {                                                                                              \
        uint64_t fast_na = na - na % (step), fast_nb = nb - nb % (step);                           \
        for (uint64_t a = 0; a < fast_na; a += (step)) {                                           \
            for (uint64_t b = 0; b < fast_nb; b += (step)) {                                       \
                fast_##size(dst + (int64_t)b * dst_pitch + a * (size), dst_pitch,                  \
                            src + (int64_t)a * src_pitch + b * (size), src_pitch);                 \
            }                                                                                      \
        }                                                                                          \
        if (fast_na < na) {                                                                        \
            plain_##size(dst + fast_na * (size), dst_pitch, src + (int64_t)fast_na * src_pitch,    \
                         src_pitch, na - fast_na, nb);                                             \
        }                                                                                          \
        if (fast_nb < nb) {                                                                        \
            plain_##size(dst + (int64_t)fast_nb * dst_pitch, dst_pitch, src + fast_nb * (size),    \
                         src_pitch, fast_na, nb - fast_nb);                                        \
        }                                                                                          \
    }

DEFINE_TILE(1, 8)
DEFINE_TILE(2, 8)
DEFINE_TILE(4, 4)
#else
#define tile_1 plain_1
#define tile_2 plain_2
#define tile_4 plain_4
#endif
#define tile_8 plain_8
#define tile_16 plain_16

/* Elements on a side of a tile: two cache lines of each row, so that the line which an unaligned
 * row splits is still there for the next tile. */
enum { TILE_ROW_BYTES = 128, TILE_LEAST = 16 };

typedef void (*tile_fn)(uint8_t *dst, int64_t dst_pitch, const uint8_t *src, int64_t src_pitch,
                        uint64_t na, uint64_t nb);

static tile_fn
tile_of(uint32_t item_bytes)
{
    switch (item_bytes) {
    case 1:
        return tile_1;
    case 2:
        return tile_2;
    case 4:
        return tile_4;
    case 8:
        return tile_8;
    default:
        return tile_16;
    }
}

void
dcp_box_transpose(uint8_t *dst, int64_t dst_pitch, const uint8_t *src, int64_t src_pitch,
                  uint64_t na, uint64_t nb, uint32_t item_bytes)
{
    DCP_ASSERT(item_bytes > 0 && item_bytes <= 16 && (item_bytes & (item_bytes - 1)) == 0);
    tile_fn tile = tile_of(item_bytes);
    uint64_t step = dcp_max_u64(TILE_ROW_BYTES / item_bytes, TILE_LEAST);
    for (uint64_t b = 0; b < nb; b += step) {
        uint64_t tile_nb = dcp_min_u64(step, nb - b);
        for (uint64_t a = 0; a < na; a += step) {
            tile(dst + (int64_t)b * dst_pitch + a * item_bytes, dst_pitch,
                 src + (int64_t)a * src_pitch + b * item_bytes, src_pitch,
                 dcp_min_u64(step, na - a), tile_nb);
        }
    }
}

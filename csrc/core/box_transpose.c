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

/* 16 x 16 bytes: four rounds of interleaving row i with row i + 8. */
static void
fast_1(uint8_t *dst, int64_t dst_pitch, const uint8_t *src, int64_t src_pitch)
{
    __m128i x[16], y[16];
    for (int i = 0; i < 16; i++) {
        x[i] = load(src + i * src_pitch);
    }
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
            y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
        }
        memcpy(x, y, sizeof x);
    }
    for (int i = 0; i < 16; i++) {
        store(dst + i * dst_pitch, x[i]);
    }
}

/* 8 x 8 elements of 2 bytes: three rounds of interleaving row i with row i + 4. */
static void
fast_2(uint8_t *dst, int64_t dst_pitch, const uint8_t *src, int64_t src_pitch)
{
    __m128i x[8], y[8];
    for (int i = 0; i < 8; i++) {
        x[i] = load(src + i * src_pitch);
    }
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 4; i++) {
            y[2 * i] = _mm_unpacklo_epi16(x[i], x[i + 4]);
            y[2 * i + 1] = _mm_unpackhi_epi16(x[i], x[i + 4]);
        }
        memcpy(x, y, sizeof x);
    }
    for (int i = 0; i < 8; i++) {
        store(dst + i * dst_pitch, x[i]);
    }
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

DEFINE_TILE(1, 16)
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

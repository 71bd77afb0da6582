/*
 * hash.c: 64- and 128-bit hashes of names and plans, and random bytes.
 *
 * Sixteen input bytes a step go through one 64x64 -> 128-bit multiplication whose halves are
 * folded together; such a product spreads every input bit over the whole word.  The inputs are
 * also added back to the state, because a factor that happens to be zero would otherwise erase
 * what came before.  The 128-bit form runs two such lanes with the words in exchanged places: a
 * pair of inputs that collides in one lane has no reason to collide in the other.  Words are read
 * little endian, so that ranks on different machines agree.
 *
 * Threads: no state.
 */
#include "dcp_hash.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>

/* Odd numbers with about half of their bits set; any such would do.  Changing one changes every
 * stored fingerprint. */
#define K0 UINT64_C(0x9c3b17a5e4d2687b)
#define K1 UINT64_C(0xd1b54a32d192ed03)
#define K2 UINT64_C(0x8bb84b93962eacc9)
#define K3 UINT64_C(0x4b33a62ed433d4a3)

static inline uint64_t
read64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap64(v);
#endif
    return v;
}

static inline uint64_t
read32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap32(v);
#endif
    return v;
}

static inline uint64_t
rotate_left(uint64_t v, unsigned n)
{
    return (v << n) | (v >> (64 - n));
}

static inline uint64_t
fold(uint64_t a, uint64_t b)
{
    __extension__ unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* The last 0..16 bytes as two words.  Words may overlap; the length is hashed too, so that no two
 * inputs of different length give the same words and length. */
static inline void
read_tail(const uint8_t *p, size_t n, uint64_t *ret_a, uint64_t *ret_b)
{
    if (n >= 8) {
        *ret_a = read64(p);
        *ret_b = read64(p + n - 8);
    } else if (n >= 4) {
        *ret_a = read32(p);
        *ret_b = read32(p + n - 4);
    } else if (n > 0) {
        *ret_a = (uint64_t)p[0] << 16 | (uint64_t)p[n / 2] << 8 | p[n - 1];
        *ret_b = 0;
    } else {
        *ret_a = 0;
        *ret_b = 0;
    }
}

static inline uint64_t
step(uint64_t state, uint64_t a, uint64_t b, uint64_t k)
{
    return fold(state ^ a, b ^ k) + rotate_left(a, 23) + b;
}

uint64_t
dcp_hash64(const void *data, size_t len, uint64_t seed)
{
    const uint8_t *p = data;
    size_t left = len;
    uint64_t state = fold(seed ^ K0, K1 ^ (uint64_t)len);
    uint64_t a, b;
    for (; left > 16; p += 16, left -= 16) {
        state = step(state, read64(p), read64(p + 8), K2);
    }
    read_tail(p, left, &a, &b);
    state = step(state, a, b, K3);
    return fold(state ^ K1, rotate_left(state, 32) + K0);
}

struct dcp_hash128
dcp_hash128(const void *data, size_t len, uint64_t seed)
{
    const uint8_t *p = data;
    size_t left = len;
    uint64_t x = fold(seed ^ K0, K1 ^ (uint64_t)len);
    uint64_t y = fold(seed + K2, K3 + (uint64_t)len);
    uint64_t a, b;
    for (; left > 16; p += 16, left -= 16) {
        a = read64(p);
        b = read64(p + 8);
        x = step(x, a, b, K2);
        y = step(y, b, a, K0);
    }
    read_tail(p, left, &a, &b);
    x = step(x, a, b, K3);
    y = step(y, b, a, K1);
    return (struct dcp_hash128){
        .lo = fold(x ^ K1, rotate_left(y, 32) + K0),
        .hi = fold(y ^ K3, rotate_left(x, 29) + K2),
    };
}

int
dcp_random_bytes(void *out, size_t len)
{
    uint8_t *at = out;
    while (len > 0) {
        ssize_t got = getrandom(at, len, 0);
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            return -errno;
        }
        at += got;
        len -= (size_t)got;
    }
    return 0;
}

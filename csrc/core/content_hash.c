/*
 * content_hash.c: the 128-bit content hash that decides whether a tensor is unchanged.
 *
 * A tensor that is wrongly called unchanged is lost without a trace, so the hash is one whose
 * collisions are counted by a proof, not by trust in mixing, and which runs at the speed of
 * memory, because every byte of a state dict goes through it.  Two levels:
 *
 *   1. Blocks of 4096 bytes, the last one filled up with zeros to a multiple of 64.  Each gives
 *      four sums s_0..s_3 by NH (UMAC, Black, Halevi, Krawczyk, Krovetz, Rogaway 1999) on pairs of
 *      32-bit words (a, b): s_p = sum over pairs i of (a_i + ka_(i+8p)) * (b_i + kb_(i+8p)),
 * factors mod 2^32, sum mod 2^64.  The keys of the four passes are one string, shifted by a stripe
 * of eight pairs each (Toeplitz).
 *   2. A polynomial over the field of p = 2^127 - 1 at a fixed random point x:
 *          h = 1;  per block:  h = (h + s_0 + 2^64 s_1) x;  h = (h + s_2 + 2^64 s_3) x;
 *          at the end:  h = (h + length in bytes) x.
 *      The result is h, below p: lo and hi are its halves.
 *
 * Bound, over the choice of the keys, for two different contents of at most n blocks each:
 *   - Lengths differ: the polynomials differ in the coefficient of x^1, so they agree on at most
 *     2n + 1 of the p points.
 *   - Lengths are equal: some block differs.  NH with Toeplitz keys is
 * 2^-128-almost-delta-universal on equal lengths: any given four differences of sums come with
 * probability 2^-128 at most. (The last differing pair meets keys in pass p that no differing pair
 * met in an earlier pass.) Two values below 2^128 are equal mod p when they differ by 0, p, 2p or
 * their negatives, and each of these five fits two pairs of differences of (s_0, s_1), by the
 * borrow between them. So this block's coefficients are both equal with probability 100 * 2^-128 at
 * most, and else the polynomials agree on at most 2n + 1 points. Together (2n + 1) / p + 2^-121:
 * 2^-105 for 4 GiB, 2^-100 for 128 GiB, 2^-97 for 1 TiB. The keys are fixed, so this speaks of
 * contents that were not made from them: enough for training, which does not forge collisions, and
 * no protection from somebody who does.
 *
 * Words are little endian everywhere.  Keys: SplitMix64 (Steele, Lea, Flood 2014) started at
 * KEY_SEED gives CONTENT_KEYS numbers, each a pair (ka low half, kb high half), then x: low half,
 * high half, its top bit cleared.  All of this is part of the file format.
 *
 * Threads: pthread_once guards keys and choice; dcp_content_hash_force is for single-threaded
 * tests and benchmarks.
 */
#include "content_hash_impl.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "le_bytes.h"

#define KEY_SEED UINT64_C(0x6463705f68617368) /* "dcp_hash" */

__extension__ typedef unsigned __int128 uint128;

/* An element of the field, below 2^127 - 1. */
#define FIELD_PRIME (((uint128)1 << 127) - 1)

static _Alignas(CONTENT_STRIPE_BYTES) uint64_t block_keys[CONTENT_KEYS];
static uint128 point;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Atomic(const struct content_impl *) chosen;

/* ---- level 1 ---- */

static void
portable_sums(const uint64_t *keys, const uint8_t *data, size_t stripes,
              uint64_t ret_sums[CONTENT_PASSES])
{
    uint64_t sums[CONTENT_PASSES][CONTENT_STRIPE_WORDS] = {{0}};
    for (size_t s = 0; s < stripes; s++) {
        uint64_t words[CONTENT_STRIPE_WORDS];
        for (size_t i = 0; i < CONTENT_STRIPE_WORDS; i++) {
            words[i] = le_get64(data + 8 * i);
        }
        for (size_t pass = 0; pass < CONTENT_PASSES; pass++) {
            const uint64_t *key = keys + pass * CONTENT_STRIPE_WORDS;
            for (size_t i = 0; i < CONTENT_STRIPE_WORDS; i++) {
                uint32_t a = (uint32_t)words[i] + (uint32_t)key[i];
                uint32_t b = (uint32_t)(words[i] >> 32) + (uint32_t)(key[i] >> 32);
                sums[pass][i] += (uint64_t)a * b;
            }
        }
        data += CONTENT_STRIPE_BYTES;
        keys += CONTENT_STRIPE_WORDS;
    }
    for (size_t pass = 0; pass < CONTENT_PASSES; pass++) {
        ret_sums[pass] = 0;
        for (size_t i = 0; i < CONTENT_STRIPE_WORDS; i++) {
            ret_sums[pass] += sums[pass][i];
        }
    }
}

static const struct content_impl portable = {.name = "portable", .sums = portable_sums};

/* ---- level 2 ---- */

/* Any 128-bit number into the field: 2^127 is 1 there. */
static inline uint128
field_reduce(uint128 v)
{
    v = (v & FIELD_PRIME) + (v >> 127);
    return v >= FIELD_PRIME ? v - FIELD_PRIME : v;
}

/* Both factors below 2^127. */
static inline uint128
field_multiply(uint128 a, uint128 b)
{
    uint64_t a_lo = (uint64_t)a, a_hi = (uint64_t)(a >> 64);
    uint64_t b_lo = (uint64_t)b, b_hi = (uint64_t)(b >> 64);
    uint128 middle = (uint128)a_lo * b_hi + (uint128)a_hi * b_lo; /* both below 2^127 */
    uint128 low = (uint128)a_lo * b_lo;
    uint128 sum = low + (middle << 64);
    uint128 high = (uint128)a_hi * b_hi + (middle >> 64) + (sum < low); /* below 2^126 */
    return field_reduce((sum & FIELD_PRIME) + ((high << 1) | (sum >> 127)));
}

/* h = (h + v) x */
static inline uint128
polynomial_step(uint128 h, uint64_t lo, uint64_t hi)
{
    uint128 v = (uint128)hi << 64 | lo;
    return field_multiply(field_reduce(h + field_reduce(v)), point);
}

static uint128
add_block(const struct content_impl *impl, uint128 h, const uint8_t *data, size_t stripes)
{
    uint64_t sums[CONTENT_PASSES];
    impl->sums(block_keys, data, stripes, sums);
    h = polynomial_step(h, sums[0], sums[1]);
    return polynomial_step(h, sums[2], sums[3]);
}

/* ---- keys and choice ---- */

static uint64_t
splitmix64(uint64_t *state)
{
    *state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static void
set_up(void)
{
    uint64_t state = KEY_SEED;
    for (size_t i = 0; i < CONTENT_KEYS; i++) {
        block_keys[i] = splitmix64(&state);
    }
    uint64_t lo = splitmix64(&state);
    point = (uint128)(splitmix64(&state) >> 1) << 64 | lo;
    const struct content_impl *best = content_x86_implementations()[0];
    atomic_store_explicit(&chosen, best != NULL ? best : &portable, memory_order_release);
}

static inline const struct content_impl *
implementation(void)
{
    const struct content_impl *impl = atomic_load_explicit(&chosen, memory_order_acquire);
    if (__builtin_expect(impl == NULL, 0)) {
        (void)pthread_once(&once, set_up);
        impl = atomic_load_explicit(&chosen, memory_order_acquire);
    }
    return impl;
}

/* ---- public ---- */

void
dcp_content_hash_begin(struct dcp_content_hash *state)
{
    state->length_bytes = 0;
    state->lo = 1;
    state->hi = 0;
}

void
dcp_content_hash_add(struct dcp_content_hash *state, const void *data, size_t len)
{
    const struct content_impl *impl = implementation();
    const uint8_t *at = data;
    size_t pending = (size_t)(state->length_bytes % DCP_CONTENT_BLOCK_BYTES);
    uint128 h = (uint128)state->hi << 64 | state->lo;
    state->length_bytes += len;
    if (pending > 0 && len >= DCP_CONTENT_BLOCK_BYTES - pending) {
        size_t n = DCP_CONTENT_BLOCK_BYTES - pending;
        memcpy(state->block + pending, at, n);
        h = add_block(impl, h, state->block, CONTENT_STRIPES);
        at += n;
        len -= n;
        pending = 0;
    }
    for (; pending == 0 && len >= DCP_CONTENT_BLOCK_BYTES; len -= DCP_CONTENT_BLOCK_BYTES) {
        h = add_block(impl, h, at, CONTENT_STRIPES);
        at += DCP_CONTENT_BLOCK_BYTES;
    }
    if (len > 0) {
        memcpy(state->block + pending, at, len);
    }
    state->lo = (uint64_t)h;
    state->hi = (uint64_t)(h >> 64);
}

struct dcp_hash128
dcp_content_hash_end(const struct dcp_content_hash *state)
{
    const struct content_impl *impl = implementation();
    size_t pending = (size_t)(state->length_bytes % DCP_CONTENT_BLOCK_BYTES);
    uint128 h = (uint128)state->hi << 64 | state->lo;
    if (pending > 0) {
        uint8_t last[DCP_CONTENT_BLOCK_BYTES];
        size_t stripes = (pending + CONTENT_STRIPE_BYTES - 1) / CONTENT_STRIPE_BYTES;
        memcpy(last, state->block, pending);
        memset(last + pending, 0, stripes * CONTENT_STRIPE_BYTES - pending);
        h = add_block(impl, h, last, stripes);
    }
    h = polynomial_step(h, state->length_bytes, 0);
    return (struct dcp_hash128){.lo = (uint64_t)h, .hi = (uint64_t)(h >> 64)};
}

struct dcp_hash128
dcp_content_hash_of(const void *data, size_t len)
{
    struct dcp_content_hash state;
    dcp_content_hash_begin(&state);
    dcp_content_hash_add(&state, data, len);
    return dcp_content_hash_end(&state);
}

const char *
dcp_content_hash_implementation(void)
{
    return implementation()->name;
}

bool
dcp_content_hash_force(const char *name)
{
    (void)implementation();
    const struct content_impl *found = strcmp(name, portable.name) == 0 ? &portable : NULL;
    for (const struct content_impl *const *at = content_x86_implementations(); *at != NULL; at++) {
        if (strcmp(name, (*at)->name) == 0) {
            found = *at;
        }
    }
    if (found != NULL) {
        atomic_store_explicit(&chosen, found, memory_order_release);
    }
    return found != NULL;
}

/*
 * crc32.c: zip's CRC32: the choice of implementation, the portable one, and combination.
 *
 * The implementation is chosen once, at the first call.  The portable code slices 16 bytes a step
 * through 16 tables (16 KiB, built at that first call too); it also serves the vector code for
 * inputs under 16 bytes.
 *
 * Combination: appending len_b bytes multiplies the polynomial of A by x^(8 len_b) mod P.  With
 * x^(2^k) for k = 0..31 at hand that takes one product per bit of the length: 1 for a 1 MiB block,
 * about 60 ns.  The table wraps because x^(2^32) = x mod P.
 *
 * Threads: pthread_once guards tables and choice; dcp_crc32_force is for single-threaded tests and
 * benchmarks.
 */
#include "crc32_impl.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define POLY_REFLECTED UINT32_C(0xEDB88320)

enum {
    SLICES = 16,
    /* Small enough that the second pass of the portable copy finds the bytes in the L1 cache. */
    PORTABLE_COPY_BYTES = 8 << 10,
};

static uint32_t slice_tables[SLICES][256];
static uint32_t power_table[32]; /* x^(2^k) mod P, reflected */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Atomic(const struct crc32_impl *) chosen;

static inline uint32_t
load32_le(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap32(v);
#endif
    return v;
}

static inline uint32_t
slice_word(uint32_t word, int first_slice)
{
    return slice_tables[first_slice][word & 0xff] ^
           slice_tables[first_slice - 1][(word >> 8) & 0xff] ^
           slice_tables[first_slice - 2][(word >> 16) & 0xff] ^
           slice_tables[first_slice - 3][word >> 24];
}

uint32_t
crc32_portable_update(uint32_t reg, const uint8_t *src, size_t len)
{
    for (; len >= SLICES; src += SLICES, len -= SLICES) {
        reg = slice_word(load32_le(src) ^ reg, 15) ^ slice_word(load32_le(src + 4), 11) ^
              slice_word(load32_le(src + 8), 7) ^ slice_word(load32_le(src + 12), 3);
    }
    for (; len >= 4; src += 4, len -= 4) {
        reg = slice_word(load32_le(src) ^ reg, 3);
    }
    for (; len > 0; src++, len--) {
        reg = (reg >> 8) ^ slice_tables[0][(reg ^ *src) & 0xff];
    }
    return reg;
}

static uint32_t
portable_copy(uint32_t reg, uint8_t *dst, const uint8_t *src, size_t len, bool streaming)
{
    (void)streaming;
    while (len > 0) {
        size_t n = len < PORTABLE_COPY_BYTES ? len : PORTABLE_COPY_BYTES;
        memcpy(dst, src, n);
        reg = crc32_portable_update(reg, src, n);
        dst += n;
        src += n;
        len -= n;
    }
    return reg;
}

static const struct crc32_impl portable = {
    .name = "portable",
    .update = crc32_portable_update,
    .copy = portable_copy,
};

/* a * b mod P.  Bit 31 of a reflected polynomial is the coefficient of x^0. */
static uint32_t
multiply_mod(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (int i = 0; i < 32; i++) {
        product ^= b & (0 - (a >> 31));
        a <<= 1;
        b = (b >> 1) ^ (POLY_REFLECTED & (0 - (b & 1)));
    }
    return product;
}

static void
set_up(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t reg = byte;
        for (int bit = 0; bit < 8; bit++) {
            reg = (reg >> 1) ^ (POLY_REFLECTED & (0 - (reg & 1)));
        }
        slice_tables[0][byte] = reg;
    }
    for (int slice = 1; slice < SLICES; slice++) {
        for (int byte = 0; byte < 256; byte++) {
            uint32_t reg = slice_tables[slice - 1][byte];
            slice_tables[slice][byte] = (reg >> 8) ^ slice_tables[0][reg & 0xff];
        }
    }
    power_table[0] = UINT32_C(1) << 30; /* x */
    for (int k = 1; k < 32; k++) {
        power_table[k] = multiply_mod(power_table[k - 1], power_table[k - 1]);
    }
    const struct crc32_impl *best = crc32_x86_implementations()[0];
    atomic_store_explicit(&chosen, best != NULL ? best : &portable, memory_order_release);
}

static inline const struct crc32_impl *
implementation(void)
{
    const struct crc32_impl *impl = atomic_load_explicit(&chosen, memory_order_acquire);
    if (__builtin_expect(impl == NULL, 0)) {
        (void)pthread_once(&once, set_up);
        impl = atomic_load_explicit(&chosen, memory_order_acquire);
    }
    return impl;
}

uint32_t
dcp_crc32(uint32_t crc, const void *data, size_t len)
{
    const struct crc32_impl *impl = implementation();
    return len == 0 ? crc : ~impl->update(~crc, data, len);
}

uint32_t
dcp_crc32_copy(uint32_t crc, void *dst, const void *src, size_t len, bool streaming)
{
    DCP_ASSERT((const uint8_t *)src + len <= (uint8_t *)dst ||
               (const uint8_t *)dst + len <= (const uint8_t *)src);
    const struct crc32_impl *impl = implementation();
    return len == 0 ? crc : ~impl->copy(~crc, dst, src, len, streaming);
}

uint32_t
dcp_crc32_combine(uint32_t crc_a, uint32_t crc_b, uint64_t len_b)
{
    (void)implementation();
    uint32_t factor = UINT32_C(1) << 31; /* x^0 */
    bool is_one = true;
    /* Bit i of the byte count stands for 2^(i + 3) bits. */
    for (unsigned k = 3; len_b != 0; k++, len_b >>= 1) {
        if ((len_b & 1) != 0) {
            factor = is_one ? power_table[k % 32] : multiply_mod(power_table[k % 32], factor);
            is_one = false;
        }
    }
    return (is_one ? crc_a : multiply_mod(factor, crc_a)) ^ crc_b;
}

const char *
dcp_crc32_implementation(void)
{
    return implementation()->name;
}

bool
dcp_crc32_force(const char *name)
{
    (void)implementation();
    const struct crc32_impl *found = strcmp(name, portable.name) == 0 ? &portable : NULL;
    for (const struct crc32_impl *const *at = crc32_x86_implementations(); *at != NULL; at++) {
        if (strcmp(name, (*at)->name) == 0) {
            found = *at;
        }
    }
    if (found != NULL) {
        atomic_store_explicit(&chosen, found, memory_order_release);
    }
    return found != NULL;
}

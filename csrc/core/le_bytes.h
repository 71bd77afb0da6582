/*
 * le_bytes.h: little-endian numbers at raw addresses, for encoders that counted their bytes first.
 *
 * A tail is written for each of tens of thousands of small records, so its writer reserves once
 * and then stores without checks.  Every function returns the address behind what it wrote.
 */
#ifndef LE_BYTES_H
#define LE_BYTES_H

#include <string.h>

#include "dcp_common.h"

static inline uint8_t *
le_put8(uint8_t *at, uint8_t v)
{
    *at = v;
    return at + 1;
}

static inline uint8_t *
le_put16(uint8_t *at, uint16_t v)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap16(v);
#endif
    memcpy(at, &v, sizeof v);
    return at + sizeof v;
}

static inline uint8_t *
le_put32(uint8_t *at, uint32_t v)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap32(v);
#endif
    memcpy(at, &v, sizeof v);
    return at + sizeof v;
}

static inline uint8_t *
le_put64(uint8_t *at, uint64_t v)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap64(v);
#endif
    memcpy(at, &v, sizeof v);
    return at + sizeof v;
}

static inline uint8_t *
le_put_bytes(uint8_t *at, const void *bytes, size_t n)
{
    memcpy(at, bytes, n);
    return at + n;
}

static inline uint32_t
le_get32(const uint8_t *at)
{
    uint32_t v;
    memcpy(&v, at, sizeof v);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap32(v);
#endif
    return v;
}

static inline uint64_t
le_get64(const uint8_t *at)
{
    uint64_t v;
    memcpy(&v, at, sizeof v);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    v = __builtin_bswap64(v);
#endif
    return v;
}

#endif

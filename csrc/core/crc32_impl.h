/*
 * crc32_impl.h: what crc32.c (choice, portable code, combination) and crc32_x86.c share.
 */
#ifndef CRC32_IMPL_H
#define CRC32_IMPL_H

#include "dcp_crc32.h"

struct crc32_impl {
    const char *name;
    /* Both work on the register itself, which zip inverts before the first and after the last
     * byte. */
    uint32_t (*update)(uint32_t reg, const uint8_t *src, size_t len);
    uint32_t (*copy)(uint32_t reg, uint8_t *dst, const uint8_t *src, size_t len, bool streaming);
};

/* Any length, no alignment; the tables must have been built (dcp_crc32 and its like see to it). */
uint32_t crc32_portable_update(uint32_t reg, const uint8_t *src, size_t len);

/* The implementations that this processor and its operating system can run, best first; NULL ends
 * the list. */
const struct crc32_impl *const *crc32_x86_implementations(void);

#endif

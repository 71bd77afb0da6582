/*
 * dcp_crc32.h: zip's CRC32 (polynomial 0xEDB88320), alone and fused with a copy.
 *
 * The best of VPCLMULQDQ, PCLMULQDQ and a portable table is chosen once at run time.  Thread safe.
 */
#ifndef DCP_CRC32_H
#define DCP_CRC32_H

#include "dcp_common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Continues `crc` (0 at the start) over `len` bytes; the same numbers as zlib's crc32(). */
uint32_t dcp_crc32(uint32_t crc, const void *data, size_t len);

/* Copies `len` bytes and returns the continued CRC of them, reading the source once.  The regions
 * do not overlap. `streaming` asks for stores that bypass the cache: for destinations much larger
 * than the cache. */
uint32_t dcp_crc32_copy(uint32_t crc, void *dst, const void *src, size_t len, bool streaming);

/* The CRC of A followed by B, from those of A and B and the length of B in bytes. */
uint32_t dcp_crc32_combine(uint32_t crc_a, uint32_t crc_b, uint64_t len_b);

/* Which implementation runs: "vpclmulqdq-512", "vpclmulqdq", "pclmulqdq", "portable". */
const char *dcp_crc32_implementation(void);
/* Tests and benchmarks: force one of them by name; false when this processor lacks it. */
bool dcp_crc32_force(const char *implementation);

#ifdef __cplusplus
}
#endif
#endif

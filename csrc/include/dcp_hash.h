/*
 * dcp_hash.h: hashes of names and plans.  Not cryptographic; equal input gives equal output on
 * every machine.
 */
#ifndef DCP_HASH_H
#define DCP_HASH_H

#include "dcp_common.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dcp_hash128 {
    uint64_t lo, hi;
};

uint64_t dcp_hash64(const void *data, size_t len, uint64_t seed);
struct dcp_hash128 dcp_hash128(const void *data, size_t len, uint64_t seed);

/* Bytes of the operating system's random source; 0 or -errno. */
int dcp_random_bytes(void *out, size_t len);

#ifdef __cplusplus
}
#endif
#endif

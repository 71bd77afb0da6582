/*
 * dcp_hash.h: hashes of names, plans and contents.  Not cryptographic; equal input gives equal
 * output on every machine.
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

/* ---- content: what decides that a tensor is unchanged since an earlier save ---- */

/* Two contents that nobody chose with the fixed keys in hand collide with a probability below
 * 2^-100 up to 128 GiB each (content_hash.c has the proof).  Part of the file format: never
 * changes. */
enum { DCP_CONTENT_BLOCK_BYTES = 4096 };

/* A content that comes in pieces; how it is cut does not matter.  Owns nothing. */
struct dcp_content_hash {
    uint64_t length_bytes;                  /* so far */
    uint64_t lo, hi;                        /* of all whole blocks but those in `block` */
    uint8_t block[DCP_CONTENT_BLOCK_BYTES]; /* the last length_bytes % DCP_CONTENT_BLOCK_BYTES */
};

void dcp_content_hash_begin(struct dcp_content_hash *state);
void dcp_content_hash_add(struct dcp_content_hash *state, const void *data, size_t len);
/* Does not change the state: adding may go on. */
struct dcp_hash128 dcp_content_hash_end(const struct dcp_content_hash *state);
/* The same in one call. */
struct dcp_hash128 dcp_content_hash_of(const void *data, size_t len);

/* Which implementation runs: "avx512", "avx2", "portable".  All give the same hashes. */
const char *dcp_content_hash_implementation(void);
/* Tests and benchmarks: force one of them by name; false when this processor lacks it. */
bool dcp_content_hash_force(const char *implementation);

static inline bool
dcp_hash128_equal(struct dcp_hash128 a, struct dcp_hash128 b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

/* ---- random ---- */

/* Bytes of the operating system's random source; 0 or -errno. */
int dcp_random_bytes(void *out, size_t len);

#ifdef __cplusplus
}
#endif
#endif

/*
 * content_hash_impl.h: what content_hash.c (keys, polynomial, streaming, the portable sums) and
 * content_hash_x86.c (the sums in vectors) share.
 */
#ifndef CONTENT_HASH_IMPL_H
#define CONTENT_HASH_IMPL_H

#include "dcp_hash.h"

enum {
    CONTENT_STRIPE_BYTES = 64, /* one vector of AVX-512 */
    CONTENT_STRIPE_WORDS = CONTENT_STRIPE_BYTES / 8,
    CONTENT_PASSES = 4,
    CONTENT_STRIPES = DCP_CONTENT_BLOCK_BYTES / CONTENT_STRIPE_BYTES,
    /* Pass p works with the keys of pass 0, p stripes on. */
    CONTENT_KEYS = (CONTENT_STRIPES + CONTENT_PASSES - 1) * CONTENT_STRIPE_WORDS,
};

struct content_impl {
    const char *name;
    /* The four sums of up to CONTENT_STRIPES stripes.  `keys` is on a multiple of
     * CONTENT_STRIPE_BYTES, `data` anywhere. */
    void (*sums)(const uint64_t *keys, const uint8_t *data, size_t stripes,
                 uint64_t ret_sums[CONTENT_PASSES]);
};

/* The implementations that this processor and its operating system can run, best first; NULL ends
 * the list. */
const struct content_impl *const *content_x86_implementations(void);

#endif

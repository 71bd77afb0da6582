/*
 * split.h: replicated tensors that are divided by rows over their holders (private to the core).
 */
#ifndef DCP_CORE_SPLIT_H
#define DCP_CORE_SPLIT_H

#include "dedup.h"

struct split_cut {
    uint32_t plan;
    struct dcp_cut cut;
};

/* A holder and what it keeps so far. */
struct split_share {
    uint64_t load_bytes;
    uint32_t holder; /* of the key's */
};

/* Zero-initialised is valid: nothing is divided. */
struct split {
    uint64_t part_bytes;  /* smallest part */
    uint64_t limit_bytes; /* a rank that stays within this takes a tensor whole */
    uint64_t mean_bytes;  /* of what all ranks write; 0: as many parts as can be */
    uint32_t *candidates; /* owned: keys that can be divided, in dedup's order; deferred first */
    uint32_t candidates_count, looked_at_count, deferred_count;
    struct split_share *shares; /* owned: room for the holders of any candidate */
    struct split_cut *cuts;     /* owned */
    uint32_t cuts_count, cuts_cap;
};

/* Finds what can be divided; after ranks keep what they alone hold. */
int split_prepare(struct split *s, const struct dedup *d, uint64_t split_bytes,
                  struct dcp_error *err) DCP_MUST_CHECK;
/* Whether `key` is left for split_pour.  Asked of every key of dedup's order; `load_bytes`: of the
 * holder that would take it whole. */
bool split_defers(struct split *s, const struct dedup *d, uint32_t key, uint64_t load_bytes);
/* Divides what was deferred and fills keep->cuts. */
int split_pour(struct split *s, struct dedup *d, struct dcp_keep *keep,
               struct dcp_error *err) DCP_MUST_CHECK;
void split_clean_up(struct split *s);

#endif

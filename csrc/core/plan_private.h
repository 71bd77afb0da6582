/*
 * plan_private.h: what the files of the planner share (private to the core).
 */
#ifndef DCP_CORE_PLAN_PRIVATE_H
#define DCP_CORE_PLAN_PRIVATE_H

#include "dcp_plan.h"

/* Sizes and offsets of torch are signed 64-bit numbers. */
#define DCP_DIM_MAX ((uint64_t)INT64_MAX)

/* A path repeats the text of its name: type and length of a part are what it adds. */
#define DCP_MAX_PATH_BYTES (DCP_MAX_FQN_BYTES + 16u * DCP_MAX_PATH_PARTS)

/* Product of `count` sizes, 0 when one of them is; true when it does not fit. */
static inline bool
dcp_volume_overflows(const uint64_t *sizes, uint32_t count, uint64_t *ret)
{
    uint64_t volume = 1;
    bool overflow = false;
    for (uint32_t d = 0; d < count; d++) {
        if (sizes[d] == 0) {
            *ret = 0;
            return false;
        }
        overflow = dcp_mul_overflows_u64(volume, sizes[d], &volume) || overflow;
    }
    *ret = volume;
    return overflow;
}

/* Bytes of a name that an error text may quote: the first 200, never half a character. */
static inline int
dcp_name_clip(const struct dcp_name *name)
{
    uint32_t len = name->fqn_len;
    if (len > 200) {
        len = 200;
        while (len > 0 && ((uint8_t)name->fqn[len] & 0xC0) == 0x80) {
            len--;
        }
    }
    return (int)len;
}

/* ---- names of all plans, numbered by first appearance; equal text, equal number ---- */

struct dcp_name_ids {
    uint32_t *ids;           /* owned: every plan's names, one plan behind the other */
    uint64_t *first;         /* owned, one per plan: where its names start in `ids` */
    uint32_t distinct_count; /* ids are below this */
};

int dcp_name_ids_build(const struct dcp_plan *plans, uint32_t plans_count,
                       struct dcp_name_ids *ret_ids, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_name_ids_clean_up(struct dcp_name_ids *ids);

/* dcp_plan_dedup for a caller that has numbered the names already. */
int dcp_plan_dedup_named(const struct dcp_plan *plans, uint32_t plans_count,
                         const struct dcp_name_ids *names, bool to_lowest_rank,
                         struct dcp_keep *ret_keep, struct dcp_error *err) DCP_MUST_CHECK;

#endif

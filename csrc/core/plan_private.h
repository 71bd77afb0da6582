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

/* The product; UINT64_MAX when it does not fit. */
static inline uint64_t
dcp_volume_of(const uint64_t *sizes, uint32_t count)
{
    uint64_t volume;
    return dcp_volume_overflows(sizes, count, &volume) ? UINT64_MAX : volume;
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

/* ---- what decides a plan, in two parts ---- */

/* Names and paths, in order; equal on all ranks of most jobs. */
struct dcp_hash128 dcp_plan_names_hash(const struct dcp_plan *plan);
/* dcp_plan_fingerprint for a caller that has hashed the names already. */
struct dcp_hash128 dcp_plan_fingerprint_named(const struct dcp_plan *plan,
                                              const struct dcp_hash128 *names_hash, uint64_t salt);

/* ---- memory of a plan whose size is known, or final ---- */

/* Room for `count` items of a plan that has none. */
int dcp_plan_reserve_items(struct dcp_plan *plan, uint32_t count,
                           struct dcp_error *err) DCP_MUST_CHECK;
/* Gives back the room that growing dimensions took ahead. */
void dcp_plan_trim(struct dcp_plan *plan);

/* ---- codec of a gather, where most ranks' names are known already ---- */

struct dcp_name_tables;

/* As dcp_plan_encode, but in the place of the names stands their hash. */
int dcp_plan_encode_nameless(const struct dcp_plan *plan, const struct dcp_hash128 *names_hash,
                             struct dcp_buf *buf, struct dcp_error *err) DCP_MUST_CHECK;
/* Takes both kinds of image.  The plan's names are a shared table: one of `tables`, or a new one
 * that is added to them.  DCP_E_MISSING: names are left out that `tables` do not have.  The image
 * must stay until the tables are cleaned up. */
int dcp_plan_decode_shared(const uint8_t *data, size_t len, struct dcp_name_tables *tables,
                           struct dcp_plan *ret_plan, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- names of all plans, numbered by first appearance; equal text, equal number ---- */

struct dcp_name_ids {
    uint32_t *ids;           /* owned: names of every plan, of a shared table once */
    uint64_t *first;         /* owned, one per plan: where its names start in `ids` */
    uint32_t distinct_count; /* ids are below this */
};

int dcp_name_ids_build(const struct dcp_plan *plans, uint32_t plans_count,
                       struct dcp_name_ids *ret_ids, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_name_ids_clean_up(struct dcp_name_ids *ids);

/* dcp_plan_dedup for a caller that has numbered the names already; may also cut (split_bytes). */
int dcp_plan_dedup_named(const struct dcp_plan *plans, uint32_t plans_count,
                         const struct dcp_name_ids *names, bool to_lowest_rank,
                         uint64_t split_bytes, struct dcp_keep *ret_keep,
                         struct dcp_error *err) DCP_MUST_CHECK;

#endif

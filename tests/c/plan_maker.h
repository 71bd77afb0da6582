/*
 * plan_maker.h: plans for tests, by hand and at random from a seed.  Failures end the test program.
 */
#ifndef PLAN_MAKER_H
#define PLAN_MAKER_H

#include "dcp_plan.h"

/* splitmix64; every seed is fine. */
struct maker_rng {
    uint64_t state;
};

uint64_t maker_next(struct maker_rng *rng);
/* 0 .. limit - 1 */
uint64_t maker_below(struct maker_rng *rng, uint64_t limit);

/* The name's index; added when the plan lacks it.  The path is the whole fqn as one string. */
uint32_t maker_name(struct dcp_plan *plan, const char *fqn);
void maker_object(struct dcp_plan *plan, const char *fqn, uint64_t slot_bytes);
void maker_tensor(struct dcp_plan *plan, const char *fqn, int dtype, uint32_t ndim,
                  const uint64_t *sizes);
void maker_shard(struct dcp_plan *plan, const char *fqn, int dtype, uint32_t ndim,
                 const uint64_t *global_size, const uint64_t *offsets, const uint64_t *sizes);

/* A shard of a two-dimensional float32 tensor. */
void maker_shard2(struct dcp_plan *plan, const char *fqn, uint64_t rows, uint64_t columns,
                  uint64_t row, uint64_t column, uint64_t height, uint64_t width);

/* Empty plans of ranks 0 .. count - 1, one file each. */
void maker_start_plans(struct dcp_plan *plans, uint32_t count);
void maker_clean_up_plans(struct dcp_plan *plans, uint32_t count);
/* Builds the global plan and forgets it; the message is in *err. */
int maker_build(const struct dcp_plan *plans, uint32_t count, struct dcp_error *err);

/* All kinds of items and names; not valid as part of a global plan. */
void maker_random_plan(struct maker_rng *rng, struct dcp_plan *plan, uint32_t rank,
                       uint32_t items_count);

#endif

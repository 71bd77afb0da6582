/*
 * plan_maker.c: plans for tests, by hand and at random from a seed.
 */
#include "plan_maker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void
must(int rc, const struct dcp_error *err)
{
    if (rc != 0) {
        fprintf(stderr, "plan_maker: %s\n", err->message);
        exit(1);
    }
}

uint64_t
maker_next(struct maker_rng *rng)
{
    uint64_t z = rng->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

uint64_t
maker_below(struct maker_rng *rng, uint64_t limit)
{
    return maker_next(rng) % limit;
}

uint32_t
maker_name(struct dcp_plan *plan, const char *fqn)
{
    struct dcp_error err = {0};
    size_t len = strlen(fqn);
    for (uint32_t i = 0; i < plan->names_count; i++) {
        if (plan->names[i].fqn_len == len && memcmp(plan->names[i].fqn, fqn, len) == 0) {
            return i;
        }
    }
    struct dcp_buf path = {0};
    dcp_path_put_str(&path, fqn, len);
    uint32_t name = 0;
    must(dcp_plan_add_name(plan, fqn, len, path.data, path.len, 1, &name, &err), &err);
    dcp_buf_clean_up(&path);
    return name;
}

void
maker_object(struct dcp_plan *plan, const char *fqn, uint64_t slot_bytes)
{
    struct dcp_error err = {0};
    struct dcp_item item = {
        .name = maker_name(plan, fqn), .kind = DCP_ITEM_BYTES, .slot_bytes = slot_bytes};
    must(dcp_plan_add_item(plan, &item, NULL, NULL, NULL, &err), &err);
}

void
maker_shard(struct dcp_plan *plan, const char *fqn, int dtype, uint32_t ndim,
            const uint64_t *global_size, const uint64_t *offsets, const uint64_t *sizes)
{
    struct dcp_error err = {0};
    struct dcp_item item = {.name = maker_name(plan, fqn),
                            .kind = DCP_ITEM_SHARD,
                            .dtype = (uint8_t)dtype,
                            .ndim = (uint8_t)ndim};
    must(dcp_plan_add_item(plan, &item, global_size, offsets, sizes, &err), &err);
}

void
maker_tensor(struct dcp_plan *plan, const char *fqn, int dtype, uint32_t ndim,
             const uint64_t *sizes)
{
    uint64_t zeros[DCP_MAX_DIMS] = {0};
    maker_shard(plan, fqn, dtype, ndim, sizes, zeros, sizes);
    plan->items[plan->items_count - 1].kind = DCP_ITEM_TENSOR;
}

void
maker_shard2(struct dcp_plan *plan, const char *fqn, uint64_t rows, uint64_t columns, uint64_t row,
             uint64_t column, uint64_t height, uint64_t width)
{
    uint64_t size[] = {rows, columns}, offsets[] = {row, column}, sizes[] = {height, width};
    maker_shard(plan, fqn, DCP_DTYPE_FLOAT32, 2, size, offsets, sizes);
}

void
maker_start_plans(struct dcp_plan *plans, uint32_t count)
{
    for (uint32_t p = 0; p < count; p++) {
        plans[p] = (struct dcp_plan){.rank = p, .thread_count = 1, .single_file_per_rank = true};
    }
}

void
maker_clean_up_plans(struct dcp_plan *plans, uint32_t count)
{
    for (uint32_t p = 0; p < count; p++) {
        dcp_plan_clean_up(&plans[p]);
    }
}

int
maker_build(const struct dcp_plan *plans, uint32_t count, struct dcp_error *err)
{
    struct dcp_global_plan global;
    *err = (struct dcp_error){0};
    int rc = dcp_global_plan_build(plans, count, false, &global, err);
    if (rc == 0) {
        dcp_global_plan_clean_up(&global);
    }
    return rc;
}

static void
random_name(struct maker_rng *rng, struct dcp_plan *plan)
{
    static const char *const words[] = {"model", "layers", "weight", "a.b", "", "\xC3\xA9t\xC3\xA9",
                                        "optim", "state"};
    struct dcp_error err = {0};
    struct dcp_buf path = {0};
    struct dcp_buf fqn = {0};
    uint32_t parts = (uint32_t)maker_below(rng, 5);
    char text[64];
    for (uint32_t i = 0; i < parts; i++) {
        if (maker_below(rng, 3) == 0) {
            uint64_t index = maker_next(rng) >> maker_below(rng, 64);
            snprintf(text, sizeof text, "%llu", (unsigned long long)index);
            dcp_path_put_int(&path, index);
        } else {
            snprintf(text, sizeof text, "%s", words[maker_below(rng, 8)]);
            dcp_path_put_str(&path, text, strlen(text));
        }
        dcp_buf_put(&fqn, ".", i != 0);
        dcp_buf_put(&fqn, text, strlen(text));
    }
    if (maker_below(rng, 8) == 0) {
        dcp_buf_put(&fqn, "?", 1); /* a name that is not its path joined by dots */
    }
    bool has_path = maker_below(rng, 8) != 0;
    uint32_t name;
    must(dcp_plan_add_name(plan, (const char *)fqn.data, fqn.len,
                           !has_path           ? NULL
                           : path.data == NULL ? (const uint8_t *)""
                                               : path.data,
                           has_path ? path.len : 0, has_path ? parts : 0, &name, &err),
         &err);
    dcp_buf_clean_up(&path);
    dcp_buf_clean_up(&fqn);
}

static void
random_item(struct maker_rng *rng, struct dcp_plan *plan, uint32_t index)
{
    struct dcp_error err = {0};
    uint64_t global_size[DCP_MAX_DIMS], offsets[DCP_MAX_DIMS], sizes[DCP_MAX_DIMS];
    struct dcp_item item = {.name = index % plan->names_count,
                            .kind = (uint8_t)(1 + maker_below(rng, 3))};
    if (maker_below(rng, 4) == 0) {
        item.name = (uint32_t)maker_below(rng, plan->names_count);
    }
    if (item.kind == DCP_ITEM_BYTES || maker_below(rng, 8) == 0) {
        item.slot_bytes = 1 + maker_below(rng, 1u << maker_below(rng, 24));
    }
    if (item.kind != DCP_ITEM_BYTES) {
        item.ndim = (uint8_t)(maker_below(rng, 16) == 0 ? maker_below(rng, DCP_MAX_DIMS + 1)
                                                        : maker_below(rng, 4));
        item.dtype = (uint8_t)(1 + maker_below(rng, 28));
        item.props = (uint8_t)maker_below(rng, 16);
    }
    uint64_t bits = item.ndim == 0 ? 1 : 50 / item.ndim + 1;
    unsigned form = (unsigned)maker_below(rng, 3);
    uint32_t cut = item.ndim == 0 ? 0 : (uint32_t)maker_below(rng, item.ndim);
    for (uint32_t d = 0; d < item.ndim; d++) {
        global_size[d] = item.ndim > 25 ? 1 : maker_below(rng, 1u << (bits < 20 ? bits : 20));
        bool whole = form == 0 || (form == 1 && d != cut);
        offsets[d] = whole ? 0 : maker_below(rng, global_size[d] + 1);
        sizes[d] = whole ? global_size[d] : maker_below(rng, global_size[d] - offsets[d] + 1);
    }
    must(dcp_plan_add_item(plan, &item, global_size, offsets, sizes, &err), &err);
}

void
maker_random_plan(struct maker_rng *rng, struct dcp_plan *plan, uint32_t rank, uint32_t items_count)
{
    *plan = (struct dcp_plan){.rank = rank,
                              .thread_count = 1 + (uint32_t)maker_below(rng, 4),
                              .single_file_per_rank = maker_below(rng, 4) != 0,
                              .has_paths = maker_below(rng, 2) == 0};
    plan->content_hash = maker_below(rng, 2) == 0;
    uint32_t names_count = 1 + (uint32_t)maker_below(rng, items_count + 1);
    for (uint32_t i = 0; i < names_count; i++) {
        random_name(rng, plan);
    }
    for (uint32_t i = 0; i < items_count; i++) {
        random_item(rng, plan, i);
    }
}

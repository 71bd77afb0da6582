/*
 * test_split.c: replicated tensors that are divided by rows: what is cut, that the parts are the
 * whole, that ranks balance, and that a damaged list of cuts is refused.
 */
#include "ctest.h"
#include "cut.h"
#include "plan_maker.h"

enum { RANKS_MAX = 12 };

static const uint64_t mib = 1u << 20;

/* ---- helpers ---- */

static struct dcp_global_plan
build(struct dcp_plan *plans, uint32_t count, uint64_t split_bytes)
{
    struct dcp_global_plan global = {0};
    struct dcp_error err = {0};
    CHECK_OK(dcp_global_plan_build_split(plans, count, split_bytes, &global, &err), &err);
    return global;
}

static uint32_t
cuts_count(const struct dcp_global_plan *global)
{
    uint32_t count = 0;
    for (uint32_t p = 0; global->keep.cuts != NULL && p < global->plans_count; p++) {
        count += global->keep.cuts[p].count;
    }
    return count;
}

static uint64_t
rank_bytes(const struct dcp_global_plan *global, uint32_t p)
{
    const struct dcp_plan *plan = &global->plans[p];
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < plan->items_count; i++) {
        bytes += dcp_keep_test(global->keep.bits[p], i)
                     ? dcp_item_weight_bytes(plan, &plan->items[i])
                     : 0;
    }
    return bytes;
}

static uint64_t
most_bytes(const struct dcp_global_plan *global)
{
    uint64_t most = 0;
    for (uint32_t p = 0; p < global->plans_count; p++) {
        most = dcp_max_u64(most, rank_bytes(global, p));
    }
    return most;
}

static uint64_t
mean_bytes(const struct dcp_global_plan *global)
{
    uint64_t sum = 0;
    for (uint32_t p = 0; p < global->plans_count; p++) {
        sum += rank_bytes(global, p);
    }
    return sum / global->plans_count;
}

/* A tensor of `bytes`, rows of 4 KiB, on ranks [first, end). */
static void
replicate(struct dcp_plan *plans, uint32_t first, uint32_t end, const char *fqn, uint64_t bytes)
{
    uint64_t size[] = {bytes / 4096, 1024};
    for (uint32_t p = first; p < end; p++) {
        maker_tensor(&plans[p], fqn, DCP_DTYPE_FLOAT32, 2, size);
    }
}

/* ---- what is cut ---- */

static void
ranks_balance_under_ddp_with_one_dominant_tensor(void)
{
    enum { RANKS = 4 };
    for (int off = 0; off < 2; off++) {
        struct dcp_plan plans[RANKS];
        maker_start_plans(plans, RANKS);
        replicate(plans, 0, RANKS, "embedding", 1024 * mib);
        for (int i = 0; i < 100; i++) {
            char fqn[16];
            snprintf(fqn, sizeof fqn, "w%d", i);
            replicate(plans, 0, RANKS, fqn, 4 * mib);
        }
        struct dcp_global_plan global =
            build(plans, RANKS, off == 0 ? DCP_SPLIT_AUTO : DCP_SPLIT_OFF);
        CHECK_EQ(mean_bytes(&global), 356 * mib);
        CHECK_EQ(most_bytes(&global), (off == 0 ? 356 : 1024) * mib);
        CHECK_EQ(cuts_count(&global), off == 0 ? RANKS : 0);
        CHECK_EQ(global.keep.dropped_bytes, (RANKS - 1) * 1424 * mib);
        CHECK_EQ(global.chunks_count, off == 0 ? 104 : 101);
        dcp_global_plan_clean_up(&global);
        maker_clean_up_plans(plans, RANKS);
    }
}

static void
as_few_tensors_and_parts_are_cut_as_balance_needs(void)
{
    static const struct {
        uint32_t ranks, tensors;
        uint64_t bytes;
        uint32_t cuts;
        uint64_t most_bytes;
    } cases[] = {
        {8, 100, 100ull << 20, 0, 1300ull << 20}, /* 12 or 13 each: whole ones balance */
        {8, 9, 1ull << 30, 8, 9ull << 27},        /* one each, the ninth in eight parts */
        {8, 4, 1ull << 30, 8, 1ull << 29},        /* a half each */
        {8, 8, 1ull << 30, 0, 1ull << 30},
        {12, 1, 72ull << 20, 9, 8ull << 20}, /* no part below DCP_SPLIT_PART_BYTES */
        {12, 1, 60ull << 20, 0, 60ull << 20},
        {1, 3, 1ull << 30, 0, 3ull << 30},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        struct dcp_plan plans[RANKS_MAX];
        uint32_t ranks = cases[c].ranks;
        maker_start_plans(plans, ranks);
        for (uint32_t t = 0; t < cases[c].tensors; t++) {
            char fqn[16];
            snprintf(fqn, sizeof fqn, "w%u", t);
            replicate(plans, 0, ranks, fqn, cases[c].bytes);
        }
        struct dcp_global_plan global = build(plans, ranks, DCP_SPLIT_AUTO);
        CHECK_EQ(cuts_count(&global), cases[c].cuts);
        CHECK_EQ(most_bytes(&global), cases[c].most_bytes);
        dcp_global_plan_clean_up(&global);
        maker_clean_up_plans(plans, ranks);
    }
}

/* Rank 0 has more of its own than the others: it gets less of the common tensor, or nothing. */
static void
parts_make_up_for_what_ranks_hold_alone(void)
{
    enum { RANKS = 4 };
    static const uint64_t own_mib[] = {0, 100, 400, 2000};
    static const uint64_t most_mib[] = {256, 281, 400, 2000};
    for (int c = 0; c < 4; c++) {
        struct dcp_plan plans[RANKS];
        maker_start_plans(plans, RANKS);
        replicate(plans, 0, 1, "own", own_mib[c] * mib + 4096);
        replicate(plans, 0, RANKS, "embedding", 1024 * mib);
        struct dcp_global_plan global = build(plans, RANKS, DCP_SPLIT_AUTO);
        CHECK(most_bytes(&global) <= most_mib[c] * mib * 65 / 64 + 4096);
        dcp_global_plan_clean_up(&global);
        maker_clean_up_plans(plans, RANKS);
    }
}

/* Eight stages of a pipeline, each on its own ranks, one of them large: its ranks share it. */
static void
holders_that_are_some_of_the_ranks_share_what_is_theirs(void)
{
    struct dcp_plan plans[RANKS_MAX];
    maker_start_plans(plans, RANKS_MAX);
    replicate(plans, 0, 2, "first", 1024 * mib);
    replicate(plans, 2, 12, "rest", 100 * mib);
    struct dcp_global_plan global = build(plans, RANKS_MAX, DCP_SPLIT_AUTO);
    CHECK_EQ(rank_bytes(&global, 0), 512 * mib);
    CHECK_EQ(rank_bytes(&global, 1), 512 * mib);
    CHECK_EQ(cuts_count(&global), 2); /* "rest" is no rank's burden */
    dcp_global_plan_clean_up(&global);
    maker_clean_up_plans(plans, RANKS_MAX);
}

static void
replicas_that_differ_are_never_cut(void)
{
    enum { RANKS = 3, CASES = 7 };
    for (int c = 0; c < CASES; c++) {
        struct dcp_plan plans[RANKS];
        struct dcp_error err = {0};
        struct dcp_global_plan global;
        uint64_t size[] = {1 << 16, 1024}, shorter[] = {1 << 15, 1024}, zeros[] = {0, 0};
        maker_start_plans(plans, RANKS);
        for (uint32_t p = 0; p < RANKS; p++) {
            bool other = p == 1;
            if (c == 3 && other) {
                maker_shard(&plans[p], "w", DCP_DTYPE_FLOAT32, 2, size, zeros, size);
                continue;
            }
            maker_tensor(&plans[p], "w", c == 0 && other ? DCP_DTYPE_INT32 : DCP_DTYPE_FLOAT32, 2,
                         c == 1 && other ? shorter : size);
            struct dcp_item *item = &plans[p].items[0];
            item->props = c == 2 && other ? DCP_PROP_REQUIRES_GRAD : 0;
            item->slot_bytes = c == 4 && other ? 1 << 28 : 0;
        }
        if (c == 5) {
            maker_object(&plans[1], "w", 1000); /* contradicts the tensor */
        }
        int rc = dcp_global_plan_build_split(plans, RANKS, 1, &global, &err);
        CHECK_EQ(rc, c == 5 ? DCP_E_ASSERTION : c == 1 && rc != 0 ? DCP_E_PLAN : 0);
        if (rc == 0) {
            CHECK_EQ(cuts_count(&global), c == 6 ? RANKS : 0);
            dcp_global_plan_clean_up(&global);
        }
        for (uint32_t p = 0; c != 6 && p < RANKS; p++) {
            CHECK(plans[p].items[0].kind == (c == 3 && p == 1 ? DCP_ITEM_SHARD : DCP_ITEM_TENSOR));
        }
        maker_clean_up_plans(plans, RANKS);
    }
}

/* ---- random plans ---- */

static uint64_t
random_size(struct maker_rng *rng, uint64_t *ret_dims)
{
    uint64_t count = 1 + maker_below(rng, 1u << maker_below(rng, 17));
    ret_dims[0] = maker_below(rng, 3) == 0 ? 1 + maker_below(rng, 3) : 1 + maker_below(rng, count);
    ret_dims[1] = 1 + count / ret_dims[0];
    ret_dims[2] = 1 + maker_below(rng, 3);
    return ret_dims[0] * ret_dims[1] * ret_dims[2] * 4;
}

/* Replicas on all or some ranks, replicated shards and ranks' own. *ret_whole_bytes: the largest
 * tensor below `split_bytes`. */
static uint32_t
random_plans(uint64_t seed, struct dcp_plan *plans, uint64_t split_bytes, uint64_t *ret_whole_bytes)
{
    struct maker_rng rng = {seed};
    uint32_t ranks = 1 + (uint32_t)maker_below(&rng, RANKS_MAX);
    uint64_t tensors = 1 + maker_below(&rng, 24);
    *ret_whole_bytes = 0;
    maker_start_plans(plans, ranks);
    for (uint64_t t = 0; t < tensors; t++) {
        char fqn[16];
        uint64_t size[3], offsets[3] = {0}, shard[3];
        uint64_t bytes = random_size(&rng, size);
        bool some = maker_below(&rng, 4) == 0, halves = maker_below(&rng, 4) == 0;
        snprintf(fqn, sizeof fqn, "t%u", (unsigned)t);
        memcpy(shard, size, sizeof shard);
        size[0] *= halves ? 2 : 1; /* two boxes, as under HSDP, each with half of the holders */
        for (uint32_t p = 0; p < ranks; p++) {
            if (halves && ranks > 1) {
                offsets[0] = p % 2 * shard[0];
                maker_shard(&plans[p], fqn, DCP_DTYPE_FLOAT32, 3, size, offsets, shard);
            } else if (!halves && (!some || p % 3 == t % 3 || p == 0)) {
                maker_tensor(&plans[p], fqn, DCP_DTYPE_FLOAT32, 3, size);
            }
        }
        if (bytes < split_bytes) {
            *ret_whole_bytes = dcp_max_u64(*ret_whole_bytes, bytes);
        }
    }
    return ranks;
}

/* That the kept chunks of every tensor lie in it, apart, and fill it is what validation proves
 * while the global plan is built; here that each lies in the box that its rank held, as a range of
 * one dimension, and that nothing else changed. */
static void
check_parts(const struct dcp_plan *whole, const struct dcp_plan *plans,
            const struct dcp_global_plan *global)
{
    for (uint32_t p = 0; p < global->plans_count; p++) {
        const struct dcp_cuts none = {0};
        const struct dcp_cuts *cuts = global->keep.cuts == NULL ? &none : &global->keep.cuts[p];
        uint32_t next = 0;
        for (uint32_t i = 0; i < plans[p].items_count; i++) {
            const struct dcp_item *before = &whole[p].items[i], *after = &plans[p].items[i];
            bool is_cut = next < cuts->count && cuts->cuts[next].item == i;
            const struct dcp_cut *cut = is_cut ? &cuts->cuts[next++] : NULL;
            CHECK_EQ(after->kind, is_cut ? DCP_ITEM_SHARD : before->kind);
            CHECK(!is_cut || dcp_keep_test(global->keep.bits[p], i));
            for (uint32_t d = 0; d < before->ndim; d++) {
                uint64_t offset = dcp_item_offsets(&whole[p], before)[d];
                uint64_t size = dcp_item_sizes(&whole[p], before)[d];
                bool along = is_cut && cut->dim == d;
                CHECK(!along || (cut->rows_count > 0 && cut->rows_count < size &&
                                 cut->first_row <= size - cut->rows_count));
                CHECK_EQ(dcp_item_offsets(&plans[p], after)[d],
                         offset + (along ? cut->first_row : 0));
                CHECK_EQ(dcp_item_sizes(&plans[p], after)[d], along ? cut->rows_count : size);
                CHECK_EQ(dcp_item_global_size(&plans[p], after)[d],
                         dcp_item_global_size(&whole[p], before)[d]);
            }
        }
        CHECK_EQ(next, cuts->count);
    }
}

static void
same_decisions(const struct dcp_global_plan *a, const struct dcp_global_plan *b)
{
    CHECK_EQ(cuts_count(a), cuts_count(b));
    for (uint32_t p = 0; p < a->plans_count; p++) {
        CHECK(memcmp(a->keep.bits[p], b->keep.bits[p], (a->plans[p].items_count + 7) / 8) == 0);
        if (a->keep.cuts != NULL && b->keep.cuts != NULL) {
            CHECK_EQ(a->keep.cuts[p].count, b->keep.cuts[p].count);
            for (uint32_t i = 0; i < a->keep.cuts[p].count; i++) {
                const struct dcp_cut *x = &a->keep.cuts[p].cuts[i], *y = &b->keep.cuts[p].cuts[i];
                CHECK(x->item == y->item && x->dim == y->dim && x->first_row == y->first_row &&
                      x->rows_count == y->rows_count);
            }
        }
    }
}

static void
parts_are_the_whole_for_random_plans_and_equal_plans_give_equal_cuts(void)
{
    uint32_t cut_plans = 0, most_cuts = 0;
    for (uint64_t seed = 0; seed < 400; seed++) {
        struct dcp_plan whole[RANKS_MAX], plans[RANKS_MAX], again[RANKS_MAX];
        uint64_t split_bytes = 1ull << (seed % 18), ignored;
        uint32_t ranks = random_plans(seed, whole, split_bytes, &ignored);
        random_plans(seed, plans, split_bytes, &ignored);
        random_plans(seed, again, split_bytes, &ignored);
        struct dcp_global_plan global = build(plans, ranks, split_bytes);
        struct dcp_global_plan global_again = build(again, ranks, split_bytes);
        uint64_t kept_bytes = mean_bytes(&global) * ranks, held_bytes = 0;
        check_parts(whole, plans, &global);
        same_decisions(&global, &global_again);
        for (uint32_t p = 0; p < ranks; p++) {
            for (uint32_t i = 0; i < whole[p].items_count; i++) {
                held_bytes += dcp_item_weight_bytes(&whole[p], &whole[p].items[i]);
            }
        }
        CHECK(held_bytes - global.keep.dropped_bytes - kept_bytes < ranks); /* the mean's rest */
        cut_plans += cuts_count(&global) > 0;
        most_cuts = cuts_count(&global) > most_cuts ? cuts_count(&global) : most_cuts;
        dcp_global_plan_clean_up(&global);
        dcp_global_plan_clean_up(&global_again);
        maker_clean_up_plans(whole, ranks);
        maker_clean_up_plans(plans, ranks);
        maker_clean_up_plans(again, ranks);
    }
    CHECK(cut_plans > 200);
    CHECK(most_cuts > 50);
}

/* Replicas on all ranks, of any size: no rank is far above the mean, unless a tensor that may not
 * be cut is. */
static void
ranks_balance_for_random_replicas(void)
{
    double worst = 0;
    for (uint64_t seed = 0; seed < 300; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plans[RANKS_MAX];
        uint32_t ranks = 2 + (uint32_t)maker_below(&rng, RANKS_MAX - 1);
        uint64_t tensors = 1 + maker_below(&rng, 30), whole_bytes = 0;
        maker_start_plans(plans, ranks);
        for (uint64_t t = 0; t < tensors; t++) {
            char fqn[16];
            uint64_t bytes = (1 + maker_below(&rng, 4096)) * 4096 << maker_below(&rng, 10);
            snprintf(fqn, sizeof fqn, "t%u", (unsigned)t);
            replicate(plans, 0, ranks, fqn, bytes);
            whole_bytes = dcp_max_u64(whole_bytes, bytes < DCP_SPLIT_BYTES ? bytes : 0);
        }
        struct dcp_global_plan global = build(plans, ranks, DCP_SPLIT_AUTO);
        uint64_t bound = dcp_max_u64(mean_bytes(&global), whole_bytes);
        bound = dcp_max_u64(bound, DCP_SPLIT_PART_BYTES);
        double ratio = (double)most_bytes(&global) / (double)bound;
        worst = ratio > worst ? ratio : worst;
        dcp_global_plan_clean_up(&global);
        maker_clean_up_plans(plans, ranks);
    }
    CHECK(worst < 1.11);
}

static void
parts_are_whole_pages_where_rows_allow_it(void)
{
    enum { RANKS = 5 };
    static const uint64_t columns[] = {1000, 1024, 7, 3072};
    for (size_t c = 0; c < sizeof columns / sizeof columns[0]; c++) {
        struct dcp_plan plans[RANKS];
        uint64_t size[] = {1000003, columns[c]};
        uint32_t uneven = 0;
        maker_start_plans(plans, RANKS);
        for (uint32_t p = 0; p < RANKS; p++) {
            maker_tensor(&plans[p], "w", DCP_DTYPE_BFLOAT16, 2, size);
        }
        struct dcp_global_plan global = build(plans, RANKS, 1);
        CHECK_EQ(cuts_count(&global), RANKS);
        for (uint32_t p = 0; p < RANKS; p++) {
            CHECK_EQ(global.keep.cuts[p].cuts[0].dim, 0);
            uneven += rank_bytes(&global, p) % 4096 != 0;
        }
        CHECK_EQ(uneven, 1); /* the last */
        CHECK((double)most_bytes(&global) < 1.05 * (double)mean_bytes(&global));
        dcp_global_plan_clean_up(&global);
        maker_clean_up_plans(plans, RANKS);
    }
}

/* Layers stacked in one tensor: eight slabs do not go evenly into six parts, their rows do. */
static void
a_short_first_dimension_leaves_the_cut_to_a_longer_one(void)
{
    enum { RANKS = 6 };
    struct dcp_plan plans[RANKS];
    uint64_t size[] = {8, 3000, 64}, few[] = {1, 2, 3};
    maker_start_plans(plans, RANKS);
    for (uint32_t p = 0; p < RANKS; p++) {
        maker_tensor(&plans[p], "layers", DCP_DTYPE_FLOAT32, 3, size);
        maker_tensor(&plans[p], "few", DCP_DTYPE_FLOAT32, 3, few);
    }
    struct dcp_global_plan global = build(plans, RANKS, 1);
    for (uint32_t p = 0; p < RANKS; p++) {
        CHECK_EQ(global.keep.cuts[p].cuts[0].dim, 1);
    }
    CHECK((double)most_bytes(&global) < 1.01 * (double)mean_bytes(&global));
    CHECK(cuts_count(&global) <= RANKS + 3); /* "few" has no more rows than that */
    dcp_global_plan_clean_up(&global);
    maker_clean_up_plans(plans, RANKS);
}

/* ---- lists of cuts on their way ---- */

static struct dcp_plan
small_plan(void)
{
    struct dcp_plan plan;
    uint64_t size[] = {10, 4}, nothing[] = {0, 4};
    maker_start_plans(&plan, 1);
    maker_tensor(&plan, "a", DCP_DTYPE_FLOAT32, 2, size);
    maker_object(&plan, "b", 512);
    maker_tensor(&plan, "c", DCP_DTYPE_FLOAT32, 2, size);
    maker_tensor(&plan, "d", DCP_DTYPE_FLOAT32, 2, size); /* not kept */
    maker_tensor(&plan, "e", DCP_DTYPE_FLOAT32, 2, nothing);
    maker_tensor(&plan, "f", DCP_DTYPE_FLOAT32, 2, size); /* ready-made */
    plan.items[5].slot_bytes = 4096;
    maker_tensor(&plan, "g", DCP_DTYPE_FLOAT32, 2, size);
    return plan;
}

static const uint8_t small_keep[] = {0x77}; /* all but d */

static int
take(const uint8_t *bytes, size_t len, struct dcp_own_cuts *ret)
{
    struct dcp_plan plan = small_plan();
    struct dcp_error err = {0};
    struct dcp_cursor c = {.data = bytes, .len = len};
    int rc = dcp_cuts_take(&c, &plan, small_keep, ret, &err);
    if (rc == 0) {
        dcp_plan_cut(&plan, &ret->list); /* asserts that it can */
    }
    CHECK(rc == 0 || (rc == DCP_E_INTERNAL && err.code == rc));
    dcp_plan_clean_up(&plan);
    return rc;
}

static void
cuts_come_back_from_a_message(void)
{
    struct dcp_cut cuts[] = {{0, 0, 3, 7}, {2, 1, 0, 4}, {6, 0, 9, 1}};
    struct dcp_cuts list = {.cuts = cuts, .count = 3};
    struct dcp_own_cuts own;
    struct dcp_buf buf = {0};
    dcp_cuts_put(&buf, &list);
    CHECK_EQ(take(buf.data, buf.len, &own), 0);
    CHECK_EQ(own.list.count, 3);
    CHECK(memcmp(own.list.cuts, cuts, sizeof cuts) == 0);
    CHECK_EQ(own.strides_bytes[0], 16);
    CHECK_EQ(own.strides_bytes[1], 4);
    dcp_own_cuts_clean_up(&own);
    dcp_own_cuts_clean_up(&own);
    for (size_t len = 0; len < buf.len; len++) {
        CHECK_EQ(take(buf.data, len, &own), DCP_E_INTERNAL);
    }
    dcp_buf_put_u8(&buf, 0);
    CHECK_EQ(take(buf.data, buf.len, &own), DCP_E_INTERNAL);
    dcp_buf_clean_up(&buf);
}

static void
cuts_that_do_not_fit_the_plan_are_refused(void)
{
    static const struct dcp_cut bad[] = {
        {1, 0, 0, 1},          /* an object */
        {3, 0, 0, 1},          /* not kept */
        {4, 0, 0, 1},          /* no rows */
        {5, 0, 0, 1},          /* ready-made */
        {7, 0, 0, 1},          /* no item */
        {UINT32_MAX, 0, 0, 1}, /* far from one */
        {0, 2, 0, 1},          /* no such dimension */
        {0, 0, 0, 0},          /* nothing left */
        {0, 0, 0, 11},         /* more than there is */
        {0, 0, 10, 1},         {0, 0, 5, 6}, {0, 0, 5, UINT64_MAX}, {0, 0, UINT64_MAX, 2},
    };
    struct dcp_own_cuts own;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct dcp_cut cut = bad[i];
        struct dcp_cuts list = {.cuts = &cut, .count = 1};
        struct dcp_buf buf = {0};
        dcp_cuts_put(&buf, &list);
        CHECK_EQ(take(buf.data, buf.len, &own), DCP_E_INTERNAL);
        dcp_buf_clean_up(&buf);
    }
    static const uint8_t far_dim[] = {1, 0, 0x80, 0x80, 0x80, 0x80, 0x10, 0, 1}; /* 2^32 */
    CHECK_EQ(take(far_dim, sizeof far_dim, &own), DCP_E_INTERNAL);
}

static void
any_bytes_are_cuts_that_fit_or_refused(void)
{
    uint32_t taken = 0;
    for (uint64_t seed = 0; seed < 20000; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_own_cuts own;
        uint8_t bytes[13];
        size_t len = 1 + 4 * maker_below(&rng, 4);
        for (size_t i = 0; i < len; i++) {
            bytes[i] =
                (uint8_t)(maker_below(&rng, 16) == 0 ? maker_next(&rng) : maker_below(&rng, 4));
        }
        if (take(bytes, len, &own) == 0) {
            taken++;
            dcp_own_cuts_clean_up(&own);
        }
    }
    CHECK(taken > 200 && taken < 19000);
}

/* ---- sources ---- */

/* The bytes of a cut item are those of its rows in the whole, whatever the strides. */
static void
sources_move_to_the_rows_that_are_kept(void)
{
    enum { A = 3, B = 8, C = 5 };
    static const int64_t forms[][3] = {
        {B * C * 4, C * 4, 4},         /* row major */
        {4, A * 4, A * B * 4},         /* all turned round */
        {C * 4, A * C * 4, 4},         /* first two turned round */
        {2 * B * C * 4, 2 * C * 4, 8}, /* every second element */
    };
    static uint32_t memory[2 * A * B * C];
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        memory[i] = (uint32_t)i;
    }
    for (uint32_t f = 0; f < 5; f++) {
        const int64_t *strides = f == 4 ? NULL : forms[f];
        const int64_t *real = f == 4 ? forms[0] : forms[f];
        for (uint32_t dim = 0; dim < 3; dim++) {
            struct dcp_plan plan;
            struct dcp_error err = {0};
            uint64_t size[] = {A, B, C};
            struct dcp_cut cut = {0, dim, 1, 2};
            struct dcp_cuts list = {.cuts = &cut, .count = 1};
            struct dcp_own_cuts own;
            struct dcp_buf buf = {0};
            struct dcp_source source = {.data = (const uint8_t *)memory, .strides_bytes = strides};
            const uint8_t keep[] = {1};
            uint32_t part[A * B * C];
            maker_start_plans(&plan, 1);
            maker_tensor(&plan, "w", DCP_DTYPE_INT32, 3, size);
            dcp_cuts_put(&buf, &list);
            struct dcp_cursor c = {.data = buf.data, .len = buf.len};
            CHECK_OK(dcp_cuts_take(&c, &plan, keep, &own, &err), &err);
            dcp_plan_cut(&plan, &own.list);
            dcp_cuts_fit_sources(&own, &plan, &source);
            const uint64_t *sizes = dcp_item_sizes(&plan, &plan.items[0]);
            uint64_t bytes = dcp_item_payload_bytes(&plan, &plan.items[0]);
            CHECK_EQ(bytes, A * B * C * 4 / size[dim] * 2);
            CHECK(f != 4 || (source.strides_bytes == NULL) == (dim == 0));
            if (source.strides_bytes == NULL) {
                memcpy(part, source.data, bytes);
            } else {
                dcp_box_gather((uint8_t *)part, source.data, 3, sizes, source.strides_bytes, 4, 0,
                               bytes);
            }
            const uint32_t *at = part;
            for (uint64_t i = 0; i < sizes[0] * sizes[1] * sizes[2]; i++) {
                uint64_t index[] = {i / (sizes[1] * sizes[2]), i / sizes[2] % sizes[1],
                                    i % sizes[2]};
                index[dim] += 1;
                CHECK_EQ(*at++,
                         (uint64_t)(index[0] * (uint64_t)real[0] + index[1] * (uint64_t)real[1] +
                                    index[2] * (uint64_t)real[2]) /
                             4);
            }
            dcp_own_cuts_clean_up(&own);
            dcp_buf_clean_up(&buf);
            dcp_plan_clean_up(&plan);
        }
    }
}

static void
running_out_of_memory_is_reported_and_leaks_nothing(void)
{
    for (uint64_t nth = 1;; nth++) {
        struct dcp_plan plans[RANKS_MAX];
        struct dcp_error err = {0};
        struct dcp_global_plan global;
        uint64_t ignored;
        uint32_t ranks = random_plans(5, plans, 1, &ignored);
        dcp_alloc_fail_after(nth);
        int rc = dcp_global_plan_build_split(plans, ranks, 1, &global, &err);
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        if (rc == 0) {
            CHECK(cuts_count(&global) > 0 && nth > 10);
            dcp_global_plan_clean_up(&global);
        }
        maker_clean_up_plans(plans, ranks);
        if (rc == 0) {
            break;
        }
    }
}

CTEST_MAIN(RUN(ranks_balance_under_ddp_with_one_dominant_tensor);
           RUN(as_few_tensors_and_parts_are_cut_as_balance_needs);
           RUN(parts_make_up_for_what_ranks_hold_alone);
           RUN(holders_that_are_some_of_the_ranks_share_what_is_theirs);
           RUN(replicas_that_differ_are_never_cut);
           RUN(parts_are_the_whole_for_random_plans_and_equal_plans_give_equal_cuts);
           RUN(ranks_balance_for_random_replicas); RUN(parts_are_whole_pages_where_rows_allow_it);
           RUN(a_short_first_dimension_leaves_the_cut_to_a_longer_one);
           RUN(cuts_come_back_from_a_message); RUN(cuts_that_do_not_fit_the_plan_are_refused);
           RUN(any_bytes_are_cuts_that_fit_or_refused); RUN(sources_move_to_the_rows_that_are_kept);
           RUN(running_out_of_memory_is_reported_and_leaks_nothing);)

/*
 * test_global_plan.c: who keeps what, and how kept items group by name, against slow and obvious
 * references.
 */
#include "ctest.h"
#include "plan_maker.h"

enum { PLANS_MAX = 8 };

/* Few names, few offsets: many items share a key. */
static uint32_t
colliding_plans(struct maker_rng *rng, struct dcp_plan *plans)
{
    uint32_t count = 1 + (uint32_t)maker_below(rng, PLANS_MAX);
    uint64_t scale = maker_below(rng, 2) == 0 ? 1 : 300; /* large enough to be decided early */
    maker_start_plans(plans, count);
    for (uint32_t p = 0; p < count; p++) {
        for (uint64_t n = maker_below(rng, 40); n > 0; n--) {
            char fqn[16];
            uint64_t size[3] = {100, 100, 100}, offsets[3], sizes[3];
            uint32_t ndim = (uint32_t)maker_below(rng, 3);
            snprintf(fqn, sizeof fqn, "n%u", (unsigned)maker_below(rng, 12));
            for (uint32_t d = 0; d < ndim; d++) {
                offsets[d] = maker_below(rng, 3);
                sizes[d] = scale * maker_below(rng, 90);
            }
            if (maker_below(rng, 4) == 0) {
                maker_object(&plans[p], fqn, 1 + maker_below(rng, 5000) * scale * scale);
            } else {
                maker_shard(&plans[p], fqn, DCP_DTYPE_INT16, ndim, size, offsets, sizes);
            }
        }
    }
    return count;
}

/* ---- dedup ---- */

static bool
same_key(const struct dcp_plan *a, uint32_t i, const struct dcp_plan *b, uint32_t j)
{
    const struct dcp_item *x = &a->items[i], *y = &b->items[j];
    const struct dcp_name *m = &a->names[x->name], *n = &b->names[y->name];
    return m->fqn_len == n->fqn_len && memcmp(m->fqn, n->fqn, m->fqn_len) == 0 &&
           (x->kind == DCP_ITEM_BYTES) == (y->kind == DCP_ITEM_BYTES) && x->ndim == y->ndim &&
           (x->ndim == 0 || memcmp(dcp_item_offsets(a, x), dcp_item_offsets(b, y),
                                   x->ndim * sizeof(uint64_t)) == 0);
}

static uint64_t
weigh(const struct dcp_plan *plan, uint32_t i)
{
    uint64_t bytes = dcp_item_weight_bytes(plan, &plan->items[i]);
    return bytes == 0 ? 1 : bytes;
}

/* Calls for the holders of item `i` of plan `p`: how many; or keeps the chosen plan's of them. */
static uint32_t
visit_holders(const struct dcp_plan *plans, uint32_t count, uint32_t p, uint32_t i,
              const uint64_t *weights, bool to_lowest, bool done[][64], uint32_t *ret_chosen)
{
    uint32_t holders = 0;
    *ret_chosen = p;
    for (uint32_t q = p; q < count; q++) {
        for (uint32_t j = 0; j < plans[q].items_count; j++) {
            if (same_key(&plans[p], i, &plans[q], j)) {
                holders++;
                done[q][j] = true;
                *ret_chosen = !to_lowest && weights[q] < weights[*ret_chosen] ? q : *ret_chosen;
            }
        }
    }
    return holders;
}

/* Whether keys of `bytes` are decided in the turn of `least`: large ones in that of their power of
 * two, small ones in the last. */
static bool
has_its_turn(uint64_t bytes, uint64_t least)
{
    return bytes < DCP_BALANCE_BYTES ? least == 1 : bytes >= least && bytes / 2 < least;
}

/* torch's loop, with our weights: what has one holder, then large keys by power of two, then the
 * others; in order of appearance, each to its lightest holder. */
static void
naive_dedup(const struct dcp_plan *plans, uint32_t count, bool to_lowest, bool kept[][64])
{
    uint64_t weights[PLANS_MAX] = {0};
    for (uint64_t least = UINT64_MAX; least > 0;
         least = least == UINT64_MAX ? 1ull << 63 : least / 2) {
        bool done[PLANS_MAX][64] = {0};
        for (uint32_t p = 0; p < count; p++) {
            for (uint32_t i = 0; i < plans[p].items_count; i++) {
                uint64_t bytes = weigh(&plans[p], i);
                uint32_t chosen;
                if (done[p][i]) {
                    continue;
                }
                bool alone =
                    visit_holders(plans, count, p, i, weights, to_lowest, done, &chosen) == 1;
                if (alone != (least == UINT64_MAX) || (!alone && !has_its_turn(bytes, least))) {
                    continue;
                }
                for (uint32_t j = 0; j < plans[chosen].items_count; j++) {
                    if (same_key(&plans[p], i, &plans[chosen], j)) {
                        kept[chosen][j] = true;
                        weights[chosen] += weigh(&plans[chosen], j);
                    }
                }
            }
        }
    }
}

static void
dedup_keeps_what_the_naive_loop_keeps(void)
{
    uint64_t dropped = 0;
    for (uint64_t seed = 0; seed < 400; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plans[PLANS_MAX];
        struct dcp_error err = {0};
        bool kept[PLANS_MAX][64] = {0};
        bool to_lowest = seed % 3 == 0;
        uint32_t count = colliding_plans(&rng, plans);
        struct dcp_keep keep;
        CHECK_OK(dcp_plan_dedup(plans, count, to_lowest, &keep, &err), &err);
        naive_dedup(plans, count, to_lowest, kept);
        uint64_t dropped_items = 0, dropped_bytes = 0;
        for (uint32_t p = 0; p < count; p++) {
            for (uint32_t i = 0; i < plans[p].items_count; i++) {
                CHECK(dcp_keep_test(keep.bits[p], i) == kept[p][i]);
                dropped_items += !kept[p][i];
                dropped_bytes +=
                    kept[p][i] ? 0 : dcp_item_weight_bytes(&plans[p], &plans[p].items[i]);
            }
        }
        CHECK_EQ(keep.count, count);
        CHECK_EQ(keep.dropped_items, dropped_items);
        CHECK_EQ(keep.dropped_bytes, dropped_bytes);
        dropped += dropped_items;
        dcp_keep_clean_up(&keep);
        dcp_keep_clean_up(&keep);
        maker_clean_up_plans(plans, count);
    }
    CHECK(dropped > 1000);
}

static void
replicas_spread_by_true_bytes(void)
{
    struct dcp_plan plans[2];
    struct dcp_error err = {0};
    struct dcp_keep keep;
    const uint64_t unit = 1 << 17;
    uint64_t global_size[] = {1000 * unit}, begin[] = {0}, end[] = {100 * unit};
    uint64_t large[] = {900 * unit}, small[] = {100 * unit}, size[] = {400 * unit};
    maker_start_plans(plans, 2);
    /* By the global size of its shard rank 0 would look too busy to take `a`. */
    maker_shard(&plans[0], "w", DCP_DTYPE_INT8, 1, global_size, begin, small);
    maker_shard(&plans[1], "w", DCP_DTYPE_INT8, 1, global_size, end, large);
    for (uint32_t p = 0; p < 2; p++) {
        maker_tensor(&plans[p], "a", DCP_DTYPE_INT8, 1, size);
        maker_tensor(&plans[p], "b", DCP_DTYPE_INT8, 1, size);
        maker_object(&plans[p], "o", 512 * unit);
    }
    CHECK_OK(dcp_plan_dedup(plans, 2, false, &keep, &err), &err);
    CHECK_EQ(keep.bits[0][0], 0xB); /* w, a and o: 1012 units */
    CHECK_EQ(keep.bits[1][0], 0x5); /* w and b: 1300 units */
    dcp_keep_clean_up(&keep);
    CHECK_OK(dcp_plan_dedup(plans, 2, true, &keep, &err), &err);
    CHECK_EQ(keep.bits[0][0], 0xF);
    CHECK_EQ(keep.bits[1][0], 0x1);
    CHECK_EQ(keep.dropped_items, 3);
    CHECK_EQ(keep.dropped_bytes, (400 + 400 + 512) * unit);
    dcp_keep_clean_up(&keep);
    maker_clean_up_plans(plans, 2);
}

static void
equal_names_are_found_whatever_their_order(void)
{
    enum { NAMES = 3000 };
    struct dcp_plan plans[2];
    struct dcp_error err = {0};
    struct dcp_keep keep;
    maker_start_plans(plans, 2);
    for (uint32_t p = 0; p < 2; p++) {
        for (uint32_t i = 0; i < NAMES; i++) {
            char fqn[32];
            uint32_t name;
            int len = snprintf(fqn, sizeof fqn, "layers.%u", p == 0 ? i : i * 7 % (2 * NAMES));
            CHECK_OK(dcp_plan_add_name(&plans[p], fqn, (size_t)len, NULL, 0, 0, &name, &err), &err);
            struct dcp_item item = {.name = name, .kind = DCP_ITEM_BYTES, .slot_bytes = 512};
            CHECK_OK(dcp_plan_add_item(&plans[p], &item, NULL, NULL, NULL, &err), &err);
        }
    }
    CHECK_OK(dcp_plan_dedup(plans, 2, true, &keep, &err), &err);
    for (uint32_t i = 0; i < NAMES; i++) {
        CHECK(dcp_keep_test(keep.bits[0], i));
        CHECK(dcp_keep_test(keep.bits[1], i) == (i * 7 % (2 * NAMES) >= NAMES));
    }
    dcp_keep_clean_up(&keep);
    maker_clean_up_plans(plans, 2);
}

/* ---- grouping ---- */

static void
entries_come_in_order_of_first_kept_item_and_hold_every_kept_item_once(void)
{
    uint32_t built = 0;
    for (uint64_t seed = 0; seed < 300; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plans[PLANS_MAX];
        struct dcp_error err = {0};
        struct dcp_global_plan global;
        uint32_t count = 1 + (uint32_t)maker_below(&rng, PLANS_MAX);
        maker_start_plans(plans, count);
        for (uint32_t t = 0; t < 10; t++) {
            char fqn[8];
            snprintf(fqn, sizeof fqn, "t%u", t);
            uint64_t size[] = {count * 4}, shard[] = {4};
            for (uint32_t p = 0; p < count; p++) {
                uint64_t offset[] = {p * 4};
                if (t % 3 == 0) {
                    maker_shard(&plans[p], fqn, DCP_DTYPE_INT8, 1, size, offset, shard);
                } else if (t % 3 == 1) {
                    maker_tensor(&plans[p], fqn, DCP_DTYPE_INT8, 1, size);
                } else if (maker_below(&rng, 2) == 0) {
                    maker_object(&plans[p], fqn, 512);
                }
            }
        }
        CHECK_OK(dcp_global_plan_build(plans, count, false, &global, &err), &err);
        bool seen[PLANS_MAX][64] = {0};
        uint64_t chunk_at = 0;
        uint32_t last_plan = 0, last_item = 0;
        for (uint64_t e = 0; e < global.entries_count; e++) {
            const struct dcp_global_entry *entry = &global.entries[e];
            CHECK_EQ(entry->first_chunk, chunk_at);
            CHECK(e == 0 || entry->plan > last_plan ||
                  (entry->plan == last_plan && entry->item > last_item));
            last_plan = entry->plan;
            last_item = entry->item;
            for (uint32_t c = 0; c < entry->chunks_count; c++, chunk_at++) {
                const struct dcp_global_chunk *chunk = &global.chunks[chunk_at];
                CHECK(dcp_keep_test(global.keep.bits[chunk->plan], chunk->item));
                CHECK(!seen[chunk->plan][chunk->item]);
                seen[chunk->plan][chunk->item] = true;
                CHECK(c != 0 || (chunk->plan == entry->plan && chunk->item == entry->item));
                CHECK(c == 0 || chunk->plan > chunk[-1].plan ||
                      (chunk->plan == chunk[-1].plan && chunk->item > chunk[-1].item));
            }
        }
        CHECK_EQ(global.chunks_count, chunk_at);
        for (uint32_t p = 0; p < count; p++) {
            for (uint32_t i = 0; i < plans[p].items_count; i++) {
                CHECK(dcp_keep_test(global.keep.bits[p], i) == seen[p][i]);
            }
        }
        built++;
        dcp_global_plan_clean_up(&global);
        dcp_global_plan_clean_up(&global);
        maker_clean_up_plans(plans, count);
    }
    CHECK_EQ(built, 300);
}

/* ---- what may share a name ---- */

static void
what_torch_asserts_about_names_fails(void)
{
    /* Kinds of the same name on rank 0 and rank 1, at different offsets. */
    static const struct {
        char kinds[3];
        int code;
    } cases[] = {
        {"TS", DCP_E_PLAN}, /* both are chunks of one tensor; they overlap */
        {"SS", DCP_E_PLAN},
        {"ST", DCP_E_ASSERTION},
        {"OT", DCP_E_ASSERTION},
        {"TO", DCP_E_ASSERTION},
        {"SO", DCP_E_ASSERTION},
        {"OS", DCP_E_ASSERTION},
        {"OO", 0}, /* one is dropped */
        {"TT", 0},
    };
    uint64_t size[] = {8}, one[] = {1}, sizes[] = {7};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct dcp_plan plans[2];
        struct dcp_error err;
        maker_start_plans(plans, 2);
        for (uint32_t p = 0; p < 2; p++) {
            char kind = cases[i].kinds[p];
            if (kind == 'O') {
                maker_object(&plans[p], "x", 512);
            } else if (kind == 'T') {
                maker_tensor(&plans[p], "x", DCP_DTYPE_INT8, 1, size);
            } else {
                uint64_t offset[] = {p + 1};
                maker_shard(&plans[p], "x", DCP_DTYPE_INT8, 1, size, p == 0 ? one : offset,
                            p == 0 ? sizes : one);
            }
        }
        CHECK_EQ(maker_build(plans, 2, &err), cases[i].code);
        if (cases[i].code == DCP_E_ASSERTION && strcmp(cases[i].kinds, "OS") != 0) {
            CHECK(strcmp(err.message, "item.index.fqn not in md") == 0);
        }
        maker_clean_up_plans(plans, 2);
    }
}

static void
a_scalar_and_an_object_of_one_name_are_not_taken_for_replicas(void)
{
    struct dcp_plan plans[2];
    struct dcp_error err;
    maker_start_plans(plans, 2);
    maker_tensor(&plans[0], "lr", DCP_DTYPE_FLOAT32, 0, NULL);
    maker_object(&plans[1], "lr", 512);
    CHECK_EQ(maker_build(plans, 2, &err), DCP_E_ASSERTION);
    maker_clean_up_plans(plans, 2);
}

static void
objects_twice_in_one_plan_fail_as_in_torch(void)
{
    struct dcp_plan plans[1];
    struct dcp_error err;
    maker_start_plans(plans, 1);
    maker_object(&plans[0], "x", 512);
    maker_object(&plans[0], "x", 512);
    CHECK_EQ(maker_build(plans, 1, &err), DCP_E_ASSERTION);
    maker_clean_up_plans(plans, 1);
}

/* ---- memory ---- */

static void
running_out_of_memory_is_reported_and_leaks_nothing(void)
{
    struct dcp_plan plans[3];
    maker_start_plans(plans, 3);
    for (uint32_t p = 0; p < 3; p++) {
        plans[p].thread_count = 2;
        for (uint64_t i = 0; i < 3; i++) {
            /* Neither ascending nor cut in order, so that every path allocates. */
            maker_shard2(&plans[p], "grid", 3, 3, (p + i) % 3, i, 1, 1);
        }
        maker_object(&plans[p], "step", 512);
    }
    bool succeeded = false;
    for (uint64_t n = 1; !succeeded && n < 100; n++) {
        struct dcp_global_plan global;
        struct dcp_error err = {0};
        dcp_alloc_fail_after(n);
        int rc = dcp_global_plan_build(plans, 3, false, &global, &err);
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        succeeded = rc == 0;
        if (succeeded) {
            CHECK(n > 20);
            dcp_global_plan_clean_up(&global);
        }
    }
    CHECK(succeeded);
    maker_clean_up_plans(plans, 3);
}

CTEST_MAIN(RUN(dedup_keeps_what_the_naive_loop_keeps); RUN(replicas_spread_by_true_bytes);
           RUN(equal_names_are_found_whatever_their_order);
           RUN(entries_come_in_order_of_first_kept_item_and_hold_every_kept_item_once);
           RUN(what_torch_asserts_about_names_fails);
           RUN(a_scalar_and_an_object_of_one_name_are_not_taken_for_replicas);
           RUN(objects_twice_in_one_plan_fail_as_in_torch);
           RUN(running_out_of_memory_is_reported_and_leaks_nothing);)

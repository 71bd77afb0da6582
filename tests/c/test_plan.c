/*
 * test_plan.c: building a plan checks every number, and its fingerprint sees every field.
 */
#include "ctest.h"
#include "plan_maker.h"

static const uint64_t ZEROS[DCP_MAX_DIMS];

static int
add(struct dcp_plan *plan, struct dcp_item item, const uint64_t *global_size,
    const uint64_t *offsets, const uint64_t *sizes)
{
    struct dcp_error err = {0};
    uint32_t before = plan->items_count;
    int rc = dcp_plan_add_item(plan, &item, global_size, offsets, sizes, &err);
    CHECK(rc == err.code);
    CHECK_EQ(plan->items_count, before + (rc == 0));
    return rc;
}

static void
items_keep_what_they_were_given(void)
{
    struct dcp_plan plan = {0};
    uint64_t size[] = {10, 6}, offsets[] = {4, 0}, sizes[] = {3, 6};
    maker_object(&plan, "step", 512);
    maker_shard(&plan, "w", DCP_DTYPE_BFLOAT16, 2, size, offsets, sizes);
    maker_tensor(&plan, "scalar", DCP_DTYPE_FLOAT64, 0, NULL);
    CHECK_EQ(plan.items_count, 3);
    const struct dcp_item *w = &plan.items[1];
    CHECK(memcmp(dcp_item_global_size(&plan, w), size, sizeof size) == 0);
    CHECK(memcmp(dcp_item_offsets(&plan, w), offsets, sizeof offsets) == 0);
    CHECK(memcmp(dcp_item_sizes(&plan, w), sizes, sizeof sizes) == 0);
    CHECK_EQ(dcp_item_payload_bytes(&plan, &plan.items[0]), 0);
    CHECK_EQ(dcp_item_payload_bytes(&plan, w), 36);
    CHECK_EQ(dcp_item_payload_bytes(&plan, &plan.items[2]), 8);
    CHECK_EQ(dcp_item_weight_bytes(&plan, &plan.items[0]), 512);
    CHECK_EQ(plan.names[w->name].fqn_len, 1);
    CHECK(plan.names[w->name].fqn[0] == 'w');
    dcp_plan_clean_up(&plan);
    dcp_plan_clean_up(&plan);
}

static void
a_plan_grows_far_beyond_its_first_arrays(void)
{
    struct dcp_plan plan = {0};
    struct dcp_error err = {0};
    char fqn[32];
    uint64_t size[3] = {0, 2, 3};
    for (uint32_t i = 0; i < 5000; i++) {
        uint32_t name;
        int len = snprintf(fqn, sizeof fqn, "layers.%u", i);
        CHECK_OK(dcp_plan_add_name(&plan, fqn, (size_t)len, NULL, 0, 0, &name, &err), &err);
        CHECK_EQ(name, i);
        size[0] = i;
        struct dcp_item item = {
            .name = name, .kind = DCP_ITEM_TENSOR, .dtype = DCP_DTYPE_INT8, .ndim = 3};
        CHECK_EQ(add(&plan, item, size, ZEROS, size), 0);
    }
    for (uint32_t i = 0; i < 5000; i++) {
        CHECK_EQ(dcp_item_payload_bytes(&plan, &plan.items[i]), 6 * (uint64_t)i);
    }
    dcp_plan_clean_up(&plan);
}

static void
items_that_make_no_sense_are_refused(void)
{
    struct dcp_plan plan = {0};
    uint64_t one[] = {1};
    maker_name(&plan, "x");
    const struct dcp_item good = {.kind = DCP_ITEM_TENSOR, .dtype = DCP_DTYPE_FLOAT32, .ndim = 1};
    struct dcp_item bad = good;
    bad.name = 1;
    CHECK_EQ(add(&plan, bad, one, ZEROS, one), DCP_E_INVALID);
    bad = good;
    bad.kind = 0;
    CHECK_EQ(add(&plan, bad, one, ZEROS, one), DCP_E_INVALID);
    bad.kind = 4;
    CHECK_EQ(add(&plan, bad, one, ZEROS, one), DCP_E_INVALID);
    bad = good;
    bad.dtype = DCP_DTYPE_COUNT;
    CHECK_EQ(add(&plan, bad, one, ZEROS, one), DCP_E_INVALID);
    bad.dtype = DCP_DTYPE_NONE;
    CHECK_EQ(add(&plan, bad, one, ZEROS, one), DCP_E_INVALID);
    bad.slot_bytes = 700;
    CHECK_EQ(add(&plan, bad, one, ZEROS, one), 0);
    bad = good;
    bad.props = 16;
    CHECK_EQ(add(&plan, bad, one, ZEROS, one), DCP_E_INVALID);
    bad = (struct dcp_item){.kind = DCP_ITEM_BYTES, .slot_bytes = 9, .ndim = 1};
    CHECK_EQ(add(&plan, bad, one, ZEROS, one), DCP_E_INVALID);
    bad = (struct dcp_item){.kind = DCP_ITEM_BYTES, .slot_bytes = 9, .dtype = DCP_DTYPE_INT8};
    CHECK_EQ(add(&plan, bad, NULL, NULL, NULL), DCP_E_INVALID);
    bad = (struct dcp_item){.kind = DCP_ITEM_BYTES, .slot_bytes = DCP_MAX_OBJECT_BYTES + 1};
    CHECK_EQ(add(&plan, bad, NULL, NULL, NULL), DCP_E_LIMIT);
    dcp_plan_clean_up(&plan);
}

static void
sizes_that_overflow_are_refused(void)
{
    struct dcp_plan plan = {0};
    uint64_t sizes[65];
    maker_name(&plan, "x");
    struct dcp_item item = {.kind = DCP_ITEM_SHARD, .dtype = DCP_DTYPE_FLOAT32, .ndim = 3};
    uint64_t wraps[] = {1ull << 32, 1ull << 32, 1}, one[] = {1, 1, 1};
    CHECK_EQ(add(&plan, item, wraps, ZEROS, one), DCP_E_LIMIT);
    CHECK_EQ(add(&plan, item, one, ZEROS, wraps), DCP_E_LIMIT);
    uint64_t large[] = {1ull << 54, 1, 1}, larger[] = {(1ull << 54) + 1, 1, 1};
    CHECK_EQ(add(&plan, item, large, ZEROS, large), 0);
    CHECK_EQ(add(&plan, item, larger, ZEROS, larger), DCP_E_LIMIT);
    uint64_t negative[] = {UINT64_MAX, 1, 1}, empty[] = {0, 1ull << 62, 1ull << 62};
    CHECK_EQ(add(&plan, item, negative, ZEROS, one), DCP_E_LIMIT);
    CHECK_EQ(add(&plan, item, one, negative, one), DCP_E_LIMIT);
    CHECK_EQ(add(&plan, item, one, ZEROS, negative), DCP_E_LIMIT);
    CHECK_EQ(add(&plan, item, empty, ZEROS, empty), 0);
    CHECK_EQ(dcp_item_payload_bytes(&plan, &plan.items[1]), 0);
    for (uint32_t d = 0; d < 65; d++) {
        sizes[d] = 1;
    }
    item.ndim = 64;
    CHECK_EQ(add(&plan, item, sizes, ZEROS, sizes), 0);
    item.ndim = 65;
    CHECK_EQ(add(&plan, item, sizes, sizes, sizes), DCP_E_LIMIT);
    dcp_plan_clean_up(&plan);
}

static void
names_beyond_the_limits_are_refused(void)
{
    struct dcp_plan plan = {0};
    struct dcp_error err = {0};
    uint32_t name = 77;
    char *text = calloc(1, DCP_MAX_FQN_BYTES + 1);
    CHECK_EQ(dcp_plan_add_name(&plan, text, DCP_MAX_FQN_BYTES + 1, NULL, 0, 0, &name, &err),
             DCP_E_LIMIT);
    CHECK_EQ(name, 77);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_plan_add_name(&plan, "a", 1, (const uint8_t *)text, 4, DCP_MAX_PATH_PARTS + 1,
                               &name, &err),
             DCP_E_LIMIT);
    dcp_error_clear(&err);
    CHECK_OK(dcp_plan_add_name(&plan, text, DCP_MAX_FQN_BYTES, NULL, 0, 0, &name, &err), &err);
    CHECK_EQ(plan.names_count, 1);
    free(text);
    dcp_plan_clean_up(&plan);
}

static void
paths_come_back_part_by_part(void)
{
    struct dcp_buf path = {0};
    dcp_path_put_str(&path, "model", 5);
    dcp_path_put_int(&path, 300);
    dcp_path_put_str(&path, "", 0);
    struct dcp_cursor c = {.data = path.data, .len = path.len};
    bool is_int;
    uint64_t index;
    struct dcp_span text;
    CHECK(dcp_path_next(&c, &is_int, &index, &text));
    CHECK(!is_int && text.len == 5 && memcmp(text.data, "model", 5) == 0);
    CHECK(dcp_path_next(&c, &is_int, &index, &text) && is_int && index == 300);
    CHECK(dcp_path_next(&c, &is_int, &index, &text) && !is_int && text.len == 0);
    CHECK(!dcp_path_next(&c, &is_int, &index, &text) && !c.failed);
    for (size_t len = 1; len < path.len; len++) {
        bool at_border = len == 7 || len == 10;
        c = (struct dcp_cursor){.data = path.data, .len = len};
        while (dcp_path_next(&c, &is_int, &index, &text)) {
        }
        CHECK(c.failed == !at_border);
    }
    c = (struct dcp_cursor){.data = (const uint8_t *)"x\1a", .len = 3};
    CHECK(!dcp_path_next(&c, &is_int, &index, &text) && c.failed);
    dcp_buf_clean_up(&path);
}

static bool
same_hash(struct dcp_hash128 a, struct dcp_hash128 b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

static void
sample_plan(struct dcp_plan *plan, const char *first_name)
{
    uint64_t size[] = {10, 6}, offsets[] = {4, 0}, sizes[] = {3, 6};
    *plan = (struct dcp_plan){.rank = 3, .thread_count = 2, .single_file_per_rank = true};
    maker_object(plan, first_name, 512);
    maker_shard(plan, "w", DCP_DTYPE_FLOAT32, 2, size, offsets, sizes);
    maker_tensor(plan, "b", DCP_DTYPE_FLOAT32, 1, sizes);
}

static void
equal_plans_have_equal_fingerprints(void)
{
    struct dcp_plan a, b;
    sample_plan(&a, "step");
    sample_plan(&b, "step");
    CHECK(same_hash(dcp_plan_fingerprint(&a, 7), dcp_plan_fingerprint(&b, 7)));
    CHECK(!same_hash(dcp_plan_fingerprint(&a, 7), dcp_plan_fingerprint(&a, 8)));
    dcp_plan_clean_up(&a);
    dcp_plan_clean_up(&b);
}

static void
every_field_changes_the_fingerprint(void)
{
    struct dcp_plan plan;
    sample_plan(&plan, "step");
    struct dcp_hash128 before = dcp_plan_fingerprint(&plan, 0);
#define MUST_DIFFER(field, value)                                                                  \
    do {                                                                                           \
        struct dcp_plan kept = plan;                                                               \
        struct dcp_item items[3];                                                                  \
        struct dcp_name names[3];                                                                  \
        memcpy(items, plan.items, sizeof items);                                                   \
        memcpy(names, plan.names, sizeof names);                                                   \
        plan.field = (value);                                                                      \
        CHECK(!same_hash(before, dcp_plan_fingerprint(&plan, 0)));                                 \
        plan = kept;                                                                               \
        memcpy(plan.items, items, sizeof items);                                                   \
        memcpy(plan.names, names, sizeof names);                                                   \
    } while (0)
    MUST_DIFFER(rank, 4);
    MUST_DIFFER(thread_count, 3);
    MUST_DIFFER(single_file_per_rank, false);
    MUST_DIFFER(has_paths, true);
    MUST_DIFFER(content_hash, true);
    MUST_DIFFER(items_count, 2);
    MUST_DIFFER(names_count, 2);
    MUST_DIFFER(items[1].name, 2);
    MUST_DIFFER(items[1].kind, DCP_ITEM_TENSOR);
    MUST_DIFFER(items[1].dtype, DCP_DTYPE_INT32);
    MUST_DIFFER(items[1].props, DCP_PROP_REQUIRES_GRAD);
    MUST_DIFFER(items[0].slot_bytes, 640);
    MUST_DIFFER(names[0].fqn, "stop");
    MUST_DIFFER(names[0].path, NULL);
    MUST_DIFFER(names[0].path_parts, 2);
#undef MUST_DIFFER
    for (uint64_t i = 0; i < plan.dims_count; i++) {
        plan.dims[i]++;
        CHECK(!same_hash(before, dcp_plan_fingerprint(&plan, 0)));
        plan.dims[i]--;
    }
    CHECK(same_hash(before, dcp_plan_fingerprint(&plan, 0)));
    dcp_plan_clean_up(&plan);
}

static void
fingerprints_of_long_plans_see_the_last_byte_and_every_border(void)
{
    struct dcp_error err = {0};
    char text[6000];
    memset(text, 'x', sizeof text);
    struct dcp_hash128 seen[64];
    uint32_t seen_count = 0;
    for (uint32_t at = 0; at < 6000; at += 100) {
        struct dcp_plan plan = {0};
        uint32_t name;
        CHECK_OK(dcp_plan_add_name(&plan, text, at, NULL, 0, 0, &name, &err), &err);
        CHECK_OK(dcp_plan_add_name(&plan, text, 6000 - at, NULL, 0, 0, &name, &err), &err);
        struct dcp_hash128 hash = dcp_plan_fingerprint(&plan, 0);
        for (uint32_t i = 0; i < seen_count; i++) {
            CHECK(!same_hash(hash, seen[i]));
        }
        seen[seen_count++] = hash;
        dcp_plan_clean_up(&plan);
    }
}

static void
running_out_of_memory_leaves_a_sound_plan(void)
{
    for (uint64_t n = 1; n < 40; n++) {
        struct dcp_plan plan = {0};
        struct dcp_error err = {0};
        uint64_t size[] = {4, 4};
        dcp_alloc_fail_after(n);
        int rc = 0;
        uint32_t added = 0;
        for (uint32_t i = 0; rc == 0 && i < 300; i++) {
            uint32_t name;
            rc = dcp_plan_add_name(&plan, "n", 1, NULL, 0, 0, &name, &err);
            struct dcp_item item = {.kind = DCP_ITEM_TENSOR, .dtype = DCP_DTYPE_INT8, .ndim = 2};
            rc = rc != 0 ? rc : dcp_plan_add_item(&plan, &item, size, ZEROS, size, &err);
            added += rc == 0;
        }
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        CHECK_EQ(plan.items_count, added);
        CHECK(rc == 0 || n < 20);
        dcp_plan_clean_up(&plan);
    }
}

CTEST_MAIN(RUN(items_keep_what_they_were_given); RUN(a_plan_grows_far_beyond_its_first_arrays);
           RUN(items_that_make_no_sense_are_refused); RUN(sizes_that_overflow_are_refused);
           RUN(names_beyond_the_limits_are_refused); RUN(paths_come_back_part_by_part);
           RUN(equal_plans_have_equal_fingerprints); RUN(every_field_changes_the_fingerprint);
           RUN(fingerprints_of_long_plans_see_the_last_byte_and_every_border);
           RUN(running_out_of_memory_leaves_a_sound_plan);)

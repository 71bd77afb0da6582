/*
 * test_read_delivery.c: what a read plan says of the memory of its targets, step by step.
 */
#include "ctest.h"

#include "dcp_engine.h"

enum { TARGETS = 4 };

/* One entry of 8x2 float32 in two chunks of 4 rows, one object; targets: all of it (two items), the
 * first chunk alone, two rows of it, the object, and one that no chunk covers. */
struct fixture {
    struct dcp_metadata md;
    struct dcp_md_entry entries[2];
    struct dcp_md_chunk chunks[3];
    uint64_t md_dims[10];
    struct dcp_read_plan plan;
};

static void
fixture_init(struct fixture *f)
{
    static const uint64_t dims[10] = {8, 2, 0, 0, 4, 2, 4, 0, 4, 2};
    static const struct {
        uint64_t offset, rows;
    } boxes[] = {{0, 8}, {0, 4}, {1, 2}};
    static uint8_t memory[64];
    memset(f, 0, sizeof *f);
    memcpy(f->md_dims, dims, sizeof dims);
    f->entries[0] = (struct dcp_md_entry){
        .kind = DCP_ITEM_TENSOR, .dtype = DCP_DTYPE_FLOAT32, .ndim = 2, .chunks_count = 2};
    f->entries[1] =
        (struct dcp_md_entry){.kind = DCP_ITEM_BYTES, .first_chunk = 2, .chunks_count = 1};
    f->chunks[0].dims = 2;
    f->chunks[1].dims = 6;
    f->chunks[2].length_bytes = 700;
    f->md = (struct dcp_metadata){.strings = "",
                                  .entries = f->entries,
                                  .entries_count = 2,
                                  .chunks = f->chunks,
                                  .chunks_count = 3,
                                  .dims = f->md_dims,
                                  .dims_count = 10};
    f->plan.md = &f->md;
    struct dcp_error err;
    dcp_error_clear(&err);
    for (size_t i = 0; i < 3; i++) {
        uint64_t offsets[2] = {boxes[i].offset, 0}, sizes[2] = {boxes[i].rows, 2}, target;
        CHECK(dcp_read_plan_add(&f->plan, 0, memory, NULL, offsets, sizes, &target, &err) == 0);
    }
    CHECK(dcp_read_plan_add(&f->plan, 1, NULL, NULL, NULL, NULL, NULL, &err) == 0);
    uint64_t holes = 1;
    CHECK(dcp_read_plan_build(&f->plan, true, &holes, &err) == 0);
    CHECK(holes == 0);
}

static void
states(struct fixture *f, enum dcp_target_state others, uint8_t *ret)
{
    struct dcp_error err;
    dcp_error_clear(&err);
    memset(ret, 0xFF, TARGETS);
    CHECK(dcp_read_plan_states(&f->plan, others, ret, &err) == 0);
}

static void
a_target_is_filled_when_the_last_of_its_bytes_is_there(void)
{
    struct fixture f;
    uint8_t state[TARGETS];
    struct dcp_error err;
    fixture_init(&f);
    dcp_error_clear(&err);
    CHECK(dcp_read_plan_track(&f.plan, &err) == 0);
    states(&f, DCP_TARGET_UNTOUCHED, state);
    CHECK(state[0] == DCP_TARGET_UNTOUCHED && state[3] == DCP_TARGET_UNTOUCHED);

    dcp_target_touch(&f.plan, 0); /* memory may change from here on, without a byte delivered */
    states(&f, DCP_TARGET_UNTOUCHED, state);
    CHECK(state[0] == DCP_TARGET_PARTLY && state[1] == DCP_TARGET_UNTOUCHED);
    dcp_target_deliver(&f.plan, 0, 63);
    states(&f, DCP_TARGET_UNTOUCHED, state);
    CHECK(state[0] == DCP_TARGET_PARTLY);
    dcp_target_touch(&f.plan, 0);
    dcp_target_deliver(&f.plan, 0, 1);
    states(&f, DCP_TARGET_UNTOUCHED, state);
    CHECK(state[0] == DCP_TARGET_FILLED && state[2] == DCP_TARGET_UNTOUCHED);

    dcp_target_touch(&f.plan, 2);
    dcp_target_deliver(&f.plan, 2, 2 * 2 * 4);
    states(&f, DCP_TARGET_UNTOUCHED, state);
    CHECK(state[2] == DCP_TARGET_FILLED);
    dcp_target_spoil(&f.plan, 2);
    states(&f, DCP_TARGET_UNTOUCHED, state);
    CHECK(state[2] == DCP_TARGET_PARTLY && state[0] == DCP_TARGET_FILLED);
    dcp_read_plan_clean_up(&f.plan);
}

static void
objects_are_as_the_caller_says(void)
{
    struct fixture f;
    uint8_t state[TARGETS];
    struct dcp_error err;
    fixture_init(&f);
    dcp_error_clear(&err);
    CHECK(dcp_read_plan_track(&f.plan, &err) == 0);
    dcp_target_touch(&f.plan, 3);
    dcp_target_deliver(&f.plan, 3, 700);
    for (int others = DCP_TARGET_UNTOUCHED; others <= DCP_TARGET_FILLED; others++) {
        states(&f, (enum dcp_target_state)others, state);
        CHECK(state[3] == others && state[0] == DCP_TARGET_UNTOUCHED);
    }
    dcp_read_plan_clean_up(&f.plan);
}

static void
a_plan_that_nobody_counts_is_untouched(void)
{
    struct fixture f;
    uint8_t state[TARGETS];
    fixture_init(&f);
    dcp_target_touch(&f.plan, 0);
    dcp_target_deliver(&f.plan, 0, 64);
    states(&f, DCP_TARGET_UNTOUCHED, state);
    CHECK(state[0] == DCP_TARGET_UNTOUCHED);
    dcp_read_plan_clean_up(&f.plan);
}

static void
only_an_item_that_is_its_chunk_and_its_target_is_whole(void)
{
    struct fixture f;
    uint64_t items[TARGETS] = {0}, whole[TARGETS] = {0}, bytes[TARGETS] = {0};
    fixture_init(&f);
    for (uint64_t i = 0; i < f.plan.items_count; i++) {
        const struct dcp_read_item *item = &f.plan.items[i];
        items[item->target]++;
        whole[item->target] += dcp_read_item_is_whole(&f.plan, item);
        bytes[item->target] += dcp_read_item_bytes(&f.plan, item);
    }
    CHECK(items[0] == 2 && whole[0] == 0 && bytes[0] == 64);
    CHECK(items[1] == 1 && whole[1] == 1 && bytes[1] == 32);
    CHECK(items[2] == 1 && whole[2] == 0 && bytes[2] == 16);
    CHECK(items[3] == 1 && whole[3] == 1 && bytes[3] == 700);
    dcp_read_plan_clean_up(&f.plan);
}

static void
without_memory_nothing_is_counted_and_nothing_lost(void)
{
    struct fixture f;
    uint8_t state[TARGETS];
    struct dcp_error err;
    fixture_init(&f);
    dcp_error_clear(&err);
    dcp_alloc_fail_after(1);
    CHECK(dcp_read_plan_track(&f.plan, &err) == DCP_E_NOMEM);
    dcp_alloc_fail_after(0);
    CHECK(f.plan.delivered == NULL);
    dcp_error_clear(&err);
    dcp_alloc_fail_after(1);
    CHECK(dcp_read_plan_states(&f.plan, DCP_TARGET_UNTOUCHED, state, &err) == DCP_E_NOMEM);
    dcp_alloc_fail_after(0);
    dcp_read_plan_clean_up(&f.plan);
}

CTEST_MAIN(RUN(a_target_is_filled_when_the_last_of_its_bytes_is_there);
           RUN(objects_are_as_the_caller_says); RUN(a_plan_that_nobody_counts_is_untouched);
           RUN(only_an_item_that_is_its_chunk_and_its_target_is_whole);
           RUN(without_memory_nothing_is_counted_and_nothing_lost);)

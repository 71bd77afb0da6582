/*
 * test_read_plan.c: overlaps and holes against a naive reference that marks every element.
 */
#include "ctest.h"

#include "plan_maker.h"
#include "dcp_engine.h"

enum { MAX_CHUNKS = 64, SIDE = 9 };

/* A metadata with one tensor whose chunks the test chooses. */
struct fixture {
    struct dcp_metadata md;
    struct dcp_md_entry entries[2];
    struct dcp_md_chunk chunks[MAX_CHUNKS + 1];
    uint64_t dims[4 + MAX_CHUNKS * 8];
};

static void
fixture_init(struct fixture *f, uint32_t ndim, const uint64_t *size)
{
    static char strings[] = "weightobject";
    memset(f, 0, sizeof *f);
    f->entries[0] = (struct dcp_md_entry){.name = 0,
                                          .name_len = 6,
                                          .kind = DCP_ITEM_TENSOR,
                                          .dtype = DCP_DTYPE_FLOAT32,
                                          .ndim = (uint8_t)ndim};
    f->entries[1] = (struct dcp_md_entry){.name = 6,
                                          .name_len = 6,
                                          .kind = DCP_ITEM_BYTES,
                                          .first_chunk = MAX_CHUNKS,
                                          .chunks_count = 1};
    f->md = (struct dcp_metadata){.strings = strings,
                                  .strings_len = sizeof strings - 1,
                                  .entries = f->entries,
                                  .entries_count = 2,
                                  .chunks = f->chunks,
                                  .chunks_count = MAX_CHUNKS + 1,
                                  .dims = f->dims};
    memcpy(f->dims, size, ndim * sizeof *size);
    f->md.dims_count = ndim;
}

static void
fixture_chunk(struct fixture *f, const uint64_t *offsets, const uint64_t *sizes)
{
    struct dcp_md_entry *entry = &f->entries[0];
    f->chunks[entry->chunks_count++].dims = f->md.dims_count;
    memcpy(f->dims + f->md.dims_count, offsets, entry->ndim * sizeof *offsets);
    f->md.dims_count += entry->ndim;
    memcpy(f->dims + f->md.dims_count, sizes, entry->ndim * sizeof *sizes);
    f->md.dims_count += entry->ndim;
}

static bool
inside(uint32_t ndim, const uint64_t *at, const uint64_t *offsets, const uint64_t *sizes)
{
    for (uint32_t d = 0; d < ndim; d++) {
        if (at[d] < offsets[d] || at[d] >= offsets[d] + sizes[d]) {
            return false;
        }
    }
    return true;
}

/* Marks, element by element, what the chunks cover and what the items say. */
static void
check_target(const struct fixture *f, const struct dcp_read_plan *plan, uint64_t target,
             uint64_t *ret_missing)
{
    uint32_t ndim = f->entries[0].ndim;
    const uint64_t *box = plan->dims + plan->targets[target].dims;
    uint64_t cells = 1;
    for (uint32_t d = 0; d < ndim; d++) {
        cells *= SIDE;
    }
    for (uint64_t cell = 0; cell < cells; cell++) {
        uint64_t at[4] = {0}, rest = cell;
        for (uint32_t d = ndim; d > 0; d--) {
            at[d - 1] = rest % SIDE;
            rest /= SIDE;
        }
        if (!inside(ndim, at, box, box + ndim)) {
            continue;
        }
        bool covered = false;
        for (uint64_t c = 0; c < f->entries[0].chunks_count; c++) {
            const uint64_t *chunk = f->dims + f->chunks[c].dims;
            bool want = inside(ndim, at, chunk, chunk + ndim), got = false;
            for (uint64_t i = 0; i < plan->items_count; i++) {
                const struct dcp_read_item *item = &plan->items[i];
                const uint64_t *dims = plan->dims + item->dims;
                uint64_t start[4] = {0};
                if (item->chunk != c || item->target != target) {
                    continue;
                }
                for (uint32_t d = 0; d < ndim; d++) {
                    start[d] = box[d] + dims[ndim + d];
                    CHECK_EQ(start[d], chunk[d] + dims[d]);
                }
                CHECK(!got);
                got = inside(ndim, at, start, dims + 2 * ndim);
            }
            CHECK(want == got);
            covered = covered || want;
        }
        *ret_missing += covered ? 0 : 1;
    }
}

static void
random_box(struct maker_rng *rng, uint32_t ndim, uint64_t *offsets, uint64_t *sizes)
{
    for (uint32_t d = 0; d < ndim; d++) {
        offsets[d] = maker_below(rng, SIDE + 1);
        sizes[d] = maker_below(rng, SIDE + 1 - offsets[d]);
    }
}

static void
items_and_holes_equal_a_naive_reference_also_for_chunks_that_overlap(void)
{
    struct maker_rng rng = {11};
    uint64_t size[4] = {SIDE, SIDE, SIDE, SIDE};
    for (int round = 0; round < 400; round++) {
        uint32_t ndim = (uint32_t)maker_below(&rng, 4);
        struct fixture f;
        fixture_init(&f, ndim, size);
        uint64_t chunks = maker_below(&rng, 12);
        for (uint64_t c = 0; c < chunks; c++) {
            uint64_t offsets[4], sizes[4];
            random_box(&rng, ndim, offsets, sizes);
            fixture_chunk(&f, offsets, sizes);
        }
        struct dcp_read_plan plan = {.md = &f.md};
        struct dcp_error err = {0};
        uint8_t memory[4];
        for (int t = 0; t < 3; t++) {
            uint64_t offsets[4], sizes[4];
            random_box(&rng, ndim, offsets, sizes);
            CHECK_OK(dcp_read_plan_add(&plan, 0, memory, NULL, offsets, sizes, NULL, &err), &err);
        }
        uint64_t hole_bytes = 0, missing = 0;
        CHECK_OK(dcp_read_plan_build(&plan, false, &hole_bytes, &err), &err);
        for (uint64_t t = 0; t < 3; t++) {
            check_target(&f, &plan, t, &missing);
        }
        CHECK_EQ(hole_bytes, missing * 4);
        int rc = dcp_read_plan_build(&plan, true, NULL, &err);
        CHECK_EQ(rc, missing > 0 ? DCP_E_HOLE : 0);
        CHECK(missing == 0 || strstr(err.message, "weight") != NULL);
        dcp_read_plan_clean_up(&plan);
    }
}

static void
a_grid_is_covered_exactly(void)
{
    uint64_t size[3] = {SIDE, SIDE, SIDE};
    struct fixture f;
    fixture_init(&f, 3, size);
    for (uint64_t c = 0; c < 27; c++) {
        uint64_t offsets[3] = {c / 9 * 3, c / 3 % 3 * 3, c % 3 * 3}, sizes[3] = {3, 3, 3};
        fixture_chunk(&f, offsets, sizes);
    }
    struct dcp_read_plan plan = {.md = &f.md};
    struct dcp_error err = {0};
    uint8_t memory[4];
    uint64_t offsets[3] = {1, 2, 3}, sizes[3] = {8, 4, 6}, missing = 0;
    CHECK_OK(dcp_read_plan_add(&plan, 0, memory, NULL, offsets, sizes, NULL, &err), &err);
    CHECK_OK(dcp_read_plan_build(&plan, true, NULL, &err), &err);
    CHECK_EQ(plan.items_count, 3 * 2 * 2);
    CHECK_EQ(plan.wanted_bytes, 8 * 4 * 6 * 4);
    check_target(&f, &plan, 0, &missing);
    CHECK_EQ(missing, 0);
    dcp_read_plan_clean_up(&plan);
}

static void
objects_are_one_item_and_targets_come_in_any_order(void)
{
    uint64_t size[1] = {SIDE}, offsets[1] = {0}, sizes[1] = {SIDE};
    struct fixture f;
    fixture_init(&f, 1, size);
    fixture_chunk(&f, offsets, sizes);
    struct dcp_read_plan plan = {.md = &f.md};
    struct dcp_error err = {0};
    uint8_t memory[4];
    uint64_t target;
    CHECK_OK(dcp_read_plan_add(&plan, 1, NULL, NULL, NULL, NULL, &target, &err), &err);
    CHECK_EQ(target, 0);
    CHECK_OK(dcp_read_plan_add(&plan, 0, memory, NULL, offsets, sizes, &target, &err), &err);
    CHECK_EQ(target, 1);
    CHECK_OK(dcp_read_plan_build(&plan, true, NULL, &err), &err);
    CHECK_EQ(plan.items_count, 2);
    CHECK_EQ(plan.objects_count, 1);
    for (uint64_t i = 0; i < 2; i++) {
        CHECK_EQ(plan.items[i].chunk, plan.items[i].target == 0 ? MAX_CHUNKS : 0);
    }
    dcp_read_plan_clean_up(&plan);
}

static void
boxes_outside_the_tensor_are_refused(void)
{
    uint64_t size[2] = {4, 4}, ok[2] = {4, 1}, bad[2] = {2, 5}, huge[2] = {UINT64_MAX, 1};
    struct fixture f;
    fixture_init(&f, 2, size);
    struct dcp_read_plan plan = {.md = &f.md};
    struct dcp_error err = {0};
    uint8_t memory[4];
    uint64_t zero[2] = {0, 0};
    CHECK_EQ(dcp_read_plan_add(&plan, 0, memory, NULL, zero, bad, NULL, &err), DCP_E_MISMATCH);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_read_plan_add(&plan, 0, memory, NULL, huge, huge, NULL, &err), DCP_E_MISMATCH);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_read_plan_add(&plan, 2, memory, NULL, zero, ok, NULL, &err), DCP_E_INVALID);
    CHECK_EQ(plan.targets_count, 0);
    dcp_read_plan_clean_up(&plan);
}

static void
chunks_without_a_file_are_named_when_wanted(void)
{
    uint64_t size[1] = {8}, left[1] = {0}, right[1] = {4}, half[1] = {4};
    struct fixture f;
    fixture_init(&f, 1, size);
    fixture_chunk(&f, left, half);
    fixture_chunk(&f, right, half);
    f.chunks[1].file = DCP_NO_FILE;
    struct dcp_error err = {0};
    uint8_t memory[4];
    for (int wanted = 0; wanted < 2; wanted++) {
        struct dcp_read_plan plan = {.md = &f.md};
        CHECK_OK(dcp_read_plan_add(&plan, 0, memory, NULL, wanted ? right : left, half, NULL, &err),
                 &err);
        CHECK_EQ(dcp_read_plan_build(&plan, true, NULL, &err), wanted ? DCP_E_MISSING : 0);
        dcp_read_plan_clean_up(&plan);
    }
}

CTEST_MAIN(RUN(items_and_holes_equal_a_naive_reference_also_for_chunks_that_overlap);
           RUN(a_grid_is_covered_exactly); RUN(objects_are_one_item_and_targets_come_in_any_order);
           RUN(boxes_outside_the_tensor_are_refused);
           RUN(chunks_without_a_file_are_named_when_wanted);)

/*
 * test_validate.c: bad plans get torch's text, good ones pass, however their chunks lie.
 *
 * The texts are those of torch 2.13's _validate_global_plan, compared run against run.
 */
#include "ctest.h"
#include "plan_maker.h"

#define CHECK_TEXT(err, text)                                                                      \
    do {                                                                                           \
        CHECK(strcmp((err)->message, (text)) == 0);                                                \
        if (strcmp((err)->message, (text)) != 0) {                                                 \
            fprintf(stderr, "  got %s\n", (err)->message);                                         \
        }                                                                                          \
    } while (0)

static void
a_chunk_out_of_bounds_is_named_as_torch_names_it(void)
{
    struct dcp_plan plans[1];
    struct dcp_error err;
    maker_start_plans(plans, 1);
    maker_shard2(&plans[0], "w", 4, 4, 3, 0, 2, 4);
    CHECK_EQ(maker_build(plans, 1, &err), DCP_E_PLAN);
    CHECK_TEXT(&err, "Failed to validate global plan: key:w has out of bounds chunk: "
                     "tensor-size:torch.Size([4, 4]) chunk: ChunkStorageMetadata(offsets="
                     "torch.Size([3, 0]), sizes=torch.Size([2, 4]))");
    maker_clean_up_plans(plans, 1);
}

static void
overlapping_chunks_are_named_as_torch_names_them(void)
{
    struct dcp_plan plans[2];
    struct dcp_error err;
    maker_start_plans(plans, 2);
    maker_shard2(&plans[0], "w", 4, 4, 0, 0, 3, 4);
    maker_shard2(&plans[1], "w", 4, 4, 2, 0, 1, 4);
    CHECK_EQ(maker_build(plans, 2, &err), DCP_E_PLAN);
    CHECK_TEXT(&err, "Failed to validate global plan: key:w has overlapping chunks: "
                     "ChunkStorageMetadata(offsets=torch.Size([2, 0]), sizes=torch.Size([1, 4])) "
                     "ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([3, 4]))");
    maker_clean_up_plans(plans, 2);
}

static void
holes_are_reported_only_when_there_are_several_plans(void)
{
    struct dcp_plan plans[2];
    struct dcp_error err;
    maker_start_plans(plans, 2);
    maker_shard2(&plans[0], "w", 4, 4, 0, 0, 3, 4);
    CHECK_EQ(maker_build(plans, 1, &err), 0);
    CHECK_EQ(maker_build(plans, 2, &err), DCP_E_PLAN);
    CHECK_TEXT(&err, "Failed to validate global plan: key:w invalid fill tensor-volume: 16 "
                     "chunks-volume: 12");
    maker_clean_up_plans(plans, 2);
}

static void
messages_are_joined_in_torchs_order_and_cut_at_500_characters(void)
{
    struct dcp_plan plans[2];
    struct dcp_error err;
    static const char prefix[] = "Failed to validate global plan: ";
    static const char mark[] = "... (truncated)";
    maker_start_plans(plans, 2);
    maker_shard2(&plans[0], "b", 4, 4, 0, 0, 4, 2);
    maker_shard2(&plans[0], "a", 2, 2, 0, 0, 1, 2);
    CHECK_EQ(maker_build(plans, 2, &err), DCP_E_PLAN);
    CHECK_TEXT(&err, "Failed to validate global plan: key:b invalid fill tensor-volume: 16 "
                     "chunks-volume: 8; key:a invalid fill tensor-volume: 4 chunks-volume: 2");
    for (uint64_t i = 0; i < 100; i++) {
        char fqn[32];
        snprintf(fqn, sizeof fqn, "\xC3\xA9\xE2\x82\xAC%u", (unsigned)i);
        maker_shard2(&plans[1], fqn, 4, 4, 0, 0, 4, 3);
    }
    CHECK_EQ(maker_build(plans, 2, &err), DCP_E_PLAN);
    size_t len = strlen(err.message), chars = 0;
    for (size_t i = 0; i < len; i++) {
        chars += ((uint8_t)err.message[i] & 0xC0) != 0x80;
    }
    CHECK_EQ(chars, sizeof prefix - 1 + 500 + sizeof mark - 1);
    CHECK(strcmp(err.message + len - (sizeof mark - 1), mark) == 0);
    maker_clean_up_plans(plans, 2);
}

static void
a_million_overlaps_cost_no_more_than_the_text_that_names_them(void)
{
    struct dcp_plan plans[2];
    struct dcp_error err;
    maker_start_plans(plans, 2);
    for (uint64_t i = 0; i < 4000; i++) {
        maker_shard2(&plans[i & 1], "w", 100000, 100000, i, i, 50000, 50000);
    }
    CHECK_EQ(maker_build(plans, 2, &err), DCP_E_PLAN);
    CHECK(strlen(err.message) > 500);
    maker_clean_up_plans(plans, 2);
}

static void
chunks_of_another_rank_count_are_out_of_bounds(void)
{
    struct dcp_plan plans[2];
    struct dcp_error err;
    uint64_t size[] = {4}, zero[] = {2}, half[] = {2};
    maker_start_plans(plans, 2);
    maker_shard2(&plans[0], "w", 4, 4, 0, 0, 2, 4);
    maker_shard(&plans[1], "w", DCP_DTYPE_FLOAT32, 1, size, zero, half);
    CHECK_EQ(maker_build(plans, 2, &err), DCP_E_PLAN);
    CHECK(strstr(err.message, "out of bounds chunk") != NULL);
    maker_clean_up_plans(plans, 2);
}

static bool
rows_overlap(const uint64_t *a, const uint64_t *b, uint32_t ndim)
{
    bool overlap = true;
    for (uint32_t d = 0; d < ndim; d++) {
        overlap = overlap && a[d] < b[d] + b[ndim + d] && b[d] < a[d] + a[ndim + d];
    }
    return overlap;
}

/* Guillotine cuts of a box at random; then one box may be moved or grown. */
static uint32_t
random_boxes(struct maker_rng *rng, uint32_t ndim, uint64_t (*boxes)[6])
{
    uint32_t count = 1;
    for (uint32_t d = 0; d < ndim; d++) {
        boxes[0][d] = 0;
        boxes[0][ndim + d] = 16;
    }
    for (uint64_t cuts = maker_below(rng, 30); cuts > 0; cuts--) {
        uint32_t b = (uint32_t)maker_below(rng, count);
        uint32_t d = (uint32_t)maker_below(rng, ndim);
        uint64_t first = maker_below(rng, boxes[b][ndim + d] + 1);
        memcpy(boxes[count], boxes[b], sizeof boxes[b]);
        boxes[b][ndim + d] = first;
        boxes[count][d] += first;
        boxes[count++][ndim + d] -= first;
    }
    if (maker_below(rng, 2) == 0) {
        uint32_t b = (uint32_t)maker_below(rng, count);
        uint32_t d = (uint32_t)maker_below(rng, ndim);
        if (maker_below(rng, 2) == 0) {
            boxes[b][d] = maker_below(rng, 16);
        }
        boxes[b][ndim + d] = maker_below(rng, 17 - boxes[b][d]);
    }
    return count;
}

static void
overlaps_are_found_exactly_when_two_boxes_overlap(void)
{
    uint32_t found = 0, clean = 0;
    for (uint64_t seed = 0; seed < 3000; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plan;
        struct dcp_error err;
        uint64_t boxes[32][6], size[] = {16, 16, 16};
        uint32_t ndim = 1 + (uint32_t)maker_below(&rng, 3);
        uint32_t count = random_boxes(&rng, ndim, boxes);
        maker_start_plans(&plan, 1);
        bool overlap = false;
        for (uint32_t i = 0; i < count; i++) {
            maker_shard(&plan, "w", DCP_DTYPE_INT8, ndim, size, boxes[i], boxes[i] + ndim);
            for (uint32_t j = 0; j < i; j++) {
                overlap = overlap || rows_overlap(boxes[i], boxes[j], ndim);
            }
        }
        int rc = maker_build(&plan, 1, &err);
        CHECK_EQ(rc, overlap ? DCP_E_PLAN : 0);
        CHECK(!overlap || strstr(err.message, "key:w has overlapping chunks: ") != NULL);
        found += overlap;
        clean += !overlap;
        dcp_plan_clean_up(&plan);
    }
    CHECK(found > 500 && clean > 500);
}

static void
pinwheels_and_large_shuffled_grids_are_valid(void)
{
    struct dcp_plan plans[2];
    struct dcp_error err;
    maker_start_plans(plans, 2);
    maker_shard2(&plans[0], "pinwheel", 3, 3, 0, 0, 1, 2);
    maker_shard2(&plans[0], "pinwheel", 3, 3, 0, 2, 2, 1);
    maker_shard2(&plans[1], "pinwheel", 3, 3, 2, 1, 1, 2);
    maker_shard2(&plans[1], "pinwheel", 3, 3, 1, 0, 2, 1);
    maker_shard2(&plans[1], "pinwheel", 3, 3, 1, 1, 1, 1);
    for (uint64_t i = 0; i < 160 * 160; i++) {
        uint64_t cell = i * 10007 % (160 * 160);
        maker_shard2(&plans[i & 1], "grid", 1600, 1600, cell / 160 * 10, cell % 160 * 10, 10, 10);
    }
    CHECK_EQ(maker_build(plans, 2, &err), 0);
    maker_clean_up_plans(plans, 2);
}

CTEST_MAIN(RUN(a_chunk_out_of_bounds_is_named_as_torch_names_it);
           RUN(overlapping_chunks_are_named_as_torch_names_them);
           RUN(holes_are_reported_only_when_there_are_several_plans);
           RUN(messages_are_joined_in_torchs_order_and_cut_at_500_characters);
           RUN(a_million_overlaps_cost_no_more_than_the_text_that_names_them);
           RUN(chunks_of_another_rank_count_are_out_of_bounds);
           RUN(overlaps_are_found_exactly_when_two_boxes_overlap);
           RUN(pinwheels_and_large_shuffled_grids_are_valid);)

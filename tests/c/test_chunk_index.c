/*
 * test_chunk_index.c: overlaps of many chunks with targets against comparing every pair, what they
 * cover against counting cells, and how much of a tensor's chunks a search looks at.
 */
#include "ctest.h"

#include "box_cover.h"
#include "chunk_index.h"
#include "dcp_engine.h"
#include "plan_maker.h"

enum { MAX_CHUNKS = 5000, MAX_NDIM = 4, MAX_CUTS = 12, TARGETS = 3 };

/* One tensor whose chunks the test chooses. */
struct tensor {
    struct dcp_metadata md;
    struct dcp_md_entry entry;
    struct dcp_md_chunk *chunks;
    uint64_t *dims;
    uint64_t base[MAX_NDIM], extent[MAX_NDIM]; /* where the chunks lie */
};

static void
tensor_init(struct tensor *t, uint32_t ndim)
{
    static char strings[] = "weight";
    *t =
        (struct tensor){.chunks = dcp_calloc(MAX_CHUNKS, sizeof *t->chunks),
                        .dims = dcp_calloc(MAX_NDIM + MAX_CHUNKS * 2 * MAX_NDIM, sizeof(uint64_t))};
    t->entry = (struct dcp_md_entry){
        .name_len = 6, .kind = DCP_ITEM_TENSOR, .dtype = DCP_DTYPE_UINT8, .ndim = (uint8_t)ndim};
    t->md = (struct dcp_metadata){.strings = strings,
                                  .strings_len = 6,
                                  .entries = &t->entry,
                                  .entries_count = 1,
                                  .chunks = t->chunks,
                                  .dims = t->dims,
                                  .dims_count = ndim};
    for (uint32_t d = 0; d < ndim; d++) {
        t->dims[d] = UINT64_MAX;
    }
}

static void
tensor_clean_up(struct tensor *t)
{
    dcp_free(t->chunks);
    dcp_free(t->dims);
}

static void
tensor_add(struct tensor *t, const uint64_t *offsets, const uint64_t *sizes)
{
    uint32_t ndim = t->entry.ndim;
    t->chunks[t->entry.chunks_count++].dims = t->md.dims_count;
    t->md.chunks_count++;
    for (uint32_t d = 0; d < ndim; d++) {
        t->dims[t->md.dims_count + d] = t->base[d] + offsets[d];
        t->dims[t->md.dims_count + ndim + d] = sizes[d];
    }
    t->md.dims_count += 2 * ndim;
}

/* In an order that no index would choose. */
static void
tensor_shuffle(struct tensor *t, struct maker_rng *rng)
{
    for (uint64_t i = t->entry.chunks_count; i > 1; i--) {
        uint64_t j = maker_below(rng, i);
        struct dcp_md_chunk chunk = t->chunks[i - 1];
        t->chunks[i - 1] = t->chunks[j];
        t->chunks[j] = chunk;
    }
}

/* ---- random tensors ---- */

/* Cuts [0, extent) at random places; pieces may be empty. */
static uint64_t
random_cuts(struct maker_rng *rng, uint64_t extent, uint64_t *cuts)
{
    uint64_t pieces = 1 + maker_below(rng, MAX_CUTS - 1);
    cuts[0] = 0;
    cuts[pieces] = extent;
    for (uint64_t i = 1; i < pieces; i++) {
        uint64_t at = i;
        uint64_t cut = maker_below(rng, extent + 1);
        while (at > 1 && cuts[at - 1] > cut) {
            cuts[at] = cuts[at - 1];
            at--;
        }
        cuts[at] = cut;
    }
    return pieces;
}

/* Cuts a box dim by dim; with `bricks` every piece is cut in its own way. */
static void
add_pieces(struct tensor *t, struct maker_rng *rng, uint32_t d, uint64_t *offsets, uint64_t *sizes,
           uint64_t cuts[MAX_NDIM][MAX_CUTS + 1], uint64_t *pieces, bool bricks)
{
    if (d == t->entry.ndim) {
        tensor_add(t, offsets, sizes);
        return;
    }
    uint64_t own[MAX_CUTS + 1];
    const uint64_t *at = bricks ? own : cuts[d];
    uint64_t count = bricks ? random_cuts(rng, t->extent[d], own) : pieces[d];
    for (uint64_t i = 0; i < count; i++) {
        offsets[d] = at[i];
        sizes[d] = at[i + 1] - at[i];
        add_pieces(t, rng, d + 1, offsets, sizes, cuts, pieces, bricks);
    }
}

static void
random_box(const struct tensor *t, struct maker_rng *rng, uint64_t *offsets, uint64_t *sizes)
{
    for (uint32_t d = 0; d < t->entry.ndim; d++) {
        bool all = maker_below(rng, 3) == 0;
        offsets[d] = all ? 0 : maker_below(rng, t->extent[d] + 1);
        sizes[d] = all ? t->extent[d] : maker_below(rng, t->extent[d] + 1 - offsets[d]);
    }
}

/* A grid, bricks or boxes at random; sometimes with holes, with copies, in any order, at the end of
 * what 64 bits can count. */
static void
random_tensor(struct tensor *t, struct maker_rng *rng)
{
    uint64_t offsets[MAX_NDIM], sizes[MAX_NDIM], pieces[MAX_NDIM] = {0};
    uint64_t cuts[MAX_NDIM][MAX_CUTS + 1];
    uint32_t ndim = (uint32_t)maker_below(rng, MAX_NDIM);
    uint64_t kind = maker_below(rng, 3);
    tensor_init(t, ndim);
    for (uint32_t d = 0; d < ndim; d++) {
        t->extent[d] = 1 + maker_below(rng, 40);
        t->base[d] = maker_below(rng, 2) == 0 ? 0 : UINT64_MAX - t->extent[d];
        pieces[d] = random_cuts(rng, t->extent[d], cuts[d]);
    }
    if (kind < 2) {
        add_pieces(t, rng, 0, offsets, sizes, cuts, pieces, kind == 1);
    } else {
        for (uint64_t i = maker_below(rng, 40); i > 0; i--) {
            random_box(t, rng, offsets, sizes);
            tensor_add(t, offsets, sizes);
        }
    }
    if (maker_below(rng, 2) == 0) {
        tensor_shuffle(t, rng);
    }
    if (maker_below(rng, 3) == 0 && t->entry.chunks_count > 0) {
        uint64_t lost = 1 + maker_below(rng, 2);
        t->entry.chunks_count -= dcp_min_u64(lost, t->entry.chunks_count);
    } else if (maker_below(rng, 3) == 0 && t->entry.chunks_count > 0) {
        t->chunks[t->entry.chunks_count++] = t->chunks[0];
    }
}

/* ---- the reference ---- */

/* The overlap of chunk `c` with a target as an item would say it; false when there is none. */
static bool
overlap_of(const struct tensor *t, uint64_t c, const uint64_t *target, uint64_t *ret)
{
    uint32_t ndim = t->entry.ndim;
    const uint64_t *chunk = t->dims + t->chunks[c].dims;
    for (uint32_t d = 0; d < ndim; d++) {
        uint64_t start = chunk[d] > target[d] ? chunk[d] : target[d];
        uint64_t chunk_end = chunk[d] + chunk[ndim + d], end = target[d] + target[ndim + d];
        end = chunk_end < end ? chunk_end : end;
        if (start >= end) {
            return false;
        }
        ret[d] = start - chunk[d];
        ret[ndim + d] = start - target[d];
        ret[2 * ndim + d] = end - start;
    }
    return true;
}

/* Items of a target, in any order, are what comparing every pair finds. */
static void
check_items(const struct tensor *t, const struct dcp_read_plan *plan, uint64_t target)
{
    uint32_t ndim = t->entry.ndim;
    const uint64_t *box = plan->dims + plan->targets[target].dims;
    uint64_t want[3 * MAX_NDIM], found = 0, expected = 0;
    static uint8_t seen[MAX_CHUNKS];
    memset(seen, 0, sizeof seen);
    for (uint64_t i = 0; i < plan->items_count; i++) {
        const struct dcp_read_item *item = &plan->items[i];
        if (item->target == target) {
            CHECK(item->chunk < t->entry.chunks_count && seen[item->chunk]++ == 0);
            CHECK(overlap_of(t, item->chunk, box, want));
            CHECK(ndim == 0 || memcmp(want, plan->dims + item->dims, 3 * ndim * sizeof *want) == 0);
            found++;
        }
    }
    bool empty = false;
    for (uint32_t d = 0; d < ndim; d++) {
        empty = empty || box[ndim + d] == 0;
    }
    for (uint64_t c = 0; !empty && c < t->entry.chunks_count; c++) {
        expected += overlap_of(t, c, box, want);
    }
    CHECK_EQ(found, expected);
}

/* Elements of a target that no item covers, counted one by one. */
static uint64_t
count_missing(const struct tensor *t, const struct dcp_read_plan *plan, uint64_t target)
{
    uint32_t ndim = t->entry.ndim;
    const uint64_t *sizes = plan->dims + plan->targets[target].dims + ndim;
    uint64_t cells = 1, missing = 0;
    for (uint32_t d = 0; d < ndim; d++) {
        cells *= sizes[d];
    }
    uint8_t *covered = dcp_calloc(cells + 1, 1);
    for (uint64_t i = 0; i < plan->items_count; i++) {
        const uint64_t *at = plan->dims + plan->items[i].dims + ndim, *lengths = at + ndim;
        uint64_t count = 1;
        if (plan->items[i].target != target) {
            continue;
        }
        for (uint32_t d = 0; d < ndim; d++) {
            count *= lengths[d];
        }
        for (uint64_t n = 0; n < count; n++) {
            uint64_t rest = n, cell = 0, pitch = 1;
            for (uint32_t d = ndim; d-- > 0;) {
                cell += (at[d] + rest % lengths[d]) * pitch;
                rest /= lengths[d];
                pitch *= sizes[d];
            }
            covered[cell] = 1;
        }
    }
    for (uint64_t n = 0; n < cells; n++) {
        missing += covered[n] == 0;
    }
    dcp_free(covered);
    return missing;
}

static void
items_and_holes_of_any_chunks_are_those_of_comparing_every_pair(void)
{
    struct maker_rng rng = {5};
    uint64_t holes = 0, exact = 0, large = 0;
    for (int round = 0; round < 400; round++) {
        struct tensor t;
        struct dcp_read_plan plan = {.md = &t.md};
        struct dcp_error err = {0};
        uint8_t memory[1];
        random_tensor(&t, &rng);
        for (int n = 0; n < TARGETS; n++) {
            uint64_t offsets[MAX_NDIM], sizes[MAX_NDIM];
            random_box(&t, &rng, offsets, sizes);
            for (uint32_t d = 0; d < t.entry.ndim; d++) {
                offsets[d] += t.base[d];
            }
            CHECK_OK(dcp_read_plan_add(&plan, 0, memory, NULL, offsets, sizes, NULL, &err), &err);
        }
        uint64_t hole_bytes = 0, missing = 0;
        CHECK_OK(dcp_read_plan_build(&plan, false, &hole_bytes, &err), &err);
        for (uint64_t n = 0; n < TARGETS; n++) {
            check_items(&t, &plan, n);
            missing += count_missing(&t, &plan, n);
        }
        CHECK_EQ(hole_bytes, missing);
        CHECK_EQ(dcp_read_plan_build(&plan, true, NULL, &err), missing > 0 ? DCP_E_HOLE : 0);
        *(missing > 0 ? &holes : &exact) += 1;
        large += t.entry.chunks_count > 64;
        dcp_read_plan_clean_up(&plan);
        tensor_clean_up(&t);
    }
    CHECK(holes > 50 && exact > 50 && large > 50); /* the cases are worth something */
}

/* ---- how much a search looks at ---- */

static uint64_t
count_candidates(const struct dcp_chunk_index *index, const uint64_t *starts, const uint64_t *ends)
{
    uint64_t count = 0;
    for (uint64_t at = dcp_chunk_index_next(index, starts, ends, 0); at < index->chunks_count;
         at = dcp_chunk_index_next(index, starts, ends, at + 1)) {
        count++;
    }
    return count;
}

/* 64 x 64 chunks in any order: eight columns of them hold 512, eight rows as well. */
static void
a_slab_of_a_grid_is_found_without_looking_at_the_rest(void)
{
    struct maker_rng rng = {9};
    struct dcp_chunk_index index = {0};
    struct dcp_error err = {0};
    struct tensor t;
    tensor_init(&t, 2);
    for (uint64_t c = 0; c < 4096; c++) {
        uint64_t offsets[2] = {c / 64 * 3, c % 64 * 5}, sizes[2] = {3, 5};
        tensor_add(&t, offsets, sizes);
    }
    tensor_shuffle(&t, &rng);
    CHECK_OK(dcp_chunk_index_build(&index, &t.md, 0, &err), &err);
    CHECK_OK(dcp_chunk_index_build(&index, &t.md, 0, &err), &err); /* with a tree */
    for (uint64_t slab = 0; slab < 8; slab++) {
        uint64_t columns[2] = {0, slab * 40}, columns_end[2] = {192, slab * 40 + 40};
        uint64_t rows[2] = {slab * 24, 0}, rows_end[2] = {slab * 24 + 24, 320};
        CHECK_EQ(count_candidates(&index, columns, columns_end), 512);
        CHECK_EQ(count_candidates(&index, rows, rows_end), 512);
        uint64_t point_end[2] = {rows[0] + 1, columns[1] + 1};
        uint64_t point[2] = {rows[0], columns[1]};
        CHECK(count_candidates(&index, point, point_end) <= 8);
    }
    uint64_t outside[2] = {192, 0}, outside_end[2] = {200, 320};
    CHECK_EQ(count_candidates(&index, outside, outside_end), 0);
    dcp_chunk_index_clean_up(&index);
    tensor_clean_up(&t);
}

static void
chunks_that_end_behind_64_bits_are_refused(void)
{
    struct dcp_chunk_index index = {0};
    struct dcp_error err = {0};
    struct tensor t;
    uint64_t start[1] = {UINT64_MAX - 1}, one[1] = {1}, two[1] = {2};
    tensor_init(&t, 1);
    tensor_add(&t, start, one);
    CHECK_OK(dcp_chunk_index_build(&index, &t.md, 0, &err), &err);
    dcp_chunk_index_clean_up(&index);
    tensor_add(&t, start, two);
    CHECK_EQ(dcp_chunk_index_build(&index, &t.md, 0, &err), DCP_E_CORRUPT);
    CHECK(strstr(err.message, "weight") != NULL);
    dcp_chunk_index_clean_up(&index);
    tensor_clean_up(&t);
}

static void
an_index_without_memory_is_not_taken_for_built(void)
{
    struct maker_rng rng = {3};
    struct dcp_chunk_index index = {0};
    struct dcp_error err = {0};
    struct tensor t;
    tensor_init(&t, 1);
    for (uint64_t c = 0; c < 100; c++) {
        uint64_t one[1] = {1};
        tensor_add(&t, &c, one);
    }
    tensor_shuffle(&t, &rng);
    for (int keys = 0; keys < 2; keys++) {
        if (keys > 0) {
            CHECK_OK(dcp_chunk_index_build(&index, &t.md, 0, &err), &err);
        }
        dcp_alloc_fail_after(1); /* the keys, then the tree */
        CHECK_EQ(dcp_chunk_index_build(&index, &t.md, 0, &err), DCP_E_NOMEM);
        dcp_alloc_fail_after(0);
        dcp_error_clear(&err);
    }
    CHECK_OK(dcp_chunk_index_build(&index, &t.md, 0, &err), &err);
    CHECK_OK(dcp_chunk_index_build(&index, &t.md, 0, &err), &err);
    uint64_t starts[1] = {17}, ends[1] = {18};
    CHECK(count_candidates(&index, starts, ends) <= 8);
    dcp_chunk_index_clean_up(&index);
    tensor_clean_up(&t);
}

/* A pinwheel, which no plane cuts apart, and the same with its middle left out. */
static void
a_pinwheel_covers_its_square(void)
{
    uint64_t boxes[5][4] = {{0, 0, 2, 1}, {0, 1, 1, 2}, {1, 2, 2, 1}, {2, 0, 1, 2}, {1, 1, 1, 1}};
    struct dcp_error err = {0};
    for (uint64_t count = 4; count <= 5; count++) {
        struct dcp_box_list list = {boxes[0], count, 2};
        uint64_t volume = 0;
        CHECK_OK(dcp_boxes_union_volume(&list, &volume, &err), &err);
        CHECK_EQ(volume, 4 + count);
    }
}

CTEST_MAIN(RUN(items_and_holes_of_any_chunks_are_those_of_comparing_every_pair);
           RUN(a_slab_of_a_grid_is_found_without_looking_at_the_rest);
           RUN(chunks_that_end_behind_64_bits_are_refused);
           RUN(an_index_without_memory_is_not_taken_for_built); RUN(a_pinwheel_covers_its_square);)

/*
 * read_plan_scaling.c: what it costs to find which saved chunks fill which targets.
 *
 *     make build/bench/read_plan_scaling && build/bench/read_plan_scaling [--json] [--quick]
 *
 * Grids of chunks, and targets that are slabs of them along one dim, all on one rank: ns of CPU per
 * overlap, index included, and per target.  Overlaps are counted against what the grid says.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dcp_engine.h"
#include "measure.h"

enum { ROUNDS = 7, SIDE = 8 /* elements of a chunk along each dim */ };

/* `tensors` tensors of grid[0] x grid[1] x ... chunks; each wanted as `slabs` slabs along dim
 * `along`.  Slabs lie half a chunk off the grid where there are several, as those of another number
 * of ranks do. */
struct shape {
    const char *name;
    uint64_t tensors, grid[3];
    uint32_t ndim, along;
    uint64_t slabs;
};

static void *
must_have(void *memory)
{
    if (memory == NULL) {
        fprintf(stderr, "read_plan_scaling: out of memory\n");
        exit(1);
    }
    return memory;
}

static uint64_t
now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t
chunks_per_tensor(const struct shape *shape)
{
    uint64_t count = 1;
    for (uint32_t d = 0; d < shape->ndim; d++) {
        count *= shape->grid[d];
    }
    return count;
}

static void
metadata_make(const struct shape *shape, struct dcp_metadata *md)
{
    uint64_t per_tensor = chunks_per_tensor(shape), ndim = shape->ndim;
    *md = (struct dcp_metadata){.entries_count = shape->tensors,
                                .chunks_count = shape->tensors * per_tensor,
                                .dims_count = shape->tensors * (ndim + per_tensor * 2 * ndim)};
    md->strings = must_have(strdup("weight"));
    md->entries = must_have(calloc(md->entries_count, sizeof *md->entries));
    md->chunks = must_have(calloc(md->chunks_count, sizeof *md->chunks));
    md->dims = must_have(calloc(md->dims_count, sizeof *md->dims));
    uint64_t at = 0, chunk = 0;
    for (uint64_t t = 0; t < shape->tensors; t++) {
        md->entries[t] = (struct dcp_md_entry){.name_len = 6,
                                               .kind = DCP_ITEM_TENSOR,
                                               .dtype = DCP_DTYPE_FLOAT32,
                                               .ndim = (uint8_t)ndim,
                                               .size = at,
                                               .first_chunk = chunk,
                                               .chunks_count = per_tensor};
        for (uint32_t d = 0; d < ndim; d++) {
            md->dims[at++] = shape->grid[d] * SIDE;
        }
        for (uint64_t c = 0; c < per_tensor; c++) {
            md->chunks[chunk++].dims = at;
            uint64_t rest = c;
            for (uint32_t d = (uint32_t)ndim; d > 0; d--) {
                md->dims[at + d - 1] = rest % shape->grid[d - 1] * SIDE;
                md->dims[at + ndim + d - 1] = SIDE;
                rest /= shape->grid[d - 1];
            }
            at += 2 * ndim;
        }
    }
}

static void
metadata_free(struct dcp_metadata *md)
{
    free(md->strings);
    free(md->entries);
    free(md->chunks);
    free(md->dims);
}

/* Adds all targets; returns how many overlaps the grid says there are. */
static uint64_t
add_targets(const struct shape *shape, struct dcp_read_plan *plan)
{
    static uint8_t memory[4];
    struct dcp_error err = {0};
    uint64_t overlaps = 0, length = shape->grid[shape->along] * SIDE;
    uint64_t others = chunks_per_tensor(shape) / shape->grid[shape->along];
    uint64_t step = length / shape->slabs, shift = shape->slabs > 1 ? SIDE / 2 : 0;
    for (uint64_t t = 0; t < shape->tensors; t++) {
        for (uint64_t s = 0; s < shape->slabs; s++) {
            uint64_t offsets[3] = {0}, sizes[3] = {0};
            for (uint32_t d = 0; d < shape->ndim; d++) {
                sizes[d] = shape->grid[d] * SIDE;
            }
            uint64_t start = s == 0 ? 0 : s * step + shift;
            uint64_t end = s + 1 == shape->slabs ? length : (s + 1) * step + shift;
            offsets[shape->along] = start;
            sizes[shape->along] = end - start;
            overlaps += others * ((end + SIDE - 1) / SIDE - start / SIDE);
            must(dcp_read_plan_add(plan, t, memory, NULL, offsets, sizes, NULL, &err) == 0,
                 "planning", &err);
        }
    }
    return overlaps;
}

static void
run(const struct shape *shape, bool as_json)
{
    struct dcp_metadata md;
    struct dcp_error err = {0};
    double build[ROUNDS], add[ROUNDS];
    uint64_t overlaps = 0, targets = shape->tensors * shape->slabs;
    metadata_make(shape, &md);
    for (int round = 0; round < ROUNDS; round++) {
        struct dcp_read_plan plan = {.md = &md};
        uint64_t t0 = now_ns();
        overlaps = add_targets(shape, &plan);
        uint64_t t1 = now_ns();
        must(dcp_read_plan_build(&plan, true, NULL, &err) == 0, "planning", &err);
        build[round] = (double)(now_ns() - t1);
        add[round] = (double)(t1 - t0);
        if (plan.items_count != overlaps) {
            fprintf(stderr, "%s: %" PRIu64 " overlaps, not %" PRIu64 "\n", shape->name,
                    plan.items_count, overlaps);
            exit(1);
        }
        dcp_read_plan_clean_up(&plan);
    }
    metadata_free(&md);
    double build_ns = median(build, ROUNDS), add_ns = median(add, ROUNDS);
    if (as_json) {
        printf("{\"name\": \"%s\", \"chunks\": %" PRIu64 ", \"targets\": %" PRIu64
               ", \"overlaps\": %" PRIu64 ", \"add_ns\": %.0f, \"build_ns\": %.0f}\n",
               shape->name, md.chunks_count, targets, overlaps, add_ns, build_ns);
    } else {
        printf("%-40s %8" PRIu64 " overlaps %9.3f ms %7.1f ns per overlap; targets %6.1f ns each\n",
               shape->name, overlaps, build_ns / 1e6, build_ns / (double)overlaps,
               add_ns / (double)targets);
    }
}

int
main(int argc, char **argv)
{
    static const struct shape shapes[] = {
        {"4096 chunks -> 8 shards", 1, {4096}, 1, 0, 8},
        {"4096 x 1 chunks -> 8 shards of rows", 1, {4096, 1}, 2, 0, 8},
        {"1000 x 256 chunks -> whole", 1000, {256, 1}, 2, 0, 1},
        {"20000 x 1 chunk -> whole", 20000, {1, 1}, 2, 0, 1},
        {"64 x 64 grid -> whole", 1, {64, 64}, 2, 0, 1},
        {"64 x 64 grid -> 8 slabs of rows", 1, {64, 64}, 2, 0, 8},
        {"64 x 64 grid -> 8 slabs of columns", 1, {64, 64}, 2, 1, 8},
        {"64 x 64 grid -> 64 slabs of columns", 1, {64, 64}, 2, 1, 64},
        {"256 x 256 grid -> whole", 1, {256, 256}, 2, 0, 1},
        {"256 x 256 grid -> 8 slabs of rows", 1, {256, 256}, 2, 0, 8},
        {"256 x 256 grid -> 8 slabs of columns", 1, {256, 256}, 2, 1, 8},
        {"256 x 256 grid -> 256 slabs of columns", 1, {256, 256}, 2, 1, 256},
        {"32 x 32 x 32 grid -> 32 slabs, last dim", 1, {32, 32, 32}, 3, 2, 32},
    };
    bool as_json = false, quick = false;
    for (int i = 1; i < argc; i++) {
        as_json = as_json || strcmp(argv[i], "--json") == 0;
        quick = quick || strcmp(argv[i], "--quick") == 0;
    }
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct shape shape = shapes[i];
        if (quick) {
            shape.tensors = shape.tensors < 10 ? shape.tensors : 10;
            shape.grid[0] = shape.grid[0] < 32 ? shape.grid[0] : 32;
        }
        run(&shape, as_json);
    }
    return 0;
}

/*
 * device_limits.c: staging and loading through a simulated device beside copies of the same bytes.
 *
 * Usage: device_limits [MiB] [bytes per tensor] [rounds] | --quick
 *
 * The device is instant: its memory is the host's, its copies are memcpy, done inside of the call,
 * so that what is left is what staging costs besides.  In every round each way runs once, one after
 * another; figures are payload bytes by time, and the share of the limit of the same round: a
 * memcpy tensor by tensor followed by a CRC of the same bytes, which is what staging from such a
 * device comes to.  One memcpy of everything is faster, for libc copies past the cache then, and is
 * shown beside it: no copy of a tensor could be that long.
 * Medians.  The first round compares what was staged with the source.  No GPU is in it: a figure
 * about one is not made here.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dcp_crc32.h"
#include "dcp_image.h"
#include "measure.h"

enum { MOST_ROUNDS = 64 };

enum way {
    WAY_COPY_AND_CRC,
    WAY_PIECES_AND_CRC,
    WAY_FILL_HOST,
    WAY_STAGE_DEVICE,
    WAY_STAGE_PLAIN,
    WAYS
};

static const char *const names[WAYS] = {"one memcpy, then CRC", "memcpy by tensors, then CRC",
                                        "fill from the host", "stage from a device",
                                        "the same without kernels"};

/* ---- a device that is memory of the host ---- */

static int
to_host(void *ctx, void *host, uint64_t device, uint64_t bytes, struct dcp_error *err)
{
    (void)ctx, (void)err;
    memcpy(host, (const void *)(uintptr_t)device, bytes);
    return 0;
}

static int
pack(void *ctx, const struct dcp_device_box *boxes, uint32_t count, struct dcp_error *err)
{
    (void)ctx, (void)err;
    for (uint32_t i = 0; i < count; i++) {
        const struct dcp_device_box *box = &boxes[i];
        uint64_t item = box->item_bytes;
        dcp_box_gather((uint8_t *)(uintptr_t)box->packed, (const uint8_t *)(uintptr_t)box->strided,
                       box->ndim, box->sizes, box->strides_bytes, box->item_bytes,
                       box->first * item, box->count * item);
    }
    return 0;
}

static int
allocate(void *ctx, uint64_t bytes, uint64_t *ret_device, struct dcp_error *err)
{
    void *memory = calloc(1, bytes);
    (void)ctx, (void)err;
    must(memory != NULL, "memory", NULL);
    *ret_device = (uint64_t)(uintptr_t)memory;
    return 0;
}

static void
release(void *ctx, uint64_t device)
{
    (void)ctx;
    free((void *)(uintptr_t)device);
}

static int
record(void *ctx, dcp_device_event **ret_event, struct dcp_error *err)
{
    (void)err;
    *ret_event = ctx;
    return 0;
}

static int
poll(void *ctx, dcp_device_event *event, struct dcp_error *err)
{
    (void)ctx, (void)event, (void)err;
    return 1;
}

static void
forget(void *ctx, dcp_device_event *event)
{
    (void)ctx, (void)event;
}

static int
wait_idle(void *ctx, struct dcp_error *err)
{
    (void)ctx, (void)err;
    return 0;
}

/* ---- one save ---- */

struct bench {
    uint64_t item_bytes, bytes;
    uint32_t items_count;
    uint8_t *source, *memory;
    struct dcp_plan plan;
    struct dcp_layout layout;
    struct dcp_image image;
    struct dcp_source *sources;
    struct dcp_save_id save_id;
};

static void
make(struct bench *bench)
{
    struct dcp_error err = {0};
    bench->source = malloc(bench->bytes);
    bench->sources = calloc(bench->items_count, sizeof *bench->sources);
    must(bench->source != NULL && bench->sources != NULL, "memory", NULL);
    for (uint64_t i = 0; i < bench->bytes; i++) {
        bench->source[i] = (uint8_t)(i * 2654435761u >> 13);
    }
    bench->plan.thread_count = 1;
    bench->plan.single_file_per_rank = true;
    for (uint32_t i = 0; i < bench->items_count; i++) {
        char fqn[48];
        uint64_t offset = 0;
        int len = snprintf(fqn, sizeof fqn, "model.layers.%u.weight", i);
        struct dcp_item item = {.kind = DCP_ITEM_TENSOR, .dtype = DCP_DTYPE_UINT8, .ndim = 1};
        must(dcp_plan_add_name(&bench->plan, fqn, (size_t)len, NULL, 0, 0, &item.name, &err) == 0 &&
                 dcp_plan_add_item(&bench->plan, &item, &bench->item_bytes, &offset,
                                   &bench->item_bytes, &err) == 0,
             "plan", &err);
        bench->sources[i].data = bench->source + i * bench->item_bytes;
    }
    must(dcp_layout_build(&bench->plan, NULL, &bench->layout, &err) == 0 &&
             dcp_image_place(&bench->layout, 0, 0, &bench->image, &err) == 0,
         "layout", &err);
    bench->memory = dcp_map_huge(bench->image.bytes, &err);
    must(bench->memory != NULL, "memory", &err);
    memset(bench->memory, 1, bench->image.bytes);
}

static void
stage(const struct bench *bench, uint32_t features)
{
    struct dcp_device device = {.kind = "instant",
                                .features = features,
                                .to_host = to_host,
                                .pack = pack,
                                .allocate = allocate,
                                .release = release,
                                .record = record,
                                .poll = poll,
                                .forget = forget,
                                .wait_idle = wait_idle};
    struct dcp_device *const items[1] = {&device};
    const struct dcp_device_list list = {items, 1};
    struct dcp_device_stats stats = {0};
    struct dcp_engine_options options = {.devices = &list, .device_stats = &stats};
    struct dcp_device_stage *begun;
    struct dcp_error err = {0};
    bool idle;
    for (uint32_t i = 0; i < bench->items_count; i++) {
        bench->sources[i].device = 1;
    }
    must(dcp_image_begin(&bench->image, bench->memory, &bench->plan, &bench->layout, bench->sources,
                         &options, &begun, &idle, &err) == 0 &&
             dcp_image_end(&bench->image, bench->memory, &bench->plan, &bench->layout,
                           bench->sources, &bench->save_id, 0, &options, begun, NULL, &err) == 0 &&
             dcp_device_stage_end(begun, &err),
         "staging", &err);
    for (uint32_t i = 0; i < bench->items_count; i++) {
        bench->sources[i].device = 0;
    }
}

static void
run(const struct bench *bench, enum way way)
{
    struct dcp_engine_options options = {0};
    struct dcp_error err = {0};
    switch (way) {
    case WAY_COPY_AND_CRC:
        memcpy(bench->memory, bench->source, bench->bytes);
        must(dcp_crc32(0, bench->memory, bench->bytes) != 1, "a checksum", NULL);
        break;
    case WAY_PIECES_AND_CRC:
        for (uint64_t at = 0; at < bench->bytes; at += bench->item_bytes) {
            memcpy(bench->memory + at, bench->source + at, bench->item_bytes);
        }
        must(dcp_crc32(0, bench->memory, bench->bytes) != 1, "a checksum", NULL);
        break;
    case WAY_FILL_HOST:
        must(dcp_image_fill(&bench->image, bench->memory, &bench->plan, &bench->layout,
                            bench->sources, &bench->save_id, 0, &options, NULL, &err) == 0,
             "filling", &err);
        break;
    case WAY_STAGE_DEVICE:
        stage(bench, DCP_DEVICE_PACKS);
        break;
    default:
        stage(bench, 0);
    }
}

static void
check(const struct bench *bench)
{
    for (uint32_t r = 0; r < bench->layout.records_count; r++) {
        const struct dcp_placed_record *placed = &bench->layout.records[r];
        must(memcmp(bench->memory + placed->payload_offset_bytes, bench->sources[placed->item].data,
                    bench->item_bytes) == 0,
             "what was staged differs", NULL);
    }
}

int
main(int argc, char **argv)
{
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    uint64_t mib = quick ? 8 : argc > 1 ? strtoull(argv[1], NULL, 10) : 256;
    struct bench bench = {.item_bytes = argc > 2 ? strtoull(argv[2], NULL, 10) : 4u << 20};
    int rounds = quick ? 1 : argc > 3 ? atoi(argv[3]) : 9;
    double seconds[WAYS][MOST_ROUNDS], shares[MOST_ROUNDS];
    must(mib > 0 && bench.item_bytes > 0 && rounds > 0 && rounds <= MOST_ROUNDS, "arguments", NULL);
    bench.items_count = (uint32_t)dcp_max_u64((mib << 20) / bench.item_bytes, 1);
    bench.bytes = bench.items_count * bench.item_bytes;
    make(&bench);
    for (int round = 0; round < rounds; round++) {
        for (enum way way = 0; way < WAYS; way++) {
            double start = seconds_of(CLOCK_MONOTONIC);
            run(&bench, way);
            seconds[way][round] = seconds_of(CLOCK_MONOTONIC) - start;
            if (round == 0 && way >= WAY_FILL_HOST) {
                check(&bench);
            }
        }
    }
    printf("%" PRIu64 " MiB in tensors of %" PRIu64 " bytes, %d rounds\n", bench.bytes >> 20,
           bench.item_bytes, rounds);
    for (enum way way = 0; way < WAYS; way++) {
        for (int round = 0; round < rounds; round++) {
            shares[round] = seconds[WAY_PIECES_AND_CRC][round] / seconds[way][round];
        }
        printf("%-28s %8.2f GB/s  %5.0f %% of the limit\n", names[way],
               (double)bench.bytes / median(seconds[way], rounds) / 1e9,
               100 * median(shares, rounds));
    }
    return 0;
}

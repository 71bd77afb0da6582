/*
 * device_world.c: simulated devices by seed, and sources that are moved to them.
 */
#include "device_world.h"

#include <stdio.h>
#include <stdlib.h>

struct device_sim_options
device_of_seed(uint64_t seed)
{
    static const uint64_t slabs[] = {UINT64_MAX, UINT64_MAX, 3u << 20, 0};
    return (struct device_sim_options){.seed = seed,
                                       .features = (uint32_t)(seed % 4),
                                       .slab_most_bytes = slabs[seed / 4 % 4],
                                       .no_pin = seed % 11 == 10};
}

struct world_options
device_world_of_seed(uint64_t seed)
{
    return (struct world_options){.seed = seed,
                                  .tensors = 1 + (uint32_t)(seed * 7 % 20),
                                  .objects = (uint32_t)(seed % 4),
                                  .thread_count = 1 + (uint32_t)(seed % 4),
                                  .file_per_item = seed % 5 == 4,
                                  .large_bytes = seed % 6 == 1 ? 3000000 + 4096 * seed : 0,
                                  .content_hash = seed / 2 % 2 == 0};
}

void
devices_make(struct devices *devices, uint32_t count, struct device_sim_options options)
{
    for (uint32_t i = 0; i < count; i++) {
        devices->sims[i] = device_sim_new(&options);
        devices->tables[i] = device_sim_table(devices->sims[i]);
        options.seed += 1;
    }
    devices->list = (struct dcp_device_list){devices->tables, count};
}

bool
devices_clean_up(struct devices *devices)
{
    bool clean = true;
    dcp_engine_trim();
    for (uint32_t i = 0; i < devices->list.count; i++) {
        clean = device_sim_free(devices->sims[i]) && clean;
    }
    return clean;
}

/* Of the memory from the first to the last element; no stride is negative. */
static uint64_t
extent_bytes(const struct dcp_plan *plan, const struct dcp_item *item,
             const struct dcp_source *source)
{
    const uint64_t *sizes = dcp_item_sizes(plan, item);
    uint64_t bytes = dcp_item_payload_bytes(plan, item);
    if (bytes > 0 && source->strides_bytes != NULL) {
        bytes = dcp_dtype_bytes(item->dtype);
        for (uint32_t d = 0; d < item->ndim; d++) {
            bytes += (sizes[d] - 1) * (uint64_t)source->strides_bytes[d];
        }
    }
    return bytes;
}

void
devices_take(const struct devices *devices, const struct dcp_plan *plan, struct dcp_source *sources,
             uint64_t seed, bool some, bool late)
{
    struct maker_rng rng = {seed};
    for (uint32_t i = 0; i < plan->items_count; i++) {
        const struct dcp_item *item = &plan->items[i];
        struct dcp_source *source = &sources[i];
        uint32_t which = (uint32_t)maker_below(&rng, devices->list.count);
        struct device_sim *sim = devices->sims[which];
        if (item->kind == DCP_ITEM_BYTES || item->slot_bytes != 0 ||
            (some && maker_below(&rng, 3) == 0)) {
            continue;
        }
        uint64_t bytes = extent_bytes(plan, item, source);
        source->device = 1 + which;
        if (bytes == 0) {
            continue;
        }
        uint64_t address = device_sim_tensor(sim, bytes, dcp_dtype_bytes(item->dtype));
        if (late) {
            device_sim_poke_later(sim, 1 + maker_below(&rng, DEVICE_SIM_STREAMS), address,
                                  source->data, bytes);
        } else {
            device_sim_poke(sim, address, source->data, bytes);
        }
        source->data = (const uint8_t *)(uintptr_t)address;
    }
    for (uint32_t s = 0; late && s < devices->list.count; s++) {
        const struct dcp_device *table = devices->tables[s];
        for (uintptr_t stream = 1; stream <= DEVICE_SIM_STREAMS; stream++) {
            if (table->follow(table->ctx, (void *)stream, NULL) != 0) {
                fprintf(stderr, "device_world: a device did not follow\n");
                exit(1);
            }
        }
    }
}

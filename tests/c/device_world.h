/*
 * device_world.h: simulated devices in every state of health, and worlds whose tensors lie on them.
 */
#ifndef DEVICE_WORLD_H
#define DEVICE_WORLD_H

#include "device_sim.h"
#include "engine_world.h"

enum { DEVICE_WORLD_MOST = 2 };

struct devices {
    struct device_sim *sims[DEVICE_WORLD_MOST];
    struct dcp_device *tables[DEVICE_WORLD_MOST];
    struct dcp_device_list list;
};

/* What a device can, by seed: nothing to all; device memory: as it likes, little, none; sometimes
 * nothing can be pinned. */
struct device_sim_options device_of_seed(uint64_t seed);
/* A world by seed: several files, one per item, empty ones, blocks, hashes. */
struct world_options device_world_of_seed(uint64_t seed);

void devices_make(struct devices *devices, uint32_t count, struct device_sim_options options);
/* Frees what the engine keeps, then the devices: false when anything was left on them. */
bool devices_clean_up(struct devices *devices);

/* Moves sources of tensors to the devices: all, or with `some` each by chance.  `late`: what they
 * hold comes on trainers' streams, which the devices' follow. */
void devices_take(const struct devices *devices, const struct dcp_plan *plan,
                  struct dcp_source *sources, uint64_t seed, bool some, bool late);

#endif

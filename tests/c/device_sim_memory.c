/*
 * device_sim_memory.c: memory of a simulated device, and memory of the host that is pinned.
 *
 * Addresses of the device lead nowhere: whoever follows one faults.
 */
#include "device_sim_parts.h"

/* Memory is pinned for all devices. */
static struct pin {
    uint8_t *memory; /* NULL: this one is free */
    uint64_t bytes;
    const struct device_sim *by;
} pins[64];
static pthread_mutex_t pins_lock = PTHREAD_MUTEX_INITIALIZER;
enum { MOST_PINS = sizeof pins / sizeof pins[0] };

void
sim_must(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "device_sim: %s\n", what);
        exit(1);
    }
}

void
sim_violation(struct device_sim *sim, const char *what)
{
    pthread_mutex_lock(&sim->lock);
    sim->violations++;
    pthread_mutex_unlock(&sim->lock);
    fprintf(stderr, "device_sim: %s\n", what);
}

uint8_t *
sim_real(const struct device_sim *sim, uint64_t address)
{
    return sim->memory + (address - BASE);
}

/* [address, address + bytes) lies in memory that is allocated. */
bool
sim_is_live(struct device_sim *sim, uint64_t address, uint64_t bytes)
{
    bool live = false;
    pthread_mutex_lock(&sim->lock);
    for (uint32_t i = 0; i < sim->ranges_count; i++) {
        const struct range *range = &sim->ranges[i];
        live = live ||
               (range->live && address >= range->from && address - range->from <= range->bytes &&
                bytes <= range->bytes - (address - range->from));
    }
    pthread_mutex_unlock(&sim->lock);
    return live;
}

void
sim_release_locked(struct device_sim *sim, uint64_t address)
{
    for (uint32_t i = 0; i < sim->ranges_count; i++) {
        struct range *range = &sim->ranges[i];
        if (range->from == address && range->live) {
            range->live = false;
            memset(sim_real(sim, range->from), FREED, range->bytes);
            return;
        }
    }
    sim_must(false, "memory was released that was not allocated");
}

bool
sim_is_pinned(const uint8_t *memory, uint64_t bytes)
{
    bool pinned = false;
    pthread_mutex_lock(&pins_lock);
    for (size_t i = 0; i < MOST_PINS; i++) {
        const struct pin *pin = &pins[i];
        pinned = pinned || (pin->memory != NULL && memory >= pin->memory &&
                            memory + bytes <= pin->memory + pin->bytes);
    }
    pthread_mutex_unlock(&pins_lock);
    return pinned;
}

uint64_t
sim_take_memory(struct device_sim *sim, uint64_t bytes, uint64_t align_bytes, bool is_slab)
{
    pthread_mutex_lock(&sim->lock);
    uint64_t at = dcp_align_up(sim->used_bytes + GUARD_BYTES, align_bytes);
    bool fits = at <= sim->options.memory_bytes && bytes <= sim->options.memory_bytes - at;
    if (fits) {
        sim_must(sim->ranges_count < MOST_RANGES, "too many allocations");
        sim->ranges[sim->ranges_count++] = (struct range){BASE + at, bytes, true, is_slab};
        sim->used_bytes = at + bytes;
    }
    pthread_mutex_unlock(&sim->lock);
    return fits ? BASE + at : 0;
}

/* Pins `bytes` from `memory` on; 0: none any more. */
void
sim_change_pin(struct device_sim *sim, uint8_t *memory, uint64_t bytes, bool is_new)
{
    size_t free_at = MOST_PINS, at = 0;
    pthread_mutex_lock(&pins_lock);
    while (at < MOST_PINS && (pins[at].memory != memory || pins[at].by != sim)) {
        free_at = free_at == MOST_PINS && pins[at].memory == NULL ? at : free_at;
        at++;
    }
    sim_must(at < MOST_PINS || is_new, "memory was unpinned that was not pinned");
    at = at == MOST_PINS ? free_at : at;
    sim_must(at < MOST_PINS, "too many pinned ranges");
    uint64_t before = pins[at].memory != NULL ? pins[at].bytes : 0;
    pins[at] = (struct pin){bytes > 0 ? memory : NULL, bytes, sim};
    pthread_mutex_unlock(&pins_lock);
    pthread_mutex_lock(&sim->lock);
    sim->pinned_bytes = sim->pinned_bytes - before + bytes;
    pthread_mutex_unlock(&sim->lock);
}

uint64_t
device_sim_tensor(struct device_sim *sim, uint64_t bytes, uint64_t align_bytes)
{
    uint64_t address = sim_take_memory(sim, bytes, align_bytes, false);
    sim_must(address != 0, "the device is full");
    return address;
}

void
device_sim_poke(struct device_sim *sim, uint64_t address, const void *data, uint64_t len)
{
    sim_must(sim_is_live(sim, address, len), "poked outside");
    memcpy(sim_real(sim, address), data, len);
}

void
device_sim_peek(struct device_sim *sim, uint64_t address, void *ret, uint64_t len)
{
    sim_must(sim_is_live(sim, address, len), "peeked outside");
    memcpy(ret, sim_real(sim, address), len);
}

void
device_sim_spoil(struct device_sim *sim)
{
    pthread_mutex_lock(&sim->lock);
    for (uint32_t i = 0; i < sim->ranges_count; i++) {
        const struct range *range = &sim->ranges[i];
        if (range->live && !range->is_slab) {
            memset(sim_real(sim, range->from), RUBBISH, range->bytes);
        }
    }
    pthread_mutex_unlock(&sim->lock);
}

uint64_t
device_sim_pinned_bytes(struct device_sim *sim)
{
    pthread_mutex_lock(&sim->lock);
    uint64_t bytes = sim->pinned_bytes;
    pthread_mutex_unlock(&sim->lock);
    return bytes;
}

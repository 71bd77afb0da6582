/*
 * device_sim_parts.h: private: what the files of the simulated device share.
 *
 * device_sim.c is the table, device_sim_queue.c runs what is on the streams, device_sim_memory.c
 * has memory of the device and what is pinned of the host's, device_sim_control.c is what tests ask
 * and make fail.
 */
#ifndef DEVICE_SIM_PARTS_H
#define DEVICE_SIM_PARTS_H

#include "device_sim.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine_world.h"

/* Not canonical: following it is a fault. */
#define BASE UINT64_C(0x00d0000000000000)
enum { MOST_RANGES = 4096, GUARD_BYTES = 256, RUBBISH = 0xEE, FREED = 0xDD };
/* Our two streams: copies and kernels, and checksums beside them. */
enum { OURS = 0, SUMS = DEVICE_SIM_STREAMS + 1, STREAMS = SUMS + 1 };

enum work_kind {
    WORK_TO_HOST,
    WORK_TO_DEVICE,
    WORK_PACK,
    WORK_UNPACK,
    WORK_CHECKSUM,
    WORK_EVENT,
    WORK_WAIT,
    WORK_POKE,
    WORK_RELEASE,
};

struct dcp_device_event {
    uint32_t left; /* streams on which it has not happened */
    bool forgotten;
    uint32_t waiters;
};

struct work {
    struct work *next;
    enum work_kind kind;
    uint8_t *host;
    uint64_t device, bytes;
    uint64_t pitch, rows; /* WORK_TO_DEVICE of rows, `bytes` each; 0 rows: it is one */
    uint32_t crc;         /* of what is read on the host */
    struct dcp_device_box *boxes;
    uint32_t count;
    struct dcp_device_event *event;
    bool done, waited; /* whoever put it there waits for it */
};

struct stream {
    struct work *first, *last;
    uint64_t count;
    bool running;
};

struct range {
    uint64_t from, bytes;
    bool live, is_slab;
};

struct device_sim {
    struct dcp_device table;
    struct device_sim_options options;
    uint8_t *memory;
    uint64_t used_bytes;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed;
    pthread_t thread;
    struct stream streams[STREAMS];
    uint64_t held_up;     /* calls that a full stream held up */
    struct maker_rng rng; /* of the thread's choices */
    struct range ranges[MOST_RANGES];
    uint32_t ranges_count;
    uint64_t calls, reads, fail_call, fail_work, violations, live_events, pinned_bytes;
    bool failed; /* for good */
    bool hung, hung_for_ever, lost, closing;
};

/* `_locked`: the caller holds the lock. */
void sim_must(bool ok, const char *what);
void sim_violation(struct device_sim *sim, const char *what);
uint8_t *sim_real(const struct device_sim *sim, uint64_t address);
bool sim_is_live(struct device_sim *sim, uint64_t address, uint64_t bytes);
void sim_release_locked(struct device_sim *sim, uint64_t address);
bool sim_is_pinned(const uint8_t *memory, uint64_t bytes);
uint64_t sim_take_memory(struct device_sim *sim, uint64_t bytes, uint64_t align_bytes,
                         bool is_slab);
void sim_change_pin(struct device_sim *sim, uint8_t *memory, uint64_t bytes, bool is_new);
void sim_drop_event_locked(struct device_sim *sim, struct dcp_device_event *event);
void *sim_thread_main(void *arg);
struct work *sim_put_locked(struct device_sim *sim, uintptr_t stream, const struct work *what);
void sim_put(struct device_sim *sim, uintptr_t stream, const struct work *what);

#endif

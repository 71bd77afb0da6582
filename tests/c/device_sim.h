/*
 * device_sim.h: a simulated device: struct dcp_device whose copies and kernels run late, on a
 * thread of its own, in stream order and after random pauses.
 *
 * Its memory has addresses that nobody can follow.  What a copy will write on the host is filled
 * with rubbish when the copy is put on the stream, so that whoever looks at it early sees that;
 * what a copy reads must stay as it is until then; every range must lie in memory that is allocated
 * when the work runs.  What breaks these rules is counted as a violation.  Failures of the
 * simulation itself end the test program.
 *
 * Streams of a trainer are numbers from 1 on, given as (void *)number; number DEVICE_SIM_CAPTURING
 * is capturing a graph.
 */
#ifndef DEVICE_SIM_H
#define DEVICE_SIM_H

#include "dcp_device.h"
#include "dcp_io.h"

enum {
    DEVICE_SIM_STREAMS = 4,
    DEVICE_SIM_CAPTURING = 99,
    /* Work that a stream of ours holds; whoever puts more on it is held up until some has run, but
     * not while the device hangs. */
    DEVICE_SIM_QUEUE = 1000,
};

struct device_sim;

struct device_sim_options {
    uint64_t seed;
    uint32_t features;     /* enum dcp_device_features */
    uint64_t memory_bytes; /* 0: 64 MiB */
    uint64_t
        slab_most_bytes;     /* larger allocations are DCP_E_NOMEM; 0: all are.  UINT64_MAX: none */
    bool no_pin;             /* pinning fails */
    bool no_checksum_memory; /* `checksum` is DCP_E_NOMEM */
    const struct dcp_io *io; /* of files that it reads by itself */
    uint64_t refuse_read;    /* of what it is to read the range of this number and all after it are
                                refused, half read; 0: none */
    bool instant;            /* no pauses and no checks: for benchmarks */
};

struct device_sim *device_sim_new(const struct device_sim_options *options);
/* Checks that nothing was left: events, memory that `allocate` gave, pinned ranges; false and a
 * line on stderr when something was, or when there were violations. */
bool device_sim_free(struct device_sim *sim);
struct dcp_device *device_sim_table(struct device_sim *sim);

/* Memory that a trainer's tensors lie in, at any alignment; gone with the device. */
uint64_t device_sim_tensor(struct device_sim *sim, uint64_t bytes, uint64_t align_bytes);
void device_sim_poke(struct device_sim *sim, uint64_t address, const void *data, uint64_t len);
void device_sim_peek(struct device_sim *sim, uint64_t address, void *ret, uint64_t len);
/* Late, on a stream of the trainer. */
void device_sim_poke_later(struct device_sim *sim, uintptr_t stream, uint64_t address,
                           const void *data, uint64_t len);
/* What the trainer sees there once all that was put on `stream` has run. */
void device_sim_peek_after(struct device_sim *sim, uintptr_t stream, uint64_t address, void *ret,
                           uint64_t len);

/* The call of this number from now on fails, of those that can; 0: none. */
void device_sim_fail_call(struct device_sim *sim, uint64_t number);
/* The work of this number from now on fails when it runs, and with it all that is asked later. */
void device_sim_fail_work(struct device_sim *sim, uint64_t number);
uint64_t device_sim_calls(const struct device_sim *sim);
/* Ranges of files that it was asked for. */
uint64_t device_sim_reads(const struct device_sim *sim);
/* Nothing runs any more.  Waiting for it to be idle ends the hang, or with `for_ever` is
 * DCP_E_TIMEOUT. */
void device_sim_hang(struct device_sim *sim, bool for_ever);
/* The same for ever, and waiting for it to be idle is DCP_E_IO. */
void device_sim_lose(struct device_sim *sim);
void device_sim_go_on(struct device_sim *sim);
/* Calls that a full stream held up, or would have while the device hung. */
uint64_t device_sim_held_up(struct device_sim *sim);
/* Overwrites what the trainer's tensors hold. */
void device_sim_spoil(struct device_sim *sim);
uint64_t device_sim_pinned_bytes(struct device_sim *sim);
uint64_t device_sim_violations(struct device_sim *sim);

#endif

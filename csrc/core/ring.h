/*
 * ring.h: private: the engine's aligned buffers and the one thread that moves them.
 *
 * dcp_ring is memory: a few aligned buffers on huge pages, kept between saves.  dcp_pump is a
 * thread with a first-in first-out queue of jobs; without a thread a job runs inside dcp_pump_push,
 * so small work goes through the same code.
 */
#ifndef DCP_RING_H
#define DCP_RING_H

#include <pthread.h>

#include "dcp_engine.h"

/* ---- memory ---- */

struct dcp_ring {
    uint8_t *memory; /* buffers_count * buffer_bytes, page aligned */
    uint64_t buffer_bytes;
    uint32_t buffers_count;
    int64_t pid;       /* the process that mapped it: a fork does not inherit the mapping */
    bool asked_to_pin; /* once, by dcp_ring_acquire_pinned */
    const struct dcp_device *pinned_by;        /* all of it; NULL: it is not pinned */
    char pin_refusal[DCP_DEVICE_REASON_BYTES]; /* why not */
};

enum { DCP_RING_MOST_BUFFERS = 8 };

/* Resolves 0, the default, in either number; DCP_E_INVALID when the shape is none. */
int dcp_ring_shape(uint32_t *buffers_count, uint64_t *buffer_bytes,
                   struct dcp_error *err) DCP_MUST_CHECK;
/* 0 for either number: the default.  Takes a kept ring of that shape or maps a new one. */
int dcp_ring_acquire(uint32_t buffers_count, uint64_t buffer_bytes, struct dcp_ring **ret_ring,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* The default shape, pinned for copies of devices where that can be had. */
int dcp_ring_acquire_pinned(const struct dcp_device *device, struct dcp_device_stats *stats,
                            struct dcp_ring **ret_ring, struct dcp_error *err) DCP_MUST_CHECK;
/* Keeps it for the next save or frees it.  NULL is fine. */
void dcp_ring_release(struct dcp_ring *ring);

static inline uint8_t *
dcp_ring_buffer(const struct dcp_ring *ring, uint32_t index)
{
    DCP_ASSERT(index < ring->buffers_count);
    return ring->memory + (uint64_t)index * ring->buffer_bytes;
}

/* ---- the thread ---- */

struct dcp_job {
    void *file;                       /* for the run function */
    uint8_t *data;                    /* memory to write from or to read into */
    uint64_t offset_bytes, len_bytes; /* in the file */
    uint32_t kind, slot;              /* for the run function */
    uint32_t flags;                   /* for the run function */
};

/* `failed` is true once a job failed: the run function then only cleans up. */
typedef int (*dcp_job_fn)(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err);

/* Enough files between writing and syncing for one commit of a journal to serve many. */
enum { DCP_PUMP_JOBS = 64 };

struct dcp_pump {
    dcp_job_fn run;              /* set before the thread starts */
    void (*on_start)(void *ctx); /* the same; called first on the thread; may be NULL */
    void *ctx;
    const char *name; /* static, of the thread; set before it starts */
    bool threaded;
    pthread_t thread;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t pushed_cond, finished_cond;
    struct dcp_job jobs[DCP_PUMP_JOBS]; /* job n is at n % DCP_PUMP_JOBS */
    uint64_t pushed, finished;          /* numbers of jobs since the start */
    bool closing;
    int code; /* of the first failure; 0 */
    struct dcp_error error;
    uint64_t wait_ns; /* the pushing thread waited for this long */
};

/* Without a thread, so far. */
int dcp_pump_init(struct dcp_pump *pump, dcp_job_fn run, void *ctx,
                  struct dcp_error *err) DCP_MUST_CHECK;
/* Starts the thread, once.  When that is not possible the pump works without: slower, never a
 * failure. */
void dcp_pump_start(struct dcp_pump *pump);
/* Returns the job's number; waits for room. */
uint64_t dcp_pump_push(struct dcp_pump *pump, const struct dcp_job *job);
/* Waits until job `number` has run.  0, or the code of the first failure of any job so far. */
int dcp_pump_wait(struct dcp_pump *pump, uint64_t number) DCP_MUST_CHECK;
/* The code of the first failure so far, without waiting; 0. */
int dcp_pump_code(struct dcp_pump *pump) DCP_MUST_CHECK;
/* Waits for all jobs pushed so far. */
int dcp_pump_drain(struct dcp_pump *pump) DCP_MUST_CHECK;
/* Runs what is queued, joins the thread, hands over the first failure. */
int dcp_pump_clean_up(struct dcp_pump *pump, struct dcp_error *err) DCP_MUST_CHECK;

/* Starts a thread of the engine: no signal reaches it, they are for the threads of the trainer.  0,
 * or an errno. */
int dcp_engine_thread(pthread_t *ret_thread, void *(*run)(void *), void *arg) DCP_MUST_CHECK;

/* Monotonic nanoseconds. */
uint64_t dcp_engine_now_ns(void);

#endif

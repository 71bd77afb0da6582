/*
 * ring.c: buffers that are touched for the first time once per process, and the engine's thread.
 *
 * The kernel takes 4 ms to hand out 32 MiB of huge pages: as long as writing 10 MB.  Finished rings
 * are therefore kept in two slots (a save and a load at once), each swapped atomically.  No lock: a
 * fork at any instant leaves the child with slots that are empty or hold a ring of its parent,
 * which its pid gives away; such a ring is forgotten, because its mapping was never inherited.
 * Rings that are pinned for a device have two slots of their own, whether that could be had or not:
 * asking costs more than mapping.  What is pinned is unpinned before it is unmapped, by the process
 * that pinned it alone.
 *
 * Threads: the ring functions from any thread; one pump belongs to the thread that made it.
 */
#include "ring.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "dcp_trace.h"
#include "device.h"

enum { KEPT_RINGS = 2 };

/* Those that nobody asked to be pinned, the others. */
static _Atomic(struct dcp_ring *) kept_rings[2][KEPT_RINGS];

static void
ring_destroy(struct dcp_ring *ring)
{
    if (ring == NULL) {
        return;
    }
    if (ring->pid == (int64_t)getpid()) {
        if (ring->pinned_by != NULL) {
            ring->pinned_by->unpin(ring->pinned_by->ctx, ring->memory);
        }
        dcp_unmap_huge(ring->memory, ring->buffer_bytes * ring->buffers_count);
    }
    dcp_free(ring);
}

int
dcp_ring_shape(uint32_t *buffers_count, uint64_t *buffer_bytes, struct dcp_error *err)
{
    uint32_t count = *buffers_count != 0 ? *buffers_count : DCP_RING_BUFFERS;
    uint64_t bytes = *buffer_bytes != 0 ? *buffer_bytes : DCP_RING_BUFFER_BYTES;
    if (count < 2 || count > DCP_RING_MOST_BUFFERS || bytes % DCP_DIRECT_ALIGN_BYTES != 0 ||
        bytes > DCP_MAX_REQUEST_BYTES) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a ring of %u buffers of %llu bytes was asked for; use 2 to %d "
                             "buffers, each a multiple of %u bytes",
                             count, (unsigned long long)bytes, DCP_RING_MOST_BUFFERS,
                             DCP_DIRECT_ALIGN_BYTES);
    }
    *buffers_count = count;
    *buffer_bytes = bytes;
    return 0;
}

static int
acquire(bool pinned, uint32_t buffers_count, uint64_t buffer_bytes, struct dcp_ring **ret_ring,
        struct dcp_error *err)
{
    uint32_t count = buffers_count;
    uint64_t bytes = buffer_bytes;
    int rc = dcp_ring_shape(&count, &bytes, err);
    if (rc != 0) {
        return rc;
    }
    for (int i = 0; i < KEPT_RINGS; i++) {
        struct dcp_ring *ring = atomic_exchange(&kept_rings[pinned][i], NULL);
        if (ring == NULL) {
            continue;
        }
        if (ring->pid == (int64_t)getpid() && ring->buffers_count == count &&
            ring->buffer_bytes == bytes) {
            *ret_ring = ring;
            return 0;
        }
        ring_destroy(ring);
    }
    struct dcp_ring *ring = dcp_calloc(1, sizeof *ring);
    if (ring == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a ring of buffers");
    }
    ring->memory = dcp_map_huge(bytes * count, err);
    if (ring->memory == NULL) {
        dcp_free(ring);
        return DCP_E_NOMEM;
    }
    ring->buffer_bytes = bytes;
    ring->buffers_count = count;
    ring->pid = (int64_t)getpid();
    *ret_ring = ring;
    return 0;
}

int
dcp_ring_acquire(uint32_t buffers_count, uint64_t buffer_bytes, struct dcp_ring **ret_ring,
                 struct dcp_error *err)
{
    return acquire(false, buffers_count, buffer_bytes, ret_ring, err);
}

int
dcp_ring_acquire_pinned(const struct dcp_device *device, struct dcp_device_stats *stats,
                        struct dcp_ring **ret_ring, struct dcp_error *err)
{
    struct dcp_ring *ring;
    int rc = acquire(true, 0, 0, &ring, err);
    if (rc != 0) {
        return rc;
    }
    if (!ring->asked_to_pin) {
        struct dcp_error refusal;
        dcp_error_clear(&refusal);
        rc = device->pin(device->ctx, ring->memory, ring->buffer_bytes * ring->buffers_count,
                         &refusal);
        ring->asked_to_pin = true;
        ring->pinned_by = rc == 0 ? device : NULL;
        if (rc != 0) {
            (void)snprintf(ring->pin_refusal, sizeof ring->pin_refusal, "%.*s",
                           DCP_DEVICE_REASON_BYTES - 1, refusal.message);
        }
    }
    if (ring->pinned_by == NULL) {
        dcp_device_because(stats, "pinning failed: %s", ring->pin_refusal);
    }
    *ret_ring = ring;
    return 0;
}

void
dcp_ring_release(struct dcp_ring *ring)
{
    bool pinned = ring != NULL && ring->asked_to_pin;
    for (int i = 0; ring != NULL && i < KEPT_RINGS; i++) {
        struct dcp_ring *empty = NULL;
        if (atomic_compare_exchange_strong(&kept_rings[pinned][i], &empty, ring)) {
            return;
        }
    }
    ring_destroy(ring);
}

void
dcp_engine_trim(void)
{
    for (int i = 0; i < KEPT_RINGS; i++) {
        ring_destroy(atomic_exchange(&kept_rings[false][i], NULL));
        ring_destroy(atomic_exchange(&kept_rings[true][i], NULL));
    }
}

uint64_t
dcp_engine_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int
dcp_engine_thread(pthread_t *ret_thread, void *(*run)(void *), void *arg)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int sys_errno = pthread_create(ret_thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return sys_errno;
}

/* Runs a job outside the lock and records its outcome. */
static void
run_job(struct dcp_pump *pump, const struct dcp_job *job, bool failed)
{
    struct dcp_error error;
    dcp_error_clear(&error);
    int code = pump->run(pump->ctx, job, failed, &error);
    pthread_mutex_lock(&pump->lock);
    if (code != 0 && pump->code == 0) {
        pump->code = code;
        pump->error = error;
    }
    pump->finished++;
    pthread_cond_signal(&pump->finished_cond);
    pthread_mutex_unlock(&pump->lock);
}

static void *
pump_main(void *arg)
{
    struct dcp_pump *pump = arg;
    dcp_trace_thread(pump->name != NULL ? pump->name : "pump");
    if (pump->on_start != NULL) {
        pump->on_start(pump->ctx);
    }
    for (;;) {
        pthread_mutex_lock(&pump->lock);
        while (pump->finished == pump->pushed && !pump->closing) {
            pthread_cond_wait(&pump->pushed_cond, &pump->lock);
        }
        if (pump->finished == pump->pushed) {
            pthread_mutex_unlock(&pump->lock);
            return NULL;
        }
        struct dcp_job job = pump->jobs[pump->finished % DCP_PUMP_JOBS];
        bool failed = pump->code != 0;
        pthread_mutex_unlock(&pump->lock);
        run_job(pump, &job, failed);
    }
}

int
dcp_pump_init(struct dcp_pump *pump, dcp_job_fn run, void *ctx, struct dcp_error *err)
{
    memset(pump, 0, sizeof *pump);
    dcp_error_clear(&pump->error);
    pump->run = run;
    pump->ctx = ctx;
    if (pthread_mutex_init(&pump->lock, NULL) != 0) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "the engine's mutex could not be made");
    }
    pthread_cond_init(&pump->pushed_cond, NULL);
    pthread_cond_init(&pump->finished_cond, NULL);
    return 0;
}

void
dcp_pump_start(struct dcp_pump *pump)
{
    if (pump->threaded) {
        return;
    }
    pump->threaded = dcp_engine_thread(&pump->thread, pump_main, pump) == 0;
}

uint64_t
dcp_pump_push(struct dcp_pump *pump, const struct dcp_job *job)
{
    if (!pump->threaded) {
        pump->pushed++;
        run_job(pump, job, pump->code != 0);
        return pump->pushed - 1;
    }
    pthread_mutex_lock(&pump->lock);
    if (pump->pushed - pump->finished == DCP_PUMP_JOBS) {
        uint64_t start_ns = dcp_engine_now_ns();
        while (pump->pushed - pump->finished == DCP_PUMP_JOBS) {
            pthread_cond_wait(&pump->finished_cond, &pump->lock);
        }
        pump->wait_ns += dcp_engine_now_ns() - start_ns;
    }
    uint64_t number = pump->pushed;
    pump->jobs[number % DCP_PUMP_JOBS] = *job;
    pump->pushed++;
    pthread_cond_signal(&pump->pushed_cond);
    pthread_mutex_unlock(&pump->lock);
    return number;
}

int
dcp_pump_wait(struct dcp_pump *pump, uint64_t number)
{
    pthread_mutex_lock(&pump->lock);
    DCP_ASSERT(number < pump->pushed);
    if (pump->finished <= number) {
        uint64_t start_ns = dcp_engine_now_ns();
        while (pump->finished <= number) {
            pthread_cond_wait(&pump->finished_cond, &pump->lock);
        }
        pump->wait_ns += dcp_engine_now_ns() - start_ns;
    }
    int code = pump->code;
    pthread_mutex_unlock(&pump->lock);
    return code;
}

int
dcp_pump_code(struct dcp_pump *pump)
{
    pthread_mutex_lock(&pump->lock);
    int code = pump->code;
    pthread_mutex_unlock(&pump->lock);
    return code;
}

int
dcp_pump_drain(struct dcp_pump *pump)
{
    return pump->pushed == 0 ? 0 : dcp_pump_wait(pump, pump->pushed - 1);
}

int
dcp_pump_clean_up(struct dcp_pump *pump, struct dcp_error *err)
{
    if (pump->run == NULL) {
        return 0;
    }
    if (pump->threaded) {
        pthread_mutex_lock(&pump->lock);
        pump->closing = true;
        pthread_cond_signal(&pump->pushed_cond);
        pthread_mutex_unlock(&pump->lock);
        pthread_join(pump->thread, NULL);
    }
    pthread_mutex_destroy(&pump->lock);
    pthread_cond_destroy(&pump->pushed_cond);
    pthread_cond_destroy(&pump->finished_cond);
    int code = pump->code;
    if (code != 0 && err != NULL && err->code == 0) {
        *err = pump->error;
    }
    pump->run = NULL;
    return code;
}

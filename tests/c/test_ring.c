/*
 * test_ring.c: the kept buffers and the thread that moves them.
 */
#include "ctest.h"

#include <sys/wait.h>
#include <unistd.h>

#include "ring.h"

static void
a_released_ring_is_used_again_and_trim_frees_it(void)
{
    struct dcp_error err = {0};
    struct dcp_ring *ring, *again, *other;
    uint64_t before = dcp_alloc_live_bytes();
    CHECK_OK(dcp_ring_acquire(0, 0, &ring, &err), &err);
    CHECK_EQ((uintptr_t)dcp_ring_buffer(ring, 1) % DCP_DIRECT_ALIGN_BYTES, 0);
    CHECK(ring->buffer_bytes * ring->buffers_count <= 64u << 20);
    uint8_t *memory = ring->memory;
    dcp_ring_release(ring);
    CHECK_OK(dcp_ring_acquire(0, 0, &again, &err), &err);
    CHECK(again->memory == memory);
    CHECK_OK(dcp_ring_acquire(0, 0, &other, &err), &err); /* a load beside a save */
    CHECK(other->memory != memory);
    dcp_ring_release(again);
    dcp_ring_release(other);
    CHECK(dcp_alloc_live_bytes() > before);
    dcp_engine_trim();
    CHECK_EQ(dcp_alloc_live_bytes(), before);
}

static void
odd_shapes_are_refused(void)
{
    struct dcp_error err = {0};
    struct dcp_ring *ring;
    CHECK_EQ(dcp_ring_acquire(1, 0, &ring, &err), DCP_E_INVALID);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_ring_acquire(100, 0, &ring, &err), DCP_E_INVALID);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_ring_acquire(2, 5000, &ring, &err), DCP_E_INVALID);
}

/* The child must neither touch nor unmap what its parent mapped. */
static void
a_forked_child_makes_its_own(void)
{
    struct dcp_error err = {0};
    struct dcp_ring *ring;
    CHECK_OK(dcp_ring_acquire(2, 1u << 20, &ring, &err), &err);
    dcp_ring_release(ring);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        int ok = dcp_ring_acquire(2, 1u << 20, &ring, &err) == 0;
        memset(dcp_ring_buffer(ring, 0), 1, 1u << 20);
        dcp_ring_release(ring);
        _exit(ok ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_EQ(status, 0);
    dcp_engine_trim();
}

struct trace {
    uint64_t ran[64], failed[64];
    uint64_t count;
    uint64_t fail_at;
};

static int
note(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err)
{
    struct trace *trace = ctx;
    trace->failed[trace->count] = failed;
    trace->ran[trace->count++] = job->offset_bytes;
    if (job->offset_bytes == trace->fail_at) {
        return dcp_error_set(err, DCP_E_IO, 5, "file", "job %llu",
                             (unsigned long long)job->offset_bytes);
    }
    return 0;
}

static void
jobs_run_in_order_and_know_of_an_earlier_failure(void)
{
    for (int threaded = 0; threaded < 2; threaded++) {
        for (uint64_t fail_at = 10; fail_at <= 100; fail_at += 90) {
            struct trace trace = {.fail_at = fail_at};
            struct dcp_pump pump;
            struct dcp_error err = {0};
            CHECK_OK(dcp_pump_init(&pump, note, &trace, &err), &err);
            if (threaded) {
                dcp_pump_start(&pump);
            }
            CHECK_EQ(dcp_pump_drain(&pump), 0);
            for (uint64_t i = 0; i < 50; i++) {
                struct dcp_job job = {.offset_bytes = i};
                CHECK_EQ(dcp_pump_push(&pump, &job), i);
            }
            CHECK_EQ(dcp_pump_wait(&pump, 49), fail_at < 50 ? DCP_E_IO : 0);
            CHECK_EQ(dcp_pump_clean_up(&pump, &err), fail_at < 50 ? DCP_E_IO : 0);
            CHECK(fail_at > 50 || strcmp(err.message, "job 10") == 0);
            CHECK_EQ(trace.count, 50);
            for (uint64_t i = 0; i < 50; i++) {
                CHECK_EQ(trace.ran[i], i);
                CHECK_EQ(trace.failed[i], i > fail_at);
            }
            CHECK_EQ(dcp_pump_clean_up(&pump, &err), 0);
        }
    }
}

CTEST_MAIN(RUN(a_released_ring_is_used_again_and_trim_frees_it); RUN(odd_shapes_are_refused);
           RUN(a_forked_child_makes_its_own); RUN(jobs_run_in_order_and_know_of_an_earlier_failure);)

/*
 * cuda_stream.c: the order between our stream and the trainer's, events, and the wait for our own.
 *
 * `follow` records an event on the trainer's stream and has ours wait for it, on the device; the
 * host waits for nothing.  One event per table is enough: a wait means what the event was when the
 * wait was put on the stream.
 *
 * Only `wait_idle` waits, by asking again and again: cudaStreamSynchronize knows no deadline.
 *
 * Threads: one at a time for a table.
 */
#include "cuda_device.h"

#include <inttypes.h>
#include <time.h>

#include "dcp_alloc.h"

enum {
    FIRST_PAUSE_NS = 20000,
    LONGEST_PAUSE_NS = 1000000, /* how much later than the device the wait may end */
};

/* `later` waits for what `earlier` has been given so far. */
static int
put_in_order(struct cuda_table *table, const struct cuda_stay *stay, cuda_stream earlier,
             cuda_stream later, struct dcp_error *err)
{
    int rc = cuda_check(stay, stay->runtime->cudaEventRecord(table->order, earlier),
                        "mark the end of a stream's work", err);
    if (rc == 0) {
        rc = cuda_check(stay, stay->runtime->cudaStreamWaitEvent(later, table->order, 0),
                        "have a stream wait for another", err);
    }
    return rc;
}

/* Whether the second stream counts: there was something on it. */
static bool
sums_count(const struct cuda_table *table)
{
    return table->sums.is_used;
}

int
cuda_stream_follow(void *ctx, void *stream, struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    struct cuda_stay stay;
    int rc = cuda_enter(table->device.index, &stay, err);

    if (rc != 0) {
        return rc;
    }
    rc = cuda_refuse_if_capturing(&stay, stream, "copy behind a stream's work", err);
    if (rc == 0) {
        rc = put_in_order(table, &stay, stream, table->stream, err);
    }
    if (rc == 0 && table->sums.stream != NULL) {
        rc = put_in_order(table, &stay, stream, table->sums.stream, err);
    }
    cuda_leave(&stay);
    return rc;
}

int
cuda_stream_lead(void *ctx, void *stream, struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    struct cuda_stay stay;
    int rc = cuda_enter(table->device.index, &stay, err);

    if (rc != 0) {
        return rc;
    }
    rc = cuda_refuse_if_capturing(&stay, stream, "have a stream wait for copies", err);
    if (rc == 0) {
        rc = put_in_order(table, &stay, table->stream, stream, err);
    }
    if (rc == 0 && sums_count(table)) {
        rc = cuda_sums_flush(table, &stay, err);
        rc = rc == 0 ? put_in_order(table, &stay, table->sums.stream, stream, err) : rc;
    }
    cuda_leave(&stay);
    return rc;
}

static int
take_event(struct cuda_table *table, const struct cuda_stay *stay, dcp_device_event **ret_event,
           struct dcp_error *err)
{
    dcp_device_event *event = table->spare;

    if (event != NULL) {
        table->spare = event->next;
        *ret_event = event;
        return 0;
    }
    event = dcp_calloc(1, sizeof *event);
    if (event == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for an event");
    }
    int rc = cuda_check(
        stay, stay->runtime->cudaEventCreateWithFlags(&event->event, DCP_CUDA_EVENT_NO_TIMING),
        "create an event", err);
    if (rc == 0) {
        rc = cuda_check(
            stay, stay->runtime->cudaEventCreateWithFlags(&event->sums, DCP_CUDA_EVENT_NO_TIMING),
            "create an event", err);
    }
    if (rc != 0) {
        if (event->event != NULL) {
            (void)stay->runtime->cudaEventDestroy(event->event);
        }
        dcp_free(event);
        return rc;
    }
    *ret_event = event;
    return 0;
}

/* Behind all that both streams were given. */
static int
record_both(struct cuda_table *table, const struct cuda_stay *stay, dcp_device_event *event,
            struct dcp_error *err)
{
    int rc = cuda_sums_flush(table, stay, err);

    event->has_sums = sums_count(table);
    if (rc == 0) {
        rc = cuda_check(stay, stay->runtime->cudaEventRecord(event->event, table->stream),
                        "record an event", err);
    }
    if (rc == 0 && event->has_sums) {
        rc = cuda_check(stay, stay->runtime->cudaEventRecord(event->sums, table->sums.stream),
                        "record an event", err);
    }
    return rc;
}

int
cuda_stream_record(void *ctx, dcp_device_event **ret_event, struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    dcp_device_event *event = NULL;
    struct cuda_stay stay;
    int rc = cuda_enter(table->device.index, &stay, err);

    if (rc != 0) {
        return rc;
    }
    rc = take_event(table, &stay, &event, err);
    if (rc == 0) {
        rc = record_both(table, &stay, event, err);
        if (rc == 0) {
            *ret_event = event;
        } else {
            cuda_stream_forget(table, event);
        }
    }
    cuda_leave(&stay);
    return rc;
}

/* 1, 0 or an error, of cudaEventQuery's or cudaStreamQuery's answer. */
static int
answer_of(const struct cuda_stay *stay, cuda_status status, struct dcp_error *err)
{
    if (status == DCP_CUDA_ERROR_NOT_READY) {
        (void)stay->runtime->cudaGetLastError();
        return 0;
    }
    int rc = cuda_check(stay, status, "finish the copies of a checkpoint", err);
    return rc == 0 ? 1 : rc;
}

int
cuda_stream_poll(void *ctx, dcp_device_event *event, struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    struct cuda_stay stay;
    int rc = cuda_enter(table->device.index, &stay, err);

    if (rc == 0) {
        rc = answer_of(&stay, stay.runtime->cudaEventQuery(event->event), err);
        if (rc > 0 && event->has_sums) {
            rc = answer_of(&stay, stay.runtime->cudaEventQuery(event->sums), err);
        }
        cuda_leave(&stay);
    }
    return rc;
}

void
cuda_stream_forget(void *ctx, dcp_device_event *event)
{
    struct cuda_table *table = ctx;

    if (event != NULL) {
        event->next = table->spare;
        table->spare = event;
    }
}

static uint64_t
now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int
wait_on(const struct cuda_table *table, const struct cuda_stay *stay, struct dcp_error *err)
{
    uint64_t begin = now_ns(), pause = FIRST_PAUSE_NS;

    for (;;) {
        int rc = answer_of(stay, stay->runtime->cudaStreamQuery(table->stream), err);
        if (rc > 0 && sums_count(table)) {
            rc = answer_of(stay, stay->runtime->cudaStreamQuery(table->sums.stream), err);
        }
        if (rc != 0) {
            return rc < 0 ? rc : 0;
        }
        if (now_ns() - begin > DCP_DEVICE_GRACE_NS) {
            return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL,
                                 "cuda:%d: copies of a checkpoint are still running after %" PRIu64
                                 " s, or wait for work of the training that does not end",
                                 (int)stay->index,
                                 (uint64_t)DCP_DEVICE_GRACE_NS / UINT64_C(1000000000));
        }
        struct timespec nap = {.tv_nsec = (long)pause};
        (void)nanosleep(&nap, NULL);
        pause = dcp_min_u64(2 * pause, LONGEST_PAUSE_NS);
    }
}

int
cuda_stream_wait_idle(void *ctx, struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    struct cuda_stay stay;
    int rc = cuda_enter(table->device.index, &stay, err);

    if (rc == 0) {
        cuda_sums_drop(table, &stay);
        rc = wait_on(table, &stay, err);
        cuda_leave(&stay);
    }
    return rc;
}

void
cuda_stream_clean_up(struct cuda_table *table, const struct cuda_stay *stay)
{
    while (table->spare != NULL) {
        dcp_device_event *event = table->spare;
        table->spare = event->next;
        (void)stay->runtime->cudaEventDestroy(event->event);
        (void)stay->runtime->cudaEventDestroy(event->sums);
        dcp_free(event);
    }
}

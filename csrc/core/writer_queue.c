/*
 * writer_queue.c: requests in flight without a thread of ours: the calling thread fills buffers, or
 * takes the next piece of an image, and starts writes, the kernel runs them.
 *
 * The queue only ever does the plain case.  A request that did not end as it was asked to (short,
 * interrupted, refused) is mended by dcp_write_range, which knows what to do about each, once
 * nothing else is in flight: what it does to the file (leaving direct I/O) must not meet another
 * request.  If the queue refused what pwrite then did, it is not used again, and the pump's thread
 * takes over.  An error that is one (EIO, ENOSPC, ...) fails the save as it does on the thread.
 *
 * Invariants: a slot stands for a buffer of the ring, or for nothing but itself when an image is
 * written.  It is used again, and the ring released, only when its request has ended.  A wait
 * for a request is as long as pwrite would have been, until the save is cancelled or has failed;
 * from then on DCP_QUEUE_GRACE_NS.  If that is over, the memory is the kernel's for ever.
 * Threads: all of it on the calling thread.
 */
#include "writer.h"

#include <errno.h>

#include "dcp_trace.h"

/* Between two looks at a queue that can't be waited on. */
#define BROKEN_PAUSE_NS 10000000u

/* Not the device's word, so pwrite is asked. */
static bool
may_be_mended(ssize_t result)
{
    switch (-result) {
    case EINTR:
    case EAGAIN:
    case EBUSY:
    case ENOMEM:
    case EINVAL:
    case ENOSYS:
    case EOPNOTSUPP:
    case ECANCELED:
    case EPERM:
        return true;
    default:
        return result >= 0;
    }
}

/* Says that the next time may be better. */
static bool
is_transient(ssize_t result)
{
    return result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY ||
           result == -ENOMEM;
}

/* Traced from its start to when it was seen to have ended. */
static void
trace_flight(const struct dcp_write_flight *flight)
{
    if (flight->traced_ns != 0) {
        const struct dcp_trace_event event = {.category = "io",
                                              .name = "write",
                                              .begin_ns = flight->traced_ns,
                                              .end_ns = dcp_trace_now_ns(),
                                              .file = flight->file->name,
                                              .offset_bytes = flight->offset_bytes,
                                              .bytes = flight->len_bytes,
                                              .beside = true};
        dcp_trace_record(&event);
    }
}

/* The request needs its buffer and its file no more. */
static int
land(struct dcp_writer *writer, struct dcp_write_flight *flight, bool written)
{
    struct dcp_write_file *file = flight->file;
    if (written) {
        file->end_bytes = dcp_max_u64(file->end_bytes, flight->offset_bytes + flight->len_bytes);
        dcp_write_count(writer, file, flight->offset_bytes, flight->len_bytes);
        trace_flight(flight);
    }
    file->given_up = file->given_up || !written;
    file->in_flight--;
    *flight = (struct dcp_write_flight){.state = DCP_FLIGHT_NONE};
    return file->closing && file->in_flight == 0 ? dcp_write_file_end(writer, file) : 0;
}

static int
lose(struct dcp_writer *writer, struct dcp_error *err)
{
    struct dcp_write_queue *queue = &writer->queue;
    queue->lost = true;
    if (writer->options->memory_lost != NULL) {
        *writer->options->memory_lost = true;
    }
    return dcp_error_set(err, DCP_E_IO, ETIMEDOUT, writer->dir_path,
                         "%u writes to %s neither ended nor failed within %llu s of the end of the "
                         "save; the device or its server does not answer",
                         queue->flying_count, writer->dir_path,
                         (unsigned long long)(DCP_QUEUE_GRACE_NS / 1000000000u));
}

/* Waits until one request has ended. */
static int
reap(struct dcp_writer *writer, struct dcp_error *err)
{
    struct dcp_write_queue *queue = &writer->queue;
    const struct dcp_io *io = writer->io;
    const atomic_int *cancel = writer->options->cancel;
    uint64_t start_ns = dcp_engine_now_ns(), hopeless_ns = 0;
    struct dcp_io_done done;
    int rc;
    while ((rc = io->queue_reap(io->ctx, queue->queue, DCP_QUEUE_SLICE_NS, &done)) != 1) {
        bool broken = rc < 0 && rc != -EINTR;
        if (broken) {
            io->sleep_ns(io->ctx, BROKEN_PAUSE_NS);
        }
        if (broken || queue->failed || (cancel != NULL && atomic_load(cancel) != 0)) {
            uint64_t now_ns = io->now_ns(io->ctx);
            hopeless_ns = hopeless_ns == 0 ? now_ns : hopeless_ns;
            if (now_ns - hopeless_ns >= DCP_QUEUE_GRACE_NS) {
                return lose(writer, err);
            }
        }
    }
    queue->wait_ns += dcp_engine_now_ns() - start_ns;
    dcp_trace_end(dcp_trace_from(start_ns), "wait", "wait for a write", 0);
    DCP_ASSERT(done.tag < writer->slots_count);
    struct dcp_write_flight *flight = &queue->flights[done.tag];
    DCP_ASSERT(flight->state == DCP_FLIGHT_FLYING);
    queue->flying_count--;
    if (done.result >= 0 && (uint64_t)done.result == flight->len_bytes) {
        return land(writer, flight, true);
    }
    flight->state = DCP_FLIGHT_ENDED;
    flight->result = done.result;
    queue->ended_count++;
    return 0;
}

/* Writes what is missing of a request that has ended, while nothing is in flight. */
static int
mend(struct dcp_writer *writer, struct dcp_write_flight *flight, struct dcp_error *err)
{
    struct dcp_write_queue *queue = &writer->queue;
    struct dcp_write_file *file = flight->file;
    ssize_t result = flight->result;
    if (!may_be_mended(result)) {
        return dcp_write_failed(writer, file, (int)-result, flight->offset_bytes, err);
    }
    uint64_t done = result > 0 ? (uint64_t)result - (uint64_t)result % file->align_bytes : 0;
    int rc = dcp_write_range(writer, file, flight->data + done, flight->offset_bytes + done,
                             flight->len_bytes - done, err);
    if (rc != 0) {
        return rc;
    }
    /* A file that has left direct I/O is to blame, not the queue. */
    queue->given_up = queue->given_up || (file->direct && !is_transient(result));
    return 0;
}

/* Empties the queue: all requests land, mended or, after a failure, as they are. */
static int
settle(struct dcp_writer *writer, struct dcp_error *err)
{
    struct dcp_write_queue *queue = &writer->queue;
    int rc = 0;
    while (queue->flying_count > 0) {
        int reap_rc = reap(writer, err);
        rc = rc != 0 ? rc : reap_rc;
        if (queue->lost) {
            return rc;
        }
    }
    for (uint32_t i = 0; i < writer->slots_count; i++) {
        struct dcp_write_flight *flight = &queue->flights[i];
        if (flight->state == DCP_FLIGHT_NONE) {
            continue;
        }
        if (rc == 0 && !queue->failed) {
            rc = mend(writer, flight, err);
        }
        queue->ended_count--;
        int land_rc = land(writer, flight, rc == 0 && !queue->failed);
        rc = rc != 0 ? rc : land_rc;
    }
    return rc;
}

int
dcp_write_queue_drain(struct dcp_writer *writer, struct dcp_error *err)
{
    return writer->queue.queue != NULL && !writer->queue.lost ? settle(writer, err) : 0;
}

static void
close_queue(struct dcp_writer *writer)
{
    struct dcp_write_queue *queue = &writer->queue;
    if (queue->queue != NULL && !queue->lost) {
        writer->io->queue_close(writer->io->ctx, queue->queue);
        queue->queue = NULL;
    }
}

int
dcp_write_queue_start(struct dcp_writer *writer, struct dcp_error *err)
{
    struct dcp_write_queue *queue = &writer->queue;
    const struct dcp_io *io = writer->io;
    enum dcp_queue_use use = writer->options->tuning.queue;
    if (queue->queue != NULL) {
        return 0;
    }
    if (use != DCP_QUEUE_OFF && !queue->given_up) {
        int rc = -ENOSYS;
        if (io->queue_open != NULL) {
            rc = io->queue_open(io->ctx, writer->slots_count, &queue->queue);
        }
        if (rc == 0) {
            return 0;
        }
        if (use == DCP_QUEUE_ON) {
            return dcp_error_set(err, DCP_E_UNSUPPORTED, -rc, NULL,
                                 "io_uring was asked for, but this system does not allow it (it "
                                 "wants Linux 5.11 and no sandbox against it); leave the choice to "
                                 "the engine");
        }
    }
    queue->given_up = true;
    dcp_pump_start(&writer->pump);
    return 0;
}

int
dcp_write_queue_push(struct dcp_writer *writer, const struct dcp_job *job, struct dcp_error *err)
{
    struct dcp_write_queue *queue = &writer->queue;
    const struct dcp_io *io = writer->io;
    struct dcp_write_file *file = job->file;
    DCP_ASSERT(job->slot < writer->slots_count);
    struct dcp_write_flight *flight = &queue->flights[job->slot];
    DCP_ASSERT(flight->state == DCP_FLIGHT_NONE);
    struct dcp_io_write write = {.fd = file->fd,
                                 .buf = job->data,
                                 .len = job->len_bytes,
                                 .offset = job->offset_bytes,
                                 .tag = job->slot,
                                 .io_priority = writer->options->tuning.io_priority};
    *flight = (struct dcp_write_flight){.state = DCP_FLIGHT_FLYING,
                                        .file = file,
                                        .data = job->data,
                                        .traced_ns = dcp_trace_begin(),
                                        .offset_bytes = job->offset_bytes,
                                        .len_bytes = job->len_bytes};
    file->in_flight++;
    int rc = io->queue_write(io->ctx, queue->queue, &write);
    if (rc == 0) {
        queue->flying_count++;
        writer->stats.queue_writes_count++;
        return 0;
    }
    flight->state = DCP_FLIGHT_ENDED; /* before it began */
    flight->result = rc;
    queue->ended_count++;
    return settle(writer, err);
}

int
dcp_write_queue_wait(struct dcp_writer *writer, uint32_t slot, struct dcp_error *err)
{
    struct dcp_write_queue *queue = &writer->queue;
    int rc = 0;
    while (rc == 0 && queue->flights[slot].state == DCP_FLIGHT_FLYING) {
        rc = reap(writer, err);
    }
    if (rc == 0 && queue->ended_count > 0) {
        rc = settle(writer, err);
    }
    if (rc == 0 && queue->given_up && queue->flying_count == 0) {
        close_queue(writer);
        dcp_pump_start(&writer->pump);
    }
    return rc;
}

int
dcp_write_queue_finish(struct dcp_writer *writer, bool failed, struct dcp_error *err)
{
    struct dcp_write_queue *queue = &writer->queue;
    queue->failed = queue->failed || failed;
    int rc = queue->lost ? 0 : settle(writer, err);
    if (rc != 0 && !queue->lost) {
        queue->failed = true;
        int again_rc = settle(writer, err);
        DCP_ASSERT(queue->lost || queue->flying_count + queue->ended_count == 0);
        (void)again_rc; /* the first failure is told */
    }
    for (uint32_t i = 0; queue->lost && i < writer->slots_count; i++) {
        if (queue->flights[i].state != DCP_FLIGHT_NONE) {
            (void)land(writer, &queue->flights[i], false); /* the kernel holds the file itself */
        }
    }
    close_queue(writer);
    return rc;
}

/*
 * io_memory_queue.c: writes in flight, threads and time of the file system in memory.
 *
 * A queued write takes effect when it is reaped, not before: whoever refills its buffer too early
 * writes the wrong bytes.  Which one of those in flight ends next, and whether it ends in time, is
 * drawn from the seed; what becomes of it is what pwrite says, faults included.
 */
#include "io_memory_private.h"

#include <errno.h>
#include <stdlib.h>

struct dcp_io_queue {
    unsigned depth, count;
    struct dcp_io_write writes[]; /* in flight, in no order */
};

static int
memory_queue_open(void *ctx, unsigned depth, struct dcp_io_queue **ret_queue)
{
    struct io_called call = io_begin(ctx, IO_QUEUE_OPEN, "");
    struct dcp_io_queue *queue = NULL;

    if (call.before == 0 && !call.fs->faults.no_queue) {
        queue = calloc(1, sizeof *queue + depth * sizeof queue->writes[0]);
        if (queue == NULL) {
            abort();
        }
        queue->depth = depth;
        call.fs->open_queues++;
        *ret_queue = queue;
    }
    return (int)io_end(&call, queue == NULL ? -ENOSYS : 0);
}

static int
memory_queue_write(void *ctx, struct dcp_io_queue *queue, const struct dcp_io_write *write)
{
    struct io_called call = io_begin(ctx, IO_QUEUE_WRITE, "");
    int rc = queue->count == queue->depth ? -EBUSY : 0;

    if (rc == 0 && call.before == 0) {
        queue->writes[queue->count++] = *write;
    }
    return (int)io_end(&call, rc);
}

static int
memory_queue_reap(void *ctx, struct dcp_io_queue *queue, uint64_t timeout_ns,
                  struct dcp_io_done *ret)
{
    struct io_memory_process *process = ctx;
    struct io_called call = io_begin(ctx, IO_QUEUE_REAP, "");
    struct io_memory *fs = call.fs;
    struct dcp_io_write write = {0};
    int queue_errno = fs->faults.queue_errno, rc = 0;

    /* A power cut ends what is in flight, too. */
    if (queue->count == 0 ||
        (!fs->crashed && (call.before != 0 || io_random(fs) % 100 < fs->faults.delay_percent))) {
        fs->now_ns += timeout_ns;
    } else {
        unsigned i = (unsigned)(io_random(fs) % queue->count);
        write = queue->writes[i];
        queue->writes[i] = queue->writes[--queue->count];
        call.before = 0;
        rc = 1;
    }
    rc = (int)io_end(&call, rc);
    if (rc == 1) {
        ret->tag = write.tag;
        ret->result = queue_errno != 0
                          ? -queue_errno
                          : process->io.pwrite(ctx, write.fd, write.buf, write.len, write.offset);
    }
    return rc;
}

static void
memory_queue_close(void *ctx, struct dcp_io_queue *queue)
{
    struct io_memory_process *process = ctx;

    if (queue->count != 0) {
        abort(); /* memory that is in flight is about to be freed */
    }
    process->fs->open_queues--;
    free(queue);
}

static int
memory_thread_priority(void *ctx, int nice, unsigned io_priority)
{
    struct io_called call = io_begin(ctx, IO_THREAD_PRIORITY, "");
    (void)nice;
    (void)io_priority;
    return (int)io_end(&call, 0);
}

static uint64_t
memory_now_ns(void *ctx)
{
    struct io_memory_process *process = ctx;
    uint64_t now_ns;

    pthread_mutex_lock(&process->fs->mutex);
    now_ns = process->fs->now_ns;
    pthread_mutex_unlock(&process->fs->mutex);
    return now_ns;
}

static void
memory_sleep_ns(void *ctx, uint64_t ns)
{
    struct io_memory_process *process = ctx;
    struct io_memory *fs = process->fs;

    pthread_mutex_lock(&fs->mutex);
    fs->longest_sleep_ns = ns > fs->longest_sleep_ns ? ns : fs->longest_sleep_ns;
    fs->now_ns += ns;
    if (fs->faults.oversleep_us > 0) {
        fs->now_ns += io_random(fs) % (fs->faults.oversleep_us * 1000u);
    }
    pthread_mutex_unlock(&fs->mutex);
}

uint64_t
io_memory_now_ns(const struct io_memory *fs)
{
    return fs->now_ns;
}

uint64_t
io_memory_longest_sleep_ns(const struct io_memory *fs)
{
    return fs->longest_sleep_ns;
}

unsigned
io_memory_open_queues(const struct io_memory *fs)
{
    return fs->open_queues;
}

void
io_queue_calls(struct dcp_io *io)
{
    io->queue_open = memory_queue_open;
    io->queue_write = memory_queue_write;
    io->queue_reap = memory_queue_reap;
    io->queue_close = memory_queue_close;
    io->thread_priority = memory_thread_priority;
    io->now_ns = memory_now_ns;
    io->sleep_ns = memory_sleep_ns;
}

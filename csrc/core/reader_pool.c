/*
 * reader_pool.c: the threads of a load that read ahead.
 *
 * Plain threads in pread: each read is a short piece of code that can be continued, mended or
 * abandoned where it stands, and works where io_uring is forbidden.  There are as many as there are
 * spans to read, up to DCP_READ_THREADS: one large file keeps a few large requests in flight, rows
 * of a tensor that is cut across keep eight small ones.  They sleep in the device, so they cost the
 * ranks of a full host nothing.
 *
 * Invariants: spans are taken in the order of requests; memory of a request is in use from push
 * until spans_done == spans_count, or until the pool was cleaned up; after a failure nothing more
 * is read.
 * Threads: init, push, wait and clean_up belong to one thread; the pool's own threads block all
 * signals and end in clean_up.
 */
#include "reader.h"

#include <string.h>

#include "dcp_trace.h"

/* The next span to read, if any. */
static struct dcp_read_request *
take_locked(struct dcp_read_pool *pool, uint32_t *ret_span)
{
    if (pool->queue_count == 0) {
        return NULL;
    }
    struct dcp_read_request *request = pool->queue[pool->queue_first];
    *ret_span = request->spans_taken++;
    if (request->spans_taken == request->spans_count) {
        pool->queue_first = (pool->queue_first + 1) % DCP_RING_MOST_BUFFERS;
        pool->queue_count--;
    }
    return request;
}

/* Reads one span; called with the lock, which is let go of meanwhile. */
static void
run_locked(struct dcp_reader *reader, struct dcp_read_request *request, uint32_t index)
{
    struct dcp_read_pool *pool = &reader->pool;
    struct dcp_error error;
    int code = 0;
    if (pool->code == 0) {
        const struct dcp_read_span *span = &request->spans[index];
        pthread_mutex_unlock(&pool->lock);
        dcp_error_clear(&error);
        code = dcp_read_file_span(reader, request->file, span, request->data + span->data_bytes,
                                  &error);
        pthread_mutex_lock(&pool->lock);
    }
    if (code != 0 && pool->code == 0) {
        pool->code = code;
        pool->error = error;
    }
    pool->open_spans--;
    if (++request->spans_done == request->spans_count) {
        pthread_cond_signal(&pool->done_cond);
    }
}

static void *
pool_main(void *arg)
{
    struct dcp_reader *reader = arg;
    struct dcp_read_pool *pool = &reader->pool;
    dcp_trace_thread("reading");
    pthread_mutex_lock(&pool->lock);
    while (!pool->closing) {
        uint32_t index;
        struct dcp_read_request *request = take_locked(pool, &index);
        if (request != NULL) {
            run_locked(reader, request, index);
        } else {
            pthread_cond_wait(&pool->pushed_cond, &pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void
start_threads(struct dcp_reader *reader, uint32_t wanted)
{
    struct dcp_read_pool *pool = &reader->pool;
    wanted = wanted < DCP_READ_THREADS ? wanted : DCP_READ_THREADS;
    if (pool->threads_count >= wanted) {
        return;
    }
    while (pool->threads_count < wanted &&
           dcp_engine_thread(&pool->threads[pool->threads_count], pool_main, reader) == 0) {
        pool->threads_count++;
    }
}

int
dcp_read_pool_init(struct dcp_read_pool *pool, struct dcp_error *err)
{
    memset(pool, 0, sizeof *pool);
    dcp_error_clear(&pool->error);
    if (pthread_mutex_init(&pool->lock, NULL) != 0) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "the reader's mutex could not be made");
    }
    pthread_cond_init(&pool->pushed_cond, NULL);
    pthread_cond_init(&pool->done_cond, NULL);
    pool->on = true;
    return 0;
}

void
dcp_read_pool_push(struct dcp_reader *reader, struct dcp_read_request *request, bool ahead)
{
    struct dcp_read_pool *pool = &reader->pool;
    uint32_t index;
    DCP_ASSERT(request->spans_count > 0);
    pthread_mutex_lock(&pool->lock);
    DCP_ASSERT(pool->queue_count < DCP_RING_MOST_BUFFERS);
    request->spans_taken = request->spans_done = 0;
    pool->queue[(pool->queue_first + pool->queue_count++) % DCP_RING_MOST_BUFFERS] = request;
    pool->open_spans += request->spans_count;
    uint32_t wanted = pool->open_spans;
    pthread_mutex_unlock(&pool->lock);
    if (ahead) {
        start_threads(reader, wanted);
    }
    pthread_mutex_lock(&pool->lock);
    if (ahead && pool->threads_count > 0) {
        pthread_cond_broadcast(&pool->pushed_cond);
    } else {
        struct dcp_read_request *next;
        while (request->spans_taken < request->spans_count &&
               (next = take_locked(pool, &index)) != NULL) {
            run_locked(reader, next, index);
        }
    }
    pthread_mutex_unlock(&pool->lock);
}

int
dcp_read_pool_wait(struct dcp_read_pool *pool, struct dcp_read_request *request)
{
    pthread_mutex_lock(&pool->lock);
    while (request->spans_done < request->spans_count) {
        pthread_cond_wait(&pool->done_cond, &pool->lock);
    }
    int code = pool->code;
    pthread_mutex_unlock(&pool->lock);
    return code;
}

int
dcp_read_pool_clean_up(struct dcp_read_pool *pool, struct dcp_error *err)
{
    if (!pool->on) {
        return 0;
    }
    pthread_mutex_lock(&pool->lock);
    pool->closing = true;
    pthread_cond_broadcast(&pool->pushed_cond);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->threads_count; i++) {
        pthread_join(pool->threads[i], NULL);
    }
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->pushed_cond);
    pthread_cond_destroy(&pool->done_cond);
    pool->on = false;
    int code = pool->code;
    if (code != 0 && err != NULL && err->code == 0) {
        *err = pool->error;
    }
    return code;
}

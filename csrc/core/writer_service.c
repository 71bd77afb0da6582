/*
 * writer_service.c: the life of a writer process: one request after the other, until its trainer is
 * done with it, or gone.
 *
 * The first thread reads the socket and tells progress; each write has a thread of its own, made
 * for it, because a priority once lowered cannot be raised for the next save.  Its trainer's end is
 * the end of the socket, or, where a child of the trainer still has a copy of that, another parent.
 * Then the write at hand stops at its next request, as a save that was cancelled; its files stay
 * and are nobody's: no one is left to commit them, and the next save in the directory empties them
 * with all else that was never committed (sweep.c).  A save that is to survive goes on instead
 * (writer_outlive.c), and the process ends with it.
 *
 * Threads: `lock` orders what is sent; the first thread never waits for it, so that it always sees
 * the trainer's end.  It owns all else, but `struct job` belongs to the write's thread until the
 * phase is IDLE again.
 */
#include "writer_service.h"

#include <pthread.h>
#include <string.h>

#include "dcp_limits.h"
#include "dcp_trace.h"
#include "writer_mappings.h"
#include "writer_message.h"
#include "writer_outlive.h"

/* Shown by ps and top; 15 characters at most. */
#define PROCESS_NAME "dcp_writer"

struct job {
    struct dcp_writer_request request;
    uint64_t prepare_bytes; /* 0: it is a write; else of the arena, to be mapped ahead */
    int arena_fd, dirfd;    /* -1 when closed */
    struct dcp_writer_mappings mappings;
    struct dcp_process_memory own; /* of a save that survives: without its headers */
    int code;                      /* of the write, when it has ended */
    _Atomic uint64_t progress_bytes;
    _Atomic uint32_t created_files;
    atomic_int cancel;
};

enum phase {
    IDLE = 0,
    WRITING = 1,
    ANSWERING = 2, /* the trainer may have the answer, and may ask for the next write */
};

struct service {
    struct dcp_writer_channel channel;
    int64_t parent;
    struct job job;
    pthread_t thread;
    bool joinable;    /* `thread` was made and not joined */
    uint64_t idle_ns; /* since when nothing is written */
    atomic_int phase;
    atomic_int ending; /* nobody waits for an answer any more */
    pthread_mutex_t lock;
};

static uint64_t
now_ns(void)
{
    const struct dcp_io *io = dcp_io_posix();
    return io->now_ns(io->ctx);
}

/* ---- the write's thread ---- */

static void
close_descriptor(int *fd)
{
    if (*fd >= 0) {
        dcp_descriptor_close(*fd);
        *fd = -1;
    }
}

/* The mapping keeps the memory. */
static int
map_error(struct job *job, uint64_t bytes, int rc, struct dcp_error *err)
{
    close_descriptor(&job->arena_fd);
    return rc == 0 ? 0
                   : dcp_error_set(err, DCP_E_IO, -rc, NULL,
                                   "mapping %llu bytes of the trainer's arena failed: %s",
                                   (unsigned long long)bytes, strerror(-rc));
}

static int
map_arena(struct job *job, const uint8_t **ret_memory, struct dcp_error *err)
{
    uint64_t bytes = job->request.image.bytes;
    const uint8_t *memory = NULL;
    int rc = 0;

    if (bytes != 0 && job->request.survives) {
        rc = dcp_process_map_own(&job->own, job->arena_fd, bytes);
        memory = job->own.bytes;
    } else if (bytes != 0) {
        rc = dcp_mappings_use(&job->mappings, job->arena_fd, bytes, &memory);
    }
    rc = map_error(job, bytes, rc, err);
    rc = rc != 0 ? rc : dcp_writer_check_image(&job->request, memory, err);
    *ret_memory = memory;
    return rc;
}

static int
write_image(struct job *job, const struct dcp_engine_options *options,
            struct dcp_write_stats *ret_stats, struct dcp_error *err)
{
    const struct dcp_writer_request *request = &job->request;
    const struct dcp_io *io = dcp_io_posix();
    const uint8_t *memory;
    uint8_t *headers = NULL;
    uint64_t traced = dcp_trace_begin();
    int rc = map_arena(job, &memory, err);
    dcp_trace_end(traced, "phase", "map the arena", request->image.bytes);

    if (!request->survives) {
        return rc != 0 ? rc
                       : dcp_image_write(io, job->dirfd, request->dir_path, &request->image, memory,
                                         options, ret_stats, err);
    }
    rc = rc != 0 ? rc : dcp_seal_take(&request->image, job->own.bytes, &headers, err);
    rc = rc != 0 ? rc
                 : dcp_image_write(io, job->dirfd, request->dir_path, &request->image,
                                   job->own.bytes, options, ret_stats, err);
    rc = rc != 0 ? rc : dcp_seal_put(io, job->dirfd, request, headers, err);
    dcp_free(headers);
    dcp_process_unmap(&job->own);
    return rc;
}

static void
run_request(struct job *job, struct dcp_writer_result *ret_result)
{
    struct dcp_engine_options options = job->request.options;

    if (job->prepare_bytes != 0) {
        int rc =
            dcp_mappings_prepare(&job->mappings, job->arena_fd, job->prepare_bytes, &job->cancel);
        ret_result->code = map_error(job, job->prepare_bytes, rc, &ret_result->err);
        return;
    }
    dcp_trace_switch(job->request.traced);
    dcp_trace_thread("writer process: writing");
    uint64_t traced = dcp_trace_begin();
    options.own_thread = true;
    options.cancel = &job->cancel;
    options.progress_bytes = &job->progress_bytes;
    options.created_files = &job->created_files;
    job->code = write_image(job, &options, &ret_result->stats, &ret_result->err);
    dcp_trace_end(traced, "phase", "write the image", job->request.image.total_bytes);
    dcp_trace_switch(false);
    if (!job->request.survives) {
        close_descriptor(&job->dirfd);
    }
    ret_result->code = job->code;
    ret_result->created_files = atomic_load(&job->created_files);
    ret_result->payload_bytes = atomic_load(&job->progress_bytes);
}

/* Before the answer, behind which the trainer reads no more.  The caller has the lock. */
static int
send_trace(struct service *service)
{
    struct dcp_buf message = {0};
    int rc = 0;

    while (rc == 0 && dcp_writer_put_trace(&message)) {
        rc = dcp_writer_send(&service->channel, &message, NULL, 0, UINT32_MAX, &service->ending,
                             NULL);
        message.len = 0;
    }
    dcp_buf_clean_up(&message);
    return rc;
}

static void *
write_thread(void *ctx)
{
    struct service *service = ctx;
    struct dcp_writer_result result = {0};
    struct dcp_buf answer = {0};

    run_request(&service->job, &result);
    dcp_writer_put_result(&answer, &result);
    atomic_store(&service->phase, ANSWERING);
    pthread_mutex_lock(&service->lock);
    int rc = send_trace(service);
    rc = rc != 0 ? rc
                 : dcp_writer_send(&service->channel, &answer, NULL, 0, UINT32_MAX,
                                   &service->ending, NULL);
    pthread_mutex_unlock(&service->lock);
    if (rc != 0) {
        /* A trainer that is not answered must not wait: it hears that we are gone. */
        dcp_socket_end(service->channel.socket);
    }
    dcp_buf_clean_up(&answer);
    atomic_store(&service->phase, IDLE);
    return NULL;
}

/* ---- the first thread ---- */

static void
join_write(struct service *service)
{
    if (service->joinable) {
        pthread_join(service->thread, NULL);
        service->joinable = false;
        service->idle_ns = now_ns();
    }
}

/* Nothing is left to do for the last request. */
static void
forget_request(struct service *service)
{
    join_write(service);
    close_descriptor(&service->job.dirfd);
    dcp_writer_request_clean_up(&service->job.request);
}

static enum dcp_writer_end
end_of(int code)
{
    return code == DCP_E_CORRUPT ? DCP_WRITER_END_PROTOCOL
           : code == DCP_E_IO    ? DCP_WRITER_END_OK
                                 : DCP_WRITER_END_SYSTEM;
}

static int
read_job(struct job *job, const struct dcp_writer_message *message)
{
    job->prepare_bytes = 0;
    return message->kind == DCP_WRITER_WRITE
               ? dcp_writer_get_request(message->body, &job->request, NULL)
           : dcp_writer_get_prepare(message->body, &job->prepare_bytes) ? 0
                                                                        : DCP_E_CORRUPT;
}

/* A write, or a preparation of later ones. */
static enum dcp_writer_end
start_job(struct service *service, struct dcp_writer_message *message)
{
    struct job *job = &service->job;
    uint32_t fds_count = message->kind == DCP_WRITER_WRITE ? DCP_SOCKET_MOST_FDS : 1;

    if (message->fds_count != fds_count || atomic_load(&service->phase) == WRITING) {
        return DCP_WRITER_END_PROTOCOL;
    }
    forget_request(service);
    int rc = read_job(job, message);
    if (rc != 0) {
        return end_of(rc);
    }
    job->arena_fd = message->fds[0];
    job->dirfd = fds_count == DCP_SOCKET_MOST_FDS ? message->fds[1] : -1;
    message->fds_count = 0;
    atomic_store(&job->progress_bytes, 0);
    atomic_store(&job->created_files, 0);
    atomic_store(&job->cancel, 0);
    atomic_store(&service->phase, WRITING);
    if (pthread_create(&service->thread, NULL, write_thread, service) != 0) {
        atomic_store(&service->phase, IDLE);
        return DCP_WRITER_END_SYSTEM;
    }
    service->joinable = true;
    return DCP_WRITER_END_OK;
}

static enum dcp_writer_end
take_message(struct service *service, struct dcp_writer_message *message)
{
    enum dcp_writer_end end = DCP_WRITER_END_PROTOCOL;

    if (message->kind == DCP_WRITER_WRITE || message->kind == DCP_WRITER_PREPARE) {
        end = start_job(service, message);
    } else if (message->kind == DCP_WRITER_CANCEL) {
        /* One that comes late finds nothing to stop: the next write clears it. */
        atomic_store(&service->job.cancel, 1);
        end = DCP_WRITER_END_OK;
    } else if (message->kind == DCP_WRITER_SETTLED && atomic_load(&service->phase) != WRITING) {
        forget_request(service);
        end = DCP_WRITER_END_OK;
    }
    dcp_writer_message_clean_up(message);
    return end;
}

/* A trainer that does not read misses some: they say what the next one says better. */
static void
tell_progress(struct service *service)
{
    struct dcp_writer_progress progress = {atomic_load(&service->job.progress_bytes)};
    struct dcp_buf message = {0};

    dcp_writer_put_progress(&message, &progress);
    if (pthread_mutex_trylock(&service->lock) == 0) {
        if (atomic_load(&service->phase) == WRITING) {
            (void)!dcp_writer_send(&service->channel, &message, NULL, 0, 0, NULL, NULL);
        }
        pthread_mutex_unlock(&service->lock);
    }
    dcp_buf_clean_up(&message);
}

static enum dcp_writer_end
serve(struct service *service)
{
    enum dcp_writer_end end = DCP_WRITER_END_OK;

    while (end == DCP_WRITER_END_OK && dcp_process_parent() == service->parent) {
        int phase = atomic_load(&service->phase);
        struct dcp_writer_message message;
        struct dcp_error err = {0};

        int rc = dcp_writer_receive(&service->channel,
                                    phase == IDLE ? DCP_WRITER_IDLE_SLICE_NS : DCP_WRITER_SLICE_NS,
                                    &message, &err);
        if (rc < 0) {
            return end_of(rc);
        }
        if (rc == 1) {
            end = take_message(service, &message);
            continue;
        }
        if (phase != IDLE) {
            tell_progress(service);
            continue;
        }
        join_write(service);
        if (!service->job.request.survives) {
            forget_request(service);
        }
        dcp_mappings_expire(&service->job.mappings, now_ns() - service->idle_ns);
    }
    return end;
}

/* The trainer is gone, and its save goes on. */
static void
outlive(struct service *service)
{
    const struct dcp_io *io = dcp_io_posix();
    struct job *job = &service->job;
    struct dcp_orphan orphan;

    dcp_orphan_begin(&orphan, io, job->dirfd, &job->request);
    while (dcp_orphan_stands(&orphan) && atomic_load(&service->phase) != IDLE) {
        io->sleep_ns(io->ctx, DCP_WRITER_SLICE_NS);
    }
    atomic_store(&job->cancel, 1); /* of a write that nobody wants any more */
    join_write(service);
    (void)dcp_orphan_finish(&orphan, job->code, atomic_load(&job->created_files),
                            DCP_WRITER_ORPHAN_NS);
    dcp_orphan_end(&orphan);
}

static int
say_hello(struct service *service)
{
    struct dcp_buf hello = {0};

    dcp_writer_put_hello(&hello);
    int rc =
        dcp_writer_send(&service->channel, &hello, NULL, 0, DCP_WRITER_SILENT_SLICES, NULL, NULL);
    dcp_buf_clean_up(&hello);
    return rc;
}

enum dcp_writer_end
dcp_writer_serve(void)
{
    struct service service = {
        .channel = {.socket = DCP_PROCESS_SOCKET},
        .parent = dcp_process_parent(),
        .job = {.arena_fd = -1, .dirfd = -1},
    };

    if (dcp_process_settle_in(PROCESS_NAME) != 0) {
        return DCP_WRITER_END_USAGE;
    }
    if (pthread_mutex_init(&service.lock, NULL) != 0) {
        return DCP_WRITER_END_SYSTEM;
    }
    service.idle_ns = now_ns();
    enum dcp_writer_end end = say_hello(&service) == 0 ? serve(&service) : DCP_WRITER_END_OK;
    atomic_store(&service.ending, 1);
    if (end == DCP_WRITER_END_OK && service.job.request.survives) {
        outlive(&service);
    }
    atomic_store(&service.job.cancel, 1);
    forget_request(&service);
    dcp_mappings_clean_up(&service.job.mappings);
    dcp_writer_channel_clean_up(&service.channel);
    dcp_descriptor_close(DCP_PROCESS_SOCKET);
    pthread_mutex_destroy(&service.lock);
    return end;
}

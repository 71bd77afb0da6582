/*
 * writer_process_write.c: a save, or a preparation for one, given to the writer process, and the
 * wait for its answer.
 *
 * The trainer only ever waits in slices: for progress, which also is the process's sign of life,
 * for the answer, or for the end of the socket, which the kernel tells in the moment the process
 * dies, however that came about.
 *
 * Silence is counted in slices that passed without a word and not by the clock: a trainer that was
 * stopped itself, or a machine that was, must not take it for the process's.
 *
 * Threads: as dcp_writer_process.h says; no state beside the handle.
 */
#include "writer_process.h"

#include <inttypes.h>
#include <unistd.h>

#include "dcp_limits.h"
#include "trace.h"

/* What is in flight: a write, or a preparation, which is one of nothing. */
struct write {
    struct dcp_writer_process *process;
    const struct dcp_image *image;
    const struct dcp_engine_options *options;
    const struct dcp_writer_survival *survival; /* may be NULL */
    const char *dir_path;                       /* never NULL for a write */
    uint64_t told_bytes;                        /* of progress, passed on */
    bool cancelled;                             /* and the process was told */
    uint32_t slices;                            /* without a word, or since the cancel */
};

/* It died, or is given up: nobody can tell which files it made. */
static int
fail_lost(struct write *write, const char *what, int code, struct dcp_error *err)
{
    struct dcp_writer_process *process = write->process;

    if (write->options->created_files != NULL) {
        atomic_fetch_add(write->options->created_files, write->image->files_count);
    }
    if (write->dir_path == NULL) {
        return dcp_error_set(err, code, 0, NULL,
                             "making the writer process (pid %" PRId64 ") ready failed: %s; the "
                             "next save starts a new process",
                             process->pid, what);
    }
    return dcp_error_set(err, code, 0, write->dir_path,
                         "writing into %s by the writer process (pid %" PRId64 ") failed: %s; this "
                         "save is lost, the next one starts a new process",
                         write->dir_path, process->pid, what);
}

static int
fail_dead(struct write *write, struct dcp_error *err)
{
    char end[128];

    dcp_writer_process_lose(write->process);
    (void)dcp_writer_process_wait_for_end(write->process, DCP_WRITER_END_NS);
    dcp_writer_process_describe_end(write->process, end, sizeof end);
    return fail_lost(write, end, DCP_E_IO, err);
}

static int
fail_foreign(struct write *write, struct dcp_error *err)
{
    dcp_writer_process_lose(write->process);
    return fail_lost(write, "it sent what is not of our protocol", DCP_E_IO, err);
}

static void
pass_progress(struct write *write, uint64_t payload_bytes)
{
    if (write->options->progress_bytes != NULL && payload_bytes > write->told_bytes) {
        atomic_fetch_add(write->options->progress_bytes, payload_bytes - write->told_bytes);
        write->told_bytes = payload_bytes;
    }
}

static bool
wants_cancel(const struct write *write)
{
    return write->options->cancel != NULL && atomic_load(write->options->cancel) != 0;
}

static int
tell_cancel(struct write *write)
{
    write->cancelled = true;
    write->slices = 0;
    return dcp_writer_process_tell(write->process, DCP_WRITER_CANCEL);
}

static int
conclude(struct write *write, const struct dcp_writer_result *result,
         struct dcp_write_stats *ret_stats, struct dcp_error *err)
{
    const struct dcp_engine_options *options = write->options;

    if (options->created_files != NULL) {
        atomic_fetch_add(options->created_files,
                         (uint32_t)dcp_min_u64(result->created_files, write->image->files_count));
    }
    pass_progress(write, dcp_min_u64(result->payload_bytes, write->image->payload_bytes));
    if (result->code != 0) {
        if (err != NULL && err->code == 0) {
            *err = result->err;
        }
        return result->code;
    }
    if (ret_stats != NULL) {
        *ret_stats = result->stats;
    }
    return 0;
}

/* A message of the process: 1 when it was the last. */
static int
take_message(struct write *write, const struct dcp_writer_message *message,
             struct dcp_writer_result *ret_result)
{
    struct dcp_writer_progress progress;

    if (message->kind == DCP_WRITER_PROGRESS && message->fds_count == 0 &&
        dcp_writer_get_progress(message->body, &progress)) {
        pass_progress(write, dcp_min_u64(progress.payload_bytes, write->image->payload_bytes));
        return 0;
    }
    if (message->kind == DCP_WRITER_DONE && message->fds_count == 0 &&
        dcp_writer_get_result(message->body, ret_result)) {
        return 1;
    }
    if (message->kind == DCP_WRITER_TRACE && message->fds_count == 0 &&
        dcp_trace_unpack(message->body)) {
        return 0;
    }
    return DCP_E_CORRUPT;
}

/* A slice without a word: 0, or it has been too many. */
static int
count_silence(struct write *write, struct dcp_error *err)
{
    uint32_t most = write->cancelled ? DCP_WRITER_CANCEL_SLICES : DCP_WRITER_SILENT_SLICES;

    if (++write->slices < most) {
        return 0;
    }
    dcp_writer_process_lose(write->process);
    if (write->cancelled) {
        return fail_lost(write, "the save was cancelled, and it did not stop in time",
                         DCP_E_CANCELLED, err);
    }
    return fail_lost(write, "it has not said a word for a minute; is it stopped?", DCP_E_IO, err);
}

static int
await_result(struct write *write, struct dcp_writer_result *ret_result, struct dcp_error *err)
{
    for (;;) {
        struct dcp_writer_message message;
        struct dcp_error why = {0};

        if (!write->cancelled && wants_cancel(write) && tell_cancel(write) != 0) {
            return fail_dead(write, err);
        }
        int rc = dcp_writer_receive(&write->process->channel, DCP_WRITER_SLICE_NS, &message, &why);
        if (rc == DCP_E_CORRUPT) {
            return fail_foreign(write, err);
        }
        if (rc < 0) {
            return fail_dead(write, err);
        }
        if (rc == 0 || write->cancelled) {
            int lost = count_silence(write, err);
            if (lost != 0) {
                if (rc == 1) {
                    dcp_writer_message_clean_up(&message);
                }
                return lost;
            }
        } else {
            write->slices = 0;
        }
        if (rc == 1) {
            rc = take_message(write, &message, ret_result);
            dcp_writer_message_clean_up(&message);
            if (rc != 0) {
                return rc > 0 ? 0 : fail_foreign(write, err);
            }
        }
    }
}

static int
send_message(struct write *write, const struct dcp_buf *message, const int *fds, uint32_t fds_count,
             struct dcp_error *err)
{
    struct dcp_error why = {0};
    int rc = dcp_buf_check(message, err);

    if (rc == 0 && dcp_writer_send(&write->process->channel, message, fds, fds_count,
                                   DCP_WRITER_SILENT_SLICES, NULL, &why) != 0) {
        rc = fail_dead(write, err);
    }
    return rc;
}

static int
send_request(struct write *write, int dirfd, const struct dcp_save_id *save_id,
             const struct dcp_arena *arena, struct dcp_error *err)
{
    struct dcp_writer_request request = {
        .save_id = *save_id,
        .image = *write->image,
        .options = *write->options,
        .dir_path = (char *)(uintptr_t)write->dir_path,
        .traced = dcp_trace_on(),
        .survives = write->survival != NULL,
    };
    const int fds[DCP_SOCKET_MOST_FDS] = {arena->fd, dirfd};
    struct dcp_buf message = {0};

    if (request.survives) {
        request.survival = *write->survival;
    }
    dcp_writer_put_request(&message, &request); /* borrows */
    int rc = send_message(write, &message, fds, DCP_SOCKET_MOST_FDS, err);
    dcp_buf_clean_up(&message);
    return rc;
}

static int
send_prepare(struct write *write, const struct dcp_arena *arena, struct dcp_error *err)
{
    struct dcp_buf message = {0};

    dcp_writer_put_prepare(&message, arena->touched_bytes);
    int rc = send_message(write, &message, &arena->fd, 1, err);
    dcp_buf_clean_up(&message);
    return rc;
}

static int
check_usable(const struct dcp_writer_process *process, struct dcp_error *err)
{
    if (process->owner == (int64_t)getpid() && !process->lost) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                         "the writer process (pid %" PRId64 ") is lost, or not of this process; "
                         "start another",
                         process->pid);
}

static int
check_arena(const struct dcp_arena *arena, uint64_t bytes, struct dcp_error *err)
{
    if (arena->kind == DCP_ARENA_SHARED && arena->bytes >= bytes) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                         "the image is not in an arena that a writer process can map");
}

int
dcp_writer_process_prepare(struct dcp_writer_process *process, const struct dcp_arena *arena,
                           atomic_int *cancel, struct dcp_error *err)
{
    const struct dcp_engine_options options = {.cancel = cancel};
    const struct dcp_image nothing = {0};
    struct write write = {.process = process, .image = &nothing, .options = &options};
    struct dcp_writer_result *result;

    int rc = check_usable(process, err);
    rc = rc != 0 ? rc : check_arena(arena, arena->touched_bytes, err);
    if (rc != 0 || arena->touched_bytes == 0) {
        return rc;
    }
    result = dcp_calloc(1, sizeof *result);
    if (result == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a writer process's answer");
    }
    dcp_writer_process_settled(process); /* it forgets the save before */
    rc = send_prepare(&write, arena, err);
    rc = rc != 0 ? rc : await_result(&write, result, err);
    rc = rc != 0 ? rc : conclude(&write, result, NULL, err);
    if (rc == 0 && write.cancelled) {
        rc = dcp_error_set(err, DCP_E_CANCELLED, 0, NULL,
                           "making a writer process ready was cancelled");
    }
    dcp_free(result);
    return rc;
}

int
dcp_writer_process_write(struct dcp_writer_process *process, int dirfd, const char *dir_path,
                         const struct dcp_save_id *save_id, const struct dcp_image *image,
                         const struct dcp_arena *arena, const struct dcp_engine_options *options,
                         struct dcp_write_stats *ret_stats, struct dcp_error *err)
{
    return dcp_writer_process_write_surviving(process, dirfd, dir_path, save_id, image, arena,
                                              options, NULL, ret_stats, err);
}

int
dcp_writer_process_write_surviving(struct dcp_writer_process *process, int dirfd,
                                   const char *dir_path, const struct dcp_save_id *save_id,
                                   const struct dcp_image *image, const struct dcp_arena *arena,
                                   const struct dcp_engine_options *options,
                                   const struct dcp_writer_survival *survival,
                                   struct dcp_write_stats *ret_stats, struct dcp_error *err)
{
    struct write write = {.process = process,
                          .image = image,
                          .options = options,
                          .survival = survival,
                          .dir_path = dir_path != NULL ? dir_path : ""};
    struct dcp_writer_result *result = dcp_calloc(1, sizeof *result);

    if (result == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a writer process's answer");
    }
    uint64_t traced = dcp_trace_begin();
    int rc = check_usable(process, err);
    rc = rc != 0 ? rc : check_arena(arena, image->bytes, err);
    if (rc == 0) {
        process->surviving = survival != NULL;
        rc = send_request(&write, dirfd, save_id, arena, err);
        rc = rc != 0 ? rc : await_result(&write, result, err);
        rc = rc != 0 ? rc : conclude(&write, result, ret_stats, err);
    }
    dcp_trace_end(traced, "wait", "the writer process writes", image->total_bytes);
    dcp_free(result);
    return rc;
}

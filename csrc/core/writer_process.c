/*
 * writer_process.c: a trainer's side of its writer process.
 *
 * The trainer only ever waits in slices: for progress, which also is the process's sign of life,
 * for the answer, or for the end of the socket, which the kernel tells in the moment the process
 * dies, however that came about.  A process that has failed in any way but a told one is not used
 * again; whoever holds the handle stops it and starts another.
 *
 * Silence is counted in slices that passed without a word and not by the clock: a trainer that was
 * stopped itself, or a machine that was, must not take it for the process's.
 *
 * Threads: as dcp_writer_process.h says; no state beside the handle.
 */
#include "dcp_writer_process.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "dcp_limits.h"
#include "writer_message.h"

/* Between two looks at whether a process has ended, at first and at most. */
#define FIRST_LOOK_NS 100000u
#define LAST_LOOK_NS 10000000u

struct dcp_writer_process {
    struct dcp_writer_channel channel;
    int64_t pid;
    int64_t owner;  /* the process that started it */
    bool surviving; /* it would go on with the last save without us */
    bool lost;      /* it died, or cannot be understood */
    bool reaped;
    enum dcp_process_state state; /* when reaped */
    int detail;
};

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

/* ---- the end of a process ---- */

/* True when it has ended. */
static bool
look(struct dcp_writer_process *process)
{
    if (!process->reaped) {
        process->state = dcp_process_look(process->pid, &process->detail);
        process->reaped = process->state != DCP_PROCESS_RUNS;
    }
    return process->reaped;
}

static bool
wait_for_end(struct dcp_writer_process *process, uint64_t timeout_ns)
{
    const struct dcp_io *io = dcp_io_posix();
    uint64_t start_ns = io->now_ns(io->ctx), step_ns = FIRST_LOOK_NS;

    while (!look(process)) {
        if (io->now_ns(io->ctx) - start_ns >= timeout_ns) {
            return false;
        }
        io->sleep_ns(io->ctx, step_ns);
        step_ns = dcp_min_u64(2 * step_ns, LAST_LOOK_NS);
    }
    return true;
}

/* Nothing that it may still say is of interest. */
static void
lose(struct dcp_writer_process *process)
{
    process->lost = true;
    dcp_socket_end(process->channel.socket);
}

static void
describe_end(const struct dcp_writer_process *process, char *ret_text, size_t size)
{
    if (!process->reaped) {
        snprintf(ret_text, size, "it does not answer");
    } else if (process->state == DCP_PROCESS_GONE) {
        snprintf(ret_text, size, "it ended");
    } else if (process->state == DCP_PROCESS_EXITED) {
        snprintf(ret_text, size, "it ended with status %d", process->detail);
    } else {
        snprintf(ret_text, size, "it was killed by signal %d%s", process->detail,
                 process->detail == SIGKILL
                     ? "; look for the out-of-memory killer in the kernel's log"
                     : "");
    }
}

/* CANCEL and SETTLED. */
static int
tell(struct dcp_writer_process *process, enum dcp_writer_kind kind)
{
    struct dcp_buf message = {0};

    dcp_writer_put_word(&message, kind);
    int rc =
        dcp_writer_send(&process->channel, &message, NULL, 0, DCP_WRITER_CANCEL_SLICES, NULL, NULL);
    dcp_buf_clean_up(&message);
    return rc;
}

void
dcp_writer_process_settled(struct dcp_writer_process *process)
{
    if (process->surviving && !process->lost && process->owner == (int64_t)getpid() &&
        tell(process, DCP_WRITER_SETTLED) != 0) {
        lose(process);
    }
    process->surviving = false;
}

void
dcp_writer_process_stop(struct dcp_writer_process *process)
{
    if (process == NULL) {
        return;
    }
    if (process->owner == (int64_t)getpid()) {
        dcp_writer_process_settled(process);
        dcp_socket_end(process->channel.socket);
        if (!wait_for_end(process, process->lost ? 0 : DCP_WRITER_END_NS)) {
            dcp_process_kill(process->pid);
            (void)wait_for_end(process, DCP_WRITER_END_NS);
        }
        dcp_descriptor_close(process->channel.socket);
    }
    dcp_writer_channel_clean_up(&process->channel);
    dcp_free(process);
}

/* ---- start ---- */

static int
await_hello(struct dcp_writer_process *process, const char *executable, struct dcp_error *err)
{
    struct dcp_writer_message message;
    struct dcp_error why = {0};
    char end[128];

    int rc = dcp_writer_receive(&process->channel, DCP_WRITER_START_NS, &message, &why);
    if (rc == 1) {
        bool ours = message.kind == DCP_WRITER_HELLO && dcp_writer_get_hello(message.body);
        dcp_writer_message_clean_up(&message);
        return ours ? 0
                    : dcp_error_set(err, DCP_E_UNSUPPORTED, 0, executable,
                                    "the writer process %s is of another build than this library; "
                                    "install dcp_native anew",
                                    executable);
    }
    if (rc == 0) {
        return dcp_error_set(err, DCP_E_TIMEOUT, 0, executable,
                             "the writer process %s said nothing within %d s of its start; is the "
                             "file system it lies on slow?",
                             executable, (int)(DCP_WRITER_START_NS / 1000000000u));
    }
    if (why.code == DCP_E_CORRUPT) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, executable,
                             "%s was started, but does not answer as a writer process: %s",
                             executable, why.message);
    }
    (void)wait_for_end(process, DCP_WRITER_END_NS);
    describe_end(process, end, sizeof end);
    return dcp_error_set(err, DCP_E_IO, 0, executable,
                         "the writer process %s was started and did not answer: %s", executable,
                         end);
}

int
dcp_writer_process_start(const char *executable, struct dcp_writer_process **ret_process,
                         struct dcp_error *err)
{
    struct dcp_writer_process *process = dcp_calloc(1, sizeof *process);
    if (process == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a writer process's handle");
    }
    process->owner = getpid();
    int rc = dcp_process_spawn(executable, &process->channel.socket, &process->pid);
    if (rc != 0) {
        dcp_free(process);
        return dcp_error_set(err, DCP_E_IO, -rc, executable,
                             "starting the writer process %s failed: %s; it is installed beside "
                             "the package's modules, and has to be executable there",
                             executable, strerror(-rc));
    }
    rc = await_hello(process, executable, err);
    if (rc != 0) {
        process->lost = true; /* killed, not asked */
        dcp_writer_process_stop(process);
        return rc;
    }
    *ret_process = process;
    return 0;
}

bool
dcp_writer_process_usable(struct dcp_writer_process *process)
{
    if (process->lost || process->owner != (int64_t)getpid()) {
        return false;
    }
    /* An idle process says nothing: what can be read is its end, or is not ours. */
    if (dcp_socket_wait(process->channel.socket, false, 0) != 0) {
        lose(process);
        (void)look(process);
        return false;
    }
    return true;
}

int64_t
dcp_writer_process_pid(const struct dcp_writer_process *process)
{
    return process->pid;
}

/* ---- a write or a preparation ---- */

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

    lose(write->process);
    (void)wait_for_end(write->process, DCP_WRITER_END_NS);
    describe_end(write->process, end, sizeof end);
    return fail_lost(write, end, DCP_E_IO, err);
}

static int
fail_foreign(struct write *write, struct dcp_error *err)
{
    lose(write->process);
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
    return tell(write->process, DCP_WRITER_CANCEL);
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
    lose(write->process);
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
send_request(struct write *write, int dirfd, const struct dcp_save_id *save_id,
             const struct dcp_arena *arena, struct dcp_error *err)
{
    struct dcp_writer_request request = {
        .save_id = *save_id,
        .image = *write->image,
        .options = *write->options,
        .dir_path = (char *)(uintptr_t)write->dir_path,
        .survives = write->survival != NULL,
    };
    const int fds[DCP_SOCKET_MOST_FDS] = {arena->fd, dirfd};
    struct dcp_buf message = {0};
    struct dcp_error why = {0};

    if (request.survives) {
        request.survival = *write->survival;
    }
    dcp_writer_put_request(&message, &request); /* borrows */
    int rc = dcp_buf_check(&message, err);
    if (rc == 0) {
        rc = dcp_writer_send(&write->process->channel, &message, fds, DCP_SOCKET_MOST_FDS,
                             DCP_WRITER_SILENT_SLICES, NULL, &why);
        rc = rc == 0 ? 0 : fail_dead(write, err);
    }
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

static int
send_prepare(struct write *write, const struct dcp_arena *arena, struct dcp_error *err)
{
    struct dcp_buf message = {0};
    struct dcp_error why = {0};

    dcp_writer_put_prepare(&message, arena->touched_bytes);
    int rc = dcp_buf_check(&message, err);
    if (rc == 0) {
        rc = dcp_writer_send(&write->process->channel, &message, &arena->fd, 1,
                             DCP_WRITER_SILENT_SLICES, NULL, &why);
        rc = rc == 0 ? 0 : fail_dead(write, err);
    }
    dcp_buf_clean_up(&message);
    return rc;
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
    int rc = check_usable(process, err);
    rc = rc != 0 ? rc : check_arena(arena, image->bytes, err);
    if (rc == 0) {
        process->surviving = survival != NULL;
        rc = send_request(&write, dirfd, save_id, arena, err);
        rc = rc != 0 ? rc : await_result(&write, result, err);
        rc = rc != 0 ? rc : conclude(&write, result, ret_stats, err);
    }
    dcp_free(result);
    return rc;
}

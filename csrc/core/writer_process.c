/*
 * writer_process.c: a trainer's handle of its writer process: started, looked at, ended.
 *
 * What the process is told to do is in writer_process_write.c.
 *
 * A process that has failed in any way but a told one is not used again; whoever holds the handle
 * stops it and starts another.
 *
 * Threads: as dcp_writer_process.h says; no state beside the handle.
 */
#include "writer_process.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "dcp_limits.h"

/* Between two looks at whether a process has ended, at first and at most. */
#define FIRST_LOOK_NS 100000u
#define LAST_LOOK_NS 10000000u

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

bool
dcp_writer_process_wait_for_end(struct dcp_writer_process *process, uint64_t timeout_ns)
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

void
dcp_writer_process_lose(struct dcp_writer_process *process)
{
    process->lost = true;
    dcp_socket_end(process->channel.socket);
}

void
dcp_writer_process_describe_end(const struct dcp_writer_process *process, char *ret_text,
                                size_t size)
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

int
dcp_writer_process_tell(struct dcp_writer_process *process, enum dcp_writer_kind kind)
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
        dcp_writer_process_tell(process, DCP_WRITER_SETTLED) != 0) {
        dcp_writer_process_lose(process);
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
        if (!dcp_writer_process_wait_for_end(process, process->lost ? 0 : DCP_WRITER_END_NS)) {
            dcp_process_kill(process->pid);
            (void)dcp_writer_process_wait_for_end(process, DCP_WRITER_END_NS);
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
    (void)dcp_writer_process_wait_for_end(process, DCP_WRITER_END_NS);
    dcp_writer_process_describe_end(process, end, sizeof end);
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
        dcp_writer_process_lose(process);
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

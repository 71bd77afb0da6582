/*
 * writer_file.c: data files of a save: opened once, written in requests, synced once, closed with a
 * check.
 *
 * Whether a file is written with O_DIRECT is decided when it is opened, by what the file system
 * says; one that says yes and then refuses a write (EINVAL) goes on through the page cache.  A
 * failed fsync is final: the kernel drops the pages it could not write, so a retry would lie.
 *
 * Threads: dcp_write_file_open on the calling thread, dcp_write_file_job on the writing thread,
 * dcp_write_close_job on the closing one.  Where a pump has no thread, its jobs run on the one that
 * pushes them.
 */
#include "writer.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "dcp_trace.h"
#include "io_explain.h"

/* "<directory>/<name>" for messages; cut when longer than an error record holds. */
static void
file_path(const struct dcp_writer *writer, const char *name, char path[DCP_ERROR_PATH_BYTES])
{
    snprintf(path, DCP_ERROR_PATH_BYTES, "%s/%s", writer->dir_path != NULL ? writer->dir_path : "",
             name);
}

static int
tell(const struct dcp_writer *writer, const char *name, int sys_errno, bool syncing,
     const char *what, uint64_t offset_bytes, struct dcp_error *err)
{
    char path[DCP_ERROR_PATH_BYTES], why[DCP_IO_EXPLAIN_BYTES];
    const struct dcp_io_trouble trouble = {.io = writer->io,
                                           .fd = writer->dirfd,
                                           .sys_errno = sys_errno,
                                           .syncing = syncing,
                                           .need_bytes = writer->total_bytes};
    file_path(writer, name, path);
    bool first = err != NULL && err->code == 0;
    int code = dcp_error_set(err, DCP_E_IO, sys_errno, path, "%s %s failed: %s", what, path,
                             dcp_io_explain(&trouble, why));
    if (first) {
        err->offset_bytes = offset_bytes;
    }
    return code;
}

static int
fail(const struct dcp_writer *writer, const char *name, int sys_errno, const char *what,
     uint64_t offset_bytes, struct dcp_error *err)
{
    return tell(writer, name, sys_errno, false, what, offset_bytes, err);
}

static int
open_new(struct dcp_writer *writer, const char *name, int *ret_fd, struct dcp_error *err)
{
    const struct dcp_io *io = writer->io;
    bool waited = false;
    int fd;
    for (;;) {
        /* A save that was given up makes no more names. */
        int stop = dcp_write_check_cancel(writer, err);
        if (stop != 0) {
            return stop;
        }
        fd = io->open_at(io->ctx, writer->dirfd, name, O_WRONLY | O_CREAT | O_EXCL, 0666);
        if ((fd == -EMFILE || fd == -ENFILE) && !waited) {
            /* Files that wait for their sync hold descriptors. */
            int rc = dcp_pump_drain(&writer->pump);
            rc = rc == 0 ? dcp_write_queue_drain(writer, err) : rc;
            rc = rc == 0 ? dcp_pump_drain(&writer->closer) : rc;
            if (rc != 0) {
                return rc; /* the pump keeps the error */
            }
            waited = true;
        } else if (fd != -EINTR) {
            break;
        }
    }
    if (fd >= 0) {
        if (writer->options->created_files != NULL) {
            atomic_fetch_add(writer->options->created_files, 1);
        }
        *ret_fd = fd;
        return 0;
    }
    char path[DCP_ERROR_PATH_BYTES];
    file_path(writer, name, path);
    if (fd == -EEXIST) {
        return dcp_error_set(err, DCP_E_EXISTS, EEXIST, path,
                             "creating %s failed: it exists already; another writer uses this "
                             "directory, and the next save will take higher numbers",
                             path);
    }
    if (fd == -ENOENT || fd == -ESTALE || fd == -ENOTDIR) {
        return dcp_error_set(err, DCP_E_REMOVED, -fd, path,
                             "creating %s failed: the directory was removed during the save", path);
    }
    return fail(writer, name, -fd, "creating", UINT64_MAX, err);
}

/* Sets file->direct where the options and the file system allow it. */
static int
choose_direct(const struct dcp_writer *writer, struct dcp_write_file *file, struct dcp_error *err)
{
    enum dcp_direct wish = writer->options->direct;
    const struct dcp_io *io = writer->io;
    struct dcp_dio_align align = {0};
    if (io->dio_align(io->ctx, file->fd, &align) == 0) {
        file->in_memory = align.in_memory;
    } else {
        align.mem_bytes = 0;
    }
    if (wish == DCP_DIRECT_OFF ||
        (wish == DCP_DIRECT_AUTO &&
         (align.in_memory || file->length_bytes < DCP_WRITE_DIRECT_LEAST_BYTES))) {
        return 0;
    }
    uint64_t step = align.offset_bytes;
    if (align.mem_bytes != 0 && align.mem_bytes <= DCP_DIRECT_ALIGN_BYTES && step != 0 &&
        (step & (step - 1)) == 0 && writer->padded_bytes % step == 0 &&
        io->set_direct(io->ctx, file->fd, true) == 0) {
        file->direct = true;
        file->align_bytes = step;
        return 0;
    }
    if (wish == DCP_DIRECT_ON) {
        char path[DCP_ERROR_PATH_BYTES];
        file_path(writer, file->name, path);
        return dcp_error_set(err, DCP_E_UNSUPPORTED, EINVAL, path,
                             "direct I/O was asked for, but the file system of %s does not do it; "
                             "leave the choice to the engine",
                             path);
    }
    return 0;
}

/* 0 where the file system can't reserve. */
static int
reserve(const struct dcp_writer *writer, const struct dcp_write_file *file, uint64_t len,
        struct dcp_error *err)
{
    const struct dcp_io *io = writer->io;
    int rc;
    do {
        rc = io->fallocate(io->ctx, file->fd, 0, len);
    } while (rc == -EINTR);
    if (rc == -ENOSPC || rc == -EDQUOT || rc == -EFBIG || rc == -EIO) {
        char what[96];
        snprintf(what, sizeof what, "reserving %" PRIu64 " bytes for", len);
        return fail(writer, file->name, -rc, what, UINT64_MAX, err);
    }
    return 0;
}

static int
set_size(const struct dcp_writer *writer, const struct dcp_write_file *file, uint64_t len,
         const char *what, struct dcp_error *err)
{
    const struct dcp_io *io = writer->io;
    int rc;
    do {
        rc = io->truncate(io->ctx, file->fd, len);
    } while (rc == -EINTR);
    return rc < 0 ? fail(writer, file->name, -rc, what, len, err) : 0;
}

/* Meets a full disk, or a quota, before the data does. */
static int
preallocate(const struct dcp_writer *writer, const struct dcp_write_file *file,
            struct dcp_error *err)
{
    if (file->in_memory || file->length_bytes < DCP_PREALLOCATE_BYTES) {
        return 0;
    }
    int rc = reserve(writer, file, file->length_bytes, err);
    if (rc == 0 && file->direct) {
        rc = set_size(writer, file, dcp_align_up(file->length_bytes, file->align_bytes), "sizing",
                      err);
    }
    return rc;
}

int
dcp_write_file_open(struct dcp_writer *writer, uint64_t n, uint64_t length_bytes,
                    struct dcp_write_file **ret_file, struct dcp_error *err)
{
    struct dcp_write_file *file = dcp_calloc(1, sizeof *file);
    if (file == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a file to write");
    }
    if (writer->file_name != NULL) {
        snprintf(file->name, sizeof file->name, "%s", writer->file_name);
    } else {
        snprintf(file->name, sizeof file->name, "__%" PRIu32 "_%" PRIu64 ".distcp", writer->rank,
                 n);
    }
    file->length_bytes = length_bytes;
    file->align_bytes = 1;
    int rc = open_new(writer, file->name, &file->fd, err);
    if (rc != 0) {
        dcp_free(file);
        return rc;
    }
    rc = choose_direct(writer, file, err);
    if (rc == 0) {
        rc = preallocate(writer, file, err);
    }
    if (rc != 0) {
        writer->io->close(writer->io->ctx, file->fd);
        dcp_free(file);
        return rc;
    }
    *ret_file = file;
    return 0;
}

int
dcp_write_check_cancel(const struct dcp_writer *writer, struct dcp_error *err)
{
    atomic_int *cancel = writer->options->cancel;
    if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the save was cancelled");
    }
    return 0;
}

/* Goes on through the page cache.  False when that is not wanted. */
static bool
leave_direct(const struct dcp_writer *writer, struct dcp_write_file *file)
{
    if (writer->options->direct == DCP_DIRECT_ON ||
        writer->io->set_direct(writer->io->ctx, file->fd, false) != 0) {
        return false;
    }
    file->direct = false;
    return true;
}

int
dcp_write_failed(const struct dcp_writer *writer, const struct dcp_write_file *file, int sys_errno,
                 uint64_t offset_bytes, struct dcp_error *err)
{
    return fail(writer, file->name, sys_errno, "writing", offset_bytes, err);
}

int
dcp_write_range(const struct dcp_writer *writer, struct dcp_write_file *file, const uint8_t *data,
                uint64_t offset, uint64_t len, struct dcp_error *err)
{
    const struct dcp_io *io = writer->io;
    uint64_t done = 0;
    while (done < len) {
        size_t want = (size_t)dcp_min_u64(len - done, DCP_MAX_REQUEST_BYTES);
        ssize_t n = io->pwrite(io->ctx, file->fd, data + done, want, offset + done);
        if (n == -EINTR) {
            continue;
        }
        if (n == -EINVAL && file->direct && leave_direct(writer, file)) {
            continue;
        }
        if (n <= 0) {
            return dcp_write_failed(writer, file, n == 0 ? EIO : (int)-n, offset + done, err);
        }
        uint64_t step = (uint64_t)n;
        if (file->direct && step < want) {
            step -= step % file->align_bytes;
            if (step == 0 && !leave_direct(writer, file)) {
                return dcp_write_failed(writer, file, EIO, offset + done, err);
            }
        }
        done += step;
    }
    file->end_bytes = dcp_max_u64(file->end_bytes, offset + len);
    return 0;
}

/* What a flush says when bytes will not reach the device; that it can't flush ahead is no harm. */
static bool
is_lost(int rc)
{
    return rc == -EIO || rc == -ENOSPC || rc == -EDQUOT;
}

/* Page cache on a disk: half of the dirty budget is being written while the other half fills. */
static int
limit_dirty(const struct dcp_writer *writer, struct dcp_write_file *file, struct dcp_error *err)
{
    const struct dcp_io *io = writer->io;
    if (file->direct || file->in_memory ||
        file->end_bytes - file->pushed_bytes < DCP_MAX_DIRTY_BYTES / 2) {
        return 0;
    }
    int rc = io->flush_range(io->ctx, file->fd, file->pushed_bytes,
                             file->end_bytes - file->pushed_bytes, false);
    bool lost = is_lost(rc);
    if (file->pushed_bytes > file->flushing_bytes && rc == 0) {
        rc = io->flush_range(io->ctx, file->fd, file->flushing_bytes,
                             file->pushed_bytes - file->flushing_bytes, true);
        /* What the wait tells, fdatasync will not tell again. */
        lost = rc != 0 && rc != -EINTR;
    }
    if (lost) {
        return tell(writer, file->name, -rc, true, "flushing", file->flushing_bytes, err);
    }
    file->flushing_bytes = file->pushed_bytes;
    file->pushed_bytes = file->end_bytes;
    return 0;
}

/* Exact length, on the device, then closed: 0 means that all of it happened. */
static int
finish(struct dcp_writer *writer, struct dcp_write_file *file, struct dcp_error *err)
{
    const struct dcp_io *io = writer->io;
    int rc = 0;
    if (file->flush_errno != 0) {
        return tell(writer, file->name, file->flush_errno, true, "flushing", UINT64_MAX, err);
    }
    if (file->end_bytes > file->length_bytes) {
        rc = set_size(writer, file, file->length_bytes, "truncating", err);
        if (rc != 0) {
            return rc;
        }
    }
    if (writer->options->sync) {
        uint64_t start_ns = dcp_engine_now_ns();
        do {
            rc = io->fdatasync(io->ctx, file->fd);
        } while (rc == -EINTR);
        writer->stats.sync_ns += dcp_engine_now_ns() - start_ns;
        dcp_trace_end_io(dcp_trace_from(start_ns), "sync", file->name, 0, 0);
        if (rc < 0) {
            return tell(writer, file->name, -rc, true, "syncing", UINT64_MAX, err);
        }
    }
    int fd = file->fd;
    file->fd = -1;
    rc = io->close(io->ctx, fd);
    /* Linux closes the descriptor even when a signal interrupts the call. */
    if (rc < 0 && rc != -EINTR) {
        return fail(writer, file->name, -rc, "closing", UINT64_MAX, err);
    }
    writer->stats.direct_files_count += file->direct ? 1 : 0;
    writer->stats.direct_files_mask |= file->direct && file->index < 64 ? 1ull << file->index : 0;
    return 0;
}

int
dcp_write_close_job(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err)
{
    struct dcp_writer *writer = ctx;
    struct dcp_write_file *file = job->file;
    int rc = failed || file->given_up ? 0 : finish(writer, file, err);
    if (file->fd >= 0) {
        writer->io->close(writer->io->ctx, file->fd);
    }
    dcp_free(file);
    return rc;
}

int
dcp_write_file_end(struct dcp_writer *writer, struct dcp_write_file *file)
{
    const struct dcp_io *io = writer->io;
    DCP_ASSERT(file->closing && file->in_flight == 0);
    if (writer->closer.threaded && !file->given_up && !file->direct && !file->in_memory) {
        /* On their way out before their turn comes: the first sync commits for many. */
        int rc = io->flush_range(io->ctx, file->fd, file->pushed_bytes,
                                 file->end_bytes - file->pushed_bytes, false);
        file->flush_errno = is_lost(rc) ? -rc : 0;
        writer->unsynced_bytes += file->end_bytes - file->flushing_bytes;
    }
    struct dcp_job job = {.file = file};
    uint64_t number = dcp_pump_push(&writer->closer, &job);
    if (writer->unsynced_bytes > DCP_MAX_DIRTY_BYTES) {
        writer->unsynced_bytes = 0;
        return dcp_pump_wait(&writer->closer, number);
    }
    return dcp_pump_code(&writer->closer);
}

/* Of an image's payload, what `written_bytes` of its files stand for. */
static uint64_t
payload_share(const struct dcp_image *image, uint64_t written_bytes)
{
    __extension__ typedef unsigned __int128 wide;
    return (uint64_t)((wide)image->payload_bytes * written_bytes / image->total_bytes);
}

void
dcp_write_count(struct dcp_writer *writer, const struct dcp_write_file *file, uint64_t offset,
                uint64_t len)
{
    if (writer->image == NULL || writer->options->progress_bytes == NULL) {
        return;
    }
    uint64_t before = payload_share(writer->image, writer->image_written_bytes);
    writer->image_written_bytes += dcp_min_u64(len, file->length_bytes - offset);
    atomic_fetch_add_explicit(writer->options->progress_bytes,
                              payload_share(writer->image, writer->image_written_bytes) - before,
                              memory_order_relaxed);
}

static int
write_job(struct dcp_writer *writer, const struct dcp_job *job, struct dcp_error *err)
{
    struct dcp_write_file *file = job->file;
    int rc = dcp_write_check_cancel(writer, err);
    uint64_t waiting = writer->options->tuning.limit_bytes_s > 0 ? dcp_trace_begin() : 0;
    if (rc == 0 && !dcp_rate_wait(&writer->rate, job->len_bytes, writer->options->cancel)) {
        rc = dcp_write_check_cancel(writer, err);
    }
    dcp_trace_end(waiting, "wait", "held to write_limit_bytes_s", 0);
    uint64_t start_ns = dcp_engine_now_ns();
    if (rc == 0 && file->direct && writer->queue.queue != NULL) {
        rc = dcp_write_queue_push(writer, job, err);
    } else if (rc == 0) {
        rc = dcp_write_range(writer, file, job->data, job->offset_bytes, job->len_bytes, err);
        if (rc == 0) {
            dcp_trace_end_io(dcp_trace_from(start_ns), "write", file->name, job->offset_bytes,
                             job->len_bytes);
            dcp_write_count(writer, file, job->offset_bytes, job->len_bytes);
            rc = limit_dirty(writer, file, err);
        }
    }
    writer->stats.write_ns += dcp_engine_now_ns() - start_ns;
    return rc;
}

int
dcp_write_file_job(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err)
{
    struct dcp_writer *writer = ctx;
    struct dcp_write_file *file = job->file;
    if (job->kind == DCP_WRITE_JOB_WRITE) {
        return failed ? 0 : write_job(writer, job, err);
    }
    DCP_ASSERT(job->kind == DCP_WRITE_JOB_CLOSE);
    file->closing = true;
    file->given_up = file->given_up || failed || job->flags != 0;
    return file->in_flight > 0 ? 0 : dcp_write_file_end(writer, file);
}

void
dcp_write_thread_priority(void *ctx)
{
    struct dcp_writer *writer = ctx;
    const struct dcp_write_tuning *tuning = &writer->options->tuning;
    const struct dcp_io *io = writer->io;
    if ((tuning->nice != 0 || tuning->io_priority != 0) &&
        io->thread_priority(io->ctx, tuning->nice, tuning->io_priority) != 0) {
        atomic_fetch_add_explicit(&writer->priority_failures, 1, memory_order_relaxed);
    }
}

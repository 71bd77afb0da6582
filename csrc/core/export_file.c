/*
 * export_file.c: bytes into files that other processes write to at the same time.
 *
 * Formats without gaps put the border between two ranks' bytes anywhere in a page.  A direct write
 * covers whole pages, so it may only touch pages that are this rank's alone; the two at the ends of
 * a range go through the page cache, which merges what several ranks put into one page.  A page is
 * written in one of the two ways by all ranks: whole pages of somebody's range have no other owner.
 *
 * What goes through the page cache is pushed out early, behind the rank: neighbours write to the
 * same pages at about the same time, and a page that is flushed between them is written twice.
 *
 * Threads: a struct dcp_export_out is used by one thread at a time.
 */
#include "export.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "io_explain.h"

static const uint64_t PAGE_BYTES = DCP_DIRECT_ALIGN_BYTES;

int
dcp_export_dir_open(struct dcp_export_dir *dir, const struct dcp_io *io, const char *path,
                    struct dcp_error *err)
{
    dir->io = io;
    dir->path = path;
    do {
        dir->fd = io->open_dir(io->ctx, path);
    } while (dir->fd == -EINTR);
    if (dir->fd < 0) {
        int sys_errno = -dir->fd;
        dir->fd = -1;
        return dcp_error_set(err, DCP_E_IO, sys_errno, path, "opening the directory %s failed: %s",
                             path, strerror(sys_errno));
    }
    return 0;
}

void
dcp_export_dir_close(struct dcp_export_dir *dir)
{
    if (dir->fd >= 0) {
        dir->io->close(dir->io->ctx, dir->fd);
    }
    dir->fd = -1;
}

static int
fail_as(const struct dcp_export_dir *dir, const char *name, int sys_errno, bool syncing,
        const char *what, struct dcp_error *err)
{
    char path[DCP_ERROR_PATH_BYTES], why[DCP_IO_EXPLAIN_BYTES];
    const struct dcp_io_trouble trouble = {
        .io = dir->io,
        .fd = dir->fd,
        .sys_errno = sys_errno,
        .syncing = syncing,
    };
    snprintf(path, sizeof path, "%s/%s", dir->path, name);
    return dcp_error_set(err, DCP_E_IO, sys_errno, path, "%s %s failed: %s", what, path,
                         dcp_io_explain(&trouble, why));
}

int
dcp_export_fail(const struct dcp_export_dir *dir, const char *name, int sys_errno, const char *what,
                struct dcp_error *err)
{
    return fail_as(dir, name, sys_errno, false, what, err);
}

int
dcp_export_fail_sync(const struct dcp_export_dir *dir, const char *name, int sys_errno,
                     const char *what, struct dcp_error *err)
{
    return fail_as(dir, name, sys_errno, true, what, err);
}

int
dcp_export_fstat(const struct dcp_export_dir *dir, int fd, const char *name, struct dcp_stat *ret,
                 struct dcp_error *err)
{
    int rc;
    do {
        rc = dir->io->fstat(dir->io->ctx, fd, ret);
    } while (rc == -EINTR);
    return rc == 0 ? 0 : dcp_export_fail(dir, name, -rc, "looking at", err);
}

int
dcp_export_check_cancel(atomic_int *cancel, struct dcp_error *err)
{
    if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the export was cancelled");
    }
    return 0;
}

static int
open_existing(const struct dcp_export_dir *dir, const char *name, struct dcp_error *err)
{
    int fd;
    do {
        fd = dir->io->open_at(dir->io->ctx, dir->fd, name, O_WRONLY, 0);
    } while (fd == -EINTR);
    if (fd == -ENOENT || fd == -ESTALE) {
        char path[DCP_ERROR_PATH_BYTES];
        snprintf(path, sizeof path, "%s/%s", dir->path, name);
        return dcp_error_set(err, DCP_E_SUPERSEDED, -fd, path,
                             "writing %s failed: it is gone; another rank failed, which its own "
                             "error tells, or another export into the directory took over",
                             path);
    }
    return fd < 0 ? dcp_export_fail(dir, name, -fd, "opening", err) : fd;
}

/* A second descriptor, for direct I/O; -1 where that is not to be had. */
static int
open_direct(const struct dcp_export_dir *dir, struct dcp_export_out *out, enum dcp_direct wish)
{
    const struct dcp_io *io = dir->io;
    struct dcp_dio_align align = {0};
    if (io->dio_align(io->ctx, out->fd, &align) != 0) {
        return -1;
    }
    out->in_memory = align.in_memory;
    uint64_t step = align.offset_bytes;
    if (wish == DCP_DIRECT_OFF || (wish == DCP_DIRECT_AUTO && align.in_memory) ||
        align.mem_bytes == 0 || align.mem_bytes > PAGE_BYTES || step == 0 ||
        PAGE_BYTES % step != 0) {
        return -1;
    }
    int fd = io->open_at(io->ctx, dir->fd, out->what->name, O_WRONLY, 0);
    if (fd >= 0 && io->set_direct(io->ctx, fd, true) != 0) {
        io->close(io->ctx, fd);
        fd = -1;
    }
    return fd < 0 ? -1 : fd;
}

int
dcp_export_out_open(const struct dcp_export_dir *dir, const struct dcp_export_file *what,
                    enum dcp_direct direct, struct dcp_export_out **ret_out, struct dcp_error *err)
{
    const struct dcp_io *io = dir->io;
    struct dcp_export_out *out = dcp_calloc(1, sizeof *out);
    if (out == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a file to write");
    }
    out->what = what;
    out->direct_fd = -1;
    out->fd = open_existing(dir, what->name, err);
    int rc = out->fd < 0 ? out->fd : 0;
    struct dcp_stat stat = {0};
    if (rc == 0) {
        rc = dcp_export_fstat(dir, out->fd, what->name, &stat, err);
    }
    if (rc == 0 && stat.size_bytes != what->length_bytes) {
        rc = dcp_error_set(err, DCP_E_STALE, 0, what->name,
                           "%s/%s has %" PRIu64 " bytes where the export's plan has %" PRIu64
                           ": it is not the file that the coordinator made",
                           dir->path, what->name, stat.size_bytes, what->length_bytes);
    }
    if (rc == 0) {
        out->direct_fd = open_direct(dir, out, direct);
    }
    if (rc == 0 && out->direct_fd < 0 && direct == DCP_DIRECT_ON) {
        rc = dcp_error_set(err, DCP_E_UNSUPPORTED, EINVAL, what->name,
                           "direct I/O was asked for, but the file system of %s does not do it; "
                           "leave the choice to the engine",
                           dir->path);
    }
    if (rc != 0) {
        if (out->fd >= 0) {
            io->close(io->ctx, out->fd);
        }
        dcp_free(out);
        return rc;
    }
    *ret_out = out;
    return 0;
}

/* Whole pages, by direct I/O as long as the kernel takes it.  *ret_done: how far it came. */
static int
write_pages(const struct dcp_export_dir *dir, struct dcp_export_out *out, const uint8_t *data,
            uint64_t offset, uint64_t len, uint64_t *ret_done, struct dcp_error *err)
{
    const struct dcp_io *io = dir->io;
    uint64_t done = 0;
    while (done < len && out->direct_fd >= 0) {
        size_t want = (size_t)dcp_min_u64(len - done, DCP_MAX_REQUEST_BYTES);
        ssize_t n = io->pwrite(io->ctx, out->direct_fd, data + done, want, offset + done);
        if (n == -EINTR) {
            continue;
        }
        if (n < 0 && n != -EINVAL) {
            return dcp_export_fail(dir, out->what->name, (int)-n, "writing", err);
        }
        uint64_t whole = n < 0 ? 0 : (uint64_t)n / PAGE_BYTES * PAGE_BYTES;
        if (whole == 0) { /* the rest goes through the page cache */
            io->close(io->ctx, out->direct_fd);
            out->direct_fd = -1;
        }
        done += whole;
    }
    *ret_done = done;
    return 0;
}

/* Bytes that would be lost in the page cache are the export's failure; that they can't be pushed
 * out early is none. */
static int
push_out(const struct dcp_export_dir *dir, struct dcp_export_out *out, uint64_t end_bytes,
         struct dcp_error *err)
{
    if (out->in_memory || out->unflushed_bytes < DCP_MAX_DIRTY_BYTES / 2) {
        return 0;
    }
    uint64_t until = end_bytes - dcp_min_u64(end_bytes, DCP_MAX_DIRTY_BYTES / 4);
    int rc = 0;
    if (until > out->flushed_bytes) {
        rc = dir->io->flush_range(dir->io->ctx, out->fd, out->flushed_bytes,
                                  until - out->flushed_bytes, false);
        out->flushed_bytes = until;
    }
    out->unflushed_bytes = 0;
    return rc == -EIO || rc == -ENOSPC || rc == -EDQUOT
               ? dcp_export_fail_sync(dir, out->what->name, -rc, "flushing", err)
               : 0;
}

static int
write_cached(const struct dcp_export_dir *dir, struct dcp_export_out *out, const uint8_t *data,
             uint64_t offset, uint64_t len, struct dcp_error *err)
{
    const struct dcp_io *io = dir->io;
    uint64_t done = 0;
    while (done < len) {
        size_t want = (size_t)dcp_min_u64(len - done, DCP_MAX_REQUEST_BYTES);
        ssize_t n = io->pwrite(io->ctx, out->fd, data + done, want, offset + done);
        if (n <= 0 && n != -EINTR) {
            return dcp_export_fail(dir, out->what->name, n == 0 ? EIO : (int)-n, "writing", err);
        }
        done += n < 0 ? 0 : (uint64_t)n;
    }
    out->unflushed_bytes += len;
    return 0;
}

int
dcp_export_out_range(const struct dcp_export_dir *dir, struct dcp_export_out *out,
                     const uint8_t *page, uint64_t offset, uint64_t len,
                     struct dcp_export_stats *stats, struct dcp_error *err)
{
    uint64_t base = offset / PAGE_BYTES * PAGE_BYTES; /* the file's byte that page[0] is */
    uint64_t end = offset + len;
    uint64_t first = dcp_min_u64(dcp_align_up(offset, PAGE_BYTES), end);
    uint64_t last = end / PAGE_BYTES * PAGE_BYTES;
    int rc = 0;
    stats->requests_count++;
    if (out->direct_fd >= 0 && last > first && last - first >= DCP_EXPORT_DIRECT_LEAST_BYTES) {
        uint64_t done = 0;
        rc = write_pages(dir, out, page + (first - base), first, last - first, &done, err);
        stats->direct_bytes += done;
        last = first + done;
    } else {
        first = last = end;
    }
    if (rc == 0 && first > offset) {
        rc = write_cached(dir, out, page + (offset - base), offset, first - offset, err);
    }
    if (rc == 0 && end > last) {
        rc = write_cached(dir, out, page + (last - base), last, end - last, err);
    }
    return rc == 0 ? push_out(dir, out, end, err) : rc;
}

int
dcp_export_out_rows(const struct dcp_export_dir *dir, struct dcp_export_out *out,
                    const uint8_t *data, uint64_t offset, uint64_t len,
                    const struct dcp_export_rows *rows, struct dcp_export_stats *stats,
                    struct dcp_error *err)
{
    DCP_ASSERT(len % rows->row_bytes == 0);
    uint64_t at = offset;
    int rc = 0;
    for (uint64_t done = 0; rc == 0 && done < len; done += rows->row_bytes) {
        rc = write_cached(dir, out, data + done, at, rows->row_bytes, err);
        at += rows->stride_bytes;
        stats->requests_count++;
    }
    return rc == 0 ? push_out(dir, out, at, err) : rc;
}

int
dcp_export_out_close(const struct dcp_export_dir *dir, struct dcp_export_out *out, bool sync,
                     struct dcp_export_stats *stats, struct dcp_error *err)
{
    const struct dcp_io *io = dir->io;
    int rc = 0, closed;
    if (sync) {
        uint64_t start_ns = dcp_engine_now_ns();
        do {
            rc = io->fdatasync(io->ctx, out->fd);
        } while (rc == -EINTR);
        stats->sync_ns += dcp_engine_now_ns() - start_ns;
        rc = rc < 0 ? dcp_export_fail_sync(dir, out->what->name, -rc, "syncing", err) : 0;
    }
    if (out->direct_fd >= 0) {
        io->close(io->ctx, out->direct_fd);
    }
    closed = io->close(io->ctx, out->fd);
    /* Linux closes the descriptor even when a signal interrupts the call. */
    if (rc == 0 && closed < 0 && closed != -EINTR) {
        rc = dcp_export_fail(dir, out->what->name, -closed, "closing", err);
    }
    dcp_free(out);
    return rc;
}

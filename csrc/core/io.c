/*
 * io.c: whole buffers and whole files over any table.
 *
 * The table gives what one system call gives; here interrupted and short calls are continued until
 * the buffer is done, the end of the file or a real error is met.  Requests are cut at
 * DCP_MAX_REQUEST_BYTES, below which no kernel cuts them.
 *
 * Threads: no state; safe wherever the table is.
 */
#include "dcp_io.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>

#include "dcp_limits.h"
#include "io_explain.h"

/* A network file system may drop a file that was replaced while we held it (ESTALE).  The name then
 * has a new file: opened again, it is read.  Each try needs one more replacement. */
enum { STALE_TRIES = 4 };

static int
io_error(const struct dcp_io *io, int fd, int sys_errno, const char *path, uint64_t offset_bytes,
         const char *what, size_t len, struct dcp_error *err)
{
    const struct dcp_io_trouble trouble = {
        .io = io, .fd = fd, .sys_errno = sys_errno, .need_bytes = len};
    char why[DCP_IO_EXPLAIN_BYTES];
    int rc = dcp_error_set(err, DCP_E_IO, sys_errno, path,
                           "%s %zu bytes at offset %" PRIu64 " of %s failed: %s", what, len,
                           offset_bytes, path, dcp_io_explain(&trouble, why));

    if (err != NULL && err->offset_bytes == UINT64_MAX) {
        err->offset_bytes = offset_bytes;
    }
    return rc;
}

int
dcp_io_read_all(const struct dcp_io *io, int fd, void *buf, size_t len, uint64_t offset,
                const char *path, struct dcp_error *err)
{
    uint8_t *at = buf;

    while (len > 0) {
        size_t want = (size_t)dcp_min_u64(len, DCP_MAX_REQUEST_BYTES);
        ssize_t n = io->pread(io->ctx, fd, at, want, offset);

        if (n == -EINTR) {
            continue;
        }
        if (n < 0) {
            return io_error(io, fd, (int)-n, path, offset, "reading", want, err);
        }
        if (n == 0) {
            return dcp_error_set(err, DCP_E_CORRUPT, 0, path,
                                 "%s ends at byte %" PRIu64 ", but %zu more bytes belong to it: it "
                                 "was cut short",
                                 path, offset, len);
        }
        DCP_ASSERT((size_t)n <= want);
        at += n;
        offset += (size_t)n;
        len -= (size_t)n;
    }
    return 0;
}

int
dcp_io_write_all(const struct dcp_io *io, int fd, const void *buf, size_t len, uint64_t offset,
                 const char *path, struct dcp_error *err)
{
    const uint8_t *at = buf;

    while (len > 0) {
        size_t want = (size_t)dcp_min_u64(len, DCP_MAX_REQUEST_BYTES);
        ssize_t n = io->pwrite(io->ctx, fd, at, want, offset);

        if (n == -EINTR) {
            continue;
        }
        if (n <= 0) {
            return io_error(io, fd, n == 0 ? EIO : (int)-n, path, offset, "writing", want, err);
        }
        DCP_ASSERT((size_t)n <= want);
        at += n;
        offset += (size_t)n;
        len -= (size_t)n;
    }
    return 0;
}

static int
open_again(const struct dcp_io *io, int dirfd, const char *name)
{
    int fd;

    do {
        fd = io->open_at(io->ctx, dirfd, name, O_RDONLY, 0);
    } while (fd == -EINTR);
    return fd;
}

bool
dcp_io_exists(const struct dcp_io *io, int dirfd, const char *name)
{
    int fd = open_again(io, dirfd, name);

    if (fd >= 0) {
        io->close(io->ctx, fd);
    }
    return fd >= 0;
}

int
dcp_io_sync(const struct dcp_io *io, int fd)
{
    int rc;

    do {
        rc = io->fsync(io->ctx, fd);
    } while (rc == -EINTR);
    return rc;
}

/* Opens and measures: a descriptor, or -errno. */
static int
open_for_reading(const struct dcp_io *io, int dirfd, const char *name, struct dcp_stat *ret_stat)
{
    int rc, fd = open_again(io, dirfd, name);

    if (fd < 0) {
        return fd;
    }
    do {
        rc = io->fstat(io->ctx, fd, ret_stat);
    } while (rc == -EINTR);
    if (rc == 0 && ret_stat->is_dir) {
        rc = -EISDIR;
    }
    if (rc != 0) {
        io->close(io->ctx, fd);
        return rc;
    }
    return fd;
}

static int
read_once(const struct dcp_io *io, int dirfd, const char *name, uint64_t max_bytes,
          struct dcp_buf *buf, struct dcp_error *err)
{
    struct dcp_stat st;
    uint8_t *at;
    int rc, fd = open_for_reading(io, dirfd, name, &st);

    if (fd < 0) {
        return dcp_error_set(err, fd == -ENOENT ? DCP_E_NOENT : DCP_E_IO, -fd, name,
                             "opening %s failed: %s", name, strerror(-fd));
    }
    if (st.size_bytes > max_bytes) {
        rc = dcp_error_set(err, DCP_E_LIMIT, 0, name,
                           "%s has %" PRIu64 " bytes, more than the %" PRIu64 " that are read",
                           name, st.size_bytes, max_bytes);
    } else if ((at = dcp_buf_extend(buf, (size_t)st.size_bytes)) == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, name, "no memory for the %" PRIu64 " bytes of %s",
                           st.size_bytes, name);
    } else {
        rc = dcp_io_read_all(io, fd, at, (size_t)st.size_bytes, 0, name, err);
    }
    io->close(io->ctx, fd);
    return rc;
}

int
dcp_io_read_file(const struct dcp_io *io, int dirfd, const char *name, uint64_t max_bytes,
                 struct dcp_buf *buf, struct dcp_error *err)
{
    size_t len = buf->len;
    struct dcp_error local;
    int rc = 0;

    for (int i = 0; i < STALE_TRIES; i++) {
        dcp_error_clear(&local);
        rc = read_once(io, dirfd, name, max_bytes, buf, &local);
        if (rc == 0) {
            return 0;
        }
        buf->len = len;
        if (local.sys_errno != ESTALE) {
            break;
        }
    }
    if (err != NULL && err->code == DCP_OK) {
        *err = local;
    }
    return rc;
}

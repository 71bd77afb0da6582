/*
 * safetensors_file.c: the header of a safetensors file, read from its start and nothing else.
 *
 * Threads: no state; several headers may be read at once.
 */
#include "dcp_safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "dcp_limits.h"

/* What is read at once: headers of a thousand tensors fit, and a disk takes as long for less. */
enum { FIRST_READ_BYTES = 128 << 10 };

static int
fail_io(const char *what, const char *path, int sys_errno, struct dcp_error *err)
{
    return dcp_error_set(err, sys_errno == ENOENT ? DCP_E_NOENT : DCP_E_IO, sys_errno, path,
                         "%s %s failed: %s", what, path, strerror(sys_errno));
}

/* The whole header in `buf`. */
static int
read_header(const struct dcp_io *io, int fd, uint64_t file_bytes, const char *path,
            struct dcp_buf *buf, struct dcp_error *err)
{
    size_t first = (size_t)dcp_min_u64(file_bytes, FIRST_READ_BYTES);
    uint64_t bytes = 0;
    uint8_t *at = dcp_buf_extend(buf, first);
    if (at == NULL) {
        return dcp_buf_check(buf, err);
    }
    int rc = dcp_io_read_all(io, fd, at, first, 0, path, err);
    if (rc == 0) {
        rc = dcp_safetensors_header_bytes(buf->data, file_bytes, path, &bytes, err);
    }
    if (rc != 0 || bytes <= first) {
        return rc;
    }
    at = dcp_buf_extend(buf, (size_t)bytes - first);
    return at == NULL ? dcp_buf_check(buf, err)
                      : dcp_io_read_all(io, fd, at, (size_t)bytes - first, first, path, err);
}

static int
read_open(const struct dcp_io *io, int fd, const char *path, struct dcp_safetensors_header *ret,
          struct dcp_error *err)
{
    struct dcp_buf buf = {0};
    struct dcp_stat stat = {0};
    int rc;
    do {
        rc = io->fstat(io->ctx, fd, &stat);
    } while (rc == -EINTR);
    if (rc < 0) {
        return fail_io("fstat of", path, -rc, err);
    }
    rc = read_header(io, fd, stat.size_bytes, path, &buf, err);
    if (rc == 0) {
        rc = dcp_safetensors_parse(buf.data, buf.len, stat.size_bytes, path, ret, err);
    }
    dcp_buf_clean_up(&buf);
    return rc;
}

int
dcp_safetensors_read(const struct dcp_io *io, const char *dir_path, const char *name,
                     struct dcp_safetensors_header *ret, struct dcp_error *err)
{
    char path[DCP_ERROR_PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", dir_path, name);
    int dirfd = io->open_dir(io->ctx, dir_path);
    if (dirfd < 0) {
        return fail_io("opening", dir_path, -dirfd, err);
    }
    int fd, rc;
    do {
        fd = io->open_at(io->ctx, dirfd, name, O_RDONLY, 0);
    } while (fd == -EINTR);
    rc = fd < 0 ? fail_io("opening", path, -fd, err) : read_open(io, fd, path, ret, err);
    /* Nothing was written: failing closes have nothing to say. */
    if (fd >= 0) {
        io->close(io->ctx, fd);
    }
    io->close(io->ctx, dirfd);
    return rc;
}

/*
 * incremental_links.c: one data file of the base, under a name of this save.
 *
 * A link is made once and looked at through its new name: it counts only if the header there is the
 * one that was read from the base, for the base's file may have been replaced in between.  After
 * that a reflink is beyond anybody's reach.  A hard link is not: whoever truncates the base's file
 * in place, as stock torch does when it overwrites, damages both.  So the file behind it loses its
 * write permission, which stops everybody but root.
 *
 * Threads: no state.
 */
#include "incremental.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

enum { WRITE_BITS = 0222 };

static int
check_header(const struct dcp_io *io, int fd, const struct dcp_link *link, const char *name)
{
    uint8_t header[DCP_FILE_HEADER_BYTES];
    struct dcp_error ignored;
    struct dcp_stat st;

    dcp_error_clear(&ignored);
    if (dcp_io_read_all(io, fd, header, sizeof header, 0, name, &ignored) != 0) {
        return ignored.sys_errno != 0 ? -ignored.sys_errno : -ESTALE;
    }
    int rc = io->fstat(io->ctx, fd, &st);
    if (rc != 0) {
        return rc;
    }
    return memcmp(header, link->from.header, sizeof header) == 0 &&
                   st.size_bytes == link->from.length_bytes
               ? 0
               : -ESTALE;
}

/* The bytes are durable already, as all that have a hash; what a reflink shares of them is now. */
static int
settle(const struct dcp_link_target *target, const struct dcp_link *link, const char *name)
{
    const struct dcp_io *io = target->io;
    struct dcp_stat st;
    int rc, close_rc, fd = io->open_at(io->ctx, target->dirfd, name, O_RDONLY | O_NOFOLLOW, 0);

    if (fd < 0) {
        return fd;
    }
    rc = check_header(io, fd, link, name);
    if (rc == 0 && target->mode == DCP_LINK_HARD) {
        rc = io->fstat(io->ctx, fd, &st);
        rc = rc == 0 ? io->chmod(io->ctx, fd, st.mode & ~(unsigned)WRITE_BITS) : rc;
        /* What was done to the file before it became read-only shows now. */
        rc = rc == 0 ? check_header(io, fd, link, name) : rc;
    }
    if (rc == 0 && target->sync) {
        rc = io->fdatasync(io->ctx, fd);
    }
    close_rc = io->close(io->ctx, fd);
    return rc != 0 ? rc : close_rc;
}

int
dcp_link_make(const struct dcp_link_target *target, const struct dcp_base *base,
              const struct dcp_link *link)
{
    const struct dcp_io *io = target->io;
    char name[DCP_CLAIM_NAME_BYTES];
    int rc;

    if (link->n > UINT32_MAX || target->n0 > UINT32_MAX - link->n) {
        return -EFBIG;
    }
    dcp_data_file_name(name, sizeof name, target->rank, target->n0 + link->n);
    if (target->mode == DCP_LINK_HARD) {
        rc = io->link_at(io->ctx, base->dirfd, link->from.name, target->dirfd, name);
    } else {
        rc = io->clone_at(io->ctx, base->dirfd, link->from.name, target->dirfd, name);
    }
    if (rc != 0) {
        return rc;
    }
    rc = settle(target, link, name);
    if (rc != 0) {
        (void)io->unlink_at(io->ctx, target->dirfd, name);
    }
    return rc;
}

/*
 * writer_orphan_wait.c: does a process without a trainer still work on a save of a directory?
 *
 * It holds a lock on its claim (writer_outlive.c); a claim that nobody has locked is of a save that
 * lives with its trainer, or of nobody, and is not waited for.  A published claim keeps its lock
 * under its new name, so the wait follows the file and not the name: it is over when the lock is.
 *
 * Threads: no state.
 */
#include <errno.h>
#include <fcntl.h>

#include "claim_scan.h"
#include "dcp_limits.h"
#include "writer_message.h"

struct search {
    int dirfd;
    int fd; /* of a locked claim, or -1 */
};

static int
find_locked(void *ctx, const char *name)
{
    const struct dcp_io *io = dcp_io_posix();
    struct search *search = ctx;
    struct dcp_claim_name claim;

    if (!dcp_claim_name_parse(name, &claim)) {
        return 0;
    }
    int fd = io->open_at(io->ctx, search->dirfd, name, O_RDONLY, 0);
    if (fd < 0) {
        return 0;
    }
    if (dcp_file_lock(fd, true)) {
        io->close(io->ctx, fd);
        return 0;
    }
    search->fd = fd;
    return 1;
}

int
dcp_writer_orphan_wait(int dirfd, const char *dir_path, uint64_t timeout_ns, atomic_int *cancel,
                       struct dcp_error *err)
{
    const struct dcp_io *io = dcp_io_posix();
    uint64_t start_ns = io->now_ns(io->ctx);
    struct search search = {.dirfd = dirfd, .fd = -1};

    int rc = io->list(io->ctx, dirfd, find_locked, &search);
    if (rc < 0) {
        return dcp_error_set(err, DCP_E_IO, -rc, dir_path, "looking for claims in %s failed",
                             dir_path != NULL ? dir_path : "the directory");
    }
    rc = 0;
    while (search.fd >= 0 && rc == 0 && !dcp_file_lock(search.fd, true)) {
        if (cancel != NULL && atomic_load(cancel) != 0) {
            rc = dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the wait was cancelled");
        } else if (io->now_ns(io->ctx) - start_ns >= timeout_ns) {
            rc = dcp_error_set(err, DCP_E_TIMEOUT, 0, dir_path,
                               "a save whose trainer died is still being written to %s",
                               dir_path != NULL ? dir_path : "the directory");
        } else {
            io->sleep_ns(io->ctx, DCP_WRITER_SLICE_NS);
        }
    }
    if (search.fd >= 0) {
        io->close(io->ctx, search.fd);
    }
    return rc;
}

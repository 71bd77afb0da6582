/*
 * save_faults.c: the failing tables of save_faults.h.
 */
#include "save_faults.h"

#include <string.h>

/* ---- collectives ---- */

/* Runs before a call; true: it is this rank's end. */
static bool
comm_dies(struct comm_faults *faults, struct dcp_error *err)
{
    if (!faults->failed && faults->mode == FAULT_BEFORE && ++faults->calls == faults->nth) {
        faults->failed = true;
        dcp_comm_sim_kill(faults->sim, faults->inner.rank);
    }
    if (faults->failed) {
        (void)dcp_error_set(err, DCP_E_COMM, 0, NULL, "the connection is gone");
    }
    return faults->failed;
}

static int
comm_reply(struct comm_faults *faults, int rc, struct dcp_error *err)
{
    if (faults->mode == FAULT_AFTER && ++faults->calls == faults->nth) {
        faults->failed = true;
        return dcp_error_set(err, DCP_E_COMM, 0, NULL, "the reply was lost");
    }
    return rc;
}

static int
faulty_all_reduce_min(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err)
{
    struct comm_faults *faults = ctx;

    if (comm_dies(faults, err)) {
        return DCP_E_COMM;
    }
    return comm_reply(faults, faults->inner.all_reduce_min(faults->inner.ctx, lanes, count, err),
                      err);
}

static int
faulty_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
              struct dcp_error *err)
{
    struct comm_faults *faults = ctx;

    if (comm_dies(faults, err)) {
        return DCP_E_COMM;
    }
    return comm_reply(faults, faults->inner.gather(faults->inner.ctx, root, send, recv, bytes, err),
                      err);
}

static int
faulty_all_gather(void *ctx, const void *send, void *recv, size_t bytes, struct dcp_error *err)
{
    struct comm_faults *faults = ctx;

    if (comm_dies(faults, err)) {
        return DCP_E_COMM;
    }
    return comm_reply(faults, faults->inner.all_gather(faults->inner.ctx, send, recv, bytes, err),
                      err);
}

static int
faulty_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
               struct dcp_error *err)
{
    struct comm_faults *faults = ctx;

    if (comm_dies(faults, err)) {
        return DCP_E_COMM;
    }
    return comm_reply(faults, faults->inner.scatter(faults->inner.ctx, root, send, recv, bytes,
                      err), err);
}

static int
faulty_broadcast(void *ctx, uint32_t root, void *buf, size_t bytes, struct dcp_error *err)
{
    struct comm_faults *faults = ctx;

    if (comm_dies(faults, err)) {
        return DCP_E_COMM;
    }
    return comm_reply(faults, faults->inner.broadcast(faults->inner.ctx, root, buf, bytes, err),
                      err);
}

static void
faulty_destroy(void *ctx)
{
    struct comm_faults *faults = ctx;

    faults->inner.destroy(faults->inner.ctx);
}

void
comm_faults_init(struct comm_faults *faults, struct dcp_comm_sim *sim,
                 const struct dcp_comm *inner, struct dcp_comm *ret_comm)
{
    *faults = (struct comm_faults){.inner = *inner, .sim = sim};
    *ret_comm = (struct dcp_comm){
        .ctx = faults,
        .kind = "faulty",
        .rank = inner->rank,
        .size = inner->size,
        .all_reduce_min = faulty_all_reduce_min,
        .gather = faulty_gather,
        .all_gather = faulty_all_gather,
        .scatter = faulty_scatter,
        .broadcast = faulty_broadcast,
        .destroy = faulty_destroy,
    };
}

void
comm_faults_arm(struct comm_faults *faults, enum fault_mode mode, uint32_t nth)
{
    faults->mode = mode;
    faults->nth = nth;
    faults->calls = 0;
}

/* ---- system calls ---- */

/* Counts a call.  *ret_before, *ret_after: the error it gives instead of, or in spite of, its
 * effect; 0: none. */
static void
io_count(struct io_faults *faults, int *ret_before, int *ret_after)
{
    uint32_t call = atomic_fetch_add(&faults->calls, 1) + 1;
    bool hit = call == faults->nth || (faults->mode == FAULT_FOR_EVER && call > faults->nth);

    *ret_before = 0;
    *ret_after = 0;
    if (faults->mode != FAULT_NONE && hit) {
        atomic_store(&faults->hit, true);
        *(faults->mode == FAULT_AFTER ? ret_after : ret_before) = -faults->sys_errno;
    }
}

/* A descriptor whose number the caller never learns. */
static int
lose_descriptor(struct io_faults *faults, int fd, int after)
{
    if (after != 0 && fd >= 0) {
        faults->inner->close(faults->inner->ctx, fd);
    }
    return after != 0 ? after : fd;
}

/* Every call goes the same way; a macro keeps twenty of them readable. */
#define PASS_ON(type, name, params, args, result)                                                  \
    static type faulty_##name params                                                               \
    {                                                                                              \
        struct io_faults *faults = ctx;                                                            \
        int before, after;                                                                         \
        type rc;                                                                                   \
                                                                                                   \
        io_count(faults, &before, &after);                                                         \
        if (before != 0) {                                                                         \
            return before;                                                                         \
        }                                                                                          \
        rc = faults->inner->name args;                                                             \
        return result;                                                                             \
    }

#define INNER faults->inner->ctx
#define REPLY (after != 0 ? after : rc)
#define REPLY_FD lose_descriptor(faults, rc, after)

PASS_ON(int, mkdirs, (void *ctx, const char *path), (INNER, path), REPLY)
PASS_ON(int, open_dir, (void *ctx, const char *path), (INNER, path), REPLY_FD)
PASS_ON(int, dup_dir, (void *ctx, int dirfd), (INNER, dirfd), REPLY_FD)
PASS_ON(int, open_at, (void *ctx, int dirfd, const char *name, int flags, unsigned mode), (INNER,
        dirfd, name, flags, mode), REPLY_FD)
PASS_ON(ssize_t, pread, (void *ctx, int fd, void *buf, size_t len, uint64_t offset), (INNER, fd,
        buf, len, offset), REPLY)
PASS_ON(ssize_t, pwrite, (void *ctx, int fd, const void *buf, size_t len, uint64_t offset), (INNER,
        fd, buf, len, offset), REPLY)
PASS_ON(int, fallocate, (void *ctx, int fd, uint64_t offset, uint64_t len), (INNER, fd, offset,
        len), REPLY)
PASS_ON(int, truncate, (void *ctx, int fd, uint64_t len), (INNER, fd, len), REPLY)
PASS_ON(int, fdatasync, (void *ctx, int fd), (INNER, fd), REPLY)
PASS_ON(int, fsync, (void *ctx, int fd), (INNER, fd), REPLY)
PASS_ON(int, fstat, (void *ctx, int fd, struct dcp_stat *ret), (INNER, fd, ret), REPLY)
PASS_ON(int, dio_align, (void *ctx, int fd, struct dcp_dio_align *ret), (INNER, fd, ret), REPLY)
PASS_ON(int, set_direct, (void *ctx, int fd, bool on), (INNER, fd, on), REPLY)
PASS_ON(int, flush_range, (void *ctx, int fd, uint64_t offset, uint64_t len, bool wait_and_drop),
        (INNER, fd, offset, len, wait_and_drop), REPLY)
PASS_ON(int, cached, (void *ctx, int fd, uint64_t offset, uint64_t len), (INNER, fd, offset, len),
        REPLY)
PASS_ON(int, space, (void *ctx, int dirfd, struct dcp_space *ret), (INNER, dirfd, ret), REPLY)
PASS_ON(int, chmod, (void *ctx, int fd, unsigned mode), (INNER, fd, mode), REPLY)
PASS_ON(int, link_at, (void *ctx, int from_dirfd, const char *from, int to_dirfd, const char *to),
        (INNER, from_dirfd, from, to_dirfd, to), REPLY)
PASS_ON(int, clone_at, (void *ctx, int from_dirfd, const char *from, int to_dirfd, const char *to),
        (INNER, from_dirfd, from, to_dirfd, to), REPLY)
PASS_ON(int, rename_at, (void *ctx, int dirfd, const char *from, const char *to), (INNER, dirfd,
        from, to), REPLY)
PASS_ON(int, unlink_at, (void *ctx, int dirfd, const char *name), (INNER, dirfd, name), REPLY)
PASS_ON(int, list, (void *ctx, int dirfd, dcp_list_fn fn, void *fn_ctx), (INNER, dirfd, fn, fn_ctx),
        REPLY)

PASS_ON(int, thread_priority, (void *ctx, int nice, unsigned io_priority), (INNER, nice,
        io_priority), REPLY)

static uint64_t
same_now_ns(void *ctx)
{
    struct io_faults *faults = ctx;

    return faults->inner->now_ns(INNER);
}

static void
same_sleep_ns(void *ctx, uint64_t ns)
{
    struct io_faults *faults = ctx;

    faults->inner->sleep_ns(INNER, ns);
}

/* A descriptor is gone whatever close says. */
static int
faulty_close(void *ctx, int fd)
{
    struct io_faults *faults = ctx;
    int before, after, rc = faults->inner->close(faults->inner->ctx, fd);

    io_count(faults, &before, &after);
    return before != 0 ? before : after != 0 ? after : rc;
}

void
io_faults_init(struct io_faults *faults, const struct dcp_io *inner)
{
    memset(faults, 0, sizeof *faults);
    faults->inner = inner;
    faults->io = (struct dcp_io){
        .ctx = faults,
        .mkdirs = faulty_mkdirs,
        .open_dir = faulty_open_dir,
        .dup_dir = faulty_dup_dir,
        .open_at = faulty_open_at,
        .close = faulty_close,
        .pread = faulty_pread,
        .pwrite = faulty_pwrite,
        .fallocate = faulty_fallocate,
        .truncate = faulty_truncate,
        .fdatasync = faulty_fdatasync,
        .fsync = faulty_fsync,
        .fstat = faulty_fstat,
        .dio_align = faulty_dio_align,
        .set_direct = faulty_set_direct,
        .flush_range = faulty_flush_range,
        .cached = faulty_cached,
        .space = faulty_space,
        .chmod = faulty_chmod,
        .link_at = faulty_link_at,
        .clone_at = faulty_clone_at,
        .rename_at = faulty_rename_at,
        .unlink_at = faulty_unlink_at,
        .list = faulty_list,
        .thread_priority = faulty_thread_priority,
        .now_ns = same_now_ns,
        .sleep_ns = same_sleep_ns,
    };
}

void
io_faults_arm(struct io_faults *faults, enum fault_mode mode, uint32_t nth, int sys_errno)
{
    faults->mode = mode;
    faults->nth = nth;
    faults->sys_errno = sys_errno;
    atomic_store(&faults->calls, 0);
    atomic_store(&faults->hit, false);
}

/*
 * io_memory_bytes.c: the calls of the file system in memory on open files: bytes, fsync, questions.
 */
#include "io_memory_private.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

/* ---- the disk's size ---- */

static unsigned
maker_of(const struct io_inode *inode)
{
    return (unsigned)(inode->label >> 16) - 1;
}

uint64_t
io_memory_used_bytes(const struct io_memory *fs, int process_id)
{
    uint64_t used = 0;

    for (const struct io_inode *inode = fs->inodes; inode != NULL; inode = inode->next) {
        if ((inode->names > 0 || inode->opens > 0) &&
            (process_id < 0 || maker_of(inode) == (unsigned)process_id)) {
            used += inode->len > inode->allocated ? inode->len : inode->allocated;
            used += inode->names * fs->faults.name_bytes;
        }
    }
    return used;
}

uint64_t
io_room(const struct io_memory *fs, unsigned process_id)
{
    const struct io_memory_faults *faults = &fs->faults;

    if (faults->space_bytes == UINT64_MAX ||
        (faults->limited != 0 && faults->limited - 1 != process_id)) {
        return UINT64_MAX;
    }
    return faults->space_bytes -
           dcp_min_u64(faults->space_bytes,
                       io_memory_used_bytes(fs, faults->limited == 0 ? -1 : (int)process_id));
}

int
io_full(const struct io_memory *fs)
{
    return fs->faults.full_errno == 0 ? -ENOSPC : -fs->faults.full_errno;
}

static size_t
cut_short(struct io_memory *fs, size_t len)
{
    if (len > 1 && fs->faults.short_percent != 0 &&
        io_random(fs) % 100 < fs->faults.short_percent) {
        return 1 + (size_t)(io_random(fs) % (len - 1));
    }
    return len;
}

static bool
is_misaligned(const struct io_memory *fs, int fd, const void *buf, size_t len, uint64_t offset)
{
    const struct io_fd *entry = &fs->fds[fd - IO_FIRST_FD];

    return (entry->direct || (entry->flags & O_DIRECT) != 0) &&
           (fs->dio.mem_bytes == 0 || (uintptr_t)buf % fs->dio.mem_bytes != 0 ||
            len % fs->dio.offset_bytes != 0 || offset % fs->dio.offset_bytes != 0);
}

static ssize_t
memory_pread(void *ctx, int fd, void *buf, size_t len, uint64_t offset)
{
    struct io_called call = io_begin(ctx, IO_PREAD, "");
    struct io_inode *inode = io_fd_file(call.fs, fd);
    ssize_t rc = 0;

    if (inode == NULL || (call.fs->fds[fd - IO_FIRST_FD].flags & O_ACCMODE) == O_WRONLY) {
        rc = -EBADF;
    } else if (is_misaligned(call.fs, fd, buf, len, offset)) {
        rc = -EINVAL;
    } else if (call.before == 0 && offset < inode->len) {
        size_t n = inode->len - (size_t)offset;
        n = cut_short(call.fs, n < len ? n : len);
        memcpy(buf, inode->data + offset, n);
        io_note(&call, io_hash_bytes(buf, n));
        rc = (ssize_t)n;
    }
    return io_end(&call, rc);
}

static ssize_t
memory_pwrite(void *ctx, int fd, const void *buf, size_t len, uint64_t offset)
{
    struct io_called call = io_begin(ctx, IO_PWRITE, "");
    struct io_inode *inode = io_fd_file(call.fs, fd);
    ssize_t rc = 0;

    if (inode == NULL || (call.fs->fds[fd - IO_FIRST_FD].flags & O_ACCMODE) == O_RDONLY) {
        rc = -EBADF;
    } else if (is_misaligned(call.fs, fd, buf, len, offset)) {
        rc = -EINVAL;
    } else if (call.before == 0 && len > 0) {
        size_t n = cut_short(call.fs, len), at = (size_t)offset;
        size_t have = inode->len > inode->allocated ? inode->len : inode->allocated;
        uint64_t most = have + dcp_min_u64(io_room(call.fs, maker_of(inode)), UINT64_MAX - have);
        if (most <= at) {
            rc = io_full(call.fs);
        } else {
            n = (size_t)dcp_min_u64(n, most - at);
            io_inode_reserve(inode, at + n);
            memcpy(inode->data + at, buf, n);
            io_inode_touch(inode, at, n);
            inode->len = at + n > inode->len ? at + n : inode->len;
            rc = (ssize_t)n;
        }
    }
    return io_end(&call, rc);
}

static int
memory_fallocate(void *ctx, int fd, uint64_t offset, uint64_t len)
{
    struct io_called call = io_begin(ctx, IO_FALLOCATE, "");
    struct io_inode *inode = io_fd_file(call.fs, fd);
    int rc = inode == NULL ? -EBADF : 0;

    if (rc == 0 && call.before == 0) {
        size_t have = inode->len > inode->allocated ? inode->len : inode->allocated;
        uint64_t more = offset + len > have ? offset + len - have : 0;
        if (more > io_room(call.fs, maker_of(inode))) {
            rc = io_full(call.fs);
        } else if (more > 0) {
            inode->allocated = (size_t)(offset + len);
        }
    }
    return (int)io_end(&call, rc);
}

static int
memory_truncate(void *ctx, int fd, uint64_t len)
{
    struct io_called call = io_begin(ctx, IO_TRUNCATE, "");
    struct io_inode *inode = io_fd_file(call.fs, fd);

    if (inode != NULL && call.before == 0) {
        io_inode_reserve(inode, (size_t)len);
        if (len < inode->len) {
            memset(inode->data + len, 0, inode->len - (size_t)len);
            io_inode_touch(inode, (size_t)len, inode->len - (size_t)len);
        }
        inode->len = (size_t)len;
        inode->allocated = inode->allocated > len ? (size_t)len : inode->allocated;
        io_inode_touch(inode, 0, 0);
    }
    return (int)io_end(&call, inode == NULL ? -EBADF : 0);
}

static int
sync_any(void *ctx, enum io_call kind, int fd)
{
    struct io_called call = io_begin(ctx, kind, "");
    struct io_fd *entry = io_fd_get(call.fs, fd);
    bool fails = call.before != 0 && call.before != -EINTR;

    if (entry != NULL && entry->inode != NULL && !call.fs->crashed && (call.before == 0 || fails)) {
        io_inode_sync(call.fs, entry->inode, fails);
        call.fs->vain_syncs += entry->inode->sync_failed && !fails;
        entry->inode->sync_failed = entry->inode->sync_failed || fails || call.after != 0;
    } else if (entry != NULL && entry->dir != NULL && call.before == 0) {
        io_dir_sync(entry->dir);
    }
    return (int)io_end(&call, entry == NULL ? -EBADF : 0);
}

uint64_t
io_memory_vain_syncs(const struct io_memory *fs)
{
    return fs->vain_syncs;
}

static int
memory_fdatasync(void *ctx, int fd)
{
    return sync_any(ctx, IO_FDATASYNC, fd);
}

static int
memory_fsync(void *ctx, int fd)
{
    return sync_any(ctx, IO_FSYNC, fd);
}

/* Starting to write back makes nothing durable. */
static int
memory_flush_range(void *ctx, int fd, uint64_t offset, uint64_t len, bool wait_and_drop)
{
    struct io_called call = io_begin(ctx, IO_FLUSH_RANGE, "");
    (void)offset;
    (void)len;
    (void)wait_and_drop;
    return (int)io_end(&call, io_fd_file(call.fs, fd) == NULL ? -EBADF : 0);
}

/* ---- questions ---- */

static int
memory_fstat(void *ctx, int fd, struct dcp_stat *ret)
{
    struct io_called call = io_begin(ctx, IO_FSTAT, "");
    struct io_fd *entry = io_fd_get(call.fs, fd);

    if (entry != NULL && call.before == 0) {
        *ret = (struct dcp_stat){.is_dir = entry->inode == NULL, .links = 1};
        if (entry->inode != NULL) {
            ret->size_bytes = entry->inode->len;
            ret->links = entry->inode->names;
            ret->mode = entry->inode->mode;
        } else if (entry->dir != NULL) {
            ret->links = entry->dir->removed ? 0 : 2;
        }
        io_note(&call, ret->size_bytes << 8 | ret->links);
    }
    return (int)io_end(&call, entry == NULL ? -EBADF : 0);
}

static int
memory_dio_align(void *ctx, int fd, struct dcp_dio_align *ret)
{
    struct io_called call = io_begin(ctx, IO_DIO_ALIGN, "");

    if (call.before == 0) {
        *ret = call.fs->dio;
    }
    return (int)io_end(&call, io_fd_file(call.fs, fd) == NULL ? -EBADF : 0);
}

static int
memory_set_direct(void *ctx, int fd, bool on)
{
    struct io_called call = io_begin(ctx, IO_SET_DIRECT, "");
    struct io_fd *entry = io_fd_get(call.fs, fd);
    int rc = entry == NULL ? -EBADF : 0;

    if (rc == 0 && on && call.fs->dio.mem_bytes == 0) {
        rc = -EINVAL;
    } else if (rc == 0 && call.before == 0) {
        entry->direct = on;
        entry->flags &= ~O_DIRECT;
    }
    return (int)io_end(&call, rc);
}

static int
memory_cached(void *ctx, int fd, uint64_t offset, uint64_t len)
{
    struct io_called call = io_begin(ctx, IO_CACHED, "");
    (void)offset;
    (void)len;
    return (int)io_end(
        &call, io_fd_file(call.fs, fd) == NULL ? -EBADF : (int)call.fs->faults.cached_percent);
}

/* A copy, of exactly the bytes that were asked for: reading beyond them is found out. */
static int
memory_map(void *ctx, int fd, uint64_t offset, size_t len, const uint8_t **ret)
{
    struct io_called call = io_begin(ctx, IO_MAP, "");
    struct io_inode *inode = io_fd_file(call.fs, fd);
    int rc = inode == NULL ? -EBADF : 0;

    if (rc == 0 && (offset > inode->len || len > inode->len - offset)) {
        rc = -EIO;
    }
    if (rc == 0 && call.before == 0) {
        struct io_memory_faults *faults = &call.fs->faults;
        bool lost = faults->lose_map == 1;
        uint8_t *copy = malloc(len);
        if (copy == NULL) {
            abort();
        }
        memcpy(copy, inode->data + offset, len);
        faults->lose_map -= faults->lose_map > 0;
        if (lost) {
            memset(copy + len / 2, 0, len - len / 2);
            call.fs->lost_map = copy;
        }
        call.fs->lent_maps++;
        *ret = copy;
    }
    return (int)io_end(&call, rc);
}

static int
memory_unmap(void *ctx, const uint8_t *bytes, size_t len)
{
    struct io_memory *fs = ((struct io_memory_process *)ctx)->fs;
    bool lost;
    (void)len;

    pthread_mutex_lock(&fs->mutex);
    lost = bytes == fs->lost_map;
    fs->lost_map = lost ? NULL : fs->lost_map;
    fs->lent_maps--;
    pthread_mutex_unlock(&fs->mutex);
    free((void *)(uintptr_t)bytes);
    return lost ? -EIO : 0;
}

unsigned
io_memory_lent_maps(const struct io_memory *fs)
{
    return fs->lent_maps;
}

static int
memory_space(void *ctx, int dirfd, struct dcp_space *ret)
{
    struct io_called call = io_begin(ctx, IO_SPACE, "");
    int rc = io_fd_get(call.fs, dirfd) == NULL ? -EBADF : call.fs->faults.hides_space ? -ENOSYS : 0;

    if (rc == 0 && call.before == 0) {
        ret->free_bytes = io_room(call.fs, call.process->id);
    }
    return (int)io_end(&call, rc);
}

void
io_bytes_calls(struct dcp_io *io)
{
    io->pread = memory_pread;
    io->pwrite = memory_pwrite;
    io->fallocate = memory_fallocate;
    io->truncate = memory_truncate;
    io->fdatasync = memory_fdatasync;
    io->fsync = memory_fsync;
    io->fstat = memory_fstat;
    io->dio_align = memory_dio_align;
    io->set_direct = memory_set_direct;
    io->flush_range = memory_flush_range;
    io->cached = memory_cached;
    io->map = memory_map;
    io->unmap = memory_unmap;
    io->space = memory_space;
}

/*
 * io_memory.c: the calls of the file system in memory on names, and the faults that hit any call.
 *
 * Every call goes the same way: hook, lock, count, fault, effect, history.  A fault may come
 * instead of the effect or after it; after the power cut nothing has an effect any more.
 */
#include "io_memory_private.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

static bool
may_be_interrupted(enum io_call kind)
{
    return kind == IO_OPEN_AT || kind == IO_PREAD || kind == IO_PWRITE || kind == IO_FALLOCATE ||
           kind == IO_TRUNCATE || kind == IO_FDATASYNC || kind == IO_FSYNC || kind == IO_FSTAT ||
           kind == IO_RENAME_AT || kind == IO_UNLINK_AT || kind == IO_LIST;
}

static int
pick(struct io_memory_process *process, int count)
{
    return process->choose == NULL ? 0 : process->choose(process, count);
}

/* A reply that a scheduler may lose: decided before the effect, outside of the lock. */
static void
choose_lost_reply(struct io_called *call)
{
    static const int results[] = {0, -ENOENT, -EIO, -EIO};
    struct io_memory_faults *faults = &call->fs->faults;
    int choice;

    if (faults->lost_replies == 0 || (call->kind != IO_RENAME_AT && call->kind != IO_UNLINK_AT)) {
        return;
    }
    choice = pick(call->process, 4);
    if (choice > 0) {
        faults->lost_replies--;
        *(choice == 3 ? &call->before : &call->after) = results[choice];
    }
}

struct io_called
io_begin(void *ctx, enum io_call kind, const char *name)
{
    struct io_called call = {.process = ctx, .kind = kind};
    struct io_memory *fs = call.process->fs;
    struct io_memory_faults *faults = &fs->faults;

    call.fs = fs;
    if (call.process->before != NULL) {
        call.process->before(call.process, kind, name);
    }
    if (!fs->crashed) {
        choose_lost_reply(&call);
    }
    pthread_mutex_lock(&fs->mutex);
    fs->calls[kind]++;
    fs->calls[IO_CALLS]++;
    if (faults->crash_at != UINT64_MAX && faults->crash_at-- == 0) {
        faults->crash_at = 0;
        fs->crashed = true;
    }
    if (fs->crashed) {
        call.before = -EIO;
    } else if (faults->fail_nth != 0 &&
               (faults->fail_call == IO_CALLS || faults->fail_call == (int)kind) &&
               --faults->fail_nth == 0) {
        *(faults->fail_after_effect || kind == IO_CLOSE ? &call.after : &call.before) =
            -faults->fail_errno;
    } else if (faults->eintr_percent != 0 && may_be_interrupted(kind) &&
               io_random(fs) % 100 < faults->eintr_percent) {
        call.before = -EINTR;
    }
    call.process->history = io_mix(call.process->history, (uint64_t)kind);
    return call;
}

ssize_t
io_end(struct io_called *call, ssize_t rc)
{
    if (call->before != 0) {
        rc = call->before;
    } else if (call->after != 0) {
        rc = call->after;
    }
    /* Descriptors depend on the schedule; what they lead to is in the history already. */
    call->process->history =
        io_mix(call->process->history, rc > 0 && call->kind == IO_OPEN_AT ? 1 : (uint64_t)rc);
    pthread_mutex_unlock(&call->fs->mutex);
    return rc;
}

void
io_note(struct io_called *call, uint64_t value)
{
    call->process->history = io_mix(call->process->history, value);
}

/* ---- descriptors ---- */

struct io_fd *
io_fd_get(struct io_memory *fs, int fd)
{
    size_t i = (size_t)(fd - IO_FIRST_FD);

    return fd >= IO_FIRST_FD && i < fs->fds_count && fs->fds[i].used ? &fs->fds[i] : NULL;
}

struct io_inode *
io_fd_file(struct io_memory *fs, int fd)
{
    struct io_fd *entry = io_fd_get(fs, fd);

    return entry == NULL ? NULL : entry->inode;
}

static struct io_dir *
fd_dir(struct io_memory *fs, int fd)
{
    struct io_fd *entry = io_fd_get(fs, fd);

    return entry == NULL ? NULL : entry->dir;
}

static int
fd_new(struct io_memory *fs, struct io_inode *inode, struct io_dir *dir, int flags)
{
    size_t i = 0;

    while (i < fs->fds_count && fs->fds[i].used) {
        i++;
    }
    if (i == fs->fds_count) {
        fs->fds_count++;
        fs->fds = realloc(fs->fds, fs->fds_count * sizeof *fs->fds);
        if (fs->fds == NULL) {
            abort();
        }
    }
    fs->fds[i] = (struct io_fd){.used = true, .inode = inode, .dir = dir, .flags = flags};
    if (inode != NULL) {
        inode->opens++;
    }
    return IO_FIRST_FD + (int)i;
}

/* ---- directories ---- */

static int
memory_mkdirs(void *ctx, const char *path)
{
    struct io_called call = io_begin(ctx, IO_MKDIRS, path);
    int rc = 0;

    if (call.before == 0 && io_dir_find(call.fs, path) == NULL) {
        rc = io_full(call.fs);
        for (size_t i = 0; i < IO_MEMORY_DIRS; i++) {
            if (!call.fs->dirs[i].used &&
                call.fs->faults.name_bytes <= io_room(call.fs, call.process->id)) {
                call.fs->dirs[i].used = true;
                strcpy(call.fs->dirs[i].path, path);
                rc = 0;
                break;
            }
        }
    }
    return (int)io_end(&call, rc);
}

static int
memory_open_dir(void *ctx, const char *path)
{
    struct io_called call = io_begin(ctx, IO_OPEN_DIR, path);
    int rc = -ENOENT;

    if (call.before == 0) {
        struct io_dir *dir = io_dir_find(call.fs, path);
        rc = dir == NULL ? -ENOENT : fd_new(call.fs, NULL, dir, 0);
    }
    return (int)io_end(&call, rc);
}

static int
memory_dup_dir(void *ctx, int dirfd)
{
    struct io_called call = io_begin(ctx, IO_DUP_DIR, "");
    struct io_dir *dir = fd_dir(call.fs, dirfd);

    return (int)io_end(&call, dir == NULL        ? -EBADF
                              : call.before != 0 ? 0
                                                 : fd_new(call.fs, NULL, dir, 0));
}

static ssize_t
open_file(struct io_called *call, struct io_dir *dir, const char *name, int flags)
{
    struct io_entry *entry = io_entries_find(&dir->entries, name);
    struct io_inode *inode = entry == NULL ? NULL : entry->inode;

    if (dir->removed || (inode == NULL && (flags & O_CREAT) == 0)) {
        return -ENOENT;
    }
    if (inode != NULL && (flags & O_EXCL) != 0) {
        return -EEXIST;
    }
    if (inode == NULL && call->fs->faults.name_bytes > io_room(call->fs, call->process->id)) {
        return io_full(call->fs);
    }
    if (inode == NULL) {
        inode = io_inode_new(call->fs,
                             (uint64_t)(call->process->id + 1) << 16 | call->process->files_made++);
        io_dir_change(call->process, dir, "", name, inode);
    }
    if ((flags & O_TRUNC) != 0 && inode->len > 0) {
        memset(inode->data, 0, inode->len);
        io_inode_touch(inode, 0, inode->len);
        inode->len = 0;
    }
    io_note(call, inode->label);
    return fd_new(call->fs, inode, NULL, flags);
}

static int
memory_open_at(void *ctx, int dirfd, const char *name, int flags, unsigned mode)
{
    struct io_called call = io_begin(ctx, IO_OPEN_AT, name);
    struct io_dir *dir = fd_dir(call.fs, dirfd);
    ssize_t rc;
    (void)mode;

    if (dir == NULL || strlen(name) >= IO_MEMORY_NAME_BYTES) {
        rc = dir == NULL ? -EBADF : -ENAMETOOLONG;
    } else if (call.before != 0) {
        rc = 0;
    } else if (strcmp(name, "..") == 0) {
        rc = fd_new(call.fs, NULL, NULL, flags);
    } else {
        rc = open_file(&call, dir, name, flags);
    }
    if (rc > 0 && call.after != 0) {
        struct io_fd *entry = io_fd_get(call.fs, (int)rc);
        entry->used = false; /* the caller will never know the number */
        if (entry->inode != NULL) {
            entry->inode->opens--;
        }
    }
    return (int)io_end(&call, rc);
}

static int
memory_close(void *ctx, int fd)
{
    struct io_called call = io_begin(ctx, IO_CLOSE, "");
    struct io_fd *entry = io_fd_get(call.fs, fd);

    if (entry != NULL) {
        entry->used = false;
        if (entry->inode != NULL) {
            entry->inode->opens--;
        }
    }
    return (int)io_end(&call, entry == NULL ? -EBADF : 0);
}

static int
change_names(struct io_called *call, int dirfd, const char *from, const char *to)
{
    struct io_dir *dir = fd_dir(call->fs, dirfd);
    struct io_entry *entry;

    if (dir == NULL || call->before != 0) {
        return dir == NULL ? -EBADF : 0;
    }
    entry = io_entries_find(&dir->entries, from);
    if (dir->removed || entry == NULL) {
        return -ENOENT;
    }
    io_dir_change(call->process, dir, from, to, entry->inode);
    return 0;
}

/* What `from` names gets, or by `clone` its bytes get, the name `to` as well. */
static int
add_name(struct io_called *call, int from_dirfd, const char *from, int to_dirfd, const char *to,
         bool clone)
{
    struct io_dir *from_dir = fd_dir(call->fs, from_dirfd), *to_dir = fd_dir(call->fs, to_dirfd);
    struct io_entry *entry;
    struct io_inode *inode;

    if (from_dir == NULL || to_dir == NULL || call->before != 0) {
        return from_dir == NULL || to_dir == NULL ? -EBADF : 0;
    }
    entry = io_entries_find(&from_dir->entries, from);
    if (from_dir->removed || to_dir->removed || entry == NULL) {
        return -ENOENT;
    }
    if (io_entries_find(&to_dir->entries, to) != NULL) {
        return -EEXIST;
    }
    if (clone && call->fs->without_clones) {
        return -EOPNOTSUPP;
    }
    inode = entry->inode;
    if (clone) {
        inode = io_inode_new(call->fs,
                             (uint64_t)(call->process->id + 1) << 16 | call->process->files_made++);
        io_inode_reserve(inode, entry->inode->len);
        if (entry->inode->len > 0) {
            memcpy(inode->data, entry->inode->data, entry->inode->len);
        }
        inode->len = entry->inode->len;
        io_inode_touch(inode, 0, inode->len);
    }
    io_note(call, inode->label);
    io_dir_change(call->process, to_dir, "", to, inode);
    return 0;
}

static int
memory_link_at(void *ctx, int from_dirfd, const char *from, int to_dirfd, const char *to)
{
    struct io_called call = io_begin(ctx, IO_LINK_AT, to);
    return (int)io_end(&call, add_name(&call, from_dirfd, from, to_dirfd, to, false));
}

static int
memory_clone_at(void *ctx, int from_dirfd, const char *from, int to_dirfd, const char *to)
{
    struct io_called call = io_begin(ctx, IO_CLONE_AT, to);
    return (int)io_end(&call, add_name(&call, from_dirfd, from, to_dirfd, to, true));
}

static int
memory_chmod(void *ctx, int fd, unsigned mode)
{
    struct io_called call = io_begin(ctx, IO_CHMOD, "");
    struct io_inode *inode = io_fd_file(call.fs, fd);

    if (inode != NULL && call.before == 0) {
        inode->mode = mode;
    }
    return (int)io_end(&call, inode == NULL ? -EBADF : 0);
}

static int
memory_rename_at(void *ctx, int dirfd, const char *from, const char *to)
{
    struct io_called call = io_begin(ctx, IO_RENAME_AT, to);
    int rc = change_names(&call, dirfd, from, to);

    if (rc != 0) {
        call.after = 0; /* there is no success whose reply could be lost */
    }
    return (int)io_end(&call, rc);
}

static int
memory_unlink_at(void *ctx, int dirfd, const char *name)
{
    struct io_called call = io_begin(ctx, IO_UNLINK_AT, name);
    int rc = change_names(&call, dirfd, name, "");

    if (rc != 0) {
        call.after = 0;
    }
    return (int)io_end(&call, rc);
}

/* Copies the names with a dot first (1), the others (2) or all (3) of the version the caller gets.
 * */
static size_t
copy_names(struct io_called *call, struct io_dir *dir, int which, bool stale,
           char (*names)[IO_MEMORY_NAME_BYTES], size_t cap)
{
    uint64_t *listed = &call->process->listed_version[dir - call->fs->dirs];
    const struct io_entries *entries = stale ? io_dir_version(dir, *listed) : &dir->entries;
    size_t count = 0;

    for (size_t i = 0; i < entries->count && count < cap; i++) {
        if ((which & (entries->items[i].name[0] == '.' ? 1 : 2)) != 0) {
            strcpy(names[count++], entries->items[i].name);
        }
    }
    if (!stale) {
        *listed = dir->version;
    }
    return count;
}

static int
memory_list(void *ctx, int dirfd, dcp_list_fn fn, void *fn_ctx)
{
    enum { MOST = 256 };
    struct io_memory_process *process = ctx;
    struct io_memory *fs = process->fs;
    int halves = fs->faults.torn_lists, rc = 0;
    char names[MOST][IO_MEMORY_NAME_BYTES];
    size_t count = 0;

    for (int half = 0; half < (halves == 0 ? 1 : 2) && rc == 0; half++) {
        struct io_called call = io_begin(ctx, IO_LIST, "");
        struct io_dir *dir = fd_dir(fs, dirfd);
        bool stale = false;

        rc = dir == NULL ? -EBADF : dir->removed ? -ENOENT : 0;
        if (rc == 0 && call.before == 0) {
            if (fs->faults.stale_lists && process->listed_version[dir - fs->dirs] < dir->version) {
                stale = pick(process, 2) == 1;
            }
            count += copy_names(&call, dir,
                                halves == 0   ? 3
                                : halves == 1 ? 1 + half
                                              : 2 - half,
                                stale, names + count, MOST - count);
        }
        for (size_t i = 0; i < count; i++) {
            io_note(&call, io_hash_bytes(names[i], strlen(names[i])));
        }
        rc = (int)io_end(&call, rc);
    }
    for (size_t i = 0; rc == 0 && i < count; i++) {
        rc = fn(fn_ctx, names[i]);
    }
    return rc;
}

/* ---- outside ---- */

struct io_memory_process *
io_memory_process(struct io_memory *fs, unsigned id)
{
    struct io_memory_process *process = &fs->processes[id];

    process->fs = fs;
    process->id = id;
    process->io = (struct dcp_io){
        .ctx = process,
        .mkdirs = memory_mkdirs,
        .open_dir = memory_open_dir,
        .dup_dir = memory_dup_dir,
        .open_at = memory_open_at,
        .close = memory_close,
        .chmod = memory_chmod,
        .link_at = memory_link_at,
        .clone_at = memory_clone_at,
        .rename_at = memory_rename_at,
        .unlink_at = memory_unlink_at,
        .list = memory_list,
    };
    io_bytes_calls(&process->io);
    io_queue_calls(&process->io);
    return process;
}

int
io_memory_rmdir(struct io_memory_process *process, const char *path)
{
    struct io_called call = io_begin(process, IO_UNLINK_AT, path);
    struct io_dir *dir = io_dir_find(call.fs, path);
    int rc = dir == NULL ? -ENOENT : dir->entries.count > 0 ? -ENOTEMPTY : 0;

    call.before = call.fs->crashed ? -EIO : 0;
    call.after = 0;
    if (rc == 0 && call.before == 0) {
        dir->removed = true;
        dir->version++;
    }
    return (int)io_end(&call, rc);
}

struct io_memory_faults *
io_memory_faults(struct io_memory *fs)
{
    return &fs->faults;
}

void
io_memory_set_dio(struct io_memory *fs, struct dcp_dio_align align)
{
    fs->dio = align;
}

void
io_memory_set_clones(struct io_memory *fs, bool can_clone)
{
    fs->without_clones = !can_clone;
}

uint64_t
io_memory_calls(const struct io_memory *fs)
{
    return fs->calls[IO_CALLS];
}

uint64_t
io_memory_calls_of(const struct io_memory *fs, enum io_call call)
{
    return fs->calls[call];
}

bool
io_memory_crashed(const struct io_memory *fs)
{
    return fs->crashed;
}

unsigned
io_memory_open_files(const struct io_memory *fs)
{
    unsigned open_count = 0;

    for (size_t i = 0; i < fs->fds_count; i++) {
        open_count += fs->fds[i].used;
    }
    return open_count;
}

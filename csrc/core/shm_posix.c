/*
 * shm_posix.c: the real table of shared memory: files in /dev/shm, and futexes in them.
 *
 * Files with a name and not memfds: another process reaches a memfd only through /proc/<pid>/fd,
 * which ptrace rules of containers forbid between siblings, and needs to be told of it; a name in
 * a directory is found by listing.  Only tmpfs will do: memory that another machine could see as
 * well (a shared file system mounted there) would be no common memory.
 *
 * Room is allocated by fallocate: a full /dev/shm (64 MiB by default in containers) is then
 * ENOSPC, and not a SIGBUS at the first touch.  Nothing but EINTR is retried.
 *
 * Threads: no state; any call from any thread.
 */
#include "dcp_shm.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "dcp_hash.h"

#define SHM_DIR "/dev/shm"

/* A small file of /proc: length, or -errno. */
static int
read_proc(const char *path, char *text, size_t cap)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t len;

    if (fd < 0) {
        return -errno;
    }
    do {
        len = read(fd, text, cap - 1);
    } while (len < 0 && errno == EINTR);
    if (len < 0) {
        len = -errno;
    } else {
        text[len] = '\0';
    }
    close(fd);
    return (int)len;
}

/* Whether /proc shows this process under the id that it has: that of another pid namespace cannot
 * say who is alive. */
static bool
proc_is_ours(void)
{
    char self[32];
    ssize_t len = readlink("/proc/self", self, sizeof self - 1);
    if (len <= 0) {
        return false;
    }
    self[len] = '\0';
    return strtol(self, NULL, 10) == (long)getpid();
}

static int
posix_host(void *ctx, struct dcp_shm_host *ret)
{
    struct {
        char boot_id[40];
        uint64_t pid_dev, pid_ino, shm_dev, shm_ino;
    } identity = {0};
    struct statfs fs;
    struct stat info;
    int len =
        read_proc("/proc/sys/kernel/random/boot_id", identity.boot_id, sizeof identity.boot_id);
    (void)ctx;

    if (len <= 0) {
        return len < 0 ? len : -ENODATA;
    }
    if (stat("/proc/self/ns/pid", &info) != 0) {
        return -errno;
    }
    if (!proc_is_ours()) {
        return -EOPNOTSUPP;
    }
    identity.pid_dev = info.st_dev;
    identity.pid_ino = info.st_ino;
    if (statfs(SHM_DIR, &fs) != 0 || stat(SHM_DIR, &info) != 0) {
        return -errno;
    }
    if (fs.f_type != TMPFS_MAGIC) {
        return -EOPNOTSUPP;
    }
    identity.shm_dev = info.st_dev;
    identity.shm_ino = info.st_ino;
    struct dcp_hash128 hash = dcp_hash128(&identity, sizeof identity, 0);
    memcpy(ret->id, &hash.lo, 8);
    memcpy(ret->id + 8, &hash.hi, 8);
    ret->pid = getpid();
    return 0;
}

/* Path of a segment; false when the name is none. */
static bool
path_of(const char *name, char path[PATH_MAX])
{
    int len = snprintf(path, PATH_MAX, "%s/%s", SHM_DIR, name);
    return len > 0 && len < PATH_MAX && strchr(name, '/') == NULL;
}

static int
posix_create(void *ctx, const char *name)
{
    char path[PATH_MAX];
    (void)ctx;

    if (!path_of(name, path)) {
        return -ENAMETOOLONG;
    }
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    return fd >= 0 ? fd : -errno;
}

static int
posix_open(void *ctx, const char *name)
{
    char path[PATH_MAX];
    struct stat info;
    int rc = 0;
    (void)ctx;

    if (!path_of(name, path)) {
        return -ENAMETOOLONG;
    }
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) {
        return -errno;
    }
    /* Names can be seen by everybody, so anybody could make one that looks like ours. */
    if (fstat(fd, &info) != 0) {
        rc = -errno;
    } else if (info.st_uid != geteuid() || !S_ISREG(info.st_mode)) {
        rc = -EPERM;
    }
    if (rc != 0) {
        close(fd);
        return rc;
    }
    return fd;
}

static int
posix_resize(void *ctx, int fd, uint64_t len)
{
    int rc;
    (void)ctx;

    if (len > INT64_MAX) {
        return -EFBIG;
    }
    do {
        rc = ftruncate(fd, (off_t)len) == 0 ? 0 : -errno;
    } while (rc == -EINTR);
    return rc;
}

static int
posix_allocate(void *ctx, int fd, uint64_t offset, uint64_t len)
{
    int rc;
    (void)ctx;

    if (offset > INT64_MAX || len > INT64_MAX) {
        return -EFBIG;
    }
    do {
        rc = fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len) == 0 ? 0 : -errno;
    } while (rc == -EINTR);
    return rc;
}

static int
posix_map(void *ctx, int fd, uint64_t len, void **ret_memory)
{
    struct stat info;
    (void)ctx;

    if (fstat(fd, &info) != 0) {
        return -errno;
    }
    if (info.st_size < 0 || len == 0 || len > (uint64_t)info.st_size) {
        return -EINVAL; /* pages behind the end would be a SIGBUS */
    }
    void *memory = mmap(NULL, (size_t)len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        return -errno;
    }
    /* A child that the trainer forks meanwhile must not keep the memory; core files need none of
     * it. */
    (void)madvise(memory, (size_t)len, MADV_DONTFORK);
    (void)madvise(memory, (size_t)len, MADV_DONTDUMP);
    *ret_memory = memory;
    return 0;
}

static void
posix_unmap(void *ctx, void *memory, uint64_t len)
{
    (void)ctx;
    (void)munmap(memory, (size_t)len);
}

static void
posix_close(void *ctx, int fd)
{
    (void)ctx;
    (void)close(fd);
}

static int
posix_unlink(void *ctx, const char *name)
{
    char path[PATH_MAX];
    (void)ctx;

    if (!path_of(name, path)) {
        return -ENAMETOOLONG;
    }
    return unlink(path) == 0 ? 0 : -errno;
}

static int
posix_list(void *ctx, dcp_list_fn fn, void *fn_ctx)
{
    int rc = 0;
    DIR *dir = opendir(SHM_DIR);
    (void)ctx;

    if (dir == NULL) {
        return -errno;
    }
    while (rc == 0) {
        errno = 0;
        const struct dirent *entry = readdir(dir);
        if (entry == NULL) {
            rc = -errno;
            break;
        }
        rc = fn(fn_ctx, entry->d_name);
    }
    closedir(dir);
    return rc;
}

static bool
posix_alive(void *ctx, int64_t pid)
{
    char path[64], text[512];
    (void)ctx;

    if (kill((pid_t)pid, 0) != 0) {
        return errno != ESRCH;
    }
    /* A killed process keeps its id until its parent looks: its state is behind the name, which
     * is in parentheses. */
    snprintf(path, sizeof path, "/proc/%lld/stat", (long long)pid);
    int len = read_proc(path, text, sizeof text);
    if (len == -ENOENT || len == -ESRCH) {
        return kill((pid_t)pid, 0) == 0 || errno != ESRCH; /* hidden is not gone */
    }
    const char *end = len > 0 ? strrchr(text, ')') : NULL;
    return end == NULL || end[1] != ' ' || (end[2] != 'Z' && end[2] != 'X');
}

static void
posix_wait(void *ctx, const void *word, uint32_t seen, uint64_t timeout_ns)
{
    struct timespec timeout = {.tv_sec = (time_t)(timeout_ns / 1000000000u),
                               .tv_nsec = (long)(timeout_ns % 1000000000u)};
    (void)ctx;
    (void)syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, NULL, 0);
}

static void
posix_wake(void *ctx, const void *word)
{
    (void)ctx;
    (void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static const struct dcp_shm posix_table = {
    .ctx = NULL,
    .host = posix_host,
    .create = posix_create,
    .open = posix_open,
    .resize = posix_resize,
    .allocate = posix_allocate,
    .map = posix_map,
    .unmap = posix_unmap,
    .close = posix_close,
    .unlink = posix_unlink,
    .list = posix_list,
    .alive = posix_alive,
    .wait = posix_wait,
    .wake = posix_wake,
};

const struct dcp_shm *
dcp_shm_posix(void)
{
    return &posix_table;
}

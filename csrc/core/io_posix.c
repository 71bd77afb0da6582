/*
 * io_posix.c: the real table: one system call per entry, results as the kernel gives them.
 *
 * With io_uring.c, which has the queue, and io_map.c, which lends pages, this is all of the core
 * that makes system calls on files and threads.  Nothing is retried and nothing is decided here,
 * so that what a test does to the in-memory table is all that can happen.  Two entries ask instead
 * of act, because the answer is not to be had from one call everywhere:
 *   dio_align  STATX_DIOALIGN (Linux 6.1) says what direct I/O needs; where kernel or file system
 *              do not answer, O_DIRECT is switched on and off as a probe, and 4096 is assumed.
 *   cached     cachestat (Linux 6.5) counts; else mincore over a mapping.
 * The structures of statx and cachestat are written out here: a build on old headers must not lose
 * them on a new kernel.
 *
 * Threads: no state; any call from any thread.
 */
#include "dcp_io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "dcp_limits.h"
#include "io_map.h"
#include "io_uring.h"

enum {
    DIRECTORY_MODE = 0777, /* less umask, as mkdir -p */
    FILE_MODE = 0666,      /* less umask */
    RAW_STATX_DIOALIGN = 0x2000,
    RAW_SYS_CACHESTAT = 451, /* the same number on every architecture */
    RAW_IOPRIO_WHO_PROCESS = 1,
    /* Mapped at a time for mincore, with room for one byte per page of 4 KiB or more. */
    MINCORE_BYTES = 32 << 20,
    MINCORE_PAGES = MINCORE_BYTES >> 12,
};

/* Of linux/magic.h; the headers of some systems lack some of them. */
static const uint32_t in_memory_magics[] = {
    0x01021994u, /* tmpfs, memfd */
    0x858458f6u, /* ramfs */
    0x958458f6u, /* hugetlbfs */
};

struct raw_statx {
    uint32_t mask;
    uint32_t before_dio[37]; /* everything up to and with the mount id */
    uint32_t dio_mem_align;
    uint32_t dio_offset_align;
    uint32_t spare[24];
};
_Static_assert(sizeof(struct raw_statx) == 256, "the kernel's struct statx is 256 bytes");
_Static_assert(offsetof(struct raw_statx, dio_mem_align) == 152, "place of stx_dio_mem_align");

struct raw_cachestat_range {
    uint64_t offset, len;
};

struct raw_cachestat {
    uint64_t cached_pages, dirty_pages, writeback_pages, evicted_pages, recently_evicted_pages;
};

static int
result(int rc)
{
    return rc < 0 ? -errno : rc;
}

/* The kernel's offsets are signed. */
static bool
range_is_bad(uint64_t offset, uint64_t len)
{
    return offset > INT64_MAX || len > (uint64_t)INT64_MAX - offset;
}

/* ---- names ---- */

static int
posix_mkdirs(void *ctx, const char *path)
{
    char part[PATH_MAX];
    size_t len = strlen(path);
    struct stat st;
    (void)ctx;

    if (stat(path, &st) == 0) {
        return S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
    }
    if (len == 0 || len >= sizeof part) {
        return len == 0 ? -ENOENT : -ENAMETOOLONG;
    }
    memcpy(part, path, len + 1);
    for (size_t i = 1; i <= len; i++) {
        if ((path[i] != '/' && path[i] != '\0') || path[i - 1] == '/') {
            continue;
        }
        part[i] = '\0';
        /* EEXIST: it was there, or another rank was faster. */
        if (mkdir(part, DIRECTORY_MODE) != 0 && errno != EEXIST) {
            return -errno;
        }
        part[i] = path[i];
    }
    if (stat(path, &st) != 0) {
        return -errno;
    }
    return S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
}

static int
posix_open_dir(void *ctx, const char *path)
{
    (void)ctx;
    return result(open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

static int
posix_dup_dir(void *ctx, int dirfd)
{
    (void)ctx;
    return result(fcntl(dirfd, F_DUPFD_CLOEXEC, 0));
}

/* Some file systems heed O_NONBLOCK in reads too, and answer EAGAIN for what takes a moment. */
static int
wait_in_reads(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags >= 0 && fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) == 0) {
        return fd;
    }
    int rc = -errno;
    close(fd);
    return rc;
}

static int
posix_open_at(void *ctx, int dirfd, const char *name, int flags, unsigned mode)
{
    (void)ctx;
    if ((flags & O_ACCMODE) == O_RDONLY) {
        /* Else a FIFO in the place of a file would be waited for.  EAGAIN: somebody's lease on a
         * file has to be broken first, which is worth the wait. */
        int fd = result(openat(dirfd, name, flags | O_NONBLOCK | O_CLOEXEC));

        if (fd != -EAGAIN) {
            return fd < 0 ? fd : wait_in_reads(fd);
        }
        flags &= ~O_NONBLOCK;
    }
    return result(openat(dirfd, name, flags | O_CLOEXEC, (mode_t)mode));
}

/* Linux frees the descriptor whatever close returns: it must not be tried again. */
static int
posix_close(void *ctx, int fd)
{
    (void)ctx;
    return result(close(fd));
}

static int
posix_link_at(void *ctx, int from_dirfd, const char *from, int to_dirfd, const char *to)
{
    (void)ctx;
    return result(linkat(from_dirfd, from, to_dirfd, to, 0));
}

static int
posix_clone_at(void *ctx, int from_dirfd, const char *from, int to_dirfd, const char *to)
{
    int from_fd = openat(from_dirfd, from, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    int to_fd, rc;
    (void)ctx;

    if (from_fd < 0) {
        return -errno;
    }
    to_fd = openat(to_dirfd, to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, FILE_MODE);
    rc = to_fd < 0 ? -errno : 0;
    if (rc == 0 && ioctl(to_fd, FICLONE, from_fd) != 0) {
        /* What file systems without reflink say; "invalid" where the two ends differ too much. */
        rc = errno == ENOTTY || errno == EINVAL || errno == EBADF ? -EOPNOTSUPP : -errno;
    }
    if (to_fd >= 0 && close(to_fd) != 0 && rc == 0) {
        rc = -errno;
    }
    if (to_fd >= 0 && rc != 0) {
        (void)unlinkat(to_dirfd, to, 0);
    }
    close(from_fd);
    return rc;
}

static int
posix_rename_at(void *ctx, int dirfd, const char *from, const char *to)
{
    (void)ctx;
    return result(renameat(dirfd, from, dirfd, to));
}

static int
posix_unlink_at(void *ctx, int dirfd, const char *name)
{
    (void)ctx;
    return result(unlinkat(dirfd, name, 0));
}

/* A fresh description each time: one shared by dup_dir would share the position of the walk too. */
static int
posix_list(void *ctx, int dirfd, dcp_list_fn fn, void *fn_ctx)
{
    int fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = 0;
    DIR *dir;
    (void)ctx;

    if (fd < 0) {
        return -errno;
    }
    dir = fdopendir(fd);
    if (dir == NULL) {
        rc = -errno;
        close(fd);
        return rc;
    }
    while (rc == 0) {
        errno = 0;
        const struct dirent *entry = readdir(dir);
        if (entry == NULL) {
            rc = -errno;
            break;
        }
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            rc = fn(fn_ctx, entry->d_name);
        }
    }
    closedir(dir);
    return rc;
}

/* ---- bytes ---- */

static ssize_t
posix_pread(void *ctx, int fd, void *buf, size_t len, uint64_t offset)
{
    ssize_t n;
    (void)ctx;

    if (range_is_bad(offset, len)) {
        return -EINVAL;
    }
    n = pread(fd, buf, len, (off_t)offset);
    return n < 0 ? -errno : n;
}

static ssize_t
posix_pwrite(void *ctx, int fd, const void *buf, size_t len, uint64_t offset)
{
    ssize_t n;
    (void)ctx;

    if (range_is_bad(offset, len)) {
        return -EFBIG;
    }
    n = pwrite(fd, buf, len, (off_t)offset);
    return n < 0 ? -errno : n;
}

static int
posix_fallocate_keep_size(void *ctx, int fd, uint64_t offset, uint64_t len)
{
    (void)ctx;
    if (range_is_bad(offset, len)) {
        return -EFBIG;
    }
    if (fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len) == 0) {
        return 0;
    }
    return errno == ENOSYS ? -EOPNOTSUPP : -errno;
}

static int
posix_truncate(void *ctx, int fd, uint64_t len)
{
    (void)ctx;
    return range_is_bad(len, 0) ? -EFBIG : result(ftruncate(fd, (off_t)len));
}

static int
posix_fdatasync(void *ctx, int fd)
{
    (void)ctx;
    return result(fdatasync(fd));
}

static int
posix_fsync(void *ctx, int fd)
{
    (void)ctx;
    return result(fsync(fd));
}

static int
posix_chmod(void *ctx, int fd, unsigned mode)
{
    (void)ctx;
    return result(fchmod(fd, (mode_t)mode));
}

static int
posix_flush_range(void *ctx, int fd, uint64_t offset, uint64_t len, bool wait_and_drop)
{
    unsigned flags = SYNC_FILE_RANGE_WRITE;
    (void)ctx;

    if (range_is_bad(offset, len)) {
        return -EINVAL;
    }
    if (wait_and_drop) {
        flags |= SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
    }
    if (sync_file_range(fd, (off_t)offset, (off_t)len, flags) != 0) {
        return -errno;
    }
    if (wait_and_drop) {
        (void)posix_fadvise(fd, (off_t)offset, (off_t)len, POSIX_FADV_DONTNEED); /* advice */
    }
    return 0;
}

/* ---- questions ---- */

static int
posix_fstat(void *ctx, int fd, struct dcp_stat *ret)
{
    struct stat st;
    int64_t ns;
    (void)ctx;

    if (fstat(fd, &st) != 0) {
        return -errno;
    }
    if (__builtin_mul_overflow((int64_t)st.st_mtim.tv_sec, 1000000000, &ns) ||
        __builtin_add_overflow(ns, (int64_t)st.st_mtim.tv_nsec, &ns)) {
        ns = st.st_mtim.tv_sec < 0 ? INT64_MIN : INT64_MAX;
    }
    ret->size_bytes = (uint64_t)st.st_size;
    ret->is_dir = S_ISDIR(st.st_mode);
    ret->links = st.st_nlink > UINT32_MAX ? UINT32_MAX : (uint32_t)st.st_nlink;
    ret->mode = st.st_mode & 07777;
    ret->mtime_ns = ns;
    return 0;
}

static int
posix_set_direct(void *ctx, int fd, bool on)
{
    int flags = fcntl(fd, F_GETFL);
    (void)ctx;

    if (flags < 0) {
        return -errno;
    }
    return result(fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT));
}

/* True where the kernel answers; mem_bytes 0 means that it said no. */
static bool
ask_dio_align(int fd, struct dcp_dio_align *ret)
{
    struct raw_statx stx;

    memset(&stx, 0, sizeof stx);
    if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, RAW_STATX_DIOALIGN, &stx) != 0 ||
        (stx.mask & RAW_STATX_DIOALIGN) == 0) {
        return false;
    }
    ret->mem_bytes = stx.dio_offset_align == 0 ? 0 : stx.dio_mem_align;
    ret->offset_bytes = stx.dio_mem_align == 0 ? 0 : stx.dio_offset_align;
    return true;
}

static int
posix_dio_align(void *ctx, int fd, struct dcp_dio_align *ret)
{
    struct dcp_dio_align align = {0};
    struct statfs fs;
    int flags;

    if (fstatfs(fd, &fs) != 0) {
        return -errno;
    }
    for (size_t i = 0; i < sizeof in_memory_magics / sizeof in_memory_magics[0]; i++) {
        align.in_memory = align.in_memory || (uint32_t)fs.f_type == in_memory_magics[i];
    }
    if (!ask_dio_align(fd, &align)) {
        flags = fcntl(fd, F_GETFL);
        if (flags < 0) {
            return -errno;
        }
        if ((flags & O_DIRECT) != 0 || posix_set_direct(ctx, fd, true) == 0) {
            align.mem_bytes = DCP_DIRECT_ALIGN_BYTES;
            align.offset_bytes = DCP_DIRECT_ALIGN_BYTES;
            if (fcntl(fd, F_SETFL, flags) != 0) {
                return -errno;
            }
        }
    }
    *ret = align;
    return 0;
}

/* Counts resident pages of [offset, end); both are multiples of the page or the end of the file. */
static int
count_by_mincore(int fd, uint64_t offset, uint64_t end, uint64_t page_bytes, uint64_t *ret_pages)
{
    unsigned char resident[MINCORE_PAGES];
    uint64_t pages = 0;

    while (offset < end) {
        size_t len = (size_t)dcp_min_u64(end - offset, MINCORE_BYTES);
        size_t count = (size_t)(dcp_align_up(len, page_bytes) / page_bytes);
        void *map = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, (off_t)offset);
        int rc;

        if (map == MAP_FAILED) {
            return -errno;
        }
        rc = mincore(map, len, resident) == 0 ? 0 : -errno;
        munmap(map, len);
        if (rc != 0) {
            return rc;
        }
        for (size_t i = 0; i < count; i++) {
            pages += resident[i] & 1u;
        }
        offset += len;
    }
    *ret_pages = pages;
    return 0;
}

static int
posix_cached(void *ctx, int fd, uint64_t offset, uint64_t len)
{
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t end, total, pages;
    struct raw_cachestat_range range;
    struct raw_cachestat counts;
    struct stat st;
    (void)ctx;

    if (range_is_bad(offset, len)) {
        return -EINVAL;
    }
    if (fstat(fd, &st) != 0) {
        return -errno;
    }
    end = dcp_min_u64(offset + len, (uint64_t)st.st_size);
    if (offset >= end) {
        return 0;
    }
    offset -= offset % page_bytes;
    total = dcp_align_up(end - offset, page_bytes) / page_bytes;
    range.offset = offset;
    range.len = end - offset;
    if (syscall(RAW_SYS_CACHESTAT, fd, &range, &counts, 0) == 0) {
        pages = counts.cached_pages;
    } else if (errno != ENOSYS && errno != EPERM && errno != EOPNOTSUPP) {
        return -errno;
    } else {
        int rc = count_by_mincore(fd, offset, end, page_bytes, &pages);
        if (rc != 0) {
            return rc == -ENODEV ? -ENOSYS : rc;
        }
    }
    return (int)(dcp_min_u64(pages, total) * 100 / total);
}

static int
posix_space(void *ctx, int dirfd, struct dcp_space *ret)
{
    struct statvfs fs;
    (void)ctx;

    if (fstatvfs(dirfd, &fs) != 0) {
        return -errno;
    }
    if (dcp_mul_overflows_u64(fs.f_bavail, fs.f_frsize, &ret->free_bytes)) {
        ret->free_bytes = UINT64_MAX;
    }
    return 0;
}

/* ---- threads and time ---- */

/* On Linux 0 names the calling thread, not its process. */
static int
posix_thread_priority(void *ctx, int nice, unsigned io_priority)
{
    (void)ctx;

    if (nice > 0) {
        errno = 0;
        int now = getpriority(PRIO_PROCESS, 0);
        if (now == -1 && errno != 0) {
            return -errno;
        }
        if (now < nice && setpriority(PRIO_PROCESS, 0, nice) != 0) {
            return -errno;
        }
    }
    if (io_priority != 0 &&
        syscall(SYS_ioprio_set, RAW_IOPRIO_WHO_PROCESS, 0, (int)io_priority) != 0) {
        return -errno;
    }
    return 0;
}

static uint64_t
posix_now_ns(void *ctx)
{
    struct timespec now;
    (void)ctx;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void
posix_sleep_ns(void *ctx, uint64_t ns)
{
    struct timespec span = {.tv_sec = (time_t)(ns / 1000000000u),
                            .tv_nsec = (long)(ns % 1000000000u)};
    (void)ctx;

    (void)nanosleep(&span, NULL);
}

static const struct dcp_io posix_table = {
    .ctx = NULL,
    .mkdirs = posix_mkdirs,
    .open_dir = posix_open_dir,
    .dup_dir = posix_dup_dir,
    .open_at = posix_open_at,
    .close = posix_close,
    .pread = posix_pread,
    .pwrite = posix_pwrite,
    .fallocate = posix_fallocate_keep_size,
    .truncate = posix_truncate,
    .fdatasync = posix_fdatasync,
    .fsync = posix_fsync,
    .fstat = posix_fstat,
    .dio_align = posix_dio_align,
    .set_direct = posix_set_direct,
    .flush_range = posix_flush_range,
    .cached = posix_cached,
    .space = posix_space,
    .chmod = posix_chmod,
    .link_at = posix_link_at,
    .clone_at = posix_clone_at,
    .rename_at = posix_rename_at,
    .unlink_at = posix_unlink_at,
    .list = posix_list,
    .queue_open = dcp_uring_open,
    .queue_write = dcp_uring_write,
    .queue_reap = dcp_uring_reap,
    .queue_close = dcp_uring_close,
    .map = dcp_map_lend,
    .unmap = dcp_map_return,
    .thread_priority = posix_thread_priority,
    .now_ns = posix_now_ns,
    .sleep_ns = posix_sleep_ns,
};

const struct dcp_io *
dcp_io_posix(void)
{
    return &posix_table;
}

/*
 * dcp_io.h: the table of system calls through which every file operation of the core goes.
 *
 * The real table is dcp_io_posix(); tests have one in memory that makes short writes, EINTR,
 * ENOSPC, EIO, reordering and crashes from one seed.  Results are those of the system call,
 * failures -errno.  No call retries: callers do. Names are relative to a directory descriptor; the
 * directory is opened once.
 */
#ifndef DCP_IO_H
#define DCP_IO_H

#include <sys/types.h>

#include "dcp_alloc.h"
#include "dcp_error.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dcp_stat {
    uint64_t size_bytes;
    bool is_dir;
    uint32_t links; /* 0: the file was removed */
    uint32_t mode;  /* permission bits */
    int64_t mtime_ns;
};

struct dcp_dio_align {
    uint32_t mem_bytes;    /* alignment of memory; 0: direct I/O is not possible */
    uint32_t offset_bytes; /* alignment of offsets and lengths */
    bool in_memory;        /* tmpfs and the like: direct I/O gains nothing */
};

struct dcp_space {
    uint64_t free_bytes; /* for this user */
};

/* Called for each name of a directory, "." and ".." left out; non-zero stops the walk and is
 * returned. */
typedef int (*dcp_list_fn)(void *ctx, const char *name);

/* A queue of writes that run beside their caller.  It belongs to the thread that opened it. */
struct dcp_io_queue;

struct dcp_io_write {
    int fd;
    const void *buf; /* stays as it is until the write was reaped */
    size_t len;
    uint64_t offset;
    uint64_t tag;         /* comes back with the result */
    unsigned io_priority; /* as ioprio_set(2) takes it; 0: that of the thread */
};

struct dcp_io_done {
    uint64_t tag;
    ssize_t result; /* of the pwrite */
};

struct dcp_io {
    void *ctx;
    int (*mkdirs)(void *ctx, const char *path);   /* like mkdir -p; 0 when it exists */
    int (*open_dir)(void *ctx, const char *path); /* descriptor */
    int (*dup_dir)(void *ctx, int dirfd);         /* descriptor */
    int (*open_at)(void *ctx, int dirfd, const char *name, int flags,
                   unsigned mode); /* descriptor; O_CLOEXEC added */
    int (*close)(void *ctx, int fd);
    ssize_t (*pread)(void *ctx, int fd, void *buf, size_t len, uint64_t offset);
    ssize_t (*pwrite)(void *ctx, int fd, const void *buf, size_t len, uint64_t offset);
    int (*fallocate)(void *ctx, int fd, uint64_t offset,
                     uint64_t len); /* keeps the size; -EOPNOTSUPP where missing */
    int (*truncate)(void *ctx, int fd, uint64_t len);
    int (*fdatasync)(void *ctx, int fd);
    int (*fsync)(void *ctx, int fd); /* of a file or a directory */
    int (*fstat)(void *ctx, int fd, struct dcp_stat *ret);
    int (*dio_align)(void *ctx, int fd, struct dcp_dio_align *ret);
    int (*set_direct)(void *ctx, int fd,
                      bool on); /* O_DIRECT by fcntl; -EINVAL where it can't be */
    int (*flush_range)(void *ctx, int fd, uint64_t offset, uint64_t len,
                       bool wait_and_drop); /* sync_file_range, DONTNEED */
    int (*cached)(void *ctx, int fd, uint64_t offset,
                  uint64_t len); /* percent of the range in the page cache; -ENOSYS */
    int (*space)(void *ctx, int dirfd, struct dcp_space *ret);
    int (*chmod)(void *ctx, int fd, unsigned mode);
    int (*link_at)(void *ctx, int from_dirfd, const char *from, int to_dirfd, const char *to);
    /* A new file (O_EXCL) that shares the bytes of another until one of them is written to:
     * FICLONE. -EOPNOTSUPP where the file system cannot.  No file is left behind on failure. */
    int (*clone_at)(void *ctx, int from_dirfd, const char *from, int to_dirfd, const char *to);
    int (*rename_at)(void *ctx, int dirfd, const char *from, const char *to);
    int (*unlink_at)(void *ctx, int dirfd, const char *name);
    int (*list)(void *ctx, int dirfd, dcp_list_fn fn, void *fn_ctx);

    /* Writes in flight: all four, or NULL.  queue_open: -ENOSYS and the like where there are none;
     * at most `depth` writes are in flight.  queue_write: 0, or the write did not start.
     * queue_reap: 1 with one result, in any order, 0 when there was none in time.  queue_close:
     * only with nothing in flight. */
    int (*queue_open)(void *ctx, unsigned depth, struct dcp_io_queue **ret_queue);
    int (*queue_write)(void *ctx, struct dcp_io_queue *queue, const struct dcp_io_write *write);
    int (*queue_reap)(void *ctx, struct dcp_io_queue *queue, uint64_t timeout_ns,
                      struct dcp_io_done *ret);
    void (*queue_close)(void *ctx, struct dcp_io_queue *queue);

    /* Bytes of a file as the page cache has them, without a copy: both, or NULL.  map: brings them
     * in; whoever is refused reads them.  unmap: by the thread that mapped; -EIO: some could not be
     * had while they were mapped (cut short, device) and read as zero. */
    int (*map)(void *ctx, int fd, uint64_t offset, size_t len, const uint8_t **ret);
    int (*unmap)(void *ctx, const uint8_t *bytes, size_t len);

    /* Of the calling thread.  `nice` only ever rises; 0 for either number leaves it. */
    int (*thread_priority)(void *ctx, int nice, unsigned io_priority);
    uint64_t (*now_ns)(void *ctx);            /* monotonic */
    void (*sleep_ns)(void *ctx, uint64_t ns); /* may end early */
};

const struct dcp_io *dcp_io_posix(void);

/* Whole-buffer helpers over any table: EINTR and short counts are continued; 0 bytes from pwrite is
 * EIO. */
int dcp_io_read_all(const struct dcp_io *io, int fd, void *buf, size_t len, uint64_t offset,
                    const char *path, struct dcp_error *err)
    DCP_MUST_CHECK; /* a file that ends early is DCP_E_CORRUPT */
int dcp_io_write_all(const struct dcp_io *io, int fd, const void *buf, size_t len, uint64_t offset,
                     const char *path, struct dcp_error *err) DCP_MUST_CHECK;
/* Whether `name` can be opened for reading. */
bool dcp_io_exists(const struct dcp_io *io, int dirfd, const char *name);
/* fsync of a file or a directory: 0 or -errno. */
int dcp_io_sync(const struct dcp_io *io, int fd) DCP_MUST_CHECK;
/* Reads a file of at most `max_bytes` whole into *buf (appends). DCP_E_NOENT when it is not there.
 */
int dcp_io_read_file(const struct dcp_io *io, int dirfd, const char *name, uint64_t max_bytes,
                     struct dcp_buf *buf, struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif

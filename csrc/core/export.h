/*
 * export.h: private: what the files of the export share.
 *
 * export_file.c opens files, puts bytes into them and makes them durable; export_stream.c collects
 * bytes in buffers and hands them to the writing thread; export_write.c turns boxes into bytes,
 * export_join.c bytes of other files into tensors; export_publish.c has the names.
 * A struct dcp_export_out is made by the thread that fills buffers and belongs to the writing
 * thread from its first job to its last.
 */
#ifndef DCP_CORE_EXPORT_H
#define DCP_CORE_EXPORT_H

#include "dcp_export.h"
#include "rate.h"
#include "ring.h"

/* Runs of a file that are shorter go through the page cache, where neighbours meet again. */
enum { DCP_EXPORT_DIRECT_LEAST_BYTES = 64 << 10 };

struct dcp_export_dir {
    const struct dcp_io *io;
    const char *path; /* borrows */
    int fd;
};

/* One file that is written to.  The ranges of other ranks end anywhere, so whole pages of a range
 * are written with direct I/O and the pages that it shares through the page cache. */
struct dcp_export_out {
    const struct dcp_export_file *what; /* borrows */
    int fd;                             /* through the page cache */
    int direct_fd;                      /* -1: there is no direct I/O */
    bool in_memory;                     /* a file system in memory: there is nothing to flush */
    uint64_t flushed_bytes;             /* what lies before is on its way out of the page cache */
    uint64_t unflushed_bytes;           /* written through the page cache since */
};

/* Rows of equal length and distance. */
struct dcp_export_rows {
    uint64_t row_bytes, stride_bytes;
};

struct dcp_export {
    struct dcp_export_dir dir;
    const struct dcp_engine_options *options; /* borrows */
    struct dcp_ring *ring;
    struct dcp_pump pump;
    struct dcp_rate rate;
    struct dcp_export_out *out; /* of the buffer being filled; owned until its close job */
    uint64_t jobs[DCP_RING_MOST_BUFFERS]; /* the last one of each buffer, + 1; 0: none */
    struct dcp_export_rows rows[DCP_RING_MOST_BUFFERS];
    uint32_t slot;         /* of the buffer being filled */
    uint64_t base_bytes;   /* where the buffer begins in the file: a multiple of a page */
    uint64_t from_bytes;   /* first and ... */
    uint64_t filled_bytes; /* ... last of the bytes in the buffer, from its begin */
    bool slot_is_free;     /* the buffer was waited for */
    struct dcp_export_stats stats;
};

/* ---- export_file.c ---- */

int dcp_export_dir_open(struct dcp_export_dir *dir, const struct dcp_io *io, const char *path,
                        struct dcp_error *err) DCP_MUST_CHECK;
void dcp_export_dir_close(struct dcp_export_dir *dir);
/* Fills *err: "`what` `name` failed" with the reason and what to do. */
int dcp_export_fail(const struct dcp_export_dir *dir, const char *name, int sys_errno,
                    const char *what, struct dcp_error *err);
/* The same of bytes that did not become durable. */
int dcp_export_fail_sync(const struct dcp_export_dir *dir, const char *name, int sys_errno,
                         const char *what, struct dcp_error *err);
int dcp_export_fstat(const struct dcp_export_dir *dir, int fd, const char *name,
                     struct dcp_stat *ret, struct dcp_error *err) DCP_MUST_CHECK;
int dcp_export_check_cancel(atomic_int *cancel, struct dcp_error *err) DCP_MUST_CHECK;
/* Opens a file that was created for this export. */
int dcp_export_out_open(const struct dcp_export_dir *dir, const struct dcp_export_file *what,
                        enum dcp_direct direct, struct dcp_export_out **ret_out,
                        struct dcp_error *err) DCP_MUST_CHECK;
/* Writes data[offset % page ...) to [offset, offset + len): data is the memory of the page that
 * `offset` lies in. */
int dcp_export_out_range(const struct dcp_export_dir *dir, struct dcp_export_out *out,
                         const uint8_t *page, uint64_t offset, uint64_t len,
                         struct dcp_export_stats *stats, struct dcp_error *err) DCP_MUST_CHECK;
int dcp_export_out_rows(const struct dcp_export_dir *dir, struct dcp_export_out *out,
                        const uint8_t *data, uint64_t offset, uint64_t len,
                        const struct dcp_export_rows *rows, struct dcp_export_stats *stats,
                        struct dcp_error *err) DCP_MUST_CHECK;
/* Closes and frees it; with `sync` its bytes are durable when this is 0. */
int dcp_export_out_close(const struct dcp_export_dir *dir, struct dcp_export_out *out, bool sync,
                         struct dcp_export_stats *stats, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- export_stream.c ---- */

int dcp_export_begin(struct dcp_export *run, const struct dcp_io *io, const char *dir_path,
                     const struct dcp_engine_options *options,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* What is put from now on goes to this file; the one before is ended. */
int dcp_export_enter(struct dcp_export *run, const struct dcp_export_file *what,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* Room for the bytes at `offset_bytes`: at least one, at most `want`.  The caller fills it before
 * the next call.  A failure is the writing thread's, which keeps the error until the end. */
int dcp_export_room(struct dcp_export *run, uint64_t offset_bytes, uint64_t want, uint8_t **ret,
                    uint64_t *ret_len) DCP_MUST_CHECK;
/* A whole buffer for rows; given back by dcp_export_push_rows.  Fails in the same way. */
int dcp_export_rows_room(struct dcp_export *run, uint8_t **ret) DCP_MUST_CHECK;
void dcp_export_push_rows(struct dcp_export *run, uint64_t offset_bytes, uint64_t len,
                          const struct dcp_export_rows *rows);
/* Ends the file that was entered, waits for the writing thread, frees everything.  `rc`: what the
 * run came to so far; the result is it, or the writing thread's failure. */
int dcp_export_end(struct dcp_export *run, int rc, struct dcp_export_stats *ret_stats,
                   struct dcp_error *err) DCP_MUST_CHECK;

#endif

/*
 * io_memory.h: struct dcp_io in memory, which does on demand what real disks do once in a lifetime.
 *
 * A file system of a few directories and files, each with two states: volatile (what calls see) and
 * durable (what a power cut leaves).  fsync carries bytes of a file, or names of a directory, from
 * the first to the second.  A power cut keeps the durable state plus a seeded, arbitrary choice of
 * what was not synced yet: each 512-byte block, each length, each create, rename and unlink for
 * itself. That is weaker than what any journaling file system promises, so what holds here holds
 * there.
 *
 * Several simulated processes share one file system; each has its own table.  A hook before every
 * call lets a scheduler interleave them, a second one chooses among the results a call might have.
 * Everything else comes from one seed.
 *
 * Threads: calls are serialised by a mutex, the hooks run outside of it.
 */
#ifndef IO_MEMORY_H
#define IO_MEMORY_H

#include "dcp_io.h"

enum io_call {
    IO_MKDIRS,
    IO_OPEN_DIR,
    IO_DUP_DIR,
    IO_OPEN_AT,
    IO_CLOSE,
    IO_PREAD,
    IO_PWRITE,
    IO_FALLOCATE,
    IO_TRUNCATE,
    IO_FDATASYNC,
    IO_FSYNC,
    IO_FSTAT,
    IO_DIO_ALIGN,
    IO_SET_DIRECT,
    IO_FLUSH_RANGE,
    IO_CACHED,
    IO_SPACE,
    IO_CHMOD,
    IO_LINK_AT,
    IO_CLONE_AT,
    IO_RENAME_AT,
    IO_UNLINK_AT,
    IO_LIST,
    IO_QUEUE_OPEN,
    IO_QUEUE_WRITE,
    IO_QUEUE_REAP,
    IO_MAP,
    IO_THREAD_PRIORITY,
    IO_CALLS, /* how many kinds there are; as fail_call: any */
};

enum {
    IO_MEMORY_BLOCK_BYTES = 512,
    IO_MEMORY_NAME_BYTES = 96,
    IO_MEMORY_DIRS = 4,
    IO_MEMORY_PROCESSES = 8,
};

/* All zero but `space_bytes` and `crash_at`, which io_memory_new sets to "never". */
struct io_memory_faults {
    unsigned short_percent; /* of preads and pwrites that move only a part */
    unsigned eintr_percent; /* of calls that may be interrupted */
    uint64_t space_bytes;   /* the disk's size */
    uint64_t name_bytes;    /* of it, that each name takes */
    int full_errno;         /* what a full disk says; 0: ENOSPC */
    unsigned limited;       /* 1 + the only process whose files count and are limited; 0: all */
    bool hides_space;       /* the disk does not tell how much is free, as quotas do not */
    int fail_call;          /* enum io_call */
    uint64_t fail_nth;      /* the n-th such call from now on fails, 1 is the next; 0: none */
    int fail_errno;
    bool fail_after_effect; /* ... after it took effect: the reply was lost */
    uint64_t crash_at;      /* calls from now on until the power is gone; then all give -EIO */
    bool stale_lists;       /* lists may show the directory as it was after our last change of it */
    int torn_lists;         /* 1: names with a dot first, the others later; 2: vice versa */
    unsigned lost_replies;  /* renames and unlinks, from now on, whose reply may be lost */
    bool no_queue;          /* queue_open gives -ENOSYS */
    unsigned delay_percent; /* of reaps that find nothing in time; 100: nothing ever ends */
    int queue_errno;        /* of every write in the queue, from now on: it ends with -errno; 0 */
    unsigned oversleep_us;  /* most that a sleep ends late */
    unsigned cached_percent; /* what the page cache holds of every file */
    uint64_t lose_map;       /* the n-th map from now on is lost while it is used; 0: none */
};

struct io_memory;

/* One simulated process.  `io` is its table. */
struct io_memory_process {
    struct dcp_io io;
    struct io_memory *fs;
    unsigned id;
    /* May be NULL.  `name` is "" where a call has none. */
    void (*before)(struct io_memory_process *process, enum io_call call, const char *name);
    /* Picks one of `count` possible results; NULL: always the first, which is the plain one. */
    int (*choose)(struct io_memory_process *process, int count);
    void *hook_ctx;
    /* Hash of every call and all that it told this process: two processes running the same code
     * are in the same state when their histories are equal. */
    uint64_t history;
    unsigned files_made;
    uint64_t listed_version[IO_MEMORY_DIRS]; /* the oldest state that a stale list may show */
};

struct io_memory *io_memory_new(uint64_t seed);
void io_memory_free(struct io_memory *fs);
struct io_memory_faults *io_memory_faults(struct io_memory *fs);
struct io_memory_process *io_memory_process(struct io_memory *fs, unsigned id);

/* What direct I/O asks for; mem_bytes 0: there is none. */
void io_memory_set_dio(struct io_memory *fs, struct dcp_dio_align align);
/* Off: clone_at is -EOPNOTSUPP, as on most file systems.  On at first. */
void io_memory_set_clones(struct io_memory *fs, bool can_clone);

/* Ends every process; with `power_cut` only the durable state and a choice of the rest survive.
 * Faults are cleared. */
void io_memory_reboot(struct io_memory *fs, bool power_cut, uint64_t seed);

/* rmdir, which the table lacks: 0, -ENOTEMPTY, -ENOENT. */
int io_memory_rmdir(struct io_memory_process *process, const char *path);

/* Time stands still but for sleeps and for waits that end without a result. */
uint64_t io_memory_now_ns(const struct io_memory *fs);
uint64_t io_memory_longest_sleep_ns(const struct io_memory *fs);
unsigned io_memory_open_queues(const struct io_memory *fs);
/* Bytes of files that were mapped and not given back. */
unsigned io_memory_lent_maps(const struct io_memory *fs);

uint64_t io_memory_calls(const struct io_memory *fs); /* so far, of all kinds */
uint64_t io_memory_calls_of(const struct io_memory *fs, enum io_call call);
bool io_memory_crashed(const struct io_memory *fs);
unsigned io_memory_open_files(const struct io_memory *fs); /* descriptors that are open */
/* Of the disk, by files that this process made; -1: by all. */
uint64_t io_memory_used_bytes(const struct io_memory *fs, int process_id);
/* fsyncs that said yes of a file whose fsync had failed before. */
uint64_t io_memory_vain_syncs(const struct io_memory *fs);
uint64_t io_memory_state_hash(const struct io_memory *fs); /* of names and contents, volatile */

/* Looks from outside: no call is counted, no fault hits. */
uint64_t io_memory_version(const struct io_memory *fs); /* counts changes of names */
bool io_memory_dir_removed(const struct io_memory *fs, const char *path);
size_t io_memory_names_count(const struct io_memory *fs, const char *path);
const char *io_memory_name(const struct io_memory *fs, const char *path, size_t i); /* sorted */
/* Borrowed; NULL when there is no such file. */
const uint8_t *io_memory_file(const struct io_memory *fs, const char *path, const char *name,
                              size_t *ret_len);
/* Permission bits of the last chmod; 0: there was none. */
unsigned io_memory_file_mode(const struct io_memory *fs, const char *path, const char *name);
/* Puts a durable file there. */
void io_memory_put_file(struct io_memory *fs, const char *path, const char *name, const void *data,
                        size_t len);

#endif

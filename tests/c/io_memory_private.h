/*
 * io_memory_private.h: the state behind io_memory.h (io_memory.c and io_memory_bytes.c have
 * the calls, io_memory_state.c the rest).
 */
#ifndef IO_MEMORY_PRIVATE_H
#define IO_MEMORY_PRIVATE_H

#include <pthread.h>

#include "io_memory.h"

/* A file.  Lives until io_memory_free: descriptors, names and logs point at it. */
struct io_inode {
    struct io_inode *next;
    uint64_t label; /* which process made it as its how-manieth: the same in every schedule */
    uint8_t *data, *durable;
    size_t len, durable_len, cap; /* both buffers have `cap` bytes, zero behind their length */
    size_t allocated;             /* by fallocate */
    uint8_t *dirty;               /* per block: differs from `durable` since the last fsync */
    unsigned names, opens;
    unsigned mode; /* by chmod */
    bool sync_failed;
    uint64_t hash; /* of data; 0: not known */
};

struct io_entry {
    char name[IO_MEMORY_NAME_BYTES];
    struct io_inode *inode;
};

struct io_entries {
    struct io_entry *items; /* sorted by name */
    size_t count, cap;
};

/* A change of names that no fsync has made durable yet.  `from` or `to` is empty for creations and
 * removals. */
struct io_change {
    char from[IO_MEMORY_NAME_BYTES], to[IO_MEMORY_NAME_BYTES];
    struct io_inode *inode;
};

struct io_dir {
    char path[IO_MEMORY_NAME_BYTES];
    bool used, removed;
    struct io_entries entries, durable;
    struct io_change *changes;
    size_t changes_count, changes_cap;
    uint64_t version;           /* counts changes of names */
    struct io_entries *history; /* of each version, when lists may be stale */
    size_t history_cap;
};

struct io_fd {
    bool used, direct;
    struct io_inode *inode; /* NULL: a directory */
    struct io_dir *dir;     /* NULL for the parent of all directories, and for files */
    int flags;
};

struct io_memory {
    pthread_mutex_t mutex;
    uint64_t random;
    struct io_memory_faults faults;
    struct dcp_dio_align dio;
    bool crashed, without_clones;
    uint64_t calls[IO_CALLS + 1]; /* the last counts all */
    struct io_inode *inodes;
    struct io_dir dirs[IO_MEMORY_DIRS];
    struct io_fd *fds;
    size_t fds_count;
    uint64_t vain_syncs;
    struct io_memory_process processes[IO_MEMORY_PROCESSES];
    uint64_t now_ns, longest_sleep_ns;
    unsigned open_queues, lent_maps;
    const uint8_t *lost_map; /* the one that was lost */
};

/* Descriptors start at 3, so that a forgotten 0 is noticed. */
enum { IO_FIRST_FD = 3 };

/* What io_begin found out about a call. */
struct io_called {
    struct io_memory_process *process;
    struct io_memory *fs;
    enum io_call kind;
    int before; /* not 0: this is the result, without an effect */
    int after;  /* not 0: this is the result, after the effect */
};

/* Every call is io_begin, an effect if `before` is 0, io_end with its result.  The lock is held
 * between the two. */
struct io_called io_begin(void *ctx, enum io_call kind, const char *name);
ssize_t io_end(struct io_called *call, ssize_t rc);
/* Something that the call told its process. */
void io_note(struct io_called *call, uint64_t value);
/* Whether the disk has room for so many more bytes of a file that the process made; the error of
 * one that has not. */
uint64_t io_room(const struct io_memory *fs, unsigned process_id);
int io_full(const struct io_memory *fs);
struct io_fd *io_fd_get(struct io_memory *fs, int fd);     /* NULL: no such descriptor */
struct io_inode *io_fd_file(struct io_memory *fs, int fd); /* NULL: not of a file */
/* Puts the calls of io_memory_bytes.c into a table. */
void io_bytes_calls(struct dcp_io *io);
/* The same for io_memory_queue.c. */
void io_queue_calls(struct dcp_io *io);

uint64_t io_random(struct io_memory *fs);
uint64_t io_mix(uint64_t hash, uint64_t value);
uint64_t io_hash_bytes(const void *data, size_t len);

struct io_inode *io_inode_new(struct io_memory *fs, uint64_t label);
void io_inode_reserve(struct io_inode *inode, size_t len);
void io_inode_touch(struct io_inode *inode, size_t offset, size_t len);
void io_inode_sync(struct io_memory *fs, struct io_inode *inode, bool fails);
uint64_t io_inode_hash(struct io_inode *inode);

struct io_entry *io_entries_find(const struct io_entries *entries, const char *name);
struct io_dir *io_dir_find(const struct io_memory *fs, const char *path);
/* Changes the names and logs it. */
void io_dir_change(struct io_memory_process *process, struct io_dir *dir, const char *from,
                   const char *to, struct io_inode *inode);
void io_dir_sync(struct io_dir *dir);
/* The names of a version of the directory, the present one included. */
const struct io_entries *io_dir_version(const struct io_dir *dir, uint64_t version);

#endif

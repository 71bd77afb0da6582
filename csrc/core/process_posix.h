/*
 * process_posix.h: private: the system calls of a writer process and of who starts it.
 *
 * Results are those of the system call, failures -errno; nothing but EINTR is retried.
 */
#ifndef PROCESS_POSIX_H
#define PROCESS_POSIX_H

#include <stdatomic.h>
#include <sys/types.h>

#include "dcp_common.h"

/* The descriptor that a started process finds its socket at. */
enum { DCP_PROCESS_SOCKET = 3 };
/* Descriptors that one message carries at most: an arena and a directory. */
enum { DCP_SOCKET_MOST_FDS = 2 };

/* ---- who starts a process ---- */

/* Starts `executable` in a session of its own with an empty environment, all signals at their
 * default and standard streams of /dev/null.  No fork handler runs and no page table is copied.
 * `ret_socket` is the other end of its socket. */
int dcp_process_spawn(const char *executable, int *ret_socket, int64_t *ret_pid) DCP_MUST_CHECK;

enum dcp_process_state {
    DCP_PROCESS_RUNS = 0,
    DCP_PROCESS_EXITED = 1, /* `ret_detail` is its status */
    DCP_PROCESS_KILLED = 2, /* `ret_detail` is the signal */
    DCP_PROCESS_GONE = 3,   /* somebody else looked first */
};

/* Of a child; one that has ended is reaped by this. */
enum dcp_process_state dcp_process_look(int64_t pid, int *ret_detail);
/* Only for a child that dcp_process_look has just found running. */
void dcp_process_kill(int64_t pid);

/* ---- the process ---- */

/* Makes the calling process a quiet one: nothing open but the standard streams and its socket, no
 * directory kept busy, no signal that is meant for a trainer heard, a name. */
int dcp_process_settle_in(const char *name) DCP_MUST_CHECK;
int64_t dcp_process_parent(void);

/* A file in memory, mapped for reading.  Zero-initialised is none. */
struct dcp_process_memory {
    uint8_t *bytes;
    uint64_t len;
    uint64_t dev, ino; /* whose mapping it is */
};

/* Locks a file for as long as `fd` is open: false while somebody else has it, who dies with his
 * lock.  `shared`: only asks. */
bool dcp_file_lock(int fd, bool shared);

/* Maps `fd`, which has at least `len` bytes; a mapping of the same file that is long enough is kept
 * as it is. */
int dcp_process_map(struct dcp_process_memory *memory, int fd, uint64_t len) DCP_MUST_CHECK;
/* A mapping of its own whose pages may be written to, for this process alone; nothing is kept. */
int dcp_process_map_own(struct dcp_process_memory *memory, int fd, uint64_t len) DCP_MUST_CHECK;
/* Whether that is the same file. */
bool dcp_process_is_mapped(const struct dcp_process_memory *memory, int fd);
/* Makes the page tables of [0, len), so that nothing faults later: many pages at a time. */
int dcp_process_touch(const struct dcp_process_memory *memory, uint64_t len,
                      const atomic_int *cancel) DCP_MUST_CHECK;
void dcp_process_unmap(struct dcp_process_memory *memory);

/* ---- both ---- */

/* 1 when the socket can be read from (or written to), or has ended; 0 after the time. */
int dcp_socket_wait(int socket, bool writing, uint64_t timeout_ns) DCP_MUST_CHECK;
/* At least one byte, or -EAGAIN and the like.  Descriptors go with the first byte. */
ssize_t dcp_socket_send(int socket, const void *bytes, size_t len, const int *fds,
                        uint32_t fds_count) DCP_MUST_CHECK;
/* 0: the other end is closed.  Received descriptors are the caller's, also those of earlier calls
 * in `fds`; -EPROTO: there were more than fit, or some were lost. */
ssize_t dcp_socket_receive(int socket, void *bytes, size_t cap, int fds[DCP_SOCKET_MOST_FDS],
                           uint32_t *fds_count) DCP_MUST_CHECK;
/* Ends the connection for both sides, whoever else has a copy of the descriptor. */
void dcp_socket_end(int socket);
void dcp_descriptor_close(int fd);

#endif

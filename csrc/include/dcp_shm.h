/*
 * dcp_shm.h: the table of system calls for memory that processes of one host share.
 *
 * A segment is a named file in memory: made by one process, mapped by the others under its name,
 * gone when the name was removed and the last mapping with it.  The real table is dcp_shm_posix()
 * (/dev/shm and futexes); tests wrap it to run out of room, to lose a process or to fail a call.
 * Results are those of the system call, failures -errno.
 */
#ifndef DCP_SHM_H
#define DCP_SHM_H

#include "dcp_io.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Who can share memory: processes with the same `id` have one boot, one set of process ids and one
 * place for segments in common. */
struct dcp_shm_host {
    uint8_t id[16];
    int64_t pid; /* of the calling process */
};

struct dcp_shm {
    void *ctx;
    int (*host)(void *ctx, struct dcp_shm_host *ret);
    int (*create)(void *ctx,
                  const char *name);          /* descriptor; empty; fails when the name is taken */
    int (*open)(void *ctx, const char *name); /* descriptor; only segments of this user */
    int (*resize)(void *ctx, int fd, uint64_t len); /* takes no memory */
    int (*allocate)(void *ctx, int fd, uint64_t offset,
                    uint64_t len); /* of the segment: touching it cannot fail later */
    int (*map)(void *ctx, int fd, uint64_t len, void **ret_memory); /* not inherited by a fork */
    void (*unmap)(void *ctx, void *memory, uint64_t len);
    void (*close)(void *ctx, int fd);
    int (*unlink)(void *ctx, const char *name);
    int (*list)(void *ctx, dcp_list_fn fn, void *fn_ctx);
    bool (*alive)(void *ctx, int64_t pid); /* false: certainly gone, or a zombie */
    /* `word`: 32 bits in a segment.  Returns when they are not `seen`, after a wake, after the
     * timeout, or for no reason. */
    void (*wait)(void *ctx, const void *word, uint32_t seen, uint64_t timeout_ns);
    void (*wake)(void *ctx, const void *word); /* all who wait */
};

const struct dcp_shm *dcp_shm_posix(void);

#ifdef __cplusplus
}
#endif
#endif

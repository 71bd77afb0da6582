/*
 * dcp_arena.h: staging memory: mappings that hold the images of a save's files, reused for ever.
 *
 * First touch decides what a save costs: fresh memory is several times slower than used memory.  So
 * an arena is kept when its save is over, and can be touched ahead (dcp_arena_populate).  How much
 * may be taken is asked before anything is taken: what the machine and every cgroup above this
 * process can spare, shared with the other ranks of the host.
 *
 * Thread rule: all functions are thread safe; one arena belongs to one save at a time.  Arenas are
 * not inherited by a fork.
 */
#ifndef DCP_ARENA_H
#define DCP_ARENA_H

#include <stdatomic.h>

#include "dcp_device.h"
#include "dcp_io.h"

#ifdef __cplusplus
extern "C" {
#endif

enum dcp_arena_kind {
    DCP_ARENA_PRIVATE = 0, /* huge pages of this process */
    DCP_ARENA_SHARED = 1,  /* a memfd, which the writer process maps */
};

struct dcp_arena {
    uint8_t *memory;     /* page aligned */
    uint64_t bytes;      /* of the mapping */
    uint64_t room_bytes; /* of address space that it can grow into */
    int fd;              /* SHARED: the memfd; else -1 */
    enum dcp_arena_kind kind;
    int64_t pid;            /* whose mapping it is */
    uint64_t touched_bytes; /* from the start, by dcp_arena_populate: not touched again */
    const struct dcp_device *pinned_by; /* through which it is unpinned; NULL: it is not pinned */
    uint64_t pinned_bytes;              /* from the start */
    char pin_refusal[DCP_DEVICE_REASON_BYTES]; /* of an arena that could not be pinned; "" */
};

struct dcp_arena_limits {
    const struct dcp_io *io; /* reads /proc and /sys/fs/cgroup; NULL: only `cap_bytes` counts */
    uint64_t cap_bytes;      /* of all arenas of this process together; 0: no cap of the user's */
    uint32_t sharers;        /* ranks of this host, which grow at the same time; 0 counts as 1 */
};

/* A kept arena that is large enough, else one that grows, else a new one.  DCP_E_LIMIT: the memory
 * is not to be had, nothing was taken, and the text says which limit it was: the caller streams.
 * DCP_E_NOMEM: mapping failed; the same holds. */
int dcp_arena_acquire(enum dcp_arena_kind kind, uint64_t bytes,
                      const struct dcp_arena_limits *limits, struct dcp_arena **ret_arena,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* Keeps it for the next save; DCP_MAX_ARENAS are kept, then the smallest goes.  NULL is fine.  In a
 * forked child nothing but the record is freed. */
void dcp_arena_release(struct dcp_arena *arena);
/* Touches the first `bytes`, so that staging into them never faults.  `cancel` may be NULL.  Worth
 * its while before filling fresh SHARED memory too: pages come faster many at a time. */
int dcp_arena_populate(struct dcp_arena *arena, uint64_t bytes, atomic_int *cancel,
                       struct dcp_error *err) DCP_MUST_CHECK;
/* Pins the first `bytes`, and what is touched beyond them, for copies of devices of this kind; it
 * stays so as long as there is the arena, and of one that grew only the rest is pinned.  A failure
 * costs speed alone; it is repeated without another try until the arena grows. */
int dcp_arena_pin(struct dcp_arena *arena, const struct dcp_device *device, uint64_t bytes,
                  struct dcp_error *err) DCP_MUST_CHECK;
/* Frees all kept arenas. */
void dcp_arena_trim(void);
/* Of all arenas of this process, kept and in use. */
uint64_t dcp_arena_total_bytes(void);

/* What may still be taken: the least of MemAvailable and, of every cgroup above this process (v1
 * and v2), its limit less what it uses that cannot be reclaimed.  UINT64_MAX when nothing tells.
 * `ret_name` gets the name of the limit ("MemAvailable", "cgroup /a/b"). */
uint64_t dcp_memory_spare_bytes(const struct dcp_io *io, char ret_name[128]);

#ifdef __cplusplus
}
#endif
#endif

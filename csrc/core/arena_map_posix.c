/*
 * arena_map_posix.c: the system calls of an arena's mapping, and of touching memory ahead.
 *
 * An arena grows where it is: what is pinned for devices is known by its address, and pinning it
 * anew takes longer than touching it.  So address space is reserved behind it, DCP_ARENA_ROOM times
 * what it needs at first, which takes no memory.  Private memory is the part of the reservation
 * that may be written to; shared memory is mapped beyond the end of its file, which then grows.
 * Processes whose address space is limited reserve nothing.
 *
 * A memfd has no name and no size limit but those of memory itself, and is gone with its last
 * holder.  It is sealed against shrinking: whoever maps it can't be killed by SIGBUS because the
 * other side cut it short.  Forked children inherit the descriptor and may keep it for as long as
 * they live, so unmapping punches the pages out first.
 *
 * Bytes are counted like those of alloc.c, so that tests see a leak and can make a mapping fail.
 * Threads: no state.
 */
#include "arena_map.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/* Written out for builds on old headers. */
enum { RAW_MADV_POPULATE_WRITE = 23, RAW_MFD_NOEXEC_SEAL = 8 };
/* Mappings of at least one are aligned to them. */
#define HUGE_PAGE_BYTES (UINT64_C(2) << 20)

static int
failed(uint64_t bytes, int sys_errno, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_NOMEM, sys_errno, NULL,
                         "mapping %llu bytes of staging memory failed; free memory, raise the "
                         "memory limit of the process, or save less at once",
                         (unsigned long long)bytes);
}

/* ---- address space ---- */

/* Of a mapping of `bytes`, with what it may grow to. */
static uint64_t
room_for(uint64_t bytes)
{
    struct rlimit limit;
    uint64_t room;
    bool limited = getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY;
    return limited || dcp_mul_overflows_u64(bytes, DCP_ARENA_ROOM, &room) || room > INT64_MAX
               ? bytes
               : room;
}

/* Address space that nobody may touch yet; 0 or an errno. */
static int
reserve(uint64_t bytes, uint8_t **ret)
{
    /* The kernel aligns mappings to 4 KiB only: reserve one huge page more, give back the ends. */
    uint64_t slack = bytes >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 0;
    uint8_t *base = mmap(NULL, bytes + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        return errno;
    }
    uint64_t head = slack == 0 ? 0 : (0 - (uint64_t)(uintptr_t)base) % HUGE_PAGE_BYTES;
    if ((head != 0 && munmap(base, head) != 0) ||
        (head != slack && munmap(base + head + bytes, slack - head) != 0)) {
        int sys_errno = errno;
        (void)munmap(base, bytes + slack);
        return sys_errno;
    }
    *ret = base + head;
    return 0;
}

/* ---- memory with a descriptor ---- */

static int
resize(int fd, uint64_t bytes)
{
    int rc;
    do {
        rc = ftruncate(fd, (off_t)bytes) == 0 ? 0 : errno;
    } while (rc == EINTR);
    return rc;
}

/* Hosts may refuse memory that could be executed; kernels before 6.3 do not know the difference. */
static int
create(void)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int fd = memfd_create("dcp_native", flags | RAW_MFD_NOEXEC_SEAL);
    return fd < 0 && errno == EINVAL ? memfd_create("dcp_native", flags) : fd;
}

/* A memfd of `bytes`; 0 or an errno. */
static int
make_file(uint64_t bytes, int *ret_fd)
{
    int fd = create(), sys_errno = 0;
    if (fd < 0) {
        return errno;
    }
    sys_errno = resize(fd, bytes);
    if (sys_errno == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
        sys_errno = errno;
    }
    if (sys_errno != 0) {
        close(fd);
        return sys_errno;
    }
    *ret_fd = fd;
    return 0;
}

/* ---- arenas ---- */

/* Huge pages and dumps are advice; that a fork shares nothing is not. */
static int
advise(uint8_t *memory, uint64_t bytes)
{
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
    (void)madvise(memory, bytes, MADV_DONTDUMP);
    return madvise(memory, bytes, MADV_DONTFORK) == 0 ? 0 : errno;
}

/* Maps arena->bytes at the start of `room_bytes` of address space; 0 or an errno. */
static int
map_with_room(struct dcp_arena *arena, uint64_t room_bytes)
{
    uint8_t *memory = NULL;
    int sys_errno = reserve(room_bytes, &memory);
    if (sys_errno != 0) {
        return sys_errno;
    }
    if (arena->fd >= 0) {
        sys_errno = mmap(memory, room_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                         arena->fd, 0) == MAP_FAILED
                        ? errno
                        : 0;
    } else {
        sys_errno = mprotect(memory, arena->bytes, PROT_READ | PROT_WRITE) == 0 ? 0 : errno;
    }
    sys_errno = sys_errno == 0 ? advise(memory, room_bytes) : sys_errno;
    if (sys_errno != 0) {
        (void)munmap(memory, room_bytes);
        return sys_errno;
    }
    arena->memory = memory;
    arena->room_bytes = room_bytes;
    return 0;
}

int
dcp_arena_map(struct dcp_arena *arena, struct dcp_error *err)
{
    uint64_t bytes = arena->bytes, room = room_for(bytes);
    int sys_errno = 0;
    arena->fd = -1;
    if (bytes > INT64_MAX || !dcp_alloc_count(bytes)) {
        return failed(bytes, ENOMEM, err);
    }
    if (arena->kind == DCP_ARENA_SHARED) {
        sys_errno = make_file(bytes, &arena->fd);
    }
    if (sys_errno == 0) {
        sys_errno = map_with_room(arena, room);
        sys_errno = sys_errno != 0 && room > bytes ? map_with_room(arena, bytes) : sys_errno;
    }
    if (sys_errno != 0) {
        if (arena->fd >= 0) {
            close(arena->fd);
            arena->fd = -1;
        }
        dcp_alloc_uncount(bytes);
        return failed(bytes, sys_errno, err);
    }
    return 0;
}

int
dcp_arena_map_grow(struct dcp_arena *arena, uint64_t bytes, struct dcp_error *err)
{
    uint64_t more = bytes - arena->bytes;
    int sys_errno;
    DCP_ASSERT(bytes >= arena->bytes && bytes <= arena->room_bytes);
    if (!dcp_alloc_count(more)) {
        return failed(bytes, ENOMEM, err);
    }
    if (arena->kind == DCP_ARENA_SHARED) {
        sys_errno = resize(arena->fd, bytes);
    } else {
        sys_errno =
            mprotect(arena->memory + arena->bytes, more, PROT_READ | PROT_WRITE) == 0 ? 0 : errno;
    }
    if (sys_errno != 0) {
        dcp_alloc_uncount(more);
        return failed(bytes, sys_errno, err);
    }
    arena->bytes = bytes;
    return 0;
}

void
dcp_arena_unmap(struct dcp_arena *arena)
{
    int rc = 0;
    if (arena->kind == DCP_ARENA_SHARED) {
        do {
            rc = fallocate(arena->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                           (off_t)arena->bytes);
        } while (rc != 0 && errno == EINTR);
        close(arena->fd);
        arena->fd = -1;
    }
    rc = munmap(arena->memory, arena->room_bytes);
    DCP_ASSERT(rc == 0);
    arena->memory = NULL;
    dcp_alloc_uncount(arena->bytes);
}

/* ---- touching ---- */

int
dcp_memory_populate(uint8_t *memory, uint64_t bytes)
{
    if (madvise(memory, bytes, RAW_MADV_POPULATE_WRITE) == 0) {
        return 0;
    }
    if (errno != EINVAL) {
        return -errno;
    }
    dcp_memory_touch(memory, bytes);
    return 0;
}

void
dcp_memory_touch(uint8_t *memory, uint64_t bytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    for (uint64_t at = 0; at < bytes; at += page) {
        /* Adding nothing is a write that keeps what is there, whoever else writes. */
        atomic_fetch_add_explicit((_Atomic uint8_t *)(memory + at), 0, memory_order_relaxed);
    }
}

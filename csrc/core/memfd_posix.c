/*
 * memfd_posix.c: the system calls of memory that two processes share by a descriptor, and of
 * touching memory ahead.
 *
 * A memfd has no name and no size limit but those of memory itself, and is gone with its last
 * holder.  It is sealed against shrinking: whoever maps it can't be killed by SIGBUS because the
 * other side cut it short.  Forked children inherit the descriptor and may keep it for as long as
 * they live, so freeing punches the pages out first.
 *
 * Bytes are counted like those of alloc.c, so that tests see a leak and can make a mapping fail.
 * Threads: no state.
 */
#include "memfd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

/* Written out for builds on old headers. */
enum { RAW_MADV_POPULATE_WRITE = 23, RAW_MFD_NOEXEC_SEAL = 8 };

static int
failed(uint64_t bytes, int sys_errno, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_NOMEM, sys_errno, NULL,
                         "mapping %llu bytes of shared staging memory failed; free memory, raise "
                         "the memory limit of the process, or save less at once",
                         (unsigned long long)bytes);
}

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

/* Huge pages and dumps are advice; that a fork shares nothing is not. */
static int
advise(uint8_t *memory, uint64_t bytes)
{
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
    (void)madvise(memory, bytes, MADV_DONTDUMP);
    return madvise(memory, bytes, MADV_DONTFORK) == 0 ? 0 : errno;
}

int
dcp_memfd_make(uint64_t bytes, int *ret_fd, uint8_t **ret_memory, struct dcp_error *err)
{
    uint8_t *memory = MAP_FAILED;
    int sys_errno = 0;
    if (bytes > INT64_MAX || !dcp_alloc_count(bytes)) {
        return failed(bytes, ENOMEM, err);
    }
    int fd = create();
    if (fd < 0) {
        sys_errno = errno;
        goto fail;
    }
    sys_errno = resize(fd, bytes);
    if (sys_errno == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
        sys_errno = errno;
    }
    if (sys_errno != 0) {
        goto fail;
    }
    memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    sys_errno = memory == MAP_FAILED ? errno : advise(memory, bytes);
    if (sys_errno != 0) {
        goto fail;
    }
    *ret_fd = fd;
    *ret_memory = memory;
    return 0;
fail:
    if (memory != MAP_FAILED) {
        munmap(memory, bytes);
    }
    if (fd >= 0) {
        close(fd);
    }
    dcp_alloc_uncount(bytes);
    return failed(bytes, sys_errno, err);
}

int
dcp_memfd_grow(int fd, uint8_t *memory, uint64_t old_bytes, uint64_t bytes, uint8_t **ret_memory,
               struct dcp_error *err)
{
    DCP_ASSERT(bytes >= old_bytes);
    if (bytes > INT64_MAX || !dcp_alloc_count(bytes - old_bytes)) {
        return failed(bytes, ENOMEM, err);
    }
    /* A descriptor that is longer than its mapping does no harm: the seal keeps it so. */
    int sys_errno = resize(fd, bytes);
    uint8_t *moved = MAP_FAILED;
    if (sys_errno == 0) {
        moved = mremap(memory, old_bytes, bytes, MREMAP_MAYMOVE);
        sys_errno = moved == MAP_FAILED ? errno : 0;
    }
    if (sys_errno != 0) {
        dcp_alloc_uncount(bytes - old_bytes);
        return failed(bytes, sys_errno, err);
    }
    *ret_memory = moved;
    return 0;
}

void
dcp_memfd_free(int fd, uint8_t *memory, uint64_t bytes)
{
    int rc;
    do {
        rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes);
    } while (rc != 0 && errno == EINTR);
    munmap(memory, bytes);
    close(fd);
    dcp_alloc_uncount(bytes);
}

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

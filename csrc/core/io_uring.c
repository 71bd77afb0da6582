/*
 * io_uring.c: writes in flight by io_uring, by raw system calls.
 *
 * One ring lives as long as one save writes and is used by one thread, so the plainest set-up is
 * enough: one system call starts a write, one waits for a result.  Buffers and files are never
 * registered (pinning 32 MiB for every save would cost more than it saves) and there is no polling
 * kernel thread.  Kernels before 5.11 have no waits with a deadline: they are said to have no
 * queue, as are those where an administrator or a sandbox forbids it.  The kernel's structures are
 * written out here: a build on old headers must not lose them on a new kernel.
 *
 * Fork: the rings are not inherited and the descriptor is closed by exec; a child that calls in
 * all the same is refused.
 * Invariant: `in_flight` counts writes that the kernel took and that were not reaped yet.
 * Threads: a queue belongs to the thread that opened it; the kernel is the only other party, on
 * head and tail of the two rings.
 */
#include "io_uring.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dcp_limits.h"

enum {
/* The same numbers on every architecture but one, which has them in its headers. */
#ifdef SYS_io_uring_setup
    RAW_SYS_SETUP = SYS_io_uring_setup,
    RAW_SYS_ENTER = SYS_io_uring_enter,
#else
    RAW_SYS_SETUP = 425,
    RAW_SYS_ENTER = 426,
#endif
    RAW_OP_WRITE = 23,
    RAW_ENTER_GETEVENTS = 1 << 0,
    RAW_ENTER_EXT_ARG = 1 << 3,
    RAW_FEAT_SINGLE_MMAP = 1 << 0, /* both rings lie in one mapping */
    RAW_FEAT_NODROP = 1 << 1,      /* a result is never lost */
    RAW_FEAT_EXT_ARG = 1 << 8,     /* waits with a deadline */
    RAW_SETUP_COOP_TASKRUN = 1 << 8,
    RAW_SETUP_SINGLE_ISSUER = 1 << 12,
    RAW_SETUP_DEFER_TASKRUN = 1 << 13,
    SIGNAL_SET_BYTES = 8,
    MOST_DEPTH = 4096,
};

#define RAW_OFFSET_SQES 0x10000000

/* The fewest interruptions first.  Kernels know the first from 6.1 on, the second from 5.19. */
static const uint32_t set_ups[] = {
    RAW_SETUP_SINGLE_ISSUER | RAW_SETUP_DEFER_TASKRUN,
    RAW_SETUP_COOP_TASKRUN,
    0,
};

struct raw_offsets {
    uint32_t head, tail, ring_mask, ring_entries;
    uint32_t rest[6]; /* submissions: flags, dropped, array; results: overflow, cqes, flags */
};

struct raw_params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
    uint32_t reserved[3];
    struct raw_offsets sq, cq;
};
_Static_assert(sizeof(struct raw_params) == 120, "the kernel's struct io_uring_params");

struct raw_sqe {
    uint8_t opcode, flags;
    uint16_t io_priority;
    int32_t fd;
    uint64_t offset, address;
    uint32_t len, rw_flags;
    uint64_t user_data;
    uint64_t rest[3];
};
_Static_assert(sizeof(struct raw_sqe) == 64, "the kernel's struct io_uring_sqe");

struct raw_cqe {
    uint64_t user_data;
    int32_t result;
    uint32_t flags;
};
_Static_assert(sizeof(struct raw_cqe) == 16, "the kernel's struct io_uring_cqe");

struct raw_timespec {
    int64_t seconds, nanoseconds;
};

struct raw_wait {
    uint64_t signal_set;
    uint32_t signal_set_bytes, least_wait_us;
    uint64_t timeout; /* struct raw_timespec * */
};

struct dcp_io_queue {
    int fd;
    int64_t pid; /* the process that opened it */
    unsigned depth, in_flight;
    uint8_t *rings;
    size_t rings_bytes;
    struct raw_sqe *sqes;
    size_t sqes_bytes;
    _Atomic uint32_t *sq_tail; /* ours; the kernel reads it in enter */
    uint32_t sq_mask;
    const _Atomic uint32_t *cq_tail; /* the kernel's */
    _Atomic uint32_t *cq_head;       /* ours */
    uint32_t cq_mask;
    const struct raw_cqe *cqes;
};

static int
set_up(unsigned depth, struct raw_params *ret_params)
{
    long fd = -1;

    for (size_t i = 0; i < sizeof set_ups / sizeof set_ups[0]; i++) {
        memset(ret_params, 0, sizeof *ret_params);
        ret_params->flags = set_ups[i];
        fd = syscall(RAW_SYS_SETUP, depth, ret_params);
        if (fd >= 0 || errno != EINVAL) {
            break;
        }
    }
    return fd < 0 ? -errno : (int)fd;
}

/* Shared with the kernel; a forked child has no copy. */
static void *
map_shared(int fd, size_t bytes, off_t offset)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);

    if (at == MAP_FAILED) {
        return NULL;
    }
    if (madvise(at, bytes, MADV_DONTFORK) != 0) {
        (void)munmap(at, bytes);
        return NULL;
    }
    return at;
}

static int
map_rings(struct dcp_io_queue *queue, const struct raw_params *params)
{
    /* rest[2] of the submissions is the index array, rest[1] of the results the results. */
    size_t sq_bytes = params->sq.rest[2] + params->sq_entries * sizeof(uint32_t);
    size_t cq_bytes = params->cq.rest[1] + params->cq_entries * sizeof(struct raw_cqe);

    queue->rings_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    queue->sqes_bytes = params->sq_entries * sizeof(struct raw_sqe);
    queue->rings = map_shared(queue->fd, queue->rings_bytes, 0);
    queue->sqes = map_shared(queue->fd, queue->sqes_bytes, RAW_OFFSET_SQES);
    if (queue->rings == NULL || queue->sqes == NULL) {
        return -ENOMEM;
    }
    queue->sq_tail = (_Atomic uint32_t *)(void *)(queue->rings + params->sq.tail);
    queue->cq_tail = (_Atomic uint32_t *)(void *)(queue->rings + params->cq.tail);
    queue->cq_head = (_Atomic uint32_t *)(void *)(queue->rings + params->cq.head);
    queue->sq_mask = params->sq_entries - 1;
    queue->cq_mask = params->cq_entries - 1;
    queue->cqes = (const struct raw_cqe *)(void *)(queue->rings + params->cq.rest[1]);
    /* Entry i of the ring always is submission i. */
    uint32_t *array = (uint32_t *)(void *)(queue->rings + params->sq.rest[2]);
    for (uint32_t i = 0; i < params->sq_entries; i++) {
        array[i] = i;
    }
    return 0;
}

static void
destroy(struct dcp_io_queue *queue)
{
    if (queue->rings != NULL) {
        (void)munmap(queue->rings, queue->rings_bytes);
    }
    if (queue->sqes != NULL) {
        (void)munmap(queue->sqes, queue->sqes_bytes);
    }
    if (queue->fd >= 0) {
        (void)close(queue->fd);
    }
    dcp_free(queue);
}

int
dcp_uring_open(void *ctx, unsigned depth, struct dcp_io_queue **ret_queue)
{
    const uint32_t wanted = RAW_FEAT_SINGLE_MMAP | RAW_FEAT_NODROP | RAW_FEAT_EXT_ARG;
    struct dcp_io_queue *queue;
    struct raw_params params;
    int rc;
    (void)ctx;

    if (depth == 0 || depth > MOST_DEPTH) {
        return -EINVAL;
    }
    queue = dcp_calloc(1, sizeof *queue);
    if (queue == NULL) {
        return -ENOMEM;
    }
    queue->pid = (int64_t)getpid();
    queue->depth = depth;
    queue->fd = set_up(depth, &params); /* the kernel sets close-on-exec */
    rc = queue->fd < 0 ? queue->fd : 0;
    if (rc == 0 && (params.features & wanted) != wanted) {
        rc = -ENOSYS;
    }
    if (rc == 0) {
        rc = map_rings(queue, &params);
    }
    if (rc != 0) {
        destroy(queue);
        return rc;
    }
    *ret_queue = queue;
    return 0;
}

int
dcp_uring_write(void *ctx, struct dcp_io_queue *queue, const struct dcp_io_write *write)
{
    (void)ctx;

    if (queue->pid != (int64_t)getpid()) {
        return -EPERM;
    }
    if (queue->in_flight == queue->depth) {
        return -EBUSY;
    }
    if (write->offset > INT64_MAX || write->len > DCP_MAX_REQUEST_BYTES) {
        return -EFBIG;
    }
    uint32_t tail = atomic_load_explicit(queue->sq_tail, memory_order_relaxed);
    queue->sqes[tail & queue->sq_mask] = (struct raw_sqe){
        .opcode = RAW_OP_WRITE,
        .io_priority = (uint16_t)write->io_priority,
        .fd = write->fd,
        .offset = write->offset,
        .address = (uint64_t)(uintptr_t)write->buf,
        .len = (uint32_t)write->len,
        .user_data = write->tag,
    };
    atomic_store_explicit(queue->sq_tail, tail + 1, memory_order_release);
    long taken = syscall(RAW_SYS_ENTER, queue->fd, 1, 0, 0, NULL, 0);
    if (taken != 1) {
        /* Only enter reads the tail: what was not taken can be taken back. */
        int rc = taken < 0 ? -errno : -EAGAIN;
        atomic_store_explicit(queue->sq_tail, tail, memory_order_release);
        return rc;
    }
    queue->in_flight++;
    return 0;
}

static bool
take_result(struct dcp_io_queue *queue, struct dcp_io_done *ret)
{
    uint32_t head = atomic_load_explicit(queue->cq_head, memory_order_relaxed);

    if (head == atomic_load_explicit(queue->cq_tail, memory_order_acquire)) {
        return false;
    }
    const struct raw_cqe *cqe = &queue->cqes[head & queue->cq_mask];
    ret->tag = cqe->user_data;
    ret->result = cqe->result;
    atomic_store_explicit(queue->cq_head, head + 1, memory_order_release);
    queue->in_flight--;
    return true;
}

int
dcp_uring_reap(void *ctx, struct dcp_io_queue *queue, uint64_t timeout_ns, struct dcp_io_done *ret)
{
    struct raw_timespec timeout = {(int64_t)(timeout_ns / 1000000000u),
                                   (int64_t)(timeout_ns % 1000000000u)};
    struct raw_wait wait = {.signal_set_bytes = SIGNAL_SET_BYTES,
                            .timeout = (uint64_t)(uintptr_t)&timeout};
    (void)ctx;

    if (queue->pid != (int64_t)getpid()) {
        return -EPERM;
    }
    if (take_result(queue, ret)) {
        return 1;
    }
    if (queue->in_flight == 0) {
        return 0;
    }
    long rc = syscall(RAW_SYS_ENTER, queue->fd, 0, 1, RAW_ENTER_GETEVENTS | RAW_ENTER_EXT_ARG,
                      &wait, sizeof wait);
    int sys_errno = rc < 0 ? errno : 0;
    if (take_result(queue, ret)) {
        return 1;
    }
    return sys_errno == ETIME ? 0 : -sys_errno;
}

void
dcp_uring_close(void *ctx, struct dcp_io_queue *queue)
{
    (void)ctx;
    if (queue != NULL) {
        DCP_ASSERT(queue->in_flight == 0);
        destroy(queue);
    }
}

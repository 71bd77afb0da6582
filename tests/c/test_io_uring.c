/*
 * test_io_uring.c: the real table's queue of writes, and the priority of threads.
 *
 * Where the kernel has no io_uring, only its absence is checked.
 */
#include "ctest.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dcp_io.h"

enum { WRITES = 64, WRITE_BYTES = 8192, DEPTH = 4 };

#define SECOND_NS UINT64_C(1000000000)

static char path[256];

static int
new_file(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/dcp_uring_XXXXXX", base != NULL ? base : "/tmp");
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    return fd;
}

static void
drop_file(int fd)
{
    CHECK_EQ(close(fd), 0);
    CHECK_EQ(unlink(path), 0);
}

/* NULL where there is none. */
static struct dcp_io_queue *
open_queue(const struct dcp_io *io, unsigned depth)
{
    struct dcp_io_queue *queue = NULL;
    int rc = io->queue_open(io->ctx, depth, &queue);
    if (rc != 0) {
        CHECK(queue == NULL && rc < 0);
        printf("    io_uring is not to be had: %s\n", strerror(-rc));
    }
    return queue;
}

static struct dcp_io_done
reap(const struct dcp_io *io, struct dcp_io_queue *queue)
{
    struct dcp_io_done done = {.tag = UINT64_MAX};
    for (int i = 0; i < 100; i++) {
        int rc = io->queue_reap(io->ctx, queue, SECOND_NS / 10, &done);
        if (rc != 0 && rc != -EINTR) {
            CHECK_EQ(rc, 1);
            return done;
        }
    }
    CHECK(false);
    return done;
}

static void
queued_writes_reach_the_file_and_each_tag_comes_back_once(void)
{
    static uint8_t data[WRITES][WRITE_BYTES], got[WRITE_BYTES];
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_io_queue *queue = open_queue(io, DEPTH);
    if (queue == NULL) {
        return;
    }
    int fd = new_file();
    unsigned in_flight = 0, seen[WRITES] = {0};
    for (unsigned i = 0; i < WRITES; i++) {
        memset(data[i], (int)(i * 7 + 1), WRITE_BYTES);
        struct dcp_io_write write = {.fd = fd,
                                     .buf = data[i],
                                     .len = WRITE_BYTES - i,
                                     .offset = (uint64_t)(WRITES - 1 - i) * WRITE_BYTES,
                                     .tag = i};
        if (in_flight == DEPTH) {
            CHECK_EQ(io->queue_write(io->ctx, queue, &write), -EBUSY);
            struct dcp_io_done done = reap(io, queue);
            CHECK(done.tag < WRITES && done.result == (ssize_t)(WRITE_BYTES - done.tag));
            seen[done.tag % WRITES]++;
            in_flight--;
        }
        CHECK_EQ(io->queue_write(io->ctx, queue, &write), 0);
        in_flight++;
    }
    for (; in_flight > 0; in_flight--) {
        struct dcp_io_done done = reap(io, queue);
        CHECK(done.tag < WRITES && done.result == (ssize_t)(WRITE_BYTES - done.tag));
        seen[done.tag % WRITES]++;
    }
    for (unsigned i = 0; i < WRITES; i++) {
        CHECK_EQ(seen[i], 1);
        CHECK_EQ(pread(fd, got, WRITE_BYTES - i, (off_t)(WRITES - 1 - i) * WRITE_BYTES),
                 WRITE_BYTES - i);
        CHECK(memcmp(got, data[i], WRITE_BYTES - i) == 0);
    }
    io->queue_close(io->ctx, queue);
    drop_file(fd);
}

static void
failures_of_the_kernel_come_back_as_results(void)
{
    static const uint8_t data[512];
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_io_queue *queue = open_queue(io, 1);
    if (queue == NULL) {
        return;
    }
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    struct dcp_io_write write = {.fd = fd, .buf = data, .len = sizeof data, .tag = 9};
    CHECK_EQ(io->queue_write(io->ctx, queue, &write), 0);
    struct dcp_io_done done = reap(io, queue);
    CHECK_EQ(done.tag, 9);
    CHECK_EQ(done.result, -EBADF);
    write.offset = UINT64_MAX;
    CHECK_EQ(io->queue_write(io->ctx, queue, &write), -EFBIG);
    io->queue_close(io->ctx, queue);
    CHECK_EQ(close(fd), 0);
}

/* A write into a full pipe never ends by itself. */
static void
a_wait_ends_at_its_deadline_and_not_before(void)
{
    static uint8_t data[1 << 16];
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_io_queue *queue = open_queue(io, 1);
    struct dcp_io_done done;
    int ends[2];
    if (queue == NULL) {
        return;
    }
    CHECK_EQ(io->queue_reap(io->ctx, queue, SECOND_NS, &done), 0); /* nothing: at once */
    CHECK_EQ(pipe2(ends, O_CLOEXEC), 0);
    CHECK_EQ(fcntl(ends[1], F_SETPIPE_SZ, 4096), 4096);
    CHECK_EQ(write(ends[1], data, 4096), 4096);
    struct dcp_io_write write = {.fd = ends[1], .buf = data, .len = 4096};
    CHECK_EQ(io->queue_write(io->ctx, queue, &write), 0);
    uint64_t start_ns = io->now_ns(io->ctx);
    CHECK_EQ(io->queue_reap(io->ctx, queue, SECOND_NS / 20, &done), 0);
    CHECK(io->now_ns(io->ctx) - start_ns >= SECOND_NS / 20);
    CHECK_EQ(read(ends[0], data, 4096), 4096);
    done = reap(io, queue);
    CHECK_EQ(done.result, 4096);
    io->queue_close(io->ctx, queue);
    CHECK(close(ends[0]) == 0 && close(ends[1]) == 0);
}

static void
a_forked_child_is_refused(void)
{
    static const uint8_t data[512];
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_io_queue *queue = open_queue(io, 1);
    if (queue == NULL) {
        return;
    }
    int fd = new_file();
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        struct dcp_io_write write = {.fd = fd, .buf = data, .len = sizeof data};
        struct dcp_io_done done;
        bool refused = io->queue_write(io->ctx, queue, &write) == -EPERM &&
                       io->queue_reap(io->ctx, queue, 0, &done) == -EPERM;
        _exit(refused ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_EQ(status, 0);
    io->queue_close(io->ctx, queue);
    drop_file(fd);
}

static void
a_queue_of_no_depth_is_refused(void)
{
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_io_queue *queue = NULL;
    CHECK_EQ(io->queue_open(io->ctx, 0, &queue), -EINVAL);
    CHECK_EQ(io->queue_open(io->ctx, 1u << 20, &queue), -EINVAL);
    CHECK(queue == NULL);
}

static int
nice_of_this_thread(void)
{
    return getpriority(PRIO_PROCESS, 0);
}

static void *
become_nice(void *arg)
{
    const struct dcp_io *io = dcp_io_posix();
    int *ret = arg;
    CHECK_EQ(io->thread_priority(io->ctx, 11, 3u << 13), 0);
    ret[0] = nice_of_this_thread();
    CHECK_EQ(io->thread_priority(io->ctx, 4, 0), 0); /* never less nice */
    ret[1] = nice_of_this_thread();
    ret[2] = (int)syscall(SYS_ioprio_get, 1, 0);
    CHECK_EQ(io->thread_priority(io->ctx, 0, 7u << 13), -EINVAL); /* no such class */
    return NULL;
}

static void
priority_is_set_for_one_thread_alone(void)
{
    int before = nice_of_this_thread(), got[3] = {0};
    long class_before = syscall(SYS_ioprio_get, 1, 0);
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, become_nice, got), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(got[0], before > 11 ? before : 11);
    CHECK_EQ(got[1], got[0]);
    CHECK_EQ(got[2], 3 << 13);
    CHECK_EQ(nice_of_this_thread(), before);
    CHECK_EQ(syscall(SYS_ioprio_get, 1, 0), class_before);
}

static void
a_sleep_takes_its_time(void)
{
    const struct dcp_io *io = dcp_io_posix();
    uint64_t start_ns = io->now_ns(io->ctx);
    io->sleep_ns(io->ctx, 3000000);
    CHECK(io->now_ns(io->ctx) - start_ns >= 3000000);
}

CTEST_MAIN(RUN(queued_writes_reach_the_file_and_each_tag_comes_back_once);
           RUN(failures_of_the_kernel_come_back_as_results);
           RUN(a_wait_ends_at_its_deadline_and_not_before); RUN(a_forked_child_is_refused);
           RUN(a_queue_of_no_depth_is_refused); RUN(priority_is_set_for_one_thread_alone);
           RUN(a_sleep_takes_its_time);)

/*
 * test_io_map.c: bytes lent by the page cache, and what happens when it has them no more.
 */
#include "ctest.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dcp_io.h"

enum { FILE_BYTES = 5 * 4096 + 100 };

struct file {
    char path[256];
    int fd;
    uint8_t bytes[FILE_BYTES];
};

static void
file_make(struct file *file)
{
    const char *base = getenv("TMPDIR");
    snprintf(file->path, sizeof file->path, "%s/dcp_map_XXXXXX", base != NULL ? base : "/tmp");
    file->fd = mkstemp(file->path);
    CHECK(file->fd >= 0);
    for (size_t i = 0; i < FILE_BYTES; i++) {
        file->bytes[i] = (uint8_t)(i * 7 + i / 4096 + 1);
    }
    CHECK_EQ(pwrite(file->fd, file->bytes, FILE_BYTES, 0), FILE_BYTES);
}

static void
file_remove(struct file *file)
{
    CHECK_EQ(close(file->fd), 0);
    CHECK_EQ(unlink(file->path), 0);
}

/* The handler of SIGBUS; sanitizers have one of their own. */
static void *
handler_now(void)
{
    struct sigaction now;
    CHECK_EQ(sigaction(SIGBUS, NULL, &now), 0);
    return (now.sa_flags & SA_SIGINFO) != 0 ? (void *)(uintptr_t)now.sa_sigaction
                                            : (void *)(uintptr_t)now.sa_handler;
}

static void
any_range_is_lent_as_it_is(void)
{
    const struct dcp_io *io = dcp_io_posix();
    static struct file file;
    void *handler = handler_now();
    file_make(&file);
    static const uint64_t offsets[] = {0, 1, 4095, 4096, 9000, FILE_BYTES - 1};
    for (size_t i = 0; i < sizeof offsets / sizeof offsets[0]; i++) {
        const uint8_t *bytes = NULL;
        size_t len = FILE_BYTES - (size_t)offsets[i];
        CHECK_EQ(io->map(io->ctx, file.fd, offsets[i], len, &bytes), 0);
        CHECK(memcmp(bytes, file.bytes + offsets[i], len) == 0);
        CHECK(handler_now() != handler);
        CHECK_EQ(io->unmap(io->ctx, bytes, len), 0);
        CHECK(handler_now() == handler);
    }
    const uint8_t *bytes = NULL;
    CHECK_EQ(io->map(io->ctx, file.fd, 0, 0, &bytes), -EINVAL);
    CHECK_EQ(io->map(io->ctx, file.fd, UINT64_MAX, 1, &bytes), -EINVAL);
    CHECK_EQ(io->map(io->ctx, -1, 0, 1, &bytes), -EBADF);
    CHECK_EQ(io->map(io->ctx, file.fd, 8 * 4096, 4096, &bytes), -EIO);
    CHECK(handler_now() == handler);
    file_remove(&file);
}

static void
a_file_cut_short_while_it_is_read_reads_as_zero_and_is_told(void)
{
    const struct dcp_io *io = dcp_io_posix();
    static struct file file;
    const uint8_t *bytes = NULL, *whole = NULL;
    static const uint8_t zeros[4096];
    /* As in a thread that blocks all signals: a fault must not kill there either. */
    sigset_t all, before, after;
    sigfillset(&all);
    file_make(&file);
    CHECK_EQ(pthread_sigmask(SIG_SETMASK, &all, &before), 0);
    CHECK_EQ(io->map(io->ctx, file.fd, 100, FILE_BYTES - 100, &bytes), 0);
    CHECK_EQ(ftruncate(file.fd, 2 * 4096), 0);
    CHECK(memcmp(bytes, file.bytes + 100, 2 * 4096 - 100) == 0);
    CHECK(memcmp(bytes + 3 * 4096 - 100, zeros, 4096) == 0);
    CHECK_EQ(io->unmap(io->ctx, bytes, FILE_BYTES - 100), -EIO);
    CHECK_EQ(pthread_sigmask(SIG_SETMASK, &before, &after), 0);
    CHECK_EQ(sigismember(&after, SIGBUS), 1);
    /* One lost mapping says nothing about the next. */
    CHECK_EQ(io->map(io->ctx, file.fd, 0, 2 * 4096, &whole), 0);
    CHECK(memcmp(whole, file.bytes, 2 * 4096) == 0);
    CHECK_EQ(io->unmap(io->ctx, whole, 2 * 4096), 0);
    file_remove(&file);
}

static void *
lend_many(void *arg)
{
    const struct dcp_io *io = dcp_io_posix();
    const struct file *file = arg;
    for (int i = 0; i < 200; i++) {
        const uint8_t *bytes = NULL;
        uint64_t offset = (uint64_t)(i % 5) * 4000;
        if (io->map(io->ctx, file->fd, offset, 4000, &bytes) != 0 ||
            memcmp(bytes, file->bytes + offset, 4000) != 0 ||
            io->unmap(io->ctx, bytes, 4000) != 0) {
            return arg;
        }
    }
    return NULL;
}

static void
threads_borrow_at_the_same_time(void)
{
    static struct file file;
    pthread_t threads[4];
    void *handler = handler_now();
    file_make(&file);
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(pthread_create(&threads[i], NULL, lend_many, &file), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *failed = &file;
        CHECK_EQ(pthread_join(threads[i], &failed), 0);
        CHECK(failed == NULL);
    }
    CHECK(handler_now() == handler);
    file_remove(&file);
}

/* ---- other people's bus errors, in a child that they kill ---- */

static void
on_other(int number)
{
    (void)number;
    _exit(7);
}

/* What becomes of a process that touches memory which nobody lent, while other memory is lent. */
static int
fate_with(void (*handler)(int), bool by_kill)
{
    const struct dcp_io *io = dcp_io_posix();
    static struct file file;
    const uint8_t *lent = NULL;
    int status = 0;
    file_make(&file);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGBUS, handler);
        const volatile uint8_t *own = mmap(NULL, 4096, PROT_READ, MAP_SHARED, file.fd, 4096);
        if (own == MAP_FAILED || io->map(io->ctx, file.fd, 0, 4096, &lent) != 0 ||
            ftruncate(file.fd, 0) != 0) {
            _exit(1);
        }
        if (by_kill) {
            raise(SIGBUS);
            _exit(0);
        }
        _exit(own[0] == 0 ? 2 : 3);
    }
    CHECK_EQ(waitpid(child, &status, 0), child);
    file_remove(&file);
    return status;
}

static void
other_bus_errors_go_to_who_had_them_before(void)
{
    int status = fate_with(on_other, false);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    status = fate_with(on_other, true);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    status = fate_with(SIG_DFL, false);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    status = fate_with(SIG_DFL, true);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    status = fate_with(SIG_IGN, true);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static struct sigaction beneath;
static atomic_int rounds;

/* As faulthandler does: a word, then whoever was there before. */
static void
pass_down(int number, siginfo_t *info, void *context)
{
    if (atomic_fetch_add(&rounds, 1) > 3) {
        _exit(9);
    }
    beneath.sa_sigaction(number, info, context);
}

static int
child_with_a_handler_over_ours(const struct file *file)
{
    const struct dcp_io *io = dcp_io_posix();
    struct sigaction over = {.sa_sigaction = pass_down, .sa_flags = SA_SIGINFO};
    struct sigaction plain = {.sa_handler = SIG_DFL};
    const uint8_t *bytes;
    (void)sigaction(SIGBUS, &plain, NULL);
    if (io->map(io->ctx, file->fd, 0, FILE_BYTES, &bytes) != 0) {
        return 3;
    }
    (void)sigaction(SIGBUS, &over, &beneath);
    if (io->unmap(io->ctx, bytes, FILE_BYTES) != 0) {
        return 4;
    }
    if (io->map(io->ctx, file->fd, 0, FILE_BYTES, &bytes) != -EBUSY ||
        handler_now() != (void *)(uintptr_t)pass_down) {
        return 5;
    }
    (void)raise(SIGBUS); /* ends the process, by way of both */
    return 6;
}

static void
a_handler_over_ours_is_not_made_to_go_round_in_circles(void)
{
    static struct file file;
    file_make(&file);
    pid_t pid = fork();
    if (pid == 0) {
        _exit(child_with_a_handler_over_ours(&file));
    }
    int status = 0;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    file_remove(&file);
}

/* In the child: what its parent had borrowed is not there, and a fault in the place is its own. */
static int
child_of_a_borrower(const struct file *file, const uint8_t *lent)
{
    void *place = (void *)((uintptr_t)lent & ~(uintptr_t)4095);
    uint8_t *own = mmap(place, 4096, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE, file->fd, 0);
    if (own != place || ftruncate(file->fd, 0) != 0) {
        return 3;
    }
    return *(volatile uint8_t *)own == 0 ? 4 : 5;
}

static void
a_child_faults_for_itself_where_its_parent_had_borrowed(void)
{
    const struct dcp_io *io = dcp_io_posix();
    struct sigaction plain = {.sa_handler = SIG_DFL}, kept;
    static struct file file, other;
    const uint8_t *bytes = NULL;
    file_make(&file);
    file_make(&other);
    CHECK_EQ(sigaction(SIGBUS, &plain, &kept), 0);
    CHECK_EQ(io->map(io->ctx, file.fd, 0, FILE_BYTES, &bytes), 0);
    pid_t pid = fork();
    if (pid == 0) {
        _exit(child_of_a_borrower(&other, bytes));
    }
    int status = 0;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    CHECK_EQ(io->unmap(io->ctx, bytes, FILE_BYTES), 0);
    CHECK_EQ(sigaction(SIGBUS, &kept, NULL), 0);
    file_remove(&file);
    file_remove(&other);
}

CTEST_MAIN(RUN(any_range_is_lent_as_it_is);
           RUN(a_file_cut_short_while_it_is_read_reads_as_zero_and_is_told);
           RUN(threads_borrow_at_the_same_time); RUN(other_bus_errors_go_to_who_had_them_before);
           RUN(a_handler_over_ours_is_not_made_to_go_round_in_circles);
           RUN(a_child_faults_for_itself_where_its_parent_had_borrowed);)

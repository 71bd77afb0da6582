/*
 * process_posix.c: the system calls of a writer process and of who starts it.
 *
 * posix_spawn and not fork: libc makes the child on the parent's memory and holds the calling
 * thread until the new program runs, so that a trainer of a terabyte starts it as fast as a small
 * one, and neither CUDA's nor Python's fork handlers run.  Closing what else the trainer had open
 * is the first thing that the new program does: a list of descriptors made by the trainer would be
 * out of date where threads open files.
 *
 * Only the child that waitpid has just called running is ever killed: a number is given out again
 * once somebody, maybe a handler of the trainer's, has reaped it.
 *
 * Threads: no state.
 */
#include "process_posix.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Where the child's end lies until it is moved: above all that is opened in the child. */
#define SPARE_DESCRIPTOR 10
/* Descriptors that are closed one by one where the kernel cannot do it at once. */
#define MOST_DESCRIPTORS (1u << 20)
/* Pages that are touched between two looks at whether to stop: a few ms. */
#define TOUCH_BYTES (64u << 20)
/* Written out for builds on old headers. */
enum { RAW_MADV_POPULATE_READ = 22 };

/* ---- who starts a process ---- */

static int
prepare_streams(posix_spawn_file_actions_t *actions, int socket)
{
    int rc = posix_spawn_file_actions_adddup2(actions, socket, DCP_PROCESS_SOCKET);
    if (rc == 0) {
        rc = posix_spawn_file_actions_addopen(actions, 0, "/dev/null", O_RDONLY, 0);
    }
    for (int fd = 1; rc == 0 && fd <= 2; fd++) {
        rc = posix_spawn_file_actions_addopen(actions, fd, "/dev/null", O_WRONLY, 0);
    }
    return rc;
}

static int
prepare_signals(posix_spawnattr_t *attributes)
{
    sigset_t all, none;

    sigfillset(&all);
    sigemptyset(&none);
    int rc = posix_spawnattr_setsigdefault(attributes, &all);
    rc = rc != 0 ? rc : posix_spawnattr_setsigmask(attributes, &none);
    return rc != 0
               ? rc
               : posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGDEF |
                                                          POSIX_SPAWN_SETSIGMASK);
}

static int
spawn(const char *executable, int socket, pid_t *ret_pid)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    char name[] = "dcp_writer", trainer[24];
    char *const arguments[] = {name, trainer, NULL}, *const environment[] = {NULL};

    snprintf(trainer, sizeof trainer, "%lld", (long long)getpid());
    int rc = posix_spawn_file_actions_init(&actions);
    if (rc != 0) {
        return -rc;
    }
    rc = posix_spawnattr_init(&attributes);
    if (rc == 0) {
        rc = prepare_streams(&actions, socket);
        rc = rc != 0 ? rc : prepare_signals(&attributes);
        rc = rc != 0
                 ? rc
                 : posix_spawn(ret_pid, executable, &actions, &attributes, arguments, environment);
        posix_spawnattr_destroy(&attributes);
    }
    posix_spawn_file_actions_destroy(&actions);
    return -rc;
}

int
dcp_process_spawn(const char *executable, int *ret_socket, int64_t *ret_pid)
{
    int ends[2];
    pid_t pid = 0;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        return -errno;
    }
    int theirs = fcntl(ends[1], F_DUPFD_CLOEXEC, SPARE_DESCRIPTOR);
    int rc = theirs < 0 ? -errno : 0;
    close(ends[1]);
    if (rc == 0) {
        rc = spawn(executable, theirs, &pid);
        close(theirs);
    }
    if (rc != 0) {
        close(ends[0]);
        return rc;
    }
    *ret_socket = ends[0];
    *ret_pid = pid;
    return 0;
}

enum dcp_process_state
dcp_process_look(int64_t pid, int *ret_detail)
{
    int status = 0;
    pid_t rc;

    do {
        rc = waitpid((pid_t)pid, &status, WNOHANG);
    } while (rc < 0 && errno == EINTR);
    if (rc == 0) {
        return DCP_PROCESS_RUNS;
    }
    if (rc < 0) {
        return DCP_PROCESS_GONE;
    }
    bool killed = WIFSIGNALED(status);
    *ret_detail = killed ? WTERMSIG(status) : WEXITSTATUS(status);
    return killed ? DCP_PROCESS_KILLED : DCP_PROCESS_EXITED;
}

void
dcp_process_kill(int64_t pid)
{
    (void)kill((pid_t)pid, SIGKILL);
}

/* ---- the process ---- */

static void
close_others(void)
{
#ifdef SYS_close_range
    if (syscall(SYS_close_range, DCP_PROCESS_SOCKET + 1, ~0u, 0) == 0) {
        return;
    }
#endif
    struct rlimit limit = {.rlim_cur = MOST_DESCRIPTORS};
    (void)getrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur > MOST_DESCRIPTORS) {
        limit.rlim_cur = MOST_DESCRIPTORS;
    }
    for (int fd = DCP_PROCESS_SOCKET + 1; fd < (int)limit.rlim_cur; fd++) {
        (void)close(fd);
    }
}

int
dcp_process_settle_in(const char *name)
{
    /* A launcher that signals everything it started means the trainer, which may want to finish its
     * save; the last two are failures of calls that are checked. */
    static const int ignored[] = {SIGINT,  SIGHUP,  SIGQUIT, SIGTERM, SIGUSR1,
                                  SIGUSR2, SIGTSTP, SIGPIPE, SIGXFSZ};
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    struct stat info;

    if (fstat(DCP_PROCESS_SOCKET, &info) != 0) {
        return -errno;
    }
    if (!S_ISSOCK(info.st_mode)) {
        return -ENOTSOCK;
    }
    for (size_t i = 0; i < sizeof ignored / sizeof ignored[0]; i++) {
        if (sigaction(ignored[i], &ignore, NULL) != 0) {
            return -errno;
        }
    }
    close_others();
    if (fcntl(DCP_PROCESS_SOCKET, F_SETFD, FD_CLOEXEC) != 0 || chdir("/") != 0 ||
        prctl(PR_SET_NAME, (unsigned long)name, 0, 0, 0) != 0) {
        return -errno;
    }
    return 0;
}

int64_t
dcp_process_parent(void)
{
    return getppid();
}

bool
dcp_file_lock(int fd, bool shared)
{
    return flock(fd, (shared ? LOCK_SH : LOCK_EX) | LOCK_NB) == 0 || errno != EWOULDBLOCK;
}

static int
map_whole(struct dcp_process_memory *memory, int fd, const struct stat *info, int protection,
          int sharing)
{
    uint64_t whole = (uint64_t)info->st_size; /* the next save may need a little more of it */

    dcp_process_unmap(memory);
    void *bytes = mmap(NULL, (size_t)whole, protection, sharing, fd, 0);
    if (bytes == MAP_FAILED) {
        return -errno;
    }
    (void)madvise(bytes, (size_t)whole, MADV_DONTDUMP);
    *memory = (struct dcp_process_memory){
        .bytes = bytes, .len = whole, .dev = info->st_dev, .ino = info->st_ino};
    return 0;
}

/* Pages behind the end would be a SIGBUS. */
static int
ask_length(int fd, uint64_t len, struct stat *ret_info)
{
    if (fstat(fd, ret_info) != 0) {
        return -errno;
    }
    return S_ISREG(ret_info->st_mode) && len != 0 && len <= (uint64_t)ret_info->st_size ? 0
                                                                                        : -EINVAL;
}

int
dcp_process_map_own(struct dcp_process_memory *memory, int fd, uint64_t len)
{
    struct stat info;
    int rc = ask_length(fd, len, &info);

    return rc != 0
               ? rc
               : map_whole(memory, fd, &info, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE);
}

int
dcp_process_map(struct dcp_process_memory *memory, int fd, uint64_t len)
{
    struct stat info;
    int rc = ask_length(fd, len, &info);

    if (rc != 0 || (memory->len >= len && dcp_process_is_mapped(memory, fd))) {
        return rc;
    }
    return map_whole(memory, fd, &info, PROT_READ, MAP_SHARED);
}

bool
dcp_process_is_mapped(const struct dcp_process_memory *memory, int fd)
{
    struct stat info;

    return memory->bytes != NULL && fstat(fd, &info) == 0 && memory->dev == info.st_dev &&
           memory->ino == info.st_ino;
}

/* Kernels before 5.14 have no call for it: then whoever reads faults. */
int
dcp_process_touch(const struct dcp_process_memory *memory, uint64_t len, const atomic_int *cancel)
{
    uint64_t step;

    len = dcp_min_u64(len, memory->len);
    for (uint64_t at = 0; at < len && atomic_load(cancel) == 0; at += step) {
        step = dcp_min_u64(len - at, TOUCH_BYTES);
        int rc;
        do {
            rc = madvise(memory->bytes + at, (size_t)step, RAW_MADV_POPULATE_READ);
        } while (rc != 0 && (errno == EINTR || errno == EAGAIN));
        if (rc != 0) {
            return errno == EINVAL ? 0 : -errno;
        }
    }
    return 0;
}

void
dcp_process_unmap(struct dcp_process_memory *memory)
{
    if (memory->bytes != NULL) {
        (void)munmap(memory->bytes, (size_t)memory->len);
    }
    *memory = (struct dcp_process_memory){0};
}

/* ---- both ---- */

int
dcp_socket_wait(int socket, bool writing, uint64_t timeout_ns)
{
    struct pollfd wanted = {.fd = socket, .events = writing ? POLLOUT : POLLIN};
    int rc = poll(&wanted, 1, (int)(timeout_ns / 1000000u));

    if (rc < 0) {
        return errno == EINTR ? 0 : -errno;
    }
    return rc;
}

ssize_t
dcp_socket_send(int socket, const void *bytes, size_t len, const int *fds, uint32_t fds_count)
{
    union {
        struct cmsghdr header; /* aligns */
        char bytes[CMSG_SPACE(DCP_SOCKET_MOST_FDS * sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = len};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t rc;

    DCP_ASSERT(fds_count <= DCP_SOCKET_MOST_FDS);
    if (fds_count != 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(fds_count * sizeof(int));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(fds_count * sizeof(int));
        memcpy(CMSG_DATA(&control.header), fds, fds_count * sizeof(int));
    }
    do {
        rc = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : rc;
}

/* Appends what came along; false when it does not fit, and then all that came is closed. */
static bool
take_descriptors(struct msghdr *message, int fds[DCP_SOCKET_MOST_FDS], uint32_t *fds_count)
{
    bool fits = (message->msg_flags & MSG_CTRUNC) == 0;

    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part != NULL;
         part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            if (*fds_count < DCP_SOCKET_MOST_FDS) {
                fds[(*fds_count)++] = fd;
            } else {
                close(fd);
                fits = false;
            }
        }
    }
    return fits;
}

ssize_t
dcp_socket_receive(int socket, void *bytes, size_t cap, int fds[DCP_SOCKET_MOST_FDS],
                   uint32_t *fds_count)
{
    union {
        struct cmsghdr header; /* aligns */
        char bytes[CMSG_SPACE(DCP_SOCKET_MOST_FDS * sizeof(int))];
    } control;
    struct iovec part = {.iov_base = bytes, .iov_len = cap};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    ssize_t rc;

    do {
        rc = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (rc < 0 && errno == EINTR);
    if (rc < 0) {
        return -errno;
    }
    return take_descriptors(&message, fds, fds_count) ? rc : -EPROTO;
}

void
dcp_socket_end(int socket)
{
    (void)shutdown(socket, SHUT_RDWR);
}

void
dcp_descriptor_close(int fd)
{
    (void)close(fd);
}

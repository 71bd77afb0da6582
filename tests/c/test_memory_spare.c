/*
 * test_memory_spare.c: what may still be taken, as machines and control groups tell it, and under a
 * real group.
 */
#include "ctest.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dcp_arena.h"
#include "io_memory.h"

#define MIB (UINT64_C(1) << 20)

/* A machine of files. */
struct host {
    struct io_memory *fs;
    struct dcp_io *io;
};

static void
put(struct host *host, const char *dir, const char *name, const char *text)
{
    CHECK_EQ(host->io->mkdirs(host->io->ctx, dir), 0);
    io_memory_put_file(host->fs, dir, name, text, strlen(text));
}

static void
put_number(struct host *host, const char *dir, const char *name, uint64_t number)
{
    char text[32];
    snprintf(text, sizeof text, "%" PRIu64 "\n", number);
    put(host, dir, name, text);
}

static void
put_stat(struct host *host, const char *dir, const char *name, const char *word, uint64_t bytes)
{
    char text[128];
    snprintf(text, sizeof text, "active_file 77\n%s_not %d\n%s %" PRIu64 "\nunevictable 3\n", word,
             9, word, bytes);
    put(host, dir, name, text);
}

/* Says MemAvailable: `mib`. */
static void
host_make(struct host *host, uint64_t mib)
{
    char text[128];
    host->fs = io_memory_new(1);
    host->io = &io_memory_process(host->fs, 0)->io;
    snprintf(text, sizeof text,
             "MemTotal:       99999999 kB\nMemFree:  5 kB\nMemAvailable:   %" PRIu64 " kB\nX: 1\n",
             mib << 10);
    put(host, "/proc", "meminfo", text);
}

static void
host_check(struct host *host, uint64_t spare_bytes, const char *name)
{
    char got[128];
    CHECK_EQ(dcp_memory_spare_bytes(host->io, got), spare_bytes);
    CHECK(strcmp(got, name) == 0);
    if (strcmp(got, name) != 0) {
        fprintf(stderr, "the limit is %s, not %s\n", got, name);
    }
    CHECK_EQ(io_memory_open_files(host->fs), 0);
}

static void
host_clean_up(struct host *host)
{
    io_memory_free(host->fs);
}

static const char v2_mounts[] =
    "22 1 0:20 / /proc rw shared:5 - proc proc rw\n"
    "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 master:2 - cgroup2 cgroup2 rw,nsdelegate\n";
static const char v1_mounts[] = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
                                "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
                                "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";

static void
without_groups_the_machine_alone_limits(void)
{
    struct host host;
    host_make(&host, 500);
    host_check(&host, 500 * MIB, "MemAvailable");
    put(&host, "/proc", "self/cgroup", "0::/user.slice\n");
    host_check(&host, 500 * MIB, "MemAvailable");
    put(&host, "/proc", "self/mountinfo", v2_mounts);
    host_check(&host, 500 * MIB, "MemAvailable"); /* the mount can't be opened */
    put(&host, "/sys/fs/cgroup", "user.slice/memory.max", "max\n");
    put_number(&host, "/sys/fs/cgroup", "user.slice/memory.current", 9999 * MIB);
    host_check(&host, 500 * MIB, "MemAvailable");
    host_clean_up(&host);
}

static void
nothing_that_tells_is_no_limit(void)
{
    struct host host = {.fs = io_memory_new(1)};
    host.io = &io_memory_process(host.fs, 0)->io;
    host_check(&host, UINT64_MAX, "");
    put(&host, "/proc", "meminfo", "MemTotal: 5 kB\nMemAvailable: many\n");
    host_check(&host, UINT64_MAX, "");
    host_clean_up(&host);
}

static void
every_group_above_counts_in_version_2(void)
{
    struct host host;
    const char *at = "/sys/fs/cgroup";
    host_make(&host, 5000);
    put(&host, "/proc", "self/cgroup", "1:name=systemd:/zzz\n0::/a/b/c\n");
    put(&host, "/proc", "self/mountinfo", v2_mounts);
    put_number(&host, at, "a/b/c/memory.max", 900 * MIB);
    put_number(&host, at, "a/b/c/memory.current", 100 * MIB);
    host_check(&host, 800 * MIB, "cgroup /a/b/c");
    put_number(&host, at, "a/memory.max", 1000 * MIB);
    put_number(&host, at, "a/memory.current", 700 * MIB);
    host_check(&host, 300 * MIB, "cgroup /a");
    /* Page cache that nobody needs is given back first. */
    put_stat(&host, at, "a/memory.stat", "inactive_file", 600 * MIB);
    host_check(&host, 800 * MIB, "cgroup /a/b/c");
    put(&host, at, "a/b/memory.max", "max\n");
    put_number(&host, at, "a/b/memory.high", 150 * MIB);
    put_number(&host, at, "a/b/memory.current", 100 * MIB);
    host_check(&host, 50 * MIB, "cgroup /a/b");
    put_number(&host, at, "a/b/memory.current", 200 * MIB);
    host_check(&host, 0, "cgroup /a/b");
    host_clean_up(&host);
}

static void
every_group_above_counts_in_version_1(void)
{
    struct host host;
    const char *at = "/sys/fs/cgroup/memory";
    host_make(&host, 5000);
    put(&host, "/proc", "self/cgroup", "9:cpu:/x\n4:hugetlb,memory:/job/task\n0::/\n");
    put(&host, "/proc", "self/mountinfo", v1_mounts);
    put_number(&host, at, "memory.limit_in_bytes", 9223372036854771712u);
    put_number(&host, at, "memory.usage_in_bytes", 7777 * MIB);
    put_number(&host, at, "job/memory.limit_in_bytes", 9223372036854771712u);
    host_check(&host, 5000 * MIB, "MemAvailable");
    put_number(&host, at, "job/task/memory.limit_in_bytes", 400 * MIB);
    put_number(&host, at, "job/task/memory.usage_in_bytes", 300 * MIB);
    put_stat(&host, at, "job/task/memory.stat", "total_inactive_file", 50 * MIB);
    host_check(&host, 150 * MIB, "cgroup /job/task");
    put_number(&host, at, "job/memory.limit_in_bytes", 320 * MIB);
    put_number(&host, at, "job/memory.usage_in_bytes", 310 * MIB);
    host_check(&host, 10 * MIB, "cgroup /job");
    put_number(&host, at, "memory.limit_in_bytes", 7780 * MIB);
    host_check(&host, 3 * MIB, "cgroup /");
    host_clean_up(&host);
}

static void
a_container_sees_its_own_group_at_the_top_of_the_mount(void)
{
    struct host host;
    host_make(&host, 5000);
    put(&host, "/proc", "self/cgroup", "0::/docker/abc/inner\n");
    put(&host, "/proc", "self/mountinfo",
        "30 24 0:26 /docker/abc /sys/fs/my\\040group ro - cgroup2 cgroup rw\n");
    put_number(&host, "/sys/fs/my group", "memory.max", 70 * MIB);
    put_number(&host, "/sys/fs/my group", "memory.current", 30 * MIB);
    host_check(&host, 40 * MIB, "cgroup /docker/abc");
    put_number(&host, "/sys/fs/my group", "inner/memory.max", 20 * MIB);
    host_check(&host, 20 * MIB, "cgroup /docker/abc/inner");
    /* The process lives elsewhere: what is shown limits all of it that can be seen. */
    put(&host, "/proc", "self/cgroup", "0::/docker/abcdef\n");
    host_check(&host, 40 * MIB, "cgroup /docker/abc");
    put(&host, "/proc", "self/cgroup", "0::/../other\n");
    host_check(&host, 40 * MIB, "cgroup /docker/abc");
    host_clean_up(&host);
}

static void
files_that_make_no_sense_do_not_limit(void)
{
    static const char *const garbage[] = {
        "", "\n", "-5\n", "abc", "12x4\n", "99999999999999999999999\n", "max", "0x10", " "};
    struct host host;
    const char *at = "/sys/fs/cgroup";
    host_make(&host, 5000);
    put(&host, "/proc", "self/cgroup", "0::/a\n");
    put(&host, "/proc", "self/mountinfo", v2_mounts);
    for (size_t i = 0; i < sizeof garbage / sizeof garbage[0]; i++) {
        put(&host, at, "a/memory.max", garbage[i]);
        host_check(&host, 5000 * MIB, "MemAvailable");
    }
    put(&host, at, "a/memory.max", "1048576");
    for (size_t i = 0; i < sizeof garbage / sizeof garbage[0]; i++) {
        put(&host, at, "a/memory.stat", garbage[i]);
        put(&host, at, "a/memory.current", "0");
        host_check(&host, MIB, "cgroup /a");
    }
    static const char *const groups[] = {"", "0", "0:", "0::", ":::", "a:b:c:d\n\n", "0:memory:/a"};
    for (size_t i = 0; i < sizeof groups / sizeof groups[0]; i++) {
        put(&host, "/proc", "self/cgroup", groups[i]);
        host_check(&host, 5000 * MIB, "MemAvailable");
    }
    static const char *const mounts[] = {"",
                                         "-",
                                         "- cgroup2",
                                         "1 2 3 / /x - cgroup2",
                                         "1 2 3 \\ \\0 - cgroup2 a b\n",
                                         "1 2 3 / /sys/fs/cgroup rw",
                                         "\n\n\n"};
    put(&host, "/proc", "self/cgroup", "0::/a\n");
    for (size_t i = 0; i < sizeof mounts / sizeof mounts[0]; i++) {
        put(&host, "/proc", "self/mountinfo", mounts[i]);
        host_check(&host, 5000 * MIB, "MemAvailable");
    }
    host_clean_up(&host);
}

/* Long enough for every buffer. */
static void
paths_that_are_too_long_do_not_limit(void)
{
    struct host host;
    struct dcp_buf buf = {0};
    host_make(&host, 5000);
    dcp_buf_put(&buf, "0::", 3);
    for (int i = 0; i < 5000; i++) {
        dcp_buf_put(&buf, "/a", 2);
    }
    io_memory_put_file(host.fs, "/proc", "self/cgroup", buf.data, buf.len);
    put(&host, "/proc", "self/mountinfo", v2_mounts);
    CHECK_EQ(host.io->mkdirs(host.io->ctx, "/sys/fs/cgroup"), 0);
    host_check(&host, 5000 * MIB, "MemAvailable");
    io_memory_put_file(host.fs, "/proc", "self/cgroup", buf.data, 3 + 4000);
    put_number(&host, "/sys/fs/cgroup", "memory.max", MIB);
    host_check(&host, MIB, "cgroup /");
    dcp_buf_clean_up(&buf);
    host_clean_up(&host);
}

static void
interrupts_and_short_reads_change_nothing_and_failures_do_not_limit(void)
{
    for (uint64_t nth = 1; nth < 60; nth++) {
        struct host host;
        char name[128];
        host_make(&host, 5000);
        put(&host, "/proc", "self/cgroup", "0::/a\n");
        put(&host, "/proc", "self/mountinfo", v2_mounts);
        put_number(&host, "/sys/fs/cgroup", "a/memory.max", 100 * MIB);
        put_number(&host, "/sys/fs/cgroup", "a/memory.current", 30 * MIB);
        io_memory_faults(host.fs)->eintr_percent = 30;
        io_memory_faults(host.fs)->short_percent = 50;
        host_check(&host, 70 * MIB, "cgroup /a");
        io_memory_faults(host.fs)->fail_call = IO_CALLS;
        io_memory_faults(host.fs)->fail_nth = nth;
        io_memory_faults(host.fs)->fail_errno = EIO;
        uint64_t spare = dcp_memory_spare_bytes(host.io, name);
        CHECK(spare == 70 * MIB || spare == 100 * MIB || spare == 5000 * MIB ||
              spare == UINT64_MAX);
        CHECK_EQ(io_memory_open_files(host.fs), 0);
        host_clean_up(&host);
    }
}

/* ---- a real group ---- */

static bool
write_text(const char *dir, const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool good = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0) {
        close(fd);
    }
    return good;
}

/* In the group, limited to 192 MiB. */
static bool
lives_in_192_mib(const char *group)
{
    struct dcp_arena_limits limits = {.io = dcp_io_posix(), .sharers = 1};
    struct dcp_arena *arena = NULL, *more = NULL;
    struct dcp_error err = {0};
    char name[128];
    uint64_t spare = dcp_memory_spare_bytes(limits.io, name);
    bool good = spare > 128 * MIB && spare <= 192 * MIB && strstr(name, group) != NULL;
    good = good &&
           dcp_arena_acquire(DCP_ARENA_PRIVATE, 160 * MIB, &limits, &arena, &err) == DCP_E_LIMIT &&
           strstr(err.message, group) != NULL;
    dcp_error_clear(&err);
    good = good && dcp_arena_acquire(DCP_ARENA_PRIVATE, 64 * MIB, &limits, &arena, &err) == 0 &&
           dcp_arena_populate(arena, 64 * MIB, NULL, &err) == 0;
    spare = dcp_memory_spare_bytes(limits.io, name);
    good = good && spare > 64 * MIB && spare <= 128 * MIB;
    limits.sharers = 2;
    good =
        good && dcp_arena_acquire(DCP_ARENA_SHARED, 64 * MIB, &limits, &more, &err) == DCP_E_LIMIT;
    if (!good) {
        fprintf(stderr, "%" PRIu64 " of %s: %s\n", spare, name, err.message);
    }
    return good;
}

static void
a_real_group_is_respected(void)
{
    const char *v1 = "/sys/fs/cgroup/memory", *v2 = "/sys/fs/cgroup";
    char group[64], dir[128], pid[32];
    struct stat info;
    bool is_v1 = stat("/sys/fs/cgroup/memory/memory.limit_in_bytes", &info) == 0;
    snprintf(group, sizeof group, "dcp_native_test_%d", (int)getpid());
    snprintf(dir, sizeof dir, "%s/%s", is_v1 ? v1 : v2, group);
    if (mkdir(dir, 0755) != 0) {
        printf("skip a_real_group_is_respected: %s can't be made: %s\n", dir, strerror(errno));
        return;
    }
    bool limited = write_text(dir, is_v1 ? "memory.limit_in_bytes" : "memory.max", "201326592");
    fflush(stdout);
    pid_t child = limited ? fork() : -1;
    if (child == 0) {
        snprintf(pid, sizeof pid, "%d", (int)getpid());
        if (!write_text(dir, "cgroup.procs", pid)) {
            _exit(77);
        }
        _exit(lives_in_192_mib(group) ? 0 : 1);
    }
    int status = 77 << 8;
    CHECK(child < 0 || waitpid(child, &status, 0) == child);
    CHECK_EQ(rmdir(dir), 0);
    if (status == 77 << 8) {
        printf("skip a_real_group_is_respected: a group of memory can't be limited or entered\n");
        return;
    }
    CHECK_EQ(status, 0);
}

CTEST_MAIN(RUN(without_groups_the_machine_alone_limits); RUN(nothing_that_tells_is_no_limit);
           RUN(every_group_above_counts_in_version_2); RUN(every_group_above_counts_in_version_1);
           RUN(a_container_sees_its_own_group_at_the_top_of_the_mount);
           RUN(files_that_make_no_sense_do_not_limit); RUN(paths_that_are_too_long_do_not_limit);
           RUN(interrupts_and_short_reads_change_nothing_and_failures_do_not_limit);
           RUN(a_real_group_is_respected);)

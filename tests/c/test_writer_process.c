/*
 * test_writer_process.c: the writer process makes the files that its trainer would have made, and
 * the death of either leaves the other well.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ctest.h"
#include "dcp_trace.h"
#include "writer_world.h"

static const struct world_options small_mix = {
    .seed = 5, .tensors = 12, .objects = 4, .thread_count = 2};
static const struct world_options one_large = {
    .seed = 7, .tensors = 1, .thread_count = 1, .large_bytes = 6000000};

/* A write that takes until something stops it. */
static struct dcp_engine_options
slow(void)
{
    return (struct dcp_engine_options){.tuning = {.limit_bytes_s = 100000},
                                       .ring_buffer_bytes = 64u << 10};
}

/* ---- what it does ---- */

static void
its_files_are_those_of_the_image(void)
{
    struct dcp_writer_process *process = writer_start();

    for (uint64_t seed = 0; seed < 24; seed++) {
        struct world_options options = {.seed = seed,
                                        .tensors = (uint32_t)(seed * 7 % 20),
                                        .objects = (uint32_t)(seed % 4),
                                        .thread_count = 1 + (uint32_t)(seed % 4),
                                        .file_per_item = seed % 5 == 4,
                                        .large_bytes = seed % 6 == 1 ? 3000000 + 4096 * seed : 0,
                                        .content_hash = seed / 2 % 2 == 0};
        _Atomic uint64_t progress = 0;
        _Atomic uint32_t created = 0;
        struct dcp_engine_options engine = {.direct = (enum dcp_direct)(seed % 2),
                                            .sync = seed % 3 == 0,
                                            .progress_bytes = &progress,
                                            .created_files = &created};
        struct dcp_write_stats stats = {0};
        struct writer_world w;
        struct dcp_error err = {0};

        writer_world_make(&w, &options, NULL);
        CHECK_OK(writer_write(process, &w, &engine, &stats, &err), &err);
        CHECK(world_check_files(dcp_io_posix(), w.dirfd, &w.world));
        CHECK_EQ(stats.files_count, w.image.files_count);
        CHECK_EQ(stats.payload_bytes, w.image.payload_bytes);
        CHECK_EQ(atomic_load(&created), w.image.files_count);
        CHECK_EQ(atomic_load(&progress), w.image.payload_bytes);
        CHECK(dcp_writer_process_usable(process));
        writer_world_clean_up(&w);
    }
    dcp_writer_process_stop(process);
}

/* Returns how many events the queue holds of that name; it is empty then. */
static uint64_t
traced_events(const char *name, struct dcp_buf *buf)
{
    struct dcp_error err = {0};
    uint64_t count, found = 0;

    do {
        CHECK_OK(dcp_trace_take(buf, 0, 0, &count, &err), &err);
    } while (count != 0);
    for (const uint8_t *at = buf->data;
         at != NULL && (at = memmem(at, (size_t)(buf->data + buf->len - at), name, strlen(name)));
         at++) {
        found++;
    }
    return found;
}

static void
what_it_did_when_is_in_its_trainers_trace(void)
{
    struct dcp_writer_process *process = writer_start();
    struct dcp_engine_options engine = {.sync = true};
    struct writer_world w;
    struct dcp_buf traced = {0}, untraced = {0};

    writer_world_make(&w, &small_mix, NULL);
    dcp_trace_switch(true);
    CHECK(writer_writes(process, &w, &engine));
    dcp_trace_switch(false);
    CHECK_EQ(traced_events("\"writer process: writing\"", &traced), 1);
    traced.len = 0;
    CHECK_EQ(dcp_trace_dropped(), 0);
    writer_world_clean_up(&w);
    writer_world_make(&w, &small_mix, NULL);
    dcp_trace_switch(true);
    CHECK(writer_writes(process, &w, &engine));
    dcp_trace_switch(false);
    CHECK_EQ(traced_events("\"sync\"", &traced), w.image.files_count);
    writer_world_clean_up(&w);
    writer_world_make(&w, &small_mix, NULL);
    CHECK(writer_writes(process, &w, &engine));
    CHECK_EQ(traced_events("\"", &untraced), 0);
    writer_world_clean_up(&w);
    dcp_buf_clean_up(&traced);
    dcp_buf_clean_up(&untraced);
    dcp_writer_process_stop(process);
}

static void
an_arena_may_grow_and_change_between_saves(void)
{
    struct dcp_writer_process *process = writer_start();
    struct dcp_engine_options engine = {0};
    struct writer_world w, other;

    writer_world_make(&w, &small_mix, NULL);
    writer_world_make(&other, &one_large, NULL);
    for (int round = 0; round < 3; round++) {
        CHECK(writer_writes(process, &w, &engine));
        CHECK_EQ(ftruncate(w.arena.fd, (off_t)(w.arena.bytes << (round + 1))), 0);
        CHECK(writer_writes(process, &w, &engine));
        CHECK(writer_writes(process, &other, &engine));
    }
    writer_world_clean_up(&other);
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

static void
an_arena_that_holds_another_save_is_not_written(void)
{
    struct dcp_writer_process *process = writer_start();
    struct dcp_engine_options engine = {0};
    struct writer_world w;
    struct dcp_error err = {0};

    writer_world_make(&w, &small_mix, NULL);
    w.world.save_id.bytes[3] ^= 1;
    CHECK_EQ(writer_write(process, &w, &engine, NULL, &err), DCP_E_CORRUPT);
    w.world.save_id.bytes[3] ^= 1;
    CHECK_EQ(ftruncate(w.arena.fd, 4096), 0); /* no SIGBUS */
    dcp_error_clear(&err);
    CHECK_EQ(writer_write(process, &w, &engine, NULL, &err), DCP_E_IO);
    CHECK_EQ(writer_world_sweep(&w), 0);
    CHECK(dcp_writer_process_usable(process));
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

static void
an_existing_name_is_told_as_the_engine_tells_it(void)
{
    struct dcp_writer_process *process = writer_start();
    struct dcp_engine_options engine = {0};
    _Atomic uint32_t created = 0;
    struct writer_world w;
    struct dcp_error err = {0};

    writer_world_make(&w, &small_mix, NULL);
    CHECK_OK(writer_write(process, &w, &engine, NULL, &err), &err);
    engine.created_files = &created;
    CHECK_EQ(writer_write(process, &w, &engine, NULL, &err), DCP_E_EXISTS);
    CHECK_EQ(err.sys_errno, EEXIST);
    CHECK(strncmp(err.path, w.dir, strlen(w.dir)) == 0);
    CHECK_EQ(atomic_load(&created), 0);
    CHECK(world_check_files(dcp_io_posix(), w.dirfd, &w.world));
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

/* ---- what it has ---- */

static void
read_of(int64_t pid, const char *name, char *text, size_t size)
{
    char path[64];

    snprintf(path, sizeof path, "/proc/%lld/%s", (long long)pid, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t len = fd >= 0 ? read(fd, text, size - 1) : -1;
    CHECK(len >= 0);
    text[len > 0 ? len : 0] = '\0';
    close(fd);
}

static void
it_inherits_its_socket_and_nothing_else(void)
{
    int leaks[3];
    char text[4096], link[64], target[256];

    for (int i = 0; i < 3; i++) {
        leaks[i] = open("/", O_RDONLY); /* not closed by an exec */
    }
    CHECK_EQ(setenv("DCP_WRITER_TEST", "1", 1), 0);
    struct dcp_writer_process *process = writer_start();
    int64_t pid = dcp_writer_process_pid(process);

    CHECK_EQ(writer_descriptors(pid), 4);
    for (int fd = 0; fd <= 3; fd++) {
        snprintf(link, sizeof link, "/proc/%lld/fd/%d", (long long)pid, fd);
        ssize_t len = readlink(link, target, sizeof target - 1);
        target[len > 0 ? len : 0] = '\0';
        CHECK(fd < 3 ? strcmp(target, "/dev/null") == 0 : strncmp(target, "socket:", 7) == 0);
    }
    read_of(pid, "environ", text, sizeof text);
    CHECK_EQ(strlen(text), 0);
    read_of(pid, "comm", text, sizeof text);
    CHECK(strcmp(text, "dcp_writer\n") == 0);
    snprintf(link, sizeof link, "/proc/%lld/cwd", (long long)pid);
    CHECK_EQ(readlink(link, target, sizeof target), 1);
    CHECK_EQ(getsid((pid_t)pid), pid);
    dcp_writer_process_stop(process);
    for (int i = 0; i < 3; i++) {
        close(leaks[i]);
    }
}

static void
signals_meant_for_its_trainer_do_not_reach_it(void)
{
    static const int signals[] = {SIGINT, SIGHUP, SIGTERM, SIGQUIT, SIGUSR1, SIGPIPE};
    struct dcp_engine_options engine = {0};
    struct writer_world w;
    sigset_t blocked, before;

    /* Nor does what the trainer's thread blocks reach it. */
    sigfillset(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    struct dcp_writer_process *process = writer_start();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    writer_world_make(&w, &small_mix, NULL);
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++) {
        CHECK_EQ(kill((pid_t)dcp_writer_process_pid(process), signals[i]), 0);
    }
    CHECK(writer_writes(process, &w, &engine));
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

static void
a_full_disk_and_a_file_limit_are_errors_and_not_its_end(void)
{
    struct rlimit before, small = {.rlim_cur = 1u << 20};
    struct dcp_engine_options engine = {0};
    char full[] = "/tmp/dcp-full-XXXXXX";
    struct writer_world w;
    struct dcp_error err = {0};

    CHECK_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    small.rlim_max = before.rlim_max;
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    struct dcp_writer_process *process = writer_start();
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
    writer_world_make(&w, &one_large, NULL);
    CHECK_EQ(writer_write(process, &w, &engine, NULL, &err), DCP_E_IO);
    CHECK_EQ(err.sys_errno, EFBIG);
    CHECK_EQ(writer_world_sweep(&w), 1);
    CHECK(dcp_writer_process_usable(process));
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);

    CHECK(mkdtemp(full) != NULL);
    if (mount("tmpfs", full, "tmpfs", 0, "size=1m") == 0) { /* where we may */
        process = writer_start();
        writer_world_make(&w, &one_large, full);
        dcp_error_clear(&err);
        CHECK_EQ(writer_write(process, &w, &engine, NULL, &err), DCP_E_IO);
        CHECK_EQ(err.sys_errno, ENOSPC);
        CHECK_EQ(writer_world_sweep(&w), 1);
        CHECK(dcp_writer_process_usable(process));
        writer_world_clean_up(&w);
        dcp_writer_process_stop(process);
        CHECK_EQ(umount(full), 0);
    }
    CHECK_EQ(rmdir(full), 0);
}

static void
descriptors_do_not_gather_over_many_saves(void)
{
    struct dcp_writer_process *process = writer_start();
    struct dcp_engine_options engine = {0};
    struct writer_world w;
    struct dcp_error err = {0};

    writer_world_make(&w, &small_mix, NULL);
    uint32_t ours = writer_descriptors(getpid());
    for (int i = 0; i < 200 && ctest_failures == 0; i++) {
        /* Every fourth fails: the names are taken. */
        bool fails = i % 4 == 3;
        int rc = writer_write(process, &w, &engine, NULL, &err);
        CHECK_EQ(rc, fails ? DCP_E_EXISTS : 0);
        if (i % 4 != 2) {
            CHECK_EQ(writer_world_sweep(&w), w.image.files_count);
        }
        dcp_error_clear(&err);
    }
    CHECK_EQ(writer_descriptors(getpid()), ours);
    CHECK_EQ(writer_descriptors(dcp_writer_process_pid(process)), 4);
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

/* ---- cancel and death ---- */

/* Does something to a write once it has made progress. */
struct disturber {
    struct dcp_writer_process *process;
    _Atomic uint64_t progress;
    atomic_int cancel;
    int signal; /* 0: cancels */
};

static void *
disturb(void *ctx)
{
    struct disturber *d = ctx;

    while (atomic_load(&d->progress) == 0) {
        dcp_io_posix()->sleep_ns(NULL, 1000000);
    }
    if (d->signal != 0) {
        kill((pid_t)dcp_writer_process_pid(d->process), d->signal);
    }
    if (d->signal != SIGKILL) {
        atomic_store(&d->cancel, 1);
    }
    return NULL;
}

static int
write_disturbed(struct disturber *d, const struct writer_world *w, struct dcp_error *err)
{
    struct dcp_engine_options engine = slow();
    _Atomic uint32_t created = 0;
    pthread_t thread;

    engine.progress_bytes = &d->progress;
    engine.cancel = &d->cancel;
    engine.created_files = &created;
    CHECK_EQ(pthread_create(&thread, NULL, disturb, d), 0);
    int rc = writer_write(d->process, w, &engine, NULL, err);
    pthread_join(thread, NULL);
    CHECK_EQ(atomic_load(&created), 1);
    CHECK_EQ(writer_world_sweep(w), 1);
    return rc;
}

static void
a_cancelled_write_ends_and_the_next_one_works(void)
{
    struct dcp_writer_process *process = writer_start();
    struct disturber d = {.process = process};
    struct dcp_engine_options engine = {0};
    struct writer_world w;
    struct dcp_error err = {0};

    writer_world_make(&w, &one_large, NULL);
    CHECK_EQ(write_disturbed(&d, &w, &err), DCP_E_CANCELLED);
    CHECK(dcp_writer_process_usable(process));
    dcp_error_clear(&err);
    CHECK(writer_writes(process, &w, &engine));
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

static void
a_process_killed_while_it_writes_fails_that_save_by_name(void)
{
    struct dcp_writer_process *process = writer_start();
    struct disturber d = {.process = process, .signal = SIGKILL};
    struct writer_world w;
    struct dcp_error err = {0};
    char pid[32];

    writer_world_make(&w, &one_large, NULL);
    CHECK_EQ(write_disturbed(&d, &w, &err), DCP_E_IO);
    snprintf(pid, sizeof pid, "pid %lld", (long long)dcp_writer_process_pid(process));
    CHECK(strstr(err.message, pid) != NULL && strstr(err.message, "signal 9") != NULL);
    CHECK(!dcp_writer_process_usable(process));
    CHECK_EQ(kill((pid_t)dcp_writer_process_pid(process), 0), -1); /* no zombie */
    dcp_writer_process_stop(process);
    writer_world_clean_up(&w);
}

static void
a_process_that_stands_still_is_given_up_after_a_cancel(void)
{
    struct dcp_writer_process *process = writer_start();
    int64_t pid = dcp_writer_process_pid(process);
    struct disturber d = {.process = process, .signal = SIGSTOP};
    struct writer_world w;
    struct dcp_error err = {0};

    writer_world_make(&w, &one_large, NULL);
    CHECK_EQ(write_disturbed(&d, &w, &err), DCP_E_CANCELLED);
    CHECK(!dcp_writer_process_usable(process));
    dcp_writer_process_stop(process);
    CHECK_EQ(kill((pid_t)pid, 0), -1);
    writer_world_clean_up(&w);
}

static void
a_process_killed_between_saves_is_noticed(void)
{
    struct dcp_writer_process *process = writer_start();
    struct dcp_engine_options engine = {0};
    struct writer_world w;
    struct dcp_error err = {0};

    writer_world_make(&w, &small_mix, NULL);
    for (int before = 0; before < 2; before++) {
        if (!before) {
            CHECK(writer_writes(process, &w, &engine));
        }
        CHECK_EQ(kill((pid_t)dcp_writer_process_pid(process), SIGKILL), 0);
        if (before) {
            CHECK_EQ(writer_write(process, &w, &engine, NULL, &err), DCP_E_IO);
            writer_world_sweep(&w);
        } else {
            while (dcp_writer_process_usable(process)) {
                dcp_io_posix()->sleep_ns(NULL, 1000000);
            }
        }
        dcp_error_clear(&err);
        CHECK_EQ(writer_write(process, &w, &engine, NULL, &err), DCP_E_INVALID);
        dcp_writer_process_stop(process);
        process = writer_start();
        dcp_error_clear(&err);
    }
    CHECK(writer_writes(process, &w, &engine));
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

static void
what_cannot_serve_is_told_at_its_start(void)
{
    struct dcp_writer_process *process = NULL;
    struct dcp_error err = {0};
    uint32_t ours = writer_descriptors(getpid());

    CHECK_EQ(dcp_writer_process_start("/nowhere/dcp_writer", &process, &err), DCP_E_IO);
    CHECK_EQ(err.sys_errno, ENOENT);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_writer_process_start("/etc/passwd", &process, &err), DCP_E_IO);
    CHECK_EQ(err.sys_errno, EACCES);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_writer_process_start("/bin/false", &process, &err), DCP_E_IO);
    CHECK(strstr(err.message, "status 1") != NULL);
    CHECK(process == NULL);
    dcp_writer_process_stop(NULL);
    CHECK_EQ(writer_descriptors(getpid()), ours);
    CHECK_EQ(waitpid(-1, NULL, WNOHANG), -1); /* no child is left */
}

static void
a_forked_child_leaves_its_parents_process_alone(void)
{
    struct dcp_writer_process *process = writer_start();
    struct dcp_engine_options engine = {0};
    struct writer_world w;
    struct dcp_error err = {0};
    int status = 0;

    writer_world_make(&w, &small_mix, NULL);
    pid_t child = fork();
    if (child == 0) {
        bool good = !dcp_writer_process_usable(process) &&
                    writer_write(process, &w, &engine, NULL, &err) == DCP_E_INVALID;
        dcp_writer_process_stop(process);
        _exit(good ? 0 : 1);
    }
    CHECK(writer_await(child, &status));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(dcp_writer_process_usable(process));
    CHECK(writer_writes(process, &w, &engine));
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

static void
a_trainer_that_ignores_its_children_is_served_all_the_same(void)
{
    struct disturber d = {.signal = SIGKILL};
    struct writer_world w;
    struct dcp_error err = {0};

    CHECK(signal(SIGCHLD, SIG_IGN) != SIG_ERR); /* the kernel reaps */
    d.process = writer_start();
    writer_world_make(&w, &one_large, NULL);
    CHECK_EQ(write_disturbed(&d, &w, &err), DCP_E_IO);
    dcp_writer_process_stop(d.process);
    writer_world_clean_up(&w);
    CHECK(signal(SIGCHLD, SIG_DFL) != SIG_ERR);
}

/* In a middle process, which is killed: says the writer's id, and writes until then. */
static void
be_a_trainer(const struct writer_world *w, bool writes, bool leaves_child, int say)
{
    struct dcp_writer_process *process = writer_start();
    struct dcp_engine_options engine = slow();
    int64_t pids[2] = {dcp_writer_process_pid(process), 0};
    struct dcp_error err = {0};

    if (leaves_child) {
        pids[1] = fork(); /* with a copy of the socket */
        if (pids[1] == 0) {
            pause();
            _exit(0);
        }
    }
    if (write(say, pids, sizeof pids) == (ssize_t)sizeof pids && writes) {
        (void)!writer_write(process, w, &engine, NULL, &err);
    }
    pause();
    _exit(0);
}

static void
it_ends_with_its_trainer(void)
{
    CHECK_EQ(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), 0);
    for (int variant = 0; variant < 4; variant++) {
        bool writes = variant % 2 == 1, leaves_child = variant / 2 == 1;
        int64_t pids[2] = {0};
        struct writer_world w;
        int ends[2], status = 0;

        writer_world_make(&w, &one_large, NULL);
        CHECK_EQ(pipe(ends), 0);
        pid_t trainer = fork();
        if (trainer == 0) {
            be_a_trainer(&w, writes, leaves_child, ends[1]);
        }
        CHECK_EQ(read(ends[0], pids, sizeof pids), sizeof pids);
        for (bool there = !writes; !there;) { /* until the file is made */
            char name[64];
            world_file_name(&w.world, 0, name, sizeof name);
            there = dcp_io_exists(dcp_io_posix(), w.dirfd, name);
        }
        kill(trainer, SIGKILL);
        CHECK(writer_await(trainer, &status));
        CHECK(writer_await(pids[0], &status));
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        if (leaves_child) {
            kill((pid_t)pids[1], SIGKILL);
            CHECK(writer_await(pids[1], &status));
        }
        CHECK_EQ(writer_world_sweep(&w), writes);
        close(ends[0]);
        close(ends[1]);
        writer_world_clean_up(&w);
    }
}

CTEST_MAIN(RUN(its_files_are_those_of_the_image); RUN(what_it_did_when_is_in_its_trainers_trace);
           RUN(an_arena_may_grow_and_change_between_saves);
           RUN(an_arena_that_holds_another_save_is_not_written);
           RUN(an_existing_name_is_told_as_the_engine_tells_it);
           RUN(it_inherits_its_socket_and_nothing_else);
           RUN(signals_meant_for_its_trainer_do_not_reach_it);
           RUN(a_full_disk_and_a_file_limit_are_errors_and_not_its_end);
           RUN(descriptors_do_not_gather_over_many_saves);
           RUN(a_cancelled_write_ends_and_the_next_one_works);
           RUN(a_process_killed_while_it_writes_fails_that_save_by_name);
           RUN(a_process_that_stands_still_is_given_up_after_a_cancel);
           RUN(a_process_killed_between_saves_is_noticed);
           RUN(what_cannot_serve_is_told_at_its_start);
           RUN(a_forked_child_leaves_its_parents_process_alone);
           RUN(a_trainer_that_ignores_its_children_is_served_all_the_same);
           RUN(it_ends_with_its_trainer);)

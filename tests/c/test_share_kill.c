/*
 * test_share_kill.c: processes that read together, one of which is killed at any of its calls: the
 * others end, with the right bytes or naming the rank, and its memory does not stay.
 *
 * Ranks are forked processes on a real directory.
 */
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ctest.h"
#include "engine_load.h"
#include "share.h"
#include "shm_faults.h"

enum { RANKS = 3, DEADLINE_MS = 60000, EXIT_OK = 0, EXIT_PEER = 10, EXIT_WRONG = 20 };

struct stage {
    char dir[64];
    int dirfd;
    struct world world;
    atomic_uint *arrived; /* seen by all processes */
};

static void
stage_make(struct stage *stage)
{
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_engine_options engine = {0};
    struct dcp_error err = {0};

    snprintf(stage->dir, sizeof stage->dir, "/tmp/dcp-share-XXXXXX");
    CHECK(mkdtemp(stage->dir) != NULL);
    stage->dirfd = io->open_dir(io->ctx, stage->dir);
    one_tensor(&stage->world, 2000, 2);
    CHECK_OK(dcp_writer_run(io, stage->dirfd, stage->dir, &stage->world.plan, &stage->world.layout,
                            stage->world.sources, &stage->world.save_id, stage->world.n0, &engine,
                            NULL, NULL, &err),
             &err);
    stage->arrived = mmap(NULL, sizeof *stage->arrived, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(stage->arrived != MAP_FAILED);
}

static void
stage_clean_up(struct stage *stage)
{
    const struct dcp_io *io = dcp_io_posix();
    char name[64];

    world_file_name(&stage->world, 0, name, sizeof name);
    CHECK_EQ(io->unlink_at(io->ctx, stage->dirfd, name), 0);
    io->close(io->ctx, stage->dirfd);
    CHECK_EQ(rmdir(stage->dir), 0);
    munmap(stage->arrived, sizeof *stage->arrived);
    world_clean_up(&stage->world);
    dcp_engine_trim();
}

/* In the child. */
static void
run_process(struct stage *stage, uint32_t rank, uint32_t victim, uint32_t nth)
{
    struct dcp_save_id load_id = {{9, (uint8_t)nth, (uint8_t)victim}};
    struct dcp_engine_options engine = {.verify = true};
    uint64_t offsets[2] = {0}, sizes[2] = {2000, 1000};
    struct dcp_share share = {.slot_bytes = DCP_BLOCK_BYTES + 2 * DCP_DIRECT_ALIGN_BYTES};
    struct dcp_read_stats stats = {0};
    struct dcp_error err = {0};
    struct shm_faults faults;
    struct load load;

    shm_faults_init(&faults, SHM_FINE, 0);
    load_init(&load, &stage->world);
    load_add(&load, &stage->world.rng, 0, offsets, sizes, rank == 1, 0);
    int rc = dcp_read_plan_build(&load.plan, true, NULL, &err);
    dcp_share_begin(&share, &faults.shm, &load_id, rank);
    atomic_fetch_add(stage->arrived, 1);
    for (int i = 0; i < DEADLINE_MS && atomic_load(stage->arrived) < RANKS; i++) {
        dcp_io_posix()->sleep_ns(NULL, 1000000);
    }
    if (rank == victim) {
        shm_faults_init(&faults, SHM_KILLS, nth);
    }
    rc = rc != 0 ? rc
                 : dcp_share_read(&share, dcp_io_posix(), stage->dirfd, stage->dir, &load.plan,
                                  &engine, NULL, NULL, &stats, &err);
    dcp_share_end(&share);
    ctest_failures = 0;
    if (rc == 0) {
        load_check(&load);
    }
    _exit(rc == 0 && ctest_failures == 0 ? EXIT_OK : rc == DCP_E_PEER ? EXIT_PEER : EXIT_WRONG);
}

/* True when the victim was killed. */
static bool
run_all(struct stage *stage, uint32_t victim, uint32_t nth, uint32_t *ret_told)
{
    pid_t pids[RANKS];
    int status[RANKS];
    bool reaped[RANKS] = {false};

    atomic_store(stage->arrived, 0);
    for (uint32_t r = 0; r < RANKS; r++) {
        fflush(stdout);
        pids[r] = fork();
        if (pids[r] == 0) {
            run_process(stage, r, victim, nth);
        }
    }
    /* The victim last: until then it is a zombie, as under a parent that is slow to look. */
    for (uint32_t i = 0; i < RANKS; i++) {
        uint32_t r = (victim + 1 + i) % RANKS;
        for (int ms = 0; ms < DEADLINE_MS && !reaped[r]; ms++) {
            reaped[r] = waitpid(pids[r], &status[r], WNOHANG) == pids[r];
            dcp_io_posix()->sleep_ns(NULL, 1000000);
        }
        CHECK(reaped[r]);
        if (!reaped[r]) {
            kill(pids[r], SIGKILL);
            waitpid(pids[r], &status[r], 0);
        }
        bool killed = WIFSIGNALED(status[r]);
        CHECK(r == victim || !killed);
        CHECK(killed || WEXITSTATUS(status[r]) == EXIT_OK || WEXITSTATUS(status[r]) == EXIT_PEER);
        *ret_told += !killed && WEXITSTATUS(status[r]) == EXIT_PEER;
    }
    /* What a killed process left goes with the next load. */
    struct dcp_share next = {0};
    struct dcp_save_id load_id = {{8}};
    dcp_share_begin(&next, dcp_shm_posix(), &load_id, 0);
    dcp_share_end(&next);
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_EQ(shm_names_of(pids[r]), 0);
    }
    return WIFSIGNALED(status[victim]);
}

static void
a_killed_process_leaves_nobody_waiting_and_nothing_behind(void)
{
    struct stage stage;
    uint32_t kills = 0, told = 0;

    stage_make(&stage);
    for (uint32_t nth = 1; nth < 100 && ctest_failures == 0; nth += nth < 12 ? 1 : 7) {
        bool killed = run_all(&stage, nth % RANKS, nth, &told);
        kills += killed;
    }
    CHECK(kills > 10);
    CHECK(told > 10);
    stage_clean_up(&stage);
}

static void
a_forked_child_leaves_the_memory_of_its_parent_alone(void)
{
    struct dcp_share share = {0};
    struct dcp_save_id load_id = {{6}};
    int status = 0;

    dcp_share_begin(&share, dcp_shm_posix(), &load_id, 0);
    CHECK_EQ(shm_names_of(getpid()), 1);
    pid_t child = fork();
    if (child == 0) {
        dcp_share_end(&share);
        _exit(share.shm == NULL ? 0 : 1);
    }
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_EQ(shm_names_of(getpid()), 1);
    CHECK_EQ(atomic_load(&share.own.header->state), DCP_SHARE_NEW);
    dcp_share_end(&share);
    CHECK_EQ(shm_names_of(getpid()), 0);
}

CTEST_MAIN(RUN(a_killed_process_leaves_nobody_waiting_and_nothing_behind);
           RUN(a_forked_child_leaves_the_memory_of_its_parent_alone);)

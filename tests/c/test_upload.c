/*
 * test_upload.c: saves in the background, as their owners see them.
 */
#include <dlfcn.h>

#include "upload_runs.h"

static const uint32_t sizes[] = {1, 2, 3, 5};

enum { SIZES = sizeof sizes / sizeof sizes[0] };

/* ---- threads that are not to be had ---- */

/* Of the calling thread: so many are refused, after so many. */
static _Thread_local uint32_t threads_granted, threads_refused;

int
pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg)
{
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

    if (threads_granted > 0) {
        threads_granted--;
    } else if (threads_refused > 0) {
        threads_refused--;
        return EAGAIN;
    }
    if (real == NULL) {
        *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    }
    return real(thread, attr, run, arg);
}

/* ---- what a save is ---- */

struct chain {
    struct upload_world world;
    bool foreground;
    int last;                /* generations are 1 to this */
    enum save_change change; /* of rank 0, from the third on */
    struct upload_result results[SAVE_GENERATIONS][UPLOAD_MOST_RANKS];
    struct save_result plain[SAVE_GENERATIONS][UPLOAD_MOST_RANKS];
};

static void
save_chain(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct chain *chain = arg;
    struct dcp_group *group = save_world_group(comm, chain->world.coordinator);
    (void)sim;

    for (int g = 1; g <= chain->last; g++) {
        struct upload_request request = {
            .save = {.generation = g,
                     .split_bytes = 1,
                     .change = g > 2 && comm->rank == 0 ? chain->change : CHANGE_NONE}};
        struct background bg;

        if (chain->foreground) {
            save_once(group, upload_world_io(&chain->world, comm->rank), &request.save,
                      &chain->plain[g][comm->rank]);
        } else if (background_begin(&bg, &chain->world, group, &request,
                                    &chain->results[g][comm->rank])) {
            background_start(&bg, group, &request);
            background_await(&bg, DCP_UPLOAD_SETTLED);
            background_look(&bg);
            background_end(&bg);
        }
    }
    dcp_group_destroy(group);
}

/* The save id, which is random, and the checksums over it are not compared. */
static void
compare_files(const struct upload_world *a, const struct upload_world *b)
{
    size_t count = io_memory_names_count(a->fs, SAVE_DIR);

    CHECK_EQ(io_memory_names_count(b->fs, SAVE_DIR), count);
    for (size_t i = 0; i < count; i++) {
        const char *name = io_memory_name(a->fs, SAVE_DIR, i);
        size_t a_len = 0, b_len = 0;
        const uint8_t *mine = io_memory_file(a->fs, SAVE_DIR, name, &a_len);
        const uint8_t *theirs = io_memory_file(b->fs, SAVE_DIR, name, &b_len);
        bool is_data = strstr(name, ".distcp") != NULL;

        CHECK(mine != NULL && theirs != NULL);
        CHECK_EQ(a_len, b_len);
        if (is_data && theirs != NULL && a_len == b_len) {
            CHECK(memcmp(mine + 64, theirs + 64, a_len - 64) == 0);
        }
    }
}

static void
uploads_leave_the_files_of_a_foreground_save(void)
{
    for (size_t s = 0; s < SIZES; s++) {
        struct chain *up = calloc(1, sizeof *up), *plain = calloc(1, sizeof *plain);

        up->last = plain->last = 2;
        plain->foreground = true;
        upload_world_init(&up->world, sizes[s]);
        upload_world_init(&plain->world, sizes[s]);
        sim_ranks_run(sizes[s], TIMEOUT_MS, save_chain, up);
        sim_ranks_run(sizes[s], TIMEOUT_MS, save_chain, plain);
        for (uint32_t r = 0; r < sizes[s]; r++) {
            const struct upload_result *result = &up->results[2][r];
            CHECK_OK(result->rc, &result->err);
            CHECK_EQ(result->info.outcome, DCP_OUTCOME_COMMITTED);
            CHECK_EQ(result->info.kept_bytes, plain->plain[2][r].info.kept_bytes);
            CHECK_EQ(result->info.unchanged_items, plain->plain[2][r].info.unchanged_items);
            CHECK_EQ(result->info.compared_items, plain->plain[2][r].info.compared_items);
            save_result_clean_up(&plain->plain[1][r]);
            save_result_clean_up(&plain->plain[2][r]);
        }
        compare_files(&up->world, &plain->world);
        CHECK_EQ(save_world_generation(up->world.fs, sizes[s]), 2);
        CHECK_EQ(store_sim_keys(up->world.store), 0);
        upload_world_end(&up->world);
        upload_world_end(&plain->world);
        free(up);
        free(plain);
    }
}

static void
plans_are_reused_until_one_changes(void)
{
    struct chain *chain = calloc(1, sizeof *chain);

    chain->last = 4;
    chain->change = CHANGE_SALT;
    upload_world_init(&chain->world, 3);
    sim_ranks_run(3, TIMEOUT_MS, save_chain, chain);
    for (int g = 1; g <= 4; g++) {
        for (uint32_t r = 0; r < 3; r++) {
            CHECK_OK(chain->results[g][r].rc, &chain->results[g][r].err);
            CHECK_EQ(chain->results[g][r].info.fast, g == 2 || g == 4);
            CHECK_EQ(chain->results[g][r].info.compared_items > 0, g == 2 || g == 4);
            CHECK(chain->results[g][r].info.staged_bytes > 0);
            CHECK_EQ(chain->results[g][r].notified, 2);
        }
    }
    CHECK_EQ(save_world_generation(chain->world.fs, 3), 4);
    upload_world_end(&chain->world);
    free(chain);
}

static void
every_way_of_writing_commits(void)
{
    for (int way = 0; way < UPLOAD_WAYS; way++) {
        for (int meets = 0; meets < 2; meets++) {
            struct run run = make_run(3, 0);
            run.request.way = (enum upload_way)way;
            run.meets = meets == 1;
            run_uploads(&run);
            check_committed(&run);
            CHECK_EQ(run.results[0].info.staged_bytes > 0,
                     way == UPLOAD_STAGED || way == UPLOAD_BEGUN);
            CHECK_EQ(run.results[0].staged, 0);
            end_run(&run);
        }
    }
}

/* ---- two at a time ---- */

struct pair {
    struct upload_world world;
    enum save_change change;
    uint32_t slow; /* its first save stands still until the second is over */
    const char *dirs[2];
    struct upload_result results[2][UPLOAD_MOST_RANKS];
};

static void
save_pair(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct pair *pair = arg;
    struct dcp_group *group = save_world_group(comm, pair->world.coordinator);
    struct gate *gate = &pair->world.ranks[comm->rank].io;
    struct background bgs[2];
    (void)sim;

    for (uint32_t i = 0; i < 2; i++) {
        struct upload_request request = {.client = i,
                                         .save = {.generation = 1 + (int)i,
                                                  .split_bytes = 1,
                                                  .dir = pair->dirs[i],
                                                  .change = i == 1 ? pair->change : CHANGE_NONE}};
        if (!background_begin(&bgs[i], &pair->world, group, &request,
                              &pair->results[i][comm->rank])) {
            exit(3);
        }
        if (i == 0 && comm->rank == pair->slow) {
            gate_close(gate, 1, IO_PWRITE);
        }
        background_start(&bgs[i], group, &request);
        if (i == 0 && comm->rank == pair->slow) {
            (void)gate_wait(gate, NULL, NULL);
        }
    }
    background_await(&bgs[1], DCP_UPLOAD_SETTLED);
    gate_open(gate);
    background_end(&bgs[1]);
    background_end(&bgs[0]);
    dcp_group_destroy(group);
}

static void
two_saves_of_one_group_are_in_flight(void)
{
    static const enum save_change changes[] = {CHANGE_NONE, CHANGE_SALT};

    for (size_t c = 0; c < 2; c++) {
        for (uint32_t slow = 0; slow < 3; slow++) {
            struct pair *pair = calloc(1, sizeof *pair);
            pair->change = changes[c];
            pair->slow = slow;
            pair->dirs[0] = "/a";
            pair->dirs[1] = "/b";
            upload_world_init(&pair->world, 3);
            sim_ranks_run(3, TIMEOUT_MS, save_pair, pair);
            for (uint32_t i = 0; i < 2; i++) {
                for (uint32_t r = 0; r < 3; r++) {
                    CHECK_OK(pair->results[i][r].rc, &pair->results[i][r].err);
                }
                CHECK_EQ(save_world_generation_of(pair->world.fs, pair->dirs[i], 3), (int)i + 1);
            }
            CHECK_EQ(pair->results[1][0].info.fast, changes[c] == CHANGE_NONE);
            CHECK_EQ(store_sim_keys(pair->world.store), 0);
            upload_world_end(&pair->world);
            free(pair);
        }
    }
}

/* The claim of the first is fenced by the second's. */
static void
the_later_save_of_one_directory_wins(void)
{
    struct pair *pair = calloc(1, sizeof *pair);

    pair->change = CHANGE_SALT;
    pair->slow = 2;
    upload_world_init(&pair->world, 3);
    sim_ranks_run(3, TIMEOUT_MS, save_pair, pair);
    for (uint32_t r = 0; r < 3; r++) {
        CHECK_OK(pair->results[1][r].rc, &pair->results[1][r].err);
        CHECK_EQ(pair->results[0][r].rc, DCP_E_PEER);
        CHECK_EQ(pair->results[0][r].outcome, DCP_OUTCOME_SUPERSEDED);
        upload_result_clean_up(&pair->results[0][r]);
    }
    CHECK_EQ(save_world_generation(pair->world.fs, 3), 2);
    CHECK_EQ(io_memory_names_count(pair->world.fs, SAVE_DIR), 4);
    upload_world_end(&pair->world);
    free(pair);
}

/* ---- failures before, and without threads ---- */

static void
a_failure_from_before_reaches_all_ranks(void)
{
    for (int way = 0; way < UPLOAD_WAYS; way++) {
        for (uint32_t victim = 0; victim < 3; victim++) {
            struct run run = make_run(3, victim);
            run.request.way = (enum upload_way)way;
            run.victim_fails_before = true;
            run_uploads(&run);
            check_blamed(&run, DCP_E_INVALID);
            check_undone(&run);
            end_run(&run);
        }
    }
}

static void
one_rank_alone_fails_by_itself(void)
{
    struct run run = make_run(1, 0);

    run.victim_fails_before = true;
    run_uploads(&run);
    check_blamed(&run, DCP_E_INVALID);
    check_undone(&run);
    end_run(&run);
}

struct threadless {
    struct run run;
    uint32_t granted;
    enum dcp_upload_state after_start;
};

static void
upload_without_threads(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct threadless *less = arg;
    struct dcp_group *group = save_world_group(comm, less->run.world.coordinator);
    struct background bg;
    (void)sim;

    if (background_begin(&bg, &less->run.world, group, &less->run.request,
                         &less->run.results[comm->rank])) {
        if (comm->rank == less->run.victim) {
            threads_granted = less->granted;
            threads_refused = 100;
        }
        background_start(&bg, group, &less->run.request);
        if (comm->rank == less->run.victim) {
            threads_granted = threads_refused = 0;
            less->after_start = dcp_upload_state(bg.upload);
        }
        background_end(&bg);
    }
    dcp_group_destroy(group);
}

static void
without_threads_it_happens_in_the_call(void)
{
    for (uint32_t size = 1; size < 4; size += 2) {
        for (uint32_t victim = 0; victim < size; victim++) {
            for (uint32_t granted = 0; granted < 2; granted++) {
                struct threadless less = {.run = make_run(size, victim), .granted = granted};
                upload_world_init(&less.run.world, size);
                sim_ranks_run(size, TIMEOUT_MS, upload_without_threads, &less);
                check_committed(&less.run);
                CHECK_EQ(less.run.results[victim].notified, 2);
                CHECK(granted == 1 || less.after_start == DCP_UPLOAD_ENDED);
                end_run(&less.run);
            }
        }
    }
}

/* ---- cancel ---- */

static bool
is_settled(void *arg)
{
    struct background *bg = arg;

    return dcp_upload_state(bg->upload) != DCP_UPLOAD_RUNNING;
}

static bool cancelled;

static void
cancel_at_gate(struct run *run, struct background *bg)
{
    struct gate *gate = &run->world.ranks[bg->rank].io;

    run->hit = gate_wait(gate, is_settled, bg);
    cancelled = dcp_upload_cancel(bg->upload);
    gate_open(gate);
}

/* Before each system call of a rank: of its writer, or of the commit. */
static void
a_cancel_holds_what_it_says(void)
{
    unsigned yes = 0, no = 0;

    for (uint32_t victim = 0; victim < 3; victim++) {
        for (uint32_t nth = 1; nth < MOST_CALLS && ctest_failures < MOST_FAILURES; nth++) {
            struct run run = make_run(3, victim);
            int before = ctest_failures;
            run.io = (struct gate_at){nth, IO_CALLS};
            run.act = cancel_at_gate;
            run_uploads(&run);
            if (cancelled) {
                check_blamed(&run, DCP_E_CANCELLED);
                check_undone(&run);
            } else {
                check_committed(&run);
            }
            if (ctest_failures != before) {
                describe(&run);
            }
            yes += cancelled;
            no += !cancelled && run.hit;
            bool was_reached = run.hit;
            end_run(&run);
            if (!was_reached) {
                break;
            }
        }
    }
    CHECK(yes > 10);
    CHECK(no > 3); /* the commit */
}

/* ---- independent saves ---- */

static void
independent_ranks_commit_their_own(void)
{
    for (uint32_t victim = 0; victim < 4; victim++) {
        struct run run = make_run(3, victim % 3);
        run.request.save.independent = true;
        run.victim_fails_before = victim < 3;
        run_uploads(&run);
        for (uint32_t r = 0; r < 3; r++) {
            bool failed = victim < 3 && r == run.victim;
            CHECK_EQ(run.results[r].rc, victim < 3 ? DCP_E_PEER : 0);
            CHECK_EQ(run.results[r].outcome, failed ? DCP_OUTCOME_ABORTED : DCP_OUTCOME_COMMITTED);
        }
        if (victim < 3) {
            check_blamed(&run, DCP_E_INVALID);
        }
        CHECK_EQ(io_memory_names_count(run.world.fs, SAVE_DIR), 6);
        end_run(&run);
    }
}

static void
meet_once(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    uint32_t *host_ranks = arg;
    struct dcp_group *group = save_world_group(comm, 0);
    struct dcp_error err = {0};
    (void)sim;

    host_ranks[comm->rank] = dcp_group_host_ranks(group) + (dcp_group_peers(group) != NULL);
    for (int i = 0; i < 2 && host_ranks[comm->rank] != 100; i++) {
        /* The second time nobody is asked: one rank alone may call. */
        if ((i == 0 || comm->rank == 1) && dcp_group_meet(group, dcp_shm_posix(), &err) != 0) {
            host_ranks[comm->rank] = 100;
        }
    }
    if (host_ranks[comm->rank] == 0 && dcp_group_peers(group) != NULL) {
        host_ranks[comm->rank] = dcp_group_host_ranks(group);
    }
    dcp_group_destroy(group);
}

static void
a_group_meets_once(void)
{
    uint32_t host_ranks[3] = {0};

    sim_ranks_run(3, TIMEOUT_MS, meet_once, host_ranks);
    for (uint32_t r = 0; r < 3; r++) {
        CHECK_EQ(host_ranks[r], 3);
    }
}

CTEST_MAIN(RUN(uploads_leave_the_files_of_a_foreground_save);
           RUN(plans_are_reused_until_one_changes); RUN(every_way_of_writing_commits);
           RUN(two_saves_of_one_group_are_in_flight); RUN(the_later_save_of_one_directory_wins);
           RUN(a_failure_from_before_reaches_all_ranks); RUN(one_rank_alone_fails_by_itself);
           RUN(without_threads_it_happens_in_the_call); RUN(a_cancel_holds_what_it_says);
           RUN(independent_ranks_commit_their_own); RUN(a_group_meets_once);)

/*
 * test_save.c: whole saves by simulated ranks: plans, bytes and what comes back.
 */
#include "ctest.h"
#include "save_world.h"
#include "sim_ranks.h"

enum { MOST_RANKS = 64, TIMEOUT_MS = 20000 };

/* ---- a run: every rank saves in turn as the script says ---- */

struct step {
    int generation;
    enum save_change change;
    uint32_t changed_rank;
};

struct run {
    struct io_memory *fs;
    const struct dcp_io *table;
    const struct step *steps;
    size_t steps_count;
    uint64_t split_bytes;
    bool stage, independent;
    uint32_t shares_count;       /* ranks below it share the metadata */
    struct save_result *results; /* step * size + rank */
};

static void
save_steps(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct run *run = arg;
    struct dcp_group *group = NULL;
    (void)sim;

    for (size_t i = 0; i < run->steps_count; i++) {
        const struct step *step = &run->steps[i];
        bool mine = step->changed_rank == comm->rank;
        struct save_request request = {
            .generation = step->generation,
            .change = mine ? step->change : CHANGE_NONE,
            .direct = i % 2 == 0 ? DCP_DIRECT_OFF : DCP_DIRECT_ON,
            .split_bytes = run->split_bytes,
            .stage = run->stage,
            .independent = run->independent,
            .share_metadata = comm->rank < run->shares_count,
        };
        if (group == NULL || request.change == CHANGE_GROUP) {
            dcp_group_destroy(group);
            group = save_world_group(comm, comm->size / 2);
        }
        save_once(group, run->table, &request, &run->results[i * comm->size + comm->rank]);
    }
    dcp_group_destroy(group);
}

static void
run_steps(struct run *run, uint32_t size)
{
    run->table = &io_memory_process(run->fs, 0)->io;
    run->results = dcp_calloc(run->steps_count * size, sizeof *run->results);
    sim_ranks_run(size, TIMEOUT_MS, save_steps, run);
    for (size_t i = 0; i < run->steps_count * size; i++) {
        struct save_result *result = &run->results[i];
        if (result->failures.count > 0) {
            fprintf(stderr, "rank %u: %s\n", result->failures.items[0].rank,
                    ((struct dcp_error *)result->failures.items[0].bytes)->message);
        }
        CHECK_OK(result->rc, &result->err);
        CHECK_EQ(result->info.outcome, DCP_OUTCOME_COMMITTED);
        save_result_clean_up(result);
    }
    CHECK_EQ(io_memory_open_files(run->fs), 0);
}

static const uint32_t sizes[] = {1, 2, 3, 5, MOST_RANKS};

/* ---- loads by other numbers of ranks ---- */

struct load_run {
    const struct dcp_io *table;
    struct load_request request;
    struct load_result results[MOST_RANKS];
};

static void
load_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct load_run *run = arg;
    struct dcp_group *group = save_world_group(comm, comm->size - 1);
    (void)sim;

    load_once(group, run->table, &run->request, &run->results[comm->rank]);
    dcp_group_destroy(group);
}

static void
check_load(struct io_memory *fs, uint32_t size, const struct load_request *request, int generation)
{
    struct load_run *run = dcp_calloc(1, sizeof *run);

    run->table = &io_memory_process(fs, 0)->io;
    run->request = *request;
    sim_ranks_run(size, TIMEOUT_MS, load_rank, run);
    for (uint32_t r = 0; r < size; r++) {
        CHECK_OK(run->results[r].rc, &run->results[r].err);
        CHECK_EQ(run->results[r].generation, generation);
        load_result_clean_up(&run->results[r]);
    }
    dcp_free(run);
}

static void
saves_of_any_number_of_ranks_load_on_any_other(void)
{
    static const struct step steps[] = {{1, CHANGE_NONE, 0}, {2, CHANGE_NONE, 0}};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        uint32_t size = sizes[s];
        struct run run = {.fs = io_memory_new(s), .steps = steps, .steps_count = 2};
        struct load_request request = {.saved_size = size, .without_state_of = UINT32_MAX};
        run_steps(&run, size);
        for (uint32_t loaders = 1; loaders <= 7; loaders += 2) {
            check_load(run.fs, loaders, &request, 2);
        }
        /* The files of the first save were swept: one file per rank and `.metadata` are left. */
        CHECK_EQ(io_memory_names_count(run.fs, SAVE_DIR), size + 1);
        dcp_free(run.results);
        io_memory_free(run.fs);
    }
    dcp_engine_trim();
}

static void
replicas_are_written_once(void)
{
    static const struct step steps[] = {{1, CHANGE_NONE, 0}};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        uint32_t size = sizes[s];
        struct run run = {.fs = io_memory_new(s), .steps = steps, .steps_count = 1};
        uint64_t kept = 0;
        run_steps(&run, size);
        for (uint32_t r = 0; r < size; r++) {
            kept += run.results[r].info.kept_items;
        }
        CHECK_EQ(kept, (SAVE_ITEMS - SAVE_REPLICAS) * size + SAVE_REPLICAS);
        CHECK_EQ(run.results[size / 2].info.dropped_items, SAVE_REPLICAS * (size - 1));
        dcp_free(run.results);
        io_memory_free(run.fs);
    }
    dcp_engine_trim();
}

/* A plan and the same plan reused, written from the ranks' memory and from a copy of it. */
static void
cut_replicas_are_written_once_and_load_right(void)
{
    static const struct step steps[] = {
        {1, CHANGE_NONE, 0}, {2, CHANGE_NONE, 0}, {3, CHANGE_NONE, 0}};
    for (size_t s = 0; s < 2 * sizeof sizes / sizeof sizes[0]; s++) {
        uint32_t size = sizes[s / 2];
        struct run run = {.fs = io_memory_new(s),
                          .steps = steps,
                          .steps_count = 3,
                          .split_bytes = 1,
                          .stage = s % 2 == 1};
        struct load_request request = {.saved_size = size, .without_state_of = UINT32_MAX};
        uint64_t kept = 0, cut = 0;
        run_steps(&run, size);
        for (uint32_t r = 0; r < 3 * size; r++) {
            kept += run.results[r].info.kept_items;
            cut += run.results[r].info.cut_items;
            CHECK_EQ(run.results[r].info.fast, r >= size);
        }
        /* Of two ranks, one takes the object and the other both tensors. */
        CHECK_EQ(cut == 0, size < 3);
        CHECK_EQ(cut % 3, 0);
        CHECK_EQ(kept, 3 * ((SAVE_ITEMS - SAVE_REPLICAS) * size + (size < 3 ? 3 : 1)) + cut);
        for (uint32_t loaders = 1; loaders <= 3; loaders++) {
            check_load(run.fs, loaders, &request, 3);
        }
        CHECK_EQ(io_memory_names_count(run.fs, SAVE_DIR), size + 1);
        dcp_free(run.results);
        io_memory_free(run.fs);
    }
    dcp_arena_trim();
    dcp_engine_trim();
}

/* FAST exactly when every rank's plan, salt and group are those of the save before. */
static void
a_plan_is_reused_only_when_nothing_about_it_changed_anywhere(void)
{
    enum { STEPS = 2 + 3 * (CHANGES - 1) };
    struct step steps[STEPS] = {{1, CHANGE_NONE, 0}};
    const uint32_t size = 3;
    struct run run = {.fs = io_memory_new(4), .steps = steps, .steps_count = STEPS};
    for (int c = 1; c < CHANGES; c++) {
        for (int k = 0; k < 3; k++) {
            steps[3 * c - 2 + k] =
                (struct step){1 + (3 * c + k) % (SAVE_GENERATIONS - 1),
                              k == 0 ? CHANGE_NONE : (enum save_change)c, (uint32_t)c % size};
        }
    }
    steps[STEPS - 1] = (struct step){1, CHANGE_NONE, 0};
    run_steps(&run, size);
    for (uint32_t i = 0; i < STEPS; i++) {
        /* Per change: back to the common plan, the changed one, the changed one again.  A new group
         * plans anew whatever the plan, and is as good as the others after that. */
        bool is_same = i > 0 && (steps[i].change == steps[i - 1].change ||
                                 steps[i - 1].change == CHANGE_GROUP);
        bool fast = is_same && steps[i].change != CHANGE_GROUP;
        for (uint32_t r = 0; r < size; r++) {
            if (run.results[i * size + r].info.fast != fast) {
                fprintf(stderr, "step %u, change %d, rank %u\n", i, steps[i].change, r);
            }
            CHECK_EQ(run.results[i * size + r].info.fast, fast);
        }
    }
    dcp_free(run.results);
    io_memory_free(run.fs);
    dcp_engine_trim();
}

static void
every_change_of_a_plan_still_loads_right(void)
{
    const uint32_t size = 3;
    for (int c = 2; c < 2 * CHANGES; c++) {
        const struct step steps[] = {{1, CHANGE_NONE, 0}, {2, (enum save_change)(c / 2), 1}};
        struct run run = {.fs = io_memory_new(4),
                          .steps = steps,
                          .steps_count = 2,
                          .split_bytes = c % 2 == 0 ? DCP_SPLIT_AUTO : 1};
        struct load_request request = {.saved_size = size, .without_state_of = 1};
        run_steps(&run, size);
        check_load(run.fs, 2, &request, 2);
        dcp_free(run.results);
        io_memory_free(run.fs);
    }
    dcp_engine_trim();
}

/* By how many of the ranks ask for it: all, too few, none. */
static void
the_metadata_reaches_every_rank_when_all_ask_for_it(void)
{
    static const struct step steps[] = {{1, CHANGE_NONE, 0}, {2, CHANGE_NONE, 0}};
    const uint32_t size = 5, coordinator = size / 2;
    for (uint32_t asking = 0; asking <= size; asking++) {
        struct run run = {.fs = io_memory_new(asking), .steps = steps, .steps_count = 2};
        run.shares_count = asking;
        run_steps(&run, size);
        for (uint32_t i = 0; i < 2 * size; i++) {
            const struct save_result *result = &run.results[i];
            struct dcp_hash128 want = run.results[i - i % size + coordinator].image;
            bool has = asking == size || i % size == coordinator;
            CHECK(want.lo != 0);
            CHECK_EQ(result->image.lo, has ? want.lo : 0);
            CHECK_EQ(result->image.hi, has ? want.hi : 0);
            /* Ranks that disagree hear of it, and none of them waits for the others' image. */
            CHECK_EQ(result->info.call_agrees, asking == 0 || asking == size);
        }
        CHECK(run.results[0].image.lo == 0 ||
              run.results[0].image.lo != run.results[size].image.lo);
        dcp_free(run.results);
        io_memory_free(run.fs);
    }
    dcp_engine_trim();
}

/* use_collectives=False: each rank commits its own part, and loads it. */
static void
independent_saves_commit_and_sweep_per_rank(void)
{
    static const struct step steps[] = {{1, CHANGE_NONE, 0}, {2, CHANGE_NONE, 0}};
    struct run run = {
        .fs = io_memory_new(8), .steps = steps, .steps_count = 2, .independent = true};
    const uint32_t size = 3;
    run_steps(&run, size);
    CHECK_EQ(io_memory_names_count(run.fs, SAVE_DIR), 2 * size);
    for (uint32_t r = 0; r < size; r++) {
        char name[32];
        size_t len;
        snprintf(name, sizeof name, "__%u.metadata", r);
        CHECK(io_memory_file(run.fs, SAVE_DIR, name, &len) != NULL);
        CHECK_EQ(run.results[size + r].info.swept_files, 1);
    }
    dcp_free(run.results);
    io_memory_free(run.fs);
    dcp_engine_trim();
}

struct look_run {
    const struct dcp_io *table;
    struct save_request request;
    struct save_result results[MOST_RANKS];
};

static void
save_and_look(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct look_run *run = arg;
    struct save_request request = run->request;
    struct dcp_group *group = save_world_group(comm, 0);
    (void)sim;

    request.fail_before_finish = request.fail_before_finish && comm->rank == 1;
    save_once(group, run->table, &request, &run->results[comm->rank]);
    dcp_group_destroy(group);
}

/* The committed save of another is there when the second one fails. */
static void
every_rank_can_see_what_became_of_its_save(void)
{
    const uint32_t size = 3;
    for (int independent = 0; independent < 2; independent++) {
        struct io_memory *fs = io_memory_new(3);
        struct look_run *run = dcp_calloc(1, sizeof *run);
        run->table = &io_memory_process(fs, 0)->io;
        run->request = (struct save_request){.independent = independent == 1, .looks = true};
        for (int fails = 0; fails < 2; fails++) {
            run->request.generation = 1 + fails;
            run->request.fail_before_finish = fails == 1;
            sim_ranks_run(size, TIMEOUT_MS, save_and_look, run);
            for (uint32_t r = 0; r < size; r++) {
                bool committed = !fails || (independent && r != 1);
                CHECK_EQ(run->results[r].info.outcome == DCP_OUTCOME_COMMITTED, committed);
                CHECK_EQ(run->results[r].was_committed, committed);
                save_result_clean_up(&run->results[r]);
            }
        }
        dcp_free(run);
        io_memory_free(fs);
    }
    dcp_engine_trim();
}

CTEST_MAIN(RUN(saves_of_any_number_of_ranks_load_on_any_other); RUN(replicas_are_written_once);
           RUN(cut_replicas_are_written_once_and_load_right);
           RUN(a_plan_is_reused_only_when_nothing_about_it_changed_anywhere);
           RUN(every_change_of_a_plan_still_loads_right);
           RUN(the_metadata_reaches_every_rank_when_all_ask_for_it);
           RUN(independent_saves_commit_and_sweep_per_rank);
           RUN(every_rank_can_see_what_became_of_its_save);)

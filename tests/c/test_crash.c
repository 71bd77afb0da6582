/*
 * test_crash.c: the power goes at every step of a save over an existing checkpoint.
 *
 * Two simulated ranks save generation 1 and then generation 2 on top of it; at call k of the second
 * save the disk stops.  What survives is what was synced and an arbitrary choice of the rest (or, as
 * after kill -9, everything).  Then exactly one of the two generations loads, bit for bit: the new one
 * for certain if the save had said so.  The next save works and leaves no junk.  The same with the
 * old checkpoint as the base of the new one.
 */
#include "ctest.h"
#include "save_world.h"
#include "sim_ranks.h"

#include <errno.h>

enum { RANKS = 2, TIMEOUT_MS = 20000, OLD = 1, NEW = 2, NEXT = 3, MOST_STEPS = 400 };

/* How the two saves are made and how the second one ends. */
struct way {
    bool power_cut;
    enum dcp_direct direct;
    bool incremental;
    enum dcp_link_mode link_mode;
};

struct job {
    const struct dcp_io *table;
    struct save_request request;
    struct save_result results[RANKS];
};

static void
save_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct job *job = arg;
    struct dcp_group *group = save_world_group(comm, 0);
    (void)sim;

    save_once(group, job->table, &job->request, &job->results[comm->rank]);
    dcp_group_destroy(group);
}

/* True when every rank was told that the save is committed. */
static bool
save(struct io_memory *fs, int generation, const struct way *way)
{
    struct job *job = dcp_calloc(1, sizeof *job);
    bool committed = true;

    job->table = &io_memory_process(fs, 0)->io;
    job->request = (struct save_request){.generation = generation,
                                         .direct = way->direct,
                                         .content_hash = way->incremental,
                                         .base = generation == SAVE_PARTLY ? SAVE_DIR : NULL,
                                         .link_mode = way->link_mode};
    sim_ranks_run(RANKS, TIMEOUT_MS, save_rank, job);
    for (uint32_t r = 0; r < RANKS; r++) {
        committed = committed && job->results[r].rc == 0;
        save_result_clean_up(&job->results[r]);
    }
    dcp_free(job);
    return committed;
}

static bool
is_junk(const char *name)
{
    return strstr(name, "claim") != NULL;
}

static void
check_next_save(struct io_memory *fs, const struct way *way)
{
    CHECK(save(fs, NEXT, way));
    CHECK_EQ(save_world_generation(fs, RANKS), NEXT);
    CHECK_EQ(io_memory_names_count(fs, SAVE_DIR), RANKS + 1); /* one file a rank and .metadata */
    for (size_t i = 0; i < io_memory_names_count(fs, SAVE_DIR); i++) {
        CHECK(!is_junk(io_memory_name(fs, SAVE_DIR, i)));
    }
}

/* One save that meets the end at call `step`.  False when it got through all of them. */
static bool
crash_once(uint64_t step, uint64_t seed, const struct way *way, unsigned *ret_seen)
{
    const int newer = way->incremental ? SAVE_PARTLY : NEW;
    struct io_memory *fs = io_memory_new(seed);
    bool crashed, told;
    int found;

    CHECK(save(fs, OLD, way));
    io_memory_faults(fs)->crash_at = step;
    told = save(fs, newer, way);
    crashed = io_memory_crashed(fs);
    io_memory_reboot(fs, way->power_cut, seed * 31 + step);
    found = save_world_generation(fs, RANKS);
    CHECK(found == OLD || found == newer);
    CHECK(!told || found == newer);
    CHECK(crashed || told);
    if (found == OLD || found == newer) {
        ret_seen[found == OLD ? OLD : NEW]++;
    } else {
        fprintf(stderr, "step %llu, seed %llu: generation %d\n", (unsigned long long)step,
                (unsigned long long)seed, found);
    }
    check_next_save(fs, way);
    io_memory_free(fs);
    return crashed;
}

static void
crash_everywhere(const struct way *way, uint64_t seeds)
{
    unsigned seen[NEXT] = {0};
    uint64_t step = 1;

    for (; step < MOST_STEPS; step++) {
        bool crashed = false;
        for (uint64_t seed = 1; seed <= seeds; seed++) {
            crashed = crash_once(step, seed, way, seen) || crashed;
        }
        if (!crashed) {
            break;
        }
    }
    CHECK(step > 20 && step < MOST_STEPS); /* it was a real save, and all of it was tried */
    CHECK(seen[OLD] > 0 && seen[NEW] > 0);
    printf("    %llu steps, %llu seeds: the old one loaded %u times, the new one %u times\n",
           (unsigned long long)step - 1, (unsigned long long)seeds, seen[OLD], seen[NEW]);
    dcp_engine_trim();
}

static void
a_power_cut_at_any_step_leaves_one_of_the_two(void)
{
    crash_everywhere(&(struct way){.power_cut = true, .direct = DCP_DIRECT_OFF}, 24);
}

static void
so_it_does_with_direct_writes(void)
{
    crash_everywhere(&(struct way){.power_cut = true, .direct = DCP_DIRECT_ON}, 8);
}

static void
a_kill_at_any_step_leaves_one_of_the_two(void)
{
    crash_everywhere(&(struct way){.direct = DCP_DIRECT_OFF}, 1);
}

static void
so_it_does_with_the_old_checkpoint_as_the_base_of_the_new_one(void)
{
    for (int hard = 0; hard < 2; hard++) {
        struct way way = {.power_cut = true,
                          .direct = DCP_DIRECT_OFF,
                          .incremental = true,
                          .link_mode = hard ? DCP_LINK_HARD : DCP_LINK_REFLINK};
        crash_everywhere(&way, 12);
        way.power_cut = false;
        crash_everywhere(&way, 1);
    }
}

/* A disk that is full, broken or deaf at any call is an error, and what was there stays. */
static void
a_failing_call_leaves_one_of_the_two(void)
{
    static const int errnos[] = {EIO, ENOSPC};
    const struct way way = {.direct = DCP_DIRECT_OFF};
    unsigned seen[NEXT] = {0};

    for (size_t e = 0; e < sizeof errnos / sizeof errnos[0]; e++) {
        for (uint64_t nth = 1; nth < MOST_STEPS; nth++) {
            struct io_memory *fs = io_memory_new(nth);
            uint64_t before;
            bool told;
            int found;

            CHECK(save(fs, OLD, &way));
            *io_memory_faults(fs) = (struct io_memory_faults){
                .space_bytes = UINT64_MAX,
                .crash_at = UINT64_MAX,
                .short_percent = 20,
                .eintr_percent = 10,
                .fail_call = IO_CALLS,
                .fail_nth = nth,
                .fail_errno = errnos[e],
            };
            before = io_memory_calls(fs);
            told = save(fs, NEW, &way);
            bool reached = io_memory_calls(fs) - before >= nth;
            io_memory_reboot(fs, false, nth);
            found = save_world_generation(fs, RANKS);
            CHECK(found == OLD || found == NEW);
            CHECK(!told || found == NEW);
            if (found == OLD || found == NEW) {
                seen[found]++;
            }
            check_next_save(fs, &way);
            io_memory_free(fs);
            if (!reached) {
                break;
            }
        }
    }
    CHECK(seen[OLD] > 0 && seen[NEW] > 0);
    dcp_engine_trim();
}

CTEST_MAIN(RUN(a_power_cut_at_any_step_leaves_one_of_the_two); RUN(so_it_does_with_direct_writes);
           RUN(a_kill_at_any_step_leaves_one_of_the_two);
           RUN(so_it_does_with_the_old_checkpoint_as_the_base_of_the_new_one);
           RUN(a_failing_call_leaves_one_of_the_two);)

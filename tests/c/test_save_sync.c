/*
 * test_save_sync.c: an fsync that fails is believed the first time.
 *
 * The kernel drops the pages that it could not write, so a second fsync says yes to nothing.  Each
 * fsync of a save over an existing checkpoint (of a data file, of the names, of the metadata, of
 * the rename) fails once, on either rank, before or after its effect.  Nobody may then be told that
 * the save is good, or ask again for that file; up to the rename the old checkpoint stays, after it
 * both do until the next save, whatever a power cut makes of the names.
 */
#include <errno.h>

#include "ctest.h"
#include "save_world.h"
#include "sim_ranks.h"

enum { RANKS = 2, TIMEOUT_MS = 20000, OLD = 1, NEW = 2, NEXT = 3, MOST_SYNCS = 30, POWER_CUTS = 6 };

struct job {
    const struct dcp_io *tables[RANKS];
    struct save_request request;
    struct save_result results[RANKS];
};

static void
save_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct job *job = arg;
    struct dcp_group *group = save_world_group(comm, 0);
    (void)sim;

    save_once(group, job->tables[comm->rank], &job->request, &job->results[comm->rank]);
    dcp_group_destroy(group);
}

static void
save(struct job *job, struct io_memory *fs, int generation, enum dcp_direct direct)
{
    *job = (struct job){.request = {.generation = generation, .direct = direct}};
    for (uint32_t r = 0; r < RANKS; r++) {
        job->tables[r] = &io_memory_process(fs, r)->io;
    }
    sim_ranks_run(RANKS, TIMEOUT_MS, save_rank, job);
}

static void
job_clean_up(struct job *job)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        save_result_clean_up(&job->results[r]);
    }
}

static void
save_well(struct io_memory *fs, int generation)
{
    struct job job;

    save(&job, fs, generation, DCP_DIRECT_OFF);
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_OK(job.results[r].rc, &job.results[r].err);
    }
    job_clean_up(&job);
}

static void
check_told(const struct job *job)
{
    const struct save_result *first = &job->results[0];

    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_EQ(job->results[r].rc, DCP_E_PEER);
        CHECK_EQ(job->results[r].info.outcome, first->info.outcome);
        CHECK(failure_lists_equal(&job->results[r].failures, &first->failures));
    }
    CHECK_EQ(first->failures.count, 1);
    for (size_t i = 0; i < first->failures.count; i++) {
        const struct dcp_error *err = (const struct dcp_error *)first->failures.items[i].bytes;
        CHECK_EQ(err->code, DCP_E_IO);
        CHECK_EQ(err->sys_errno, EIO);
        CHECK(strstr(err->path, SAVE_DIR) != NULL);
        CHECK(strstr(err->message, "must be taken for lost") != NULL);
        CHECK(strstr(err->message, "check it") != NULL);
    }
}

/* What a fault leaves is looked at again after each of several power cuts. */
struct fault {
    enum io_call call;
    uint64_t nth;
    bool after_effect;
    enum dcp_direct direct;
};

/* OLD, then NEW with the fault.  False when NEW made fewer such calls. */
static bool
make(const struct fault *fault, uint64_t seed, struct io_memory **ret_fs, struct job *ret_job)
{
    struct io_memory *fs = io_memory_new(seed);
    struct io_memory_faults *faults = io_memory_faults(fs);
    bool hit;

    save_well(fs, OLD);
    faults->fail_call = (int)fault->call;
    faults->fail_nth = fault->nth;
    faults->fail_errno = EIO;
    faults->fail_after_effect = fault->after_effect;
    save(ret_job, fs, NEW, fault->direct);
    hit = faults->fail_nth == 0;
    faults->fail_nth = 0;
    *ret_fs = fs;
    return hit;
}

static bool
fail_once(const struct fault *fault, unsigned *ret_committed, unsigned *ret_aborted)
{
    bool hit = true;

    for (uint64_t seed = 0; seed <= POWER_CUTS && hit; seed++) {
        struct io_memory *fs;
        struct job job;

        hit = make(fault, seed, &fs, &job);
        if (hit) {
            bool committed = job.results[0].info.outcome == DCP_OUTCOME_COMMITTED;
            *(committed ? ret_committed : ret_aborted) += 1;
            check_told(&job);
            CHECK_EQ(io_memory_vain_syncs(fs), 0);
            CHECK_EQ(save_world_generation(fs, RANKS), committed ? NEW : OLD);
            /* An aborted save leaves nothing; after one that is not durable both stay. */
            CHECK_EQ(io_memory_names_count(fs, SAVE_DIR), committed ? 2 * RANKS + 1 : RANKS + 1);
            if (seed > 0) {
                io_memory_reboot(fs, true, seed);
                int found = save_world_generation(fs, RANKS);
                CHECK(found == OLD || (found == NEW && committed));
            }
            save_well(fs, NEXT);
            CHECK_EQ(save_world_generation(fs, RANKS), NEXT);
            CHECK_EQ(io_memory_names_count(fs, SAVE_DIR), RANKS + 1);
            CHECK_EQ(io_memory_open_files(fs), 0);
        }
        job_clean_up(&job);
        io_memory_free(fs);
    }
    return hit;
}

/* Returns how many syncs a save makes. */
static uint64_t
fail_each(enum io_call call, enum dcp_direct direct, unsigned *ret_committed, unsigned *ret_aborted)
{
    uint64_t nth = 1;

    for (int after = 0; after < 2; after++) {
        struct fault fault = {.call = call, .nth = 1, .after_effect = after != 0, .direct = direct};
        while (fault.nth < MOST_SYNCS && fail_once(&fault, ret_committed, ret_aborted)) {
            fault.nth++;
        }
        nth = fault.nth;
    }
    dcp_engine_trim();
    return nth - 1;
}

static void
a_data_file_that_cannot_be_synced_fails_the_save_on_all_ranks(void)
{
    for (int i = 0; i < 2; i++) {
        unsigned committed = 0, aborted = 0;
        CHECK_EQ(
            fail_each(IO_FDATASYNC, i == 0 ? DCP_DIRECT_OFF : DCP_DIRECT_ON, &committed, &aborted),
            RANKS);
        CHECK(committed == 0 && aborted > 0);
    }
}

static void
names_and_metadata_that_cannot_be_synced_leave_the_old_one_or_both(void)
{
    unsigned committed = 0, aborted = 0;

    /* The directory by each rank, the metadata, the directory after the rename. */
    CHECK_EQ(fail_each(IO_FSYNC, DCP_DIRECT_OFF, &committed, &aborted), RANKS + 2);
    CHECK_EQ(committed, 2 * (POWER_CUTS + 1));
    CHECK_EQ(aborted, 2 * (POWER_CUTS + 1) * (RANKS + 1));
}

CTEST_MAIN(RUN(a_data_file_that_cannot_be_synced_fails_the_save_on_all_ranks);
           RUN(names_and_metadata_that_cannot_be_synced_leave_the_old_one_or_both);)

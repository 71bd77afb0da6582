/*
 * test_save_space.c: a save over an existing checkpoint where the disk ends at byte N, or a quota.
 *
 * For every N: all ranks are told the same, by rank, file, errno and what to do; the old checkpoint
 * loads whole; nothing of the failed save is left.  With the limit gone the next save works, and is
 * all that is there.  The file system in memory counts to the byte, and every name takes some, so
 * that each write and each creation of a save is in turn the one that does not fit.
 *
 * What the coordinator knows before the first byte is tested by how much was written: nothing.
 */
#include <errno.h>

#include "ctest.h"
#include "save_world.h"
#include "sim_ranks.h"

enum {
    MOST_RANKS = 3,
    MOST_FAILURES = 10,
    TIMEOUT_MS = 20000,
    NAME_BYTES = 40,
    NEW = 2,    /* generation that may not fit; those around it are 1 and 3 in turn */
    CHUNK = 64, /* rooms tried in one file system: it never forgets a file */
};

#define UNLIMITED UINT64_MAX

/* How a disk is full. */
struct fullness {
    int sys_errno;
    bool hides;     /* statvfs knows nothing of it */
    bool of_a_rank; /* one rank has a quota; the others have all they want */
    uint32_t rank;  /* that one */
};

/* Saves of one group to disks of growing size. */
struct filling {
    uint32_t size;
    struct fullness full;
    bool fast;                   /* the plan is reused */
    uint64_t room_bytes, stride; /* for NEW; advanced by the run */
    bool fits;                   /* NEW was committed: the end */
    /* of the run */
    struct io_memory *fs;
    const struct dcp_io *tables[MOST_RANKS];
    struct save_result results[MOST_RANKS];
    uint64_t used_bytes;
};

static void
limit(struct io_memory *fs, const struct fullness *full, uint64_t space_bytes)
{
    struct io_memory_faults *faults = io_memory_faults(fs);

    faults->space_bytes = space_bytes;
    faults->name_bytes = NAME_BYTES;
    faults->full_errno = full->sys_errno;
    faults->hides_space = full->hides;
    faults->limited = full->of_a_rank ? 1 + full->rank : 0;
}

/* All ranks come here; afterwards rank 0 is alone until it comes again. */
static bool
meet(const struct dcp_group *group)
{
    const struct dcp_comm *comm = dcp_group_comm(group);
    struct dcp_error err = {0};
    int64_t lane = 0;

    CHECK_OK(comm->all_reduce_min(comm->ctx, &lane, 1, &err), &err);
    return comm->rank == 0;
}

/* ---- what must hold ---- */

static bool
tells_what_to_do(const struct dcp_error *err)
{
    return err->sys_errno == EDQUOT ? strstr(err->message, "quota") != NULL
                                    : strstr(err->message, "free") != NULL &&
                                          strstr(err->message, "save elsewhere") != NULL;
}

/* This rank's data file, the claim that becomes the metadata, or the directory. */
static bool
names_the_place(const struct dcp_error *err, uint32_t rank)
{
    char data_file[64];

    snprintf(data_file, sizeof data_file, SAVE_DIR "/__%u_", rank);
    return strcmp(err->path, SAVE_DIR) == 0 ||
           strncmp(err->path, data_file, strlen(data_file)) == 0 ||
           (rank == 0 && strstr(err->path, SAVE_DIR "/.dcp_native-claim-") != NULL);
}

static void
check_told(const struct save_result *results, uint32_t size, const struct fullness *full)
{
    for (uint32_t r = 0; r < size; r++) {
        CHECK_EQ(results[r].rc, DCP_E_PEER);
        CHECK_EQ(results[r].info.outcome, DCP_OUTCOME_ABORTED);
        CHECK(failure_lists_equal(&results[r].failures, &results[0].failures));
    }
    CHECK(results[0].failures.count > 0);
    for (size_t i = 0; i < results[0].failures.count; i++) {
        const struct dcp_failure *failure = &results[0].failures.items[i];
        const struct dcp_error *err = (const struct dcp_error *)failure->bytes;
        bool good = err->code == DCP_E_IO && err->sys_errno == full->sys_errno &&
                    (!full->of_a_rank || failure->rank == full->rank) &&
                    names_the_place(err, failure->rank) && tells_what_to_do(err);
        CHECK(good);
        if (!good) {
            fprintf(stderr, "    rank %u, errno %d, %s: %s\n", failure->rank, err->sys_errno,
                    err->path, err->message);
        }
    }
}

/* The only names: a data file of each rank and the metadata. */
static bool
is_clean(const struct io_memory *fs, uint32_t size)
{
    bool clean = io_memory_names_count(fs, SAVE_DIR) == size + 1;

    for (size_t i = 0; i < io_memory_names_count(fs, SAVE_DIR); i++) {
        const char *name = io_memory_name(fs, SAVE_DIR, i);
        clean = clean && (strcmp(name, ".metadata") == 0 || strstr(name, ".distcp") != NULL);
    }
    return clean && io_memory_open_files(fs) == 0;
}

static void
results_clean_up(struct save_result *results, uint32_t size)
{
    for (uint32_t r = 0; r < size; r++) {
        save_result_clean_up(&results[r]);
    }
}

/* ---- saves to a disk that is as large as need be, less something ---- */

static void
begin_limit(struct filling *filling)
{
    const struct fullness *full = &filling->full;

    filling->used_bytes = io_memory_used_bytes(filling->fs, -1);
    limit(filling->fs, full,
          io_memory_used_bytes(filling->fs, full->of_a_rank ? (int)full->rank : -1) +
              filling->room_bytes);
}

static void
judge_limited(struct filling *filling, int before)
{
    filling->fits = filling->results[0].rc == 0;
    limit(filling->fs, &(struct fullness){0}, UNLIMITED);
    if (!filling->fits) {
        check_told(filling->results, filling->size, &filling->full);
        CHECK_EQ(io_memory_used_bytes(filling->fs, -1), filling->used_bytes);
        filling->room_bytes += filling->stride;
    }
    CHECK_EQ(save_world_generation(filling->fs, filling->size), filling->fits ? NEW : before);
    CHECK(is_clean(filling->fs, filling->size));
    results_clean_up(filling->results, filling->size);
}

static void
judge_unlimited(struct filling *filling)
{
    for (uint32_t r = 0; r < filling->size; r++) {
        CHECK_OK(filling->results[r].rc, &filling->results[r].err);
    }
    CHECK(is_clean(filling->fs, filling->size));
    results_clean_up(filling->results, filling->size);
}

static void
fill_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct filling *filling = arg;
    struct dcp_group *group = save_world_group(comm, 0);
    struct save_request request = {.direct = DCP_DIRECT_OFF};
    uint32_t rank = comm->rank;
    (void)sim;

    for (int i = 0; i <= CHUNK && !filling->fits; i++) {
        int generation = i % 2 == 0 ? 1 : 3;
        if (!filling->fast) {
            dcp_group_forget_plan(group);
        }
        request.generation = generation;
        save_once(group, filling->tables[rank], &request, &filling->results[rank]);
        if (meet(group)) {
            judge_unlimited(filling);
            begin_limit(filling);
        }
        meet(group);
        request.generation = NEW;
        save_once(group, filling->tables[rank], &request, &filling->results[rank]);
        if (meet(group)) {
            judge_limited(filling, generation);
        }
        meet(group);
    }
    dcp_group_destroy(group);
}

/* Every `stride`-th N from a disk without a free byte to one with room for the save. */
static void
fill_at_every_byte(uint32_t size, struct fullness full, bool fast, uint64_t first, uint64_t stride)
{
    const uint64_t most = 1 << 16;
    struct filling filling = {
        .size = size, .full = full, .fast = fast, .room_bytes = first, .stride = stride};

    while (!filling.fits && filling.room_bytes < most && ctest_failures < MOST_FAILURES) {
        filling.fs = io_memory_new(filling.room_bytes);
        limit(filling.fs, &(struct fullness){0}, UNLIMITED);
        for (uint32_t r = 0; r < size; r++) {
            filling.tables[r] = &io_memory_process(filling.fs, r)->io;
        }
        sim_ranks_run(size, TIMEOUT_MS, fill_rank, &filling);
        io_memory_free(filling.fs);
    }
    CHECK(filling.fits && filling.room_bytes > 1000);
    printf("    %u ranks%s, errno %d%s%s: needs up to %llu bytes\n", size, fast ? ", fast" : "",
           full.sys_errno, full.hides ? ", hidden" : "", full.of_a_rank ? ", of one rank" : "",
           (unsigned long long)filling.room_bytes);
    dcp_engine_trim();
}

/* ---- cases ---- */

static void
a_disk_that_ends_at_any_byte_costs_the_new_save_only(void)
{
    const struct fullness hidden = {.sys_errno = ENOSPC, .hides = true};

    fill_at_every_byte(1, hidden, false, 0, 1);
    fill_at_every_byte(2, hidden, true, 1, 17);
    fill_at_every_byte(3, hidden, false, 2, 29);
}

static void
so_does_one_that_tells_how_much_is_free(void)
{
    const struct fullness told = {.sys_errno = ENOSPC};

    fill_at_every_byte(1, told, true, 0, 17);
    fill_at_every_byte(2, told, false, 3, 17);
    fill_at_every_byte(3, told, true, 4, 29);
}

static void
a_quota_of_all_or_of_one_rank_costs_the_new_save_only(void)
{
    fill_at_every_byte(2, (struct fullness){EDQUOT, true, false, 0}, false, 5, 17);
    for (uint32_t rank = 0; rank < 3; rank++) {
        fill_at_every_byte(3, (struct fullness){EDQUOT, true, true, rank}, rank % 2 != 0, rank, 17);
        fill_at_every_byte(2, (struct fullness){ENOSPC, true, true, rank % 2}, true, rank, 19);
    }
}

/* ---- what the coordinator knows before the first byte ---- */

/* Saves of one group, each under a limit of its own. */
struct sequence {
    uint32_t size;
    bool apart; /* a directory per rank, as where each node has a disk of its own */
    struct {
        uint64_t space_bytes; /* 0: unlimited */
        bool of_coordinator;  /* it is the coordinator's disk, and the others have theirs */
    } steps[4];
    uint32_t count;
    /* of the run */
    struct io_memory *fs;
    struct save_result results[4][MOST_RANKS];
    uint64_t writes[4]; /* calls of pwrite, by all ranks */
};

static void
sequence_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    static const char *const own_dirs[MOST_RANKS] = {"/node0", "/node1", "/node2"};
    struct sequence *sequence = arg;
    struct dcp_group *group = save_world_group(comm, 0);
    struct save_request request = {.direct = DCP_DIRECT_OFF};
    uint32_t rank = comm->rank;
    (void)sim;

    request.dir = sequence->apart ? own_dirs[rank] : NULL;
    for (uint32_t i = 0; i < sequence->count; i++) {
        request.generation = 1 + (int)i;
        if (meet(group)) {
            uint64_t space = sequence->steps[i].space_bytes;
            limit(sequence->fs, &(struct fullness){.of_a_rank = sequence->steps[i].of_coordinator},
                  space == 0 ? UNLIMITED : space);
            sequence->writes[i] = io_memory_calls_of(sequence->fs, IO_PWRITE);
        }
        meet(group);
        save_once(group, &io_memory_process(sequence->fs, rank)->io, &request,
                  &sequence->results[i][rank]);
        if (meet(group)) {
            sequence->writes[i] = io_memory_calls_of(sequence->fs, IO_PWRITE) - sequence->writes[i];
        }
    }
    dcp_group_destroy(group);
}

static void
sequence_run(struct sequence *sequence)
{
    sequence->fs = io_memory_new(sequence->size);
    sim_ranks_run(sequence->size, TIMEOUT_MS, sequence_rank, sequence);
}

static void
sequence_clean_up(struct sequence *sequence)
{
    for (uint32_t i = 0; i < sequence->count; i++) {
        results_clean_up(sequence->results[i], sequence->size);
    }
    io_memory_free(sequence->fs);
    dcp_engine_trim();
}

/* What one save of so many ranks takes, all names and the metadata included. */
static uint64_t
bytes_of_a_save(uint32_t size)
{
    struct sequence sequence = {.size = size, .count = 1};
    uint64_t used;

    sequence_run(&sequence);
    used = io_memory_used_bytes(sequence.fs, -1);
    sequence_clean_up(&sequence);
    return used;
}

static const struct dcp_error *
only_failure(const struct save_result *result)
{
    CHECK_EQ(result->failures.count, 1);
    return result->failures.count == 1 ? (const struct dcp_error *)result->failures.items[0].bytes
                                       : &result->err;
}

static void
ranks_that_do_not_fit_together_are_refused_before_the_first_byte(void)
{
    for (uint32_t size = 2; size <= MOST_RANKS; size++) {
        uint64_t one = bytes_of_a_save(size);
        /* Room for half of the second save: for each rank alone, not for all together. */
        struct sequence sequence = {.size = size, .count = 4};
        sequence.steps[1].space_bytes = one + one / 2;
        sequence_run(&sequence);
        for (uint32_t r = 0; r < size; r++) {
            CHECK_EQ(sequence.results[0][r].rc, 0);
            CHECK_EQ(sequence.results[1][r].rc, DCP_E_PEER);
            CHECK_EQ(sequence.results[2][r].rc, 0);
            CHECK(sequence.results[3][r].info.fast); /* the plan has outlived it */
        }
        CHECK_EQ(sequence.writes[1], 1); /* of the claim */
        const struct dcp_error *err = only_failure(&sequence.results[1][size - 1]);
        CHECK_EQ(err->sys_errno, ENOSPC);
        CHECK(strstr(err->message,
                     "the previous checkpoint is kept until the new one is complete") != NULL);
        CHECK(strstr(err->message, SAVE_DIR) != NULL);
        CHECK_EQ(save_world_generation(sequence.fs, size), 4);
        sequence_clean_up(&sequence);
    }
}

static void
the_first_save_is_refused_too_and_tells_of_no_previous_one(void)
{
    struct sequence sequence = {.size = 3, .count = 2};

    sequence.steps[0].space_bytes = bytes_of_a_save(3) / 2;
    sequence_run(&sequence);
    for (uint32_t r = 0; r < 3; r++) {
        CHECK_EQ(sequence.results[0][r].rc, DCP_E_PEER);
        CHECK_EQ(sequence.results[1][r].rc, 0);
    }
    CHECK_EQ(sequence.writes[0], 1);
    const struct dcp_error *err = only_failure(&sequence.results[0][2]);
    CHECK(strstr(err->message, "3 ranks") != NULL && strstr(err->message, "previous") == NULL);
    CHECK_EQ(save_world_generation(sequence.fs, 3), 2);
    sequence_clean_up(&sequence);
}

/* The coordinator's disk holds its own files, by far not those of all; nor need it. */
static void
a_disk_per_node_is_not_asked_to_hold_what_other_nodes_write(void)
{
    struct sequence sequence = {.size = 3, .apart = true, .count = 4};
    uint64_t own = bytes_of_a_save(3) * 6 / 10; /* its part and the metadata of all */

    for (uint32_t i = 0; i < 3; i++) {
        sequence.steps[i].space_bytes = (1 + (i > 0)) * own; /* two side by side */
        sequence.steps[i].of_coordinator = true;
    }
    sequence.steps[3].space_bytes = own + 100; /* but not without end */
    sequence.steps[3].of_coordinator = true;
    sequence_run(&sequence);
    for (uint32_t r = 0; r < 3; r++) {
        CHECK_OK(sequence.results[0][r].rc, &sequence.results[0][r].err);
        CHECK_OK(sequence.results[1][r].rc, &sequence.results[1][r].err);
        CHECK(sequence.results[2][r].info.fast);
        CHECK_EQ(sequence.results[3][r].rc, DCP_E_PEER);
    }
    CHECK(strstr(only_failure(&sequence.results[3][1])->message, "not enough space") != NULL);
    sequence_clean_up(&sequence);
}

static void
a_disk_without_room_for_a_name_leaves_no_directory_and_no_claim(void)
{
    /* Nothing; the directory; it and the claim's name, but not its text. */
    for (uint64_t space = 1; space <= NAME_BYTES + 10; space++) {
        struct sequence sequence = {.size = 2, .count = 2};
        sequence.steps[0].space_bytes = space;
        sequence_run(&sequence);
        for (uint32_t r = 0; r < 2; r++) {
            CHECK_EQ(sequence.results[0][r].rc, DCP_E_PEER);
            CHECK_EQ(sequence.results[0][r].failures.count, space < NAME_BYTES ? 2 : 1);
            CHECK(failure_lists_equal(&sequence.results[0][r].failures,
                                      &sequence.results[0][0].failures));
            CHECK_EQ(sequence.results[1][r].rc, 0);
        }
        CHECK_EQ(save_world_generation(sequence.fs, 2), 2);
        CHECK(is_clean(sequence.fs, 2));
        sequence_clean_up(&sequence);
    }
}

/* ---- what killed saves leave ---- */

/* A disk with room for two checkpoints.  A save is killed at call `step`, again and again. */
static bool
kill_and_save_again(uint64_t step, uint64_t space_bytes)
{
    struct io_memory *fs = io_memory_new(step);
    bool killed = true;

    for (int i = 0; i < 4; i++) {
        struct sequence sequence = {.size = 2, .count = 1};
        sequence.steps[0].space_bytes = space_bytes;
        sequence.fs = fs;
        if (i == 1 || i == 2) {
            io_memory_faults(fs)->crash_at = step;
        }
        sim_ranks_run(2, TIMEOUT_MS, sequence_rank, &sequence);
        CHECK(i == 1 || i == 2 || sequence.results[0][0].rc == 0);
        killed = killed && (i == 0 || i == 3 || io_memory_crashed(fs));
        results_clean_up(sequence.results[0], 2);
        io_memory_reboot(fs, false, step);
        limit(fs, &(struct fullness){0}, UNLIMITED);
        CHECK_EQ(save_world_generation(fs, 2), 1);
    }
    CHECK(is_clean(fs, 2));
    io_memory_free(fs);
    return killed;
}

static void
what_killed_saves_left_does_not_fill_the_disk_for_ever(void)
{
    uint64_t space_bytes = 2 * bytes_of_a_save(2) + 300; /* the claim's text is longer at first */
    uint64_t step = 1;

    while (step < 200 && ctest_failures < MOST_FAILURES && kill_and_save_again(step, space_bytes)) {
        step++;
    }
    CHECK(step > 30 && step < 200);
    dcp_engine_trim();
}

CTEST_MAIN(RUN(a_disk_that_ends_at_any_byte_costs_the_new_save_only);
           RUN(so_does_one_that_tells_how_much_is_free);
           RUN(a_quota_of_all_or_of_one_rank_costs_the_new_save_only);
           RUN(ranks_that_do_not_fit_together_are_refused_before_the_first_byte);
           RUN(the_first_save_is_refused_too_and_tells_of_no_previous_one);
           RUN(a_disk_per_node_is_not_asked_to_hold_what_other_nodes_write);
           RUN(a_disk_without_room_for_a_name_leaves_no_directory_and_no_claim);
           RUN(what_killed_saves_left_does_not_fill_the_disk_for_ever);)

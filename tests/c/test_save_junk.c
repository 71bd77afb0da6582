/*
 * test_save_junk.c: whatever saves failed before it, a save that succeeds leaves its own files,
 * what was never ours, and nothing else.
 *
 * Random sequences of saves to one directory by groups of one to three ranks, most of which meet
 * something: a failing call, a full disk, a dead rank, a kill, a power cut, a caller that raises.
 * After each of them the directory holds one whole checkpoint, the last one or the new one.  The
 * seed of a sequence decides all of it.
 */
#include <errno.h>

#include "ctest.h"
#include "save_faults.h"
#include "save_world.h"
#include "sim_ranks.h"

enum {
    SEQUENCES = 600,
    LEAST_SAVES = 2,
    MOST_SAVES = 6,
    MOST_COMMITS = 2 * MOST_SAVES + 2, /* of a sequence */
    MOST_RANKS = 3,
    MOST_FAILURES = 5,
    TIMEOUT_MS = 20000,
    LONGEST_CALLS = 40, /* of a rank in one save, roughly */
    LONGEST_COLLECTIVES = 11,
};

enum fate {
    FATE_NONE,
    FATE_CALL_FAILS,
    FATE_REPLY_IS_LOST,
    FATE_DISK_FAILS_FOR_EVER,
    FATE_DISK_IS_FULL,
    FATE_RANK_DIES,
    FATE_CALLER_RAISES,
    FATE_KILLED,
    FATE_POWER_CUT,
    FATES,
};

static const char *const fate_names[FATES] = {
    "nothing",     "a failing call",       "a lost reply", "a broken disk", "a full disk",
    "a dead rank", "a caller that raises", "a kill",       "a power cut"};

/* Names that look like ours to a careless eye. */
static const char *const foreign[] = {
    "notes.txt",      "__0_0.distcp.bak", "__00_1.distcp",          "__1_.distcp",  "_0_0.distcp",
    "__0_0.metadata", "model.metadata",   ".dcp_native-claim-mine", ".metadata.tmp"};

enum { FOREIGN = sizeof foreign / sizeof foreign[0] };

struct save_case {
    struct io_memory *fs;
    const struct dcp_io *table;
    uint32_t size;
    int generation;
    enum save_change change;
    enum fate fate;
    uint32_t victim;
    uint64_t nth;
    bool after_another;  /* a good save of generation - 1 by the same group comes before */
    uint64_t other_hash; /* of its metadata */
    struct save_result results[MOST_RANKS];
};

/* A checkpoint that was seen in the directory. */
struct commit {
    uint64_t hash; /* of its metadata */
    int generation;
    uint32_t size;
    bool may_return; /* after a power cut: no later one was reported durable */
};

struct sequence {
    uint64_t seed, random;
    struct io_memory *fs;
    struct commit commits[MOST_COMMITS];
    size_t commits_count;
    size_t present; /* index of the one that is there; commits_count: none */
    int generation; /* of the last save */
    unsigned met[FATES], failed[FATES];
};

static uint64_t
draw(struct sequence *sequence, uint64_t count)
{
    sequence->random = sequence->random * 6364136223846793005u + 1442695040888963407u;
    return (sequence->random >> 33) % count;
}

/* ---- one save ---- */

static uint64_t
hash_of_metadata(const struct io_memory *fs)
{
    size_t len = 0;
    const uint8_t *bytes = io_memory_file(fs, SAVE_DIR, ".metadata", &len);
    uint64_t hash = 1;

    for (size_t i = 0; bytes != NULL && i < len; i++) {
        hash = (hash ^ bytes[i]) * 0x100000001B3u;
    }
    return bytes == NULL ? 0 : hash;
}

static void
meet(const struct dcp_comm *comm)
{
    struct dcp_error err = {0};
    int64_t lane = 0;

    CHECK_OK(comm->all_reduce_min(comm->ctx, &lane, 1, &err), &err);
}

/* Faults of the file system as a whole, which one rank sets for all. */
static void
arm_disk(const struct save_case *save)
{
    struct io_memory_faults *faults = io_memory_faults(save->fs);

    if (save->fate == FATE_DISK_IS_FULL) {
        faults->hides_space = save->nth % 2 == 0;
        faults->name_bytes = 40;
        faults->space_bytes = io_memory_used_bytes(save->fs, -1) + save->nth * 137;
    } else if (save->fate == FATE_KILLED || save->fate == FATE_POWER_CUT) {
        faults->crash_at = save->nth * save->size;
    }
}

static void
arm_rank(const struct save_case *save, struct comm_faults *comm, struct io_faults *io)
{
    static const enum fault_mode modes[FATES] = {[FATE_CALL_FAILS] = FAULT_BEFORE,
                                                 [FATE_REPLY_IS_LOST] = FAULT_AFTER,
                                                 [FATE_DISK_FAILS_FOR_EVER] = FAULT_FOR_EVER};
    static const int errnos[] = {EIO, ENOSPC, EDQUOT, EACCES};

    if (save->fate == FATE_RANK_DIES) {
        comm_faults_arm(comm, save->nth % 2 == 0 ? FAULT_BEFORE : FAULT_AFTER,
                        1 + (uint32_t)(save->nth % LONGEST_COLLECTIVES));
    } else {
        io_faults_arm(io, modes[save->fate], (uint32_t)save->nth, errnos[save->nth % 4]);
    }
}

static void
save_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct save_case *save = arg;
    uint32_t rank = comm->rank;
    struct save_request request = {
        .generation = save->generation, .change = save->change, .direct = DCP_DIRECT_OFF};
    struct comm_faults comm_faults;
    struct io_faults io_faults;
    struct dcp_group *group = NULL;
    struct dcp_error err = {0};
    struct dcp_comm table;

    comm_faults_init(&comm_faults, sim, comm, &table);
    io_faults_init(&io_faults, save->table);
    CHECK_OK(dcp_group_new(&table, 0, &group, &err), &err);
    if (save->after_another) {
        request.generation--;
        save_once(group, &io_faults.io, &request, &save->results[rank]);
        CHECK_OK(save->results[rank].rc, &save->results[rank].err);
        save_result_clean_up(&save->results[rank]);
        request.generation++;
    }
    meet(comm);
    if (rank == 0) {
        save->other_hash = hash_of_metadata(save->fs);
        arm_disk(save);
    }
    meet(comm);
    if (rank == save->victim) {
        arm_rank(save, &comm_faults, &io_faults);
        request.fail_before_agree = save->fate == FATE_CALLER_RAISES && save->nth % 2 == 0;
        request.fail_before_finish = save->fate == FATE_CALLER_RAISES && save->nth % 2 != 0;
    }
    save_once(group, &io_faults.io, &request, &save->results[rank]);
    if (save->results[rank].rc != 0 && save->results[rank].rc != DCP_E_PEER) {
        dcp_comm_sim_kill(sim, rank); /* who lost its connection leaves */
    }
    dcp_group_destroy(group);
}

/* ---- what must hold ---- */

static void
check_foreign(const struct io_memory *fs)
{
    for (size_t i = 0; i < FOREIGN; i++) {
        size_t len = 0;
        const uint8_t *bytes = io_memory_file(fs, SAVE_DIR, foreign[i], &len);
        CHECK(bytes != NULL && len == strlen(foreign[i]) && memcmp(bytes, foreign[i], len) == 0);
    }
}

static void
check_only_its_own(const struct save_case *save)
{
    const struct io_memory *fs = save->fs;
    uint64_t files = 0;
    size_t data_files = 0;

    for (uint32_t r = 0; r < save->size; r++) {
        files += save->results[r].info.write.files_count;
    }
    for (size_t i = 0; i < io_memory_names_count(fs, SAVE_DIR); i++) {
        uint32_t rank;
        uint64_t n;
        if (dcp_data_file_parse(io_memory_name(fs, SAVE_DIR, i), &rank, &n)) {
            data_files++;
            CHECK(rank < save->size && n >= save->results[0].info.n0);
        }
    }
    CHECK_EQ(data_files, files);
    CHECK_EQ(io_memory_names_count(fs, SAVE_DIR), FOREIGN + 1 + files);
}

static bool
all_ok(const struct save_case *save)
{
    bool ok = true;

    for (uint32_t r = 0; r < save->size; r++) {
        ok = ok && save->results[r].rc == 0;
    }
    return ok;
}

/* Notes a checkpoint, durable for certain or maybe not, and that it is there now. */
static void
note(struct sequence *sequence, const struct save_case *save, uint64_t hash, int generation,
     bool durable)
{
    for (size_t i = 0; durable && i < sequence->commits_count; i++) {
        sequence->commits[i].may_return = false;
    }
    sequence->present = sequence->commits_count++;
    sequence->commits[sequence->present] = (struct commit){hash, generation, save->size, true};
}

/* Which checkpoint is there: an old one that may be, or else the one that was saved last. */
static void
find_present(struct sequence *sequence, const struct save_case *save, bool ok)
{
    uint64_t hash = hash_of_metadata(save->fs);
    bool power_cut = save->fate == FATE_POWER_CUT;
    size_t i = 0;

    while (i < sequence->commits_count && sequence->commits[i].hash != hash) {
        i++;
    }
    if (hash == 0) {
        CHECK(!ok && sequence->commits_count == 0);
    } else if (i == sequence->commits_count) {
        note(sequence, save, hash, save->generation, ok || power_cut);
    } else {
        CHECK(!ok);
        CHECK(power_cut ? sequence->commits[i].may_return : i == sequence->present);
        sequence->present = i;
    }
    for (i = 0; power_cut && i < sequence->commits_count; i++) {
        sequence->commits[i].may_return = i == sequence->present;
    }
}

static void
judge(struct sequence *sequence, const struct save_case *save)
{
    bool ok = all_ok(save);
    /* A call that fails, or never comes, while a committed save sweeps costs it nothing but that.
     */
    bool may_sweep = save->fate == FATE_NONE || save->fate == FATE_DISK_IS_FULL ||
                     save->fate == FATE_RANK_DIES || save->fate == FATE_CALLER_RAISES;

    sequence->met[save->fate]++;
    sequence->failed[save->fate] += !ok;
    CHECK(ok || save->fate != FATE_NONE);
    if (save->after_another) {
        note(sequence, save, save->other_hash, save->generation - 1, true);
    }
    find_present(sequence, save, ok);
    if (sequence->commits_count > 0) {
        const struct commit *present = &sequence->commits[sequence->present];
        CHECK_EQ(save_world_generation(save->fs, present->size), present->generation);
    }
    if (ok && may_sweep) {
        check_only_its_own(save);
    }
    check_foreign(save->fs);
    CHECK_EQ(io_memory_open_files(save->fs), 0);
    CHECK_EQ(io_memory_vain_syncs(save->fs), 0);
}

/* ---- sequences ---- */

static void
run_save(struct sequence *sequence, enum fate fate)
{
    static const enum save_change changes[] = {CHANGE_NONE, CHANGE_NONE, CHANGE_THREAD_COUNT,
                                               CHANGE_FILE_PER_ITEM};
    struct io_memory *fs = sequence->fs;
    struct save_case save = {.fs = fs,
                             .table = &io_memory_process(fs, 0)->io,
                             .size = 1 + (uint32_t)draw(sequence, MOST_RANKS),
                             .fate = fate,
                             .change = changes[draw(sequence, 4)],
                             .generation = 2 + sequence->generation % (SAVE_GENERATIONS - 2),
                             .nth = 1 + draw(sequence, LONGEST_CALLS),
                             .after_another = draw(sequence, 4) == 0};
    int before = ctest_failures;

    save.victim = (uint32_t)draw(sequence, save.size);
    sequence->generation = save.generation;
    sim_ranks_run(save.size, TIMEOUT_MS, save_rank, &save);
    if (fate == FATE_KILLED || fate == FATE_POWER_CUT) {
        io_memory_reboot(fs, fate == FATE_POWER_CUT, draw(sequence, 1 << 20));
    }
    *io_memory_faults(fs) =
        (struct io_memory_faults){.space_bytes = UINT64_MAX, .crash_at = UINT64_MAX};
    judge(sequence, &save);
    if (ctest_failures != before) {
        fprintf(stderr, "    seed %llu: %u ranks, generation %d, %s, rank %u, number %llu%s\n",
                (unsigned long long)sequence->seed, save.size, save.generation, fate_names[fate],
                save.victim, (unsigned long long)save.nth, save.after_another ? ", second" : "");
    }
    for (uint32_t r = 0; r < save.size; r++) {
        save_result_clean_up(&save.results[r]);
    }
}

static void
run_sequence(struct sequence *sequence)
{
    struct io_memory_process *process;
    struct io_memory *fs = io_memory_new(sequence->seed);
    uint64_t saves;

    sequence->random = sequence->seed;
    sequence->fs = fs;
    sequence->commits_count = 0;
    sequence->present = 0;
    sequence->generation = 0;
    process = io_memory_process(fs, 0);
    CHECK_EQ(process->io.mkdirs(process, SAVE_DIR), 0);
    for (size_t i = 0; i < FOREIGN; i++) {
        io_memory_put_file(fs, SAVE_DIR, foreign[i], foreign[i], strlen(foreign[i]));
    }
    saves = LEAST_SAVES + draw(sequence, MOST_SAVES - LEAST_SAVES + 1);
    for (uint64_t i = 0; i < saves; i++) {
        run_save(sequence, (enum fate)draw(sequence, FATES));
    }
    run_save(sequence, FATE_NONE);
    io_memory_free(fs);
}

static void
a_good_save_leaves_nothing_of_the_bad_ones_before_it(void)
{
    struct sequence sequence = {0};

    for (uint64_t seed = 1; seed <= SEQUENCES && ctest_failures < MOST_FAILURES; seed++) {
        sequence.seed = seed;
        run_sequence(&sequence);
    }
    for (int fate = 0; fate < FATES; fate++) {
        printf("    %s: met by %u saves, %u of which failed\n", fate_names[fate],
               sequence.met[fate], sequence.failed[fate]);
        CHECK(ctest_failures > 0 || fate == FATE_NONE || sequence.failed[fate] > 50);
    }
    dcp_engine_trim();
}

CTEST_MAIN(RUN(a_good_save_leaves_nothing_of_the_bad_ones_before_it);)

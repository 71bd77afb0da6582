/*
 * test_load.c: whole loads by simulated ranks: what is absent, damaged, replaced or fails on the
 * way is an error on every rank, and never bytes of anything but the checkpoint.
 */
#include <errno.h>

#include "ctest.h"
#include "save_faults.h"
#include "save_world.h"
#include "sim_ranks.h"

enum { RANKS = 3, COORDINATOR = 1, TIMEOUT_MS = 20000, MOST_CALLS = 500, MOST_FAILURES = 20 };

struct load_case {
    struct load_request request;
    uint32_t victim; /* of everything that follows, and of fail_before */
    struct {
        enum fault_mode mode;
        uint32_t nth;
    } comm, io;
    bool victim_acts_between; /* request.between runs on the victim only */
    /* filled by the run */
    const struct dcp_io *table;
    bool comm_hit, io_hit;
    struct load_result results[RANKS];
};

struct save_case {
    const struct dcp_io *table;
    int generation;
};

static void
save_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct save_case *save = arg;
    struct dcp_group *group = save_world_group(comm, COORDINATOR);
    struct save_request request = {.generation = save->generation, .direct = DCP_DIRECT_OFF};
    struct save_result result;
    (void)sim;

    save_once(group, save->table, &request, &result);
    if (result.rc != 0) {
        fprintf(stderr, "a save failed: %s\n", result.err.message);
        exit(1);
    }
    dcp_group_destroy(group);
}

static void
save(struct io_memory *fs, int generation)
{
    struct save_case arg = {&io_memory_process(fs, 1)->io, generation};
    sim_ranks_run(RANKS, TIMEOUT_MS, save_rank, &arg);
}

static void
load_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct load_case *load = arg;
    bool is_victim = comm->rank == load->victim;
    struct load_request request = load->request;
    struct comm_faults comm_faults;
    struct io_faults io_faults;
    struct dcp_comm table;
    struct dcp_group *group;

    comm_faults_init(&comm_faults, sim, comm, &table);
    io_faults_init(&io_faults, load->table);
    if (is_victim) {
        comm_faults_arm(&comm_faults, load->comm.mode, load->comm.nth);
        io_faults_arm(&io_faults, load->io.mode, load->io.nth, EIO);
    } else {
        memset(request.fail_before, 0, sizeof request.fail_before);
        request.between = load->victim_acts_between ? NULL : request.between;
    }
    group = save_world_group(&table, COORDINATOR);
    load_once(group, &io_faults.io, &request, &load->results[comm->rank]);
    if (is_victim) {
        load->comm_hit = comm_faults.failed;
        load->io_hit = atomic_load(&io_faults.hit);
    }
    if (load->results[comm->rank].rc != 0 && load->results[comm->rank].rc != DCP_E_PEER) {
        dcp_comm_sim_kill(sim, comm->rank);
    }
    dcp_group_destroy(group);
}

static void
describe(const struct load_case *load)
{
    fprintf(stderr, "failed: rank %u, comm mode %d call %u, io mode %d call %u\n", load->victim,
            load->comm.mode, load->comm.nth, load->io.mode, load->io.nth);
    for (uint32_t r = 0; r < RANKS; r++) {
        const struct load_result *result = &load->results[r];
        fprintf(stderr, "  rank %u: %s, read %s, generation %d: %s\n", r, dcp_code_name(result->rc),
                dcp_code_name(result->read_code), result->generation, result->err.message);
        for (size_t i = 0; i < result->failures.count; i++) {
            fprintf(stderr, "    rank %u failed: %s\n", result->failures.items[i].rank,
                    ((struct dcp_error *)result->failures.items[i].bytes)->message);
        }
    }
}

/* What holds whatever goes wrong: success is the whole checkpoint, a failure is the same list
 * everywhere, and bytes are right or missing. */
static void
run_load(struct io_memory *fs, struct load_case *load)
{
    int before = ctest_failures;
    const struct load_result *told = NULL;

    load->table = &io_memory_process(fs, 0)->io;
    load->request.saved_size = RANKS;
    load->request.without_state_of = UINT32_MAX;
    sim_ranks_run(RANKS, TIMEOUT_MS, load_rank, load);
    for (uint32_t r = 0; r < RANKS; r++) {
        const struct load_result *result = &load->results[r];
        CHECK(result->generation == 1 || (result->rc != 0 && result->generation == 0));
        CHECK(load->comm_hit || result->rc == load->results[0].rc);
        CHECK(load->comm_hit || result->rc == 0 || result->rc == DCP_E_PEER);
        CHECK(result->rc != DCP_E_TIMEOUT);
        CHECK((result->rc == DCP_E_PEER) == (result->failures.count > 0));
        if (result->rc == DCP_E_PEER) {
            told = told == NULL ? result : told;
            CHECK(failure_lists_equal(&told->failures, &result->failures));
        }
    }
    CHECK_EQ(io_memory_open_files(fs), 0);
    if (ctest_failures != before) {
        describe(load);
    }
}

static void
load_clean_up(struct load_case *load)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        load_result_clean_up(&load->results[r]);
    }
}

static const struct dcp_error *
failure_of(const struct load_case *load, size_t i)
{
    return (const struct dcp_error *)load->results[0].failures.items[i].bytes;
}

/* ---- cases ---- */

static void
a_load_of_nothing_tells_every_rank_what_is_absent(void)
{
    for (int has_directory = 0; has_directory < 2; has_directory++) {
        struct io_memory *fs = io_memory_new(1);
        struct dcp_io *io = &io_memory_process(fs, 0)->io;
        struct load_case load = {.victim = UINT32_MAX};
        if (has_directory) {
            CHECK_EQ(io->mkdirs(io->ctx, SAVE_DIR), 0);
        }
        run_load(fs, &load);
        CHECK_EQ(load.results[0].failures.count, RANKS);
        for (uint32_t r = 0; r < load.results[0].failures.count; r++) {
            char own[32];
            snprintf(own, sizeof own, "__%u.metadata", r);
            CHECK_EQ(failure_of(&load, r)->code, DCP_E_ASSERTION);
            CHECK(strstr(failure_of(&load, r)->message, own) != NULL);
        }
        load_clean_up(&load);
        io_memory_free(fs);
    }
}

/* One rank reads and checks the file; a file of ours is sent without its pickle. */
static void
other_ranks_get_no_more_of_our_metadata_than_they_need(void)
{
    struct io_memory *fs = io_memory_new(1);
    size_t len;
    save(fs, 1);
    const uint8_t *image = io_memory_file(fs, SAVE_DIR, ".metadata", &len);
    uint8_t *stock = dcp_malloc(len);
    memcpy(stock, image, len);
    for (int is_stock = 0; is_stock < 2; is_stock++) {
        struct load_case load = {.victim = UINT32_MAX};
        io_memory_put_file(fs, SAVE_DIR, ".metadata", stock, len - (is_stock ? 1 : 0));
        run_load(fs, &load);
        for (uint32_t r = 0; r < RANKS; r++) {
            size_t bytes = load.results[r].image_bytes;
            bool is_whole = is_stock || r == COORDINATOR;
            CHECK_EQ(load.results[r].rc, 0);
            CHECK(is_whole ? bytes == len - (is_stock ? 1 : 0) : bytes > 64 && bytes < len / 2);
        }
        load_clean_up(&load);
    }
    dcp_free(stock);
    io_memory_free(fs);
    dcp_engine_trim();
}

/* An image that was cut or changed anywhere is an error, or shows the checkpoint it was. */
static void
damaged_metadata_never_gives_wrong_bytes(void)
{
    struct io_memory *fs = io_memory_new(1);
    size_t len;
    save(fs, 1);
    const uint8_t *image = io_memory_file(fs, SAVE_DIR, ".metadata", &len);
    uint8_t *damaged = dcp_malloc(len);
    unsigned errors = 0;
    for (size_t at = 0; at < len && ctest_failures < MOST_FAILURES; at += at < 64 ? 7 : 37) {
        for (int cut = 0; cut < 2; cut++) {
            struct io_memory *other = io_memory_new(at);
            struct dcp_io *io = &io_memory_process(other, 0)->io;
            struct load_case load = {.victim = UINT32_MAX};
            io->mkdirs(io->ctx, SAVE_DIR);
            for (size_t i = 0; i < io_memory_names_count(fs, SAVE_DIR); i++) {
                const char *name = io_memory_name(fs, SAVE_DIR, i);
                size_t file_len;
                const uint8_t *bytes = io_memory_file(fs, SAVE_DIR, name, &file_len);
                if (strcmp(name, ".metadata") != 0) {
                    io_memory_put_file(other, SAVE_DIR, name, bytes, file_len);
                }
            }
            memcpy(damaged, image, len);
            damaged[at] ^= (uint8_t)(1u << at % 8);
            io_memory_put_file(other, SAVE_DIR, ".metadata", damaged, cut ? at : len);
            run_load(other, &load);
            errors += load.results[0].rc != 0;
            load_clean_up(&load);
            io_memory_free(other);
        }
    }
    CHECK(errors > 20);
    dcp_free(damaged);
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
save_second(void *arg)
{
    save(arg, 2);
}

static void
wipe_and_save_second(void *arg)
{
    struct dcp_io *io = &io_memory_process(arg, 2)->io;
    int dirfd = io->open_dir(io->ctx, SAVE_DIR);
    while (io_memory_names_count(arg, SAVE_DIR) > 0) {
        (void)io->unlink_at(io->ctx, dirfd, io_memory_name(arg, SAVE_DIR, 0));
    }
    io->close(io->ctx, dirfd);
    save(arg, 2);
}

static void
a_checkpoint_that_is_replaced_during_a_load_is_noticed(void)
{
    static const struct {
        void (*act)(void *);
        int code;
    } acts[] = {{save_second, DCP_E_NOENT}, {wipe_and_save_second, DCP_E_STALE}};
    for (size_t a = 0; a < 2; a++) {
        for (uint32_t victim = 0; victim < RANKS; victim++) {
            struct io_memory *fs = io_memory_new(a);
            struct load_case load = {.victim = victim, .victim_acts_between = true};
            save(fs, 1);
            load.request.between = acts[a].act;
            load.request.between_arg = fs;
            run_load(fs, &load);
            CHECK_EQ(load.results[victim].rc, DCP_E_PEER);
            CHECK_EQ(load.results[victim].read_code, acts[a].code);
            CHECK_EQ(save_world_generation(fs, RANKS), 2);
            load_clean_up(&load);
            io_memory_free(fs);
        }
    }
    dcp_engine_trim();
}

static void
a_caller_that_raises_at_any_step_fails_the_load_everywhere(void)
{
    struct io_memory *fs = io_memory_new(1);
    save(fs, 1);
    for (uint32_t victim = 0; victim < RANKS; victim++) {
        for (int step = 0; step < 3; step++) {
            struct load_case load = {.victim = victim};
            load.request.fail_before[step] = true;
            run_load(fs, &load);
            CHECK_EQ(load.results[0].rc, DCP_E_PEER);
            CHECK_EQ(load.results[0].failures.count, 1);
            CHECK_EQ(load.results[0].failures.items[0].rank, victim);
            load_clean_up(&load);
        }
    }
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
a_failing_call_of_any_rank_never_gives_wrong_bytes(void)
{
    struct io_memory *fs = io_memory_new(1);
    unsigned cases[2] = {0};
    save(fs, 1);
    for (int i = 0; i < 7 * RANKS; i++) {
        bool hit = true;
        for (uint32_t nth = 1; hit && nth < MOST_CALLS && ctest_failures < MOST_FAILURES; nth++) {
            struct load_case load = {.victim = (uint32_t)i % RANKS};
            int kind = i / RANKS;
            if (kind < 4) {
                load.comm.mode = kind % 2 == 0 ? FAULT_BEFORE : FAULT_AFTER;
                load.comm.nth = nth;
                load.request.fail_before[2] = kind >= 2; /* and the failure is told meanwhile */
            } else {
                load.io.mode = (enum fault_mode)(FAULT_BEFORE + kind - 4);
                load.io.nth = nth;
            }
            run_load(fs, &load);
            hit = load.comm_hit || load.io_hit;
            cases[load.io_hit] += hit;
            load_clean_up(&load);
        }
    }
    /* vote, three of the broadcast, two statuses; four more where a failure is told */
    CHECK_EQ(cases[0], 2 * RANKS * (6 + 10));
    CHECK(cases[1] > 100);
    io_memory_free(fs);
    dcp_engine_trim();
}

CTEST_MAIN(RUN(a_load_of_nothing_tells_every_rank_what_is_absent);
           RUN(other_ranks_get_no_more_of_our_metadata_than_they_need);
           RUN(damaged_metadata_never_gives_wrong_bytes);
           RUN(a_checkpoint_that_is_replaced_during_a_load_is_noticed);
           RUN(a_caller_that_raises_at_any_step_fails_the_load_everywhere);
           RUN(a_failing_call_of_any_rank_never_gives_wrong_bytes);)

/*
 * test_device_save.c: whole saves of ranks whose tensors lie on devices: agreed, cut, compared with
 * a base, staged in two steps or streamed, and loaded again.
 */
#include "ctest.h"

#include "save_world.h"
#include "sim_ranks.h"

enum { RANKS = 3, TIMEOUT_MS = 20000 };

struct run {
    struct io_memory *fs;
    const struct dcp_io *table;
    const struct devices *devices; /* NULL: tensors lie on the host */
    bool stage, independent;
    uint64_t split_bytes;
    struct save_result results[RANKS];
    struct load_result loads[RANKS];
};

/* A whole save on the host, then one of a few changed items that names it as its base. */
static void
save_and_load(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct run *run = arg;
    struct dcp_group *group = save_world_group(comm, 0);
    struct save_result first = {0};
    struct save_request request = {.generation = 1,
                                   .dir = "/a",
                                   .content_hash = true,
                                   .independent = run->independent,
                                   .split_bytes = run->split_bytes};
    struct load_request load = {.dir = "/b", .saved_size = RANKS, .without_state_of = UINT32_MAX};
    (void)sim;

    save_once(group, run->table, &request, &first);
    CHECK_OK(first.rc, &first.err);
    save_result_clean_up(&first);
    request.generation = SAVE_PARTLY;
    request.dir = "/b";
    request.base = "/a";
    request.stage = run->stage;
    request.devices = run->devices;
    save_once(group, run->table, &request, &run->results[comm->rank]);
    if (!run->independent) {
        load_once(group, run->table, &load, &run->loads[comm->rank]);
    }
    dcp_group_destroy(group);
}

static void
run_one(struct run *run, uint64_t seed, const struct devices *devices)
{
    run->fs = io_memory_new(seed);
    run->table = &io_memory_process(run->fs, 0)->io;
    run->devices = devices;
    sim_ranks_run(RANKS, TIMEOUT_MS, save_and_load, run);
    for (uint32_t r = 0; r < RANKS; r++) {
        CHECK_OK(run->results[r].rc, &run->results[r].err);
        CHECK_EQ(run->results[r].info.outcome, DCP_OUTCOME_COMMITTED);
        if (!run->independent) {
            CHECK_OK(run->loads[r].rc, &run->loads[r].err);
            CHECK_EQ(run->loads[r].generation, SAVE_PARTLY);
            load_result_clean_up(&run->loads[r]);
        }
        save_result_clean_up(&run->results[r]);
    }
    CHECK_EQ(io_memory_open_files(run->fs), 0);
    io_memory_free(run->fs);
}

static void
saves_from_devices_are_those_from_the_host(void)
{
    for (uint64_t seed = 0; seed < 16; seed++) {
        struct run host = {.stage = seed % 2 == 0,
                           .independent = seed % 8 >= 6,
                           .split_bytes = seed % 4 < 2 ? DCP_SPLIT_OFF : 64};
        struct run run = host;
        struct devices devices[RANKS];
        for (uint32_t r = 0; r < RANKS; r++) {
            devices_make(&devices[r], 1, device_of_seed(seed + r));
        }
        run_one(&host, seed, NULL);
        run_one(&run, seed, devices);
        dcp_arena_trim();
        dcp_engine_trim();
        for (uint32_t r = 0; r < RANKS; r++) {
            const struct dcp_save_info *info = &run.results[r].info;
            CHECK_EQ(info->reused_items, host.results[r].info.reused_items);
            CHECK_EQ(info->reused_bytes, host.results[r].info.reused_bytes);
            CHECK_EQ(info->cut_items, host.results[r].info.cut_items);
            CHECK(info->device.copied_bytes > 0);
            CHECK_EQ(host.results[r].info.device.copied_bytes, 0);
            CHECK(devices_clean_up(&devices[r]));
        }
    }
}

/* A save that is given up between the two steps of staging. */
static void
a_save_that_ends_between_the_steps_waits_for_its_copies(void)
{
    struct devices devices;
    struct io_memory *fs = io_memory_new(1);
    const struct dcp_io *io = &io_memory_process(fs, 0)->io;
    struct dcp_comm comm;
    struct dcp_error err = {0};
    struct save_request request = {.generation = 1, .devices = &devices};
    struct dcp_stage_params params = {.kind = DCP_ARENA_PRIVATE};
    struct begun_save begun;

    devices_make(&devices, 1, device_of_seed(3));
    dcp_comm_local(&comm);
    struct dcp_group *group = save_world_group(&comm, 0);
    save_begin(group, io, &request, &begun);
    CHECK_OK(begun.rc, &begun.err);
    CHECK_OK(dcp_save_stage_begin(begun.save, begun.sources, &params, &err), &err);
    begun_save_end(&begun);
    dcp_group_destroy(group);
    dcp_arena_trim();
    io_memory_free(fs);
    CHECK(devices_clean_up(&devices));
}

CTEST_MAIN(RUN(saves_from_devices_are_those_from_the_host);
           RUN(a_save_that_ends_between_the_steps_waits_for_its_copies);)

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

/* ---- pinned memory ---- */

static int pins, unpins;
static int (*real_pin)(void *, void *, uint64_t, struct dcp_error *);
static void (*real_unpin)(void *, void *);

static int
count_pin(void *ctx, void *memory, uint64_t bytes, struct dcp_error *err)
{
    pins++;
    return real_pin(ctx, memory, bytes, err);
}

static void
count_unpin(void *ctx, void *memory)
{
    unpins++;
    real_unpin(ctx, memory);
}

/* One rank with one device, whose pins are counted. */
struct bench {
    struct devices devices;
    struct io_memory *fs;
    struct dcp_comm comm;
    struct dcp_group *group;
    struct save_request request;
};

static void
bench_make(struct bench *bench, struct device_sim_options options)
{
    memset(bench, 0, sizeof *bench);
    devices_make(&bench->devices, 1, options);
    real_pin = bench->devices.tables[0]->pin;
    real_unpin = bench->devices.tables[0]->unpin;
    bench->devices.tables[0]->pin = count_pin;
    bench->devices.tables[0]->unpin = count_unpin;
    pins = unpins = 0;
    bench->fs = io_memory_new(1);
    dcp_comm_local(&bench->comm);
    bench->group = save_world_group(&bench->comm, 0);
    bench->request = (struct save_request){.generation = 1, .devices = &bench->devices};
}

static void
bench_clean_up(struct bench *bench)
{
    dcp_group_destroy(bench->group);
    dcp_arena_trim();
    io_memory_free(bench->fs);
    CHECK(devices_clean_up(&bench->devices));
}

/* Stages a save and gives it up; what `cancel` makes of it. */
static int
stage_one(struct bench *bench, atomic_int *cancel, struct dcp_save_info *ret_info)
{
    const struct dcp_io *io = &io_memory_process(bench->fs, 0)->io;
    struct dcp_stage_params params = {.kind = DCP_ARENA_PRIVATE, .cancel = cancel};
    struct dcp_error err = {0};
    struct begun_save begun;
    save_begin(bench->group, io, &bench->request, &begun);
    CHECK_OK(begun.rc, &begun.err);
    int rc = dcp_save_stage_begin(begun.save, begun.sources, &params, &err);
    if (rc == 0 && cancel != NULL) {
        atomic_store(cancel, 1);
    }
    const struct dcp_stage_end how = {.cancel = cancel};
    rc = rc == 0 ? dcp_save_stage_end(begun.save, begun.sources, &how, &err) : rc;
    dcp_save_get_info(begun.save, ret_info);
    begun_save_end(&begun);
    return rc;
}

static void
saves_with_the_same_arena_pin_once(void)
{
    struct device_sim_options options = {.seed = 1,
                                         .features = DCP_DEVICE_PACKS | DCP_DEVICE_CHECKSUMS,
                                         .slab_most_bytes = UINT64_MAX};
    struct bench bench;
    struct dcp_save_info info;
    bench_make(&bench, options);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(stage_one(&bench, NULL, &info), 0);
        CHECK_EQ(pins, 1);
        CHECK_EQ(unpins, 0);
        CHECK(info.device.reason[0] == 0);
    }
    bench_clean_up(&bench);
    CHECK_EQ(unpins, 1);
}

static void
memory_that_cannot_be_pinned_is_asked_about_once_and_told_every_time(void)
{
    struct bench bench;
    struct dcp_save_info info;
    bench_make(&bench, (struct device_sim_options){
                           .seed = 2, .features = DCP_DEVICE_CHECKSUMS, .no_pin = true});
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(stage_one(&bench, NULL, &info), 0);
        CHECK(strstr(info.device.reason, "no memory to pin") != NULL);
    }
    CHECK_EQ(pins, 1);
    bench_clean_up(&bench);
    CHECK_EQ(unpins, 0);
}

static void
an_arena_that_a_hung_device_may_write_to_is_named(void)
{
    struct bench bench;
    struct dcp_save_info info;
    struct dcp_error err = {0};
    atomic_int cancel = 0;
    struct dcp_arena *arena;
    bench_make(&bench, (struct device_sim_options){.seed = 3});
    CHECK_OK(dcp_arena_acquire(DCP_ARENA_PRIVATE, 1 << 20, NULL, &arena, &err), &err);
    dcp_arena_release(arena);
    device_sim_hang(bench.devices.sims[0], true);
    CHECK_EQ(stage_one(&bench, &cancel, &info), DCP_E_CANCELLED);
    CHECK(strstr(info.device.reason, "lost until the process ends") != NULL);
    dcp_arena_trim();
    CHECK(dcp_arena_total_bytes() > 0);
    device_sim_go_on(bench.devices.sims[0]);
    CHECK_OK(bench.devices.tables[0]->wait_idle(bench.devices.sims[0], &err), &err);
    dcp_arena_release(arena);
    bench_clean_up(&bench);
}

static void
a_warm_up_that_fails_pins_nothing(void)
{
    struct bench bench;
    struct dcp_error err = {0};
    struct begun_save begun;
    atomic_int cancel = 1;
    struct dcp_stage_params params = {.kind = DCP_ARENA_PRIVATE, .cancel = &cancel};
    bench_make(&bench, (struct device_sim_options){.seed = 4});
    save_begin(bench.group, &io_memory_process(bench.fs, 0)->io, &bench.request, &begun);
    CHECK_OK(begun.rc, &begun.err);
    CHECK_EQ(dcp_save_warm_up(begun.save, &params, 1, &err), DCP_E_CANCELLED);
    CHECK_EQ(pins, 0);
    params.cancel = NULL;
    dcp_error_clear(&err);
    CHECK_OK(dcp_save_warm_up(begun.save, &params, 1, &err), &err);
    CHECK_EQ(pins, 1);
    begun_save_end(&begun);
    bench_clean_up(&bench);
    CHECK_EQ(unpins, 1);
}

CTEST_MAIN(RUN(saves_from_devices_are_those_from_the_host);
           RUN(a_save_that_ends_between_the_steps_waits_for_its_copies);
           RUN(saves_with_the_same_arena_pin_once);
           RUN(memory_that_cannot_be_pinned_is_asked_about_once_and_told_every_time);
           RUN(an_arena_that_a_hung_device_may_write_to_is_named);
           RUN(a_warm_up_that_fails_pins_nothing);)

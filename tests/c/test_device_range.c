/*
 * test_device_range.c: what a device reads from a file by itself is what the ordinary way brings:
 * the same bytes, checked against the same checksums, counted and told in the same way; and where
 * it cannot, or must not, the ordinary way is taken.
 */
#include "ctest.h"

#include "device_world.h"
#include "engine_load.h"

enum { COLUMNS = 1000, FEATURES = DCP_DEVICE_READS_FILES | DCP_DEVICE_CHECKSUMS };
/* More than is read in one go (64 MiB). */
#define MANY_ROWS 17000u

struct scene {
    struct world world;
    struct disk disk;
    struct devices devices;
    struct dcp_read_plan plan;
    uint64_t rows, bytes, address;
    struct dcp_device_put *put;
    struct dcp_engine_options engine;
    struct dcp_read_stats stats;
    struct dcp_device_stats device_stats;
    uint8_t state;
};

/* A tensor that was saved in `parts`, and memory for it on a device; what the trainer is about to
 * write there comes late. */
static void
scene_make(struct scene *scene, uint64_t rows, uint64_t parts, struct device_sim_options options)
{
    memset(scene, 0, sizeof *scene);
    one_tensor(&scene->world, rows, parts);
    disk_make(&scene->disk, &scene->world, 512);
    scene->rows = rows;
    scene->bytes = rows * COLUMNS * 4;
    options.io = scene->disk.io;
    options.memory_bytes = 160u << 20;
    devices_make(&scene->devices, 1, options);
    scene->address = device_sim_tensor(scene->devices.sims[0], scene->bytes, 4);
    scene->plan.md = &scene->world.md;
    scene->plan.devices = &scene->devices.list;
    scene->engine.verify = true;

    const struct dcp_device *table = scene->devices.tables[0];
    uint8_t *late = malloc(scene->bytes);
    memset(late, 0x55, scene->bytes);
    device_sim_poke_later(scene->devices.sims[0], 1, scene->address, late, scene->bytes);
    CHECK_EQ(table->follow(table->ctx, (void *)1, NULL), 0);
    free(late);
}

static void
scene_clean_up(struct scene *scene)
{
    dcp_device_put_destroy(scene->put);
    dcp_read_plan_clean_up(&scene->plan);
    disk_clean_up(&scene->disk);
    world_clean_up(&scene->world);
    CHECK(devices_clean_up(&scene->devices));
}

/* Loads rows from `from` on; strides in elements, NULL: row major. */
static int
scene_load(struct scene *scene, uint64_t from, uint64_t rows, const int64_t *strides, bool ranges,
           struct dcp_error *err)
{
    uint64_t offsets[2] = {from, 0}, sizes[2] = {rows, COLUMNS}, target;
    struct dcp_read_plan *plan = &scene->plan;
    CHECK_OK(dcp_read_plan_add(plan, entry_of(&scene->world, 0),
                               (uint8_t *)(uintptr_t)scene->address, strides, offsets, sizes,
                               &target, err),
             err);
    plan->targets[target].kind = DCP_TARGET_PIECES;
    plan->targets[target].device = 1;
    CHECK_OK(dcp_read_plan_build(plan, true, NULL, err), err);
    CHECK_OK(dcp_read_plan_track(plan, err), err);
    int rc = dcp_device_put_new(plan, NULL, NULL, &scene->put, err);
    if (rc != 0) {
        return rc;
    }
    dcp_device_put_set_cancel(scene->put, scene->engine.cancel);
    plan->on_piece = dcp_device_put_piece;
    plan->on_piece_ctx = scene->put;
    plan->on_range = ranges ? dcp_device_put_range : NULL;
    rc = dcp_reader_run(scene->disk.io, scene->disk.dirfd, "/d", plan, &scene->engine, NULL, NULL,
                        &scene->stats, err);
    int put_rc = dcp_device_put_finish(scene->put, scene->engine.cancel, rc == 0 ? err : NULL);
    dcp_device_put_get_stats(scene->put, &scene->device_stats);
    CHECK_EQ(dcp_read_plan_states(plan, DCP_TARGET_UNTOUCHED, &scene->state, NULL), 0);
    return rc != 0 ? rc : put_rc;
}

/* All of it arrived, `direct` bytes of it by the device's own reads. */
static void
check_loaded(struct scene *scene, uint64_t from, uint64_t rows, uint64_t direct)
{
    uint64_t bytes = rows * COLUMNS * 4;
    uint8_t *got = malloc(bytes);
    device_sim_peek(scene->devices.sims[0], scene->address, got, bytes);
    CHECK(memcmp(got, scene->world.tensors[0].image + from * COLUMNS * 4, bytes) == 0);
    free(got);
    CHECK_EQ(scene->state, DCP_TARGET_FILLED);
    CHECK_EQ(scene->stats.wanted_bytes, bytes);
    CHECK_EQ(scene->stats.device_direct_bytes, direct);
    CHECK_EQ(scene->stats.straight_bytes, direct);
    CHECK(scene->stats.read_bytes >= bytes);
    CHECK_EQ(scene->device_stats.copied_bytes, bytes - direct);
}

static void
whole_payloads_pass_the_host_by_and_are_verified(void)
{
    for (uint64_t seed = 0; seed < 6; seed++) {
        struct scene scene;
        struct dcp_error err = {0};
        _Atomic uint64_t progress = 0;
        bool verify = seed % 2 == 0;
        uint64_t rows = seed < 2 ? MANY_ROWS : 3000;
        scene_make(&scene, rows, seed < 2 ? 1 : 1 + seed,
                   (struct device_sim_options){.seed = seed, .features = FEATURES});
        scene.engine.verify = verify;
        scene.engine.progress_bytes = &progress;
        CHECK_OK(scene_load(&scene, 0, rows, NULL, true, &err), &err);
        check_loaded(&scene, 0, rows, scene.bytes);
        CHECK_EQ(scene.stats.verified_bytes, verify ? scene.bytes : 0);
        CHECK_EQ(scene.stats.unverified_bytes, verify ? 0 : scene.bytes);
        CHECK(scene.stats.read_bytes < scene.bytes + 4096); /* and what says where it is */
        CHECK_EQ(atomic_load(&progress), scene.bytes);
        CHECK_EQ(device_sim_reads(scene.devices.sims[0]), seed < 2 ? 2 : 1 + seed);
        CHECK(scene.device_stats.reason[0] == 0);
        scene_clean_up(&scene);
    }
}

static void
nobody_who_did_not_ask_gets_it(void)
{
    struct scene scene;
    struct dcp_error err = {0};
    scene_make(&scene, 3000, 1, (struct device_sim_options){.seed = 1, .features = FEATURES});
    CHECK_OK(scene_load(&scene, 0, 3000, NULL, false, &err), &err);
    check_loaded(&scene, 0, 3000, 0);
    CHECK_EQ(device_sim_reads(scene.devices.sims[0]), 0);
    scene_clean_up(&scene);
}

static void
what_is_refused_comes_the_ordinary_way_from_there_on(void)
{
    /* A payload of two ranges, whose second one is refused; then three payloads of one file. */
    for (uint64_t c = 0; c < 2; c++) {
        struct scene scene;
        struct dcp_error err = {0};
        uint64_t rows = c == 0 ? MANY_ROWS : 3000;
        scene_make(&scene, rows, c == 0 ? 1 : 3,
                   (struct device_sim_options){
                       .seed = c, .features = FEATURES, .refuse_read = c == 0 ? 2 : 1});
        CHECK_OK(scene_load(&scene, 0, rows, NULL, true, &err), &err);
        check_loaded(&scene, 0, rows, c == 0 ? 64u << 20 : 0);
        CHECK_EQ(scene.stats.verified_bytes, scene.bytes);
        CHECK_EQ(device_sim_reads(scene.devices.sims[0]), c == 0 ? 2 : 1);
        CHECK(strstr(scene.device_stats.reason, "not this file") != NULL);
        scene_clean_up(&scene);
    }
}

static void
what_cannot_be_verified_on_the_device_is_not_read_by_it(void)
{
    for (uint64_t c = 0; c < 4; c++) {
        struct scene scene;
        struct dcp_error err = {0};
        bool pinned = c < 2, verify = c % 2 == 0;
        scene_make(
            &scene, 3000, 1,
            (struct device_sim_options){.seed = c,
                                        .features = pinned ? DCP_DEVICE_READS_FILES : FEATURES,
                                        .no_pin = !pinned});
        scene.engine.verify = verify;
        CHECK_OK(scene_load(&scene, 0, 3000, NULL, true, &err), &err);
        check_loaded(&scene, 0, 3000, verify ? 0 : scene.bytes);
        CHECK_EQ(scene.stats.verified_bytes, verify ? scene.bytes : 0);
        CHECK(!pinned || (strstr(scene.device_stats.reason, "verify") != NULL) == verify);
        scene_clean_up(&scene);
    }
}

static int
no_memory_for_checksums(void *ctx, uint64_t device, uint64_t bytes, uint32_t *crcs,
                        struct dcp_error *err)
{
    (void)ctx, (void)device, (void)bytes, (void)crcs;
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for checksums");
}

static void
a_device_without_memory_for_checksums_has_the_host_read_again(void)
{
    struct scene scene;
    struct dcp_error err = {0};
    scene_make(&scene, 3000, 1, (struct device_sim_options){.seed = 1, .features = FEATURES});
    scene.devices.tables[0]->checksum = no_memory_for_checksums;
    CHECK_OK(scene_load(&scene, 0, 3000, NULL, true, &err), &err);
    check_loaded(&scene, 0, 3000, 0);
    CHECK_EQ(scene.stats.verified_bytes, scene.bytes);
    CHECK_EQ(device_sim_reads(scene.devices.sims[0]), 1);
    CHECK(strstr(scene.device_stats.reason, "no memory for checksums") != NULL);
    scene_clean_up(&scene);
}

static void
parts_of_payloads_and_strided_targets_come_the_ordinary_way(void)
{
    const int64_t turned[2] = {1, 3000};
    for (int c = 0; c < 3; c++) {
        struct scene scene;
        struct dcp_error err = {0};
        scene_make(&scene, 3000, 1,
                   (struct device_sim_options){.features = FEATURES | DCP_DEVICE_PACKS,
                                               .slab_most_bytes = UINT64_MAX});
        uint64_t from = c == 1 ? 1000 : 0, rows = c == 0 ? 3000 : 2000;
        CHECK_OK(scene_load(&scene, from, rows, c == 0 ? turned : NULL, true, &err), &err);
        CHECK_EQ(device_sim_reads(scene.devices.sims[0]), 0);
        if (c == 0) {
            CHECK_EQ(scene.state, DCP_TARGET_FILLED);
            CHECK_EQ(scene.stats.device_direct_bytes, 0);
        } else {
            check_loaded(&scene, from, rows, 0);
        }
        scene_clean_up(&scene);
    }
}

static void
damage_is_the_error_that_the_ordinary_way_gives(void)
{
    for (int where = 0; where < 3; where++) {
        struct dcp_error errors[2];
        for (int ranges = 0; ranges < 2; ranges++) {
            struct scene scene;
            struct dcp_error *err = &errors[ranges];
            dcp_error_clear(err);
            scene_make(&scene, MANY_ROWS, 1, (struct device_sim_options){.features = FEATURES});
            const struct dcp_placed_record *record = &scene.world.layout.records[0];
            disk_damage(&scene.disk, &scene.world, 0,
                        record->payload_offset_bytes + (record->payload_bytes - 1) * where / 2, 1,
                        UINT64_MAX);
            CHECK_EQ(scene_load(&scene, 0, MANY_ROWS, NULL, ranges != 0, err), DCP_E_CHECKSUM);
            CHECK_EQ(scene.state, DCP_TARGET_PARTLY);
            CHECK((device_sim_reads(scene.devices.sims[0]) > 0) == (ranges != 0));
            scene_clean_up(&scene);
        }
        CHECK(strcmp(errors[0].message, errors[1].message) == 0);
        CHECK(strcmp(errors[0].path, errors[1].path) == 0);
        CHECK_EQ(errors[0].offset_bytes, errors[1].offset_bytes);
        CHECK(strstr(errors[1].message, "tensor.0") != NULL);
    }
}

static void
a_file_that_ends_early_fails_by_name(void)
{
    struct scene scene;
    struct dcp_error err = {0};
    scene_make(&scene, 3000, 1, (struct device_sim_options){.features = FEATURES});
    disk_damage(&scene.disk, &scene.world, 0, 0, 0, 5000000);
    CHECK(scene_load(&scene, 0, 3000, NULL, true, &err) != 0);
    CHECK(strstr(err.path, ".distcp") != NULL);
    CHECK(scene.state != DCP_TARGET_FILLED);
    scene_clean_up(&scene);
}

static void
fail_everywhere(bool work)
{
    bool failed = true;
    uint64_t failures = 0;
    for (uint64_t n = 1; failed; n++) {
        struct scene scene;
        struct dcp_error err = {0};
        scene_make(&scene, 1500, 2, (struct device_sim_options){.seed = n, .features = FEATURES});
        if (work) {
            device_sim_fail_work(scene.devices.sims[0], n);
        } else {
            device_sim_fail_call(scene.devices.sims[0], n);
        }
        int rc = scene_load(&scene, 0, 1500, NULL, true, &err);
        /* Pinning is the one call whose failure is none. */
        bool no_pin = strstr(scene.device_stats.reason, "failure of pin") != NULL;
        failed = rc != 0 || no_pin;
        failures += rc != 0;
        if (rc != 0) {
            CHECK_EQ(rc, DCP_E_IO);
            CHECK(scene.state != DCP_TARGET_FILLED);
        } else {
            check_loaded(&scene, 0, 1500, no_pin ? 0 : scene.bytes);
        }
        device_sim_fail_call(scene.devices.sims[0], 0);
        device_sim_fail_work(scene.devices.sims[0], 0);
        scene_clean_up(&scene);
    }
    CHECK(failures > 4);
}

static void
a_call_that_fails_leaves_no_target_filled(void)
{
    fail_everywhere(false);
}

static void
work_that_fails_later_leaves_no_target_filled(void)
{
    fail_everywhere(true);
}

static void
a_device_that_hangs_is_left_when_the_load_is_cancelled(void)
{
    struct scene scene;
    struct dcp_error err = {0};
    atomic_int cancel = 1;
    scene_make(&scene, 3000, 1, (struct device_sim_options){.features = FEATURES});
    device_sim_hang(scene.devices.sims[0], false);
    scene.engine.cancel = &cancel;
    CHECK_EQ(scene_load(&scene, 0, 3000, NULL, true, &err), DCP_E_CANCELLED);
    CHECK(scene.state != DCP_TARGET_FILLED);
    CHECK_EQ(device_sim_reads(scene.devices.sims[0]), 0);
    device_sim_go_on(scene.devices.sims[0]);
    scene_clean_up(&scene);
}

CTEST_MAIN(RUN(whole_payloads_pass_the_host_by_and_are_verified);
           RUN(nobody_who_did_not_ask_gets_it);
           RUN(what_is_refused_comes_the_ordinary_way_from_there_on);
           RUN(what_cannot_be_verified_on_the_device_is_not_read_by_it);
           RUN(a_device_without_memory_for_checksums_has_the_host_read_again);
           RUN(parts_of_payloads_and_strided_targets_come_the_ordinary_way);
           RUN(damage_is_the_error_that_the_ordinary_way_gives);
           RUN(a_file_that_ends_early_fails_by_name);
           RUN(a_call_that_fails_leaves_no_target_filled);
           RUN(work_that_fails_later_leaves_no_target_filled);
           RUN(a_device_that_hangs_is_left_when_the_load_is_cancelled);)

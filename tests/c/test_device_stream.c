/*
 * test_device_stream.c: files that are written from devices are those that are written from the
 * host, whatever the devices and the file system can, and nothing is left behind whatever fails.
 */
#include "ctest.h"

#include "device_world.h"
#include "io_memory.h"

struct scene {
    struct io_memory *fs;
    struct dcp_io *io;
    int dirfd;
    struct devices devices;
    struct world world;
};

static void
scene_make(struct scene *scene, uint64_t seed, const struct world_options *options, bool some)
{
    scene->fs = io_memory_new(seed);
    scene->io = &io_memory_process(scene->fs, 0)->io;
    if (seed % 3 != 0) {
        io_memory_set_dio(scene->fs, (struct dcp_dio_align){512, 512, false});
    }
    CHECK_EQ(scene->io->mkdirs(scene->io->ctx, "/d"), 0);
    scene->dirfd = scene->io->open_dir(scene->io->ctx, "/d");
    devices_make(&scene->devices, 1 + (uint32_t)(seed % DEVICE_WORLD_MOST), device_of_seed(seed));
    world_make(&scene->world, options);
    devices_take(&scene->devices, &scene->world.plan, scene->world.sources, seed, some,
                 seed % 2 == 0);
}

static void
scene_clean_up(struct scene *scene)
{
    scene->io->close(scene->io->ctx, scene->dirfd);
    world_clean_up(&scene->world);
    io_memory_free(scene->fs);
    CHECK(devices_clean_up(&scene->devices));
}

static void
files_equal_naive_files_whatever_devices_can(void)
{
    for (uint64_t seed = 0; seed < 72; seed++) {
        struct world_options options = device_world_of_seed(seed);
        struct scene scene;
        struct dcp_device_stats stats = {0};
        struct dcp_error err = {0};
        scene_make(&scene, seed, &options, seed % 5 != 0);
        struct dcp_engine_options engine = {.ring_buffer_bytes = 4096u << (seed % 8),
                                            .sync = seed % 2 == 0,
                                            .devices = &scene.devices.list,
                                            .device_stats = &stats};
        CHECK_OK(world_write(scene.io, scene.dirfd, &scene.world, &engine, NULL, NULL, &err), &err);
        CHECK(world_check_files(scene.io, scene.dirfd, &scene.world));
        scene_clean_up(&scene);
    }
}

/* More than all segments of the ring together, in many pieces. */
static void
what_is_larger_than_all_segments_comes_through_them(void)
{
    for (uint64_t seed = 0; seed < 4; seed++) {
        struct world_options options = {
            .seed = seed, .tensors = 8, .thread_count = 1, .large_bytes = 45u << 20};
        struct scene scene;
        struct dcp_device_stats stats = {0};
        struct dcp_error err = {0};
        scene_make(&scene, seed, &options, false);
        struct dcp_engine_options engine = {.devices = &scene.devices.list, .device_stats = &stats};
        CHECK_OK(world_write(scene.io, scene.dirfd, &scene.world, &engine, NULL, NULL, &err), &err);
        CHECK(world_check_files(scene.io, scene.dirfd, &scene.world));
        CHECK(stats.copied_bytes > 40u << 20);
        /* One ring, and another to gather through. */
        CHECK(device_sim_pinned_bytes(scene.devices.sims[0]) <=
              2 * DCP_RING_BUFFERS * DCP_RING_BUFFER_BYTES);
        scene_clean_up(&scene);
    }
}

static void
fail_everywhere(bool work)
{
    for (uint64_t seed = 0; seed < 8; seed++) {
        bool failed = true;
        for (uint64_t n = 1; failed; n += 1 + n / 12) {
            struct world_options options = device_world_of_seed(seed);
            struct scene scene;
            struct dcp_device_stats stats = {0};
            struct dcp_error err = {0};
            options.tensors = 6;
            scene_make(&scene, seed, &options, true);
            struct dcp_engine_options engine = {.devices = &scene.devices.list,
                                                .device_stats = &stats};
            if (work) {
                device_sim_fail_work(scene.devices.sims[0], n);
            } else {
                device_sim_fail_call(scene.devices.sims[0], n);
            }
            int rc = world_write(scene.io, scene.dirfd, &scene.world, &engine, NULL, NULL, &err);
            failed = rc != 0;
            if (failed) {
                CHECK_EQ(rc, DCP_E_IO);
                CHECK(strstr(err.message, "simulated failure of") != NULL);
            } else {
                CHECK(world_check_files(scene.io, scene.dirfd, &scene.world));
                /* Pinning is the one call whose failure is none. */
                failed = strstr(stats.reason, "failure of pin") != NULL;
            }
            device_sim_fail_call(scene.devices.sims[0], 0);
            scene_clean_up(&scene);
        }
    }
}

static void
a_call_that_fails_fails_the_save_and_leaves_nothing(void)
{
    fail_everywhere(false);
}

static void
work_that_fails_later_fails_the_save_and_leaves_nothing(void)
{
    fail_everywhere(true);
}

static void
no_memory_at_any_point_fails_the_save_and_leaves_nothing(void)
{
    for (uint64_t seed = 0; seed < 4; seed++) {
        int rc = DCP_E_NOMEM;
        for (uint64_t n = 1; rc == DCP_E_NOMEM; n++) {
            struct world_options options = device_world_of_seed(seed);
            struct scene scene;
            struct dcp_error err = {0};
            scene_make(&scene, seed, &options, true);
            struct dcp_engine_options engine = {.devices = &scene.devices.list};
            dcp_alloc_fail_after(n);
            rc = world_write(scene.io, scene.dirfd, &scene.world, &engine, NULL, NULL, &err);
            dcp_alloc_fail_after(0);
            CHECK(rc == 0 || rc == DCP_E_NOMEM);
            CHECK(rc != 0 || world_check_files(scene.io, scene.dirfd, &scene.world));
            scene_clean_up(&scene);
        }
    }
}

static void
a_device_that_hangs_is_left_when_the_save_is_cancelled(void)
{
    struct world_options options = device_world_of_seed(7);
    struct scene scene;
    struct dcp_error err = {0};
    atomic_int cancel = 1;
    scene_make(&scene, 1, &options, false);
    struct dcp_engine_options engine = {.cancel = &cancel, .devices = &scene.devices.list};
    device_sim_hang(scene.devices.sims[0], false);
    CHECK_EQ(world_write(scene.io, scene.dirfd, &scene.world, &engine, NULL, NULL, &err),
             DCP_E_CANCELLED);
    device_sim_go_on(scene.devices.sims[0]);
    scene_clean_up(&scene);
}

CTEST_MAIN(RUN(files_equal_naive_files_whatever_devices_can);
           RUN(what_is_larger_than_all_segments_comes_through_them);
           RUN(a_call_that_fails_fails_the_save_and_leaves_nothing);
           RUN(work_that_fails_later_fails_the_save_and_leaves_nothing);
           RUN(no_memory_at_any_point_fails_the_save_and_leaves_nothing);
           RUN(a_device_that_hangs_is_left_when_the_save_is_cancelled);)

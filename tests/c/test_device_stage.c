/*
 * test_device_stage.c: an image whose payloads come from devices is, byte for byte, the one whose
 * payloads lie on the host, whatever the devices can, however late they are, and nothing is left
 * behind whatever fails.
 */
#include "ctest.h"

#include "dcp_arena.h"
#include "device.h"
#include "device_world.h"
#include "image_world.h"

/* Of an image, with the checksums of devices behind it. */
static uint64_t
memory_bytes(const struct world *world, const struct world_image *image)
{
    return image->image.bytes + dcp_image_checksums_bytes(&world->layout) + 1;
}

/* Stages a world into `ret`; what failed is left clean. */
static int
stage(const struct world *world, const struct devices *devices, atomic_int *cancel,
      struct world_image *ret, struct dcp_device_stats *stats, bool *ret_idle,
      struct dcp_error *err)
{
    const struct dcp_device *first = devices->tables[0];
    struct dcp_engine_options options = {
        .cancel = cancel, .devices = &devices->list, .device_stats = stats};
    struct dcp_device_stage *begun = NULL;
    struct world_image made = {0};
    bool pinned;
    int rc = dcp_image_place(&world->layout, world->plan.rank, world->n0, &made.image, err);
    CHECK_EQ(rc, 0);
    made.memory = dcp_map_huge(memory_bytes(world, &made), err);
    memset(made.memory, WORLD_IMAGE_GARBAGE, made.image.bytes);
    pinned = first->pin(first->ctx, made.memory, memory_bytes(world, &made), NULL) == 0;
    options.device_crcs = pinned ? (uint32_t *)(void *)(made.memory + made.image.bytes) : NULL;
    rc = dcp_image_begin(&made.image, made.memory, &world->plan, &world->layout, world->sources,
                         &options, &begun, ret_idle, err);
    if (rc == 0) {
        rc = dcp_image_end(&made.image, made.memory, &world->plan, &world->layout, world->sources,
                           &world->save_id, world->n0, &options, begun, NULL, err);
        *ret_idle = dcp_device_stage_end(begun, NULL);
    }
    if (pinned) {
        first->unpin(first->ctx, made.memory);
    }
    if (rc != 0) {
        if (!*ret_idle) {
            device_sim_go_on(devices->sims[0]);
            device_sim_table(devices->sims[0])->wait_idle(devices->sims[0], NULL);
        }
        dcp_unmap_huge(made.memory, memory_bytes(world, &made));
        dcp_image_clean_up(&made.image);
        return rc;
    }
    *ret = made;
    return 0;
}

static void
image_done(const struct world *world, struct world_image *image)
{
    dcp_unmap_huge(image->memory, memory_bytes(world, image));
    dcp_image_clean_up(&image->image);
}

static void
images_equal_naive_files_whatever_devices_can(void)
{
    for (uint64_t seed = 0; seed < 96; seed++) {
        struct world_options options = device_world_of_seed(seed);
        struct devices devices;
        struct world world;
        struct world_image image = {0};
        struct dcp_device_stats stats = {0};
        struct dcp_error err = {0};
        bool idle = false;
        devices_make(&devices, 1 + (uint32_t)(seed % DEVICE_WORLD_MOST), device_of_seed(seed));
        world_make(&world, &options);
        devices_take(&devices, &world.plan, world.sources, seed, seed % 3 != 0, seed % 2 == 0);
        CHECK_OK(stage(&world, &devices, NULL, &image, &stats, &idle, &err), &err);
        CHECK(idle);
        if (image.memory != NULL) {
            CHECK(world_image_check(&world, &image));
            image_done(&world, &image);
        }
        world_clean_up(&world);
        CHECK(devices_clean_up(&devices));
    }
}

/* One float32 tensor of two dims, `turned` or not. */
static void
matrix(struct world *world, uint64_t rows, uint64_t columns, bool turned)
{
    static const struct world_options empty = {.seed = 3, .thread_count = 1};
    uint64_t size[2] = {rows, columns}, parts[2] = {1, 1};
    world_make(world, &empty);
    dcp_layout_clean_up(&world->layout);
    dcp_free(world->md.strings);
    dcp_free(world->md.entries);
    dcp_free(world->md.chunks);
    dcp_free(world->md.dims);
    dcp_free(world->md.files);
    world_add_tensor(world, DCP_DTYPE_FLOAT32, 2, size, parts);
    struct world_tensor *tensor = &world->tensors[0];
    int64_t strides[2] = {turned ? 4 : (int64_t)columns * 4, turned ? (int64_t)rows * 4 : 4};
    dcp_box_scatter(world->memory[0], tensor->image, 2, size, strides, 4, 0, tensor->bytes);
    world_finish(world, 1, false);
    memcpy(world->strides[0], strides, sizeof strides);
    world->sources[0].strides_bytes = world->strides[0];
}

/* Larger than a slab, than a landing, and than a segment of the ring. */
static void
large_payloads_come_in_steps(void)
{
    for (uint32_t features = 0; features < 4; features++) {
        for (int turned = 0; turned < 2; turned++) {
            struct device_sim_options options = {.seed = features,
                                                 .features = features,
                                                 .memory_bytes = 96u << 20,
                                                 .slab_most_bytes = UINT64_MAX};
            struct devices devices;
            struct world world;
            struct world_image image = {0};
            struct dcp_device_stats stats = {0};
            struct dcp_error err = {0};
            bool idle = false;
            devices_make(&devices, 1, options);
            matrix(&world, 3001, 2999, turned != 0);
            devices_take(&devices, &world.plan, world.sources, 1, false, true);
            CHECK_OK(stage(&world, &devices, NULL, &image, &stats, &idle, &err), &err);
            CHECK(image.memory != NULL && world_image_check(&world, &image));
            CHECK(stats.copied_bytes >= 3001 * 2999 * 4);
            CHECK_EQ(stats.packed_bytes, turned && (features & 1) ? 3001 * 2999 * 4 : 0);
            /* Never an element at a time. */
            CHECK(stats.copies_count < 40);
            image_done(&world, &image);
            world_clean_up(&world);
            CHECK(devices_clean_up(&devices));
        }
    }
}

/* A device without kernels, or of no memory, says so. */
static void
what_makes_it_slower_is_told(void)
{
    static const struct {
        struct device_sim_options options;
        const char *reason;
    } cases[] = {
        {{.seed = 1, .features = DCP_DEVICE_PACKS, .slab_most_bytes = UINT64_MAX}, ""},
        {{.seed = 2, .slab_most_bytes = UINT64_MAX}, "simulated:2 has no kernels"},
        {{.seed = 3, .features = DCP_DEVICE_PACKS}, "simulated:3 has no memory for a slab"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct devices devices;
        struct world world;
        struct world_image image = {0};
        struct dcp_device_stats stats = {0};
        struct dcp_error err = {0};
        bool idle = false;
        devices_make(&devices, 1, cases[i].options);
        matrix(&world, 100, 90, true);
        devices_take(&devices, &world.plan, world.sources, 1, false, false);
        CHECK_OK(stage(&world, &devices, NULL, &image, &stats, &idle, &err), &err);
        CHECK(strcmp(stats.reason, cases[i].reason) == 0);
        CHECK_EQ(stats.packed_count, i == 0 ? 1 : 0);
        image_done(&world, &image);
        world_clean_up(&world);
        CHECK(devices_clean_up(&devices));
    }
}

/* Places an image of `world` in pinned memory and begins to stage it. */
static void
begin_image(const struct world *world, const struct devices *devices,
            const struct dcp_engine_options *engine, struct world_image *ret,
            struct dcp_device_stage **ret_stage)
{
    const struct dcp_device *table = devices->tables[0];
    struct dcp_error err = {0};
    bool idle = false;
    CHECK_OK(dcp_image_place(&world->layout, world->plan.rank, world->n0, &ret->image, &err), &err);
    ret->memory = dcp_map_huge(memory_bytes(world, ret), &err);
    CHECK_EQ(table->pin(table->ctx, ret->memory, memory_bytes(world, ret), &err), 0);
    CHECK_OK(dcp_image_begin(&ret->image, ret->memory, &world->plan, &world->layout, world->sources,
                             engine, ret_stage, &idle, &err),
             &err);
}

/* Ends it, and all that begin_image and its caller made. */
static void
end_image(struct world *world, struct devices *devices, const struct dcp_engine_options *engine,
          struct world_image *image, struct dcp_device_stage *begun)
{
    struct dcp_error err = {0};
    CHECK_OK(dcp_image_end(&image->image, image->memory, &world->plan, &world->layout,
                           world->sources, &world->save_id, world->n0, engine, begun, NULL, &err),
             &err);
    CHECK(dcp_device_stage_end(begun, NULL));
    CHECK(world_image_check(world, image));
    devices->tables[0]->unpin(devices->tables[0]->ctx, image->memory);
    image_done(world, image);
    world_clean_up(world);
    CHECK(devices_clean_up(devices));
}

/* More copies than a stream takes: 1200 rows, too far apart for one copy. */
static void
beginning_is_held_up_by_no_stream_that_is_full(void)
{
    enum { ROWS = 1200, COLUMNS = 5000, PITCH = 4 * COLUMNS + 64 };
    struct device_sim_options options = {.seed = 4};
    struct dcp_device_stats stats = {0};
    struct dcp_device_stage *begun = NULL;
    struct world_image image = {0};
    struct devices devices;
    struct world world;
    devices_make(&devices, 1, options);
    matrix(&world, ROWS, COLUMNS, false);
    uint64_t address = device_sim_tensor(devices.sims[0], (uint64_t)ROWS * PITCH, 64);
    for (uint64_t r = 0; r < ROWS; r++) {
        device_sim_poke(devices.sims[0], address + r * PITCH,
                        world.tensors[0].image + r * 4 * COLUMNS, 4 * COLUMNS);
    }
    world.strides[0][0] = PITCH;
    world.sources[0].data = (const uint8_t *)(uintptr_t)address;
    world.sources[0].device = 1;
    struct dcp_engine_options engine = {.devices = &devices.list, .device_stats = &stats};
    device_sim_hang(devices.sims[0], false);
    begin_image(&world, &devices, &engine, &image, &begun);
    CHECK(stats.copies_count > 100 && stats.copies_count < ROWS);
    CHECK_EQ(device_sim_held_up(devices.sims[0]), 0);
    device_sim_go_on(devices.sims[0]);
    end_image(&world, &devices, &engine, &image, begun);
    CHECK_EQ(stats.copies_count, ROWS);
}

struct owner {
    struct world *world;
    struct devices *devices;
    _Atomic uint64_t progress_bytes;
    uint64_t checked_bytes; /* of the walk, when the tensors became the owner's */
    uint32_t calls;
};

/* The tensors are the owner's again: he overwrites them, and drops them. */
static void
on_brought(void *ctx)
{
    struct owner *owner = ctx;
    struct world *world = owner->world;
    owner->calls++;
    owner->checked_bytes = atomic_load(&owner->progress_bytes);
    for (uint32_t i = 0; i < owner->devices->list.count; i++) {
        device_sim_spoil(owner->devices->sims[i]);
    }
    for (uint32_t i = 0; i < world->plan.items_count; i++) {
        if (world->records[i] == NULL) {
            dcp_free(world->memory[i]);
            world->memory[i] = NULL;
        }
    }
    memset(world->sources, 0xFF, world->plan.items_count * sizeof *world->sources);
}

/* Stages a world on one device for an owner who takes his tensors back; with `idle` everything has
 * landed before the walk begins. */
static void
stage_for(struct owner *owner, bool idle)
{
    const struct dcp_device *table = owner->devices->tables[0];
    struct dcp_device_stats stats = {0};
    struct dcp_device_stage *begun = NULL;
    struct world_image image = {0};
    struct dcp_engine_options engine = {.devices = &owner->devices->list,
                                        .device_stats = &stats,
                                        .progress_bytes = &owner->progress_bytes,
                                        .brought = on_brought,
                                        .brought_ctx = owner};
    begin_image(owner->world, owner->devices, &engine, &image, &begun);
    if (idle) {
        CHECK_EQ(table->wait_idle(table->ctx, NULL), 0);
    }
    end_image(owner->world, owner->devices, &engine, &image, begun);
    CHECK_EQ(owner->calls, 1);
}

static void
sources_are_the_owners_as_soon_as_their_bytes_are_on_the_host(void)
{
    for (uint64_t seed = 0; seed < 48; seed++) {
        struct world_options options = device_world_of_seed(seed);
        struct device_sim_options device = device_of_seed(seed);
        struct devices devices;
        struct world world;
        struct owner owner = {.world = &world, .devices = &devices};
        device.no_pin = false;
        devices_make(&devices, 1, device);
        world_make(&world, &options);
        devices_take(&devices, &world.plan, world.sources, seed, true, seed % 2 == 0);
        stage_for(&owner, seed % 3 == 0);
    }
}

/* What has landed before the walk began is not the owner's only when all is checked. */
static void
sources_do_not_wait_for_checksums(void)
{
    struct device_sim_options options = {.seed = 6, .memory_bytes = 96u << 20};
    struct devices devices;
    struct world world;
    struct owner owner = {.world = &world, .devices = &devices};
    devices_make(&devices, 1, options);
    matrix(&world, 3001, 2999, false);
    devices_take(&devices, &world.plan, world.sources, 1, false, false);
    stage_for(&owner, true);
    CHECK(owner.checked_bytes <= 2 * DCP_BLOCK_BYTES);
}

/* More landings than the window has: who walks has the device's checksums with the first byte. */
static void
checksums_of_a_payload_beyond_the_window_are_the_devices_too(void)
{
    struct device_sim_options options = {
        .seed = 8, .features = DCP_DEVICE_CHECKSUMS, .memory_bytes = 400u << 20, .instant = true};
    struct dcp_device_stats stats = {0};
    struct dcp_device_stage *begun = NULL;
    struct world_image image = {0};
    struct dcp_error err = {0};
    struct devices devices;
    struct world world;
    devices_make(&devices, 1, options);
    matrix(&world, 9001, 8999, false);
    devices_take(&devices, &world.plan, world.sources, 1, false, false);
    uint64_t crcs_bytes = dcp_image_checksums_bytes(&world.layout);
    uint32_t *crcs = dcp_map_huge(crcs_bytes, NULL);
    CHECK_EQ(devices.tables[0]->pin(devices.tables[0]->ctx, crcs, crcs_bytes, NULL), 0);
    struct dcp_engine_options engine = {
        .devices = &devices.list, .device_stats = &stats, .device_crcs = crcs};
    begin_image(&world, &devices, &engine, &image, &begun);
    CHECK(dcp_device_stage_checksums(begun, 0) == crcs);
    CHECK_OK(dcp_image_end(&image.image, image.memory, &world.plan, &world.layout, world.sources,
                           &world.save_id, world.n0, &engine, begun, NULL, &err),
             &err);
    CHECK(dcp_device_stage_end(begun, NULL));
    CHECK(world_image_check(&world, &image));
    devices.tables[0]->unpin(devices.tables[0]->ctx, image.memory);
    devices.tables[0]->unpin(devices.tables[0]->ctx, crcs);
    dcp_unmap_huge(crcs, crcs_bytes);
    image_done(&world, &image);
    world_clean_up(&world);
    CHECK(devices_clean_up(&devices));
}

/* A device that is full leaves them to the host. */
static void
checksums_that_a_device_has_no_memory_for_are_computed_by_the_host(void)
{
    struct device_sim_options options = {.seed = 6,
                                         .features = DCP_DEVICE_CHECKSUMS,
                                         .memory_bytes = 96u << 20,
                                         .no_checksum_memory = true};
    struct devices devices;
    struct world world;
    struct world_image image = {0};
    struct dcp_device_stats stats = {0};
    struct dcp_error err = {0};
    bool idle = false;
    devices_make(&devices, 1, options);
    matrix(&world, 3001, 2999, false);
    devices_take(&devices, &world.plan, world.sources, 1, false, false);
    CHECK_OK(stage(&world, &devices, NULL, &image, &stats, &idle, &err), &err);
    CHECK(strstr(stats.reason, "no memory for checksums") != NULL);
    CHECK(image.memory != NULL && world_image_check(&world, &image));
    image_done(&world, &image);
    world_clean_up(&world);
    CHECK(devices_clean_up(&devices));
}

/* Every call in turn: the save fails by its name, and nothing is left.  With `work`, what a call
 * put on the stream fails later. */
static void
fail_everywhere(bool work)
{
    for (uint64_t seed = 0; seed < 8; seed++) {
        bool failed = true;
        for (uint64_t n = 1; failed; n += 1 + n / 16) {
            struct world_options options = device_world_of_seed(seed);
            struct device_sim_options device = device_of_seed(seed);
            struct devices devices;
            struct world world;
            struct world_image image = {0};
            struct dcp_device_stats stats = {0};
            struct dcp_error err = {0};
            bool idle = false;
            options.tensors = 6;
            devices_make(&devices, 1, device);
            world_make(&world, &options);
            devices_take(&devices, &world.plan, world.sources, seed, true, false);
            if (work) {
                device_sim_fail_work(devices.sims[0], n);
            } else {
                device_sim_fail_call(devices.sims[0], n);
            }
            int rc = stage(&world, &devices, NULL, &image, &stats, &idle, &err);
            failed = rc != 0;
            CHECK(idle);
            if (failed) {
                CHECK_EQ(rc, DCP_E_IO);
                CHECK(strstr(err.message, "simulated failure of") != NULL);
            } else {
                /* Pinning is the one call whose failure is none. */
                CHECK(world_image_check(&world, &image));
                image_done(&world, &image);
                failed = stats.reason[0] != '\0' && strstr(stats.reason, "failure of pin") != NULL;
                failed = failed || (!work && n <= 2);
            }
            device_sim_fail_call(devices.sims[0], 0);
            world_clean_up(&world);
            CHECK(devices_clean_up(&devices));
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
        for (uint64_t n = 2; rc == DCP_E_NOMEM; n++) {
            struct world_options options = device_world_of_seed(seed);
            struct devices devices;
            struct world world;
            struct world_image image = {0};
            struct dcp_device_stage *begun = NULL;
            struct dcp_device_stats stats = {0};
            struct dcp_error err = {0};
            bool idle = false;
            devices_make(&devices, 1, device_of_seed(seed));
            world_make(&world, &options);
            devices_take(&devices, &world.plan, world.sources, seed, true, false);
            struct dcp_engine_options engine = {.devices = &devices.list, .device_stats = &stats};
            CHECK_OK(dcp_image_place(&world.layout, world.plan.rank, world.n0, &image.image, &err),
                     &err);
            image.memory = dcp_map_huge(memory_bytes(&world, &image), &err);
            dcp_alloc_fail_after(n);
            rc = dcp_image_begin(&image.image, image.memory, &world.plan, &world.layout,
                                 world.sources, &engine, &begun, &idle, &err);
            CHECK(idle);
            if (rc == 0) {
                rc = dcp_image_end(&image.image, image.memory, &world.plan, &world.layout,
                                   world.sources, &world.save_id, world.n0, &engine, begun, NULL,
                                   &err);
                CHECK(dcp_device_stage_end(begun, NULL));
            }
            dcp_alloc_fail_after(0);
            if (rc == 0) {
                memset(image.memory + image.image.bytes, 0, 1);
                CHECK(world_image_check(&world, &image));
            }
            CHECK(rc == 0 || rc == DCP_E_NOMEM);
            image_done(&world, &image);
            world_clean_up(&world);
            CHECK(devices_clean_up(&devices));
        }
    }
}

static void
a_device_that_hangs_is_left_when_the_save_is_cancelled(void)
{
    for (int how = 0; how < 3; how++) { /* it hangs; for ever; and cannot even be asked */
        struct device_sim_options options = {
            .seed = 5, .features = DCP_DEVICE_PACKS, .slab_most_bytes = UINT64_MAX};
        struct world_options layout = device_world_of_seed(7);
        struct devices devices;
        struct world world;
        struct world_image image = {0};
        struct dcp_device_stats stats = {0};
        struct dcp_error err = {0};
        atomic_int cancel = 0;
        bool idle = false;
        devices_make(&devices, 1, options);
        world_make(&world, &layout);
        devices_take(&devices, &world.plan, world.sources, 1, false, false);
        /* All is put on the stream, and nothing comes of it: so the cancel is seen while waiting.
         */
        const struct dcp_device *table = devices.tables[0];
        struct dcp_engine_options engine = {
            .cancel = &cancel, .devices = &devices.list, .device_stats = &stats};
        struct dcp_device_stage *begun = NULL;
        CHECK_OK(dcp_image_place(&world.layout, world.plan.rank, world.n0, &image.image, &err),
                 &err);
        image.memory = dcp_map_huge(memory_bytes(&world, &image), &err);
        CHECK_EQ(table->pin(table->ctx, image.memory, image.image.bytes, &err), 0);
        if (how == 2) {
            device_sim_lose(devices.sims[0]);
        } else {
            device_sim_hang(devices.sims[0], how == 1);
        }
        CHECK_OK(dcp_image_begin(&image.image, image.memory, &world.plan, &world.layout,
                                 world.sources, &engine, &begun, &idle, &err),
                 &err);
        atomic_store(&cancel, 1);
        CHECK_EQ(dcp_image_end(&image.image, image.memory, &world.plan, &world.layout,
                               world.sources, &world.save_id, world.n0, &engine, begun, NULL, &err),
                 DCP_E_CANCELLED);
        CHECK_EQ(dcp_device_stage_end(begun, NULL), how == 0);
        device_sim_go_on(devices.sims[0]);
        CHECK_EQ(table->wait_idle(table->ctx, NULL), 0);
        table->unpin(table->ctx, image.memory);
        image_done(&world, &image);
        world_clean_up(&world);
        CHECK(devices_clean_up(&devices));
    }
}

static void
a_source_that_names_no_device_or_no_memory_is_refused(void)
{
    struct device_sim_options options = {.seed = 5, .slab_most_bytes = UINT64_MAX};
    struct devices devices;
    struct world world;
    struct world_image image = {0};
    struct dcp_device_stats stats = {0};
    struct dcp_error err = {0};
    struct dcp_engine_options none = {0};
    bool idle = false;
    devices_make(&devices, 1, options);
    matrix(&world, 10, 10, false);
    world.sources[0].device = 2;
    CHECK_EQ(stage(&world, &devices, NULL, &image, &stats, &idle, &err), DCP_E_INVALID);
    CHECK(idle);
    dcp_error_clear(&err);
    CHECK_EQ(world_image_make(&world, &none, NULL, &image, &err), DCP_E_INVALID);
    world.sources[0].device = 1;
    world.sources[0].data = NULL;
    dcp_error_clear(&err);
    CHECK_EQ(stage(&world, &devices, NULL, &image, &stats, &idle, &err), DCP_E_INVALID);
    CHECK(idle && strstr(err.message, "no memory to save") != NULL);
    world_clean_up(&world);
    CHECK(devices_clean_up(&devices));
}

static void
pinned_arenas_are_unpinned_before_they_move_or_go(void)
{
    for (int shared = 0; shared < 2; shared++) {
        struct device_sim_options options = {.seed = 1, .slab_most_bytes = UINT64_MAX};
        struct device_sim *sim = device_sim_new(&options);
        const struct dcp_device *table = device_sim_table(sim);
        enum dcp_arena_kind kind = shared ? DCP_ARENA_SHARED : DCP_ARENA_PRIVATE;
        struct dcp_arena *arena;
        struct dcp_error err = {0};
        CHECK_OK(dcp_arena_acquire(kind, 3u << 20, NULL, &arena, &err), &err);
        CHECK_OK(dcp_arena_pin(arena, table, 3u << 20, &err), &err);
        uint64_t pinned = device_sim_pinned_bytes(sim), calls = device_sim_calls(sim);
        CHECK(pinned >= 3u << 20);
        CHECK_OK(dcp_arena_pin(arena, table, 2u << 20, &err), &err);
        CHECK_EQ(device_sim_calls(sim), calls); /* it is pinned already */
        dcp_arena_release(arena);
        CHECK_OK(dcp_arena_acquire(kind, 2u << 20, NULL, &arena, &err), &err);
        CHECK_EQ(device_sim_pinned_bytes(sim), pinned);
        dcp_arena_release(arena);
        CHECK_OK(dcp_arena_acquire(kind, 90u << 20, NULL, &arena, &err), &err);
        CHECK_EQ(device_sim_pinned_bytes(sim), 0);
        CHECK_OK(dcp_arena_pin(arena, table, 90u << 20, &err), &err);
        CHECK(device_sim_pinned_bytes(sim) >= 90u << 20);
        CHECK_EQ(dcp_arena_pin(arena, table, 900u << 20, NULL), DCP_E_INVALID);
        device_sim_fail_call(sim, 1);
        dcp_arena_release(arena);
        dcp_arena_trim();
        CHECK(device_sim_free(sim));
    }
}

CTEST_MAIN(RUN(images_equal_naive_files_whatever_devices_can); RUN(large_payloads_come_in_steps);
           RUN(what_makes_it_slower_is_told); RUN(beginning_is_held_up_by_no_stream_that_is_full);
           RUN(sources_are_the_owners_as_soon_as_their_bytes_are_on_the_host);
           RUN(sources_do_not_wait_for_checksums);
           RUN(checksums_of_a_payload_beyond_the_window_are_the_devices_too);
           RUN(checksums_that_a_device_has_no_memory_for_are_computed_by_the_host);
           RUN(a_call_that_fails_fails_the_save_and_leaves_nothing);
           RUN(work_that_fails_later_fails_the_save_and_leaves_nothing);
           RUN(no_memory_at_any_point_fails_the_save_and_leaves_nothing);
           RUN(a_device_that_hangs_is_left_when_the_save_is_cancelled);
           RUN(a_source_that_names_no_device_or_no_memory_is_refused);
           RUN(pinned_arenas_are_unpinned_before_they_move_or_go);)

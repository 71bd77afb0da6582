/*
 * test_device_put.c: what is loaded into targets on devices is there when the load is finished, and
 * nothing beside it has changed: boxes of any strides, of the saved dtype and of others, whatever
 * the devices can; and what failed is told, target by target.
 */
#include "ctest.h"

#include <sys/wait.h>
#include <unistd.h>

#include "dcp_convert.h"
#include "device_world.h"
#include "engine_load.h"

enum { UNTOUCHED = 0x55, MOST_AIMS = 128 };

/* One target. */
struct aim {
    const struct world_tensor *tensor;
    uint64_t offsets[DCP_MAX_DIMS], sizes[DCP_MAX_DIMS];
    int64_t strides[DCP_MAX_DIMS]; /* elements; of the host's, bytes */
    uint64_t bytes, extent_bytes;  /* of the box; of its memory */
    uint8_t from, to;              /* dtypes */
    struct device_sim *sim;        /* NULL: memory of the host */
    uint64_t address;
    uint8_t *memory; /* owned; of the host's */
};

struct scene {
    struct disk disk;
    struct world world;
    struct devices devices;
    struct dcp_read_plan plan;
    struct aim aims[MOST_AIMS];
    uint32_t aims_count;
    struct dcp_device_put *put;
    bool ranges; /* devices may read files */
};

/* A dtype that elements are converted to without a NaN on the way, or their own. */
static uint8_t
choose_dtype(struct maker_rng *rng, uint8_t from)
{
    if (maker_below(rng, 2) == 0) {
        return from;
    }
    switch (from) {
    case DCP_DTYPE_UINT8:
        return DCP_DTYPE_FLOAT32;
    case DCP_DTYPE_INT64:
        return DCP_DTYPE_INT32;
    default:
        return from;
    }
}

static void
add_aim(struct scene *scene, struct maker_rng *rng, uint32_t t)
{
    struct aim *aim = &scene->aims[scene->aims_count++];
    const struct world_tensor *tensor = &scene->world.tensors[t];
    uint64_t entry = entry_of(&scene->world, t), target;
    struct dcp_error err = {0};
    uint32_t order[DCP_MAX_DIMS], ndim = tensor->ndim;
    bool whole = maker_below(rng, 3) == 0, plain = maker_below(rng, 2) == 0;
    *aim = (struct aim){.tensor = tensor, .from = scene->world.md.entries[entry].dtype};
    aim->to = choose_dtype(rng, aim->from);
    uint32_t item = dcp_dtype_bytes(aim->to);
    uint64_t stride = 1;
    bool on_host = maker_below(rng, 4) == 0;
    aim->bytes = item;
    for (uint32_t d = 0; d < ndim; d++) {
        order[d] = ndim - 1 - d;
        aim->offsets[d] = whole ? 0 : maker_below(rng, tensor->size[d] + 1);
        aim->sizes[d] =
            whole ? tensor->size[d] : maker_below(rng, tensor->size[d] - aim->offsets[d] + 1);
        aim->bytes *= aim->sizes[d];
    }
    for (uint32_t d = ndim; !plain && d > 1; d--) {
        uint32_t other = (uint32_t)maker_below(rng, d), keep = order[d - 1];
        order[d - 1] = order[other];
        order[other] = keep;
    }
    for (uint32_t d = 0; d < ndim; d++) {
        aim->strides[order[d]] = (int64_t)(stride * (on_host ? item : 1));
        stride *= aim->sizes[order[d]] + (plain ? 0 : maker_below(rng, 2));
    }
    aim->extent_bytes = (stride + 1) * item;
    uint8_t *fill = malloc(aim->extent_bytes);
    memset(fill, UNTOUCHED, aim->extent_bytes);
    uint32_t which = (uint32_t)maker_below(rng, scene->devices.list.count);
    if (on_host) {
        aim->memory = fill;
    } else {
        aim->sim = scene->devices.sims[which];
        aim->address = device_sim_tensor(aim->sim, aim->extent_bytes, item);
        device_sim_poke(aim->sim, aim->address, fill, aim->extent_bytes);
        free(fill);
    }
    uint8_t *data = on_host ? aim->memory : (uint8_t *)(uintptr_t)aim->address;
    CHECK_OK(dcp_read_plan_add(&scene->plan, entry, data, aim->strides, aim->offsets, aim->sizes,
                               &target, &err),
             &err);
    scene->plan.targets[target].dtype = aim->to == aim->from ? 0 : aim->to;
    if (!on_host) {
        scene->plan.targets[target].kind = DCP_TARGET_PIECES;
        scene->plan.targets[target].device = 1 + which;
    }
}

static void
scene_make(struct scene *scene, uint64_t seed, const struct world_options *options,
           const struct device_sim_options *device, uint32_t per_tensor)
{
    struct maker_rng rng = {seed};
    struct dcp_error err = {0};
    memset(scene, 0, sizeof *scene);
    world_make(&scene->world, options);
    disk_make(&scene->disk, &scene->world, seed % 3 == 0 ? 0 : 512);
    struct device_sim_options of_disk = *device;
    of_disk.io = scene->disk.io;
    devices_make(&scene->devices, 1 + (uint32_t)(seed % DEVICE_WORLD_MOST), of_disk);
    scene->ranges = (device->features & DCP_DEVICE_READS_FILES) != 0;
    scene->plan.md = &scene->world.md;
    scene->plan.devices = &scene->devices.list;
    for (uint32_t t = 0; t < scene->world.tensors_count; t++) {
        for (uint32_t i = 0; !scene->world.tensors[t].opaque && i < per_tensor; i++) {
            add_aim(scene, &rng, t);
        }
    }
    CHECK_OK(dcp_read_plan_build(&scene->plan, true, NULL, &err), &err);
    CHECK_OK(dcp_read_plan_track(&scene->plan, &err), &err);
}

static void
scene_clean_up(struct scene *scene)
{
    dcp_device_put_destroy(scene->put);
    for (uint32_t i = 0; i < scene->aims_count; i++) {
        free(scene->aims[i].memory);
    }
    dcp_read_plan_clean_up(&scene->plan);
    disk_clean_up(&scene->disk);
    world_clean_up(&scene->world);
    CHECK(devices_clean_up(&scene->devices));
}

static int
no_record(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
          const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    (void)ctx, (void)plan, (void)item, (void)bytes, (void)len, (void)err;
    CHECK(false);
    return 0;
}

/* Reads, and waits for the devices. */
static int
scene_load(struct scene *scene, struct dcp_error *err)
{
    struct dcp_engine_options engine = {.verify = true};
    int rc = dcp_device_put_new(&scene->plan, NULL, NULL, &scene->put, err);
    if (rc != 0) {
        return rc;
    }
    scene->plan.on_piece = dcp_device_put_piece;
    scene->plan.on_piece_ctx = scene->put;
    scene->plan.on_range = scene->ranges ? dcp_device_put_range : NULL;
    rc = dcp_reader_run(scene->disk.io, scene->disk.dirfd, "/d", &scene->plan, &engine, no_record,
                        NULL, NULL, err);
    int put_rc = dcp_device_put_finish(scene->put, NULL, rc == 0 ? err : NULL);
    return rc != 0 ? rc : put_rc;
}

static void
check_aim(const struct aim *aim)
{
    uint32_t from_bytes = dcp_dtype_bytes(aim->from), to_bytes = dcp_dtype_bytes(aim->to);
    uint64_t count = aim->bytes / to_bytes;
    uint8_t *saved = malloc(count * from_bytes + 1), *made = malloc(aim->bytes + 1);
    uint8_t *want = malloc(aim->extent_bytes), *got = malloc(aim->extent_bytes);
    int64_t strides_bytes[DCP_MAX_DIMS];
    for (uint32_t d = 0; d < aim->tensor->ndim; d++) {
        strides_bytes[d] = aim->strides[d] * (int64_t)(aim->sim != NULL ? to_bytes : 1);
    }
    world_cut(aim->tensor, aim->offsets, aim->sizes, saved);
    if (aim->from == aim->to) {
        memcpy(made, saved, aim->bytes);
    } else {
        dcp_convert(made, aim->to, saved, aim->from, count);
    }
    memset(want, UNTOUCHED, aim->extent_bytes);
    dcp_box_scatter(want, made, aim->tensor->ndim, aim->sizes, strides_bytes, to_bytes, 0,
                    aim->bytes);
    if (aim->sim != NULL) {
        device_sim_peek_after(aim->sim, 1, aim->address, got, aim->extent_bytes);
    } else {
        memcpy(got, aim->memory, aim->extent_bytes);
    }
    CHECK(memcmp(want, got, aim->extent_bytes) == 0);
    free(saved);
    free(made);
    free(want);
    free(got);
}

static void
all_arrives_and_nothing_beside_it_changes(void)
{
    for (uint64_t seed = 0; seed < 72; seed++) {
        struct world_options options = device_world_of_seed(seed);
        struct device_sim_options device = device_of_seed(seed);
        struct scene scene;
        struct dcp_error err = {0};
        device.features |= seed % 3 == 0 ? DCP_DEVICE_READS_FILES : 0;
        device.refuse_read = seed % 9;
        scene_make(&scene, seed, &options, &device, 3);
        CHECK_OK(scene_load(&scene, &err), &err);
        for (uint32_t i = 0; i < scene.devices.list.count; i++) {
            const struct dcp_device *table = scene.devices.tables[i];
            CHECK_OK(table->lead(table->ctx, (void *)1, &err), &err);
        }
        uint8_t states[MOST_AIMS];
        CHECK_OK(dcp_read_plan_states(&scene.plan, DCP_TARGET_UNTOUCHED, states, &err), &err);
        for (uint32_t i = 0; i < scene.aims_count; i++) {
            check_aim(&scene.aims[i]);
            CHECK_EQ(states[i], scene.aims[i].bytes > 0 ? DCP_TARGET_FILLED : DCP_TARGET_UNTOUCHED);
        }
        scene_clean_up(&scene);
    }
}

/* Several slots, and slabs that are smaller than one. */
static void
what_is_larger_than_all_slots_goes_through_them(void)
{
    for (uint64_t seed = 0; seed < 4; seed++) {
        struct device_sim_options device = {.seed = seed,
                                            .features = DCP_DEVICE_PACKS,
                                            .memory_bytes = 256u << 20,
                                            .slab_most_bytes = seed % 2 ? UINT64_MAX : 3u << 20};
        struct world_options options = {
            .seed = seed, .tensors = 3, .thread_count = 1, .large_bytes = 20u << 20};
        struct scene scene;
        struct dcp_device_stats stats;
        struct dcp_error err = {0};
        scene_make(&scene, seed, &options, &device, 2);
        CHECK_OK(scene_load(&scene, &err), &err);
        for (uint32_t i = 0; i < scene.aims_count; i++) {
            check_aim(&scene.aims[i]);
        }
        dcp_device_put_get_stats(scene.put, &stats);
        CHECK(stats.slab_bytes <= DCP_RING_BUFFER_BYTES);
        scene_clean_up(&scene);
    }
}

static void
fail_everywhere(bool work)
{
    for (uint64_t seed = 1; seed < 6; seed += 2) {
        bool failed = true;
        for (uint64_t n = 1; failed; n += 1 + n / 3) {
            struct world_options options = device_world_of_seed(seed);
            struct scene scene;
            struct dcp_device_stats stats;
            struct dcp_error err = {0};
            uint8_t states[MOST_AIMS];
            struct device_sim_options device = device_of_seed(seed);
            options.tensors = 5;
            options.large_bytes = 0;
            scene_make(&scene, seed, &options, &device, 2);
            if (work) {
                device_sim_fail_work(scene.devices.sims[0], n);
            } else {
                device_sim_fail_call(scene.devices.sims[0], n);
            }
            int rc = scene_load(&scene, &err);
            failed = rc != 0;
            dcp_device_put_get_stats(scene.put, &stats);
            CHECK_OK(dcp_read_plan_states(&scene.plan, DCP_TARGET_UNTOUCHED, states, NULL), &err);
            if (failed) {
                CHECK_EQ(rc, DCP_E_IO);
                CHECK(strstr(err.message, "simulated failure of") != NULL);
            }
            for (uint32_t i = 0; i < scene.aims_count; i++) {
                const struct aim *aim = &scene.aims[i];
                if (!failed || aim->sim == NULL) {
                    check_aim(aim);
                }
                CHECK(!failed || aim->sim == NULL || states[i] != DCP_TARGET_FILLED);
            }
            /* Pinning is the one call whose failure is none. */
            failed = failed || strstr(stats.reason, "failure of pin") != NULL;
            device_sim_fail_call(scene.devices.sims[0], 0);
            scene_clean_up(&scene);
        }
    }
}

static void
a_call_that_fails_spoils_what_it_touched(void)
{
    fail_everywhere(false);
}

static void
work_that_fails_later_spoils_what_it_touched(void)
{
    fail_everywhere(true);
}

static void
a_device_that_hangs_is_left_when_the_load_is_cancelled(void)
{
    struct world_options options = device_world_of_seed(7);
    struct scene scene;
    struct dcp_error err = {0};
    atomic_int cancel = 1;
    struct dcp_engine_options engine = {.verify = true};
    struct device_sim_options device = device_of_seed(1);
    scene_make(&scene, 1, &options, &device, 3);
    CHECK_OK(dcp_device_put_new(&scene.plan, NULL, NULL, &scene.put, &err), &err);
    scene.plan.on_piece = dcp_device_put_piece;
    scene.plan.on_piece_ctx = scene.put;
    dcp_device_put_set_cancel(scene.put, &cancel);
    device_sim_hang(scene.devices.sims[0], false);
    CHECK_OK(dcp_reader_run(scene.disk.io, scene.disk.dirfd, "/d", &scene.plan, &engine, no_record,
                            NULL, NULL, &err),
             &err);
    CHECK_EQ(dcp_device_put_finish(scene.put, &cancel, &err), DCP_E_CANCELLED);
    device_sim_go_on(scene.devices.sims[0]);
    scene_clean_up(&scene);
}

/* One tensor of 2000 x 30 x 8 floats, saved in parts along its last dim, to one target. */
static void
scene_of_one(struct scene *scene, const int64_t *strides, const struct device_sim_options *device)
{
    static const uint64_t size[3] = {2000, 30, 8}, parts[3] = {1, 1, 4};
    struct dcp_error err = {0};
    struct aim *aim = &scene->aims[0];
    uint64_t target;
    memset(scene, 0, sizeof *scene);
    scene->world.rng = (struct maker_rng){1};
    world_add_tensor(&scene->world, DCP_DTYPE_FLOAT32, 3, size, parts);
    world_finish(&scene->world, 1, false);
    disk_make(&scene->disk, &scene->world, 512);
    devices_make(&scene->devices, 1, *device);
    scene->plan.md = &scene->world.md;
    scene->plan.devices = &scene->devices.list;
    *aim = (struct aim){.tensor = &scene->world.tensors[0],
                        .sizes = {2000, 30, 8},
                        .bytes = 2000 * 30 * 8 * 4,
                        .extent_bytes = 4,
                        .from = DCP_DTYPE_FLOAT32,
                        .to = DCP_DTYPE_FLOAT32,
                        .sim = scene->devices.sims[0]};
    for (int d = 0; d < 3; d++) {
        aim->strides[d] = strides[d];
        aim->extent_bytes += (size[d] - 1) * (uint64_t)strides[d] * 4;
    }
    scene->aims_count = 1;
    aim->address = device_sim_tensor(aim->sim, aim->extent_bytes, 4);
    uint8_t *fill = malloc(aim->extent_bytes);
    memset(fill, UNTOUCHED, aim->extent_bytes);
    device_sim_poke(aim->sim, aim->address, fill, aim->extent_bytes);
    free(fill);
    CHECK_OK(dcp_read_plan_add(&scene->plan, entry_of(&scene->world, 0),
                               (uint8_t *)(uintptr_t)aim->address, aim->strides, aim->offsets,
                               aim->sizes, &target, &err),
             &err);
    scene->plan.targets[target].kind = DCP_TARGET_PIECES;
    scene->plan.targets[target].device = 1;
    CHECK_OK(dcp_read_plan_build(&scene->plan, true, NULL, &err), &err);
    CHECK_OK(dcp_read_plan_track(&scene->plan, &err), &err);
}

static void
without_memory_for_a_slab_no_target_takes_many_copies(void)
{
    static const int64_t cases[][3] = {
        {240, 8, 1},      /* row major: four columns of it come at a time */
        {1, 2000, 60000}, /* turned round */
        {8, 16000, 1},    /* two dims changed places */
        {30, 1, 60000},   /* all three */
        {480, 16, 2},     /* every second element */
        {2, 4000, 480000}, {9, 18000, 1}, {500, 16, 1}, {31, 1, 62001},
    };
    for (size_t c = 0; c < 2 * sizeof cases / sizeof cases[0]; c++) {
        struct device_sim_options device = {.seed = c,
                                            .features = c % 2 == 0 ? DCP_DEVICE_PACKS : 0};
        struct scene scene;
        struct dcp_device_stats stats;
        struct dcp_error err = {0};
        scene_of_one(&scene, cases[c / 2], &device);
        CHECK_OK(scene_load(&scene, &err), &err);
        check_aim(&scene.aims[0]);
        dcp_device_put_get_stats(scene.put, &stats);
        CHECK_EQ(stats.copied_bytes, scene.aims[0].bytes);
        CHECK(stats.copies_count <= 500); /* of 480000 elements */
        CHECK_EQ(stats.packed_count, 0);
        scene_clean_up(&scene);
    }
}

/* After so many copies the load is cancelled. */
static atomic_int cancel_after, cancelled;
static int (*copy_rows)(void *, uint64_t, uint64_t, const void *, uint64_t, uint64_t,
                        struct dcp_error *);

static int
copy_and_cancel(void *ctx, uint64_t device, uint64_t pitch_bytes, const void *host,
                uint64_t row_bytes, uint64_t rows, struct dcp_error *err)
{
    CHECK(atomic_load(&cancelled) == 0); /* none comes after it */
    if (atomic_fetch_sub(&cancel_after, 1) == 1) {
        atomic_store(&cancelled, 1);
    }
    return copy_rows(ctx, device, pitch_bytes, host, row_bytes, rows, err);
}

static void
a_piece_in_many_copies_is_cancelled_between_them(void)
{
    static const int64_t steps[3] = {500, 16, 2};
    struct device_sim_options device = {.seed = 1};
    struct scene scene;
    struct dcp_error err = {0};
    struct dcp_engine_options engine = {.verify = true};
    scene_of_one(&scene, steps, &device);
    copy_rows = scene.devices.tables[0]->to_device_rows;
    scene.devices.tables[0]->to_device_rows = copy_and_cancel;
    atomic_store(&cancelled, 0);
    atomic_store(&cancel_after, 5);
    CHECK_OK(dcp_device_put_new(&scene.plan, NULL, NULL, &scene.put, &err), &err);
    dcp_device_put_set_cancel(scene.put, &cancelled);
    scene.plan.on_piece = dcp_device_put_piece;
    scene.plan.on_piece_ctx = scene.put;
    CHECK_OK(dcp_reader_run(scene.disk.io, scene.disk.dirfd, "/d", &scene.plan, &engine, no_record,
                            NULL, NULL, &err),
             &err);
    CHECK_EQ(dcp_device_put_finish(scene.put, &cancelled, &err), DCP_E_CANCELLED);
    CHECK(atomic_load(&cancelled) == 1);
    scene_clean_up(&scene);
}

static bool touched;

static int
touch_idle(void *ctx, struct dcp_error *err)
{
    (void)ctx, (void)err;
    touched = true;
    return 0;
}

static void
touch_release(void *ctx, uint64_t device)
{
    (void)ctx, (void)device;
    touched = true;
}

static void
touch_forget(void *ctx, dcp_device_event *event)
{
    (void)ctx, (void)event;
    touched = true;
}

/* Of a process that forks while a load is on its way, as those of data loaders do. */
static void
a_forked_child_that_lets_go_of_a_load_leaves_the_device_alone(void)
{
    static const int64_t steps[3] = {480, 16, 2};
    struct device_sim_options device = {
        .seed = 1, .features = DCP_DEVICE_PACKS, .slab_most_bytes = UINT64_MAX};
    struct scene scene;
    struct dcp_error err = {0};
    struct dcp_engine_options engine = {.verify = true};
    int status = -1;
    scene_of_one(&scene, steps, &device);
    CHECK_OK(dcp_device_put_new(&scene.plan, NULL, NULL, &scene.put, &err), &err);
    scene.plan.on_piece = dcp_device_put_piece;
    scene.plan.on_piece_ctx = scene.put;
    device_sim_hang(scene.devices.sims[0], false);
    CHECK_OK(dcp_reader_run(scene.disk.io, scene.disk.dirfd, "/d", &scene.plan, &engine, no_record,
                            NULL, NULL, &err),
             &err);
    pid_t child = fork();
    if (child == 0) {
        struct dcp_device *table = scene.devices.tables[0];
        touched = false;
        table->wait_idle = touch_idle;
        table->release = touch_release;
        table->forget = touch_forget;
        dcp_device_put_destroy(scene.put);
        _exit(touched ? 1 : 0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_EQ(status, 0);
    device_sim_go_on(scene.devices.sims[0]);
    CHECK_OK(dcp_device_put_finish(scene.put, NULL, &err), &err);
    check_aim(&scene.aims[0]);
    scene_clean_up(&scene);
}

static void
what_can_be_put_is_known_beforehand(void)
{
    struct device_sim_options options = {.seed = 1, .slab_most_bytes = UINT64_MAX};
    struct devices devices;
    const uint64_t sizes[2] = {512, 300};
    const int64_t turned[2] = {1, 512}, rows[2] = {100000, 1};
    const uint8_t f32 = DCP_DTYPE_FLOAT32;
    devices_make(&devices, 1, options);
    struct dcp_device with = *devices.tables[0], without = with;
    with.features = DCP_DEVICE_PACKS;
    CHECK(dcp_device_put_can(&with, f32, f32, 2, sizes, turned));
    CHECK(dcp_device_put_can(&with, DCP_DTYPE_BFLOAT16, f32, 2, sizes, turned));
    CHECK(!dcp_device_put_can(&with, DCP_DTYPE_COMPLEX128, f32, 2, sizes, NULL));
    CHECK(!dcp_device_put_can(&without, f32, f32, 2, sizes, turned));
    CHECK(!dcp_device_put_can(&without, f32, f32, 2, sizes, rows));
    CHECK(dcp_device_put_can(&without, f32, f32, 2, sizes, NULL));
    CHECK(dcp_device_put_can(&without, f32, f32, 2, (const uint64_t[]){512, 30000}, rows));
    CHECK(dcp_device_put_can(&without, f32, f32, 2, (const uint64_t[]){512, 0}, turned));
    CHECK(devices_clean_up(&devices));
}

CTEST_MAIN(RUN(all_arrives_and_nothing_beside_it_changes);
           RUN(what_is_larger_than_all_slots_goes_through_them);
           RUN(a_call_that_fails_spoils_what_it_touched);
           RUN(work_that_fails_later_spoils_what_it_touched);
           RUN(a_device_that_hangs_is_left_when_the_load_is_cancelled);
           RUN(without_memory_for_a_slab_no_target_takes_many_copies);
           RUN(a_piece_in_many_copies_is_cancelled_between_them);
           RUN(a_forked_child_that_lets_go_of_a_load_leaves_the_device_alone);
           RUN(what_can_be_put_is_known_beforehand);)

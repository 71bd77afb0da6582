/*
 * save_stage.c: a save's files in memory of ours, so that the trainer may go on while they are
 * written.
 *
 * The arena holds the files themselves and not copies of the tensors: the one pass that has to be
 * made while the trainer waits also computes the checksums, and the background is left with writing
 * alone.  Checksums are compared with those of the save before here, where they are made.
 *
 * Sources on devices make it two steps.  The first, on the trainer's thread, puts copies on the
 * devices' streams, each to its final place (device_stage.c), as many as those take without making
 * it wait; the second, on any thread, puts the others and is the pass over everything, in which a
 * payload of a device is waited for and then only looked at.  In it comes the moment when all bytes
 * are in memory of the host and the tensors are the trainer's again; checksums are computed before
 * and after it, as the copies leave time.  Without such sources the first step is the arena alone.
 *
 * Nothing here is collective: what fails is told to the others over the store.
 */
#include "save.h"

#include <inttypes.h>

#include "dcp_trace.h"
#include "device.h"

static bool
has_devices(const struct dcp_save *save)
{
    return save->devices != NULL && save->devices->count > 0;
}

/* The image, and behind it what devices write their checksums to: so it is pinned with the arena.
 */
static uint64_t
arena_bytes(const struct dcp_save *save)
{
    return save->image.bytes +
           (has_devices(save) ? dcp_image_checksums_bytes(dcp_save_layout(save)) : 0);
}

static int
take_arena(struct dcp_save *save, const struct dcp_stage_params *params, struct dcp_error *err)
{
    int rc;

    if (save->installed == NULL || save->arena != NULL) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a save was staged before it was agreed, or twice");
    }
    dcp_image_clean_up(&save->image);
    rc = dcp_image_place(dcp_save_layout(save), save->plan.rank, save->info.n0, &save->image, err);
    if (rc != 0) {
        return rc;
    }
    return dcp_arena_acquire(params->kind, arena_bytes(save), &params->limits, &save->arena, err);
}

/* On failure: unless copies may still write to it, which is only after a device hung for
 * DCP_DEVICE_GRACE_NS: then it is leaked on purpose, and no other reason is as grave. */
static void
give_up_arena(struct dcp_save *save, bool idle)
{
    struct dcp_device_stats *stats = &save->info.device;

    if (idle) {
        dcp_arena_release(save->arena);
    } else {
        stats->reason[0] = '\0';
        dcp_device_because(stats,
                           "%" PRIu64 " bytes of staging memory are lost until the process ends: a "
                           "device that hangs may still write to them",
                           save->arena->bytes);
    }
    save->arena = NULL;
}

/* Whether it is pinned.  A failure costs speed alone, and is reported. */
static bool
pin(struct dcp_save *save, struct dcp_arena *arena)
{
    struct dcp_error refusal;

    dcp_error_clear(&refusal);
    if (has_devices(save) &&
        dcp_arena_pin(arena, save->devices->items[0], arena_bytes(save), &refusal) != 0) {
        dcp_device_because(&save->info.device, "pinning failed: %s", refusal.message);
        return false;
    }
    return has_devices(save);
}

/* One call of dcp_save_stage_end. */
struct ending {
    struct dcp_save *save;
    const struct dcp_stage_end *how;
    uint64_t start_ns;
};

/* The tensors are the caller's again, which is what staging takes. */
static void
on_brought(void *ctx)
{
    const struct ending *ending = ctx;
    struct dcp_save_info *info = &ending->save->info;

    info->stage_ns = info->stage_begin_ns + dcp_now_ns() - ending->start_ns;
    if (ending->how->brought != NULL) {
        ending->how->brought(ending->how->ctx);
    }
}

static int
end(struct dcp_save *save, const struct dcp_source *sources, struct ending *ending,
    struct dcp_error *err)
{
    const struct dcp_engine_options options = {.cancel = ending->how->cancel,
                                               .hashes = save->reuse.hashes,
                                               .devices = save->devices,
                                               .brought = on_brought,
                                               .brought_ctx = ending};
    uint32_t *crcs;
    int rc = dcp_save_new_crcs(save, &crcs, err);

    if (rc != 0) {
        return rc;
    }
    rc = dcp_image_end(&save->image, save->arena->memory, &save->plan, dcp_save_layout(save),
                       sources, &save->info.save_id, save->info.n0, &options, save->stage, crcs,
                       err);
    if (rc == 0) {
        rc = dcp_unchanged_count(save, crcs, err);
    }
    dcp_free(crcs);
    return rc;
}

int
dcp_save_stage_begin(struct dcp_save *save, const struct dcp_source *sources,
                     const struct dcp_stage_params *params, struct dcp_error *err)
{
    struct dcp_engine_options options = {.cancel = params->cancel,
                                         .hashes = save->reuse.hashes,
                                         .devices = save->devices,
                                         .device_stats = &save->info.device};
    uint64_t start_ns = dcp_now_ns();
    bool idle = true;
    int rc = take_arena(save, params, err);

    if (rc != 0) {
        return rc;
    }
    /* Touched in one call, fresh pages cost less than faulted in one by one; used ones nothing. */
    rc = dcp_arena_populate(save->arena, arena_bytes(save), params->cancel, err);
    if (rc == 0 && has_devices(save)) {
        if (pin(save, save->arena)) {
            options.device_crcs = (uint32_t *)(void *)(save->arena->memory + save->image.bytes);
        }
        rc = dcp_image_begin(&save->image, save->arena->memory, &save->plan, dcp_save_layout(save),
                             sources, &options, &save->stage, &idle, err);
    }
    if (rc != 0) {
        give_up_arena(save, idle);
        return rc;
    }
    save->info.stage_begin_ns = dcp_now_ns() - start_ns;
    return 0;
}

int
dcp_save_stage_end(struct dcp_save *save, const struct dcp_source *sources,
                   const struct dcp_stage_end *how, struct dcp_error *err)
{
    struct ending ending = {.save = save, .how = how, .start_ns = dcp_now_ns()};
    bool idle;
    int rc;

    if (save->arena == NULL) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "the staging of a save was ended before it was begun");
    }
    rc = end(save, sources, &ending, err);
    idle = dcp_device_stage_end(save->stage, NULL);
    save->stage = NULL;
    if (rc != 0) {
        give_up_arena(save, idle);
        return rc;
    }
    if (save->info.stage_ns == 0) {
        save->info.stage_ns = save->info.stage_begin_ns + dcp_now_ns() - ending.start_ns;
    }
    dcp_trace_end(dcp_trace_from(ending.start_ns), "phase", "fill the arena",
                  save->image.total_bytes);
    save->info.staged_bytes = save->image.total_bytes;
    save->info.arena_bytes = save->arena->bytes;
    return 0;
}

int
dcp_save_stage(struct dcp_save *save, const struct dcp_source *sources,
               const struct dcp_stage_params *params, struct dcp_error *err)
{
    const struct dcp_stage_end how = {.cancel = params->cancel};
    int rc = dcp_save_stage_begin(save, sources, params, err);

    return rc == 0 ? dcp_save_stage_end(save, sources, &how, err) : rc;
}

void
dcp_save_set_devices(struct dcp_save *save, const struct dcp_device_list *devices)
{
    save->devices = devices;
}

int
dcp_save_warm_up(struct dcp_save *save, const struct dcp_stage_params *params, uint32_t arenas,
                 struct dcp_error *err)
{
    struct dcp_arena *taken[DCP_MAX_ARENAS] = {NULL}; /* at once: each is another one */
    int rc = 0;

    for (uint32_t i = 0; rc == 0 && i < dcp_min_u64(arenas, DCP_MAX_ARENAS); i++) {
        rc = take_arena(save, params, err);
        if (rc == 0) {
            taken[i] = save->arena;
            save->arena = NULL;
            rc = dcp_arena_populate(taken[i], arena_bytes(save), params->cancel, err);
            if (rc == 0) {
                (void)pin(save, taken[i]);
            }
            save->info.arena_bytes += taken[i]->bytes;
        }
        if (rc == 0 && params->process != NULL) {
            rc = dcp_writer_process_prepare(params->process, taken[i], params->cancel, err);
        }
    }
    save->info.staged_bytes = save->image.total_bytes;
    for (uint32_t i = 0; i < DCP_MAX_ARENAS; i++) {
        dcp_arena_release(taken[i]);
    }
    return rc;
}

/*
 * save_stage.c: a save's files in memory of ours, so that the trainer may go on while they are
 * written.
 *
 * The arena holds the files themselves and not copies of the tensors: the one pass that has to be
 * made while the trainer waits also computes the checksums, and the background is left with writing
 * alone.  Checksums are compared with those of the save before here, where they are made.
 *
 * Sources on devices make it two steps.  The first, on the trainer's thread, puts all copies on the
 * devices' streams, each to its final place (device_stage.c), and waits for none of them; the
 * second, on any thread, is the pass over everything, in which a payload of a device is waited for
 * and then only looked at.  Without such sources the first step is the arena alone.
 *
 * Nothing here is collective: what fails is told to the others over the store.
 */
#include "save.h"

#include "dcp_trace.h"

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
    return dcp_arena_acquire(params->kind, save->image.bytes, &params->limits, &save->arena, err);
}

/* On failure: unless copies may still write to it, which is only after a device hung for
 * DCP_DEVICE_GRACE_NS: then it is leaked on purpose. */
static void
give_up_arena(struct dcp_save *save, bool idle)
{
    if (idle) {
        dcp_arena_release(save->arena);
    }
    save->arena = NULL;
}

static bool
has_devices(const struct dcp_save *save)
{
    return save->devices != NULL && save->devices->count > 0;
}

/* A failure costs speed alone, and is reported. */
static void
pin(struct dcp_save *save, struct dcp_arena *arena)
{
    struct dcp_error refusal;

    dcp_error_clear(&refusal);
    if (has_devices(save) &&
        dcp_arena_pin(arena, save->devices->items[0], save->image.bytes, &refusal) != 0) {
        dcp_device_because(&save->info.device, "pinning failed: %s", refusal.message);
    }
}

static int
end(struct dcp_save *save, const struct dcp_source *sources, atomic_int *cancel,
    struct dcp_error *err)
{
    const struct dcp_engine_options options = {
        .cancel = cancel, .hashes = save->reuse.hashes, .devices = save->devices};
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
    const struct dcp_engine_options options = {.cancel = params->cancel,
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
    rc = dcp_arena_populate(save->arena, save->image.bytes, params->cancel, err);
    if (rc == 0 && has_devices(save)) {
        pin(save, save->arena);
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
dcp_save_stage_end(struct dcp_save *save, const struct dcp_source *sources, atomic_int *cancel,
                   struct dcp_error *err)
{
    uint64_t start_ns = dcp_now_ns();
    bool idle;
    int rc;

    if (save->arena == NULL) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "the staging of a save was ended before it was begun");
    }
    rc = end(save, sources, cancel, err);
    idle = dcp_device_stage_end(save->stage, NULL);
    save->stage = NULL;
    if (rc != 0) {
        give_up_arena(save, idle);
        return rc;
    }
    save->info.stage_ns = save->info.stage_begin_ns + dcp_now_ns() - start_ns;
    dcp_trace_end(dcp_trace_from(start_ns), "phase", "fill the arena", save->image.total_bytes);
    save->info.staged_bytes = save->image.total_bytes;
    save->info.arena_bytes = save->arena->bytes;
    return 0;
}

int
dcp_save_stage(struct dcp_save *save, const struct dcp_source *sources,
               const struct dcp_stage_params *params, struct dcp_error *err)
{
    int rc = dcp_save_stage_begin(save, sources, params, err);

    return rc == 0 ? dcp_save_stage_end(save, sources, params->cancel, err) : rc;
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
            rc = dcp_arena_populate(taken[i], save->image.bytes, params->cancel, err);
            pin(save, taken[i]);
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

/*
 * save_stage.c: a save's files in memory of ours, so that the trainer may go on while they are
 * written.
 *
 * The arena holds the files themselves and not copies of the tensors: the one pass that has to be
 * made while the trainer waits also computes the checksums, and the background is left with writing
 * alone.  Checksums are compared with those of the save before here, where they are made.
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

static void
give_back_arena(struct dcp_save *save)
{
    dcp_arena_release(save->arena);
    save->arena = NULL;
}

static int
fill(struct dcp_save *save, const struct dcp_source *sources, atomic_int *cancel,
     struct dcp_error *err)
{
    const struct dcp_engine_options options = {.cancel = cancel, .hashes = save->reuse.hashes};
    uint32_t *crcs;
    int rc = dcp_save_new_crcs(save, &crcs, err);

    if (rc != 0) {
        return rc;
    }
    rc = dcp_image_fill(&save->image, save->arena->memory, &save->plan, dcp_save_layout(save),
                        sources, &save->info.save_id, save->info.n0, &options, crcs, err);
    if (rc == 0) {
        rc = dcp_unchanged_count(save, crcs, err);
    }
    dcp_free(crcs);
    return rc;
}

int
dcp_save_stage(struct dcp_save *save, const struct dcp_source *sources,
               const struct dcp_stage_params *params, struct dcp_error *err)
{
    uint64_t start_ns = dcp_now_ns();
    int rc = take_arena(save, params, err);

    if (rc != 0) {
        return rc;
    }
    /* Touched in one call, fresh pages cost less than faulted in one by one; used ones nothing. */
    rc = dcp_arena_populate(save->arena, save->image.bytes, params->cancel, err);
    rc = rc == 0 ? fill(save, sources, params->cancel, err) : rc;
    if (rc != 0) {
        give_back_arena(save);
        return rc;
    }
    save->info.stage_ns = dcp_now_ns() - start_ns;
    dcp_trace_end(dcp_trace_from(start_ns), "phase", "fill the arena", save->image.total_bytes);
    save->info.staged_bytes = save->image.total_bytes;
    save->info.arena_bytes = save->arena->bytes;
    return 0;
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

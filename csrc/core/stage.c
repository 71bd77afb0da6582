/*
 * stage.c: a private copy of the items a save keeps, so that the trainer may go on while bytes are
 * written.
 *
 * One mapping on huge pages holds everything, each payload on a cache line.  The last released
 * mapping is kept and reused: first touch of fresh memory costs several times the copy.  A forked
 * child starts with none.
 */
#include "dcp_transfer.h"

#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

enum { STAGE_ALIGN_BYTES = 64 };

/* A mapping that waits for the next stage. */
struct spare {
    uint8_t *block;
    size_t bytes;
    int64_t pid;
};

/* The kept mapping or NULL.  No lock: one that another thread holds during a fork stays locked in
 * the child. */
static _Atomic(struct spare *) kept_spare;

static void
spare_destroy(struct spare *spare)
{
    if (spare != NULL && spare->pid == (int64_t)getpid()) {
        dcp_unmap_huge(spare->block, spare->bytes);
    }
    dcp_free(spare);
}

static int
take_block(size_t need, struct dcp_stage *stage, struct dcp_error *err)
{
    struct spare *spare = atomic_exchange(&kept_spare, NULL);

    stage->pid = (int64_t)getpid();
    if (spare != NULL && spare->pid == stage->pid && spare->bytes >= need) {
        stage->block = spare->block;
        stage->block_bytes = spare->bytes;
        dcp_free(spare);
        return 0;
    }
    spare_destroy(spare);
    stage->block = dcp_map_huge(need, err);
    stage->block_bytes = need;
    return stage->block == NULL ? DCP_E_NOMEM : 0;
}

static uint64_t
staged_bytes(const struct dcp_plan *plan, const struct dcp_item *item)
{
    return item->slot_bytes != 0 ? item->slot_bytes : dcp_item_payload_bytes(plan, item);
}

static void
stage_item(const struct dcp_plan *plan, const struct dcp_item *item,
           const struct dcp_source *source, uint8_t *dst)
{
    uint64_t bytes = staged_bytes(plan, item);

    if (bytes == 0) {
        return;
    }
    if (item->slot_bytes != 0 || source->strides_bytes == NULL) {
        memcpy(dst, source->data, bytes);
    } else {
        dcp_box_gather(dst, source->data, item->ndim, dcp_item_sizes(plan, item),
                       source->strides_bytes, dcp_dtype_bytes(item->dtype), 0, bytes);
    }
}

int
dcp_stage_build(const struct dcp_plan *plan, const uint8_t *keep, const struct dcp_source *sources,
                atomic_int *cancel, struct dcp_stage *ret_stage, struct dcp_error *err)
{
    struct dcp_stage stage = {0};
    uint64_t need = 0, pos = 0;
    int rc;

    for (uint32_t i = 0; i < plan->items_count; i++) {
        if (dcp_keep_test(keep, i)) {
            need += dcp_align_up(staged_bytes(plan, &plan->items[i]), STAGE_ALIGN_BYTES);
        }
    }
    stage.sources =
        dcp_calloc(plan->items_count == 0 ? 1 : plan->items_count, sizeof *stage.sources);
    if (stage.sources == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory to stage %u items",
                             plan->items_count);
    }
    rc = need == 0 ? 0 : take_block(need, &stage, err);
    if (rc != 0) {
        dcp_free(stage.sources);
        return rc;
    }
    for (uint32_t i = 0; i < plan->items_count; i++) {
        if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
            dcp_stage_release(&stage);
            return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the save was cancelled");
        }
        if (dcp_keep_test(keep, i)) {
            stage.sources[i].data = stage.block + pos;
            stage_item(plan, &plan->items[i], &sources[i], stage.block + pos);
            pos += dcp_align_up(staged_bytes(plan, &plan->items[i]), STAGE_ALIGN_BYTES);
        }
    }
    *ret_stage = stage;
    return 0;
}

void
dcp_stage_release(struct dcp_stage *stage)
{
    if (stage->block != NULL && stage->pid == (int64_t)getpid()) {
        struct spare *spare = dcp_malloc(sizeof *spare);
        if (spare == NULL) {
            dcp_unmap_huge(stage->block, stage->block_bytes);
        } else {
            *spare = (struct spare){stage->block, stage->block_bytes, stage->pid};
            spare_destroy(atomic_exchange(&kept_spare, spare));
        }
    }
    dcp_free(stage->sources);
    memset(stage, 0, sizeof *stage);
}

void
dcp_stage_trim(void)
{
    spare_destroy(atomic_exchange(&kept_spare, NULL));
}

/*
 * stage.c: a private copy of the items a save keeps, so that the trainer may go on while bytes are
 * written.
 *
 * One mapping on huge pages holds everything, each payload on a cache line.  The last released
 * mapping is kept and reused: first touch of fresh memory costs several times the copy.  A forked
 * child starts with none.
 */
#include "dcp_transfer.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

enum { STAGE_ALIGN_BYTES = 64 };

/* The kept mapping; guarded by `spare_lock`; valid only in the process `spare_pid`. */
static pthread_mutex_t spare_lock = PTHREAD_MUTEX_INITIALIZER;
static uint8_t *spare_block;
static size_t spare_bytes;
static pid_t spare_pid;

static uint8_t *
take_spare(size_t *ret_bytes)
{
    uint8_t *block;

    pthread_mutex_lock(&spare_lock);
    block = spare_pid == getpid() ? spare_block : NULL; /* a child never had the mapping */
    *ret_bytes = spare_bytes;
    spare_block = NULL;
    pthread_mutex_unlock(&spare_lock);
    return block;
}

static int
take_block(size_t need, struct dcp_stage *stage, struct dcp_error *err)
{
    size_t spare_size = 0;
    uint8_t *spare = take_spare(&spare_size);

    if (spare != NULL && spare_size >= need) {
        stage->block = spare;
        stage->block_bytes = spare_size;
        return 0;
    }
    dcp_unmap_huge(spare, spare_size);
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
                struct dcp_stage *ret_stage, struct dcp_error *err)
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
    uint8_t *old = NULL;
    size_t old_bytes = 0;

    if (stage->block != NULL) {
        pthread_mutex_lock(&spare_lock);
        if (spare_pid == getpid()) {
            old = spare_block;
            old_bytes = spare_bytes;
        }
        spare_block = stage->block;
        spare_bytes = stage->block_bytes;
        spare_pid = getpid();
        pthread_mutex_unlock(&spare_lock);
        dcp_unmap_huge(old, old_bytes);
    }
    dcp_free(stage->sources);
    memset(stage, 0, sizeof *stage);
}

void
dcp_stage_trim(void)
{
    size_t bytes = 0;
    uint8_t *block = take_spare(&bytes);

    dcp_unmap_huge(block, bytes);
}

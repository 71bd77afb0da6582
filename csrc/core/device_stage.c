/*
 * device_stage.c: the payloads of a save on devices, on their way to their places in its image.
 *
 * The layout knows every place beforehand, so a payload's bytes go once over the bus and are never
 * moved again:
 *     dense runs of 256 KiB and more    device -> image, a copy each
 *     small ones, and strided ones      device -> slab (a kernel packs hundreds, each at its place
 *                                       relative to the others) -> image, one copy per slab
 *     what only the host can gather     when whoever walks the image comes to it
 * Copies rise through the image, and after every DCP_DEVICE_LANDING_BYTES of it an event is
 * recorded: a landing, the range of memory that is written to until the event has happened.
 * Landings do not overlap, so whoever walks the image in order knows by one cursor how far it is
 * his: he computes checksums of what has landed, and writes frames into the gaps, which the slab's
 * copies overwrite with rubbish, only after them.
 *
 * Invariants: nothing is written to the image behind the last landing that was waited for but by
 * copies; an end without a wait for all landings waits for the devices.
 * Threads: begun on one thread, waited for and ended on any one other.
 */
#include "device.h"

#include <string.h>

struct landing {
    const uint8_t *from; /* up to that of the next one, at most */
    const struct dcp_device *device;
    dcp_device_event *event; /* NULL once it has happened */
};

struct dcp_device_stage {
    const struct dcp_device_list *devices;
    struct dcp_device_stats *stats;
    struct dcp_device_bring **brings; /* owned; one per device, NULL until it is needed */
    struct landing *landings;         /* owned; rising */
    uint64_t landings_count, landings_cap;
    uint64_t landed;   /* landings that have happened */
    bool open;         /* the last landing has no event yet */
    uint8_t *late;     /* owned bitmap of records */
    uint64_t *crcs_at; /* owned; per record 1 + an index in `crcs`; NULL: none are computed */
    uint32_t *crcs;    /* owned mapping, pinned */
    uint64_t crcs_bytes;
    const struct dcp_device *crcs_pinned_by;
};

/* ---- landings ---- */

static int
close_landing(struct dcp_device_stage *stage, struct dcp_error *err)
{
    if (!stage->open) {
        return 0;
    }
    struct landing *landing = &stage->landings[stage->landings_count - 1];
    uint64_t index = 0;
    while (stage->devices->items[index] != landing->device) {
        index++;
    }
    int rc = dcp_device_bring_flush(stage->brings[index], err);
    rc = rc == 0 ? landing->device->record(landing->device->ctx, &landing->event, err) : rc;
    stage->open = rc != 0;
    return rc;
}

/* Opens one for copies to `host`, unless one of the device is open that still has room. */
static int
open_landing(struct dcp_device_stage *stage, const struct dcp_device *device, const uint8_t *host,
             struct dcp_error *err)
{
    if (stage->open) {
        const struct landing *last = &stage->landings[stage->landings_count - 1];
        if (last->device == device && (uint64_t)(host - last->from) < DCP_DEVICE_LANDING_BYTES) {
            return 0;
        }
        int rc = close_landing(stage, err);
        if (rc != 0) {
            return rc;
        }
    }
    if (stage->landings_count == stage->landings_cap) {
        uint64_t cap = dcp_max_u64(64, 2 * stage->landings_cap);
        void *grown = dcp_realloc(stage->landings, (size_t)cap * sizeof *stage->landings);
        if (grown == NULL) {
            return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the copies of a save");
        }
        stage->landings = grown;
        stage->landings_cap = cap;
    }
    stage->landings[stage->landings_count++] = (struct landing){.from = host, .device = device};
    stage->open = true;
    return 0;
}

/* ---- checksums that devices compute ---- */

static uint64_t
blocks_of(uint64_t payload_bytes)
{
    return (payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
}

static bool
can_check(const struct dcp_device_stage_params *params, const struct dcp_placed_record *record,
          const struct dcp_source *source)
{
    if (source->device == 0 || source->device > params->devices->count ||
        !dcp_layout_lists(params->plan, record)) {
        return false;
    }
    const struct dcp_device *device = params->devices->items[source->device - 1];
    return (device->features & DCP_DEVICE_CHECKSUMS) != 0;
}

/* Room for the CRCs of all payloads that can be checked; none where it cannot be pinned. */
static int
make_crcs(struct dcp_device_stage *stage, const struct dcp_device_stage_params *params,
          struct dcp_error *err)
{
    const struct dcp_layout *layout = params->layout;
    const struct dcp_device *device = NULL;
    struct dcp_error refusal;
    uint64_t blocks = 0;
    for (uint32_t r = 0; params->checksums && r < layout->records_count; r++) {
        const struct dcp_source *source = &params->sources[layout->records[r].item];
        if (can_check(params, &layout->records[r], source)) {
            device = params->devices->items[source->device - 1];
            blocks += blocks_of(layout->records[r].payload_bytes);
        }
    }
    if (blocks == 0) {
        return 0;
    }
    stage->crcs_bytes = dcp_align_up(blocks * sizeof *stage->crcs, DCP_DIRECT_ALIGN_BYTES);
    stage->crcs = dcp_map_huge(stage->crcs_bytes, err);
    stage->crcs_at = dcp_calloc(layout->records_count, sizeof *stage->crcs_at);
    if (stage->crcs == NULL || stage->crcs_at == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the checksums of a save");
    }
    dcp_error_clear(&refusal);
    if (device->pin(device->ctx, stage->crcs, stage->crcs_bytes, &refusal) == 0) {
        stage->crcs_pinned_by = device;
    } else {
        dcp_device_because(params->stats, "pinning failed: %s", refusal.message);
        dcp_free(stage->crcs_at);
        stage->crcs_at = NULL;
    }
    return 0;
}

/* After the copies of a payload, before the event behind them. */
static int
check(struct dcp_device_stage *stage, const struct dcp_device_payload *payload,
      const struct dcp_device_form *form, uint32_t record, uint64_t *crcs_used,
      struct dcp_error *err)
{
    const struct dcp_device *device = payload->device;
    if (stage->crcs_at == NULL || form->run_bytes != form->bytes ||
        form->bytes <= DCP_BLOCK_BYTES || (device->features & DCP_DEVICE_CHECKSUMS) == 0) {
        return 0;
    }
    int rc =
        device->checksum(device->ctx, form->address, form->bytes, stage->crcs + *crcs_used, err);
    if (rc == 0) {
        stage->crcs_at[record] = 1 + *crcs_used;
        *crcs_used += blocks_of(form->bytes);
    }
    return rc;
}

/* ---- begin ---- */

/* One payload to its place: in steps, so that the first are waited for while the last are on their
 * way. */
static int
bring_payload(struct dcp_device_stage *stage, struct dcp_device_bring *bring,
              const struct dcp_device_payload *payload, const struct dcp_device_form *form,
              uint8_t *host, struct dcp_error *err)
{
    uint64_t most = DCP_DEVICE_LANDING_BYTES; /* whole elements */
    int rc = 0;
    for (uint64_t at = 0; rc == 0 && at < form->bytes;) {
        uint64_t n = dcp_min_u64(form->bytes - at, most);
        rc = open_landing(stage, payload->device, host + at, err);
        rc = rc == 0 ? dcp_device_bring_put(bring, form, at, n, host + at, err) : rc;
        at += n;
    }
    return rc;
}

static int
bring_record(struct dcp_device_stage *stage, const struct dcp_device_stage_params *params,
             uint32_t index, uint8_t *file_memory, uint64_t *crcs_used, struct dcp_error *err)
{
    const struct dcp_placed_record *record = &params->layout->records[index];
    const struct dcp_item *item = &params->plan->items[record->item];
    const struct dcp_source *source = &params->sources[record->item];
    struct dcp_device_form form;
    int rc = dcp_device_check_source(params->devices, params->plan, item, source, err);
    if (rc != 0 || source->device == 0 || record->payload_bytes == 0) {
        return rc;
    }
    if (params->cancel != NULL && atomic_load(params->cancel) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the save was cancelled");
    }
    struct dcp_device_payload payload =
        dcp_device_payload_of(params->devices, params->plan, item, source);
    struct dcp_device_bring **bring = &stage->brings[source->device - 1];
    DCP_ASSERT(payload.bytes == record->payload_bytes);
    if (*bring == NULL) {
        uint64_t slab = dcp_min_u64(DCP_DEVICE_SLAB_BYTES, params->image->bytes);
        rc = dcp_device_bring_new(payload.device, slab, stage->stats, bring, err);
    }
    rc = rc == 0 ? dcp_device_bring_form(*bring, &payload, &form, err) : rc;
    if (rc == 0 && form.way == DCP_DEVICE_GATHER) {
        dcp_keep_set(stage->late, index);
        return 0;
    }
    uint8_t *host = file_memory + record->payload_offset_bytes;
    rc = rc == 0 ? bring_payload(stage, *bring, &payload, &form, host, err) : rc;
    return rc == 0 ? check(stage, &payload, &form, index, crcs_used, err) : rc;
}

static int
bring_all(struct dcp_device_stage *stage, const struct dcp_device_stage_params *params,
          struct dcp_error *err)
{
    uint64_t crcs_used = 0;
    int rc = make_crcs(stage, params, err);
    for (uint32_t f = 0; rc == 0 && f < params->layout->files_count; f++) {
        const struct dcp_placed_file *file = &params->layout->files[f];
        uint8_t *memory = params->memory + params->image->files[f].offset_bytes;
        for (uint32_t r = 0; rc == 0 && r < file->records_count; r++) {
            rc = bring_record(stage, params, file->first_record + r, memory, &crcs_used, err);
        }
    }
    return rc == 0 ? close_landing(stage, err) : rc;
}

int
dcp_device_stage_begin(const struct dcp_device_stage_params *params,
                       struct dcp_device_stage **ret_stage, bool *ret_idle, struct dcp_error *err)
{
    struct dcp_device_stage *stage = dcp_calloc(1, sizeof *stage);
    int rc = 0;
    if (stage != NULL) {
        stage->devices = params->devices;
        stage->stats = params->stats;
        stage->brings = dcp_calloc(dcp_max_u64(params->devices->count, 1), sizeof *stage->brings);
        stage->late = dcp_calloc(1, dcp_max_u64(dcp_keep_bytes(params->layout->records_count), 1));
    }
    if (stage == NULL || stage->brings == NULL || stage->late == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the copies of a save");
    }
    rc = rc == 0 ? bring_all(stage, params, err) : rc;
    *ret_idle = rc == 0 || dcp_device_stage_end(stage, NULL);
    if (rc != 0) {
        return rc;
    }
    *ret_stage = stage;
    return 0;
}

/* ---- wait, end ---- */

int
dcp_device_stage_wait(struct dcp_device_stage *stage, const uint8_t *at, atomic_int *cancel,
                      const uint8_t **ret_to, struct dcp_error *err)
{
    while (stage->landed < stage->landings_count && stage->landings[stage->landed].from <= at) {
        struct landing *landing = &stage->landings[stage->landed];
        int rc = dcp_device_await(landing->device, landing->event, cancel, stage->stats, err);
        if (rc != 0) {
            return rc;
        }
        landing->device->forget(landing->device->ctx, landing->event);
        landing->event = NULL;
        stage->landed++;
    }
    *ret_to = stage->landed < stage->landings_count ? stage->landings[stage->landed].from
                                                    : (const uint8_t *)UINTPTR_MAX;
    return 0;
}

bool
dcp_device_stage_is_late(const struct dcp_device_stage *stage, uint32_t record)
{
    return dcp_keep_test(stage->late, record);
}

int
dcp_device_stage_gather(struct dcp_device_stage *stage, const struct dcp_device_payload *payload,
                        uint8_t *host, atomic_int *cancel, struct dcp_error *err)
{
    struct dcp_device_form form;
    dcp_device_form_of(payload, false, &form);
    return dcp_device_gather(payload->device, &form, host, cancel, stage->stats, err);
}

const uint32_t *
dcp_device_stage_checksums(const struct dcp_device_stage *stage, uint32_t record)
{
    return stage->crcs_at == NULL || stage->crcs_at[record] == 0
               ? NULL
               : stage->crcs + (stage->crcs_at[record] - 1);
}

bool
dcp_device_stage_end(struct dcp_device_stage *stage, struct dcp_error *err)
{
    bool idle = true;
    if (stage == NULL) {
        return true;
    }
    if (stage->brings != NULL && (stage->open || stage->landed < stage->landings_count)) {
        idle = dcp_device_all_idle(stage->devices, err);
    }
    for (uint64_t i = stage->landed; i < stage->landings_count; i++) {
        const struct landing *landing = &stage->landings[i];
        landing->device->forget(landing->device->ctx, landing->event);
    }
    for (uint32_t i = 0; stage->brings != NULL && i < stage->devices->count; i++) {
        dcp_device_bring_destroy(stage->brings[i]);
    }
    if (idle && stage->crcs != NULL) {
        if (stage->crcs_pinned_by != NULL) {
            stage->crcs_pinned_by->unpin(stage->crcs_pinned_by->ctx, stage->crcs);
        }
        dcp_unmap_huge(stage->crcs, stage->crcs_bytes);
    }
    dcp_free(stage->brings);
    dcp_free(stage->landings);
    dcp_free(stage->late);
    dcp_free(stage->crcs_at);
    dcp_free(stage);
    return idle;
}

/*
 * device_stage.c: the payloads of a save on devices, on their way to their places in its image.
 *
 * The layout knows every place beforehand, so a payload's bytes go once over the bus and are never
 * moved again:
 *     dense runs of 256 KiB and more    device -> image, a copy each
 *     small ones, and strided ones      device -> slab (a kernel packs hundreds, each at its place
 *                                       relative to the others) -> image, one copy per slab
 *     what only the host can gather     when whoever walks the image comes to it
 * Copies rise through the image in landings: a range of it that copies write to until the event
 * behind them has happened.  Landings do not overlap, so whoever walks the image in order knows by
 * one cursor how far it is his: he computes checksums of what has landed, and writes frames into
 * the gaps, which the slab's copies overwrite with rubbish, only after them.
 *
 * A stream takes so many calls and then holds up whoever makes the next one.  So only a window of
 * landings is on its way: the first ones are put by whoever begins, which is the trainer and never
 * waits, and the others by whoever walks, each time that a landing has happened.  All of them run
 * behind what the trainer had put on his streams when the stage was begun: ours followed them then.
 *
 * Once everything has landed, what the walk has not reached yet of the host's own payloads is
 * brought at once, so that from then on nothing reads the sources: the rest of the walk is
 * checksums.
 *
 * Invariants: nothing is written to the image behind the last landing that was waited for but by
 * copies; an end without a wait for all landings waits for the devices.
 * Threads: begun on one thread, waited for and ended on any one other.
 */
#include "device.h"

#include <string.h>

enum {
    /* Landings on their way: 256 MiB are 10 ms of a bus of 25 GB/s, in which the walk looks at them
     * ten times. */
    WINDOW_LANDINGS = 32,
    /* Calls for one; a stream takes about 1000 before it holds up its caller, and checksums and
     * lists of boxes are more than one each. */
    LANDING_CALLS = 12,
};

struct landing {
    const uint8_t *from; /* up to that of the next one, at most */
    const struct dcp_device *device;
    dcp_device_event *event;
};

struct dcp_device_stage {
    struct dcp_device_stage_params params;    /* all that it names is borrowed until the end, the
                                                 sources until everything is there */
    struct dcp_device_bring **brings;         /* owned; one per device, NULL until it is needed */
    struct landing landings[WINDOW_LANDINGS]; /* a ring */
    uint64_t put, landed;                     /* landings so far */
    bool running;      /* something was put on a stream that no landing stands for yet */
    uint8_t *late;     /* owned bitmap of records */
    uint64_t *crcs_at; /* owned; per record 1 + an index in params.crcs; 0: none */
    uint64_t crcs_used;
    bool no_crcs; /* a device had no memory for them */

    /* What is put next: byte done_bytes of a record's payload. */
    bool has;
    uint32_t record; /* of the layout */
    struct dcp_device_payload payload;
    struct dcp_device_form form;
    uint64_t done_bytes;
};

static const struct dcp_placed_record *
record_of(const struct dcp_device_stage *stage, uint32_t record)
{
    return &stage->params.layout->records[record];
}

/* Where its payload goes. */
static uint8_t *
place_of(const struct dcp_device_stage *stage, uint32_t record)
{
    const struct dcp_placed_record *placed = record_of(stage, record);
    return stage->params.memory + stage->params.image->files[placed->file].offset_bytes +
           placed->payload_offset_bytes;
}

/* Where the next byte goes that is put on a stream. */
static uint8_t *
next_place(const struct dcp_device_stage *stage)
{
    return place_of(stage, stage->record) + stage->done_bytes;
}

/* ---- checksums that devices compute ---- */

static uint64_t
blocks_of(uint64_t payload_bytes)
{
    return (payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
}

uint64_t
dcp_image_checksums_bytes(const struct dcp_layout *layout)
{
    uint64_t blocks = 0;
    for (uint32_t r = 0; r < layout->records_count; r++) {
        uint64_t payload_bytes = layout->records[r].payload_bytes;
        blocks += payload_bytes > DCP_BLOCK_BYTES ? blocks_of(payload_bytes) : 0;
    }
    return blocks * sizeof(uint32_t);
}

/* Before the first copy of a payload: the event behind that tells of its checksums, too, so whoever
 * walks has them with its first byte, however many landings it takes.  A device without memory for
 * them leaves them to the host. */
static int
check(struct dcp_device_stage *stage, struct dcp_error *err)
{
    const struct dcp_device *device = stage->payload.device;
    const struct dcp_device_form *form = &stage->form;
    if (stage->params.crcs == NULL || stage->no_crcs || form->run_bytes != form->bytes ||
        form->bytes <= DCP_BLOCK_BYTES || (device->features & DCP_DEVICE_CHECKSUMS) == 0 ||
        !dcp_layout_lists(stage->params.plan, record_of(stage, stage->record))) {
        return 0;
    }
    struct dcp_error refusal;
    dcp_error_clear(&refusal);
    int rc = device->checksum(device->ctx, form->address, form->bytes,
                              stage->params.crcs + stage->crcs_used, &refusal);
    if (rc == DCP_E_NOMEM) {
        dcp_device_because(stage->params.stats, "no checksums by devices: %s", refusal.message);
        stage->no_crcs = true;
        return 0;
    }
    if (rc != 0) {
        *err = refusal;
        return rc;
    }
    stage->crcs_at[stage->record] = 1 + stage->crcs_used;
    stage->crcs_used += blocks_of(form->bytes);
    return 0;
}

/* ---- what is put ---- */

/* Looks at the record at the cursor: *ret_takes when copies bring its payload. */
static int
look_at_record(struct dcp_device_stage *stage, bool *ret_takes, struct dcp_error *err)
{
    const struct dcp_device_stage_params *params = &stage->params;
    const struct dcp_placed_record *record = record_of(stage, stage->record);
    const struct dcp_item *item = &params->plan->items[record->item];
    const struct dcp_source *source = &params->sources[record->item];
    int rc = dcp_device_check_source(params->devices, params->plan, item, source, err);
    *ret_takes = false;
    if (rc != 0 || source->device == 0 || record->payload_bytes == 0) {
        return rc;
    }
    stage->payload = dcp_device_payload_of(params->devices, params->plan, item, source);
    struct dcp_device_bring **bring = &stage->brings[source->device - 1];
    DCP_ASSERT(stage->payload.bytes == record->payload_bytes);
    if (*bring == NULL) {
        uint64_t slab = dcp_min_u64(DCP_DEVICE_SLAB_BYTES, params->image->bytes);
        rc = dcp_device_bring_new(stage->payload.device, slab, params->stats, bring, err);
    }
    rc = rc == 0 ? dcp_device_bring_form(*bring, &stage->payload, &stage->form, err) : rc;
    if (rc == 0 && stage->form.way == DCP_DEVICE_GATHER) {
        dcp_keep_set(stage->late, stage->record);
        return 0;
    }
    *ret_takes = rc == 0;
    return rc;
}

/* Sets the cursor to the first payload that copies bring, from `record` on. */
static int
find_next(struct dcp_device_stage *stage, uint32_t record, struct dcp_error *err)
{
    int rc = 0;
    stage->has = false;
    stage->done_bytes = 0;
    for (; rc == 0 && !stage->has && record < stage->params.layout->records_count; record++) {
        stage->record = record;
        rc = look_at_record(stage, &stage->has, err);
    }
    return rc;
}

static uint32_t
bring_index(const struct dcp_device_stage *stage, const struct dcp_device *device)
{
    uint32_t index = 0;
    while (stage->params.devices->items[index] != device) {
        index++;
    }
    return index;
}

/* The next step of the payload at the cursor, of at most `room` bytes, whole elements. */
static int
put_step(struct dcp_device_stage *stage, struct dcp_device_bring *bring, uint64_t room,
         uint64_t calls, struct dcp_error *err)
{
    const struct dcp_device_form *form = &stage->form;
    uint64_t n = dcp_min_u64(form->bytes - stage->done_bytes, room);
    if (form->way == DCP_DEVICE_RUNS && form->run_bytes < n / calls) {
        n = form->run_bytes * calls;
    }
    n -= n % form->item_bytes;
    int rc = stage->done_bytes == 0 ? check(stage, err) : 0;
    if (rc == 0) {
        rc = dcp_device_bring_put(bring, form, stage->done_bytes, n, next_place(stage), err);
    }
    stage->done_bytes += n;
    if (rc == 0 && stage->done_bytes == form->bytes) {
        rc = find_next(stage, stage->record + 1, err);
    }
    return rc;
}

/* One landing: copies of one device, up to its bytes or its calls, and the event behind them. */
static int
put_landing(struct dcp_device_stage *stage, struct dcp_error *err)
{
    const struct dcp_device *device = stage->payload.device;
    struct dcp_device_bring *bring = stage->brings[bring_index(stage, device)];
    const uint8_t *from = next_place(stage);
    struct landing landing = {.from = from, .device = device};
    uint64_t calls = bring->calls, end = calls + LANDING_CALLS, room = DCP_DEVICE_LANDING_BYTES;
    int rc = 0;
    stage->running = true;
    while (rc == 0 && room >= stage->form.item_bytes && calls < end) {
        rc = put_step(stage, bring, room, end - calls, err);
        calls = bring->calls;
        if (!stage->has || stage->payload.device != device) {
            break;
        }
        uint64_t used = (uint64_t)(next_place(stage) - from);
        room = used < DCP_DEVICE_LANDING_BYTES ? DCP_DEVICE_LANDING_BYTES - used : 0;
    }
    rc = rc == 0 ? dcp_device_bring_flush(bring, err) : rc;
    rc = rc == 0 ? device->record(device->ctx, &landing.event, err) : rc;
    if (rc == 0) {
        stage->landings[stage->put++ % WINDOW_LANDINGS] = landing;
        stage->running = false;
    }
    return rc;
}

static int
check_cancel(atomic_int *cancel, struct dcp_error *err)
{
    if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the save was cancelled");
    }
    return 0;
}

static int
put_window(struct dcp_device_stage *stage, atomic_int *cancel, struct dcp_error *err)
{
    int rc = 0;
    while (rc == 0 && stage->has && stage->put - stage->landed < WINDOW_LANDINGS) {
        rc = check_cancel(cancel, err);
        rc = rc == 0 ? put_landing(stage, err) : rc;
    }
    return rc;
}

int
dcp_device_stage_begin(const struct dcp_device_stage_params *params,
                       struct dcp_device_stage **ret_stage, bool *ret_idle, struct dcp_error *err)
{
    struct dcp_device_stage *stage = dcp_calloc(1, sizeof *stage);
    uint32_t records = params->layout->records_count;
    int rc = 0;
    if (stage != NULL) {
        stage->params = *params;
        stage->brings = dcp_calloc(dcp_max_u64(params->devices->count, 1), sizeof *stage->brings);
        stage->late = dcp_calloc(1, dcp_max_u64(dcp_keep_bytes(records), 1));
        stage->crcs_at = dcp_calloc(dcp_max_u64(records, 1), sizeof *stage->crcs_at);
    }
    if (stage == NULL || stage->brings == NULL || stage->late == NULL || stage->crcs_at == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the copies of a save");
    }
    rc = rc == 0 ? find_next(stage, 0, err) : rc;
    rc = rc == 0 ? put_window(stage, params->cancel, err) : rc;
    *ret_idle = rc == 0 || dcp_device_stage_end(stage, NULL);
    if (rc != 0) {
        return rc;
    }
    *ret_stage = stage;
    return 0;
}

/* ---- what lands ---- */

static struct landing *
first_landing(struct dcp_device_stage *stage)
{
    return stage->landed < stage->put ? &stage->landings[stage->landed % WINDOW_LANDINGS] : NULL;
}

static void
take_landing(struct dcp_device_stage *stage)
{
    struct landing *landing = first_landing(stage);
    landing->device->forget(landing->device->ctx, landing->event);
    stage->landed++;
}

/* Copies write to nothing below it any more. */
static const uint8_t *
landed_to(struct dcp_device_stage *stage)
{
    const struct landing *landing = first_landing(stage);
    return landing != NULL ? landing->from
           : stage->has    ? next_place(stage)
                           : (const uint8_t *)UINTPTR_MAX;
}

int
dcp_device_stage_wait(struct dcp_device_stage *stage, const uint8_t *at, atomic_int *cancel,
                      const uint8_t **ret_to, struct dcp_error *err)
{
    int rc = 0;
    while (rc == 0 && landed_to(stage) <= at) {
        rc = put_window(stage, cancel, err);
        if (rc == 0) {
            const struct landing *landing = first_landing(stage);
            rc =
                dcp_device_await(landing->device, landing->event, cancel, stage->params.stats, err);
        }
        if (rc == 0) {
            take_landing(stage);
        }
    }
    rc = rc == 0 ? put_window(stage, cancel, err) : rc;
    *ret_to = landed_to(stage);
    return rc;
}

int
dcp_device_stage_poll(struct dcp_device_stage *stage, atomic_int *cancel, struct dcp_error *err)
{
    int rc = 1;
    while (rc > 0 && stage->landed < stage->put) {
        const struct landing *landing = first_landing(stage);
        rc = landing->device->poll(landing->device->ctx, landing->event, err);
        if (rc > 0) {
            take_landing(stage);
        }
    }
    if (rc >= 0) {
        int put = put_window(stage, cancel, err);
        rc = put != 0 ? put : !stage->has && stage->landed == stage->put;
    }
    return rc;
}

/* ---- what does not land ---- */

bool
dcp_device_stage_is_late(const struct dcp_device_stage *stage, uint32_t record)
{
    return dcp_keep_test(stage->late, record);
}

int
dcp_device_stage_gather(struct dcp_device_stage *stage, uint32_t record, atomic_int *cancel,
                        struct dcp_error *err)
{
    const struct dcp_device_stage_params *params = &stage->params;
    const struct dcp_placed_record *placed = record_of(stage, record);
    const struct dcp_device_payload payload =
        dcp_device_payload_of(params->devices, params->plan, &params->plan->items[placed->item],
                              &params->sources[placed->item]);
    struct dcp_device_form form;
    dcp_device_form_of(&payload, false, &form);
    return dcp_device_gather(payload.device, &form, place_of(stage, record), cancel, params->stats,
                             err);
}

/* A payload of the host to its place, in steps of a landing's bytes. */
static int
bring_from_host(const struct dcp_device_stage *stage, uint32_t record, atomic_int *cancel,
                struct dcp_error *err)
{
    const struct dcp_plan *plan = stage->params.plan;
    const struct dcp_placed_record *placed = record_of(stage, record);
    const struct dcp_item *item = &plan->items[placed->item];
    const struct dcp_source *source = &stage->params.sources[placed->item];
    int rc = dcp_device_check_source(NULL, plan, item, source, err);
    uint8_t *place = place_of(stage, record);
    const uint8_t *data = source->data;
    bool dense = item->slot_bytes != 0 || source->strides_bytes == NULL;
    for (uint64_t at = 0, n; rc == 0 && at < placed->payload_bytes; at += n) {
        n = dcp_min_u64(placed->payload_bytes - at, DCP_DEVICE_LANDING_BYTES); /* whole elements */
        rc = check_cancel(cancel, err);
        if (rc == 0 && dense) {
            memcpy(place + at, data + at, n);
        } else if (rc == 0) {
            dcp_box_gather(place + at, data, item->ndim, dcp_item_sizes(plan, item),
                           source->strides_bytes, dcp_dtype_bytes(item->dtype), at, n);
        }
    }
    return rc;
}

int
dcp_device_stage_bring_rest(struct dcp_device_stage *stage, uint32_t first, atomic_int *cancel,
                            struct dcp_error *err)
{
    const struct dcp_device_stage_params *params = &stage->params;
    int rc = 0;
    DCP_ASSERT(!stage->has && stage->landed == stage->put);
    for (uint32_t r = first; rc == 0 && r < params->layout->records_count; r++) {
        if (params->sources[record_of(stage, r)->item].device == 0) {
            rc = bring_from_host(stage, r, cancel, err);
        } else if (dcp_device_stage_is_late(stage, r)) {
            rc = dcp_device_stage_gather(stage, r, cancel, err);
        }
    }
    for (uint32_t i = 0; i < params->devices->count; i++) {
        dcp_device_bring_destroy(stage->brings[i]);
        stage->brings[i] = NULL;
    }
    return rc;
}

const uint32_t *
dcp_device_stage_checksums(const struct dcp_device_stage *stage, uint32_t record)
{
    return stage->crcs_at[record] == 0 ? NULL : stage->params.crcs + (stage->crcs_at[record] - 1);
}

bool
dcp_device_stage_end(struct dcp_device_stage *stage, struct dcp_error *err)
{
    bool idle = true;
    if (stage == NULL) {
        return true;
    }
    if (stage->running || stage->landed < stage->put) {
        idle = dcp_device_all_idle(stage->params.devices, err);
    }
    while (stage->landed < stage->put) {
        take_landing(stage);
    }
    for (uint32_t i = 0; stage->brings != NULL && i < stage->params.devices->count; i++) {
        dcp_device_bring_destroy(stage->brings[i]);
    }
    dcp_free(stage->brings);
    dcp_free(stage->late);
    dcp_free(stage->crcs_at);
    dcp_free(stage);
    return idle;
}

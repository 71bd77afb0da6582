/*
 * device_put_range.c: ranges of files that a device reads by itself, past the host's memory.
 *
 * What is read is summed up on the device, and only the CRCs come to the host, in the slot that is
 * being filled.  A device that has no memory for that now is one that cannot verify: the range
 * comes again, in pieces.
 *
 * Threads: as device_put.c.
 */
#include "device_put.h"

/* Until all that was put on the device's stream so far has run. */
static int
wait_for_stream(struct dcp_device_put *put, const struct dcp_device *device, struct dcp_error *err)
{
    dcp_device_event *event = NULL;
    int rc = device->record(device->ctx, &event, err);
    rc = rc == 0 ? dcp_device_await(device, event, put->cancel, &put->stats, err) : rc;
    device->forget(device->ctx, event);
    return rc;
}

/* The CRCs of the blocks at `address`, to the slot that is being filled, behind what is in it. */
static int
sum_blocks(struct dcp_device_put *put, const struct dcp_device *device, uint64_t address,
           uint64_t bytes, const uint32_t **ret_crcs, struct dcp_error *err)
{
    uint64_t blocks = bytes / DCP_BLOCK_BYTES + (bytes % DCP_BLOCK_BYTES != 0);
    uint64_t need = blocks * sizeof(uint32_t), room = put->ring->buffer_bytes;
    uint64_t at = dcp_align_up(put->used_bytes, DCP_PUT_ALIGN_BYTES);
    int rc = 0;
    DCP_ASSERT(need <= room);
    if (at > room - need) {
        at = 0;
        rc = dcp_put_end_slot(put, err);
    }
    uint32_t *crcs = (uint32_t *)(void *)(put->slots[put->current].memory + at);
    put->running = true;
    rc = rc == 0 ? device->checksum(device->ctx, address, bytes, crcs, err) : rc;
    if (rc == DCP_E_NOMEM) {
        err->code = DCP_E_UNSUPPORTED; /* what there is no memory for can be done without */
        rc = DCP_E_UNSUPPORTED;
    }
    rc = rc == 0 ? wait_for_stream(put, device, err) : rc;
    *ret_crcs = crcs;
    return rc;
}

static int
read_range(struct dcp_device_put *put, const struct dcp_device *device,
           const struct dcp_file_range *range, const uint32_t **ret_crcs, struct dcp_error *err)
{
    const struct dcp_target *target = &put->plan->targets[range->item->target];
    uint64_t address = (uint64_t)(uintptr_t)target->data + range->at_bytes;
    bool sums = (device->features & DCP_DEVICE_CHECKSUMS) != 0 && put->ring->pinned_by != NULL;
    bool reads = (device->features & DCP_DEVICE_READS_FILES) != 0;
    if (!reads || (ret_crcs != NULL && !sums)) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL, "%s:%d cannot %s", device->kind,
                             (int)device->index,
                             reads ? "verify what it reads from files" : "read files");
    }
    /* What the caller's streams hold comes first.  This wait can be cancelled, the one in read_file
     * cannot. */
    int rc = wait_for_stream(put, device, err);
    rc = rc == 0 ? device->read_file(device->ctx, range->fd, range->offset_bytes, address,
                                     range->bytes, err)
                 : rc;
    return rc == 0 && ret_crcs != NULL
               ? sum_blocks(put, device, address, range->bytes, ret_crcs, err)
               : rc;
}

int
dcp_device_put_range(void *ctx, const struct dcp_file_range *range, const uint32_t **ret_crcs,
                     struct dcp_error *err)
{
    struct dcp_device_put *put = ctx;
    const struct dcp_target *target = &put->plan->targets[range->item->target];
    if (put->code != 0) {
        *err = put->error;
        return put->code;
    }
    int rc = read_range(put, put->lanes[target->device - 1].device, range, ret_crcs, err);
    if (rc == DCP_E_UNSUPPORTED) {
        dcp_device_because(&put->stats, "%s", err->message);
    } else if (rc != 0) {
        dcp_put_fail(put, rc, err);
    }
    return rc;
}

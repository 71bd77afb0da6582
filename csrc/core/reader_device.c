/*
 * reader_device.c: payloads that go from their file straight into the memory of a device.
 *
 * Who takes the pieces of a plan may take ranges of files too (dcp_read_plan.on_range): then no
 * buffer of the host is between.  It is asked for large payloads that are wanted whole and are one
 * run of their target.  What would be verified is verified on the device, against the CRCs of the
 * same blocks; where that cannot be, and from the first byte on that is refused, a payload is read
 * like all others.  A file that was refused once is not tried again: a try waits for the device.
 *
 * Threads: the calling thread reads; what others read ahead of it goes on meanwhile.
 */
#include "reader.h"

#include "dcp_trace.h"

/* Less is not worth waiting for the device. */
#define LEAST_BYTES (1u << 20)
/* In one go: whoever cancels waits for it, and progress stands still. */
#define RANGE_BYTES (64u << 20)

static bool
can_be_asked(const struct dcp_reader *reader, const struct dcp_read_part *part)
{
    const struct dcp_read_box *box = &part->box;
    bool dense = box->ndim == 0 || (box->ndim == 1 && box->target_strides[0] == 1);
    return reader->plan->on_range != NULL && !reader->file->refused &&
           reader->plan->targets[part->item->target].device != 0 && !part->check_whole && dense &&
           box->dtype == box->target_dtype && box->wanted_bytes == box->payload_bytes &&
           box->payload_bytes >= LEAST_BYTES;
}

/* Range [from, from + bytes) of the payload.  `err` holds no error yet. */
static int
read_range(struct dcp_reader *reader, const struct dcp_read_part *part, uint64_t from,
           uint64_t bytes, struct dcp_error *err)
{
    const struct dcp_read_plan *plan = reader->plan;
    const struct dcp_read_file *file = reader->file;
    const struct dcp_read_box *box = &part->box;
    bool verified = reader->options->verify && part->block_crcs != NULL;
    struct dcp_file_range range = {.item = part->item,
                                   .fd = file->direct_fd >= 0 ? file->direct_fd : file->fd,
                                   .offset_bytes = part->payload_offset_bytes + from,
                                   .bytes = bytes,
                                   .at_bytes = (uint64_t)box->target_at * box->item_bytes + from};
    const uint32_t *crcs = NULL;
    int rc = dcp_read_check_cancel(reader, err);
    if (rc != 0) {
        return rc;
    }
    dcp_target_touch(plan, part->item->target);
    uint64_t traced = dcp_trace_begin();
    rc = plan->on_range(plan->on_piece_ctx, &range, verified ? &crcs : NULL, err);
    dcp_trace_end_io(traced, "read to a device", file->path, range.offset_bytes, bytes);
    if (rc != 0) {
        return rc;
    }
    dcp_read_count(reader, file, bytes, 1);
    for (uint64_t at = 0; verified && at < bytes; at += DCP_BLOCK_BYTES) {
        if (crcs[at / DCP_BLOCK_BYTES] != part->block_crcs[(from + at) / DCP_BLOCK_BYTES]) {
            return dcp_read_fail_block(reader, file, part, from + at, err);
        }
    }
    dcp_read_count_done(reader, bytes, verified);
    reader->stats.straight_bytes += bytes;
    reader->stats.device_direct_bytes += bytes;
    dcp_target_deliver(plan, part->item->target, bytes);
    return 0;
}

int
dcp_read_to_device(struct dcp_reader *reader, const struct dcp_read_part *part, uint64_t *ret_to,
                   struct dcp_error *err)
{
    uint64_t payload = part->box.payload_bytes, to = 0;
    struct dcp_error why;
    int rc = 0;
    dcp_error_clear(&why);
    while (can_be_asked(reader, part) && to < payload) {
        uint64_t bytes = dcp_min_u64(payload - to, RANGE_BYTES);
        rc = read_range(reader, part, to, bytes, &why);
        if (rc == DCP_E_UNSUPPORTED) {
            reader->file->refused = true;
            rc = 0;
        } else if (rc != 0) {
            if (err != NULL && err->code == 0) {
                *err = why;
            }
            return rc;
        } else {
            to += bytes;
        }
    }
    *ret_to = to;
    return 0;
}

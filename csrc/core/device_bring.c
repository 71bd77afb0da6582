/*
 * device_bring.c: copies from one device to the host, put on its stream.
 *
 * The slab mirrors a range of the host's memory: a packed payload lies in it where it lies in that
 * range, so that one copy of the range serves hundreds of payloads and the host has nothing to
 * scatter.  What lies between them in the range (frames of records, payloads of the host) is
 * overwritten with rubbish on the way: whoever writes it does so after the copy.  One slab is
 * enough, for everything is in stream order: the kernel that fills it anew runs after the copy out
 * of it.
 *
 * Threads: as struct dcp_device.
 */
#include "device.h"

/* Host memory between packed payloads that is brought along rather than cut out. */
#define GAP_MOST_BYTES (64u << 10)

int
dcp_device_bring_new(const struct dcp_device *device, uint64_t slab_bytes,
                     struct dcp_device_stats *stats, struct dcp_device_bring **ret_bring,
                     struct dcp_error *err)
{
    struct dcp_device_bring *bring = dcp_calloc(1, sizeof *bring);
    if (bring == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the copies of a device");
    }
    bring->device = device;
    bring->stats = stats;
    bring->want_bytes = slab_bytes;
    *ret_bring = bring;
    return 0;
}

void
dcp_device_bring_destroy(struct dcp_device_bring *bring)
{
    if (bring != NULL) {
        dcp_device_slab_release(bring->device, &bring->slab);
    }
    dcp_free(bring);
}

int
dcp_device_bring_form(struct dcp_device_bring *bring, const struct dcp_device_payload *payload,
                      struct dcp_device_form *ret_form, struct dcp_error *err)
{
    /* What would be packed asks for the slab. */
    dcp_device_form_of(payload, true, ret_form);
    if (ret_form->way != DCP_DEVICE_PACK) {
        return 0;
    }
    int rc =
        dcp_device_slab_need(bring->device, bring->want_bytes, &bring->slab, bring->stats, err);
    if (rc == 0 && bring->slab.bytes == 0) {
        dcp_device_form_of(payload, false, ret_form);
    }
    return rc;
}

static int
copy(struct dcp_device_bring *bring, uint8_t *host, uint64_t address, uint64_t bytes,
     struct dcp_error *err)
{
    const struct dcp_device *device = bring->device;
    bring->calls++;
    bring->stats->copies_count++;
    bring->stats->copied_bytes += bytes;
    return device->to_host(device->ctx, host, address, bytes, err);
}

int
dcp_device_bring_flush(struct dcp_device_bring *bring, struct dcp_error *err)
{
    const struct dcp_device *device = bring->device;
    const struct dcp_device_box *box = &bring->boxes[0];
    uint32_t count = bring->boxes_count;
    int rc;
    bring->boxes_count = 0;
    if (count == 0) {
        return 0;
    }
    if (count == 1 && box->ndim == 1 && box->strides_bytes[0] == (int64_t)box->item_bytes) {
        return copy(bring, bring->host, box->strided + box->first * box->item_bytes,
                    bring->pending_bytes, err);
    }
    for (uint32_t i = 0; i < count; i++) {
        bring->stats->packed_bytes += bring->boxes[i].count * bring->boxes[i].item_bytes;
    }
    bring->calls += 2; /* a kernel, and the event behind its list of boxes */
    bring->stats->packed_count += count;
    rc = device->pack(device->ctx, bring->boxes, count, err);
    return rc == 0 ? copy(bring, bring->host, bring->slab.address, bring->pending_bytes, err) : rc;
}

/* How many of `len` bytes at `host` the slab takes now, after what is pending. */
static uint64_t
slab_room(const struct dcp_device_bring *bring, const struct dcp_device_form *form, uint64_t len,
          const uint8_t *host)
{
    if (bring->boxes_count == 0) {
        return dcp_min_u64(len, bring->slab.bytes) / form->item_bytes * form->item_bytes;
    }
    const uint8_t *end = bring->host + bring->pending_bytes;
    uint64_t at = (uint64_t)(host - bring->host);
    DCP_ASSERT(host >= end);
    if ((uint64_t)(host - end) > GAP_MOST_BYTES || at >= bring->slab.bytes ||
        bring->boxes_count == DCP_DEVICE_BOXES) {
        return 0;
    }
    return dcp_min_u64(len, bring->slab.bytes - at) / form->item_bytes * form->item_bytes;
}

static int
put_packed(struct dcp_device_bring *bring, const struct dcp_device_form *form, uint64_t from,
           uint64_t len, uint8_t *host, struct dcp_error *err)
{
    DCP_ASSERT(from % form->item_bytes == 0 && len % form->item_bytes == 0);
    while (len > 0) {
        uint64_t n = slab_room(bring, form, len, host);
        if (n == 0) {
            int rc = dcp_device_bring_flush(bring, err);
            if (rc != 0) {
                return rc;
            }
            continue;
        }
        bring->host = bring->boxes_count == 0 ? host : bring->host;
        bring->boxes[bring->boxes_count++] =
            dcp_device_form_box(form, bring->slab.address + (uint64_t)(host - bring->host),
                                from / form->item_bytes, n / form->item_bytes);
        bring->pending_bytes = (uint64_t)(host - bring->host) + n;
        from += n;
        host += n;
        len -= n;
    }
    return 0;
}

static int
put_runs(struct dcp_device_bring *bring, const struct dcp_device_form *form, uint64_t from,
         uint64_t len, uint8_t *host, struct dcp_error *err)
{
    /* A later pack must not bring rubbish over these. */
    int rc = dcp_device_bring_flush(bring, err);
    while (rc == 0 && len > 0) {
        uint64_t skip = from % form->run_bytes;
        uint64_t n = dcp_min_u64(len, form->run_bytes - skip);
        rc = copy(bring, host, dcp_device_form_run(form, from / form->run_bytes) + skip, n, err);
        from += n;
        host += n;
        len -= n;
    }
    return rc;
}

int
dcp_device_bring_put(struct dcp_device_bring *bring, const struct dcp_device_form *form,
                     uint64_t from, uint64_t len, uint8_t *host, struct dcp_error *err)
{
    DCP_ASSERT(form->way != DCP_DEVICE_GATHER && from <= form->bytes && len <= form->bytes - from);
    return form->way == DCP_DEVICE_PACK ? put_packed(bring, form, from, len, host, err)
                                        : put_runs(bring, form, from, len, host, err);
}

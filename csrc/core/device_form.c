/*
 * device_form.c: how a payload on a device is best copied, and how the host waits for one.
 *
 * A copy over the bus costs some microseconds whatever its length, and a kernel moves bytes a
 * hundred times faster than the bus does.  So dense runs from DIRECT_LEAST_BYTES on are copied one
 * by one, and everything else is packed by the kernel first, many payloads into one slab, which
 * one copy brings over.  Without a kernel runs are copied down to RUN_LEAST_BYTES; what has shorter
 * ones is gathered by the host (device_gather.c), never element by element over the bus.
 *
 * Device memory is the trainer's: a slab is taken when it is first needed, smaller where it cannot
 * be had, and without any there are plain copies.
 *
 * Threads: no state.
 */
#include "device.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "group.h"

/* 256 KiB take 10 microseconds at 25 GB/s: as long as starting a few copies. */
#define DIRECT_LEAST_BYTES (256u << 10)
/* Below this the host's own gathering is faster than what one copy after another costs. */
#define RUN_LEAST_BYTES (16u << 10)

/* A smaller slab is not worth a kernel. */
#define SLAB_LEAST_BYTES (1u << 20)

/* Between looks at an event: short at first, for most of them have happened or nearly so. */
#define FIRST_PAUSE_NS 20000u
#define MOST_PAUSE_NS 1000000u

/* ---- forms ---- */

static void
append_dim(struct dcp_device_form *form, uint64_t size, int64_t stride)
{
    if (size == 1) {
        return;
    }
    uint32_t last = form->ndim;
    if (last > 0 && form->strides_bytes[last - 1] == stride * (int64_t)size) {
        form->sizes[last - 1] *= size;
        form->strides_bytes[last - 1] = stride;
        return;
    }
    form->sizes[last] = size;
    form->strides_bytes[last] = stride;
    form->ndim++;
}

void
dcp_device_form_of(const struct dcp_device_payload *payload, bool packs,
                   struct dcp_device_form *ret)
{
    DCP_ASSERT(payload->bytes > 0 && payload->ndim <= DCP_MAX_DIMS);
    uint64_t item = payload->item_bytes;
    ret->address = payload->address;
    ret->bytes = payload->bytes;
    ret->item_bytes = payload->item_bytes;
    ret->ndim = 0;
    for (uint32_t d = 0; payload->strides_bytes != NULL && d < payload->ndim; d++) {
        append_dim(ret, payload->sizes[d], payload->strides_bytes[d]);
    }
    if (ret->ndim == 0) {
        ret->sizes[0] = payload->bytes / item;
        ret->strides_bytes[0] = (int64_t)item;
        ret->ndim = 1;
    }
    uint32_t last = ret->ndim - 1;
    ret->run_bytes = ret->strides_bytes[last] == (int64_t)item ? ret->sizes[last] * item : item;
    if (packs && ret->ndim <= DCP_DEVICE_DIMS && ret->run_bytes < DIRECT_LEAST_BYTES) {
        ret->way = DCP_DEVICE_PACK;
    } else if (ret->run_bytes == ret->bytes || ret->run_bytes >= RUN_LEAST_BYTES) {
        ret->way = DCP_DEVICE_RUNS;
    } else {
        ret->way = DCP_DEVICE_GATHER;
    }
}

uint64_t
dcp_device_form_run(const struct dcp_device_form *form, uint64_t index)
{
    uint64_t address = form->address;
    uint32_t last = form->ndim - 1;
    uint32_t outer = form->strides_bytes[last] == (int64_t)form->item_bytes ? last : form->ndim;
    for (uint32_t d = outer; d > 0; d--) {
        address += (index % form->sizes[d - 1]) * (uint64_t)form->strides_bytes[d - 1];
        index /= form->sizes[d - 1];
    }
    return address;
}

struct dcp_device_box
dcp_device_form_box(const struct dcp_device_form *form, uint64_t packed, uint64_t first,
                    uint64_t count)
{
    struct dcp_device_box box = {.strided = form->address,
                                 .packed = packed,
                                 .first = first,
                                 .count = count,
                                 .item_bytes = form->item_bytes,
                                 .ndim = form->ndim};
    DCP_ASSERT(form->ndim <= DCP_DEVICE_DIMS);
    memcpy(box.sizes, form->sizes, form->ndim * sizeof box.sizes[0]);
    memcpy(box.strides_bytes, form->strides_bytes, form->ndim * sizeof box.strides_bytes[0]);
    return box;
}

/* ---- slabs ---- */

int
dcp_device_slab_need(const struct dcp_device *device, uint64_t want_bytes,
                     struct dcp_device_slab *slab, struct dcp_device_stats *stats,
                     struct dcp_error *err)
{
    struct dcp_error refusal;
    int rc = DCP_E_NOMEM;
    if (slab->asked) {
        return 0;
    }
    slab->asked = true;
    if ((device->features & DCP_DEVICE_PACKS) == 0) {
        dcp_device_because(stats, "%s:%" PRId32 " has no kernels", device->kind, device->index);
        return 0;
    }
    uint64_t bytes = dcp_max_u64(want_bytes, SLAB_LEAST_BYTES);
    for (; rc == DCP_E_NOMEM && bytes >= SLAB_LEAST_BYTES; bytes /= 2) {
        dcp_error_clear(&refusal);
        rc = device->allocate(device->ctx, bytes, &slab->address, &refusal);
        slab->bytes = rc == 0 ? bytes : 0;
    }
    if (rc == DCP_E_NOMEM) {
        dcp_device_because(stats, "%s:%" PRId32 " has no memory for a slab", device->kind,
                           device->index);
    } else if (rc != 0 && err != NULL && err->code == 0) {
        *err = refusal;
    }
    stats->slab_bytes = dcp_max_u64(stats->slab_bytes, slab->bytes);
    return rc == DCP_E_NOMEM ? 0 : rc;
}

void
dcp_device_slab_release(const struct dcp_device *device, struct dcp_device_slab *slab)
{
    if (slab->bytes > 0) {
        device->release(device->ctx, slab->address);
    }
    *slab = (struct dcp_device_slab){0};
}

/* ---- sources ---- */

int
dcp_device_check_source(const struct dcp_device_list *devices, const struct dcp_plan *plan,
                        const struct dcp_item *item, const struct dcp_source *source,
                        struct dcp_error *err)
{
    const struct dcp_name *name = &plan->names[item->name];
    int len = (int)dcp_min_u64(name->fqn_len, 256);
    uint64_t bytes = item->slot_bytes != 0 ? item->slot_bytes : dcp_item_payload_bytes(plan, item);
    if (source->data == NULL && bytes > 0) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "%.*s has no memory to save", len,
                             name->fqn);
    }
    if (source->device == 0) {
        return 0;
    }
    if (devices == NULL || source->device > devices->count) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "%.*s lies on device %u of %u; this is a bug, please report it", len,
                             name->fqn, source->device, devices == NULL ? 0 : devices->count);
    }
    if (item->kind == DCP_ITEM_BYTES || item->slot_bytes != 0) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "%.*s is a finished record and lies on a device; this is a bug, "
                             "please report it",
                             len, name->fqn);
    }
    return 0;
}

struct dcp_device_payload
dcp_device_payload_of(const struct dcp_device_list *devices, const struct dcp_plan *plan,
                      const struct dcp_item *item, const struct dcp_source *source)
{
    return (struct dcp_device_payload){.device = devices->items[source->device - 1],
                                       .address = (uint64_t)(uintptr_t)source->data,
                                       .bytes = dcp_item_payload_bytes(plan, item),
                                       .item_bytes = dcp_dtype_bytes(item->dtype),
                                       .ndim = item->ndim,
                                       .sizes = dcp_item_sizes(plan, item),
                                       .strides_bytes = source->strides_bytes};
}

/* ---- stats ---- */

void
dcp_device_because(struct dcp_device_stats *stats, const char *format, ...)
{
    va_list args;
    if (stats->reason[0] != '\0') {
        return;
    }
    va_start(args, format);
    vsnprintf(stats->reason, sizeof stats->reason, format, args);
    va_end(args);
}

void
dcp_device_stats_add(struct dcp_device_stats *sum, const struct dcp_device_stats *more)
{
    sum->copied_bytes += more->copied_bytes;
    sum->copies_count += more->copies_count;
    sum->packed_bytes += more->packed_bytes;
    sum->packed_count += more->packed_count;
    sum->slab_bytes = dcp_max_u64(sum->slab_bytes, more->slab_bytes);
    sum->wait_ns += more->wait_ns;
    if (more->reason[0] != '\0') {
        dcp_device_because(sum, "%s", more->reason);
    }
}

/* ---- waiting ---- */

int
dcp_device_wait(const struct dcp_device *device, dcp_device_event *event, atomic_int *cancel,
                struct dcp_error *err)
{
    const struct dcp_io *io = dcp_io_posix();
    uint64_t start_ns = dcp_now_ns(), pause_ns = FIRST_PAUSE_NS;
    for (;;) {
        int rc = device->poll(device->ctx, event, err);
        if (rc != 0) {
            return rc > 0 ? 0 : rc;
        }
        if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
            return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL,
                                 "waiting for %s:%" PRId32 " was cancelled", device->kind,
                                 device->index);
        }
        if (dcp_now_ns() - start_ns >= DCP_DEVICE_TIMEOUT_NS) {
            return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL,
                                 "copies of %s:%" PRId32 " have not ended within %llu s; look for "
                                 "a kernel or a collective that hangs on it",
                                 device->kind, device->index,
                                 (unsigned long long)(DCP_DEVICE_TIMEOUT_NS / 1000000000u));
        }
        io->sleep_ns(io->ctx, pause_ns);
        pause_ns = dcp_min_u64(2 * pause_ns, MOST_PAUSE_NS);
    }
}

int
dcp_device_await(const struct dcp_device *device, dcp_device_event *event, atomic_int *cancel,
                 struct dcp_device_stats *stats, struct dcp_error *err)
{
    uint64_t start_ns = dcp_now_ns();
    int rc = dcp_device_wait(device, event, cancel, err);
    stats->wait_ns += dcp_now_ns() - start_ns;
    return rc;
}

bool
dcp_device_all_idle(const struct dcp_device_list *devices, struct dcp_error *err)
{
    bool idle = true;
    for (uint32_t i = 0; i < devices->count; i++) {
        const struct dcp_device *device = devices->items[i];
        struct dcp_error local;
        dcp_error_clear(&local);
        int rc = device->wait_idle(device->ctx, &local);
        idle = idle && rc == 0;
        if (rc != 0 && err != NULL && err->code == 0) {
            *err = local;
        }
    }
    return idle;
}

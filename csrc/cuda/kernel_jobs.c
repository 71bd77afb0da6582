/*
 * kernel_jobs.c: cuts strided boxes into jobs of kernels.
 *
 * A job is one thread block's work.  Small boxes are one job each; large ones are cut, so that a
 * list of 20,000 scalars and one of a single huge tensor spread over the device alike.
 *
 * Where the innermost dim is dense on both sides and everything is aligned, 2 to 16 neighbouring
 * items become one of up to 16 bytes: a box is then three parts, up to the first aligned item, the
 * wide middle and the rest.  Items whose address is not a multiple of their size (the packed side
 * may lie anywhere) are moved by smaller accesses.
 *
 * Pure functions of their arguments; any thread.
 */
#include "kernel_jobs.h"

#include <inttypes.h>
#include <string.h>

enum { WIDEST_BYTES = 16 };

static int
check_box(const struct dcp_device_box *box, struct dcp_error *err)
{
    uint64_t items = 1, end;
    uint32_t item = box->item_bytes;
    bool fits = item != 0 && item <= WIDEST_BYTES && (item & (item - 1)) == 0 &&
                box->ndim <= DCP_DEVICE_DIMS &&
                !dcp_add_overflows_u64(box->first, box->count, &end);

    for (uint32_t d = 0; fits && d < box->ndim; d++) {
        fits = !dcp_mul_overflows_u64(items, box->sizes[d], &items);
    }
    if (fits && end <= items && items <= DCP_MAX_PAYLOAD_BYTES) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                         "a kernel was asked to move elements [%" PRIu64 ", + %" PRIu64
                         ") of a box of %" PRIu32 " dims and items of %" PRIu32
                         " bytes, which it has not",
                         box->first, box->count, box->ndim, item);
}

/* The box's range as one job; dims of one element go. */
static void
whole_job(const struct dcp_device_box *box, struct dcp_kernel_job *ret_job)
{
    *ret_job = (struct dcp_kernel_job){
        .strided = box->strided,
        .packed = box->packed,
        .first = box->first,
        .count = box->count,
        .item_bytes = box->item_bytes,
    };
    for (uint32_t d = box->ndim; d > 0; d--) {
        if (box->sizes[d - 1] != 1) {
            ret_job->sizes[ret_job->ndim] = box->sizes[d - 1];
            ret_job->strides_bytes[ret_job->ndim++] = box->strides_bytes[d - 1];
        }
    }
    if (ret_job->ndim == 1 && box->count > 0) {
        /* Rows begin anywhere then, which lets more of them be moved wide. */
        ret_job->strided += ret_job->first * (uint64_t)ret_job->strides_bytes[0];
        ret_job->first = 0;
        ret_job->sizes[0] = ret_job->count;
    }
}

/* Items before the first that begins `wide` aligned ones; UINT64_MAX when there is none. */
static uint64_t
items_to_aligned(const struct dcp_kernel_job *job, uint32_t wide)
{
    uint64_t width = (uint64_t)wide * job->item_bytes, head_bytes;

    if (job->ndim == 0 || job->strides_bytes[0] != (int64_t)job->item_bytes) {
        return UINT64_MAX;
    }
    if (job->ndim == 1) {
        head_bytes = (0 - job->packed) % width;
        bool alike = (job->strided - job->packed) % width == 0;
        return alike && head_bytes % job->item_bytes == 0 ? head_bytes / job->item_bytes
                                                          : UINT64_MAX;
    }
    for (uint32_t d = 1; d < job->ndim; d++) {
        if ((uint64_t)job->strides_bytes[d] % width != 0) {
            return UINT64_MAX;
        }
    }
    uint64_t head = (wide - job->first % wide) % wide;
    bool aligned = job->sizes[0] % wide == 0 && job->strided % width == 0 &&
                   (job->packed + head * job->item_bytes) % width == 0;
    return aligned ? head : UINT64_MAX;
}

int
kernel_cut_begin(struct kernel_cut *cut, const struct dcp_device_box *box, struct dcp_error *err)
{
    int rc = check_box(box, err);
    if (rc != 0) {
        return rc;
    }
    *cut = (struct kernel_cut){.wide = 1, .body_end = box->count};
    whole_job(box, &cut->all);
    for (uint32_t width = WIDEST_BYTES; width > box->item_bytes; width /= 2) {
        uint32_t wide = width / box->item_bytes;
        uint64_t head = items_to_aligned(&cut->all, wide);
        if (head < box->count && box->count - head >= wide) {
            cut->wide = wide;
            cut->body = head;
            cut->body_end = head + (box->count - head) / wide * wide;
            break;
        }
    }
    uint64_t items = (box->count + KERNEL_JOBS_OF_BOX - 1) / KERNEL_JOBS_OF_BOX;
    items = dcp_max_u64(items, KERNEL_JOB_BYTES / box->item_bytes);
    cut->tile = (items + cut->wide - 1) / cut->wide * cut->wide;
    return 0;
}

/* The largest access that all addresses of a job allow. */
static uint32_t
access_bytes(const struct dcp_kernel_job *job)
{
    uint64_t bits = job->strided | job->packed | job->item_bytes;
    for (uint32_t d = 0; d < job->ndim; d++) {
        bits |= (uint64_t)job->strides_bytes[d];
    }
    return (uint32_t)(bits & (0 - bits));
}

static void
widen(const struct kernel_cut *cut, uint64_t from, struct dcp_kernel_job *job)
{
    job->item_bytes *= cut->wide;
    job->strides_bytes[0] = (int64_t)job->item_bytes;
    if (job->ndim == 1) {
        job->strided += cut->body * cut->all.item_bytes;
        job->sizes[0] = (cut->body_end - cut->body) / cut->wide;
        job->first = (from - cut->body) / cut->wide;
    } else {
        job->sizes[0] /= cut->wide;
        job->first /= cut->wide;
    }
    job->count /= cut->wide;
}

bool
kernel_cut_next(struct kernel_cut *cut, struct dcp_kernel_job *ret_job)
{
    uint64_t from = cut->done, end;

    if (from == cut->all.count) {
        return false;
    }
    bool in_body = from >= cut->body && from < cut->body_end;
    if (in_body) {
        end = dcp_min_u64(from + cut->tile, cut->body_end);
    } else {
        end = from < cut->body ? cut->body : cut->all.count;
    }
    *ret_job = cut->all;
    ret_job->first += from;
    ret_job->packed += from * cut->all.item_bytes;
    ret_job->count = end - from;
    if (in_body && cut->wide > 1) {
        widen(cut, from, ret_job);
    }
    ret_job->access_bytes = access_bytes(ret_job);
    cut->done = end;
    return true;
}

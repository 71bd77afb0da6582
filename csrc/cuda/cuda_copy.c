/*
 * cuda_copy.c: copies and memory of the device, in the order of our stream.
 *
 * A copy is cut where the host's address is a multiple of CUDA_PIN_BYTES: memory is pinned in
 * pieces that end there, and CUDA takes a copy only if its host side lies in one of them.
 *
 * Memory comes from the device's pool and goes back to it in stream order: cudaMalloc and cudaFree
 * would have the whole device wait.  The pool is the default one, which keeps nothing that is free
 * once the device has been waited for, so torch's allocator gets it back.  A device without pools
 * has no memory for us: slabs only make copies faster.
 *
 * Threads: one at a time for a table.
 */
#include "cuda_device.h"

#include <inttypes.h>
#include <stdio.h>

int
cuda_copy_pieces(const struct cuda_stay *stay, cuda_stream stream, void *host, uint64_t device,
                 uint64_t bytes, bool to_host, struct dcp_error *err)
{
    char *at = host;

    while (bytes > 0) {
        uint64_t left = CUDA_PIN_BYTES - (uintptr_t)at % CUDA_PIN_BYTES;
        uint64_t n = dcp_min_u64(bytes, left);
        void *memory = (void *)(uintptr_t)device;
        int rc = cuda_check(
            stay,
            stay->runtime->cudaMemcpyAsync(
                to_host ? at : memory, to_host ? memory : at, n,
                to_host ? DCP_CUDA_COPY_DEVICE_TO_HOST : DCP_CUDA_COPY_HOST_TO_DEVICE, stream),
            to_host ? "copy to the host" : "copy to the device", err);
        if (rc != 0) {
            return rc;
        }
        at += n;
        device += n;
        bytes -= n;
    }
    return 0;
}

static int
copy(struct cuda_table *table, void *host, uint64_t device, uint64_t bytes, bool to_host,
     struct dcp_error *err)
{
    struct cuda_stay stay;
    int rc = cuda_enter(table->device.index, &stay, err);

    if (rc == 0) {
        rc = cuda_copy_pieces(&stay, table->stream, host, device, bytes, to_host, err);
        cuda_leave(&stay);
    }
    return rc;
}

int
cuda_copy_to_host(void *ctx, void *host, uint64_t device, uint64_t bytes, struct dcp_error *err)
{
    return copy(ctx, host, device, bytes, true, err);
}

int
cuda_copy_to_device(void *ctx, uint64_t device, const void *host, uint64_t bytes,
                    struct dcp_error *err)
{
    /* It is only read. */
    return copy(ctx, (void *)(uintptr_t)host, device, bytes, false, err);
}

/* As many rows as lie in one piece of pinned memory go at once; one that lies in two goes by
 * itself.
 */
static int
copy_rows(const struct cuda_table *table, const struct cuda_stay *stay, uint64_t device,
          uint64_t pitch_bytes, char *host, uint64_t row_bytes, uint64_t rows,
          struct dcp_error *err)
{
    int rc = 0;

    while (rc == 0 && rows > 0) {
        uint64_t left = CUDA_PIN_BYTES - (uintptr_t)host % CUDA_PIN_BYTES;
        uint64_t n = dcp_min_u64(rows, left / row_bytes);
        if (n == 0) {
            n = 1;
            rc = cuda_copy_pieces(stay, table->stream, host, device, row_bytes, false, err);
        } else {
            rc = cuda_check(stay,
                            stay->runtime->cudaMemcpy2DAsync(
                                (void *)(uintptr_t)device, pitch_bytes, host, row_bytes, row_bytes,
                                n, DCP_CUDA_COPY_HOST_TO_DEVICE, table->stream),
                            "copy rows to the device", err);
        }
        host += n * row_bytes;
        device += n * pitch_bytes;
        rows -= n;
    }
    return rc;
}

int
cuda_copy_rows_to_device(void *ctx, uint64_t device, uint64_t pitch_bytes, const void *host,
                         uint64_t row_bytes, uint64_t rows, struct dcp_error *err)
{
    const struct cuda_table *table = ctx;
    struct cuda_stay stay;
    int rc = cuda_enter(table->device.index, &stay, err);

    if (rc == 0) {
        /* The host's side is only read. */
        rc = copy_rows(table, &stay, device, pitch_bytes, (char *)(uintptr_t)host, row_bytes, rows,
                       err);
        cuda_leave(&stay);
    }
    return rc;
}

int
cuda_copy_allocate(void *ctx, uint64_t bytes, uint64_t *ret_device, struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    struct cuda_stay stay;
    char what[64];
    void *memory = NULL;

    if (!table->has_pools) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "cuda:%d: its memory has no pools, so none is taken for a slab",
                             (int)table->device.index);
    }
    int rc = cuda_enter(table->device.index, &stay, err);
    if (rc != 0) {
        return rc;
    }
    (void)snprintf(what, sizeof what, "allocate %" PRIu64 " bytes for a slab", bytes);
    rc = cuda_check(&stay, stay.runtime->cudaMallocAsync(&memory, bytes, table->stream), what, err);
    cuda_leave(&stay);
    if (rc == 0) {
        *ret_device = (uint64_t)(uintptr_t)memory;
    }
    return rc;
}

void
cuda_copy_release(void *ctx, uint64_t device)
{
    struct cuda_table *table = ctx;
    struct cuda_stay stay;

    if (device == 0 || cuda_enter(table->device.index, &stay, NULL) != 0) {
        return;
    }
    if (stay.runtime->cudaFreeAsync((void *)(uintptr_t)device, table->stream) != 0) {
        (void)stay.runtime->cudaGetLastError();
    }
    cuda_leave(&stay);
}

/*
 * cuda_sums.c: CRC32 of blocks, by a kernel, on a stream of their own.
 *
 * Copies keep the bus busy and checksums the device's memory, so neither waits for the other: two
 * streams, which meet where an event is recorded and where the trainer's streams are followed or
 * led.  Results are collected in one buffer of the device and brought over together before an
 * event: one small copy for all payloads of a landing.  Not every device can write to memory that
 * was pinned after it was allocated.
 *
 * The buffer is taken with the first checksum and given back with the table: the pool it comes from
 * would else keep far more than it from torch.
 *
 * Invariants: words of the buffer from `used` on are zero once the stream is there; `used` results
 * go to `host` on.
 * Compiled and run on stand-ins for CUDA, not on a GPU. Threads: one at a time for a table.
 */
#include "cuda_device.h"

#include "kernel_index.h"

enum {
    BUFFER_BLOCKS = 16 << 10, /* 64 KiB; of more than 16 GiB results come in several copies */
    BUFFER_BYTES = BUFFER_BLOCKS * sizeof(uint32_t),
};

static int
set_to_zero(const struct cuda_table *table, const struct cuda_stay *stay, uint64_t bytes,
            struct dcp_error *err)
{
    return cuda_check(
        stay, stay->runtime->cudaMemsetAsync(table->sums.memory, 0, bytes, table->sums.stream),
        "set memory for checksums to zero", err);
}

void
cuda_sums_drop(struct cuda_table *table, const struct cuda_stay *stay)
{
    struct cuda_sums *sums = &table->sums;

    if (sums->memory != NULL && stay->runtime->cudaFreeAsync(sums->memory, sums->stream) != 0) {
        (void)stay->runtime->cudaGetLastError();
    }
    sums->memory = NULL;
    sums->used = 0;
}

static int
need_buffer(struct cuda_table *table, const struct cuda_stay *stay, struct dcp_error *err)
{
    struct cuda_sums *sums = &table->sums;
    void *memory = NULL;

    if (sums->memory != NULL) {
        return 0;
    }
    int rc = cuda_check(stay, stay->runtime->cudaMallocAsync(&memory, BUFFER_BYTES, sums->stream),
                        "allocate memory for checksums", err);
    if (rc != 0) {
        return rc;
    }
    sums->memory = memory;
    sums->is_used = true;
    rc = set_to_zero(table, stay, BUFFER_BYTES, err);
    if (rc != 0) {
        cuda_sums_drop(table, stay);
    }
    return rc;
}

int
cuda_sums_flush(struct cuda_table *table, const struct cuda_stay *stay, struct dcp_error *err)
{
    struct cuda_sums *sums = &table->sums;
    uint64_t bytes = (uint64_t)sums->used * sizeof *sums->host;

    if (sums->used == 0) {
        return 0;
    }
    int rc = cuda_copy_pieces(stay, sums->stream, sums->host, (uint64_t)(uintptr_t)sums->memory,
                              bytes, true, err);
    rc = rc == 0 ? set_to_zero(table, stay, bytes, err) : rc;
    sums->used = 0;
    if (rc != 0) {
        cuda_sums_drop(table, stay);
    }
    if (rc == DCP_E_NOMEM) { /* would mean that nothing was promised; these were */
        rc = DCP_E_IO;
        if (err != NULL) {
            err->code = rc;
        }
    }
    return rc;
}

/* As many blocks of a range as the buffer has room for. */
static int
put(struct cuda_table *table, const struct cuda_stay *stay, uint64_t device, uint64_t bytes,
    uint32_t *crcs, uint32_t *ret_blocks, struct dcp_error *err)
{
    struct cuda_sums *sums = &table->sums;
    int rc = 0;

    if (sums->used == BUFFER_BLOCKS || (sums->used > 0 && sums->host + sums->used != crcs)) {
        rc = cuda_sums_flush(table, stay, err);
    }
    rc = rc == 0 ? need_buffer(table, stay, err) : rc;
    if (rc != 0) {
        return rc;
    }
    uint64_t room = BUFFER_BLOCKS - sums->used;
    uint64_t n = dcp_min_u64(bytes, room * DCP_BLOCK_BYTES);
    uint32_t blocks = (uint32_t)((n - 1) / DCP_BLOCK_BYTES + 1);
    struct dcp_kernel_checksum params = dcp_kernel_checksum_of(device, n);
    params.crcs = (uint64_t)(uintptr_t)(sums->memory + sums->used);
    rc = cuda_kernels_launch(stay, sums->stream, table->kernels.checksum,
                             blocks * DCP_KERNEL_CRC_SLICES, DCP_KERNEL_CHECKSUM_THREADS, &params,
                             "compute checksums", err);
    if (rc == 0) {
        sums->host = sums->used == 0 ? crcs : sums->host;
        sums->used += blocks;
        *ret_blocks = blocks;
    }
    return rc;
}

int
cuda_sums_checksum(void *ctx, uint64_t device, uint64_t bytes, uint32_t *crcs,
                   struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    struct cuda_stay stay;
    int rc;

    DCP_ASSERT((table->device.features & DCP_DEVICE_CHECKSUMS) != 0);
    if (bytes == 0) {
        return 0;
    }
    rc = cuda_enter(table->device.index, &stay, err);
    if (rc != 0) {
        return rc;
    }
    while (rc == 0 && bytes > 0) {
        uint32_t blocks = 0;
        rc = put(table, &stay, device, bytes, crcs, &blocks, err);
        uint64_t done = dcp_min_u64((uint64_t)blocks * DCP_BLOCK_BYTES, bytes);
        crcs += blocks;
        device += done;
        bytes -= done;
    }
    cuda_leave(&stay);
    return rc;
}

/*
 * kernels_host.h: our kernels on the host, every thread in turn.  For tests: the package itself
 * never runs them here.
 *
 * It does what kernels.cu does around the shared arithmetic, with addresses that the host can
 * follow.  A driver that stands in for CUDA calls it from its cuLaunchKernel.
 */
#ifndef DCP_KERNELS_HOST_H
#define DCP_KERNELS_HOST_H

#include <string.h>

#include "kernel_index.h"

static inline void
dcp_kernel_move_on_host(const struct dcp_kernel_move *params, uint32_t blocks, uint32_t threads,
                        bool to_packed)
{
    const struct dcp_kernel_job *jobs = (const struct dcp_kernel_job *)(uintptr_t)params->jobs;
    for (uint32_t block = 0; block < blocks; block++) {
        struct dcp_kernel_at step;
        dcp_kernel_at_item(&jobs[block], threads, &step);
        for (uint32_t thread = 0; thread < threads; thread++) {
            dcp_kernel_move_thread(&jobs[block], &step, thread, threads, to_packed);
        }
    }
}

static inline void
dcp_kernel_checksum_on_host(const struct dcp_kernel_checksum *params, uint32_t blocks,
                            uint32_t threads)
{
    uint32_t *crcs = (uint32_t *)(uintptr_t)params->crcs;
    uint32_t table[DCP_KERNEL_CRC_TABLE_LEN];

    for (uint32_t i = 0; i < DCP_KERNEL_CRC_TABLE_LEN; i++) {
        table[i] = dcp_kernel_crc_table_entry(params->powers, threads, i);
    }
    for (uint32_t block = 0; block < blocks; block++) {
        struct dcp_kernel_slice slice = dcp_kernel_crc_slice(params, block);
        uint32_t sum = 0;
        for (uint32_t thread = 0; thread < threads; thread++) {
            sum ^= dcp_kernel_crc_thread(params, table, &slice, thread, threads);
        }
        crcs[block / DCP_KERNEL_CRC_SLICES] ^= dcp_kernel_crc_of_slice(params, &slice, sum);
    }
}

/* False when there is no kernel of this name.  `params` is what cuLaunchKernel is given. */
static inline bool
dcp_kernel_run_on_host(const char *name, uint32_t grid, uint32_t block, void **params)
{
    if (strcmp(name, DCP_KERNEL_PACK) == 0 || strcmp(name, DCP_KERNEL_UNPACK) == 0) {
        bool to_packed = strcmp(name, DCP_KERNEL_PACK) == 0;
        dcp_kernel_move_on_host((const struct dcp_kernel_move *)params[0], grid, block, to_packed);
        return true;
    }
    if (strcmp(name, DCP_KERNEL_CHECKSUM) == 0) {
        dcp_kernel_checksum_on_host((const struct dcp_kernel_checksum *)params[0], grid, block);
        return true;
    }
    return false;
}

#endif

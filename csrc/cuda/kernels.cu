/*
 * kernels.cu: the kernels: gather and scatter of strided boxes, CRC32 of blocks.
 *
 * What a thread does is in kernel_index.h, which the host compiles and tests as well; here is only
 * what blocks share.  A job's description is read once by its block, into shared memory.  Compiled
 * to a fat binary that the driver loads (cuda_kernels.c): no part of CUDA is linked.  Compiled for
 * sm_80, sm_90 and sm_100 and not run on a GPU.
 *
 * Elements of one thread block that are far apart in memory (a transpose) are read as they lie: 32
 * bytes for one element at worst, which is still faster than the bus that the result takes.
 */
#include "kernel_index.h"

static __device__ __forceinline__ void
move_job(const struct dcp_kernel_move &params, bool to_packed)
{
    __shared__ struct dcp_kernel_job job;
    __shared__ struct dcp_kernel_at step;
    const uint64_t *from =
        (const uint64_t *)((const struct dcp_kernel_job *)(uintptr_t)params.jobs + blockIdx.x);

    static_assert(sizeof job % 8 == 0 && sizeof job / 8 <= DCP_KERNEL_MOVE_THREADS,
                  "one word each");
    if (threadIdx.x < sizeof job / 8) {
        ((uint64_t *)&job)[threadIdx.x] = from[threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        dcp_kernel_at_item(&job, blockDim.x, &step);
    }
    __syncthreads();
    dcp_kernel_move_thread(&job, &step, threadIdx.x, blockDim.x, to_packed);
}

extern "C" __global__ void
__launch_bounds__(DCP_KERNEL_MOVE_THREADS)
    dcp_kernel_pack(const __grid_constant__ struct dcp_kernel_move params)
{
    move_job(params, true);
}

extern "C" __global__ void
__launch_bounds__(DCP_KERNEL_MOVE_THREADS)
    dcp_kernel_unpack(const __grid_constant__ struct dcp_kernel_move params)
{
    move_job(params, false);
}

extern "C" __global__ void
__launch_bounds__(DCP_KERNEL_CHECKSUM_THREADS)
    dcp_kernel_checksum(const __grid_constant__ struct dcp_kernel_checksum params)
{
    __shared__ uint32_t table[DCP_KERNEL_CRC_TABLE_LEN];
    __shared__ uint32_t sum;
    const struct dcp_kernel_slice slice = dcp_kernel_crc_slice(&params, blockIdx.x);

    if (slice.bytes == 0) {
        return;
    }
    for (uint32_t i = threadIdx.x; i < DCP_KERNEL_CRC_TABLE_LEN; i += blockDim.x) {
        table[i] = dcp_kernel_crc_table_entry(params.powers, blockDim.x, i);
    }
    if (threadIdx.x == 0) {
        sum = 0;
    }
    __syncthreads();
    atomicXor(&sum, dcp_kernel_crc_thread(&params, table, &slice, threadIdx.x, blockDim.x));
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *crcs = (uint32_t *)(uintptr_t)params.crcs;
        atomicXor(crcs + blockIdx.x / DCP_KERNEL_CRC_SLICES,
                  dcp_kernel_crc_of_slice(&params, &slice, sum));
    }
}

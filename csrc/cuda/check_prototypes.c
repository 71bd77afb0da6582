/*
 * check_prototypes.c: our own prototypes of CUDA's and NCCL's functions against their headers.
 *
 * Compiled where the headers are present, never linked.  Every line of the lists in cuda_api.h has
 * to be compatible with the real declaration, every value with the real enumerator, every struct
 * with the real layout: a header of another release that differs stops the build here and not a
 * training job.  The lists are compared type by type; our structs stand for the real ones, so in
 * the lists of cuFile the real names are put in their place first.
 */
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda_api.h"

#define SAME_TYPE(result, name, parameters)                                                        \
    _Static_assert(__builtin_types_compatible_p(__typeof__(&name), result(*) parameters),          \
                   #name " is declared otherwise");
#define SAME_VALUE(ours, theirs)                                                                   \
    _Static_assert((unsigned int)(ours) == (unsigned int)(theirs), #theirs " has another value")

CUDART_FUNCTIONS(SAME_TYPE)
CUDA_DRIVER_FUNCTIONS(SAME_TYPE)

SAME_VALUE(DCP_CUDA_ERROR_OUT_OF_MEMORY, cudaErrorMemoryAllocation);
SAME_VALUE(DCP_CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(DCP_CUDA_ERROR_NOT_READY, cudaErrorNotReady);
SAME_VALUE(DCP_CUDA_ERROR_HOST_MEMORY_REGISTERED, cudaErrorHostMemoryAlreadyRegistered);
SAME_VALUE(DCP_CUDA_ERROR_CAPTURE_IMPLICIT, cudaErrorStreamCaptureImplicit);
SAME_VALUE(DCP_CUDA_STREAM_NON_BLOCKING, cudaStreamNonBlocking);
SAME_VALUE(DCP_CUDA_EVENT_NO_TIMING, cudaEventDisableTiming);
SAME_VALUE(DCP_CUDA_COPY_HOST_TO_DEVICE, cudaMemcpyHostToDevice);
SAME_VALUE(DCP_CUDA_COPY_DEVICE_TO_HOST, cudaMemcpyDeviceToHost);
SAME_VALUE(DCP_CUDA_HOST_PORTABLE, cudaHostRegisterPortable);
SAME_VALUE(DCP_CUDA_HOST_PORTABLE, cudaHostAllocPortable);
SAME_VALUE(DCP_CUDA_HOST_MAPPED, cudaHostAllocMapped);
SAME_VALUE(DCP_CUDA_CAPTURE_NONE, cudaStreamCaptureStatusNone);
SAME_VALUE(DCP_CUDA_CAPTURE_RELAXED, cudaStreamCaptureModeRelaxed);
SAME_VALUE(DCP_CUDA_ATTRIBUTE_MEMORY_POOLS, cudaDevAttrMemoryPoolsSupported);
SAME_VALUE(0, cudaSuccess);
SAME_VALUE(0, CUDA_SUCCESS);

#if __has_include(<cufile.h>)
#include <cufile.h>

SAME_VALUE(DCP_CUFILE_HANDLE_FD, CU_FILE_HANDLE_TYPE_OPAQUE_FD);
SAME_VALUE(DCP_CUFILE_ALREADY_OPEN, CU_FILE_DRIVER_ALREADY_OPEN);
SAME_VALUE(0, CU_FILE_SUCCESS);
_Static_assert(sizeof(struct cufile_status) == sizeof(CUfileError_t) &&
                   offsetof(struct cufile_status, error) == offsetof(CUfileError_t, err) &&
                   offsetof(struct cufile_status, driver) == offsetof(CUfileError_t, cu_err),
               "CUfileError_t is laid out otherwise");
_Static_assert(sizeof(struct cufile_description) == sizeof(CUfileDescr_t) &&
                   offsetof(struct cufile_description, type) == offsetof(CUfileDescr_t, type) &&
                   offsetof(struct cufile_description, handle) == offsetof(CUfileDescr_t, handle) &&
                   offsetof(struct cufile_description, operations) ==
                       offsetof(CUfileDescr_t, fs_ops),
               "CUfileDescr_t is laid out otherwise");

#define cufile_status CUfileError_t
#define cufile_description CUfileDescr_t
CUFILE_FUNCTIONS(SAME_TYPE)
#endif

#if __has_include(<nccl.h>)
#include <nccl.h>

#include "nccl_api.h"

#define SAME_FIELD(ours, theirs)                                                                   \
    _Static_assert(offsetof(struct nccl_config, ours) == offsetof(ncclConfig_t, theirs),           \
                   "ncclConfig_t." #theirs " lies elsewhere")

SAME_VALUE(0, ncclSuccess);
SAME_VALUE(DCP_NCCL_IN_PROGRESS, ncclInProgress);
SAME_VALUE(DCP_NCCL_MIN, ncclMin);
SAME_VALUE(DCP_NCCL_UINT8, ncclUint8);
SAME_VALUE(DCP_NCCL_INT64, ncclInt64);
SAME_VALUE(DCP_NCCL_CONFIG_UNSET, NCCL_CONFIG_UNDEF_INT);
SAME_VALUE(DCP_NCCL_CONFIG_VERSION, NCCL_VERSION(2, 18, 0));
_Static_assert(NCCL_VERSION_CODE >= DCP_NCCL_CONFIG_VERSION, "NCCL 2.18 or newer is needed here");
SAME_FIELD(size, size);
SAME_FIELD(magic, magic);
SAME_FIELD(version, version);
SAME_FIELD(blocking, blocking);
SAME_FIELD(cga_cluster_size, cgaClusterSize);
SAME_FIELD(min_ctas, minCTAs);
SAME_FIELD(max_ctas, maxCTAs);
SAME_FIELD(net_name, netName);
SAME_FIELD(split_share, splitShare);
SAME_VALUE(DCP_NCCL_CONFIG_MAGIC, NCCL_API_MAGIC);

#define nccl_config ncclConfig_t
NCCL_FUNCTIONS(SAME_TYPE)
NCCL_NEWER_FUNCTIONS(SAME_TYPE)
#endif

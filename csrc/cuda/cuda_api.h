/*
 * cuda_api.h: the functions of CUDA's runtime and driver and of cuFile that we call, as tables.
 *
 * No header of CUDA is needed to compile this and none of its libraries to link or to load it: one
 * binary serves builds of torch with and without CUDA.  A table is filled by dlsym from the library
 * that torch has loaded into the process already, once, all or nothing; ours is therefore the
 * runtime that torch's streams and memory belong to.  Nothing here creates a context.
 *
 * The prototypes are our own, in one list for each library.  Where the real headers are present a
 * build compares every line with them (check_prototypes.c).  Enumerations of CUDA are `unsigned
 * int` to the ABI, and are that here.
 *
 * Threads: any.
 */
#ifndef DCP_CUDA_API_H
#define DCP_CUDA_API_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "dcp_error.h"

typedef unsigned int cuda_status; /* enum cudaError, enum CUresult: 0 is success */
typedef struct CUstream_st *cuda_stream;
typedef struct CUevent_st *cuda_event;
typedef struct CUctx_st *cuda_context;
typedef struct CUmod_st *cuda_module;
typedef struct CUfunc_st *cuda_function;
typedef unsigned int cuda_enum;

/* Values of CUDA's enumerations and flags, checked like the prototypes. */
enum {
    DCP_CUDA_ERROR_OUT_OF_MEMORY = 2,
    DCP_CUDA_ERROR_NOT_READY = 600,
    DCP_CUDA_ERROR_HOST_MEMORY_REGISTERED = 712,
    DCP_CUDA_ERROR_CAPTURE_IMPLICIT = 906,
    DCP_CUDA_STREAM_NON_BLOCKING = 1,
    DCP_CUDA_EVENT_NO_TIMING = 2,
    DCP_CUDA_COPY_HOST_TO_DEVICE = 1,
    DCP_CUDA_COPY_DEVICE_TO_HOST = 2,
    DCP_CUDA_HOST_PORTABLE = 1, /* of cudaHostRegister and cudaHostAlloc alike */
    DCP_CUDA_HOST_MAPPED = 2,
    DCP_CUDA_CAPTURE_NONE = 0,    /* enum cudaStreamCaptureStatus */
    DCP_CUDA_CAPTURE_RELAXED = 2, /* enum cudaStreamCaptureMode */
    DCP_CUDA_ATTRIBUTE_MEMORY_POOLS = 115,
    DCP_CUFILE_HANDLE_FD = 1,
    DCP_CUFILE_ALREADY_OPEN = 5026,
};

/* X(result, name, parameters), of the runtime. */
#define CUDART_FUNCTIONS(X)                                                                        \
    X(const char *, cudaGetErrorString, (cuda_status status))                                      \
    X(cuda_status, cudaGetLastError, (void))                                                       \
    X(cuda_status, cudaDeviceGetAttribute, (int *value, cuda_enum attribute, int device))          \
    X(cuda_status, cudaStreamCreateWithFlags, (cuda_stream * stream, unsigned int flags))          \
    X(cuda_status, cudaStreamDestroy, (cuda_stream stream))                                        \
    X(cuda_status, cudaStreamQuery, (cuda_stream stream))                                          \
    X(cuda_status, cudaStreamWaitEvent,                                                            \
      (cuda_stream stream, cuda_event event, unsigned int flags))                                  \
    X(cuda_status, cudaStreamIsCapturing, (cuda_stream stream, cuda_enum * status))                \
    X(cuda_status, cudaThreadExchangeStreamCaptureMode, (cuda_enum * mode))                        \
    X(cuda_status, cudaEventCreateWithFlags, (cuda_event * event, unsigned int flags))             \
    X(cuda_status, cudaEventRecord, (cuda_event event, cuda_stream stream))                        \
    X(cuda_status, cudaEventQuery, (cuda_event event))                                             \
    X(cuda_status, cudaEventDestroy, (cuda_event event))                                           \
    X(cuda_status, cudaMemcpyAsync,                                                                \
      (void *to, const void *from, size_t bytes, cuda_enum kind, cuda_stream stream))              \
    X(cuda_status, cudaMemcpy2DAsync,                                                              \
      (void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,               \
       size_t height, cuda_enum kind, cuda_stream stream))                                         \
    X(cuda_status, cudaMemsetAsync, (void *memory, int value, size_t bytes, cuda_stream stream))   \
    X(cuda_status, cudaMallocAsync, (void **memory, size_t bytes, cuda_stream stream))             \
    X(cuda_status, cudaFreeAsync, (void *memory, cuda_stream stream))                              \
    X(cuda_status, cudaHostAlloc, (void **memory, size_t bytes, unsigned int flags))               \
    X(cuda_status, cudaFreeHost, (void *memory))                                                   \
    X(cuda_status, cudaHostRegister, (void *memory, size_t bytes, unsigned int flags))             \
    X(cuda_status, cudaHostUnregister, (void *memory))

/* Of the driver: contexts, because cudaSetDevice of the device that a thread had before would
 * create a context there (cuda_context.h), and modules. */
#define CUDA_DRIVER_FUNCTIONS(X)                                                                   \
    X(cuda_status, cuDeviceGet, (int *device, int ordinal))                                        \
    X(cuda_status, cuDevicePrimaryCtxRetain, (cuda_context * context, int device))                 \
    X(cuda_status, cuCtxPushCurrent_v2, (cuda_context context))                                    \
    X(cuda_status, cuCtxPopCurrent_v2, (cuda_context * context))                                   \
    X(cuda_status, cuGetErrorString, (cuda_status status, const char **text))                      \
    X(cuda_status, cuModuleLoadData, (cuda_module * module, const void *image))                    \
    X(cuda_status, cuModuleGetFunction,                                                            \
      (cuda_function * function, cuda_module module, const char *name))                            \
    X(cuda_status, cuLaunchKernel,                                                                 \
      (cuda_function function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,      \
       unsigned int block_x, unsigned int block_y, unsigned int block_z,                           \
       unsigned int shared_bytes, cuda_stream stream, void **params, void **extra))

struct cufile_status {
    cuda_status error, driver;
};

struct cufile_description {
    cuda_enum type;
    union {
        int fd;
        void *handle;
    } handle;
    const void *operations;
};

typedef struct cufile_status cufile_status;
typedef struct cufile_description cufile_description;

/* Of cuFile. */
#define CUFILE_FUNCTIONS(X)                                                                        \
    X(cufile_status, cuFileDriverOpen, (void))                                                     \
    X(cufile_status, cuFileHandleRegister, (void **handle, cufile_description *description))       \
    X(void, cuFileHandleDeregister, (void *handle))                                                \
    X(ssize_t, cuFileRead,                                                                         \
      (void *handle, void *memory, size_t bytes, off_t file_offset, off_t memory_offset))

#define CUDA_API_FIELD(result, name, parameters) result(*name) parameters;

struct cudart_api {
    CUDART_FUNCTIONS(CUDA_API_FIELD)
};

struct cuda_driver_api {
    CUDA_DRIVER_FUNCTIONS(CUDA_API_FIELD)
};

struct cufile_api {
    CUFILE_FUNCTIONS(CUDA_API_FIELD)
};

#undef CUDA_API_FIELD

/* NULL while the library is not in this process, or lacks one of the functions. */
const struct cudart_api *cudart_api(void);
const struct cuda_driver_api *cuda_driver_api(void);
/* Loads the library when torch has not: for those who asked for direct storage. */
const struct cufile_api *cufile_api(void);

/* Tests: these instead of what the process has; NULL gives up the choice.  Not beside other
 * calls. */
void cuda_api_replace(const struct cudart_api *cudart, const struct cuda_driver_api *driver,
                      const struct cufile_api *cufile);

#endif

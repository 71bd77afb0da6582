/*
 * fake_cudart.c: libcudart.so.13 for tests: the functions that torch 2.14 and this package call,
 * over fake_gpu.h.
 *
 * Streams and events are in fake_cudart_stream.c.
 *
 * Preloaded, it is found under the real soname, so that nothing is patched.  What torch links to
 * and no test needs (graphs, memory pools, kernels, ...) is in fake_cudart_absent.c and answers
 * "not supported".  Prototypes are written out here, since the headers of the toolkit may be
 * absent.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cudart.h"

#define VERSION 13000
#define COPY_DEFAULT 4

static __thread int last_error;

/* What every function ends with: the runtime remembers the last error of a thread. */
int
fake_done(int code)
{
    if (code != FAKE_OK) {
        last_error = code;
    }
    return code;
}

int
fake_refuse(const char *name)
{
    return fake_done(fake_absent(name));
}

/* ---- errors, versions ---- */

int
cudaGetLastError(void)
{
    int code = last_error;

    last_error = FAKE_OK;
    return code;
}

int
cudaPeekAtLastError(void)
{
    return last_error;
}

const char *
cudaGetErrorString(int code)
{
    return fake_error_text(code);
}

const char *
cudaGetErrorName(int code)
{
    return fake_error_name(code);
}

int
cudaDriverGetVersion(int *version)
{
    ENTER();
    *version = VERSION;
    return FAKE_OK;
}

int
cudaRuntimeGetVersion(int *version)
{
    ENTER();
    *version = VERSION;
    return FAKE_OK;
}

/* ---- devices ---- */

int
cudaGetDeviceCount(int *count)
{
    ENTER();
    *count = fake_device_count();
    return fake_done(*count > 0 ? FAKE_OK : 100); /* cudaErrorNoDevice */
}

int
cudaGetDevice(int *device)
{
    ENTER();
    *device = *fake_current_device();
    return FAKE_OK;
}

/* As of CUDA 12 this creates the device's context. */
int
cudaSetDevice(int device)
{
    int code;

    ENTER();
    code = fake_context(device);
    if (code == FAKE_OK) {
        *fake_current_device() = device;
    }
    return fake_done(code);
}

/* The start of cudaDeviceProp of CUDA 13, as far as torch reads it, and room for the rest. */
struct properties {
    char name[256];
    char uuid[16], luid[8];
    unsigned luid_mask;
    size_t memory_bytes, shared_bytes;
    int registers, warp;
    size_t pitch;
    int threads, threads_dim[3], grid[3];
    size_t constant_bytes;
    int major, minor;
    size_t texture[2];
    int multiprocessors;
    char rest[2048];
};

int
cudaGetDeviceProperties(void *ret, int device)
{
    struct properties made = {.name = "Fake GPU of dcp_native's tests"};
    size_t bytes = 1008; /* sizeof(cudaDeviceProp), the last 56 ints of it reserved */

    ENTER();
    if (device < 0 || device >= fake_device_count()) {
        return fake_done(FAKE_INVALID_DEVICE);
    }
    made.uuid[0] = (char)(device + 1);
    made.memory_bytes = fake_device_bytes();
    made.shared_bytes = 48 << 10;
    made.registers = 65536;
    made.warp = 32;
    made.threads = 1024;
    made.major = 9;
    made.multiprocessors = 4;
    memcpy(ret, &made, bytes);
    return FAKE_OK;
}

int
cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    ENTER();
    (void)device;
    *value = fake_attribute(attribute);
    return FAKE_OK;
}

int
cudaDeviceGetPCIBusId(char *id, int bytes, int device)
{
    ENTER();
    (void)snprintf(id, (size_t)bytes, "0000:%02x:00.0", device + 1);
    return FAKE_OK;
}

int
cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    ENTER();
    *can = device != peer;
    return FAKE_OK;
}

int
cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
    ENTER();
    (void)peer;
    (void)flags;
    return FAKE_OK;
}

int
cudaDeviceSynchronize(void)
{
    ENTER_CONTEXT();
    return fake_done(fake_device_wait(*fake_current_device()));
}

int
cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    ENTER_CONTEXT();
    *least = 0;
    *greatest = -5;
    return FAKE_OK;
}

int
cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    ENTER_CONTEXT();
    *total_bytes = fake_device_bytes();
    *free_bytes = *total_bytes - fake_device_used_bytes(*fake_current_device());
    return FAKE_OK;
}

/* ---- memory ---- */

int
cudaMalloc(void **memory, size_t bytes)
{
    ENTER_CONTEXT();
    return fake_done(fake_allocate(*fake_current_device(), bytes, memory));
}

int
cudaFree(void *memory)
{
    ENTER_CONTEXT();
    return fake_done(fake_free(memory, FAKE_MEMORY_DEVICE));
}

int
cudaMallocAsync(void **memory, size_t bytes, void *stream)
{
    struct fake_stream *on;
    int code;

    ENTER();
    code = fake_stream_find(stream, &on);
    return fake_done(code != FAKE_OK ? code : fake_allocate(fake_stream_device(on), bytes, memory));
}

static void
free_now(void *memory)
{
    (void)fake_forget(*(void **)memory, FAKE_MEMORY_DEVICE);
}

int
cudaFreeAsync(void *memory, void *stream)
{
    struct fake_stream *on;
    int code;

    ENTER();
    code = fake_stream_find(stream, &on);
    return fake_done(code != FAKE_OK ? code : fake_call(on, free_now, &memory, sizeof(memory)));
}

int
cudaHostAlloc(void **memory, size_t bytes, unsigned flags)
{
    ENTER_CONTEXT();
    (void)flags;
    return fake_done(fake_allocate_pinned(bytes, memory));
}

int
cudaMallocHost(void **memory, size_t bytes)
{
    ENTER_CONTEXT();
    return fake_done(fake_allocate_pinned(bytes, memory));
}

int
cudaFreeHost(void *memory)
{
    ENTER();
    return fake_done(fake_free(memory, FAKE_MEMORY_PINNED));
}

int
cudaHostRegister(void *memory, size_t bytes, unsigned flags)
{
    ENTER_CONTEXT();
    (void)flags;
    return fake_done(fake_pin(memory, bytes));
}

int
cudaHostUnregister(void *memory)
{
    ENTER();
    return fake_done(fake_unpin(memory));
}

int
cudaHostGetDevicePointer(void **device, void *host, unsigned flags)
{
    struct fake_range range;

    ENTER_CONTEXT();
    (void)flags;
    if (!fake_range_of(host, &range) || range.kind != FAKE_MEMORY_PINNED) {
        return fake_done(FAKE_INVALID_VALUE);
    }
    *device = host;
    return FAKE_OK;
}

struct attributes {
    int type, device;
    void *device_pointer, *host_pointer;
    long reserved[8];
};

int
cudaPointerGetAttributes(struct attributes *ret, const void *address)
{
    struct fake_range range = {0};

    ENTER_CONTEXT();
    (void)fake_range_of(address, &range);
    memset(ret, 0, sizeof(*ret));
    ret->type = (int)range.kind;
    ret->device = range.kind == FAKE_MEMORY_UNKNOWN ? -2 : range.device;
    ret->device_pointer = range.kind == FAKE_MEMORY_UNKNOWN ? NULL : (void *)address;
    ret->host_pointer = range.kind == FAKE_MEMORY_DEVICE ? NULL : (void *)address;
    return FAKE_OK;
}

/* ---- copies ---- */

int
cudaMemcpyAsync(void *dst, const void *src, size_t bytes, int kind, void *handle)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    (void)kind;
    code = fake_stream_find(handle, &stream);
    return fake_done(code != FAKE_OK ? code : fake_copy(dst, src, bytes, stream));
}

/* Each row is work of its own, which nobody who waits for all of them can tell. */
int
cudaMemcpy2DAsync(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width,
                  size_t height, int kind, void *handle)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    (void)kind;
    code = fake_stream_find(handle, &stream);
    if (code == FAKE_OK && (width > dst_pitch || width > src_pitch)) {
        code = FAKE_INVALID_VALUE;
    }
    for (size_t row = 0; code == FAKE_OK && row < height; row++) {
        code = fake_copy((char *)dst + row * dst_pitch, (const char *)src + row * src_pitch, width,
                         stream);
    }
    return fake_done(code);
}

int
cudaMemcpyPeerAsync(void *dst, int dst_device, const void *src, int src_device, size_t bytes,
                    void *handle)
{
    (void)dst_device;
    (void)src_device;
    return cudaMemcpyAsync(dst, src, bytes, COPY_DEFAULT, handle);
}

int
cudaMemcpy(void *dst, const void *src, size_t bytes, int kind)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    (void)kind;
    code = fake_stream_find(NULL, &stream);
    code = code != FAKE_OK ? code : fake_copy(dst, src, bytes, stream);
    return fake_done(code != FAKE_OK ? code : fake_stream_wait(stream));
}

int
cudaMemsetAsync(void *dst, int value, size_t bytes, void *handle)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    code = fake_stream_find(handle, &stream);
    return fake_done(code != FAKE_OK ? code : fake_fill(dst, value, bytes, stream));
}

int
cudaMemset(void *dst, int value, size_t bytes)
{
    return cudaMemsetAsync(dst, value, bytes, NULL);
}

/* ---- the driver's functions ---- */

int
cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                 unsigned long long flags, int *status)
{
    ENTER();
    (void)version;
    (void)flags;
    *function = fake_driver_function(symbol);
    if (status != NULL) {
        *status = *function != NULL ? 0 : 1; /* found, symbol not found */
    }
    return FAKE_OK;
}

int
cudaGetDriverEntryPoint(const char *symbol, void **function, unsigned long long flags, int *status)
{
    return cudaGetDriverEntryPointByVersion(symbol, function, VERSION, flags, status);
}

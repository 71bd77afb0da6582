/*
 * fake_cuda.c: libcuda.so.1 for tests: the driver functions that torch 2.14, the fake runtime and
 * this package call, over fake_gpu.h.
 *
 * A context is its device: the handle of device i is `contexts + i`.
 */
#include "fake_cuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_gpu.h"
#include "kernels_host.h"

#define BELOW_MAX 16

static char contexts[DCP_FAKE_DEVICES];
static char absent_text[256] = "operation not supported";
static __thread int below[BELOW_MAX];
static __thread int below_count;

void
fake_host_call_run(void *data)
{
    const struct fake_host_call *call = data;

    call->fn(call->arg);
}

int
fake_absent(const char *name)
{
    (void)snprintf(absent_text, sizeof(absent_text), "the fake CUDA of the tests cannot do %s",
                   name);
    (void)fprintf(stderr, "%s\n", absent_text);
    return FAKE_NOT_SUPPORTED;
}

static const struct {
    int code;
    const char *name, *text;
} errors[] = {
    {FAKE_OK, "cudaSuccess", "no error"},
    {FAKE_INVALID_VALUE, "cudaErrorInvalidValue", "invalid argument"},
    {FAKE_NO_MEMORY, "cudaErrorMemoryAllocation", "out of memory"},
    {FAKE_FORKED, "cudaErrorInitializationError", "initialization error"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {FAKE_INVALID_DEVICE, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {FAKE_INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {FAKE_NOT_FOUND, "cudaErrorSymbolNotFound", "named symbol not found"},
    {FAKE_NOT_READY, "cudaErrorNotReady", "device not ready"},
    {FAKE_ILLEGAL_ADDRESS, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {FAKE_ALREADY_PINNED, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {FAKE_NOT_PINNED, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {FAKE_NOT_SUPPORTED, "cudaErrorNotSupported", absent_text},
    {FAKE_CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
};

const char *
fake_error_text(int code)
{
    for (size_t i = 0; i < sizeof(errors) / sizeof(*errors); i++) {
        if (errors[i].code == code) {
            return errors[i].text;
        }
    }
    return "an error that the fake CUDA has no text for";
}

const char *
fake_error_name(int code)
{
    for (size_t i = 0; i < sizeof(errors) / sizeof(*errors); i++) {
        if (errors[i].code == code) {
            return errors[i].name;
        }
    }
    return "cudaErrorUnknown";
}

int
fake_attribute(int attribute)
{
    switch (attribute) {
    case 1: /* threads of a block */
        return 1024;
    case 10: /* threads of a warp */
        return 32;
    case 16: /* multiprocessors */
        return 4;
    case 75: /* compute capability */
        return 9;
    case 41:  /* unified addressing */
    case 115: /* memory pools */
    case 99:  /* memory of the host can be registered */
        return 1;
    default:
        return 0;
    }
}

/* ---- the driver ---- */

#define ENTER()                                                                                    \
    do {                                                                                           \
        int code_ = fake_enter(__func__);                                                          \
        if (code_ != FAKE_OK) {                                                                    \
            return code_;                                                                          \
        }                                                                                          \
    } while (0)

int
cuInit(unsigned flags)
{
    ENTER();
    (void)flags;
    return FAKE_OK;
}

int
cuDriverGetVersion(int *version)
{
    ENTER();
    *version = 13000;
    return FAKE_OK;
}

int
cuDeviceGet(int *device, int index)
{
    ENTER();
    *device = index;
    return index >= 0 && index < fake_device_count() ? FAKE_OK : FAKE_INVALID_DEVICE;
}

int
cuDeviceGetCount(int *count)
{
    ENTER();
    *count = fake_device_count();
    return FAKE_OK;
}

int
cuDeviceGetAttribute(int *value, int attribute, int device)
{
    ENTER();
    (void)device;
    *value = fake_attribute(attribute);
    return FAKE_OK;
}

int
cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    ENTER();
    *flags = 0;
    *active = fake_has_context(device);
    return FAKE_OK;
}

int
cuDevicePrimaryCtxRetain(void **context, int device)
{
    int code;

    ENTER();
    code = fake_context(device);
    if (code == FAKE_OK) {
        *context = &contexts[device];
    }
    return code;
}

int
cuDevicePrimaryCtxRelease_v2(int device)
{
    ENTER();
    (void)device;
    return FAKE_OK;
}

/* The runtime's current device and the driver's current context are one thing: what lies below it
 * on the driver's stack is kept here. */
int
cuCtxGetCurrent(void **context)
{
    int device = *fake_current_device();

    ENTER();
    *context = fake_has_context(device) ? &contexts[device] : NULL;
    return FAKE_OK;
}

int
cuCtxSetCurrent(void *context)
{
    ENTER();
    if (context != NULL) {
        *fake_current_device() = (int)((char *)context - contexts);
    }
    return FAKE_OK;
}

int
cuCtxPushCurrent_v2(void *context)
{
    ENTER();
    if (context == NULL || below_count == BELOW_MAX) {
        return FAKE_INVALID_VALUE;
    }
    below[below_count++] = *fake_current_device();
    *fake_current_device() = (int)((char *)context - contexts);
    return FAKE_OK;
}

int
cuCtxPopCurrent_v2(void **context)
{
    ENTER();
    if (below_count == 0) {
        return FAKE_INVALID_VALUE;
    }
    if (context != NULL) {
        *context = &contexts[*fake_current_device()];
    }
    *fake_current_device() = below[--below_count];
    return FAKE_OK;
}

int
cuCtxGetDevice(int *device)
{
    ENTER();
    *device = *fake_current_device();
    return FAKE_OK;
}

int
cuPointerGetAttribute(void *data, int attribute, uint64_t address)
{
    struct fake_range range;

    ENTER();
    if (!fake_range_of((const void *)(uintptr_t)address, &range)) {
        return FAKE_INVALID_VALUE;
    }
    switch (attribute) {
    case 1: /* context */
        *(void **)data = &contexts[range.device];
        return FAKE_OK;
    case 2: /* memory type: 1 of the host, 2 of the device */
        *(unsigned *)data = (unsigned)range.kind;
        return FAKE_OK;
    case 9: /* device */
        *(int *)data = range.device;
        return FAKE_OK;
    default:
        return FAKE_NOT_SUPPORTED;
    }
}

int
cuMemGetAddressRange_v2(uint64_t *start, size_t *bytes, uint64_t address)
{
    struct fake_range range;

    ENTER();
    if (!fake_range_of((const void *)(uintptr_t)address, &range)) {
        return FAKE_INVALID_VALUE;
    }
    *start = range.start;
    *bytes = range.bytes;
    return FAKE_OK;
}

int
cuGetErrorString(int code, const char **text)
{
    *text = fake_error_text(code);
    return FAKE_OK;
}

int
cuGetErrorName(int code, const char **name)
{
    *name = fake_error_name(code);
    return FAKE_OK;
}

/* torch asks to be told of log lines; there are none. */
int
cuLogsRegisterCallback(void *callback, void *data, void **handle)
{
    ENTER();
    (void)callback;
    (void)data;
    *handle = contexts;
    return FAKE_OK;
}

int
cuLogsUnregisterCallback(void *handle)
{
    ENTER();
    (void)handle;
    return FAKE_OK;
}

/* ---- our kernels, run by the thread of their stream on the host ---- */

struct launch {
    char name[64];
    unsigned grid, block;
    union {
        struct dcp_kernel_move move;
        struct dcp_kernel_checksum checksum;
    } params;
};

static char module;
static const char *const kernel_names[] = {DCP_KERNEL_PACK, DCP_KERNEL_UNPACK, DCP_KERNEL_CHECKSUM};

/* Any image will do: the code that runs is the host's. */
int
cuModuleLoadData(void **ret_module, const void *image)
{
    int code;

    ENTER();
    code = fake_context(*fake_current_device());
    if (code != FAKE_OK || image == NULL) {
        return code != FAKE_OK ? code : FAKE_INVALID_VALUE;
    }
    *ret_module = &module;
    return FAKE_OK;
}

int
cuModuleUnload(void *handle)
{
    ENTER();
    return handle == &module ? FAKE_OK : FAKE_INVALID_HANDLE;
}

int
cuModuleGetFunction(const void **function, void *handle, const char *name)
{
    ENTER();
    (void)handle;
    for (size_t i = 0; i < sizeof(kernel_names) / sizeof(*kernel_names); i++) {
        if (strcmp(kernel_names[i], name) == 0) {
            *function = kernel_names[i];
            return FAKE_OK;
        }
    }
    return FAKE_NOT_FOUND;
}

static void
run_launch(void *data)
{
    struct launch *launch = data;
    void *params[] = {&launch->params};

    if (!dcp_kernel_run_on_host(launch->name, launch->grid, launch->block, params)) {
        abort(); /* cuModuleGetFunction gave no such name */
    }
}

int
cuLaunchKernel(const void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
               unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
               void *handle, void **params, void **extra)
{
    struct launch launch = {.grid = grid_x, .block = block_x};
    struct fake_stream *stream;
    int code;

    ENTER();
    (void)shared_bytes;
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || grid_x == 0 || block_x == 0 ||
        block_x > 1024 || extra != NULL) {
        return FAKE_INVALID_VALUE;
    }
    code = fake_stream_find(handle, &stream);
    if (code != FAKE_OK) {
        return code;
    }
    if (fake_stream_device(stream) != *fake_current_device()) {
        return FAKE_INVALID_HANDLE; /* as the driver has it: the stream is of the current context */
    }
    (void)snprintf(launch.name, sizeof(launch.name), "%s", (const char *)function);
    if (strcmp(launch.name, DCP_KERNEL_CHECKSUM) == 0) {
        memcpy(&launch.params, params[0], sizeof(launch.params.checksum));
    } else {
        memcpy(&launch.params, params[0], sizeof(launch.params.move));
    }
    fake_count("kernels", 1);
    return fake_call(stream, run_launch, &launch, sizeof(launch));
}

/* ---- finding functions ---- */

static int
absent_function(void)
{
    return fake_absent("a driver function that it has not");
}

void *
fake_driver_function(const char *name)
{
    char versioned[80];
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), *found = NULL;

    if (strncmp(name, "cu", 2) != 0 || self == NULL) {
        return NULL;
    }
    (void)snprintf(versioned, sizeof(versioned), "%s_v2", name);
    found = dlsym(self, versioned);
    found = found != NULL ? found : dlsym(self, name);
    return found != NULL ? found : (void *)absent_function;
}

int
cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status)
{
    ENTER();
    (void)version;
    (void)flags;
    *function = strcmp(symbol, "cuGetProcAddress") == 0 ? (void *)cuGetProcAddress_v2
                                                        : fake_driver_function(symbol);
    if (status != NULL) {
        *status = *function != NULL ? 0 : 1;
    }
    return *function != NULL ? FAKE_OK : FAKE_NOT_FOUND;
}

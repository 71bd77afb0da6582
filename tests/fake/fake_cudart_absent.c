/*
 * fake_cudart_absent.c: what torch 2.14 links to in libcudart.so.13 and the fake does not do: it
 * says which function or which kernel was asked for and answers "not supported", which torch turns
 * into a RuntimeError.
 *
 * The names of kernels are kept from their registration, so that a test that makes torch launch
 * one (a contiguous() of a strided tensor, say) is told which.  The kernel that fills a dense
 * tensor is run, by the thread of its stream on the host: the barrier of an NCCL group needs it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cudart.h"

#define ABSENT(name)                                                                               \
    int name(void);                                                                                \
    int name(void)                                                                                 \
    {                                                                                              \
        return fake_refuse(#name);                                                                 \
    }

ABSENT(cudaDeviceGetDefaultMemPool)
ABSENT(cudaDeviceGetGraphMemAttribute)
ABSENT(cudaDeviceSetGraphMemAttribute)
ABSENT(cudaFuncSetAttribute)
ABSENT(cudaGetSymbolAddress)
ABSENT(cudaGraphAddNode)
ABSENT(cudaGraphConditionalHandleCreate)
ABSENT(cudaGraphDestroy)
ABSENT(cudaGraphExecDestroy)
ABSENT(cudaGraphGetNodes)
ABSENT(cudaGraphInstantiateWithFlags)
ABSENT(cudaGraphLaunch)
ABSENT(cudaGraphNodeGetDependencies)
ABSENT(cudaGraphRetainUserObject)
ABSENT(cudaIpcCloseMemHandle)
ABSENT(cudaIpcGetEventHandle)
ABSENT(cudaIpcGetMemHandle)
ABSENT(cudaIpcOpenEventHandle)
ABSENT(cudaIpcOpenMemHandle)
ABSENT(cudaKernelSetAttributeForDevice)
ABSENT(cudaLibraryGetKernel)
ABSENT(cudaLibraryLoadData)
ABSENT(cudaLibraryUnload)
ABSENT(cudaMemPoolGetAttribute)
ABSENT(cudaMemPoolSetAccess)
ABSENT(cudaMemPoolSetAttribute)
ABSENT(cudaMemPoolTrimTo)
ABSENT(cudaMemcpyToSymbol)
ABSENT(cudaProfilerStart)
ABSENT(cudaProfilerStop)
ABSENT(cudaStreamAddCallback)
ABSENT(cudaStreamBeginCaptureToGraph)
ABSENT(cudaStreamUpdateCaptureDependencies)
ABSENT(cudaUserObjectCreate)
ABSENT(cudaUserObjectRelease)

/* ---- kernels ---- */

struct dim3 {
    unsigned x, y, z;
};

struct kernel {
    const void *host;
    const char *name;
};

static struct kernel *kernels;
static size_t kernels_count, kernels_room;
static void *image[1];
static __thread struct {
    struct dim3 grid, block;
    size_t shared_bytes;
    void *stream;
} pushed;

void **
__cudaRegisterFatBinary(void *binary)
{
    (void)binary;
    return image;
}

void
__cudaRegisterFatBinaryEnd(void **handle)
{
    (void)handle;
}

void
__cudaUnregisterFatBinary(void **handle)
{
    (void)handle;
}

void
__cudaRegisterVar(void)
{
}

/* Called by the constructors of one library after the other. */
void
__cudaRegisterFunction(void **handle, const char *host, char *device, const char *name)
{
    (void)handle;
    (void)device;
    if (kernels_count == kernels_room) {
        kernels_room = kernels_room * 2 + 1024;
        kernels = realloc(kernels, kernels_room * sizeof(*kernels));
        if (kernels == NULL) {
            abort();
        }
    }
    kernels[kernels_count++] = (struct kernel){.host = host, .name = name};
}

static const char *
kernel_name(const void *host)
{
    for (size_t i = 0; i < kernels_count; i++) {
        if (kernels[i].host == host) {
            return kernels[i].name;
        }
    }
    return "that was never registered";
}

static int
refuse_kernel(const void *host)
{
    char what[512];

    (void)snprintf(what, sizeof(what), "the launch of the kernel %s", kernel_name(host));
    return fake_refuse(what);
}

/* vectorized_elementwise_kernel<width, FillFunctor<type>>(int count, type value, char *data) */
struct fill {
    char *data;
    int count;
    size_t item_bytes;
    char value[8];
};

static void
run_fill(void *data)
{
    const struct fill *fill = data;

    for (int i = 0; i < fill->count; i++) {
        memcpy(fill->data + (size_t)i * fill->item_bytes, fill->value, fill->item_bytes);
    }
}

/* The bytes of one item that the kernel fills with; 0: it is another kernel. */
static size_t
filled_item_bytes(const char *name)
{
    const char *type = strstr(name, "vectorized_elementwise_kernelI");
    const char *letter;

    type = type != NULL ? strstr(type, "11FillFunctorI") : NULL;
    if (type == NULL) {
        return 0;
    }
    letter = type + strlen("11FillFunctorI");
    return strchr("ahb", *letter) != NULL   ? 1
           : strchr("st", *letter) != NULL  ? 2
           : strchr("ijf", *letter) != NULL ? 4
           : strchr("lmd", *letter) != NULL ? 8
                                            : 0;
}

int
cudaLaunchKernel(const void *host, struct dim3 grid, struct dim3 block, void **args,
                 size_t shared_bytes, void *stream)
{
    struct fill fill = {.item_bytes = filled_item_bytes(kernel_name(host))};
    struct fake_stream *on;
    int code;

    (void)grid;
    (void)block;
    (void)shared_bytes;
    if (fill.item_bytes == 0) {
        return refuse_kernel(host);
    }
    fill.count = *(const int *)args[0];
    memcpy(fill.value, args[1], fill.item_bytes);
    fill.data = *(char **)args[2];
    code = fake_stream_find(stream, &on);
    return fake_done(code != FAKE_OK ? code : fake_call(on, run_fill, &fill, sizeof(fill)));
}

int
cudaLaunchCooperativeKernel(const void *host, struct dim3 grid, struct dim3 block, void **args,
                            size_t shared_bytes, void *stream)
{
    return cudaLaunchKernel(host, grid, block, args, shared_bytes, stream);
}

int
__cudaLaunchKernel(const void *kernel, struct dim3 grid, struct dim3 block, void **args,
                   size_t shared_bytes, void *stream)
{
    return cudaLaunchKernel(kernel, grid, block, args, shared_bytes, stream);
}

int
cudaLaunchKernelExC(const void *config, const void *host, void **args)
{
    (void)config;
    (void)args;
    return refuse_kernel(host);
}

int
__cudaGetKernel(const void **kernel, const void *host)
{
    *kernel = host;
    return FAKE_OK;
}

unsigned
__cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared_bytes, void *stream)
{
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared_bytes = shared_bytes;
    pushed.stream = stream;
    return 0;
}

int
__cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared_bytes,
                           void **stream)
{
    *grid = pushed.grid;
    *block = pushed.block;
    *shared_bytes = pushed.shared_bytes;
    *stream = pushed.stream;
    return FAKE_OK;
}

int
cudaFuncGetAttributes(void *attributes, const void *host)
{
    (void)attributes;
    return refuse_kernel(host);
}

int
cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *host, int threads,
                                                       size_t shared_bytes, unsigned flags)
{
    (void)host;
    (void)threads;
    (void)shared_bytes;
    (void)flags;
    *blocks = 1;
    return FAKE_OK;
}

int
cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *host, int threads,
                                              size_t shared_bytes)
{
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads,
                                                                  shared_bytes, 0);
}

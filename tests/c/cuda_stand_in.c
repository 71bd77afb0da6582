/*
 * cuda_stand_in.c: CUDA's functions on one thread: see the header.
 */
#include "cuda_stand_in.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dcp_common.h"
#include "cuda_api.h"
#include "cuda_image.h"
#include "kernels_host.h"

enum { MAX_OPS = 4096, MAX_PINS = 64, NOT_READY = 600, NOT_CURRENT = 201, INVALID = 1 };

struct CUstream_st {
    bool ours;
};
struct CUevent_st {
    uint64_t behind; /* ops that have to have run */
};
struct CUctx_st {
    int unused;
};
struct CUfunc_st {
    const char *name;
};

struct op {
    char kind;
    void *to;
    const void *from;
    size_t bytes;
    size_t pitch, rows; /* of 'C'; 0 rows: it is one */
    const char *kernel;
    unsigned int grid, block;
    union {
        struct dcp_kernel_move move;
        struct dcp_kernel_checksum checksum;
    } params;
};

struct pin {
    const char *memory;
    size_t bytes;
};

struct stand_in stand_in;

static struct CUstream_st trainer_stream;
static struct CUctx_st context;
static struct op ops[MAX_OPS];
static uint64_t ops_put, ops_run;
static char order_text[MAX_OPS + 1];
static struct pin pinned[MAX_PINS];
static struct CUfunc_st functions[] = {
    {DCP_KERNEL_PACK}, {DCP_KERNEL_UNPACK}, {DCP_KERNEL_CHECKSUM}};

void *const stand_in_stream = &trainer_stream;

/* In place of the package's, which has no kernels for a machine like this. */
const void *
cuda_image(void)
{
    return "image";
}

static bool
fails(void)
{
    stand_in.calls++;
    return stand_in.calls == stand_in.fail_at;
}

static cuda_status
runtime_result(cuda_status status)
{
    if (status != 0) {
        stand_in.last_error = status;
    }
    return status;
}

/* What a call of the runtime answers before it does anything. */
static cuda_status
runtime_call(void)
{
    if (stand_in.depth == 0) {
        return runtime_result(NOT_CURRENT);
    }
    return runtime_result(fails() ? stand_in.fail_with : 0);
}

static struct op *
put(char kind, cuda_stream stream)
{
    DCP_ASSERT(ops_put < MAX_OPS);
    order_text[ops_put] = stream == &trainer_stream ? (char)(kind - 'A' + 'a') : kind;
    struct op *op = &ops[ops_put++];
    *op = (struct op){.kind = kind};
    stand_in.waiting++;
    return op;
}

static void
run_op(const struct op *op)
{
    void *params[] = {(void *)(uintptr_t)&op->params};

    switch (op->kind) {
    case 'C':
        for (size_t row = 0; row < (op->rows > 0 ? op->rows : 1); row++) {
            memcpy((char *)op->to + row * op->pitch, (const char *)op->from + row * op->bytes,
                   op->bytes);
        }
        break;
    case 'Z':
        memset(op->to, 0, op->bytes);
        break;
    case 'K':
        DCP_ASSERT(dcp_kernel_run_on_host(op->kernel, op->grid, op->block, params));
        break;
    case 'F':
        free(op->to);
        stand_in.slabs--;
        break;
    default:
        break;
    }
}

void
stand_in_run_some(uint32_t count)
{
    for (; count > 0 && ops_run < ops_put; count--) {
        run_op(&ops[ops_run++]);
        stand_in.waiting--;
    }
}

void
stand_in_run(void)
{
    stand_in_run_some(MAX_OPS);
}

static const char *
get_error_string(cuda_status status)
{
    return status == STAND_IN_SICK ? "an illegal memory access was encountered" : "some error";
}

static cuda_status
get_last_error(void)
{
    cuda_status status = stand_in.last_error;
    stand_in.last_error = 0;
    return status;
}

static cuda_status
get_attribute(int *value, cuda_enum attribute, int device)
{
    DCP_ASSERT((attribute) == (DCP_CUDA_ATTRIBUTE_MEMORY_POOLS));
    DCP_ASSERT((device) == (STAND_IN_DEVICE));
    *value = stand_in.has_pools ? 1 : 0;
    return runtime_call();
}

static cuda_status
stream_create(cuda_stream *stream, unsigned int flags)
{
    cuda_status status = runtime_call();

    DCP_ASSERT((flags) == (DCP_CUDA_STREAM_NON_BLOCKING));
    if (status == 0) {
        *stream = calloc(1, sizeof **stream);
        (*stream)->ours = true;
        stand_in.objects++;
    }
    return status;
}

static cuda_status
stream_destroy(cuda_stream stream)
{
    DCP_ASSERT(stream->ours);
    free(stream);
    stand_in.objects--;
    return 0;
}

static cuda_status
stream_query(cuda_stream stream)
{
    cuda_status status = runtime_call();

    DCP_ASSERT(stream->ours);
    if (status == 0 && stand_in.sick_with != 0) {
        return runtime_result(stand_in.sick_with);
    }
    if (status == 0 && ops_run < ops_put) {
        stand_in_run_some(1); /* time passes */
        return runtime_result(NOT_READY);
    }
    return status;
}

static cuda_status
stream_wait_event(cuda_stream stream, cuda_event event, unsigned int flags)
{
    cuda_status status = runtime_call();

    DCP_ASSERT(event->behind <= ops_put);
    DCP_ASSERT((flags) == (0));
    if (status == 0) {
        put('W', stream);
    }
    return status;
}

static cuda_status
stream_is_capturing(cuda_stream stream, cuda_enum *capture)
{
    cuda_status status = runtime_call();

    *capture = stream != NULL && stream == stand_in.capturing ? 1 : DCP_CUDA_CAPTURE_NONE;
    if (status == 0 && stream == NULL && stand_in.legacy_is_caught) {
        return runtime_result(DCP_CUDA_ERROR_CAPTURE_IMPLICIT);
    }
    return status;
}

static cuda_status
exchange_capture_mode(cuda_enum *mode)
{
    cuda_enum before = stand_in.capture_mode;
    /* The way back is not made to fail: there is nothing that one could do. */
    cuda_status status = *mode == DCP_CUDA_CAPTURE_RELAXED ? runtime_call() : 0;

    if (status == 0) {
        stand_in.capture_mode = *mode;
        *mode = before;
    }
    return status;
}

static cuda_status
event_create(cuda_event *event, unsigned int flags)
{
    cuda_status status = runtime_call();

    DCP_ASSERT((flags) == (DCP_CUDA_EVENT_NO_TIMING));
    if (status == 0) {
        *event = calloc(1, sizeof **event);
        stand_in.objects++;
    }
    return status;
}

static cuda_status
event_record(cuda_event event, cuda_stream stream)
{
    cuda_status status = runtime_call();

    if (status == 0) {
        put('R', stream);
        event->behind = ops_put;
    }
    return status;
}

static cuda_status
event_query(cuda_event event)
{
    cuda_status status = runtime_call();

    if (status == 0 && stand_in.sick_with != 0) {
        return runtime_result(stand_in.sick_with);
    }
    return status != 0 ? status : runtime_result(ops_run < event->behind ? NOT_READY : 0);
}

static cuda_status
event_destroy(cuda_event event)
{
    free(event);
    stand_in.objects--;
    return 0;
}

/* CUDA wants the host's side in one pinned piece, or wholly out of all. */
static bool
lies_in_one_piece(const char *host, size_t bytes)
{
    for (int i = 0; i < MAX_PINS; i++) {
        const struct pin *pin = &pinned[i];
        bool apart = host + bytes <= pin->memory || host >= pin->memory + pin->bytes;
        bool inside = host >= pin->memory && host + bytes <= pin->memory + pin->bytes;
        if (pin->memory != NULL && !apart && !inside) {
            return false;
        }
    }
    return true;
}

static cuda_status
memcpy_async(void *to, const void *from, size_t bytes, cuda_enum kind, cuda_stream stream)
{
    cuda_status status = runtime_call();
    const void *host = kind == DCP_CUDA_COPY_DEVICE_TO_HOST ? to : from;

    if (status == 0 && !lies_in_one_piece(host, bytes)) {
        return runtime_result(INVALID);
    }
    if (status == 0) {
        struct op *op = put('C', stream);
        op->to = to;
        op->from = from;
        op->bytes = bytes;
        stand_in.copies++;
    }
    return status;
}

static cuda_status
memcpy_rows_async(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                  size_t height, cuda_enum kind, cuda_stream stream)
{
    cuda_status status = runtime_call();

    if (status == 0 &&
        (from_pitch != width || to_pitch < width || to_pitch > INT32_MAX ||
         kind != DCP_CUDA_COPY_HOST_TO_DEVICE || !lies_in_one_piece(from, width * height))) {
        return runtime_result(INVALID);
    }
    if (status == 0) {
        struct op *op = put('C', stream);
        op->to = to;
        op->from = from;
        op->bytes = width;
        op->pitch = to_pitch;
        op->rows = height;
        stand_in.copies++;
    }
    return status;
}

static cuda_status
memset_async(void *memory, int value, size_t bytes, cuda_stream stream)
{
    cuda_status status = runtime_call();

    DCP_ASSERT(value == 0);
    if (status == 0) {
        struct op *op = put('Z', stream);
        op->to = memory;
        op->bytes = bytes;
    }
    return status;
}

static cuda_status
malloc_async(void **memory, size_t bytes, cuda_stream stream)
{
    cuda_status status = runtime_call();

    DCP_ASSERT(stream->ours);
    if (status == 0) {
        *memory = malloc(bytes);
        stand_in.slabs++;
    }
    return status;
}

static cuda_status
free_async(void *memory, cuda_stream stream)
{
    put('F', stream)->to = memory;
    return runtime_call();
}

static cuda_status
host_alloc(void **memory, size_t bytes, unsigned int flags)
{
    cuda_status status = runtime_call();

    DCP_ASSERT((flags) == (DCP_CUDA_HOST_PORTABLE | DCP_CUDA_HOST_MAPPED));
    if (status == 0) {
        *memory = malloc(bytes);
        stand_in.lists++;
    }
    return status;
}

static cuda_status
free_host(void *memory)
{
    free(memory);
    return 0;
}

static cuda_status
host_register(void *memory, size_t bytes, unsigned int flags)
{
    cuda_status status = runtime_call();

    DCP_ASSERT((flags) == (DCP_CUDA_HOST_PORTABLE));
    if (status == 0 && memory == stand_in.pinned_elsewhere) {
        return runtime_result(DCP_CUDA_ERROR_HOST_MEMORY_REGISTERED);
    }
    for (int i = 0; status == 0 && i < MAX_PINS; i++) {
        DCP_ASSERT(pinned[i].memory == NULL || (char *)memory + bytes <= pinned[i].memory ||
                   (char *)memory >= pinned[i].memory + pinned[i].bytes);
    }
    for (int i = 0; status == 0 && i < MAX_PINS; i++) {
        if (pinned[i].memory == NULL) {
            pinned[i] = (struct pin){memory, bytes};
            stand_in.pins++;
            break;
        }
    }
    return status;
}

static cuda_status
host_unregister(void *memory)
{
    stand_in.unpins++;
    for (int i = 0; i < MAX_PINS; i++) {
        if (pinned[i].memory == memory) {
            pinned[i].memory = NULL;
            stand_in.pins--;
            return 0;
        }
    }
    return runtime_result(INVALID);
}

static cuda_status
device_get(int *device, int ordinal)
{
    *device = ordinal;
    return fails() ? stand_in.fail_with : 0;
}

static cuda_status
retain(cuda_context *ret, int device)
{
    DCP_ASSERT((device) == (STAND_IN_DEVICE));
    *ret = &context;
    return fails() ? stand_in.fail_with : 0;
}

static cuda_status
push(cuda_context pushed)
{
    cuda_status status = fails() ? stand_in.fail_with : 0;
    DCP_ASSERT(pushed == &context);
    stand_in.depth += status == 0 ? 1 : 0;
    return status;
}

static cuda_status
pop(cuda_context *ret)
{
    *ret = &context;
    DCP_ASSERT(stand_in.depth > 0);
    stand_in.depth--;
    return 0;
}

static cuda_status
driver_error_string(cuda_status status, const char **text)
{
    *text = get_error_string(status);
    return 0;
}

static cuda_status
module_load(cuda_module *module, const void *image)
{
    *module = (cuda_module)(uintptr_t)image;
    return fails() ? stand_in.fail_with : 0;
}

static cuda_status
module_function(cuda_function *function, cuda_module module, const char *name)
{
    DCP_ASSERT(module != NULL);
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        if (strcmp(functions[i].name, name) == 0) {
            *function = &functions[i];
        }
    }
    return fails() ? stand_in.fail_with : 0;
}

static cuda_status
launch(cuda_function function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
       unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared_bytes,
       cuda_stream stream, void **params, void **extra)
{
    cuda_status status = fails() ? stand_in.fail_with : 0;

    DCP_ASSERT(stand_in.depth > 0 && extra == NULL && grid_x > 0);
    DCP_ASSERT(grid_y * grid_z * block_y * block_z == 1 && shared_bytes == 0);
    if (status == 0) {
        struct op *op = put('K', stream);
        op->kernel = function->name;
        op->grid = grid_x;
        op->block = block_x;
        if (strcmp(function->name, DCP_KERNEL_CHECKSUM) == 0) {
            op->params.checksum = *(struct dcp_kernel_checksum *)params[0];
        } else {
            op->params.move = *(struct dcp_kernel_move *)params[0];
        }
    }
    return status;
}

static cufile_status
file_driver_open(void)
{
    return (cufile_status){.error = stand_in.cufile_fails ? 5001 : 0};
}

static cufile_status
file_register(void **handle, cufile_description *description)
{
    DCP_ASSERT((description->type) == (DCP_CUFILE_HANDLE_FD));
    *handle = (void *)(uintptr_t)(description->handle.fd + 1);
    stand_in.objects++;
    return (cufile_status){.error = 0};
}

static void
file_deregister(void *handle)
{
    DCP_ASSERT(handle != NULL);
    stand_in.objects--;
}

static ssize_t
file_read(void *handle, void *memory, size_t bytes, off_t file_offset, off_t memory_offset)
{
    int fd = (int)(uintptr_t)handle - 1;
    DCP_ASSERT((stand_in.waiting) == (0));
    DCP_ASSERT(stand_in.depth > 0);
    /* Pieces: a read may end early. */
    return pread(fd, (char *)memory + memory_offset, bytes < 1000 ? bytes : 1000, file_offset);
}

static const struct cudart_api runtime = {
    .cudaGetErrorString = get_error_string,
    .cudaGetLastError = get_last_error,
    .cudaDeviceGetAttribute = get_attribute,
    .cudaStreamCreateWithFlags = stream_create,
    .cudaStreamDestroy = stream_destroy,
    .cudaStreamQuery = stream_query,
    .cudaStreamWaitEvent = stream_wait_event,
    .cudaStreamIsCapturing = stream_is_capturing,
    .cudaThreadExchangeStreamCaptureMode = exchange_capture_mode,
    .cudaEventCreateWithFlags = event_create,
    .cudaEventRecord = event_record,
    .cudaEventQuery = event_query,
    .cudaEventDestroy = event_destroy,
    .cudaMemcpyAsync = memcpy_async,
    .cudaMemcpy2DAsync = memcpy_rows_async,
    .cudaMemsetAsync = memset_async,
    .cudaMallocAsync = malloc_async,
    .cudaFreeAsync = free_async,
    .cudaHostAlloc = host_alloc,
    .cudaFreeHost = free_host,
    .cudaHostRegister = host_register,
    .cudaHostUnregister = host_unregister,
};

static const struct cuda_driver_api driver = {
    .cuDeviceGet = device_get,
    .cuDevicePrimaryCtxRetain = retain,
    .cuCtxPushCurrent_v2 = push,
    .cuCtxPopCurrent_v2 = pop,
    .cuGetErrorString = driver_error_string,
    .cuModuleLoadData = module_load,
    .cuModuleGetFunction = module_function,
    .cuLaunchKernel = launch,
};

static const struct cufile_api file = {
    .cuFileDriverOpen = file_driver_open,
    .cuFileHandleRegister = file_register,
    .cuFileHandleDeregister = file_deregister,
    .cuFileRead = file_read,
};

void
stand_in_begin(void)
{
    stand_in = (struct stand_in){.has_pools = true, .fail_with = 1, .order = order_text};
    ops_put = ops_run = 0;
    memset(order_text, 0, sizeof order_text);
    memset(pinned, 0, sizeof pinned);
    cuda_api_replace(&runtime, &driver, &file);
}

void
stand_in_end(void)
{
    stand_in.fail_at = 0;
    stand_in.sick_with = 0;
    stand_in_run();
    dcp_cuda_clean_up();
    stand_in_run(); /* memory that was given back in a stream's order */
    DCP_ASSERT((stand_in.objects) == (0));
    DCP_ASSERT((stand_in.depth) == (0));
    DCP_ASSERT((stand_in.capture_mode) == (0));
    DCP_ASSERT((stand_in.last_error) == (0));
    DCP_ASSERT((stand_in.slabs) == (0));
    DCP_ASSERT((stand_in.pins) == (0));
    cuda_api_replace(NULL, NULL, NULL);
}

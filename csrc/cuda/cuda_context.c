/*
 * cuda_context.c: entering and leaving a device, and CUDA's errors as ours.
 *
 * A thread's current device is the trainer's.  It is left alone by pushing the primary context of
 * the device that a call is about on the driver's stack and popping it afterwards; the runtime
 * works in whatever context is on top.  cudaSetDevice there and back would not do: a background
 * thread that never chose a device has device 0, and going "back" to it creates a context on device
 * 0, half a GiB in every process.
 *
 * Contexts are retained once per device and never released: tables live as long as the process.
 *
 * While any thread captures a graph in the default, global mode, calls like cudaEventQuery are
 * forbidden to all threads, and one of them spoils that capture.  Our stream is never part of one,
 * so the thread is in relaxed mode during its stay.
 *
 * Threads: any; a mutex guards the first entry of a device.
 */
#include "cuda_context.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <unistd.h>

enum { CAPTURE_ERROR_FIRST = 900, CAPTURE_ERROR_LAST = 908 };

static _Atomic(cuda_context) contexts[CUDA_MAX_DEVICES];
static atomic_int used_by_pid; /* the process that retained them; 0: none yet */
static pthread_mutex_t retain_mutex = PTHREAD_MUTEX_INITIALIZER;

int
cuda_refuse_capture(const struct cuda_stay *stay, const char *what, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                         "cuda:%d: cannot %s while a CUDA graph is being captured: a graph would "
                         "repeat the copies and not the checkpoint.  Save and load outside of the "
                         "capture, between replays of the graph",
                         (int)stay->index, what);
}

static int
fill_error(const struct cuda_stay *stay, cuda_status status, const char *text, const char *what,
           struct dcp_error *err)
{
    if (status >= CAPTURE_ERROR_FIRST && status <= CAPTURE_ERROR_LAST) {
        return cuda_refuse_capture(stay, what, err);
    }
    if (status == DCP_CUDA_ERROR_OUT_OF_MEMORY) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "cuda:%d: cannot %s: %s", (int)stay->index,
                             what, text);
    }
    return dcp_error_set(err, DCP_E_IO, 0, NULL,
                         "cuda:%d: cannot %s: %s (error %u).  CUDA reports errors of work that was "
                         "given to it before as well: if other calls fail too, the process has to "
                         "be started again",
                         (int)stay->index, what, text, status);
}

int
cuda_check(const struct cuda_stay *stay, cuda_status status, const char *what,
           struct dcp_error *err)
{
    if (status == 0) {
        return 0;
    }
    const char *text = stay->runtime->cudaGetErrorString(status);
    (void)stay->runtime->cudaGetLastError();
    return fill_error(stay, status, text != NULL ? text : "unknown error", what, err);
}

int
cuda_check_driver(const struct cuda_stay *stay, cuda_status status, const char *what,
                  struct dcp_error *err)
{
    const char *text = NULL;

    if (status == 0) {
        return 0;
    }
    if (stay->driver->cuGetErrorString(status, &text) != 0 || text == NULL) {
        text = "unknown error";
    }
    return fill_error(stay, status, text, what, err);
}

int
cuda_refuse_if_capturing(const struct cuda_stay *stay, cuda_stream stream, const char *what,
                         struct dcp_error *err)
{
    cuda_enum capture = DCP_CUDA_CAPTURE_NONE;
    cuda_status status = stay->runtime->cudaStreamIsCapturing(stream, &capture);

    /* The default stream cannot be captured; that another one is shows as this error. */
    if (status == DCP_CUDA_ERROR_CAPTURE_IMPLICIT) {
        (void)stay->runtime->cudaGetLastError();
        return cuda_refuse_capture(stay, what, err);
    }
    int rc = cuda_check(stay, status, "look at a stream", err);
    if (rc == 0 && capture != DCP_CUDA_CAPTURE_NONE) {
        rc = cuda_refuse_capture(stay, what, err);
    }
    return rc;
}

static int
retain_locked(struct cuda_stay *stay, struct dcp_error *err)
{
    cuda_context context = NULL;
    int device, rc;

    rc = cuda_check_driver(stay, stay->driver->cuDeviceGet(&device, (int)stay->index),
                           "find the device", err);
    if (rc == 0) {
        rc = cuda_check_driver(stay, stay->driver->cuDevicePrimaryCtxRetain(&context, device),
                               "use the device's context", err);
    }
    if (rc == 0) {
        atomic_store(&used_by_pid, (int)getpid());
        atomic_store(&contexts[stay->index], context);
    }
    return rc;
}

static int
context_of(struct cuda_stay *stay, cuda_context *ret_context, struct dcp_error *err)
{
    int rc = 0, pid = atomic_load(&used_by_pid);

    if (pid != 0 && pid != (int)getpid()) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                             "cuda:%d: process %d used CUDA and this one was forked off it, which "
                             "CUDA does not survive.  Start it with the 'spawn' method",
                             (int)stay->index, pid);
    }
    if (atomic_load(&contexts[stay->index]) == NULL) {
        (void)pthread_mutex_lock(&retain_mutex);
        if (atomic_load(&contexts[stay->index]) == NULL) {
            rc = retain_locked(stay, err);
        }
        (void)pthread_mutex_unlock(&retain_mutex);
    }
    if (rc == 0) {
        *ret_context = atomic_load(&contexts[stay->index]);
    }
    return rc;
}

int
cuda_enter(int32_t index, struct cuda_stay *ret_stay, struct dcp_error *err)
{
    struct cuda_stay stay = {.runtime = cudart_api(),
                             .driver = cuda_driver_api(),
                             .index = index,
                             .capture_mode = DCP_CUDA_CAPTURE_RELAXED};
    cuda_context context = NULL;
    int rc;

    if (stay.runtime == NULL || stay.driver == NULL) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                             "cuda:%d: %s is not loaded in this process, or lacks a function that "
                             "is needed.  A build of torch with CUDA 11.2 or newer loads it",
                             (int)index,
                             stay.runtime == NULL ? "CUDA's runtime (libcudart)"
                                                  : "CUDA's driver (libcuda)");
    }
    if (index < 0 || index >= CUDA_MAX_DEVICES) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "cuda:%d: there is no such device",
                             (int)index);
    }
    rc = context_of(&stay, &context, err);
    if (rc == 0) {
        rc = cuda_check_driver(&stay, stay.driver->cuCtxPushCurrent_v2(context),
                               "enter the device's context", err);
    }
    if (rc != 0) {
        return rc;
    }
    rc = cuda_check(&stay, stay.runtime->cudaThreadExchangeStreamCaptureMode(&stay.capture_mode),
                    "leave the captures of other threads", err);
    if (rc != 0) {
        (void)stay.driver->cuCtxPopCurrent_v2(&context);
        return rc;
    }
    *ret_stay = stay;
    return 0;
}

void
cuda_leave(struct cuda_stay *stay)
{
    cuda_context context;

    (void)stay->runtime->cudaThreadExchangeStreamCaptureMode(&stay->capture_mode);
    (void)stay->driver->cuCtxPopCurrent_v2(&context);
}

void
cuda_context_forget(void)
{
    for (int i = 0; i < CUDA_MAX_DEVICES; i++) {
        atomic_store(&contexts[i], NULL);
    }
    atomic_store(&used_by_pid, 0);
}

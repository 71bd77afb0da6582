/*
 * fake_cudart_stream.c: streams, events and the capture of graphs of the fake libcudart.so.13.
 */
#include <stdlib.h>

#include "fake_cudart.h"

#define EVENT_MAGIC 0x45564e54u

/* ---- streams ---- */

int
cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority)
{
    ENTER_CONTEXT();
    (void)priority;
    return fake_done(fake_stream_new((flags & 1) == 0, (struct fake_stream **)stream));
}

int
cudaStreamCreateWithFlags(void **stream, unsigned flags)
{
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

int
cudaStreamCreate(void **stream)
{
    return cudaStreamCreateWithPriority(stream, 0, 0);
}

int
cudaStreamDestroy(void *handle)
{
    struct fake_stream *stream;

    ENTER();
    return fake_done(fake_stream_find(handle, &stream)); /* what it was given still runs */
}

int
cudaStreamSynchronize(void *handle)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    code = fake_stream_find(handle, &stream);
    return fake_done(code != FAKE_OK ? code : fake_stream_wait(stream));
}

int
cudaStreamQuery(void *handle)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    code = fake_stream_find(handle, &stream);
    return fake_done(code != FAKE_OK ? code : fake_stream_done(stream) ? FAKE_OK : FAKE_NOT_READY);
}

int
cudaStreamGetPriority(void *handle, int *priority)
{
    ENTER();
    (void)handle;
    *priority = 0;
    return FAKE_OK;
}

int
cudaStreamGetDevice(void *handle, int *device)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    code = fake_stream_find(handle, &stream);
    if (code == FAKE_OK) {
        *device = fake_stream_device(stream);
    }
    return fake_done(code);
}

int
cudaLaunchHostFunc(void *handle, void (*fn)(void *), void *arg)
{
    struct fake_host_call call = {.fn = fn, .arg = arg};
    struct fake_stream *stream;
    int code;

    ENTER();
    code = fake_stream_find(handle, &stream);
    return fake_done(code != FAKE_OK ? code
                                     : fake_call(stream, fake_host_call_run, &call, sizeof(call)));
}

/* ---- events ---- */

int
cudaEventCreateWithFlags(void **event, unsigned flags)
{
    struct fake_event *made;

    ENTER_CONTEXT();
    (void)flags;
    made = calloc(1, sizeof(*made));
    if (made == NULL) {
        return fake_done(FAKE_NO_MEMORY);
    }
    made->magic = EVENT_MAGIC;
    made->device = *fake_current_device();
    *event = made;
    return FAKE_OK;
}

int
cudaEventCreate(void **event)
{
    return cudaEventCreateWithFlags(event, 0);
}

int
cudaEventDestroy(void *handle)
{
    struct fake_event *event = handle;

    ENTER();
    if (event == NULL || event->magic != EVENT_MAGIC) {
        return fake_done(FAKE_INVALID_HANDLE);
    }
    event->magic = 0;
    free(event);
    return FAKE_OK;
}

int
cudaEventRecordWithFlags(void *handle_event, void *handle, unsigned flags)
{
    struct fake_event *event = handle_event;
    struct fake_stream *stream;
    int code;

    ENTER();
    (void)flags;
    code = fake_stream_find(handle, &stream);
    if (code == FAKE_OK &&
        (event->magic != EVENT_MAGIC || event->device != fake_stream_device(stream))) {
        code = FAKE_INVALID_HANDLE;
    }
    return fake_done(code != FAKE_OK ? code : fake_record(event, stream));
}

int
cudaEventRecord(void *event, void *handle)
{
    return cudaEventRecordWithFlags(event, handle, 0);
}

int
cudaStreamWaitEvent(void *handle, void *event, unsigned flags)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    (void)flags;
    code = fake_stream_find(handle, &stream);
    return fake_done(code != FAKE_OK ? code : fake_wait_event(stream, event));
}

static int
event_state(const struct fake_event *event)
{
    if (event == NULL || event->magic != EVENT_MAGIC) {
        return FAKE_INVALID_HANDLE;
    }
    if (event->captured) {
        return FAKE_CAPTURE_UNSUPPORTED;
    }
    return event->on != NULL ? fake_context(fake_stream_device(event->on)) : FAKE_OK;
}

int
cudaEventQuery(void *event)
{
    int code;

    ENTER();
    code = event_state(event);
    return fake_done(code != FAKE_OK ? code : fake_event_done(event) ? FAKE_OK : FAKE_NOT_READY);
}

/* Nothing takes any time here. */
int
cudaEventElapsedTime(float *ret_ms, void *start, void *end)
{
    int code;

    ENTER();
    code = event_state(start);
    if (code == FAKE_OK) {
        code = event_state(end);
    }
    if (code == FAKE_OK) {
        *ret_ms = 0;
    }
    return fake_done(code);
}

int
cudaEventSynchronize(void *event)
{
    int code;

    ENTER();
    code = event_state(event);
    return fake_done(code != FAKE_OK ? code : fake_event_wait(event));
}

/* ---- capture of graphs: what is captured is thrown away ---- */

int
cudaStreamIsCapturing(void *handle, int *status)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    if (!fake_has_context(*fake_current_device()) && (uintptr_t)handle <= 2) {
        *status = 0;
        return FAKE_OK;
    }
    code = fake_stream_find(handle, &stream);
    if (code == FAKE_OK) {
        *status = fake_stream_capture(stream, -1);
    }
    return fake_done(code);
}

int
cudaStreamGetCaptureInfo(void *handle, int *status, unsigned long long *id, void **graph,
                         const void **nodes, const void **edges, size_t *nodes_count)
{
    int code = cudaStreamIsCapturing(handle, status);

    (void)graph;
    (void)nodes;
    (void)edges;
    if (code == FAKE_OK && id != NULL) {
        *id = (unsigned long long)*status;
    }
    if (code == FAKE_OK && nodes_count != NULL) {
        *nodes_count = 0;
    }
    return code;
}

int
cudaStreamBeginCapture(void *handle, int mode)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    (void)mode;
    code = fake_stream_find(handle, &stream);
    if (code == FAKE_OK) {
        (void)fake_stream_capture(stream, 1);
    }
    return fake_done(code);
}

int
cudaStreamEndCapture(void *handle, void **graph)
{
    struct fake_stream *stream;
    int code;

    ENTER();
    code = fake_stream_find(handle, &stream);
    if (code == FAKE_OK) {
        (void)fake_stream_capture(stream, 0);
        *graph = stream;
    }
    return fake_done(code);
}

int
cudaThreadExchangeStreamCaptureMode(int *mode)
{
    ENTER();
    (void)mode;
    return FAKE_OK;
}

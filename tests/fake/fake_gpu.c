/*
 * fake_gpu.c: the engine under the fake driver and runtime (fake_gpu.h).
 *
 * A stream is a queue and a thread, started by its first work; an event is a place in the queue of
 * a stream, so that waiting for one is a piece of work that waits until that stream got there.  The
 * default stream's rule is the same thing: its work waits for the ends of all blocking streams as
 * they stand, and theirs for its end.  One mutex and one condition guard everything: a test has a
 * handful of streams.  Streams are never freed: an event may name one that was destroyed.
 */
#include "fake_work.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STREAM_MAGIC 0x5354524du
#define QUEUE_WORKS 1024 /* that a stream takes before it holds up whoever gives it more */

struct fake_stream {
    uint32_t magic;
    int device;
    bool blocking; /* it and the device's default stream wait for each other */
    bool capturing, started;
    uint64_t queued, done; /* pieces of work */
    struct fake_work *first, **last;
    struct fake_stream *next;
};

struct device {
    struct fake_stream *standard;
    bool context;
    int died_of;
    uint64_t works_left; /* until it dies; UINT64_MAX: it lives */
    int dies_of;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct fake_stream *streams;
static struct device devices[DCP_FAKE_DEVICES];
static int devices_count;
static uint64_t device_bytes, delay_us, seed;
static bool held;
static __thread int current_device;
static __thread struct fake_stream *thread_streams[DCP_FAKE_DEVICES];

static uint64_t
setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);

    return text != NULL && *text != '\0' ? strtoull(text, NULL, 10) : otherwise;
}

/* A context does not survive fork(): whatever the child asks of it fails. */
static void
note_fork(void)
{
    for (int i = 0; i < devices_count; i++) {
        if (devices[i].context) {
            devices[i].died_of = FAKE_FORKED;
        }
    }
}

static void
set_up(void)
{
    devices_count = (int)setting("DCP_FAKE_CUDA_DEVICES", 2);
    if (devices_count > DCP_FAKE_DEVICES) {
        devices_count = DCP_FAKE_DEVICES;
    }
    device_bytes = setting("DCP_FAKE_CUDA_MEMORY", (uint64_t)8 << 30);
    delay_us = setting("DCP_FAKE_CUDA_DELAY_US", 300);
    seed = setting("DCP_FAKE_CUDA_SEED", 1) * 0x9E3779B97F4A7C15u + 1;
    for (int i = 0; i < DCP_FAKE_DEVICES; i++) {
        devices[i].works_left = UINT64_MAX;
    }
    (void)pthread_atfork(NULL, NULL, note_fork);
}

int
fake_device_count(void)
{
    pthread_once(&once, set_up);
    return devices_count;
}

uint64_t
fake_device_bytes(void)
{
    pthread_once(&once, set_up);
    return device_bytes;
}

int *
fake_current_device(void)
{
    return &current_device;
}

int
fake_context(int device)
{
    int code;
    bool is_new;

    if (device < 0 || device >= fake_device_count()) {
        return FAKE_INVALID_DEVICE;
    }
    pthread_mutex_lock(&lock);
    is_new = !devices[device].context;
    devices[device].context = true;
    code = devices[device].died_of;
    pthread_mutex_unlock(&lock);
    if (is_new) {
        fake_count("contexts", 1);
    }
    return code;
}

bool
fake_has_context(int device)
{
    return device >= 0 && device < fake_device_count() && devices[device].context;
}

/* ---- what the thread of a stream does ---- */

static uint64_t
random_locked(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static void
run(const struct fake_work *work)
{
    switch (work->kind) {
    case WORK_COPY:
        memmove(work->dst, work->src, work->bytes);
        break;
    case WORK_FILL:
        memset(work->dst, work->value, work->bytes);
        break;
    case WORK_CALL:
        work->fn(work->owned);
        break;
    case WORK_WAIT:
        break;
    }
}

/* Whether the device still works; the pieces that a test gave it are counted down. */
static bool
device_lives_locked(struct device *device, const struct fake_work *work)
{
    if (device->died_of == 0 && work->kind != WORK_WAIT && device->works_left != UINT64_MAX) {
        if (device->works_left == 0) {
            device->died_of = device->dies_of;
        } else {
            device->works_left--;
        }
    }
    return device->died_of == 0;
}

static void *
stream_main(void *arg)
{
    struct fake_stream *stream = arg;
    struct device *device = &devices[stream->device];

    pthread_mutex_lock(&lock);
    for (;;) {
        struct fake_work *work = stream->first;
        uint64_t pause_us;
        bool lives;

        if (work == NULL || held ||
            (work->kind == WORK_WAIT && work->on->done < work->serial && device->died_of == 0)) {
            pthread_cond_wait(&moved, &lock);
            continue;
        }
        lives = device_lives_locked(device, work);
        pause_us = delay_us > 0 && random_locked() % 8 == 0 ? random_locked() % delay_us : 0;
        pthread_mutex_unlock(&lock);
        if (lives) {
            if (pause_us > 0) {
                usleep((useconds_t)pause_us);
            }
            run(work);
        }
        pthread_mutex_lock(&lock);
        stream->first = work->next;
        if (stream->first == NULL) {
            stream->last = &stream->first;
        }
        stream->done++;
        pthread_cond_broadcast(&moved);
        free(work->owned);
        free(work);
    }
    return NULL;
}

/* ---- streams ---- */

static struct fake_stream *
stream_new_locked(int device, bool blocking)
{
    struct fake_stream *stream = calloc(1, sizeof(*stream));

    if (stream != NULL) {
        stream->magic = STREAM_MAGIC;
        stream->device = device;
        stream->blocking = blocking;
        stream->last = &stream->first;
        stream->next = streams;
        streams = stream;
    }
    return stream;
}

int
fake_stream_new(bool blocking, struct fake_stream **ret_stream)
{
    int code = fake_context(current_device);

    if (code != FAKE_OK) {
        return code;
    }
    pthread_mutex_lock(&lock);
    *ret_stream = stream_new_locked(current_device, blocking);
    pthread_mutex_unlock(&lock);
    return *ret_stream != NULL ? FAKE_OK : FAKE_NO_MEMORY;
}

int
fake_stream_find(void *handle, struct fake_stream **ret_stream)
{
    struct fake_stream *stream = handle, **standard;
    int code = fake_context(current_device);

    if (code != FAKE_OK) {
        return code;
    }
    if ((uintptr_t)handle > 2) {
        if (stream->magic != STREAM_MAGIC) {
            return FAKE_INVALID_HANDLE;
        }
        *ret_stream = stream;
        return devices[stream->device].died_of;
    }
    standard = (uintptr_t)handle == 2 ? &thread_streams[current_device]
                                      : &devices[current_device].standard;
    pthread_mutex_lock(&lock);
    if (*standard == NULL) {
        *standard = stream_new_locked(current_device, (uintptr_t)handle == 2);
    }
    pthread_mutex_unlock(&lock);
    *ret_stream = *standard;
    return *ret_stream != NULL ? FAKE_OK : FAKE_NO_MEMORY;
}

int
fake_stream_device(const struct fake_stream *stream)
{
    return stream->device;
}

int
fake_stream_capture(struct fake_stream *stream, int on)
{
    int before = stream->capturing;

    if (on >= 0) {
        stream->capturing = on != 0;
    }
    return before;
}

static void
append_locked(struct fake_stream *stream, struct fake_work *work)
{
    pthread_t thread;

    *stream->last = work;
    stream->last = &work->next;
    stream->queued++;
    if (!stream->started) {
        stream->started = true;
        if (pthread_create(&thread, NULL, stream_main, stream) != 0) {
            abort(); /* a test that cannot start threads shows nothing */
        }
        pthread_detach(thread);
    }
    pthread_cond_broadcast(&moved);
}

static int
append_wait_locked(struct fake_stream *stream, struct fake_stream *on, uint64_t serial)
{
    struct fake_work *work;

    if (stream == on || on->done >= serial) {
        return FAKE_OK;
    }
    work = calloc(1, sizeof(*work));
    if (work == NULL) {
        return FAKE_NO_MEMORY;
    }
    work->kind = WORK_WAIT;
    work->on = on;
    work->serial = serial;
    append_locked(stream, work);
    return FAKE_OK;
}

/* The default stream's rule, before work is put on `stream`. */
static int
order_locked(struct fake_stream *stream)
{
    struct fake_stream *standard = devices[stream->device].standard;
    int code = FAKE_OK;

    if (stream == standard) {
        for (struct fake_stream *s = streams; s != NULL && code == FAKE_OK; s = s->next) {
            if (s->blocking && s->device == stream->device) {
                code = append_wait_locked(stream, s, s->queued);
            }
        }
    } else if (stream->blocking && standard != NULL) {
        code = append_wait_locked(stream, standard, standard->queued);
    }
    return code;
}

int
fake_put(struct fake_stream *stream, const struct fake_work *work)
{
    struct fake_work *copy = NULL;
    bool full;
    int code;

    if (stream->capturing) {
        fake_count("captured", 1);
        free(work->owned);
        return FAKE_OK;
    }
    copy = malloc(sizeof(*copy));
    if (copy == NULL) {
        free(work->owned);
        return FAKE_NO_MEMORY;
    }
    *copy = *work;
    pthread_mutex_lock(&lock);
    full = stream->queued - stream->done >= QUEUE_WORKS;
    while (stream->queued - stream->done >= QUEUE_WORKS && !held) {
        pthread_cond_wait(&moved, &lock);
    }
    code = order_locked(stream);
    if (code == FAKE_OK) {
        append_locked(stream, copy);
    }
    pthread_mutex_unlock(&lock);
    if (full) {
        fake_count("held_up", 1);
    }
    if (code != FAKE_OK) {
        free(copy->owned);
        free(copy);
    }
    return code;
}

static int
wait_locked(struct fake_stream *stream, uint64_t serial)
{
    while (stream->done < serial) {
        pthread_cond_wait(&moved, &lock);
    }
    return devices[stream->device].died_of;
}

int
fake_stream_wait(struct fake_stream *stream)
{
    int code;

    if (stream->capturing) {
        return FAKE_CAPTURE_UNSUPPORTED;
    }
    pthread_mutex_lock(&lock);
    code = order_locked(stream);
    code = code != FAKE_OK ? code : wait_locked(stream, stream->queued);
    pthread_mutex_unlock(&lock);
    return code;
}

bool
fake_stream_done(struct fake_stream *stream)
{
    bool done;

    pthread_mutex_lock(&lock);
    done = stream->done >= stream->queued;
    pthread_mutex_unlock(&lock);
    return done;
}

int
fake_device_wait(int device)
{
    pthread_mutex_lock(&lock);
    for (struct fake_stream *s = streams; s != NULL; s = s->next) {
        if (s->device == device) {
            (void)wait_locked(s, s->queued);
        }
    }
    pthread_mutex_unlock(&lock);
    return devices[device].died_of;
}

void
fake_settle(void)
{
    bool waited = false;

    pthread_mutex_lock(&lock);
    for (struct fake_stream *s = streams; s != NULL; s = s->next) {
        waited = waited || s->done < s->queued;
        (void)wait_locked(s, s->queued);
    }
    pthread_mutex_unlock(&lock);
    if (waited) {
        fake_count("waits_to_free", 1);
    }
}

/* ---- events ---- */

int
fake_record(struct fake_event *event, struct fake_stream *stream)
{
    int code;

    pthread_mutex_lock(&lock);
    code = order_locked(stream);
    event->on = stream;
    event->serial = stream->queued;
    event->captured = stream->capturing;
    pthread_mutex_unlock(&lock);
    return code;
}

int
fake_wait_event(struct fake_stream *stream, const struct fake_event *event)
{
    int code = FAKE_OK;

    if (event->captured != stream->capturing) {
        return FAKE_CAPTURE_UNSUPPORTED;
    }
    pthread_mutex_lock(&lock);
    if (event->on != NULL && !stream->capturing) {
        code = append_wait_locked(stream, event->on, event->serial);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

bool
fake_event_done(const struct fake_event *event)
{
    bool done;

    pthread_mutex_lock(&lock);
    done = event->on == NULL || event->on->done >= event->serial;
    pthread_mutex_unlock(&lock);
    return done;
}

int
fake_event_wait(const struct fake_event *event)
{
    int code = FAKE_OK;

    pthread_mutex_lock(&lock);
    if (event->on != NULL) {
        code = wait_locked(event->on, event->serial);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

bool
fake_is_read_later(const uint8_t *memory, uint64_t bytes)
{
    bool found = false;

    pthread_mutex_lock(&lock);
    for (struct fake_stream *s = streams; s != NULL && !found; s = s->next) {
        for (const struct fake_work *w = s->first; w != NULL && !found; w = w->next) {
            const uint8_t *src = w->src;

            found = w->kind == WORK_CALL ||
                    (w->kind == WORK_COPY && src < memory + bytes && memory < src + w->bytes);
        }
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* ---- for tests ---- */

void
dcp_fake_hold(int on)
{
    pthread_mutex_lock(&lock);
    held = on != 0;
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&lock);
}

void
dcp_fake_break(int device, uint64_t works, int code)
{
    pthread_mutex_lock(&lock);
    devices[device].works_left = code != 0 ? works : UINT64_MAX;
    devices[device].dies_of = code;
    devices[device].died_of = code != 0 ? devices[device].died_of : 0;
    pthread_mutex_unlock(&lock);
}

void
dcp_fake_capture(void *handle, int on)
{
    struct fake_stream *stream;

    if (fake_stream_find(handle, &stream) == FAKE_OK) {
        (void)fake_stream_capture(stream, on);
    }
}

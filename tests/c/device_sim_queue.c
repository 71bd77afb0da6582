/*
 * device_sim_queue.c: one thread that runs what is on the streams of a simulated device.
 *
 * Streams are first in, first out; which of them goes on is drawn from the seed.  Work runs outside
 * of the lock, as copies of a device do, so that a sanitizer sees what races with it.
 */
#include "device_sim_parts.h"

#include <time.h>

#include "dcp_crc32.h"

static void
run_boxes(struct device_sim *sim, const struct work *work)
{
    for (uint32_t i = 0; i < work->count; i++) {
        const struct dcp_device_box *box = &work->boxes[i];
        uint64_t below = 0, above = box->item_bytes, elements = 1, item = box->item_bytes;
        for (uint32_t d = 0; d < box->ndim; d++) {
            int64_t span = (int64_t)(box->sizes[d] - 1) * box->strides_bytes[d];
            below += span < 0 ? (uint64_t)-span : 0;
            above += span > 0 ? (uint64_t)span : 0;
            elements *= box->sizes[d];
        }
        if (box->ndim == 0 || box->ndim > DCP_DEVICE_DIMS || box->first > elements ||
            box->count == 0 || box->count > elements - box->first ||
            !sim_is_live(sim, box->packed, box->count * item) ||
            !sim_is_live(sim, box->strided - below, below + above)) {
            sim_violation(sim, "a kernel was given a box that is none");
            continue;
        }
        uint8_t *strided = sim_real(sim, box->strided), *packed = sim_real(sim, box->packed);
        if (work->kind == WORK_PACK) {
            dcp_box_gather(packed, strided, box->ndim, box->sizes, box->strides_bytes,
                           box->item_bytes, box->first * item, box->count * item);
        } else {
            dcp_box_scatter(strided, packed, box->ndim, box->sizes, box->strides_bytes,
                            box->item_bytes, box->first * item, box->count * item);
        }
    }
}

static void
run_checksum(struct device_sim *sim, const struct work *work)
{
    uint32_t *crcs = (uint32_t *)(void *)work->host;
    for (uint64_t at = 0; at < work->bytes; at += DCP_BLOCK_BYTES) {
        crcs[at / DCP_BLOCK_BYTES] = dcp_crc32(0, sim_real(sim, work->device + at),
                                               dcp_min_u64(work->bytes - at, DCP_BLOCK_BYTES));
    }
}

static void
run(struct device_sim *sim, struct work *work)
{
    uint64_t rows = dcp_max_u64(work->rows, 1);
    bool ranged = work->kind == WORK_TO_HOST || work->kind == WORK_TO_DEVICE ||
                  work->kind == WORK_CHECKSUM || work->kind == WORK_POKE;
    if (ranged && !sim_is_live(sim, work->device, (rows - 1) * work->pitch + work->bytes)) {
        sim_violation(sim, "work on device memory that is not allocated");
        return;
    }
    switch (work->kind) {
    case WORK_TO_HOST:
        memcpy(work->host, sim_real(sim, work->device), work->bytes);
        break;
    case WORK_TO_DEVICE:
        if (!sim->options.instant && dcp_crc32(0, work->host, rows * work->bytes) != work->crc) {
            sim_violation(sim, "host memory changed before it was copied to the device");
        }
        for (uint64_t row = 0; row < rows; row++) {
            memcpy(sim_real(sim, work->device + row * work->pitch), work->host + row * work->bytes,
                   work->bytes);
        }
        break;
    case WORK_POKE:
        memcpy(sim_real(sim, work->device), work->host, work->bytes);
        free(work->host);
        break;
    case WORK_PACK:
    case WORK_UNPACK:
        run_boxes(sim, work);
        free(work->boxes);
        break;
    case WORK_CHECKSUM:
        run_checksum(sim, work);
        break;
    case WORK_RELEASE:
    case WORK_EVENT:
    case WORK_WAIT:
        break;
    }
}

void
sim_drop_event_locked(struct device_sim *sim, struct dcp_device_event *event)
{
    if (event->left == 0 && event->forgotten && event->waiters == 0) {
        sim->live_events--;
        free(event);
    }
}

static void
pause_a_bit(struct device_sim *sim)
{
    if (!sim->options.instant && maker_below(&sim->rng, 3) == 0) {
        struct timespec span = {0, (long)maker_below(&sim->rng, 60000)};
        nanosleep(&span, NULL);
    }
}

/* A stream whose first work can run now; NULL. */
static struct stream *
choose_locked(struct device_sim *sim)
{
    uint64_t start = sim->options.instant ? 0 : maker_below(&sim->rng, STREAMS);
    for (uint64_t i = 0; i < STREAMS && !sim->hung; i++) {
        struct stream *stream = &sim->streams[(start + i) % STREAMS];
        const struct work *work = stream->first;
        if (work != NULL && (work->kind != WORK_WAIT || work->event->left == 0)) {
            return stream;
        }
    }
    return NULL;
}

static void
finish_locked(struct device_sim *sim, struct stream *stream)
{
    struct work *work = stream->first;
    stream->first = work->next;
    stream->count--;
    stream->last = stream->first == NULL ? NULL : stream->last;
    stream->running = false;
    if (work->kind == WORK_EVENT) {
        work->event->left--;
        sim_drop_event_locked(sim, work->event);
    } else if (work->kind == WORK_WAIT) {
        work->event->waiters--;
        sim_drop_event_locked(sim, work->event);
    } else if (work->kind == WORK_RELEASE) {
        sim_release_locked(sim, work->device);
    }
    if (work->waited) {
        work->done = true;
    } else {
        free(work);
    }
    pthread_cond_broadcast(&sim->changed);
}

void *
sim_thread_main(void *arg)
{
    struct device_sim *sim = arg;
    pthread_mutex_lock(&sim->lock);
    for (;;) {
        struct stream *stream = choose_locked(sim);
        if (stream == NULL && sim->closing && !sim->hung) {
            break;
        }
        if (stream == NULL) {
            pthread_cond_wait(&sim->changed, &sim->lock);
            continue;
        }
        stream->running = true;
        struct work *work = stream->first;
        bool fails = sim->fail_work > 0 && --sim->fail_work == 0;
        sim->failed = sim->failed || fails;
        bool skip = sim->failed;
        pthread_mutex_unlock(&sim->lock);
        pause_a_bit(sim);
        if (!skip) {
            run(sim, work);
        } else if (work->kind == WORK_PACK || work->kind == WORK_UNPACK) {
            free(work->boxes);
        } else if (work->kind == WORK_POKE) {
            free(work->host);
        }
        pthread_mutex_lock(&sim->lock);
        finish_locked(sim, stream);
    }
    pthread_mutex_unlock(&sim->lock);
    return NULL;
}

struct work *
sim_put_locked(struct device_sim *sim, uintptr_t stream, const struct work *what)
{
    struct work *work = malloc(sizeof *work);
    sim_must(work != NULL && stream < STREAMS, "no such stream");
    *work = *what;
    struct stream *to = &sim->streams[stream];
    bool ours = stream == OURS || stream == SUMS;
    if (ours && to->count >= DEVICE_SIM_QUEUE) {
        sim->held_up++;
    }
    while (ours && to->count >= DEVICE_SIM_QUEUE && !sim->hung) {
        pthread_cond_wait(&sim->changed, &sim->lock);
    }
    *(to->first == NULL ? &to->first : &to->last->next) = work;
    to->last = work;
    to->count++;
    pthread_cond_broadcast(&sim->changed);
    return work;
}

void
sim_put(struct device_sim *sim, uintptr_t stream, const struct work *what)
{
    pthread_mutex_lock(&sim->lock);
    (void)sim_put_locked(sim, stream, what);
    pthread_mutex_unlock(&sim->lock);
}

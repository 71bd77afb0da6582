/*
 * device_sim.c: one thread that runs what is on the streams of a simulated device.
 *
 * Streams are first in, first out; which of them goes on is drawn from the seed.  Work runs outside
 * of the lock, as copies of a device do, so that a sanitizer sees what races with it.
 */
#include "device_sim.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dcp_crc32.h"
#include "engine_world.h"

/* Not canonical: following it is a fault. */
#define BASE UINT64_C(0x00d0000000000000)
#define READ_ALIGN_BYTES UINT64_C(4096)
enum { MOST_RANGES = 4096, GUARD_BYTES = 256, RUBBISH = 0xEE, FREED = 0xDD, OURS = 0 };

enum work_kind {
    WORK_TO_HOST,
    WORK_TO_DEVICE,
    WORK_PACK,
    WORK_UNPACK,
    WORK_CHECKSUM,
    WORK_EVENT,
    WORK_WAIT,
    WORK_POKE,
    WORK_RELEASE,
};

struct dcp_device_event {
    bool done, forgotten;
    uint32_t waiters;
};

struct work {
    struct work *next;
    enum work_kind kind;
    uint8_t *host;
    uint64_t device, bytes;
    uint32_t crc; /* of what is read on the host */
    struct dcp_device_box *boxes;
    uint32_t count;
    struct dcp_device_event *event;
    bool done, waited; /* whoever put it there waits for it */
};

struct stream {
    struct work *first, *last;
    bool running;
};

struct range {
    uint64_t from, bytes;
    bool live, is_slab;
};

struct device_sim {
    struct dcp_device table;
    struct device_sim_options options;
    uint8_t *memory;
    uint64_t used_bytes;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed;
    pthread_t thread;
    struct stream streams[DEVICE_SIM_STREAMS + 1];
    struct maker_rng rng; /* of the thread's choices */
    struct range ranges[MOST_RANGES];
    uint32_t ranges_count;
    struct {
        uint8_t *memory;
        uint64_t bytes;
    } pins[64];
    uint64_t calls, reads, fail_call, fail_work, violations, live_events, pinned_bytes;
    bool failed; /* for good */
    bool hung, hung_for_ever, closing;
};

static void
must(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "device_sim: %s\n", what);
        exit(1);
    }
}

static void
violation(struct device_sim *sim, const char *what)
{
    pthread_mutex_lock(&sim->lock);
    sim->violations++;
    pthread_mutex_unlock(&sim->lock);
    fprintf(stderr, "device_sim: %s\n", what);
}

static uint8_t *
real(const struct device_sim *sim, uint64_t address)
{
    return sim->memory + (address - BASE);
}

/* [address, address + bytes) lies in memory that is allocated. */
static bool
is_live(struct device_sim *sim, uint64_t address, uint64_t bytes)
{
    bool live = false;
    pthread_mutex_lock(&sim->lock);
    for (uint32_t i = 0; i < sim->ranges_count; i++) {
        const struct range *range = &sim->ranges[i];
        live = live ||
               (range->live && address >= range->from && address - range->from <= range->bytes &&
                bytes <= range->bytes - (address - range->from));
    }
    pthread_mutex_unlock(&sim->lock);
    return live;
}

/* ---- work ---- */

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
            !is_live(sim, box->packed, box->count * item) ||
            !is_live(sim, box->strided - below, below + above)) {
            violation(sim, "a kernel was given a box that is none");
            continue;
        }
        uint8_t *strided = real(sim, box->strided), *packed = real(sim, box->packed);
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
        crcs[at / DCP_BLOCK_BYTES] = dcp_crc32(0, real(sim, work->device + at),
                                               dcp_min_u64(work->bytes - at, DCP_BLOCK_BYTES));
    }
}

static void
run(struct device_sim *sim, struct work *work)
{
    bool ranged = work->kind == WORK_TO_HOST || work->kind == WORK_TO_DEVICE ||
                  work->kind == WORK_CHECKSUM || work->kind == WORK_POKE;
    if (ranged && !is_live(sim, work->device, work->bytes)) {
        violation(sim, "work on device memory that is not allocated");
        return;
    }
    switch (work->kind) {
    case WORK_TO_HOST:
        memcpy(work->host, real(sim, work->device), work->bytes);
        break;
    case WORK_TO_DEVICE:
        if (!sim->options.instant && dcp_crc32(0, work->host, work->bytes) != work->crc) {
            violation(sim, "host memory changed before it was copied to the device");
        }
        memcpy(real(sim, work->device), work->host, work->bytes);
        break;
    case WORK_POKE:
        memcpy(real(sim, work->device), work->host, work->bytes);
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

static void
release_locked(struct device_sim *sim, uint64_t address)
{
    for (uint32_t i = 0; i < sim->ranges_count; i++) {
        struct range *range = &sim->ranges[i];
        if (range->from == address && range->live) {
            range->live = false;
            memset(real(sim, range->from), FREED, range->bytes);
            return;
        }
    }
    must(false, "memory was released that was not allocated");
}

static void
drop_event_locked(struct device_sim *sim, struct dcp_device_event *event)
{
    if (event->done && event->forgotten && event->waiters == 0) {
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
    uint64_t start = sim->options.instant ? 0 : maker_below(&sim->rng, DEVICE_SIM_STREAMS + 1);
    for (uint64_t i = 0; i <= DEVICE_SIM_STREAMS && !sim->hung; i++) {
        struct stream *stream = &sim->streams[(start + i) % (DEVICE_SIM_STREAMS + 1)];
        const struct work *work = stream->first;
        if (work != NULL && (work->kind != WORK_WAIT || work->event->done)) {
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
    stream->last = stream->first == NULL ? NULL : stream->last;
    stream->running = false;
    if (work->kind == WORK_EVENT) {
        work->event->done = true;
        drop_event_locked(sim, work->event);
    } else if (work->kind == WORK_WAIT) {
        work->event->waiters--;
        drop_event_locked(sim, work->event);
    } else if (work->kind == WORK_RELEASE) {
        release_locked(sim, work->device);
    }
    if (work->waited) {
        work->done = true;
    } else {
        free(work);
    }
    pthread_cond_broadcast(&sim->changed);
}

static void *
thread_main(void *arg)
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

static struct work *
put_locked(struct device_sim *sim, uintptr_t stream, const struct work *what)
{
    struct work *work = malloc(sizeof *work);
    must(work != NULL && stream <= DEVICE_SIM_STREAMS, "no such stream");
    *work = *what;
    if (sim->streams[stream].last != NULL) {
        sim->streams[stream].last->next = work;
    } else {
        sim->streams[stream].first = work;
    }
    sim->streams[stream].last = work;
    pthread_cond_broadcast(&sim->changed);
    return work;
}

static void
put(struct device_sim *sim, uintptr_t stream, const struct work *what)
{
    pthread_mutex_lock(&sim->lock);
    (void)put_locked(sim, stream, what);
    pthread_mutex_unlock(&sim->lock);
}

/* ---- the table ---- */

/* Counts a call that may fail: nonzero when it does. */
static int
call(struct device_sim *sim, const char *name, struct dcp_error *err)
{
    pthread_mutex_lock(&sim->lock);
    sim->calls++;
    bool fails = sim->failed || (sim->fail_call > 0 && --sim->fail_call == 0);
    pthread_mutex_unlock(&sim->lock);
    return fails ? dcp_error_set(err, DCP_E_IO, 0, NULL, "simulated failure of %s", name) : 0;
}

static bool
is_pinned(struct device_sim *sim, const uint8_t *memory, uint64_t bytes)
{
    bool pinned = false;
    pthread_mutex_lock(&sim->lock);
    for (size_t i = 0; i < sizeof sim->pins / sizeof sim->pins[0]; i++) {
        pinned = pinned || (sim->pins[i].memory != NULL && memory >= sim->pins[i].memory &&
                            memory + bytes <= sim->pins[i].memory + sim->pins[i].bytes);
    }
    pthread_mutex_unlock(&sim->lock);
    return pinned;
}

/* A copy of memory that is not pinned is over when the call returns. */
static void
put_copy(struct device_sim *sim, const struct work *what)
{
    struct work work = *what;
    bool pinned = is_pinned(sim, what->host, what->bytes);
    pthread_mutex_lock(&sim->lock);
    work.waited = !pinned && !sim->hung;
    struct work *queued = put_locked(sim, OURS, &work);
    while (work.waited && !queued->done) {
        pthread_cond_wait(&sim->changed, &sim->lock);
    }
    if (work.waited) {
        free(queued);
    }
    pthread_mutex_unlock(&sim->lock);
}

static int
sim_to_host(void *ctx, void *host, uint64_t device, uint64_t bytes, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "to_host", err);
    if (rc == 0) {
        if (!sim->options.instant) {
            memset(host, RUBBISH, bytes);
        }
        put_copy(sim, &(struct work){
                          .kind = WORK_TO_HOST, .host = host, .device = device, .bytes = bytes});
    }
    return rc;
}

static int
sim_to_device(void *ctx, uint64_t device, const void *host, uint64_t bytes, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "to_device", err);
    if (rc == 0) {
        put_copy(sim, &(struct work){.kind = WORK_TO_DEVICE,
                                     .host = (uint8_t *)(uintptr_t)host,
                                     .device = device,
                                     .bytes = bytes,
                                     .crc = sim->options.instant ? 0 : dcp_crc32(0, host, bytes)});
    }
    return rc;
}

static int
put_boxes(struct device_sim *sim, enum work_kind kind, const struct dcp_device_box *boxes,
          uint32_t count, struct dcp_error *err)
{
    int rc = call(sim, kind == WORK_PACK ? "pack" : "unpack", err);
    must(count > 0 && (sim->table.features & DCP_DEVICE_PACKS) != 0, "no kernels");
    if (rc == 0) {
        struct work work = {.kind = kind, .count = count};
        work.boxes = malloc(count * sizeof *boxes);
        must(work.boxes != NULL, "no memory");
        memcpy(work.boxes, boxes, count * sizeof *boxes);
        put(sim, OURS, &work);
    }
    return rc;
}

static int
sim_pack(void *ctx, const struct dcp_device_box *boxes, uint32_t count, struct dcp_error *err)
{
    return put_boxes(ctx, WORK_PACK, boxes, count, err);
}

static int
sim_unpack(void *ctx, const struct dcp_device_box *boxes, uint32_t count, struct dcp_error *err)
{
    return put_boxes(ctx, WORK_UNPACK, boxes, count, err);
}

static int
sim_checksum(void *ctx, uint64_t device, uint64_t bytes, uint32_t *crcs, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    uint64_t blocks = (bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
    int rc = call(sim, "checksum", err);
    must((sim->table.features & DCP_DEVICE_CHECKSUMS) != 0, "no checksums");
    if (rc == 0) {
        must(is_pinned(sim, (uint8_t *)crcs, blocks * sizeof *crcs),
             "checksums go to pinned memory");
        memset(crcs, RUBBISH, blocks * sizeof *crcs);
        put(sim, OURS,
            &(struct work){
                .kind = WORK_CHECKSUM, .host = (uint8_t *)crcs, .device = device, .bytes = bytes});
    }
    return rc;
}

static uint64_t
take_memory(struct device_sim *sim, uint64_t bytes, uint64_t align_bytes, bool is_slab)
{
    pthread_mutex_lock(&sim->lock);
    uint64_t at = dcp_align_up(sim->used_bytes + GUARD_BYTES, align_bytes);
    bool fits = at <= sim->options.memory_bytes && bytes <= sim->options.memory_bytes - at;
    if (fits) {
        must(sim->ranges_count < MOST_RANGES, "too many allocations");
        sim->ranges[sim->ranges_count++] = (struct range){BASE + at, bytes, true, is_slab};
        sim->used_bytes = at + bytes;
    }
    pthread_mutex_unlock(&sim->lock);
    return fits ? BASE + at : 0;
}

static int
sim_allocate(void *ctx, uint64_t bytes, uint64_t *ret_device, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "allocate", err);
    if (rc == 0) {
        *ret_device = bytes > sim->options.slab_most_bytes ? 0 : take_memory(sim, bytes, 512, true);
        rc =
            *ret_device == 0 ? dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "simulated: no memory") : 0;
    }
    return rc;
}

static void
sim_release(void *ctx, uint64_t device)
{
    put(ctx, OURS, &(struct work){.kind = WORK_RELEASE, .device = device});
}

static int
sim_pin(void *ctx, void *memory, uint64_t bytes, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "pin", err);
    if (rc == 0 && sim->options.no_pin) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "simulated: no memory to pin");
    }
    pthread_mutex_lock(&sim->lock);
    for (size_t i = 0; rc == 0; i++) {
        must(i < sizeof sim->pins / sizeof sim->pins[0], "too many pinned ranges");
        if (sim->pins[i].memory == NULL) {
            sim->pins[i].memory = memory;
            sim->pins[i].bytes = bytes;
            sim->pinned_bytes += bytes;
            break;
        }
    }
    pthread_mutex_unlock(&sim->lock);
    return rc;
}

static void
sim_unpin(void *ctx, void *memory)
{
    struct device_sim *sim = ctx;
    bool found = false;
    pthread_mutex_lock(&sim->lock);
    for (size_t i = 0; i < sizeof sim->pins / sizeof sim->pins[0]; i++) {
        if (sim->pins[i].memory == memory && !found) {
            /* It must still be there: this reads it. */
            (void)*(volatile uint8_t *)memory;
            sim->pinned_bytes -= sim->pins[i].bytes;
            sim->pins[i].memory = NULL;
            found = true;
        }
    }
    pthread_mutex_unlock(&sim->lock);
    must(found, "memory was unpinned that was not pinned");
}

static struct dcp_device_event *
record_locked(struct device_sim *sim, uintptr_t stream)
{
    struct dcp_device_event *event = calloc(1, sizeof *event);
    must(event != NULL, "no memory");
    sim->live_events++;
    (void)put_locked(sim, stream, &(struct work){.kind = WORK_EVENT, .event = event});
    return event;
}

static int
sim_record(void *ctx, dcp_device_event **ret_event, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "record", err);
    if (rc == 0) {
        pthread_mutex_lock(&sim->lock);
        *ret_event = record_locked(sim, OURS);
        pthread_mutex_unlock(&sim->lock);
    }
    return rc;
}

static int
sim_poll(void *ctx, dcp_device_event *event, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "poll", err);
    if (rc == 0) {
        pthread_mutex_lock(&sim->lock);
        rc = event->done ? 1 : 0;
        pthread_mutex_unlock(&sim->lock);
    }
    return rc;
}

static void
sim_forget(void *ctx, dcp_device_event *event)
{
    struct device_sim *sim = ctx;
    if (event != NULL) {
        pthread_mutex_lock(&sim->lock);
        event->forgotten = true;
        drop_event_locked(sim, event);
        pthread_mutex_unlock(&sim->lock);
    }
}

/* `second` goes on after what `first` has been given. */
static int
order(struct device_sim *sim, uintptr_t first, uintptr_t second, const char *name,
      struct dcp_error *err)
{
    int rc = call(sim, name, err);
    if (rc == 0 && (first == DEVICE_SIM_CAPTURING || second == DEVICE_SIM_CAPTURING)) {
        rc = dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL, "the stream is capturing a graph");
    }
    if (rc == 0) {
        pthread_mutex_lock(&sim->lock);
        struct dcp_device_event *event = record_locked(sim, first);
        event->waiters = 1;
        event->forgotten = true;
        (void)put_locked(sim, second, &(struct work){.kind = WORK_WAIT, .event = event});
        pthread_mutex_unlock(&sim->lock);
    }
    return rc;
}

static int
sim_follow(void *ctx, void *stream, struct dcp_error *err)
{
    return order(ctx, (uintptr_t)stream, OURS, "follow", err);
}

static int
sim_lead(void *ctx, void *stream, struct dcp_error *err)
{
    return order(ctx, OURS, (uintptr_t)stream, "lead", err);
}

static int
sim_wait_idle(void *ctx, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = 0;
    pthread_mutex_lock(&sim->lock);
    if (sim->hung && sim->hung_for_ever) {
        rc = dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL, "simulated: it hangs");
    } else {
        sim->hung = false;
        pthread_cond_broadcast(&sim->changed);
    }
    while (rc == 0 && sim->streams[OURS].first != NULL) {
        pthread_cond_wait(&sim->changed, &sim->lock);
    }
    if (rc == 0 && sim->failed) {
        rc = dcp_error_set(err, DCP_E_IO, 0, NULL, "simulated: it has failed");
    }
    pthread_mutex_unlock(&sim->lock);
    return rc;
}

/* As far as the file goes; alignment is the device's own concern. */
static int
read_to_memory(struct device_sim *sim, int fd, uint64_t offset, uint64_t device, uint64_t bytes)
{
    uint64_t from = offset & ~(READ_ALIGN_BYTES - 1);
    uint64_t len = dcp_align_up(offset + bytes, READ_ALIGN_BYTES) - from, done = 0;
    uint8_t *buffer = aligned_alloc(READ_ALIGN_BYTES, len);
    must(buffer != NULL, "no memory");
    while (done < len) {
        ssize_t n = sim->options.io->pread(sim->options.io->ctx, fd, buffer + done, len - done,
                                           from + done);
        if (n <= 0) {
            break;
        }
        done += (uint64_t)n;
    }
    bool whole = done >= offset + bytes - from;
    if (whole) {
        memcpy(real(sim, device), buffer + (offset - from), bytes);
    }
    free(buffer);
    return whole ? 0 : -1;
}

static int
sim_read_file(void *ctx, int fd, uint64_t offset_bytes, uint64_t device, uint64_t bytes,
              struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    uint64_t refuse = sim->options.refuse_read;
    int rc = call(sim, "read_file", err);
    must((sim->table.features & DCP_DEVICE_READS_FILES) != 0, "it reads no files");
    rc = rc == 0 ? sim_wait_idle(ctx, err) : rc;
    if (rc == 0 && !is_live(sim, device, bytes)) {
        violation(sim, "a file was read to device memory that is not allocated");
    } else if (rc == 0) {
        bool refused = ++sim->reads >= refuse && refuse > 0;
        uint64_t len = refused ? bytes / 2 : bytes;
        if (read_to_memory(sim, fd, offset_bytes, device, len) != 0 || refused) {
            rc = dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL, "simulated: not this file");
        }
    }
    return rc;
}

/* ---- for tests ---- */

struct device_sim *
device_sim_new(const struct device_sim_options *options)
{
    struct device_sim *sim = calloc(1, sizeof *sim);
    must(sim != NULL, "no memory");
    sim->options = *options;
    if (sim->options.memory_bytes == 0) {
        sim->options.memory_bytes = 64u << 20;
    }
    sim->rng.state = options->seed;
    sim->memory = malloc(sim->options.memory_bytes);
    must(sim->memory != NULL, "no memory");
    pthread_mutex_init(&sim->lock, NULL);
    pthread_cond_init(&sim->changed, NULL);
    sim->table = (struct dcp_device){.ctx = sim,
                                     .kind = "simulated",
                                     .index = (int32_t)(options->seed % 8),
                                     .features = options->features,
                                     .follow = sim_follow,
                                     .lead = sim_lead,
                                     .to_host = sim_to_host,
                                     .to_device = sim_to_device,
                                     .pack = sim_pack,
                                     .unpack = sim_unpack,
                                     .checksum = sim_checksum,
                                     .allocate = sim_allocate,
                                     .release = sim_release,
                                     .pin = sim_pin,
                                     .unpin = sim_unpin,
                                     .record = sim_record,
                                     .poll = sim_poll,
                                     .forget = sim_forget,
                                     .wait_idle = sim_wait_idle,
                                     .read_file = sim_read_file};
    must(pthread_create(&sim->thread, NULL, thread_main, sim) == 0, "no thread");
    return sim;
}

bool
device_sim_free(struct device_sim *sim)
{
    bool clean = true;
    pthread_mutex_lock(&sim->lock);
    sim->closing = true;
    sim->hung = false;
    pthread_cond_broadcast(&sim->changed);
    pthread_mutex_unlock(&sim->lock);
    pthread_join(sim->thread, NULL);
    for (uint32_t i = 0; i < sim->ranges_count; i++) {
        clean = clean && !(sim->ranges[i].live && sim->ranges[i].is_slab);
    }
    clean = clean && sim->violations == 0 && sim->live_events == 0 && sim->pinned_bytes == 0;
    if (!clean) {
        fprintf(stderr, "device_sim: left: %llu violations, %llu events, %llu pinned bytes%s\n",
                (unsigned long long)sim->violations, (unsigned long long)sim->live_events,
                (unsigned long long)sim->pinned_bytes, ", or a slab");
    }
    pthread_mutex_destroy(&sim->lock);
    pthread_cond_destroy(&sim->changed);
    free(sim->memory);
    free(sim);
    return clean;
}

struct dcp_device *
device_sim_table(struct device_sim *sim)
{
    return &sim->table;
}

uint64_t
device_sim_tensor(struct device_sim *sim, uint64_t bytes, uint64_t align_bytes)
{
    uint64_t address = take_memory(sim, bytes, align_bytes, false);
    must(address != 0, "the device is full");
    return address;
}

void
device_sim_poke(struct device_sim *sim, uint64_t address, const void *data, uint64_t len)
{
    must(is_live(sim, address, len), "poked outside");
    memcpy(real(sim, address), data, len);
}

void
device_sim_peek(struct device_sim *sim, uint64_t address, void *ret, uint64_t len)
{
    must(is_live(sim, address, len), "peeked outside");
    memcpy(ret, real(sim, address), len);
}

void
device_sim_poke_later(struct device_sim *sim, uintptr_t stream, uint64_t address, const void *data,
                      uint64_t len)
{
    uint8_t *copy = malloc(len + 1);
    must(copy != NULL && stream != OURS, "not a trainer's stream");
    memcpy(copy, data, len);
    put(sim, stream,
        &(struct work){.kind = WORK_POKE, .host = copy, .device = address, .bytes = len});
}

void
device_sim_peek_after(struct device_sim *sim, uintptr_t stream, uint64_t address, void *ret,
                      uint64_t len)
{
    pthread_mutex_lock(&sim->lock);
    while (sim->streams[stream].first != NULL) {
        pthread_cond_wait(&sim->changed, &sim->lock);
    }
    pthread_mutex_unlock(&sim->lock);
    device_sim_peek(sim, address, ret, len);
}

static void
set(struct device_sim *sim, uint64_t *field, uint64_t value)
{
    pthread_mutex_lock(&sim->lock);
    *field = value;
    pthread_mutex_unlock(&sim->lock);
}

void
device_sim_fail_call(struct device_sim *sim, uint64_t number)
{
    set(sim, &sim->fail_call, number);
}

void
device_sim_fail_work(struct device_sim *sim, uint64_t number)
{
    set(sim, &sim->fail_work, number);
}

uint64_t
device_sim_calls(const struct device_sim *sim)
{
    return sim->calls;
}

uint64_t
device_sim_reads(const struct device_sim *sim)
{
    return sim->reads;
}

static void
set_hung(struct device_sim *sim, bool hung, bool for_ever)
{
    pthread_mutex_lock(&sim->lock);
    sim->hung = hung;
    sim->hung_for_ever = for_ever;
    pthread_cond_broadcast(&sim->changed);
    pthread_mutex_unlock(&sim->lock);
}

void
device_sim_hang(struct device_sim *sim, bool for_ever)
{
    set_hung(sim, true, for_ever);
}

void
device_sim_go_on(struct device_sim *sim)
{
    set_hung(sim, false, false);
}

uint64_t
device_sim_pinned_bytes(struct device_sim *sim)
{
    pthread_mutex_lock(&sim->lock);
    uint64_t bytes = sim->pinned_bytes;
    pthread_mutex_unlock(&sim->lock);
    return bytes;
}

uint64_t
device_sim_violations(struct device_sim *sim)
{
    pthread_mutex_lock(&sim->lock);
    uint64_t count = sim->violations;
    pthread_mutex_unlock(&sim->lock);
    return count;
}

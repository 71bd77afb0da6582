/*
 * device_sim.c: the table of a simulated device: each call checks what it is given and puts work on
 * a stream.
 */
#include "device_sim_parts.h"

#include "dcp_crc32.h"

#define READ_ALIGN_BYTES UINT64_C(4096)

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

/* A copy of memory that is not pinned is over when the call returns. */
static void
put_copy(struct device_sim *sim, const struct work *what)
{
    struct work work = *what;
    bool pinned = sim_is_pinned(what->host, what->bytes * dcp_max_u64(what->rows, 1));
    pthread_mutex_lock(&sim->lock);
    work.waited = !pinned && !sim->hung;
    struct work *queued = sim_put_locked(sim, OURS, &work);
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
sim_to_device_rows(void *ctx, uint64_t device, uint64_t pitch_bytes, const void *host,
                   uint64_t row_bytes, uint64_t rows, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "to_device", err);
    if (rc == 0 && (pitch_bytes < row_bytes || pitch_bytes > DCP_DEVICE_PITCH_BYTES)) {
        sim_violation(sim, "rows that overlap, or lie too far apart");
    }
    if (rc == 0) {
        put_copy(sim, &(struct work){
                          .kind = WORK_TO_DEVICE,
                          .host = (uint8_t *)(uintptr_t)host,
                          .device = device,
                          .bytes = row_bytes,
                          .pitch = pitch_bytes,
                          .rows = rows,
                          .crc = sim->options.instant ? 0 : dcp_crc32(0, host, rows * row_bytes)});
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
    sim_must(count > 0 && (sim->table.features & DCP_DEVICE_PACKS) != 0, "no kernels");
    if (rc == 0) {
        struct work work = {.kind = kind, .count = count};
        work.boxes = malloc(count * sizeof *boxes);
        sim_must(work.boxes != NULL, "no memory");
        memcpy(work.boxes, boxes, count * sizeof *boxes);
        sim_put(sim, OURS, &work);
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
    sim_must((sim->table.features & DCP_DEVICE_CHECKSUMS) != 0, "no checksums");
    if (rc == 0 && sim->options.no_checksum_memory) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "simulated: no memory for checksums");
    }
    if (rc == 0) {
        sim_must(sim_is_pinned((uint8_t *)crcs, blocks * sizeof *crcs),
                 "checksums go to pinned memory");
        memset(crcs, RUBBISH, blocks * sizeof *crcs);
        sim_put(
            sim, SUMS,
            &(struct work){
                .kind = WORK_CHECKSUM, .host = (uint8_t *)crcs, .device = device, .bytes = bytes});
    }
    return rc;
}

static int
sim_allocate(void *ctx, uint64_t bytes, uint64_t *ret_device, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "allocate", err);
    if (rc == 0) {
        *ret_device =
            bytes > sim->options.slab_most_bytes ? 0 : sim_take_memory(sim, bytes, 512, true);
        rc =
            *ret_device == 0 ? dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "simulated: no memory") : 0;
    }
    return rc;
}

static void
sim_release(void *ctx, uint64_t device)
{
    sim_put(ctx, OURS, &(struct work){.kind = WORK_RELEASE, .device = device});
}

static int
sim_pin(void *ctx, void *memory, uint64_t bytes, struct dcp_error *err)
{
    struct device_sim *sim = ctx;
    int rc = call(sim, "pin", err);
    if (rc == 0 && sim->options.no_pin) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "simulated: no memory to pin");
    }
    sim_change_pin(sim, memory, rc == 0 ? bytes : 0, true);
    return rc;
}

static void
sim_unpin(void *ctx, void *memory)
{
    /* It must still be there: this reads it. */
    (void)*(volatile uint8_t *)memory;
    sim_change_pin(ctx, memory, 0, false);
}

static struct dcp_device_event *
record_locked(struct device_sim *sim, uintptr_t stream)
{
    struct dcp_device_event *event = calloc(1, sizeof *event);
    sim_must(event != NULL, "no memory");
    sim->live_events++;
    event->left = stream == OURS ? 2 : 1;
    (void)sim_put_locked(sim, stream, &(struct work){.kind = WORK_EVENT, .event = event});
    if (stream == OURS) {
        (void)sim_put_locked(sim, SUMS, &(struct work){.kind = WORK_EVENT, .event = event});
    }
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
        rc = event->left == 0 ? 1 : 0;
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
        sim_drop_event_locked(sim, event);
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
        event->waiters = second == OURS ? 2 : 1;
        event->forgotten = true;
        (void)sim_put_locked(sim, second, &(struct work){.kind = WORK_WAIT, .event = event});
        if (second == OURS) {
            (void)sim_put_locked(sim, SUMS, &(struct work){.kind = WORK_WAIT, .event = event});
        }
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
        rc = sim->lost ? DCP_E_IO : DCP_E_TIMEOUT;
        rc = dcp_error_set(err, rc, 0, NULL, "simulated: nobody knows what still runs");
    } else {
        sim->hung = false;
        pthread_cond_broadcast(&sim->changed);
    }
    while (rc == 0 && (sim->streams[OURS].first != NULL || sim->streams[SUMS].first != NULL)) {
        pthread_cond_wait(&sim->changed, &sim->lock);
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
    sim_must(buffer != NULL, "no memory");
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
        memcpy(sim_real(sim, device), buffer + (offset - from), bytes);
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
    sim_must((sim->table.features & DCP_DEVICE_READS_FILES) != 0, "it reads no files");
    rc = rc == 0 ? sim_wait_idle(ctx, err) : rc;
    if (rc == 0 && !sim_is_live(sim, device, bytes)) {
        sim_violation(sim, "a file was read to device memory that is not allocated");
    } else if (rc == 0) {
        bool refused = ++sim->reads >= refuse && refuse > 0;
        uint64_t len = refused ? bytes / 2 : bytes;
        if (read_to_memory(sim, fd, offset_bytes, device, len) != 0 || refused) {
            rc = dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL, "simulated: not this file");
        }
    }
    return rc;
}

struct device_sim *
device_sim_new(const struct device_sim_options *options)
{
    struct device_sim *sim = calloc(1, sizeof *sim);
    sim_must(sim != NULL, "no memory");
    sim->options = *options;
    if (sim->options.memory_bytes == 0) {
        sim->options.memory_bytes = 64u << 20;
    }
    sim->rng.state = options->seed;
    sim->memory = malloc(sim->options.memory_bytes);
    sim_must(sim->memory != NULL, "no memory");
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
                                     .to_device_rows = sim_to_device_rows,
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
    sim_must(pthread_create(&sim->thread, NULL, sim_thread_main, sim) == 0, "no thread");
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

void
device_sim_poke_later(struct device_sim *sim, uintptr_t stream, uint64_t address, const void *data,
                      uint64_t len)
{
    uint8_t *copy = malloc(len + 1);
    sim_must(copy != NULL && stream != OURS, "not a trainer's stream");
    memcpy(copy, data, len);
    sim_put(sim, stream,
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

/*
 * writer_run.c: the files of a save, one after another: opened, filled by whoever has the bytes,
 * closed; and the threads this takes.
 *
 * Threads: the calling thread fills.  With direct I/O the kernel's queue writes beside it, or,
 * where there is none, one thread that lives as long as the call.  Neither is started below
 * INLINE_MOST_BYTES, where nothing overlaps, nor without direct I/O, where writing is copying by
 * the processor: a piece that goes to the kernel right after its checksum, from the cache, beats a
 * second thread that reads it from memory again.  With several files one more thread syncs and
 * closes them.
 */
#include "writer.h"

#include <errno.h>

#include "dcp_trace.h"

/* One buffer's worth: a single request, which no copy can run beside. */
#define INLINE_MOST_BYTES DCP_RING_BUFFER_BYTES

int
dcp_write_check_numbers(uint64_t n0, uint32_t files_count, struct dcp_error *err)
{
    if (n0 > UINT32_MAX || files_count > UINT32_MAX - n0) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "file number %llu is over 32 bits: save to a new directory",
                             (unsigned long long)n0);
    }
    return 0;
}

int
dcp_write_push(struct dcp_writer *writer, const uint8_t *data, uint64_t offset, uint64_t len,
               uint32_t slot, uint64_t *ret_number, struct dcp_error *err)
{
    int rc = dcp_write_check_cancel(writer, err);
    if (rc != 0) {
        return rc;
    }
    struct dcp_job job = {.file = writer->file,
                          .data = (uint8_t *)(uintptr_t)data,
                          .offset_bytes = offset,
                          .len_bytes = len,
                          .kind = DCP_WRITE_JOB_WRITE,
                          .slot = slot};
    *ret_number = dcp_pump_push(&writer->pump, &job);
    return 0;
}

static int
open_file(struct dcp_writer *writer, uint32_t index, struct dcp_write_file **ret_file,
          struct dcp_error *err)
{
    uint64_t n, length_bytes;
    uint64_t traced = dcp_trace_begin();
    writer->content.describe(writer, index, &n, &length_bytes);
    int rc = dcp_write_file_open(writer, n, length_bytes, ret_file, err);
    if (rc == 0) {
        (*ret_file)->index = index;
        dcp_trace_end_io(traced, "open", (*ret_file)->name, 0, 0);
    }
    return rc;
}

/* Opens and allocates all files, where they are few and large. */
static int
open_ahead(struct dcp_writer *writer, struct dcp_error *err)
{
    if (writer->files_count < 2 || writer->files_count > DCP_AHEAD_FILES ||
        writer->total_bytes < DCP_AHEAD_BYTES) {
        return 0;
    }
    for (uint32_t i = 0; i < writer->files_count; i++) {
        struct dcp_error local;
        dcp_error_clear(&local);
        int rc = open_file(writer, i, &writer->ahead[i], &local);
        if (rc != 0 && (local.sys_errno == EMFILE || local.sys_errno == ENFILE)) {
            return 0; /* one at a time, then */
        }
        if (rc != 0) {
            if (err != NULL && err->code == 0) {
                *err = local;
            }
            return rc;
        }
    }
    return 0;
}

static int
take_file(struct dcp_writer *writer, uint32_t index, struct dcp_error *err)
{
    if (index < DCP_AHEAD_FILES && writer->ahead[index] != NULL) {
        writer->file = writer->ahead[index];
        writer->ahead[index] = NULL;
        return 0;
    }
    return open_file(writer, index, &writer->file, err);
}

/* Given up half way: the job closes the file without calling it finished. */
static void
give_up_file(struct dcp_writer *writer, struct dcp_write_file *file)
{
    if (file != NULL) {
        struct dcp_job job = {.file = file, .kind = DCP_WRITE_JOB_CLOSE, .flags = 1};
        dcp_pump_push(&writer->pump, &job);
    }
}

static int
write_file(struct dcp_writer *writer, uint32_t index, struct dcp_error *err)
{
    int rc = take_file(writer, index, err);
    if (rc != 0) {
        return rc;
    }
    uint64_t length_bytes = writer->file->length_bytes;
    if (writer->file->direct && (writer->total_bytes > INLINE_MOST_BYTES ||
                                 writer->options->tuning.queue == DCP_QUEUE_ON)) {
        rc = dcp_write_queue_start(writer, err);
    }
    rc = rc == 0 ? writer->content.write(writer, index, err) : rc;
    if (rc == 0) {
        struct dcp_job job = {.file = writer->file, .kind = DCP_WRITE_JOB_CLOSE};
        dcp_pump_push(&writer->pump, &job);
        writer->file = NULL;
        writer->stats.files_count++;
        writer->stats.file_bytes += length_bytes;
    }
    return rc;
}

static int
write_files(struct dcp_writer *writer, struct dcp_error *err)
{
    int rc = open_ahead(writer, err);
    if (writer->options->sync && writer->files_count > 1) {
        dcp_pump_start(&writer->closer);
    }
    for (uint32_t i = 0; rc == 0 && i < writer->files_count; i++) {
        rc = write_file(writer, i, err);
    }
    give_up_file(writer, writer->file);
    for (int i = 0; i < DCP_AHEAD_FILES; i++) {
        give_up_file(writer, writer->ahead[i]);
    }
    return rc;
}

static void
count_time(struct dcp_writer *writer, uint64_t start_ns, uint64_t filled_ns)
{
    struct dcp_write_stats *stats = &writer->stats;
    uint64_t waited_ns = writer->pump.wait_ns + writer->queue.wait_ns;
    uint64_t inline_ns = 0; /* of the calling thread, besides copying */
    stats->limited_ns = writer->rate.slept_ns;
    if (!writer->pump.threaded) {
        waited_ns += writer->closer.wait_ns;
        inline_ns = stats->limited_ns + stats->write_ns;
        inline_ns += writer->closer.threaded ? 0 : stats->sync_ns;
    }
    uint64_t filling_ns = filled_ns - start_ns;
    stats->copy_ns = filling_ns - dcp_min_u64(filling_ns, waited_ns + inline_ns);
    stats->wait_ns = waited_ns + (dcp_engine_now_ns() - filled_ns);
}

static int
run_threads(struct dcp_writer *writer, uint64_t start_ns, struct dcp_error *err)
{
    int rc = dcp_pump_init(&writer->pump, dcp_write_file_job, writer, err);
    if (rc != 0) {
        return rc;
    }
    rc = dcp_pump_init(&writer->closer, dcp_write_close_job, writer, err);
    if (rc == 0) {
        writer->pump.name = "writing";
        writer->closer.name = "syncing";
        writer->pump.on_start = writer->closer.on_start = dcp_write_thread_priority;
        if (writer->options->own_thread) {
            dcp_write_thread_priority(writer);
        }
        rc = write_files(writer, err);
        int queue_rc = dcp_write_queue_finish(writer, rc != 0, err);
        rc = rc != 0 ? rc : queue_rc;
    }
    uint64_t filled_ns = dcp_engine_now_ns();
    int pump_rc = dcp_pump_clean_up(&writer->pump, err);
    int closer_rc = dcp_pump_clean_up(&writer->closer, err);
    count_time(writer, start_ns, filled_ns);
    return rc != 0 ? rc : pump_rc != 0 ? pump_rc : closer_rc;
}

int
dcp_write_run(struct dcp_writer *writer, struct dcp_error *err)
{
    uint64_t start_ns = dcp_engine_now_ns();
    dcp_rate_init(&writer->rate, writer->io, writer->options->tuning.limit_bytes_s,
                  writer->request_bytes);
    int rc = run_threads(writer, start_ns, err);
    writer->stats.priority_failures = atomic_load(&writer->priority_failures);
    writer->stats.wall_ns = dcp_engine_now_ns() - start_ns;
    return rc;
}

/*
 * export_stream.c: bytes in the order of the file, collected in buffers, written by a second
 * thread.
 *
 * A buffer stands for a span of the file that begins on a page, so what is put at some offset lies
 * in memory as it does in its page, and whole pages can be written from it with direct I/O.  Bytes
 * that follow the last ones join them; others start the next buffer.  The calling thread copies
 * into one buffer while the writing thread sleeps in the write of another.
 *
 * Invariants: from_bytes <= filled_bytes; equal: the buffer holds nothing.  A slot is filled only
 * after its last job has run.
 * Threads: all functions on the thread that began the export; jobs on the pump's.
 */
#include "export.h"

#include <string.h>

enum { JOB_RANGE = 1, JOB_ROWS = 2, JOB_CLOSE = 3 };

static int
run_job(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err)
{
    struct dcp_export *run = ctx;
    struct dcp_export_out *out = job->file;
    if (job->kind == JOB_CLOSE) {
        bool good = !failed && job->flags == 0;
        return dcp_export_out_close(&run->dir, out, good && run->options->sync, &run->stats, err);
    }
    int rc = failed ? 0 : dcp_export_check_cancel(run->options->cancel, err);
    if (failed || rc != 0) {
        return rc;
    }
    if (!dcp_rate_wait(&run->rate, job->len_bytes, run->options->cancel)) {
        return dcp_export_check_cancel(run->options->cancel, err);
    }
    rc = job->kind == JOB_ROWS
             ? dcp_export_out_rows(&run->dir, out, job->data, job->offset_bytes, job->len_bytes,
                                   &run->rows[job->slot], &run->stats, err)
             : dcp_export_out_range(&run->dir, out, job->data, job->offset_bytes, job->len_bytes,
                                    &run->stats, err);
    if (rc == 0 && run->options->progress_bytes != NULL) {
        atomic_fetch_add_explicit(run->options->progress_bytes, job->len_bytes,
                                  memory_order_relaxed);
    }
    return rc;
}

static void
on_start(void *ctx)
{
    struct dcp_export *run = ctx;
    const struct dcp_write_tuning *tuning = &run->options->tuning;
    if (tuning->nice != 0 || tuning->io_priority != 0) {
        /* An export at full priority is no failed one. */
        (void)run->dir.io->thread_priority(run->dir.io->ctx, tuning->nice, tuning->io_priority);
    }
}

int
dcp_export_begin(struct dcp_export *run, const struct dcp_io *io, const char *dir_path,
                 const struct dcp_engine_options *options, struct dcp_error *err)
{
    memset(run, 0, sizeof *run);
    run->options = options;
    run->stats.wall_ns = dcp_engine_now_ns(); /* the start, until the end */
    int rc = dcp_export_dir_open(&run->dir, io, dir_path, err);
    if (rc == 0) {
        rc = dcp_ring_acquire(options->ring_buffers, options->ring_buffer_bytes, &run->ring, err);
    }
    if (rc == 0) {
        rc = dcp_pump_init(&run->pump, run_job, run, err);
    }
    if (rc != 0) {
        dcp_ring_release(run->ring);
        dcp_export_dir_close(&run->dir);
        return rc;
    }
    run->pump.on_start = on_start;
    run->stats.memory_bytes = run->ring->buffer_bytes * run->ring->buffers_count;
    dcp_rate_init(&run->rate, io, options->tuning.limit_bytes_s, run->ring->buffer_bytes);
    dcp_pump_start(&run->pump);
    return 0;
}

static void
push_slot(struct dcp_export *run, const struct dcp_job *job)
{
    run->jobs[run->slot] = dcp_pump_push(&run->pump, job) + 1;
    run->stats.payload_bytes += job->len_bytes;
    run->slot = (run->slot + 1) % run->ring->buffers_count;
    run->slot_is_free = false;
    run->from_bytes = run->filled_bytes = 0;
}

/* Hands over what the buffer holds. */
static void
push_filled(struct dcp_export *run)
{
    if (run->filled_bytes == run->from_bytes) {
        return;
    }
    struct dcp_job job = {.file = run->out,
                          .data = dcp_ring_buffer(run->ring, run->slot),
                          .offset_bytes = run->base_bytes + run->from_bytes,
                          .len_bytes = run->filled_bytes - run->from_bytes,
                          .kind = JOB_RANGE,
                          .slot = run->slot};
    push_slot(run, &job);
}

/* 0, or the code of the writing thread's first failure, which it keeps. */
static int
wait_for_slot(struct dcp_export *run)
{
    if (run->slot_is_free) {
        return 0;
    }
    uint64_t job = run->jobs[run->slot];
    int rc = job == 0 ? dcp_pump_code(&run->pump) : dcp_pump_wait(&run->pump, job - 1);
    run->slot_is_free = rc == 0;
    return rc;
}

/* Whoever closes it, it is closed once. */
static void
leave(struct dcp_export *run, bool given_up)
{
    if (run->out == NULL) {
        return;
    }
    struct dcp_job job = {.file = run->out, .kind = JOB_CLOSE, .flags = given_up};
    (void)dcp_pump_push(&run->pump, &job);
    run->out = NULL;
}

int
dcp_export_enter(struct dcp_export *run, const struct dcp_export_file *what, struct dcp_error *err)
{
    push_filled(run);
    leave(run, false);
    int rc = dcp_export_check_cancel(run->options->cancel, err);
    return rc != 0 ? rc
                   : dcp_export_out_open(&run->dir, what, run->options->direct, &run->out, err);
}

int
dcp_export_room(struct dcp_export *run, uint64_t offset_bytes, uint64_t want, uint8_t **ret,
                uint64_t *ret_len)
{
    DCP_ASSERT(run->out != NULL && want > 0);
    uint64_t size = run->ring->buffer_bytes;
    if (run->filled_bytes > run->from_bytes &&
        (offset_bytes != run->base_bytes + run->filled_bytes || run->filled_bytes == size)) {
        push_filled(run);
    }
    int rc = wait_for_slot(run);
    if (rc != 0) {
        return rc;
    }
    if (run->filled_bytes == run->from_bytes) {
        run->from_bytes = run->filled_bytes = offset_bytes % DCP_DIRECT_ALIGN_BYTES;
        run->base_bytes = offset_bytes - run->from_bytes;
    }
    *ret = dcp_ring_buffer(run->ring, run->slot) + run->filled_bytes;
    *ret_len = dcp_min_u64(want, size - run->filled_bytes);
    run->filled_bytes += *ret_len;
    return 0;
}

int
dcp_export_rows_room(struct dcp_export *run, uint8_t **ret)
{
    DCP_ASSERT(run->out != NULL);
    push_filled(run);
    int rc = wait_for_slot(run);
    if (rc == 0) {
        *ret = dcp_ring_buffer(run->ring, run->slot);
    }
    return rc;
}

void
dcp_export_push_rows(struct dcp_export *run, uint64_t offset_bytes, uint64_t len,
                     const struct dcp_export_rows *rows)
{
    run->rows[run->slot] = *rows;
    struct dcp_job job = {.file = run->out,
                          .data = dcp_ring_buffer(run->ring, run->slot),
                          .offset_bytes = offset_bytes,
                          .len_bytes = len,
                          .kind = JOB_ROWS,
                          .slot = run->slot};
    push_slot(run, &job);
}

int
dcp_export_end(struct dcp_export *run, int rc, struct dcp_export_stats *ret_stats,
               struct dcp_error *err)
{
    if (rc == 0 && run->out != NULL) {
        push_filled(run);
    }
    leave(run, rc != 0);
    run->stats.wait_ns = run->pump.wait_ns;
    int code = dcp_pump_clean_up(&run->pump, err);
    dcp_ring_release(run->ring);
    dcp_export_dir_close(&run->dir);
    run->stats.wall_ns = dcp_engine_now_ns() - run->stats.wall_ns;
    rc = rc != 0 ? rc : code;
    if (rc == 0 && ret_stats != NULL) {
        *ret_stats = run->stats;
    }
    return rc;
}

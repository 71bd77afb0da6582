/*
 * writer_image.c: data files from a ready image: requests straight from its memory.
 *
 * Neither the plan nor the tensors are needed, and nothing is copied: whoever maps the image can
 * write it.  The rest is a save's: files, threads, the queue, what failed writes become.
 *
 * Invariants: files lie on multiples of DCP_DIRECT_ALIGN_BYTES, with zeros behind them, so every
 * request is aligned, and the last one may be longer than its file.
 * Threads: as writer_run.c; nothing is copied on the calling thread.
 */
#include "writer.h"

#include "dcp_trace.h"

static void
describe_file(const struct dcp_writer *writer, uint32_t index, uint64_t *ret_n,
              uint64_t *ret_length_bytes)
{
    *ret_n = writer->image->files[index].n;
    *ret_length_bytes = writer->image->files[index].length_bytes;
}

static int
push_file(struct dcp_writer *writer, uint32_t index, struct dcp_error *err)
{
    const struct dcp_image_file *placed = &writer->image->files[index];
    const uint8_t *memory = writer->image_memory + placed->offset_bytes;
    uint64_t end = dcp_align_up(placed->length_bytes, writer->file->align_bytes);
    for (uint64_t at = 0; at < end; at += writer->request_bytes) {
        uint64_t number, len = dcp_min_u64(end - at, writer->request_bytes);
        uint64_t waiting = dcp_trace_begin();
        int rc = dcp_write_queue_wait(writer, writer->buffer_index, err);
        dcp_trace_end(waiting, "wait", "wait for a slot", 0);
        if (rc == 0) {
            rc = dcp_write_push(writer, memory + at, at, len, writer->buffer_index, &number, err);
        }
        /* The pump keeps the error; it is fetched when the pump is cleaned up. */
        rc = rc == 0 ? dcp_pump_code(&writer->pump) : rc;
        if (rc != 0) {
            return rc;
        }
        writer->buffer_index = (writer->buffer_index + 1) % writer->slots_count;
    }
    return 0;
}

int
dcp_image_write(const struct dcp_io *io, int dirfd, const char *dir_path,
                const struct dcp_image *image, const uint8_t *memory,
                const struct dcp_engine_options *options, struct dcp_write_stats *ret_stats,
                struct dcp_error *err)
{
    struct dcp_writer writer = {.io = io,
                                .dirfd = dirfd,
                                .dir_path = dir_path,
                                .options = options,
                                .content = {describe_file, push_file},
                                .rank = image->rank,
                                .files_count = image->files_count,
                                .total_bytes = image->total_bytes,
                                .request_bytes = options->ring_buffer_bytes,
                                .padded_bytes = DCP_DIRECT_ALIGN_BYTES,
                                .slots_count = options->ring_buffers,
                                .image = image,
                                .image_memory = memory};
    DCP_ASSERT((uintptr_t)memory % DCP_DIRECT_ALIGN_BYTES == 0);
    int rc = dcp_ring_shape(&writer.slots_count, &writer.request_bytes, err);
    rc = rc == 0 ? dcp_write_run(&writer, err) : rc;
    if (rc == 0) {
        writer.stats.payload_bytes = image->payload_bytes;
        if (ret_stats != NULL) {
            *ret_stats = writer.stats;
        }
    }
    return rc;
}

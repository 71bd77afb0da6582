/*
 * image.c: a save's data files as they will be, in memory.
 *
 * The writer's walk (writer.c) makes the bytes; here they stay where they are put.  Payloads on
 * devices are put there by the devices (device_stage.c), before and beside the walk.  Each file
 * starts on a multiple of DCP_DIRECT_ALIGN_BYTES and is followed by zeros up to the next one, so
 * direct I/O writes it without a copy.
 *
 * Invariants: a filled image has no byte that the walk did not write: memory may be reused without
 * clearing it.
 * Threads: all of it on the calling thread.
 */
#include "dcp_image.h"

#include <string.h>

#include "dcp_trace.h"
#include "writer.h"

int
dcp_image_place(const struct dcp_layout *layout, uint32_t rank, uint64_t n0,
                struct dcp_image *ret_image, struct dcp_error *err)
{
    struct dcp_image image = {
        .rank = rank, .files_count = layout->files_count, .payload_bytes = layout->payload_bytes};
    int rc = dcp_write_check_numbers(n0, layout->files_count, err);
    if (rc != 0) {
        return rc;
    }
    image.files = dcp_malloc_array(layout->files_count, sizeof *image.files);
    if (image.files == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for an image of %u files",
                             layout->files_count);
    }
    for (uint32_t i = 0; i < layout->files_count; i++) {
        const struct dcp_placed_file *placed = &layout->files[i];
        uint64_t end;
        if (dcp_add_overflows_u64(image.bytes, placed->length_bytes, &end) || end > INT64_MAX) {
            dcp_image_clean_up(&image);
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "the files of rank %u do not fit one address space together",
                                 rank);
        }
        image.files[i] = (struct dcp_image_file){.offset_bytes = image.bytes,
                                                 .length_bytes = placed->length_bytes,
                                                 .n = n0 + placed->index};
        image.bytes = dcp_align_up(end, DCP_DIRECT_ALIGN_BYTES);
        image.total_bytes += placed->length_bytes;
    }
    *ret_image = image;
    return 0;
}

void
dcp_image_clean_up(struct dcp_image *image)
{
    if (image != NULL) {
        dcp_free(image->files);
        memset(image, 0, sizeof *image);
    }
}

int
dcp_image_begin(const struct dcp_image *image, uint8_t *memory, const struct dcp_plan *plan,
                const struct dcp_layout *layout, const struct dcp_source *sources,
                const struct dcp_engine_options *options, struct dcp_device_stage **ret_stage,
                bool *ret_idle, struct dcp_error *err)
{
    const struct dcp_device_stage_params params = {
        .devices = options->devices,
        .plan = plan,
        .layout = layout,
        .sources = sources,
        .image = image,
        .memory = memory,
        /* For content hashes the host reads every byte, and a CRC on the way costs nothing. */
        .crcs = !plan->content_hash || options->hashes != NULL ? options->device_crcs : NULL,
        .cancel = options->cancel,
        .stats = options->device_stats,
    };
    return dcp_device_stage_begin(&params, ret_stage, ret_idle, err);
}

int
dcp_image_end(const struct dcp_image *image, uint8_t *memory, const struct dcp_plan *plan,
              const struct dcp_layout *layout, const struct dcp_source *sources,
              const struct dcp_save_id *save_id, uint64_t n0,
              const struct dcp_engine_options *options, struct dcp_device_stage *stage,
              uint32_t *ret_crcs, struct dcp_error *err)
{
    struct dcp_writer writer = {.options = options,
                                .rank = plan->rank,
                                .plan = plan,
                                .layout = layout,
                                .sources = sources,
                                .save_id = save_id,
                                .n0 = n0,
                                .crcs = ret_crcs,
                                .stage = stage};
    int rc = 0;
    DCP_ASSERT(image->files_count == layout->files_count && image->rank == plan->rank);
    for (uint32_t i = 0; rc == 0 && i < image->files_count; i++) {
        const struct dcp_image_file *file = &image->files[i];
        uint64_t end = dcp_align_up(file->length_bytes, DCP_DIRECT_ALIGN_BYTES);
        DCP_ASSERT(file->n == n0 + layout->files[i].index &&
                   file->offset_bytes + end <= image->bytes);
        uint64_t traced = dcp_trace_begin();
        dcp_write_stream_open_image(&writer, memory + file->offset_bytes, file->length_bytes);
        rc = dcp_write_walk_file(&writer, &layout->files[i], err);
        if (rc == 0) {
            memset(memory + file->offset_bytes + file->length_bytes, 0, end - file->length_bytes);
        }
        dcp_trace_end(traced, "cpu", "copy and checksum", file->length_bytes);
    }
    rc = rc == 0 ? dcp_write_end_bringing(&writer, err) : rc;
    dcp_buf_clean_up(&writer.scratch);
    return rc;
}

int
dcp_image_fill(const struct dcp_image *image, uint8_t *memory, const struct dcp_plan *plan,
               const struct dcp_layout *layout, const struct dcp_source *sources,
               const struct dcp_save_id *save_id, uint64_t n0,
               const struct dcp_engine_options *options, uint32_t *ret_crcs, struct dcp_error *err)
{
    return dcp_image_end(image, memory, plan, layout, sources, save_id, n0, options, NULL, ret_crcs,
                         err);
}

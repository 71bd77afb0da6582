/*
 * dcp_image.h: the data files of a save as they will be, in memory.
 *
 * Staging builds the image in one pass over the tensors: headers, payloads by fused copy and CRC,
 * tables.  What is left is to write it, which needs neither the plan nor the tensors: a C thread or
 * another process does it at the cost of the system calls.
 *
 * Thread rule: none; a place belongs to whoever made it.
 */
#ifndef DCP_IMAGE_H
#define DCP_IMAGE_H

#include "dcp_engine.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dcp_image_file {
    uint64_t offset_bytes; /* in the image; a multiple of DCP_DIRECT_ALIGN_BYTES */
    uint64_t length_bytes; /* of the file; zeros follow up to the next such multiple */
    uint64_t n;            /* of the name __{rank}_{n}.distcp */
};

/* Where files lie in an image.  Zero-initialised is a valid empty one. */
struct dcp_image {
    uint32_t rank;
    uint32_t files_count;
    struct dcp_image_file *files; /* owned */
    uint64_t bytes;               /* of memory that holds the image */
    uint64_t total_bytes;         /* of all files */
    uint64_t payload_bytes;       /* for progress */
};

int dcp_image_place(const struct dcp_layout *layout, uint32_t rank, uint64_t n0,
                    struct dcp_image *ret_image, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_image_clean_up(struct dcp_image *image);

/* Builds all files of `layout` in `memory` (image->bytes, page aligned).  Of `options` cancel,
 * hashes and progress_bytes are used.  `ret_crcs` as of dcp_writer_run.  All sources are memory of
 * the host; else see dcp_image_begin. */
int dcp_image_fill(const struct dcp_image *image, uint8_t *memory, const struct dcp_plan *plan,
                   const struct dcp_layout *layout, const struct dcp_source *sources,
                   const struct dcp_save_id *save_id, uint64_t n0,
                   const struct dcp_engine_options *options, uint32_t *ret_crcs,
                   struct dcp_error *err) DCP_MUST_CHECK;

/* The same with sources on options->devices, in two steps.  The first puts copies of their payloads
 * on the devices' streams, as many as those take at a time, and counts into options->device_stats;
 * it waits for none.  All that it is given is borrowed until the stage ends.  *ret_idle false: it
 * failed, and copies may still write to `memory`, for ever. */
struct dcp_device_stage;
/* Room for the checksums that devices may compute of an image's payloads: options->device_crcs. */
uint64_t dcp_image_checksums_bytes(const struct dcp_layout *layout);
int dcp_image_begin(const struct dcp_image *image, uint8_t *memory, const struct dcp_plan *plan,
                    const struct dcp_layout *layout, const struct dcp_source *sources,
                    const struct dcp_engine_options *options, struct dcp_device_stage **ret_stage,
                    bool *ret_idle, struct dcp_error *err) DCP_MUST_CHECK;
/* Puts the other copies, fills the rest around them, and waits for each where it needs it.  Once
 * all payloads are in `memory` it calls options->brought, and does not look at `sources` again:
 * they may be gone.  Then, whatever it returns, the caller ends the stage. */
int dcp_image_end(const struct dcp_image *image, uint8_t *memory, const struct dcp_plan *plan,
                  const struct dcp_layout *layout, const struct dcp_source *sources,
                  const struct dcp_save_id *save_id, uint64_t n0,
                  const struct dcp_engine_options *options, struct dcp_device_stage *stage,
                  uint32_t *ret_crcs, struct dcp_error *err) DCP_MUST_CHECK;
/* Waits for copies that were not waited for; false: they may still write to `memory`, for ever.
 * NULL is fine. */
bool dcp_device_stage_end(struct dcp_device_stage *stage, struct dcp_error *err);

/* Creates (O_EXCL), writes, syncs and closes every file, as dcp_writer_run does.  The progress is
 * of image->payload_bytes, by the share of file bytes that are written.  Requests have
 * options->ring_buffer_bytes, and options->ring_buffers of them are in flight at a time.  When it
 * sets *options->memory_lost, `memory` must be neither freed nor used again. */
int dcp_image_write(const struct dcp_io *io, int dirfd, const char *dir_path,
                    const struct dcp_image *image, const uint8_t *memory,
                    const struct dcp_engine_options *options, struct dcp_write_stats *ret_stats,
                    struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif

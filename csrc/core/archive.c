/*
 * archive.c: a checkpoint's tensors streamed into one torch.save file.
 *
 * The layout of the zip is known before the first byte is read, so the file is a stream like a data
 * file of a save (writer_stream.c): one fused pass copies and sums what was read ahead into the
 * ring that direct I/O writes from.  The sum is at once what the zip wants to know of its entry and
 * what the record said of it, which is how every byte is verified: nothing reaches the end of the
 * file, and with it a name, unless all of them were right.
 *
 * Memory: 12 MiB of what is read ahead, 24 MiB of what is written, and what the caller fetches.
 * Threads: the calling thread copies; one reads ahead (archive_read.c), the kernel's queue or one
 * more writes (writer_run.c).
 */
#include "dcp_archive.h"

#include <string.h>

#include "archive_read.h"
#include "archive_zip.h"
#include "dcp_crc32.h"
#include "writer.h"

enum { WRITE_BUFFERS = 3 };

/* `writer` is first: the content functions get it. */
struct archive {
    struct dcp_writer writer;
    const struct dcp_archive_params *params;
    struct archive_place *places;
    uint64_t directory_offset;
    struct archive_reader reader;
    uint64_t fetched_bytes;
};

/* ---- entries ---- */

/* What scratch holds, and empties it. */
static int
write_scratch(struct dcp_writer *writer, struct dcp_error *err)
{
    struct dcp_buf *scratch = &writer->scratch;
    int rc = dcp_buf_check(scratch, err);
    if (rc == 0) {
        rc = dcp_write_stream_bytes(writer, scratch->data, scratch->len, err);
    }
    dcp_buf_clear(scratch);
    return rc;
}

static int
write_payload(struct dcp_writer *writer, const uint8_t *data, uint64_t len, uint32_t *ret_crc,
              struct dcp_error *err)
{
    struct dcp_source source = {.data = data};
    struct dcp_write_payload payload = {.source = &source, .item_bytes = 1, .len_bytes = len};
    int rc = dcp_write_stream_payload(writer, &payload, err);
    *ret_crc = payload.crc;
    return rc;
}

static int
write_records(struct archive *self, uint64_t index, uint32_t *ret_crc, struct dcp_error *err)
{
    uint64_t left = self->params->entries[index].bytes;
    uint32_t entry_crc = 0, payload_crc = 0;
    while (left > 0) {
        const struct archive_piece *piece;
        uint32_t crc;
        int rc = archive_read_next(&self->reader, index, &piece, err);
        if (rc == 0) {
            rc = write_payload(&self->writer, piece->bytes, piece->len_bytes, &crc, err);
        }
        if (rc != 0) {
            return rc;
        }
        entry_crc = dcp_crc32_combine(entry_crc, crc, piece->len_bytes);
        payload_crc = piece->first ? crc : dcp_crc32_combine(payload_crc, crc, piece->len_bytes);
        if (piece->last && piece->payload.has_crc && payload_crc != piece->payload.crc) {
            return archive_read_mismatch(&self->reader, piece, payload_crc, err);
        }
        left -= piece->len_bytes;
    }
    *ret_crc = entry_crc;
    return 0;
}

static int
write_bytes_of(struct archive *self, uint64_t index, uint32_t *ret_crc, struct dcp_error *err)
{
    const struct dcp_archive_entry *entry = &self->params->entries[index];
    const uint8_t *data = entry->data;
    enum archive_way way = ARCHIVE_UNKNOWN;
    int rc = archive_read_way(&self->reader, index, &way, err);
    if (rc == 0 && way == ARCHIVE_RECORDS) {
        return write_records(self, index, ret_crc, err);
    }
    if (rc == 0 && way == ARCHIVE_FETCH) {
        rc = self->params->fetch(self->params->fetch_ctx, index, &data, err);
        self->fetched_bytes += entry->bytes;
    }
    return rc == 0 ? write_payload(&self->writer, data, entry->bytes, ret_crc, err) : rc;
}

static int
write_entry(struct archive *self, uint64_t index, struct dcp_error *err)
{
    const struct dcp_archive_entry *entry = &self->params->entries[index];
    struct archive_place *place = &self->places[index];
    struct dcp_writer *writer = &self->writer;
    archive_zip_put_local(&writer->scratch, self->params, entry, place);
    int rc = write_scratch(writer, err);
    DCP_ASSERT(rc != 0 || writer->position_bytes == place->data_offset);
    if (rc == 0 && entry->bytes > 0) {
        rc = write_bytes_of(self, index, &place->crc, err);
    }
    if (rc == 0) {
        archive_zip_put_descriptor(&writer->scratch, entry, place);
        rc = write_scratch(writer, err);
    }
    return rc;
}

static int
write_directory(struct archive *self, struct dcp_error *err)
{
    const struct dcp_archive_params *params = self->params;
    struct dcp_writer *writer = &self->writer;
    int rc = 0;
    DCP_ASSERT(writer->position_bytes == self->directory_offset);
    for (uint64_t i = 0; rc == 0 && i < params->entries_count; i++) {
        archive_zip_put_central(&writer->scratch, params, &params->entries[i], &self->places[i]);
        rc = write_scratch(writer, err);
    }
    if (rc == 0) {
        archive_zip_put_end(&writer->scratch, params->entries_count, self->directory_offset,
                            writer->position_bytes - self->directory_offset);
        rc = write_scratch(writer, err);
    }
    return rc;
}

/* ---- the writer's content ---- */

static void
describe_file(const struct dcp_writer *writer, uint32_t index, uint64_t *ret_n,
              uint64_t *ret_length_bytes)
{
    (void)index;
    *ret_n = 0;
    *ret_length_bytes = writer->total_bytes;
}

static int
stream_file(struct dcp_writer *writer, uint32_t index, struct dcp_error *err)
{
    struct archive *self = (struct archive *)writer;
    int rc = 0;
    (void)index;
    dcp_write_stream_open(writer);
    for (uint64_t i = 0; rc == 0 && i < self->params->entries_count; i++) {
        rc = write_entry(self, i, err);
    }
    rc = rc == 0 ? write_directory(self, err) : rc;
    if (rc == 0 && writer->position_bytes != writer->total_bytes) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, writer->file->name,
                             "the file has %llu bytes where its layout says %llu",
                             (unsigned long long)writer->position_bytes,
                             (unsigned long long)writer->total_bytes);
    }
    return rc == 0 ? dcp_write_stream_flush(writer, err) : rc;
}

static int
run_writer(struct archive *self, int dirfd, struct dcp_archive_stats *ret_stats,
           struct dcp_error *err)
{
    struct dcp_writer *writer = &self->writer;
    writer->dirfd = dirfd;
    int rc = dcp_ring_acquire(WRITE_BUFFERS, DCP_RING_BUFFER_BYTES, &writer->ring, err);
    if (rc != 0) {
        return rc;
    }
    writer->request_bytes = writer->padded_bytes = writer->ring->buffer_bytes;
    writer->slots_count = writer->ring->buffers_count;
    rc = dcp_write_run(writer, err);
    struct dcp_read_stats read_stats = self->reader.reader.stats;
    int read_rc = archive_reader_clean_up(&self->reader, err);
    ret_stats->write = writer->stats;
    ret_stats->read = read_stats;
    ret_stats->fetched_bytes = self->fetched_bytes;
    if (!writer->queue.lost) {
        dcp_ring_release(writer->ring);
    }
    return rc != 0 ? rc : read_rc;
}

int
dcp_archive_write(const struct dcp_archive_params *params, struct dcp_archive_stats *ret_stats,
                  struct dcp_error *err)
{
    const struct dcp_io *io = params->io;
    struct archive self = {.params = params};
    struct dcp_archive_stats stats = {.fetched_bytes = 0};
    self.writer = (struct dcp_writer){.io = io,
                                      .dir_path = params->target_path,
                                      .file_name = params->target_name,
                                      .options = params->options,
                                      .content = {describe_file, stream_file},
                                      .files_count = 1};
    if (strlen(params->target_name) >= DCP_WRITE_NAME_BYTES) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "the name %s is too long",
                             params->target_name);
    }
    self.places = dcp_malloc_array(params->entries_count, sizeof *self.places);
    if (self.places == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a zip's directory");
    }
    int dirfd = -1;
    int rc = archive_zip_place(params, self.places, &self.directory_offset, err);
    if (rc == 0) {
        self.writer.total_bytes =
            self.directory_offset +
            archive_zip_tail_bytes(params, self.places, self.directory_offset);
        rc = archive_reader_init(&self.reader, params, err);
    }
    if (rc == 0) {
        dirfd = io->open_dir(io->ctx, params->target_path);
        rc = dirfd >= 0 ? 0
                        : dcp_error_set(err, DCP_E_IO, -dirfd, params->target_path,
                                        "opening the directory %s failed: %s", params->target_path,
                                        strerror(-dirfd));
    }
    if (rc == 0) {
        rc = run_writer(&self, dirfd, &stats, err);
    }
    (void)!archive_reader_clean_up(&self.reader, err);
    if (dirfd >= 0) {
        io->close(io->ctx, dirfd);
    }
    dcp_buf_clean_up(&self.writer.scratch);
    dcp_free(self.places);
    if (rc == 0 && ret_stats != NULL) {
        *ret_stats = stats;
    }
    return rc;
}

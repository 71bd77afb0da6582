/*
 * writer.c: one rank's data files, from its layout and its sources.
 *
 * A file is a stream: [header][records and the gaps before them][block table][hash table].  The
 * layout has fixed every offset beforehand, so nothing is ever patched: what is known late
 * (checksums, hashes) lies behind what it covers.  One file after another goes through the same
 * ring; the next file is filled while the last one is written and synced.
 *
 * The same walk fills an image (image.c): only the stream under it differs.
 *
 * A payload on a device is like any other to the walk: for files its bytes are read off a stream
 * that runs ahead, in an image they have landed where they belong.
 *
 * Memory: the ring (32 MiB by default), 4 bytes per MiB of payload, 32 bytes per hashed record.
 * Threads: the calling thread copies; writer_run.c says who writes.
 */
#include "writer.h"

#include <string.h>

/* What is kept of a file's payloads until its tables are written. */
struct file_blocks {
    struct dcp_block_entry *entries;
    uint32_t entries_count;
    uint32_t *crcs;
    uint64_t crcs_count;           /* used */
    struct dcp_hash_entry *hashes; /* one per record; NULL without a hash table */
    uint32_t hashes_count;         /* used */
};

/* A record that we make ourselves, from raw elements. */
static bool
is_raw(const struct dcp_item *item)
{
    return item->kind != DCP_ITEM_BYTES && item->slot_bytes == 0;
}

static uint64_t
blocks_of(uint64_t payload_bytes)
{
    return (payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
}

static void
file_blocks_clean_up(struct file_blocks *blocks)
{
    dcp_free(blocks->entries);
    dcp_free(blocks->crcs);
    dcp_free(blocks->hashes);
    memset(blocks, 0, sizeof *blocks);
}

static int
file_blocks_init(const struct dcp_writer *writer, const struct dcp_placed_file *placed,
                 struct file_blocks *blocks, struct dcp_error *err)
{
    uint64_t crcs = 0;
    uint32_t entries = 0;
    for (uint32_t i = 0; i < placed->records_count; i++) {
        const struct dcp_placed_record *record = &writer->layout->records[placed->first_record + i];
        if (dcp_layout_lists(writer->plan, record)) {
            entries++;
            crcs += blocks_of(record->payload_bytes);
        }
    }
    uint64_t table_bytes = entries > 0 ? dcp_block_table_bytes(entries, crcs) : 0;
    uint64_t hash_bytes =
        writer->plan->content_hash ? dcp_hash_table_bytes(placed->records_count) : 0;
    if (table_bytes != placed->table_bytes || hash_bytes != placed->hash_bytes) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                             "the layout reserves %llu and %llu bytes for tables of %llu and %llu",
                             (unsigned long long)placed->table_bytes,
                             (unsigned long long)placed->hash_bytes,
                             (unsigned long long)table_bytes, (unsigned long long)hash_bytes);
    }
    blocks->entries = dcp_malloc_array(entries, sizeof *blocks->entries);
    blocks->crcs = dcp_malloc_array(crcs, sizeof *blocks->crcs);
    if (hash_bytes > 0) {
        blocks->hashes = dcp_malloc_array(placed->records_count, sizeof *blocks->hashes);
    }
    if (blocks->entries == NULL || blocks->crcs == NULL ||
        (hash_bytes > 0 && blocks->hashes == NULL)) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for checksums");
    }
    return 0;
}

static int
check_position(const struct dcp_writer *writer, uint64_t expected, struct dcp_error *err)
{
    if (writer->position_bytes != expected) {
        return dcp_error_set(
            err, DCP_E_INTERNAL, 0, writer->file != NULL ? writer->file->name : NULL,
            "the writer is at byte %llu where the layout says %llu",
            (unsigned long long)writer->position_bytes, (unsigned long long)expected);
    }
    return 0;
}

/* A finished record (an object, or a tensor that only torch.save can write), copied as it is. */
static int
write_ready(struct dcp_writer *writer, const struct dcp_placed_record *record,
            struct dcp_write_payload *payload, struct dcp_error *err)
{
    payload->item_bytes = 1;
    payload->ndim = 0;
    payload->len_bytes = record->length_bytes;
    struct dcp_source dense = {0};
    if (!payload->landed) {
        dense.data = payload->source->data;
        payload->source = &dense;
    }
    return dcp_write_stream_payload(writer, payload, err);
}

static int
write_raw(struct dcp_writer *writer, const struct dcp_item *item,
          const struct dcp_placed_record *record, struct dcp_write_payload *payload,
          struct dcp_error *err)
{
    struct dcp_buf *scratch = &writer->scratch;
    payload->ndim = item->ndim;
    payload->item_bytes = dcp_dtype_bytes(item->dtype);
    payload->sizes = dcp_item_sizes(writer->plan, item);
    payload->len_bytes = record->payload_bytes;
    struct dcp_tensor_shape shape = {.dtype = item->dtype,
                                     .ndim = item->ndim,
                                     .sizes = payload->sizes,
                                     .payload_bytes = record->payload_bytes};
    dcp_buf_clear(scratch);
    dcp_record_put_head(scratch, record->payload_bytes);
    int rc = dcp_buf_check(scratch, err);
    if (rc == 0) {
        rc = dcp_write_stream_bytes(writer, scratch->data, scratch->len, err);
    }
    if (rc == 0) {
        rc = check_position(writer, record->payload_offset_bytes, err);
    }
    if (rc == 0) {
        rc = dcp_write_stream_payload(writer, payload, err);
    }
    if (rc == 0) {
        dcp_buf_clear(scratch);
        dcp_record_put_tail(scratch, &shape, payload->crc, payload->block_crcs);
        rc = dcp_buf_check(scratch, err);
    }
    return rc == 0 ? dcp_write_stream_bytes(writer, scratch->data, scratch->len, err) : rc;
}

/* Everything has landed: nothing has to read the sources for longer than it takes to copy what is
 * left of them. */
static int
bring_rest(struct dcp_writer *writer, struct dcp_error *err)
{
    const struct dcp_engine_options *options = writer->options;
    int rc = dcp_device_stage_bring_rest(writer->stage, writer->next_record, options->cancel, err);
    writer->brought = rc == 0;
    if (rc == 0 && options->brought != NULL) {
        options->brought(options->brought_ctx);
    }
    return rc;
}

int
dcp_write_look_at_devices(struct dcp_writer *writer, uint64_t n, bool reads_source,
                          struct dcp_error *err)
{
    if (writer->stage == NULL || writer->brought) {
        return 0;
    }
    writer->unlooked_bytes += n;
    if (writer->unlooked_bytes < DCP_BLOCK_BYTES) {
        return 0;
    }
    int rc = dcp_device_stage_poll(writer->stage, writer->options->cancel, err);
    writer->unlooked_bytes = rc > 0 ? writer->unlooked_bytes : 0;
    if (rc > 0 && reads_source) {
        return 0;
    }
    return rc > 0 ? bring_rest(writer, err) : rc;
}

int
dcp_write_end_bringing(struct dcp_writer *writer, struct dcp_error *err)
{
    const uint8_t *to;
    if (writer->stage == NULL || writer->brought) {
        return 0;
    }
    int rc = dcp_device_stage_wait(writer->stage, (const uint8_t *)(UINTPTR_MAX - 1),
                                   writer->options->cancel, &to, err);
    return rc == 0 ? bring_rest(writer, err) : rc;
}

/* Before a record is written.  In an image devices may be writing to its place, and their copies
 * bring rubbish between payloads: up to a payload that comes piece by piece, or else to the
 * record's end, that is over.  The source of one that was brought may be gone. */
static int
prepare(struct dcp_writer *writer, uint32_t index, struct dcp_error *err)
{
    const struct dcp_placed_record *record = &writer->layout->records[index];
    const struct dcp_item *item = &writer->plan->items[record->item];
    const struct dcp_source *source = &writer->sources[record->item];
    const uint8_t *end = writer->buffer + record->offset_bytes + record->length_bytes;
    const uint8_t *to;
    if (writer->brought) {
        return 0;
    }
    int rc = dcp_device_check_source(writer->options->devices, writer->plan, item, source, err);
    if (rc != 0 || writer->stage == NULL) {
        return rc;
    }
    bool lands = source->device != 0 && record->payload_bytes > 0;
    rc = dcp_device_stage_wait(writer->stage,
                               lands ? writer->buffer + record->payload_offset_bytes : end,
                               writer->options->cancel, &to, err);
    if (rc == 0 && dcp_device_stage_is_late(writer->stage, index)) {
        rc = dcp_device_stage_wait(writer->stage, end, writer->options->cancel, &to, err);
        rc = rc == 0 ? dcp_device_stage_gather(writer->stage, index, writer->options->cancel, err)
                     : rc;
    }
    writer->next_record = index + 1;
    return rc;
}

/* Notes the record's content hash: `computed`, or NULL when the caller knew it before. */
static void
keep_hash(const struct dcp_writer *writer, const struct dcp_placed_record *record,
          const struct dcp_content_hash *computed, struct file_blocks *blocks)
{
    blocks->hashes[blocks->hashes_count++] =
        (struct dcp_hash_entry){.record_offset_bytes = record->offset_bytes,
                                .record_bytes = record->length_bytes,
                                .hash = computed != NULL ? dcp_content_hash_end(computed)
                                                         : writer->options->hashes[record->item]};
}

static int
write_record(struct dcp_writer *writer, uint32_t index, struct file_blocks *blocks,
             struct dcp_error *err)
{
    const struct dcp_placed_record *record = &writer->layout->records[index];
    const struct dcp_item *item = &writer->plan->items[record->item];
    struct dcp_write_payload payload = {.source = &writer->sources[record->item]};
    struct dcp_content_hash hash;
    int rc;
    if (blocks->hashes != NULL && writer->options->hashes == NULL) {
        dcp_content_hash_begin(&hash);
        payload.hash = &hash;
    }
    rc = dcp_write_look_at_devices(writer, record->length_bytes, false, err);
    rc = rc == 0 ? prepare(writer, index, err) : rc;
    payload.landed = writer->brought || (writer->stage != NULL && payload.source->device != 0);
    if (rc == 0) {
        rc = dcp_write_stream_zeros_to(writer, record->offset_bytes, err);
    }
    if (rc == 0) {
        rc = check_position(writer, record->offset_bytes, err);
    }
    if (rc != 0) {
        return rc;
    }
    if (dcp_layout_lists(writer->plan, record)) {
        payload.block_crcs = blocks->crcs + blocks->crcs_count;
        blocks->crcs_count += blocks_of(record->payload_bytes);
        payload.device_crcs =
            writer->stage == NULL ? NULL : dcp_device_stage_checksums(writer->stage, index);
    }
    rc = is_raw(item) ? write_raw(writer, item, record, &payload, err)
                      : write_ready(writer, record, &payload, err);
    if (rc == 0 && payload.block_crcs != NULL) {
        blocks->entries[blocks->entries_count++] = (struct dcp_block_entry){
            record->payload_offset_bytes, record->payload_bytes, payload.crc, payload.block_crcs};
    }
    if (rc == 0) {
        rc = check_position(writer, record->offset_bytes + record->length_bytes, err);
    }
    if (rc == 0 && writer->crcs != NULL) {
        writer->crcs[index] = payload.crc;
    }
    if (rc == 0 && blocks->hashes != NULL) {
        keep_hash(writer, record, payload.hash, blocks);
    }
    return rc;
}

static int
write_header(struct dcp_writer *writer, const struct dcp_placed_file *placed, struct dcp_error *err)
{
    struct dcp_file_header header = {.save_id = *writer->save_id,
                                     .rank = writer->rank,
                                     .n = (uint32_t)(writer->n0 + placed->index),
                                     .length_bytes = placed->length_bytes,
                                     .table_offset_bytes = placed->table_offset_bytes,
                                     .table_bytes = placed->table_bytes,
                                     .planned_outside = writer->plan->planned_outside,
                                     .hash_offset_bytes = placed->hash_offset_bytes,
                                     .hash_bytes = placed->hash_bytes};
    struct dcp_buf *scratch = &writer->scratch;
    dcp_buf_clear(scratch);
    dcp_file_put_header(scratch, &header);
    int rc = dcp_buf_check(scratch, err);
    return rc == 0 ? dcp_write_stream_bytes(writer, scratch->data, scratch->len, err) : rc;
}

static int
write_tables(struct dcp_writer *writer, const struct dcp_placed_file *placed,
             const struct file_blocks *blocks, struct dcp_error *err)
{
    struct dcp_buf *scratch = &writer->scratch;
    int rc = dcp_write_stream_zeros_to(writer, placed->table_offset_bytes, err);
    dcp_buf_clear(scratch);
    if (placed->table_bytes > 0) {
        dcp_block_table_put(scratch, writer->save_id, blocks->entries, blocks->entries_count);
    }
    if (placed->hash_bytes > 0) {
        static const uint8_t zeros[8] = {0};
        uint64_t table_end = placed->table_offset_bytes + placed->table_bytes;
        DCP_ASSERT(placed->hash_offset_bytes - table_end < sizeof zeros);
        dcp_buf_put(scratch, zeros, placed->hash_offset_bytes - table_end);
        dcp_hash_table_put(scratch, writer->save_id, blocks->hashes, blocks->hashes_count);
    }
    if (rc == 0) {
        rc = dcp_buf_check(scratch, err);
    }
    if (rc == 0) {
        rc = dcp_write_stream_bytes(writer, scratch->data, scratch->len, err);
    }
    return rc == 0 ? check_position(writer, placed->length_bytes, err) : rc;
}

int
dcp_write_walk_file(struct dcp_writer *writer, const struct dcp_placed_file *placed,
                    struct dcp_error *err)
{
    struct file_blocks blocks = {0};
    int rc = file_blocks_init(writer, placed, &blocks, err);
    rc = rc == 0 ? write_header(writer, placed, err) : rc;
    for (uint32_t i = 0; rc == 0 && i < placed->records_count; i++) {
        rc = write_record(writer, placed->first_record + i, &blocks, err);
    }
    rc = rc == 0 ? write_tables(writer, placed, &blocks, err) : rc;
    file_blocks_clean_up(&blocks);
    return rc;
}

static void
describe_file(const struct dcp_writer *writer, uint32_t index, uint64_t *ret_n,
              uint64_t *ret_length_bytes)
{
    const struct dcp_placed_file *placed = &writer->layout->files[index];
    *ret_n = writer->n0 + placed->index;
    *ret_length_bytes = placed->length_bytes;
}

static int
stream_file(struct dcp_writer *writer, uint32_t index, struct dcp_error *err)
{
    dcp_write_stream_open(writer);
    int rc = dcp_write_walk_file(writer, &writer->layout->files[index], err);
    return rc == 0 ? dcp_write_stream_flush(writer, err) : rc;
}

/* What the stream brings: in the order of the walk. */
static bool
next_on_device(const void *ctx, uint64_t *cursor, struct dcp_device_payload *ret)
{
    const struct dcp_writer *writer = ctx;
    const struct dcp_device_list *devices = writer->options->devices;
    while (*cursor < writer->layout->records_count) {
        const struct dcp_placed_record *record = &writer->layout->records[(*cursor)++];
        const struct dcp_item *item = &writer->plan->items[record->item];
        const struct dcp_source *source = &writer->sources[record->item];
        /* One that `prepare` will refuse is not looked at. */
        if (source->device != 0 && record->payload_bytes > 0 &&
            dcp_device_check_source(devices, writer->plan, item, source, NULL) == 0) {
            *ret = dcp_device_payload_of(devices, writer->plan, item, source);
            return true;
        }
    }
    return false;
}

/* The files of a writer whose memory is there. */
static int
run(struct dcp_writer *writer, struct dcp_error *err)
{
    const struct dcp_engine_options *options = writer->options;
    struct dcp_device_stats stats = {0};
    int rc = 0;
    if (options->devices != NULL) {
        rc = dcp_device_stream_new(options->devices, next_on_device, writer, &stats,
                                   &writer->stream, err);
    }
    rc = rc == 0 ? dcp_write_run(writer, err) : rc;
    dcp_device_stream_destroy(writer->stream);
    if (options->device_stats != NULL) {
        dcp_device_stats_add(options->device_stats, &stats);
    }
    return rc;
}

int
dcp_writer_run(const struct dcp_io *io, int dirfd, const char *dir_path,
               const struct dcp_plan *plan, const struct dcp_layout *layout,
               const struct dcp_source *sources, const struct dcp_save_id *save_id, uint64_t n0,
               const struct dcp_engine_options *options, uint32_t *ret_crcs,
               struct dcp_write_stats *ret_stats, struct dcp_error *err)
{
    int rc = dcp_write_check_numbers(n0, layout->files_count, err);
    if (rc != 0) {
        return rc;
    }
    struct dcp_writer writer = {.io = io,
                                .dirfd = dirfd,
                                .dir_path = dir_path,
                                .options = options,
                                .content = {describe_file, stream_file},
                                .rank = plan->rank,
                                .files_count = layout->files_count,
                                .total_bytes = layout->total_bytes,
                                .plan = plan,
                                .layout = layout,
                                .sources = sources,
                                .save_id = save_id,
                                .n0 = n0,
                                .crcs = ret_crcs};
    rc = dcp_ring_acquire(options->ring_buffers, options->ring_buffer_bytes, &writer.ring, err);
    if (rc != 0) {
        return rc;
    }
    writer.request_bytes = writer.padded_bytes = writer.ring->buffer_bytes;
    writer.slots_count = writer.ring->buffers_count;
    rc = run(&writer, err);
    writer.stats.ring_bytes = writer.ring->buffer_bytes * writer.ring->buffers_count;
    dcp_buf_clean_up(&writer.scratch);
    if (!writer.queue.lost) {
        dcp_ring_release(writer.ring);
    }
    if (rc == 0 && ret_stats != NULL) {
        *ret_stats = writer.stats;
    }
    return rc;
}

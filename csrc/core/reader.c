/*
 * reader.c: the walk of a load: items in file order, cut into requests, read ahead, delivered.
 *
 * Items are sorted by file and offset.  Small records that lie close together share a request and
 * are read whole, which verifies them; of large payloads only the wanted rows are read, widened to
 * whole checksum blocks where at least half of a block has to be read anyway.  A piece that is one
 * run in its target, and aligned where direct I/O asks for it, is read straight into the target;
 * all else passes through the ring.  Requests are pushed in order and delivered in order, so a
 * running CRC needs no bookkeeping.  A file that lies in the page cache is not read at all: it is
 * mapped window by window, and copied and verified from there (io_map.c).
 *
 * Memory: 8 or 24 MiB of the ring once something is read, 4 bytes per MiB of the open files,
 * and where nothing can be mapped one record at a time that no ring buffer holds.
 * Threads: the calling thread builds and delivers; reader_pool.c reads ahead.
 */
#include "reader.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Too little to read ahead of. */
#define INLINE_MOST_BYTES (1u << 20)
/* Loads from here on push everything out of the cache anyway. */
#define STREAMING_LEAST_BYTES (32u << 20)

/* Below this a load does with little memory. */
#define SMALL_LOAD_BYTES (64u << 20)
enum { SMALL_LOAD_BUFFERS = 4, LARGE_LOAD_BUFFERS = 3 };

struct visit {
    uint32_t file;
    uint64_t offset_bytes;
    uint64_t item; /* index in plan items */
};

static int
compare_visits(const void *left, const void *right)
{
    const struct visit *a = left, *b = right;
    if (a->file != b->file) {
        return a->file < b->file ? -1 : 1;
    }
    if (a->offset_bytes != b->offset_bytes) {
        return a->offset_bytes < b->offset_bytes ? -1 : 1;
    }
    return a->item < b->item ? -1 : a->item > b->item;
}

/* ---- items ---- */

static int
want_record(struct dcp_reader *reader, const struct dcp_read_item *item, struct dcp_error *err)
{
    const struct dcp_md_chunk *chunk = &reader->plan->md->chunks[item->chunk];
    struct dcp_read_use use = {.kind = DCP_READ_USE_RECORD,
                               .item = item,
                               .at_bytes = chunk->offset_bytes,
                               .len_bytes = chunk->length_bytes};
    uint64_t lead = use.at_bytes & (reader->file->align_bytes - 1);
    if (use.len_bytes > reader->buffer_bytes - lead) {
        return dcp_read_big(reader, &use, err);
    }
    return dcp_read_through_ring(reader, &use, err);
}

/* Reads [from, to) of a payload straight into its target, as far as alignment allows; *ret_to is
 * where it stopped, `from` when nothing was possible. */
static int
read_straight(struct dcp_reader *reader, struct dcp_read_use *use, uint64_t *ret_to,
              struct dcp_error *err)
{
    struct dcp_read_part *part = use->part;
    const struct dcp_read_file *file = reader->file;
    uint64_t to = use->to;
    *ret_to = use->from;
    if ((to - use->from) % file->align_bytes != 0) {
        to -= (to - use->from) % (use->verified ? DCP_BLOCK_BYTES : file->align_bytes);
    }
    if (to - use->from < DCP_READ_STRAIGHT_LEAST_BYTES || to <= use->from) {
        return 0;
    }
    uint8_t *run = dcp_read_box_run(&part->box, use->from, to);
    uint64_t at = part->payload_offset_bytes + use->from;
    if (run == NULL || at % file->align_bytes != 0 || (uintptr_t)run % file->mem_align_bytes != 0) {
        return 0;
    }
    struct dcp_read_use straight = *use;
    straight.to = to;
    straight.at_bytes = at;
    straight.len_bytes = to - use->from;
    int rc = dcp_read_in_place(reader, &straight, run, err);
    if (rc == 0) {
        *ret_to = to;
    }
    return rc;
}

/* The next piece of [from, to) that one request holds: whole blocks where they are verified. */
static uint64_t
ring_piece_end(struct dcp_reader *reader, const struct dcp_read_use *use)
{
    uint64_t at = use->part->payload_offset_bytes + use->from;
    uint64_t capacity = dcp_read_request_room(reader, at);
    if (capacity < DCP_BLOCK_BYTES) {
        capacity = dcp_read_request_bytes(reader) - (at & (reader->file->align_bytes - 1));
    }
    if (use->to - use->from <= capacity) {
        return use->to;
    }
    /* Block borders also keep elements whole. */
    uint64_t end = use->from + capacity;
    return end - end % DCP_BLOCK_BYTES;
}

/* What is hot is best read into a cached buffer and moved from there with the CRC; mapped, it needs
 * no buffer. */
static bool
goes_straight(const struct dcp_reader *reader)
{
    enum dcp_read_mode mode = reader->file->mode;
    return mode == DCP_READ_DIRECT || mode == DCP_READ_BUFFERED ||
           (mode == DCP_READ_HOT && !reader->options->verify);
}

/* Reads [from, to) of a payload.  `full`: all of it is wanted. */
static int
want_range(struct dcp_reader *reader, struct dcp_read_part *part, uint64_t from, uint64_t to,
           bool verified, bool full, struct dcp_error *err)
{
    struct dcp_read_use use = {.kind = DCP_READ_USE_RANGE,
                               .verified = verified,
                               .item = part->item,
                               .part = part,
                               .from = from,
                               .to = to};
    int rc = 0;
    while (rc == 0 && use.from < to) {
        uint64_t done = use.from;
        if (full && goes_straight(reader)) {
            use.to =
                dcp_min_u64(to, use.from - use.from % DCP_BLOCK_BYTES +
                                    dcp_max_u64(dcp_read_request_bytes(reader), DCP_BLOCK_BYTES));
            rc = read_straight(reader, &use, &done, err);
        }
        if (rc == 0 && done == use.from) {
            use.to = to;
            use.to = ring_piece_end(reader, &use);
            use.at_bytes = part->payload_offset_bytes + use.from;
            use.len_bytes = use.to - use.from;
            rc = dcp_read_through_ring(reader, &use, err);
            done = use.to;
        }
        use.from = done;
        use.to = to;
    }
    return rc;
}

/* A piece of a payload and how it is to be read. */
struct extent {
    uint64_t from, to;
    bool verified, full;
};

/* The next piece at or behind `at`: one block, or what of one block a row wants.  False at the
 * end.  A half of each block, as a tensor divided anew over two ranks leaves it, is not worth twice
 * the bytes; clearly more than a half is. */
static bool
next_extent(const struct dcp_reader *reader, const struct dcp_read_part *part, uint64_t at,
            struct extent *ret)
{
    const struct dcp_read_box *box = &part->box;
    if (!dcp_read_box_next(box, at, &ret->from, &ret->to)) {
        return false;
    }
    uint64_t start = ret->from - ret->from % DCP_BLOCK_BYTES;
    uint64_t end = dcp_min_u64(start + DCP_BLOCK_BYTES, box->payload_bytes);
    uint64_t read = dcp_read_box_spanned(box, end) - dcp_read_box_spanned(box, start);
    ret->verified = reader->options->verify && part->block_crcs != NULL &&
                    (reader->options->verify_all || read * 16 > (end - start) * 9);
    if (ret->verified) {
        ret->from = start;
        ret->to = end;
    } else {
        ret->to = dcp_min_u64(ret->to, end);
    }
    ret->full = dcp_read_box_below(box, ret->to) - dcp_read_box_below(box, ret->from) ==
                ret->to - ret->from;
    return true;
}

/* Reads what an item wants of a large payload: by a device, else neighbouring pieces of one sort in
 * one go. */
static int
want_part(struct dcp_reader *reader, struct dcp_read_part *part, struct dcp_error *err)
{
    struct extent open = {0}, next;
    int rc = dcp_read_to_device(reader, part, &open.to, err);
    open.from = open.to;
    while (rc == 0 && next_extent(reader, part, open.to, &next)) {
        if (open.to == next.from && open.verified == next.verified && open.full == next.full &&
            open.to > open.from) {
            open.to = next.to;
            continue;
        }
        if (open.to > open.from) {
            rc = want_range(reader, part, open.from, open.to, open.verified, open.full, err);
        }
        open = next;
    }
    if (rc == 0 && open.to > open.from) {
        rc = want_range(reader, part, open.from, open.to, open.verified, open.full, err);
    }
    return rc;
}

static struct dcp_read_part *
part_new(const struct dcp_read_item *item, struct dcp_error *err)
{
    struct dcp_read_part *part = dcp_malloc(sizeof *part);
    if (part == NULL) {
        dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a tensor to read");
        return NULL;
    }
    part->item = item;
    part->users = 1;
    part->block_crcs = NULL;
    part->check_whole = false;
    part->running_crc = part->whole_crc = 0;
    return part;
}

/* A large record that is not known to be ours: parsed from the parts that matter. */
static int
want_parsed(struct dcp_reader *reader, struct dcp_read_part *part, struct dcp_error *err)
{
    const struct dcp_read_item *item = part->item;
    const struct dcp_md_chunk *chunk = &reader->plan->md->chunks[item->chunk];
    struct dcp_record_view view;
    struct dcp_error why;
    dcp_error_clear(&why);
    int rc = dcp_read_file_parse(reader, reader->file, chunk, &view, &why);
    if (rc == DCP_E_UNSUPPORTED || (rc == 0 && dcp_read_view_differs(reader->plan, item, &view))) {
        return want_record(reader, item, err);
    }
    if (rc != 0) {
        return dcp_read_fail(reader, reader->file, item, rc, chunk->offset_bytes, why.message, err);
    }
    bool dense;
    rc = dcp_read_box_init_view(&part->box, reader->plan, item, &view, dcp_read_gap_bytes(reader),
                                &dense, err);
    if (rc != 0) {
        return rc;
    }
    if (!dense) {
        return want_record(reader, item, err);
    }
    part->payload_offset_bytes = chunk->offset_bytes + view.payload_offset_bytes;
    const struct dcp_block_entry *blocks = NULL;
    if (reader->file->header.planned_outside && view.contiguous) {
        rc = dcp_read_file_blocks(reader, reader->file, part->payload_offset_bytes,
                                  view.payload_bytes, &blocks, err);
    }
    part->block_crcs = blocks != NULL ? blocks->block_crcs : NULL;
    part->check_whole = blocks == NULL && reader->options->verify && view.has_crc &&
                        part->box.wanted_bytes == part->box.payload_bytes;
    part->whole_crc = view.payload_crc;
    return rc == 0 ? want_part(reader, part, err) : rc;
}

/* How a tensor's record is read. */
static int
want_tensor(struct dcp_reader *reader, struct dcp_read_part *part, struct dcp_error *err)
{
    const struct dcp_metadata *md = reader->plan->md;
    const struct dcp_read_item *item = part->item;
    const struct dcp_md_entry *entry = dcp_read_entry(reader, item);
    const struct dcp_md_chunk *chunk = &md->chunks[item->chunk];
    struct dcp_read_box *box = &part->box;
    int rc = dcp_read_box_init(box, reader->plan, item, dcp_read_gap_bytes(reader), err);
    if (rc != 0) {
        return rc;
    }
    uint64_t payload = box->payload_bytes;
    if (md->is_raw) {
        part->payload_offset_bytes = chunk->offset_bytes;
        return chunk->length_bytes == payload
                   ? want_part(reader, part, err)
                   : dcp_read_fail(reader, reader->file, item, DCP_E_CORRUPT, chunk->offset_bytes,
                                   "its bytes are not those of its shape", err);
    }
    struct dcp_tensor_shape shape = {.dtype = entry->dtype,
                                     .ndim = entry->ndim,
                                     .sizes = md->dims + chunk->dims + entry->ndim,
                                     .payload_bytes = payload};
    uint64_t head = dcp_record_head_bytes(payload);
    bool ours = dcp_read_length_tells(reader, reader->file, entry->dtype) &&
                chunk->length_bytes == head + payload + dcp_record_tail_bytes(&shape);
    if (!ours) {
        return chunk->length_bytes <= DCP_READ_WHOLE_RECORD_BYTES ? want_record(reader, item, err)
                                                                  : want_parsed(reader, part, err);
    }
    part->payload_offset_bytes = chunk->offset_bytes + head;
    if (payload <= DCP_BLOCK_BYTES) {
        bool whole = payload <= DCP_READ_WHOLE_PAYLOAD_BYTES || reader->options->verify_all ||
                     box->wanted_bytes >= payload / 2;
        return whole ? want_record(reader, item, err) : want_part(reader, part, err);
    }
    const struct dcp_block_entry *blocks;
    rc = dcp_read_file_blocks(reader, reader->file, part->payload_offset_bytes, payload, &blocks,
                              err);
    if (rc != 0) {
        return rc;
    }
    if (blocks == NULL && (reader->options->verify || reader->file->table.entries_count > 0)) {
        return want_parsed(reader, part, err);
    }
    part->block_crcs = blocks != NULL ? blocks->block_crcs : NULL;
    return want_part(reader, part, err);
}

static int
visit_item(struct dcp_reader *reader, const struct dcp_read_item *item, struct dcp_error *err)
{
    const struct dcp_md_entry *entry = dcp_read_entry(reader, item);
    const struct dcp_md_chunk *chunk = &reader->plan->md->chunks[item->chunk];
    uint64_t end;
    if (dcp_add_overflows_u64(chunk->offset_bytes, chunk->length_bytes, &end) ||
        end > reader->file->size_bytes) {
        return dcp_read_fail(reader, reader->file, item, DCP_E_CORRUPT, chunk->offset_bytes,
                             "the record ends behind the end of the file, which was cut short",
                             err);
    }
    /* Quantised tensors have an element size but no record that we could know. */
    bool opaque = entry->kind == DCP_ITEM_BYTES || chunk->transforms != 0 ||
                  dcp_dtype_bytes(entry->dtype) == 0 || entry->dtype >= DCP_DTYPE_QINT8;
    if (entry->kind == DCP_ITEM_BYTES && chunk->length_bytes == 0 && reader->plan->records_decide &&
        reader->on_record != NULL) {
        /* Bytes of a planner's own, of which there may be none: nothing to read. */
        dcp_target_touch(reader->plan, item->target);
        return reader->on_record(reader->on_record_ctx, reader->plan, item, (const uint8_t *)"", 0,
                                 err);
    }
    if (opaque && chunk->length_bytes == 0) {
        return dcp_read_fail(reader, reader->file, item, DCP_E_CORRUPT, chunk->offset_bytes,
                             "by the metadata its record is empty", err);
    }
    if (opaque) {
        const struct dcp_block_entry *listed;
        bool ask = reader->options->verify && reader->file->header.planned_outside;
        int rc = ask ? dcp_read_file_blocks(reader, reader->file, chunk->offset_bytes,
                                            chunk->length_bytes, &listed, err)
                     : 0; /* the table stays, for hand_over */
        return rc == 0 ? want_record(reader, item, err) : rc;
    }
    struct dcp_read_part *part = part_new(item, err);
    if (part == NULL) {
        return DCP_E_NOMEM;
    }
    int rc = want_tensor(reader, part, err);
    dcp_read_part_release(part);
    return rc;
}

/* ---- the walk ---- */

static int
enter_file(struct dcp_reader *reader, const struct visit *visits, uint64_t left,
           struct dcp_error *err)
{
    uint64_t wanted = 0;
    for (uint64_t i = 0; i < left && visits[i].file == visits[0].file; i++) {
        wanted += dcp_read_item_bytes(reader->plan, &reader->plan->items[visits[i].item]);
    }
    int rc = dcp_read_request_push(reader, err);
    if (rc != 0) {
        return rc;
    }
    dcp_read_file_release(reader, reader->file);
    reader->file = NULL;
    return dcp_read_file_open(reader, visits[0].file, wanted, &reader->file, err);
}

static int
walk(struct dcp_reader *reader, const struct visit *visits, struct dcp_error *err)
{
    uint64_t count = reader->plan->items_count;
    int rc = 0;
    for (uint64_t i = 0; rc == 0 && i < count; i++) {
        if (reader->file == NULL || reader->file->index != visits[i].file) {
            rc = enter_file(reader, visits + i, count - i, err);
        }
        if (rc == 0) {
            rc = visit_item(reader, &reader->plan->items[visits[i].item], err);
        }
    }
    return rc == 0 ? dcp_read_settle_all(reader, err) : rc;
}

static int
sort_items(const struct dcp_read_plan *plan, struct visit **ret_visits, struct dcp_error *err)
{
    struct visit *visits = dcp_malloc_array(plan->items_count, sizeof *visits);
    if (visits == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a load's order");
    }
    bool sorted = true;
    for (uint64_t i = 0; i < plan->items_count; i++) {
        const struct dcp_md_chunk *chunk = &plan->md->chunks[plan->items[i].chunk];
        visits[i] = (struct visit){chunk->file, chunk->offset_bytes, i};
        sorted = sorted && (i == 0 || compare_visits(&visits[i - 1], &visits[i]) < 0);
    }
    if (!sorted) {
        qsort(visits, plan->items_count, sizeof *visits, compare_visits);
    }
    *ret_visits = visits;
    return 0;
}

/* How much of the ring is used: what is not touched takes no memory.  With everything else that it
 * needs a load stays below 32 MiB. */
static void
choose_buffers(struct dcp_reader *reader)
{
    const struct dcp_engine_options *options = reader->options;
    bool small = reader->plan->wanted_bytes < SMALL_LOAD_BYTES;
    reader->buffers_count = options->ring_buffers != 0 ? options->ring_buffers
                            : small                    ? SMALL_LOAD_BUFFERS
                                                       : LARGE_LOAD_BUFFERS;
    reader->buffer_bytes =
        options->ring_buffer_bytes != 0
            ? dcp_max_u64(options->ring_buffer_bytes, DCP_READ_LEAST_BUFFER_BYTES)
        : small ? DCP_READ_LEAST_BUFFER_BYTES
                : DCP_RING_BUFFER_BYTES;
}

void
dcp_read_stats_add(struct dcp_read_stats *sum, const struct dcp_read_stats *more)
{
    sum->read_bytes += more->read_bytes;
    sum->hot_bytes += more->hot_bytes;
    sum->wanted_bytes += more->wanted_bytes;
    sum->verified_bytes += more->verified_bytes;
    sum->unverified_bytes += more->unverified_bytes;
    sum->straight_bytes += more->straight_bytes;
    sum->device_direct_bytes += more->device_direct_bytes;
    sum->shared_bytes += more->shared_bytes;
    sum->requests_count += more->requests_count;
    sum->files_count += more->files_count;
    sum->direct_files_count += more->direct_files_count;
    sum->hot_files_count += more->hot_files_count;
    sum->wall_ns += more->wall_ns;
}

int
dcp_reader_run(const struct dcp_io *io, int dirfd, const char *dir_path,
               const struct dcp_read_plan *plan, const struct dcp_engine_options *options,
               dcp_record_fn on_record, void *on_record_ctx, struct dcp_read_stats *ret_stats,
               struct dcp_error *err)
{
    uint64_t start_ns = dcp_engine_now_ns();
    struct dcp_reader reader = {.io = io,
                                .dirfd = dirfd,
                                .dir_path = dir_path,
                                .plan = plan,
                                .options = options,
                                .on_record = on_record,
                                .on_record_ctx = on_record_ctx};
    struct visit *visits = NULL;
    choose_buffers(&reader);
    reader.ahead = plan->wanted_bytes > INLINE_MOST_BYTES || plan->objects_count > 0;
    reader.streaming = plan->wanted_bytes >= STREAMING_LEAST_BYTES;
    int rc = sort_items(plan, &visits, err);
    if (rc == 0) {
        rc = dcp_read_pool_init(&reader.pool, err);
    }
    if (rc == 0) {
        rc = walk(&reader, visits, err);
        int pool_rc = dcp_read_pool_clean_up(&reader.pool, err);
        rc = rc != 0 ? rc : pool_rc;
    }
    for (uint32_t i = 0; i < DCP_RING_MOST_BUFFERS; i++) {
        dcp_read_request_clear(&reader, &reader.requests[i]);
        dcp_free(reader.requests[i].spans);
        dcp_free(reader.requests[i].uses);
    }
    dcp_read_file_release(&reader, reader.file);
    dcp_ring_release(reader.ring);
    dcp_free(visits);
    reader.stats.wall_ns = dcp_engine_now_ns() - start_ns;
    if (rc == 0 && ret_stats != NULL) {
        *ret_stats = reader.stats;
    }
    return rc;
}

int
dcp_reader_run_path(const struct dcp_io *io, const char *dir_path, const struct dcp_read_plan *plan,
                    const struct dcp_engine_options *options, dcp_record_fn on_record,
                    void *on_record_ctx, struct dcp_read_stats *ret_stats, struct dcp_error *err)
{
    int dirfd = io->open_dir(io->ctx, dir_path);
    if (dirfd < 0) {
        return dcp_error_set(err, dirfd == -ENOENT ? DCP_E_NOENT : DCP_E_IO, -dirfd, dir_path,
                             "opening the directory %s failed: %s", dir_path, strerror(-dirfd));
    }
    int rc = dcp_reader_run(io, dirfd, dir_path, plan, options, on_record, on_record_ctx, ret_stats,
                            err);
    /* Nothing was written: a failing close has nothing to say. */
    io->close(io->ctx, dirfd);
    return rc;
}

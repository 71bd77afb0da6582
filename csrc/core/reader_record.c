/*
 * reader_record.c: checks what was read and puts it where it belongs.
 *
 * Bytes are verified in the pass that moves them: a block that is wanted whole and is one run in
 * the target goes through the fused copy and CRC.  A mismatch fails the load, so it does not matter
 * that the target was written before it was known.  Records of ours are recognised by their head
 * and length and need no parsing; all others go through the zip parser.
 *
 * Threads: the calling thread.
 */
#include "reader.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "dcp_crc32.h"
#include "le_bytes.h"
#include "zip_format.h"

int
dcp_read_fail(const struct dcp_reader *reader, const struct dcp_read_file *file,
              const struct dcp_read_item *item, int code, uint64_t offset_bytes, const char *what,
              struct dcp_error *err)
{
    const struct dcp_md_entry *entry = dcp_read_entry(reader, item);
    bool first = err != NULL && err->code == 0;
    dcp_error_set(err, code, 0, file->path, "%.*s in %s at byte %" PRIu64 ": %s",
                  (int)dcp_min_u64(entry->name_len, 256), reader->plan->md->strings + entry->name,
                  file->path, offset_bytes, what);
    if (first) {
        err->offset_bytes = offset_bytes;
    }
    return code;
}

int
dcp_read_fail_block(const struct dcp_reader *reader, const struct dcp_read_file *file,
                    const struct dcp_read_part *part, uint64_t from, struct dcp_error *err)
{
    return dcp_read_fail(reader, file, part->item, DCP_E_CHECKSUM,
                         part->payload_offset_bytes + from,
                         "the checksum of a block does not match: the file is damaged; "
                         "load another checkpoint, or with verify off to take it as it is",
                         err);
}

void
dcp_read_part_release(struct dcp_read_part *part)
{
    if (part != NULL && --part->users == 0) {
        dcp_free(part);
    }
}

void
dcp_read_count_done(struct dcp_reader *reader, uint64_t wanted, bool verified)
{
    reader->stats.wanted_bytes += wanted;
    if (verified) {
        reader->stats.verified_bytes += wanted;
    } else {
        reader->stats.unverified_bytes += wanted;
    }
    if (reader->options->progress_bytes != NULL) {
        atomic_fetch_add_explicit(reader->options->progress_bytes, wanted, memory_order_relaxed);
    }
}

/* ---- ranges of large payloads ---- */

/* The CRC of [from, to), whose bytes are put where they belong unless they are there already. */
static uint32_t
move_with_crc(const struct dcp_reader *reader, const struct dcp_read_part *part,
              const uint8_t *bytes, uint32_t crc, uint64_t from, uint64_t to, bool in_place)
{
    uint64_t len = to - from;
    uint8_t *run = in_place ? NULL : dcp_read_box_run(&part->box, from, to);
    if (run != NULL) {
        return dcp_crc32_copy(crc, run, bytes, len, reader->streaming);
    }
    crc = dcp_crc32(crc, bytes, len);
    if (!in_place) {
        dcp_read_box_put(&part->box, bytes, from, to);
    }
    return crc;
}

static int
deliver_blocks(struct dcp_reader *reader, const struct dcp_read_file *file,
               const struct dcp_read_use *use, const uint8_t *bytes, bool in_place,
               struct dcp_error *err)
{
    const struct dcp_read_part *part = use->part;
    DCP_ASSERT(use->from % DCP_BLOCK_BYTES == 0);
    for (uint64_t from = use->from; from < use->to; from += DCP_BLOCK_BYTES) {
        uint64_t to = dcp_min_u64(from + DCP_BLOCK_BYTES, use->to);
        uint32_t crc =
            move_with_crc(reader, part, bytes + (from - use->from), 0, from, to, in_place);
        if (crc != part->block_crcs[from / DCP_BLOCK_BYTES]) {
            return dcp_read_fail_block(reader, file, part, from, err);
        }
    }
    return 0;
}

/* One CRC over a payload that arrives in order, piece by piece. */
static int
deliver_whole(struct dcp_reader *reader, const struct dcp_read_file *file,
              const struct dcp_read_use *use, const uint8_t *bytes, bool in_place,
              struct dcp_error *err)
{
    struct dcp_read_part *part = use->part;
    for (uint64_t from = use->from; from < use->to; from += DCP_BLOCK_BYTES) {
        uint64_t to = dcp_min_u64(from + DCP_BLOCK_BYTES, use->to);
        part->running_crc = move_with_crc(reader, part, bytes + (from - use->from),
                                          part->running_crc, from, to, in_place);
    }
    if (use->to == part->box.payload_bytes && part->running_crc != part->whole_crc) {
        return dcp_read_fail(reader, file, use->item, DCP_E_CHECKSUM, part->payload_offset_bytes,
                             "the checksum of the tensor does not match: the file is damaged; load "
                             "another checkpoint, or with verify off to take it as it is",
                             err);
    }
    return 0;
}

/* A copy of a request's size leaves memcpy below the size from which its stores bypass the cache;
 * ours do, and the CRC that comes with it is free beside the memory. */
static void
put_unverified(const struct dcp_reader *reader, const struct dcp_read_box *box,
               const uint8_t *bytes, uint64_t from, uint64_t to)
{
    uint8_t *run = reader->streaming ? dcp_read_box_run(box, from, to) : NULL;
    if (run != NULL) {
        (void)dcp_crc32_copy(0, run, bytes, to - from, true);
    } else {
        dcp_read_box_put(box, bytes, from, to);
    }
}

static int
deliver_range(struct dcp_reader *reader, const struct dcp_read_file *file,
              const struct dcp_read_use *use, const uint8_t *bytes, bool in_place,
              struct dcp_error *err)
{
    const struct dcp_read_box *box = &use->part->box;
    uint64_t wanted = dcp_read_box_below(box, use->to) - dcp_read_box_below(box, use->from);
    int rc = 0;
    if (use->verified) {
        rc = deliver_blocks(reader, file, use, bytes, in_place, err);
    } else if (use->part->check_whole) {
        rc = deliver_whole(reader, file, use, bytes, in_place, err);
    } else if (!in_place) {
        put_unverified(reader, box, bytes, use->from, use->to);
    }
    if (rc == 0) {
        dcp_read_count_done(reader, wanted, use->verified || use->part->check_whole);
        reader->stats.straight_bytes += in_place ? wanted : 0;
    }
    return rc;
}

/* ---- whole records ---- */

/* A whole record against the file's block table, where that lists it, else as the zip it is. */
static int
verify_whole(const struct dcp_read_file *file, const struct dcp_read_use *use,
             const uint8_t *record, struct dcp_error *why)
{
    const struct dcp_block_entry *listed =
        file->header.planned_outside ? dcp_block_table_find(&file->table, use->at_bytes) : NULL;
    if (listed == NULL || listed->payload_bytes != use->len_bytes) {
        return dcp_record_verify(record, (size_t)use->len_bytes, why);
    }
    return dcp_crc32(0, record, use->len_bytes) == listed->payload_crc
               ? 0
               : dcp_error_set(why, DCP_E_CHECKSUM, 0, NULL,
                               "the checksum of the record does not match: the file is damaged");
}

static int
hand_over(struct dcp_reader *reader, const struct dcp_read_file *file,
          const struct dcp_read_use *use, const uint8_t *record, struct dcp_error *err)
{
    /* Of what transforms made of a record only their own checks know anything. */
    bool transformed = reader->plan->md->chunks[use->item->chunk].transforms != 0;
    bool verify = reader->options->verify && !transformed;
    if (verify) {
        struct dcp_error why;
        dcp_error_clear(&why);
        int rc = verify_whole(file, use, record, &why);
        if (rc != 0) {
            return dcp_read_fail(reader, file, use->item, rc, use->at_bytes, why.message, err);
        }
    }
    if (reader->on_record == NULL) {
        return dcp_read_fail(reader, file, use->item, DCP_E_UNSUPPORTED, use->at_bytes,
                             "only Python can read this record", err);
    }
    int rc = reader->on_record(reader->on_record_ctx, reader->plan, use->item, record,
                               (size_t)use->len_bytes, err);
    if (rc == 0) {
        dcp_read_count_done(reader, use->len_bytes, verify);
    }
    return rc;
}

/* What a record of ours must begin with; its length is fixed by its shape. */
static bool
is_own_record(const struct dcp_reader *reader, const struct dcp_read_file *file,
              const struct dcp_read_item *item, const struct dcp_read_box *box,
              const uint8_t *record, uint64_t len_bytes)
{
    const struct dcp_md_entry *entry = dcp_read_entry(reader, item);
    if (!dcp_read_length_tells(reader, file, entry->dtype)) {
        return false;
    }
    const struct dcp_md_chunk *chunk = &reader->plan->md->chunks[item->chunk];
    struct dcp_tensor_shape shape = {.dtype = entry->dtype,
                                     .ndim = entry->ndim,
                                     .sizes = reader->plan->md->dims + chunk->dims + entry->ndim,
                                     .payload_bytes = box->payload_bytes};
    uint64_t head_bytes = dcp_record_head_bytes(box->payload_bytes);
    if (box->payload_bytes == 0 ||
        len_bytes != head_bytes + box->payload_bytes + dcp_record_tail_bytes(&shape)) {
        return false;
    }
    uint8_t room[256];
    struct dcp_buf head = {.data = room, .cap = sizeof room};
    DCP_ASSERT(head_bytes <= sizeof room);
    dcp_record_put_head(&head, box->payload_bytes);
    const uint8_t *descriptor = record + head_bytes + box->payload_bytes;
    return memcmp(record, room, (size_t)head_bytes) == 0 &&
           le_get32(descriptor) == ZIP_DESCRIPTOR_SIGNATURE &&
           le_get32(descriptor + 8) == box->payload_bytes;
}

static int
deliver_own(struct dcp_reader *reader, const struct dcp_read_file *file,
            const struct dcp_read_use *use, const struct dcp_read_box *box, const uint8_t *record,
            struct dcp_error *err)
{
    const uint8_t *payload = record + dcp_record_head_bytes(box->payload_bytes);
    uint64_t len = box->payload_bytes;
    if (!reader->options->verify) {
        dcp_read_box_put(box, payload, 0, len);
        dcp_read_count_done(reader, box->wanted_bytes, false);
        return 0;
    }
    uint8_t *run = dcp_read_box_run(box, 0, len);
    uint32_t crc;
    if (run != NULL) {
        crc = dcp_crc32_copy(0, run, payload, len, reader->streaming);
    } else {
        crc = dcp_crc32(0, payload, len);
        dcp_read_box_put(box, payload, 0, len);
    }
    if (crc != le_get32(payload + len + 4)) {
        return dcp_read_fail(reader, file, use->item, DCP_E_CHECKSUM,
                             use->at_bytes + (uint64_t)(payload - record),
                             "the checksum of the tensor does not match: the file is damaged; load "
                             "another checkpoint, or with verify off to take it as it is",
                             err);
    }
    dcp_read_count_done(reader, box->wanted_bytes, true);
    return 0;
}

static int
memory_read(void *ctx, uint64_t offset, size_t len, const uint8_t **ret, struct dcp_error *err)
{
    const struct dcp_span *record = ctx;
    if (offset > record->len || len > record->len - offset) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL, "the record points behind its end");
    }
    *ret = record->data + offset;
    return 0;
}

static int
deliver_parsed(struct dcp_reader *reader, const struct dcp_read_file *file,
               const struct dcp_read_use *use, struct dcp_read_box *box, const uint8_t *record,
               struct dcp_error *err)
{
    struct dcp_span span = {record, (size_t)use->len_bytes};
    struct dcp_record_input input = {
        .read = memory_read, .ctx = &span, .length_bytes = use->len_bytes};
    struct dcp_record_view view;
    struct dcp_error why;
    dcp_error_clear(&why);
    int rc = dcp_record_parse(&input, &view, &why);
    if (rc == DCP_E_UNSUPPORTED ||
        (rc == 0 && dcp_read_view_differs(reader->plan, use->item, &view))) {
        return hand_over(reader, file, use, record, err);
    }
    if (rc != 0) {
        return dcp_read_fail(reader, file, use->item, rc, use->at_bytes, why.message, err);
    }
    bool dense;
    rc = dcp_read_box_init_view(box, reader->plan, use->item, &view, 0, &dense, err);
    if (rc != 0) {
        return rc;
    }
    const uint8_t *payload = record + view.payload_offset_bytes;
    bool verified = reader->options->verify && view.has_crc;
    if (verified && dcp_crc32(0, payload, view.payload_bytes) != view.payload_crc) {
        return dcp_read_fail(reader, file, use->item, DCP_E_CHECKSUM,
                             use->at_bytes + view.payload_offset_bytes,
                             "the checksum of the tensor does not match: the file is damaged", err);
    }
    if (dense) {
        dcp_read_box_put(box, payload, 0, box->payload_bytes);
    } else {
        dcp_read_put_strided(reader->plan, use->item, &view, payload);
    }
    dcp_read_count_done(reader, box->wanted_bytes, verified);
    return 0;
}

static int
deliver_record(struct dcp_reader *reader, const struct dcp_read_file *file,
               const struct dcp_read_use *use, const uint8_t *record, struct dcp_error *err)
{
    const struct dcp_md_entry *entry = dcp_read_entry(reader, use->item);
    if (entry->kind == DCP_ITEM_BYTES || dcp_dtype_bytes(entry->dtype) == 0 ||
        reader->plan->md->chunks[use->item->chunk].transforms != 0) {
        return hand_over(reader, file, use, record, err);
    }
    struct dcp_read_box box;
    int rc = dcp_read_box_init(&box, reader->plan, use->item, 0, err);
    if (rc != 0) {
        return rc;
    }
    if (is_own_record(reader, file, use->item, &box, record, use->len_bytes)) {
        return deliver_own(reader, file, use, &box, record, err);
    }
    return deliver_parsed(reader, file, use, &box, record, err);
}

int
dcp_read_deliver(struct dcp_reader *reader, const struct dcp_read_file *file,
                 const struct dcp_read_use *use, const uint8_t *bytes, bool in_place,
                 struct dcp_error *err)
{
    const struct dcp_read_plan *plan = reader->plan;
    uint64_t target = use->item->target;
    dcp_target_touch(plan, target);
    if (use->kind == DCP_READ_USE_RECORD) {
        int rc = deliver_record(reader, file, use, bytes, err);
        dcp_target_deliver(plan, target, rc == 0 ? dcp_read_item_bytes(plan, use->item) : 0);
        return rc;
    }
    uint64_t before = reader->stats.wanted_bytes;
    int rc = deliver_range(reader, file, use, bytes, in_place, err);
    dcp_target_deliver(plan, target, reader->stats.wanted_bytes - before);
    return rc;
}

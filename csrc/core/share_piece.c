/*
 * share_piece.c: one piece of what is read for several ranks: checked by the rank that read it,
 * taken by those that want it.
 *
 * Threads: no state; a reader belongs to its thread.
 */
#include "share.h"

#include <string.h>

#include "dcp_crc32.h"
#include "le_bytes.h"
#include "reader.h"
#include "zip_format.h"

void
dcp_read_stats_add(struct dcp_read_stats *sum, const struct dcp_read_stats *more)
{
    sum->read_bytes += more->read_bytes;
    sum->hot_bytes += more->hot_bytes;
    sum->wanted_bytes += more->wanted_bytes;
    sum->verified_bytes += more->verified_bytes;
    sum->unverified_bytes += more->unverified_bytes;
    sum->straight_bytes += more->straight_bytes;
    sum->shared_bytes += more->shared_bytes;
    sum->requests_count += more->requests_count;
    sum->files_count += more->files_count;
    sum->wall_ns += more->wall_ns;
}

static int
fail_piece(const struct dcp_reader *reader, const struct dcp_share_piece *piece, uint64_t from,
           struct dcp_error *err)
{
    const struct dcp_metadata *md = reader->plan->md;
    const struct dcp_md_entry *entry = &md->entries[piece->entry];
    uint64_t at = piece->payload_offset_bytes + from;

    dcp_error_set(err, DCP_E_CHECKSUM, 0, reader->file->path,
                  "%.*s in %s at byte %llu: the checksum does not match: the file is damaged; load "
                  "another checkpoint, or with verify off to take it as it is",
                  (int)dcp_min_u64(entry->name_len, 256), md->strings + entry->name,
                  reader->file->path, (unsigned long long)at);
    err->offset_bytes = at;
    return DCP_E_CHECKSUM;
}

static uint32_t
sum(const uint8_t *bytes, uint8_t *copy, uint64_t len)
{
    /* The copy is read at once, by other cores: it should stay in the cache. */
    return copy != NULL ? dcp_crc32_copy(0, copy, bytes, len, false) : dcp_crc32(0, bytes, len);
}

static void
move(const uint8_t *bytes, uint8_t *copy, uint64_t len)
{
    if (copy != NULL) {
        memcpy(copy, bytes, len);
    }
}

int
dcp_share_check_piece(struct dcp_reader *reader, const struct dcp_share_piece *piece,
                      const uint8_t *bytes, uint8_t *copy, bool *ret_verified,
                      struct dcp_error *err)
{
    uint64_t payload = piece->payload_bytes;
    *ret_verified = reader->options->verify;
    if (!reader->options->verify) {
        move(bytes, copy, piece->to - piece->from);
        return 0;
    }
    if (payload <= DCP_BLOCK_BYTES) {
        const uint8_t *descriptor = bytes + payload;
        bool good = le_get32(descriptor) == ZIP_DESCRIPTOR_SIGNATURE &&
                    le_get32(descriptor + 8) == payload &&
                    le_get32(descriptor + 4) == sum(bytes, copy, payload);
        return good ? 0 : fail_piece(reader, piece, 0, err);
    }
    const struct dcp_block_entry *blocks;
    int rc = dcp_read_file_blocks(reader, reader->file, piece->payload_offset_bytes, payload,
                                  &blocks, err);
    if (rc != 0 || blocks == NULL) {
        *ret_verified = false;
        move(bytes, copy, piece->to - piece->from);
        return rc;
    }
    for (uint64_t from = piece->from; from < piece->to; from += DCP_BLOCK_BYTES) {
        uint64_t at = from - piece->from;
        uint64_t len = dcp_min_u64(DCP_BLOCK_BYTES, piece->to - from);
        if (sum(bytes + at, copy != NULL ? copy + at : NULL, len) !=
            blocks->block_crcs[from / DCP_BLOCK_BYTES]) {
            return fail_piece(reader, piece, from, err);
        }
    }
    return 0;
}

int
dcp_share_take_piece(const struct dcp_read_plan *plan, const struct dcp_share_wants *wants,
                     const struct dcp_share_piece *piece, const uint8_t *bytes, uint64_t *visit,
                     uint64_t *ret_wanted, struct dcp_error *err)
{
    struct dcp_read_box box;
    int rc = 0;

    while (*visit < wants->visits_count && wants->visits[*visit].chunk != piece->chunk) {
        ++*visit;
    }
    for (uint64_t v = *visit;
         rc == 0 && v < wants->visits_count && wants->visits[v].chunk == piece->chunk; v++) {
        const struct dcp_read_item *item = &plan->items[wants->visits[v].item];
        rc = dcp_read_box_init(&box, plan, item, 0, err);
        if (rc == 0) {
            uint64_t wanted =
                dcp_read_box_below(&box, piece->to) - dcp_read_box_below(&box, piece->from);
            dcp_target_touch(plan, item->target);
            dcp_read_box_put(&box, bytes, piece->from, piece->to);
            dcp_target_deliver(plan, item->target, wanted);
            *ret_wanted += wanted;
        }
    }
    return rc;
}

/*
 * share_unit.c: one unit of what is read for several ranks: read and checked by one of them, taken
 * by those that want some of it.  What lies between, a slot of shared memory or a broadcast, is not
 * its business.
 *
 * Threads: no state; a reader belongs to its thread.
 */
#include "share.h"

#include <string.h>

#include "dcp_crc32.h"
#include "le_bytes.h"
#include "reader.h"
#include "zip_format.h"

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

/* Compares the checksums of a piece; *ret_verified false when there is nothing to compare, by the
 * file or by the reader's options. */
static int
check_piece(struct dcp_reader *reader, const struct dcp_share_piece *piece, const uint8_t *bytes,
            uint8_t *copy, bool *ret_verified, struct dcp_error *err)
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

/* Moves what this rank wants of a piece to its targets. */
static int
take_piece(struct dcp_share_taker *taker, const struct dcp_share_piece *piece, const uint8_t *bytes,
           uint64_t *ret_wanted, struct dcp_error *err)
{
    const struct dcp_read_plan *plan = taker->plan;
    const struct dcp_share_wants *wants = taker->wants;
    uint64_t *visit = &taker->visit;
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

/* ---- units ---- */

static uint64_t
place_in(const struct dcp_share_unit *unit, const struct dcp_share_piece *piece)
{
    return piece->payload_offset_bytes + piece->from - unit->from_bytes;
}

int
dcp_share_read_unit(struct dcp_reader *reader, const struct dcp_share_unit *unit,
                    uint64_t wanted_bytes, uint8_t *data, struct dcp_error *err)
{
    uint64_t len = unit->end_bytes - unit->from_bytes;
    struct dcp_read_span span = {.from_bytes = unit->from_bytes, .to_bytes = unit->end_bytes};
    if (!dcp_share_is_open(reader, unit)) {
        dcp_read_file_release(reader, reader->file);
        reader->file = NULL;
        int rc = dcp_read_file_open(reader, unit->file, wanted_bytes, &reader->file, err);
        if (rc != 0) {
            return rc;
        }
    }
    reader->stats.read_bytes += len;
    reader->stats.hot_bytes += reader->file->hot ? len : 0;
    reader->stats.requests_count++;
    return dcp_read_file_span(reader, reader->file, &span, data, err);
}

bool
dcp_share_is_open(const struct dcp_reader *reader, const struct dcp_share_unit *unit)
{
    return reader->file != NULL && reader->file->index == unit->file;
}

int
dcp_share_check_unit(struct dcp_reader *reader, const struct dcp_share_unit *unit,
                     const uint8_t *data, uint8_t *copy, uint64_t *ret_verified,
                     struct dcp_error *err)
{
    uint64_t verified = 0;
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < unit->pieces_count; i++) {
        uint64_t at = place_in(unit, &unit->pieces[i]);
        bool good = false;
        rc = check_piece(reader, &unit->pieces[i], data + at, copy != NULL ? copy + at : NULL,
                         &good, err);
        verified |= (uint64_t)good << i;
    }
    if (rc == 0) {
        *ret_verified = verified;
    }
    return rc;
}

int
dcp_share_take_unit(struct dcp_share_taker *taker, const struct dcp_share_unit *unit,
                    const uint8_t *data, uint64_t verified, bool is_own, struct dcp_error *err)
{
    struct dcp_read_stats *stats = &taker->stats;
    uint64_t taken = 0;
    for (uint32_t i = 0; i < unit->pieces_count; i++) {
        const struct dcp_share_piece *piece = &unit->pieces[i];
        uint64_t wanted = 0;
        if (!dcp_share_is_user(piece->users, taker->member)) {
            continue;
        }
        int rc = take_piece(taker, piece, data + place_in(unit, piece), &wanted, err);
        if (rc != 0) {
            return rc;
        }
        if ((verified >> i) & 1) {
            stats->verified_bytes += wanted;
        } else {
            stats->unverified_bytes += wanted;
        }
        taken += wanted;
    }
    stats->wanted_bytes += taken;
    stats->shared_bytes += is_own ? 0 : taken;
    if (taker->options->progress_bytes != NULL) {
        atomic_fetch_add_explicit(taker->options->progress_bytes, taken, memory_order_relaxed);
    }
    return 0;
}

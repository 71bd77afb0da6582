/*
 * share_schedule.c: what the ranks of a host read together, cut into units, in one order.
 *
 * Each rank walks the published wants, which are sorted alike, and merges them on the way: chunks
 * in file order, of each the blocks that somebody wants, neighbours joined up to the size of a
 * slot. Unit after unit goes to the reader that has the fewest bytes so far.  All that follows from
 * the published numbers alone, so every rank walks the same units without a word more, and no rank
 * holds a list of them: a checkpoint of any size costs the walk a few kilobytes.
 *
 * Readers take turns and do not own long runs of a file, because all ranks consume in one order:
 * whoever owned the second half of a file would wait, its slots full, until the first half is
 * consumed.  In turns the host reads the file from front to back, in requests of slot size.
 *
 * A chunk is shared when its readers would read an eighth more without, or could not verify what
 * they read: pieces of less than half a checksum block.
 *
 * Threads: a cursor belongs to one; wants do not change while there are cursors.
 */
#include "share.h"

#include <string.h>

/* A zip descriptor: signature, CRC, two sizes. */
enum { DESCRIPTOR_BYTES = 16 };

static bool
head_before(const struct dcp_share_head *a, const struct dcp_share_head *b)
{
    if (a->file != b->file) {
        return a->file < b->file;
    }
    return a->offset_bytes != b->offset_bytes ? a->offset_bytes < b->offset_bytes
                                              : a->chunk < b->chunk;
}

/* Moves member `m` to its next want: of file DCP_NO_FILE at the end. */
static void
advance(struct dcp_share_cursor *cursor, uint32_t m)
{
    const struct dcp_share_member *member = &cursor->members[m];
    if (cursor->at[m] == member->header->wants_count) {
        cursor->heads[m].file = DCP_NO_FILE;
        return;
    }
    const struct dcp_md_chunk *chunk = &cursor->md->chunks[member->wants[cursor->at[m]].chunk];
    cursor->heads[m] = (struct dcp_share_head){chunk->file, member->wants[cursor->at[m]].chunk,
                                               chunk->offset_bytes};
}

static bool
check_want(const struct dcp_share_member *member, const struct dcp_share_want *want,
           const struct dcp_metadata *md)
{
    if (want->entry >= md->entries_count || want->chunk >= md->chunks_count) {
        return false;
    }
    const struct dcp_md_entry *entry = &md->entries[want->entry];
    uint64_t offset, payload;
    if (want->chunk < entry->first_chunk ||
        want->chunk - entry->first_chunk >= entry->chunks_count ||
        md->chunks[want->chunk].file == DCP_NO_FILE) {
        return false;
    }
    if (want->detail == 0) {
        return true;
    }
    if (!dcp_share_payload(md, want->entry, want->chunk, &offset, &payload)) {
        return false;
    }
    uint64_t blocks = (payload + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
    uint64_t words = DCP_SHARE_DETAIL_BITS + (blocks + 63) / 64;
    uint64_t index = want->detail - 1, count = member->header->details_count;
    return index < count && words <= count - index;
}

bool
dcp_share_check_wants(const struct dcp_share *share, const struct dcp_metadata *md)
{
    for (uint32_t m = 0; m < share->members_count; m++) {
        const struct dcp_share_member *member = &share->members[m];
        struct dcp_share_head last = {0};
        for (uint64_t i = 0; i < member->header->wants_count; i++) {
            if (!check_want(member, &member->wants[i], md)) {
                return false;
            }
            const struct dcp_md_chunk *chunk = &md->chunks[member->wants[i].chunk];
            struct dcp_share_head head = {chunk->file, member->wants[i].chunk, chunk->offset_bytes};
            if (i > 0 && !head_before(&last, &head)) {
                return false;
            }
            last = head;
        }
    }
    return true;
}

void
dcp_share_cursor_init(struct dcp_share_cursor *cursor, const struct dcp_share *share,
                      const struct dcp_metadata *md)
{
    memset(cursor, 0, sizeof *cursor);
    cursor->md = md;
    cursor->members = share->members;
    cursor->members_count = share->members_count;
    for (uint32_t m = 0; m < share->members_count; m++) {
        const struct dcp_share_header *header = share->members[m].header;
        if (header->slots_count > 0 &&
            (cursor->unit_bytes == 0 || header->slot_bytes < cursor->unit_bytes)) {
            cursor->unit_bytes = header->slot_bytes;
        }
        advance(cursor, m);
    }
}

/* ---- chunks ---- */

/* Takes the next chunk of all members into cursor->chunk; false at the end. */
static bool
merge_chunk(struct dcp_share_cursor *cursor)
{
    const struct dcp_share_head *first = &cursor->heads[0];
    for (uint32_t m = 1; m < cursor->members_count; m++) {
        if (head_before(&cursor->heads[m], first)) {
            first = &cursor->heads[m];
        }
    }
    if (first->file == DCP_NO_FILE) {
        return false;
    }
    struct dcp_share_head head = *first;
    cursor->chunk.users = 0;
    for (uint32_t m = 0; m < cursor->members_count; m++) {
        if (cursor->heads[m].file == DCP_NO_FILE || cursor->heads[m].chunk != head.chunk) {
            continue;
        }
        const struct dcp_share_want *want = &cursor->members[m].wants[cursor->at[m]++];
        cursor->chunk.chunk = want->chunk;
        cursor->chunk.entry = want->entry;
        cursor->chunk.users |= UINT64_C(1) << m;
        cursor->details[m] =
            want->detail == 0 ? NULL : cursor->members[m].details + want->detail - 1;
        advance(cursor, m);
    }
    return true;
}

static bool
wants_block(const struct dcp_share_cursor *cursor, uint32_t member, uint64_t block)
{
    const uint64_t *detail = cursor->details[member];
    return detail == NULL || ((detail[DCP_SHARE_DETAIL_BITS + block / 64] >> (block % 64)) & 1);
}

/* Who wants a block. */
static uint64_t
users_of(const struct dcp_share_cursor *cursor, uint64_t block)
{
    uint64_t users = 0;
    for (uint64_t left = cursor->chunk.users; left != 0; left &= left - 1) {
        uint32_t m = (uint32_t)__builtin_ctzll(left);
        users |= (uint64_t)wants_block(cursor, m, block) << m;
    }
    return users;
}

/* Bytes of all blocks that somebody wants. */
static uint64_t
union_bytes(const struct dcp_share_cursor *cursor)
{
    uint64_t payload = cursor->chunk.payload_bytes, blocks = 0;
    for (uint64_t left = cursor->chunk.users; left != 0; left &= left - 1) {
        if (cursor->details[__builtin_ctzll(left)] == NULL) {
            return payload;
        }
    }
    for (uint64_t word = 0; word * 64 < cursor->blocks_count; word++) {
        uint64_t bits = 0;
        for (uint64_t left = cursor->chunk.users; left != 0; left &= left - 1) {
            bits |= cursor->details[__builtin_ctzll(left)][DCP_SHARE_DETAIL_BITS + word];
        }
        blocks += (uint64_t)__builtin_popcountll(bits);
    }
    uint64_t missing = users_of(cursor, cursor->blocks_count - 1) != 0
                           ? cursor->blocks_count * DCP_BLOCK_BYTES - payload
                           : 0;
    return blocks * DCP_BLOCK_BYTES - missing;
}

static bool
pays(const struct dcp_share_cursor *cursor)
{
    if ((cursor->chunk.users & (cursor->chunk.users - 1)) == 0) {
        return false;
    }
    uint64_t apart = 0, weak = 0, together = union_bytes(cursor);
    for (uint64_t left = cursor->chunk.users; left != 0; left &= left - 1) {
        const uint64_t *detail = cursor->details[__builtin_ctzll(left)];
        apart += detail == NULL ? cursor->chunk.payload_bytes : detail[DCP_SHARE_DETAIL_READ];
        weak += detail == NULL ? 0 : detail[DCP_SHARE_DETAIL_WEAK];
    }
    return apart > together + together / 8 || (weak > 0 && together <= apart + apart / 8);
}

bool
dcp_share_next_chunk(struct dcp_share_cursor *cursor)
{
    struct dcp_share_piece *chunk = &cursor->chunk;
    while (cursor->unit_bytes > 0 && merge_chunk(cursor)) {
        if (dcp_share_payload(cursor->md, chunk->entry, chunk->chunk, &chunk->payload_offset_bytes,
                              &chunk->payload_bytes)) {
            cursor->block = 0;
            cursor->blocks_count = (chunk->payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
            if (pays(cursor)) {
                return true;
            }
        }
    }
    chunk->users = 0;
    return false;
}

/* ---- units ---- */

static uint64_t
block_end(const struct dcp_share_piece *chunk, uint64_t block)
{
    uint64_t to = dcp_min_u64((block + 1) * DCP_BLOCK_BYTES, chunk->payload_bytes);
    uint64_t descriptor = chunk->payload_bytes <= DCP_BLOCK_BYTES ? DESCRIPTOR_BYTES : 0;
    return chunk->payload_offset_bytes + to + descriptor;
}

/* Adds the next blocks of the chunk that the unit has room for.  False when it had none, or when it
 * is full. */
static bool
add_piece(struct dcp_share_cursor *cursor, struct dcp_share_unit *unit)
{
    const struct dcp_share_piece *chunk = &cursor->chunk;
    uint32_t file = cursor->md->chunks[chunk->chunk].file;
    uint64_t first = cursor->block;
    uint64_t at = chunk->payload_offset_bytes + first * DCP_BLOCK_BYTES;
    if (unit->pieces_count == 0) {
        unit->file = file;
        unit->from_bytes = at & ~(uint64_t)(DCP_DIRECT_ALIGN_BYTES - 1);
    } else if (unit->pieces_count == DCP_SHARE_MOST_PIECES || file != unit->file ||
               at < unit->end_bytes || at - unit->end_bytes > DCP_SHARE_GAP_BYTES) {
        return false;
    }
    struct dcp_share_piece *piece = &unit->pieces[unit->pieces_count];
    uint64_t limit = unit->from_bytes + cursor->unit_bytes, users;
    *piece = *chunk;
    piece->users = 0;
    while (cursor->block < cursor->blocks_count && (users = users_of(cursor, cursor->block)) != 0 &&
           dcp_align_up(block_end(chunk, cursor->block), DCP_DIRECT_ALIGN_BYTES) <= limit) {
        piece->users |= users;
        piece->end_bytes = block_end(chunk, cursor->block);
        cursor->block++;
    }
    if (cursor->block == first) {
        DCP_ASSERT(unit->pieces_count > 0);
        return false;
    }
    piece->from = first * DCP_BLOCK_BYTES;
    piece->to = dcp_min_u64(cursor->block * DCP_BLOCK_BYTES, chunk->payload_bytes);
    unit->end_bytes = piece->end_bytes;
    unit->users |= piece->users;
    unit->pieces_count++;
    return true;
}

static void
deal(struct dcp_share_cursor *cursor, struct dcp_share_unit *unit)
{
    uint32_t best = DCP_SHARE_MOST_RANKS;
    for (uint32_t m = 0; m < cursor->members_count; m++) {
        if (cursor->members[m].header->slots_count > 0 &&
            (best == DCP_SHARE_MOST_RANKS ||
             cursor->reader_bytes[m] < cursor->reader_bytes[best])) {
            best = m;
        }
    }
    unit->reader = best;
    unit->number = cursor->reader_units[best]++;
    cursor->reader_bytes[best] += unit->end_bytes - unit->from_bytes;
}

bool
dcp_share_next_unit(struct dcp_share_cursor *cursor, struct dcp_share_unit *ret)
{
    ret->pieces_count = 0;
    ret->users = 0;
    for (;;) {
        if (cursor->chunk.users == 0 && !dcp_share_next_chunk(cursor)) {
            break;
        }
        while (cursor->block < cursor->blocks_count && users_of(cursor, cursor->block) == 0) {
            cursor->block++;
        }
        if (cursor->block == cursor->blocks_count) {
            cursor->chunk.users = 0;
        } else if (!add_piece(cursor, ret)) {
            break;
        }
    }
    if (ret->pieces_count == 0) {
        return false;
    }
    deal(cursor, ret);
    return true;
}

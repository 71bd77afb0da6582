/*
 * file_frame.c: what a data file holds besides records: the header in front, the block table
 * behind.
 *
 * The header tells a stale or foreign file before the first read of it; the table gathers the CRCs
 * of all blocks of a file, so that a reader of parts of many tensors fetches them with one request.
 * Both carry a magic, a version and a CRC over all their other bytes.  A hash table may follow
 * (hash_table.c); a flag of the header tells, since older readers know how to go without.
 *
 * Header, 64 bytes:  magic[4] version crc rank | save_id[16] | n flags length(8) | table offset(8)
 * bytes(8).  Table: magic[4] version crc entries | save_id[16] | blocks(8) | per entry: offset(8)
 * bytes(8) crc 0 | all block CRCs | zeros up to a multiple of 8.  Numbers are little endian, 4
 * bytes where no width is given.
 *
 * Threads: no state.
 */
#include "file_frame.h"

#include <stdlib.h>

#include "dcp_crc32.h"
#include "le_bytes.h"
#include "zip_format.h"

enum {
    TABLE_VERSION = 1,
    TABLE_HEADER_BYTES = 40,
    TABLE_ENTRY_BYTES = 24,
    FLAG_HASH_TABLE = 1 << 0,
    FLAG_PLANNED_OUTSIDE = 1 << 1,
};

/* The first byte is no text and no start of a zip or a pickle. */
static const uint8_t header_magic[4] = {0x89, 'D', 'C', 'P'};
static const uint8_t table_magic[4] = {0x89, 'D', 'C', 'B'};

int
dcp_frame_damaged(struct dcp_error *err, const char *what)
{
    return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                         "reading a data file's frame failed: %s; the file is damaged or another "
                         "save's",
                         what);
}

uint32_t
dcp_frame_crc(const uint8_t *bytes, size_t len)
{
    uint32_t crc = dcp_crc32(0, bytes, DCP_FRAME_CRC_OFFSET);
    return dcp_crc32(crc, bytes + DCP_FRAME_CRC_OFFSET + 4, len - DCP_FRAME_CRC_OFFSET - 4);
}

static int
compare_offsets(const void *offset_bytes, const void *entry)
{
    uint64_t wanted, found;
    memcpy(&wanted, offset_bytes, sizeof wanted);
    memcpy(&found, entry, sizeof found);
    return wanted < found ? -1 : wanted > found;
}

const void *
dcp_frame_find(const void *entries, uint32_t entries_count, size_t entry_bytes,
               uint64_t offset_bytes)
{
    return entries_count == 0
               ? NULL
               : bsearch(&offset_bytes, entries, entries_count, entry_bytes, compare_offsets);
}

void
dcp_file_put_header(struct dcp_buf *buf, const struct dcp_file_header *header)
{
    /* Readers derive where the hash table is. */
    DCP_ASSERT(
        header->hash_bytes == 0 ||
        (header->hash_offset_bytes == dcp_align_up(header->table_offset_bytes + header->table_bytes,
                                                   DCP_FRAME_ALIGN_BYTES) &&
         header->hash_offset_bytes + header->hash_bytes == header->length_bytes));
    uint8_t *start = dcp_buf_extend(buf, DCP_FILE_HEADER_BYTES);
    if (start == NULL) {
        return;
    }
    uint8_t *at = le_put_bytes(start, header_magic, sizeof header_magic);
    at = le_put32(le_put32(at, DCP_FILE_VERSION), 0);
    at = le_put32(at, header->rank);
    at = le_put_bytes(at, header->save_id.bytes, sizeof header->save_id.bytes);
    at = le_put32(le_put32(at, header->n),
                  (header->hash_bytes > 0 ? FLAG_HASH_TABLE : 0u) |
                      (header->planned_outside ? FLAG_PLANNED_OUTSIDE : 0u));
    at = le_put64(at, header->length_bytes);
    at = le_put64(at, header->table_offset_bytes);
    at = le_put64(at, header->table_bytes);
    DCP_ASSERT(at == start + DCP_FILE_HEADER_BYTES);
    (void)le_put32(start + DCP_FRAME_CRC_OFFSET, dcp_frame_crc(start, (size_t)(at - start)));
}

/* Nobody may make a reader allocate more than the records before a table can fill: every block of
 * it is a mebibyte in front of it, but for the last of each payload, and no record is shorter than
 * the end of a zip; those that a program made have a byte, and all may be listed. */
static bool
tables_fit(const struct dcp_file_header *header)
{
    uint64_t blocks = header->table_offset_bytes / DCP_BLOCK_BYTES + 1;
    uint64_t least_bytes = header->planned_outside ? 1 : ZIP_END_BYTES;
    uint32_t records =
        (uint32_t)dcp_min_u64(header->table_offset_bytes / least_bytes + 1, DCP_MAX_ITEMS_PER_RANK);
    uint32_t listed = header->planned_outside ? records : (uint32_t)dcp_min_u64(blocks, UINT32_MAX);
    return header->table_bytes <= dcp_block_table_bytes(listed, blocks + listed) &&
           header->hash_bytes <= dcp_hash_table_bytes(records);
}

int
dcp_file_parse_header(const uint8_t *bytes, struct dcp_file_header *ret, struct dcp_error *err)
{
    struct dcp_cursor c = {.data = bytes, .len = DCP_FILE_HEADER_BYTES};
    if (memcmp(dcp_cursor_bytes(&c, 4), header_magic, sizeof header_magic) != 0) {
        return dcp_frame_damaged(err, "it does not start with dcp_native's header");
    }
    uint32_t version = dcp_cursor_u32(&c);
    if (dcp_cursor_u32(&c) != dcp_frame_crc(bytes, DCP_FILE_HEADER_BYTES)) {
        return dcp_frame_damaged(err, "the CRC of the header does not match");
    }
    if (version != DCP_FILE_VERSION) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                             "reading a data file's header failed: it has version %u, this reader "
                             "knows %u; read it with a newer dcp_native",
                             version, DCP_FILE_VERSION);
    }
    struct dcp_file_header header = {.rank = dcp_cursor_u32(&c)};
    memcpy(header.save_id.bytes, dcp_cursor_bytes(&c, sizeof header.save_id.bytes),
           sizeof header.save_id.bytes);
    header.n = dcp_cursor_u32(&c);
    uint32_t flags = dcp_cursor_u32(&c);
    header.planned_outside = (flags & FLAG_PLANNED_OUTSIDE) != 0;
    header.length_bytes = dcp_cursor_u64(&c);
    header.table_offset_bytes = dcp_cursor_u64(&c);
    header.table_bytes = dcp_cursor_u64(&c);
    uint64_t table_end;
    if (dcp_add_overflows_u64(header.table_offset_bytes, header.table_bytes, &table_end) ||
        table_end > header.length_bytes || header.length_bytes < DCP_FILE_HEADER_BYTES) {
        return dcp_frame_damaged(err, "the header's lengths contradict each other");
    }
    header.hash_offset_bytes = header.length_bytes;
    if ((flags & FLAG_HASH_TABLE) != 0) {
        /* Rounding up past 2^64 gives 0, which is refused like any other place before the end. */
        header.hash_offset_bytes = dcp_align_up(table_end, DCP_FRAME_ALIGN_BYTES);
        if (header.hash_offset_bytes < table_end ||
            header.hash_offset_bytes >= header.length_bytes) {
            return dcp_frame_damaged(err, "the header's hash table lies behind the file's end");
        }
        header.hash_bytes = header.length_bytes - header.hash_offset_bytes;
    }
    DCP_ASSERT(!c.failed);
    if (!tables_fit(&header)) {
        return dcp_frame_damaged(err, "the header's tables are longer than its records allow");
    }
    *ret = header;
    return 0;
}

/* ---- block table ---- */

static uint64_t
blocks_of(uint64_t payload_bytes)
{
    return payload_bytes / DCP_BLOCK_BYTES + (payload_bytes % DCP_BLOCK_BYTES != 0);
}

uint64_t
dcp_block_table_bytes(uint32_t entries_count, uint64_t blocks_count)
{
    DCP_ASSERT(blocks_count <= UINT64_MAX / 8);
    uint64_t bytes =
        TABLE_HEADER_BYTES + (uint64_t)entries_count * TABLE_ENTRY_BYTES + blocks_count * 4;
    return dcp_align_up(bytes, DCP_FRAME_ALIGN_BYTES);
}

void
dcp_block_table_put(struct dcp_buf *buf, const struct dcp_save_id *save_id,
                    const struct dcp_block_entry *entries, uint32_t entries_count)
{
    uint64_t blocks_count = 0;
    for (uint32_t i = 0; i < entries_count; i++) {
        DCP_ASSERT(i == 0 || entries[i - 1].payload_offset_bytes < entries[i].payload_offset_bytes);
        blocks_count += blocks_of(entries[i].payload_bytes);
    }
    uint64_t total = dcp_block_table_bytes(entries_count, blocks_count);
    uint8_t *start = dcp_buf_extend(buf, total);
    if (start == NULL) {
        return;
    }
    uint8_t *at = le_put_bytes(start, table_magic, sizeof table_magic);
    at = le_put32(le_put32(at, TABLE_VERSION), 0);
    at = le_put32(at, entries_count);
    at = le_put_bytes(at, save_id->bytes, sizeof save_id->bytes);
    at = le_put64(at, blocks_count);
    for (uint32_t i = 0; i < entries_count; i++) {
        at = le_put64(at, entries[i].payload_offset_bytes);
        at = le_put64(at, entries[i].payload_bytes);
        at = le_put32(le_put32(at, entries[i].payload_crc), 0);
    }
    for (uint32_t i = 0; i < entries_count; i++) {
        for (uint64_t k = 0; k < blocks_of(entries[i].payload_bytes); k++) {
            at = le_put32(at, entries[i].block_crcs[k]);
        }
    }
    memset(at, 0, (size_t)(start + total - at));
    (void)le_put32(start + DCP_FRAME_CRC_OFFSET, dcp_frame_crc(start, total));
}

/* The fixed part: magic, version, CRC, save id, and counts that fit `len`. */
static int
read_table_header(struct dcp_cursor *c, const struct dcp_save_id *save_id,
                  uint32_t *ret_entries_count, uint64_t *ret_blocks_count, struct dcp_error *err)
{
    if (c->len < TABLE_HEADER_BYTES ||
        memcmp(dcp_cursor_bytes(c, 4), table_magic, sizeof table_magic) != 0) {
        return dcp_frame_damaged(err, "the block table is not where the header says");
    }
    uint32_t version = dcp_cursor_u32(c);
    if (dcp_cursor_u32(c) != dcp_frame_crc(c->data, c->len)) {
        return dcp_frame_damaged(err, "the CRC of the block table does not match");
    }
    *ret_entries_count = dcp_cursor_u32(c);
    const uint8_t *id = dcp_cursor_bytes(c, sizeof save_id->bytes);
    if (version != TABLE_VERSION || memcmp(id, save_id->bytes, sizeof save_id->bytes) != 0) {
        return dcp_frame_damaged(err, "the block table belongs to another save");
    }
    *ret_blocks_count = dcp_cursor_u64(c);
    if (*ret_blocks_count > c->len / 4 ||
        dcp_block_table_bytes(*ret_entries_count, *ret_blocks_count) != c->len) {
        return dcp_frame_damaged(err, "the block table's length contradicts its counts");
    }
    return 0;
}

static int
read_table_entries(struct dcp_cursor *c, uint64_t blocks_count, struct dcp_block_table *table,
                   struct dcp_error *err)
{
    uint64_t used = 0, previous_end = 0;
    for (uint32_t i = 0; i < table->entries_count; i++) {
        struct dcp_block_entry *entry = &table->entries[i];
        entry->payload_offset_bytes = dcp_cursor_u64(c);
        entry->payload_bytes = dcp_cursor_u64(c);
        entry->payload_crc = dcp_cursor_u32(c);
        (void)dcp_cursor_u32(c);
        entry->block_crcs = table->crcs + used;
        uint64_t blocks = blocks_of(entry->payload_bytes), end;
        if (dcp_add_overflows_u64(entry->payload_offset_bytes, entry->payload_bytes, &end) ||
            entry->payload_offset_bytes < previous_end || blocks > blocks_count - used) {
            return dcp_frame_damaged(err, "the block table's entries contradict each other");
        }
        previous_end = end;
        used += blocks;
    }
    if (used != blocks_count) {
        return dcp_frame_damaged(err, "the block table's entries contradict each other");
    }
    for (uint64_t i = 0; i < blocks_count; i++) {
        table->crcs[i] = dcp_cursor_u32(c);
    }
    DCP_ASSERT(!c->failed);
    return 0;
}

int
dcp_block_table_parse(const uint8_t *bytes, size_t len, const struct dcp_save_id *save_id,
                      struct dcp_block_table *ret, struct dcp_error *err)
{
    struct dcp_cursor c = {.data = bytes, .len = len};
    struct dcp_block_table table = {.entries_count = 0};
    uint64_t blocks_count = 0;
    int rc = read_table_header(&c, save_id, &table.entries_count, &blocks_count, err);
    if (rc != 0) {
        return rc;
    }
    table.entries = dcp_calloc(table.entries_count, sizeof *table.entries);
    table.crcs = dcp_malloc_array(blocks_count, sizeof *table.crcs);
    if (table.entries == NULL || table.crcs == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                           "reading a block table of %zu bytes failed: out of memory", len);
        goto fail;
    }
    rc = read_table_entries(&c, blocks_count, &table, err);
    if (rc != 0) {
        goto fail;
    }
    *ret = table;
    return 0;
fail:
    dcp_block_table_clean_up(&table);
    return rc;
}

const struct dcp_block_entry *
dcp_block_table_find(const struct dcp_block_table *table, uint64_t payload_offset_bytes)
{
    return dcp_frame_find(table->entries, table->entries_count, sizeof *table->entries,
                          payload_offset_bytes);
}

void
dcp_block_table_clean_up(struct dcp_block_table *table)
{
    if (table == NULL) {
        return;
    }
    dcp_free(table->entries);
    dcp_free(table->crcs);
    *table = (struct dcp_block_table){.entries_count = 0};
}

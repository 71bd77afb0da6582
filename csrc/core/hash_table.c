/*
 * hash_table.c: the content hashes of a data file's records, behind its block table.
 *
 * A save with `base=` asks for every tensor what its content was at the base: one read per file of
 * the base answers that, without touching a payload.  The hashes are of what was meant to be
 * written, so a file that rotted on disk is still told from its source by the CRCs alone.
 *
 *     magic[4] version crc entries | save_id[16] | per record: offset(8) bytes(8) lo(8) hi(8)
 *
 * Numbers are little endian, 4 bytes where no width is given.
 *
 * Threads: no state.
 */
#include "file_frame.h"

#include "le_bytes.h"

enum { TABLE_VERSION = 1, TABLE_HEADER_BYTES = 32, TABLE_ENTRY_BYTES = 32 };

/* The first byte is no text and no start of a zip or a pickle. */
static const uint8_t table_magic[4] = {0x89, 'D', 'C', 'H'};

uint64_t
dcp_hash_table_bytes(uint32_t entries_count)
{
    return entries_count == 0 ? 0
                              : TABLE_HEADER_BYTES + (uint64_t)entries_count * TABLE_ENTRY_BYTES;
}

void
dcp_hash_table_put(struct dcp_buf *buf, const struct dcp_save_id *save_id,
                   const struct dcp_hash_entry *entries, uint32_t entries_count)
{
    uint64_t total = dcp_hash_table_bytes(entries_count);
    uint8_t *start = total == 0 ? NULL : dcp_buf_extend(buf, total);
    if (start == NULL) {
        return;
    }
    uint8_t *at = le_put_bytes(start, table_magic, sizeof table_magic);
    at = le_put32(le_put32(at, TABLE_VERSION), 0);
    at = le_put32(at, entries_count);
    at = le_put_bytes(at, save_id->bytes, sizeof save_id->bytes);
    for (uint32_t i = 0; i < entries_count; i++) {
        DCP_ASSERT(i == 0 || entries[i - 1].record_offset_bytes < entries[i].record_offset_bytes);
        at = le_put64(le_put64(at, entries[i].record_offset_bytes), entries[i].record_bytes);
        at = le_put64(le_put64(at, entries[i].hash.lo), entries[i].hash.hi);
    }
    DCP_ASSERT(at == start + total);
    (void)le_put32(start + DCP_FRAME_CRC_OFFSET, dcp_frame_crc(start, total));
}

/* The fixed part: magic, version, CRC, save id, and a count that fits `len`. */
static int
read_header(struct dcp_cursor *c, const struct dcp_save_id *save_id, uint32_t *ret_entries_count,
            struct dcp_error *err)
{
    if (c->len < TABLE_HEADER_BYTES ||
        memcmp(dcp_cursor_bytes(c, 4), table_magic, sizeof table_magic) != 0) {
        return dcp_frame_damaged(err, "the hash table is not where the header says");
    }
    uint32_t version = dcp_cursor_u32(c);
    if (dcp_cursor_u32(c) != dcp_frame_crc(c->data, c->len)) {
        return dcp_frame_damaged(err, "the CRC of the hash table does not match");
    }
    uint32_t entries_count = dcp_cursor_u32(c);
    const uint8_t *id = dcp_cursor_bytes(c, sizeof save_id->bytes);
    if (version != TABLE_VERSION || memcmp(id, save_id->bytes, sizeof save_id->bytes) != 0) {
        return dcp_frame_damaged(err, "the hash table belongs to another save");
    }
    if (dcp_hash_table_bytes(entries_count) != c->len) {
        return dcp_frame_damaged(err, "the hash table's length contradicts its count");
    }
    *ret_entries_count = entries_count;
    return 0;
}

int
dcp_hash_table_parse(const uint8_t *bytes, size_t len, const struct dcp_save_id *save_id,
                     struct dcp_hash_table *ret, struct dcp_error *err)
{
    struct dcp_cursor c = {.data = bytes, .len = len};
    struct dcp_hash_table table = {0};
    int rc = read_header(&c, save_id, &table.entries_count, err);
    if (rc != 0) {
        return rc;
    }
    table.entries = dcp_malloc_array(table.entries_count, sizeof *table.entries);
    if (table.entries == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "reading a hash table of %zu bytes failed: out of memory", len);
    }
    uint64_t previous_end = DCP_FILE_HEADER_BYTES;
    for (uint32_t i = 0; i < table.entries_count; i++) {
        struct dcp_hash_entry *entry = &table.entries[i];
        entry->record_offset_bytes = dcp_cursor_u64(&c);
        entry->record_bytes = dcp_cursor_u64(&c);
        entry->hash.lo = dcp_cursor_u64(&c);
        entry->hash.hi = dcp_cursor_u64(&c);
        if (entry->record_offset_bytes < previous_end || entry->record_bytes == 0 ||
            dcp_add_overflows_u64(entry->record_offset_bytes, entry->record_bytes, &previous_end)) {
            dcp_hash_table_clean_up(&table);
            return dcp_frame_damaged(err, "the hash table's entries contradict each other");
        }
    }
    DCP_ASSERT(!c.failed);
    *ret = table;
    return 0;
}

const struct dcp_hash_entry *
dcp_hash_table_find(const struct dcp_hash_table *table, uint64_t record_offset_bytes)
{
    return dcp_frame_find(table->entries, table->entries_count, sizeof *table->entries,
                          record_offset_bytes);
}

void
dcp_hash_table_clean_up(struct dcp_hash_table *table)
{
    if (table == NULL) {
        return;
    }
    dcp_free(table->entries);
    *table = (struct dcp_hash_table){0};
}

/*
 * zip_directory.c: end records, directory entries and local headers of a record, read from
 * untrusted bytes.
 *
 * Sizes and CRCs are taken from the directory alone: torch leaves them zero in local headers.
 * Every offset is checked against the place of the directory before it is handed out, so callers
 * may index with what they get.  Compressed entries are damage: torch.load(mmap=True) of one reads
 * wrong bytes without a word.
 *
 * Threads: no state.
 */
#include "zip_format.h"

#include "dcp_alloc.h"
#include "le_bytes.h"

static int
damaged(struct dcp_error *err, const char *what)
{
    return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                         "reading a record's zip directory failed: %s; the file is damaged or not "
                         "a torch.save record",
                         what);
}

/* The plain end record nearest to the end whose comment fits; SIZE_MAX when there is none. */
static size_t
scan_for_end(const uint8_t *tail, size_t tail_len)
{
    if (tail_len < ZIP_END_BYTES) {
        return SIZE_MAX;
    }
    for (size_t at = tail_len - ZIP_END_BYTES;; at--) {
        if (le_get32(tail + at) == ZIP_END_SIGNATURE) {
            size_t comment = (size_t)tail[at + 20] | (size_t)tail[at + 21] << 8;
            if (comment <= tail_len - at - ZIP_END_BYTES) {
                return at;
            }
        }
        if (at == 0) {
            return SIZE_MAX;
        }
    }
}

/* Reads the zip64 end record that the locator at `locator_at` points to. */
static int
read_end_64(const uint8_t *tail, size_t locator_at, uint64_t tail_offset, struct zip_end *end,
            struct dcp_error *err)
{
    struct dcp_cursor c = {
        .data = tail, .len = locator_at + ZIP64_LOCATOR_BYTES, .pos = locator_at + 8};
    uint64_t offset = dcp_cursor_u64(&c);
    if (offset < tail_offset) {
        return tail_offset == 0 ? damaged(err, "its zip64 end record is misplaced") : DCP_E_MISSING;
    }
    uint64_t at = offset - tail_offset;
    if (at > locator_at || locator_at - at < ZIP64_END_BYTES ||
        le_get32(tail + at) != ZIP64_END_SIGNATURE) {
        return damaged(err, "its zip64 end record is misplaced");
    }
    c.pos = (size_t)at + 24; /* signature, size, versions, disks */
    (void)dcp_cursor_u64(&c);
    end->entries_count = dcp_cursor_u64(&c);
    end->directory_bytes = dcp_cursor_u64(&c);
    end->directory_offset = dcp_cursor_u64(&c);
    end->records_offset = offset;
    end->has_64 = true;
    DCP_ASSERT(!c.failed);
    return 0;
}

int
zip_find_end(const uint8_t *tail, size_t tail_len, uint64_t length_bytes, struct zip_end *ret_end,
             struct dcp_error *err)
{
    DCP_ASSERT(tail_len <= length_bytes);
    uint64_t tail_offset = length_bytes - tail_len;
    size_t at = scan_for_end(tail, tail_len);
    if (at == SIZE_MAX) {
        return tail_offset == 0 ? damaged(err, "it has no end record") : DCP_E_MISSING;
    }
    struct dcp_cursor c = {.data = tail, .len = tail_len, .pos = at + 8};
    (void)dcp_cursor_u16(&c);
    struct zip_end end = {.entries_count = dcp_cursor_u16(&c)};
    end.directory_bytes = dcp_cursor_u32(&c);
    end.directory_offset = dcp_cursor_u32(&c);
    end.comment_bytes = dcp_cursor_u16(&c);
    end.records_offset = tail_offset + at;
    end.comment_offset = tail_offset + at + ZIP_END_BYTES;
    if (at < ZIP64_LOCATOR_BYTES && tail_offset != 0) {
        return DCP_E_MISSING;
    }
    if (at >= ZIP64_LOCATOR_BYTES &&
        le_get32(tail + at - ZIP64_LOCATOR_BYTES) == ZIP64_LOCATOR_SIGNATURE) {
        int rc = read_end_64(tail, at - ZIP64_LOCATOR_BYTES, tail_offset, &end, err);
        if (rc != 0) {
            return rc;
        }
    }
    uint64_t directory_end;
    if (dcp_add_overflows_u64(end.directory_offset, end.directory_bytes, &directory_end) ||
        directory_end != end.records_offset) {
        return damaged(err, "the directory does not end where the end record starts");
    }
    if (end.entries_count == 0 || end.entries_count > end.directory_bytes / ZIP_CENTRAL_BYTES) {
        return damaged(err, "the directory has an impossible number of entries");
    }
    *ret_end = end;
    return 0;
}

/* Replaces the fields that are all ones by those of the zip64 extra field. */
static int
read_extra_64(struct dcp_cursor *extra, struct zip_entry *entry, uint64_t *stored_bytes,
              struct dcp_error *err)
{
    bool wants_bytes = entry->bytes == ZIP_MAX_32;
    bool wants_stored = *stored_bytes == ZIP_MAX_32;
    bool wants_offset = entry->header_offset == ZIP_MAX_32;
    if (!wants_bytes && !wants_stored && !wants_offset) {
        return 0;
    }
    while (extra->pos < extra->len) {
        uint16_t id = dcp_cursor_u16(extra);
        uint16_t len = dcp_cursor_u16(extra);
        const uint8_t *data = dcp_cursor_bytes(extra, len);
        if (data == NULL) {
            break;
        }
        if (id != ZIP64_EXTRA_ID) {
            continue;
        }
        struct dcp_cursor c = {.data = data, .len = len};
        entry->bytes = wants_bytes ? dcp_cursor_u64(&c) : entry->bytes;
        *stored_bytes = wants_stored ? dcp_cursor_u64(&c) : *stored_bytes;
        entry->header_offset = wants_offset ? dcp_cursor_u64(&c) : entry->header_offset;
        return c.failed ? damaged(err, "a zip64 extra field is too short") : 0;
    }
    return damaged(err, "a zip64 extra field is missing");
}

static int
check_entry(const struct zip_entry *entry, const struct zip_end *end, uint16_t method,
            uint64_t stored_bytes, struct dcp_error *err)
{
    if (method != 0 || stored_bytes != entry->bytes) {
        return damaged(err, "an entry is compressed, torch.save stores them");
    }
    if ((entry->flags & ZIP_FLAG_ENCRYPTED) != 0) {
        return damaged(err, "an entry is encrypted");
    }
    uint64_t entry_end;
    if (dcp_add_overflows_u64(entry->header_offset, ZIP_LOCAL_BYTES + entry->name_len,
                              &entry_end) ||
        dcp_add_overflows_u64(entry_end, entry->bytes, &entry_end) ||
        entry_end > end->directory_offset) {
        return damaged(err, "an entry reaches beyond the directory");
    }
    return 0;
}

int
zip_next_entry(const uint8_t *directory, const struct zip_end *end, size_t *pos,
               struct zip_entry *ret_entry, struct dcp_error *err)
{
    struct dcp_cursor c = {.data = directory, .len = end->directory_bytes, .pos = *pos};
    bool is_entry = dcp_cursor_u32(&c) == ZIP_CENTRAL_SIGNATURE;
    (void)dcp_cursor_u32(&c); /* versions */
    struct zip_entry entry = {.flags = dcp_cursor_u16(&c)};
    uint16_t method = dcp_cursor_u16(&c);
    (void)dcp_cursor_u32(&c); /* time, date */
    entry.crc = dcp_cursor_u32(&c);
    uint64_t stored_bytes = dcp_cursor_u32(&c);
    entry.bytes = dcp_cursor_u32(&c);
    entry.name_len = dcp_cursor_u16(&c);
    uint16_t extra_len = dcp_cursor_u16(&c);
    uint16_t comment_len = dcp_cursor_u16(&c);
    (void)dcp_cursor_u64(&c); /* disk, attributes */
    entry.header_offset = dcp_cursor_u32(&c);
    entry.name = (const char *)dcp_cursor_bytes(&c, entry.name_len);
    struct dcp_cursor extra = {.data = dcp_cursor_bytes(&c, extra_len), .len = extra_len};
    (void)dcp_cursor_bytes(&c, comment_len);
    if (c.failed || !is_entry) {
        return damaged(err, "the directory is cut short");
    }
    int rc = read_extra_64(&extra, &entry, &stored_bytes, err);
    if (rc == 0) {
        rc = check_entry(&entry, end, method, stored_bytes, err);
    }
    if (rc == 0) {
        entry.directory_bytes = (uint32_t)(c.pos - *pos);
        *pos = c.pos;
        *ret_entry = entry;
    }
    return rc;
}

int
zip_data_offset(const uint8_t *header, const struct zip_end *end, const struct zip_entry *entry,
                uint64_t *ret_offset_bytes, struct dcp_error *err)
{
    struct dcp_cursor c = {.data = header, .len = ZIP_LOCAL_BYTES + entry->name_len};
    bool is_local = dcp_cursor_u32(&c) == ZIP_LOCAL_SIGNATURE;
    (void)dcp_cursor_u32(&c); /* version, flags */
    uint16_t method = dcp_cursor_u16(&c);
    (void)dcp_cursor_bytes(&c, 16); /* time, date, CRC, sizes */
    uint16_t name_len = dcp_cursor_u16(&c);
    uint16_t extra_len = dcp_cursor_u16(&c);
    if (!is_local || method != 0 || name_len != entry->name_len ||
        memcmp(header + ZIP_LOCAL_BYTES, entry->name, name_len) != 0) {
        return damaged(err, "a local header does not match the directory");
    }
    /* check_entry has bounded the sum without the extra field. */
    uint64_t offset = entry->header_offset + ZIP_LOCAL_BYTES + name_len + extra_len;
    if (offset + entry->bytes > end->directory_offset) {
        return damaged(err, "an entry reaches beyond the directory");
    }
    *ret_offset_bytes = offset;
    return 0;
}

/*
 * zip_directory.c: end records, directory entries and local headers of a record, read from
 * untrusted bytes.
 *
 * Sizes and CRCs are taken from the directory alone: torch leaves them zero in local headers.
 * Every offset is checked against the place of the directory before it is handed out, so callers
 * may index with what they get.  Compressed entries are damage: torch.load(mmap=True) of one reads
 * wrong bytes without a word.  So is what torch's own unzipper stumbles over: several disks, flags
 * it does not know, tensors marked as folders.
 *
 * Threads: no state.
 */
#include "zip_format.h"

#include "dcp_alloc.h"
#include "le_bytes.h"

enum {
    /* Encrypted, patched, strongly encrypted, masked: torch's unzipper refuses these. */
    FLAGS_REFUSED = ZIP_FLAG_ENCRYPTED | 0x0020 | 0x0040 | 0x2000,
    ATTRIBUTE_FOLDER = 0x10, /* of MS-DOS: torch reads nothing of such an entry */
    MAX_16 = 0xffff,         /* "see the zip64 record" */
};

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
        .data = tail, .len = locator_at + ZIP64_LOCATOR_BYTES, .pos = locator_at + 4};
    uint32_t disk = dcp_cursor_u32(&c);
    uint64_t offset = dcp_cursor_u64(&c);
    if (disk != 0 || dcp_cursor_u32(&c) != 1) {
        return damaged(err, "it is spread over several disks");
    }
    if (offset < tail_offset) {
        return tail_offset == 0 ? damaged(err, "its zip64 end record is misplaced") : DCP_E_MISSING;
    }
    uint64_t at = offset - tail_offset;
    if (at > locator_at || locator_at - at < ZIP64_END_BYTES ||
        le_get32(tail + at) != ZIP64_END_SIGNATURE) {
        return damaged(err, "its zip64 end record is misplaced");
    }
    c.pos = (size_t)at + 4;
    if (dcp_cursor_u64(&c) != locator_at - at - ZIP64_SIZE_FROM_BYTES) {
        return damaged(err, "its zip64 end record does not end where the next one starts");
    }
    (void)dcp_cursor_u32(&c);            /* versions */
    uint64_t disks = dcp_cursor_u64(&c); /* this one and the directory's */
    uint64_t entries_here = dcp_cursor_u64(&c);
    end->entries_count = dcp_cursor_u64(&c);
    if (disks != 0 || entries_here != end->entries_count) {
        return damaged(err, "it is spread over several disks");
    }
    end->directory_bytes = dcp_cursor_u64(&c);
    end->directory_offset = dcp_cursor_u64(&c);
    end->records_offset = offset;
    end->has_64 = true;
    DCP_ASSERT(!c.failed);
    return 0;
}

/* The plain end record, all of it.  With a zip64 record in front of it, which alone counts, its
 * fields say the same or "see there". */
static int
read_end(const uint8_t *tail, size_t at, struct zip_end *end, struct dcp_error *err)
{
    struct dcp_cursor c = {.data = tail, .len = at + ZIP_END_BYTES, .pos = at + 4};
    uint32_t fields[6];
    uint64_t values[6] = {
        0, 0, end->entries_count, end->entries_count, end->directory_bytes, end->directory_offset};
    for (int i = 0; i < 6; i++) {
        fields[i] = i < 4 ? dcp_cursor_u16(&c) : dcp_cursor_u32(&c);
        bool sees_64 = fields[i] == (i < 4 ? (uint32_t)MAX_16 : UINT32_MAX);
        if (end->has_64 ? fields[i] != values[i] && !sees_64 : i < 2 && fields[i] != 0) {
            return damaged(err, "its end record contradicts the directory, or speaks of disks");
        }
    }
    end->comment_bytes = dcp_cursor_u16(&c);
    DCP_ASSERT(!c.failed);
    if (end->has_64) {
        return 0;
    }
    if (fields[2] != fields[3]) {
        return damaged(err, "it is spread over several disks");
    }
    end->entries_count = fields[3];
    end->directory_bytes = fields[4];
    end->directory_offset = fields[5];
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
    struct zip_end end = {.records_offset = tail_offset + at,
                          .comment_offset = tail_offset + at + ZIP_END_BYTES};
    if (at < ZIP64_LOCATOR_BYTES && tail_offset != 0) {
        return DCP_E_MISSING;
    }
    int rc = 0;
    if (at >= ZIP64_LOCATOR_BYTES &&
        le_get32(tail + at - ZIP64_LOCATOR_BYTES) == ZIP64_LOCATOR_SIGNATURE) {
        rc = read_end_64(tail, at - ZIP64_LOCATOR_BYTES, tail_offset, &end, err);
    }
    if (rc == 0) {
        rc = read_end(tail, at, &end, err);
    }
    if (rc != 0) {
        return rc;
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
              uint32_t *disk, struct dcp_error *err)
{
    bool wants_bytes = entry->bytes == ZIP_MAX_32;
    bool wants_stored = *stored_bytes == ZIP_MAX_32;
    bool wants_offset = entry->header_offset == ZIP_MAX_32;
    bool wants_disk = *disk == MAX_16;
    if (!wants_bytes && !wants_stored && !wants_offset && !wants_disk) {
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
        *disk = wants_disk ? dcp_cursor_u32(&c) : *disk;
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
    if ((entry->flags & FLAGS_REFUSED) != 0) {
        return damaged(err, "an entry is encrypted or patched");
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
    uint32_t disk = dcp_cursor_u16(&c);
    (void)dcp_cursor_u16(&c); /* internal attributes */
    uint32_t attributes = dcp_cursor_u32(&c);
    entry.header_offset = dcp_cursor_u32(&c);
    entry.name = (const char *)dcp_cursor_bytes(&c, entry.name_len);
    struct dcp_cursor extra = {.data = dcp_cursor_bytes(&c, extra_len), .len = extra_len};
    (void)dcp_cursor_bytes(&c, comment_len);
    if (c.failed || !is_entry) {
        return damaged(err, "the directory is cut short");
    }
    int rc = read_extra_64(&extra, &entry, &stored_bytes, &disk, err);
    if (rc == 0 && (disk != 0 || (attributes & ATTRIBUTE_FOLDER) != 0)) {
        return damaged(err, "an entry lies on another disk, or is marked as a folder");
    }
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

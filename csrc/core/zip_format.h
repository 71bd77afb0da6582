/*
 * zip_format.h: the zip structures that records are made of (PKWARE APPNOTE 4.3), stored entries
 * only.
 *
 * zip_put.c writes them at raw addresses after their size was counted; zip_directory.c reads them
 * from untrusted bytes.  A number that does not fit its 32-bit field is written as all ones, and
 * in full in a zip64 extra field.
 */
#ifndef ZIP_FORMAT_H
#define ZIP_FORMAT_H

#include "dcp_error.h"

enum {
    ZIP_LOCAL_SIGNATURE = 0x04034b50,
    ZIP_CENTRAL_SIGNATURE = 0x02014b50,
    ZIP_DESCRIPTOR_SIGNATURE = 0x08074b50,
    ZIP_END_SIGNATURE = 0x06054b50,
    ZIP64_END_SIGNATURE = 0x06064b50,
    ZIP64_LOCATOR_SIGNATURE = 0x07064b50,

    /* Fixed parts; names and extra fields follow. */
    ZIP_LOCAL_BYTES = 30,
    ZIP_CENTRAL_BYTES = 46,
    ZIP_END_BYTES = 22,
    ZIP64_END_BYTES = 56,
    ZIP64_LOCATOR_BYTES = 20,
    ZIP64_SIZE_FROM_BYTES = 12, /* the zip64 end record counts its size from behind that field */

    ZIP_FLAG_ENCRYPTED = 0x0001,
    ZIP_FLAG_DESCRIPTOR = 0x0008, /* CRC and sizes follow the data */
    ZIP_FLAG_UTF8 = 0x0800,

    ZIP_EXTRA_HEADER_BYTES = 4,
    ZIP64_EXTRA_ID = 1,
    ZIP_MAX_COMMENT_BYTES = 0xffff,
};

#define ZIP_MAX_32 UINT64_C(0xffffffff)

/* ---- writing ---- */

struct zip_put_entry {
    const char *name;
    uint32_t name_len;
    uint32_t crc;
    uint64_t bytes;         /* of the data */
    uint64_t header_offset; /* of its local header in the record */
    bool has_descriptor;    /* the local header leaves CRC and sizes to a descriptor */
};

static inline bool
zip_needs_64(uint64_t value)
{
    return value >= ZIP_MAX_32;
}

/* Sizes go together, because a local header must carry both or none. */
static inline uint64_t
zip_local_extra_bytes(const struct zip_put_entry *entry)
{
    return zip_needs_64(entry->bytes) ? ZIP_EXTRA_HEADER_BYTES + 16 : 0;
}

static inline uint64_t
zip_central_extra_bytes(const struct zip_put_entry *entry)
{
    uint64_t body =
        (zip_needs_64(entry->bytes) ? 16 : 0) + (zip_needs_64(entry->header_offset) ? 8 : 0);
    return body == 0 ? 0 : ZIP_EXTRA_HEADER_BYTES + body;
}

static inline uint64_t
zip_local_bytes(const struct zip_put_entry *entry)
{
    return ZIP_LOCAL_BYTES + entry->name_len + zip_local_extra_bytes(entry);
}

static inline uint64_t
zip_descriptor_bytes(const struct zip_put_entry *entry)
{
    return !entry->has_descriptor ? 0 : zip_needs_64(entry->bytes) ? 24 : 16;
}

static inline uint64_t
zip_central_bytes(const struct zip_put_entry *entry)
{
    return ZIP_CENTRAL_BYTES + entry->name_len + zip_central_extra_bytes(entry);
}

static inline bool
zip_end_needs_64(uint64_t directory_offset, uint64_t directory_bytes)
{
    return zip_needs_64(directory_offset) || zip_needs_64(directory_bytes);
}

static inline uint64_t
zip_end_bytes(uint64_t directory_offset, uint64_t directory_bytes)
{
    bool with_64 = zip_end_needs_64(directory_offset, directory_bytes);
    return ZIP_END_BYTES + (with_64 ? ZIP64_END_BYTES + ZIP64_LOCATOR_BYTES : 0);
}

/* Each writes exactly the bytes counted above and returns the address behind them. */
uint8_t *zip_put_local(uint8_t *at, const struct zip_put_entry *entry);
uint8_t *zip_put_descriptor(uint8_t *at, const struct zip_put_entry *entry);
uint8_t *zip_put_central(uint8_t *at, const struct zip_put_entry *entry);
/* `with_64` forces the zip64 end records; zip_end_bytes counts them only where they are needed. */
uint8_t *zip_put_end(uint8_t *at, uint64_t entries_count, uint64_t directory_offset,
                     uint64_t directory_bytes, bool with_64);

/* ---- reading ---- */

/* Where the directory lies.  Offsets from the start of the record. */
struct zip_end {
    uint64_t directory_offset, directory_bytes;
    uint64_t entries_count;
    uint64_t records_offset; /* of the first end record, zip64 or plain: the directory ends there */
    uint64_t comment_offset; /* behind the plain end record */
    uint32_t comment_bytes;
    bool has_64;
};

struct zip_entry {
    const char *name; /* borrows; not terminated */
    uint32_t name_len;
    uint16_t flags;
    uint32_t crc;
    uint64_t bytes;
    uint64_t header_offset;
    uint32_t directory_bytes; /* of this entry's part of the directory */
};

/* Finds the end records in the last `tail_len` bytes of a record of `length_bytes`.  DCP_E_MISSING
 * without an error text: not in these bytes, a longer tail may have them. */
int zip_find_end(const uint8_t *tail, size_t tail_len, uint64_t length_bytes,
                 struct zip_end *ret_end, struct dcp_error *err) DCP_MUST_CHECK;

/* Walks a directory: `directory` holds its bytes, *pos starts at 0.  Checks every field against
 * the directory's own place; compressed and encrypted entries are DCP_E_CORRUPT.  Behind the last
 * entry *pos must be the directory's length, which is the caller's to check. */
int zip_next_entry(const uint8_t *directory, const struct zip_end *end, size_t *pos,
                   struct zip_entry *ret_entry, struct dcp_error *err) DCP_MUST_CHECK;

/* Where an entry's data starts.  `header` holds at least ZIP_LOCAL_BYTES + name_len bytes from
 * entry->header_offset on. */
int zip_data_offset(const uint8_t *header, const struct zip_end *end, const struct zip_entry *entry,
                    uint64_t *ret_offset_bytes, struct dcp_error *err) DCP_MUST_CHECK;

#endif

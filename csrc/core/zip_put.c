/*
 * zip_put.c: zip headers, descriptors and end records at raw addresses.
 *
 * The writer counts before it writes, so nothing here can fail.  Dates are zero: a record's bytes
 * depend on its item alone.
 *
 * Threads: no state.
 */
#include "zip_format.h"

#include "le_bytes.h"

enum { VERSION_PLAIN = 0, VERSION_64 = 45 };

static inline uint32_t
field_32(uint64_t value)
{
    return zip_needs_64(value) ? UINT32_MAX : (uint32_t)value;
}

/* Flags, method, time, date: the same in both headers. */
static inline uint8_t *
put_flags(uint8_t *at, const struct zip_put_entry *entry)
{
    at = le_put16(at, ZIP_FLAG_UTF8 | (entry->has_descriptor ? ZIP_FLAG_DESCRIPTOR : 0));
    return le_put16(le_put32(at, 0), 0);
}

uint8_t *
zip_put_local(uint8_t *at, const struct zip_put_entry *entry)
{
    uint64_t extra_bytes = zip_local_extra_bytes(entry);
    uint64_t known_bytes = entry->has_descriptor ? 0 : entry->bytes;
    uint32_t field = extra_bytes != 0 ? UINT32_MAX : (uint32_t)known_bytes;

    at = le_put32(at, ZIP_LOCAL_SIGNATURE);
    at = le_put16(at, extra_bytes != 0 ? VERSION_64 : VERSION_PLAIN);
    at = put_flags(at, entry);
    at = le_put32(at, entry->has_descriptor ? 0 : entry->crc);
    at = le_put32(le_put32(at, field), field);
    at = le_put16(at, (uint16_t)entry->name_len);
    at = le_put16(at, (uint16_t)extra_bytes);
    at = le_put_bytes(at, entry->name, entry->name_len);
    if (extra_bytes != 0) {
        at = le_put16(le_put16(at, ZIP64_EXTRA_ID),
                      (uint16_t)(extra_bytes - ZIP_EXTRA_HEADER_BYTES));
        at = le_put64(le_put64(at, known_bytes), known_bytes);
    }
    return at;
}

uint8_t *
zip_put_descriptor(uint8_t *at, const struct zip_put_entry *entry)
{
    if (!entry->has_descriptor) {
        return at;
    }
    at = le_put32(le_put32(at, ZIP_DESCRIPTOR_SIGNATURE), entry->crc);
    if (zip_needs_64(entry->bytes)) {
        return le_put64(le_put64(at, entry->bytes), entry->bytes);
    }
    return le_put32(le_put32(at, (uint32_t)entry->bytes), (uint32_t)entry->bytes);
}

uint8_t *
zip_put_central(uint8_t *at, const struct zip_put_entry *entry)
{
    uint64_t extra_bytes = zip_central_extra_bytes(entry);
    uint16_t version = extra_bytes != 0 ? VERSION_64 : VERSION_PLAIN;

    at = le_put32(at, ZIP_CENTRAL_SIGNATURE);
    at = le_put16(le_put16(at, version), version);
    at = put_flags(at, entry);
    at = le_put32(at, entry->crc);
    at = le_put32(le_put32(at, field_32(entry->bytes)), field_32(entry->bytes));
    at = le_put16(at, (uint16_t)entry->name_len);
    at = le_put16(at, (uint16_t)extra_bytes);
    at = le_put32(le_put16(at, 0), 0); /* comment, disk, internal attributes */
    at = le_put32(at, 0);              /* external attributes */
    at = le_put32(at, field_32(entry->header_offset));
    at = le_put_bytes(at, entry->name, entry->name_len);
    if (extra_bytes != 0) {
        at = le_put16(le_put16(at, ZIP64_EXTRA_ID),
                      (uint16_t)(extra_bytes - ZIP_EXTRA_HEADER_BYTES));
        if (zip_needs_64(entry->bytes)) {
            at = le_put64(le_put64(at, entry->bytes), entry->bytes);
        }
        if (zip_needs_64(entry->header_offset)) {
            at = le_put64(at, entry->header_offset);
        }
    }
    return at;
}

uint8_t *
zip_put_end(uint8_t *at, uint64_t entries_count, uint64_t directory_offset,
            uint64_t directory_bytes, bool with_64)
{
    if (with_64 || zip_end_needs_64(directory_offset, directory_bytes)) {
        at = le_put32(at, ZIP64_END_SIGNATURE);
        at = le_put64(at, ZIP64_END_BYTES - ZIP64_SIZE_FROM_BYTES);
        at = le_put16(le_put16(at, VERSION_64), VERSION_64);
        at = le_put32(le_put32(at, 0), 0); /* disks */
        at = le_put64(le_put64(at, entries_count), entries_count);
        at = le_put64(le_put64(at, directory_bytes), directory_offset);
        at = le_put32(le_put32(at, ZIP64_LOCATOR_SIGNATURE), 0);
        at = le_put64(at, directory_offset + directory_bytes);
        at = le_put32(at, 1); /* disks in total */
    }
    uint16_t count = entries_count >= UINT16_MAX ? UINT16_MAX : (uint16_t)entries_count;
    at = le_put32(le_put32(at, ZIP_END_SIGNATURE), 0);
    at = le_put16(le_put16(at, count), count);
    at = le_put32(at, field_32(directory_bytes));
    at = le_put32(at, field_32(directory_offset));
    return le_put16(at, 0);
}

/*
 * archive_zip.c: headers, descriptors and directory of a torch.save file, where torch puts them.
 *
 * torch.load can calculate where storages lie instead of reading their headers; that works only for
 * files that are laid out as torch's own zip writer does it.  So its ways are kept: CRC and sizes
 * follow the data in a descriptor, of which an entry without bytes has none; a number that needs 64
 * bits goes to an extra field in front of the padding, and lengthens the descriptor too, also when
 * that number is the place of the header; padding is an extra field "FB" that is always there.
 *
 * Threads: no state.
 */
#include "archive_zip.h"

#include "le_bytes.h"
#include "zip_format.h"

enum {
    PAD_ID = 0x4246, /* "FB" */
    PAD_BYTE = 'Z',
    NAME_MOST_BYTES = 4096, /* far below the 16 bits that the format has for it */
};

static uint64_t
name_bytes(const struct dcp_archive_params *params, const struct dcp_archive_entry *entry)
{
    return params->folder.len + 1 + entry->name.len;
}

/* The extra field of what does not fit 32 bits; 0 when everything does. */
static uint64_t
extra_64_bytes(const struct dcp_archive_entry *entry, const struct archive_place *place)
{
    uint64_t body =
        (zip_needs_64(entry->bytes) ? 16 : 0) + (zip_needs_64(place->header_offset) ? 8 : 0);
    return body == 0 ? 0 : ZIP_EXTRA_HEADER_BYTES + body;
}

static uint64_t
descriptor_bytes(const struct dcp_archive_entry *entry, const struct archive_place *place)
{
    return entry->bytes == 0 ? 0 : extra_64_bytes(entry, place) != 0 ? 24 : 16;
}

static uint64_t
unpadded_bytes(const struct dcp_archive_params *params, const struct dcp_archive_entry *entry,
               const struct archive_place *place)
{
    return ZIP_LOCAL_BYTES + name_bytes(params, entry) + extra_64_bytes(entry, place) +
           ZIP_EXTRA_HEADER_BYTES;
}

int
archive_zip_place(const struct dcp_archive_params *params, struct archive_place *places,
                  uint64_t *ret_end_bytes, struct dcp_error *err)
{
    uint64_t align = params->align_bytes, at = 0;
    if (align == 0 || (align & (align - 1)) != 0 || align > ARCHIVE_MOST_ALIGN_BYTES) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "storages cannot be aligned to %llu bytes: it must be a power of two "
                             "up to %u",
                             (unsigned long long)align, ARCHIVE_MOST_ALIGN_BYTES);
    }
    for (uint64_t i = 0; i < params->entries_count; i++) {
        const struct dcp_archive_entry *entry = &params->entries[i];
        struct archive_place *place = &places[i];
        uint64_t end;
        *place = (struct archive_place){.header_offset = at};
        if (name_bytes(params, entry) > NAME_MOST_BYTES) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "a name in a torch.save file may have %d bytes", NAME_MOST_BYTES);
        }
        /* `at` is below DCP_MAX_FILE_BYTES. */
        place->data_offset = dcp_align_up(at + unpadded_bytes(params, entry, place), align);
        if (dcp_add_overflows_u64(place->data_offset, entry->bytes, &end) ||
            end > DCP_MAX_FILE_BYTES) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "the tensors do not fit one file: it may have %llu bytes",
                                 (unsigned long long)DCP_MAX_FILE_BYTES);
        }
        at = end + descriptor_bytes(entry, place);
    }
    *ret_end_bytes = at;
    return 0;
}

static bool
end_needs_64(uint64_t entries_count, uint64_t directory_offset, uint64_t directory_bytes)
{
    return entries_count >= UINT16_MAX || zip_end_needs_64(directory_offset, directory_bytes);
}

uint64_t
archive_zip_tail_bytes(const struct dcp_archive_params *params, const struct archive_place *places,
                       uint64_t directory_offset)
{
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < params->entries_count; i++) {
        const struct dcp_archive_entry *entry = &params->entries[i];
        bytes += ZIP_CENTRAL_BYTES + name_bytes(params, entry) + extra_64_bytes(entry, &places[i]);
    }
    bool with_64 = end_needs_64(params->entries_count, directory_offset, bytes);
    return bytes + ZIP_END_BYTES + (with_64 ? ZIP64_END_BYTES + ZIP64_LOCATOR_BYTES : 0);
}

static void
put_name(struct dcp_buf *buf, const struct dcp_archive_params *params,
         const struct dcp_archive_entry *entry)
{
    dcp_buf_put(buf, params->folder.data, params->folder.len);
    dcp_buf_put_u8(buf, '/');
    dcp_buf_put(buf, entry->name.data, entry->name.len);
}

static void
put_extra_64(struct dcp_buf *buf, const struct dcp_archive_entry *entry,
             const struct archive_place *place)
{
    uint64_t bytes = extra_64_bytes(entry, place);
    if (bytes == 0) {
        return;
    }
    dcp_buf_put_u16(buf, ZIP64_EXTRA_ID);
    dcp_buf_put_u16(buf, (uint16_t)(bytes - ZIP_EXTRA_HEADER_BYTES));
    if (zip_needs_64(entry->bytes)) {
        dcp_buf_put_u64(buf, entry->bytes);
        dcp_buf_put_u64(buf, entry->bytes);
    }
    if (zip_needs_64(place->header_offset)) {
        dcp_buf_put_u64(buf, place->header_offset);
    }
}

static uint32_t
field_32(uint64_t value)
{
    return zip_needs_64(value) ? UINT32_MAX : (uint32_t)value;
}

/* Flags, method, time, date. */
static void
put_flags(struct dcp_buf *buf, const struct dcp_archive_entry *entry)
{
    dcp_buf_put_u16(buf, ZIP_FLAG_UTF8 | (entry->bytes > 0 ? ZIP_FLAG_DESCRIPTOR : 0));
    dcp_buf_put_u16(buf, 0);
    dcp_buf_put_u32(buf, 0);
}

void
archive_zip_put_local(struct dcp_buf *buf, const struct dcp_archive_params *params,
                      const struct dcp_archive_entry *entry, const struct archive_place *place)
{
    uint64_t extra_64 = extra_64_bytes(entry, place);
    uint64_t pad_bytes =
        place->data_offset - place->header_offset - unpadded_bytes(params, entry, place);
    dcp_buf_put_u32(buf, ZIP_LOCAL_SIGNATURE);
    dcp_buf_put_u16(buf, 0);
    put_flags(buf, entry);
    dcp_buf_put_u32(buf, 0); /* CRC and sizes: in the descriptor */
    dcp_buf_put_u64(buf, 0);
    dcp_buf_put_u16(buf, (uint16_t)name_bytes(params, entry));
    dcp_buf_put_u16(buf, (uint16_t)(extra_64 + ZIP_EXTRA_HEADER_BYTES + pad_bytes));
    put_name(buf, params, entry);
    put_extra_64(buf, entry, place);
    dcp_buf_put_u16(buf, PAD_ID);
    dcp_buf_put_u16(buf, (uint16_t)pad_bytes);
    uint8_t *pad = dcp_buf_extend(buf, (size_t)pad_bytes);
    if (pad != NULL) {
        memset(pad, PAD_BYTE, (size_t)pad_bytes);
    }
}

void
archive_zip_put_descriptor(struct dcp_buf *buf, const struct dcp_archive_entry *entry,
                           const struct archive_place *place)
{
    uint64_t bytes = descriptor_bytes(entry, place);
    if (bytes == 0) {
        return;
    }
    dcp_buf_put_u32(buf, ZIP_DESCRIPTOR_SIGNATURE);
    dcp_buf_put_u32(buf, place->crc);
    for (int i = 0; i < 2; i++) {
        if (bytes == 24) {
            dcp_buf_put_u64(buf, entry->bytes);
        } else {
            dcp_buf_put_u32(buf, (uint32_t)entry->bytes);
        }
    }
}

void
archive_zip_put_central(struct dcp_buf *buf, const struct dcp_archive_params *params,
                        const struct dcp_archive_entry *entry, const struct archive_place *place)
{
    dcp_buf_put_u32(buf, ZIP_CENTRAL_SIGNATURE);
    dcp_buf_put_u32(buf, 0); /* versions */
    put_flags(buf, entry);
    dcp_buf_put_u32(buf, place->crc);
    dcp_buf_put_u32(buf, field_32(entry->bytes));
    dcp_buf_put_u32(buf, field_32(entry->bytes));
    dcp_buf_put_u16(buf, (uint16_t)name_bytes(params, entry));
    dcp_buf_put_u16(buf, (uint16_t)extra_64_bytes(entry, place));
    dcp_buf_put_u16(buf, 0); /* comment */
    dcp_buf_put_u32(buf, 0); /* disk, internal attributes */
    dcp_buf_put_u32(buf, 0); /* external attributes */
    dcp_buf_put_u32(buf, field_32(place->header_offset));
    put_name(buf, params, entry);
    put_extra_64(buf, entry, place);
}

void
archive_zip_put_end(struct dcp_buf *buf, uint64_t entries_count, uint64_t directory_offset,
                    uint64_t directory_bytes)
{
    bool with_64 = end_needs_64(entries_count, directory_offset, directory_bytes);
    uint8_t *at =
        dcp_buf_extend(buf, ZIP_END_BYTES + (with_64 ? ZIP64_END_BYTES + ZIP64_LOCATOR_BYTES : 0));
    if (at != NULL) {
        (void)zip_put_end(at, entries_count, directory_offset, directory_bytes, with_64);
    }
}

/*
 * record_object.c: records of objects, and records grown to the size of their slot.
 *
 * A cached plan fixes where every record lies, so an object whose pickle changes length from save
 * to save is given a slot with room to grow.  The room is a stored entry of zeros before the
 * directory: stock torch skips entries that it does not know, but fails on large amounts of bytes
 * behind the end record.
 *
 * Threads: no state.
 */
#include "dcp_record.h"

#include <string.h>

#include "dcp_crc32.h"
#include "le_bytes.h"
#include "zip_format.h"

enum {
    SLOT_FIRST_BYTES = 512,
    SLOT_ALIGN_BYTES = 64,
    /* The most that an empty pad entry adds: both headers with zip64 fields, its name "archive/pad"
     * twice, and zip64 end records where the record had none. */
    PAD_MAX_BYTES = ZIP_LOCAL_BYTES + 20 + ZIP_CENTRAL_BYTES + 28 + 2 * 11 + ZIP64_END_BYTES +
                    ZIP64_LOCATOR_BYTES,
    ARCHIVE_NAME_MAX_BYTES = 255,
    /* End records, a comment, and as much again as torch tolerates behind them. */
    TAIL_MAX_BYTES = 68 << 10,
};

#define PAD_NAME "/pad"
#define VERSION_TEXT "3\n"
#define VERSION_CRC 0x55679ed1u

uint64_t
dcp_record_slot_bytes(uint64_t length_bytes)
{
    DCP_ASSERT(length_bytes <= DCP_MAX_OBJECT_BYTES);
    uint64_t slot = SLOT_FIRST_BYTES;
    while (slot < length_bytes + PAD_MAX_BYTES) {
        slot = dcp_align_up(slot + slot / 4, SLOT_ALIGN_BYTES);
    }
    return slot;
}

int
dcp_record_put_object(struct dcp_buf *buf, const uint8_t *pickle, size_t pickle_len,
                      struct dcp_error *err)
{
    if (pickle_len > DCP_MAX_OBJECT_BYTES) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "writing an object of %zu pickled bytes failed: the limit is %llu; "
                             "save it as tensors",
                             pickle_len, (unsigned long long)DCP_MAX_OBJECT_BYTES);
    }
    struct zip_put_entry entries[2] = {
        {.name = "archive/data.pkl",
         .name_len = 16,
         .bytes = pickle_len,
         .crc = dcp_crc32(0, pickle, pickle_len)},
        {.name = "archive/version",
         .name_len = 15,
         .bytes = sizeof VERSION_TEXT - 1,
         .crc = VERSION_CRC},
    };
    entries[1].header_offset = zip_local_bytes(&entries[0]) + pickle_len;
    uint64_t directory_offset =
        entries[1].header_offset + zip_local_bytes(&entries[1]) + entries[1].bytes;
    uint64_t directory_bytes = zip_central_bytes(&entries[0]) + zip_central_bytes(&entries[1]);
    uint64_t total =
        directory_offset + directory_bytes + zip_end_bytes(directory_offset, directory_bytes);

    uint8_t *start = dcp_buf_extend(buf, total);
    if (start == NULL) {
        return dcp_buf_check(buf, err);
    }
    uint8_t *at = zip_put_local(start, &entries[0]);
    at = le_put_bytes(at, pickle, pickle_len);
    at = zip_put_local(at, &entries[1]);
    at = le_put_bytes(at, VERSION_TEXT, sizeof VERSION_TEXT - 1);
    at = zip_put_central(at, &entries[0]);
    at = zip_put_central(at, &entries[1]);
    at = zip_put_end(at, 2, directory_offset, directory_bytes, false);
    DCP_ASSERT(at == start + total);
    (void)at;
    return 0;
}

/* ---- padding ---- */

struct padding {
    struct zip_end end; /* of the record as it was */
    struct zip_put_entry pad;
    char name[ARCHIVE_NAME_MAX_BYTES + sizeof PAD_NAME];
    uint64_t directory_offset, directory_bytes; /* of the grown record */
    bool with_64;
};

static int
slot_too_small(struct dcp_error *err, uint64_t zip_len, uint64_t slot_bytes)
{
    return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                         "padding a record of %llu bytes to a slot of %llu failed: the slot is too "
                         "small; plan again with a larger one",
                         (unsigned long long)zip_len, (unsigned long long)slot_bytes);
}

/* Walks the whole directory, so that only a well-formed record is written again, and names the pad
 * entry after the archive of the first one. */
static int
read_zip(const uint8_t *zip, size_t zip_len, struct padding *p, bool *ret_any_crc,
         struct dcp_error *err)
{
    size_t tail_len = (size_t)dcp_min_u64(zip_len, TAIL_MAX_BYTES);
    int rc = zip_find_end(zip + zip_len - tail_len, tail_len, zip_len, &p->end, err);
    if (rc != 0) {
        return rc != DCP_E_MISSING ? rc
                                   : dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                                                   "padding a record failed: it has no zip end "
                                                   "record; it is not a torch.save record");
    }
    size_t pos = 0;
    *ret_any_crc = false;
    for (uint64_t i = 0; i < p->end.entries_count; i++) {
        struct zip_entry entry;
        rc = zip_next_entry(zip + p->end.directory_offset, &p->end, &pos, &entry, err);
        if (rc != 0) {
            return rc;
        }
        *ret_any_crc = *ret_any_crc || entry.crc != 0;
        const char *slash = memchr(entry.name, '/', entry.name_len);
        size_t archive_len = slash == NULL ? 0 : (size_t)(slash - entry.name);
        if (archive_len == 0 || archive_len > ARCHIVE_NAME_MAX_BYTES) {
            return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                                 "padding a record failed: an entry lies outside the archive's "
                                 "folder; it is not a torch.save record");
        }
        if (i == 0) {
            memcpy(p->name, entry.name, archive_len);
            memcpy(p->name + archive_len, PAD_NAME, sizeof PAD_NAME);
            p->pad.name_len = (uint32_t)(archive_len + sizeof PAD_NAME - 1);
        }
    }
    p->pad.name = p->name;
    p->pad.header_offset = p->end.directory_offset;
    return 0;
}

/* Bytes of the grown record when the pad entry holds pad.bytes. */
static uint64_t
grown_bytes(struct padding *p)
{
    p->directory_offset = p->end.directory_offset + zip_local_bytes(&p->pad) + p->pad.bytes;
    p->directory_bytes = p->end.directory_bytes + zip_central_bytes(&p->pad);
    p->with_64 = p->end.has_64 || zip_end_needs_64(p->directory_offset, p->directory_bytes);
    return p->directory_offset + p->directory_bytes + ZIP_END_BYTES +
           (p->with_64 ? ZIP64_END_BYTES + ZIP64_LOCATOR_BYTES : 0);
}

/* Chooses pad.bytes.  Growing it may bring in zip64 fields, which shrink it again: three rounds
 * settle that, but for a few sizes just above 4 GiB that have no solution. */
static bool
fit_to_slot(struct padding *p, uint64_t slot_bytes)
{
    p->pad.bytes = 0;
    for (int round = 0; round < 3; round++) {
        uint64_t fixed = grown_bytes(p) - p->pad.bytes;
        if (fixed > slot_bytes) {
            return false;
        }
        p->pad.bytes = slot_bytes - fixed;
    }
    return grown_bytes(p) == slot_bytes;
}

int
dcp_record_put_padded(struct dcp_buf *buf, const uint8_t *zip, size_t zip_len, uint64_t slot_bytes,
                      struct dcp_error *err)
{
    struct padding p = {.pad = {.bytes = 0}};
    bool any_crc = false;
    int rc = read_zip(zip, zip_len, &p, &any_crc, err);
    if (rc != 0) {
        return rc;
    }
    if (slot_bytes == zip_len) {
        dcp_buf_put(buf, zip, zip_len);
        return dcp_buf_check(buf, err);
    }
    if (!fit_to_slot(&p, slot_bytes)) {
        return slot_too_small(err, zip_len, slot_bytes);
    }
    /* The CRC of n zero bytes.  A record without CRCs stays without: readers take all zeros as
     * "switched off". */
    p.pad.crc = any_crc ? ~dcp_crc32_combine(UINT32_MAX, 0, p.pad.bytes) : 0;

    uint8_t *start = dcp_buf_extend(buf, slot_bytes);
    if (start == NULL) {
        return dcp_buf_check(buf, err);
    }
    uint8_t *at = le_put_bytes(start, zip, p.end.directory_offset);
    at = zip_put_local(at, &p.pad);
    memset(at, 0, p.pad.bytes);
    at += p.pad.bytes;
    at = le_put_bytes(at, zip + p.end.directory_offset, p.end.directory_bytes);
    at = zip_put_central(at, &p.pad);
    at = zip_put_end(at, p.end.entries_count + 1, p.directory_offset, p.directory_bytes, p.with_64);
    DCP_ASSERT(at == start + slot_bytes);
    (void)at;
    return 0;
}

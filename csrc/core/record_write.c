/*
 * record_write.c: head and tail of a tensor's record.
 *
 *     [local header data/0][payload][descriptor][data.pkl][version][byteorder][blocks][directory]
 *
 * The payload comes first and its CRC behind it, so that a writer streams bytes once and needs to
 * know nothing before they went by.  torch.load requires data.pkl, version and data/0; byteorder
 * makes the record explicit, and readers that do not know `blocks` skip it.
 *
 * lay_out() alone decides sizes and offsets; counting and writing both start from it, so they
 * cannot disagree.  A tail is written without allocation into room reserved once: 20,000 small
 * records are an ordinary save.
 *
 * Threads: no state.
 */
#include "dcp_record.h"

#include "dcp_crc32.h"
#include "le_bytes.h"
#include "pickle_put.h"
#include "zip_format.h"

enum {
    ENTRY_DATA,
    ENTRY_PICKLE,
    ENTRY_VERSION,
    ENTRY_BYTEORDER,
    ENTRY_BLOCKS,
    ENTRIES_MAX,
};

#define NAME_DATA "archive/data/0"
#define NAME_PICKLE "archive/data.pkl"
#define NAME_VERSION "archive/version"
#define NAME_BYTEORDER "archive/byteorder"
#define NAME_BLOCKS "archive/blocks"
#define NAMED(text) .name = (text), .name_len = sizeof(text) - 1

#define VERSION_TEXT "3\n"
#define VERSION_CRC 0x55679ed1u
#define BYTEORDER_TEXT "little"
#define BYTEORDER_CRC 0x19e33d85u

struct tail {
    struct zip_put_entry entries[ENTRIES_MAX];
    unsigned entries_count;
    uint64_t directory_offset; /* in the record */
    uint64_t directory_bytes;
    uint64_t tail_bytes;
};

static inline struct zip_put_entry
data_entry(uint64_t payload_bytes)
{
    return (struct zip_put_entry){
        NAMED(NAME_DATA),
        .bytes = payload_bytes,
        .has_descriptor = payload_bytes != 0,
    };
}

static inline uint64_t
blocks_entry_bytes(uint64_t payload_bytes)
{
    return payload_bytes <= DCP_BLOCK_BYTES
               ? 0
               : (payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES * 4;
}

static void
lay_out(const struct dcp_tensor_shape *shape, struct tail *ret)
{
    DCP_ASSERT(shape->payload_bytes <= DCP_MAX_PAYLOAD_BYTES);
    struct zip_put_entry *entries = ret->entries;
    uint64_t blocks_bytes = blocks_entry_bytes(shape->payload_bytes);

    entries[ENTRY_DATA] = data_entry(shape->payload_bytes);
    entries[ENTRY_PICKLE] = (struct zip_put_entry){
        NAMED(NAME_PICKLE), .bytes = pickle_tensor_bytes(shape->dtype, shape->ndim, shape->sizes)};
    entries[ENTRY_VERSION] = (struct zip_put_entry){
        NAMED(NAME_VERSION), .bytes = sizeof VERSION_TEXT - 1, .crc = VERSION_CRC};
    entries[ENTRY_BYTEORDER] = (struct zip_put_entry){
        NAMED(NAME_BYTEORDER), .bytes = sizeof BYTEORDER_TEXT - 1, .crc = BYTEORDER_CRC};
    entries[ENTRY_BLOCKS] = (struct zip_put_entry){NAMED(NAME_BLOCKS), .bytes = blocks_bytes};
    ret->entries_count = blocks_bytes != 0 ? ENTRIES_MAX : ENTRY_BLOCKS;

    uint64_t at = 0, tail_start = 0;
    ret->directory_bytes = 0;
    for (unsigned i = 0; i < ret->entries_count; i++) {
        entries[i].header_offset = at;
        at += zip_local_bytes(&entries[i]) + entries[i].bytes;
        if (i == ENTRY_DATA) {
            tail_start = at;
        }
        at += zip_descriptor_bytes(&entries[i]);
        ret->directory_bytes += zip_central_bytes(&entries[i]);
    }
    ret->directory_offset = at;
    at += ret->directory_bytes + zip_end_bytes(at, ret->directory_bytes);
    ret->tail_bytes = at - tail_start;
}

static uint8_t *
put_blocks(uint8_t *at, struct zip_put_entry *entry, const uint32_t *block_crcs)
{
    uint8_t *data = at + zip_local_bytes(entry);
    uint8_t *end = data;
    for (uint64_t i = 0; i < entry->bytes / 4; i++) {
        end = le_put32(end, block_crcs[i]);
    }
    entry->crc = dcp_crc32(0, data, entry->bytes);
    (void)zip_put_local(at, entry);
    return end;
}

uint64_t
dcp_record_head_bytes(uint64_t payload_bytes)
{
    struct zip_put_entry entry = data_entry(payload_bytes);
    return zip_local_bytes(&entry);
}

uint64_t
dcp_record_tail_bytes(const struct dcp_tensor_shape *shape)
{
    struct tail tail;
    lay_out(shape, &tail);
    return tail.tail_bytes;
}

bool
dcp_record_length_tells(uint8_t dtype)
{
    static const uint64_t one = 1;
    struct dcp_tensor_shape shape = {
        .dtype = dtype, .ndim = 1, .sizes = &one, .payload_bytes = dcp_dtype_bytes(dtype)};
    uint64_t tail_bytes = dcp_record_tail_bytes(&shape);
    bool tells = true;
    for (uint8_t other = 1; other < DCP_DTYPE_QINT8; other++) {
        shape.dtype = other;
        tells = tells && (other == dtype || dcp_dtype_bytes(other) != shape.payload_bytes ||
                          dcp_record_tail_bytes(&shape) != tail_bytes);
    }
    return tells;
}

void
dcp_record_put_head(struct dcp_buf *buf, uint64_t payload_bytes)
{
    struct zip_put_entry entry = data_entry(payload_bytes);
    uint8_t *at = dcp_buf_extend(buf, zip_local_bytes(&entry));
    if (at != NULL) {
        (void)zip_put_local(at, &entry);
    }
}

void
dcp_record_put_tail(struct dcp_buf *buf, const struct dcp_tensor_shape *shape, uint32_t payload_crc,
                    const uint32_t *block_crcs)
{
    struct tail tail;
    lay_out(shape, &tail);
    uint8_t *start = dcp_buf_extend(buf, tail.tail_bytes);
    if (start == NULL) {
        return;
    }
    struct zip_put_entry *entries = tail.entries;
    entries[ENTRY_DATA].crc = payload_crc;
    uint8_t *at = zip_put_descriptor(start, &entries[ENTRY_DATA]);

    /* A local header carries the CRC of the data behind it: write the data first. */
    uint8_t *data = at + zip_local_bytes(&entries[ENTRY_PICKLE]);
    uint8_t *data_end = pickle_tensor_write(data, shape->dtype, shape->ndim, shape->sizes);
    DCP_ASSERT((uint64_t)(data_end - data) == entries[ENTRY_PICKLE].bytes);
    entries[ENTRY_PICKLE].crc = dcp_crc32(0, data, entries[ENTRY_PICKLE].bytes);
    (void)zip_put_local(at, &entries[ENTRY_PICKLE]);

    at = zip_put_local(data_end, &entries[ENTRY_VERSION]);
    at = le_put_bytes(at, VERSION_TEXT, sizeof VERSION_TEXT - 1);
    at = zip_put_local(at, &entries[ENTRY_BYTEORDER]);
    at = le_put_bytes(at, BYTEORDER_TEXT, sizeof BYTEORDER_TEXT - 1);
    if (tail.entries_count > ENTRY_BLOCKS) {
        at = put_blocks(at, &entries[ENTRY_BLOCKS], block_crcs);
    }
    for (unsigned i = 0; i < tail.entries_count; i++) {
        at = zip_put_central(at, &entries[i]);
    }
    at = zip_put_end(at, tail.entries_count, tail.directory_offset, tail.directory_bytes, false);
    DCP_ASSERT(at == start + tail.tail_bytes);
    (void)at;
}

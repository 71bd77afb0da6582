/*
 * dcp_record.h: the torch.save zip of one item, written and parsed.
 *
 * We write payload first, so that the CRC is needed only after the bytes went by:
 *     [local header
 * archive/data/0][payload][descriptor][data.pkl][version][byteorder][blocks][directory] `blocks`
 * (payloads over DCP_BLOCK_BYTES) holds the CRC32 of every 1 MiB of the payload.  Sizes of head and
 * tail are pure functions of dtype and sizes.  From 0xFFFFFFFF payload bytes on, zip64 fields are
 * used, in the local header too. Payloads are row major, little endian.
 *
 * Reading takes our records and stock torch's (data.pkl first, strides, storage offsets,
 * Parameters).
 */
#ifndef DCP_RECORD_H
#define DCP_RECORD_H

#include "dcp_alloc.h"
#include "dcp_dtype.h"
#include "dcp_hash.h"
#include "dcp_limits.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dcp_tensor_shape {
    uint8_t dtype; /* enum dcp_dtype, not quantised */
    uint8_t ndim;
    const uint64_t *sizes; /* borrows ndim numbers */
    uint64_t payload_bytes;
};

uint64_t dcp_record_head_bytes(uint64_t payload_bytes);
uint64_t dcp_record_tail_bytes(const struct dcp_tensor_shape *shape);

/* Exactly dcp_record_head_bytes / dcp_record_tail_bytes bytes.  `block_crcs` holds one CRC per
 * started DCP_BLOCK_BYTES; it is read only when payload_bytes > DCP_BLOCK_BYTES. */
void dcp_record_put_head(struct dcp_buf *buf, uint64_t payload_bytes);
void dcp_record_put_tail(struct dcp_buf *buf, const struct dcp_tensor_shape *shape,
                         uint32_t payload_crc, const uint32_t *block_crcs);

/* ---- objects ---- */

/* The smallest slot that holds `length` bytes and its padding; slots grow by a factor of 1.25 from
 * 512 bytes. */
uint64_t dcp_record_slot_bytes(uint64_t length_bytes);
/* A record around a finished pickle (protocol 2) of an object without tensors: data.pkl and
 * version.  Unpadded. */
int dcp_record_put_object(struct dcp_buf *buf, const uint8_t *pickle, size_t pickle_len,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* Appends the record `zip` grown to exactly `slot_bytes` by a stored entry `<archive>/pad` before
 * its directory.  The record must be a well-formed zip (zip64 end records, as torch writes, are
 * understood); DCP_E_LIMIT when the slot is too small. */
int dcp_record_put_padded(struct dcp_buf *buf, const uint8_t *zip, size_t zip_len,
                          uint64_t slot_bytes, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- reading ---- */

/* Gives bytes of a record: sets *ret to `len` bytes at `offset` of it, valid until the next call.
 */
struct dcp_record_input {
    int (*read)(void *ctx, uint64_t offset, size_t len, const uint8_t **ret, struct dcp_error *err);
    void *ctx;
    uint64_t length_bytes; /* of the record */
};

struct dcp_record_view {
    uint8_t dtype;
    uint8_t ndim;
    uint64_t sizes[DCP_MAX_DIMS];
    int64_t strides[DCP_MAX_DIMS]; /* elements, of the stored payload */
    uint64_t storage_offset;       /* elements */
    uint64_t payload_offset_bytes; /* of storage 0 in the record */
    uint64_t payload_bytes;        /* of storage 0, whole */
    uint32_t payload_crc;
    bool has_crc;    /* false: the writer had CRCs switched off */
    bool contiguous; /* row major, storage_offset 0, payload is exactly the tensor */
};

/* Finds the one tensor of a record.  DCP_E_UNSUPPORTED (go through torch.load): several storages,
 * quantised, sparse, subclasses, conj / neg flags.  DCP_E_CORRUPT: damaged, compressed entries
 * (mmap of them reads wrong bytes), big endian. Reads the end of the record, data.pkl and the local
 * header of data/0, and nothing else. */
int dcp_record_parse(const struct dcp_record_input *input, struct dcp_record_view *ret_view,
                     struct dcp_error *err) DCP_MUST_CHECK;

/* Checks the CRC of every entry of a whole record in memory.  DCP_E_CHECKSUM names the entry. */
int dcp_record_verify(const uint8_t *record, size_t len, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- file frame: the 64-byte header before the first record, the block table and the hash table
 * behind the last ---- */

enum { DCP_FILE_HEADER_BYTES = 64, DCP_FILE_VERSION = 1 };

struct dcp_file_header {
    struct dcp_save_id save_id;
    uint32_t rank;
    uint32_t n;            /* of the name __{rank}_{n}.distcp */
    uint64_t length_bytes; /* of the whole file */
    uint64_t table_offset_bytes;
    uint64_t table_bytes;
    /* A flag: a planner of the program's own gave the records.  What the metadata says of one tells
     * nothing of its bytes, and the block table lists ready-made ones too. */
    bool planned_outside;
    /* Of the hash table, which a flag of the header announces: at the end of the block table,
     * rounded up to 8, up to the end of the file.  0 bytes and the end of the file without one. */
    uint64_t hash_offset_bytes;
    uint64_t hash_bytes;
};

void dcp_file_put_header(struct dcp_buf *buf, const struct dcp_file_header *header);
/* DCP_E_CORRUPT on a wrong magic, version or CRC, and on tables longer than the records in front of
 * them can need, so that whoever reads them need not bound them. `bytes` holds
 * DCP_FILE_HEADER_BYTES. */
int dcp_file_parse_header(const uint8_t *bytes, struct dcp_file_header *ret,
                          struct dcp_error *err) DCP_MUST_CHECK;

/* Block table: for every payload over DCP_BLOCK_BYTES, ascending, where it lies, its CRC and its
 * blocks' CRCs; in files of `planned_outside` also for every ready-made record, of any length. */
struct dcp_block_entry {
    uint64_t payload_offset_bytes; /* in the file */
    uint64_t payload_bytes;
    uint32_t payload_crc;
    const uint32_t *block_crcs; /* ceil(payload_bytes / DCP_BLOCK_BYTES) of them; borrows */
};

uint64_t dcp_block_table_bytes(uint32_t entries_count, uint64_t blocks_count);
void dcp_block_table_put(struct dcp_buf *buf, const struct dcp_save_id *save_id,
                         const struct dcp_block_entry *entries, uint32_t entries_count);

/* A parsed table; owns its memory. */
struct dcp_block_table {
    struct dcp_block_entry *entries;
    uint32_t entries_count;
    uint32_t *crcs;
};
int dcp_block_table_parse(const uint8_t *bytes, size_t len, const struct dcp_save_id *save_id,
                          struct dcp_block_table *ret, struct dcp_error *err) DCP_MUST_CHECK;
const struct dcp_block_entry *dcp_block_table_find(const struct dcp_block_table *table,
                                                   uint64_t payload_offset_bytes);
void dcp_block_table_clean_up(struct dcp_block_table *table);

/* Hash table: for every record of the file, ascending, where it lies and the content hash of its
 * payload (row major; of a ready-made record, the whole record).  A later save with `base=` reads
 * it to find out what has not changed. */
struct dcp_hash_entry {
    uint64_t record_offset_bytes; /* in the file; what metadata says */
    uint64_t record_bytes;        /* what metadata says */
    struct dcp_hash128 hash;
};

/* A multiple of 8; 0 for a file without records, which has no table. */
uint64_t dcp_hash_table_bytes(uint32_t entries_count);
void dcp_hash_table_put(struct dcp_buf *buf, const struct dcp_save_id *save_id,
                        const struct dcp_hash_entry *entries, uint32_t entries_count);

/* A parsed table; owns its memory. */
struct dcp_hash_table {
    struct dcp_hash_entry *entries;
    uint32_t entries_count;
};
/* `save_id` is that of the file's header.  DCP_E_CORRUPT when anything is damaged. */
int dcp_hash_table_parse(const uint8_t *bytes, size_t len, const struct dcp_save_id *save_id,
                         struct dcp_hash_table *ret, struct dcp_error *err) DCP_MUST_CHECK;
/* NULL when no record starts there. */
const struct dcp_hash_entry *dcp_hash_table_find(const struct dcp_hash_table *table,
                                                 uint64_t record_offset_bytes);
void dcp_hash_table_clean_up(struct dcp_hash_table *table);

#ifdef __cplusplus
}
#endif
#endif

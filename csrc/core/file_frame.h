/*
 * file_frame.h: what the header and the two tables of a data file (file_frame.c, hash_table.c) have
 * in common: a magic, a version, and a CRC over all their other bytes.
 */
#ifndef FILE_FRAME_H
#define FILE_FRAME_H

#include "dcp_record.h"

enum {
    DCP_FRAME_CRC_OFFSET = 8,
    DCP_FRAME_ALIGN_BYTES = 8, /* of tables: where they start and how long they are */
};

/* Over everything but the four bytes where the CRC itself stands. */
uint32_t dcp_frame_crc(const uint8_t *bytes, size_t len);
/* The entry of a table whose first member, a uint64_t by which the table ascends, is
 * `offset_bytes`; NULL when there is none. */
const void *dcp_frame_find(const void *entries, uint32_t entries_count, size_t entry_bytes,
                           uint64_t offset_bytes);
/* DCP_E_CORRUPT. */
int dcp_frame_damaged(struct dcp_error *err, const char *what);

#endif

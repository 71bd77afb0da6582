/*
 * archive_read.h: private: the records of tensors, read ahead in the order of an archive's entries.
 */
#ifndef ARCHIVE_READ_H
#define ARCHIVE_READ_H

#include "dcp_archive.h"
#include "reader.h"

enum { ARCHIVE_READ_BUFFERS = 3 };

/* How the bytes of an entry come. */
enum archive_way {
    ARCHIVE_UNKNOWN = 0,
    ARCHIVE_MEMORY,  /* they are there, or there are none */
    ARCHIVE_RECORDS, /* in pieces, by archive_read_next */
    ARCHIVE_FETCH,   /* whoever made the entries has them */
};

/* The payload of one record. */
struct archive_payload {
    uint64_t offset_bytes; /* in the file */
    uint64_t bytes;
    uint32_t file; /* index in the metadata */
    uint32_t crc;
    bool has_crc;
};

/* A part of a payload that is read in one go. */
struct archive_piece {
    struct archive_payload payload; /* that it is part of */
    struct dcp_read_file *file;     /* holds a reference */
    uint64_t entry;
    uint64_t from_bytes, len_bytes; /* in the file */
    bool first, last;               /* of the payload */
    uint8_t *memory;                /* where the read begins */
    const uint8_t *bytes;           /* where the piece does */
    bool direct;
    uint64_t job;
    uint32_t slot;
};

struct archive_reader {
    const struct dcp_archive_params *params;
    struct dcp_metadata md;
    struct dcp_read_plan plan; /* of `reader`: nothing but the metadata */
    struct dcp_reader reader;  /* opens files */
    uint8_t *ways;             /* enum archive_way of every entry */

    struct dcp_read_file **files; /* those that are open, by index in the metadata */
    uint64_t *wanted_bytes;       /* of every file */
    uint32_t open_count, next_closed;

    /* what is looked at: the entry, its payloads, how far they are pushed */
    uint64_t ahead;
    struct archive_payload *payloads;
    uint64_t payloads_count, payloads_cap, payload_at, payload_bytes;

    /* what is read: pieces in order, in slots that are used again when all of theirs were taken */
    struct dcp_ring *ring;
    struct dcp_pump pump;
    struct archive_piece pieces[DCP_PUMP_JOBS];
    uint64_t pushed, popped;
    bool taken; /* the first one is lent to the caller */
    struct {
        uint32_t pieces;
        uint64_t used_bytes;
    } slots[ARCHIVE_READ_BUFFERS];
    uint32_t slot;
};

/* Reads the metadata, opens the directory. */
int archive_reader_init(struct archive_reader *self, const struct dcp_archive_params *params,
                        struct dcp_error *err) DCP_MUST_CHECK;
/* Also of one that was not initialised, if it is zero.  The first failure of a read is told. */
int archive_reader_clean_up(struct archive_reader *self, struct dcp_error *err) DCP_MUST_CHECK;
/* Entries are asked for in order. */
int archive_read_way(struct archive_reader *self, uint64_t entry, enum archive_way *ret_way,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* The next piece of `entry`, one of records; valid until the next call. */
int archive_read_next(struct archive_reader *self, uint64_t entry,
                      const struct archive_piece **ret_piece, struct dcp_error *err) DCP_MUST_CHECK;
/* The whole payload of the piece has another CRC than its record says. */
int archive_read_mismatch(const struct archive_reader *self, const struct archive_piece *piece,
                          uint32_t crc, struct dcp_error *err);

#endif

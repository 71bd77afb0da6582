/*
 * record_maker.h: records for tests: ours, and torch.save's layout by a writer of the tests' own,
 * so that the parser is not tested against its counterpart alone.
 */
#ifndef RECORD_MAKER_H
#define RECORD_MAKER_H

#include "dcp_metadata.h"
#include "dcp_record.h"

/* A record in memory, given out in exact heap blocks so that any overread is caught. */
struct record_memory {
    const uint8_t *data;
    size_t len;
    uint8_t *given; /* free() it in the end */
    uint64_t read_bytes;
};

int record_memory_read(void *ctx, uint64_t offset, size_t len, const uint8_t **ret,
                       struct dcp_error *err);

/* dcp_record_parse and dcp_record_verify over exact copies.  Ends the program when a failure comes
 * without a code and a text. */
int record_parse(const uint8_t *data, size_t len, struct dcp_record_view *ret,
                 struct dcp_error *err);
int record_verify(const uint8_t *data, size_t len);

struct dcp_tensor_shape record_shape(int dtype, uint32_t ndim, const uint64_t *sizes);
/* Appends a whole record of ours with a payload made from its offsets, and checks its counted
 * sizes. */
void record_make(struct dcp_buf *buf, const struct dcp_tensor_shape *shape);

struct record_stock_entry {
    const char *name; /* behind "archive/" */
    const void *data;
    size_t len;
    uint32_t crc;         /* set by record_make_stock_zip */
    size_t header_offset; /* likewise */
};

/* Pickle first, FB padding, descriptors, zip64 end records: as torch.save lays it out. */
void record_make_stock_zip(struct dcp_buf *buf, struct record_stock_entry *entries, size_t count,
                           bool with_crc);
/* A (2, 3) float32 tensor in that layout. */
void record_make_stock(struct dcp_buf *buf, bool with_crc, const char *byteorder);

/* Small records to damage: ours, stock, an object, a padded stock one. */
enum { RECORD_SAMPLES = 4, RECORD_SAMPLE_OBJECT = 2 };
void record_make_sample(int which, struct dcp_buf *buf);

bool record_same_geometry(const struct dcp_record_view *a, const struct dcp_record_view *b);

#endif

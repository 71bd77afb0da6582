/*
 * reader.h: private: what the files of the reader share.
 *
 * reader.c walks the items, reader_request.c builds requests, reader_file.c opens files and runs
 * the requests, reader_record.c checks and delivers what was read.  The calling thread builds and
 * delivers in order; the pump's thread reads ahead.
 */
#ifndef DCP_READER_H
#define DCP_READER_H

#include "read_box.h"
#include "ring.h"

/* Below this a file is read through the page cache, where read-ahead serves better than requests of
 * a few pages. */
#define DCP_READ_DIRECT_LEAST_BYTES (4u << 20)
/* Percent of a file in the page cache from which copies beat the device. */
#define DCP_READ_HOT_PERCENT 50
/* A read over this many unwanted bytes costs less than a second request. */
#define DCP_READ_GAP_BYTES (128u << 10)
#define DCP_READ_HOT_GAP_BYTES (8u << 10)
/* Page cache: requests that are still in the cache when they are checked and copied. */
#define DCP_READ_HOT_REQUEST_BYTES (2u << 20)
/* Ranges from here on are read straight into their target. */
#define DCP_READ_STRAIGHT_LEAST_BYTES (256u << 10)
/* Records up to this are read whole: a block and its head and tail. */
#define DCP_READ_WHOLE_RECORD_BYTES (DCP_BLOCK_BYTES + (64u << 10))
/* Payloads up to this are read whole however little of them is wanted. */
#define DCP_READ_WHOLE_PAYLOAD_BYTES (64u << 10)
/* Smallest ring buffer of a reader: the largest whole record, and alignment at both ends. */
#define DCP_READ_LEAST_BUFFER_BYTES (2u << 20)
#define DCP_READ_NAME_BYTES 256

struct dcp_read_file {
    int fd;        /* through the page cache: header, table, windows; -1 when closed */
    int direct_fd; /* O_DIRECT; -1 when the file is read through the page cache */
    bool direct;
    uint32_t users; /* requests in flight, and the walk while it is in this file */
    uint64_t align_bytes, mem_align_bytes; /* 1 without direct I/O */
    uint64_t size_bytes;
    uint32_t index; /* in metadata files */
    char path[DCP_ERROR_PATH_BYTES];
    struct dcp_file_header header; /* zero unless the checkpoint is native */
    bool table_tried;
    struct dcp_block_table table;
};

/* A large payload that several requests bring in. */
struct dcp_read_part {
    const struct dcp_read_item *item;
    struct dcp_read_box box;
    uint64_t payload_offset_bytes; /* in the file */
    uint32_t users;                /* uses in flight, and the walk while it is at this item */
    const uint32_t *block_crcs;    /* borrows from the file's table; NULL when blocks have none */
    bool check_whole;              /* the payload is read whole and has one CRC */
    uint32_t whole_crc, running_crc;
};

enum dcp_read_use_kind {
    DCP_READ_USE_RECORD = 1, /* a whole record */
    DCP_READ_USE_RANGE = 2,  /* a range of a payload */
};

struct dcp_read_use {
    uint8_t kind;  /* enum dcp_read_use_kind */
    bool verified; /* ranges: made of whole blocks, whose CRCs are checked */
    const struct dcp_read_item *item;
    struct dcp_read_part *part; /* ranges */
    uint64_t at_bytes;          /* in the file */
    uint64_t from, to;          /* ranges: in the payload */
    uint64_t len_bytes;
};

struct dcp_read_request {
    bool pushed;
    bool in_place; /* `data` is the target's own memory */
    uint64_t job;  /* number in the pump */
    struct dcp_read_file *file;
    uint8_t *data;                 /* what was read: a ring buffer, the target, or `big` */
    uint64_t from_bytes, to_bytes; /* in the file */
    uint64_t capacity_bytes;       /* of `data`, from from_bytes on */
    void *big;                     /* owned: a record that no ring buffer holds */
    uint64_t big_bytes;
    struct dcp_read_use *uses; /* owned array, reused */
    uint32_t uses_count, uses_cap;
};

struct dcp_reader {
    const struct dcp_io *io;
    int dirfd;
    const char *dir_path;
    const struct dcp_read_plan *plan;
    const struct dcp_engine_options *options;
    dcp_record_fn on_record;
    void *on_record_ctx;
    struct dcp_ring *ring;
    struct dcp_pump pump;
    struct dcp_read_file *file;                      /* where the walk is */
    struct dcp_read_request requests[DCP_PUMP_JOBS]; /* one per ring buffer, used in turn */
    uint32_t open_request;                           /* the one being filled or the next to fill */
    struct dcp_read_stats stats;
};

/* ---- reader_file.c ---- */
/* Opens and checks a file that `wanted_bytes` will be read from. */
int dcp_read_file_open(struct dcp_reader *reader, uint32_t index, uint64_t wanted_bytes,
                       struct dcp_read_file **ret_file, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_read_file_release(struct dcp_reader *reader, struct dcp_read_file *file);
/* The payload's entry in the file's block table; NULL when it has none. */
int dcp_read_file_blocks(struct dcp_reader *reader, struct dcp_read_file *file,
                         uint64_t payload_offset_bytes, uint64_t payload_bytes,
                         const struct dcp_block_entry **ret_entry,
                         struct dcp_error *err) DCP_MUST_CHECK;
/* Parses a record by reading only the parts of it that are needed. */
int dcp_read_file_parse(struct dcp_reader *reader, struct dcp_read_file *file,
                        const struct dcp_md_chunk *chunk, struct dcp_record_view *ret_view,
                        struct dcp_error *err) DCP_MUST_CHECK;
/* The pump's function; ctx is the reader. */
int dcp_read_file_job(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err);
int dcp_read_check_cancel(const struct dcp_reader *reader, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- reader_request.c ---- */
/* The request that is being filled, or the next to fill. */
static inline struct dcp_read_request *
dcp_read_current(struct dcp_reader *reader)
{
    return &reader->requests[reader->open_request];
}

/* Unwanted bytes that one request may read over, in the current file. */
uint64_t dcp_read_gap_bytes(const struct dcp_reader *reader);
/* Starts a new request of the current file at `from_bytes`, its memory a ring buffer. */
int dcp_read_request_begin(struct dcp_reader *reader, uint64_t from_bytes,
                           struct dcp_error *err) DCP_MUST_CHECK;
int dcp_read_request_append(struct dcp_reader *reader, const struct dcp_read_use *use,
                            struct dcp_error *err) DCP_MUST_CHECK;
/* Whether the open request can take bytes [at, at + len) as well. */
bool dcp_read_request_takes(struct dcp_reader *reader, uint64_t at_bytes, uint64_t len_bytes);
/* Gives the request that is being filled to the reading thread. */
void dcp_read_request_push(struct dcp_reader *reader);
/* Forgets what it holds; also of a load that failed. */
void dcp_read_request_clear(struct dcp_reader *reader, struct dcp_read_request *request);
/* Reads a use through the ring, sharing a request with its neighbours. */
int dcp_read_through_ring(struct dcp_reader *reader, const struct dcp_read_use *use,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* A record that no ring buffer holds: alone, in memory of its own. */
int dcp_read_big(struct dcp_reader *reader, const struct dcp_read_use *use,
                 struct dcp_error *err) DCP_MUST_CHECK;
/* Waits for all that was pushed and delivers it. */
int dcp_read_settle_all(struct dcp_reader *reader, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- reader_record.c ---- */
/* Checks and delivers one use of a request that has been read; `bytes` are the use's own. */
int dcp_read_deliver(struct dcp_reader *reader, const struct dcp_read_request *request,
                     const struct dcp_read_use *use, const uint8_t *bytes,
                     struct dcp_error *err) DCP_MUST_CHECK;
void dcp_read_part_release(struct dcp_read_part *part);
/* Sets an error that names tensor and file. */
int dcp_read_fail(const struct dcp_reader *reader, const struct dcp_read_file *file,
                  const struct dcp_read_item *item, int code, uint64_t offset_bytes,
                  const char *what, struct dcp_error *err);

static inline const struct dcp_md_entry *
dcp_read_entry(const struct dcp_reader *reader, const struct dcp_read_item *item)
{
    return &reader->plan->md->entries[reader->plan->targets[item->target].entry];
}

#endif

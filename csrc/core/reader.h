/*
 * reader.h: private: what the files of the reader share.
 *
 * reader.c walks the items, reader_request.c builds requests, reader_pool.c has the threads that
 * read ahead, reader_file.c opens files and reads from them, reader_record.c checks and delivers
 * what was read, reader_device.c has devices read.  The calling thread builds and delivers in
 * order.
 */
#ifndef DCP_READER_H
#define DCP_READER_H

#include "data_file.h"
#include "read_box.h"
#include "ring.h"

/* A read over this many unwanted bytes costs less than another request: disks of 30,000 requests
 * a second, eight at a time, and of 1.7 GB/s break even between 16 and 64 KiB. */
#define DCP_READ_GAP_BYTES (16u << 10)
#define DCP_READ_HOT_GAP_BYTES (8u << 10)
/* Mapping this many unwanted bytes costs less than another mapping; nothing reads them. */
#define DCP_READ_MAP_GAP_BYTES (256u << 10)
/* Ranges from here on are read straight into their target. */
#define DCP_READ_STRAIGHT_LEAST_BYTES (256u << 10)
/* Records up to this are read whole: a block and its head and tail. */
#define DCP_READ_WHOLE_RECORD_BYTES (DCP_BLOCK_BYTES + (64u << 10))
/* Payloads up to this are read whole however little of them is wanted. */
#define DCP_READ_WHOLE_PAYLOAD_BYTES (64u << 10)
/* Smallest ring buffer of a reader: the largest whole record, and alignment at both ends. */
#define DCP_READ_LEAST_BUFFER_BYTES (2u << 20)

/* Reads in flight at most: small ranges need depth, large ones need two. */
enum { DCP_READ_THREADS = 8 };

/* How the bulk of a file is read. */
enum dcp_read_mode {
    DCP_READ_BUFFERED = 1, /* through the page cache, ahead, by threads */
    DCP_READ_DIRECT = 2,   /* O_DIRECT, ahead, by threads */
    DCP_READ_HOT = 3,      /* it lies in the page cache: by the calling thread, piece by piece */
    DCP_READ_MAPPED = 4,   /* the same, lent by the page cache instead of read */
};

struct dcp_read_file {
    int fd;        /* through the page cache: header, table, windows; -1 when closed */
    int direct_fd; /* O_DIRECT; -1 when the file is read through the page cache */
    enum dcp_read_mode mode;
    bool hot;       /* lay in the page cache, or in memory, when it was opened */
    bool refused;   /* no device reads from it by itself */
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
    uint64_t data_bytes; /* where it lies in the request's data */
};

/* One run of a file, read in one go. */
struct dcp_read_span {
    uint64_t from_bytes, to_bytes; /* in the file */
    uint64_t data_bytes;           /* where from_bytes goes in the request's data */
};

struct dcp_read_request {
    bool pushed;
    bool in_place; /* `data` is the target's own memory */
    struct dcp_read_file *file;
    uint8_t *data; /* what is read: a ring buffer, the target, or `big`; NULL: mapped */
    uint64_t capacity_bytes;
    void *big; /* owned: a record that no ring buffer holds */
    uint64_t big_bytes;
    struct dcp_read_span *spans; /* owned array, reused; rising in the file and in data */
    uint32_t spans_count, spans_cap;
    struct dcp_read_use *uses; /* owned array, reused */
    uint32_t uses_count, uses_cap;
    uint64_t used_bytes;              /* of the file, that uses asked for */
    uint32_t spans_taken, spans_done; /* guarded by the pool's lock */
};

struct dcp_read_pool {
    bool on; /* init was called */
    pthread_t threads[DCP_READ_THREADS];
    uint32_t threads_count; /* of the calling thread alone */
    pthread_mutex_t lock;   /* guards all below */
    pthread_cond_t pushed_cond, done_cond;
    struct dcp_read_request *queue[DCP_RING_MOST_BUFFERS]; /* with spans to take, in order */
    uint32_t queue_first, queue_count;
    uint32_t open_spans; /* pushed and not done */
    bool closing;
    int code; /* of the first failure; 0 */
    struct dcp_error error;
};

struct dcp_reader {
    const struct dcp_io *io;
    int dirfd;
    const char *dir_path;
    const struct dcp_read_plan *plan;
    const struct dcp_engine_options *options;
    dcp_record_fn on_record;
    void *on_record_ctx;
    uint32_t buffers_count; /* of the ring */
    uint64_t buffer_bytes;
    struct dcp_ring *ring; /* NULL until something has to be read into it */
    bool ahead;            /* enough to read for threads to be worth it */
    bool streaming;        /* what is loaded pushes everything out of the cache anyway */
    struct dcp_read_pool pool;
    struct dcp_read_file *file;                              /* where the walk is */
    struct dcp_read_request requests[DCP_RING_MOST_BUFFERS]; /* one per ring buffer, in turn */
    uint32_t open_request; /* the one being filled or the next to fill */
    struct dcp_read_stats stats;
};

/* ---- reader.c ---- */
void dcp_read_stats_add(struct dcp_read_stats *sum, const struct dcp_read_stats *more);

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
/* Reads a span into `data`; from any thread. */
int dcp_read_file_span(const struct dcp_reader *reader, const struct dcp_read_file *file,
                       const struct dcp_read_span *span, uint8_t *data,
                       struct dcp_error *err) DCP_MUST_CHECK;
int dcp_read_check_cancel(const struct dcp_reader *reader, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- reader_pool.c ---- */
int dcp_read_pool_init(struct dcp_read_pool *pool, struct dcp_error *err) DCP_MUST_CHECK;
/* Reads the request's spans: by threads, or at once by the caller when `ahead` is false or there
 * are no threads to be had. */
void dcp_read_pool_push(struct dcp_reader *reader, struct dcp_read_request *request, bool ahead);
/* Waits for a pushed request.  0, or the code of the first failure of any so far. */
int dcp_read_pool_wait(struct dcp_read_pool *pool, struct dcp_read_request *request) DCP_MUST_CHECK;
/* Waits for reads in flight, drops the others, joins the threads, hands over the first failure. */
int dcp_read_pool_clean_up(struct dcp_read_pool *pool, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- reader_request.c ---- */
/* The request that is being filled, or the next to fill. */
static inline struct dcp_read_request *
dcp_read_current(struct dcp_reader *reader)
{
    return &reader->requests[reader->open_request];
}

/* Unwanted bytes that a read may go over, in the current file. */
uint64_t dcp_read_gap_bytes(const struct dcp_reader *reader);
/* The most that one request of the current file holds. */
uint64_t dcp_read_request_bytes(const struct dcp_reader *reader);
/* Reads `use` alone, straight into `target`. */
int dcp_read_in_place(struct dcp_reader *reader, const struct dcp_read_use *use, uint8_t *target,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* Bytes from `at_bytes` on that the open request can take; 0: it cannot. */
uint64_t dcp_read_request_room(struct dcp_reader *reader, uint64_t at_bytes);
/* Counts what was read of the file. */
void dcp_read_count(struct dcp_reader *reader, const struct dcp_read_file *file, uint64_t bytes,
                    uint32_t requests);
/* Has the request that is being filled read; a mapped one is delivered at once. */
int dcp_read_request_push(struct dcp_reader *reader, struct dcp_error *err) DCP_MUST_CHECK;
/* Forgets what it holds; also of a load that failed. */
void dcp_read_request_clear(struct dcp_reader *reader, struct dcp_read_request *request);
/* Reads a use through the ring, sharing a request with its neighbours. */
int dcp_read_through_ring(struct dcp_reader *reader, const struct dcp_read_use *use,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* A record that no ring buffer holds: lent by the page cache, else alone in memory of its own. */
int dcp_read_big(struct dcp_reader *reader, const struct dcp_read_use *use,
                 struct dcp_error *err) DCP_MUST_CHECK;
/* Waits for all that was pushed and delivers it. */
int dcp_read_settle_all(struct dcp_reader *reader, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- reader_record.c ---- */
/* Checks and delivers one use that has been read from `file` to `bytes`. */
int dcp_read_deliver(struct dcp_reader *reader, const struct dcp_read_file *file,
                     const struct dcp_read_use *use, const uint8_t *bytes, bool in_place,
                     struct dcp_error *err) DCP_MUST_CHECK;
void dcp_read_part_release(struct dcp_read_part *part);
/* Counts bytes of targets that are in place. */
void dcp_read_count_done(struct dcp_reader *reader, uint64_t wanted, bool verified);
/* The error of a block, at `from` of the payload, that is not what was saved. */
int dcp_read_fail_block(const struct dcp_reader *reader, const struct dcp_read_file *file,
                        const struct dcp_read_part *part, uint64_t from, struct dcp_error *err);
/* Sets an error that names tensor and file. */
int dcp_read_fail(const struct dcp_reader *reader, const struct dcp_read_file *file,
                  const struct dcp_read_item *item, int code, uint64_t offset_bytes,
                  const char *what, struct dcp_error *err);

/* Whether a tensor's record can be known by its length: it is ours, and of the dtype that the
 * metadata names, or none of another one is as long. */
static inline bool
dcp_read_length_tells(const struct dcp_reader *reader, const struct dcp_read_file *file,
                      uint8_t dtype)
{
    return reader->plan->md->is_native &&
           (!file->header.planned_outside || dcp_record_length_tells(dtype));
}

/* ---- reader_device.c ---- */
/* Has a device read a payload of the current file into its memory, up to *ret_to, a block's
 * border; 0 when none does. */
int dcp_read_to_device(struct dcp_reader *reader, const struct dcp_read_part *part,
                       uint64_t *ret_to, struct dcp_error *err) DCP_MUST_CHECK;

static inline const struct dcp_md_entry *
dcp_read_entry(const struct dcp_reader *reader, const struct dcp_read_item *item)
{
    return &reader->plan->md->entries[reader->plan->targets[item->target].entry];
}

#endif

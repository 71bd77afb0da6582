/*
 * writer.h: private: what the files of the writer share.
 *
 * writer.c walks the layout, writer_stream.c turns one file's bytes into jobs or puts them into an
 * image (image.c), writer_image.c makes jobs of a ready image.  writer_run.c takes one file after
 * another and has the threads, writer_file.c opens files and runs the jobs, writer_queue.c has the
 * requests that are in flight without a thread.
 * Payloads on devices come by themselves: in an image they are where they belong once they have
 * landed (device_stage.c), for files they are read off a stream (device_stream.c).
 * The calling thread fills buffers.  Requests run on the pump's thread, or in the queue, or, where
 * neither pays, inside of the push; with several files a second pump syncs and closes them beside
 * the writing of the next.  A struct dcp_write_file belongs to the caller until its last job is
 * pushed, then to whoever runs that job, which hands it to the closer, which frees it.
 */
#ifndef DCP_WRITER_H
#define DCP_WRITER_H

#include "dcp_image.h"
#include "device.h"
#include "rate.h"
#include "ring.h"

enum { DCP_WRITE_NAME_BYTES = 64 };

/* Files below this are written through the page cache: two system calls less, and the last block
 * needs no padding.  Device bytes per second do not matter at this size. */
#define DCP_WRITE_DIRECT_LEAST_BYTES (64u << 10)
/* Without direct I/O a piece goes to the kernel while it is still in the cache from its
 * checksum. */
#define DCP_WRITE_PIECE_BYTES (512u << 10)

enum dcp_write_job { DCP_WRITE_JOB_WRITE = 1, DCP_WRITE_JOB_CLOSE = 2 };

struct dcp_write_file {
    int fd; /* -1 when closed */
    char name[DCP_WRITE_NAME_BYTES];
    uint32_t index;        /* of the save's files */
    uint64_t length_bytes; /* of the finished file */
    uint64_t align_bytes;  /* of offsets and lengths; 1 without direct I/O */
    bool in_memory;        /* tmpfs: nothing is ever dirty */
    bool direct;           /* O_DIRECT is set; only the writing thread clears it */
    /* of the writing thread */
    uint64_t end_bytes;      /* behind the last byte written, padding included */
    uint64_t flushing_bytes; /* [flushing, pushed) is on its way out, [pushed, end) is dirty */
    uint64_t pushed_bytes;
    int flush_errno; /* of a flush that the closer reports */
    /* of the calling thread, with a queue */
    uint32_t in_flight; /* requests of it that have not ended */
    bool closing;       /* its last request closes it */
    bool given_up;      /* ... without calling it finished */
};

/* A request in the queue. */
struct dcp_write_flight {
    enum { DCP_FLIGHT_NONE, DCP_FLIGHT_FLYING, DCP_FLIGHT_ENDED } state; /* ENDED: not as wanted */
    struct dcp_write_file *file;
    const uint8_t *data;
    uint64_t offset_bytes, len_bytes;
    uint64_t traced_ns; /* when it began, for the trace; 0: not traced */
    ssize_t result;     /* once ENDED */
};

struct dcp_write_queue {
    struct dcp_io_queue *queue;                             /* NULL: requests go another way */
    struct dcp_write_flight flights[DCP_RING_MOST_BUFFERS]; /* by the job's slot */
    uint32_t flying_count, ended_count;
    bool given_up; /* it is not there, or did what pwrite had to mend: not used again */
    bool failed;   /* what is in flight is only waited for */
    bool lost;     /* ... and was waited for in vain: memory and queue are never freed */
    uint64_t wait_ns;
};

struct dcp_writer;

/* Where the files of a writer and their bytes come from. */
struct dcp_write_content {
    /* The number in the name of file `index`, and its length. */
    void (*describe)(const struct dcp_writer *writer, uint32_t index, uint64_t *ret_n,
                     uint64_t *ret_length_bytes);
    /* Pushes all bytes of file `index`, which is open as writer->file. */
    int (*write)(struct dcp_writer *writer, uint32_t index, struct dcp_error *err);
};

struct dcp_writer {
    const struct dcp_io *io;
    int dirfd;
    const char *dir_path;
    const struct dcp_engine_options *options;
    struct dcp_write_content content;
    uint32_t rank;         /* of the names */
    const char *file_name; /* of the only file, where it is no data file; else NULL */
    uint32_t files_count;
    uint64_t total_bytes;   /* of all files */
    uint64_t request_bytes; /* the longest */
    uint64_t padded_bytes;  /* there is memory for the last request up to this multiple */
    uint32_t slots_count;   /* requests that may be in flight */

    /* the walk: what is written, from tensors */
    const struct dcp_plan *plan;
    const struct dcp_layout *layout;
    const struct dcp_source *sources;
    const struct dcp_save_id *save_id;
    uint64_t n0;
    uint32_t *crcs; /* per layout record; may be NULL */
    struct dcp_buf scratch;
    struct dcp_ring *ring;
    struct dcp_device_stage *stage;   /* of an image: what devices bring; NULL: nothing */
    uint32_t next_record;             /* ... the first that the walk has not brought there */
    uint64_t unlooked_bytes;          /* ... of the walk, since it looked at the devices */
    bool brought;                     /* ... all payloads are in the image, unchecked as they are */
    struct dcp_device_stream *stream; /* of files: the same */

    /* ... or from an image; NULL: it is not */
    const struct dcp_image *image;
    const uint8_t *image_memory;
    uint64_t image_written_bytes; /* of its files, padding left out */

    struct dcp_pump pump;
    struct dcp_pump closer;  /* pushed to by the thread that runs the pump's jobs */
    uint64_t unsynced_bytes; /* of that thread: in the page cache, handed to the closer */
    struct dcp_write_queue queue;
    struct dcp_rate rate;               /* of that thread too */
    _Atomic uint64_t priority_failures; /* of any thread */
    /* write and limited time: of the writing thread; direct_files, sync time: of the closing one */
    struct dcp_write_stats stats;
    struct dcp_write_file *ahead[DCP_AHEAD_FILES]; /* the first ones, not begun; or NULL */

    /* the stream: where the next byte goes */
    struct dcp_write_file *file;
    bool in_place;                  /* no direct I/O: large payloads are written from the source */
    bool to_image;                  /* `buffer` is all of the file: nothing is pushed */
    uint64_t position_bytes;        /* in the file */
    uint8_t *buffer;                /* being filled: of the ring, or the file in an image */
    uint64_t filled_bytes;          /* of it */
    uint64_t filling_ns;            /* since when, for the trace; 0: not traced */
    uint64_t limit_bytes;           /* of it: the buffer is pushed when that much is in it */
    uint64_t streaming_least_bytes; /* payloads from here on bypass the cache */
    uint32_t buffer_index;
    uint64_t buffer_jobs[DCP_PUMP_JOBS]; /* 1 + number of the last job that used each buffer */
};

/* ---- writer.c ---- */
/* Header, records and tables of one file, to the stream that is open. */
int dcp_write_walk_file(struct dcp_writer *writer, const struct dcp_placed_file *placed,
                        struct dcp_error *err) DCP_MUST_CHECK;

/* With a stage, after `n` more bytes of the walk: has the devices go on, now and then, and once
 * they are through brings the other payloads; not while one is read from the host. */
int dcp_write_look_at_devices(struct dcp_writer *writer, uint64_t n, bool reads_source,
                              struct dcp_error *err) DCP_MUST_CHECK;
/* After the last file: waits for the devices, whatever the layout has on them. */
int dcp_write_end_bringing(struct dcp_writer *writer, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- writer_run.c ---- */
/* Writes all files: opens, has their content pushed, closes; waits for everything, frees the
 * threads.  The first failure is told. */
int dcp_write_run(struct dcp_writer *writer, struct dcp_error *err) DCP_MUST_CHECK;
/* A request for writer->file.  `slot` is free in the queue. */
int dcp_write_push(struct dcp_writer *writer, const uint8_t *data, uint64_t offset, uint64_t len,
                   uint32_t slot, uint64_t *ret_number, struct dcp_error *err) DCP_MUST_CHECK;
/* DCP_E_LIMIT when a number of `files_count` from n0 on does not fit a file header. */
int dcp_write_check_numbers(uint64_t n0, uint32_t files_count,
                            struct dcp_error *err) DCP_MUST_CHECK;

/* ---- writer_file.c ---- */
int dcp_write_file_open(struct dcp_writer *writer, uint64_t n, uint64_t length_bytes,
                        struct dcp_write_file **ret_file, struct dcp_error *err) DCP_MUST_CHECK;
/* Counts bytes of a file that are written, which is the progress of an image. */
void dcp_write_count(struct dcp_writer *writer, const struct dcp_write_file *file, uint64_t offset,
                     uint64_t len);
/* The pump's function; ctx is the writer. */
int dcp_write_file_job(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err);
/* Writes all of it through pwrite, whatever single calls do. */
int dcp_write_range(const struct dcp_writer *writer, struct dcp_write_file *file,
                    const uint8_t *data, uint64_t offset, uint64_t len,
                    struct dcp_error *err) DCP_MUST_CHECK;
/* A write that failed for good. */
int dcp_write_failed(const struct dcp_writer *writer, const struct dcp_write_file *file,
                     int sys_errno, uint64_t offset_bytes, struct dcp_error *err);
/* After the last request of a closing file: hands it to the closer, which frees it. */
int dcp_write_file_end(struct dcp_writer *writer, struct dcp_write_file *file) DCP_MUST_CHECK;
/* The closer's function; ctx is the writer. */
int dcp_write_close_job(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err);
/* Gives the calling thread, one of the engine, the priority that the options ask for. */
void dcp_write_thread_priority(void *ctx);
/* DCP_E_CANCELLED when the caller asked to stop. */
int dcp_write_check_cancel(const struct dcp_writer *writer, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- writer_queue.c: all on the calling thread ---- */
/* Gets requests away from the calling thread: by the queue where it may be, else by the pump's
 * thread. */
int dcp_write_queue_start(struct dcp_writer *writer, struct dcp_error *err) DCP_MUST_CHECK;
/* The job's slot is not in flight. */
int dcp_write_queue_push(struct dcp_writer *writer, const struct dcp_job *job,
                         struct dcp_error *err) DCP_MUST_CHECK;
/* Waits until `slot` is not in flight. */
int dcp_write_queue_wait(struct dcp_writer *writer, uint32_t slot,
                         struct dcp_error *err) DCP_MUST_CHECK;
/* Waits for all that is in flight and ends the files that waited for it. */
int dcp_write_queue_drain(struct dcp_writer *writer, struct dcp_error *err) DCP_MUST_CHECK;
/* Waits for all that is in flight, ends the files that waited for it, closes the queue.  `failed`:
 * nothing is mended any more. */
int dcp_write_queue_finish(struct dcp_writer *writer, bool failed,
                           struct dcp_error *err) DCP_MUST_CHECK;

/* ---- writer_stream.c ---- */
/* The bytes go to writer->file. */
void dcp_write_stream_open(struct dcp_writer *writer);
/* The bytes go to `memory`, where the file of `length_bytes` lies. */
void dcp_write_stream_open_image(struct dcp_writer *writer, uint8_t *memory, uint64_t length_bytes);
int dcp_write_stream_bytes(struct dcp_writer *writer, const uint8_t *data, uint64_t len,
                           struct dcp_error *err) DCP_MUST_CHECK;
int dcp_write_stream_zeros_to(struct dcp_writer *writer, uint64_t position_bytes,
                              struct dcp_error *err) DCP_MUST_CHECK;

struct dcp_write_payload {
    const struct dcp_source *source;
    uint32_t ndim, item_bytes;
    const uint64_t *sizes;
    uint64_t len_bytes;
    bool landed;                   /* it is in the image, or comes by itself; no source */
    const uint32_t *device_crcs;   /* of the blocks, where a device has computed them, or NULL */
    uint32_t *block_crcs;          /* out, one per started block; NULL when none are kept */
    uint32_t crc;                  /* out, of the whole */
    struct dcp_content_hash *hash; /* gets the bytes added; may be NULL */
};

int dcp_write_stream_payload(struct dcp_writer *writer, struct dcp_write_payload *payload,
                             struct dcp_error *err) DCP_MUST_CHECK;
/* Pushes what is left, padded where direct I/O wants it. */
int dcp_write_stream_flush(struct dcp_writer *writer, struct dcp_error *err) DCP_MUST_CHECK;

#endif

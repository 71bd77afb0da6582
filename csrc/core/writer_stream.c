/*
 * writer_stream.c: one file's bytes, in order, turned into write requests or put into an image.
 *
 * Bytes of payloads on devices are at hand when they are asked for: in the image itself, or in a
 * segment of pinned memory that stands for the source.
 *
 * There are two sinks.  An image has room for the whole file: bytes are put where they belong and
 * nothing is pushed.  Otherwise they become requests.
 *
 * With direct I/O all bytes pass through the ring: payloads by one fused copy and CRC, so the
 * source is read once.  Without it large payloads are checksummed in place and handed to the kernel
 * from the source, which saves the copy; only small things are packed.
 *
 * Invariants: at most limit_bytes are in the buffer, of an image as many as its file has; with
 * direct I/O only full buffers are pushed before the end, so every request is aligned.  A buffer is
 * refilled only after its job has run. Threads: all of it on the calling thread.
 */
#include "writer.h"

#include <string.h>

#include "box.h"
#include "dcp_crc32.h"
#include "dcp_trace.h"
#include "source_pages.h"

/* Strided sources whose dense runs are at least this long are gathered in pieces that stay in the
 * cache for the CRC; shorter runs (transposes) waste less of each line when many rows are gathered
 * at once. */
#define DENSE_RUN_BYTES 64
#define GATHER_PIECE_BYTES (256u << 10)
/* Without direct I/O smaller payloads are packed: a system call costs as much as copying this. */
#define IN_PLACE_LEAST_BYTES (32u << 10)
/* From here on the destination is larger than what the cache should give up for it. */
#define STREAMING_LEAST_BYTES (1u << 20)
/* An image is far larger than the cache, whatever its payloads are: stores bypass it from the first
 * length that crc32_fold.h does by pages side by side. */
#define IMAGE_STREAMING_LEAST_BYTES (16u << 10)

/* Pieces that are hashed right after their CRC, while the cache still has them. */
#define HASH_PIECE_BYTES (256u << 10)

/* A running CRC that is cut into blocks, and the content hash that goes along. */
struct block_crc {
    uint32_t whole, block;
    uint64_t done_bytes;
    uint32_t *blocks;              /* NULL: one block of any size */
    struct dcp_content_hash *hash; /* NULL: none */
};

/* How many of `n` bytes the next step takes: none behind the current block. */
static uint64_t
block_room(const struct block_crc *crc, uint64_t n)
{
    n = crc->hash == NULL ? n : dcp_min_u64(n, HASH_PIECE_BYTES);
    if (crc->blocks == NULL) {
        return n;
    }
    return dcp_min_u64(n, DCP_BLOCK_BYTES - crc->done_bytes % DCP_BLOCK_BYTES);
}

/* After the CRC of `n` bytes at `data`: hashes them, and ends the current block when it is full or
 * the payload is at its end. */
static void
block_add(struct block_crc *crc, const uint8_t *data, uint64_t n, bool last)
{
    if (crc->hash != NULL) {
        dcp_content_hash_add(crc->hash, data, n);
    }
    crc->done_bytes += n;
    if (crc->blocks == NULL) {
        crc->whole = crc->block;
        return;
    }
    uint64_t in_block = (crc->done_bytes - 1) % DCP_BLOCK_BYTES + 1;
    if (n > 0 && (last || in_block == DCP_BLOCK_BYTES)) {
        crc->blocks[(crc->done_bytes - 1) / DCP_BLOCK_BYTES] = crc->block;
        crc->whole = dcp_crc32_combine(crc->whole, crc->block, in_block);
        crc->block = 0;
    }
}

/* Pushes the buffer as it is. */
static int
push_buffer(struct dcp_writer *writer, uint64_t len, struct dcp_error *err)
{
    uint64_t number;
    dcp_trace_end(writer->filling_ns, "cpu", "copy and checksum", writer->filled_bytes);
    int rc = dcp_write_push(writer, writer->buffer, writer->position_bytes - writer->filled_bytes,
                            len, writer->buffer_index, &number, err);
    if (rc != 0) {
        return rc;
    }
    writer->buffer_jobs[writer->buffer_index] = number + 1;
    writer->buffer_index = (writer->buffer_index + 1) % writer->ring->buffers_count;
    writer->buffer = NULL;
    writer->filled_bytes = 0;
    return 0;
}

/* No more at a time than a buffer of the ring has: steps that small are looked at by `cancel`, and
 * what was gathered is in the cache when its CRC is taken. */
static int
image_room(const struct dcp_writer *writer, uint8_t **ret_at, uint64_t *ret_room,
           struct dcp_error *err)
{
    uint64_t left = writer->limit_bytes - writer->filled_bytes;
    *ret_at = writer->buffer + writer->filled_bytes;
    *ret_room = dcp_min_u64(left, DCP_RING_BUFFER_BYTES);
    if (left == 0) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                             "a file has more than the %llu bytes that the layout says",
                             (unsigned long long)writer->limit_bytes);
    }
    return dcp_write_check_cancel(writer, err);
}

/* Where the next bytes go and how many fit; waits for a free buffer. */
static int
stream_room(struct dcp_writer *writer, uint8_t **ret_at, uint64_t *ret_room, struct dcp_error *err)
{
    if (writer->to_image) {
        return image_room(writer, ret_at, ret_room, err);
    }
    if (writer->filled_bytes >= writer->limit_bytes) {
        int rc = push_buffer(writer, writer->filled_bytes, err);
        if (rc != 0) {
            return rc;
        }
    }
    if (writer->buffer == NULL) {
        uint64_t job = writer->buffer_jobs[writer->buffer_index];
        uint64_t waiting = dcp_trace_begin();
        /* The pump keeps the error; it is fetched when the pump is cleaned up. */
        int rc = job != 0 ? dcp_pump_wait(&writer->pump, job - 1) : 0;
        rc = rc == 0 ? dcp_write_queue_wait(writer, writer->buffer_index, err) : rc;
        if (rc != 0) {
            return rc;
        }
        dcp_trace_end(waiting, "wait", "wait for a buffer", 0);
        writer->filling_ns = dcp_trace_begin();
        writer->buffer = dcp_ring_buffer(writer->ring, writer->buffer_index);
    }
    *ret_at = writer->buffer + writer->filled_bytes;
    *ret_room = writer->limit_bytes - writer->filled_bytes;
    return 0;
}

static void
stream_took(struct dcp_writer *writer, uint64_t n)
{
    writer->filled_bytes += n;
    writer->position_bytes += n;
}

static void
count_progress(const struct dcp_writer *writer, uint64_t n)
{
    if (writer->options->progress_bytes != NULL) {
        atomic_fetch_add_explicit(writer->options->progress_bytes, n, memory_order_relaxed);
    }
}

/* Where the next bytes of a payload lie, and how many of them are taken in one step of at most
 * `room`.  A mapped source is in memory after that, one on a device has arrived. */
static int
source_step(const struct dcp_writer *writer, const struct dcp_write_payload *payload,
            const struct block_crc *crc, uint64_t room, const uint8_t **ret_from, uint64_t *ret,
            struct dcp_error *err)
{
    const struct dcp_source *source = payload->source;
    uint64_t n = block_room(crc, dcp_min_u64(room, payload->len_bytes - crc->done_bytes));
    if (source->device != 0) {
        return dcp_device_stream_peek(writer->stream, (uint64_t)(uintptr_t)source->data, n,
                                      writer->options->cancel, ret_from, ret, err);
    }
    *ret_from = source->data + crc->done_bytes;
    *ret = n;
    return source_is_mapped(writer->options, *ret_from, n)
               ? source_pages_need(writer->options, *ret_from, n, err)
               : 0;
}

static void
source_done(const struct dcp_writer *writer, const struct dcp_write_payload *payload,
            const uint8_t *from, uint64_t n)
{
    if (payload->source->device != 0) {
        dcp_device_stream_take(writer->stream, n);
    } else if (source_is_mapped(writer->options, from, n)) {
        source_pages_done(from, n);
    }
}

/* Dense source into the ring or the image, one fused pass. */
static int
payload_copy(struct dcp_writer *writer, const struct dcp_write_payload *payload,
             struct block_crc *crc, struct dcp_error *err)
{
    bool streaming = payload->len_bytes >= writer->streaming_least_bytes;
    while (crc->done_bytes < payload->len_bytes) {
        uint8_t *at;
        uint64_t room;
        int rc = stream_room(writer, &at, &room, err);
        if (rc != 0) {
            return rc;
        }
        uint64_t left = payload->len_bytes - crc->done_bytes, n;
        const uint8_t *from;
        rc = source_step(writer, payload, crc, room, &from, &n, err);
        if (rc != 0) {
            return rc;
        }
        crc->block = dcp_crc32_copy(crc->block, at, from, n, streaming);
        block_add(crc, from, n, n == left);
        source_done(writer, payload, from, n);
        stream_took(writer, n);
        count_progress(writer, n);
        rc = dcp_write_look_at_devices(writer, n, true, err);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

/* Dense source, no direct I/O: checksummed in place, written from where it lies. */
static int
payload_in_place(struct dcp_writer *writer, const struct dcp_write_payload *payload,
                 struct block_crc *crc, struct dcp_error *err)
{
    int rc = writer->filled_bytes > 0 ? push_buffer(writer, writer->filled_bytes, err) : 0;
    while (rc == 0 && crc->done_bytes < payload->len_bytes) {
        const uint8_t *at;
        uint64_t left = payload->len_bytes - crc->done_bytes, n, number;
        rc = source_step(writer, payload, crc, DCP_WRITE_PIECE_BYTES, &at, &n, err);
        if (rc != 0) {
            return rc;
        }
        uint64_t traced = dcp_trace_begin();
        crc->block = dcp_crc32(crc->block, at, n);
        block_add(crc, at, n, n == left);
        dcp_trace_end(traced, "cpu", "checksum", n);
        rc = dcp_write_push(writer, at, writer->position_bytes, n, 0, &number, err);
        if (rc == 0 && payload->source->device != 0) {
            /* The segment is filled again: with a pump from a direct file before it may be early.
             */
            rc = dcp_pump_wait(&writer->pump, number);
        }
        source_done(writer, payload, at, n);
        writer->position_bytes += n;
        count_progress(writer, n);
    }
    return rc;
}

/* The longest dense run of a strided source, in bytes. */
static uint64_t
dense_run(const struct dcp_write_payload *payload)
{
    uint64_t run = payload->item_bytes;
    for (uint32_t d = payload->ndim; d > 0; d--) {
        if (payload->sizes[d - 1] == 1) {
            continue;
        }
        if (payload->source->strides_bytes[d - 1] != (int64_t)run) {
            break;
        }
        run *= payload->sizes[d - 1];
    }
    return run;
}

/* Strided source: gathered in row-major order, then checksummed. */
static int
payload_gather(struct dcp_writer *writer, const struct dcp_write_payload *payload,
               struct block_crc *crc, struct dcp_error *err)
{
    bool dense = dense_run(payload) >= DENSE_RUN_BYTES;
    while (crc->done_bytes < payload->len_bytes) {
        uint8_t *at;
        uint64_t room;
        int rc = stream_room(writer, &at, &room, err);
        if (rc != 0) {
            return rc;
        }
        uint64_t left = payload->len_bytes - crc->done_bytes;
        uint64_t n = dcp_min_u64(room, dense ? dcp_min_u64(left, GATHER_PIECE_BYTES) : left);
        dcp_box_gather(at, payload->source->data, payload->ndim, payload->sizes,
                       payload->source->strides_bytes, payload->item_bytes, crc->done_bytes, n);
        for (uint64_t done = 0; done < n;) {
            uint64_t part = block_room(crc, n - done);
            crc->block = dcp_crc32(crc->block, at + done, part);
            block_add(crc, at + done, part, done + part == left);
            done += part;
        }
        stream_took(writer, n);
        count_progress(writer, n);
        rc = dcp_write_look_at_devices(writer, n, true, err);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

/* In an image, from a device, or brought before: checksummed where it is. */
static int
payload_landed(struct dcp_writer *writer, const struct dcp_write_payload *payload,
               struct block_crc *crc, struct dcp_error *err)
{
    const uint32_t *known = payload->hash == NULL ? payload->device_crcs : NULL;
    while (crc->done_bytes < payload->len_bytes) {
        const uint8_t *landed_to;
        uint8_t *at;
        uint64_t room, left = payload->len_bytes - crc->done_bytes;
        int rc = stream_room(writer, &at, &room, err);
        if (rc == 0) { /* checksums of the device come with the first byte */
            rc = dcp_device_stage_wait(writer->stage, at, writer->options->cancel, &landed_to, err);
        }
        if (rc != 0) {
            return rc;
        }
        uint64_t n = block_room(crc, dcp_min_u64(dcp_min_u64(left, room),
                                                 (uint64_t)(uintptr_t)landed_to - (uintptr_t)at));
        if (known != NULL) {
            uint64_t block = crc->done_bytes / DCP_BLOCK_BYTES;
            bool ends = n == left || (crc->done_bytes + n) % DCP_BLOCK_BYTES == 0;
            crc->block = ends ? known[block] : 0;
        } else {
            crc->block = dcp_crc32(crc->block, at, n);
        }
        block_add(crc, at, n, n == left);
        stream_took(writer, n);
        count_progress(writer, n);
        rc = dcp_write_look_at_devices(writer, n, false, err);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

void
dcp_write_stream_open(struct dcp_writer *writer)
{
    DCP_ASSERT(writer->filled_bytes == 0);
    bool direct = writer->file->direct;
    writer->position_bytes = 0;
    writer->in_place = !direct;
    writer->limit_bytes =
        direct ? writer->request_bytes : dcp_min_u64(writer->request_bytes, DCP_WRITE_PIECE_BYTES);
    writer->streaming_least_bytes = STREAMING_LEAST_BYTES;
}

void
dcp_write_stream_open_image(struct dcp_writer *writer, uint8_t *memory, uint64_t length_bytes)
{
    writer->to_image = true;
    writer->buffer = memory;
    writer->limit_bytes = length_bytes;
    writer->position_bytes = writer->filled_bytes = 0;
    writer->streaming_least_bytes = IMAGE_STREAMING_LEAST_BYTES;
}

int
dcp_write_stream_bytes(struct dcp_writer *writer, const uint8_t *data, uint64_t len,
                       struct dcp_error *err)
{
    while (len > 0) {
        uint8_t *at;
        uint64_t room;
        int rc = stream_room(writer, &at, &room, err);
        if (rc != 0) {
            return rc;
        }
        uint64_t n = dcp_min_u64(room, len);
        memcpy(at, data, n);
        stream_took(writer, n);
        data += n;
        len -= n;
    }
    return 0;
}

int
dcp_write_stream_zeros_to(struct dcp_writer *writer, uint64_t position_bytes, struct dcp_error *err)
{
    while (writer->position_bytes < position_bytes) {
        uint8_t *at;
        uint64_t room;
        int rc = stream_room(writer, &at, &room, err);
        if (rc != 0) {
            return rc;
        }
        uint64_t n = dcp_min_u64(room, position_bytes - writer->position_bytes);
        memset(at, 0, n);
        stream_took(writer, n);
    }
    return 0;
}

int
dcp_write_stream_payload(struct dcp_writer *writer, struct dcp_write_payload *payload,
                         struct dcp_error *err)
{
    struct block_crc crc = {.blocks = payload->block_crcs, .hash = payload->hash};
    int rc;
    if (payload->landed) {
        rc = payload_landed(writer, payload, &crc, err);
    } else if (payload->source->device == 0 && /* else its bytes come in row-major order */
               !dcp_box_is_row_major(payload->ndim, payload->sizes, payload->item_bytes,
                                     payload->source->strides_bytes)) {
        rc = payload_gather(writer, payload, &crc, err);
    } else if (writer->in_place && payload->len_bytes >= IN_PLACE_LEAST_BYTES) {
        rc = payload_in_place(writer, payload, &crc, err);
    } else {
        rc = payload_copy(writer, payload, &crc, err);
    }
    payload->crc = crc.whole;
    writer->stats.payload_bytes += crc.done_bytes;
    return rc;
}

int
dcp_write_stream_flush(struct dcp_writer *writer, struct dcp_error *err)
{
    if (writer->filled_bytes == 0) {
        return 0;
    }
    uint64_t len = dcp_align_up(writer->filled_bytes, writer->file->align_bytes);
    memset(writer->buffer + writer->filled_bytes, 0, len - writer->filled_bytes);
    return push_buffer(writer, len, err);
}

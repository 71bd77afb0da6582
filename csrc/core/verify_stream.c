/*
 * verify_stream.c: one data file after the other, read ahead by a second thread.
 *
 * The file is read in its own order, in requests as large as the device likes, each byte once; gaps
 * that no record needs are skipped when they are worth a seek.  A request that fails spoils its
 * buffer from there on, not the pump: records behind it are still checked.
 *
 * Threads: stream_job on the pump's thread, all else on the calling one.  A slot belongs to the
 * pump from its push until its job was waited for.
 */
#include "verify.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

/* Page cache: requests that are still in the cache of the processor when they are checked. */
#define BUFFERED_REQUEST_BYTES (2u << 20)
/* Reading over a gap of this many bytes costs less than another request. */
#define GAP_BYTES (1u << 20)

static int
fail_read(const struct dcp_verify_file *file, int sys_errno, uint64_t offset, struct dcp_error *why)
{
    int rc = dcp_error_set(why, DCP_E_IO, sys_errno, file->path,
                           "reading byte %" PRIu64 " failed: %s", offset, strerror(sys_errno));
    why->offset_bytes = offset;
    return rc;
}

/* Reads a slot's range as far as it goes. */
static void
read_slot(const struct dcp_verify_stream *s, struct dcp_verify_slot *slot, uint8_t *data)
{
    const struct dcp_verify_file *file = s->file;
    bool direct = file->direct_fd >= 0;
    while (slot->read_to < slot->to) {
        uint64_t done = slot->read_to - slot->from, len = slot->to - slot->read_to;
        if (dcp_verify_check_cancel(s->options, &slot->why) != 0) {
            return;
        }
        /* Behind the end of the file a direct read stops by itself. */
        size_t want = (size_t)(direct ? dcp_align_up(len, file->align_bytes) : len);
        ssize_t n = s->io->pread(s->io->ctx, direct ? file->direct_fd : file->fd, data + done, want,
                                 slot->read_to);
        if (n == -EINTR) {
            continue;
        }
        if (n == -EINVAL && direct && s->options->direct != DCP_DIRECT_ON) {
            direct = false;
            continue;
        }
        if (n < 0) {
            (void)fail_read(file, (int)-n, slot->read_to, &slot->why);
            return;
        }
        if (n == 0) {
            (void)dcp_error_set(&slot->why, DCP_E_CORRUPT, 0, file->path,
                                "the file ends at byte %" PRIu64 ": it was cut short just now",
                                slot->read_to);
            slot->why.offset_bytes = slot->read_to;
            return;
        }
        uint64_t step = dcp_min_u64((uint64_t)n, len);
        if (direct && step < len && step % file->align_bytes != 0) {
            /* The rest of a unit comes through the page cache, from any byte. */
            direct = false;
        }
        slot->read_to += step;
    }
}

static int
stream_job(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err)
{
    struct dcp_verify_slot *slot = job->file;
    (void)failed;
    (void)err;
    read_slot(ctx, slot, job->data);
    return 0;
}

int
dcp_verify_stream_init(struct dcp_verify_stream *s, const struct dcp_io *io,
                       const struct dcp_verify_options *options, struct dcp_error *err)
{
    *s = (struct dcp_verify_stream){.io = io, .options = options};
    int rc = dcp_ring_acquire(DCP_VERIFY_BUFFERS, DCP_RING_BUFFER_BYTES, &s->ring, err);
    if (rc == 0) {
        rc = dcp_pump_init(&s->pump, stream_job, s, err);
    }
    if (rc != 0) {
        dcp_ring_release(s->ring);
        s->ring = NULL;
    }
    return rc;
}

void
dcp_verify_stream_clean_up(struct dcp_verify_stream *s)
{
    struct dcp_error ignored;
    dcp_error_clear(&ignored);
    if (s->ring != NULL) {
        dcp_verify_stream_end(s);
        (void)!dcp_pump_clean_up(&s->pump, &ignored); /* jobs keep their failures in slots */
        dcp_ring_release(s->ring);
    }
    dcp_buf_clean_up(&s->piece);
    s->ring = NULL;
}

void
dcp_verify_stream_begin(struct dcp_verify_stream *s, const struct dcp_verify_file *file,
                        const struct dcp_metadata *md, const struct dcp_verify_ref *refs,
                        uint64_t refs_count)
{
    s->file = file;
    s->md = md;
    s->refs = refs;
    s->refs_count = refs_count;
    s->ahead = 0;
    s->pushed_to = 0;
    s->request_bytes = file->direct_fd >= 0 ? s->ring->buffer_bytes : BUFFERED_REQUEST_BYTES;
    if (file->size_bytes > s->request_bytes) {
        dcp_pump_start(&s->pump);
    }
}

/* Forgets what was read ahead. */
static void
drop(struct dcp_verify_stream *s)
{
    for (; s->popped < s->pushed; s->popped++) {
        (void)!dcp_pump_wait(&s->pump, s->slots[s->popped % DCP_VERIFY_BUFFERS].job);
    }
}

void
dcp_verify_stream_end(struct dcp_verify_stream *s)
{
    drop(s);
    s->file = NULL;
}

static uint64_t
end_of(const struct dcp_verify_stream *s, uint64_t ref)
{
    const struct dcp_md_chunk *chunk = &s->md->chunks[s->refs[ref].chunk];
    return chunk->offset_bytes + chunk->length_bytes;
}

/* Gives the next range that records need to the pump; false when there is none. */
static bool
push_next(struct dcp_verify_stream *s)
{
    while (s->ahead < s->refs_count && end_of(s, s->ahead) <= s->pushed_to) {
        s->ahead++;
    }
    if (s->ahead == s->refs_count) {
        return false;
    }
    uint64_t start = s->refs[s->ahead].offset_bytes;
    if (start > s->pushed_to && start - s->pushed_to > GAP_BYTES) {
        s->pushed_to = start - start % DCP_DIRECT_ALIGN_BYTES;
    }
    uint32_t index = (uint32_t)(s->pushed % DCP_VERIFY_BUFFERS);
    struct dcp_verify_slot *slot = &s->slots[index];
    slot->from = slot->read_to = s->pushed_to;
    slot->to = dcp_min_u64(slot->from + s->request_bytes, end_of(s, s->refs_count - 1));
    dcp_error_clear(&slot->why);
    struct dcp_job job = {.file = slot, .data = dcp_ring_buffer(s->ring, index)};
    slot->job = dcp_pump_push(&s->pump, &job);
    s->read_bytes += slot->to - slot->from;
    s->pushed_to = slot->to;
    s->pushed++;
    return true;
}

/* Starts to read anew at `offset`. */
static void
seek(struct dcp_verify_stream *s, uint64_t offset)
{
    drop(s);
    s->pushed_to = offset - offset % DCP_DIRECT_ALIGN_BYTES;
    while (s->ahead > 0 && (s->ahead == s->refs_count || end_of(s, s->ahead - 1) > s->pushed_to)) {
        s->ahead--;
    }
}

int
dcp_verify_stream_at(struct dcp_verify_stream *s, uint64_t offset, uint64_t most,
                     const uint8_t **ret, uint64_t *ret_len, struct dcp_error *why)
{
    DCP_ASSERT(most > 0);
    for (int tries = 0; tries < 2; tries++) {
        for (;;) {
            while (s->pushed - s->popped < DCP_VERIFY_BUFFERS && push_next(s)) {
            }
            if (s->popped == s->pushed) {
                break;
            }
            uint32_t index = (uint32_t)(s->popped % DCP_VERIFY_BUFFERS);
            struct dcp_verify_slot *slot = &s->slots[index];
            if (offset < slot->from) {
                break;
            }
            (void)!dcp_pump_wait(&s->pump, slot->job);
            if (offset < slot->read_to) {
                *ret = dcp_ring_buffer(s->ring, index) + (offset - slot->from);
                *ret_len = dcp_min_u64(most, slot->read_to - offset);
                return 0;
            }
            if (offset < slot->to) {
                *why = slot->why;
                return why->code;
            }
            s->popped++;
        }
        seek(s, offset);
    }
    return dcp_error_set(why, DCP_E_INTERNAL, 0, s->file->path,
                         "byte %" PRIu64 " of %s belongs to no record", offset, s->file->path);
}

int
dcp_verify_stream_gather(struct dcp_verify_stream *s, uint64_t offset, uint64_t len,
                         const uint8_t **ret, struct dcp_error *why)
{
    uint64_t got;
    int rc = dcp_verify_stream_at(s, offset, len, ret, &got, why);
    if (rc != 0 || got == len) {
        return rc;
    }
    dcp_buf_clear(&s->piece);
    uint8_t *piece = dcp_buf_extend(&s->piece, (size_t)len);
    if (piece == NULL) {
        return dcp_buf_check(&s->piece, why);
    }
    for (uint64_t done = 0;;) {
        memcpy(piece + done, *ret, (size_t)got);
        done += got;
        if (done == len) {
            *ret = piece;
            return 0;
        }
        rc = dcp_verify_stream_at(s, offset + done, len - done, ret, &got, why);
        if (rc != 0) {
            return rc;
        }
    }
}

/*
 * writer_channel.c: whole messages over the socket between a trainer and its writer process.
 *
 *     [magic 4][version 2][kind 2][length of the body 8][body]
 *
 * A stream and not packets: the places of a rank's files are longer than a packet may be when every
 * item has a file of its own.  Reads never go past the message at hand, so that descriptors belong
 * to the message they came with.  Memory is taken for what has arrived, not for what a length
 * announces.
 *
 * Threads: one receives; whoever sends has the sending side to itself.
 */
#include "writer_message.h"

#include <errno.h>
#include <string.h>

#include "dcp_limits.h"
#include "le_bytes.h"
#include "writer_frame.h"

static int
not_ours(struct dcp_error *err, const char *what)
{
    return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                         "a message between trainer and writer process is not of our protocol (%s)",
                         what);
}

/* The most that a body of that kind can have; 0 for kinds without one. */
static uint64_t
most_body_bytes(uint32_t kind)
{
    return kind == DCP_WRITER_HELLO      ? DCP_WRITER_HELLO_BYTES
           : kind == DCP_WRITER_WRITE    ? DCP_WRITER_REQUEST_MOST_BYTES
           : kind == DCP_WRITER_PROGRESS ? DCP_WRITER_PROGRESS_BYTES
           : kind == DCP_WRITER_DONE     ? DCP_WRITER_RESULT_MOST_BYTES
           : kind == DCP_WRITER_PREPARE  ? DCP_WRITER_PREPARE_BYTES
           : kind == DCP_WRITER_TRACE    ? DCP_WRITER_TRACE_MOST_BYTES
                                         : 0;
}

static int
check_header(const struct dcp_writer_channel *channel, struct dcp_error *err)
{
    struct dcp_cursor c = {.data = channel->in.data, .len = channel->in.len};
    uint32_t magic = dcp_cursor_u32(&c), version = dcp_cursor_u16(&c), kind = dcp_cursor_u16(&c);
    uint64_t length = dcp_cursor_u64(&c);

    DCP_ASSERT(!c.failed);
    if (magic != DCP_WRITER_MAGIC) {
        return not_ours(err, "magic");
    }
    if (version != DCP_WRITER_VERSION) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                             "a writer process of protocol %u was met by a trainer of protocol %u: "
                             "install dcp_native anew",
                             version, DCP_WRITER_VERSION);
    }
    if (kind < DCP_WRITER_HELLO || kind > DCP_WRITER_TRACE || length > most_body_bytes(kind)) {
        return not_ours(err, "kind or length");
    }
    return 0;
}

/* Bytes of the message at hand that have not arrived. */
static uint64_t
missing_bytes(const struct dcp_writer_channel *channel)
{
    const struct dcp_buf *in = &channel->in;

    if (in->len < DCP_WRITER_HEADER_BYTES) {
        return DCP_WRITER_HEADER_BYTES - in->len;
    }
    return DCP_WRITER_HEADER_BYTES + le_get64(in->data + DCP_WRITER_LENGTH_AT) - in->len;
}

static void
close_descriptors(const int *fds, uint32_t *fds_count)
{
    while (*fds_count != 0) {
        dcp_descriptor_close(fds[--*fds_count]);
    }
}

void
dcp_writer_channel_clean_up(struct dcp_writer_channel *channel)
{
    close_descriptors(channel->fds, &channel->fds_count);
    dcp_buf_clean_up(&channel->in);
}

void
dcp_writer_message_clean_up(struct dcp_writer_message *message)
{
    close_descriptors(message->fds, &message->fds_count);
}

/* Makes room for the next message; long ones are rare and do not keep their memory. */
static void
begin_message(struct dcp_writer_channel *channel)
{
    channel->taken = false;
    if (channel->in.cap > DCP_WRITER_STEP_BYTES) {
        dcp_buf_clean_up(&channel->in);
    } else {
        dcp_buf_clear(&channel->in);
    }
}

/* Takes what there is of the message at hand: 1, or 0 when the socket is empty. */
static int
take_bytes(struct dcp_writer_channel *channel, struct dcp_error *err)
{
    size_t want = (size_t)dcp_min_u64(missing_bytes(channel), DCP_WRITER_STEP_BYTES);
    uint8_t *at = dcp_buf_extend(&channel->in, want);

    if (at == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "no memory for a message between trainer and writer process");
    }
    ssize_t got = dcp_socket_receive(channel->socket, at, want, channel->fds, &channel->fds_count);
    channel->in.len -= want - (size_t)(got > 0 ? got : 0);
    if (got == -EAGAIN) {
        return 0;
    }
    if (got == -EPROTO) {
        return not_ours(err, "descriptors were lost; is the limit of open files too low?");
    }
    if (got <= 0) {
        return dcp_error_set(err, DCP_E_IO, got < 0 ? (int)-got : 0, NULL,
                             "the other side of a writer process's socket is gone");
    }
    /* Checked once, before the length is believed. */
    if (channel->in.len >= DCP_WRITER_HEADER_BYTES &&
        channel->in.len - (size_t)got < DCP_WRITER_HEADER_BYTES) {
        int rc = check_header(channel, err);
        if (rc != 0) {
            return rc;
        }
    }
    return 1;
}

static void
hand_out(struct dcp_writer_channel *channel, struct dcp_writer_message *ret_message)
{
    *ret_message = (struct dcp_writer_message){
        .kind = channel->in.data[DCP_WRITER_KIND_AT],
        .body = {channel->in.data + DCP_WRITER_HEADER_BYTES,
                 channel->in.len - DCP_WRITER_HEADER_BYTES},
        .fds_count = channel->fds_count,
    };
    memcpy(ret_message->fds, channel->fds, sizeof channel->fds);
    channel->fds_count = 0;
    channel->taken = true;
}

int
dcp_writer_receive(struct dcp_writer_channel *channel, uint64_t timeout_ns,
                   struct dcp_writer_message *ret_message, struct dcp_error *err)
{
    bool waited = false;

    if (channel->taken) {
        begin_message(channel);
    }
    while (channel->in.len < DCP_WRITER_HEADER_BYTES || missing_bytes(channel) != 0) {
        int rc = take_bytes(channel, err);
        if (rc < 0) {
            return rc;
        }
        if (rc == 0) {
            rc = waited ? 0 : dcp_socket_wait(channel->socket, false, timeout_ns);
            waited = true;
            if (rc < 0) {
                return dcp_error_set(err, DCP_E_IO, -rc, NULL,
                                     "waiting for a message between trainer and writer process "
                                     "failed: %s",
                                     strerror(-rc));
            }
            if (rc == 0) {
                return 0;
            }
        }
    }
    hand_out(channel, ret_message);
    return 1;
}

int
dcp_writer_send(const struct dcp_writer_channel *channel, const struct dcp_buf *message,
                const int *fds, uint32_t fds_count, uint32_t slices, const atomic_int *stop,
                struct dcp_error *err)
{
    size_t sent = 0;

    int rc = dcp_buf_check(message, err);
    if (rc != 0) {
        return rc;
    }
    while (sent < message->len) {
        ssize_t put = dcp_socket_send(channel->socket, message->data + sent, message->len - sent,
                                      fds, sent == 0 ? fds_count : 0);
        if (put > 0) {
            sent += (size_t)put;
            continue;
        }
        if (put != -EAGAIN) {
            return dcp_error_set(err, DCP_E_IO, (int)-put, NULL,
                                 "sending a message between trainer and writer process failed: %s",
                                 strerror((int)-put));
        }
        if (slices == 0 || (stop != NULL && atomic_load(stop) != 0)) {
            return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL,
                                 "a writer process or its trainer takes no messages");
        }
        rc = dcp_socket_wait(channel->socket, true, DCP_WRITER_SLICE_NS);
        if (rc < 0) {
            return dcp_error_set(err, DCP_E_IO, -rc, NULL,
                                 "waiting to send between trainer and writer process failed: %s",
                                 strerror(-rc));
        }
        slices -= rc == 0 && slices != UINT32_MAX;
    }
    return 0;
}

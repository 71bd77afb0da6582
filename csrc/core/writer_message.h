/*
 * writer_message.h: private: what a trainer and its writer process tell each other.
 */
#ifndef WRITER_MESSAGE_H
#define WRITER_MESSAGE_H

#include "dcp_writer_process.h"
#include "process_posix.h"

/* Changes with every change of a message. */
enum { DCP_WRITER_VERSION = 3 };

enum dcp_writer_kind {
    DCP_WRITER_HELLO = 1,    /* process: ready; body: hash of its build */
    DCP_WRITER_WRITE = 2,    /* trainer: struct dcp_writer_request; arena and directory with it */
    DCP_WRITER_CANCEL = 3,   /* trainer: stop the write; it is answered by DONE as ever */
    DCP_WRITER_PROGRESS = 4, /* process: every DCP_WRITER_SLICE_NS while it writes */
    DCP_WRITER_DONE = 5,     /* process: struct dcp_writer_result */
    DCP_WRITER_SETTLED = 6,  /* trainer: the last write's save needs nobody any more */
    DCP_WRITER_PREPARE = 7,  /* trainer: how much of the arena that comes along; answer: DONE */
    DCP_WRITER_TRACE = 8,    /* process: what a traced write did (trace_pack.c), before its DONE */
};

/* The bytes of one image and how to write them.  Zero-initialised is a valid empty one. */
struct dcp_writer_request {
    struct dcp_save_id save_id;
    struct dcp_image image;              /* files are owned */
    struct dcp_engine_options options;   /* without pointers */
    char *dir_path;                      /* owned; for messages */
    bool traced;                         /* the process tells what it did when */
    bool survives;                       /* its trainer; then */
    struct dcp_writer_survival survival; /* with metadata that is owned */
};

struct dcp_writer_progress {
    uint64_t payload_bytes;
};

struct dcp_writer_result {
    int32_t code;         /* of dcp_image_write */
    struct dcp_error err; /* filled when `code` is not 0 */
    uint32_t created_files;
    uint64_t payload_bytes;
    struct dcp_write_stats stats;
};

/* ---- framing ---- */

/* One end of the socket.  One thread receives; sending is its users' to order. */
struct dcp_writer_channel {
    int socket;        /* borrows */
    struct dcp_buf in; /* of the message that is arriving */
    int fds[DCP_SOCKET_MOST_FDS];
    uint32_t fds_count;
    bool taken; /* what lies in `in` was handed out */
};

struct dcp_writer_message {
    enum dcp_writer_kind kind;
    struct dcp_span body; /* valid until the next receive */
    int fds[DCP_SOCKET_MOST_FDS];
    uint32_t fds_count; /* the receiver's to close */
};

void dcp_writer_channel_clean_up(struct dcp_writer_channel *channel);
/* Closes descriptors that nobody took out of the message. */
void dcp_writer_message_clean_up(struct dcp_writer_message *message);
/* Waits for a whole message: 1, or 0 when none was there in time.  DCP_E_IO: the other side is
 * gone.  DCP_E_CORRUPT: it does not speak our protocol. */
int dcp_writer_receive(struct dcp_writer_channel *channel, uint64_t timeout_ns,
                       struct dcp_writer_message *ret_message,
                       struct dcp_error *err) DCP_MUST_CHECK;
/* Sends one message, or gives up after that many slices without room in the socket, or once `stop`
 * (may be NULL) is set. */
int dcp_writer_send(const struct dcp_writer_channel *channel, const struct dcp_buf *message,
                    const int *fds, uint32_t fds_count, uint32_t slices, const atomic_int *stop,
                    struct dcp_error *err) DCP_MUST_CHECK;

/* ---- messages: `put` appends a whole message, `get` reads a body ---- */

void dcp_writer_put_hello(struct dcp_buf *buf);
void dcp_writer_put_request(struct dcp_buf *buf, const struct dcp_writer_request *request);
/* CANCEL and SETTLED. */
void dcp_writer_put_word(struct dcp_buf *buf, enum dcp_writer_kind kind);
void dcp_writer_put_prepare(struct dcp_buf *buf, uint64_t bytes);
void dcp_writer_put_progress(struct dcp_buf *buf, const struct dcp_writer_progress *progress);
/* What was recorded in this process, some of it: false when nothing is left.  Of the taking thread.
 */
bool dcp_writer_put_trace(struct dcp_buf *buf);
void dcp_writer_put_result(struct dcp_buf *buf, const struct dcp_writer_result *result);

/* False: another build. */
bool dcp_writer_get_hello(struct dcp_span body);
int dcp_writer_get_request(struct dcp_span body, struct dcp_writer_request *ret_request,
                           struct dcp_error *err) DCP_MUST_CHECK;
bool dcp_writer_get_prepare(struct dcp_span body, uint64_t *ret_bytes);
bool dcp_writer_get_progress(struct dcp_span body, struct dcp_writer_progress *ret_progress);
bool dcp_writer_get_result(struct dcp_span body, struct dcp_writer_result *ret_result);

/* DCP_E_CORRUPT unless each file in `memory` has the header that the request says. */
int dcp_writer_check_image(const struct dcp_writer_request *request, const uint8_t *memory,
                           struct dcp_error *err) DCP_MUST_CHECK;
void dcp_writer_request_clean_up(struct dcp_writer_request *request);

#endif

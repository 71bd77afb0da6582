/*
 * pickle_out.h: emits a pickle of protocol 4: one frame, memoised on request.
 *
 * Calls follow the pickle machine's stack: put values, then the opcode that consumes them.  A value
 * that is needed again is memoised once and fetched by its number: two bytes for the first 256
 * numbers, five for the others, so callers memoise what is hot first.
 *
 * Failures (memory) stay in the buffer (`failed`) and are checked once, at the end.
 */
#ifndef DCP_PICKLE_OUT_H
#define DCP_PICKLE_OUT_H

#include "dcp_alloc.h"
#include "pickle_op.h"

struct dcp_pickle_out {
    struct dcp_buf *buf; /* borrows */
    size_t first_byte;   /* of the pickle in the buffer */
    uint32_t memo_count; /* the number that the next MEMOIZE gets */
};

/* Emits PROTO and the frame's opcode; the frame's length is filled in by the end. */
void dcp_pickle_out_begin(struct dcp_pickle_out *out, struct dcp_buf *buf);
/* Emits STOP and closes the frame. */
void dcp_pickle_out_end(struct dcp_pickle_out *out);

/* UTF-8 text. */
void dcp_pickle_out_text(struct dcp_pickle_out *out, const void *text, size_t len);
/* Pushes the class or function `name` of `module`, given by the memo number of its name. */
void dcp_pickle_out_global(struct dcp_pickle_out *out, uint32_t module_memo, const char *name);
/* An integer of more than 31 bits. */
void dcp_pickle_out_long(struct dcp_pickle_out *out, uint64_t value);

static inline void
dcp_pickle_out_op(struct dcp_pickle_out *out, enum dcp_pickle_op op)
{
    struct dcp_buf *buf = out->buf;
    if (buf->len < buf->cap || dcp_buf_reserve(buf, 1) == 0) {
        buf->data[buf->len++] = (uint8_t)op;
    }
}

/* The top of the stack gets a memo number, which is returned. */
static inline uint32_t
dcp_pickle_out_memoize(struct dcp_pickle_out *out)
{
    dcp_pickle_out_op(out, DCP_OP_MEMOIZE);
    return out->memo_count++;
}

static inline void
dcp_pickle_out_get(struct dcp_pickle_out *out, uint32_t memo)
{
    DCP_ASSERT(memo < out->memo_count);
    struct dcp_buf *buf = out->buf;
    if (buf->cap - buf->len < 5 && dcp_buf_reserve(buf, 5) != 0) {
        return;
    }
    uint8_t *at = buf->data + buf->len;
    if (memo < 256) {
        at[0] = DCP_OP_BINGET;
        at[1] = (uint8_t)memo;
        buf->len += 2;
        return;
    }
    at[0] = DCP_OP_LONG_BINGET;
    at[1] = (uint8_t)memo;
    at[2] = (uint8_t)(memo >> 8);
    at[3] = (uint8_t)(memo >> 16);
    at[4] = (uint8_t)(memo >> 24);
    buf->len += 5;
}

/* A non-negative integer in its shortest form. */
static inline void
dcp_pickle_out_uint(struct dcp_pickle_out *out, uint64_t value)
{
    struct dcp_buf *buf = out->buf;
    if (value > INT32_MAX) {
        dcp_pickle_out_long(out, value);
        return;
    }
    if (buf->cap - buf->len < 5 && dcp_buf_reserve(buf, 5) != 0) {
        return;
    }
    uint8_t *at = buf->data + buf->len;
    at[1] = (uint8_t)value;
    if (value < 1u << 8) {
        at[0] = DCP_OP_BININT1;
        buf->len += 2;
        return;
    }
    at[2] = (uint8_t)(value >> 8);
    if (value < 1u << 16) {
        at[0] = DCP_OP_BININT2;
        buf->len += 3;
        return;
    }
    at[0] = DCP_OP_BININT;
    at[3] = (uint8_t)(value >> 16);
    at[4] = (uint8_t)(value >> 24);
    buf->len += 5;
}

static inline void
dcp_pickle_out_bool(struct dcp_pickle_out *out, bool value)
{
    dcp_pickle_out_op(out, value ? DCP_OP_NEWTRUE : DCP_OP_NEWFALSE);
}

#endif

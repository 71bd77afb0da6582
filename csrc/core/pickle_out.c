/*
 * pickle_out.c: the parts of the pickle writer that are too large or too rare to be inlined.
 *
 * One frame holds the whole pickle: Python's reader then takes the bytes in one piece, and stops
 * where the frame says, so what follows (the trailer of `.metadata`) is never looked at.
 *
 * Threads: a writer belongs to one thread.
 */
#include "pickle_out.h"

#include <string.h>

enum {
    PROTOCOL = 4,
    FRAME_LENGTH_AT = 3, /* behind PROTO, its number and FRAME */
    FRAME_BODY_AT = FRAME_LENGTH_AT + 8,
};

void
dcp_pickle_out_begin(struct dcp_pickle_out *out, struct dcp_buf *buf)
{
    *out = (struct dcp_pickle_out){.buf = buf, .first_byte = buf->len};
    dcp_buf_put_u8(buf, DCP_OP_PROTO);
    dcp_buf_put_u8(buf, PROTOCOL);
    dcp_buf_put_u8(buf, DCP_OP_FRAME);
    dcp_buf_put_u64(buf, 0);
}

void
dcp_pickle_out_end(struct dcp_pickle_out *out)
{
    struct dcp_buf *buf = out->buf;
    dcp_buf_put_u8(buf, DCP_OP_STOP);
    if (buf->failed) {
        return;
    }
    uint64_t body = buf->len - out->first_byte - FRAME_BODY_AT;
    for (unsigned i = 0; i < sizeof body; i++) {
        buf->data[out->first_byte + FRAME_LENGTH_AT + i] = (uint8_t)(body >> (8 * i));
    }
}

void
dcp_pickle_out_text(struct dcp_pickle_out *out, const void *text, size_t len)
{
    struct dcp_buf *buf = out->buf;
    if (len <= UINT8_MAX) {
        dcp_buf_put_u8(buf, DCP_OP_SHORT_BINUNICODE);
        dcp_buf_put_u8(buf, (uint8_t)len);
    } else if (len <= UINT32_MAX) {
        dcp_buf_put_u8(buf, DCP_OP_BINUNICODE);
        dcp_buf_put_u32(buf, (uint32_t)len);
    } else {
        dcp_buf_put_u8(buf, DCP_OP_BINUNICODE8);
        dcp_buf_put_u64(buf, len);
    }
    dcp_buf_put(buf, text, len);
}

void
dcp_pickle_out_global(struct dcp_pickle_out *out, uint32_t module_memo, const char *name)
{
    dcp_pickle_out_get(out, module_memo);
    dcp_pickle_out_text(out, name, strlen(name));
    dcp_pickle_out_op(out, DCP_OP_STACK_GLOBAL);
}

void
dcp_pickle_out_long(struct dcp_pickle_out *out, uint64_t value)
{
    /* Little endian and signed: a byte more when the highest bit is taken. */
    uint8_t bytes[9] = {0};
    uint8_t used = 1;
    for (unsigned i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(value >> (8 * i));
        if (bytes[i] != 0) {
            used = (uint8_t)(i + (bytes[i] >= 0x80 ? 2 : 1));
        }
    }
    dcp_buf_put_u8(out->buf, DCP_OP_LONG1);
    dcp_buf_put_u8(out->buf, used);
    dcp_buf_put(out->buf, bytes, used);
}

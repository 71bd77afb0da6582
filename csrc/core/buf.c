/*
 * buf.c: growing byte buffers and bounds-checked cursors.
 *
 * Encoders append without looking at results and ask once, at their end, whether memory ran out;
 * decoders read without looking and ask once whether the input was too short.  So neither can
 * forget a check in the middle, and a failed buffer takes no further bytes.
 *
 * Numbers are little endian whatever the machine is.  Threads: an object belongs to one at a time.
 */
#include "dcp_alloc.h"

#include <string.h>

enum { FIRST_CAP_BYTES = 256, VARINT_MAX_BYTES = 10 };

/* The slow half of an append, kept out of the inlined half. */
static bool __attribute__((noinline))
grow(struct dcp_buf *buf, size_t more)
{
    size_t need;
    if (buf->failed || __builtin_add_overflow(buf->len, more, &need)) {
        buf->failed = true;
        return false;
    }
    size_t cap = buf->cap < FIRST_CAP_BYTES ? FIRST_CAP_BYTES : buf->cap;
    if (cap < need && (__builtin_mul_overflow(cap, (size_t)2, &cap) || cap < need)) {
        cap = need;
    }
    uint8_t *data = dcp_realloc(buf->data, cap);
    if (data == NULL) {
        buf->failed = true;
        return false;
    }
    buf->data = data;
    buf->cap = cap;
    return true;
}

static inline bool
make_room(struct dcp_buf *buf, size_t more)
{
    if (!buf->failed && more <= buf->cap - buf->len) {
        return true;
    }
    return grow(buf, more);
}

void
dcp_buf_clean_up(struct dcp_buf *buf)
{
    if (buf == NULL) {
        return;
    }
    dcp_free(buf->data);
    *buf = (struct dcp_buf){0};
}

void
dcp_buf_clear(struct dcp_buf *buf)
{
    buf->len = 0;
    buf->failed = false;
}

int
dcp_buf_reserve(struct dcp_buf *buf, size_t more)
{
    return make_room(buf, more) ? 0 : DCP_E_NOMEM;
}

uint8_t *
dcp_buf_extend(struct dcp_buf *buf, size_t n)
{
    /* Nothing to write is no failure, but an empty buffer has no address to give yet. */
    if (!make_room(buf, n == 0 && buf->data == NULL ? 1 : n)) {
        return NULL;
    }
    uint8_t *at = buf->data + buf->len;
    buf->len += n;
    return at;
}

void
dcp_buf_put(struct dcp_buf *buf, const void *bytes, size_t n)
{
    if (n != 0 && make_room(buf, n)) {
        memcpy(buf->data + buf->len, bytes, n);
        buf->len += n;
    }
}

void
dcp_buf_put_u8(struct dcp_buf *buf, uint8_t v)
{
    if (make_room(buf, 1)) {
        buf->data[buf->len++] = v;
    }
}

void
dcp_buf_put_u16(struct dcp_buf *buf, uint16_t v)
{
    uint8_t bytes[2] = {(uint8_t)v, (uint8_t)(v >> 8)};
    dcp_buf_put(buf, bytes, sizeof bytes);
}

void
dcp_buf_put_u32(struct dcp_buf *buf, uint32_t v)
{
    uint8_t bytes[4] = {(uint8_t)v, (uint8_t)(v >> 8), (uint8_t)(v >> 16), (uint8_t)(v >> 24)};
    dcp_buf_put(buf, bytes, sizeof bytes);
}

void
dcp_buf_put_u64(struct dcp_buf *buf, uint64_t v)
{
    uint8_t bytes[8];
    for (unsigned i = 0; i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)(v >> (8 * i));
    }
    dcp_buf_put(buf, bytes, sizeof bytes);
}

void
dcp_buf_put_varint(struct dcp_buf *buf, uint64_t v)
{
    uint8_t bytes[VARINT_MAX_BYTES];
    size_t n = 0;
    while (v >= 0x80) {
        bytes[n++] = (uint8_t)(v | 0x80);
        v >>= 7;
    }
    bytes[n++] = (uint8_t)v;
    dcp_buf_put(buf, bytes, n);
}

int
dcp_buf_check(const struct dcp_buf *buf, struct dcp_error *err)
{
    if (!buf->failed) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                         "growing a buffer of %zu bytes failed: out of memory", buf->len);
}

/* ---- cursor ---- */

const uint8_t *
dcp_cursor_bytes(struct dcp_cursor *c, uint64_t n)
{
    DCP_ASSERT(c->pos <= c->len);
    if (c->failed || n > c->len - c->pos) {
        c->failed = true;
        return NULL;
    }
    const uint8_t *at = c->data + c->pos;
    c->pos += (size_t)n;
    return at;
}

/* The next n <= 8 bytes as a little-endian number. */
static inline uint64_t
take_number(struct dcp_cursor *c, unsigned n)
{
    const uint8_t *at = dcp_cursor_bytes(c, n);
    uint64_t v = 0;
    if (at == NULL) {
        return 0;
    }
    for (unsigned i = 0; i < n; i++) {
        v |= (uint64_t)at[i] << (8 * i);
    }
    return v;
}

uint8_t
dcp_cursor_u8(struct dcp_cursor *c)
{
    return (uint8_t)take_number(c, 1);
}

uint16_t
dcp_cursor_u16(struct dcp_cursor *c)
{
    return (uint16_t)take_number(c, 2);
}

uint32_t
dcp_cursor_u32(struct dcp_cursor *c)
{
    return (uint32_t)take_number(c, 4);
}

uint64_t
dcp_cursor_u64(struct dcp_cursor *c)
{
    return take_number(c, 8);
}

uint64_t
dcp_cursor_varint(struct dcp_cursor *c)
{
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        uint8_t byte = dcp_cursor_u8(c);
        uint64_t part = byte & 0x7f;
        if (c->failed || (shift == 63 && part > 1)) {
            break;
        }
        v |= part << shift;
        if ((byte & 0x80) == 0) {
            return v;
        }
    }
    c->failed = true;
    return 0;
}

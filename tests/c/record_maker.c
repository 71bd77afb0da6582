/*
 * record_maker.c: see record_maker.h.
 */
#include "record_maker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dcp_crc32.h"
#include "zip_format.h"

#define must(cond) must_hold((cond), __LINE__, #cond)

static void
must_hold(bool holds, int line, const char *what)
{
    if (!holds) {
        fprintf(stderr, "record_maker.c:%d: %s does not hold\n", line, what);
        abort();
    }
}

int
record_memory_read(void *ctx, uint64_t offset, size_t len, const uint8_t **ret,
                   struct dcp_error *err)
{
    struct record_memory *m = ctx;
    free(m->given);
    m->given = NULL;
    if (offset > m->len || len > m->len - offset) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL, "the parser reads beyond the record");
    }
    m->given = malloc(len + (len == 0));
    memcpy(m->given, m->data + offset, len);
    m->read_bytes += len;
    *ret = m->given;
    return 0;
}

int
record_parse(const uint8_t *data, size_t len, struct dcp_record_view *ret, struct dcp_error *err)
{
    struct record_memory m = {.data = data, .len = len};
    struct dcp_record_input input = {.read = record_memory_read, .ctx = &m, .length_bytes = len};
    dcp_error_clear(err);
    int rc = dcp_record_parse(&input, ret, err);
    free(m.given);
    must(rc == 0 || (err->code == rc && err->message[0] != '\0'));
    must(rc != DCP_E_INTERNAL);
    return rc;
}

int
record_verify(const uint8_t *data, size_t len)
{
    struct dcp_error err = {0};
    uint8_t *exact = malloc(len + (len == 0));
    memcpy(exact, data, len);
    int rc = dcp_record_verify(exact, len, &err);
    free(exact);
    must(rc == 0 || (err.code == rc && err.message[0] != '\0'));
    return rc;
}

void
record_make(struct dcp_buf *buf, const struct dcp_tensor_shape *shape)
{
    size_t start = buf->len;
    dcp_record_put_head(buf, shape->payload_bytes);
    must(buf->len - start == dcp_record_head_bytes(shape->payload_bytes));
    uint8_t *payload = dcp_buf_extend(buf, shape->payload_bytes);
    for (uint64_t i = 0; i < shape->payload_bytes; i++) {
        payload[i] = (uint8_t)(i * 31 + i / 253);
    }
    uint32_t crcs[64], whole = dcp_crc32(0, payload, shape->payload_bytes);
    for (uint64_t at = 0, i = 0; at < shape->payload_bytes; at += DCP_BLOCK_BYTES, i++) {
        crcs[i] =
            dcp_crc32(0, payload + at, dcp_min_u64(DCP_BLOCK_BYTES, shape->payload_bytes - at));
    }
    size_t tail = buf->len;
    dcp_record_put_tail(buf, shape, whole, crcs);
    must(buf->len - tail == dcp_record_tail_bytes(shape));
}

struct dcp_tensor_shape
record_shape(int dtype, uint32_t ndim, const uint64_t *sizes)
{
    uint64_t bytes = dcp_dtype_bytes(dtype);
    for (uint32_t i = 0; i < ndim; i++) {
        bytes *= sizes[i];
    }
    return (struct dcp_tensor_shape){(uint8_t)dtype, (uint8_t)ndim, sizes, bytes};
}

void
record_make_stock_zip(struct dcp_buf *buf, struct record_stock_entry *entries, size_t count,
                      bool with_crc)
{
    size_t start = buf->len;
    for (size_t i = 0; i < count; i++) {
        struct record_stock_entry *e = &entries[i];
        size_t name_len = strlen("archive/") + strlen(e->name);
        e->header_offset = buf->len - start;
        e->crc = with_crc ? dcp_crc32(0, e->data, e->len) : 0;
        size_t padding = 64 - (e->header_offset + 30 + name_len + 4) % 64;
        dcp_buf_put(buf, "PK\3\4\0\0\x08\x08\0\0\0\0\0\0", 14);
        dcp_buf_put_u32(buf, 0);
        dcp_buf_put_u64(buf, 0);
        dcp_buf_put_u16(buf, (uint16_t)name_len);
        dcp_buf_put_u16(buf, (uint16_t)(padding + 4));
        dcp_buf_put(buf, "archive/", 8);
        dcp_buf_put(buf, e->name, strlen(e->name));
        dcp_buf_put(buf, "FB", 2);
        dcp_buf_put_u16(buf, (uint16_t)padding);
        for (size_t k = 0; k < padding; k++) {
            dcp_buf_put_u8(buf, 'Z');
        }
        dcp_buf_put(buf, e->data, e->len);
        dcp_buf_put_u32(buf, ZIP_DESCRIPTOR_SIGNATURE);
        dcp_buf_put_u32(buf, e->crc);
        dcp_buf_put_u64(buf, e->len);
        dcp_buf_put_u64(buf, e->len);
    }
    size_t directory = buf->len - start;
    for (size_t i = 0; i < count; i++) {
        struct record_stock_entry *e = &entries[i];
        dcp_buf_put(buf, "PK\1\2\0\0\0\0\x08\x08\0\0\0\0\0\0", 16);
        dcp_buf_put_u32(buf, e->crc);
        dcp_buf_put_u32(buf, (uint32_t)e->len);
        dcp_buf_put_u32(buf, (uint32_t)e->len);
        dcp_buf_put_u16(buf, (uint16_t)(strlen("archive/") + strlen(e->name)));
        dcp_buf_put(buf, "\0\0\0\0\0\0\0\0\0\0\0\0", 12);
        dcp_buf_put_u32(buf, (uint32_t)e->header_offset);
        dcp_buf_put(buf, "archive/", 8);
        dcp_buf_put(buf, e->name, strlen(e->name));
    }
    size_t end = buf->len - start;
    dcp_buf_put_u32(buf, ZIP64_END_SIGNATURE);
    dcp_buf_put_u64(buf, 44);
    dcp_buf_put(buf, "\x1e\3\x2d\0\0\0\0\0\0\0\0\0", 12);
    dcp_buf_put_u64(buf, count);
    dcp_buf_put_u64(buf, count);
    dcp_buf_put_u64(buf, end - directory);
    dcp_buf_put_u64(buf, directory);
    dcp_buf_put_u32(buf, ZIP64_LOCATOR_SIGNATURE);
    dcp_buf_put_u32(buf, 0);
    dcp_buf_put_u64(buf, end);
    dcp_buf_put_u32(buf, 1);
    dcp_buf_put_u32(buf, ZIP_END_SIGNATURE);
    dcp_buf_put_u32(buf, 0);
    dcp_buf_put_u16(buf, (uint16_t)count);
    dcp_buf_put_u16(buf, (uint16_t)count);
    dcp_buf_put_u32(buf, (uint32_t)(end - directory));
    dcp_buf_put_u32(buf, (uint32_t)directory);
    dcp_buf_put_u16(buf, 0);
}

void
record_make_stock(struct dcp_buf *buf, bool with_crc, const char *byteorder)
{
    static const uint64_t sizes[] = {2, 3};
    static const uint8_t data[24] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    struct dcp_buf pickle = {0};
    dcp_pickle_put_tensor(&pickle, DCP_DTYPE_FLOAT32, 2, sizes);
    struct record_stock_entry entries[] = {
        {.name = "data.pkl", .data = pickle.data, .len = pickle.len},
        {.name = ".format_version", .data = "1", .len = 1},
        {.name = ".storage_alignment", .data = "64", .len = 2},
        {.name = "byteorder", .data = byteorder, .len = strlen(byteorder)},
        {.name = "data/0", .data = data, .len = sizeof data},
        {.name = "version", .data = "3\n", .len = 2},
        {.name = ".data/serialization_id",
         .data = "0636457737946401051300000027264370494161",
         .len = 40},
    };
    record_make_stock_zip(buf, entries, sizeof entries / sizeof entries[0], with_crc);
    dcp_buf_clean_up(&pickle);
}

void
record_make_sample(int which, struct dcp_buf *buf)
{
    static const uint64_t sizes[] = {4, 5};
    struct dcp_error err = {0};
    struct dcp_tensor_shape shape = record_shape(DCP_DTYPE_INT16, 2, sizes);
    struct dcp_buf zip = {0};
    switch (which) {
    case 0:
        record_make(buf, &shape);
        break;
    case 1:
        record_make_stock(buf, true, "little");
        break;
    case 2:
        must(dcp_record_put_object(buf, (const uint8_t *)"\x80\2K\7.", 5, &err) == 0);
        break;
    default:
        record_make_stock(&zip, true, "little");
        must(dcp_record_put_padded(buf, zip.data, zip.len, dcp_record_slot_bytes(zip.len), &err) ==
             0);
        dcp_buf_clean_up(&zip);
    }
}

bool
record_same_geometry(const struct dcp_record_view *a, const struct dcp_record_view *b)
{
    return a->dtype == b->dtype && a->ndim == b->ndim && a->storage_offset == b->storage_offset &&
           a->payload_bytes == b->payload_bytes && a->contiguous == b->contiguous &&
           memcmp(a->sizes, b->sizes, a->ndim * sizeof a->sizes[0]) == 0 &&
           memcmp(a->strides, b->strides, a->ndim * sizeof a->strides[0]) == 0;
}

/*
 * test_record.c: records are written exactly as counted and parsed as written; stock torch's layout
 * is read; objects fill their slots.
 *
 * Real files of torch are compared in the Python tests.
 */
#include "ctest.h"
#include "dcp_crc32.h"
#include "record_maker.h"
#include "zip_format.h"

static uint64_t seed = 77;

static uint64_t
next_random(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return seed >> 24;
}

/* ---- round trips ---- */

static void
every_dtype_and_shape_is_parsed_as_written(void)
{
    static const uint64_t sizes[][5] = {{0},    {0},           {3, 0},          {2, 3, 4}, {70000},
                                        {1, 1}, {255, 256, 3}, {2, 1, 2, 2, 1}, {1100000}};
    static const uint32_t ndims[] = {0, 1, 2, 3, 1, 2, 3, 5, 1};
    for (int dtype = 1; dtype < DCP_DTYPE_QINT8; dtype++) {
        for (int k = 0; k < 9; k++) {
            struct dcp_tensor_shape shape = record_shape(dtype, ndims[k], sizes[k]);
            struct dcp_buf buf = {0};
            struct dcp_error err = {0};
            struct dcp_record_view view;
            record_make(&buf, &shape);
            CHECK_OK(record_parse(buf.data, buf.len, &view, &err), &err);
            CHECK(view.dtype == dtype && view.ndim == shape.ndim && view.storage_offset == 0);
            CHECK(memcmp(view.sizes, sizes[k], shape.ndim * sizeof(uint64_t)) == 0);
            CHECK(view.contiguous && view.has_crc);
            CHECK_EQ(view.payload_bytes, shape.payload_bytes);
            CHECK_EQ(view.payload_offset_bytes, dcp_record_head_bytes(shape.payload_bytes));
            CHECK(view.payload_crc ==
                  dcp_crc32(0, buf.data + view.payload_offset_bytes, view.payload_bytes));
            CHECK_EQ(record_verify(buf.data, buf.len), 0);
            dcp_buf_clean_up(&buf);
        }
    }
}

static void
the_counted_pickle_length_holds_for_any_shape(void)
{
    static const uint64_t steps[] = {0,
                                     1,
                                     2,
                                     255,
                                     256,
                                     65535,
                                     65536,
                                     INT32_MAX,
                                     1ull << 31,
                                     1ull << 32,
                                     (1ull << 39) - 1,
                                     1ull << 39,
                                     1ull << 55};
    for (int round = 0; round < 20000; round++) {
        uint64_t sizes[DCP_MAX_DIMS];
        uint32_t ndim = (uint32_t)(next_random() % (round % 50 == 0 ? DCP_MAX_DIMS + 1 : 6));
        for (uint32_t i = 0; i < ndim; i++) {
            sizes[i] = steps[next_random() % 13];
        }
        int dtype = 1 + (int)(next_random() % (DCP_DTYPE_COUNT - 1));
        struct dcp_buf buf = {0};
        dcp_pickle_put_tensor(&buf, dtype, ndim, sizes); /* asserts the length itself */
        CHECK(buf.data[0] == 0x80 && buf.data[buf.len - 1] == '.');
        dcp_buf_clean_up(&buf);
    }
}

static void
blocks_hold_the_crc_of_every_mebibyte(void)
{
    uint64_t sizes[] = {3 * DCP_BLOCK_BYTES + 5};
    struct dcp_tensor_shape shape = record_shape(DCP_DTYPE_UINT8, 1, sizes);
    struct dcp_buf buf = {0};
    record_make(&buf, &shape);
    struct dcp_error err = {0};
    struct zip_end end;
    CHECK_OK(zip_find_end(buf.data, buf.len, buf.len, &end, &err), &err);
    CHECK_EQ(end.entries_count, 5);
    size_t pos = 0;
    struct zip_entry entry = {0};
    for (uint64_t i = 0; i < end.entries_count; i++) {
        CHECK_OK(zip_next_entry(buf.data + end.directory_offset, &end, &pos, &entry, &err), &err);
    }
    CHECK(entry.name_len == 14 && memcmp(entry.name, "archive/blocks", 14) == 0);
    CHECK_EQ(entry.bytes, 16);
    uint64_t offset = 0;
    CHECK_OK(zip_data_offset(buf.data + entry.header_offset, &end, &entry, &offset, &err), &err);
    struct dcp_cursor c = {.data = buf.data + offset, .len = 16};
    const uint8_t *payload = buf.data + dcp_record_head_bytes(shape.payload_bytes);
    for (int i = 0; i < 4; i++) {
        CHECK(dcp_cursor_u32(&c) ==
              dcp_crc32(0, payload + i * DCP_BLOCK_BYTES, i < 3 ? DCP_BLOCK_BYTES : 5));
    }
    dcp_buf_clean_up(&buf);
}

/* ---- payloads around 4 GiB, whose bytes are never made ---- */

struct sparse {
    struct dcp_buf head, tail, zeros;
    uint64_t payload_bytes;
};

static int
sparse_read(void *ctx, uint64_t offset, size_t len, const uint8_t **ret, struct dcp_error *err)
{
    struct sparse *s = ctx;
    s->zeros.len = 0;
    uint8_t *out = dcp_buf_extend(&s->zeros, len);
    if (out == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "test");
    }
    uint64_t tail_at = s->head.len + s->payload_bytes;
    for (size_t i = 0; i < len; i++) {
        uint64_t at = offset + i;
        out[i] = at < s->head.len ? s->head.data[at]
                 : at < tail_at   ? 0
                                  : s->tail.data[at - tail_at];
    }
    *ret = out;
    return 0;
}

static void
payloads_around_four_gibibytes_are_found(void)
{
    static const uint64_t lengths[] = {(1ull << 32) - 400, (1ull << 32) - 61,   (1ull << 32) - 60,
                                       (1ull << 32) - 2,   (1ull << 32) - 1,    1ull << 32,
                                       (1ull << 32) + 1,   (1ull << 33) + 12345};
    uint32_t *crcs = dcp_calloc(9000, sizeof *crcs);
    for (int i = 0; i < 8; i++) {
        struct sparse s = {.payload_bytes = lengths[i]};
        struct dcp_tensor_shape shape = record_shape(DCP_DTYPE_UINT8, 1, &lengths[i]);
        dcp_record_put_head(&s.head, lengths[i]);
        dcp_record_put_tail(&s.tail, &shape, 0xABCD0000u + (uint32_t)i, crcs);
        CHECK_EQ(s.head.len, dcp_record_head_bytes(lengths[i]));
        CHECK_EQ(s.tail.len, dcp_record_tail_bytes(&shape));
        CHECK_EQ(s.head.len, lengths[i] >= 0xFFFFFFFF ? 64 : 44);
        struct dcp_record_input input = {sparse_read, &s, s.head.len + lengths[i] + s.tail.len};
        struct dcp_record_view view;
        struct dcp_error err = {0};
        CHECK_OK(dcp_record_parse(&input, &view, &err), &err);
        CHECK_EQ(view.payload_bytes, lengths[i]);
        CHECK_EQ(view.payload_offset_bytes, s.head.len);
        CHECK(view.payload_crc == 0xABCD0000u + (uint32_t)i && view.contiguous);
        CHECK_EQ(view.sizes[0], lengths[i]);
        dcp_buf_clean_up(&s.head);
        dcp_buf_clean_up(&s.tail);
        dcp_buf_clean_up(&s.zeros);
    }
    dcp_free(crcs);
}

static void
parsing_reads_little_and_never_the_payload(void)
{
    uint64_t sizes[] = {500000};
    struct dcp_tensor_shape shape = record_shape(DCP_DTYPE_FLOAT32, 1, sizes);
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    struct dcp_record_view view;
    record_make(&buf, &shape);
    struct record_memory m = {.data = buf.data, .len = buf.len};
    struct dcp_record_input input = {record_memory_read, &m, buf.len};
    CHECK_OK(dcp_record_parse(&input, &view, &err), &err);
    CHECK(m.read_bytes < 5000);
    free(m.given);
    dcp_buf_clean_up(&buf);
}

/* ---- stock torch ---- */

static void
the_stock_layout_is_read(void)
{
    for (int with_crc = 0; with_crc < 2; with_crc++) {
        struct dcp_buf buf = {0};
        struct dcp_error err = {0};
        struct dcp_record_view view;
        record_make_stock(&buf, with_crc, "little");
        CHECK_OK(record_parse(buf.data, buf.len, &view, &err), &err);
        CHECK(view.dtype == DCP_DTYPE_FLOAT32 && view.ndim == 2 && view.contiguous);
        CHECK(view.sizes[0] == 2 && view.sizes[1] == 3 && view.payload_bytes == 24);
        CHECK(buf.data[view.payload_offset_bytes + 8] == 9);
        CHECK_EQ(view.payload_offset_bytes % 64, 0);
        CHECK(view.has_crc == (with_crc != 0));
        CHECK_EQ(record_verify(buf.data, buf.len), 0);
        buf.data[view.payload_offset_bytes] ^= 1;
        CHECK_EQ(record_verify(buf.data, buf.len), with_crc ? DCP_E_CHECKSUM : 0);
        dcp_buf_clean_up(&buf);
    }
}

static void
a_comment_and_trailing_bytes_do_not_hide_the_end(void)
{
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    struct dcp_record_view view;
    record_make_stock(&buf, true, "little");
    size_t len = buf.len;
    for (int i = 0; i < 60000; i++) {
        dcp_buf_put_u8(&buf, 0);
    }
    CHECK_OK(record_parse(buf.data, len + 1000, &view, &err), &err);
    buf.data[len - 2] = 60000 & 0xff;
    buf.data[len - 1] = 60000 >> 8;
    CHECK_OK(record_parse(buf.data, buf.len, &view, &err), &err);
    CHECK_EQ(view.payload_bytes, 24);
    CHECK_EQ(record_verify(buf.data, buf.len), 0);
    dcp_buf_clean_up(&buf);
}

/* ---- objects and slots ---- */

static void
slots_hold_their_record_and_grow_by_a_quarter(void)
{
    uint64_t previous = 0;
    for (uint64_t length = 1; length < 1ull << 36; length += 1 + length / 37) {
        uint64_t slot = dcp_record_slot_bytes(length);
        CHECK(slot >= length + 150 && slot >= 512);
        CHECK(slot >= previous);
        CHECK(slot == 512 || slot - slot / 4 < length + 400);
        CHECK_EQ(dcp_record_slot_bytes(length), slot);
        previous = slot;
    }
}

static void
a_padded_record_fills_its_slot_and_keeps_its_entries(void)
{
    for (int which = 0; which < RECORD_SAMPLES; which++) {
        struct dcp_buf zip = {0}, out = {0};
        struct dcp_error err = {0};
        record_make_sample(which, &zip);
        struct dcp_record_view before = {0}, after = {0};
        int rc = record_parse(zip.data, zip.len, &before, &err);
        uint64_t slots[] = {zip.len, dcp_record_slot_bytes(zip.len), 100000, 1 << 20};
        for (int i = 0; i < 4; i++) {
            dcp_buf_clear(&out);
            dcp_buf_put(&out, "xyz", 3);
            dcp_error_clear(&err);
            CHECK_OK(dcp_record_put_padded(&out, zip.data, zip.len, slots[i], &err), &err);
            CHECK_EQ(out.len, 3 + slots[i]);
            CHECK_EQ(record_verify(out.data + 3, slots[i]), 0);
            CHECK_EQ(record_parse(out.data + 3, slots[i], &after, &err), rc);
            CHECK(rc != 0 || (record_same_geometry(&before, &after) &&
                              before.payload_offset_bytes == after.payload_offset_bytes));
            struct zip_end end;
            size_t tail = slots[i] < 60000 ? slots[i] : 60000;
            CHECK_OK(zip_find_end(out.data + 3 + slots[i] - tail, tail, slots[i], &end, &err),
                     &err);
            CHECK(end.directory_offset + 500 + 400 > slots[i]);
        }
        dcp_buf_clear(&out);
        for (uint64_t slot = zip.len - 5; slot < zip.len + 98; slot++) {
            dcp_error_clear(&err);
            rc = dcp_record_put_padded(&out, zip.data, zip.len, slot, &err);
            CHECK_EQ(rc, slot == zip.len ? 0 : DCP_E_LIMIT);
        }
        dcp_buf_clean_up(&zip);
        dcp_buf_clean_up(&out);
    }
}

static void
a_record_without_crcs_stays_without_when_padded(void)
{
    struct dcp_buf zip = {0}, out = {0};
    struct dcp_error err = {0};
    struct dcp_record_view view;
    record_make_stock(&zip, false, "little");
    CHECK_OK(dcp_record_put_padded(&out, zip.data, zip.len, 5000, &err), &err);
    CHECK_OK(record_parse(out.data, out.len, &view, &err), &err);
    CHECK(!view.has_crc);
    CHECK_EQ(record_verify(out.data, out.len), 0);
    dcp_buf_clean_up(&zip);
    dcp_buf_clean_up(&out);
}

static void
no_memory_is_reported_and_nothing_leaks(void)
{
    struct dcp_buf zip = {0}, out = {0};
    struct dcp_error err = {0};
    record_make_stock(&zip, true, "little");
    dcp_alloc_fail_after(1);
    CHECK_EQ(dcp_record_put_padded(&out, zip.data, zip.len, 5000, &err), DCP_E_NOMEM);
    CHECK_EQ(err.code, DCP_E_NOMEM);
    dcp_error_clear(&err);
    dcp_buf_clean_up(&out);
    CHECK_EQ(dcp_record_put_object(&out, (const uint8_t *)"\x80\2K\7.", 5, &err), DCP_E_NOMEM);
    dcp_buf_clean_up(&out);
    static const uint64_t sizes[] = {4, 5};
    struct dcp_tensor_shape shape = record_shape(DCP_DTYPE_INT16, 2, sizes);
    dcp_record_put_head(&out, 40);
    dcp_record_put_tail(&out, &shape, 0, NULL);
    CHECK(out.failed && out.len == 0);
    dcp_alloc_fail_after(0);
    dcp_buf_clean_up(&out);
    dcp_buf_clean_up(&zip);
}

CTEST_MAIN(RUN(every_dtype_and_shape_is_parsed_as_written);
           RUN(the_counted_pickle_length_holds_for_any_shape);
           RUN(blocks_hold_the_crc_of_every_mebibyte);
           RUN(payloads_around_four_gibibytes_are_found);
           RUN(parsing_reads_little_and_never_the_payload); RUN(the_stock_layout_is_read);
           RUN(a_comment_and_trailing_bytes_do_not_hide_the_end);
           RUN(slots_hold_their_record_and_grow_by_a_quarter);
           RUN(a_padded_record_fills_its_slot_and_keeps_its_entries);
           RUN(a_record_without_crcs_stays_without_when_padded);
           RUN(no_memory_is_reported_and_nothing_leaks);)

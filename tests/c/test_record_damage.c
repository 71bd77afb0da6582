/*
 * test_record_damage.c: no damage to a record goes unnoticed or crashes the reader, and what is not
 * one plain tensor is refused by kind.
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

static void
compressed_and_encrypted_entries_are_damage(void)
{
    for (int entry_index = 0; entry_index < 7; entry_index++) {
        for (int kind = 0; kind < 2; kind++) {
            struct dcp_buf buf = {0};
            struct dcp_error err = {0};
            struct dcp_record_view view;
            struct zip_end end;
            struct zip_entry entry;
            record_make_stock(&buf, true, "little");
            CHECK_OK(zip_find_end(buf.data, buf.len, buf.len, &end, &err), &err);
            size_t pos = 0, at = 0;
            for (int i = 0; i <= entry_index; i++) {
                at = end.directory_offset + pos;
                CHECK_OK(zip_next_entry(buf.data + end.directory_offset, &end, &pos, &entry, &err),
                         &err);
            }
            buf.data[at + (kind == 0 ? 10 : 8)] |= kind == 0 ? 8 : 1;
            CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_CORRUPT);
            CHECK_EQ(record_verify(buf.data, buf.len), DCP_E_CORRUPT);
            dcp_buf_clean_up(&buf);
        }
    }
}

static void
what_is_not_one_plain_tensor_is_refused_by_kind(void)
{
    static const uint64_t sizes[] = {2, 3};
    static const uint8_t data[24] = {1};
    struct dcp_buf pickle = {0}, buf = {0};
    struct dcp_error err = {0};
    struct dcp_record_view view;
    dcp_pickle_put_tensor(&pickle, DCP_DTYPE_FLOAT32, 2, sizes);
    struct record_stock_entry entries[] = {
        {.name = "data.pkl", .data = pickle.data, .len = pickle.len},
        {.name = "data/0", .data = data, .len = sizeof data},
        {.name = "data/1", .data = data, .len = sizeof data},
    };
    record_make_stock_zip(&buf, entries, 3, true);
    CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_UNSUPPORTED);
    dcp_buf_clear(&buf);
    record_make_stock_zip(&buf, entries, 1, true);
    CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_UNSUPPORTED);
    dcp_buf_clear(&buf);
    record_make_stock_zip(&buf, entries + 1, 1, true);
    CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_CORRUPT);

    entries[1].len = 23; /* the shape needs 24 */
    dcp_buf_clear(&buf);
    record_make_stock_zip(&buf, entries, 2, true);
    CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_CORRUPT);
    entries[1].len = 24;
    entries[1].name = "data/7"; /* the pickle says 0 */
    dcp_buf_clear(&buf);
    record_make_stock_zip(&buf, entries, 2, true);
    CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_CORRUPT);

    dcp_buf_clear(&buf);
    record_make_stock(&buf, true, "big");
    CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_CORRUPT);
    CHECK(strstr(err.message, "big-endian") != NULL);
    dcp_buf_clear(&buf);
    CHECK_OK(dcp_record_put_object(&buf, (const uint8_t *)"\x80\2K\7.", 5, &err), &err);
    CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_UNSUPPORTED);
    dcp_buf_clean_up(&buf);
    dcp_buf_clean_up(&pickle);
}

/* The directory may point at a header of something else: signature, method and name must agree. */
static void
a_local_header_that_contradicts_the_directory_is_refused(void)
{
    static const size_t offsets[] = {0, 8, 26, 30, 43}; /* signature, method, name length, name */
    for (size_t i = 0; i < sizeof offsets / sizeof offsets[0]; i++) {
        struct dcp_buf buf = {0};
        struct dcp_error err = {0};
        struct dcp_record_view view;
        record_make_sample(0, &buf);
        CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), 0);
        buf.data[offsets[i]] ^= 1;
        CHECK_EQ(record_parse(buf.data, buf.len, &view, &err), DCP_E_CORRUPT);
        CHECK_EQ(record_verify(buf.data, buf.len), DCP_E_CORRUPT);
        dcp_buf_clean_up(&buf);
    }
}

static void
every_truncation_is_an_error(void)
{
    for (int which = 0; which < RECORD_SAMPLES; which++) {
        struct dcp_buf buf = {0}, out = {0};
        record_make_sample(which, &buf);
        for (size_t len = 0; len < buf.len; len++) {
            struct dcp_error err = {0};
            struct dcp_record_view view;
            CHECK(record_parse(buf.data, len, &view, &err) < 0);
            CHECK(record_verify(buf.data, len) < 0);
            dcp_error_clear(&err);
            CHECK(dcp_record_put_padded(&out, buf.data, len, 1 << 16, &err) < 0);
            CHECK_EQ(out.len, 0);
        }
        for (size_t cut = 1; cut < buf.len; cut++) {
            struct dcp_error err = {0};
            struct dcp_record_view view;
            CHECK(record_parse(buf.data + cut, buf.len - cut, &view, &err) < 0);
            CHECK(record_verify(buf.data + cut, buf.len - cut) < 0);
        }
        dcp_buf_clean_up(&buf);
        dcp_buf_clean_up(&out);
    }
}

/* A flipped record is refused, or still says the same; where it would give other bytes, its CRC
 * does not hold. */
static void
check_flipped(const struct dcp_buf *good, const struct dcp_buf *bad, bool is_tensor,
              const struct dcp_record_view *want)
{
    struct dcp_error err = {0};
    struct dcp_record_view got;
    if (is_tensor && record_parse(bad->data, bad->len, &got, &err) == 0) {
        CHECK(record_same_geometry(want, &got));
        CHECK(got.payload_offset_bytes <= bad->len &&
              got.payload_bytes <= bad->len - got.payload_offset_bytes);
        bool same_bytes = memcmp(good->data + want->payload_offset_bytes,
                                 bad->data + got.payload_offset_bytes, got.payload_bytes) == 0;
        uint32_t crc = dcp_crc32(0, bad->data + got.payload_offset_bytes, got.payload_bytes);
        CHECK(same_bytes || (got.has_crc && crc != got.payload_crc));
        CHECK(same_bytes || record_verify(bad->data, bad->len) < 0);
    } else if (!is_tensor) {
        CHECK(record_parse(bad->data, bad->len, &got, &err) < 0);
    }
    (void)record_verify(bad->data, bad->len);
    struct dcp_buf out = {0};
    dcp_error_clear(&err);
    if (dcp_record_put_padded(&out, bad->data, bad->len, 1 << 14, &err) == 0) {
        CHECK_EQ(out.len, 1 << 14);
    }
    dcp_buf_clean_up(&out);
}

static void
no_flipped_bit_changes_a_tensor_unnoticed(void)
{
    for (int which = 0; which < RECORD_SAMPLES; which++) {
        struct dcp_buf good = {0}, bad = {0};
        struct dcp_record_view want = {0};
        struct dcp_error err = {0};
        record_make_sample(which, &good);
        bool is_tensor = which != 2;
        CHECK_EQ(record_parse(good.data, good.len, &want, &err), is_tensor ? 0 : DCP_E_UNSUPPORTED);
        dcp_buf_put(&bad, good.data, good.len);
        for (size_t bit = 0; bit < good.len * 8; bit++) {
            bad.data[bit / 8] ^= (uint8_t)(1 << bit % 8);
            check_flipped(&good, &bad, is_tensor, &want);
            bad.data[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        for (int round = 0; round < 3000; round++) {
            memcpy(bad.data, good.data, good.len);
            for (uint64_t n = 2 + next_random() % 6; n > 0; n--) {
                /* Half of the flips go to the directory, the richest part. */
                size_t span = round % 2 == 0 ? good.len : good.len < 400 ? good.len : 400;
                bad.data[good.len - 1 - next_random() % span] ^= (uint8_t)(1 << next_random() % 8);
            }
            check_flipped(&good, &bad, is_tensor, &want);
        }
        dcp_buf_clean_up(&good);
        dcp_buf_clean_up(&bad);
    }
}

CTEST_MAIN(RUN(compressed_and_encrypted_entries_are_damage);
           RUN(what_is_not_one_plain_tensor_is_refused_by_kind);
           RUN(a_local_header_that_contradicts_the_directory_is_refused);
           RUN(every_truncation_is_an_error); RUN(no_flipped_bit_changes_a_tensor_unnoticed);)

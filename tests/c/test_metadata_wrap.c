/*
 * test_metadata_wrap.c: a planner's own pickle inside a `.metadata` of ours: not a byte of it
 * changes, whatever it is, and readers know whose it is.
 */
#include "ctest.h"

#include "dcp_crc32.h"
#include "metadata_maker.h"
#include "metadata_private.h"
#include "plan_maker.h"

static const struct dcp_save_id save_id = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}};

/* The pickle of a sample, as Python would have made it; the caller's. */
static void
make_pickle(uint64_t seed, struct dcp_buf *ret)
{
    struct metadata_sample sample;
    struct dcp_metadata_footer footer;
    metadata_sample_make(&sample, seed);
    metadata_sample_image(&sample, ret);
    CHECK(dcp_metadata_footer_parse(ret->data, ret->len, &footer));
    CHECK(!footer.planned_outside);
    ret->len = (size_t)footer.pickle_bytes;
    metadata_sample_clean_up(&sample);
}

static struct dcp_span
span_of(const struct dcp_buf *buf)
{
    return (struct dcp_span){buf->data, buf->len};
}

static void
a_wrapped_pickle_is_read_as_it_says(void)
{
    for (uint64_t seed = 1; seed <= 10; seed++) {
        struct dcp_buf pickle = {0}, image = {0};
        struct dcp_metadata plain, wrapped;
        struct dcp_metadata_footer footer;
        struct dcp_error err = {0};
        make_pickle(seed, &pickle);
        struct dcp_span span = span_of(&pickle);
        dcp_buf_put(&image, "before", 6);
        CHECK_OK(dcp_metadata_wrap(&span, &save_id, &image, &err), &err);
        CHECK(memcmp(image.data, "before", 6) == 0);
        CHECK(memcmp(image.data + 6, pickle.data, pickle.len) == 0);
        CHECK(dcp_metadata_footer_parse(image.data + 6, image.len - 6, &footer));
        CHECK_EQ(footer.pickle_bytes, pickle.len);
        CHECK(footer.index_bytes > 0 && footer.planned_outside);
        CHECK_OK(dcp_metadata_read(image.data + 6, image.len - 6, &wrapped, &err), &err);
        CHECK_OK(dcp_metadata_read(pickle.data, pickle.len, &plain, &err), &err);
        CHECK(metadata_is_same(&plain, &wrapped));
        CHECK(!plain.is_native && !plain.planned_outside);
        CHECK(wrapped.is_native && wrapped.planned_outside);
        CHECK(memcmp(&wrapped.save_id, &save_id, sizeof save_id) == 0);
        dcp_metadata_clean_up(&plain);
        dcp_metadata_clean_up(&wrapped);
        dcp_buf_clean_up(&pickle);
        dcp_buf_clean_up(&image);
    }
}

static void
metadata_of_our_own_is_not_a_planners(void)
{
    struct metadata_sample sample;
    struct dcp_buf image = {0};
    struct dcp_metadata md;
    struct dcp_error err = {0};
    metadata_sample_make(&sample, 4);
    metadata_sample_image(&sample, &image);
    CHECK_OK(dcp_metadata_read(image.data, image.len, &md, &err), &err);
    CHECK(md.is_native && !md.planned_outside);
    dcp_metadata_clean_up(&md);
    dcp_buf_clean_up(&image);
    metadata_sample_clean_up(&sample);
}

/* What no reader of ours understands stays what it is, and keeps the save's name. */
static void
what_only_python_reads_is_wrapped_without_an_index(void)
{
    static const char *const pickles[] = {"", "no pickle at all", "\x80\2cos\nsystem\n(U\2lst.",
                                          "\x80\2}q\0.", "\x80\2N."};
    static const size_t lens[] = {0, 16, 21, 6, 4};
    for (size_t i = 0; i < sizeof lens / sizeof lens[0]; i++) {
        struct dcp_span span = {(const uint8_t *)pickles[i], lens[i]};
        struct dcp_buf image = {0};
        struct dcp_metadata_footer footer;
        struct dcp_metadata md;
        struct dcp_save_id found;
        struct dcp_error err = {0};
        CHECK_OK(dcp_metadata_wrap(&span, &save_id, &image, &err), &err);
        CHECK(dcp_metadata_footer_parse(image.data, image.len, &footer));
        CHECK_EQ(footer.pickle_bytes, lens[i]);
        CHECK_EQ(footer.index_bytes, 0);
        CHECK(lens[i] == 0 || memcmp(image.data, pickles[i], lens[i]) == 0);
        CHECK(dcp_metadata_peek_save_id(image.data, image.len, &found));
        CHECK(memcmp(&found, &save_id, sizeof found) == 0);
        int rc = dcp_metadata_read(image.data, image.len, &md, &err);
        CHECK(rc == DCP_E_CORRUPT || rc == DCP_E_UNSUPPORTED);
        dcp_buf_clean_up(&image);
    }
}

static void
a_pickle_of_any_damage_is_wrapped_all_the_same(void)
{
    struct maker_rng rng = {9};
    struct dcp_buf pickle = {0};
    make_pickle(2, &pickle);
    for (int i = 0; i < 300; i++) {
        size_t len = i % 4 == 0 ? (size_t)maker_below(&rng, pickle.len) : pickle.len;
        uint8_t *exact = malloc(len + (len == 0));
        memcpy(exact, pickle.data, len);
        if (len > 0) {
            exact[maker_below(&rng, len)] ^= (uint8_t)(1 + maker_below(&rng, 255));
        }
        struct dcp_span span = {exact, len};
        struct dcp_buf image = {0};
        struct dcp_metadata md;
        struct dcp_error err = {0};
        CHECK_OK(dcp_metadata_wrap(&span, &save_id, &image, &err), &err);
        CHECK(image.len > len && memcmp(image.data, exact, len) == 0);
        if (dcp_metadata_read(image.data, image.len, &md, &err) == 0) {
            CHECK(md.planned_outside);
            dcp_metadata_clean_up(&md);
        }
        dcp_buf_clean_up(&image);
        free(exact);
    }
    dcp_buf_clean_up(&pickle);
}

static void
every_allocation_may_fail(void)
{
    struct dcp_buf pickle = {0};
    unsigned told = 0;
    make_pickle(3, &pickle);
    for (uint64_t n = 1;; n++) {
        struct dcp_span span = span_of(&pickle);
        struct dcp_buf image = {0};
        struct dcp_error err = {0};
        dcp_alloc_fail_after(n);
        int rc = dcp_metadata_wrap(&span, &save_id, &image, &err);
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || (rc == DCP_E_NOMEM && err.code == rc && err.message[0] != '\0'));
        dcp_buf_clean_up(&image);
        told += rc != 0;
        if (rc == 0) {
            break;
        }
    }
    CHECK(told > 3);
    dcp_buf_clean_up(&pickle);
}

/* Flags of a later version: the footer is not believed, the pickle is. */
static void
a_flag_that_nobody_knows_is_no_footer_of_ours(void)
{
    struct dcp_buf pickle = {0}, image = {0};
    struct dcp_metadata md;
    struct dcp_error err = {0};
    make_pickle(5, &pickle);
    struct dcp_span span = span_of(&pickle);
    CHECK_OK(dcp_metadata_wrap(&span, &save_id, &image, &err), &err);
    uint8_t *footer = image.data + image.len - DCP_METADATA_FOOTER_BYTES;
    footer[11] |= 0x80;
    uint32_t crc = dcp_crc32(0, footer, DCP_METADATA_FOOTER_BYTES - 4);
    for (int i = 0; i < 4; i++) {
        footer[DCP_METADATA_FOOTER_BYTES - 4 + i] = (uint8_t)(crc >> 8 * i);
    }
    CHECK_OK(dcp_metadata_read(image.data, image.len, &md, &err), &err);
    CHECK(!md.is_native);
    dcp_metadata_clean_up(&md);
    dcp_buf_clean_up(&pickle);
    dcp_buf_clean_up(&image);
}

CTEST_MAIN(RUN(a_wrapped_pickle_is_read_as_it_says); RUN(metadata_of_our_own_is_not_a_planners);
           RUN(what_only_python_reads_is_wrapped_without_an_index);
           RUN(a_pickle_of_any_damage_is_wrapped_all_the_same); RUN(every_allocation_may_fail);
           RUN(a_flag_that_nobody_knows_is_no_footer_of_ours);)

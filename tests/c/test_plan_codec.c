/*
 * test_plan_codec.c: a plan survives its image, and no image can hurt the decoder.
 */
#include "ctest.h"
#include "plan_maker.h"

static void
encode(const struct dcp_plan *plan, struct dcp_buf *image)
{
    struct dcp_error err = {0};
    dcp_buf_clear(image);
    CHECK_OK(dcp_plan_encode(plan, image, &err), &err);
}

static bool
same_plan(const struct dcp_plan *a, const struct dcp_plan *b)
{
    struct dcp_hash128 x = dcp_plan_fingerprint(a, 0), y = dcp_plan_fingerprint(b, 0);
    return x.lo == y.lo && x.hi == y.hi && a->dims_count == b->dims_count;
}

static void
random_plans_come_back_equal(void)
{
    struct dcp_buf image = {0};
    for (uint64_t seed = 0; seed < 400; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plan, back = {0};
        struct dcp_error err = {0};
        maker_random_plan(&rng, &plan, (uint32_t)seed, (uint32_t)maker_below(&rng, 60));
        encode(&plan, &image);
        CHECK_OK(dcp_plan_decode(image.data, image.len, &back, &err), &err);
        CHECK(same_plan(&plan, &back));
        dcp_plan_clean_up(&plan);
        dcp_plan_clean_up(&back);
    }
    dcp_buf_clean_up(&image);
}

static void
an_empty_plan_comes_back_empty(void)
{
    struct dcp_plan plan = {0}, back = {0};
    struct dcp_error err = {0};
    struct dcp_buf image = {0};
    encode(&plan, &image);
    CHECK_OK(dcp_plan_decode(image.data, image.len, &back, &err), &err);
    CHECK(same_plan(&plan, &back));
    dcp_buf_clean_up(&image);
    dcp_plan_clean_up(&back);
}

/* Decodes a copy of exactly `len` bytes, so that the sanitizer sees a read behind it. */
static int
decode_copy(const uint8_t *data, size_t len, struct dcp_plan *ret_plan)
{
    struct dcp_error err = {0};
    uint8_t *copy = malloc(len == 0 ? 1 : len);
    memcpy(copy, data, len);
    int rc = dcp_plan_decode(copy, len, ret_plan, &err);
    CHECK(rc == err.code);
    free(copy);
    return rc;
}

static void
every_truncation_is_refused(void)
{
    struct dcp_buf image = {0};
    for (uint64_t seed = 0; seed < 8; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plan, back;
        maker_random_plan(&rng, &plan, 5, 30);
        encode(&plan, &image);
        for (size_t len = 0; len < image.len; len++) {
            CHECK_EQ(decode_copy(image.data, len, &back), DCP_E_CORRUPT);
        }
        dcp_buf_put_u8(&image, 0);
        CHECK_EQ(decode_copy(image.data, image.len, &back), DCP_E_CORRUPT);
        dcp_plan_clean_up(&plan);
    }
    dcp_buf_clean_up(&image);
}

/* What decodes must be a plan that every later step can trust: it encodes, and comes back equal. */
static void
mutations_are_refused_or_decode_to_a_sound_plan(void)
{
    struct dcp_buf image = {0}, again = {0};
    uint32_t accepted = 0, refused = 0;
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plan;
        maker_random_plan(&rng, &plan, 5, 12);
        encode(&plan, &image);
        for (uint32_t round = 0; round < 400; round++) {
            uint8_t *copy = malloc(image.len);
            memcpy(copy, image.data, image.len);
            for (uint64_t n = 1 + maker_below(&rng, 3); n > 0; n--) {
                uint8_t *at = &copy[maker_below(&rng, image.len)];
                uint8_t bit = (uint8_t)(1u << maker_below(&rng, 8));
                *at = (uint8_t)(maker_below(&rng, 2) ? maker_next(&rng) : *at ^ bit);
            }
            struct dcp_plan back = {0}, twice = {0};
            if (decode_copy(copy, image.len, &back) == 0) {
                accepted++;
                encode(&back, &again);
                CHECK_EQ(decode_copy(again.data, again.len, &twice), 0);
                CHECK(same_plan(&back, &twice));
            } else {
                refused++;
            }
            dcp_plan_clean_up(&back);
            dcp_plan_clean_up(&twice);
            free(copy);
        }
        dcp_plan_clean_up(&plan);
    }
    CHECK(accepted > 500 && refused > 500);
    dcp_buf_clean_up(&image);
    dcp_buf_clean_up(&again);
}

/* The head of an image with names of `names_bytes` bytes. */
static void
put_head(struct dcp_buf *image, uint64_t names_count, uint64_t names_bytes, uint64_t items_count)
{
    dcp_buf_clear(image);
    dcp_buf_put(image, "DCPP\2\1", 6);
    dcp_buf_put_u32(image, 0);
    dcp_buf_put_u32(image, 1);
    dcp_buf_put_u32(image, (uint32_t)names_count);
    dcp_buf_put_u32(image, (uint32_t)items_count);
    dcp_buf_put_u64(image, names_bytes);
    dcp_buf_put_u64(image, 0);
}

static void
counts_that_the_input_cannot_hold_are_refused_before_memory_is_taken(void)
{
    struct dcp_buf image = {0};
    struct dcp_plan back;
    const uint32_t counts[] = {2, 1000, 1u << 31, UINT32_MAX};
    const uint64_t lengths[] = {5, 1000, 1ull << 32, UINT64_MAX - 38, UINT64_MAX};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        put_head(&image, counts[i], 4, 0);
        dcp_buf_put(&image, "\0\1a\0", 4);
        dcp_alloc_fail_after(1);
        CHECK_EQ(decode_copy(image.data, image.len, &back), DCP_E_CORRUPT);
        put_head(&image, 0, 0, counts[i]);
        CHECK_EQ(decode_copy(image.data, image.len, &back), DCP_E_CORRUPT);
        dcp_alloc_fail_after(0);
    }
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        put_head(&image, 1, lengths[i], 0);
        dcp_buf_put(&image, "\0\1a\0", 4);
        dcp_alloc_fail_after(1);
        CHECK_EQ(decode_copy(image.data, image.len, &back), DCP_E_CORRUPT);
        dcp_alloc_fail_after(0);
    }
    dcp_buf_clean_up(&image);
}

static void
items_that_lie_are_refused(void)
{
    /* One name "a", then one item: head byte and what follows. */
    static const struct {
        const char *bytes;
        size_t len;
        int code;
    } cases[] = {
        {"\x41\x07\x00\x00", 4, 0},                             /* a 0-d float32 tensor */
        {"\x41\x07\x00\x41", 4, DCP_E_CORRUPT},                 /* 65 dims */
        {"\x41\x20\x00\x00", 4, DCP_E_INVALID},                 /* dtype 32 */
        {"\x41\x00\x00\x00", 4, DCP_E_INVALID},                 /* no dtype, no slot */
        {"\x40\x07\x00\x00", 4, DCP_E_INVALID},                 /* kind 0 */
        {"\x01\x01\x07\x00\x00", 5, DCP_E_CORRUPT},             /* name 1 of 1 */
        {"\x45", 1, DCP_E_CORRUPT},                             /* like the one before: none */
        {"\x4D", 1, DCP_E_CORRUPT},                             /* and its size */
        {"\x49\x07\x00\x00", 4, DCP_E_CORRUPT},                 /* size without type */
        {"\x71\x07\x00\x01\x05", 5, DCP_E_CORRUPT},             /* box mode 3 */
        {"\x52\x07\x00\x01\x05\x01\x00\x02", 8, DCP_E_CORRUPT}, /* cut in dim 1 of 1 */
        {"\x52\x07\x00\x01\x05\x00\x01\x02", 8, 0},             /* cut in dim 0 */
        {"\x43", 1, DCP_E_CORRUPT},                             /* object without a slot */
        {"\xC3\x00", 2, DCP_E_CORRUPT},                         /* slot of 0 */
        {"\xC3\x05", 2, 0},                                     /* object */
        {"\xC7\x05", 2, DCP_E_CORRUPT},                         /* object with a type */
        {"\x41\x07\x00\x02\x80\x80\x80\x80\x80\x80\x80\x80\x40\x10", 14, DCP_E_LIMIT},
    };
    struct dcp_buf image = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct dcp_plan back = {0};
        put_head(&image, 1, 4, 1);
        dcp_buf_put(&image, "\0\1a\0", 4);
        dcp_buf_put(&image, cases[i].bytes, cases[i].len);
        CHECK_EQ(decode_copy(image.data, image.len, &back), cases[i].code);
        dcp_plan_clean_up(&back);
    }
    dcp_buf_clean_up(&image);
}

static void
paths_that_lie_are_refused(void)
{
    /* The name "ab.07" and a path. */
    static const struct {
        const char *bytes;
        size_t len;
        int code;
    } cases[] = {
        {"\1\2\4\4", 4, 0},             /* "ab" "07" */
        {"\1\1\x0A", 3, 0},             /* "ab.07" */
        {"\1\2\4\5", 4, DCP_E_CORRUPT}, /* "ab" 07: not how 7 is written */
        {"\1\2\2\6", 4, DCP_E_CORRUPT}, /* cut where there is no dot */
        {"\1\1\4", 3, DCP_E_CORRUPT},   /* stops early */
        {"\1\2\4\6", 4, DCP_E_CORRUPT}, /* runs over */
        {"\1\0", 2, DCP_E_CORRUPT},     /* no parts */
        {"\2\1\3s\1q", 6, 0},           /* raw: "q" */
        {"\2\2\3s\1q", 6, DCP_E_CORRUPT},
        {"\2\1\3s\2q", 6, DCP_E_CORRUPT},
        {"\2\1\3z\1q", 6, DCP_E_CORRUPT},
        {"\3", 1, DCP_E_CORRUPT},
    };
    struct dcp_buf image = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct dcp_plan back = {0};
        put_head(&image, 1, 7 + cases[i].len, 0);
        dcp_buf_put(&image, "\0\5ab.07", 7);
        dcp_buf_put(&image, cases[i].bytes, cases[i].len);
        CHECK_EQ(decode_copy(image.data, image.len, &back), cases[i].code);
        dcp_plan_clean_up(&back);
    }
    dcp_buf_clean_up(&image);
}

/* A few bytes must not stand for much memory: names and sizes may be left out only up to a limit.
 */
static void
what_an_image_leaves_out_is_bounded(void)
{
    struct dcp_buf image = {0};
    for (uint32_t over = 0; over < 2; over++) {
        struct dcp_plan back = {0};
        char text[300];
        memset(text, 2, sizeof text); /* as text or as sizes */
        put_head(&image, 2, 2 + 1 + sizeof text + 1 + 4, 0);
        dcp_buf_put_varint(&image, 0);
        dcp_buf_put_varint(&image, sizeof text);
        dcp_buf_put(&image, text, sizeof text);
        dcp_buf_put_u8(&image, 0);
        dcp_buf_put_varint(&image, 255 + over);
        dcp_buf_put(&image, "\0\0", 2);
        CHECK_EQ(decode_copy(image.data, image.len, &back), over ? DCP_E_CORRUPT : 0);
        dcp_plan_clean_up(&back);

        uint8_t ndim = (uint8_t)(8 + over);
        put_head(&image, 1, 4, 2);
        dcp_buf_put(&image, "\0\1a\0", 4);
        dcp_buf_put(&image, "\x42\x07\x00", 3);
        dcp_buf_put_u8(&image, ndim);
        dcp_buf_put(&image, text, ndim);
        dcp_buf_put(&image, "\x0E\0", 2); /* a whole shard of name 0 with type and size as before */
        CHECK_EQ(decode_copy(image.data, image.len, &back), over ? DCP_E_CORRUPT : 0);
        dcp_plan_clean_up(&back);
    }
    dcp_buf_clean_up(&image);
}

static void
an_object_without_a_length_is_not_encoded(void)
{
    struct dcp_plan plan = {0};
    struct dcp_buf image = {0};
    struct dcp_error err = {0};
    maker_object(&plan, "step", 0);
    CHECK_EQ(dcp_plan_encode(&plan, &image, &err), DCP_E_INVALID);
    dcp_buf_clean_up(&image);
    dcp_plan_clean_up(&plan);
}

static void
an_fsdp_item_takes_at_most_32_bytes_with_its_name(void)
{
    static const char *const parts[] = {"attention.wq.weight", "attention.wk.weight",
                                        "feed_forward.w1.weight", "ffn_norm.weight"};
    struct dcp_plan plan = {.rank = 37, .thread_count = 1, .single_file_per_rank = true};
    struct dcp_error err = {0};
    for (uint32_t i = 0; i < 320; i++) {
        char fqn[96];
        struct dcp_buf path = {0};
        uint32_t name;
        uint64_t size[] = {8192, 8192}, offsets[] = {37 * 32, 0}, sizes[] = {32, 8192};
        int len = snprintf(fqn, sizeof fqn, "model.layers.%u.%s", i / 4, parts[i % 4]);
        dcp_path_put_str(&path, "model", 5);
        dcp_path_put_str(&path, fqn + 6, (size_t)len - 6);
        CHECK_OK(dcp_plan_add_name(&plan, fqn, (size_t)len, path.data, path.len, 2, &name, &err),
                 &err);
        struct dcp_item item = {.name = name,
                                .kind = DCP_ITEM_SHARD,
                                .dtype = DCP_DTYPE_FLOAT32,
                                .ndim = i % 4 == 3 ? 1 : 2};
        CHECK_OK(dcp_plan_add_item(&plan, &item, size, offsets, sizes, &err), &err);
        dcp_buf_clean_up(&path);
    }
    struct dcp_buf image = {0};
    encode(&plan, &image);
    CHECK(image.len <= 320 * 32);
    dcp_buf_clean_up(&image);
    dcp_plan_clean_up(&plan);
}

static void
running_out_of_memory_is_reported_and_leaks_nothing(void)
{
    struct maker_rng rng = {11};
    struct dcp_plan plan;
    struct dcp_buf image = {0};
    maker_random_plan(&rng, &plan, 0, 200);
    encode(&plan, &image);
    bool succeeded = false;
    for (uint64_t n = 1; !succeeded && n < 200; n++) {
        struct dcp_plan back = {0};
        struct dcp_error err = {0};
        dcp_alloc_fail_after(n);
        int rc = dcp_plan_decode(image.data, image.len, &back, &err);
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        succeeded = rc == 0;
        dcp_plan_clean_up(&back);
    }
    CHECK(succeeded);
    for (uint64_t n = 1; n < 3; n++) {
        struct dcp_buf small = {0};
        struct dcp_error err = {0};
        dcp_alloc_fail_after(n);
        CHECK_EQ(dcp_plan_encode(&plan, &small, &err), DCP_E_NOMEM);
        dcp_alloc_fail_after(0);
        dcp_buf_clean_up(&small);
    }
    dcp_buf_clean_up(&image);
    dcp_plan_clean_up(&plan);
}

CTEST_MAIN(RUN(random_plans_come_back_equal); RUN(an_empty_plan_comes_back_empty);
           RUN(every_truncation_is_refused); RUN(mutations_are_refused_or_decode_to_a_sound_plan);
           RUN(counts_that_the_input_cannot_hold_are_refused_before_memory_is_taken);
           RUN(items_that_lie_are_refused); RUN(paths_that_lie_are_refused);
           RUN(what_an_image_leaves_out_is_bounded); RUN(an_object_without_a_length_is_not_encoded);
           RUN(an_fsdp_item_takes_at_most_32_bytes_with_its_name);
           RUN(running_out_of_memory_is_reported_and_leaks_nothing);)

/*
 * test_safetensors.c: a safetensors header is accepted only when its tensors cover the data; no
 * bytes make the parser crash, hang or leave what it says about them untrue.
 */
#include "ctest.h"

#include "dcp_limits.h"
#include "dcp_safetensors.h"
#include "json.h"
#include "plan_maker.h"

enum { ROUNDS = 40000, MOST_BYTES = 4096 };

static struct dcp_error err;

static void
image_of(struct dcp_buf *buf, const char *json)
{
    dcp_buf_clear(buf);
    dcp_buf_put_u64(buf, strlen(json));
    dcp_buf_put(buf, json, strlen(json));
}

/* What parsing a header gives for a file with `data_bytes` behind it. */
static int
parse(const char *json, uint64_t data_bytes, struct dcp_safetensors_header *ret)
{
    struct dcp_buf buf = {0};
    image_of(&buf, json);
    uint8_t *exact = malloc(buf.len); /* so that a sanitizer sees a read behind its end */
    memcpy(exact, buf.data, buf.len);
    dcp_error_clear(&err);
    int rc = dcp_safetensors_parse(exact, buf.len, buf.len + data_bytes, "f", ret, &err);
    free(exact);
    dcp_buf_clean_up(&buf);
    return rc;
}

static int
code_of(const char *json, uint64_t data_bytes)
{
    struct dcp_safetensors_header header = {0};
    int rc = parse(json, data_bytes, &header);
    dcp_safetensors_header_clean_up(&header);
    return rc;
}

static bool
refuses(const char *json, uint64_t data_bytes, const char *why)
{
    int rc = code_of(json, data_bytes);
    bool said = rc == DCP_E_CORRUPT && strstr(err.message, why) != NULL;
    if (!said) {
        fprintf(stderr, "%s: %d, %s\n", json, rc, rc == 0 ? "accepted" : err.message);
    }
    return said;
}

static void
case_headers_are_read(void)
{
    struct dcp_safetensors_header header = {0};
    const char *json = "{\"__metadata__\":{\"format\":\"pt\",\"\\u00e9\\ud83d\\ude00\":\"a\\n\"},"
                       "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[4,16]},"
                       "\"a\":{\"shape\":[],\"data_offsets\":[0,4],\"dtype\":\"F32\",\"x\":[1,{}]},"
                       "\"c\":{\"dtype\":\"F8_E4M3\",\"shape\":[0,7],\"data_offsets\":[16,16]}}   ";
    CHECK_OK(parse(json, 16, &header), &err);
    CHECK_EQ(header.tensors_count, 3);
    CHECK(header.tensors[0].name_len == 1 && header.tensors[0].name[0] == 'a');
    CHECK_EQ(header.tensors[0].ndim, 0);
    CHECK_EQ(header.tensors[0].dtype, DCP_DTYPE_FLOAT32);
    CHECK_EQ(header.tensors[0].offset_bytes, header.header_bytes);
    CHECK_EQ(header.tensors[1].ndim, 2);
    CHECK_EQ(header.tensors[1].sizes[1], 3);
    CHECK_EQ(header.tensors[1].length_bytes, 12);
    CHECK_EQ(header.tensors[1].dtype, DCP_DTYPE_BFLOAT16);
    CHECK_EQ(header.tensors[2].length_bytes, 0);
    CHECK(header.has_texts && header.texts_count == 2);
    CHECK(header.texts[1].key_len == 6 &&
          memcmp(header.texts[1].key, "\xC3\xA9\xF0\x9F\x98\x80", 6) == 0);
    CHECK(header.texts[1].value_len == 2 && header.texts[1].value[1] == '\n');
    dcp_safetensors_header_clean_up(&header);
    dcp_safetensors_header_clean_up(&header);
    CHECK_EQ(code_of("{}", 0), 0);
    CHECK_EQ(code_of("{\"__metadata__\":null}", 0), 0);
    CHECK_EQ(code_of("{\"q\":{\"dtype\":\"F4\",\"shape\":[3,2],\"data_offsets\":[0,3]}}", 3), 0);
}

#define ONE(dtype, shape, from, to)                                                                \
    "{\"t\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to "]}}"
#define TWO(a, b, c, d)                                                                            \
    "{\"t\":{\"dtype\":\"U8\",\"shape\":[" a "],\"data_offsets\":[" b "]},"                        \
    "\"u\":{\"dtype\":\"U8\",\"shape\":[" c "],\"data_offsets\":[" d "]}}"

static void
case_tensors_must_cover_the_data(void)
{
    CHECK_EQ(code_of(TWO("4", "0,4", "4", "4,8"), 8), 0);
    CHECK_EQ(code_of(TWO("4", "4,8", "4", "0,4"), 8), 0);
    CHECK(refuses(TWO("4", "0,4", "4", "5,9"), 9, "gap"));
    CHECK(refuses(TWO("4", "0,4", "4", "3,7"), 8, "overlap"));
    CHECK(refuses(TWO("4", "0,4", "4", "0,4"), 4, "overlap"));
    CHECK(refuses(TWO("4", "0,4", "4", "4,8"), 9, "belong to none"));
    CHECK(refuses(TWO("4", "0,4", "4", "4,8"), 7, "cut short"));
    CHECK(refuses(ONE("U8", "[4]", 1, 5), 5, "gap"));
    CHECK(refuses("{}", 1, "belong to none"));
    CHECK(refuses("{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                  "\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
                  2, "twice"));
}

static void
case_numbers_that_lie_are_refused(void)
{
    CHECK(refuses(ONE("U8", "[4]", 4, 0), 4, "do not hold"));
    CHECK(refuses(ONE("F32", "[4]", 0, 4), 4, "do not hold"));
    CHECK(refuses(ONE("U8", "[4294967296,4294967296]", 0, 0), 0, "64 bits"));
    CHECK(refuses(ONE("F64", "[2305843009213693952]", 0, 0), 0, "64 bits"));
    CHECK(refuses(ONE("U8", "[9223372036854775808,0]", 0, 0), 0, "63 bits"));
    CHECK(refuses(ONE("U8", "[18446744073709551616]", 0, 0), 0, "64 bits"));
    CHECK(
        refuses(ONE("U8", "[1]", 18446744073709551614, 18446744073709551615), 1, "behind the end"));
    CHECK(refuses(ONE("F4", "[3]", 0, 1), 1, "whole bytes"));
    CHECK(refuses(ONE("F128", "[3]", 0, 1), 1, "dtype"));
    CHECK(refuses(ONE("U8", "[-1]", 0, 1), 1, "whole number"));
    CHECK(refuses(ONE("U8", "[1.0]", 0, 1), 1, "whole number"));
    CHECK(refuses(ONE("U8", "[1e0]", 0, 1), 1, "whole number"));
    CHECK(refuses(ONE("U8", "[01]", 0, 1), 1, "whole number"));
    CHECK(
        refuses("{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, "two numbers"));
    CHECK(refuses("{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}", 1,
                  "two numbers"));
    CHECK(refuses("{\"t\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "missing"));
    CHECK(refuses("{\"t\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1]}}", 1, "twice"));
    struct dcp_buf many = {0};
    static const char start[] = "{\"t\":{\"dtype\":\"U8\",\"data_offsets\":[0,1],\"shape\":[1";
    dcp_buf_put(&many, start, sizeof start - 1);
    for (int i = 0; i < DCP_MAX_DIMS; i++) {
        dcp_buf_put(&many, ",1", 2);
    }
    dcp_buf_put(&many, "]}}", 4);
    CHECK(refuses((char *)many.data, 1, "dimensions"));
    dcp_buf_clean_up(&many);
}

static void
case_what_is_no_json_is_refused(void)
{
    static const char *const bad[] = {
        "",
        " ",
        "{",
        "}",
        "[]",
        "null",
        "{,}",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1}",
        "{\"a\":{},}",
        "{} {}",
        "{}x",
        "{\"__metadata__\":{\"a\":1}}",
        "{\"__metadata__\":{\"a\":\"b\",}}",
        "{\"__metadata__\":[]}",
        "{\"__metadata__\":{},\"__metadata__\":{}}",
        "{\"__metadata__\":{\"a\":\"\\x\"}}",
        "{\"__metadata__\":{\"a\":\"\\ud800\"}}",
        "{\"__metadata__\":{\"a\":\"\\udc00\"}}",
        "{\"__metadata__\":{\"a\":\"\\ud800\\u0041\"}}",
        "{\"__metadata__\":{\"a\":\"\\u12\"}}",
        "{\"__metadata__\":{\"a\":\"\\u12g4\"}}",
        "{\"__metadata__\":{\"a\":\"\n\"}}",
        "{\"__metadata__\":{\"a\":\"",
        "{\"a\\",
        "{\"\\u",
        "{\"t\":{\"x\":[1,]}}",
        "{\"t\":{\"x\":{\"y\"}}}",
        "{\"t\":{\"x\":nul}}",
        "{\"t\":{\"x\":-}}",
        "{\"t\":{\"x\":1.}}",
        "{\"t\":{\"x\":1e}}",
        "{\"t\":{\"x\":00}}",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK(refuses(bad[i], 0, "no whole safetensors file"));
    }
    CHECK(refuses("{\"\xff\":{}}", 0, "UTF-8"));
    CHECK(refuses("{\"\xed\xa0\x80\":{}}", 0, "UTF-8"));
}

static void
case_deep_nesting_ends(void)
{
    struct dcp_buf deep = {0};
    dcp_buf_put(&deep, "{\"t\":{\"x\":", 10);
    for (int i = 0; i < 100000; i++) {
        dcp_buf_put_u8(&deep, '[');
    }
    dcp_buf_put_u8(&deep, 0);
    CHECK(refuses((char *)deep.data, 0, "too deep"));
    dcp_buf_clean_up(&deep);
}

static void
case_lengths_are_compared_with_the_file(void)
{
    struct dcp_safetensors_header header = {0};
    uint8_t prefix[8] = {0};
    uint64_t bytes;
    CHECK_EQ(dcp_safetensors_header_bytes(prefix, 7, "f", &bytes, NULL), DCP_E_CORRUPT);
    CHECK_EQ(dcp_safetensors_header_bytes(prefix, 8, "f", &bytes, NULL), 0);
    CHECK_EQ(bytes, 8);
    prefix[0] = 1;
    CHECK_EQ(dcp_safetensors_header_bytes(prefix, 8, "f", &bytes, NULL), DCP_E_CORRUPT);
    memset(prefix, 0xFF, sizeof prefix);
    CHECK_EQ(dcp_safetensors_header_bytes(prefix, UINT64_MAX, "f", &bytes, NULL), DCP_E_CORRUPT);
    memset(prefix, 0, sizeof prefix);
    prefix[3] = 6; /* 100,663,296 */
    CHECK_EQ(dcp_safetensors_header_bytes(prefix, 1u << 30, "f", &bytes, NULL), DCP_E_CORRUPT);
    uint8_t cut[9] = {2, 0, 0, 0, 0, 0, 0, 0, '{'};
    for (size_t len = 0; len <= sizeof cut; len++) {
        CHECK_EQ(dcp_safetensors_parse(cut, len, 10, "f", &header, NULL), DCP_E_CORRUPT);
    }
}

static void
case_memory_that_runs_out_is_told(void)
{
    const char *json = "{\"__metadata__\":{\"a\":\"b\"}," TWO("4", "0,4", "4", "4,8");
    char text[512];
    snprintf(text, sizeof text, "%s", json);
    char *second = strstr(text + 1, "{\"t\"");
    memmove(second, second + 1, strlen(second));
    CHECK_EQ(code_of(text, 8), 0);
    struct dcp_safetensors_header header = {0};
    struct dcp_buf buf = {0};
    image_of(&buf, text);
    int rc = DCP_E_NOMEM;
    for (uint64_t n = 0; rc != 0 && n < 100; n++) {
        dcp_error_clear(&err);
        dcp_alloc_fail_after(n + 1);
        rc = dcp_safetensors_parse(buf.data, buf.len, buf.len + 8, "f", &header, &err);
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
    }
    CHECK_EQ(rc, 0);
    dcp_safetensors_header_clean_up(&header);
    dcp_buf_clean_up(&buf);
}

/* ---- fuzzing ---- */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Whatever is accepted must be true. */
int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct dcp_safetensors_header header = {0};
    dcp_error_clear(&err);
    int rc = dcp_safetensors_parse(data, size, size, "f", &header, &err);
    if (rc != 0 && rc != DCP_E_CORRUPT) {
        abort();
    }
    uint64_t sum = 0;
    for (uint64_t i = 0; i < header.tensors_count; i++) {
        const struct dcp_safetensor *tensor = &header.tensors[i];
        if (tensor->offset_bytes < header.header_bytes || tensor->offset_bytes > size ||
            tensor->length_bytes > size - tensor->offset_bytes) {
            abort();
        }
        sum += tensor->length_bytes;
    }
    if (rc == 0 && header.header_bytes + sum != size) {
        abort();
    }
    dcp_safetensors_header_clean_up(&header);
    return 0;
}

static void
mutate(struct maker_rng *rng, struct dcp_buf *b)
{
    static const char marks[] = "{}[]\",:\\u0123456789.-eE nt\x80\xff";
    size_t at = (size_t)maker_below(rng, b->len);
    size_t run = 1 + (size_t)maker_below(rng, dcp_min_u64(b->len - at, 24));
    switch (maker_below(rng, 5)) {
    case 0:
        b->data[at] ^= (uint8_t)(1u << maker_below(rng, 8));
        break;
    case 1:
        b->data[at] = (uint8_t)marks[maker_below(rng, sizeof marks - 1)];
        break;
    case 2:
        memmove(b->data + at, b->data + at + run, b->len - at - run);
        b->len -= run;
        break;
    case 3:
        memmove(b->data + maker_below(rng, b->len - run + 1), b->data + at, run);
        break;
    default:
        if (dcp_buf_extend(b, 1) != NULL) {
            memmove(b->data + at + 1, b->data + at, b->len - 1 - at);
            b->data[at] = (uint8_t)marks[maker_below(rng, sizeof marks - 1)];
        }
        break;
    }
}

static void
case_mutated_headers_are_survived(void)
{
    static const char *const seeds[] = {
        TWO("4", "0,4", "4", "4,8"),
        "{\"__metadata__\":{\"format\":\"pt\",\"e\":\"\\u00e9\\ud83d\\ude00\"},"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8],\"x\":[1.5e3,{\"y\":null}]"
        "}}",
        ONE("U8", "[8]", 0, 8),
    };
    struct maker_rng rng = {20260};
    struct dcp_buf b = {0};
    uint64_t accepted = 0;
    for (int round = 0; round < ROUNDS; round++) {
        image_of(&b, seeds[maker_below(&rng, 3)]);
        dcp_buf_put_u64(&b, 0); /* the data */
        for (uint64_t n = maker_below(&rng, 4); n > 0 && b.len > 0; n--) {
            mutate(&rng, &b);
        }
        if (maker_below(&rng, 4) != 0 && b.len >= 16) {
            uint64_t len = b.len - 16;
            memcpy(b.data, &len, sizeof len); /* the header ends where the data begins again */
        }
        uint8_t *exact = malloc(b.len + 1);
        memcpy(exact, b.data, b.len);
        (void)LLVMFuzzerTestOneInput(exact, b.len);
        accepted += err.code == 0 ? 1 : 0;
        free(exact);
    }
    CHECK(accepted > ROUNDS / 10 && accepted < ROUNDS);
    dcp_buf_clean_up(&b);
}

CTEST_MAIN(RUN(case_headers_are_read); RUN(case_tensors_must_cover_the_data);
           RUN(case_numbers_that_lie_are_refused); RUN(case_what_is_no_json_is_refused);
           RUN(case_deep_nesting_ends); RUN(case_lengths_are_compared_with_the_file);
           RUN(case_memory_that_runs_out_is_told); RUN(case_mutated_headers_are_survived);)

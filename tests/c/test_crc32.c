/*
 * test_crc32.c: every implementation gives zlib's numbers, copies exactly, and combines.
 *
 * The reference is the definition, one bit at a time, written here again on purpose.
 */
#include "ctest.h"
#include "dcp_crc32.h"

static const char *const implementations[] = {"portable", "pclmulqdq", "vpclmulqdq",
                                              "vpclmulqdq-512"};
enum { IMPLEMENTATIONS = sizeof implementations / sizeof implementations[0], GUARD = 80 };

static uint64_t seed = 20240601;

static uint64_t
next_random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static uint32_t
reference(uint32_t crc, const uint8_t *data, size_t len)
{
    crc = ~crc;
    for (size_t i = 0; i < len; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1)));
        }
    }
    return ~crc;
}

static uint8_t *
random_bytes(size_t len)
{
    uint8_t *data = dcp_malloc(len + 8);
    for (size_t i = 0; i < len; i += 8) {
        uint64_t v = next_random();
        memcpy(data + i, &v, 8);
    }
    return data;
}

static void
the_known_answer_holds(void)
{
    for (int i = 0; i < IMPLEMENTATIONS; i++) {
        if (dcp_crc32_force(implementations[i])) {
            CHECK(dcp_crc32(0, "123456789", 9) == 0xCBF43926u);
            CHECK(dcp_crc32(0, "", 0) == 0);
            CHECK(dcp_crc32(7, NULL, 0) == 7);
            CHECK(strcmp(dcp_crc32_implementation(), implementations[i]) == 0);
        }
    }
    CHECK(!dcp_crc32_force("no such thing"));
}

/* Lengths 0..2100 cover every path of the loops; offsets every alignment of a vector. */
static void
every_length_and_alignment_agrees_with_the_definition(void)
{
    enum { LONGEST = 2100 };
    uint8_t *data = random_bytes(LONGEST + 64);
    uint8_t *copy = dcp_malloc(LONGEST + 64 + 2 * GUARD);
    for (size_t len = 0; len <= LONGEST; len++) {
        size_t offset = len % 64;
        uint32_t start = (uint32_t)next_random();
        uint32_t want = reference(start, data + offset, len);
        for (int i = 0; i < IMPLEMENTATIONS; i++) {
            if (!dcp_crc32_force(implementations[i])) {
                continue;
            }
            CHECK(dcp_crc32(start, data + offset, len) == want);
            for (int streaming = 0; streaming < 2; streaming++) {
                size_t shift = next_random() % 64;
                memset(copy, 0xA5, LONGEST + 64 + 2 * GUARD);
                uint8_t *dst = copy + GUARD + shift;
                CHECK(dcp_crc32_copy(start, dst, data + offset, len, streaming) == want);
                CHECK(len == 0 || memcmp(dst, data + offset, len) == 0);
                bool clean = true;
                for (size_t g = 1; g <= GUARD; g++) {
                    clean = clean && dst[-(ptrdiff_t)g] == 0xA5;
                    clean = clean && (shift + len + g - 1 >= LONGEST + 64 + GUARD ||
                                      dst[len + g - 1] == 0xA5);
                }
                CHECK(clean);
            }
        }
    }
    dcp_free(data);
    dcp_free(copy);
}

static void
long_inputs_agree_across_implementations(void)
{
    size_t len = (3u << 20) + 77;
    uint8_t *data = random_bytes(len);
    uint8_t *copy = dcp_malloc(len);
    uint32_t want = reference(0, data, len);
    for (int i = 0; i < IMPLEMENTATIONS; i++) {
        if (!dcp_crc32_force(implementations[i])) {
            continue;
        }
        CHECK(dcp_crc32(0, data, len) == want);
        for (int streaming = 0; streaming < 2; streaming++) {
            memset(copy, 0, len);
            CHECK(dcp_crc32_copy(0, copy, data, len, streaming) == want);
            CHECK(memcmp(copy, data, len) == 0);
        }
    }
    dcp_free(data);
    dcp_free(copy);
}

/* Streaming copies take four pages at a time; what is left over goes another way. */
static void
streaming_copies_agree_around_their_steps(void)
{
    enum { STEP = 16384, LONGEST = 2 * STEP + 200 };
    static const size_t around[] = {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 200};
    uint8_t *data = random_bytes(LONGEST + 64);
    uint8_t *copy = dcp_malloc(LONGEST + 64 + GUARD);
    for (size_t c = 0; c < 4 * sizeof around / sizeof around[0]; c++) {
        size_t len = (c % 2 + 1) * STEP + around[c / 4] - (c / 2 % 2) * 2 * around[c / 4] % STEP;
        size_t shift = next_random() % 64, offset = next_random() % 64;
        uint32_t start = (uint32_t)next_random();
        uint32_t want = reference(start, data + offset, len);
        for (int i = 0; i < IMPLEMENTATIONS; i++) {
            if (!dcp_crc32_force(implementations[i])) {
                continue;
            }
            memset(copy, 0xA5, LONGEST + 64 + GUARD);
            CHECK(dcp_crc32_copy(start, copy + shift, data + offset, len, true) == want);
            CHECK(memcmp(copy + shift, data + offset, len) == 0);
            CHECK(copy[shift + len] == 0xA5 && (shift == 0 || copy[shift - 1] == 0xA5));
        }
    }
    dcp_free(data);
    dcp_free(copy);
}

/* Exact blocks on the heap: a read of one byte too many is caught by the address sanitizer. */
static void
no_byte_outside_the_input_is_read(void)
{
    for (size_t len = 1; len < 700; len++) {
        uint8_t *data = malloc(len), *copy = malloc(len);
        memset(data, (int)len, len);
        uint32_t want = reference(0, data, len);
        for (int i = 0; i < IMPLEMENTATIONS; i++) {
            if (dcp_crc32_force(implementations[i])) {
                CHECK(dcp_crc32(0, data, len) == want);
                CHECK(dcp_crc32_copy(0, copy, data, len, len % 2) == want);
            }
        }
        free(data);
        free(copy);
    }
}

static void
pieces_continue_and_combine_to_the_whole(void)
{
    size_t len = 100000;
    uint8_t *data = random_bytes(len);
    uint32_t whole = reference(0, data, len);
    for (int round = 0; round < 200; round++) {
        size_t cut = round < 3 ? (size_t)round : next_random() % (len + 1);
        uint32_t a = dcp_crc32(0, data, cut), b = dcp_crc32(0, data + cut, len - cut);
        CHECK(dcp_crc32_combine(a, b, len - cut) == whole);
        CHECK(dcp_crc32(a, data + cut, len - cut) == whole);
    }
    dcp_free(data);
}

/* Appending 2^60 zero bytes in one step is the same as in two halves, also where the table of
 * powers wraps. */
static void
combination_holds_for_lengths_that_no_test_can_hash(void)
{
    uint32_t crc = 0x12345678;
    for (unsigned bit = 0; bit < 63; bit++) {
        uint64_t half = UINT64_C(1) << bit;
        uint32_t zeros = dcp_crc32_combine(0, 0, half);
        CHECK(zeros == 0);
        uint32_t twice = dcp_crc32_combine(dcp_crc32_combine(crc, 0, half), 0, half);
        CHECK(twice == dcp_crc32_combine(crc, 0, 2 * half));
    }
    uint8_t byte = 0;
    uint32_t crc_zeros = reference(0, &byte, 1);
    uint64_t len = 1;
    uint8_t *zeros = dcp_calloc(1, 1 << 16);
    for (; len <= 1 << 16; len *= 2) {
        CHECK(crc_zeros == reference(0, zeros, len));
        crc_zeros = dcp_crc32_combine(crc_zeros, crc_zeros, len);
    }
    dcp_free(zeros);
}

CTEST_MAIN(RUN(the_known_answer_holds); RUN(every_length_and_alignment_agrees_with_the_definition);
           RUN(long_inputs_agree_across_implementations);
           RUN(streaming_copies_agree_around_their_steps); RUN(no_byte_outside_the_input_is_read);
           RUN(pieces_continue_and_combine_to_the_whole);
           RUN(combination_holds_for_lengths_that_no_test_can_hash);)

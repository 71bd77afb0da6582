/*
 * test_file_frame.c: header, block table and hash table come back as written, and nothing else is
 * taken for them.
 */
#include "ctest.h"
#include "dcp_crc32.h"
#include "dcp_record.h"

static const struct dcp_save_id save_id = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}};

static struct dcp_file_header
sample_header(void)
{
    return (struct dcp_file_header){
        .save_id = save_id,
        .rank = 12,
        .n = 34,
        .length_bytes = 1ull << 40,
        .table_offset_bytes = (1ull << 40) - 4096,
        .table_bytes = 4000,
    };
}

static void
a_header_comes_back_as_written(void)
{
    struct dcp_file_header header = sample_header(), got;
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    dcp_file_put_header(&buf, &header);
    CHECK_EQ(buf.len, DCP_FILE_HEADER_BYTES);
    CHECK_OK(dcp_file_parse_header(buf.data, &got, &err), &err);
    CHECK(memcmp(&got.save_id, &save_id, sizeof save_id) == 0);
    CHECK(got.rank == 12 && got.n == 34 && got.length_bytes == header.length_bytes);
    CHECK(got.table_offset_bytes == header.table_offset_bytes && got.table_bytes == 4000);
    dcp_buf_clean_up(&buf);
}

static void
a_header_tells_where_the_hash_table_is(void)
{
    for (uint64_t slack = 0; slack < 8; slack++) {
        struct dcp_file_header header = sample_header(), got;
        struct dcp_buf plain = {0}, buf = {0};
        struct dcp_error err = {0};
        header.table_bytes = 72;
        header.table_offset_bytes = 8928 - slack;
        header.length_bytes = header.hash_offset_bytes = 9000 - slack;
        dcp_file_put_header(&plain, &header);
        CHECK_OK(dcp_file_parse_header(plain.data, &got, &err), &err);
        CHECK(got.hash_bytes == 0 && got.hash_offset_bytes == header.length_bytes);
        header.hash_offset_bytes = 9000;
        header.hash_bytes = 320;
        header.length_bytes = 9320;
        dcp_file_put_header(&buf, &header);
        CHECK_OK(dcp_file_parse_header(buf.data, &got, &err), &err);
        CHECK_EQ(got.hash_offset_bytes, 9000);
        CHECK_EQ(got.hash_bytes, 320);
        dcp_buf_clean_up(&plain);
        dcp_buf_clean_up(&buf);
    }
}

/* A file without hash table is what it always was: the field that has the flag stays zero. */
static void
a_header_without_hash_table_is_the_old_one(void)
{
    static const uint8_t old[DCP_FILE_HEADER_BYTES] = {
        0x89, 0x44, 0x43, 0x50, 0x01, 0x00, 0x00, 0x00, 0xc3, 0x9b, 0x78, 0xd8, 0x0c,
        0x00, 0x00, 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a,
        0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0x10, 0x22, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0xf0, 0xff, 0xff,
        0xff, 0x00, 0x00, 0x00, 0xa0, 0x0f, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    };
    struct dcp_file_header header = sample_header();
    struct dcp_buf buf = {0};
    dcp_file_put_header(&buf, &header);
    CHECK(memcmp(buf.data, old, sizeof old) == 0);
    dcp_buf_clean_up(&buf);
}

static void
every_flipped_bit_of_a_header_is_noticed(void)
{
    struct dcp_file_header header = sample_header(), got;
    struct dcp_buf buf = {0};
    dcp_file_put_header(&buf, &header);
    for (size_t bit = 0; bit < buf.len * 8; bit++) {
        struct dcp_error err = {0};
        buf.data[bit / 8] ^= (uint8_t)(1 << bit % 8);
        CHECK_EQ(dcp_file_parse_header(buf.data, &got, &err), DCP_E_CORRUPT);
        CHECK(err.code == DCP_E_CORRUPT && err.message[0] != '\0');
        buf.data[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    dcp_buf_clean_up(&buf);
}

static void
a_header_whose_lengths_contradict_is_refused(void)
{
    struct dcp_file_header headers[3] = {sample_header(), sample_header(), sample_header()};
    headers[0].table_bytes = 5000;
    headers[1].table_offset_bytes = UINT64_MAX;
    headers[2].length_bytes = 63;
    headers[2].table_offset_bytes = headers[2].table_bytes = 0;
    for (int i = 0; i < 3; i++) {
        struct dcp_buf buf = {0};
        struct dcp_error err = {0};
        struct dcp_file_header got;
        dcp_file_put_header(&buf, &headers[i]);
        CHECK_EQ(dcp_file_parse_header(buf.data, &got, &err), DCP_E_CORRUPT);
        dcp_buf_clean_up(&buf);
    }
}

/* A sparse file of any length costs its maker nothing: memory for its tables must be earned by the
 * records before them. */
static void
a_header_whose_tables_are_longer_than_its_records_allow_is_refused(void)
{
    static const uint64_t records[] = {64, 5000, 3u << 20, 1ull << 30};
    for (int i = 0; i < 4; i++) {
        uint64_t blocks = records[i] / DCP_BLOCK_BYTES + 1;
        uint64_t most = dcp_block_table_bytes((uint32_t)blocks, 2 * blocks);
        uint64_t most_hashes = dcp_hash_table_bytes((uint32_t)(records[i] / 22 + 1));
        for (int more = 0; more < 3; more++) {
            struct dcp_file_header header = sample_header(), got;
            struct dcp_buf buf = {0};
            struct dcp_error err = {0};
            header.table_offset_bytes = records[i];
            header.table_bytes = most + (more == 1 ? 8 : 0);
            header.hash_bytes = most_hashes + (more == 2 ? 32 : 0);
            header.hash_offset_bytes = header.table_offset_bytes + header.table_bytes;
            header.length_bytes = header.hash_offset_bytes + header.hash_bytes;
            dcp_file_put_header(&buf, &header);
            CHECK_EQ(dcp_file_parse_header(buf.data, &got, &err), more > 0 ? DCP_E_CORRUPT : 0);
            CHECK(more == 0 || strstr(err.message, "longer than its records") != NULL);
            dcp_buf_clean_up(&buf);
        }
    }
}

static void
put_u32(uint8_t *at, uint32_t v)
{
    for (int i = 0; i < 4; i++) {
        at[i] = (uint8_t)(v >> (8 * i));
    }
}

/* Makes the CRC of a header or table right again after an edit. */
static void
sign(uint8_t *bytes, size_t len)
{
    put_u32(bytes + 8, dcp_crc32(dcp_crc32(0, bytes, 8), bytes + 12, len - 12));
}

/* The flag says that there is a hash table, the lengths leave no room for one. */
static void
a_header_whose_hash_table_has_no_room_is_refused(void)
{
    uint64_t lengths[] = {96, 97, 101, 103, 104};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        struct dcp_file_header got, header = {.length_bytes = lengths[i],
                                              .table_offset_bytes = 64,
                                              .table_bytes = i == 0 ? 32 : 33};
        struct dcp_buf buf = {0};
        struct dcp_error err = {0};
        dcp_file_put_header(&buf, &header);
        put_u32(buf.data + 36, 1);
        sign(buf.data, buf.len);
        CHECK_EQ(dcp_file_parse_header(buf.data, &got, &err), DCP_E_CORRUPT);
        dcp_buf_clean_up(&buf);
    }
    struct dcp_file_header got,
        header = {.length_bytes = UINT64_MAX, .table_offset_bytes = UINT64_MAX - 3};
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    dcp_file_put_header(&buf, &header);
    put_u32(buf.data + 36, 1);
    sign(buf.data, buf.len);
    CHECK_EQ(dcp_file_parse_header(buf.data, &got, &err), DCP_E_CORRUPT);
    dcp_buf_clean_up(&buf);
}

enum { ENTRIES = 7 };

static void
put_sample_table(struct dcp_buf *buf, struct dcp_block_entry *entries, uint32_t *crcs)
{
    uint64_t offset = 64, blocks_count = 0;
    for (int i = 0; i < ENTRIES; i++) {
        uint64_t payload = (uint64_t)(i + 1) * DCP_BLOCK_BYTES + (uint64_t)i * 777 % 1000;
        uint64_t blocks = (payload + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
        entries[i] = (struct dcp_block_entry){offset, payload, 0xC0DE0000u + (uint32_t)i,
                                              crcs + blocks_count};
        for (uint64_t k = 0; k < blocks; k++) {
            crcs[blocks_count++] = (uint32_t)(k * 2654435761u + (uint32_t)i);
        }
        offset += payload + 5000;
    }
    dcp_block_table_put(buf, &save_id, entries, ENTRIES);
    CHECK_EQ(buf->len, dcp_block_table_bytes(ENTRIES, blocks_count));
    CHECK_EQ(buf->len % 8, 0);
}

static void
a_table_comes_back_as_written_and_finds_by_offset(void)
{
    struct dcp_block_entry entries[ENTRIES];
    uint32_t crcs[100];
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    struct dcp_block_table table;
    put_sample_table(&buf, entries, crcs);
    CHECK_OK(dcp_block_table_parse(buf.data, buf.len, &save_id, &table, &err), &err);
    CHECK_EQ(table.entries_count, ENTRIES);
    for (int i = 0; i < ENTRIES; i++) {
        uint64_t offset = entries[i].payload_offset_bytes;
        const struct dcp_block_entry *found = dcp_block_table_find(&table, offset);
        CHECK(found != NULL && found->payload_bytes == entries[i].payload_bytes);
        CHECK(found->payload_crc == entries[i].payload_crc);
        uint64_t blocks = (found->payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
        CHECK(memcmp(found->block_crcs, entries[i].block_crcs, blocks * 4) == 0);
        CHECK(dcp_block_table_find(&table, offset + 1) == NULL);
        CHECK(dcp_block_table_find(&table, offset - 1) == NULL);
    }
    dcp_block_table_clean_up(&table);
    dcp_block_table_clean_up(&table);
    CHECK(dcp_block_table_find(&table, 64) == NULL);
    dcp_buf_clean_up(&buf);
}

static void
an_empty_table_is_a_table(void)
{
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    struct dcp_block_table table;
    dcp_block_table_put(&buf, &save_id, NULL, 0);
    CHECK_EQ(buf.len, dcp_block_table_bytes(0, 0));
    CHECK_OK(dcp_block_table_parse(buf.data, buf.len, &save_id, &table, &err), &err);
    CHECK_EQ(table.entries_count, 0);
    CHECK(dcp_block_table_find(&table, 0) == NULL);
    dcp_block_table_clean_up(&table);
    dcp_buf_clean_up(&buf);
}

/* Of either table; a table that was parsed is given up. */
typedef int (*parse_fn)(const uint8_t *bytes, size_t len, const struct dcp_save_id *id,
                        struct dcp_error *err);

static int
parse_blocks(const uint8_t *bytes, size_t len, const struct dcp_save_id *id, struct dcp_error *err)
{
    struct dcp_block_table table = {0};
    int rc = dcp_block_table_parse(bytes, len, id, &table, err);
    dcp_block_table_clean_up(&table);
    return rc;
}

static int
parse_hashes(const uint8_t *bytes, size_t len, const struct dcp_save_id *id, struct dcp_error *err)
{
    struct dcp_hash_table table = {0};
    int rc = dcp_hash_table_parse(bytes, len, id, &table, err);
    dcp_hash_table_clean_up(&table);
    return rc;
}

static void
check_damage_is_refused(struct dcp_buf *buf, parse_fn parse)
{
    for (size_t len = 0; len < buf->len; len++) {
        struct dcp_error err = {0};
        uint8_t *exact = malloc(len + (len == 0));
        memcpy(exact, buf->data, len);
        CHECK_EQ(parse(exact, len, &save_id, &err), DCP_E_CORRUPT);
        free(exact);
    }
    for (size_t bit = 0; bit < buf->len * 8; bit++) {
        struct dcp_error err = {0};
        buf->data[bit / 8] ^= (uint8_t)(1 << bit % 8);
        CHECK_EQ(parse(buf->data, buf->len, &save_id, &err), DCP_E_CORRUPT);
        buf->data[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    struct dcp_error err = {0};
    struct dcp_save_id other = save_id;
    other.bytes[15] ^= 1;
    CHECK_EQ(parse(buf->data, buf->len, &other, &err), DCP_E_CORRUPT);
    CHECK(strstr(err.message, "another save") != NULL);
}

static void
damaged_or_foreign_tables_are_refused(void)
{
    struct dcp_block_entry entries[ENTRIES];
    uint32_t crcs[100];
    struct dcp_buf buf = {0};
    put_sample_table(&buf, entries, crcs);
    check_damage_is_refused(&buf, parse_blocks);
    dcp_buf_clean_up(&buf);
}

static void
a_table_with_contradicting_entries_is_refused_though_its_crc_holds(void)
{
    uint32_t crcs[8] = {0};
    struct dcp_block_entry beyond[1] = {{UINT64_MAX - 5, 2 * DCP_BLOCK_BYTES, 0, crcs}};
    struct dcp_block_entry overlapping[2] = {{64, 2 * DCP_BLOCK_BYTES, 0, crcs},
                                             {65, 2 * DCP_BLOCK_BYTES, 0, crcs}};
    for (int i = 0; i < 2; i++) {
        struct dcp_buf buf = {0};
        struct dcp_error err = {0};
        struct dcp_block_table table;
        dcp_block_table_put(&buf, &save_id, i == 0 ? beyond : overlapping, i == 0 ? 1 : 2);
        CHECK_EQ(dcp_block_table_parse(buf.data, buf.len, &save_id, &table, &err), DCP_E_CORRUPT);
        dcp_buf_clean_up(&buf);
    }
}

static void
no_memory_is_reported_and_nothing_leaks(void)
{
    struct dcp_block_entry entries[ENTRIES];
    uint32_t crcs[100];
    struct dcp_buf buf = {0};
    struct dcp_block_table table;
    put_sample_table(&buf, entries, crcs);
    for (uint64_t n = 1; n <= 2; n++) {
        struct dcp_error err = {0};
        dcp_alloc_fail_after(n);
        CHECK_EQ(dcp_block_table_parse(buf.data, buf.len, &save_id, &table, &err), DCP_E_NOMEM);
        dcp_alloc_fail_after(0);
    }
    dcp_buf_clean_up(&buf);
}

/* ---- hash table ---- */

static void
put_sample_hashes(struct dcp_buf *buf, struct dcp_hash_entry entries[ENTRIES])
{
    uint64_t offset = DCP_FILE_HEADER_BYTES;
    for (uint32_t i = 0; i < ENTRIES; i++) {
        entries[i] = (struct dcp_hash_entry){offset, 600 + 1000 * i, dcp_hash128(&i, 4, 1)};
        offset += entries[i].record_bytes + (i % 3) * 4096;
    }
    dcp_hash_table_put(buf, &save_id, entries, ENTRIES);
    CHECK_EQ(buf->len, dcp_hash_table_bytes(ENTRIES));
    CHECK_EQ(buf->len % 8, 0);
}

static void
hashes_come_back_as_written_and_are_found_by_offset(void)
{
    struct dcp_hash_entry entries[ENTRIES];
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    struct dcp_hash_table table;
    put_sample_hashes(&buf, entries);
    CHECK_OK(dcp_hash_table_parse(buf.data, buf.len, &save_id, &table, &err), &err);
    CHECK_EQ(table.entries_count, ENTRIES);
    for (int i = 0; i < ENTRIES; i++) {
        uint64_t offset = entries[i].record_offset_bytes;
        const struct dcp_hash_entry *found = dcp_hash_table_find(&table, offset);
        CHECK(found != NULL && found->record_bytes == entries[i].record_bytes);
        CHECK(found != NULL && dcp_hash128_equal(found->hash, entries[i].hash));
        CHECK(dcp_hash_table_find(&table, offset + 1) == NULL);
        CHECK(dcp_hash_table_find(&table, offset - 1) == NULL);
    }
    dcp_hash_table_clean_up(&table);
    dcp_hash_table_clean_up(&table);
    dcp_hash_table_clean_up(NULL);
    CHECK(dcp_hash_table_find(&table, 64) == NULL);
    dcp_buf_clean_up(&buf);
    dcp_hash_table_put(&buf, &save_id, NULL, 0);
    CHECK(buf.len == 0 && dcp_hash_table_bytes(0) == 0);
    CHECK_EQ(dcp_hash_table_bytes(UINT32_MAX), 32 + 32ull * UINT32_MAX);
    dcp_buf_clean_up(&buf);
}

static void
damaged_or_foreign_hashes_are_refused(void)
{
    struct dcp_hash_entry entries[ENTRIES];
    struct dcp_buf buf = {0};
    struct dcp_hash_table table;
    put_sample_hashes(&buf, entries);
    check_damage_is_refused(&buf, parse_hashes);
    struct dcp_error err = {0};
    dcp_alloc_fail_after(1);
    CHECK_EQ(dcp_hash_table_parse(buf.data, buf.len, &save_id, &table, &err), DCP_E_NOMEM);
    dcp_alloc_fail_after(0);
    dcp_buf_clean_up(&buf);
}

static void
hashes_of_impossible_records_are_refused_though_the_crc_holds(void)
{
    static const struct dcp_hash_entry cases[][2] = {
        {{DCP_FILE_HEADER_BYTES - 1, 600, {1, 2}}, {2000, 600, {1, 2}}}, /* in the header */
        {{64, 600, {1, 2}}, {663, 600, {1, 2}}},                         /* overlapping */
        {{64, 0, {1, 2}}, {2000, 600, {1, 2}}},                          /* empty */
        {{64, 600, {1, 2}}, {UINT64_MAX - 5, 600, {1, 2}}},              /* past the end of time */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct dcp_buf buf = {0};
        struct dcp_error err = {0};
        struct dcp_hash_table table;
        dcp_hash_table_put(&buf, &save_id, cases[i], 2);
        CHECK_EQ(dcp_hash_table_parse(buf.data, buf.len, &save_id, &table, &err), DCP_E_CORRUPT);
        dcp_buf_clean_up(&buf);
    }
}

/* Any bytes at all behind a right magic and CRC: refused, or a table that keeps its promises. */
static void
random_hash_tables_do_no_harm(void)
{
    uint64_t seed = 77;
    int parsed = 0;
    for (int trial = 0; trial < 20000; trial++) {
        struct dcp_hash_entry entries[ENTRIES];
        struct dcp_buf buf = {0};
        struct dcp_error err = {0};
        struct dcp_hash_table table;
        put_sample_hashes(&buf, entries);
        for (int edits = trial % 4; edits >= 0; edits--) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            buf.data[12 + (seed >> 33) % (buf.len - 12)] ^= (uint8_t)(1 << (seed >> 60) % 8);
        }
        sign(buf.data, buf.len);
        if (dcp_hash_table_parse(buf.data, buf.len, &save_id, &table, &err) == 0) {
            parsed++;
            CHECK_EQ(dcp_hash_table_bytes(table.entries_count), buf.len);
            for (uint32_t i = 1; i < table.entries_count; i++) {
                CHECK(table.entries[i - 1].record_offset_bytes +
                          table.entries[i - 1].record_bytes <=
                      table.entries[i].record_offset_bytes);
            }
            dcp_hash_table_clean_up(&table);
        }
        dcp_buf_clean_up(&buf);
    }
    CHECK(parsed > 1000 && parsed < 19000);
}

CTEST_MAIN(RUN(a_header_comes_back_as_written); RUN(a_header_tells_where_the_hash_table_is);
           RUN(a_header_without_hash_table_is_the_old_one);
           RUN(a_header_whose_hash_table_has_no_room_is_refused);
           RUN(every_flipped_bit_of_a_header_is_noticed);
           RUN(a_header_whose_lengths_contradict_is_refused);
           RUN(a_header_whose_tables_are_longer_than_its_records_allow_is_refused);
           RUN(a_table_comes_back_as_written_and_finds_by_offset); RUN(an_empty_table_is_a_table);
           RUN(damaged_or_foreign_tables_are_refused);
           RUN(a_table_with_contradicting_entries_is_refused_though_its_crc_holds);
           RUN(no_memory_is_reported_and_nothing_leaks);
           RUN(hashes_come_back_as_written_and_are_found_by_offset);
           RUN(damaged_or_foreign_hashes_are_refused);
           RUN(hashes_of_impossible_records_are_refused_though_the_crc_holds);
           RUN(random_hash_tables_do_no_harm);)

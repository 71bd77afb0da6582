/*
 * test_archive_zip64.c: archives beyond what 32 and 16 bits can say: an entry of more than 4 GiB,
 * entries behind it, more of them than the plain end record can count.
 *
 * No disk holds these files: what is written to them is zeros but for a few pages, which are kept.
 */
#include "ctest.h"

#include <sys/mman.h>

#include "archive_zip.h"
#include "dcp_crc32.h"
#include "io_memory.h"
#include "le_bytes.h"
#include "zip_format.h"

#define GIB (UINT64_C(1) << 30)
#define FOLDER "archive"
#define DIR "/d"

enum { PAGE_BYTES = 4096, MOST_PAGES = 256 };

/* ---- a file of which only pages that are not zero are kept ---- */

static struct {
    uint64_t at[MOST_PAGES];
    uint8_t *pages[MOST_PAGES];
    uint32_t count;
    uint64_t length_bytes;
    bool too_many;
} sink;

static uint8_t *
sink_page(uint64_t at, bool make)
{
    for (uint32_t i = 0; i < sink.count; i++) {
        if (sink.at[i] == at) {
            return sink.pages[i];
        }
    }
    if (!make || sink.count == MOST_PAGES) {
        sink.too_many = sink.too_many || make;
        return NULL;
    }
    sink.at[sink.count] = at;
    sink.pages[sink.count] = calloc(1, PAGE_BYTES);
    return sink.pages[sink.count++];
}

static ssize_t
sink_pwrite(void *ctx, int fd, const void *bytes, size_t len, uint64_t offset)
{
    static const uint8_t zeros[PAGE_BYTES];
    (void)ctx;
    (void)fd;
    for (size_t done = 0; done < len;) {
        uint64_t page = (offset + done) / PAGE_BYTES, in_page = (offset + done) % PAGE_BYTES;
        size_t n = (size_t)dcp_min_u64(PAGE_BYTES - in_page, len - done);
        if (memcmp((const uint8_t *)bytes + done, zeros, n) != 0) {
            uint8_t *kept = sink_page(page * PAGE_BYTES, true);
            if (kept != NULL) {
                memcpy(kept + in_page, (const uint8_t *)bytes + done, n);
            }
        }
        done += n;
    }
    sink.length_bytes = offset + len > sink.length_bytes ? offset + len : sink.length_bytes;
    return (ssize_t)len;
}

static int
sink_resize(void *ctx, int fd, uint64_t len)
{
    (void)ctx;
    (void)fd;
    sink.length_bytes = len;
    return 0;
}

static int
sink_reserve(void *ctx, int fd, uint64_t offset, uint64_t len)
{
    (void)ctx;
    (void)fd;
    (void)offset;
    (void)len;
    return 0;
}

static void
sink_read(uint64_t offset, uint8_t *ret, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        const uint8_t *page = sink_page((offset + i) / PAGE_BYTES * PAGE_BYTES, false);
        ret[i] = page == NULL ? 0 : page[(offset + i) % PAGE_BYTES];
    }
}

static void
sink_clean_up(void)
{
    for (uint32_t i = 0; i < sink.count; i++) {
        free(sink.pages[i]);
    }
    memset(&sink, 0, sizeof sink);
}

/* Whether the file has exactly these bytes there; empties `want`. */
static bool
sink_has(uint64_t offset, struct dcp_buf *want)
{
    uint8_t *got = malloc(want->len + 1);
    sink_read(offset, got, want->len);
    bool same = offset + want->len <= sink.length_bytes && memcmp(got, want->data, want->len) == 0;
    free(got);
    dcp_buf_clear(want);
    return same;
}

/* ---- archives of entries in memory ---- */

static struct dcp_archive_entry
entry_of(const char *name, const uint8_t *data, uint64_t bytes)
{
    return (struct dcp_archive_entry){
        .name = {(const uint8_t *)name, strlen(name)}, .bytes = bytes, .data = data};
}

static int
never_fetch(void *ctx, uint64_t entry, const uint8_t **ret_data, struct dcp_error *err)
{
    (void)ctx;
    (void)ret_data;
    return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "entry %llu is in memory",
                         (unsigned long long)entry);
}

static int
write_entries(const struct dcp_io *io, const struct dcp_archive_entry *entries, uint64_t count,
              struct dcp_error *err)
{
    struct dcp_engine_options options = {.sync = true};
    struct dcp_archive_params params = {.io = io,
                                        .source_path = DIR,
                                        .target_path = DIR,
                                        .target_name = "f",
                                        .folder = {(const uint8_t *)FOLDER, strlen(FOLDER)},
                                        .align_bytes = 64,
                                        .entries = entries,
                                        .entries_count = count,
                                        .options = &options,
                                        .fetch = never_fetch};
    struct dcp_plan plan = {.rank = 0, .thread_count = 1, .single_file_per_rank = true};
    struct dcp_global_plan global = {0};
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    struct dcp_save_id id = {{1}};
    struct dcp_buf image = {0};
    CHECK_OK(dcp_global_plan_build(&plan, 1, false, &global, err), err);
    CHECK_OK(dcp_metadata_write(&global, &meta, &id, 0, NULL, &image, err), err);
    params.image = (struct dcp_span){image.data, image.len};
    io->mkdirs(io->ctx, DIR);
    int rc = dcp_archive_write(&params, NULL, err);
    dcp_buf_clean_up(&image);
    dcp_global_plan_clean_up(&global);
    dcp_plan_clean_up(&plan);
    return rc;
}

/* ---- what the format says ---- */

struct expected {
    uint64_t header, data;
    uint32_t crc;
};

static void
put_extra_64(struct dcp_buf *buf, bool long_bytes, bool far, uint64_t bytes, uint64_t header)
{
    if (long_bytes || far) {
        dcp_buf_put_u16(buf, 1);
        dcp_buf_put_u16(buf, (uint16_t)((long_bytes ? 16 : 0) + (far ? 8 : 0)));
    }
    if (long_bytes) {
        dcp_buf_put_u64(buf, bytes);
        dcp_buf_put_u64(buf, bytes);
    }
    if (far) {
        dcp_buf_put_u64(buf, header);
    }
}

/* Compares header and descriptor; returns where the next entry begins. */
static uint64_t
check_entry(const struct dcp_archive_entry *entry, uint64_t at, struct expected *ret)
{
    struct dcp_buf want = {0};
    bool long_bytes = entry->bytes >= UINT32_MAX, far = at >= UINT32_MAX;
    uint64_t name_len = strlen(FOLDER) + 1 + entry->name.len, pad = 0;
    uint64_t extra = (long_bytes || far ? 4 : 0) + (long_bytes ? 16 : 0) + (far ? 8 : 0);
    while ((at + 30 + name_len + extra + 4 + pad) % 64 != 0) {
        pad++;
    }
    dcp_buf_put(&want, "PK\3\4\0\0", 6);
    dcp_buf_put(&want, entry->bytes > 0 ? "\x08\x08" : "\0\x08", 2);
    for (int i = 0; i < 18; i++) {
        dcp_buf_put_u8(&want, 0);
    }
    dcp_buf_put_u16(&want, (uint16_t)name_len);
    dcp_buf_put_u16(&want, (uint16_t)(extra + 4 + pad));
    dcp_buf_put(&want, FOLDER "/", strlen(FOLDER) + 1);
    dcp_buf_put(&want, entry->name.data, entry->name.len);
    put_extra_64(&want, long_bytes, far, entry->bytes, at);
    dcp_buf_put(&want, "FB", 2);
    dcp_buf_put_u16(&want, (uint16_t)pad);
    for (; pad > 0; pad--) {
        dcp_buf_put_u8(&want, 'Z');
    }
    uint64_t data = at + want.len;
    CHECK(sink_has(at, &want));
    *ret = (struct expected){at, data, dcp_crc32(0, entry->data, entry->bytes)};
    at = data + entry->bytes;
    if (entry->bytes > 0) {
        dcp_buf_put(&want, "PK\7\x08", 4);
        dcp_buf_put_u32(&want, ret->crc);
        for (int i = 0; i < 2; i++) {
            if (extra > 0) {
                dcp_buf_put_u64(&want, entry->bytes);
            } else {
                dcp_buf_put_u32(&want, (uint32_t)entry->bytes);
            }
        }
    }
    uint64_t end = at + want.len;
    CHECK(sink_has(at, &want));
    dcp_buf_clean_up(&want);
    return end;
}

static uint32_t
clip(uint64_t value)
{
    return value >= UINT32_MAX ? UINT32_MAX : (uint32_t)value;
}

static void
check_directory(const struct dcp_archive_entry *entries, const struct expected *places,
                uint16_t count, uint64_t at)
{
    struct dcp_buf want = {0};
    for (uint16_t i = 0; i < count; i++) {
        const struct dcp_archive_entry *entry = &entries[i];
        bool long_bytes = entry->bytes >= UINT32_MAX, far = places[i].header >= UINT32_MAX;
        dcp_buf_put(&want, "PK\1\2\0\0\0\0", 8);
        dcp_buf_put(&want, entry->bytes > 0 ? "\x08\x08" : "\0\x08", 2);
        dcp_buf_put(&want, "\0\0\0\0\0\0", 6);
        dcp_buf_put_u32(&want, places[i].crc);
        dcp_buf_put_u32(&want, clip(entry->bytes));
        dcp_buf_put_u32(&want, clip(entry->bytes));
        dcp_buf_put_u16(&want, (uint16_t)(strlen(FOLDER) + 1 + entry->name.len));
        dcp_buf_put_u16(
            &want, (uint16_t)((long_bytes || far ? 4 : 0) + (long_bytes ? 16 : 0) + (far ? 8 : 0)));
        dcp_buf_put(&want, "\0\0\0\0\0\0\0\0\0\0", 10);
        dcp_buf_put_u32(&want, clip(places[i].header));
        dcp_buf_put(&want, FOLDER "/", strlen(FOLDER) + 1);
        dcp_buf_put(&want, entry->name.data, entry->name.len);
        put_extra_64(&want, long_bytes, far, entry->bytes, places[i].header);
    }
    uint64_t directory_bytes = want.len;
    dcp_buf_put(&want, "PK\6\6", 4);
    dcp_buf_put_u64(&want, 44);
    CHECK(sink_has(at, &want)); /* four bytes of versions follow, which nobody reads */
    uint64_t end = at + directory_bytes;
    dcp_buf_put_u64(&want, 0); /* disks */
    dcp_buf_put_u64(&want, count);
    dcp_buf_put_u64(&want, count);
    dcp_buf_put_u64(&want, directory_bytes);
    dcp_buf_put_u64(&want, at);
    dcp_buf_put(&want, "PK\6\7\0\0\0\0", 8);
    dcp_buf_put_u64(&want, end);
    dcp_buf_put_u32(&want, 1);
    dcp_buf_put(&want, "PK\5\6\0\0\0\0", 8);
    dcp_buf_put_u16(&want, count);
    dcp_buf_put_u16(&want, count);
    dcp_buf_put_u32(&want, clip(directory_bytes));
    dcp_buf_put_u32(&want, clip(at));
    dcp_buf_put_u16(&want, 0);
    CHECK_EQ(sink.length_bytes, end + 16 + want.len);
    CHECK(sink_has(end + 16, &want));
    dcp_buf_clean_up(&want);
}

static void
case_an_entry_of_more_than_4_gib_and_those_behind_it_are_as_the_format_says(void)
{
    enum { COUNT = 5 };
    const uint64_t long_bytes = 4 * GIB + 4096 + 100;
    struct io_memory *fs = io_memory_new(1);
    struct dcp_io io = io_memory_process(fs, 0)->io;
    struct dcp_error err = {0};
    struct expected places[COUNT];
    uint64_t at = 0;
    uint8_t *data = mmap(NULL, long_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(data != MAP_FAILED);
    memcpy(data + 3 * GIB - 2, "middle", 6);
    memcpy(data + long_bytes - 3, "end", 3);
    io.pwrite = sink_pwrite;
    io.truncate = sink_resize;
    io.fallocate = sink_reserve;
    io.queue_open = NULL;
    const struct dcp_archive_entry entries[COUNT] = {
        entry_of("data.pkl", (const uint8_t *)"\x80\2N.", 4), entry_of("data/0", data, long_bytes),
        entry_of("data/1", (const uint8_t *)"behind", 6), entry_of("nothing", NULL, 0),
        entry_of("version", (const uint8_t *)"3\n", 2)};
    CHECK_OK(write_entries(&io, entries, COUNT, &err), &err);
    CHECK(!sink.too_many);
    for (int i = 0; i < COUNT; i++) {
        at = check_entry(&entries[i], at, &places[i]);
    }
    check_directory(entries, places, COUNT, at);
    uint8_t got[6];
    sink_read(places[1].data + 3 * GIB - 2, got, 6);
    CHECK(memcmp(got, "middle", 6) == 0);
    sink_read(places[1].data + long_bytes - 3, got, 3);
    CHECK(memcmp(got, "end", 3) == 0);
    sink_read(places[2].data, got, 6);
    CHECK(memcmp(got, "behind", 6) == 0);
    munmap(data, long_bytes);
    sink_clean_up();
    CHECK_EQ(io_memory_open_files(fs), 0);
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
case_more_entries_than_16_bits_count_have_a_long_end_record(void)
{
    for (uint64_t count = UINT16_MAX - 1; count <= UINT16_MAX + UINT64_C(1); count++) {
        struct io_memory *fs = io_memory_new(1);
        const struct dcp_io *io = &io_memory_process(fs, 0)->io;
        struct dcp_archive_entry *entries = malloc(count * sizeof *entries);
        struct dcp_error err = {0};
        struct zip_end end;
        struct zip_entry entry;
        size_t len, pos = 0;
        for (uint64_t i = 0; i < count; i++) {
            entries[i] = entry_of("n", NULL, 0);
        }
        CHECK_OK(write_entries(io, entries, count, &err), &err);
        const uint8_t *bytes = io_memory_file(fs, DIR, "f", &len);
        CHECK_OK(zip_find_end(bytes + len - 200, 200, len, &end, &err), &err);
        CHECK_EQ(end.has_64, count >= UINT16_MAX);
        CHECK_EQ(end.entries_count, count);
        for (uint64_t i = 0; i < count; i++) {
            CHECK_OK(zip_next_entry(bytes + end.directory_offset, &end, &pos, &entry, &err), &err);
        }
        CHECK_EQ(pos, end.directory_bytes);
        free(entries);
        CHECK_EQ(io_memory_open_files(fs), 0);
        io_memory_free(fs);
        dcp_engine_trim();
    }
}

/* Lengths at the border of 32 bits, none of which is written. */
static void
case_places_hold_what_their_numbers_need(void)
{
    const uint64_t lengths[] = {0,      1, UINT32_MAX - 1, UINT32_MAX, UINT32_MAX + UINT64_C(1),
                                9 * GIB};
    for (int first = 0; first < 6; first++) {
        for (int second = 0; second < 6; second++) {
            const struct dcp_archive_entry entries[3] = {entry_of("a", NULL, lengths[first]),
                                                         entry_of("bb", NULL, lengths[second]),
                                                         entry_of("c", NULL, 5)};
            struct dcp_archive_params params = {.folder = {(const uint8_t *)FOLDER, 7},
                                                .align_bytes = 64,
                                                .entries = entries,
                                                .entries_count = 3};
            struct archive_place places[3];
            struct dcp_error err = {0};
            struct dcp_buf buf = {0};
            uint64_t end, at = 0;
            CHECK_OK(archive_zip_place(&params, places, &end, &err), &err);
            for (int i = 0; i < 3; i++) {
                places[i].crc = 7;
                CHECK_EQ(places[i].header_offset, at);
                CHECK_EQ(places[i].data_offset % 64, 0);
                archive_zip_put_local(&buf, &params, &entries[i], &places[i]);
                CHECK_EQ(at + buf.len, places[i].data_offset);
                dcp_buf_clear(&buf);
                archive_zip_put_descriptor(&buf, &entries[i], &places[i]);
                at = places[i].data_offset + entries[i].bytes + buf.len;
                dcp_buf_clear(&buf);
            }
            CHECK_EQ(end, at);
            for (int i = 0; i < 3; i++) {
                archive_zip_put_central(&buf, &params, &entries[i], &places[i]);
            }
            archive_zip_put_end(&buf, 3, end, buf.len);
            CHECK_EQ(buf.len, archive_zip_tail_bytes(&params, places, end));
            struct zip_end found;
            CHECK_OK(zip_find_end(buf.data, buf.len, end + buf.len, &found, &err), &err);
            size_t pos = 0;
            for (int i = 0; i < 3; i++) {
                struct zip_entry entry;
                CHECK_OK(zip_next_entry(buf.data, &found, &pos, &entry, &err), &err);
                CHECK_EQ(entry.bytes, entries[i].bytes);
                CHECK_EQ(entry.header_offset, places[i].header_offset);
            }
            dcp_buf_clean_up(&buf);
        }
    }
}

CTEST_MAIN(RUN(case_places_hold_what_their_numbers_need);
           RUN(case_more_entries_than_16_bits_count_have_a_long_end_record);
           RUN(case_an_entry_of_more_than_4_gib_and_those_behind_it_are_as_the_format_says);)

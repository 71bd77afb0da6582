/*
 * test_archive.c: a torch.save file written from a checkpoint: every byte of it, whatever the
 * tensors' ways through the engine, the calls that fail, and the records' damage.
 */
#include "ctest.h"

#include <errno.h>

#include "archive_subject.h"
#include "dcp_crc32.h"

static void
case_the_file_is_what_torch_would_write(void)
{
    for (uint64_t seed = 1; seed <= 30; seed++) {
        struct archive_subject s;
        struct world_options options = {
            .seed = seed, .tensors = 12, .objects = 2, .thread_count = 1 + (uint32_t)seed % 3};
        archive_make(&s, &options);
        s.align_bytes = seed % 3 == 0 ? 1 : seed % 3 == 1 ? 64 : 4096;
        s.options.verify = seed % 2 == 0;
        CHECK_OK(archive_write(&s, "f"), &s.err);
        CHECK(archive_is_right(&s, "f"));
        archive_clean_up(&s);
    }
}

static void
case_rows_of_many_files_are_copied_and_only_the_rest_is_asked_for(void)
{
    for (int i = 0; i < 6; i++) {
        struct archive_subject s;
        archive_make_ways(&s, i >= 4, i % 2 == 0 ? 512 : 0);
        s.options.direct = i % 2 == 0 ? DCP_DIRECT_ON : DCP_DIRECT_OFF;
        struct io_memory_faults *faults = io_memory_faults(s.checkpoint.disk.fs);
        faults->cached_percent = i % 3 == 1 ? 100 : 0;
        faults->short_percent = faults->eintr_percent = i >= 2 ? 30 : 0;
        CHECK_OK(archive_write(&s, "f"), &s.err);
        CHECK(archive_is_right(&s, "f"));
        /* The columns, and the two that no metadata knows. */
        uint64_t columns = s.checkpoint.world.tensors[1].bytes;
        CHECK_EQ(s.fetched_count, 3);
        CHECK_EQ(s.stats.fetched_bytes, columns + 7 + 3);
        uint64_t copied = 0;
        for (uint32_t t = 0; t < s.checkpoint.world.tensors_count; t++) {
            copied += t == 1 ? 0 : s.checkpoint.world.tensors[t].bytes;
        }
        CHECK_EQ(s.stats.read.read_bytes, copied);
        archive_clean_up(&s);
    }
}

static void
case_an_archive_of_nothing_is_an_empty_zip(void)
{
    struct archive_subject s;
    size_t len;
    archive_make_ways(&s, false, 0);
    s.entries_count = 0;
    CHECK_OK(archive_write(&s, "f"), &s.err);
    CHECK(archive_is_right(&s, "f"));
    CHECK(io_memory_file(s.checkpoint.disk.fs, TARGET_DIR, "f", &len) != NULL && len == 22);
    archive_clean_up(&s);
}

static void
case_what_cannot_be_written_is_refused_before_the_file_is_made(void)
{
    static const uint64_t bad_align[] = {0, 3, 65536, UINT64_MAX};
    struct archive_subject s;
    char longest[80];
    archive_make_ways(&s, false, 0);
    for (int i = 0; i < 4; i++) {
        s.align_bytes = bad_align[i];
        CHECK_EQ(archive_write(&s, "f"), DCP_E_INVALID);
    }
    s.align_bytes = 64;
    memset(longest, 'n', sizeof longest);
    longest[79] = '\0';
    CHECK_EQ(archive_write(&s, longest), DCP_E_INVALID);
    s.entries[0].name.len = 5000;
    CHECK_EQ(archive_write(&s, "f"), DCP_E_LIMIT);
    s.entries[0].name.len = 8;
    s.entries[2].bytes = UINT64_MAX - 10;
    CHECK_EQ(archive_write(&s, "f"), DCP_E_LIMIT);
    s.entries[2].bytes = (UINT64_C(1) << 62) - 100;
    CHECK_EQ(archive_write(&s, "f"), DCP_E_LIMIT);
    CHECK_EQ(io_memory_names_count(s.checkpoint.disk.fs, TARGET_DIR), 0);
    archive_list(&s);
    CHECK_OK(archive_write(&s, "f"), &s.err);
    CHECK_EQ(archive_write(&s, "f"), DCP_E_EXISTS);
    CHECK(archive_is_right(&s, "f"));
    archive_clean_up(&s);
}

/* ---- calls that fail ---- */

static void
fail_every_call(int sys_errno, bool large)
{
    unsigned told = 0;
    for (uint64_t n = 1;; n++) {
        struct archive_subject s;
        archive_make_ways(&s, large, n % 2 == 0 ? 512 : 0);
        struct io_memory_faults *faults = io_memory_faults(s.checkpoint.disk.fs);
        faults->no_queue = n % 3 == 0;
        uint64_t before = io_memory_calls(s.checkpoint.disk.fs);
        faults->fail_call = IO_CALLS;
        faults->fail_nth = n;
        faults->fail_errno = sys_errno;
        int rc = archive_write(&s, "f");
        faults->fail_nth = 0;
        uint64_t calls = io_memory_calls(s.checkpoint.disk.fs) - before;
        told += rc != 0;
        /* Some calls only ask for advice; then nothing may be missing. */
        CHECK(rc != 0 || archive_is_right(&s, "f"));
        archive_clean_up(&s);
        if (calls < n) {
            CHECK_EQ(rc, 0);
            break;
        }
    }
    CHECK(told >= 8);
}

static void
case_every_call_may_fail_and_nothing_is_left_open(void)
{
    fail_every_call(EIO, false);
    fail_every_call(ENOSPC, false);
    fail_every_call(EMFILE, false);
    fail_every_call(EIO, true);
}

static void
case_every_allocation_may_fail(void)
{
    unsigned told = 0;
    for (uint64_t n = 1;; n++) {
        struct archive_subject s;
        archive_make_ways(&s, false, 0);
        dcp_alloc_fail_after(n);
        int rc = archive_write(&s, "f");
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        CHECK(rc != 0 || archive_is_right(&s, "f"));
        archive_clean_up(&s);
        told += rc != 0;
        if (rc == 0) {
            break;
        }
    }
    CHECK(told > 10);
}

static void
case_a_full_disk_is_told(void)
{
    struct archive_subject s;
    archive_make_ways(&s, false, 0);
    struct io_memory_faults *faults = io_memory_faults(s.checkpoint.disk.fs);
    for (uint64_t room = 0; room < 1200000; room += 300000) {
        faults->space_bytes = io_memory_used_bytes(s.checkpoint.disk.fs, -1) + room;
        CHECK_EQ(archive_write(&s, "f"), DCP_E_IO);
        CHECK(s.err.sys_errno == ENOSPC);
        faults->space_bytes = UINT64_MAX;
        int dirfd = s.checkpoint.disk.io->open_dir(s.checkpoint.disk.io->ctx, TARGET_DIR);
        s.checkpoint.disk.io->unlink_at(s.checkpoint.disk.io->ctx, dirfd, "f");
        s.checkpoint.disk.io->close(s.checkpoint.disk.io->ctx, dirfd);
    }
    CHECK_OK(archive_write(&s, "f"), &s.err);
    CHECK(archive_is_right(&s, "f"));
    archive_clean_up(&s);
}

static void
case_what_a_fetch_says_ends_the_write(void)
{
    for (uint64_t at = 1; at <= 3; at++) {
        struct archive_subject s;
        archive_make_ways(&s, false, 0);
        s.fetch_fails_at = at;
        CHECK_EQ(archive_write(&s, "f"), DCP_E_CANCELLED);
        CHECK(strcmp(s.err.message, "nobody has them") == 0);
        CHECK_EQ(s.fetched_count, at);
        archive_clean_up(&s);
    }
}

static void
case_a_cancelled_write_ends(void)
{
    struct archive_subject s;
    atomic_int cancel = 1;
    archive_make_ways(&s, true, 0);
    s.options.cancel = &cancel;
    CHECK_EQ(archive_write(&s, "f"), DCP_E_CANCELLED);
    archive_clean_up(&s);
}

/* The file is written beside the old one and takes its name, as format_utils.py does it. */
static int
replace(struct archive_subject *s)
{
    const struct dcp_io *io = s->checkpoint.disk.io;
    int rc = archive_write_from(s, io, &s->checkpoint.image, "part");
    if (rc == 0) {
        int dirfd = io->open_dir(io->ctx, TARGET_DIR);
        rc = dirfd < 0 ? dirfd : io->rename_at(io->ctx, dirfd, "part", "f");
        rc = rc == 0 ? dcp_io_sync(io, dirfd) : rc;
        if (dirfd >= 0) {
            io->close(io->ctx, dirfd);
        }
    }
    return rc;
}

static void
case_a_crash_at_any_call_leaves_the_old_file_or_the_whole_new_one(void)
{
    unsigned old = 0, new = 0;
    for (unsigned power_cut = 0; power_cut < 2; power_cut++) {
        for (uint64_t at = 1;; at++) {
            struct archive_subject s;
            archive_make_ways(&s, false, at % 2 == 0 ? 512 : 0);
            struct io_memory *fs = s.checkpoint.disk.fs;
            io_memory_put_file(fs, TARGET_DIR, "f", "old", 3);
            io_memory_faults(fs)->crash_at = at;
            bool done = replace(&s) == 0;
            io_memory_reboot(fs, power_cut != 0, at);
            size_t len;
            const uint8_t *bytes = io_memory_file(fs, TARGET_DIR, "f", &len);
            bool is_old = bytes != NULL && len == 3 && memcmp(bytes, "old", 3) == 0;
            bool is_new = archive_is_right(&s, "f");
            CHECK(is_old || is_new);
            CHECK(!done || is_new);
            old += is_old;
            new += is_new;
            s.checkpoint.disk.dirfd =
                s.checkpoint.disk.io->open_dir(s.checkpoint.disk.io->ctx, DIR);
            archive_clean_up(&s);
            if (done) {
                break;
            }
        }
    }
    CHECK(old > 10 && new > 1);
}

/* ---- damage ---- */

static uint64_t
file_bytes(const struct archive_subject *s, uint32_t file)
{
    char name[64];
    size_t len;
    world_file_name(&s->checkpoint.world, file, name, sizeof name);
    CHECK(io_memory_file(s->checkpoint.disk.fs, DIR, name, &len) != NULL);
    return len;
}

static void
unlink_target(struct archive_subject *s)
{
    const struct dcp_io *io = s->checkpoint.disk.io;
    int dirfd = io->open_dir(io->ctx, TARGET_DIR);
    io->unlink_at(io->ctx, dirfd, "f");
    io->close(io->ctx, dirfd);
}

static void
case_a_flipped_byte_is_found_or_of_no_matter(void)
{
    struct archive_subject s;
    unsigned found = 0, checksums = 0;
    archive_make_ways(&s, false, 0);
    struct maker_rng rng = {11};
    for (int i = 0; i < 400; i++) {
        uint32_t file = (uint32_t)maker_below(&rng, s.checkpoint.world.layout.files_count);
        uint64_t offset = maker_below(&rng, file_bytes(&s, file));
        offset = i % 2 == 0 ? offset : offset % 4096; /* headers, small records */
        uint8_t flip = (uint8_t)(1 + maker_below(&rng, 255));
        disk_damage(&s.checkpoint.disk, &s.checkpoint.world, file, offset, flip, UINT64_MAX);
        int rc = archive_write(&s, "f");
        CHECK(rc == DCP_E_CHECKSUM || rc == DCP_E_CORRUPT || rc == DCP_E_STALE ||
              (rc == 0 && archive_is_right(&s, "f")));
        found += rc != 0;
        checksums += rc == DCP_E_CHECKSUM;
        CHECK(rc != DCP_E_CHECKSUM ||
              (strstr(s.err.message, "tensor.") != NULL && strstr(s.err.path, ".distcp") != NULL));
        disk_damage(&s.checkpoint.disk, &s.checkpoint.world, file, offset, flip, UINT64_MAX);
        unlink_target(&s);
    }
    CHECK(found > 150 && checksums > 50);
    CHECK_OK(archive_write(&s, "f"), &s.err);
    archive_clean_up(&s);
}

static void
case_without_verify_damaged_elements_are_taken_as_they_are(void)
{
    struct archive_subject s;
    archive_make_ways(&s, false, 0);
    const struct dcp_placed_record *record = NULL;
    for (uint32_t i = 0; i < s.checkpoint.world.layout.records_count; i++) {
        const struct dcp_placed_record *r = &s.checkpoint.world.layout.records[i];
        record = s.checkpoint.world.item_tensor[r->item] == 5 ? r : record;
    }
    disk_damage(&s.checkpoint.disk, &s.checkpoint.world, record->file,
                record->payload_offset_bytes + 9, 1, UINT64_MAX);
    CHECK_EQ(archive_write(&s, "f"), DCP_E_CHECKSUM);
    CHECK_EQ(s.err.offset_bytes, record->payload_offset_bytes);
    CHECK(strstr(s.err.message, "tensor.5") != NULL);
    unlink_target(&s);
    s.options.verify = false;
    CHECK_OK(archive_write(&s, "f"), &s.err);
    s.checkpoint.world.tensors[5].image[9] ^= 1;
    CHECK(archive_is_right(&s, "f")); /* with the CRC of what was taken */
    archive_clean_up(&s);
}

static void
case_a_file_that_is_cut_short_or_gone_is_told(void)
{
    struct archive_subject s;
    archive_make_ways(&s, false, 0);
    uint64_t whole = file_bytes(&s, 0);
    for (uint64_t cut = 0; cut < whole; cut += whole / 40) {
        char name[64];
        size_t len;
        world_file_name(&s.checkpoint.world, 0, name, sizeof name);
        const uint8_t *now = io_memory_file(s.checkpoint.disk.fs, DIR, name, &len);
        uint8_t *kept = malloc(len);
        memcpy(kept, now, len);
        io_memory_put_file(s.checkpoint.disk.fs, DIR, name, kept, cut);
        CHECK_EQ(archive_write(&s, "f"), DCP_E_CORRUPT);
        io_memory_put_file(s.checkpoint.disk.fs, DIR, name, kept, len);
        free(kept);
        unlink_target(&s);
    }
    char name[64];
    world_file_name(&s.checkpoint.world, 1, name, sizeof name);
    s.checkpoint.disk.io->unlink_at(s.checkpoint.disk.io->ctx, s.checkpoint.disk.dirfd, name);
    CHECK_EQ(archive_write(&s, "f"), DCP_E_NOENT);
    archive_clean_up(&s);
}

/* ---- metadata that lies, with checksums that hold ---- */

enum lie {
    LIE_OFFSET_HUGE,
    LIE_OFFSET_NEXT,
    LIE_LENGTH_HUGE,
    LIE_LENGTH_NONE,
    LIE_LENGTH_SHORT,
    LIE_ROWS,
    LIE_ROWS_HUGE,
    LIE_FIRST_ROW,
    LIE_SIZE,
    LIE_DTYPE_LIKE,
    LIE_DTYPE_WIDE,
    LIE_NO_FILE,
    LIE_OTHER_FILE,
    LIE_TRANSFORMS,
    LIES,
};

static void
lie_about(struct dcp_metadata *md, uint64_t entry_index, enum lie lie)
{
    struct dcp_md_entry *entry = &md->entries[entry_index];
    struct dcp_md_chunk *chunk = &md->chunks[entry->first_chunk];
    uint64_t *box = md->dims + chunk->dims;
    switch (lie) {
    case LIE_OFFSET_HUGE:
        chunk->offset_bytes = (UINT64_C(1) << 62) - 1;
        break;
    case LIE_OFFSET_NEXT:
        chunk->offset_bytes++;
        break;
    case LIE_LENGTH_HUGE:
        chunk->length_bytes = UINT64_C(1) << 61;
        break;
    case LIE_LENGTH_NONE:
        chunk->length_bytes = 0;
        break;
    case LIE_LENGTH_SHORT:
        chunk->length_bytes = 21;
        break;
    case LIE_ROWS:
        box[entry->ndim] += entry->ndim > 0;
        break;
    case LIE_ROWS_HUGE:
        box[entry->ndim] = entry->ndim > 0 ? UINT64_C(1) << 60 : box[entry->ndim];
        break;
    case LIE_FIRST_ROW:
        box[0] += entry->ndim > 0;
        break;
    case LIE_SIZE:
        md->dims[entry->size] += entry->ndim > 0;
        break;
    case LIE_DTYPE_LIKE:
        entry->dtype = entry->dtype == DCP_DTYPE_UINT8 ? DCP_DTYPE_INT8 : DCP_DTYPE_INT32;
        break;
    case LIE_DTYPE_WIDE:
        entry->dtype = DCP_DTYPE_COMPLEX128;
        break;
    case LIE_NO_FILE:
        chunk->file = DCP_NO_FILE;
        break;
    case LIE_OTHER_FILE:
        chunk->file = (chunk->file + 1) % md->files_count;
        break;
    default:
        chunk->transforms = 1;
    }
}

/* The image with an index of lies, and a footer that vouches for it. */
static void
make_lying_image(const struct dcp_buf *image, uint64_t entry, enum lie lie, struct dcp_buf *ret)
{
    struct dcp_metadata md;
    struct dcp_metadata_footer footer;
    struct dcp_error err = {0};
    CHECK(dcp_metadata_footer_parse(image->data, image->len, &footer));
    CHECK_OK(dcp_metadata_read(image->data, image->len, &md, &err), &err);
    lie_about(&md, entry, lie);
    dcp_buf_put(ret, image->data, (size_t)footer.pickle_bytes);
    CHECK_OK(dcp_metadata_index_encode(&md, ret, &err), &err);
    footer.index_bytes = ret->len - footer.pickle_bytes;
    footer.index_crc = dcp_crc32(0, ret->data + footer.pickle_bytes, (size_t)footer.index_bytes);
    dcp_metadata_footer_put(ret, &footer);
    dcp_metadata_clean_up(&md);
}

static void
case_metadata_that_lies_leads_to_an_error_or_to_the_loader(void)
{
    struct archive_subject s;
    unsigned refused = 0, asked = 0;
    archive_make_ways(&s, false, 0);
    uint64_t plain_fetches = 3;
    for (uint64_t entry = 0; entry < 6; entry++) {
        for (int lie = 0; lie < LIES; lie++) {
            struct dcp_buf image = {0};
            make_lying_image(&s.checkpoint.image, entry, (enum lie)lie, &image);
            int rc = archive_write_from(&s, s.checkpoint.disk.io, &image, "f");
            /* The loader of this test always has the bytes. */
            CHECK(rc == DCP_E_CORRUPT || rc == DCP_E_CHECKSUM || rc == DCP_E_NOENT ||
                  (rc == 0 && archive_is_right(&s, "f")));
            refused += rc != 0;
            asked += rc == 0 && s.fetched_count > plain_fetches;
            unlink_target(&s);
            dcp_buf_clean_up(&image);
        }
    }
    CHECK(refused > 15 && asked > 15);
    archive_clean_up(&s);
}

static void
case_metadata_of_any_damage_is_refused_or_harmless(void)
{
    struct archive_subject s;
    struct maker_rng rng = {5};
    archive_make_ways(&s, false, 0);
    for (int i = 0; i < 300; i++) {
        struct dcp_buf image = {0};
        dcp_buf_put(&image, s.checkpoint.image.data, s.checkpoint.image.len);
        image.data[maker_below(&rng, image.len)] ^= (uint8_t)(1 + maker_below(&rng, 255));
        image.len = i % 3 == 0 ? maker_below(&rng, image.len) : image.len;
        int rc = archive_write_from(&s, s.checkpoint.disk.io, &image, "f");
        CHECK(rc != 0 || archive_is_right(&s, "f"));
        unlink_target(&s);
        dcp_buf_clean_up(&image);
    }
    archive_clean_up(&s);
}

CTEST_MAIN(RUN(case_the_file_is_what_torch_would_write);
           RUN(case_rows_of_many_files_are_copied_and_only_the_rest_is_asked_for);
           RUN(case_an_archive_of_nothing_is_an_empty_zip);
           RUN(case_what_cannot_be_written_is_refused_before_the_file_is_made);
           RUN(case_every_call_may_fail_and_nothing_is_left_open);
           RUN(case_every_allocation_may_fail); RUN(case_a_full_disk_is_told);
           RUN(case_what_a_fetch_says_ends_the_write); RUN(case_a_cancelled_write_ends);
           RUN(case_a_crash_at_any_call_leaves_the_old_file_or_the_whole_new_one);
           RUN(case_a_flipped_byte_is_found_or_of_no_matter);
           RUN(case_without_verify_damaged_elements_are_taken_as_they_are);
           RUN(case_a_file_that_is_cut_short_or_gone_is_told);
           RUN(case_metadata_that_lies_leads_to_an_error_or_to_the_loader);
           RUN(case_metadata_of_any_damage_is_refused_or_harmless);)

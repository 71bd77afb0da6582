/*
 * test_verify.c: checkpoints that are whole pass, and whatever is wrong with one is named: by
 * tensor, file and byte, without giving up behind the first.
 */
#include "ctest.h"

#include <stdatomic.h>

#include "metadata_private.h"
#include "verify_subject.h"

/* ---- whole ones ---- */

static void
an_intact_checkpoint_passes_and_every_record_is_counted(void)
{
    for (uint64_t seed = 0; seed < 12; seed++) {
        struct world_options options = {.seed = seed,
                                        .tensors = (uint32_t)(seed * 5 % 17),
                                        .objects = (uint32_t)seed % 4,
                                        .thread_count = 1 + (uint32_t)seed % 3,
                                        .file_per_item = seed % 5 == 4,
                                        .large_bytes = seed % 3 == 1 ? 21u << 20 : 0,
                                        .content_hash = seed % 2 == 0};
        struct subject s;
        make(&s, &options);
        struct io_memory_faults *faults = io_memory_faults(s.disk.fs);
        faults->short_percent = seed % 2 == 0 ? 0 : 30;
        faults->eintr_percent = seed % 2 == 0 ? 0 : 20;
        uint64_t records_bytes = 0;
        for (uint32_t r = 0; r < s.world.layout.records_count; r++) {
            records_bytes += s.world.layout.records[r].length_bytes;
        }
        for (int level = DCP_VERIFY_COMPLETE; level <= DCP_VERIFY_FULL; level++) {
            _Atomic uint64_t progress = 0;
            struct dcp_verify_options verify = {
                .level = level, .direct = (enum dcp_direct)(seed % 3), .progress_bytes = &progress};
            struct dcp_verify_result result;
            struct dcp_error err;
            CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
            CHECK_EQ(result.problems_found, 0);
            if (result.problems_found > 0) {
                fprintf(stderr, "%s: %s\n", result.problems[0].tensor, result.problems[0].what);
            }
            bool full = level == DCP_VERIFY_FULL;
            CHECK(result.is_native);
            CHECK(memcmp(&result.save_id, &s.world.save_id, sizeof result.save_id) == 0);
            CHECK_EQ(result.records_count, s.world.plan.items_count);
            CHECK_EQ(result.checked_bytes, full ? records_bytes : 0);
            CHECK_EQ(progress, full ? records_bytes : 0);
            CHECK_EQ(result.unverified_bytes, 0);
            CHECK_EQ(result.unreferenced_files_count + result.claims_count, 0);
            CHECK(!full || verify.direct != DCP_DIRECT_ON ||
                  result.direct_files_count == result.files_count);
            dcp_verify_result_clean_up(&result);
        }
        clean_up(&s);
    }
}

static void
large_tensors_are_read_once_and_in_32_mib(void)
{
    struct subject s;
    struct world_options options = {
        .seed = 2, .tensors = 3, .thread_count = 1, .large_bytes = 70u << 20};
    make(&s, &options);
    for (int direct = DCP_DIRECT_OFF; direct <= DCP_DIRECT_ON; direct++) {
        struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL,
                                            .direct = (enum dcp_direct)direct};
        struct dcp_verify_result result;
        struct dcp_error err;
        dcp_engine_trim();
        uint64_t live = dcp_alloc_live_bytes();
        CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
        CHECK_EQ(result.problems_found, 0);
        CHECK(result.read_bytes < result.file_bytes + (1u << 20));
        /* The ring is kept for the next one. */
        CHECK(dcp_alloc_live_bytes() - live <= 25u << 20);
        dcp_verify_result_clean_up(&result);
    }
    clean_up(&s);
}

static _Atomic uint64_t most_live_bytes;

static void
watch_memory(struct io_memory_process *process, enum io_call call, const char *name)
{
    (void)process;
    (void)call;
    (void)name;
    uint64_t live = dcp_alloc_live_bytes();
    if (live > most_live_bytes) {
        most_live_bytes = live;
    }
}

static void
memory_stays_within_32_mib(void)
{
    struct subject s;
    struct world_options options = {.seed = 8,
                                    .tensors = 12,
                                    .objects = 4,
                                    .thread_count = 1,
                                    .large_bytes = 40u << 20,
                                    .content_hash = true};
    make(&s, &options);
    dcp_engine_trim();
    most_live_bytes = 0;
    uint64_t live = dcp_alloc_live_bytes();
    io_memory_process(s.disk.fs, 0)->before = watch_memory;
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, NULL), 0);
    io_memory_process(s.disk.fs, 0)->before = NULL;
    CHECK(most_live_bytes > live && most_live_bytes - live <= 32u << 20);
    clean_up(&s);
}

/* ---- damage ---- */

/* Flips a byte and puts it back. */
static uint64_t
flip(struct subject *s, const char *name, uint64_t offset, enum dcp_verify_level level,
     struct dcp_verify_problem *ret_first)
{
    size_t len;
    const uint8_t *old = io_memory_file(s->disk.fs, DIR, name, &len);
    uint8_t *bytes = dcp_malloc(len);
    memcpy(bytes, old, len);
    bytes[offset] ^= 0x10;
    io_memory_put_file(s->disk.fs, DIR, name, bytes, len);
    uint64_t found = problems(s->disk.fs, DIR, level, ret_first);
    bytes[offset] ^= 0x10;
    io_memory_put_file(s->disk.fs, DIR, name, bytes, len);
    dcp_free(bytes);
    return found;
}

static void
any_byte_of_a_tensors_record_that_changes_is_found_and_named(void)
{
    struct subject s;
    make(&s, &small);
    uint32_t tried = 0;
    for (uint32_t r = 0; r < s.world.layout.records_count; r++) {
        const struct dcp_placed_record *record = &s.world.layout.records[r];
        if (s.world.records[record->item] != NULL) {
            continue;
        }
        char name[64], want[32];
        world_file_name(&s.world, record->file, name, sizeof name);
        snprintf(want, sizeof want, "tensor.%u", s.world.item_tensor[record->item]);
        uint64_t step = 1 + record->length_bytes / 150;
        for (uint64_t at = 0; at < record->length_bytes; at += step) {
            struct dcp_verify_problem first = {0};
            uint64_t found = flip(&s, name, record->offset_bytes + at, DCP_VERIFY_FULL, &first);
            tried++;
            CHECK_EQ(found, 1);
            if (found != 1) {
                fprintf(stderr, "record %u, byte %" PRIu64 " of %" PRIu64 "\n", r, at,
                        record->length_bytes);
                continue;
            }
            CHECK(strcmp(first.tensor, want) == 0 && strcmp(first.file, name) == 0);
            CHECK(first.offset_bytes >= record->offset_bytes &&
                  first.offset_bytes < record->offset_bytes + record->length_bytes);
            uint64_t payload = record->payload_offset_bytes - record->offset_bytes;
            bool in_payload = at >= payload && at < payload + record->payload_bytes;
            CHECK(in_payload == (first.code == DCP_E_CHECKSUM &&
                                 first.offset_bytes == record->payload_offset_bytes));
        }
        CHECK_EQ(flip(&s, name, record->offset_bytes, DCP_VERIFY_STRUCTURE, NULL), 0);
    }
    CHECK(tried > 500);
    clean_up(&s);
}

static void
any_byte_of_a_header_or_a_table_that_changes_is_found(void)
{
    struct subject s;
    struct world_options options = small;
    options.large_bytes = 3u << 20;
    options.thread_count = 1;
    make(&s, &options);
    const struct dcp_placed_file *file = &s.world.layout.files[0];
    char name[64];
    world_file_name(&s.world, 0, name, sizeof name);
    struct {
        uint64_t from, to, step;
        enum dcp_verify_level level;
    } ranges[] = {
        {0, DCP_FILE_HEADER_BYTES, 1, DCP_VERIFY_COMPLETE},
        {file->table_offset_bytes, file->table_offset_bytes + file->table_bytes, 3,
         DCP_VERIFY_STRUCTURE},
        {file->hash_offset_bytes, file->hash_offset_bytes + file->hash_bytes, 7,
         DCP_VERIFY_STRUCTURE},
    };
    CHECK(file->table_bytes > 0 && file->hash_bytes > 0);
    for (size_t r = 0; r < sizeof ranges / sizeof ranges[0]; r++) {
        for (uint64_t at = ranges[r].from; at < ranges[r].to; at += ranges[r].step) {
            struct dcp_verify_problem first = {0};
            CHECK_EQ(flip(&s, name, at, ranges[r].level, &first), 1);
            CHECK(strcmp(first.file, name) == 0 && first.what[0] != 0);
        }
    }
    clean_up(&s);
}

static void
a_damaged_block_of_a_large_tensor_is_named_even_without_the_table(void)
{
    struct subject s;
    struct world_options options = {.seed = 4, .thread_count = 1, .large_bytes = 12u << 20};
    make(&s, &options);
    char name[64];
    world_file_name(&s.world, 0, name, sizeof name);
    const struct dcp_placed_record *record = &s.world.layout.records[0];
    for (uint64_t block = 0; block * DCP_BLOCK_BYTES < record->payload_bytes; block += 2) {
        struct dcp_verify_problem first = {0};
        uint64_t at = record->payload_offset_bytes + block * DCP_BLOCK_BYTES;
        CHECK_EQ(flip(&s, name, at + 77, DCP_VERIFY_FULL, &first), 1);
        CHECK_EQ(first.code, DCP_E_CHECKSUM);
        CHECK_EQ(first.offset_bytes, at);
    }
    disk_damage(&s.disk, &s.world, 0, s.world.layout.files[0].table_offset_bytes + 20, 1,
                UINT64_MAX);
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, NULL), 1);
    CHECK_EQ(flip(&s, name, record->payload_offset_bytes + 77, DCP_VERIFY_FULL, NULL), 2);
    clean_up(&s);
}

static void
an_objects_bytes_are_checked_by_its_zip(void)
{
    struct subject s;
    make(&s, &small);
    uint32_t found = 0;
    for (uint32_t r = 0; r < s.world.layout.records_count; r++) {
        const struct dcp_placed_record *record = &s.world.layout.records[r];
        if (s.world.records[record->item] == NULL) {
            continue;
        }
        char name[64];
        struct dcp_verify_problem first = {0};
        world_file_name(&s.world, record->file, name, sizeof name);
        for (uint64_t at = 60; at + 100 < record->length_bytes; at += 50) {
            uint64_t n = flip(&s, name, record->offset_bytes + at, DCP_VERIFY_FULL, &first);
            CHECK(n <= 1);
            found += n == 1;
        }
        CHECK_EQ(flip(&s, name, record->offset_bytes + record->length_bytes - 22, DCP_VERIFY_FULL,
                      &first),
                 1);
    }
    CHECK(found > 20);
    clean_up(&s);
}

static void
no_byte_of_the_pickle_changes_unseen(void)
{
    struct subject s;
    make(&s, &small);
    struct dcp_metadata_footer footer;
    CHECK(dcp_metadata_footer_parse(s.image.data, s.image.len, &footer));
    for (uint64_t at = 0; at < footer.pickle_bytes; at += 5) {
        struct dcp_verify_problem first = {0};
        CHECK_EQ(flip(&s, ".metadata", at, DCP_VERIFY_COMPLETE, &first), 1);
        CHECK(strcmp(first.file, ".metadata") == 0);
    }
    /* Behind it lies what readers can do without. */
    for (uint64_t at = footer.pickle_bytes; at < s.image.len; at += 5) {
        CHECK(flip(&s, ".metadata", at, DCP_VERIFY_FULL, NULL) != UINT64_MAX);
    }
    clean_up(&s);
}

static void
a_file_cut_anywhere_is_found(void)
{
    struct subject s;
    make(&s, &small);
    for (uint32_t f = 0; f < s.world.layout.files_count; f++) {
        char name[64];
        size_t len;
        world_file_name(&s.world, f, name, sizeof name);
        const uint8_t *old = io_memory_file(s.disk.fs, DIR, name, &len);
        uint8_t *bytes = dcp_malloc(len);
        memcpy(bytes, old, len);
        for (size_t cut = 0; cut < len; cut += 1 + len / 40) {
            struct dcp_verify_problem first = {0};
            io_memory_put_file(s.disk.fs, DIR, name, bytes, cut);
            CHECK(problems(s.disk.fs, DIR, DCP_VERIFY_COMPLETE, &first) >= 1);
            CHECK(first.code == DCP_E_CORRUPT && strcmp(first.file, name) == 0);
            CHECK(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, NULL) >= 1);
        }
        io_memory_put_file(s.disk.fs, DIR, name, bytes, len);
        dcp_free(bytes);
    }
    for (size_t cut = 0; cut < s.image.len; cut += 1 + s.image.len / 60) {
        struct dcp_metadata_footer footer;
        CHECK(dcp_metadata_footer_parse(s.image.data, s.image.len, &footer));
        io_memory_put_file(s.disk.fs, DIR, ".metadata", s.image.data, cut);
        CHECK(cut >= footer.pickle_bytes ||
              problems(s.disk.fs, DIR, DCP_VERIFY_COMPLETE, NULL) == 1);
    }
    clean_up(&s);
}

static void
missing_foreign_and_mixed_up_files_are_named(void)
{
    struct subject s;
    struct dcp_verify_problem first = {0};
    struct dcp_file_header header;
    struct dcp_error err = {0};
    char names[2][64];
    size_t lens[2];
    uint8_t *bytes[2];
    make(&s, &small);
    for (uint32_t f = 0; f < 2; f++) {
        world_file_name(&s.world, f, names[f], sizeof names[f]);
        const uint8_t *old = io_memory_file(s.disk.fs, DIR, names[f], &lens[f]);
        bytes[f] = dcp_malloc(lens[f]);
        memcpy(bytes[f], old, lens[f]);
    }
    s.disk.io->unlink_at(s.disk.io->ctx, s.disk.dirfd, names[1]);
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_COMPLETE, &first), 1);
    CHECK(first.code == DCP_E_NOENT && strcmp(first.file, names[1]) == 0);
    CHECK(strstr(first.what, "records of the checkpoint lie in it, the first of ") != NULL);

    io_memory_put_file(s.disk.fs, DIR, names[1], bytes[0], lens[0]);
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_COMPLETE, &first), 1);
    CHECK(first.code == DCP_E_CORRUPT && strstr(first.what, "mixed up") != NULL);

    CHECK_OK(dcp_file_parse_header(bytes[1], &header, &err), &err);
    header.save_id.bytes[3] ^= 1;
    struct dcp_buf other = {0};
    dcp_file_put_header(&other, &header);
    memcpy(bytes[1], other.data, other.len);
    dcp_buf_clean_up(&other);
    io_memory_put_file(s.disk.fs, DIR, names[1], bytes[1], lens[1]);
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_COMPLETE, &first), 1);
    CHECK(first.code == DCP_E_STALE && strstr(first.what, "another save") != NULL);
    for (int i = 0; i < 2; i++) {
        dcp_free(bytes[i]);
    }
    clean_up(&s);
}

static void
problems_do_not_hide_each_other_and_the_list_is_bounded(void)
{
    struct subject s;
    struct world_options options = {.seed = 21, .tensors = 20, .thread_count = 1};
    make(&s, &options);
    uint64_t damaged = 0;
    for (uint32_t r = 0; r < s.world.layout.records_count; r++) {
        const struct dcp_placed_record *record = &s.world.layout.records[r];
        if (s.world.records[record->item] == NULL && record->payload_bytes > 0) {
            disk_damage(&s.disk, &s.world, record->file, record->payload_offset_bytes, 1,
                        UINT64_MAX);
            damaged++;
        }
    }
    struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL, .problems_most = 5};
    struct dcp_verify_result result;
    struct dcp_error err;
    CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
    CHECK(damaged > 10);
    CHECK_EQ(result.problems_found, damaged);
    CHECK_EQ(result.problems_count, 5);
    dcp_verify_result_clean_up(&result);
    clean_up(&s);
}

static void
parts_of_a_check_find_each_damage_once(void)
{
    struct subject s;
    struct world_options options = small;
    options.file_per_item = true;
    make(&s, &options);
    for (uint32_t r = 0; r < s.world.layout.records_count; r++) {
        const struct dcp_placed_record *record = &s.world.layout.records[r];
        disk_damage(&s.disk, &s.world, record->file,
                    record->offset_bytes + record->length_bytes - 22, 1, UINT64_MAX);
    }
    uint64_t found = 0, checked = 0;
    for (uint32_t part = 0; part < 3; part++) {
        struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL, .part = part, .parts = 3};
        struct dcp_verify_result result;
        struct dcp_error err;
        CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
        CHECK(result.problems_found < s.world.layout.records_count);
        found += result.problems_found;
        checked += result.checked_bytes;
        dcp_verify_result_clean_up(&result);
    }
    CHECK_EQ(found, s.world.layout.records_count);
    CHECK(checked > 0);
    clean_up(&s);
}

CTEST_MAIN(RUN(an_intact_checkpoint_passes_and_every_record_is_counted);
           RUN(large_tensors_are_read_once_and_in_32_mib); RUN(memory_stays_within_32_mib);
           RUN(any_byte_of_a_tensors_record_that_changes_is_found_and_named);
           RUN(any_byte_of_a_header_or_a_table_that_changes_is_found);
           RUN(a_damaged_block_of_a_large_tensor_is_named_even_without_the_table);
           RUN(an_objects_bytes_are_checked_by_its_zip); RUN(no_byte_of_the_pickle_changes_unseen);
           RUN(a_file_cut_anywhere_is_found); RUN(missing_foreign_and_mixed_up_files_are_named);
           RUN(problems_do_not_hide_each_other_and_the_list_is_bounded);
           RUN(parts_of_a_check_find_each_damage_once);)

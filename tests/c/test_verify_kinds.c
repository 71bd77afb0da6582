/*
 * test_verify_kinds.c: checks of checkpoints of other kinds: linked files, stock torch's records
 * and other zips, metadata of single ranks or of classes that only Python knows, tensors in part.
 */
#include "ctest.h"

#include "incremental_world.h"
#include "metadata_private.h"
#include "record_maker.h"
#include "verify_subject.h"
#include "zip_format.h"

/* ---- linked ---- */

static void
linked_files_count_as_the_checkpoints_own(void)
{
    for (int i = 0; i < 4; i++) {
        struct io_memory *fs = io_memory_new((uint64_t)i);
        struct saving saving = {.dir = "/base", .content_hash = true, .independent = i % 2 == 1};
        struct tensors first = {.count = 4, .lengths = {1000, 600000, 20, 5000}};
        struct tensors second = first;
        struct dcp_save_info info;
        struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
        struct dcp_verify_result result;
        struct dcp_error err;
        tensors_save(NULL, fs, &first, &saving, &info);
        second.versions[0] = 1;
        saving = (struct saving){.dir = "/next",
                                 .base = "/base",
                                 .independent = i % 2 == 1,
                                 .mode = i / 2 == 0 ? DCP_LINK_REFLINK : DCP_LINK_HARD};
        tensors_save(NULL, fs, &second, &saving, &info);
        CHECK_EQ(info.linked_files, 1);
        CHECK_OK(run(fs, "/next", &verify, &result, &err), &err);
        CHECK_EQ(result.problems_found, 0);
        CHECK_EQ(result.ranks_count, i % 2);
        CHECK_EQ(result.records_count, 4);
        CHECK_EQ(result.unreferenced_files_count, 0);
        dcp_verify_result_clean_up(&result);
        io_memory_free(fs);
        dcp_engine_trim();
    }
}

/* ---- zips ---- */

/* A checkpoint of one (2, columns) tensor with stock metadata and the given record, which holds
 * (2, 3) float32. */
static struct io_memory *
make_stock(const struct dcp_buf *record, int dtype, uint64_t columns)
{
    const uint64_t sizes[2] = {2, columns};
    struct io_memory *fs = io_memory_new(1);
    const struct dcp_io *io = &io_memory_process(fs, 0)->io;
    struct dcp_plan plan = {.rank = 0, .thread_count = 1, .single_file_per_rank = true};
    struct dcp_global_plan global = {0};
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    struct dcp_save_id id = {{1}};
    struct dcp_metadata_footer footer;
    struct dcp_buf image = {0};
    struct dcp_error err = {0};
    maker_tensor(&plan, "stock", dtype, 2, sizes);
    CHECK_OK(dcp_global_plan_build(&plan, 1, false, &global, &err), &err);
    global.layouts[0].records[0].offset_bytes = 0;
    global.layouts[0].records[0].length_bytes = record->len;
    CHECK_OK(dcp_metadata_write(&global, &meta, &id, 0, NULL, &image, &err), &err);
    CHECK(dcp_metadata_footer_parse(image.data, image.len, &footer));
    io->mkdirs(io->ctx, DIR);
    io_memory_put_file(fs, DIR, ".metadata", image.data, (size_t)footer.pickle_bytes);
    io_memory_put_file(fs, DIR, "__0_0.distcp", record->data, record->len);
    dcp_buf_clean_up(&image);
    dcp_global_plan_clean_up(&global);
    dcp_plan_clean_up(&plan);
    return fs;
}

static void
stock_records_are_checked_by_their_entries(void)
{
    for (int with_crc = 0; with_crc < 2; with_crc++) {
        struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
        struct dcp_verify_result result;
        struct dcp_error err;
        struct dcp_buf record = {0};
        record_make_stock(&record, with_crc != 0, "little");
        struct io_memory *fs = make_stock(&record, DCP_DTYPE_FLOAT32, 3);
        CHECK_OK(run(fs, DIR, &verify, &result, &err), &err);
        CHECK_EQ(result.problems_found, 0);
        CHECK(!result.is_native);
        CHECK_EQ(result.checked_bytes, with_crc ? record.len : 0);
        CHECK_EQ(result.unverified_bytes, with_crc ? 0 : record.len);
        dcp_verify_result_clean_up(&result);
        uint64_t found = 0;
        for (size_t at = 0; at < record.len; at++) {
            record.data[at] ^= 4;
            io_memory_put_file(fs, DIR, "__0_0.distcp", record.data, record.len);
            record.data[at] ^= 4;
            uint64_t n = problems(fs, DIR, DCP_VERIFY_FULL, NULL);
            CHECK(n <= 1);
            found += n;
        }
        CHECK(found > (with_crc ? 250u : 100u));
        for (size_t cut = 0; cut < record.len; cut += 7) {
            io_memory_put_file(fs, DIR, "__0_0.distcp", record.data, cut);
            CHECK_EQ(problems(fs, DIR, DCP_VERIFY_COMPLETE, NULL), 1);
        }
        io_memory_free(fs);
        dcp_buf_clean_up(&record);
        dcp_engine_trim();
    }
}

/* The bits of a byte of a record's end that some unzipper, or torch's, looks at: of directory
 * entries neither versions and times nor most flags and attributes, of the zip64 end record not the
 * versions. */
static uint8_t
bits_that_matter(const uint8_t *record, const struct zip_end *end, size_t at)
{
    static const uint8_t idle[ZIP_CENTRAL_BYTES] = {
        [4] = 0xff,  [5] = 0xff,  [6] = 0xff,  [7] = 0xff,  [8] = 0x9e,  [9] = 0xdf,
        [12] = 0xff, [13] = 0xff, [14] = 0xff, [15] = 0xff, [36] = 0xff, [37] = 0xff,
        [38] = 0xef, [39] = 0xff, [40] = 0xff, [41] = 0xff};
    size_t pos = 0;
    if (at < end->directory_offset) {
        return 0;
    }
    if (at >= end->records_offset) {
        size_t field = at - end->records_offset;
        return end->has_64 && field >= 12 && field < 16 ? 0 : 0xff;
    }
    for (uint64_t i = 0; i < end->entries_count; i++) {
        size_t field = at - end->directory_offset - pos;
        struct zip_entry entry;
        struct dcp_error err = {0};
        CHECK_OK(zip_next_entry(record + end->directory_offset, end, &pos, &entry, &err), &err);
        if (field < entry.directory_bytes) {
            return field < ZIP_CENTRAL_BYTES ? (uint8_t)~idle[field] : 0xff;
        }
    }
    return 0;
}

/* Flips all bits, then single ones, of each byte of the last 420 of a record. */
static void
flip_the_end(struct io_memory *fs, const char *name, uint64_t offset, uint64_t length)
{
    static const uint8_t masks[] = {0xff, 0x01, 0x10, 0x20, 0x80};
    size_t len;
    const uint8_t *old = io_memory_file(fs, DIR, name, &len);
    uint8_t *bytes = dcp_malloc(len), *record = bytes + offset;
    struct zip_end end;
    struct dcp_error err = {0};
    memcpy(bytes, old, len);
    CHECK_OK(zip_find_end(record, (size_t)length, length, &end, &err), &err);
    for (size_t at = length < 420 ? 0 : (size_t)length - 420; at < length; at++) {
        uint8_t bits = bits_that_matter(record, &end, at);
        for (size_t m = 0; m < sizeof masks; m++) {
            record[at] ^= masks[m];
            io_memory_put_file(fs, DIR, name, bytes, len);
            record[at] ^= masks[m];
            uint64_t found = problems(fs, DIR, DCP_VERIFY_FULL, NULL);
            CHECK(found <= 1);
            CHECK(found == 1 || (masks[m] & bits) == 0);
            if (found == 0 && (masks[m] & bits) != 0) {
                fprintf(stderr, "byte %zu of %" PRIu64 ", mask %02x\n", at, length, masks[m]);
            }
        }
    }
    io_memory_put_file(fs, DIR, name, bytes, len);
    CHECK_EQ(problems(fs, DIR, DCP_VERIFY_FULL, NULL), 0);
    dcp_free(bytes);
}

static void
no_byte_of_a_zips_end_that_matters_changes_unseen(void)
{
    for (int with_crc = 0; with_crc < 2; with_crc++) {
        struct dcp_buf record = {0};
        record_make_stock(&record, with_crc != 0, "little");
        struct io_memory *fs = make_stock(&record, DCP_DTYPE_FLOAT32, 3);
        flip_the_end(fs, "__0_0.distcp", 0, record.len);
        io_memory_free(fs);
        dcp_buf_clean_up(&record);
    }
    struct subject s;
    uint32_t tried = 0;
    make(&s, &small);
    for (uint32_t r = 0; r < s.world.layout.records_count && tried < 1; r++) {
        const struct dcp_placed_record *record = &s.world.layout.records[r];
        char name[64];
        if (s.world.records[record->item] != NULL) {
            world_file_name(&s.world, record->file, name, sizeof name);
            flip_the_end(s.disk.fs, name, record->offset_bytes, record->length_bytes);
            tried++;
        }
    }
    CHECK_EQ(tried, 1);
    clean_up(&s);
    dcp_engine_trim();
}

static void
a_record_of_another_shape_or_byte_order_is_found(void)
{
    struct dcp_verify_problem first = {0};
    struct dcp_buf record = {0};
    record_make_stock(&record, true, "little");
    /* Another dtype is converted by whoever loads it: planners may cast what they save. */
    struct io_memory *fs = make_stock(&record, DCP_DTYPE_INT32, 3);
    CHECK_EQ(problems(fs, DIR, DCP_VERIFY_FULL, &first), 0);
    io_memory_free(fs);
    fs = make_stock(&record, DCP_DTYPE_FLOAT32, 4);
    CHECK_EQ(problems(fs, DIR, DCP_VERIFY_FULL, &first), 1);
    CHECK(strstr(first.what, "another shape") != NULL && !strcmp(first.tensor, "stock"));
    io_memory_free(fs);
    dcp_buf_clear(&record);
    record_make_stock(&record, true, "big");
    fs = make_stock(&record, DCP_DTYPE_FLOAT32, 3);
    CHECK_EQ(problems(fs, DIR, DCP_VERIFY_FULL, &first), 1);
    CHECK(strstr(first.what, "big-endian") != NULL);
    io_memory_free(fs);
    dcp_buf_clean_up(&record);
    dcp_engine_trim();
}

/* A large stock record: the tensor's bytes behind the pickle, as torch lays them out. */
static void
a_large_zip_is_checked_as_it_streams_by(void)
{
    static const uint64_t sizes[2] = {2, 3};
    uint64_t len = 20u << 20;
    uint8_t *data = dcp_calloc(1, len);
    struct dcp_buf record = {0}, pickle = {0};
    dcp_pickle_put_tensor(&pickle, DCP_DTYPE_FLOAT32, 2, sizes);
    for (uint64_t i = 0; i < len; i += 97) {
        data[i] = (uint8_t)i;
    }
    struct record_stock_entry entries[] = {
        {.name = "data.pkl", .data = pickle.data, .len = pickle.len},
        {.name = "junk", .data = data, .len = len},
        {.name = "data/0", .data = data, .len = 24},
        {.name = "version", .data = "3\n", .len = 2},
    };
    record_make_stock_zip(&record, entries, 4, true);
    struct io_memory *fs = make_stock(&record, DCP_DTYPE_FLOAT32, 3);
    io_memory_set_dio(fs, (struct dcp_dio_align){512, 512, false});
    CHECK_EQ(problems(fs, DIR, DCP_VERIFY_FULL, NULL), 0);
    struct dcp_verify_problem first = {0};
    record.data[record.len - 5000] ^= 1;
    record.data[11u << 20] ^= 1;
    io_memory_put_file(fs, DIR, "__0_0.distcp", record.data, record.len);
    CHECK_EQ(problems(fs, DIR, DCP_VERIFY_FULL, &first), 1);
    CHECK(first.code == DCP_E_CHECKSUM && strstr(first.what, "archive/junk") != NULL);
    for (size_t back = 1; back < 500; back += 19) {
        record.data[record.len - back] ^= 8;
        io_memory_put_file(fs, DIR, "__0_0.distcp", record.data, record.len);
        CHECK_EQ(problems(fs, DIR, DCP_VERIFY_FULL, NULL), 1);
        record.data[record.len - back] ^= 8;
    }
    io_memory_free(fs);
    dcp_buf_clean_up(&record);
    dcp_buf_clean_up(&pickle);
    dcp_free(data);
    dcp_engine_trim();
}

/* ---- metadata ---- */

static void
metadata_of_single_ranks_are_each_checked(void)
{
    struct subject s;
    struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
    struct dcp_verify_result result;
    struct dcp_error err;
    make(&s, &small);
    put_metadata(&s, "__7.metadata");
    s.disk.io->unlink_at(s.disk.io->ctx, s.disk.dirfd, ".metadata");
    put_metadata(&s, "__2.metadata");
    io_memory_put_file(s.disk.fs, DIR, "__99_5.distcp", "x", 1);
    io_memory_put_file(s.disk.fs, DIR, ".dcp_native-claim-9-0123456789abcdef", "x", 1);
    CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
    CHECK_EQ(result.problems_found, 0);
    CHECK(result.ranks_count == 2 && result.ranks[0] == 2 && result.ranks[1] == 7);
    CHECK_EQ(result.records_count, 2 * s.world.plan.items_count);
    CHECK_EQ(result.unreferenced_files_count, 1);
    CHECK_EQ(result.claims_count, 1);
    dcp_verify_result_clean_up(&result);
    clean_up(&s);
}

/* Three sets of one file each: every part has one of them to read. */
static void
parts_divide_the_files_of_single_ranks(void)
{
    struct subject s;
    struct world_options options = {.seed = 5, .tensors = 3, .thread_count = 1};
    struct dcp_error err;
    make(&s, &options);
    s.disk.io->unlink_at(s.disk.io->ctx, s.disk.dirfd, ".metadata");
    for (uint32_t rank = 0; rank < 3; rank++) {
        char name[32];
        snprintf(name, sizeof name, "__%u.metadata", rank);
        put_metadata(&s, name);
    }
    for (uint32_t part = 0; part < 3; part++) {
        struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL, .part = part, .parts = 3};
        struct dcp_verify_result result;
        CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
        CHECK_EQ(result.files_count, 1);
        CHECK_EQ(result.problems_found, 0);
        dcp_verify_result_clean_up(&result);
    }
    clean_up(&s);
}

static struct dcp_hash128
metadata_id_of(struct io_memory *fs, uint32_t part, uint64_t want_problems)
{
    struct dcp_verify_options verify = {.part = part, .parts = 2};
    struct dcp_verify_result result;
    struct dcp_error err;
    CHECK_OK(run(fs, DIR, &verify, &result, &err), &err);
    CHECK_EQ(result.problems_found, want_problems);
    struct dcp_hash128 id = result.metadata_id;
    dcp_verify_result_clean_up(&result);
    return id;
}

static void
all_metadata_counts_for_its_id_and_part_0_alone_blames_it(void)
{
    struct subject s;
    make(&s, &small);
    struct dcp_hash128 whole = metadata_id_of(s.disk.fs, 0, 0);
    CHECK(dcp_hash128_equal(whole, metadata_id_of(s.disk.fs, 1, 0)));
    s.disk.io->unlink_at(s.disk.io->ctx, s.disk.dirfd, ".metadata");
    struct dcp_hash128 none = metadata_id_of(s.disk.fs, 0, 1);
    CHECK(none.lo == 0 && none.hi == 0);
    CHECK(dcp_hash128_equal(none, metadata_id_of(s.disk.fs, 1, 0)));
    put_metadata(&s, "__0.metadata");
    struct dcp_hash128 one = metadata_id_of(s.disk.fs, 0, 0);
    put_metadata(&s, "__1.metadata");
    struct dcp_hash128 two = metadata_id_of(s.disk.fs, 0, 0);
    CHECK(!dcp_hash128_equal(one, whole) && !dcp_hash128_equal(one, two));
    io_memory_put_file(s.disk.fs, DIR, "__1.metadata", "junk", 4);
    struct dcp_hash128 junk = metadata_id_of(s.disk.fs, 0, 1);
    CHECK(!dcp_hash128_equal(junk, two));
    CHECK(dcp_hash128_equal(junk, metadata_id_of(s.disk.fs, 1, 0)));
    clean_up(&s);
}

static void
a_directory_without_metadata_is_a_problem_and_no_directory_an_error(void)
{
    struct subject s;
    struct dcp_verify_problem first = {0};
    struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
    struct dcp_verify_result result;
    struct dcp_error err;
    make(&s, &small);
    s.disk.io->unlink_at(s.disk.io->ctx, s.disk.dirfd, ".metadata");
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_COMPLETE, &first), 1);
    CHECK(first.code == DCP_E_NOENT && strstr(first.what, "no checkpoint was saved") != NULL);
    io_memory_put_file(s.disk.fs, DIR, ".dcp_native-claim-9-0123456789abcdef", "x", 1);
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_COMPLETE, &first), 1);
    CHECK(strstr(first.what, "in flight") != NULL);
    CHECK_EQ(run(s.disk.fs, "/nowhere", &verify, &result, &err), DCP_E_NOENT);
    clean_up(&s);
}

static void
metadata_that_only_python_reads_may_be_translated(void)
{
    struct subject s;
    struct dcp_verify_result result;
    struct dcp_error err;
    make(&s, &small);
    static const uint8_t foreign[] = "\x80\4\x8c\2os\x8c\6system\x93.";
    struct dcp_verify_translation known[2] = {
        {.original = {foreign, 3}},
        {.original = {foreign, sizeof foreign - 1}, .translated = {s.image.data, s.image.len}}};
    struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
    io_memory_put_file(s.disk.fs, DIR, ".metadata", foreign, sizeof foreign - 1);
    CHECK_EQ(run(s.disk.fs, DIR, &verify, &result, &err), DCP_E_UNSUPPORTED);
    verify.translations = known;
    verify.translations_count = 2;
    CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
    CHECK_EQ(result.problems_found, 0);
    dcp_verify_result_clean_up(&result);
    /* Of single ranks: one that needs it, and one that does not. */
    s.disk.io->unlink_at(s.disk.io->ctx, s.disk.dirfd, ".metadata");
    io_memory_put_file(s.disk.fs, DIR, "__0.metadata", foreign, sizeof foreign - 1);
    io_memory_put_file(s.disk.fs, DIR, "__1.metadata", s.image.data, s.image.len);
    CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
    CHECK(result.problems_found == 0 && result.ranks_count == 2);
    dcp_verify_result_clean_up(&result);
    known[1].original.len--;
    CHECK_EQ(run(s.disk.fs, DIR, &verify, &result, &err), DCP_E_UNSUPPORTED);
    clean_up(&s);
}

/* ---- chunks ---- */

/* Two ranks with rows 0-4 and 4-8 of an (8, 4) tensor; then rank 1's box is moved. */
static uint64_t
with_second_box(const uint64_t box[4], uint32_t second_rank, struct dcp_verify_problem *ret_first)
{
    struct io_memory *fs = io_memory_new(1);
    const struct dcp_io *io = &io_memory_process(fs, 0)->io;
    struct dcp_plan plans[2];
    struct dcp_global_plan global = {0};
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    struct dcp_save_id id = {{1}};
    struct dcp_buf image = {0};
    struct dcp_error err = {0};
    maker_start_plans(plans, 2);
    plans[1].rank = second_rank;
    maker_shard2(&plans[0], "w", 8, 4, 0, 0, 4, 4);
    maker_shard2(&plans[1], "w", 8, 4, 4, 0, 4, 4);
    CHECK_OK(dcp_global_plan_build(plans, 2, false, &global, &err), &err);
    memcpy(plans[1].dims + plans[1].items[0].dims + 2, box, 4 * sizeof *box);
    CHECK_OK(dcp_metadata_write(&global, &meta, &id, second_rank == 0 ? 5 : 0, NULL, &image, &err),
             &err);
    io->mkdirs(io->ctx, DIR);
    io_memory_put_file(fs, DIR, ".metadata", image.data, image.len);
    uint64_t files = problems(fs, DIR, DCP_VERIFY_COMPLETE, NULL);
    uint64_t found = problems(fs, DIR, DCP_VERIFY_STRUCTURE, ret_first);
    CHECK(files > 0);
    dcp_buf_clean_up(&image);
    dcp_global_plan_clean_up(&global);
    maker_clean_up_plans(plans, 2);
    io_memory_free(fs);
    return found - files;
}

static void
chunks_that_overlap_or_leave_a_hole_are_found(void)
{
    static const uint64_t same[4] = {4, 0, 4, 4}, over[4] = {3, 0, 4, 4}, hole[4] = {5, 0, 3, 4},
                          narrow[4] = {4, 1, 4, 3};
    struct dcp_verify_problem first = {0};
    CHECK_EQ(with_second_box(same, 1, &first), 0);
    CHECK_EQ(with_second_box(over, 1, &first), 1);
    CHECK(!strcmp(first.tensor, "w") &&
          !strcmp(first.what, "the chunks [0:4, 0:4] and [3:7, 0:4] overlap"));
    CHECK_EQ(with_second_box(hole, 1, &first), 1);
    CHECK(first.code == DCP_E_HOLE && strstr(first.what, "28 of its 32 elements") != NULL);
    CHECK_EQ(with_second_box(narrow, 1, &first), 1);
    CHECK_EQ(first.code, DCP_E_HOLE);
}

static void
one_rank_that_saved_alone_may_hold_part_of_a_tensor(void)
{
    static const uint64_t size[2] = {8, 4}, at[2] = {2, 0}, part[2] = {3, 4};
    struct subject s;
    struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
    struct dcp_verify_result result;
    struct dcp_error err;
    world_make(&s.world, &(struct world_options){.seed = 1, .thread_count = 1});
    s.image = (struct dcp_buf){0};
    dcp_layout_clean_up(&s.world.layout);
    struct dcp_plan *plan = &s.world.plan;
    maker_shard(plan, "shard", DCP_DTYPE_FLOAT32, 2, size, at, part);
    CHECK_OK(dcp_layout_build(plan, NULL, &s.world.layout, &err), &err);
    static uint8_t bytes[48];
    struct dcp_source source = {.data = bytes};
    struct dcp_source *kept = s.world.sources;
    s.world.sources = &source;
    disk_make(&s.disk, &s.world, 512);
    s.world.sources = kept;
    put_metadata(&s, ".metadata");
    CHECK_OK(run(s.disk.fs, DIR, &verify, &result, &err), &err);
    CHECK_EQ(result.problems_found, 0);
    CHECK_EQ(result.partial_tensors_count, 1);
    dcp_verify_result_clean_up(&result);
    plan->items_count = 0; /* the world has no memory of this one */
    clean_up(&s);
}

CTEST_MAIN(RUN(linked_files_count_as_the_checkpoints_own);
           RUN(stock_records_are_checked_by_their_entries);
           RUN(no_byte_of_a_zips_end_that_matters_changes_unseen);
           RUN(a_record_of_another_shape_or_byte_order_is_found);
           RUN(a_large_zip_is_checked_as_it_streams_by);
           RUN(metadata_of_single_ranks_are_each_checked);
           RUN(parts_divide_the_files_of_single_ranks);
           RUN(all_metadata_counts_for_its_id_and_part_0_alone_blames_it);
           RUN(a_directory_without_metadata_is_a_problem_and_no_directory_an_error);
           RUN(metadata_that_only_python_reads_may_be_translated);
           RUN(chunks_that_overlap_or_leave_a_hole_are_found);
           RUN(one_rank_that_saved_alone_may_hold_part_of_a_tensor);)

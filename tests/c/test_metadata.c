/*
 * test_metadata.c: `.metadata` written and read back: index and pickle say the same, damage is
 * found, memory failures are clean.
 */
#include "ctest.h"

#include "metadata_subject.h"
#include "metadata_private.h"
#include "plan_maker.h"

enum { SEEDS = 20 };

static struct dcp_error err;

static void
case_index_and_pickle_say_the_same(void)
{
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct metadata_sample sample;
        struct dcp_buf image = {0};
        metadata_sample_make(&sample, seed);
        metadata_sample_image(&sample, &image);
        struct dcp_metadata by_index = {0}, by_pickle = {0}, by_plan = {0};
        struct dcp_md_record *records = NULL;
        uint64_t records_count = 0;
        dcp_error_clear(&err);
        CHECK_OK(dcp_metadata_read(image.data, image.len, &by_index, &err), &err);
        CHECK_OK(dcp_metadata_read_pickle(image.data, image.len, &by_pickle, &err), &err);
        CHECK_OK(dcp_metadata_from_plan(&sample.global, NULL, SAMPLE_N0, &by_plan, &records,
                                        &records_count, &err),
                 &err);
        CHECK(by_index.is_native && !by_pickle.is_native);
        CHECK_EQ(by_index.save_id.bytes[7], 8);
        CHECK(by_index.entries_count > 8 && by_index.chunks_count > by_index.entries_count);
        CHECK(metadata_is_same(&by_index, &by_pickle));
        CHECK(metadata_is_same(&by_plan, &by_pickle));
        CHECK_EQ(records_count, by_plan.chunks_count);
        dcp_metadata_clean_up(&by_index);
        dcp_metadata_clean_up(&by_index);
        dcp_metadata_clean_up(&by_pickle);
        dcp_metadata_clean_up(&by_plan);
        dcp_free(records);
        dcp_buf_clean_up(&image);
        metadata_sample_clean_up(&sample);
    }
}

static void
case_places_are_those_of_the_layouts(void)
{
    struct metadata_sample sample;
    struct dcp_buf image = {0};
    struct dcp_metadata md = {0};
    metadata_sample_make(&sample, 3);
    metadata_sample_image(&sample, &image);
    dcp_error_clear(&err);
    CHECK_OK(dcp_metadata_read_pickle(image.data, image.len, &md, &err), &err);
    uint64_t checked = 0;
    for (uint32_t p = 0; p < SAMPLE_RANKS; p++) {
        const struct dcp_plan *plan = &sample.plans[p];
        const struct dcp_layout *layout = &sample.global.layouts[p];
        for (uint32_t r = 0; r < layout->records_count; r++) {
            const struct dcp_placed_record *record = &layout->records[r];
            const struct dcp_item *item = &plan->items[record->item];
            const struct dcp_name *name = &plan->names[item->name];
            const struct dcp_md_entry *entry = dcp_metadata_find(&md, name->fqn, name->fqn_len);
            CHECK(entry != NULL);
            bool found = false;
            for (uint64_t c = 0; entry != NULL && c < entry->chunks_count; c++) {
                const struct dcp_md_chunk *chunk = &md.chunks[entry->first_chunk + c];
                if (memcmp(md.dims + chunk->dims, dcp_item_offsets(plan, item),
                           item->ndim * sizeof(uint64_t)) != 0) {
                    continue;
                }
                char file[64];
                snprintf(file, sizeof file, "__%u_%u.distcp", p, SAMPLE_N0 + record->file);
                const struct dcp_md_file *named = &md.files[chunk->file];
                found = named->name_len == strlen(file) &&
                        memcmp(md.strings + named->name, file, named->name_len) == 0 &&
                        chunk->offset_bytes == record->offset_bytes &&
                        chunk->length_bytes == record->length_bytes && chunk->transforms == 0;
                break;
            }
            CHECK(found);
            checked += found;
        }
    }
    CHECK_EQ(checked, md.chunks_count);
    CHECK(dcp_metadata_find(&md, "model", 5) == NULL);
    CHECK(dcp_metadata_find(&md, "", 0) == NULL);
    dcp_metadata_clean_up(&md);
    dcp_buf_clean_up(&image);
    metadata_sample_clean_up(&sample);
}

static void
case_an_empty_checkpoint_is_written_and_read(void)
{
    struct dcp_plan plan = {.thread_count = 1, .single_file_per_rank = true};
    struct dcp_global_plan global = {0};
    struct dcp_storage_meta meta = {0};
    struct dcp_save_id id = {.bytes = {9}}, found = {.bytes = {0}};
    struct dcp_buf image = {0};
    struct dcp_metadata md = {0};
    dcp_error_clear(&err);
    CHECK_OK(dcp_global_plan_build(&plan, 1, false, &global, &err), &err);
    CHECK_OK(dcp_metadata_write(&global, &meta, &id, 0, NULL, &image, &err), &err);
    CHECK_OK(dcp_metadata_read(image.data, image.len, &md, &err), &err);
    CHECK_EQ(md.entries_count, 0);
    CHECK_EQ(md.chunks_count, 0);
    CHECK(dcp_metadata_find(&md, "x", 1) == NULL);
    CHECK(dcp_metadata_peek_save_id(image.data, image.len, &found));
    CHECK_EQ(found.bytes[0], 9);
    CHECK(!dcp_metadata_peek_save_id(image.data, image.len - 1, &found));
    CHECK(!dcp_metadata_peek_save_id(image.data, 0, &found));
    dcp_metadata_clean_up(&md);
    CHECK_OK(dcp_metadata_read_pickle(image.data, image.len, &md, &err), &err);
    dcp_metadata_clean_up(&md);
    dcp_buf_clean_up(&image);
    dcp_global_plan_clean_up(&global);
    dcp_plan_clean_up(&plan);
}

static void
case_empty_shards_at_one_place_share_a_record(void)
{
    struct dcp_plan plan;
    struct dcp_global_plan global = {0};
    struct dcp_storage_meta meta = {0};
    struct dcp_save_id id = {.bytes = {9}};
    struct dcp_buf image = {0};
    maker_start_plans(&plan, 1);
    uint64_t size[2] = {4, 3}, end[2] = {4, 0}, none[2] = {0, 3}, zero[2] = {0, 0};
    maker_shard(&plan, "w", DCP_DTYPE_FLOAT32, 2, size, zero, size);
    maker_shard(&plan, "w", DCP_DTYPE_FLOAT32, 2, size, end, none);
    maker_shard(&plan, "w", DCP_DTYPE_FLOAT32, 2, size, end, none);
    dcp_error_clear(&err);
    CHECK_OK(dcp_global_plan_build(&plan, 1, false, &global, &err), &err);
    CHECK_OK(dcp_metadata_write(&global, &meta, &id, 0, NULL, &image, &err), &err);
    struct dcp_metadata md = {0};
    bool same = false;
    CHECK_OK(dcp_metadata_read(image.data, image.len, &md, &err), &err);
    CHECK_EQ(md.chunks_count, 3);
    CHECK_OK(metadata_read_copy(image.data, image.len, true, &md, &same, &err), &err);
    CHECK(same);
    dcp_metadata_clean_up(&md);
    dcp_buf_clean_up(&image);
    dcp_global_plan_clean_up(&global);
    maker_clean_up_plans(&plan, 1);
}

static void
case_an_element_type_without_a_name_is_refused(void)
{
    struct dcp_plan plan;
    struct dcp_global_plan global = {0};
    struct dcp_storage_meta meta = {0};
    struct dcp_save_id id = {.bytes = {9}};
    struct dcp_buf image = {0};
    uint64_t size[1] = {4};
    maker_start_plans(&plan, 1);
    maker_tensor(&plan, "w", DCP_DTYPE_UINT8, 1, size);
    plan.items[0].dtype = DCP_DTYPE_NONE;
    plan.items[0].slot_bytes = 2048;
    dcp_error_clear(&err);
    CHECK_OK(dcp_global_plan_build(&plan, 1, false, &global, &err), &err);
    CHECK_EQ(dcp_metadata_write(&global, &meta, &id, 0, NULL, &image, &err), DCP_E_UNSUPPORTED);
    CHECK(strstr(err.message, "w has an element type") != NULL);
    dcp_buf_clean_up(&image);
    dcp_global_plan_clean_up(&global);
    maker_clean_up_plans(&plan, 1);
}

static void
case_every_truncation_is_an_error_or_loses_only_the_trailer(void)
{
    struct subject s;
    make_subject(&s, 5, false);
    for (size_t len = 0; len < s.image.len; len++) {
        bool same = false;
        int rc = metadata_read_copy(s.image.data, len, false, &s.md, &same, &err);
        CHECK_EQ(rc, len < s.footer.pickle_bytes ? DCP_E_CORRUPT : 0);
        CHECK(rc != 0 || same);
    }
    clean_up_subject(&s);
}

static void
case_every_flipped_bit_is_found_or_harmless(void)
{
    struct subject s;
    make_subject(&s, 7, false);
    uint64_t errors = 0;
    for (size_t bit = 0; bit < 8 * s.image.len; bit += 3) {
        bool same = false;
        s.image.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        int rc = metadata_read_copy(s.image.data, s.image.len, false, &s.md, &same, &err);
        bool in_pickle = bit / 8 < s.footer.pickle_bytes;
        CHECK_EQ(rc, in_pickle ? DCP_E_CORRUPT : 0);
        CHECK(rc != 0 || same);
        errors += rc != 0;
        s.image.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    CHECK(errors > s.footer.pickle_bytes);
    clean_up_subject(&s);
}

static void
case_every_flipped_bit_of_a_bare_pickle_is_survived(void)
{
    struct subject s;
    make_subject(&s, 11, false);
    uint64_t errors = 0;
    for (size_t bit = 0; bit < 8 * s.footer.pickle_bytes; bit++) {
        bool same = false;
        s.image.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        int rc = metadata_read_copy(s.image.data, (size_t)s.footer.pickle_bytes, true, &s.md, &same,
                                    &err);
        CHECK(rc == 0 || rc == DCP_E_CORRUPT || rc == DCP_E_UNSUPPORTED);
        errors += rc != 0;
        s.image.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    CHECK(errors > s.footer.pickle_bytes);
    clean_up_subject(&s);
}

static void
case_every_flipped_bit_of_a_bare_index_is_survived(void)
{
    struct subject s;
    make_subject(&s, 13, false);
    const uint8_t *index = s.image.data + s.footer.pickle_bytes;
    size_t len = (size_t)s.footer.index_bytes;
    uint8_t *copy = malloc(len);
    uint64_t errors = 0;
    for (size_t bit = 0; bit < 8 * len; bit++) {
        memcpy(copy, index, len);
        copy[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        struct dcp_metadata md;
        dcp_error_clear(&err);
        int rc = dcp_metadata_index_decode(copy, len, &md, &err);
        CHECK(rc == 0 || rc == DCP_E_CORRUPT);
        errors += rc != 0;
        if (rc == 0) {
            CHECK_OK(dcp_metadata_validate(&md, &err), &err);
            dcp_metadata_clean_up(&md);
        }
    }
    CHECK(errors > len);
    for (size_t cut = 0; cut < len; cut++) {
        struct dcp_metadata md;
        dcp_error_clear(&err);
        CHECK_EQ(dcp_metadata_index_decode(index, cut, &md, &err), DCP_E_CORRUPT);
    }
    free(copy);
    clean_up_subject(&s);
}

static void
case_a_damaged_index_leaves_the_pickle(void)
{
    struct subject s;
    make_subject(&s, 17, false);
    struct dcp_metadata md = {0};
    s.image.data[s.footer.pickle_bytes + 2] ^= 0x40;
    CHECK_OK(dcp_metadata_read(s.image.data, s.image.len, &md, &err), &err);
    CHECK(md.is_native);
    CHECK(metadata_is_same(&md, &s.md));
    dcp_metadata_clean_up(&md);
    clean_up_subject(&s);
}

static void
case_running_out_of_memory_is_an_error_and_leaks_nothing(void)
{
    struct subject s;
    make_subject(&s, 19, false);
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    struct dcp_save_id id = {.bytes = {1}};
    for (unsigned way = 0; way < 3; way++) {
        bool succeeded = false;
        for (uint64_t n = 1; n < 500 && !succeeded; n++) {
            struct dcp_metadata md = {0};
            struct dcp_buf image = {0};
            dcp_error_clear(&err);
            dcp_alloc_fail_after(n);
            int rc = way == 0
                         ? dcp_metadata_write(&s.sample.global, &meta, &id, 0, NULL, &image, &err)
                     : way == 1 ? dcp_metadata_read(s.image.data, s.image.len, &md, &err)
                                : dcp_metadata_read_pickle(s.image.data, s.image.len, &md, &err);
            dcp_alloc_fail_after(0);
            CHECK(rc == 0 || rc == DCP_E_NOMEM);
            CHECK_EQ(rc, err.code);
            succeeded = rc == 0;
            dcp_metadata_clean_up(&md);
            dcp_buf_clean_up(&image);
        }
        CHECK(succeeded);
    }
    clean_up_subject(&s);
}

CTEST_MAIN(RUN(case_index_and_pickle_say_the_same); RUN(case_places_are_those_of_the_layouts);
           RUN(case_an_empty_checkpoint_is_written_and_read);
           RUN(case_empty_shards_at_one_place_share_a_record);
           RUN(case_an_element_type_without_a_name_is_refused);
           RUN(case_every_truncation_is_an_error_or_loses_only_the_trailer);
           RUN(case_every_flipped_bit_is_found_or_harmless);
           RUN(case_every_flipped_bit_of_a_bare_pickle_is_survived);
           RUN(case_every_flipped_bit_of_a_bare_index_is_survived);
           RUN(case_a_damaged_index_leaves_the_pickle);
           RUN(case_running_out_of_memory_is_an_error_and_leaks_nothing);)

/*
 * test_layout.c: records lie in order, aligned, apart, in the files where torch would put them.
 */
#include "ctest.h"
#include "plan_maker.h"

#include "dcp_record.h"

static uint64_t
record_bytes(const struct dcp_plan *plan, const struct dcp_item *item)
{
    uint64_t payload = dcp_item_payload_bytes(plan, item);
    struct dcp_tensor_shape shape = {.dtype = item->dtype,
                                     .ndim = item->ndim,
                                     .sizes = dcp_item_sizes(plan, item),
                                     .payload_bytes = payload};
    return item->slot_bytes != 0
               ? item->slot_bytes
               : dcp_record_head_bytes(payload) + payload + dcp_record_tail_bytes(&shape);
}

static void
check_record(const struct dcp_plan *plan, const struct dcp_placed_record *record, uint64_t end)
{
    const struct dcp_item *item = &plan->items[record->item];
    uint64_t payload = item->slot_bytes ? item->slot_bytes : dcp_item_payload_bytes(plan, item);
    uint64_t head = item->slot_bytes ? 0 : dcp_record_head_bytes(payload);
    uint64_t align = payload >= DCP_LARGE_PAYLOAD_BYTES    ? DCP_LARGE_ALIGN_BYTES
                     : payload >= DCP_MEDIUM_PAYLOAD_BYTES ? DCP_MEDIUM_ALIGN_BYTES
                                                           : 1;
    CHECK_EQ(record->length_bytes, record_bytes(plan, item));
    CHECK_EQ(record->payload_bytes, payload);
    CHECK_EQ(record->payload_offset_bytes, record->offset_bytes + head);
    CHECK_EQ(record->payload_offset_bytes % align, 0);
    CHECK(record->offset_bytes >= end && record->offset_bytes - end < align);
}

static void
check_layout(const struct dcp_plan *plan, const uint8_t *keep, const struct dcp_layout *layout)
{
    uint32_t seen = 0;
    uint64_t total = 0;
    uint8_t *placed = calloc(1, plan->items_count + 1);
    for (uint32_t f = 0; f < layout->files_count; f++) {
        const struct dcp_placed_file *file = &layout->files[f];
        uint64_t end = DCP_FILE_HEADER_BYTES, blocks = 0;
        uint32_t entries = 0;
        bool tensors = false;
        CHECK_EQ(file->index, f);
        CHECK_EQ(file->first_record, seen);
        for (uint32_t i = 0; i < file->records_count; i++, seen++) {
            const struct dcp_placed_record *record = &layout->records[seen];
            const struct dcp_item *item = &plan->items[record->item];
            CHECK_EQ(record->file, f);
            CHECK(dcp_keep_test(keep, record->item) && !placed[record->item]);
            placed[record->item] = 1;
            check_record(plan, record, end);
            end = record->offset_bytes + record->length_bytes;
            CHECK(!tensors || item->kind != DCP_ITEM_BYTES);
            tensors = item->kind != DCP_ITEM_BYTES;
            if (item->slot_bytes == 0 && record->payload_bytes > DCP_BLOCK_BYTES) {
                entries++;
                blocks += (record->payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
            }
        }
        uint64_t table = entries == 0 ? 0 : dcp_block_table_bytes(entries, blocks);
        CHECK_EQ(file->table_bytes, table);
        CHECK_EQ(file->table_offset_bytes, table == 0 ? end : dcp_align_up(end, 8));
        uint64_t hash = plan->content_hash ? dcp_hash_table_bytes(file->records_count) : 0;
        uint64_t table_end = file->table_offset_bytes + table;
        CHECK_EQ(file->hash_bytes, hash);
        CHECK_EQ(file->hash_offset_bytes, hash == 0 ? table_end : dcp_align_up(table_end, 8));
        CHECK_EQ(file->length_bytes, file->hash_offset_bytes + hash);
        total += file->length_bytes;
    }
    CHECK_EQ(layout->records_count, seen);
    CHECK_EQ(layout->total_bytes, total);
    for (uint32_t i = 0; i < plan->items_count; i++) {
        CHECK(placed[i] == dcp_keep_test(keep, i));
    }
    free(placed);
}

static void
records_lie_in_order_aligned_and_apart_and_layouts_repeat(void)
{
    for (uint64_t seed = 0; seed < 300; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plan;
        struct dcp_layout layout, again;
        struct dcp_error err = {0};
        uint8_t keep[16];
        maker_random_plan(&rng, &plan, 1, (uint32_t)maker_below(&rng, 100));
        for (uint32_t i = 0; i < sizeof keep; i++) {
            keep[i] = (uint8_t)(seed % 2 == 0 ? 0xFF : maker_next(&rng));
        }
        CHECK_OK(dcp_layout_build(&plan, seed % 4 == 0 ? NULL : keep, &layout, &err), &err);
        check_layout(&plan, keep, &layout);
        CHECK(!plan.single_file_per_rank || layout.files_count == plan.thread_count);
        CHECK(plan.single_file_per_rank || layout.files_count == layout.records_count);
        CHECK_OK(dcp_layout_build(&plan, keep, &again, &err), &err);
        CHECK(memcmp(layout.records, again.records,
                     layout.records_count * sizeof *layout.records) == 0);
        dcp_layout_clean_up(&again);
        dcp_layout_clean_up(&layout);
        dcp_layout_clean_up(&layout);
        dcp_plan_clean_up(&plan);
    }
}

/* Item indices of the layout's records, one digit each, a bar between files. */
static void
spell(const struct dcp_layout *layout, char *text)
{
    for (uint32_t f = 0; f < layout->files_count; f++) {
        for (uint32_t i = 0; i < layout->files[f].records_count; i++) {
            *text++ = (char)('0' + layout->records[layout->files[f].first_record + i].item);
        }
        *text++ = '|';
    }
    *text = 0;
}

static void
files_get_objects_first_and_then_what_torch_would_give_them(void)
{
    struct dcp_plan plan = {.single_file_per_rank = true};
    struct dcp_error err = {0};
    char text[64];
    uint64_t sizes[] = {3000, 1000, 5000, 1000};
    maker_tensor(&plan, "a", DCP_DTYPE_INT8, 1, &sizes[0]);
    maker_object(&plan, "b", 512);
    maker_tensor(&plan, "c", DCP_DTYPE_INT8, 1, &sizes[1]);
    maker_object(&plan, "d", 512);
    maker_tensor(&plan, "e", DCP_DTYPE_INT8, 1, &sizes[2]);
    maker_tensor(&plan, "f", DCP_DTYPE_INT8, 1, &sizes[3]);
    static const struct {
        uint32_t thread_count;
        bool single;
        const char *files;
    } cases[] = {
        {1, true, "130245|"},    {2, true, "14|3025|"}, /* objects round robin; 5000 to file 0, the
                                                           rest to file 1 */
        {4, true, "12|35|4|0|"}, {1, false, "0|1|2|3|4|5|"}, {3, false, "0|1|2|3|4|5|"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct dcp_layout layout;
        plan.thread_count = cases[i].thread_count;
        plan.single_file_per_rank = cases[i].single;
        CHECK_OK(dcp_layout_build(&plan, NULL, &layout, &err), &err);
        spell(&layout, text);
        CHECK(strcmp(text, cases[i].files) == 0);
        if (strcmp(text, cases[i].files) != 0) {
            fprintf(stderr, "  got %s\n", text);
        }
        dcp_layout_clean_up(&layout);
    }
    dcp_plan_clean_up(&plan);
}

static void
more_threads_than_items_give_files_that_are_headers(void)
{
    struct dcp_plan plan = {.single_file_per_rank = true, .thread_count = 3};
    struct dcp_error err = {0};
    struct dcp_layout layout;
    maker_object(&plan, "a", 700);
    CHECK_OK(dcp_layout_build(&plan, NULL, &layout, &err), &err);
    CHECK_EQ(layout.files_count, 3);
    CHECK_EQ(layout.files[0].length_bytes, DCP_FILE_HEADER_BYTES + 700);
    CHECK_EQ(layout.files[2].length_bytes, DCP_FILE_HEADER_BYTES);
    CHECK_EQ(layout.total_bytes, 3 * DCP_FILE_HEADER_BYTES + 700);
    dcp_layout_clean_up(&layout);
    dcp_plan_clean_up(&plan);
}

static void
hash_tables_lie_behind_everything_and_move_nothing(void)
{
    struct dcp_plan plan = {.single_file_per_rank = true, .thread_count = 3};
    struct dcp_error err = {0};
    struct dcp_layout without, with;
    uint64_t size[] = {(1 << 20) + 3};
    maker_object(&plan, "a", 701);
    maker_tensor(&plan, "b", DCP_DTYPE_INT8, 1, size);
    CHECK_OK(dcp_layout_build(&plan, NULL, &without, &err), &err);
    plan.content_hash = true;
    CHECK_OK(dcp_layout_build(&plan, NULL, &with, &err), &err);
    CHECK(memcmp(with.records, without.records, 2 * sizeof *with.records) == 0);
    for (uint32_t f = 0; f < 3; f++) {
        const struct dcp_placed_file *file = &with.files[f];
        uint64_t end = without.files[f].length_bytes;
        CHECK_EQ(file->table_offset_bytes, without.files[f].table_offset_bytes);
        CHECK_EQ(file->table_bytes, without.files[f].table_bytes);
        CHECK_EQ(without.files[f].hash_bytes, 0);
        CHECK_EQ(without.files[f].hash_offset_bytes, end);
        CHECK_EQ(file->hash_bytes, dcp_hash_table_bytes(file->records_count));
        CHECK_EQ(file->hash_offset_bytes, f == 2 ? end : dcp_align_up(end, 8));
        CHECK_EQ(file->length_bytes, file->hash_offset_bytes + file->hash_bytes);
    }
    CHECK_EQ(with.files[2].length_bytes, DCP_FILE_HEADER_BYTES);
    dcp_layout_clean_up(&with);
    dcp_layout_clean_up(&without);
    dcp_plan_clean_up(&plan);
}

static void
ready_made_tensor_records_are_placed_like_objects(void)
{
    struct dcp_plan plan = {.single_file_per_rank = true, .thread_count = 1};
    struct dcp_error err = {0};
    struct dcp_layout layout;
    uint64_t size[] = {4 << 20};
    maker_tensor(&plan, "q", DCP_DTYPE_QINT8, 1, size);
    plan.items[0].slot_bytes = (4 << 20) + 1500;
    maker_object(&plan, "o", 600);
    CHECK_OK(dcp_layout_build(&plan, NULL, &layout, &err), &err);
    CHECK_EQ(layout.records[1].item, 0);
    CHECK_EQ(layout.records[1].offset_bytes, DCP_LARGE_ALIGN_BYTES);
    CHECK_EQ(layout.records[1].length_bytes, (4 << 20) + 1500);
    CHECK_EQ(layout.records[1].payload_offset_bytes, layout.records[1].offset_bytes);
    CHECK_EQ(layout.records[1].payload_bytes, layout.records[1].length_bytes);
    CHECK_EQ(layout.files[0].table_bytes, 0);
    dcp_layout_clean_up(&layout);
    dcp_plan_clean_up(&plan);
}

static void
limits_of_alignment_and_block_table_are_met_to_the_byte(void)
{
    static const struct {
        uint64_t payload_bytes;
        uint64_t align;
        bool table;
    } cases[] = {
        {DCP_MEDIUM_PAYLOAD_BYTES - 1, 1, false},
        {DCP_MEDIUM_PAYLOAD_BYTES, DCP_MEDIUM_ALIGN_BYTES, false},
        {DCP_LARGE_PAYLOAD_BYTES - 1, DCP_MEDIUM_ALIGN_BYTES, false},
        {DCP_LARGE_PAYLOAD_BYTES, DCP_LARGE_ALIGN_BYTES, false},
        {DCP_BLOCK_BYTES + 1, DCP_LARGE_ALIGN_BYTES, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct dcp_plan plan = {.single_file_per_rank = true, .thread_count = 1};
        struct dcp_layout layout;
        struct dcp_error err = {0};
        maker_object(&plan, "o", 601);
        maker_tensor(&plan, "t", DCP_DTYPE_INT8, 1, &cases[i].payload_bytes);
        CHECK_OK(dcp_layout_build(&plan, NULL, &layout, &err), &err);
        uint64_t payload_at =
            DCP_FILE_HEADER_BYTES + 601 + dcp_record_head_bytes(cases[i].payload_bytes);
        CHECK_EQ(layout.records[1].payload_offset_bytes, dcp_align_up(payload_at, cases[i].align));
        CHECK((layout.files[0].table_bytes != 0) == cases[i].table);
        dcp_layout_clean_up(&layout);
        dcp_plan_clean_up(&plan);
    }
}

static void
layouts_that_cannot_be_are_refused(void)
{
    struct dcp_plan plan = {.single_file_per_rank = true};
    struct dcp_layout layout;
    struct dcp_error err = {0};
    CHECK_EQ(dcp_layout_build(&plan, NULL, &layout, &err), DCP_E_INVALID);
    dcp_error_clear(&err);
    plan.thread_count = 1;
    maker_object(&plan, "o", 0);
    CHECK_EQ(dcp_layout_build(&plan, NULL, &layout, &err), DCP_E_INVALID);
    dcp_error_clear(&err);
    uint64_t size[] = {1ull << 56};
    plan.items[0].slot_bytes = 512;
    for (uint32_t i = 0; i < 70; i++) {
        maker_tensor(&plan, "huge", DCP_DTYPE_INT8, 1, size);
    }
    CHECK_EQ(dcp_layout_build(&plan, NULL, &layout, &err), DCP_E_LIMIT);
    dcp_plan_clean_up(&plan);
}

CTEST_MAIN(RUN(records_lie_in_order_aligned_and_apart_and_layouts_repeat);
           RUN(files_get_objects_first_and_then_what_torch_would_give_them);
           RUN(more_threads_than_items_give_files_that_are_headers);
           RUN(hash_tables_lie_behind_everything_and_move_nothing);
           RUN(ready_made_tensor_records_are_placed_like_objects);
           RUN(limits_of_alignment_and_block_table_are_met_to_the_byte);
           RUN(layouts_that_cannot_be_are_refused);)

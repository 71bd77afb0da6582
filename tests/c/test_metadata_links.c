/*
 * test_metadata_links.c: a checkpoint that takes over records of earlier saves: everything has one
 * place, the saves are listed, and what does not fit together is refused.
 */
#include "ctest.h"

#include "dcp_crc32.h"
#include "metadata_subject.h"
#include "metadata_private.h"
#include "plan_maker.h"

static struct dcp_error err;

static int
write_links(const struct metadata_sample *sample, const struct dcp_links *links,
            struct dcp_buf *image)
{
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    dcp_error_clear(&err);
    return dcp_metadata_write(&sample->global, &meta, &sample->save_id, SAMPLE_N0, links, image,
                              &err);
}

static void
index_and_pickle_say_the_same(void)
{
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct subject s;
        bool same = false;
        make_subject(&s, seed, true);
        CHECK(s.md.is_native && s.md.accepted_count > 0);
        CHECK_OK(metadata_read_copy(s.image.data, s.image.len, true, &s.md, &same, &err), &err);
        CHECK(same);
        for (uint64_t c = 0; c < s.md.chunks_count; c++) {
            CHECK(s.md.chunks[c].file != DCP_NO_FILE);
        }
        clean_up_subject(&s);
    }
}

/* Whether a chunk of the item's name has this place, in a file of this name. */
static bool
has_place(const struct subject *s, uint32_t p, uint32_t item_index, uint64_t n, uint64_t offset,
          uint64_t length)
{
    const struct dcp_plan *plan = &s->sample.plans[p];
    const struct dcp_item *item = &plan->items[item_index];
    const struct dcp_name *name = &plan->names[item->name];
    const struct dcp_md_entry *entry = dcp_metadata_find(&s->md, name->fqn, name->fqn_len);
    char file[64];
    snprintf(file, sizeof file, "__%u_%llu.distcp", p, (unsigned long long)(SAMPLE_N0 + n));
    for (uint64_t c = 0; entry != NULL && c < entry->chunks_count; c++) {
        const struct dcp_md_chunk *chunk = &s->md.chunks[entry->first_chunk + c];
        const struct dcp_md_file *named = &s->md.files[chunk->file];
        if (memcmp(s->md.dims + chunk->dims, dcp_item_offsets(plan, item),
                   item->ndim * sizeof(uint64_t)) == 0 &&
            chunk->offset_bytes == offset && chunk->length_bytes == length &&
            named->name_len == strlen(file) &&
            memcmp(s->md.strings + named->name, file, named->name_len) == 0) {
            return true;
        }
    }
    return false;
}

static void
written_and_linked_records_are_where_they_are_said_to_be(void)
{
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct subject s;
        uint64_t checked = 0;
        make_subject(&s, seed, true);
        for (uint32_t p = 0; p < SAMPLE_RANKS; p++) {
            const struct dcp_layout *layout = &s.sample.global.layouts[p];
            for (uint32_t r = 0; r < layout->records_count; r++, checked++) {
                const struct dcp_placed_record *at = &layout->records[r];
                CHECK(has_place(&s, p, at->item, at->file, at->offset_bytes, at->length_bytes));
            }
        }
        const struct dcp_links *links = &s.sample.links;
        for (uint64_t r = 0; r < links->records_count; r++, checked++) {
            const struct dcp_linked_record *at = &links->records[r];
            CHECK(has_place(&s, at->plan, at->item, links->files[at->file].n, at->offset_bytes,
                            at->length_bytes));
        }
        CHECK_EQ(checked, s.md.chunks_count);
        CHECK(links->records_count > 0 && links->records_count < checked);
        clean_up_subject(&s);
    }
}

/* storage_data: of each plan what it writes, in the order of its files, then what it links. */
static void
links_follow_what_their_plan_writes(void)
{
    struct subject s;
    make_subject(&s, 4, true);
    struct dcp_metadata md = {0};
    struct dcp_md_record *records = NULL;
    uint64_t count = 0, at = 0, link = 0;
    CHECK_OK(dcp_metadata_from_plan(&s.sample.global, &s.sample.links, SAMPLE_N0, &md, &records,
                                    &count, &err),
             &err);
    CHECK_EQ(count, md.chunks_count);
    for (uint32_t p = 0; p < SAMPLE_RANKS; p++) {
        const struct dcp_layout *layout = &s.sample.global.layouts[p];
        for (uint32_t r = 0; r < layout->records_count; r++, at++) {
            const struct dcp_md_entry *entry = &md.entries[records[at].entry];
            CHECK_EQ(md.chunks[entry->first_chunk + records[at].hint].offset_bytes,
                     layout->records[r].offset_bytes);
        }
        for (; link < s.sample.links.records_count && s.sample.links.records[link].plan == p;
             link++, at++) {
            const struct dcp_md_entry *entry = &md.entries[records[at].entry];
            CHECK_EQ(md.chunks[entry->first_chunk + records[at].hint].offset_bytes,
                     s.sample.links.records[link].offset_bytes);
        }
    }
    CHECK_EQ(at, count);
    dcp_metadata_clean_up(&md);
    dcp_free(records);
    clean_up_subject(&s);
}

static void
the_saves_of_linked_files_are_accepted_and_no_others(void)
{
    struct subject s;
    make_subject(&s, 6, true);
    const struct dcp_links *links = &s.sample.links;
    CHECK(dcp_metadata_accepts(&s.md, &s.sample.save_id));
    for (uint32_t f = 0; f < links->files_count; f++) {
        struct dcp_save_id near = links->files[f].save_id;
        CHECK(dcp_metadata_accepts(&s.md, &near));
        near.bytes[15] ^= 1;
        CHECK(!dcp_metadata_accepts(&s.md, &near));
    }
    CHECK(s.md.accepted_count < links->files_count); /* two files of one save among them */
    for (uint32_t i = 1; i < s.md.accepted_count; i++) {
        CHECK(memcmp(&s.md.accepted[i - 1], &s.md.accepted[i], sizeof s.md.accepted[i]) < 0);
    }
    struct dcp_metadata stock = {0};
    CHECK_OK(dcp_metadata_read_pickle(s.image.data, s.image.len, &stock, &err), &err);
    CHECK_EQ(stock.accepted_count, 0);
    dcp_metadata_clean_up(&stock);
    clean_up_subject(&s);
}

static void
no_links_leave_no_trace(void)
{
    struct metadata_sample sample;
    struct dcp_buf plain = {0}, empty = {0};
    struct dcp_links none = {0};
    struct dcp_metadata_footer footer;
    metadata_sample_make(&sample, 8);
    CHECK_OK(write_links(&sample, NULL, &plain), &err);
    CHECK_OK(write_links(&sample, &none, &empty), &err);
    CHECK(plain.len == empty.len && memcmp(plain.data, empty.data, plain.len) == 0);
    CHECK(dcp_metadata_footer_parse(plain.data, plain.len, &footer));
    CHECK_EQ(footer.pickle_bytes + footer.index_bytes + DCP_METADATA_FOOTER_BYTES, plain.len);
    /* Both numbers stand where older readers want zeros. */
    const uint8_t *bytes = plain.data + plain.len - DCP_METADATA_FOOTER_BYTES;
    static const uint8_t zeros[4] = {0};
    CHECK(memcmp(bytes + 12, zeros, 4) == 0 && memcmp(bytes + 56, zeros, 4) == 0);
    dcp_buf_clean_up(&plain);
    dcp_buf_clean_up(&empty);
    dcp_links_clean_up(&none);
    dcp_links_clean_up(NULL);
    metadata_sample_clean_up(&sample);
}

static void
a_save_that_writes_nothing_links_everything(void)
{
    struct dcp_plan plan;
    struct dcp_global_plan global = {0};
    struct dcp_storage_meta meta = {0};
    struct dcp_save_id id = {.bytes = {9}};
    struct dcp_buf image = {0};
    struct dcp_metadata md = {0};
    uint64_t size[1] = {4};
    uint8_t nothing[1] = {0};
    maker_start_plans(&plan, 1);
    maker_tensor(&plan, "w", DCP_DTYPE_UINT8, 1, size);
    dcp_error_clear(&err);
    CHECK_OK(dcp_global_plan_build(&plan, 1, false, &global, &err), &err);
    dcp_layout_clean_up(&global.layouts[0]);
    CHECK_OK(dcp_layout_build(&plan, nothing, &global.layouts[0], &err), &err);
    struct dcp_linked_file file = {.plan = 0, .n = 1, .save_id = {.bytes = {7}}};
    struct dcp_linked_record record = {.offset_bytes = 64, .length_bytes = 600};
    struct dcp_links links = {&file, &record, 1, 1};
    CHECK_OK(dcp_metadata_write(&global, &meta, &id, 5, &links, &image, &err), &err);
    CHECK_OK(dcp_metadata_read(image.data, image.len, &md, &err), &err);
    CHECK_EQ(md.files_count, 1);
    CHECK(md.files_count == 1 && md.files[0].name_len == strlen("__0_6.distcp") &&
          memcmp(md.strings + md.files[0].name, "__0_6.distcp", md.files[0].name_len) == 0);
    dcp_metadata_clean_up(&md);
    dcp_buf_clean_up(&image);
    dcp_global_plan_clean_up(&global);
    maker_clean_up_plans(&plan, 1);
}

/* Each breaks one promise of the contract. */
static void
break_links(struct metadata_sample *sample, int way)
{
    struct dcp_links *links = &sample->links;
    struct dcp_linked_file *file = &links->files[1], *file0 = &links->files[0];
    struct dcp_linked_record *record = &links->records[3];
    switch (way) {
    case 0: /* a chunk without a place */
        links->records_count--;
        break;
    case 1: /* twice the same item */
        record[0] = record[-1];
        break;
    case 2:
        record->plan = SAMPLE_RANKS;
        break;
    case 3:
        record->item = sample->plans[record->plan].items_count;
        break;
    case 4:
        record->file = links->files_count;
        break;
    case 5: { /* out of order */
        struct dcp_linked_record t = record[0];
        record[0] = record[1];
        record[1] = t;
        break;
    }
    case 6: /* written as well: the item before a linked one */
        for (record = links->records; record->plan == 0; record++) {
            uint32_t before = record->item - 1;
            bool linked = record > links->records && record[-1].item == before;
            if (record->item > 0 && !linked && dcp_keep_test(sample->global.keep.bits[0], before)) {
                record->item = before;
                return;
            }
        }
        CHECK(!"no such item");
        break;
    case 7: /* the name of a file that is written */
        file0->n = sample->global.layouts[file0->plan].files_count - 1;
        break;
    case 8:
        *file = *file0;
        break;
    case 9:
        file->save_id = sample->save_id;
        break;
    case 10:
        memset(&file->save_id, 0, sizeof file->save_id);
        break;
    case 11:
        file->plan = SAMPLE_RANKS;
        break;
    default: /* the last plan's last file, so that the order holds */
        links->files[links->files_count - 1].n = way == 12 ? UINT32_MAX : UINT64_MAX;
    }
}

static void
links_that_do_not_fit_are_refused(void)
{
    static const char *const says[14] = {"records for",           "is out of order",
                                         "is of no item or file", "is of no item or file",
                                         "is of no item or file", "is out of order",
                                         "has two places",        "takes the name of a file",
                                         "is out of order",       "by no earlier save",
                                         "by no earlier save",    "takes the name of a file",
                                         "over 32 bits",          "over 32 bits"};
    for (int way = 0; way < 14; way++) {
        struct metadata_sample sample;
        struct dcp_buf image = {0};
        metadata_sample_make(&sample, 10);
        metadata_sample_link(&sample, 10);
        CHECK(sample.links.records_count > 5 && sample.links.files_count > 2);
        break_links(&sample, way);
        CHECK_EQ(write_links(&sample, &sample.links, &image),
                 way < 12 ? DCP_E_INTERNAL : DCP_E_LIMIT);
        CHECK(strstr(err.message, says[way]) != NULL);
        dcp_buf_clean_up(&image);
        metadata_sample_clean_up(&sample);
    }
}

static void
files_of_too_many_saves_are_refused(void)
{
    struct metadata_sample sample;
    enum { MOST = DCP_MAX_ACCEPTED_SAVES };
    struct dcp_linked_file *files = dcp_calloc(MOST + 1, sizeof *files);
    metadata_sample_make(&sample, 1);
    for (uint32_t i = 0; i <= MOST; i++) {
        files[i].n = 10 + i;
        files[i].save_id = (struct dcp_save_id){
            .bytes = {200, (uint8_t)(i * 7), (uint8_t)(i >> 8), (uint8_t)(i >> 16)}};
    }
    for (uint32_t extra = 0; extra < 2; extra++) {
        struct dcp_links links = {.files = files, .files_count = MOST + extra};
        struct dcp_buf image = {0};
        struct dcp_metadata md = {0};
        CHECK_EQ(write_links(&sample, &links, &image), extra == 0 ? 0 : DCP_E_LIMIT);
        if (extra == 0) {
            CHECK_OK(dcp_metadata_read(image.data, image.len, &md, &err), &err);
            CHECK(md.is_native && md.accepted_count == MOST);
            CHECK(dcp_metadata_accepts(&md, &files[12345].save_id));
            CHECK(!dcp_metadata_accepts(&md, &files[MOST].save_id));
        }
        dcp_metadata_clean_up(&md);
        dcp_buf_clean_up(&image);
    }
    dcp_free(files);
    metadata_sample_clean_up(&sample);
}

/* The list has no second copy, so damage to it is damage to the checkpoint. */
static void
every_flipped_bit_of_the_list_is_found(void)
{
    struct subject s;
    make_subject(&s, 12, true);
    size_t start = (size_t)(s.footer.pickle_bytes + s.footer.index_bytes);
    size_t end = s.image.len - DCP_METADATA_FOOTER_BYTES;
    CHECK_EQ(end - start, 16 * s.md.accepted_count);
    for (size_t bit = 8 * start; bit < 8 * s.image.len; bit++) {
        bool same = false;
        s.image.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        int rc = metadata_read_copy(s.image.data, s.image.len, false, &s.md, &same, &err);
        /* A footer that does not hold together says nothing: the pickle is read. */
        CHECK_EQ(rc, bit / 8 < end ? DCP_E_CORRUPT : 0);
        s.image.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    clean_up_subject(&s);
}

/* Right in every checksum, but not what we write. */
static void
a_lying_list_is_refused(void)
{
    for (int lie = 0; lie < 5; lie++) {
        struct subject s;
        make_subject(&s, 14, true);
        CHECK(s.footer.accepted_count >= 2);
        size_t start = (size_t)(s.footer.pickle_bytes + s.footer.index_bytes);
        uint8_t *ids = s.image.data + start;
        size_t ids_bytes = 16 * (size_t)s.footer.accepted_count;
        int want = DCP_E_CORRUPT;
        if (lie == 0) { /* twice the same */
            memcpy(ids + 16, ids, 16);
        } else if (lie == 1) { /* descending */
            memset(ids, 0xFF, 16);
        } else if (lie == 2) { /* the checkpoint's own */
            memset(ids, 0, 16);
            memcpy(ids, s.sample.save_id.bytes, 16);
        } else { /* more than there is room for: no footer of ours, so the pickle is read */
            s.footer.accepted_count = lie == 3 ? DCP_MAX_ACCEPTED_SAVES : UINT32_MAX;
            want = 0;
        }
        s.footer.accepted_crc = dcp_crc32(0, ids, ids_bytes);
        s.image.len -= DCP_METADATA_FOOTER_BYTES;
        dcp_metadata_footer_put(&s.image, &s.footer);
        CHECK_EQ(metadata_read_copy(s.image.data, s.image.len, false, NULL, NULL, &err), want);
        clean_up_subject(&s);
    }
}

/* What the coordinator of a load sends in place of the file. */
static void
the_end_of_an_image_says_what_the_whole_says(void)
{
    for (unsigned linked = 0; linked < 2; linked++) {
        struct subject s;
        make_subject(&s, 18 + linked, linked == 1);
        CHECK_EQ(s.md.tail_at, s.footer.pickle_bytes);
        size_t len = s.image.len - (size_t)s.md.tail_at;
        uint8_t *tail = dcp_malloc(len);
        memcpy(tail, s.image.data + s.md.tail_at, len);
        struct dcp_metadata md = {0};
        dcp_error_clear(&err);
        CHECK_OK(dcp_metadata_read_tail(tail, len, &md, &err), &err);
        CHECK(metadata_is_same(&md, &s.md) && md.is_native);
        CHECK(memcmp(&md.save_id, &s.md.save_id, sizeof md.save_id) == 0);
        CHECK_EQ(md.accepted_count, s.md.accepted_count);
        dcp_metadata_clean_up(&md);
        for (size_t bit = 0; bit < 8 * len; bit += 3) {
            tail[bit / 8] ^= (uint8_t)(1u << bit % 8);
            dcp_error_clear(&err);
            CHECK_EQ(dcp_metadata_read_tail(tail, len, &md, &err), DCP_E_CORRUPT);
            CHECK_EQ(err.code, DCP_E_CORRUPT);
            tail[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
        for (size_t cut = 1; cut <= len; cut++) {
            dcp_error_clear(&err);
            CHECK_EQ(dcp_metadata_read_tail(tail, len - cut, &md, &err), DCP_E_CORRUPT);
        }
        dcp_error_clear(&err); /* the whole is no end */
        CHECK_EQ(dcp_metadata_read_tail(s.image.data, s.image.len, &md, &err), DCP_E_CORRUPT);
        /* Without a good index only the whole helps. */
        s.image.data[s.footer.pickle_bytes + 2] ^= 0x40;
        dcp_error_clear(&err);
        CHECK_OK(dcp_metadata_read(s.image.data, s.image.len, &md, &err), &err);
        CHECK_EQ(md.tail_at, 0);
        dcp_metadata_clean_up(&md);
        dcp_free(tail);
        clean_up_subject(&s);
    }
}

static void
running_out_of_memory_is_an_error_and_leaks_nothing(void)
{
    struct subject s;
    make_subject(&s, 16, true);
    for (unsigned way = 0; way < 2; way++) {
        bool succeeded = false;
        for (uint64_t n = 1; n < 500 && !succeeded; n++) {
            struct dcp_metadata md = {0};
            struct dcp_buf image = {0};
            dcp_error_clear(&err);
            dcp_alloc_fail_after(n);
            int rc = way == 0 ? write_links(&s.sample, &s.sample.links, &image)
                              : dcp_metadata_read(s.image.data, s.image.len, &md, &err);
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

CTEST_MAIN(RUN(index_and_pickle_say_the_same);
           RUN(written_and_linked_records_are_where_they_are_said_to_be);
           RUN(links_follow_what_their_plan_writes);
           RUN(the_saves_of_linked_files_are_accepted_and_no_others); RUN(no_links_leave_no_trace);
           RUN(a_save_that_writes_nothing_links_everything); RUN(links_that_do_not_fit_are_refused);
           RUN(files_of_too_many_saves_are_refused); RUN(every_flipped_bit_of_the_list_is_found);
           RUN(a_lying_list_is_refused); RUN(the_end_of_an_image_says_what_the_whole_says);
           RUN(running_out_of_memory_is_an_error_and_leaks_nothing);)

/*
 * test_incremental.c: what a save with a base takes over, what it writes anew, and what it can be
 * told by hostile bases and ranks.
 */
#include <errno.h>

#include "ctest.h"
#include "incremental.h"
#include "incremental_world.h"
#include "plan_maker.h"

#define BASE "/base"
#define NEXT "/next"

static const struct tensors plain = {
    .count = 5, .lengths = {1000, 300000, 20, 5000, 0}, .two_rows = 2, .strided = 8};

static void
save(struct io_memory *fs, const struct tensors *tensors, const char *dir, const char *base,
     struct dcp_save_info *info)
{
    struct saving saving = {.dir = dir, .base = base, .content_hash = base == NULL};
    tensors_save(NULL, fs, tensors, &saving, info);
}

/* ---- what is reused ---- */

static void
what_has_not_changed_is_linked_and_the_base_may_go(void)
{
    for (int i = 0; i < 8; i++) {
        struct io_memory *fs = io_memory_new((uint64_t)i);
        struct tensors first = plain, second = plain;
        bool independent = i / 4 != 0;
        struct saving saving = {.dir = BASE, .content_hash = true, .independent = independent};
        struct dcp_save_info info;

        tensors_save(NULL, fs, &first, &saving, &info);
        CHECK(!info.incremental && info.base_reason[0] == '\0');
        second.versions[0] = 1;
        saving = (struct saving){.dir = i % 2 == 0 ? NEXT : BASE,
                                 .base = BASE,
                                 .mode = i / 2 % 2 == 0 ? DCP_LINK_REFLINK : DCP_LINK_HARD,
                                 .independent = independent};
        tensors_save(NULL, fs, &second, &saving, &info);
        CHECK(info.incremental && info.base_reason[0] == '\0');
        CHECK_EQ(info.reused_items, 4);
        CHECK(info.reused_bytes > 300000 * 4);
        CHECK_EQ(info.linked_files, 1);
        CHECK_EQ(info.write.payload_bytes, 1000 * 4);
        CHECK(tensors_load(fs, &second, saving.dir, independent));
        if (i % 2 == 0) {
            CHECK(tensors_load(fs, &first, BASE, independent));
            tensors_remove(fs, BASE);
            CHECK(tensors_load(fs, &second, NEXT, independent));
        }
        /* Metadata, the file that was written, the link. */
        CHECK_EQ(io_memory_names_count(fs, saving.dir), 3);
        const char *link = i % 2 == 0 ? "__0_1.distcp" : "__0_2.distcp";
        CHECK_EQ(io_memory_file_mode(fs, saving.dir, link),
                 saving.mode == DCP_LINK_HARD ? 0444 : 0644);
        CHECK_EQ(io_memory_open_files(fs), 0);
        io_memory_free(fs);
    }
    dcp_engine_trim();
}

static void
nothing_changed_links_everything(void)
{
    struct io_memory *fs = io_memory_new(1);
    struct tensors tensors = plain;
    struct dcp_save_info info;

    tensors.thread_count = 3;
    save(fs, &tensors, BASE, NULL, &info);
    save(fs, &tensors, NEXT, BASE, &info);
    CHECK_EQ(info.reused_items, 5);
    CHECK_EQ(info.linked_files, 3);
    CHECK_EQ(info.write.payload_bytes, 0);
    CHECK(tensors_load(fs, &tensors, NEXT, false));
    io_memory_free(fs);
    dcp_engine_trim();
}

/* Versions change at random; every save is incremental to the one before, and all of them load. */
static void
a_long_chain_loads_and_carries_no_more_dead_bytes_than_live_ones(void)
{
    enum { STEPS = 40 };
    for (int per_item = 0; per_item < 2; per_item++) {
        struct io_memory *fs = io_memory_new(7);
        struct tensors tensors = {.count = 12, .file_per_item = per_item != 0, .thread_count = 2};
        struct maker_rng rng = {.state = 11};
        struct dcp_save_info info;
        unsigned reused = 0, anew = 0;

        for (uint32_t i = 0; i < tensors.count; i++) {
            tensors.lengths[i] = 10 + maker_below(&rng, 3000);
        }
        save(fs, &tensors, BASE, NULL, &info);
        for (int step = 0; step < STEPS; step++) {
            uint64_t changes = maker_below(&rng, 5), bytes = 0;
            for (uint64_t c = 0; c < changes; c++) {
                tensors.versions[maker_below(&rng, tensors.count)]++;
            }
            save(fs, &tensors, BASE, BASE, &info);
            CHECK(tensors_load(fs, &tensors, BASE, false));
            CHECK(info.linked_files <= DCP_MOST_LINKS);
            CHECK(info.reused_items + changes <= tensors.count + changes);
            reused += info.reused_items > 0;
            anew += info.reused_items + changes < tensors.count;
            for (size_t i = 0; i < io_memory_names_count(fs, BASE); i++) {
                size_t len;
                const char *name = io_memory_name(fs, BASE, i);
                CHECK(io_memory_file(fs, BASE, name, &len) != NULL);
                bytes += strcmp(name, ".metadata") == 0 ? 0 : len;
            }
            CHECK(bytes <= 2 * info.reused_bytes + info.write.file_bytes);
        }
        CHECK(reused > STEPS / 2);
        CHECK(anew > 3); /* half-dead files, or too many */
        io_memory_free(fs);
    }
    dcp_engine_trim();
}

static void
a_file_of_which_less_than_half_is_in_use_is_written_anew(void)
{
    struct io_memory *fs = io_memory_new(3);
    struct tensors tensors = {.count = 3, .lengths = {4000, 4000, 4000}};
    struct dcp_save_info info;

    save(fs, &tensors, BASE, NULL, &info);
    tensors.versions[0] = 1;
    save(fs, &tensors, BASE, BASE, &info);
    CHECK_EQ(info.reused_items, 2);
    tensors.versions[1] = 1;
    save(fs, &tensors, BASE, BASE, &info);
    CHECK_EQ(info.reused_items, 1); /* tensor 0, in a file of its own; 2 is a third of the first */
    CHECK(strstr(info.base_reason, "less than half") != NULL);
    CHECK(tensors_load(fs, &tensors, BASE, false));
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
of_many_files_the_eight_with_most_bytes_are_linked(void)
{
    struct io_memory *fs = io_memory_new(3);
    struct tensors tensors = {.count = 12, .file_per_item = true};
    struct dcp_save_info info;

    for (uint32_t i = 0; i < tensors.count; i++) {
        tensors.lengths[i] = 1000 + 500 * ((i * 5) % 12);
    }
    save(fs, &tensors, BASE, NULL, &info);
    save(fs, &tensors, NEXT, BASE, &info);
    CHECK_EQ(info.reused_items, DCP_MOST_LINKS);
    CHECK_EQ(info.linked_files, DCP_MOST_LINKS);
    CHECK_EQ(info.write.payload_bytes, 4 * (1000 + 1500 + 2000 + 2500));
    CHECK(strstr(info.base_reason, "too many files") != NULL);
    CHECK(tensors_load(fs, &tensors, NEXT, false));
    io_memory_free(fs);
    dcp_engine_trim();
}

/* ---- what is not ---- */

enum bad_base {
    BAD_ABSENT,
    BAD_EMPTY,
    BAD_METADATA_FLIPPED,
    BAD_METADATA_STOCK,
    BAD_WITHOUT_HASHES,
    BAD_WITHOUT_CLONES,
    BAD_FILE_MISSING,
    BAD_FILE_CUT,
    BAD_FILE_OF_ANOTHER_SAVE,
    BAD_HASHES_FLIPPED,
    BAD_DTYPE,
    BAD_SHAPE,
    BAD_NAMES,
    BAD_KINDS,
};

static const char *const bad_reasons[BAD_KINDS] = {
    [BAD_ABSENT] = "no checkpoint",
    [BAD_EMPTY] = "no checkpoint",
    [BAD_METADATA_FLIPPED] = "damaged",
    [BAD_METADATA_STOCK] = "not saved by dcp_native",
    [BAD_WITHOUT_HASHES] = "without content hashes",
    [BAD_WITHOUT_CLONES] = "no reflinks",
    [BAD_FILE_MISSING] = "missing, damaged or of another",
    [BAD_FILE_CUT] = "missing, damaged",
    [BAD_FILE_OF_ANOTHER_SAVE] = "missing, damaged",
    [BAD_HASHES_FLIPPED] = "missing, damaged",
    [BAD_DTYPE] = "same names",
    [BAD_SHAPE] = "same names",
    [BAD_NAMES] = "same names",
};

static uint8_t *
copy_file(struct io_memory *fs, const char *dir, const char *name, size_t *ret_len)
{
    const uint8_t *data = io_memory_file(fs, dir, name, ret_len);
    uint8_t *copy = data == NULL ? NULL : malloc(*ret_len + 1);

    if (copy == NULL) {
        fprintf(stderr, "%s/%s is not there\n", dir, name);
        exit(1);
    }
    memcpy(copy, data, *ret_len);
    return copy;
}

static void
spoil_metadata(struct io_memory *fs, bool as_stock)
{
    size_t len;
    uint8_t *image = copy_file(fs, BASE, ".metadata", &len);

    if (as_stock) {
        len -= 64; /* the footer: what is left is a pickle with bytes behind it */
    } else {
        memset(image, 0, len);
    }
    io_memory_put_file(fs, BASE, ".metadata", image, len);
    free(image);
}

static void
spoil_file(struct io_memory *fs, enum bad_base bad)
{
    struct dcp_file_header header;
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    size_t len;
    uint8_t *data = copy_file(fs, BASE, "__0_0.distcp", &len);

    CHECK_OK(dcp_file_parse_header(data, &header, &err), &err);
    if (bad == BAD_FILE_CUT) {
        len -= 8;
    } else if (bad == BAD_HASHES_FLIPPED) {
        data[header.hash_offset_bytes + header.hash_bytes / 2] ^= 4;
    } else {
        header.save_id.bytes[3] ^= 1;
        dcp_file_put_header(&buf, &header);
        memcpy(data, buf.data, buf.len);
    }
    io_memory_put_file(fs, BASE, "__0_0.distcp", data, len);
    dcp_buf_clean_up(&buf);
    free(data);
}

static void
spoil(struct io_memory *fs, enum bad_base bad, struct tensors *next)
{
    const struct dcp_io *io = &io_memory_process(fs, 2)->io;

    switch (bad) {
    case BAD_EMPTY:
        tensors_remove(fs, BASE);
        break;
    case BAD_METADATA_FLIPPED:
    case BAD_METADATA_STOCK:
        spoil_metadata(fs, bad == BAD_METADATA_STOCK);
        break;
    case BAD_WITHOUT_CLONES:
        io_memory_set_clones(fs, false);
        break;
    case BAD_FILE_MISSING: {
        int fd = io->open_dir(io->ctx, BASE);
        CHECK_EQ(io->unlink_at(io->ctx, fd, "__0_0.distcp"), 0);
        io->close(io->ctx, fd);
        break;
    }
    case BAD_FILE_CUT:
    case BAD_FILE_OF_ANOTHER_SAVE:
    case BAD_HASHES_FLIPPED:
        spoil_file(fs, bad);
        break;
    case BAD_SHAPE:
        next->two_rows = 0;
        break;
    default:
        break;
    }
}

static void
a_base_of_no_use_means_a_full_save_and_a_reason(void)
{
    for (enum bad_base bad = 0; bad < BAD_KINDS; bad++) {
        struct io_memory *fs = io_memory_new(bad);
        struct tensors first = plain, next = plain;
        struct saving saving = {.dir = BASE, .content_hash = bad != BAD_WITHOUT_HASHES};
        struct dcp_save_info info;

        first.dtype = bad == BAD_DTYPE ? DCP_DTYPE_INT32 : 0;
        first.count = bad == BAD_NAMES ? 1 : first.count;
        if (bad != BAD_ABSENT) {
            tensors_save(NULL, fs, &first, &saving, &info);
        }
        spoil(fs, bad, &next);
        saving = (struct saving){.dir = NEXT, .base = BASE};
        tensors_save(NULL, fs, &next, &saving, &info);
        CHECK(bad == BAD_SHAPE || bad == BAD_NAMES || info.reused_items == 0);
        if (strstr(info.base_reason, bad_reasons[bad]) == NULL) {
            fprintf(stderr, "bad base %d: \"%s\"\n", (int)bad, info.base_reason);
            CHECK(false);
        }
        CHECK(tensors_load(fs, &next, NEXT, false));
        /* Metadata and the file; with a link where some of it was of use. */
        CHECK_EQ(io_memory_names_count(fs, NEXT), 2 + info.linked_files);
        CHECK_EQ(io_memory_open_files(fs), 0);
        io_memory_free(fs);
    }
    dcp_engine_trim();
}

/* Rewrites the base's hash table with one bit of one tensor's hash turned. */
static void
turn_hash_bit(struct io_memory *fs, uint32_t entry, unsigned bit)
{
    struct dcp_file_header header;
    struct dcp_hash_table table = {0};
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    size_t len;
    uint8_t *data = copy_file(fs, BASE, "__0_0.distcp", &len);

    CHECK_OK(dcp_file_parse_header(data, &header, &err), &err);
    CHECK_OK(dcp_hash_table_parse(data + header.hash_offset_bytes, header.hash_bytes,
                                  &header.save_id, &table, &err),
             &err);
    *(bit < 64 ? &table.entries[entry].hash.lo : &table.entries[entry].hash.hi) ^= 1ull << bit % 64;
    dcp_hash_table_put(&buf, &header.save_id, table.entries, table.entries_count);
    CHECK_EQ(buf.len, header.hash_bytes);
    memcpy(data + header.hash_offset_bytes, buf.data, buf.len);
    io_memory_put_file(fs, BASE, "__0_0.distcp", data, len);
    dcp_hash_table_clean_up(&table);
    dcp_buf_clean_up(&buf);
    free(data);
}

static void
all_128_bits_of_a_hash_decide(void)
{
    for (unsigned bit = 0; bit < 128; bit += bit == 0 || bit == 126 ? 1 : 7) {
        struct io_memory *fs = io_memory_new(bit);
        struct tensors tensors = {.count = 3, .lengths = {100, 100, 100}};
        struct dcp_save_info info;

        save(fs, &tensors, BASE, NULL, &info);
        turn_hash_bit(fs, 1, bit);
        save(fs, &tensors, NEXT, BASE, &info);
        CHECK_EQ(info.reused_items, 2);
        CHECK(tensors_load(fs, &tensors, NEXT, false));
        io_memory_free(fs);
    }
    dcp_engine_trim();
}

static void
a_save_can_be_cancelled_while_it_compares(void)
{
    struct io_memory *fs = io_memory_new(1);
    struct tensors tensors = plain;
    struct saving saving = {.dir = BASE, .base = BASE};
    struct dcp_failure_list failures = {0};
    struct dcp_save_info info;

    save(fs, &tensors, BASE, NULL, &info);
    CHECK_EQ(tensors_cancel(fs, &tensors, &saving, &failures), DCP_E_PEER);
    CHECK_EQ(failures.count, 1);
    CHECK_EQ(((struct dcp_error *)failures.items[0].bytes)->code, DCP_E_CANCELLED);
    CHECK_EQ(io_memory_names_count(fs, BASE), 2);
    CHECK(tensors_load(fs, &tensors, BASE, false));
    CHECK_EQ(io_memory_open_files(fs), 0);
    dcp_failure_list_clean_up(&failures);
    io_memory_free(fs);
    dcp_engine_trim();
}

/* ---- what the coordinator believes ---- */

struct told {
    struct dcp_plan plan;
    struct dcp_global_plan global;
    struct dcp_metadata md;
    struct dcp_buf image;
    struct dcp_reuse reuse;
    struct dcp_buf message;
};

static void
told_make(struct told *told)
{
    struct dcp_storage_meta meta = {.version = "1.0.0"};
    struct dcp_save_id id = {.bytes = {9}};
    struct dcp_error err = {0};
    const uint64_t size[] = {10};

    *told = (struct told){.plan = {.thread_count = 2, .single_file_per_rank = true}};
    for (int i = 0; i < 10; i++) {
        char fqn[16];
        snprintf(fqn, sizeof fqn, "t%d", i);
        maker_tensor(&told->plan, fqn, DCP_DTYPE_FLOAT32, 1, size);
    }
    CHECK_OK(dcp_global_plan_build(&told->plan, 1, false, &told->global, &err), &err);
    CHECK_OK(dcp_metadata_write(&told->global, &meta, &id, 0, NULL, &told->image, &err), &err);
    CHECK_OK(dcp_metadata_read(told->image.data, told->image.len, &told->md, &err), &err);
    CHECK_EQ(told->md.files_count, 2);
    told->reuse.reused = dcp_calloc(2, 1);
    for (uint32_t i = 0; i < 10; i++) {
        struct dcp_base_finder finder = {0};
        const struct dcp_md_chunk *chunk =
            dcp_base_find(&told->md, &told->plan, &told->plan.items[i], &finder);
        CHECK(chunk != NULL);
        if (chunk->file == 1) {
            told->reuse.reused[i >> 3] |= (uint8_t)(1u << (i & 7));
            told->reuse.items++;
        }
    }
    told->reuse.links_count = 1;
    told->reuse.links[0] = (struct dcp_link){.from = {.file = 1, .written_by = id}, .n = 2};
    CHECK_OK(dcp_reuse_encode(&told->plan, &told->reuse, &told->message, &err), &err);
}

static void
told_clean_up(struct told *told)
{
    dcp_buf_clean_up(&told->message);
    dcp_reuse_clean_up(&told->reuse);
    dcp_metadata_clean_up(&told->md);
    dcp_buf_clean_up(&told->image);
    dcp_global_plan_clean_up(&told->global);
    dcp_plan_clean_up(&told->plan);
}

static int
join(const struct told *told, const uint8_t *message, size_t len, uint64_t *ret_records)
{
    struct dcp_joined_reuse joined = {0};
    struct dcp_span span = {message, len};
    struct dcp_error err = {0};
    int rc = dcp_reuse_join(&told->md, &told->global, &span, &joined, &err);

    CHECK(rc == 0 || strstr(err.message, "rank 0") != NULL);
    *ret_records = joined.links.records_count;
    if (rc == 0) {
        CHECK_EQ(joined.layouts[0].records_count + joined.links.records_count, 10);
    }
    dcp_joined_reuse_clean_up(&joined);
    return rc;
}

static void
the_coordinator_believes_only_what_plans_and_base_bear_out(void)
{
    struct told told;
    uint64_t records, refused = 0;

    told_make(&told);
    CHECK_EQ(join(&told, told.message.data, told.message.len, &records), 0);
    CHECK_EQ(records, told.reuse.items);
    for (size_t len = 0; len < told.message.len; len++) {
        uint8_t *cut = malloc(len + 1); /* of its own, so that a read behind it is seen */
        memcpy(cut, told.message.data, len);
        CHECK_EQ(join(&told, cut, len, &records), DCP_E_COMM);
        free(cut);
    }
    for (size_t bit = 0; bit < 8 * told.message.len; bit++) {
        uint8_t *wrong = malloc(told.message.len);
        memcpy(wrong, told.message.data, told.message.len);
        wrong[bit / 8] ^= (uint8_t)(1u << bit % 8);
        bool padding = bit >= 8 * (told.message.len - 2) + 10;
        int rc = join(&told, wrong, told.message.len, &records);
        CHECK_EQ(rc, padding ? 0 : DCP_E_COMM);
        refused += rc != 0;
        free(wrong);
    }
    CHECK(refused > 300);
    told_clean_up(&told);
}

/* ---- unchanged since the last save ---- */

static void
unchanged_tensors_are_counted_by_checksum_without_a_base(void)
{
    struct io_memory *fs = io_memory_new(5);
    struct dcp_group *group = tensors_group();
    struct tensors tensors = {.count = 3, .lengths = {100, 200, 300}};
    struct saving saving = {.dir = BASE};
    struct dcp_save_info info;

    tensors_save(group, fs, &tensors, &saving, &info);
    CHECK_EQ(info.compared_items, 0);
    CHECK_EQ(info.unchanged_items, 0);
    CHECK_EQ(info.trainable_items, 3);
    tensors.versions[1]++;
    tensors_save(group, fs, &tensors, &saving, &info);
    CHECK_EQ(info.compared_items, 3);
    CHECK_EQ(info.unchanged_items, 2);
    CHECK_EQ(info.unchanged_bytes, 4 * 400);
    CHECK_EQ(info.trainable_unchanged, 2);
    tensors_save(group, fs, &tensors, &saving, &info);
    CHECK_EQ(info.trainable_unchanged, info.trainable_items);
    /* Another plan has nothing to be compared with. */
    tensors.count = 2;
    tensors_save(group, fs, &tensors, &saving, &info);
    CHECK_EQ(info.compared_items, 0);
    dcp_group_destroy(group);
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
what_is_reused_counts_as_unchanged_and_is_compared_again_when_it_is_written(void)
{
    struct io_memory *fs = io_memory_new(5);
    struct dcp_group *group = tensors_group();
    struct tensors tensors = {.count = 3, .lengths = {100, 200, 3000}};
    struct saving saving = {.dir = BASE, .content_hash = true};
    struct dcp_save_info info;

    tensors_save(group, fs, &tensors, &saving, &info);
    tensors.versions[0]++;
    saving.base = BASE;
    tensors_save(group, fs, &tensors, &saving, &info);
    CHECK_EQ(info.reused_items, 2);
    CHECK_EQ(info.compared_items, 3);
    CHECK_EQ(info.unchanged_items, 2);
    saving.base = NULL;
    tensors.versions[1]++;
    tensors_save(group, fs, &tensors, &saving, &info);
    CHECK(info.fast);
    CHECK_EQ(info.compared_items, 3); /* the base was the last save: its checksums still hold */
    CHECK_EQ(info.unchanged_items, 2);
    dcp_group_destroy(group);
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
only_what_requires_gradients_is_trained_where_anything_says_so(void)
{
    struct io_memory *fs = io_memory_new(5);
    struct tensors tensors = {.count = 2, .lengths = {100, 200}, .dtype = DCP_DTYPE_INT32};
    struct dcp_save_info info;

    save(fs, &tensors, BASE, NULL, &info);
    CHECK_EQ(info.trainable_items, 0);
    tensors.props = DCP_PROP_REQUIRES_GRAD;
    save(fs, &tensors, BASE, NULL, &info);
    CHECK_EQ(info.trainable_items, 2);
    CHECK_EQ(info.trainable_bytes, 4 * 300);
    io_memory_free(fs);
    dcp_engine_trim();
}

CTEST_MAIN(RUN(what_has_not_changed_is_linked_and_the_base_may_go);
           RUN(nothing_changed_links_everything);
           RUN(a_long_chain_loads_and_carries_no_more_dead_bytes_than_live_ones);
           RUN(a_file_of_which_less_than_half_is_in_use_is_written_anew);
           RUN(of_many_files_the_eight_with_most_bytes_are_linked);
           RUN(a_base_of_no_use_means_a_full_save_and_a_reason); RUN(all_128_bits_of_a_hash_decide);
           RUN(a_save_can_be_cancelled_while_it_compares);
           RUN(the_coordinator_believes_only_what_plans_and_base_bear_out);
           RUN(unchanged_tensors_are_counted_by_checksum_without_a_base);
           RUN(what_is_reused_counts_as_unchanged_and_is_compared_again_when_it_is_written);
           RUN(only_what_requires_gradients_is_trained_where_anything_says_so);)

/*
 * test_planned_outside.c: data files of saves that a planner of the program's own planned: objects
 * of any bytes are checked by the file's table, and no tensor is believed to be what the metadata
 * says.
 */
#include "ctest.h"

#include "record_maker.h"
#include "share.h"
#include "verify_subject.h"

enum { TENSORS = 4, LONG_BYTES = 3 << 20 };

/* Bytes of no form, of one and of several blocks, a zip, and tensors that are read in every way. */
static void
make_outside(struct subject *s)
{
    static const uint64_t sizes[][2] = {{300, 0}, {200000, 0}, {LONG_BYTES, 0}, {600, 1000}};
    static const uint64_t parts[][2] = {{1, 0}, {1, 0}, {1, 0}, {2, 1}};
    *s = (struct subject){.image = {0}};
    world_begin(&s->world);
    s->world.plan.planned_outside = true;
    world_add_bytes(&s->world, 1);
    world_add_bytes(&s->world, 700);
    world_add_bytes(&s->world, 2 * DCP_BLOCK_BYTES + 5);
    world_add_object(&s->world, 600);
    for (int i = 0; i < TENSORS; i++) {
        world_add_tensor(&s->world, i == 3 ? DCP_DTYPE_FLOAT32 : DCP_DTYPE_UINT8, i == 3 ? 2 : 1,
                         sizes[i], parts[i]);
    }
    world_finish(&s->world, 1, false);
    disk_make(&s->disk, &s->world, 512);
    put_metadata(s, ".metadata");
}

static void
the_table_lists_what_has_no_checksum_of_its_own(void)
{
    struct subject s;
    make_outside(&s);
    CHECK(world_check_files(s.disk.io, s.disk.dirfd, &s.world));
    clean_up(&s);
}

/* ---- the check ---- */

static void
an_intact_checkpoint_has_no_problem_and_nothing_unverified(void)
{
    for (int level = DCP_VERIFY_COMPLETE; level <= DCP_VERIFY_FULL; level++) {
        struct dcp_verify_options options = {.level = (enum dcp_verify_level)level};
        struct dcp_verify_result result;
        struct dcp_error err;
        struct subject s;
        make_outside(&s);
        CHECK_OK(run(s.disk.fs, DIR, &options, &result, &err), &err);
        CHECK_EQ(result.problems_found, 0);
        CHECK_EQ(result.objects_count, 4);
        CHECK_EQ(result.unverified_records_count, 0);
        dcp_verify_result_clean_up(&result);
        clean_up(&s);
    }
}

static void
any_byte_that_changes_is_found_and_named(void)
{
    struct subject s;
    struct maker_rng rng = {3};
    make_outside(&s);
    for (uint32_t i = 0; i < s.world.layout.records_count; i++) {
        const struct dcp_placed_record *record = &s.world.layout.records[i];
        const struct dcp_item *item = &s.world.plan.items[record->item];
        const struct dcp_name *name = &s.world.plan.names[item->name];
        for (int k = 0; k < 12; k++) {
            /* A zip's head and padding are of no matter; bytes of no form all are. */
            uint64_t at =
                item->kind == DCP_ITEM_BYTES
                    ? record->offset_bytes + maker_below(&rng, record->length_bytes)
                    : record->payload_offset_bytes + maker_below(&rng, record->payload_bytes);
            struct dcp_verify_problem first;
            disk_damage(&s.disk, &s.world, 0, at, 0x40, UINT64_MAX);
            CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, &first), 1);
            CHECK(strlen(first.tensor) == name->fqn_len &&
                  memcmp(first.tensor, name->fqn, name->fqn_len) == 0);
            CHECK(strstr(first.what, "checksum") != NULL || strstr(first.what, "CRC") != NULL);
            disk_damage(&s.disk, &s.world, 0, at, 0x40, UINT64_MAX);
        }
    }
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, NULL), 0);
    clean_up(&s);
}

/* A hole, as a lost write leaves it, takes the form of what was there with it. */
static void
an_object_that_became_zeros_is_a_problem(void)
{
    struct subject s;
    char name[64];
    size_t len;
    make_outside(&s);
    world_file_name(&s.world, 0, name, sizeof name);
    const uint8_t *bytes = io_memory_file(s.disk.fs, DIR, name, &len);
    uint8_t *holed = malloc(len);
    memcpy(holed, bytes, len);
    const struct dcp_placed_record *record = &s.world.layout.records[3]; /* the zip */
    CHECK_EQ(s.world.plan.items[record->item].kind, DCP_ITEM_BYTES);
    memset(holed + record->offset_bytes, 0, record->length_bytes);
    io_memory_put_file(s.disk.fs, DIR, name, holed, len);
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, NULL), 1);
    free(holed);
    clean_up(&s);
}

static void
a_damaged_table_is_one_problem_and_leaves_the_bytes_unverified(void)
{
    struct dcp_verify_options options = {.level = DCP_VERIFY_FULL};
    struct dcp_verify_result result;
    struct dcp_error err;
    struct subject s;
    make_outside(&s);
    disk_damage(&s.disk, &s.world, 0, s.world.layout.files[0].table_offset_bytes + 50, 1,
                UINT64_MAX);
    CHECK_OK(run(s.disk.fs, DIR, &options, &result, &err), &err);
    CHECK_EQ(result.problems_found, 1);
    CHECK_EQ(result.unverified_records_count, 4);
    dcp_verify_result_clean_up(&result);
    clean_up(&s);
}

/* The header of `file` anew, saying what is not so. */
static void
lie_in_header(struct subject *s, bool planned_outside)
{
    char name[64];
    size_t len;
    struct dcp_file_header header;
    struct dcp_error err = {0};
    struct dcp_buf made = {0};
    world_file_name(&s->world, 0, name, sizeof name);
    const uint8_t *bytes = io_memory_file(s->disk.fs, DIR, name, &len);
    CHECK_OK(dcp_file_parse_header(bytes, &header, &err), &err);
    CHECK(header.planned_outside != planned_outside);
    header.planned_outside = planned_outside;
    dcp_file_put_header(&made, &header);
    dcp_buf_put(&made, bytes + DCP_FILE_HEADER_BYTES, len - DCP_FILE_HEADER_BYTES);
    io_memory_put_file(s->disk.fs, DIR, name, made.data, made.len);
    dcp_buf_clean_up(&made);
}

static void
an_object_that_the_table_lacks_is_a_problem(void)
{
    struct subject s = {.image = {0}};
    struct dcp_verify_problem first;
    world_begin(&s.world);
    world_add_object(&s.world, 600);
    world_finish(&s.world, 1, false);
    disk_make(&s.disk, &s.world, 512);
    put_metadata(&s, ".metadata");
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, NULL), 0);
    lie_in_header(&s, true);
    CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, &first), 1);
    CHECK(strstr(first.what, "does not list") != NULL);
    clean_up(&s);
}

/* ---- loads ---- */

struct taken {
    struct subject *s;
    unsigned objects, tensors;
    bool changed; /* the bytes are not those that were saved */
};

static int
take(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
     const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    struct taken *taken = ctx;
    const struct world *world = &taken->s->world;
    const struct dcp_placed_record *record = &world->layout.records[item->chunk];
    const uint8_t *saved = world->records[item->chunk];
    struct dcp_record_view view;
    (void)plan;
    (void)err;
    if (saved != NULL) {
        taken->objects++;
        taken->changed =
            taken->changed || len != record->length_bytes || memcmp(bytes, saved, len) != 0;
        return 0;
    }
    struct dcp_error why = {0};
    taken->tensors++;
    CHECK_OK(record_parse(bytes, len, &view, &why), &why);
    CHECK(view.dtype == DCP_DTYPE_UINT8 || view.dtype == DCP_DTYPE_FLOAT32);
    return 0;
}

/* Tensors `first` and up, `part` of each, and all objects. */
static int
load_some(struct subject *s, uint32_t first, unsigned percent, bool verify, struct taken *taken,
          struct dcp_read_stats *stats, struct dcp_error *err)
{
    struct dcp_engine_options engine = {.verify = verify};
    struct maker_rng rng = {1};
    struct load load;
    load_init(&load, &s->world);
    *taken = (struct taken){.s = s};
    for (uint32_t t = first; t < s->world.tensors_count; t++) {
        const struct world_tensor *tensor = &s->world.tensors[t];
        uint64_t offsets[DCP_MAX_DIMS] = {0}, sizes[DCP_MAX_DIMS];
        memcpy(sizes, tensor->size, sizeof sizes);
        sizes[0] = sizes[0] * percent / 100;
        offsets[0] = tensor->size[0] - sizes[0];
        load_add(&load, &rng, t, offsets, sizes, false, 0);
    }
    load_add_objects(&load);
    dcp_error_clear(err);
    CHECK_OK(dcp_read_plan_build(&load.plan, true, NULL, err), err);
    int rc = dcp_reader_run(s->disk.io, s->disk.dirfd, DIR, &load.plan, &engine, take, taken, stats,
                            err);
    if (rc == 0 && taken->tensors == 0) {
        load_check(&load);
    }
    load_clean_up(&load);
    return rc;
}

static void
what_was_saved_comes_back_verified(void)
{
    struct dcp_read_stats stats;
    struct dcp_error err;
    struct taken taken;
    struct subject s;
    make_outside(&s);
    CHECK_OK(load_some(&s, 0, 100, true, &taken, &stats, &err), &err);
    CHECK(taken.objects == 4 && taken.tensors == 0 && !taken.changed);
    CHECK_EQ(stats.unverified_bytes, 0);
    CHECK_OK(load_some(&s, 0, 30, true, &taken, &stats, &err), &err);
    CHECK(taken.objects == 4 && taken.tensors == 0 && !taken.changed);
    CHECK_OK(load_some(&s, 0, 30, false, &taken, &stats, &err), &err);
    CHECK(taken.objects == 4 && taken.tensors == 0 && !taken.changed);
    CHECK_EQ(stats.verified_bytes, 0);
    clean_up(&s);
}

static void
damaged_bytes_of_an_object_fail_the_load_that_verifies(void)
{
    struct subject s;
    make_outside(&s);
    for (uint32_t i = 0; i < 4; i++) {
        const struct dcp_placed_record *record = &s.world.layout.records[i];
        struct dcp_read_stats stats;
        struct dcp_error err;
        struct taken taken;
        uint64_t at = record->offset_bytes + record->length_bytes / 2;
        disk_damage(&s.disk, &s.world, 0, at, 1, UINT64_MAX);
        CHECK_EQ(load_some(&s, TENSORS, 100, true, &taken, &stats, &err), DCP_E_CHECKSUM);
        CHECK(strstr(err.message, "object.") != NULL);
        CHECK_OK(load_some(&s, TENSORS, 100, false, &taken, &stats, &err), &err);
        CHECK(taken.objects == 4 && taken.changed);
        disk_damage(&s.disk, &s.world, 0, at, 1, UINT64_MAX);
    }
    clean_up(&s);
}

static void
a_damaged_block_is_found_in_a_partial_read(void)
{
    struct dcp_read_stats stats;
    struct dcp_error err;
    struct taken taken;
    struct subject s;
    make_outside(&s);
    for (uint32_t i = 0; i < s.world.layout.records_count; i++) {
        const struct dcp_placed_record *record = &s.world.layout.records[i];
        if (s.world.item_tensor[record->item] == 2) {
            disk_damage(&s.disk, &s.world, 0, record->payload_offset_bytes + LONG_BYTES - 9, 1,
                        UINT64_MAX);
        }
    }
    CHECK_EQ(load_some(&s, 2, 30, true, &taken, &stats, &err), DCP_E_CHECKSUM);
    CHECK(strstr(err.message, "tensor.2") != NULL && strstr(err.message, "block") != NULL);
    clean_up(&s);
}

/* The records of uint8, int8 and bool, of float8_e4m3fn and float8_e5m2fnuz, are equally long. */
static void
a_record_of_another_dtype_is_handed_over_whatever_is_wanted_of_it(void)
{
    static const int twins[] = {DCP_DTYPE_INT8, DCP_DTYPE_BOOL};
    for (size_t i = 0; i < 2 * sizeof twins / sizeof twins[0]; i++) {
        for (unsigned percent = 100; percent > 0; percent -= 90) {
            struct dcp_read_stats stats;
            struct dcp_error err;
            struct taken taken;
            struct subject s;
            make_outside(&s);
            for (uint32_t t = 0; t < 3; t++) {
                s.world.md.entries[entry_of(&s.world, t)].dtype = (uint8_t)twins[i / 2];
            }
            CHECK_OK(load_some(&s, 0, percent, i % 2 == 0, &taken, &stats, &err), &err);
            CHECK_EQ(taken.tensors, 3);
            clean_up(&s);
        }
    }
}

/* Ranks that read together go by lengths alone. */
static void
ranks_share_no_reads_of_such_records(void)
{
    struct subject s;
    uint64_t offset, payload;
    make_outside(&s);
    uint32_t entry = (uint32_t)entry_of(&s.world, 2);
    uint32_t chunk = (uint32_t)s.world.md.entries[entry].first_chunk;
    CHECK(dcp_share_payload(&s.world.md, entry, chunk, &offset, &payload));
    s.world.md.planned_outside = true;
    CHECK(!dcp_share_payload(&s.world.md, entry, chunk, &offset, &payload));
    clean_up(&s);
}

static void
a_record_of_another_shape_is_damage(void)
{
    struct dcp_read_stats stats;
    struct dcp_error err;
    struct taken taken;
    struct subject s;
    make_outside(&s);
    const struct dcp_md_entry *entry = &s.world.md.entries[entry_of(&s.world, 3)];
    for (uint64_t c = 0; c < entry->chunks_count; c++) {
        /* 300 x 1000 of each: as long, as wide, another tensor. */
        uint64_t *box = s.world.md.dims + s.world.md.chunks[entry->first_chunk + c].dims;
        CHECK(box[2] == 300 && box[3] == 1000);
        box[2] = 1000;
        box[3] = 300;
    }
    CHECK_EQ(load_some(&s, 3, 100, true, &taken, &stats, &err), DCP_E_CORRUPT);
    clean_up(&s);
}

CTEST_MAIN(RUN(the_table_lists_what_has_no_checksum_of_its_own);
           RUN(an_intact_checkpoint_has_no_problem_and_nothing_unverified);
           RUN(any_byte_that_changes_is_found_and_named);
           RUN(an_object_that_became_zeros_is_a_problem);
           RUN(a_damaged_table_is_one_problem_and_leaves_the_bytes_unverified);
           RUN(an_object_that_the_table_lacks_is_a_problem);
           RUN(what_was_saved_comes_back_verified);
           RUN(damaged_bytes_of_an_object_fail_the_load_that_verifies);
           RUN(a_damaged_block_is_found_in_a_partial_read);
           RUN(a_record_of_another_dtype_is_handed_over_whatever_is_wanted_of_it);
           RUN(ranks_share_no_reads_of_such_records); RUN(a_record_of_another_shape_is_damage);)

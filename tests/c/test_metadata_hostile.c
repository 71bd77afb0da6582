/*
 * test_metadata_hostile.c: pickles made to crash, hang or fill memory are refused in bounded time.
 *
 * The pickles are assembled by hand, opcode by opcode, so that each proves one defence.
 */
#include "ctest.h"

#include "dcp_crc32.h"
#include "metadata_private.h"
#include "pickle_asm.h"

enum { MANY = 300000 };

static void
case_a_small_pickle_by_hand_is_read(void)
{
    begin_metadata();
    text("w");
    begin_tensor(10);
    chunk(0, 4);
    chunk(4, 6);
    end_tensor();
    text("step");
    object("BytesStorageMetadata");
    begin_storage();
    record("w", 4, "b.distcp", 7);
    record("w", 0, "a.distcp", 9);
    record("step", -1, "a.distcp", 11);
    record("nobody", -1, "c.distcp", 11);
    end_metadata();
    struct dcp_metadata md = {0};
    dcp_error_clear(&err);
    CHECK_OK(dcp_metadata_read_pickle(p.data, p.len, &md, &err), &err);
    CHECK_EQ(md.entries_count, 2);
    CHECK_EQ(md.chunks_count, 3);
    CHECK_EQ(md.files_count, 3); /* the file of the record that nobody wants is known */
    CHECK_EQ(md.chunks[0].offset_bytes, 9);
    CHECK_EQ(md.chunks[1].offset_bytes, 7);
    CHECK_EQ(md.chunks[1].length_bytes, 'd');
    CHECK_EQ(md.chunks[2].offset_bytes, 11);
    CHECK_EQ(md.chunks[0].file, 1);
    CHECK_EQ(md.chunks[1].file, 0);
    dcp_metadata_clean_up(&md);
    dcp_buf_clean_up(&p);
}

static void
case_deep_nesting_is_refused(void)
{
    begin();
    for (int i = 0; i < MANY; i++) {
        op("(");
    }
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "nested too deeply");
    begin();
    op(")");
    for (int i = 0; i < MANY; i++) {
        op("\x85");
    }
    op(".");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "no Metadata");
    begin();
    for (int i = 0; i < MANY; i++) {
        op("]");
    }
    for (int i = 1; i < MANY; i++) {
        op("a");
    }
    op(".");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "far more values");
    dcp_buf_clean_up(&p);
}

static void
case_giant_counts_are_refused_before_memory_is_asked_for(void)
{
    static const struct {
        const char *bytes;
        size_t len;
        const char *words;
    } giants[] = {
        {"X\xFF\xFF\xFF\xFF.", 6, "longer than the rest"},
        {"\x8D\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF.", 10, "longer than the rest"},
        {"\x8D\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F.", 10, "longer than the rest"},
        {"B\xFF\xFF\xFF\xFF.", 6, "longer than the rest"},
        {"\x95\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF.", 10, "frame"},
        {"Nr\xFF\xFF\xFF\xFF.", 7, "memo number"},
        {"j\xFF\xFF\xFF\xFF.", 6, "memo number"},
        {"\x8A\xFF\x01.", 4, "longer than the rest"},
    };
    for (size_t i = 0; i < sizeof giants / sizeof giants[0]; i++) {
        begin();
        dcp_buf_put(&p, giants[i].bytes, giants[i].len);
        uint64_t live = dcp_alloc_live_bytes();
        CHECK_REFUSED(DCP_E_CORRUPT, giants[i].words);
        CHECK_EQ(dcp_alloc_live_bytes(), live);
    }
    dcp_buf_clean_up(&p);
}

static void
case_opcodes_that_find_too_little_are_refused(void)
{
    static const char *const programs[] = {
        ".",    "0",     "a",      "e",       "s",       "u",    "t",       "b",        "R",
        "\x81", "\x85",  "\x86",   "\x87",    "\x93",    "\x94", "N(.",     "N(a",      "Q",
        "]N(a", "}NN(s", "N(\x85", "NN(\x86", "N(N\x93", "NN(b", "NN(R",    "](NN\x87", "}(Nu.",
        "Nt",   "NNs.",  "N(Ne.",  "NNNs.",   "NNa.",    "NNR.", "NN\x93.",
    };
    for (size_t i = 0; i < sizeof programs / sizeof programs[0]; i++) {
        begin();
        op(programs[i]);
        CHECK_EQ(run(), DCP_E_CORRUPT);
        CHECK_EQ(err.offset_bytes < p.len, 1);
    }
    dcp_buf_clean_up(&p);
}

static void
case_other_opcodes_and_other_bytes_are_told_apart(void)
{
    for (unsigned byte = 0; byte < 256; byte++) {
        begin();
        dcp_buf_put_u8(&p, (uint8_t)byte);
        int rc = run();
        CHECK(rc == DCP_E_CORRUPT || rc == DCP_E_UNSUPPORTED);
    }
    begin();
    op("I1\n.");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "byte 2 of 6: an opcode that torch's files do not use");
    begin();
    op("\xFF");
    CHECK_REFUSED(DCP_E_CORRUPT, "no opcode");
    dcp_buf_clear(&p);
    op("(lp0\n.");
    CHECK_REFUSED(DCP_E_CORRUPT, "no pickle");
    dcp_buf_clean_up(&p);
}

static void
case_unknown_globals_are_refused_by_name(void)
{
    begin();
    global("os", "system");
    text("true");
    op("\x85R.");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "os.system");
    begin();
    text("builtins");
    text("eval");
    op("\x93.");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "builtins.eval");
    begin();
    global("torch", "load");
    op(".");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "torch.load");
    begin();
    global("torch\x01\x1B[2J", "x");
    op(".");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "torch??[2J.x");
    dcp_buf_clean_up(&p);
}

static void
case_what_the_loader_needs_is_refused_by_name(void)
{
    begin_metadata();
    op("u");
    text("mcore_data");
    op("}ub.");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "mcore_data");
    begin_metadata();
    op("u");
    text("storage_data");
    op("Nub.");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "storage_data");
    dcp_buf_clean_up(&p);
}

static void
case_a_shared_tensor_cannot_multiply(void)
{
    /* One tensor of 20,000 chunks under 20,000 keys would be 400 million chunks. */
    begin_metadata();
    text("k");
    begin_tensor(1);
    chunk(0, 1);
    op("\x94"); /* the first memo number: the chunk */
    for (int i = 0; i < 20000; i++) {
        op("h");
        dcp_buf_put_u8(&p, 0);
    }
    end_tensor();
    op("\x94"); /* the second: the tensor */
    for (int i = 0; i < 20000; i++) {
        char key[16];
        snprintf(key, sizeof key, "%d", i);
        text(key);
        op("h\x01");
    }
    begin_storage();
    end_metadata();
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "far more chunks");
    dcp_buf_clean_up(&p);
}

static void
case_a_shared_name_cannot_multiply(void)
{
    char *name = malloc(1 << 19);
    memset(name, 'n', (1 << 19) - 1);
    name[(1 << 19) - 1] = 0;
    /* As a key of two hundred thousand objects. */
    begin_metadata();
    text(name);
    op("\x94");
    object("BytesStorageMetadata");
    op("\x94");
    for (int i = 0; i < 200000; i++) {
        op("h");
        dcp_buf_put_u8(&p, 0);
        op("h\x01");
    }
    begin_storage();
    end_metadata();
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "a name that comes twice");
    /* As the name that records ask for in turn with another one. */
    begin_metadata();
    text(name);
    op("\x94");
    object("BytesStorageMetadata");
    begin_storage();
    record("a", -1, "f", 1);
    op("\x94"); /* number 1: a _StorageInfo */
    for (int i = 0; i < 20000; i++) {
        for (int k = 0; k < 2; k++) {
            object("MetadataIndex");
            op("}(");
            text("fqn");
            if (k == 0) {
                op("h");
                dcp_buf_put_u8(&p, 0);
            } else {
                text("b");
            }
            op("ubh\x01");
        }
    }
    end_metadata();
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "a name that comes too often");
    free(name);
    dcp_buf_clean_up(&p);
}

static void
case_the_attributes_of_an_object_are_used_once(void)
{
    /* The dict is memoised, becomes a chunk's attributes, and is fetched again. */
    begin();
    object("ChunkStorageMetadata");
    op("}\x94(");
    text("offsets");
    size_of(1);
    op("ubh");
    dcp_buf_put_u8(&p, 0);
    op(".");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "a second time");
    /* A dict that two objects share is an ordinary one. */
    begin();
    op("}\x94");
    object("ChunkStorageMetadata");
    op("h");
    dcp_buf_put_u8(&p, 0);
    op("(");
    text("offsets");
    size_of(1);
    op("ub0.");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "no Metadata");
    dcp_buf_clean_up(&p);
}

static void
case_numbers_and_boxes_out_of_bounds_are_damage(void)
{
    begin_metadata();
    text("w");
    begin_tensor(10);
    chunk(5, 6);
    end_tensor();
    begin_storage();
    end_metadata();
    CHECK_REFUSED(DCP_E_CORRUPT, "outside its tensor");
    begin();
    global("torch", "Size");
    op("J\xFF\xFF\xFF\xFF\x85\x85R.");
    CHECK_REFUSED(DCP_E_CORRUPT, "torch.Size");
    begin();
    global("torch", "Size");
    op("\x8A\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01\x85\x85R.");
    CHECK_REFUSED(DCP_E_CORRUPT, "torch.Size");
    begin_metadata();
    text("\xC0\x80");
    object("BytesStorageMetadata");
    begin_storage();
    end_metadata();
    CHECK_REFUSED(DCP_E_CORRUPT, "UTF-8");
    begin_metadata();
    text("k\xED\xA0\x80");
    object("BytesStorageMetadata");
    begin_storage();
    end_metadata();
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "UTF-8");
    dcp_buf_clean_up(&p);
}

static void
case_many_small_objects_take_bounded_memory(void)
{
    begin();
    for (int i = 0; i < MANY; i++) {
        op("}\x94");
    }
    op(".");
    CHECK_REFUSED(DCP_E_UNSUPPORTED, "no Metadata");
    begin_metadata();
    text("w");
    begin_tensor(1);
    for (int i = 0; i < 5000; i++) {
        chunk(0, 1);
    }
    end_tensor();
    begin_storage();
    for (int i = 0; i < 5000; i++) {
        record("w", 0, "f", 1);
    }
    end_metadata();
    CHECK_EQ(run(), 0);
    dcp_buf_clean_up(&p);
}

/* A footer that is right in every checksum, around an index that lies. */
static void
case_a_lying_index_leaves_the_pickle(void)
{
    static const char *const lies[] = {
        "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01",     "\x01", "\x7F\x7F\x7F\x7F\x7F",
        "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", "",
    };
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        begin_metadata();
        text("step");
        object("BytesStorageMetadata");
        begin_storage();
        end_metadata();
        struct dcp_metadata_footer footer = {.pickle_bytes = p.len, .index_bytes = strlen(lies[i])};
        op(lies[i]);
        footer.pickle_crc = dcp_crc32(0, p.data, (size_t)footer.pickle_bytes);
        footer.index_crc = dcp_crc32(0, p.data + footer.pickle_bytes, (size_t)footer.index_bytes);
        dcp_metadata_footer_put(&p, &footer);
        struct dcp_metadata md = {0};
        dcp_error_clear(&err);
        CHECK_OK(dcp_metadata_read(p.data, p.len, &md, &err), &err);
        CHECK_EQ(md.entries_count, 1);
        CHECK_EQ(md.chunks[0].file, DCP_NO_FILE);
        dcp_metadata_clean_up(&md);
    }
    dcp_buf_clean_up(&p);
}

CTEST_MAIN(RUN(case_a_small_pickle_by_hand_is_read); RUN(case_deep_nesting_is_refused);
           RUN(case_giant_counts_are_refused_before_memory_is_asked_for);
           RUN(case_opcodes_that_find_too_little_are_refused);
           RUN(case_other_opcodes_and_other_bytes_are_told_apart);
           RUN(case_unknown_globals_are_refused_by_name);
           RUN(case_what_the_loader_needs_is_refused_by_name);
           RUN(case_a_shared_tensor_cannot_multiply); RUN(case_a_shared_name_cannot_multiply);
           RUN(case_the_attributes_of_an_object_are_used_once);
           RUN(case_numbers_and_boxes_out_of_bounds_are_damage);
           RUN(case_many_small_objects_take_bounded_memory);
           RUN(case_a_lying_index_leaves_the_pickle);)

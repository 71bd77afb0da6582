/*
 * test_metadata_foreign.c: what only Python could rebuild is stepped over where a load needs
 * nothing of it, named, and refused where it is in the way; and it costs no more than the file is
 * long.
 */
#include "ctest.h"
#include "metadata_private.h"
#include "pickle_asm.h"
#include "plan_maker.h"

enum { MANY = 200000, FLIPS = 20000 };

/* A whole checkpoint of one tensor and one object, up to where further attributes go. */
static void
begin_whole(void)
{
    begin_metadata();
    text("w");
    begin_tensor(10);
    chunk(0, 10);
    end_tensor();
    text("step");
    object("BytesStorageMetadata");
    begin_storage();
    record("w", 0, "a.distcp", 9);
    record("step", -1, "a.distcp", 11);
    op("u");
}

static void
end_whole(void)
{
    op("ub.");
}

/* Reads what was assembled; it must be the whole checkpoint. */
static void
check_whole(const char *foreign)
{
    struct dcp_metadata md = {0};
    CHECK_EQ(run(), 0);
    dcp_error_clear(&err);
    CHECK_OK(dcp_metadata_read_pickle(p.data, p.len, &md, &err), &err);
    CHECK_EQ(md.entries_count, 2);
    CHECK_EQ(md.chunks_count, 2);
    CHECK_EQ(md.chunks[0].offset_bytes, 9);
    CHECK_EQ(md.chunks[1].offset_bytes, 11);
    if (foreign[0] == 0 ? md.foreign[0] != 0 : strstr(md.foreign, foreign) == NULL) {
        CHECK(!"what is foreign is named");
        fprintf(stderr, "    '%s', not '%s'\n", md.foreign, foreign);
    }
    dcp_metadata_clean_up(&md);
}

static void
u8(unsigned byte)
{
    dcp_buf_put_u8(&p, (uint8_t)byte);
}

/* An object of a class that nobody knows, with every way to fill one. */
static void
foreign_object(void)
{
    global("megatron.core", "ShardedObject");
    op(")\x81\x94}\x94(");
    text("key");
    text("value");
    op("ub");
    global("collections", "OrderedDict");
    op(")R");
    op("(");
    text("a");
    op("K\x01u");
    text("b");
    op("Ns");
    op("a"); /* the OrderedDict is appended to the object */
    op("(K\x01K\x02");
    global("os", "system");
    text("true");
    op("\x85Re"); /* a list of calls, into the object */
}

static void
case_attributes_of_others_are_stepped_over(void)
{
    static const char *const values[] = {
        "}",          "]",        "N",        "K\x07",   "(K\x01K\x02t", "\x8F(K\x01\x90",
        "(K\x01\x91", "\x8B\x02", "\x96\x02", "\x8E\x02"};
    static const size_t tails[] = {0, 0, 0, 0, 0, 0, 0, 3 + 2, 7 + 2, 7 + 2};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        begin_whole();
        text("mcore_data");
        op(values[i]);
        for (size_t k = 0; k < tails[i]; k++) {
            u8(0);
        }
        end_whole();
        check_whole("an attribute that is not torch's own: mcore_data");
    }
    dcp_buf_clean_up(&p);
}

static void
case_foreign_objects_absorb_all_that_is_put_into_them(void)
{
    begin_whole();
    text("all_local_plans");
    foreign_object();
    end_whole();
    check_whole("a global that is not on the list: megatron.core.ShardedObject");
    static const char *const places[] = {"planner_data", "storage_meta", "version"};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        begin_whole();
        text(places[i]);
        foreign_object();
        end_whole();
        check_whole("megatron.core.ShardedObject");
    }
    begin_whole();
    text("planner_data");
    op("}(");
    text("a");
    op("]u");
    end_whole();
    check_whole("planner_data is a program's own");
    begin_whole();
    text("storage_meta");
    object("StorageMeta");
    op("}(");
    text("more");
    op("Nub");
    end_whole();
    check_whole("an attribute that is not torch's own: more");
    begin_whole();
    end_whole();
    check_whole("");
    dcp_buf_clean_up(&p);
}

/* Known classes in unknown ways, inside of an attribute of others. */
static void
case_strange_uses_of_known_classes_are_foreign(void)
{
    static const char *const programs[] = {
        "ctorch\nSize\nN\x85R",
        "ctorch\nSize\n(Nt\x85R",
        "ctorch\nSize\n)}\x92",
        "ctorch\nSize\n)\x81",
        "ctorch\nfloat32\nK\x01\x85R",
        "cpathlib\nPosixPath\nK\x01\x85R",
        "ctorch.serialization\n_get_layout\nX\x01\0\0\0s\x85R",
        "c" MODULE "\nMetadata\nN\x85\x81",
        "c" MODULE "\nMetadata\nN\x85R",
        "c" MODULE "\nTensorProperties\n)\x81Nb",
        "c" MODULE "\nBytesStorageMetadata\n)\x81}b",
        "c" MODULE "\nChunkStorageMetadata\n)\x81K\x01"
        "b",
        "c" MODULE "\n_MEM_FORMAT_ENCODING\nK\x09\x85R",
    };
    for (size_t i = 0; i < sizeof programs / sizeof programs[0]; i++) {
        begin_whole();
        text("extra");
        if (i == 6) {
            global("torch.serialization", "_get_layout");
            text("torch.sparse_coo");
            op("\x85R");
        } else {
            op(programs[i]);
        }
        end_whole();
        if (i == 1) {
            CHECK_EQ(run(), DCP_E_CORRUPT); /* a torch.Size of None is none in Python either */
        } else {
            check_whole("byte ");
        }
    }
    dcp_buf_clean_up(&p);
}

static void
expect_refused(const char *words)
{
    CHECK_EQ(run(), DCP_E_UNSUPPORTED);
    if (strstr(err.message, words) == NULL) {
        CHECK(!"the message has the expected words");
        fprintf(stderr, "    %s\n", err.message);
    }
}

static void
case_foreign_values_where_the_loader_looks_are_refused(void)
{
    begin();
    foreign_object();
    op(".");
    expect_refused("no Metadata (byte 2 of");
    begin_metadata(); /* a value of state_dict_metadata */
    text("w");
    foreign_object();
    begin_storage();
    end_metadata();
    expect_refused("ShardedObject");
    begin_metadata(); /* a chunk */
    text("w");
    begin_tensor(10);
    foreign_object();
    end_tensor();
    begin_storage();
    end_metadata();
    expect_refused("key w: a chunk that torch did not write (");
    begin_metadata(); /* an element type of another torch */
    text("w");
    object("TensorStorageMetadata");
    op("}(");
    text("properties");
    properties("float3");
    text("size");
    size_of(1);
    text("chunks");
    op("]ub");
    begin_storage();
    end_metadata();
    expect_refused("torch.float3");
    begin_metadata(); /* a record */
    text("step");
    object("BytesStorageMetadata");
    op("u");
    text("storage_data");
    op("}(");
    object("MetadataIndex");
    op("}(");
    text("fqn");
    text("step");
    op("ub");
    foreign_object();
    end_metadata();
    expect_refused("storage_data is not of torch");
    begin_metadata(); /* all records */
    text("step");
    object("BytesStorageMetadata");
    op("u");
    text("storage_data");
    foreign_object();
    op("ub.");
    expect_refused("storage_data is no dict");
    dcp_buf_clean_up(&p);
}

/* An unknown attribute may change what the known ones mean. */
static void
case_strange_attributes_spoil_what_the_loader_needs(void)
{
    for (unsigned first = 0; first < 2; first++) {
        begin_metadata();
        text("w");
        begin_tensor(10);
        object("ChunkStorageMetadata");
        op("}(");
        if (first == 1) {
            text("stride");
            op("N");
        }
        text("offsets");
        size_of(0);
        text("sizes");
        size_of(10);
        if (first == 0) {
            text("stride");
            op("N");
        }
        op("ub");
        end_tensor();
        begin_storage();
        end_metadata();
        expect_refused("not torch's own: stride");
    }
    begin_metadata();
    text("step");
    object("BytesStorageMetadata");
    op("}(");
    text("codec");
    op("Nub");
    begin_storage();
    end_metadata();
    expect_refused("key step");
    dcp_buf_clean_up(&p);
}

static void
case_hostile_foreign_values_take_bounded_time_and_memory(void)
{
    static const char *const units[] = {
        "(",
        "]",
        "}",
        "}\x94",
        "]\x94",
        "\x8F",
        "\x8F\x94",
        ")",
        "N",
        "N\x85",
        "]N"
        "a",
        "}NNs",
        "((t",
        "(\x91",
        "(l",
        ")\x94",
        "\x8C\x00",
        "K\x01",
        "cx\ny\n)R",
        "cx\ny\n)\x81}b",
        "cx\ny\n)}\x92",
        "ctorch\nSize\n)\x85R",
        "c" MODULE "\nMetadataIndex\n)\x81",
        "c" MODULE "\nMetadata\n)\x81}N"
        "b",
    };
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        for (unsigned closed = 0; closed < 2; closed++) {
            begin_whole();
            text("extra");
            op("](");
            for (int k = 0; k < MANY / (int)strlen(units[i]); k++) {
                dcp_buf_put(&p, units[i], i == 16 ? 2 : strlen(units[i]));
            }
            if (closed == 1) {
                op("e");
                end_whole();
            }
            int rc = run(); /* which checks time and memory */
            CHECK(rc == 0 || rc == DCP_E_CORRUPT || rc == DCP_E_UNSUPPORTED);
            CHECK(rc == 0 || strstr(err.message, "byte ") != NULL ||
                  strstr(err.message, "key") != NULL);
        }
    }
    dcp_buf_clean_up(&p);
}

static void
case_memo_abuse_takes_bounded_memory(void)
{
    /* One number far ahead, then all numbers; numbers given twice; fetched for ever. */
    begin_whole();
    text("extra");
    op("N");
    for (uint32_t i = 0; i < 30000; i++) {
        u8('r');
        dcp_buf_put_u32(&p, (i * 7919u) % 70000u);
    }
    end_whole();
    check_whole("extra");
    begin_whole();
    text("extra");
    foreign_object();
    op("q\x07");
    op("](");
    for (int i = 0; i < MANY; i++) {
        op("h\x07");
    }
    op("ea");
    end_whole();
    check_whole("ShardedObject");
    begin_whole();
    text("extra");
    op("Nr");
    dcp_buf_put_u32(&p, (uint32_t)p.len + 1000);
    end_whole();
    CHECK_EQ(run(), DCP_E_CORRUPT);
    dcp_buf_clean_up(&p);
}

static void
case_every_cut_and_flip_of_a_foreign_file_is_survived(void)
{
    struct maker_rng rng = {2026};
    uint64_t refused = 0;
    begin_whole();
    text("all_local_plans");
    foreign_object();
    end_whole();
    struct dcp_buf whole = p;
    p = (struct dcp_buf){0};
    for (size_t len = 0; len < whole.len; len++) {
        dcp_buf_clear(&p);
        CHECK(dcp_buf_reserve(&p, whole.len) == 0);
        dcp_buf_put(&p, whole.data, len);
        CHECK_EQ(run(), DCP_E_CORRUPT);
    }
    for (unsigned i = 0; i < FLIPS; i++) {
        dcp_buf_clear(&p);
        dcp_buf_put(&p, whole.data, whole.len);
        for (uint64_t flips = 1 + maker_below(&rng, 3); flips > 0; flips--) {
            uint64_t bit = maker_below(&rng, 8 * whole.len);
            p.data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
        int rc = run();
        CHECK(rc == 0 || rc == DCP_E_CORRUPT || rc == DCP_E_UNSUPPORTED);
        refused += rc != 0;
    }
    CHECK(refused > FLIPS / 4);
    dcp_buf_clean_up(&whole);
    dcp_buf_clean_up(&p);
}

CTEST_MAIN(RUN(case_attributes_of_others_are_stepped_over);
           RUN(case_foreign_objects_absorb_all_that_is_put_into_them);
           RUN(case_strange_uses_of_known_classes_are_foreign);
           RUN(case_foreign_values_where_the_loader_looks_are_refused);
           RUN(case_strange_attributes_spoil_what_the_loader_needs);
           RUN(case_hostile_foreign_values_take_bounded_time_and_memory);
           RUN(case_memo_abuse_takes_bounded_memory);
           RUN(case_every_cut_and_flip_of_a_foreign_file_is_survived);)

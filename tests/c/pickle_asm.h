/*
 * pickle_asm.h: `.metadata` pickles assembled by hand, opcode by opcode, and run within the bounds
 * of time and memory that dcp_metadata_read promises.
 *
 * One pickle at a time, in `p`.
 */
#ifndef TESTS_PICKLE_ASM_H
#define TESTS_PICKLE_ASM_H

#include <time.h>

#include "ctest.h"
#include "metadata_maker.h"
#include "pickle_out.h"
#include "pickle_vm.h"

#define MODULE "torch.distributed.checkpoint.metadata"
#define FILESYSTEM "torch.distributed.checkpoint.filesystem"

enum {
    LIMIT_MS = 5000,
    /* What dcp_metadata_read promises of memory, beyond the image. */
    PEAK_PER_BYTE = 16,
    PEAK_ROOM_BYTES = 256 << 10,
};

static struct dcp_error err;
static struct dcp_buf p;

/* ---- an assembler ---- */

static inline void
begin(void)
{
    dcp_buf_clear(&p);
    dcp_buf_put(&p, "\x80\x04", 2);
}

static inline void
op(const char *bytes)
{
    dcp_buf_put(&p, bytes, strlen(bytes));
}

static inline void
text(const char *t)
{
    dcp_buf_put_u8(&p, DCP_OP_BINUNICODE);
    dcp_buf_put_u32(&p, (uint32_t)strlen(t));
    op(t);
}

static inline void
global(const char *module, const char *name)
{
    op("c");
    op(module);
    op("\n");
    op(name);
    op("\n");
}

static inline void
object(const char *name)
{
    global(strcmp(name, "_StorageInfo") == 0 ? FILESYSTEM : MODULE, name);
    op(")\x81");
}

/* A torch.Size of one number below 256. */
static inline void
size_of(uint8_t n)
{
    global("torch", "Size");
    op("K");
    dcp_buf_put_u8(&p, n);
    op("\x85\x85R");
}

static inline void
properties(const char *dtype)
{
    object("TensorProperties");
    op("(");
    global("torch", dtype);
    global("torch.serialization", "_get_layout");
    text("torch.strided");
    op("\x85R\x89");
    global(MODULE, "_MEM_FORMAT_ENCODING");
    op("K");
    dcp_buf_put_u8(&p, 0);
    op("\x85R\x89tb");
}

static inline void
chunk(uint8_t offset, uint8_t size)
{
    object("ChunkStorageMetadata");
    op("}(");
    text("offsets");
    size_of(offset);
    text("sizes");
    size_of(size);
    op("ub");
}

/* Up to the open list of chunks of a tensor of `size` numbers. */
static inline void
begin_tensor(uint8_t size)
{
    object("TensorStorageMetadata");
    op("}(");
    text("properties");
    properties("uint8");
    text("size");
    size_of(size);
    text("chunks");
    op("](");
}

static inline void
end_tensor(void)
{
    op("eub");
}

static inline void
begin_metadata(void)
{
    begin();
    object("Metadata");
    op("}(");
    text("state_dict_metadata");
    op("}(");
}

static inline void
begin_storage(void)
{
    op("u");
    text("storage_data");
    op("}(");
}

static inline void
record(const char *fqn, int offset, const char *path, uint8_t at)
{
    object("MetadataIndex");
    op("}(");
    text("fqn");
    text(fqn);
    if (offset >= 0) {
        text("offset");
        size_of((uint8_t)offset);
    }
    op("ub");
    object("_StorageInfo");
    op("}(");
    text("relative_path");
    text(path);
    text("offset");
    op("K");
    dcp_buf_put_u8(&p, at);
    text("length");
    op("Kdub");
}

static inline void
end_metadata(void)
{
    op("uub.");
}

/* ---- running ---- */

static inline double
cpu_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static inline int
run(void)
{
    double start = cpu_ms();
    CHECK(!p.failed);
    uint64_t live = dcp_alloc_live_bytes();
    dcp_alloc_reset_peak();
    int rc = metadata_read_copy(p.data, p.len, true, NULL, NULL, &err);
    CHECK(cpu_ms() - start < LIMIT_MS);
    CHECK(dcp_alloc_peak_bytes() - live <= PEAK_PER_BYTE * p.len + PEAK_ROOM_BYTES);
    CHECK_EQ(dcp_alloc_live_bytes(), live);
    return rc;
}

#define CHECK_REFUSED(code, words)                                                                 \
    do {                                                                                           \
        CHECK_EQ(run(), code);                                                                     \
        if (strstr(err.message, words) == NULL) {                                                  \
            CHECK(!"the message has the expected words");                                          \
            fprintf(stderr, "    %s\n", err.message);                                              \
        }                                                                                          \
    } while (0)

#endif

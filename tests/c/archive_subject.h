/*
 * archive_subject.h: a checkpoint on a simulated disk, what its torch.save file must be, and writes
 * of that file.
 *
 * Included after ctest.h by the tests of archives, so that CHECK counts in theirs.  The expected
 * file is put together by its own code, from the format's description, with a CRC by definition.
 */
#ifndef ARCHIVE_SUBJECT_H
#define ARCHIVE_SUBJECT_H

#include "dcp_archive.h"
#include "metadata_private.h"
#include "verify_subject.h"

#define TARGET_DIR "/t"
#define FOLDER "archive"

enum { MOST_ENTRIES = WORLD_TENSORS + 8 };

struct archive_subject {
    struct subject checkpoint;
    struct dcp_archive_entry entries[MOST_ENTRIES];
    const uint8_t *bytes[MOST_ENTRIES]; /* what each must hold */
    char names[MOST_ENTRIES][24], fqns[MOST_ENTRIES][24];
    uint64_t entries_count;
    uint64_t align_bytes;
    struct dcp_engine_options options;
    uint64_t fetched_count, fetch_fails_at; /* 1 is the first; 0: none fails */
    struct dcp_archive_stats stats;
    struct dcp_error err;
};

static const uint8_t archive_pickle[] = "\x80\2}q\0.";

static inline void
archive_add(struct archive_subject *s, const char *name, uint64_t bytes, const uint8_t *data,
            const char *fqn, const uint8_t *want)
{
    uint64_t i = s->entries_count++;
    snprintf(s->names[i], sizeof s->names[i], "%s", name);
    snprintf(s->fqns[i], sizeof s->fqns[i], "%s", fqn);
    s->entries[i] = (struct dcp_archive_entry){
        .name = {(const uint8_t *)s->names[i], strlen(name)},
        .bytes = bytes,
        .data = data,
        .fqn = {(const uint8_t *)s->fqns[i], strlen(fqn)},
    };
    s->bytes[i] = want;
}

/* The entries of a torch.save file of the world's tensors, one that is asked for among them. */
static inline void
archive_list(struct archive_subject *s)
{
    const struct world *world = &s->checkpoint.world;
    char name[24], fqn[24];
    s->entries_count = 0;
    archive_add(s, "data.pkl", sizeof archive_pickle, archive_pickle, "", archive_pickle);
    archive_add(s, "nothing", 0, NULL, "", archive_pickle);
    for (uint32_t t = 0; t < world->tensors_count; t++) {
        snprintf(name, sizeof name, "data/%u", t);
        snprintf(fqn, sizeof fqn, "tensor.%u", t);
        archive_add(s, name, world->tensors[t].bytes, NULL, fqn, world->tensors[t].image);
    }
    archive_add(s, "data/asked", 7, NULL, "", (const uint8_t *)"abcdefg");
    archive_add(s, "data/unknown", 3, NULL, "no such tensor", (const uint8_t *)"xyz");
    archive_add(s, "version", 2, (const uint8_t *)"3\n", "", (const uint8_t *)"3\n");
}

/* Of the checkpoint's world, which was filled by the caller. */
static inline void
archive_begin(struct archive_subject *s, uint32_t dio_bytes)
{
    disk_make(&s->checkpoint.disk, &s->checkpoint.world, dio_bytes);
    put_metadata(&s->checkpoint, ".metadata");
    s->checkpoint.disk.io->mkdirs(s->checkpoint.disk.io->ctx, TARGET_DIR);
    s->align_bytes = 64;
    s->options = (struct dcp_engine_options){.sync = true, .verify = true};
    archive_list(s);
}

static inline void
archive_make(struct archive_subject *s, const struct world_options *options)
{
    memset(s, 0, sizeof *s);
    world_make(&s->checkpoint.world, options);
    archive_begin(s, 512);
}

/* Tensors of every way: rows of several files, one file, columns, no dims, more than one slot of
 * the reader when `large`. */
static inline void
archive_make_ways(struct archive_subject *s, bool large, uint32_t dio_bytes)
{
    static const uint64_t rows[] = {37, 50}, columns[] = {40, 30}, none[] = {0, 5}, one[] = {700};
    static const uint64_t by_rows[] = {5, 1}, by_columns[] = {1, 3}, alone[] = {1, 1};
    uint64_t long_rows[] = {large ? 1700 : 300, 1000};
    struct world *world = &s->checkpoint.world;
    memset(s, 0, sizeof *s);
    world_begin(world);
    world_add_tensor(world, DCP_DTYPE_FLOAT32, 2, rows, by_rows);
    world_add_tensor(world, DCP_DTYPE_BFLOAT16, 2, columns, by_columns);
    world_add_tensor(world, DCP_DTYPE_INT64, 0, NULL, NULL);
    world_add_tensor(world, DCP_DTYPE_FLOAT32, 2, long_rows, by_rows);
    world_add_tensor(world, DCP_DTYPE_UINT8, 2, none, alone);
    world_add_tensor(world, DCP_DTYPE_UINT8, 1, one, alone);
    world_add_object(world, 500);
    world_finish(world, 2, false);
    archive_begin(s, dio_bytes);
}

static inline void
archive_clean_up(struct archive_subject *s)
{
    clean_up(&s->checkpoint);
}

static inline int
archive_fetch(void *ctx, uint64_t entry, const uint8_t **ret_data, struct dcp_error *err)
{
    struct archive_subject *s = ctx;
    if (++s->fetched_count == s->fetch_fails_at) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "nobody has them");
    }
    *ret_data = s->bytes[entry];
    return 0;
}

/* Writes `name` from the metadata `image`. */
static inline int
archive_write_from(struct archive_subject *s, const struct dcp_io *io, const struct dcp_buf *image,
                   const char *name)
{
    struct dcp_archive_params params = {
        .io = io,
        .source_path = DIR,
        .image = {image->data, image->len},
        .target_path = TARGET_DIR,
        .target_name = name,
        .folder = {(const uint8_t *)FOLDER, strlen(FOLDER)},
        .align_bytes = s->align_bytes,
        .entries = s->entries,
        .entries_count = s->entries_count,
        .options = &s->options,
        .fetch = archive_fetch,
        .fetch_ctx = s,
    };
    s->fetched_count = 0;
    dcp_error_clear(&s->err);
    int rc = dcp_archive_write(&params, &s->stats, &s->err);
    CHECK_EQ(rc, s->err.code);
    CHECK(rc == 0 || s->err.message[0] != '\0');
    CHECK(rc != DCP_E_INTERNAL);
    CHECK_EQ(io_memory_open_queues(s->checkpoint.disk.fs), 0);
    return rc;
}

static inline int
archive_write(struct archive_subject *s, const char *name)
{
    struct disk *disk = &s->checkpoint.disk;
    unsigned open_before = io_memory_open_files(disk->fs);
    int rc = archive_write_from(s, disk->io, &s->checkpoint.image, name);
    CHECK_EQ(io_memory_open_files(disk->fs), open_before);
    return rc;
}

/* ---- what the file must be ---- */

static inline void
expect_name(struct dcp_buf *buf, const struct dcp_archive_entry *entry)
{
    dcp_buf_put(buf, FOLDER "/", strlen(FOLDER) + 1);
    dcp_buf_put(buf, entry->name.data, entry->name.len);
}

static inline void
expect_entry(const struct archive_subject *s, struct dcp_buf *buf, uint64_t i)
{
    const struct dcp_archive_entry *entry = &s->entries[i];
    size_t name_len = strlen(FOLDER) + 1 + entry->name.len, pad;
    for (pad = 0; (buf->len + 30 + name_len + 4 + pad) % s->align_bytes != 0;) {
        pad++;
    }
    dcp_buf_put(buf, "PK\3\4\0\0", 6);
    dcp_buf_put(buf, entry->bytes > 0 ? "\x08\x08" : "\0\x08", 2);
    dcp_buf_put(buf, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 18);
    dcp_buf_put_u16(buf, (uint16_t)name_len);
    dcp_buf_put_u16(buf, (uint16_t)(4 + pad));
    expect_name(buf, entry);
    dcp_buf_put(buf, "FB", 2);
    dcp_buf_put_u16(buf, (uint16_t)pad);
    for (; pad > 0; pad--) {
        dcp_buf_put_u8(buf, 'Z');
    }
    dcp_buf_put(buf, s->bytes[i], entry->bytes);
    if (entry->bytes > 0) {
        dcp_buf_put(buf, "PK\7\x08", 4);
        dcp_buf_put_u32(buf, world_crc32(s->bytes[i], entry->bytes));
        dcp_buf_put_u32(buf, (uint32_t)entry->bytes);
        dcp_buf_put_u32(buf, (uint32_t)entry->bytes);
    }
}

static inline void
archive_expect(const struct archive_subject *s, struct dcp_buf *buf)
{
    uint32_t headers[MOST_ENTRIES];
    for (uint64_t i = 0; i < s->entries_count; i++) {
        headers[i] = (uint32_t)buf->len;
        expect_entry(s, buf, i);
    }
    uint32_t directory = (uint32_t)buf->len;
    for (uint64_t i = 0; i < s->entries_count; i++) {
        const struct dcp_archive_entry *entry = &s->entries[i];
        dcp_buf_put(buf, "PK\1\2\0\0\0\0", 8);
        dcp_buf_put(buf, entry->bytes > 0 ? "\x08\x08" : "\0\x08", 2);
        dcp_buf_put(buf, "\0\0\0\0\0\0", 6);
        dcp_buf_put_u32(buf, entry->bytes > 0 ? world_crc32(s->bytes[i], entry->bytes) : 0);
        dcp_buf_put_u32(buf, (uint32_t)entry->bytes);
        dcp_buf_put_u32(buf, (uint32_t)entry->bytes);
        dcp_buf_put_u16(buf, (uint16_t)(strlen(FOLDER) + 1 + entry->name.len));
        dcp_buf_put(buf, "\0\0\0\0\0\0\0\0\0\0\0\0", 12);
        dcp_buf_put_u32(buf, headers[i]);
        expect_name(buf, entry);
    }
    uint32_t end = (uint32_t)buf->len;
    dcp_buf_put(buf, "PK\5\6\0\0\0\0", 8);
    dcp_buf_put_u16(buf, (uint16_t)s->entries_count);
    dcp_buf_put_u16(buf, (uint16_t)s->entries_count);
    dcp_buf_put_u32(buf, end - directory);
    dcp_buf_put_u32(buf, directory);
    dcp_buf_put_u16(buf, 0);
}

/* Whether the file is there and holds exactly what it should. */
static inline bool
archive_is_right(const struct archive_subject *s, const char *name)
{
    struct dcp_buf want = {0};
    size_t len;
    const uint8_t *bytes = io_memory_file(s->checkpoint.disk.fs, TARGET_DIR, name, &len);
    archive_expect(s, &want);
    bool same = bytes != NULL && len == want.len && memcmp(bytes, want.data, len) == 0;
    dcp_buf_clean_up(&want);
    return same;
}

#endif

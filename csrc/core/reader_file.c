/*
 * reader_file.c: data files of a load: opened and checked once, read in requests.
 *
 * Small reads (header, block table, windows of foreign records) go through the page cache on one
 * descriptor; the bulk of large cold files on a second one with O_DIRECT, that of files which lie
 * in the page cache by mappings where there are any.  A file of ours is believed only when its
 * header carries the save id of the metadata, or one that it accepts (of a linked file):
 * overwritten or foreign files are named before a byte of them reaches a tensor.
 *
 * Threads: dcp_read_file_span on any, all else on the calling thread; what it looks at does not
 * change after the open.
 */
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "dcp_trace.h"

int
dcp_read_check_cancel(const struct dcp_reader *reader, struct dcp_error *err)
{
    atomic_int *cancel = reader->options->cancel;
    if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the load was cancelled");
    }
    return 0;
}

static int
fail_io(const struct dcp_read_file *file, int sys_errno, const char *what, uint64_t offset_bytes,
        struct dcp_error *err)
{
    bool first = err != NULL && err->code == 0;
    int code = dcp_error_set(err, DCP_E_IO, sys_errno, file->path, "%s %s failed: %s", what,
                             file->path, strerror(sys_errno));
    if (first) {
        err->offset_bytes = offset_bytes;
    }
    return code;
}

static int
fail_short(const struct dcp_read_file *file, uint64_t offset_bytes, uint64_t end_bytes,
           struct dcp_error *err)
{
    bool first = err != NULL && err->code == 0;
    int code = dcp_error_set(err, DCP_E_CORRUPT, 0, file->path,
                             "%s was cut short: it ends at byte %" PRIu64 ", but the checkpoint "
                             "needs it up to byte %" PRIu64,
                             file->path, offset_bytes, end_bytes);
    if (first) {
        err->offset_bytes = offset_bytes;
    }
    return code;
}

/* Whether a file's bytes are to be had without its device. */
static bool
is_hot(const struct dcp_reader *reader, const struct dcp_read_file *file,
       const struct dcp_dio_align *align, uint64_t wanted_bytes)
{
    const struct dcp_io *io = reader->io;
    /* Asking takes as long as the file is large, a few reads of it do not. */
    bool ask =
        wanted_bytes >= DCP_DATA_FILE_DIRECT_LEAST_BYTES || file->size_bytes / 16 <= wanted_bytes;
    return align->in_memory ||
           (ask && io->cached(io->ctx, file->fd, 0, file->size_bytes) >= DCP_DATA_FILE_HOT_PERCENT);
}

static bool
open_direct(const struct dcp_reader *reader, struct dcp_read_file *file, const char *name,
            const struct dcp_dio_align *align)
{
    int fd = dcp_data_file_open_direct(reader->io, reader->dirfd, name, align);
    if (fd >= 0) {
        file->mode = DCP_READ_DIRECT;
        file->direct_fd = fd;
        file->align_bytes = align->offset_bytes;
        file->mem_align_bytes = align->mem_bytes;
    }
    return fd >= 0;
}

/* Decides how the bulk of a file is read. */
static int
choose_mode(const struct dcp_reader *reader, struct dcp_read_file *file, const char *name,
            uint64_t wanted_bytes, struct dcp_error *err)
{
    const struct dcp_io *io = reader->io;
    enum dcp_direct wish = reader->options->direct;
    struct dcp_dio_align align = {0};
    file->mode = DCP_READ_BUFFERED;
    if (io->dio_align(io->ctx, file->fd, &align) != 0) {
        align = (struct dcp_dio_align){0};
    }
    if (wish != DCP_DIRECT_ON && is_hot(reader, file, &align, wanted_bytes)) {
        file->hot = true;
        file->mode = io->map != NULL ? DCP_READ_MAPPED : DCP_READ_HOT;
        return 0;
    }
    if (wish == DCP_DIRECT_OFF ||
        (wish == DCP_DIRECT_AUTO && wanted_bytes < DCP_DATA_FILE_DIRECT_LEAST_BYTES)) {
        return 0;
    }
    if (!open_direct(reader, file, name, &align) && wish == DCP_DIRECT_ON) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, EINVAL, file->path,
                             "direct I/O was asked for, but the file system of %s does not do it; "
                             "leave the choice to the engine",
                             file->path);
    }
    return 0;
}

static int
read_small(struct dcp_reader *reader, struct dcp_read_file *file, uint64_t offset, uint8_t *data,
           size_t len, struct dcp_error *err)
{
    reader->stats.read_bytes += len;
    reader->stats.hot_bytes += file->hot ? len : 0;
    reader->stats.requests_count++;
    uint64_t traced = dcp_trace_begin();
    int rc = dcp_io_read_all(reader->io, file->fd, data, len, offset, file->path, err);
    dcp_trace_end_io(traced, "read", file->path, offset, len);
    return rc;
}

/* A file of a native checkpoint says which save wrote it, and which of its files it is. */
static int
check_header(struct dcp_reader *reader, struct dcp_read_file *file, const char *name,
             struct dcp_error *err)
{
    struct dcp_file_header *header = &file->header;
    uint8_t bytes[DCP_FILE_HEADER_BYTES];
    int rc = read_small(reader, file, 0, bytes, sizeof bytes, err);
    if (rc != 0) {
        return rc;
    }
    struct dcp_error why;
    dcp_error_clear(&why);
    if (dcp_file_parse_header(bytes, header, &why) != 0) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, file->path,
                             "%s is no data file of this checkpoint: %s", file->path, why.message);
    }
    if (!dcp_metadata_accepts(reader->plan->md, &header->save_id)) {
        return dcp_error_set(err, DCP_E_STALE, 0, file->path,
                             "%s was written by another save than the metadata: the directory was "
                             "overwritten, or files of two checkpoints were mixed",
                             file->path);
    }
    if (!dcp_data_file_has_own_name(reader->plan->md, header, name)) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, file->path,
                             "%s is another file of this checkpoint, by its header "
                             "__%" PRIu32 "_%" PRIu32 ".distcp: rename it back",
                             file->path, header->rank, header->n);
    }
    if (file->size_bytes < header->length_bytes) {
        return fail_short(file, file->size_bytes, header->length_bytes, err);
    }
    return 0;
}

/* Reads the file's block table, once.  A damaged table is an error only where checksums count. */
static int
read_table(struct dcp_reader *reader, struct dcp_read_file *file, struct dcp_error *err)
{
    file->table_tried = true;
    const struct dcp_file_header *header = &file->header;
    if (header->table_bytes == 0) {
        return 0;
    }
    uint64_t end;
    if (dcp_add_overflows_u64(header->table_offset_bytes, header->table_bytes, &end) ||
        end > file->size_bytes) {
        return fail_short(file, file->size_bytes, end, err);
    }
    uint8_t *bytes = dcp_malloc((size_t)header->table_bytes);
    if (bytes == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, file->path,
                             "out of memory for the block table of %s", file->path);
    }
    int rc = read_small(reader, file, header->table_offset_bytes, bytes,
                        (size_t)header->table_bytes, err);
    if (rc == 0) {
        struct dcp_error why;
        dcp_error_clear(&why);
        int parsed = dcp_block_table_parse(bytes, (size_t)header->table_bytes, &header->save_id,
                                           &file->table, &why);
        if (parsed == DCP_E_NOMEM || (parsed != 0 && reader->options->verify)) {
            rc = dcp_error_set(err, parsed, 0, file->path, "the block table of %s: %s", file->path,
                               why.message);
        }
    }
    dcp_free(bytes);
    return rc;
}

int
dcp_read_file_blocks(struct dcp_reader *reader, struct dcp_read_file *file,
                     uint64_t payload_offset_bytes, uint64_t payload_bytes,
                     const struct dcp_block_entry **ret_entry, struct dcp_error *err)
{
    *ret_entry = NULL;
    int rc = file->table_tried ? 0 : read_table(reader, file, err);
    if (rc == 0 && file->table.entries_count > 0) {
        const struct dcp_block_entry *entry =
            dcp_block_table_find(&file->table, payload_offset_bytes);
        *ret_entry = entry != NULL && entry->payload_bytes == payload_bytes ? entry : NULL;
    }
    return rc;
}

static void
close_fds(const struct dcp_reader *reader, struct dcp_read_file *file)
{
    /* Nothing was written: a failing close has nothing to say. */
    if (file->direct_fd >= 0) {
        reader->io->close(reader->io->ctx, file->direct_fd);
    }
    if (file->fd >= 0) {
        reader->io->close(reader->io->ctx, file->fd);
    }
    file->fd = file->direct_fd = -1;
}

void
dcp_read_file_release(struct dcp_reader *reader, struct dcp_read_file *file)
{
    if (file == NULL || --file->users > 0) {
        return;
    }
    close_fds(reader, file);
    dcp_block_table_clean_up(&file->table);
    dcp_free(file);
}

int
dcp_read_file_open(struct dcp_reader *reader, uint32_t index, uint64_t wanted_bytes,
                   struct dcp_read_file **ret_file, struct dcp_error *err)
{
    char name[DCP_DATA_FILE_NAME_BYTES];
    int rc = dcp_data_file_of(reader->plan->md, index, reader->dir_path, name, err);
    if (rc != 0) {
        return rc;
    }
    struct dcp_read_file *file = dcp_calloc(1, sizeof *file);
    if (file == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a file to read");
    }
    file->index = index;
    file->users = 1;
    file->align_bytes = file->mem_align_bytes = 1;
    file->direct_fd = -1;
    snprintf(file->path, sizeof file->path, "%s/%s",
             reader->dir_path != NULL ? reader->dir_path : "", name);
    struct dcp_stat stat = {0};
    file->fd = dcp_data_file_open(reader->io, reader->dirfd, name);
    if (file->fd < 0) {
        int sys_errno = -file->fd;
        bool gone = sys_errno == ENOENT || sys_errno == ESTALE;
        rc = dcp_error_set(err, gone ? DCP_E_NOENT : DCP_E_IO, sys_errno, file->path,
                           "opening %s failed: %s%s", file->path, strerror(sys_errno),
                           gone ? "; the checkpoint names it, so it was removed or replaced" : "");
        goto failed;
    }
    do {
        rc = reader->io->fstat(reader->io->ctx, file->fd, &stat);
    } while (rc == -EINTR);
    if (rc < 0) {
        rc = fail_io(file, -rc, "fstat of", UINT64_MAX, err);
        goto failed;
    }
    file->size_bytes = stat.size_bytes;
    rc = reader->plan->md->is_native ? check_header(reader, file, name, err) : 0;
    if (rc != 0) {
        goto failed;
    }
    rc = choose_mode(reader, file, name, wanted_bytes, err);
    if (rc != 0) {
        goto failed;
    }
    reader->stats.files_count++;
    reader->stats.direct_files_count += file->mode == DCP_READ_DIRECT ? 1 : 0;
    reader->stats.hot_files_count += file->hot ? 1 : 0;
    *ret_file = file;
    return 0;
failed:
    dcp_read_file_release(reader, file);
    return rc;
}

/* ---- windows of a record ---- */

enum { WINDOW_BYTES = 4096, WINDOWS = 2 };

struct windows {
    struct dcp_reader *reader;
    struct dcp_read_file *file;
    const struct dcp_md_chunk *chunk;
    struct dcp_buf bytes[WINDOWS];
    uint64_t from[WINDOWS]; /* in the record */
    uint32_t next;          /* the one to replace */
};

static int
windows_read(void *ctx, uint64_t offset, size_t len, const uint8_t **ret, struct dcp_error *err)
{
    struct windows *windows = ctx;
    uint64_t record_bytes = windows->chunk->length_bytes;
    if (offset > record_bytes || len > record_bytes - offset) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, windows->file->path,
                             "a record of %s points behind its end", windows->file->path);
    }
    for (uint32_t i = 0; i < WINDOWS; i++) {
        if (offset >= windows->from[i] &&
            offset + len <= windows->from[i] + windows->bytes[i].len) {
            *ret = windows->bytes[i].data + (offset - windows->from[i]);
            return 0;
        }
    }
    uint32_t i = windows->next;
    windows->next = (i + 1) % WINDOWS;
    size_t want = (size_t)dcp_min_u64(dcp_max_u64(len, WINDOW_BYTES), record_bytes - offset);
    dcp_buf_clear(&windows->bytes[i]);
    uint8_t *at = dcp_buf_extend(&windows->bytes[i], want);
    if (at == NULL) {
        return dcp_buf_check(&windows->bytes[i], err);
    }
    windows->from[i] = offset;
    *ret = at;
    return read_small(windows->reader, windows->file, windows->chunk->offset_bytes + offset, at,
                      want, err);
}

int
dcp_read_file_parse(struct dcp_reader *reader, struct dcp_read_file *file,
                    const struct dcp_md_chunk *chunk, struct dcp_record_view *ret_view,
                    struct dcp_error *err)
{
    struct windows windows = {.reader = reader, .file = file, .chunk = chunk};
    struct dcp_record_input input = {
        .read = windows_read, .ctx = &windows, .length_bytes = chunk->length_bytes};
    int rc = dcp_record_parse(&input, ret_view, err);
    for (uint32_t i = 0; i < WINDOWS; i++) {
        dcp_buf_clean_up(&windows.bytes[i]);
    }
    return rc;
}

/* ---- spans ---- */

int
dcp_read_file_span(const struct dcp_reader *reader, const struct dcp_read_file *file,
                   const struct dcp_read_span *span, uint8_t *data, struct dcp_error *err)
{
    const struct dcp_io *io = reader->io;
    bool direct = file->direct_fd >= 0;
    uint64_t need = span->to_bytes - span->from_bytes;
    /* Rounding up to the alignment may reach behind the end of the file. */
    uint64_t len = dcp_align_up(need, direct ? file->align_bytes : 1);
    uint64_t done = 0, traced = dcp_trace_begin();
    int rc = dcp_read_check_cancel(reader, err);
    while (rc == 0 && done < need) {
        size_t want = (size_t)dcp_min_u64(len - done, DCP_MAX_REQUEST_BYTES);
        ssize_t n = io->pread(io->ctx, direct ? file->direct_fd : file->fd, data + done, want,
                              span->from_bytes + done);
        if (n == -EINTR) {
            continue;
        }
        if (n == -EINVAL && direct && reader->options->direct != DCP_DIRECT_ON) {
            direct = false;
            continue;
        }
        if (n < 0) {
            return fail_io(file, (int)-n, "reading", span->from_bytes + done, err);
        }
        uint64_t step = (uint64_t)n;
        if (direct && done + step < need) {
            step -= step % file->align_bytes;
        }
        if (n == 0) {
            return fail_short(file, span->from_bytes + done, span->to_bytes, err);
        }
        if (step == 0) {
            /* Less than one aligned unit: the page cache can go on from any byte. */
            direct = false;
            step = (uint64_t)n;
        }
        done += step;
    }
    if (rc == 0) {
        dcp_trace_end_io(traced, "read", file->path, span->from_bytes, need);
    }
    return rc;
}

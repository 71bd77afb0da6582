/*
 * verify_file.c: a data file of the checkpoint that is checked: opened, measured, its header and
 * its tables.
 *
 * A file of ours says in its header which save wrote it, under which name and how long it is; all
 * three are compared.  A linked file (of an incremental save) keeps the header of the save that
 * wrote it, so only the id is compared there.  Small reads go through the page cache on one
 * descriptor; records through a second one with O_DIRECT where that gains something.
 *
 * Threads: the calling thread.
 */
#include "verify.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static int
check_cut(const struct dcp_verify_file *file, uint64_t need_bytes, struct dcp_error *why)
{
    if (file->size_bytes >= need_bytes) {
        return 0;
    }
    int rc = dcp_error_set(why, DCP_E_CORRUPT, 0, file->path,
                           "the file has %" PRIu64 " of its %" PRIu64 " bytes: it was cut short or "
                           "never written whole",
                           file->size_bytes, need_bytes);
    why->offset_bytes = file->size_bytes;
    return rc;
}

/* Whose file it is. */
static int
check_header(struct dcp_verifier *v, struct dcp_verify_file *file, struct dcp_error *why)
{
    struct dcp_file_header *header = &file->header;
    uint8_t bytes[DCP_FILE_HEADER_BYTES];
    int rc = check_cut(file, sizeof bytes, why);
    if (rc == 0) {
        v->stream.read_bytes += sizeof bytes;
        rc = dcp_io_read_all(v->io, file->fd, bytes, sizeof bytes, 0, file->path, why);
    }
    if (rc == 0) {
        rc = dcp_file_parse_header(bytes, header, why);
    }
    if (rc != 0) {
        return rc;
    }
    if (!dcp_metadata_accepts(v->md, &header->save_id)) {
        return dcp_error_set(why, DCP_E_STALE, 0, file->path,
                             "the file was written by another save than the metadata: the "
                             "directory was overwritten, or files of two checkpoints were mixed");
    }
    if (!dcp_data_file_has_own_name(v->md, header, file->name)) {
        return dcp_error_set(why, DCP_E_CORRUPT, 0, file->path,
                             "the file was written as __%u_%u.distcp: files of the checkpoint were "
                             "renamed or mixed up",
                             header->rank, header->n);
    }
    file->has_header = true;
    return check_cut(file, header->length_bytes, why);
}

void
dcp_verify_file_close(struct dcp_verifier *v, struct dcp_verify_file *file)
{
    /* Nothing was written: a failing close has nothing to say. */
    if (file->direct_fd >= 0) {
        v->io->close(v->io->ctx, file->direct_fd);
    }
    if (file->fd >= 0) {
        v->io->close(v->io->ctx, file->fd);
    }
    file->fd = file->direct_fd = -1;
    dcp_block_table_clean_up(&file->table);
}

int
dcp_verify_file_open(struct dcp_verifier *v, uint32_t index, struct dcp_verify_file *file,
                     struct dcp_error *why)
{
    *file = (struct dcp_verify_file){.fd = -1, .direct_fd = -1, .align_bytes = 1};
    int rc = dcp_data_file_of(v->md, index, NULL, file->name, why);
    if (rc != 0) {
        return rc;
    }
    snprintf(file->path, sizeof file->path, "%s/%s", v->dir_path, file->name);
    file->fd = dcp_data_file_open(v->io, v->dirfd, file->name);
    if (file->fd < 0) {
        bool gone = file->fd == -ENOENT || file->fd == -ESTALE;
        return dcp_error_set(why, gone ? DCP_E_NOENT : DCP_E_IO, -file->fd, file->path,
                             gone ? "the file is missing" : "opening the file failed: %s",
                             strerror(-file->fd));
    }
    struct dcp_stat stat = {0};
    do {
        rc = v->io->fstat(v->io->ctx, file->fd, &stat);
    } while (rc == -EINTR);
    if (rc != 0) {
        return dcp_error_set(why, DCP_E_IO, -rc, file->path, "fstat failed: %s", strerror(-rc));
    }
    if (stat.is_dir) {
        return dcp_error_set(why, DCP_E_CORRUPT, 0, file->path,
                             "a directory lies where a data file should be");
    }
    file->size_bytes = stat.size_bytes;
    return v->md->is_native ? check_header(v, file, why) : 0;
}

/* ---- tables ---- */

/* Reads `len` bytes of the file into the verifier's window. */
static int
read_window(struct dcp_verifier *v, const struct dcp_verify_file *file, uint64_t offset,
            uint64_t len, struct dcp_error *why)
{
    dcp_buf_clear(&v->window);
    uint8_t *at = dcp_buf_extend(&v->window, (size_t)len);
    if (at == NULL) {
        return dcp_buf_check(&v->window, why);
    }
    v->stream.read_bytes += len;
    return dcp_io_read_all(v->io, file->fd, at, (size_t)len, offset, file->path, why);
}

static int
check_block_table(struct dcp_verifier *v, struct dcp_verify_file *file, struct dcp_error *why)
{
    const struct dcp_file_header *header = &file->header;
    int rc = read_window(v, file, header->table_offset_bytes, header->table_bytes, why);
    return rc != 0 ? rc
                   : dcp_block_table_parse(v->window.data, v->window.len, &header->save_id,
                                           &file->table, why);
}

static int
check_hash_table(struct dcp_verifier *v, struct dcp_verify_file *file, struct dcp_error *why)
{
    const struct dcp_file_header *header = &file->header;
    struct dcp_hash_table table = {0};
    int rc = read_window(v, file, header->hash_offset_bytes, header->hash_bytes, why);
    if (rc == 0) {
        rc = dcp_hash_table_parse(v->window.data, v->window.len, &header->save_id, &table, why);
    }
    dcp_hash_table_clean_up(&table);
    return rc;
}

int
dcp_verify_file_tables(struct dcp_verifier *v, struct dcp_verify_file *file, struct dcp_error *err)
{
    const struct dcp_file_header *header = &file->header;
    struct dcp_error why;
    int rc = 0;
    if (!file->has_header) {
        return 0;
    }
    dcp_error_clear(&why);
    if (header->table_bytes > 0 && check_block_table(v, file, &why) != 0) {
        why.offset_bytes = header->table_offset_bytes;
        rc = dcp_verify_note(v, DCP_VERIFY_NO_ENTRY, file->name, &why, err);
    }
    dcp_error_clear(&why);
    if (rc == 0 && header->hash_bytes > 0 && check_hash_table(v, file, &why) != 0) {
        why.offset_bytes = header->hash_offset_bytes;
        rc = dcp_verify_note(v, DCP_VERIFY_NO_ENTRY, file->name, &why, err);
    }
    return rc;
}

/* ---- how records are read ---- */

int
dcp_verify_file_choose_direct(struct dcp_verifier *v, struct dcp_verify_file *file,
                              uint64_t wanted_bytes, struct dcp_error *why)
{
    const struct dcp_io *io = v->io;
    enum dcp_direct wish = v->options->direct;
    struct dcp_dio_align align = {0};
    if (wish == DCP_DIRECT_OFF ||
        (wish == DCP_DIRECT_AUTO && wanted_bytes < DCP_DATA_FILE_DIRECT_LEAST_BYTES)) {
        return 0;
    }
    if (io->dio_align(io->ctx, file->fd, &align) != 0) {
        align.mem_bytes = 0;
    }
    if (wish == DCP_DIRECT_AUTO &&
        (align.in_memory ||
         io->cached(io->ctx, file->fd, 0, file->size_bytes) >= DCP_DATA_FILE_HOT_PERCENT)) {
        return 0;
    }
    int fd = dcp_data_file_open_direct(io, v->dirfd, file->name, &align);
    if (fd >= 0) {
        file->direct_fd = fd;
        file->align_bytes = align.offset_bytes;
        v->result->direct_files_count++;
        return 0;
    }
    if (wish == DCP_DIRECT_ON) {
        return dcp_error_set(why, DCP_E_INVALID, EINVAL, file->path,
                             "direct I/O was asked for, but the file system of %s does not do it; "
                             "leave the choice to the engine",
                             file->path);
    }
    return 0;
}

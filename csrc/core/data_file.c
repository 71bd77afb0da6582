/*
 * data_file.c: names, descriptors and identity of the data files that a checkpoint's metadata
 * names.
 *
 * What the metadata says is not trusted: it may come from anybody.
 *
 * Threads: no state.
 */
#include "data_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "dcp_commit.h"

int
dcp_data_file_of(const struct dcp_metadata *md, uint32_t index, const char *dir_path,
                 char ret_name[DCP_DATA_FILE_NAME_BYTES], struct dcp_error *err)
{
    const struct dcp_md_file *file = &md->files[index];
    const char *text = md->strings + file->name;
    bool bad = file->name_len == 0 || file->name_len >= DCP_DATA_FILE_NAME_BYTES ||
               text[0] == '/' || memchr(text, '\0', file->name_len) != NULL;
    for (uint32_t i = 0; !bad && i < file->name_len; i++) {
        bool at_start = i == 0 || text[i - 1] == '/';
        bad = at_start && file->name_len - i >= 2 && text[i] == '.' && text[i + 1] == '.' &&
              (file->name_len - i == 2 || text[i + 2] == '/');
    }
    if (bad) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, dir_path,
                             "the metadata names a data file outside its directory: %.*s",
                             (int)dcp_min_u64(file->name_len, DCP_DATA_FILE_NAME_BYTES), text);
    }
    memcpy(ret_name, text, file->name_len);
    ret_name[file->name_len] = '\0';
    return 0;
}

int
dcp_data_file_open(const struct dcp_io *io, int dirfd, const char *name)
{
    int fd;
    do {
        fd = io->open_at(io->ctx, dirfd, name, O_RDONLY, 0);
    } while (fd == -EINTR);
    return fd;
}

int
dcp_data_file_open_direct(const struct dcp_io *io, int dirfd, const char *name,
                          const struct dcp_dio_align *align)
{
    uint32_t step = align->offset_bytes;
    if (align->mem_bytes == 0 || align->mem_bytes > DCP_DIRECT_ALIGN_BYTES || step == 0 ||
        (step & (step - 1)) != 0 || step > DCP_DIRECT_ALIGN_BYTES) {
        return -EINVAL;
    }
    int fd = dcp_data_file_open(io, dirfd, name);
    int rc = fd < 0 ? fd : io->set_direct(io->ctx, fd, true);
    if (fd >= 0 && rc != 0) {
        io->close(io->ctx, fd);
    }
    return rc != 0 ? rc : fd;
}

bool
dcp_data_file_has_own_name(const struct dcp_metadata *md, const struct dcp_file_header *header,
                           const char *name)
{
    char own[DCP_DATA_FILE_NAME_BYTES];
    if (memcmp(&header->save_id, &md->save_id, sizeof header->save_id) != 0) {
        return true;
    }
    dcp_data_file_name(own, sizeof own, header->rank, header->n);
    return strcmp(own, name) == 0;
}

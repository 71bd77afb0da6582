/*
 * export_publish.c: the names of an export: files made before it, given their final names after it.
 *
 * The format has no switch that turns from one set of files to another: readers find tensors by an
 * index of file names, or take all files there are.  What is promised therefore depends on what
 * lies in the directory.  Where the new files replace nothing, or one file replaces itself, every
 * instant shows the old export whole or the new one.  Else the old index and the old files go
 * before the first new file gets its name, and the new index comes last: whoever looks in between
 * finds no export, or a part of one, which lacks tensors; never tensors of two exports.  The window
 * is a few renames long: all bytes are durable before it begins.
 *
 * Each step is made durable before the next, where its order matters after a power cut.
 *
 * Up to the first of the old names that goes, publishing can fail or be cancelled: then the new
 * files go.  From there on nothing of this export is removed, whatever happens: it may be the only
 * one there is.
 *
 * Threads: none of its own.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "export.h"

/* ---- making files ---- */

static int
sync_dir(const struct dcp_export_dir *dir, struct dcp_error *err)
{
    int rc = dcp_io_sync(dir->io, dir->fd);
    return rc == 0 ? 0 : dcp_export_fail_sync(dir, ".", -rc, "syncing", err);
}

static int
unlink_name(const struct dcp_export_dir *dir, const char *name, struct dcp_error *err)
{
    int rc;
    do {
        rc = dir->io->unlink_at(dir->io->ctx, dir->fd, name);
    } while (rc == -EINTR);
    return rc == 0 || rc == -ENOENT ? 0 : dcp_export_fail(dir, name, -rc, "removing", err);
}

/* Blocks for all bytes, where the file system can: a full disk is met before the data. */
static int
allocate(const struct dcp_export_dir *dir, int fd, const struct dcp_export_file *file,
         struct dcp_error *err)
{
    const struct dcp_io *io = dir->io;
    struct dcp_dio_align align = {0};
    bool in_memory = io->dio_align(io->ctx, fd, &align) == 0 && align.in_memory;
    int rc = 0;
    if (!in_memory && file->length_bytes >= DCP_PREALLOCATE_BYTES) {
        do {
            rc = io->fallocate(io->ctx, fd, 0, file->length_bytes);
        } while (rc == -EINTR);
        if (rc == -ENOSPC || rc == -EDQUOT || rc == -EFBIG || rc == -EIO) {
            return dcp_export_fail(dir, file->name, -rc, "reserving space for", err);
        }
    }
    do {
        rc = io->truncate(io->ctx, fd, file->length_bytes);
    } while (rc == -EINTR);
    return rc == 0 ? 0 : dcp_export_fail(dir, file->name, -rc, "sizing", err);
}

static int
create_file(const struct dcp_export_dir *dir, const struct dcp_export_file *file,
            struct dcp_error *err)
{
    const struct dcp_io *io = dir->io;
    if (file->head.len > file->length_bytes || file->length_bytes > DCP_MAX_FILE_BYTES) {
        return dcp_error_set(err, DCP_E_INVALID, 0, file->name,
                             "%s: a file of %" PRIu64 " bytes cannot begin with %zu", file->name,
                             file->length_bytes, file->head.len);
    }
    int fd;
    do {
        fd = io->open_at(io->ctx, dir->fd, file->name, O_WRONLY | O_CREAT | O_EXCL, 0666);
    } while (fd == -EINTR);
    if (fd < 0) {
        return dcp_export_fail(dir, file->name, -fd, "creating", err);
    }
    int rc = allocate(dir, fd, file, err);
    if (rc == 0 && file->head.len > 0) {
        rc = dcp_io_write_all(io, fd, file->head.data, file->head.len, 0, file->name, err);
    }
    int closed = io->close(io->ctx, fd);
    if (rc == 0 && closed < 0 && closed != -EINTR) {
        rc = dcp_export_fail(dir, file->name, -closed, "closing", err);
    }
    return rc;
}

/* ---- walking a directory ---- */

/* Names that a walk found, one after the other, each with its NUL. */
struct names {
    struct dcp_buf buf;
    const char *prefix;  /* names that begin with it, or NULL */
    const char *pattern; /* names that fit it, or NULL; '#' is a digit */
};

static bool
fits(const char *pattern, const char *name)
{
    for (; *pattern != 0 && *name != 0; pattern++, name++) {
        if (*pattern == '#' ? *name < '0' || *name > '9' : *pattern != *name) {
            return false;
        }
    }
    return *pattern == *name;
}

static int
note_name(void *ctx, const char *name)
{
    struct names *names = ctx;
    if ((names->prefix != NULL && strncmp(name, names->prefix, strlen(names->prefix)) == 0) ||
        (names->pattern != NULL && fits(names->pattern, name))) {
        dcp_buf_put(&names->buf, name, strlen(name) + 1);
    }
    return 0;
}

static int
list_names(const struct dcp_export_dir *dir, struct names *names, struct dcp_error *err)
{
    int rc;
    do {
        dcp_buf_clear(&names->buf);
        rc = dir->io->list(dir->io->ctx, dir->fd, note_name, names);
    } while (rc == -EINTR);
    return rc == 0 ? dcp_buf_check(&names->buf, err)
                   : dcp_export_fail(dir, ".", -rc, "listing", err);
}

static const char *
next_name(const struct names *names, const char *name)
{
    const char *end = (const char *)names->buf.data + names->buf.len;
    name = name == NULL ? (const char *)names->buf.data : name + strlen(name) + 1;
    return names->buf.len == 0 || name == end ? NULL : name;
}

int
dcp_export_sweep(const struct dcp_io *io, const char *dir_path, struct dcp_error *err)
{
    struct names names = {.prefix = DCP_EXPORT_PREFIX};
    struct dcp_export_dir dir;
    int rc = dcp_export_dir_open(&dir, io, dir_path, err);
    if (rc != 0) {
        return rc;
    }
    rc = list_names(&dir, &names, err);
    for (const char *name = NULL; rc == 0 && (name = next_name(&names, name)) != NULL;) {
        rc = unlink_name(&dir, name, err);
    }
    dcp_buf_clean_up(&names.buf);
    dcp_export_dir_close(&dir);
    return rc;
}

int
dcp_export_create(const struct dcp_io *io, const char *dir_path,
                  const struct dcp_export_file *files, uint32_t files_count, struct dcp_error *err)
{
    struct dcp_export_dir dir;
    int rc;
    do {
        rc = io->mkdirs(io->ctx, dir_path);
    } while (rc == -EINTR);
    if (rc < 0) {
        return dcp_error_set(err, DCP_E_IO, -rc, dir_path, "making the directory %s failed: %s",
                             dir_path, strerror(-rc));
    }
    rc = dcp_export_dir_open(&dir, io, dir_path, err);
    if (rc != 0) {
        return rc;
    }
    for (uint32_t i = 0; rc == 0 && i < files_count; i++) {
        rc = create_file(&dir, &files[i], err);
        if (rc != 0) { /* an export that did not begin leaves nothing; EEXIST is impossible */
            for (uint32_t j = 0; j <= i; j++) {
                (void)unlink_name(&dir, files[j].name, NULL);
            }
        }
    }
    dcp_export_dir_close(&dir);
    return rc;
}

/* ---- publishing ---- */

static int
fail_gone(const struct dcp_export_dir *dir, const char *name, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_SUPERSEDED, ENOENT, name,
                         "publishing %s/%s failed: it is gone; another export into the directory "
                         "took over",
                         dir->path, name);
}

/* Everything of a file is durable: the heads, and what a rank wrote that shares a descriptor with
 * nobody. */
static int
sync_file(const struct dcp_export_dir *dir, const char *name, struct dcp_error *err)
{
    const struct dcp_io *io = dir->io;
    int fd;
    do {
        fd = io->open_at(io->ctx, dir->fd, name, O_WRONLY, 0);
    } while (fd == -EINTR);
    if (fd == -ENOENT) {
        return fail_gone(dir, name, err);
    }
    if (fd < 0) {
        return dcp_export_fail(dir, name, -fd, "opening", err);
    }
    int rc = dcp_io_sync(io, fd);
    rc = rc == 0 ? 0 : dcp_export_fail_sync(dir, name, -rc, "syncing", err);
    io->close(io->ctx, fd);
    return rc;
}

static int
write_index(const struct dcp_export_dir *dir, const struct dcp_export_publication *publication,
            struct dcp_error *err)
{
    const struct dcp_export_file file = {.name = publication->index_tmp_name,
                                         .length_bytes = publication->index.len,
                                         .head = publication->index};
    int rc = create_file(dir, &file, err);
    return rc == 0 && publication->sync ? sync_file(dir, file.name, err) : rc;
}

static int
rename_name(const struct dcp_export_dir *dir, const char *from, const char *to,
            struct dcp_error *err)
{
    int rc = dir->io->rename_at(dir->io->ctx, dir->fd, from, to);
    if (rc == -EINTR) { /* it took effect or it did not */
        rc = dcp_io_exists(dir->io, dir->fd, from)
                 ? dir->io->rename_at(dir->io->ctx, dir->fd, from, to)
                 : 0;
    }
    return rc == 0 ? 0 : dcp_export_fail(dir, from, -rc, "giving its final name to", err);
}

/* All of this export is there and durable. */
static int
prepare(const struct dcp_export_dir *dir, const struct dcp_export_publication *publication,
        struct dcp_error *err)
{
    int rc = publication->index_name != NULL ? write_index(dir, publication, err) : 0;
    for (uint32_t i = 0; rc == 0 && publication->sync && i < publication->names_count; i++) {
        rc = sync_file(dir, publication->names[i].from, err);
    }
    return rc == 0 && publication->sync ? sync_dir(dir, err) : rc;
}

/* The last look before the former export goes: an export that began meanwhile has swept this one.
 */
static int
check_there(const struct dcp_export_dir *dir, const struct dcp_export_publication *publication,
            struct dcp_error *err)
{
    for (uint32_t i = 0; i < publication->names_count; i++) {
        if (!dcp_io_exists(dir->io, dir->fd, publication->names[i].from)) {
            return fail_gone(dir, publication->names[i].from, err);
        }
    }
    if (publication->index_name != NULL &&
        !dcp_io_exists(dir->io, dir->fd, publication->index_tmp_name)) {
        return fail_gone(dir, publication->index_tmp_name, err);
    }
    return dcp_export_check_cancel(publication->cancel, err);
}

static void
discard(const struct dcp_export_dir *dir, const struct dcp_export_publication *publication)
{
    for (uint32_t i = 0; i < publication->names_count; i++) {
        (void)unlink_name(dir, publication->names[i].from, NULL);
    }
    if (publication->index_name != NULL) {
        (void)unlink_name(dir, publication->index_tmp_name, NULL);
    }
}

/* Files of the former export; none that the publication only replaces by itself. */
static int
remove_former(const struct dcp_export_dir *dir, const struct dcp_export_publication *publication,
              const struct names *former, struct dcp_error *err)
{
    const char *first = next_name(former, NULL);
    bool only_itself =
        first == NULL || (publication->names_count == 1 && next_name(former, first) == NULL &&
                          strcmp(first, publication->names[0].to) == 0);
    int rc = 0;
    if (only_itself) {
        return 0;
    }
    if (publication->index_name != NULL) {
        rc = unlink_name(dir, publication->index_name, err);
        rc = rc == 0 && publication->sync ? sync_dir(dir, err) : rc;
    }
    for (const char *name = NULL; rc == 0 && (name = next_name(former, name)) != NULL;) {
        rc = unlink_name(dir, name, err);
    }
    return rc == 0 && publication->sync ? sync_dir(dir, err) : rc;
}

/* From the former export to this one. */
static int
take_over(const struct dcp_export_dir *dir, const struct dcp_export_publication *publication,
          const struct names *former, struct dcp_error *err)
{
    int rc = remove_former(dir, publication, former, err);
    for (uint32_t i = 0; rc == 0 && i < publication->names_count; i++) {
        rc = rename_name(dir, publication->names[i].from, publication->names[i].to, err);
    }
    rc = rc == 0 && publication->sync ? sync_dir(dir, err) : rc;
    if (rc == 0 && publication->index_name != NULL) {
        rc = rename_name(dir, publication->index_tmp_name, publication->index_name, err);
        rc = rc == 0 && publication->sync ? sync_dir(dir, err) : rc;
    }
    return rc;
}

int
dcp_export_publish(const struct dcp_io *io, const char *dir_path,
                   const struct dcp_export_publication *publication, struct dcp_error *err)
{
    struct names former = {.pattern = publication->replaced_pattern};
    struct dcp_export_dir dir;
    struct dcp_error why;
    int rc = dcp_export_dir_open(&dir, io, dir_path, err);
    if (rc != 0) {
        return rc;
    }
    rc = prepare(&dir, publication, err);
    rc = rc == 0 ? list_names(&dir, &former, err) : rc;
    rc = rc == 0 ? check_there(&dir, publication, err) : rc;
    if (rc != 0) {
        discard(&dir, publication);
        goto done;
    }
    dcp_error_clear(&why);
    rc = take_over(&dir, publication, &former, &why);
    if (rc != 0) {
        rc = dcp_error_set(err, rc, why.sys_errno, why.path,
                           "%s; the former export may be gone, so this one was not removed: its "
                           "files without their final names are those in %s that begin with %s; "
                           "save again",
                           why.message, dir_path, DCP_EXPORT_PREFIX);
    }
done:
    dcp_buf_clean_up(&former.buf);
    dcp_export_dir_close(&dir);
    return rc;
}

void
dcp_export_discard(const struct dcp_io *io, const char *dir_path, const char *const *names,
                   uint32_t count)
{
    struct dcp_export_dir dir;
    if (dcp_export_dir_open(&dir, io, dir_path, NULL) != 0) {
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        (void)unlink_name(&dir, names[i], NULL);
    }
    dcp_export_dir_close(&dir);
}

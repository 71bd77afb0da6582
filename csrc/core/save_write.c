/*
 * save_write.c: the bytes of one save: this rank's files, and the coordinator's metadata image.
 *
 * Nothing here is collective: what fails is told to the others by the status agreement.
 */
#include "save.h"

#include <errno.h>

#include "io_explain.h"

static int
build_metadata(struct dcp_save *save, struct dcp_error *err)
{
    const struct dcp_installed_plan *installed = dcp_save_installed(save);
    uint64_t start_ns = dcp_now_ns();
    int rc;

    dcp_buf_clear(&save->metadata);
    rc = dcp_metadata_write(&installed->global, &save->meta, &save->info.save_id, save->info.n0,
                            &save->metadata, err);
    save->info.metadata_ns = dcp_now_ns() - start_ns;
    save->info.metadata = (struct dcp_span){save->metadata.data, save->metadata.len};
    return rc;
}

/* The names must be durable before this rank says so. */
static int
sync_names(const struct dcp_save *save, struct dcp_error *err)
{
    char why[DCP_IO_EXPLAIN_BYTES];
    struct dcp_io_trouble trouble = {.io = save->io, .fd = save->dirfd, .syncing = true};
    int rc;

    do {
        rc = save->io->fsync(save->io->ctx, save->dirfd);
    } while (rc == -EINTR);
    if (rc == 0) {
        return 0;
    }
    trouble.sys_errno = -rc;
    return dcp_error_set(err, DCP_E_IO, -rc, save->dir_path, "syncing the directory %s failed: %s",
                         save->dir_path, dcp_io_explain(&trouble, why));
}

int
dcp_save_write(struct dcp_save *save, const struct dcp_source *sources, atomic_int *cancel,
               _Atomic uint64_t *progress_bytes, struct dcp_error *err)
{
    const struct dcp_installed_plan *installed = dcp_save_installed(save);
    struct dcp_engine_options options = {
        .direct = save->direct,
        .sync = save->sync,
        .cancel = cancel,
        .progress_bytes = progress_bytes,
        .created_files = &save->created_files,
    };
    uint64_t start_ns = dcp_now_ns();
    int rc = 0;

    if (!save->agreed) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a save was written before it was agreed");
    }
    if (save->info.is_coordinator) {
        rc = build_metadata(save, err);
    }
    if (rc == 0) {
        rc = dcp_save_check_own(save, err);
    }
    if (rc == 0) {
        rc = dcp_writer_run(save->io, save->dirfd, save->dir_path, &save->plan, &installed->layout,
                            sources, &save->info.save_id, save->info.n0, &options, NULL,
                            &save->info.write, err);
    }
    if (rc == 0 && save->sync) {
        rc = sync_names(save, err);
    }
    save->info.write_ns = dcp_now_ns() - start_ns;
    return rc;
}

/*
 * save_write.c: the bytes of one save: this rank's files, and the coordinator's metadata image.
 *
 * Nothing here is collective: what fails is told to the others by the status agreement.
 */
#include "save.h"

#include <errno.h>

static int
build_metadata(struct dcp_save *save, struct dcp_error *err)
{
    const struct dcp_installed_plan *installed = dcp_save_installed(save);
    uint64_t start_ns = dcp_now_ns();
    int rc;

    dcp_buf_clear(&save->metadata);
    rc = dcp_metadata_write(&installed->global, &save->meta, &save->info.save_id, save->info.n0,
                            NULL, &save->metadata, err);
    save->info.metadata_ns = dcp_now_ns() - start_ns;
    save->info.metadata = (struct dcp_span){save->metadata.data, save->metadata.len};
    return rc;
}

/* A full disk is better met before the first byte than at the last one. */
static int
check_space(struct dcp_save *save, uint64_t need_bytes, struct dcp_error *err)
{
    struct dcp_space space;
    int rc = save->io->space(save->io->ctx, save->dirfd, &space);

    if (rc == 0 && space.free_bytes < need_bytes) {
        return dcp_error_set(err, DCP_E_IO, ENOSPC, save->dir_path,
                             "not enough space in %s: this rank writes %llu bytes, %llu are free",
                             save->dir_path, (unsigned long long)need_bytes,
                             (unsigned long long)space.free_bytes);
    }
    return 0; /* where free space cannot be asked, the writes tell */
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
        rc = check_space(save, installed->layout.total_bytes, err);
    }
    if (rc == 0) {
        rc = dcp_writer_run(save->io, save->dirfd, save->dir_path, &save->plan, &installed->layout,
                            sources, &save->info.save_id, save->info.n0, &options, NULL,
                            &save->info.write, err);
    }
    /* The names must be durable before this rank says so. */
    if (rc == 0 && save->sync) {
        int sync_rc = save->io->fsync(save->io->ctx, save->dirfd);
        if (sync_rc < 0) {
            rc = dcp_error_set(err, DCP_E_IO, -sync_rc, save->dir_path,
                               "could not sync the directory %s", save->dir_path);
        }
    }
    save->info.write_ns = dcp_now_ns() - start_ns;
    return rc;
}

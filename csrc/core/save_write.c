/*
 * save_write.c: the bytes of one save: this rank's files, and the coordinator's metadata image.
 *
 * Nothing here is collective: what fails is told to the others by the status agreement.
 */
#include "save.h"

#include <errno.h>

#include "dcp_trace.h"
#include "io_explain.h"
#include "ring.h"

/* From about a millisecond of building on it pays to start a thread. */
enum { METADATA_THREAD_CHUNKS = 4096 };

/* The metadata image, built beside the writing of the files. */
struct metadata_job {
    struct dcp_save *save;
    pthread_t thread;
    bool threaded;
    int rc; /* valid once joined */
    struct dcp_error err;
};

/* How the files get to the disk. */
struct writing {
    bool staged;                        /* else from `sources` */
    const struct dcp_source *sources;   /* NULL without items */
    struct dcp_writer_process *process; /* for what was staged; NULL: here */
    bool survive;
    atomic_int *cancel;
    _Atomic uint64_t *progress_bytes;
    bool *memory_lost;
};

static int
build_metadata(struct dcp_save *save, struct dcp_error *err)
{
    struct dcp_global_plan global = save->installed->global;
    uint64_t start_ns = dcp_now_ns();
    int rc;

    if (save->info.planned_outside) {
        DCP_ASSERT(save->metadata.len > 0);
        save->info.metadata = (struct dcp_span){save->metadata.data, save->metadata.len};
        return 0;
    }
    if (save->compared) {
        global.layouts = save->joined.layouts; /* borrows, as all else of the copy */
    }
    dcp_buf_clear(&save->metadata);
    rc = dcp_metadata_write(&global, &save->meta, &save->info.save_id, save->info.n0,
                            save->compared ? &save->joined.links : NULL, &save->metadata, err);
    save->info.metadata_ns = dcp_now_ns() - start_ns;
    dcp_trace_end(dcp_trace_from(start_ns), "cpu", "build .metadata", save->metadata.len);
    save->info.metadata = (struct dcp_span){save->metadata.data, save->metadata.len};
    return rc;
}

static void *
metadata_main(void *arg)
{
    struct metadata_job *job = arg;

    dcp_trace_thread("metadata");
    job->rc = build_metadata(job->save, &job->err);
    return NULL;
}

/* Small ones, and all where no thread can be had, are built here and now. */
static int
metadata_start(struct dcp_save *save, struct metadata_job *job, struct dcp_error *err)
{
    *job = (struct metadata_job){.save = save};
    dcp_error_clear(&job->err);
    if (!save->info.is_coordinator) {
        return 0;
    }
    if (save->installed->global.chunks_count >= METADATA_THREAD_CHUNKS) {
        job->threaded = dcp_engine_thread(&job->thread, metadata_main, job) == 0;
    }
    return job->threaded ? 0 : build_metadata(save, err);
}

/* The first failure is told. */
static int
metadata_join(struct metadata_job *job, int rc, struct dcp_error *err)
{
    if (!job->threaded) {
        return rc;
    }
    pthread_join(job->thread, NULL);
    if (rc == 0 && job->rc != 0) {
        *err = job->err;
    }
    return rc != 0 ? rc : job->rc;
}

/* The names must be durable before this rank says so. */
static int
sync_names(const struct dcp_save *save, struct dcp_error *err)
{
    char why[DCP_IO_EXPLAIN_BYTES];
    struct dcp_io_trouble trouble = {.io = save->io, .fd = save->dirfd, .syncing = true};
    uint64_t traced = dcp_trace_begin();
    int rc = dcp_io_sync(save->io, save->dirfd);
    dcp_trace_end(traced, "io", "sync the directory", 0);

    if (rc == 0) {
        return 0;
    }
    trouble.sys_errno = -rc;
    return dcp_error_set(err, DCP_E_IO, -rc, save->dir_path, "syncing the directory %s failed: %s",
                         save->dir_path, dcp_io_explain(&trouble, why));
}

int
dcp_save_new_crcs(const struct dcp_save *save, uint32_t **ret_crcs, struct dcp_error *err)
{
    uint32_t count = dcp_save_layout(save)->records_count;

    *ret_crcs = dcp_malloc_array(count, sizeof **ret_crcs);
    return *ret_crcs != NULL ? 0
                             : dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                                             "no memory for the checksums of %u records", count);
}

static int
write_sources(struct dcp_save *save, const struct dcp_source *sources,
              const struct dcp_engine_options *options, struct dcp_error *err)
{
    uint32_t *crcs;
    int rc = dcp_save_new_crcs(save, &crcs, err);

    if (rc != 0) {
        return rc;
    }
    rc = dcp_writer_run(save->io, save->dirfd, save->dir_path, &save->plan, dcp_save_layout(save),
                        sources, &save->info.save_id, save->info.n0, options, crcs,
                        &save->info.write, err);
    if (rc == 0) {
        rc = dcp_unchanged_count(save, crcs, err);
    }
    dcp_free(crcs);
    return rc;
}

/* What was staged: its checksums are known since then. */
static int
write_image(struct dcp_save *save, const struct writing *how,
            const struct dcp_engine_options *options, struct dcp_error *err)
{
    const struct dcp_writer_survival survival = {
        .claim_rank = save->independent ? (int32_t)save->group->comm.rank : -1,
        .n0 = save->info.n0,
        .metadata = save->info.is_coordinator ? save->info.metadata : (struct dcp_span){0},
    };

    if (how->process == NULL) {
        return dcp_image_write(save->io, save->dirfd, save->dir_path, &save->image,
                               save->arena->memory, options, &save->info.write, err);
    }
    return dcp_writer_process_write_surviving(
        how->process, save->dirfd, save->dir_path, &save->info.save_id, &save->image, save->arena,
        options, how->survive ? &survival : NULL, &save->info.write, err);
}

void
dcp_save_lend_thread(struct dcp_save *save)
{
    save->own_thread = true;
}

static int
write_all(struct dcp_save *save, const struct writing *how, struct dcp_error *err)
{
    struct dcp_engine_options options = {
        .direct = save->direct,
        .tuning = save->tuning,
        .mapped_from = save->mapped_from,
        .mapped_to = save->mapped_to,
        .own_thread = save->own_thread,
        .sync = save->sync,
        .cancel = how->cancel,
        .progress_bytes = how->progress_bytes,
        .hashes = save->reuse.hashes,
        .devices = save->devices,
        .device_stats = &save->info.device,
        .created_files = &save->created_files,
        .memory_lost = how->memory_lost,
    };
    uint64_t start_ns = dcp_now_ns();
    struct metadata_job metadata;
    int rc = dcp_save_check_own(save, err);

    if (rc != 0) {
        return rc;
    }
    rc = metadata_start(save, &metadata, err);
    if (how->survive) {
        rc = metadata_join(&metadata, rc, err); /* it goes to the process with the files */
        metadata.threaded = false;
    }
    if (rc == 0) {
        rc = how->staged ? write_image(save, how, &options, err)
                         : write_sources(save, how->sources, &options, err);
    }
    rc = metadata_join(&metadata, rc, err);
    if (rc == 0 && save->sync) {
        rc = sync_names(save, err);
    }
    save->info.write_ns = dcp_now_ns() - start_ns;
    dcp_trace_end(dcp_trace_from(start_ns), "phase", "write files", save->info.write.file_bytes);
    return rc;
}

int
dcp_save_write(struct dcp_save *save, const struct dcp_source *sources, atomic_int *cancel,
               _Atomic uint64_t *progress_bytes, struct dcp_error *err)
{
    const struct writing how = {
        .sources = sources, .cancel = cancel, .progress_bytes = progress_bytes};

    if (save->installed == NULL) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a save was written before it was agreed");
    }
    return write_all(save, &how, err);
}

int
dcp_save_write_staged(struct dcp_save *save, struct dcp_writer_process *process, bool survive,
                      atomic_int *cancel, _Atomic uint64_t *progress_bytes, struct dcp_error *err)
{
    bool memory_lost = false;
    const struct writing how = {.staged = true,
                                .memory_lost = &memory_lost,
                                .process = process,
                                .survive = survive && process != NULL,
                                .cancel = cancel,
                                .progress_bytes = progress_bytes};
    int rc;

    if (save->arena == NULL) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a save was written from memory in which it was not staged");
    }
    rc = write_all(save, &how, err);
    if (!memory_lost) {
        dcp_arena_release(save->arena);
    }
    save->arena = NULL;
    return rc;
}

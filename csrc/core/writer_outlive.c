/*
 * writer_outlive.c: a save whose trainer is gone is finished, or given up, by what is in the
 * directory.
 *
 * No process asks another: a rank says that it is done by the header of its files, which goes to
 * disk when all else of the file has (seal), so a header that carries the save's id means a file
 * that is whole and survives a power cut.  The process that has the metadata waits for the files
 * that it names and publishes through the claim, by the one rename that decides every save
 * (commit.c): whoever gives the save up meanwhile, a rank that lives or a newer save, takes the
 * claim away, and the rename finds nothing.
 *
 * The claim is locked meanwhile: a lock dies with its process, whatever way that goes, so who asks
 * for it learns whether anybody still works on the save.
 *
 * Threads: no state.
 */
#include "writer_outlive.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "claim_scan.h"
#include "data_file.h"
#include "dcp_limits.h"

/* ---- headers come last ---- */

int
dcp_seal_take(const struct dcp_image *image, uint8_t *memory, uint8_t **ret_headers,
              struct dcp_error *err)
{
    uint8_t *headers = dcp_malloc_array(image->files_count, DCP_FILE_HEADER_BYTES);

    if (headers == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the headers of %u files",
                             image->files_count);
    }
    for (uint32_t i = 0; i < image->files_count; i++) {
        uint8_t *at = memory + image->files[i].offset_bytes;
        memcpy(headers + (size_t)i * DCP_FILE_HEADER_BYTES, at, DCP_FILE_HEADER_BYTES);
        memset(at, 0, DCP_FILE_HEADER_BYTES);
    }
    *ret_headers = headers;
    return 0;
}

static int
seal_error(const struct dcp_writer_request *request, const char *name, int sys_errno,
           const char *what, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_IO, sys_errno, request->dir_path, "%s %s in %s failed: %s",
                         what, name, request->dir_path, strerror(sys_errno));
}

/* Only a file as we left it: the directory may be another save's by now. */
static int
check_unsealed(const struct dcp_io *io, int fd, const struct dcp_writer_request *request,
               const struct dcp_image_file *file, const char *name, struct dcp_error *err)
{
    static const uint8_t none[DCP_FILE_HEADER_BYTES];
    uint8_t found[DCP_FILE_HEADER_BYTES];
    struct dcp_stat info;

    int rc = io->fstat(io->ctx, fd, &info);
    if (rc != 0) {
        return seal_error(request, name, -rc, "asking for the length of", err);
    }
    if (info.size_bytes != file->length_bytes) {
        return dcp_error_set(err, DCP_E_SUPERSEDED, 0, request->dir_path,
                             "%s in %s is not as it was written: another save took over", name,
                             request->dir_path);
    }
    rc = dcp_io_read_all(io, fd, found, sizeof found, 0, name, err);
    if (rc == 0 && memcmp(found, none, sizeof none) != 0) {
        rc = dcp_error_set(err, DCP_E_SUPERSEDED, 0, request->dir_path,
                           "%s in %s has a header already: another save took over", name,
                           request->dir_path);
    }
    return rc;
}

static int
seal_file(const struct dcp_io *io, int dirfd, const struct dcp_writer_request *request,
          const struct dcp_image_file *file, const uint8_t *header, struct dcp_error *err)
{
    char name[DCP_DATA_FILE_NAME_BYTES];
    int fd;

    dcp_data_file_name(name, sizeof name, request->image.rank, file->n);
    do {
        fd = io->open_at(io->ctx, dirfd, name, O_RDWR, 0);
    } while (fd == -EINTR);
    if (fd < 0) {
        return seal_error(request, name, -fd, "opening", err);
    }
    int rc = check_unsealed(io, fd, request, file, name, err);
    rc = rc != 0 ? rc : dcp_io_write_all(io, fd, header, DCP_FILE_HEADER_BYTES, 0, name, err);
    if (rc == 0 && request->options.sync) {
        int sys = io->fdatasync(io->ctx, fd); /* once: a second one may say yes to nothing */
        rc = sys == 0 ? 0 : seal_error(request, name, -sys, "syncing", err);
    }
    int sys = io->close(io->ctx, fd);
    if (rc == 0 && sys != 0 && sys != -EINTR) {
        rc = seal_error(request, name, -sys, "closing", err);
    }
    return rc;
}

int
dcp_seal_put(const struct dcp_io *io, int dirfd, const struct dcp_writer_request *request,
             const uint8_t *headers, struct dcp_error *err)
{
    /* A file that is found must stay to be found. */
    int rc = request->options.sync ? dcp_io_sync(io, dirfd) : 0;

    if (rc != 0) {
        return seal_error(request, ".", -rc, "syncing", err);
    }
    for (uint32_t i = 0; rc == 0 && i < request->image.files_count; i++) {
        rc = seal_file(io, dirfd, request, &request->image.files[i],
                       headers + (size_t)i * DCP_FILE_HEADER_BYTES, err);
    }
    return rc;
}

/* ---- without a trainer ---- */

static void
make_claim(const struct dcp_orphan *orphan, struct dcp_claim *ret_claim)
{
    const struct dcp_writer_request *request = orphan->request;

    *ret_claim = (struct dcp_claim){.io = orphan->io,
                                    .dir_path = request->dir_path,
                                    .dirfd = orphan->dirfd,
                                    .rank = request->survival.claim_rank,
                                    .n0 = request->survival.n0,
                                    .save_id = request->save_id,
                                    .sync = request->options.sync};
    dcp_claim_name_put(ret_claim->name, ret_claim->rank, ret_claim->n0, &ret_claim->save_id);
    dcp_metadata_name(ret_claim->target, ret_claim->rank);
}

void
dcp_orphan_begin(struct dcp_orphan *orphan, const struct dcp_io *io, int dirfd,
                 const struct dcp_writer_request *request)
{
    *orphan = (struct dcp_orphan){.io = io, .request = request, .dirfd = dirfd, .lock_fd = -1};
}

static bool
commits(const struct dcp_orphan *orphan)
{
    return orphan->request->survival.metadata.len != 0;
}

bool
dcp_orphan_stands(struct dcp_orphan *orphan)
{
    const struct dcp_io *io = orphan->io;
    struct dcp_claim claim;

    make_claim(orphan, &claim);
    int fd = io->open_at(io->ctx, orphan->dirfd, claim.name, O_RDONLY, 0);
    if (fd < 0) {
        return fd != -ENOENT && fd != -ESTALE; /* else nobody can tell yet */
    }
    /* Who asks holds it for a moment: then the next look gets it. */
    if (commits(orphan) && orphan->lock_fd < 0 && dcp_file_lock(fd, false)) {
        orphan->lock_fd = fd;
    } else {
        io->close(io->ctx, fd);
    }
    return true;
}

static bool
is_complete(const struct dcp_orphan *orphan, const struct dcp_metadata *md, uint32_t index)
{
    const struct dcp_io *io = orphan->io;
    uint8_t bytes[DCP_FILE_HEADER_BYTES];
    char name[DCP_DATA_FILE_NAME_BYTES];
    struct dcp_file_header header;
    struct dcp_stat info;

    if (dcp_data_file_of(md, index, NULL, name, NULL) != 0) {
        return false;
    }
    int fd = dcp_data_file_open(io, orphan->dirfd, name);
    if (fd < 0) {
        return false;
    }
    bool complete = dcp_io_read_all(io, fd, bytes, sizeof bytes, 0, name, NULL) == 0 &&
                    dcp_file_parse_header(bytes, &header, NULL) == 0 &&
                    dcp_metadata_accepts(md, &header.save_id) &&
                    dcp_data_file_has_own_name(md, &header, name) &&
                    io->fstat(io->ctx, fd, &info) == 0 && info.size_bytes == header.length_bytes;
    io->close(io->ctx, fd);
    return complete;
}

/* True when all files that the metadata names are there. */
static bool
await_files(struct dcp_orphan *orphan, const struct dcp_metadata *md, uint64_t timeout_ns)
{
    const struct dcp_io *io = orphan->io;
    uint64_t start_ns = io->now_ns(io->ctx);
    uint32_t next = 0;

    for (;;) {
        while (next < md->files_count && is_complete(orphan, md, next)) {
            next++;
        }
        if (next == md->files_count) {
            return true;
        }
        if (!dcp_orphan_stands(orphan) || io->now_ns(io->ctx) - start_ns >= timeout_ns) {
            return false;
        }
        io->sleep_ns(io->ctx, DCP_WRITER_SLICE_NS);
    }
}

/* The first `count` files of the image are ours. */
static void
discard_own(const struct dcp_orphan *orphan, struct dcp_claim *claim, uint32_t count)
{
    const struct dcp_image *image = &orphan->request->image;

    for (uint32_t i = 0; i < count && i < image->files_count; i++) {
        char name[DCP_DATA_FILE_NAME_BYTES];
        const char *names[1] = {name};
        dcp_data_file_name(name, sizeof name, image->rank, image->files[i].n);
        dcp_claim_discard(claim, names, 1);
    }
}

enum dcp_outcome
dcp_orphan_finish(struct dcp_orphan *orphan, int code, uint32_t created_files, uint64_t timeout_ns)
{
    const struct dcp_span metadata = orphan->request->survival.metadata;
    enum dcp_outcome outcome = DCP_OUTCOME_UNKNOWN;
    struct dcp_metadata md = {0};
    struct dcp_claim claim;

    if (!commits(orphan)) {
        return outcome;
    }
    make_claim(orphan, &claim);
    bool whole = code == 0 && dcp_metadata_read(metadata.data, metadata.len, &md, NULL) == 0 &&
                 memcmp(&md.save_id, &claim.save_id, sizeof md.save_id) == 0 &&
                 await_files(orphan, &md, timeout_ns);
    dcp_metadata_clean_up(&md);
    if (whole) {
        (void)!dcp_claim_publish(&claim, metadata.data, metadata.len, &outcome, NULL);
    }
    if (outcome == DCP_OUTCOME_UNKNOWN) {
        outcome = dcp_claim_settle(&claim, NULL);
    }
    if (outcome == DCP_OUTCOME_COMMITTED) {
        uint64_t swept;
        (void)!dcp_claim_sweep(&claim, &swept, NULL);
    } else if (outcome == DCP_OUTCOME_ABORTED) {
        discard_own(orphan, &claim, created_files);
    }
    return outcome;
}

void
dcp_orphan_end(struct dcp_orphan *orphan)
{
    if (orphan->lock_fd >= 0) {
        orphan->io->close(orphan->io->ctx, orphan->lock_fd);
        orphan->lock_fd = -1;
    }
}

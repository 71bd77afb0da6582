/*
 * dcp_archive.h: a torch.save file made of a checkpoint's tensors, without holding them.
 *
 * The file is the zip that torch.save writes: the same names, order, flags and alignment, so that
 * torch.load maps it and may calculate where storages lie.  Its length follows from the names and
 * lengths of its entries, checksums lie behind what they cover, and so it is written in one pass.
 */
#ifndef DCP_ARCHIVE_H
#define DCP_ARCHIVE_H

#include "dcp_engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A file of the zip.  Where its bytes are: in memory (`data`), in the records of a tensor (`fqn`),
 * or with whoever is asked for them (neither).  Borrows everything. */
struct dcp_archive_entry {
    struct dcp_span name; /* behind the folder: "data/0" */
    uint64_t bytes;
    const uint8_t *data;
    struct dcp_span fqn;
};

/* Gives the bytes of an entry, which stay as they are until the next call or the end of the write.
 * Asked for entries that name nothing, and for tensors whose records do not hold them row by row
 * (resharded boxes, transforms, records that only torch reads).  Called in the order of entries, on
 * the calling thread. */
typedef int (*dcp_archive_fetch_fn)(void *ctx, uint64_t entry, const uint8_t **ret_data,
                                    struct dcp_error *err);

struct dcp_archive_params {
    const struct dcp_io *io;
    const char *source_path; /* directory of the checkpoint */
    struct dcp_span image;   /* its metadata file */
    const char *target_path; /* directory of the new file */
    const char *target_name; /* which does not exist; at most 63 bytes */
    struct dcp_span folder;  /* of the zip: "archive" */
    uint64_t align_bytes;    /* of every entry's bytes in the file; a power of two */
    const struct dcp_archive_entry *entries;
    uint64_t entries_count;
    const struct dcp_engine_options *options; /* `verify`: records against their CRCs */
    dcp_archive_fetch_fn fetch;
    void *fetch_ctx;
};

struct dcp_archive_stats {
    struct dcp_write_stats write;
    struct dcp_read_stats read;
    uint64_t fetched_bytes;
};

/* Writes and syncs the file; on failure what there is of it stays, for the caller to remove.
 * DCP_E_STALE and DCP_E_NOENT: the checkpoint is not the one of the image any more.  Memory: two
 * rings, 36 MiB, and 100 bytes per entry. */
int dcp_archive_write(const struct dcp_archive_params *params, struct dcp_archive_stats *ret_stats,
                      struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif

/*
 * dcp_verify.h: is a checkpoint whole?  Checked without loading it: no target memory, no group.
 *
 * What is checked grows with the level:
 *   COMPLETE   the metadata parses (ours by its checksum), every data file it names is there, is of
 *              this save (ours by the header) and is long enough for its records.
 *   STRUCTURE  chunks fill their tensors without overlap, each has a record, no two records of a
 *              file overlap, block tables and hash tables hold.
 *   FULL       every byte of every record: ours are made anew from their payload and compared, all
 *              others (objects, stock torch's) by the CRCs of their zip entries.
 *
 * Problems are listed, not raised, and the check goes on behind each of them.  Nothing is modified.
 * A checkpoint that is replaced meanwhile is told from a damaged one by reading its metadata again:
 * when that has changed, the check starts over.
 */
#ifndef DCP_VERIFY_H
#define DCP_VERIFY_H

#include "dcp_engine.h"
#include "dcp_hash.h"

#ifdef __cplusplus
extern "C" {
#endif

enum dcp_verify_level {
    DCP_VERIFY_COMPLETE = 0,
    DCP_VERIFY_STRUCTURE = 1,
    DCP_VERIFY_FULL = 2,
};

/* A metadata file that only Python can read, and what stands in its place: a pickle of torch's
 * plain Metadata.  Both borrow. */
struct dcp_verify_translation {
    struct dcp_span original, translated;
};

struct dcp_verify_options {
    enum dcp_verify_level level;
    enum dcp_direct direct;
    uint32_t problems_most; /* that are kept; 0: DCP_VERIFY_PROBLEMS */
    /* Ranks of a job may divide the work: data file number f (counted over all metadata files, as
     * these list them) is only looked at when f % parts == part, metadata and chunks of tensors
     * are only blamed by part 0.  What all parts find together is what one check finds, provided
     * that all of them had the same metadata_id.  parts 0: all. */
    uint32_t part, parts;
    /* Looked up by the bytes of a metadata file that is DCP_E_UNSUPPORTED; borrow. */
    const struct dcp_verify_translation *translations;
    size_t translations_count;
    atomic_int *cancel;               /* non-zero stops with DCP_E_CANCELLED; may be NULL */
    _Atomic uint64_t *progress_bytes; /* counts bytes of records gone through; may be NULL */
};

enum { DCP_VERIFY_PROBLEMS = 100 };

struct dcp_verify_problem {
    int32_t code; /* enum dcp_code */
    int32_t sys_errno;
    uint64_t offset_bytes; /* in `file`; UINT64_MAX when it has no meaning */
    const char *tensor;    /* key of the state dict; "" when none is concerned */
    const char *file;      /* name in the checkpoint's directory; "" when none is concerned */
    const char *what;
};

/* Zero-initialised is a valid empty one. */
struct dcp_verify_result {
    struct dcp_verify_problem *problems; /* owned: the first ones */
    uint32_t problems_count;
    uint64_t problems_found; /* 0: the checkpoint is whole as far as the level tells */
    struct dcp_bump strings; /* owns their text */

    bool is_native; /* written by us */
    struct dcp_save_id save_id;
    /* Of all metadata files, as they were read; zero when there are none. */
    struct dcp_hash128 metadata_id;
    /* Metadata of single ranks (saved with use_collectives=False) in place of one for all.  Which
     * other ranks there should be cannot be known. */
    uint32_t *ranks; /* owned, ascending; ranks_count 0: one metadata for all */
    uint32_t ranks_count;

    uint64_t tensors_count, objects_count, records_count;
    /* Tensors that the checkpoint holds only in part, and rightly so: it is of single ranks, or of
     * one rank that saved alone. */
    uint64_t partial_tensors_count;
    uint64_t files_count, file_bytes; /* data files that were looked at */
    uint64_t direct_files_count;      /* read with O_DIRECT */
    uint64_t read_bytes;              /* of data files */
    uint64_t checked_bytes;           /* of records whose checksums were compared, match or not */
    uint64_t unverified_bytes; /* FULL: of records that have no checksum, or one we cannot read */
    uint64_t unverified_records_count;

    /* No problems: saves in flight or stopped, and data files that no metadata names. */
    uint64_t claims_count, unreferenced_files_count;
    uint32_t replaced_count; /* how often the check started over */
    uint64_t wall_ns;
};

/* 0 when the check ran to its end, with or without problems.  DCP_E_NOENT: the directory is not
 * there (any more).  DCP_E_UNSUPPORTED: metadata that only Python can read, and no translation of
 * it.  DCP_E_STALE: replaced again and again.  A directory without metadata is a problem, not an
 * error.
 *
 * Memory: at most 32 MiB beside what the metadata itself takes.  Threads: any; one more reads ahead
 * at level FULL. */
int dcp_verify_run(const struct dcp_io *io, const char *dir_path,
                   const struct dcp_verify_options *options, struct dcp_verify_result *ret_result,
                   struct dcp_error *err) DCP_MUST_CHECK;

/* Idempotent; NULL is fine. */
void dcp_verify_result_clean_up(struct dcp_verify_result *result);

#ifdef __cplusplus
}
#endif
#endif

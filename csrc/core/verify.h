/*
 * verify.h: private: what the files of the check share.
 *
 * verify.c looks at the directory, verify_set.c at one metadata file and all that it names,
 * verify_boxes.c at the chunks of a tensor, verify_file.c opens data files, verify_stream.c reads
 * them ahead, verify_record.c checks records.
 *
 * What is wrong with a checkpoint is written to a local error record and then noted; what ends the
 * check (no memory, cancelled) goes back through `err`.  dcp_verify_is_fatal tells them apart.
 */
#ifndef DCP_CORE_VERIFY_H
#define DCP_CORE_VERIFY_H

#include "claim_scan.h"
#include "data_file.h"
#include "dcp_verify.h"
#include "ring.h"

enum {
    DCP_VERIFY_BUFFERS = 3, /* one is checked, one is read, one waits: 24 MiB */
    /* Records up to this are looked at in one piece: a block, its head and its tail. */
    DCP_VERIFY_WHOLE_BYTES = DCP_BLOCK_BYTES + (64 << 10),
};

/* One chunk's record, in the order of files. */
struct dcp_verify_ref {
    uint64_t offset_bytes;
    uint64_t chunk; /* index in metadata chunks */
    uint32_t file;  /* index in metadata files */
    uint32_t entry; /* index in metadata entries */
};

struct dcp_verify_file {
    int fd;        /* through the page cache; -1 when closed */
    int direct_fd; /* O_DIRECT; -1 when the page cache serves */
    uint64_t size_bytes;
    uint64_t align_bytes; /* of direct reads; 1 without */
    char name[DCP_DATA_FILE_NAME_BYTES];
    char path[DCP_ERROR_PATH_BYTES];
    bool has_header;
    struct dcp_file_header header;
    struct dcp_block_table table; /* empty unless it was read and holds */
};

/* What one buffer holds of the file. */
struct dcp_verify_slot {
    uint64_t from, to;
    uint64_t read_to; /* how far reading got; `why` says why not to `to` */
    uint64_t job;     /* number in the pump */
    struct dcp_error why;
};

/* Reads one file ahead, skipping what no record needs. */
struct dcp_verify_stream {
    const struct dcp_io *io;
    const struct dcp_verify_options *options;
    struct dcp_ring *ring;
    struct dcp_pump pump;
    const struct dcp_verify_file *file;
    const struct dcp_metadata *md;
    const struct dcp_verify_ref *refs; /* of the file, ascending, apart from each other */
    uint64_t refs_count;
    uint64_t ahead; /* ref that is to be read next */
    uint64_t pushed_to;
    uint64_t pushed, popped; /* buffers; number n lies in slot n % DCP_VERIFY_BUFFERS */
    struct dcp_verify_slot slots[DCP_VERIFY_BUFFERS];
    struct dcp_buf piece; /* what dcp_verify_stream_gather put together */
    uint64_t request_bytes;
    uint64_t read_bytes; /* so far, of all files */
};

struct dcp_verifier {
    const struct dcp_io *io;
    int dirfd;
    const char *dir_path;
    const struct dcp_verify_options *options;
    struct dcp_verify_result *result;
    const struct dcp_metadata *md;
    uint64_t files_seen; /* data files of the metadata files so far */
    struct dcp_verify_stream stream;
    struct dcp_buf crcs; /* uint32_t per block of the payload in progress */
    struct dcp_buf made; /* what a head or a tail should be */
    struct dcp_buf window;
};

/* ---- verify.c ---- */

static inline bool
dcp_verify_is_fatal(int code)
{
    return code == DCP_E_NOMEM || code == DCP_E_CANCELLED || code == DCP_E_INTERNAL;
}

int dcp_verify_check_cancel(const struct dcp_verify_options *options,
                            struct dcp_error *err) DCP_MUST_CHECK;

enum { DCP_VERIFY_NO_ENTRY = 0xFFFFFFFFu };

/* Lists a problem of a tensor (or DCP_VERIFY_NO_ENTRY) and a file (or NULL), at why->offset_bytes.
 * A fatal one is handed back instead. */
int dcp_verify_note(struct dcp_verifier *v, uint32_t entry, const char *file,
                    const struct dcp_error *why, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- verify_set.c ---- */
/* Checks all that the metadata of `rank` (-1: of all ranks) stands for, and adds the data files it
 * names to *references.  Without an error text: DCP_E_NOENT when there is no such metadata,
 * DCP_E_STALE when it was replaced meanwhile. */
int dcp_verify_set(struct dcp_verifier *v, int32_t rank, struct dcp_reference_set *references,
                   struct dcp_error *err) DCP_MUST_CHECK;

/* ---- verify_boxes.c ---- */
/* Notes chunks of a tensor that overlap, and with `must_fill` what they leave open; *ret_filled
 * says whether they leave nothing. */
int dcp_verify_boxes(struct dcp_verifier *v, uint32_t entry, bool must_fill, bool *ret_filled,
                     struct dcp_error *err) DCP_MUST_CHECK;

/* ---- verify_file.c ---- */
/* Opens a data file and checks what level COMPLETE asks of it; *why says what is wrong. */
int dcp_verify_file_open(struct dcp_verifier *v, uint32_t index, struct dcp_verify_file *ret,
                         struct dcp_error *why) DCP_MUST_CHECK;
/* Its tables; notes those that are damaged. */
int dcp_verify_file_tables(struct dcp_verifier *v, struct dcp_verify_file *file,
                           struct dcp_error *err) DCP_MUST_CHECK;
/* Decides how `wanted_bytes` of it are read. */
int dcp_verify_file_choose_direct(struct dcp_verifier *v, struct dcp_verify_file *file,
                                  uint64_t wanted_bytes, struct dcp_error *why) DCP_MUST_CHECK;
void dcp_verify_file_close(struct dcp_verifier *v, struct dcp_verify_file *file);

/* ---- verify_stream.c ---- */
int dcp_verify_stream_init(struct dcp_verify_stream *stream, const struct dcp_io *io,
                           const struct dcp_verify_options *options,
                           struct dcp_error *err) DCP_MUST_CHECK;
void dcp_verify_stream_clean_up(struct dcp_verify_stream *stream);
void dcp_verify_stream_begin(struct dcp_verify_stream *stream, const struct dcp_verify_file *file,
                             const struct dcp_metadata *md, const struct dcp_verify_ref *refs,
                             uint64_t refs_count);
/* Before the file is closed. */
void dcp_verify_stream_end(struct dcp_verify_stream *stream);
/* The bytes at `offset` of the file, from 1 to `most` of them, valid until the next call.  Offsets
 * should ascend; going back costs reading again. */
int dcp_verify_stream_at(struct dcp_verify_stream *stream, uint64_t offset, uint64_t most,
                         const uint8_t **ret, uint64_t *ret_len,
                         struct dcp_error *why) DCP_MUST_CHECK;
/* Exactly `len` bytes in one piece. */
int dcp_verify_stream_gather(struct dcp_verify_stream *stream, uint64_t offset, uint64_t len,
                             const uint8_t **ret, struct dcp_error *why) DCP_MUST_CHECK;

/* ---- verify_record.c ---- */
int dcp_verify_record(struct dcp_verifier *v, const struct dcp_verify_file *file,
                      const struct dcp_verify_ref *ref, struct dcp_error *err) DCP_MUST_CHECK;

#endif

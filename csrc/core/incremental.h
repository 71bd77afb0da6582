/*
 * incremental.h: what a save with `base=` does not write again (private to the core).
 *
 * incremental_base.c reads the earlier checkpoint, incremental.c decides for one rank,
 * incremental_links.c makes the files, incremental_message.c tells the coordinator, and
 * save_compare.c is the collective step around them.
 */
#ifndef DCP_CORE_INCREMENTAL_H
#define DCP_CORE_INCREMENTAL_H

#include <stdatomic.h>

#include "dcp_transfer.h"

/* Files of earlier saves that one rank links in one save.  A chain of incremental saves would else
 * end with a file for every save it ever made. */
enum { DCP_MOST_LINKS = 8 };

/* ---- the earlier checkpoint ---- */

struct dcp_base {
    const struct dcp_io *io; /* borrows */
    int dirfd;               /* -1 or lower: this rank cannot open the directory (-errno) */
    struct dcp_metadata md;
};

/* What the coordinator found; the first byte of what it sends.  `md` is filled with OK alone. */
enum dcp_base_state {
    DCP_BASE_OK = 0,
    DCP_BASE_ABSENT = 1,     /* no such directory, or nothing was committed there */
    DCP_BASE_UNREADABLE = 2, /* an error of the file system */
    DCP_BASE_FOREIGN = 3,    /* not written by this package */
    DCP_BASE_DAMAGED = 4,
    DCP_BASE_STATES,
};

/* Appends {state, image} of the metadata file `name` in `path`.  Only memory can fail; all else is
 * a state. */
int dcp_base_read(const struct dcp_io *io, const char *path, const char *name,
                  struct dcp_buf *ret_message, struct dcp_error *err) DCP_MUST_CHECK;
/* Takes such a message, and opens the directory where this rank sees it. */
int dcp_base_open(struct dcp_base *base, const struct dcp_io *io, const char *path,
                  const struct dcp_buf *message, enum dcp_base_state *ret_state,
                  struct dcp_error *err) DCP_MUST_CHECK;
/* Idempotent; zero-initialised needs dirfd -1. */
void dcp_base_close(struct dcp_base *base);

/* Where a search ended; items of one name come in the order of its chunks. */
struct dcp_base_finder {
    const struct dcp_md_entry *entry;
    uint64_t next; /* of its chunks */
};

/* The chunk that holds exactly this item: same name, kind, element type, size and box, in a record
 * as long as ours would be.  Zero the finder before the first item of a plan.  NULL: none. */
const struct dcp_md_chunk *dcp_base_find(const struct dcp_metadata *md, const struct dcp_plan *plan,
                                         const struct dcp_item *item,
                                         struct dcp_base_finder *finder);

/* A data file of the base as this rank found it. */
struct dcp_base_file {
    uint32_t file; /* index in md.files */
    char name[DCP_CLAIM_NAME_BYTES];
    uint8_t header[DCP_FILE_HEADER_BYTES];
    struct dcp_save_id written_by; /* of the header; accepted by the base */
    uint64_t length_bytes;
};

/* Reads header and hash table.  DCP_E_MISSING: a file without hashes; other codes: the file is not
 * to be trusted. */
int dcp_base_file_read(const struct dcp_base *base, uint32_t file, struct dcp_base_file *ret_file,
                       struct dcp_hash_table *ret_table, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- links ---- */

struct dcp_link {
    struct dcp_base_file from;
    uint64_t n; /* of the name __{rank}_{n0 + n}.distcp */
};

/* Where links go, and how. */
struct dcp_link_target {
    const struct dcp_io *io;
    int dirfd;
    uint32_t rank;
    uint64_t n0;
    enum dcp_link_mode mode;
    bool sync;
};

/* 0: the file is there under its new name, durable (but for the name), with the header that was
 * read before; else -errno and nothing is left behind.  The names end where numbers do: -EFBIG. */
int dcp_link_make(const struct dcp_link_target *target, const struct dcp_base *base,
                  const struct dcp_link *link) DCP_MUST_CHECK;

/* ---- the decision of one rank ---- */

/* Owned by the save. */
struct dcp_reuse {
    uint8_t *reused;            /* bitmap over the plan's items; NULL: nothing was compared */
    struct dcp_hash128 *hashes; /* of kept items, parallel to the plan's; NULL: not known */
    struct dcp_link links[DCP_MOST_LINKS];
    uint32_t links_count; /* made, this save's to remove */
    uint64_t items, bytes, hash_ns;
    struct dcp_save_id base_id;         /* of the base's metadata */
    char reason[DCP_BASE_REASON_BYTES]; /* why not more; "" */
};

struct dcp_reuse_request {
    const struct dcp_base *base;
    const struct dcp_plan *plan;
    const uint8_t *keep;
    uint64_t first_link_n; /* above the numbers of all files that the plan may write */
    const struct dcp_source *sources;
    const struct dcp_device_list *devices; /* of the sources; NULL: there are none */
    struct dcp_device_stats *device_stats; /* added to; NULL without devices */
    struct dcp_link_target target;
    atomic_int *cancel; /* may be NULL */
};

/* Hashes the kept items and links the files of those that have not changed.  Fails for want of
 * memory or when cancelled only; `reuse` then holds the links that were made. */
int dcp_reuse_decide(const struct dcp_reuse_request *request, struct dcp_reuse *reuse,
                     struct dcp_error *err) DCP_MUST_CHECK;
void dcp_reuse_clean_up(struct dcp_reuse *reuse);

/* ---- what the coordinator hears of it ---- */

int dcp_reuse_encode(const struct dcp_plan *plan, const struct dcp_reuse *reuse,
                     struct dcp_buf *buf, struct dcp_error *err) DCP_MUST_CHECK;

/* The coordinator's view of all ranks: what is linked, and the layouts of what is written. */
struct dcp_joined_reuse {
    struct dcp_links links;
    struct dcp_layout *layouts; /* owned, one per plan */
    uint32_t layouts_count;
};

/* `messages`: one per plan of `global`.  Every number is checked against plans and base: DCP_E_COMM
 * names the rank whose message contradicts them. */
int dcp_reuse_join(const struct dcp_metadata *md, const struct dcp_global_plan *global,
                   const struct dcp_span *messages, struct dcp_joined_reuse *ret_joined,
                   struct dcp_error *err) DCP_MUST_CHECK;
void dcp_joined_reuse_clean_up(struct dcp_joined_reuse *joined);

#endif

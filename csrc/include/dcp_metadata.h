/*
 * dcp_metadata.h: `.metadata` written from a global plan and read into flat arrays.
 *
 * The file is a pickle of torch's Metadata that stock torch reads, then a trailer that pickle
 * readers ignore: [pickle][index][accepted save ids][footer: magic, version, lengths, CRCs, save
 * id].  `index` is the flat form below; when the footer's checks hold it is used instead of the
 * pickle.  A checkpoint saved with `base=` refers to data files of earlier saves by links of its
 * own; their headers keep the ids of the saves that wrote them, which the trailer lists.
 */
#ifndef DCP_METADATA_H
#define DCP_METADATA_H

#include "dcp_plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the writer (role) adds: torch's StorageMeta and version. */
struct dcp_storage_meta {
    const char *checkpoint_id;   /* NULL for None */
    bool checkpoint_id_is_path;  /* a pathlib.PosixPath, else a str */
    const char *storage_save_id; /* the writer's uuid text; NULL for None */
    const char *version;         /* "1.0.0"; NULL for None */
};

/* A data file of an earlier save under a name of this one: __{rank of plan}_{n0 + n}.distcp, n
 * behind the files that the plan's layout writes. */
struct dcp_linked_file {
    uint32_t plan; /* index in dcp_global_plan.plans */
    uint64_t n;
    struct dcp_save_id save_id; /* of the save that wrote it; what its header says */
};

/* A kept item that is not written again. */
struct dcp_linked_record {
    uint32_t plan, item;
    uint32_t file;                       /* index in dcp_links.files */
    uint64_t offset_bytes, length_bytes; /* of the record in that file */
};

/* Zero-initialised is a valid empty one. */
struct dcp_links {
    struct dcp_linked_file *files;     /* owned; ascending by plan, then n; no two alike */
    struct dcp_linked_record *records; /* owned; ascending by plan, then item; no two alike */
    uint32_t files_count;
    uint64_t records_count;
};

/* Idempotent; NULL is fine. */
void dcp_links_clean_up(struct dcp_links *links);

/* Emits the whole image.  Chunks, index hints, dict orders as torch's planner and writer make them.
 * File names are __{rank}_{n0 + k}.distcp.
 *
 * With `links` (NULL: none) the layouts of *global hold only the records that are written.  Linked
 * records follow their plan's own ones in the order of storage_data; together they cover every
 * chunk exactly once (else DCP_E_INTERNAL).  The trailer lists the saves that wrote the linked
 * files: DCP_MAX_ACCEPTED_SAVES at most (DCP_E_LIMIT), none of them this one. */
int dcp_metadata_write(const struct dcp_global_plan *global, const struct dcp_storage_meta *meta,
                       const struct dcp_save_id *save_id, uint64_t n0,
                       const struct dcp_links *links, struct dcp_buf *buf,
                       struct dcp_error *err) DCP_MUST_CHECK;

/* The image of a pickle that Python made: the pickle, our index where it says all that the pickle
 * says, and the footer with the save's id. */
int dcp_metadata_wrap(const struct dcp_span *pickle, const struct dcp_save_id *save_id,
                      struct dcp_buf *buf, struct dcp_error *err) DCP_MUST_CHECK;

enum { DCP_NO_FILE = 0xFFFFFFFFu };

/* One key of state_dict_metadata, in file order. */
struct dcp_md_entry {
    uint64_t name; /* offset in strings */
    uint32_t name_len;
    uint8_t kind;  /* DCP_ITEM_TENSOR for tensors (whole or sharded), DCP_ITEM_BYTES for objects */
    uint8_t dtype; /* enum dcp_dtype */
    uint8_t props;
    uint8_t ndim;
    uint64_t size;         /* index in dims of ndim numbers */
    uint64_t first_chunk;  /* index in chunks */
    uint64_t chunks_count; /* objects have exactly one, without dims */
};

struct dcp_md_chunk {
    uint64_t dims;         /* index in dims: offsets, then sizes, ndim each */
    uint64_t offset_bytes; /* of the record in the file */
    uint64_t length_bytes;
    uint32_t file;       /* index in files; DCP_NO_FILE when storage_data lacks it */
    uint32_t transforms; /* 1: transform_descriptors present, only Python can read it */
};

struct dcp_md_file {
    uint64_t name; /* offset in strings: relative_path */
    uint32_t name_len;
    uint32_t reserved;
};

enum { DCP_FOREIGN_BYTES = 256 };

/* Flat arrays, owned (or borrowed from a mapped image; `owned` says which).  Read only once built.
 */
struct dcp_metadata {
    char *strings;
    uint64_t strings_len;
    struct dcp_md_entry *entries;
    uint64_t entries_count;
    struct dcp_md_chunk *chunks;
    uint64_t chunks_count;
    uint64_t *dims;
    uint64_t dims_count;
    struct dcp_md_file *files;
    uint32_t files_count;
    bool owned;
    bool is_native; /* written by us: footer present and valid */
    /* Written by us for a planner of the program's own: dtypes of records need not be as it says.
     */
    bool planned_outside;
    bool is_raw;      /* chunks are payloads alone, row major, with no record around them */
    uint64_t tail_at; /* where dcp_metadata_read_tail can begin; 0: only the whole helps */
    struct dcp_save_id save_id;   /* of the footer; zero when stock */
    struct dcp_save_id *accepted; /* owned, ascending: other saves whose data files are linked */
    uint32_t accepted_count;
    /* The first thing that only Python could rebuild (an unknown global, an attribute of others)
     * and where it is; "": nothing.  The flat form does not depend on it. */
    char foreign[DCP_FOREIGN_BYTES];
    uint32_t *name_index;    /* hash table of entries by name, owned */
    uint64_t name_index_cap; /* power of two */
};

/* Reads an image: our index when the footer holds, else the pickle by an allow-listed reader.
 * Unknown globals and attributes of others are stepped over and named in `foreign`.
 * DCP_E_UNSUPPORTED: they are where the loader needs to look (the caller may let torch unpickle
 * it); DCP_E_CORRUPT: damaged, with what and where.  Time is linear in `len`; beyond the image,
 * memory is 2 times `len` for torch's files, 16 times and 256 KiB at most. */
int dcp_metadata_read(const uint8_t *image, size_t len, struct dcp_metadata *ret,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* Only what the end of an image of ours says: save_id, accepted, planned_outside.  No checksum but
 * its own is compared, no chunk is read. */
int dcp_metadata_read_ids(const uint8_t *image, size_t len, struct dcp_metadata *ret,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* The same of an image's bytes from `tail_at` on, for those whom somebody sends them that has read
 * and checked the whole: a pickle is 20 times as long as what follows it. */
int dcp_metadata_read_tail(const uint8_t *tail, size_t len, struct dcp_metadata *ret,
                           struct dcp_error *err) DCP_MUST_CHECK;
/* The same from the pickle alone (tests compare the two). */
int dcp_metadata_read_pickle(const uint8_t *image, size_t len, struct dcp_metadata *ret,
                             struct dcp_error *err) DCP_MUST_CHECK;
void dcp_metadata_clean_up(struct dcp_metadata *md);

/* NULL when there is no such key. */
const struct dcp_md_entry *dcp_metadata_find(const struct dcp_metadata *md, const char *fqn,
                                             size_t len);

/* Whether a data file whose header has this id belongs to the checkpoint: written by its own save,
 * or by one whose files it links. */
bool dcp_metadata_accepts(const struct dcp_metadata *md, const struct dcp_save_id *id);

/* The save id of an image's footer; false when it has none (stock, truncated).  Does not check the
 * body. */
bool dcp_metadata_peek_save_id(const uint8_t *image, size_t len, struct dcp_save_id *ret);

/* ---- data.pkl of a tensor record ---- */
struct dcp_tensor_pickle {
    uint8_t dtype;
    uint8_t ndim;
    uint64_t sizes[DCP_MAX_DIMS];
    int64_t strides[DCP_MAX_DIMS]; /* elements */
    uint64_t storage_offset;       /* elements */
    uint64_t storage_bytes;        /* whole storage */
    uint32_t storage_key_len;
    char storage_key[32]; /* "0" */
};
/* _rebuild_tensor_v2 / _v3 and _rebuild_parameter of one storage; anything else is
 * DCP_E_UNSUPPORTED. */
int dcp_pickle_read_tensor(const uint8_t *data, size_t len, struct dcp_tensor_pickle *ret,
                           struct dcp_error *err) DCP_MUST_CHECK;
/* Appends data.pkl as format.md A gives it; its length depends only on dtype, ndim and sizes. */
void dcp_pickle_put_tensor(struct dcp_buf *buf, int dtype, uint32_t ndim, const uint64_t *sizes);

#ifdef __cplusplus
}
#endif
#endif

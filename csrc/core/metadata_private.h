/*
 * metadata_private.h: what the files of the metadata module share.
 *
 * One flat form (struct dcp_metadata) lies in the middle: a plan is flattened into it, the pickle
 * and the index are written from it, and both are read back into it, entry for entry and byte for
 * byte the same.  So the two encodings cannot drift apart unseen.
 */
#ifndef DCP_METADATA_PRIVATE_H
#define DCP_METADATA_PRIVATE_H

#include "dcp_metadata.h"

/* ---- metadata.c: the flat form itself ---- */

/* Allocates entries, chunks and dims (zeroed, counts set) and owns them. */
int dcp_metadata_alloc(struct dcp_metadata *md, uint64_t entries_count, uint64_t chunks_count,
                       uint64_t dims_count, struct dcp_error *err) DCP_MUST_CHECK;
/* Builds the hash table of names.  DCP_E_UNSUPPORTED when a name comes twice. */
int dcp_metadata_index_names(struct dcp_metadata *md, struct dcp_error *err) DCP_MUST_CHECK;
/* Every offset, count, dim, box and file index.  DCP_E_CORRUPT says which is out of bounds. */
int dcp_metadata_validate(const struct dcp_metadata *md, struct dcp_error *err) DCP_MUST_CHECK;

/* File names, as found or made: one growing array of struct dcp_md_file, text in `strings`. */
struct dcp_md_names {
    struct dcp_buf strings;
    struct dcp_md_file *files;
    uint32_t files_count, files_cap;
};
/* Appends a file; its text is copied. */
int dcp_md_names_add_file(struct dcp_md_names *names, const void *text, size_t len,
                          uint32_t *ret_file, struct dcp_error *err) DCP_MUST_CHECK;
/* Hands strings and files over to *md. */
int dcp_md_names_move(struct dcp_md_names *names, struct dcp_metadata *md,
                      struct dcp_error *err) DCP_MUST_CHECK;
void dcp_md_names_clean_up(struct dcp_md_names *names);

/* ---- metadata_flatten.c: plan -> flat form ---- */

/* A record in the order of storage_data: which chunk of which entry it is. */
struct dcp_md_record {
    uint32_t entry;
    uint32_t hint; /* position in the entry's chunks */
};

/* *ret_records is owned by the caller: one element per kept item, in the order of the layouts, each
 * plan's links behind its own.  `links` may be NULL and is sound (dcp_metadata_check_links). */
int dcp_metadata_from_plan(const struct dcp_global_plan *global, const struct dcp_links *links,
                           uint64_t n0, struct dcp_metadata *ret_md,
                           struct dcp_md_record **ret_records, uint64_t *ret_records_count,
                           struct dcp_error *err) DCP_MUST_CHECK;

/* ---- metadata_links.c: what a checkpoint takes over from earlier saves ---- */

/* Order, bounds and ids of *links, and that names are new and within 32 bits. */
int dcp_metadata_check_links(const struct dcp_global_plan *global, const struct dcp_links *links,
                             const struct dcp_save_id *save_id, uint64_t n0,
                             struct dcp_error *err) DCP_MUST_CHECK;
/* Fills md->accepted from the linked files. */
int dcp_metadata_collect_accepted(struct dcp_metadata *md, const struct dcp_links *links,
                                  struct dcp_error *err) DCP_MUST_CHECK;
/* Fills md->accepted from `count` ids of an image; md->save_id is known. */
int dcp_metadata_read_accepted(struct dcp_metadata *md, const uint8_t *bytes, uint32_t count,
                               struct dcp_error *err) DCP_MUST_CHECK;

/* ---- metadata_paths.c: planner_data ---- */

/* A key of planner_data and the plan whose path it takes. */
struct dcp_md_path {
    uint32_t plan, name; /* the name in that plan */
    uint32_t entry;      /* of the same name in the metadata; DCP_NO_FILE when there is none */
};

/* The keys in torch's order; *ret_paths is owned by the caller.  *md must have its name index. */
int dcp_metadata_merge_paths(const struct dcp_global_plan *global, const struct dcp_metadata *md,
                             struct dcp_md_path **ret_paths, uint64_t *ret_count,
                             struct dcp_error *err) DCP_MUST_CHECK;

/* ---- metadata_index_*.c: flat form <-> bytes ---- */

int dcp_metadata_index_encode(const struct dcp_metadata *md, struct dcp_buf *buf,
                              struct dcp_error *err) DCP_MUST_CHECK;
/* *ret_md has neither name index nor save id yet. */
int dcp_metadata_index_decode(const uint8_t *data, size_t len, struct dcp_metadata *ret_md,
                              struct dcp_error *err) DCP_MUST_CHECK;

/* ---- metadata_footer.c ---- */

enum { DCP_METADATA_FOOTER_BYTES = 64 };

struct dcp_metadata_footer {
    uint64_t pickle_bytes;
    uint64_t index_bytes;
    uint32_t pickle_crc;
    uint32_t index_crc;
    uint32_t accepted_count; /* save ids between index and footer */
    uint32_t accepted_crc;   /* of them; 0 when there are none */
    struct dcp_save_id save_id;
    bool planned_outside;
};

void dcp_metadata_footer_put(struct dcp_buf *buf, const struct dcp_metadata_footer *footer);
/* Ends an image whose pickle begins at `start` and its index at `index_at`: the accepted saves, the
 * footer.  The caller gives save_id, accepted_count and planned_outside. */
int dcp_metadata_seal(struct dcp_buf *buf, size_t start, size_t index_at,
                      const struct dcp_save_id *accepted, struct dcp_metadata_footer *footer,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* False when the image does not end with a footer of ours whose lengths fill it. */
bool dcp_metadata_footer_parse(const uint8_t *image, size_t len, struct dcp_metadata_footer *ret);
/* The same of an image whose pickle was left out: it begins with the index. */
bool dcp_metadata_footer_parse_tail(const uint8_t *tail, size_t len,
                                    struct dcp_metadata_footer *ret);

#endif

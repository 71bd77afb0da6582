/*
 * dcp_plan.h: items, one rank's plan, and the coordinator's steps over all ranks' plans.
 *
 * An item is one thing to save: a tensor, a shard (a box of a global tensor) or an object.  A plan
 * holds items in state dict order, as plain numbers; where the bytes come from is not part of it
 * (dcp_source, dcp_engine.h), so a plan can be sent, compared and cached.  The coordinator decides
 * which items each rank keeps (a bitmap); everything else (layout, metadata) is a pure function of
 * plans and bitmaps, so no rank reports back where it wrote what.
 */
#ifndef DCP_PLAN_H
#define DCP_PLAN_H

#include "dcp_alloc.h"
#include "dcp_dtype.h"
#include "dcp_hash.h"
#include "dcp_limits.h"

#ifdef __cplusplus
extern "C" {
#endif

enum dcp_item_kind {
    DCP_ITEM_TENSOR = 1, /* a whole plain tensor; its box is the tensor */
    DCP_ITEM_SHARD = 2,  /* a box of a global tensor */
    DCP_ITEM_BYTES = 3,  /* a serialised object; no dims */
};

/* TensorProperties of torch's metadata, packed.  The layout is always torch.strided. */
enum dcp_props {
    DCP_PROP_REQUIRES_GRAD = 1 << 0,
    DCP_PROP_PIN_MEMORY = 1 << 1,
    DCP_PROP_CHANNELS_LAST = 1 << 2,   /* else contiguous_format */
    DCP_PROP_PRESERVE_FORMAT = 1 << 3, /* else contiguous_format */
};

struct dcp_item {
    uint32_t name; /* index in dcp_plan.names */
    uint8_t kind;  /* enum dcp_item_kind */
    uint8_t dtype; /* enum dcp_dtype; 0 for objects */
    uint8_t props; /* enum dcp_props */
    uint8_t ndim;  /* <= DCP_MAX_DIMS */
    uint64_t
        dims; /* index in dcp_plan.dims of 3 * ndim numbers: global size, box offsets, box sizes */
    /* 0: the layout makes room for a record that the writer frames itself (tensors).  Else the
     * record is given ready-made and opaque, this many bytes long, padding included: objects
     * always, and tensors that only torch.save can serialise (quantised ones).  The layout places
     * such a record like an object, whatever its kind; box and dtype still describe the tensor for
     * metadata and validation, and dtype may be DCP_DTYPE_NONE. */
    uint64_t slot_bytes;
};

/* A name of the flattened state dict.  Every flattened key has one, also when this rank has no item
 * for it. */
struct dcp_name {
    const char *fqn; /* UTF-8, not terminated */
    const uint8_t
        *path;        /* encoded path, see dcp_path_*; NULL when the state dict was not flattened */
    uint32_t fqn_len; /* bytes */
    uint32_t path_len;   /* bytes */
    uint32_t path_parts; /* 0 without a path */
};

struct dcp_name_table; /* private to the core: names that several plans share */

struct dcp_plan {
    uint32_t rank;             /* group rank; names the files */
    uint32_t thread_count;     /* of the writer: files per rank when single_file_per_rank */
    bool single_file_per_rank; /* else one file per item */
    bool has_paths;            /* flatten_state_dict: metadata gets planner_data */
    bool content_hash;         /* of the writer: data files get a hash table */
    bool planned_outside;   /* what the records are is known to a planner of the program's alone */
    struct dcp_name *names; /* owned array, or the table's */
    uint32_t names_count, names_cap;
    struct dcp_item *items; /* owned array, state dict order */
    uint32_t items_count, items_cap;
    uint64_t *dims; /* owned array */
    uint64_t dims_count, dims_cap;
    struct dcp_bump strings; /* owns names' text and paths */
    /* Of a plan that was gathered: owns names and strings in this plan's place; else NULL. */
    struct dcp_name_table *table;
};

/* Zero-initialised is a valid empty plan.  The destructor is idempotent. */
void dcp_plan_clean_up(struct dcp_plan *plan);

/* Copies the name (and path).  The caller guarantees that names are unique. */
int dcp_plan_add_name(struct dcp_plan *plan, const char *fqn, size_t fqn_len, const uint8_t *path,
                      size_t path_len, uint32_t path_parts, uint32_t *ret_name,
                      struct dcp_error *err) DCP_MUST_CHECK;

/* Copies *item (its `dims` is set here) and 3 * item->ndim numbers: global size, box offsets, box
 * sizes (borrowed for the call; may be NULL when ndim is 0).  Checks every field and product; a box
 * that leaves the tensor is accepted, the global plan's validation reports it.  An object's
 * slot_bytes may be set later (plan->items[i].slot_bytes), but before encoding or layout. */
int dcp_plan_add_item(struct dcp_plan *plan, const struct dcp_item *item,
                      const uint64_t *global_size, const uint64_t *offsets, const uint64_t *sizes,
                      struct dcp_error *err) DCP_MUST_CHECK;

/* Paths: parts in order, a string as 's' varint(len) bytes, a list index as 'i' varint(index). */
void dcp_path_put_str(struct dcp_buf *buf, const char *text, size_t len);
void dcp_path_put_int(struct dcp_buf *buf, uint64_t index);
/* Reads the next part: true and *ret_is_int with *ret_int or *ret_text; false at the end or on
 * damage (c->failed). */
bool dcp_path_next(struct dcp_cursor *c, bool *ret_is_int, uint64_t *ret_int,
                   struct dcp_span *ret_text);

static inline const uint64_t *
dcp_item_global_size(const struct dcp_plan *plan, const struct dcp_item *item)
{
    return plan->dims + item->dims;
}

static inline const uint64_t *
dcp_item_offsets(const struct dcp_plan *plan, const struct dcp_item *item)
{
    return plan->dims + item->dims + item->ndim;
}

static inline const uint64_t *
dcp_item_sizes(const struct dcp_plan *plan, const struct dcp_item *item)
{
    return plan->dims + item->dims + 2 * (size_t)item->ndim;
}

/* Raw bytes of a tensor or shard (product of box sizes and element size), also when its record is
 * opaque; 0 for objects.  Checked when added. */
uint64_t dcp_item_payload_bytes(const struct dcp_plan *plan, const struct dcp_item *item);

/* Everything that decides plan, layout or metadata: names, paths, order, kinds, dtypes, props,
 * boxes, slots, writer options.  Never data, never the directory.  `salt` mixes in what the caller
 * knows (planner options). */
struct dcp_hash128 dcp_plan_fingerprint(const struct dcp_plan *plan, uint64_t salt);

/* Bytes that an item weighs when ranks and files are balanced: its ready-made record or its raw
 * tensor. */
static inline uint64_t
dcp_item_weight_bytes(const struct dcp_plan *plan, const struct dcp_item *item)
{
    return dcp_max_u64(item->slot_bytes, dcp_item_payload_bytes(plan, item));
}

/* ---- codec: a compact little-endian image, complete in itself; decode checks every bound, name,
 * kind, dtype, dim and product ---- */
int dcp_plan_encode(const struct dcp_plan *plan, struct dcp_buf *buf,
                    struct dcp_error *err) DCP_MUST_CHECK;
int dcp_plan_decode(const uint8_t *data, size_t len, struct dcp_plan *ret_plan,
                    struct dcp_error *err) DCP_MUST_CHECK;

/* ---- coordinator's steps; `plans` are in group rank order ---- */

/* The rows of one item that a rank keeps; other holders of the tensor keep the others. */
struct dcp_cut {
    uint32_t item;                  /* index in dcp_plan.items */
    uint32_t dim;                   /* whose indices are the rows */
    uint64_t first_row, rows_count; /* of the item's box */
};

/* The cuts of one plan, ascending by item, each item at most once. */
struct dcp_cuts {
    struct dcp_cut *cuts;
    uint32_t count;
};

/* Narrows the boxes of cut items, which become shards.  A plan is cut once: rows count from the
 * box that an item was added with. */
void dcp_plan_cut(struct dcp_plan *plan, const struct dcp_cuts *cuts);

/* Which replicated tensors are divided by rows over their holders: those of at least this many
 * bytes, or one of these. */
#define DCP_SPLIT_AUTO 0         /* of DCP_SPLIT_BYTES and more, where whole ones unbalance ranks */
#define DCP_SPLIT_OFF UINT64_MAX /* none */

/* Bitmaps of kept items, one per plan: bit i of byte i / 8.  */
struct dcp_keep {
    uint8_t **bits;                        /* plans_count pointers into `block` */
    uint8_t *block;                        /* owned */
    uint32_t count;                        /* plans */
    uint64_t dropped_items, dropped_bytes; /* replicas that are not written */
    struct dcp_cuts *cuts; /* owned, one per plan, their arrays with it; NULL when none is cut */
};

static inline bool
dcp_keep_test(const uint8_t *bits, uint32_t item)
{
    return (bits[item >> 3] >> (item & 7)) & 1;
}

static inline void
dcp_keep_set(uint8_t *bits, uint32_t item)
{
    bits[item >> 3] |= (uint8_t)(1u << (item & 7));
}

static inline void
dcp_keep_clear(uint8_t *bits, uint32_t item)
{
    bits[item >> 3] &= (uint8_t) ~(1u << (item & 7));
}

/* Of a bitmap over so many items. */
static inline size_t
dcp_keep_bytes(uint32_t items_count)
{
    return ((size_t)items_count + 7) / 8;
}

/* Each (fqn, offsets) is kept by one rank (sizes and dtypes are ignored, as torch does): large
 * ones first, the one with the fewest bytes so far, the lowest on a tie; or always the lowest.
 * Duplicates within one rank's plan are all kept, as torch does.  Linear in items. */
int dcp_plan_dedup(const struct dcp_plan *plans, uint32_t plans_count, bool to_lowest_rank,
                   struct dcp_keep *ret_keep, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_keep_clean_up(struct dcp_keep *keep);

/* The kept items of all plans, grouped by name in torch's order (first appearance over plans, then
 * items): what metadata and validation walk.  DCP_E_ASSERTION when an object or a whole tensor
 * comes after another kept item of its name, or a shard after an object. */
struct dcp_global_entry {
    uint32_t plan, item;   /* first kept item: gives kind, dtype, props, size */
    uint32_t chunks_count; /* kept items of this name; 1 for objects, whose chunk names the item */
    uint64_t first_chunk;  /* index in dcp_global_plan.chunks */
};

struct dcp_global_chunk {
    uint32_t plan, item;
};

struct dcp_global_plan {
    const struct dcp_plan *plans; /* borrows */
    uint32_t plans_count;
    struct dcp_keep keep;             /* owned */
    struct dcp_global_entry *entries; /* owned, torch's order */
    uint64_t entries_count;
    struct dcp_global_chunk *chunks; /* owned; of an entry: plan order, then item order */
    uint64_t chunks_count;
    struct dcp_layout *layouts; /* owned, one per plan */
};

/* Dedup, grouping, validation (sort and sweep, linear-log) and layouts.  DCP_E_PLAN carries torch's
 * text: "Failed to validate global plan: ...", joined by "; ", cut at 500 characters.  `plans` must
 * outlive the result. */
int dcp_global_plan_build(const struct dcp_plan *plans, uint32_t plans_count, bool to_lowest_rank,
                          struct dcp_global_plan *ret_global, struct dcp_error *err) DCP_MUST_CHECK;
/* The same, and replicated tensors may be divided over their holders (`split_bytes` as above): the
 * plans are cut in place, also when a later step fails; keep.cuts tells what each rank does to its
 * own plan. */
int dcp_global_plan_build_split(struct dcp_plan *plans, uint32_t plans_count, uint64_t split_bytes,
                                struct dcp_global_plan *ret_global,
                                struct dcp_error *err) DCP_MUST_CHECK;
void dcp_global_plan_clean_up(struct dcp_global_plan *global);
/* Validation alone; called by dcp_global_plan_build. */
int dcp_global_plan_validate(const struct dcp_global_plan *global,
                             struct dcp_error *err) DCP_MUST_CHECK;

/* ---- layout: where each kept record of a plan lies; a pure function of plan and bitmap ---- */
struct dcp_placed_record {
    uint32_t item;         /* index in plan.items */
    uint32_t file;         /* index in dcp_layout.files */
    uint64_t offset_bytes; /* of the record in the file; what metadata says */
    uint64_t length_bytes; /* of the record; what metadata says */
    /* Raw tensor bytes in the file; the whole record when it is ready-made (slot_bytes != 0). */
    uint64_t payload_offset_bytes;
    uint64_t payload_bytes;
};

struct dcp_placed_file {
    uint32_t index;        /* k of the name __{rank}_{n0 + k}.distcp */
    uint32_t first_record; /* in dcp_layout.records; records of a file are in ascending offset */
    uint32_t records_count;
    /* Of the block table, behind the last record, 8-byte aligned; the file's end without one. */
    uint64_t table_offset_bytes;
    uint64_t table_bytes; /* 0 when dcp_layout_lists none of the file's records */
    /* Of the hash table, behind the block table, 8-byte aligned; 0 bytes and the file's end without
     * content_hash or without records. */
    uint64_t hash_offset_bytes;
    uint64_t hash_bytes;
    uint64_t length_bytes; /* of the whole file, tables included */
};

struct dcp_layout {
    struct dcp_placed_file
        *files; /* owned; thread_count of them, empty ones included, or one per kept item */
    uint32_t files_count;
    struct dcp_placed_record *records; /* owned; grouped by file, ascending offset */
    uint32_t records_count;
    uint64_t total_bytes;   /* of all files */
    uint64_t payload_bytes; /* of all records */
};

/* Whether the block table has an entry for the record: raw payloads over DCP_BLOCK_BYTES have one.
 * Ready-made records are always read whole and have CRCs of their own, but not those that a planner
 * of the program's made as it pleases. */
static inline bool
dcp_layout_lists(const struct dcp_plan *plan, const struct dcp_placed_record *record)
{
    return plan->items[record->item].slot_bytes == 0 ? record->payload_bytes > DCP_BLOCK_BYTES
                                                     : plan->planned_outside;
}

/* Objects first in every file, as torch does; thread_count > 1 spreads objects round robin and
 * tensors, largest first, onto the file with the fewest bytes.  Without single_file_per_rank the
 * kept item number k is file k.  A payload of DCP_LARGE_PAYLOAD_BYTES or more starts on a multiple
 * of DCP_LARGE_ALIGN_BYTES of the file, from DCP_MEDIUM_PAYLOAD_BYTES on DCP_MEDIUM_ALIGN_BYTES,
 * small ones are packed; the gap lies before the record.  The payload of a ready-made record
 * (slot_bytes != 0) is the record itself.  An empty file is its header.  `keep` NULL keeps all. */
int dcp_layout_build(const struct dcp_plan *plan, const uint8_t *keep,
                     struct dcp_layout *ret_layout, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_layout_clean_up(struct dcp_layout *layout);

#ifdef __cplusplus
}
#endif
#endif

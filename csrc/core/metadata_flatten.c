/*
 * metadata_flatten.c: a global plan and its layouts as the flat form of `.metadata`.
 *
 * The plan knows chunks by (plan, item), the layout knows records by (file, item).  One map from
 * items to chunks joins them, so each is walked once and everything is linear.  Along the way the
 * order of records is kept: it is the order of storage_data in the pickle, as torch's coordinator
 * makes it by appending the ranks' results.  What a plan links from earlier saves follows what it
 * writes.
 *
 * Threads: no state.
 */
#include "metadata_private.h"

#include <stdio.h>
#include <string.h>

enum { FILE_NAME_BYTES = 64, RECORD_NONE = 0xFFFFFFFFu };

struct flattener {
    const struct dcp_global_plan *global;
    const struct dcp_links *links; /* may be NULL */
    uint32_t *link_files;          /* of each linked file: its number in the flat form */
    uint64_t n0;
    struct dcp_metadata md;
    struct dcp_md_names names;
    uint64_t *first_item;          /* of each plan in `of_item` */
    struct dcp_md_record *of_item; /* the chunk of each item of all plans */
    struct dcp_md_record *records; /* the result's order */
    uint64_t items_count, records_count;
    uint64_t used_chunks, used_dims, used_records, used_links; /* so far */
    struct dcp_error *err;
};

static int
refuse_plan(struct flattener *f, uint32_t plan, uint32_t item, const char *what)
{
    return dcp_error_set(f->err, DCP_E_INTERNAL, 0, NULL,
                         "writing metadata: item %u of plan %u %s; this is a bug, please report it",
                         item, plan, what);
}

/* Allocates everything but the names. */
static int
make_room(struct flattener *f)
{
    const struct dcp_global_plan *global = f->global;
    uint64_t dims_count = 0;
    for (uint64_t e = 0; e < global->entries_count; e++) {
        const struct dcp_global_entry *entry = &global->entries[e];
        uint64_t ndim = global->plans[entry->plan].items[entry->item].ndim;
        dims_count += ndim + 2 * ndim * entry->chunks_count;
    }
    for (uint32_t p = 0; p < global->plans_count; p++) {
        f->items_count += global->plans[p].items_count;
        f->records_count += global->layouts[p].records_count;
    }
    uint32_t link_files_count = f->links == NULL ? 0 : f->links->files_count;
    f->records_count += f->links == NULL ? 0 : f->links->records_count;
    if (global->entries_count >= UINT32_MAX || global->chunks_count >= UINT32_MAX) {
        return dcp_error_set(f->err, DCP_E_LIMIT, 0, NULL,
                             "writing metadata: %llu chunks, 2^32 are allowed; save in parts",
                             (unsigned long long)global->chunks_count);
    }
    int rc =
        dcp_metadata_alloc(&f->md, global->entries_count, global->chunks_count, dims_count, f->err);
    if (rc != 0) {
        return rc;
    }
    f->first_item = dcp_malloc_array(global->plans_count, sizeof *f->first_item);
    f->of_item = dcp_malloc_array((size_t)f->items_count, sizeof *f->of_item);
    f->records = dcp_malloc_array((size_t)f->records_count, sizeof *f->records);
    f->link_files = dcp_malloc_array(link_files_count, sizeof *f->link_files);
    if (f->first_item == NULL || f->of_item == NULL || f->records == NULL ||
        f->link_files == NULL) {
        return dcp_error_set(f->err, DCP_E_NOMEM, 0, NULL,
                             "writing the metadata of %llu items: out of memory",
                             (unsigned long long)f->items_count);
    }
    uint64_t first = 0;
    for (uint32_t p = 0; p < global->plans_count; p++) {
        f->first_item[p] = first;
        first += global->plans[p].items_count;
    }
    memset(f->of_item, 0xFF, (size_t)f->items_count * sizeof *f->of_item);
    memset(f->link_files, 0xFF, link_files_count * sizeof *f->link_files);
    return 0;
}

static void
put_dims(struct flattener *f, const uint64_t *numbers, uint64_t count)
{
    DCP_ASSERT(f->used_dims + count <= f->md.dims_count);
    if (count != 0) {
        memcpy(f->md.dims + f->used_dims, numbers, (size_t)count * sizeof *numbers);
        f->used_dims += count;
    }
}

/* Entry `e` and its chunks, without files. */
static int
flatten_entry(struct flattener *f, uint32_t e)
{
    const struct dcp_global_entry *from = &f->global->entries[e];
    const struct dcp_plan *plan = &f->global->plans[from->plan];
    const struct dcp_item *item = &plan->items[from->item];
    const struct dcp_name *name = &plan->names[item->name];
    bool is_object = item->kind == DCP_ITEM_BYTES;
    DCP_ASSERT(from->chunks_count <= f->md.chunks_count - f->used_chunks);
    if (!is_object && item->dtype == DCP_DTYPE_NONE) {
        return dcp_error_set(f->err, DCP_E_UNSUPPORTED, 0, NULL,
                             "writing metadata: %.*s has an element type that only torch knows; "
                             "use torch's own writer",
                             (int)dcp_min_u64(name->fqn_len, 200), name->fqn);
    }
    struct dcp_md_entry *entry = &f->md.entries[e];
    *entry = (struct dcp_md_entry){
        .name = f->names.strings.len,
        .name_len = name->fqn_len,
        .kind = is_object ? DCP_ITEM_BYTES : DCP_ITEM_TENSOR,
        .dtype = is_object ? DCP_DTYPE_NONE : item->dtype,
        .props = is_object ? 0 : item->props,
        .ndim = is_object ? 0 : item->ndim,
        .size = f->used_dims,
        .first_chunk = f->used_chunks,
        .chunks_count = from->chunks_count,
    };
    dcp_buf_put(&f->names.strings, name->fqn, name->fqn_len);
    put_dims(f, dcp_item_global_size(plan, item), entry->ndim);
    for (uint32_t c = 0; c < from->chunks_count; c++) {
        const struct dcp_global_chunk *chunk = &f->global->chunks[from->first_chunk + c];
        const struct dcp_plan *owner = &f->global->plans[chunk->plan];
        const struct dcp_item *box = &owner->items[chunk->item];
        if ((box->kind == DCP_ITEM_BYTES) != is_object || (!is_object && box->ndim != item->ndim)) {
            return refuse_plan(f, chunk->plan, chunk->item, "has another rank than its tensor");
        }
        f->of_item[f->first_item[chunk->plan] + chunk->item] = (struct dcp_md_record){e, c};
        f->md.chunks[f->used_chunks++] = (struct dcp_md_chunk){
            .dims = f->used_dims,
            .file = DCP_NO_FILE,
        };
        put_dims(f, dcp_item_offsets(owner, box), entry->ndim);
        put_dims(f, dcp_item_sizes(owner, box), entry->ndim);
    }
    return 0;
}

static int
add_file(struct flattener *f, uint32_t p, uint64_t n, uint32_t *ret_file)
{
    char text[FILE_NAME_BYTES];
    int len = snprintf(text, sizeof text, "__%u_%llu.distcp", f->global->plans[p].rank,
                       (unsigned long long)(f->n0 + n));
    DCP_ASSERT(len > 0 && (size_t)len < sizeof text);
    return dcp_md_names_add_file(&f->names, text, (size_t)len, ret_file, f->err);
}

/* Gives the chunk of an item its place. */
static int
place_record(struct flattener *f, uint32_t p, uint32_t item, uint32_t file, uint64_t offset_bytes,
             uint64_t length_bytes)
{
    struct dcp_md_record at = f->of_item[f->first_item[p] + item];
    if (at.entry == RECORD_NONE || f->used_records == f->records_count) {
        return refuse_plan(f, p, item, "has a place but is in no chunk");
    }
    struct dcp_md_chunk *chunk = &f->md.chunks[f->md.entries[at.entry].first_chunk + at.hint];
    if (chunk->file != DCP_NO_FILE) {
        return refuse_plan(f, p, item, "has two places");
    }
    chunk->file = file;
    chunk->offset_bytes = offset_bytes;
    chunk->length_bytes = length_bytes;
    f->records[f->used_records++] = at;
    return 0;
}

/* Records that plan `p` writes. */
static int
place_written(struct flattener *f, uint32_t p)
{
    const struct dcp_layout *layout = &f->global->layouts[p];
    int rc = 0;
    for (uint32_t k = 0; k < layout->files_count; k++) {
        const struct dcp_placed_file *placed = &layout->files[k];
        uint32_t file;
        if (placed->records_count > 0) {
            rc = add_file(f, p, placed->index, &file);
        }
        for (uint32_t r = 0; rc == 0 && r < placed->records_count; r++) {
            const struct dcp_placed_record *record = &layout->records[placed->first_record + r];
            rc = place_record(f, p, record->item, file, record->offset_bytes, record->length_bytes);
        }
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

/* Records that plan `p` links; those of lower plans are placed already. */
static int
place_linked(struct flattener *f, uint32_t p)
{
    const struct dcp_links *links = f->links;
    while (links != NULL && f->used_links < links->records_count) {
        const struct dcp_linked_record *record = &links->records[f->used_links];
        const struct dcp_linked_file *linked = &links->files[record->file];
        uint32_t *file = &f->link_files[record->file];
        if (record->plan != p) {
            break;
        }
        int rc = *file != DCP_NO_FILE ? 0 : add_file(f, linked->plan, linked->n, file);
        if (rc == 0) {
            rc =
                place_record(f, p, record->item, *file, record->offset_bytes, record->length_bytes);
        }
        if (rc != 0) {
            return rc;
        }
        f->used_links++;
    }
    return 0;
}

static int
flatten(struct flattener *f)
{
    int rc = make_room(f);
    for (uint32_t e = 0; rc == 0 && e < f->global->entries_count; e++) {
        rc = flatten_entry(f, e);
    }
    for (uint32_t p = 0; rc == 0 && p < f->global->plans_count; p++) {
        rc = place_written(f, p);
        if (rc == 0) {
            rc = place_linked(f, p);
        }
    }
    if (rc == 0 && (f->used_records != f->records_count || f->used_records != f->md.chunks_count)) {
        rc = dcp_error_set(f->err, DCP_E_INTERNAL, 0, NULL,
                           "writing metadata: %llu records for %llu chunks; this is a bug, please "
                           "report it",
                           (unsigned long long)f->used_records,
                           (unsigned long long)f->md.chunks_count);
    }
    return rc != 0 ? rc : dcp_md_names_move(&f->names, &f->md, f->err);
}

int
dcp_metadata_from_plan(const struct dcp_global_plan *global, const struct dcp_links *links,
                       uint64_t n0, struct dcp_metadata *ret_md, struct dcp_md_record **ret_records,
                       uint64_t *ret_records_count, struct dcp_error *err)
{
    struct flattener f = {.global = global, .links = links, .n0 = n0, .err = err};
    int rc = flatten(&f);
    if (rc != 0) {
        dcp_metadata_clean_up(&f.md);
        dcp_free(f.records);
    } else {
        *ret_md = f.md;
        *ret_records = f.records;
        *ret_records_count = f.records_count;
    }
    dcp_md_names_clean_up(&f.names);
    dcp_free(f.first_item);
    dcp_free(f.of_item);
    dcp_free(f.link_files);
    return rc;
}

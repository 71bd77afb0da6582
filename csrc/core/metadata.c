/*
 * metadata.c: the flat form of `.metadata`: memory, the table of names, and its one validation.
 *
 * Whoever fills the arrays (index, pickle or plan), the same check runs before anybody else reads
 * them, so users of struct dcp_metadata may add and multiply its numbers without fear: every box
 * lies in its tensor, every tensor has at most DCP_MAX_PAYLOAD_BYTES bytes, every index is in
 * range.
 *
 * Threads: read only once built; then any number of readers.
 */
#include "metadata_private.h"

#include <string.h>

#include "dcp_hash.h"
#include "index_map.h"

enum { FIRST_FILES_CAP = 16, NAME_SEED = 0x6d64 };

static int
no_memory(struct dcp_error *err, uint64_t chunks_count)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                         "holding the metadata of %llu chunks: out of memory",
                         (unsigned long long)chunks_count);
}

int
dcp_metadata_alloc(struct dcp_metadata *md, uint64_t entries_count, uint64_t chunks_count,
                   uint64_t dims_count, struct dcp_error *err)
{
    md->owned = true;
    md->entries_count = entries_count;
    md->chunks_count = chunks_count;
    md->dims_count = dims_count;
    md->entries = dcp_calloc((size_t)entries_count, sizeof *md->entries);
    md->chunks = dcp_calloc((size_t)chunks_count, sizeof *md->chunks);
    md->dims = dcp_calloc((size_t)dims_count, sizeof *md->dims);
    if (md->entries == NULL || md->chunks == NULL || md->dims == NULL) {
        return no_memory(err, chunks_count);
    }
    return 0;
}

void
dcp_metadata_clean_up(struct dcp_metadata *md)
{
    if (md == NULL) {
        return;
    }
    if (md->owned) {
        dcp_free(md->strings);
        dcp_free(md->entries);
        dcp_free(md->chunks);
        dcp_free(md->dims);
        dcp_free(md->files);
    }
    dcp_free(md->accepted);
    dcp_free(md->name_index);
    *md = (struct dcp_metadata){0};
}

/* ---- names of files ---- */

int
dcp_md_names_add_file(struct dcp_md_names *names, const void *text, size_t len, uint32_t *ret_file,
                      struct dcp_error *err)
{
    if (len == 0 || len > UINT32_MAX || memchr(text, 0, len) != NULL) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                             "storage_data names a file by %zu bytes that are no file name", len);
    }
    if (names->files_count == names->files_cap) {
        uint32_t cap = names->files_cap == 0 ? FIRST_FILES_CAP : 2 * names->files_cap;
        struct dcp_md_file *files = NULL;
        if (names->files_count < UINT32_MAX / 2) {
            files = dcp_realloc(names->files, (size_t)cap * sizeof *files);
        }
        if (files == NULL) {
            return no_memory(err, names->files_count);
        }
        names->files = files;
        names->files_cap = cap;
    }
    names->files[names->files_count] = (struct dcp_md_file){
        .name = names->strings.len,
        .name_len = (uint32_t)len,
    };
    dcp_buf_put(&names->strings, text, len);
    *ret_file = names->files_count++;
    return dcp_buf_check(&names->strings, err);
}

int
dcp_md_names_move(struct dcp_md_names *names, struct dcp_metadata *md, struct dcp_error *err)
{
    DCP_ASSERT(md->owned && md->strings == NULL && md->files == NULL);
    int rc = dcp_buf_check(&names->strings, err);
    if (rc != 0) {
        return rc;
    }
    md->strings = (char *)names->strings.data;
    md->strings_len = names->strings.len;
    md->files = names->files;
    md->files_count = names->files_count;
    *names = (struct dcp_md_names){0};
    return 0;
}

void
dcp_md_names_clean_up(struct dcp_md_names *names)
{
    dcp_buf_clean_up(&names->strings);
    dcp_free(names->files);
    *names = (struct dcp_md_names){0};
}

/* ---- finding by name ---- */

/* The slot of a name: where it is, or the empty one where it belongs; the capacity when the chain
 * is too long. */
static uint64_t
find_slot(const struct dcp_metadata *md, const char *name, size_t len)
{
    uint64_t home = dcp_hash64(name, len, NAME_SEED) >> 8;
    for (uint64_t probe = 0; probe < DCP_INDEX_MAX_PROBES; probe++) {
        uint64_t at = (home + probe) & (md->name_index_cap - 1);
        uint32_t found = md->name_index[at];
        if (found == 0) {
            return at;
        }
        const struct dcp_md_entry *entry = &md->entries[found - 1];
        if (entry->name_len == len &&
            (len == 0 || memcmp(md->strings + entry->name, name, len) == 0)) {
            return at;
        }
    }
    return md->name_index_cap;
}

int
dcp_metadata_index_names(struct dcp_metadata *md, struct dcp_error *err)
{
    DCP_ASSERT(md->name_index == NULL);
    if (md->entries_count >= UINT32_MAX) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL, "a checkpoint of %llu keys",
                             (unsigned long long)md->entries_count);
    }
    uint64_t cap = 16;
    while (cap / 2 < md->entries_count) {
        cap *= 2;
    }
    md->name_index = dcp_calloc((size_t)cap, sizeof *md->name_index);
    if (md->name_index == NULL) {
        return no_memory(err, md->chunks_count);
    }
    md->name_index_cap = cap;
    for (uint64_t e = 0; e < md->entries_count; e++) {
        const struct dcp_md_entry *entry = &md->entries[e];
        const char *name = entry->name_len == 0 ? "" : md->strings + entry->name;
        uint64_t at = find_slot(md, name, entry->name_len);
        if (at == cap || md->name_index[at] != 0) {
            return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                                 "state_dict_metadata has the key %.*s %s",
                                 (int)dcp_min_u64(entry->name_len, 200), name,
                                 at == cap ? "whose hash collides with too many others" : "twice");
        }
        md->name_index[at] = (uint32_t)e + 1;
    }
    return 0;
}

const struct dcp_md_entry *
dcp_metadata_find(const struct dcp_metadata *md, const char *fqn, size_t len)
{
    if (md->name_index_cap == 0) {
        return NULL;
    }
    uint64_t at = find_slot(md, fqn, len);
    if (at == md->name_index_cap || md->name_index[at] == 0) {
        return NULL;
    }
    return &md->entries[md->name_index[at] - 1];
}

/* ---- validation ---- */

/* Which entry and chunk are damaged, for the message. */
struct suspect {
    const struct dcp_metadata *md;
    uint64_t entry, chunk;
    struct dcp_error *err;
};

static int
refuse(const struct suspect *s, const char *what)
{
    return dcp_error_set(s->err, DCP_E_CORRUPT, 0, NULL,
                         "checking the metadata: key number %llu, chunk %llu: %s; the file is "
                         "damaged, restore it from a copy",
                         (unsigned long long)s->entry, (unsigned long long)s->chunk, what);
}

static bool
is_outside(uint64_t first, uint64_t count, uint64_t total)
{
    return first > total || count > total - first;
}

/* Payload bytes of a tensor of these sizes; false when they exceed the limit.  A zero anywhere
 * makes it empty, but no single size may be absurd. */
static bool
fits_payload(const uint64_t *sizes, uint32_t ndim, uint32_t element_bytes)
{
    uint64_t bytes = element_bytes;
    bool is_empty = false;
    bool overflows = false;
    for (uint32_t i = 0; i < ndim; i++) {
        if (sizes[i] > DCP_MAX_PAYLOAD_BYTES) {
            return false;
        }
        is_empty = is_empty || sizes[i] == 0;
        overflows = overflows || dcp_mul_overflows_u64(bytes, sizes[i], &bytes) ||
                    bytes > DCP_MAX_PAYLOAD_BYTES;
    }
    return is_empty || !overflows;
}

static int
validate_entry(const struct suspect *s, const struct dcp_md_entry *entry)
{
    const struct dcp_metadata *md = s->md;
    if (is_outside(entry->name, entry->name_len, md->strings_len)) {
        return refuse(s, "the name lies outside the strings");
    }
    if (is_outside(entry->first_chunk, entry->chunks_count, md->chunks_count)) {
        return refuse(s, "the chunks lie outside the chunk table");
    }
    if (entry->kind == DCP_ITEM_BYTES) {
        if (entry->ndim != 0 || entry->dtype != DCP_DTYPE_NONE || entry->props != 0 ||
            entry->chunks_count != 1) {
            return refuse(s, "an object with the attributes of a tensor");
        }
        return 0;
    }
    if (entry->kind != DCP_ITEM_TENSOR) {
        return refuse(s, "neither a tensor nor an object");
    }
    if (entry->dtype == DCP_DTYPE_NONE || dcp_dtype_bytes(entry->dtype) == 0 ||
        entry->ndim > DCP_MAX_DIMS) {
        return refuse(s, "an unknown element type or too many dimensions");
    }
    if (is_outside(entry->size, entry->ndim, md->dims_count)) {
        return refuse(s, "the size lies outside the dimension table");
    }
    if (!fits_payload(md->dims + entry->size, entry->ndim, dcp_dtype_bytes(entry->dtype))) {
        return refuse(s, "the size is beyond any memory");
    }
    return 0;
}

static int
validate_chunk(const struct suspect *s, const struct dcp_md_entry *entry,
               const struct dcp_md_chunk *chunk)
{
    const struct dcp_metadata *md = s->md;
    if (chunk->file != DCP_NO_FILE && chunk->file >= md->files_count) {
        return refuse(s, "the file is not in the file table");
    }
    uint64_t end;
    if (chunk->transforms > 1 ||
        dcp_add_overflows_u64(chunk->offset_bytes, chunk->length_bytes, &end) || end > INT64_MAX) {
        return refuse(s, "the record lies beyond the end of any file");
    }
    if (is_outside(chunk->dims, 2ull * entry->ndim, md->dims_count)) {
        return refuse(s, "the box lies outside the dimension table");
    }
    if (entry->kind == DCP_ITEM_BYTES) {
        return 0;
    }
    const uint64_t *size = md->dims + entry->size;
    const uint64_t *offsets = md->dims + chunk->dims;
    const uint64_t *sizes = offsets + entry->ndim;
    for (uint32_t i = 0; i < entry->ndim; i++) {
        if (is_outside(offsets[i], sizes[i], size[i])) {
            return refuse(s, "the box lies outside its tensor");
        }
    }
    return 0;
}

int
dcp_metadata_validate(const struct dcp_metadata *md, struct dcp_error *err)
{
    struct suspect s = {.md = md, .err = err};
    for (s.entry = 0; s.entry < md->entries_count; s.entry++) {
        const struct dcp_md_entry *entry = &md->entries[s.entry];
        s.chunk = 0;
        int rc = validate_entry(&s, entry);
        for (; rc == 0 && s.chunk < entry->chunks_count; s.chunk++) {
            rc = validate_chunk(&s, entry, &md->chunks[entry->first_chunk + s.chunk]);
        }
        if (rc != 0) {
            return rc;
        }
    }
    for (uint32_t f = 0; f < md->files_count; f++) {
        const struct dcp_md_file *file = &md->files[f];
        if (file->name_len == 0 || is_outside(file->name, file->name_len, md->strings_len) ||
            memchr(md->strings + file->name, 0, file->name_len) != NULL) {
            return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                                 "checking the metadata: the name of file %u is no file name; the "
                                 "file is damaged, restore it from a copy",
                                 f);
        }
    }
    return 0;
}

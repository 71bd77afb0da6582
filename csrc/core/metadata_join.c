/*
 * metadata_join.c: storage_data joined to the chunks it places.
 *
 * A key of storage_data is a MetadataIndex: name, offsets, and a hint, the position in the tensor's
 * list of chunks.  torch joins by a dict; here the hint is tried and checked against the offsets,
 * and only where it does not hold a table of all boxes is built, once.  Names come in the plans'
 * order, so the entry behind the last one is tried before its hash.  Files come in runs.
 *
 * Texts may be shared by reference, so a small pickle can ask for a huge amount of comparing: the
 * bytes compared are budgeted by the file's length.
 *
 * Threads: no state.
 */
#include "metadata_classes.h"

#include <string.h>

#include "dcp_hash.h"
#include "index_map.h"
#include "utf8.h"

enum {
    FILE_SEED = 0x666c,
    MAX_FILE_NAME_BYTES = 4096,
    /* Torch's own files compare less than one byte per byte. */
    BUDGET_PER_BYTE = 64,
};

struct joiner {
    struct dcp_md_walk *walk;
    struct dcp_index_map file_map;
    struct dcp_index_map box_map; /* chunks by entry and offsets; the first of equal ones */
    bool has_box_map;
    dcp_pvalue last_path; /* the text and the file of the record before */
    uint32_t last_file;
    dcp_pvalue last_fqn;
    uint64_t last_entry; /* index + 1; 0: none */
    uint64_t budget_bytes;
};

static const struct dcp_span no_key = {(const uint8_t *)"", 0};

static int
spend(struct joiner *j, struct dcp_span text)
{
    if (text.len > j->budget_bytes) {
        return dcp_md_walk_fail(j->walk, DCP_E_UNSUPPORTED, text, "a name that comes too often");
    }
    j->budget_bytes -= text.len;
    return 0;
}

/* ---- names ---- */

static bool
is_entry(const struct dcp_metadata *md, uint64_t e, struct dcp_span name)
{
    const struct dcp_md_entry *entry = &md->entries[e];
    return entry->name_len == name.len &&
           (name.len == 0 || memcmp(md->strings + entry->name, name.data, name.len) == 0);
}

/* Sets last_entry to the entry of this name. */
static int
find_entry(struct joiner *j, dcp_pvalue fqn)
{
    if (fqn == j->last_fqn) {
        return 0;
    }
    const struct dcp_metadata *md = &j->walk->md;
    struct dcp_span name = dcp_p_text(j->walk->vm, fqn);
    int rc = spend(j, name);
    if (rc != 0) {
        return rc;
    }
    /* last_entry is the index of the next one. */
    uint64_t next = j->last_entry < md->entries_count ? j->last_entry : 0;
    j->last_fqn = fqn;
    if (next < md->entries_count && is_entry(md, next, name)) {
        j->last_entry = next + 1;
        return 0;
    }
    const struct dcp_md_entry *found = dcp_metadata_find(md, (const char *)name.data, name.len);
    j->last_entry = found == NULL ? 0 : (uint64_t)(found - md->entries) + 1;
    return 0;
}

/* Sets last_file to the file of this name, which is added when new. */
static int
find_file(struct joiner *j, dcp_pvalue path)
{
    if (path == j->last_path) {
        return 0;
    }
    struct dcp_md_walk *walk = j->walk;
    struct dcp_span text = dcp_p_text(walk->vm, path);
    if (text.len > MAX_FILE_NAME_BYTES || dcp_utf8_check(text.data, text.len) != DCP_UTF8_VALID) {
        return dcp_md_walk_fail(walk, DCP_E_CORRUPT, no_key,
                                "a relative_path that is no file name");
    }
    int rc = spend(j, text);
    if (rc != 0) {
        return rc;
    }
    uint64_t hash = dcp_hash64(text.data, text.len, FILE_SEED);
    uint32_t probe = 0;
    uint32_t file;
    while ((file = dcp_index_map_next(&j->file_map, hash, &probe)) != DCP_INDEX_NONE) {
        const struct dcp_md_file *known = &walk->names.files[file];
        if (known->name_len == text.len &&
            memcmp(walk->names.strings.data + known->name, text.data, text.len) == 0) {
            break;
        }
    }
    if (file == DCP_INDEX_NONE) {
        rc = dcp_md_names_add_file(&walk->names, text.data, text.len, &file, walk->err);
        walk->md.strings = (char *)walk->names.strings.data;
        if (rc == 0) {
            rc = dcp_index_map_add(&j->file_map, hash, file, walk->err);
        }
    }
    j->last_path = path;
    j->last_file = file;
    return rc;
}

/* ---- boxes ---- */

static uint64_t
hash_box(uint64_t entry, const uint64_t *offsets, uint32_t ndim)
{
    return dcp_hash64(offsets, ndim * sizeof *offsets, entry);
}

/* The first chunk of an entry at these offsets. */
static uint32_t
find_box(const struct joiner *j, uint64_t e, const uint64_t *offsets, uint64_t hash)
{
    const struct dcp_metadata *md = &j->walk->md;
    const struct dcp_md_entry *entry = &md->entries[e];
    uint32_t probe = 0;
    uint32_t c;
    while ((c = dcp_index_map_next(&j->box_map, hash, &probe)) != DCP_INDEX_NONE) {
        if (c >= entry->first_chunk && c - entry->first_chunk < entry->chunks_count &&
            memcmp(md->dims + md->chunks[c].dims, offsets, entry->ndim * sizeof *offsets) == 0) {
            break;
        }
    }
    return c;
}

static int
make_box_map(struct joiner *j)
{
    if (j->has_box_map) {
        return 0;
    }
    const struct dcp_metadata *md = &j->walk->md;
    if (md->chunks_count >= DCP_INDEX_NONE) {
        return dcp_md_walk_fail(j->walk, DCP_E_UNSUPPORTED, no_key, "more than 2^32 chunks");
    }
    for (uint64_t e = 0; e < md->entries_count; e++) {
        const struct dcp_md_entry *entry = &md->entries[e];
        for (uint64_t c = 0; c < entry->chunks_count; c++) {
            uint32_t chunk = (uint32_t)(entry->first_chunk + c);
            const uint64_t *offsets = md->dims + md->chunks[chunk].dims;
            uint64_t hash = hash_box(e, offsets, entry->ndim);
            if (find_box(j, e, offsets, hash) != DCP_INDEX_NONE) {
                continue;
            }
            int rc = dcp_index_map_add(&j->box_map, hash, chunk, j->walk->err);
            if (rc != 0) {
                return rc;
            }
        }
    }
    j->has_box_map = true;
    return 0;
}

/* The chunk of entry `e` that a key means; NULL when it means none. */
static int
find_chunk(struct joiner *j, uint64_t e, dcp_pvalue key, struct dcp_md_chunk **ret)
{
    const struct dcp_pickle_vm *vm = j->walk->vm;
    struct dcp_metadata *md = &j->walk->md;
    const struct dcp_md_entry *entry = &md->entries[e];
    dcp_pvalue offset = dcp_p_field(vm, key, DCP_INDEX_OFFSET);
    bool has_offset = dcp_p_is_custom(offset, DCP_CUSTOM_SIZE);
    *ret = NULL;
    if (entry->kind == DCP_ITEM_BYTES) {
        *ret = has_offset ? NULL : &md->chunks[entry->first_chunk];
        return 0;
    }
    if (!has_offset || dcp_md_size_ndim(vm, offset) != entry->ndim) {
        return 0;
    }
    uint64_t offsets[DCP_MAX_DIMS];
    for (uint32_t i = 0; i < entry->ndim; i++) {
        offsets[i] = dcp_md_size_at(vm, offset, i);
    }
    size_t bytes = entry->ndim * sizeof *offsets;
    dcp_pvalue hint = dcp_p_field(vm, key, DCP_INDEX_INDEX);
    if (dcp_p_tag(hint) == DCP_P_INT && dcp_p_payload(hint) < entry->chunks_count) {
        struct dcp_md_chunk *chunk = &md->chunks[entry->first_chunk + dcp_p_payload(hint)];
        if (memcmp(md->dims + chunk->dims, offsets, bytes) == 0) {
            *ret = chunk;
            return 0;
        }
    }
    int rc = make_box_map(j);
    if (rc != 0) {
        return rc;
    }
    uint32_t c = find_box(j, e, offsets, hash_box(e, offsets, entry->ndim));
    *ret = c == DCP_INDEX_NONE ? NULL : &md->chunks[c];
    return 0;
}

/* ---- records ---- */

static bool
has_transforms(const struct dcp_pickle_vm *vm, dcp_pvalue transforms)
{
    switch (dcp_p_tag(transforms)) {
    case DCP_P_UNSET:
    case DCP_P_NONE:
        return false;
    case DCP_P_LIST:
        return dcp_p_sequence_count(vm, transforms) != 0;
    default:
        return true;
    }
}

static int
join_record(struct joiner *j, dcp_pvalue key, dcp_pvalue info)
{
    struct dcp_md_walk *walk = j->walk;
    const struct dcp_pickle_vm *vm = walk->vm;
    if (!dcp_p_is_object(key, DCP_CLASS_INDEX) || !dcp_p_is_object(info, DCP_CLASS_INFO)) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, no_key, "storage_data is not of torch");
    }
    dcp_pvalue fqn = dcp_p_field(vm, key, DCP_INDEX_FQN);
    dcp_pvalue path = dcp_p_field(vm, info, DCP_INFO_PATH);
    dcp_pvalue offset = dcp_p_field(vm, info, DCP_INFO_OFFSET);
    dcp_pvalue length = dcp_p_field(vm, info, DCP_INFO_LENGTH);
    if (dcp_p_tag(fqn) != DCP_P_TEXT || dcp_p_tag(path) != DCP_P_TEXT ||
        dcp_p_tag(offset) != DCP_P_INT || dcp_p_tag(length) != DCP_P_INT) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, no_key,
                                "a record of storage_data that torch did not write");
    }
    if (dcp_p_int(offset) < 0 || dcp_p_int(length) < 0) {
        return dcp_md_walk_fail(walk, DCP_E_CORRUPT, dcp_p_text(vm, fqn),
                                "its record lies before the start of the file");
    }
    int rc = find_file(j, path);
    if (rc == 0) {
        rc = find_entry(j, fqn);
    }
    /* A record that no key wants stays unread; its file is known all the same. */
    if (rc != 0 || j->last_entry == 0) {
        return rc;
    }
    struct dcp_md_chunk *chunk;
    rc = find_chunk(j, j->last_entry - 1, key, &chunk);
    if (rc == 0 && chunk != NULL) {
        chunk->file = j->last_file;
        chunk->offset_bytes = (uint64_t)dcp_p_int(offset);
        chunk->length_bytes = (uint64_t)dcp_p_int(length);
        chunk->transforms = has_transforms(vm, dcp_p_field(vm, info, DCP_INFO_TRANSFORMS));
    }
    return rc;
}

static void
copy_place(struct dcp_md_chunk *to, const struct dcp_md_chunk *from)
{
    to->file = from->file;
    to->offset_bytes = from->offset_bytes;
    to->length_bytes = from->length_bytes;
    to->transforms = from->transforms;
}

/* Chunks of equal offsets (empty shards) have one key, so only one of them was placed: the others
 * lie where it does. */
static int
place_equal_boxes(struct joiner *j)
{
    struct dcp_metadata *md = &j->walk->md;
    bool is_complete = true;
    for (uint64_t c = 0; c < md->chunks_count && is_complete; c++) {
        is_complete = md->chunks[c].file != DCP_NO_FILE;
    }
    int rc = is_complete ? 0 : make_box_map(j);
    /* First towards the first of each, then from it. */
    for (unsigned pass = 0; rc == 0 && !is_complete && pass < 2; pass++) {
        for (uint64_t e = 0; e < md->entries_count; e++) {
            const struct dcp_md_entry *entry = &md->entries[e];
            for (uint64_t c = 0; c < entry->chunks_count; c++) {
                struct dcp_md_chunk *chunk = &md->chunks[entry->first_chunk + c];
                const uint64_t *offsets = md->dims + chunk->dims;
                uint32_t first = find_box(j, e, offsets, hash_box(e, offsets, entry->ndim));
                DCP_ASSERT(first != DCP_INDEX_NONE);
                struct dcp_md_chunk *to = pass == 0 ? &md->chunks[first] : chunk;
                const struct dcp_md_chunk *from = pass == 0 ? chunk : &md->chunks[first];
                if (to->file == DCP_NO_FILE) {
                    copy_place(to, from);
                }
            }
        }
    }
    return rc;
}

static int
join(struct joiner *j, dcp_pvalue storage_data)
{
    const struct dcp_pickle_vm *vm = j->walk->vm;
    int rc = dcp_metadata_index_names(&j->walk->md, j->walk->err);
    struct dcp_p_iter it = dcp_p_iter_of(vm, storage_data);
    dcp_pvalue key;
    while (rc == 0 && (key = dcp_p_next(vm, &it)) != DCP_P_UNSET) {
        rc = join_record(j, key, dcp_p_next(vm, &it));
    }
    return rc != 0 ? rc : place_equal_boxes(j);
}

int
dcp_md_join(struct dcp_md_walk *walk, dcp_pvalue storage_data)
{
    if (dcp_p_tag(storage_data) != DCP_P_DICT) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, no_key, "storage_data is no dict");
    }
    int rc = dcp_buf_check(&walk->names.strings, walk->err);
    if (rc != 0) {
        return rc;
    }
    struct joiner j = {
        .walk = walk,
        .budget_bytes = BUDGET_PER_BYTE * (uint64_t)walk->vm->len,
    };
    /* The table of names reads the strings, which keep growing by file names: lent meanwhile. */
    walk->md.strings = (char *)walk->names.strings.data;
    rc = join(&j, storage_data);
    walk->md.strings = NULL;
    dcp_index_map_clean_up(&j.file_map);
    dcp_index_map_clean_up(&j.box_map);
    return rc != 0 ? rc : dcp_md_names_move(&walk->names, &walk->md, walk->err);
}

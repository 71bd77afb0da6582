/*
 * metadata_walk.c: the objects of an unpickled Metadata as the flat form.
 *
 * Two passes over state_dict_metadata: the first counts, so that every array is allocated once and
 * its size is checked against the file's (objects may be shared by reference, so a small pickle
 * can stand for a huge structure), the second fills.  Nothing recurses: the form has fixed depth,
 * and what is deeper is not torch's.
 *
 * Threads: no state.
 */
#include "metadata_classes.h"

#include <stdio.h>

#include "utf8.h"

enum {
    /* What the bytes of a file can hold.  A chunk that is listed and placed takes 50 bytes and
     * more, or 17 if nothing places it; a key as much.  Offsets and sizes of 64 dimensions, the
     * sizes shared, take more than one byte for each number. */
    MIN_CHUNK_BYTES = 8,
    MIN_ENTRY_BYTES = 8,
    /* Keys and chunks that any file may have, however short. */
    ROOM_COUNT = 64,
};

static const struct dcp_span no_key = {(const uint8_t *)"", 0};

int
dcp_md_walk_fail(struct dcp_md_walk *walk, int code, struct dcp_span key, const char *what)
{
    char quoted[DCP_QUOTE_BYTES];
    (void)dcp_pickle_quote(quoted, 0, key);
    bool is_corrupt = code == DCP_E_CORRUPT;
    const char *note = is_corrupt ? "" : walk->vm->note;
    return dcp_error_set(walk->err, code, 0, NULL, "reading the metadata%s%s: %s%s%s%s; %s",
                         quoted[0] == 0 ? "" : ", key ", quoted, what, note[0] == 0 ? "" : " (",
                         note, note[0] == 0 ? "" : ")",
                         is_corrupt ? "the file is damaged, restore it from a copy"
                                    : "only Python's own reader may understand it");
}

static int
check_text(struct dcp_md_walk *walk, struct dcp_span text)
{
    switch (dcp_utf8_check(text.data, text.len)) {
    case DCP_UTF8_VALID:
        break;
    case DCP_UTF8_SURROGATES:
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, text, "a name that is not strict UTF-8");
    case DCP_UTF8_INVALID:
        return dcp_md_walk_fail(walk, DCP_E_CORRUPT, text, "a name that is no UTF-8");
    }
    if (text.len > DCP_MAX_FQN_BYTES) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, text, "a name of more than 1 MiB");
    }
    return 0;
}

/* ---- counting ---- */

struct totals {
    uint64_t entries, chunks, dims;
    uint64_t name_bytes;
};

static int
count_tensor(struct dcp_md_walk *walk, struct dcp_span key, dcp_pvalue tensor, struct totals *n)
{
    const struct dcp_pickle_vm *vm = walk->vm;
    dcp_pvalue properties = dcp_p_field(vm, tensor, DCP_TENSOR_PROPERTIES);
    dcp_pvalue size = dcp_p_field(vm, tensor, DCP_TENSOR_SIZE);
    dcp_pvalue chunks = dcp_p_field(vm, tensor, DCP_TENSOR_CHUNKS);
    if (!dcp_p_is_object(properties, DCP_CLASS_PROPERTIES) ||
        dcp_p_tag(dcp_p_field(vm, properties, 0)) != DCP_P_INT ||
        !dcp_p_is_custom(size, DCP_CUSTOM_SIZE) || dcp_p_tag(chunks) != DCP_P_LIST) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, key, "a tensor that torch did not write");
    }
    uint64_t count = dcp_p_sequence_count(vm, chunks);
    uint64_t ndim = dcp_md_size_ndim(vm, size);
    /* No overflow: each list is no longer than the file has bytes, and the sums stay below 2^42 or
     * this fails. */
    n->chunks += count;
    n->dims += ndim + 2 * ndim * count;
    if (n->chunks > ROOM_COUNT + vm->len / MIN_CHUNK_BYTES ||
        n->dims > ROOM_COUNT * DCP_MAX_DIMS + (uint64_t)vm->len) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, key,
                                "far more chunks than the file's length can hold");
    }
    return 0;
}

static int
count(struct dcp_md_walk *walk, dcp_pvalue state, struct totals *n)
{
    const struct dcp_pickle_vm *vm = walk->vm;
    struct dcp_p_iter it = dcp_p_iter_of(vm, state);
    dcp_pvalue key;
    while ((key = dcp_p_next(vm, &it)) != DCP_P_UNSET) {
        dcp_pvalue value = dcp_p_next(vm, &it);
        if (dcp_p_tag(key) != DCP_P_TEXT) {
            return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, no_key, "a key that is no text");
        }
        struct dcp_span name = dcp_p_text(vm, key);
        n->name_bytes += name.len;
        if (n->name_bytes > vm->len || n->entries > ROOM_COUNT + vm->len / MIN_ENTRY_BYTES) {
            return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, name, "a name that comes twice");
        }
        int rc = check_text(walk, name);
        if (rc == 0 && dcp_p_is_object(value, DCP_CLASS_TENSOR)) {
            rc = count_tensor(walk, name, value, n);
        } else if (rc == 0 && dcp_p_is_object(value, DCP_CLASS_BYTES) &&
                   dcp_p_field(vm, value, 0) == DCP_P_UNSET) {
            n->chunks++;
        } else if (rc == 0) {
            rc = dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, name, "neither a tensor nor an object");
        }
        if (rc != 0) {
            return rc;
        }
        n->entries++;
    }
    return 0;
}

/* ---- filling ---- */

static void
put_size(struct dcp_md_walk *walk, dcp_pvalue size, uint32_t ndim)
{
    DCP_ASSERT(walk->used_dims + ndim <= walk->md.dims_count);
    uint64_t *dims = walk->md.dims + walk->used_dims;
    for (uint32_t i = 0; i < ndim; i++) {
        dims[i] = dcp_md_size_at(walk->vm, size, i);
    }
    walk->used_dims += ndim;
}

static int
fill_chunk(struct dcp_md_walk *walk, struct dcp_span key, dcp_pvalue chunk, uint32_t ndim)
{
    const struct dcp_pickle_vm *vm = walk->vm;
    if (!dcp_p_is_object(chunk, DCP_CLASS_CHUNK)) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, key, "a chunk that torch did not write");
    }
    dcp_pvalue offsets = dcp_p_field(vm, chunk, DCP_CHUNK_OFFSETS);
    dcp_pvalue sizes = dcp_p_field(vm, chunk, DCP_CHUNK_SIZES);
    if (!dcp_p_is_custom(offsets, DCP_CUSTOM_SIZE) || !dcp_p_is_custom(sizes, DCP_CUSTOM_SIZE)) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, key, "a chunk without torch.Size");
    }
    if (dcp_md_size_ndim(vm, offsets) != ndim || dcp_md_size_ndim(vm, sizes) != ndim) {
        return dcp_md_walk_fail(walk, DCP_E_CORRUPT, key, "a chunk of another rank");
    }
    walk->md.chunks[walk->used_chunks++] = (struct dcp_md_chunk){
        .dims = walk->used_dims,
        .file = DCP_NO_FILE,
    };
    put_size(walk, offsets, ndim);
    put_size(walk, sizes, ndim);
    return 0;
}

static int
fill_entry(struct dcp_md_walk *walk, struct dcp_md_entry *entry, struct dcp_span key,
           dcp_pvalue value)
{
    const struct dcp_pickle_vm *vm = walk->vm;
    *entry = (struct dcp_md_entry){
        .name = walk->names.strings.len,
        .name_len = (uint32_t)key.len,
        .kind = DCP_ITEM_BYTES,
        .size = walk->used_dims,
        .first_chunk = walk->used_chunks,
        .chunks_count = 1,
    };
    dcp_buf_put(&walk->names.strings, key.data, key.len);
    if (dcp_p_class(value) == DCP_CLASS_BYTES) {
        walk->md.chunks[walk->used_chunks++] = (struct dcp_md_chunk){
            .dims = walk->used_dims,
            .file = DCP_NO_FILE,
        };
        return 0;
    }
    dcp_pvalue properties = dcp_p_field(vm, value, DCP_TENSOR_PROPERTIES);
    uint64_t packed = dcp_p_payload(dcp_p_field(vm, properties, 0));
    dcp_pvalue size = dcp_p_field(vm, value, DCP_TENSOR_SIZE);
    dcp_pvalue chunks = dcp_p_field(vm, value, DCP_TENSOR_CHUNKS);
    entry->kind = DCP_ITEM_TENSOR;
    entry->dtype = (uint8_t)(packed >> 8);
    entry->props = (uint8_t)packed;
    entry->ndim = (uint8_t)dcp_md_size_ndim(vm, size);
    entry->chunks_count = dcp_p_sequence_count(vm, chunks);
    put_size(walk, size, entry->ndim);
    struct dcp_p_iter it = dcp_p_iter_of(vm, chunks);
    dcp_pvalue chunk;
    while ((chunk = dcp_p_next(vm, &it)) != DCP_P_UNSET) {
        int rc = fill_chunk(walk, key, chunk, entry->ndim);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

static int
walk_state(struct dcp_md_walk *walk, dcp_pvalue state)
{
    const struct dcp_pickle_vm *vm = walk->vm;
    if (dcp_p_tag(state) != DCP_P_DICT) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, no_key, "state_dict_metadata is no dict");
    }
    struct totals n = {0};
    int rc = count(walk, state, &n);
    if (rc == 0) {
        rc = dcp_metadata_alloc(&walk->md, n.entries, n.chunks, n.dims, walk->err);
    }
    struct dcp_p_iter it = dcp_p_iter_of(vm, state);
    for (uint64_t e = 0; rc == 0 && e < n.entries; e++) {
        dcp_pvalue key = dcp_p_next(vm, &it);
        rc = fill_entry(walk, &walk->md.entries[e], dcp_p_text(vm, key), dcp_p_next(vm, &it));
    }
    return rc;
}

/* ---- the rest ---- */

static bool
is_absent(dcp_pvalue v)
{
    return v == DCP_P_UNSET || dcp_p_tag(v) == DCP_P_NONE;
}

/* {name: path}, as flatten_state_dict makes it; the paths are not kept. */
static bool
is_planner_data(const struct dcp_pickle_vm *vm, dcp_pvalue planner_data)
{
    if (dcp_p_tag(planner_data) != DCP_P_DICT) {
        return is_absent(planner_data);
    }
    struct dcp_p_iter it = dcp_p_iter_of(vm, planner_data);
    dcp_pvalue key;
    while ((key = dcp_p_next(vm, &it)) != DCP_P_UNSET) {
        if (dcp_p_tag(key) != DCP_P_TEXT ||
            !dcp_p_tuple_has(vm, dcp_p_next(vm, &it), DCP_P_ALL_INTS_OR_TEXTS)) {
            return false;
        }
    }
    return true;
}

/* Notes what is a program's own where a stock load looks for nothing. */
static void
note_programs_own(struct dcp_md_walk *walk, dcp_pvalue root)
{
    const struct dcp_pickle_vm *vm = walk->vm;
    dcp_pvalue meta = dcp_p_field(vm, root, DCP_METADATA_META);
    dcp_pvalue version = dcp_p_field(vm, root, DCP_METADATA_VERSION);
    const char *what = vm->note;
    if (what[0] != 0) {
        (void)snprintf(walk->md.foreign, sizeof walk->md.foreign, "%s", what);
        return;
    }
    if (!is_planner_data(vm, dcp_p_field(vm, root, DCP_METADATA_PLANNER))) {
        what = "planner_data is a program's own";
    } else if (!is_absent(meta) && !dcp_p_is_object(meta, DCP_CLASS_META)) {
        what = "storage_meta is a program's own";
    } else if (!is_absent(version) && dcp_p_tag(version) != DCP_P_TEXT) {
        what = "version is a program's own";
    }
    (void)snprintf(walk->md.foreign, sizeof walk->md.foreign, "%s", what);
}

static int
walk_root(struct dcp_md_walk *walk, dcp_pvalue root)
{
    const struct dcp_pickle_vm *vm = walk->vm;
    if (!dcp_p_is_object(root, DCP_CLASS_METADATA)) {
        return dcp_md_walk_fail(walk, DCP_E_UNSUPPORTED, no_key, "the pickle is no Metadata");
    }
    note_programs_own(walk, root);
    int rc = walk_state(walk, dcp_p_field(vm, root, DCP_METADATA_STATE));
    if (rc == 0) {
        rc = dcp_md_join(walk, dcp_p_field(vm, root, DCP_METADATA_STORAGE));
    }
    return rc != 0 ? rc : dcp_metadata_validate(&walk->md, walk->err);
}

int
dcp_metadata_from_pickle(const struct dcp_pickle_vm *vm, dcp_pvalue root,
                         struct dcp_metadata *ret_md, struct dcp_error *err)
{
    struct dcp_md_walk walk = {.vm = vm, .err = err};
    int rc = walk_root(&walk, root);
    dcp_md_names_clean_up(&walk.names);
    if (rc != 0) {
        dcp_metadata_clean_up(&walk.md);
        return rc;
    }
    *ret_md = walk.md;
    return 0;
}

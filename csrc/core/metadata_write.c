/*
 * metadata_write.c: the whole `.metadata` image: pickle, index, accepted saves, footer.
 *
 * What stock torch unpickles from it is equal to the Metadata that stock would have written, with
 * the same order of dicts and attributes, but in half the bytes and half the load time: classes
 * and attribute names are memoised first, so that their numbers fit one byte, and equal immutable
 * values are shared (metadata_values.c).  Chunks stay objects of their own, because a program may
 * edit one of them.
 *
 * The pickle is written from the flat form (metadata_flatten.c), which the index repeats, so
 * readers of either see the same.  Everything is linear in items.
 *
 * Threads: no state.
 */
#include "metadata_private.h"

#include <string.h>

#include "metadata_emit.h"

enum {
    /* Python's pickler closes a run of items after as many; readers keep their stacks small. */
    BATCH_ITEMS = 1000,
    /* First guesses of the image's size, so that it grows once or twice at most. */
    BYTES_PER_CHUNK = 96,
    BYTES_PER_NAME = 128,
};

/* ---- pieces ---- */

static void
begin_attributes(struct dcp_pickle_out *out)
{
    dcp_pickle_out_op(out, DCP_OP_EMPTY_DICT);
    dcp_pickle_out_op(out, DCP_OP_MARK);
}

static void
end_attributes(struct dcp_pickle_out *out)
{
    dcp_pickle_out_op(out, DCP_OP_SETITEMS);
    dcp_pickle_out_op(out, DCP_OP_BUILD);
}

/* Before and after item `i` of `count` that go into a list or dict by `close` (APPENDS or
 * SETITEMS). */
static void
begin_batch(struct dcp_pickle_out *out, uint64_t i)
{
    if (i % BATCH_ITEMS == 0) {
        dcp_pickle_out_op(out, DCP_OP_MARK);
    }
}

static void
end_batch(struct dcp_pickle_out *out, uint64_t i, uint64_t count, enum dcp_pickle_op close)
{
    if ((i + 1) % BATCH_ITEMS == 0 || i + 1 == count) {
        dcp_pickle_out_op(out, close);
    }
}

static void
put_text(struct dcp_pickle_out *out, const char *text)
{
    dcp_pickle_out_text(out, text, strlen(text));
}

static void
put_text_or_none(struct dcp_pickle_out *out, const char *text)
{
    if (text == NULL) {
        dcp_pickle_out_op(out, DCP_OP_NONE);
    } else {
        put_text(out, text);
    }
}

/* ---- state_dict_metadata ---- */

static int
put_chunk(struct dcp_md_writer *w, uint64_t c, uint32_t ndim)
{
    struct dcp_pickle_out *out = &w->out;
    const uint64_t *dims = w->md.dims + w->md.chunks[c].dims;
    uint32_t sizes_memo;
    dcp_md_begin_object(out, DCP_MD_CHUNK);
    begin_attributes(out);
    dcp_pickle_out_get(out, DCP_MD_KEY_OFFSETS);
    int rc = dcp_md_put_size(w, dims, ndim, &w->chunk_memo[c]);
    if (rc != 0) {
        return rc;
    }
    dcp_pickle_out_get(out, DCP_MD_KEY_SIZES);
    rc = dcp_md_put_size(w, dims + ndim, ndim, &sizes_memo);
    end_attributes(out);
    return rc;
}

static int
put_tensor(struct dcp_md_writer *w, const struct dcp_md_entry *entry)
{
    struct dcp_pickle_out *out = &w->out;
    uint32_t size_memo;
    dcp_md_begin_object(out, DCP_MD_TENSOR);
    begin_attributes(out);
    dcp_pickle_out_get(out, DCP_MD_KEY_PROPERTIES);
    dcp_md_put_properties(w, entry->dtype, entry->props);
    dcp_pickle_out_get(out, DCP_MD_KEY_SIZE);
    int rc = dcp_md_put_size(w, w->md.dims + entry->size, entry->ndim, &size_memo);
    dcp_pickle_out_get(out, DCP_MD_KEY_CHUNKS);
    dcp_pickle_out_op(out, DCP_OP_EMPTY_LIST);
    uint64_t count = entry->chunks_count;
    if (rc == 0 && count == 1) {
        rc = put_chunk(w, entry->first_chunk, entry->ndim);
        dcp_pickle_out_op(out, DCP_OP_APPEND);
        count = 0;
    }
    for (uint64_t c = 0; rc == 0 && c < count; c++) {
        begin_batch(out, c);
        rc = put_chunk(w, entry->first_chunk + c, entry->ndim);
        end_batch(out, c, count, DCP_OP_APPENDS);
    }
    end_attributes(out);
    return rc;
}

static int
put_state_dict_metadata(struct dcp_md_writer *w)
{
    struct dcp_pickle_out *out = &w->out;
    put_text(out, "state_dict_metadata");
    dcp_pickle_out_op(out, DCP_OP_EMPTY_DICT);
    for (uint64_t e = 0; e < w->md.entries_count; e++) {
        const struct dcp_md_entry *entry = &w->md.entries[e];
        begin_batch(out, e);
        dcp_pickle_out_text(out, w->md.strings + entry->name, entry->name_len);
        w->entry_memo[e] = dcp_pickle_out_memoize(out);
        if (entry->kind == DCP_ITEM_BYTES) {
            dcp_md_begin_object(out, DCP_MD_BYTES);
        } else {
            int rc = put_tensor(w, entry);
            if (rc != 0) {
                return rc;
            }
        }
        end_batch(out, e, w->md.entries_count, DCP_OP_SETITEMS);
    }
    return 0;
}

/* ---- planner_data ---- */

static int
put_path(struct dcp_md_writer *w, const struct dcp_name *name)
{
    static const enum dcp_pickle_op close[] = {DCP_OP_EMPTY_TUPLE, DCP_OP_TUPLE1, DCP_OP_TUPLE2,
                                               DCP_OP_TUPLE3, DCP_OP_TUPLE};
    struct dcp_cursor c = {.data = name->path, .len = name->path_len};
    bool is_long = name->path_parts > 3;
    if (is_long) {
        dcp_pickle_out_op(&w->out, DCP_OP_MARK);
    }
    uint32_t parts = 0;
    bool is_int;
    uint64_t number;
    struct dcp_span text;
    while (dcp_path_next(&c, &is_int, &number, &text)) {
        parts++;
        if (is_int) {
            dcp_pickle_out_uint(&w->out, number);
            continue;
        }
        int rc = dcp_md_put_text(w, text.data, text.len);
        if (rc != 0) {
            return rc;
        }
    }
    if (c.failed || parts != name->path_parts) {
        return dcp_error_set(w->err, DCP_E_INTERNAL, 0, NULL,
                             "writing metadata: the path of %.*s is damaged; this is a bug, please "
                             "report it",
                             (int)dcp_min_u64(name->fqn_len, 200), name->fqn);
    }
    dcp_pickle_out_op(&w->out, close[is_long ? 4 : parts]);
    return 0;
}

static int
put_planner_data(struct dcp_md_writer *w)
{
    struct dcp_pickle_out *out = &w->out;
    put_text(out, "planner_data");
    if (w->global->plans_count == 0 || !w->global->plans[0].has_paths) {
        dcp_pickle_out_op(out, DCP_OP_NONE);
        return 0;
    }
    int rc = dcp_metadata_index_names(&w->md, w->err);
    if (rc == 0) {
        rc = dcp_metadata_merge_paths(w->global, &w->md, &w->paths, &w->paths_count, w->err);
    }
    dcp_pickle_out_op(out, DCP_OP_EMPTY_DICT);
    for (uint64_t i = 0; rc == 0 && i < w->paths_count; i++) {
        const struct dcp_md_path *path = &w->paths[i];
        const struct dcp_name *name = &w->global->plans[path->plan].names[path->name];
        begin_batch(out, i);
        if (path->entry == DCP_NO_FILE) {
            dcp_pickle_out_text(out, name->fqn, name->fqn_len);
        } else {
            dcp_pickle_out_get(out, w->entry_memo[path->entry]);
        }
        rc = put_path(w, name);
        end_batch(out, i, w->paths_count, DCP_OP_SETITEMS);
    }
    return rc;
}

/* ---- storage_data ---- */

static void
put_index_key(struct dcp_md_writer *w, const struct dcp_md_record *record)
{
    struct dcp_pickle_out *out = &w->out;
    const struct dcp_md_entry *entry = &w->md.entries[record->entry];
    dcp_md_begin_object(out, DCP_MD_INDEX);
    begin_attributes(out);
    dcp_pickle_out_get(out, DCP_MD_KEY_FQN);
    dcp_pickle_out_get(out, w->entry_memo[record->entry]);
    dcp_pickle_out_get(out, DCP_MD_KEY_INDEX);
    if (entry->kind == DCP_ITEM_BYTES) {
        dcp_pickle_out_op(out, DCP_OP_NONE);
    } else {
        dcp_pickle_out_uint(out, record->hint);
        dcp_pickle_out_get(out, DCP_MD_KEY_OFFSET);
        dcp_pickle_out_get(out, w->chunk_memo[entry->first_chunk + record->hint]);
    }
    end_attributes(out);
}

static void
put_storage_info(struct dcp_md_writer *w, const struct dcp_md_chunk *chunk)
{
    struct dcp_pickle_out *out = &w->out;
    DCP_ASSERT(chunk->file < w->md.files_count);
    dcp_md_begin_object(out, DCP_MD_STORAGE_INFO);
    begin_attributes(out);
    dcp_pickle_out_get(out, DCP_MD_KEY_RELATIVE_PATH);
    uint32_t *memo = &w->file_memo[chunk->file];
    if (*memo != DCP_MD_NO_MEMO) {
        dcp_pickle_out_get(out, *memo);
    } else {
        const struct dcp_md_file *file = &w->md.files[chunk->file];
        dcp_pickle_out_text(out, w->md.strings + file->name, file->name_len);
        *memo = dcp_pickle_out_memoize(out);
    }
    dcp_pickle_out_get(out, DCP_MD_KEY_OFFSET);
    dcp_pickle_out_uint(out, chunk->offset_bytes);
    dcp_pickle_out_get(out, DCP_MD_KEY_LENGTH);
    dcp_pickle_out_uint(out, chunk->length_bytes);
    end_attributes(out);
}

static void
put_storage_data(struct dcp_md_writer *w)
{
    struct dcp_pickle_out *out = &w->out;
    put_text(out, "storage_data");
    dcp_pickle_out_op(out, DCP_OP_EMPTY_DICT);
    for (uint64_t r = 0; r < w->records_count; r++) {
        const struct dcp_md_record *record = &w->records[r];
        begin_batch(out, r);
        put_index_key(w, record);
        uint64_t first = w->md.entries[record->entry].first_chunk;
        put_storage_info(w, &w->md.chunks[first + record->hint]);
        end_batch(out, r, w->records_count, DCP_OP_SETITEMS);
    }
}

/* ---- storage_meta and version ---- */

static void
put_storage_meta(struct dcp_md_writer *w)
{
    struct dcp_pickle_out *out = &w->out;
    const struct dcp_storage_meta *meta = w->meta;
    put_text(out, "storage_meta");
    dcp_md_begin_object(out, DCP_MD_STORAGE_META);
    begin_attributes(out);
    put_text(out, "checkpoint_id");
    if (meta->checkpoint_id != NULL && meta->checkpoint_id_is_path) {
        put_text(out, "pathlib");
        put_text(out, "PosixPath");
        dcp_pickle_out_op(out, DCP_OP_STACK_GLOBAL);
        put_text(out, meta->checkpoint_id);
        dcp_pickle_out_op(out, DCP_OP_TUPLE1);
        dcp_pickle_out_op(out, DCP_OP_REDUCE);
    } else {
        put_text_or_none(out, meta->checkpoint_id);
    }
    put_text(out, "save_id");
    put_text_or_none(out, meta->storage_save_id);
    put_text(out, "load_id");
    dcp_pickle_out_op(out, DCP_OP_NONE);
    put_text(out, "modules");
    dcp_pickle_out_op(out, DCP_OP_EMPTY_LIST);
    end_attributes(out);
    put_text(out, "version");
    put_text_or_none(out, meta->version);
}

/* ---- the image ---- */

static int
put_pickle(struct dcp_md_writer *w, struct dcp_buf *buf)
{
    dcp_pickle_out_begin(&w->out, buf);
    dcp_md_put_fixed(w);
    dcp_md_begin_object(&w->out, DCP_MD_METADATA);
    begin_attributes(&w->out);
    int rc = put_state_dict_metadata(w);
    if (rc == 0) {
        rc = put_planner_data(w);
    }
    if (rc != 0) {
        return rc;
    }
    put_storage_data(w);
    put_storage_meta(w);
    end_attributes(&w->out);
    dcp_pickle_out_end(&w->out);
    return dcp_buf_check(buf, w->err);
}

/* The flat form, checked before anything is made of it, and the memo tables. */
static int
prepare(struct dcp_md_writer *w, uint64_t n0, const struct dcp_save_id *save_id,
        const struct dcp_links *links, struct dcp_buf *buf)
{
    int rc = links == NULL ? 0 : dcp_metadata_check_links(w->global, links, save_id, n0, w->err);
    if (rc == 0) {
        rc = dcp_metadata_from_plan(w->global, links, n0, &w->md, &w->records, &w->records_count,
                                    w->err);
    }
    if (rc == 0 && links != NULL) {
        rc = dcp_metadata_collect_accepted(&w->md, links, w->err);
    }
    if (rc != 0) {
        return rc;
    }
    struct dcp_error why = {0};
    if (dcp_metadata_validate(&w->md, &why) != 0) {
        return dcp_error_set(w->err, DCP_E_LIMIT, 0, NULL,
                             "writing metadata of a plan beyond what readers accept (%s); use "
                             "torch's own writer",
                             why.message);
    }
    size_t chunks_count = (size_t)w->md.chunks_count;
    w->entry_memo = dcp_malloc_array((size_t)w->md.entries_count, sizeof *w->entry_memo);
    w->chunk_memo = dcp_malloc_array(chunks_count, sizeof *w->chunk_memo);
    w->file_memo = dcp_malloc_array(w->md.files_count, sizeof *w->file_memo);
    size_t guess = chunks_count * BYTES_PER_CHUNK + (size_t)w->md.entries_count * BYTES_PER_NAME;
    if (w->entry_memo == NULL || w->chunk_memo == NULL || w->file_memo == NULL ||
        dcp_buf_reserve(buf, guess) != 0) {
        return dcp_md_no_memory(w);
    }
    memset(w->file_memo, 0xFF, w->md.files_count * sizeof *w->file_memo);
    dcp_md_writer_init(w);
    return 0;
}

static int
write_image(struct dcp_md_writer *w, uint64_t n0, const struct dcp_save_id *save_id,
            const struct dcp_links *links, struct dcp_buf *buf)
{
    size_t start = buf->len;
    int rc = prepare(w, n0, save_id, links, buf);
    if (rc == 0) {
        rc = put_pickle(w, buf);
    }
    size_t index_at = buf->len;
    if (rc == 0) {
        rc = dcp_metadata_index_encode(&w->md, buf, w->err);
    }
    if (rc != 0) {
        return rc;
    }
    struct dcp_metadata_footer footer = {.save_id = *save_id,
                                         .accepted_count = w->md.accepted_count};
    return dcp_metadata_seal(buf, start, index_at, w->md.accepted, &footer, w->err);
}

int
dcp_metadata_write(const struct dcp_global_plan *global, const struct dcp_storage_meta *meta,
                   const struct dcp_save_id *save_id, uint64_t n0, const struct dcp_links *links,
                   struct dcp_buf *buf, struct dcp_error *err)
{
    struct dcp_md_writer w = {.global = global, .meta = meta, .err = err};
    int rc = write_image(&w, n0, save_id, links, buf);
    dcp_metadata_clean_up(&w.md);
    dcp_free(w.records);
    dcp_free(w.paths);
    dcp_free(w.entry_memo);
    dcp_free(w.chunk_memo);
    dcp_free(w.file_memo);
    dcp_free(w.values);
    dcp_index_map_clean_up(&w.map);
    return rc;
}

/*
 * verify_set.c: one metadata file and everything it stands for: chunks, records, data files.
 *
 * Data files are opened one after the other, each once, in the order of the metadata; records of a
 * file are gone through in the order they lie in.
 *
 * Threads: the calling thread.
 */
#include "verify.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "claim_scan.h"

/* One metadata file and what it says. */
struct set {
    char name[DCP_CLAIM_NAME_BYTES];
    struct dcp_buf image; /* md may point into it */
    bool was_read;
    struct dcp_hash128 hash; /* of the image, once it was read */
    struct dcp_metadata md;
    struct dcp_verify_ref *refs; /* owned; by file, then offset */
    uint64_t refs_count;
    bool looked_again; /* a file was gone, and the metadata had not changed */
};

/* ---- metadata ---- */

static void
set_clean_up(struct set *set)
{
    dcp_metadata_clean_up(&set->md);
    dcp_buf_clean_up(&set->image);
    dcp_free(set->refs);
}

static struct dcp_hash128
hash_of(const struct dcp_buf *image)
{
    return dcp_hash128(image->data, image->len, image->len);
}

/* DCP_E_STALE when the metadata is no longer what `set` was read from; 0 when it is. */
static int
look_again(struct dcp_verifier *v, const struct set *set, struct dcp_error *err)
{
    struct dcp_buf image = {0};
    struct dcp_error why;
    if (!set->was_read) {
        return 0;
    }
    dcp_error_clear(&why);
    int rc = dcp_io_read_file(v->io, v->dirfd, set->name, DCP_MAX_METADATA_BYTES, &image, &why);
    bool is_same = rc == 0 && dcp_hash128_equal(hash_of(&image), set->hash);
    dcp_buf_clean_up(&image);
    if (rc == DCP_E_NOMEM) {
        return dcp_error_set(err, rc, 0, set->name, "%s", why.message);
    }
    return is_same || (rc != 0 && rc != DCP_E_NOENT) ? 0 : DCP_E_STALE;
}

/* What stands in the place of an image that only Python reads; NULL when nothing does. */
static const struct dcp_span *
translation_of(const struct dcp_verifier *v, const struct dcp_buf *image)
{
    for (size_t i = 0; i < v->options->translations_count; i++) {
        const struct dcp_verify_translation *known = &v->options->translations[i];
        if (known->original.len == image->len &&
            memcmp(known->original.data, image->data, image->len) == 0) {
            return &known->translated;
        }
    }
    return NULL;
}

/* Parses what was read. */
static int
parse_set(const struct dcp_verifier *v, struct set *set, struct dcp_error *why)
{
    int rc = dcp_metadata_read(set->image.data, set->image.len, &set->md, why);
    const struct dcp_span *translated =
        rc == DCP_E_UNSUPPORTED ? translation_of(v, &set->image) : NULL;
    if (translated != NULL) {
        dcp_error_clear(why);
        rc = dcp_metadata_read(translated->data, translated->len, &set->md, why);
    }
    if (translated != NULL && rc == 0 &&
        dcp_metadata_peek_save_id(set->image.data, set->image.len, &set->md.save_id)) {
        set->md.is_native = true; /* the image was ours, around a planner's pickle */
        set->md.planned_outside = true;
    }
    return rc;
}

/* Makes the metadata file a part of what tells this check's metadata from another's. */
static void
add_to_id(struct dcp_verifier *v, const struct set *set)
{
    struct dcp_hash128 parts[2] = {v->result->metadata_id, set->hash};
    v->result->metadata_id =
        dcp_hash128(parts, sizeof parts, dcp_hash64(set->name, strlen(set->name), 0));
}

/* Reads and parses.  *ret_good is false when that failed; damage is noted by part 0 alone: the
 * others have read the same bytes, as their metadata_id tells.  DCP_E_NOENT without an error text
 * when there is no such file. */
static int
read_set(struct dcp_verifier *v, struct set *set, bool *ret_good, struct dcp_error *err)
{
    struct dcp_error why;
    *ret_good = false;
    dcp_error_clear(&why);
    int rc =
        dcp_io_read_file(v->io, v->dirfd, set->name, DCP_MAX_METADATA_BYTES, &set->image, &why);
    if (rc == DCP_E_NOENT) {
        return rc;
    }
    if (rc == 0) {
        set->hash = hash_of(&set->image);
        set->was_read = true;
        add_to_id(v, set);
        rc = parse_set(v, set, &why);
        if (rc == DCP_E_UNSUPPORTED) {
            return dcp_error_set(err, rc, 0, set->name, "%s: %s", set->name, why.message);
        }
    }
    *ret_good = rc == 0;
    bool is_others = v->options->part != 0 && set->was_read && !dcp_verify_is_fatal(rc);
    return rc == 0 || is_others ? 0 : dcp_verify_note(v, DCP_VERIFY_NO_ENTRY, set->name, &why, err);
}

static int
compare_refs(const void *left, const void *right)
{
    const struct dcp_verify_ref *a = left, *b = right;
    if (a->file != b->file) {
        return a->file < b->file ? -1 : 1;
    }
    if (a->offset_bytes != b->offset_bytes) {
        return a->offset_bytes < b->offset_bytes ? -1 : 1;
    }
    return a->chunk < b->chunk ? -1 : a->chunk > b->chunk;
}

/* Where every chunk's record lies.  Notes chunks that have none. */
static int
collect_refs(struct dcp_verifier *v, struct set *set, struct dcp_error *err)
{
    const struct dcp_metadata *md = &set->md;
    struct dcp_error why;
    int rc = 0;
    set->refs = dcp_malloc_array((size_t)md->chunks_count, sizeof *set->refs);
    if (set->refs == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "checking %" PRIu64 " records: out of memory", md->chunks_count);
    }
    for (uint64_t e = 0; rc == 0 && e < md->entries_count; e++) {
        const struct dcp_md_entry *entry = &md->entries[e];
        for (uint64_t i = 0; rc == 0 && i < entry->chunks_count; i++) {
            const struct dcp_md_chunk *chunk = &md->chunks[entry->first_chunk + i];
            if (chunk->file != DCP_NO_FILE && chunk->length_bytes > 0) {
                set->refs[set->refs_count++] =
                    (struct dcp_verify_ref){.offset_bytes = chunk->offset_bytes,
                                            .chunk = entry->first_chunk + i,
                                            .file = chunk->file,
                                            .entry = (uint32_t)e};
                continue;
            }
            bool is_empty = entry->kind == DCP_ITEM_BYTES && chunk->file != DCP_NO_FILE;
            if (v->options->part != 0 || is_empty) {
                continue; /* a planner's own object may have no bytes: nothing of it can be damaged
                           */
            }
            dcp_error_clear(&why);
            dcp_error_set(&why, DCP_E_MISSING, 0, NULL,
                          chunk->file == DCP_NO_FILE
                              ? "the metadata does not say where chunk %" PRIu64 " of it lies"
                              : "the metadata gives chunk %" PRIu64 " of it no bytes",
                          i);
            rc = dcp_verify_note(v, (uint32_t)e, set->name, &why, err);
        }
    }
    qsort(set->refs, (size_t)set->refs_count, sizeof *set->refs, compare_refs);
    return rc;
}

/* Rank and number of a data file that is named as torch and we name them. */
static bool
parse_file(const struct dcp_metadata *md, uint32_t index, uint32_t *ret_rank, uint64_t *ret_n)
{
    const struct dcp_md_file *file = &md->files[index];
    char name[DCP_DATA_FILE_NAME_BYTES];
    if (file->name_len >= sizeof name) {
        return false;
    }
    memcpy(name, md->strings + file->name, file->name_len);
    name[file->name_len] = '\0';
    return dcp_data_file_parse(name, ret_rank, ret_n);
}

/* A rank that saves alone may hold parts of tensors: several ranks must fill them together. */
static bool
several_ranks_wrote(const struct dcp_metadata *md)
{
    uint32_t rank, first_rank = 0;
    uint64_t n;
    bool any = false;
    for (uint32_t f = 0; f < md->files_count; f++) {
        if (!parse_file(md, f, &rank, &n)) {
            continue;
        }
        if (any && rank != first_rank) {
            return true;
        }
        any = true;
        first_rank = rank;
    }
    return false;
}

static int
check_entries(struct dcp_verifier *v, struct set *set, bool is_rank_local, struct dcp_error *err)
{
    const struct dcp_metadata *md = &set->md;
    bool must_fill = !is_rank_local && several_ranks_wrote(md);
    for (uint64_t e = 0; e < md->entries_count; e++) {
        bool is_object = md->entries[e].kind == DCP_ITEM_BYTES, filled = true;
        v->result->objects_count += is_object;
        v->result->tensors_count += !is_object;
        if (v->options->level == DCP_VERIFY_COMPLETE || v->options->part != 0) {
            continue;
        }
        int rc = dcp_verify_check_cancel(v->options, err);
        if (rc == 0) {
            rc = dcp_verify_boxes(v, (uint32_t)e, must_fill, &filled, err);
        }
        if (rc != 0) {
            return rc;
        }
        v->result->partial_tensors_count += !filled && !must_fill;
    }
    v->result->records_count += set->refs_count;
    return 0;
}

/* ---- data files ---- */

/* Notes records that lie where they can not, and those that overlap another; the others are left
 * in refs[0, *ret_count). */
static int
check_places(struct dcp_verifier *v, const struct dcp_verify_file *file,
             struct dcp_verify_ref *refs, uint64_t count, uint64_t *ret_count,
             struct dcp_error *err)
{
    uint64_t first = file->has_header ? DCP_FILE_HEADER_BYTES : 0, kept = 0, previous_end = 0;
    uint64_t last = file->has_header ? file->header.table_offset_bytes : file->size_bytes;
    bool with_overlaps = v->options->level >= DCP_VERIFY_STRUCTURE;
    for (uint64_t i = 0; i < count; i++) {
        const struct dcp_md_chunk *chunk = &v->md->chunks[refs[i].chunk];
        uint64_t at = chunk->offset_bytes, end = at + chunk->length_bytes;
        const struct dcp_md_chunk *before = kept > 0 ? &v->md->chunks[refs[kept - 1].chunk] : NULL;
        struct dcp_error why;
        dcp_error_clear(&why);
        if (at < first || end > dcp_min_u64(last, file->size_bytes)) {
            dcp_error_set(&why, DCP_E_CORRUPT, 0, file->path,
                          "its record lies at bytes %" PRIu64 " to %" PRIu64
                          ", but records of the file can lie at %" PRIu64 " to %" PRIu64 " only",
                          at, end, first, dcp_min_u64(last, file->size_bytes));
        } else if (with_overlaps && at < previous_end &&
                   (at != before->offset_bytes || chunk->length_bytes != before->length_bytes)) {
            dcp_error_set(&why, DCP_E_CORRUPT, 0, file->path,
                          "its record at bytes %" PRIu64 " to %" PRIu64 " overlaps the one before",
                          at, end);
        } else if (at >= previous_end || !with_overlaps) {
            refs[kept++] = refs[i];
            previous_end = end;
        }
        if (why.code != 0) {
            why.offset_bytes = at;
            int rc = dcp_verify_note(v, refs[i].entry, file->name, &why, err);
            if (rc != 0) {
                return rc;
            }
        }
    }
    *ret_count = kept;
    return 0;
}

static int
check_records(struct dcp_verifier *v, struct dcp_verify_file *file,
              const struct dcp_verify_ref *refs, uint64_t count, struct dcp_error *err)
{
    struct dcp_error why;
    uint64_t wanted = 0;
    for (uint64_t i = 0; i < count; i++) {
        wanted += v->md->chunks[refs[i].chunk].length_bytes;
    }
    dcp_error_clear(&why);
    int rc = dcp_verify_file_choose_direct(v, file, wanted, &why);
    if (rc != 0) {
        *err = why;
        return rc;
    }
    dcp_verify_stream_begin(&v->stream, file, v->md, refs, count);
    for (uint64_t i = 0; rc == 0 && i < count; i++) {
        const struct dcp_md_chunk *chunk = &v->md->chunks[refs[i].chunk];
        if (chunk->transforms != 0) {
            v->result->unverified_bytes += chunk->length_bytes;
            v->result->unverified_records_count++;
            continue;
        }
        rc = dcp_verify_check_cancel(v->options, err);
        if (rc == 0) {
            rc = dcp_verify_record(v, file, &refs[i], err);
        }
    }
    dcp_verify_stream_end(&v->stream);
    return rc;
}

/* A file that cannot be opened, or is not what it should be. */
static int
note_file(struct dcp_verifier *v, struct set *set, const struct dcp_verify_ref *refs,
          uint64_t count, const struct dcp_verify_file *file, const struct dcp_error *why,
          struct dcp_error *err)
{
    struct dcp_error full = *why;
    bool is_gone = why->code == DCP_E_NOENT || why->code == DCP_E_STALE;
    if (is_gone && !set->looked_again) {
        int rc = look_again(v, set, err);
        if (rc != 0) {
            return rc;
        }
        set->looked_again = true;
    }
    if (count > 0 && !dcp_verify_is_fatal(why->code)) {
        const struct dcp_md_entry *entry = &v->md->entries[refs[0].entry];
        dcp_error_clear(&full);
        dcp_error_set(&full, why->code, why->sys_errno, file->path,
                      "%s; %" PRIu64 " record%s of the checkpoint lie%s in it, the first of %.*s",
                      why->message, count, count == 1 ? "" : "s", count == 1 ? "s" : "",
                      (int)dcp_min_u64(entry->name_len, 256), v->md->strings + entry->name);
        full.offset_bytes = why->offset_bytes;
    }
    return dcp_verify_note(v, DCP_VERIFY_NO_ENTRY, file->name, &full, err);
}

static int
check_file(struct dcp_verifier *v, struct set *set, uint32_t index, struct dcp_verify_ref *refs,
           uint64_t count, struct dcp_error *err)
{
    const struct dcp_verify_options *options = v->options;
    struct dcp_verify_file file;
    struct dcp_error why;
    dcp_error_clear(&why);
    v->result->files_count++;
    int rc = dcp_verify_file_open(v, index, &file, &why);
    v->result->file_bytes += file.size_bytes;
    if (rc != 0) {
        rc = note_file(v, set, refs, count, &file, &why, err);
    } else {
        rc = check_places(v, &file, refs, count, &count, err);
        if (rc == 0 && options->level >= DCP_VERIFY_STRUCTURE) {
            rc = dcp_verify_file_tables(v, &file, err);
        }
        if (rc == 0 && options->level == DCP_VERIFY_FULL) {
            rc = check_records(v, &file, refs, count, err);
        }
    }
    dcp_verify_file_close(v, &file);
    return rc;
}

static int
check_files(struct dcp_verifier *v, struct set *set, struct dcp_error *err)
{
    uint64_t at = 0;
    int rc = 0;
    for (uint32_t f = 0; rc == 0 && f < set->md.files_count; f++) {
        uint64_t first = at;
        while (at < set->refs_count && set->refs[at].file == f) {
            at++;
        }
        rc = dcp_verify_check_cancel(v->options, err);
        uint64_t number = v->files_seen++;
        bool is_mine = v->options->parts == 0 || number % v->options->parts == v->options->part;
        if (rc == 0 && is_mine) {
            rc = check_file(v, set, f, set->refs + first, at - first, err);
        }
    }
    return rc;
}

static void
note_references(const struct dcp_metadata *md, struct dcp_buf *files)
{
    uint32_t rank;
    uint64_t n;
    for (uint32_t f = 0; f < md->files_count; f++) {
        if (parse_file(md, f, &rank, &n)) {
            uint64_t key = dcp_file_key(rank, n);
            dcp_buf_put(files, &key, sizeof key);
        }
    }
}

static int
check_all(struct dcp_verifier *v, struct set *set, bool is_rank_local, struct dcp_error *err)
{
    v->result->is_native = set->md.is_native;
    if (!is_rank_local) {
        v->result->save_id = set->md.save_id;
    }
    int rc = collect_refs(v, set, err);
    if (rc == 0) {
        rc = check_entries(v, set, is_rank_local, err);
    }
    return rc != 0 ? rc : check_files(v, set, err);
}

int
dcp_verify_set(struct dcp_verifier *v, int32_t rank, struct dcp_reference_set *references,
               struct dcp_error *err)
{
    struct set set = {.refs_count = 0};
    uint64_t found_before = v->result->problems_found;
    bool good = false;
    dcp_metadata_name(set.name, rank);
    int rc = read_set(v, &set, &good, err);
    if (rc == 0 && good) {
        v->md = &set.md;
        rc = check_all(v, &set, rank >= 0, err);
    }
    if (rc == 0 && (!good || v->result->problems_found != found_before)) {
        rc = look_again(v, &set, err);
    }
    references->incomplete = references->incomplete || (rc == 0 && !good);
    note_references(&set.md, &references->files);
    if (rc == 0) {
        rc = dcp_buf_check(&references->files, err);
    }
    v->md = NULL;
    set_clean_up(&set);
    return rc;
}

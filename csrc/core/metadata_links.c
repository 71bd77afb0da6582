/*
 * metadata_links.c: what a checkpoint takes over from earlier saves: its links, and the ids of the
 * saves whose data files it therefore accepts.
 *
 * A linked file keeps the header of the save that wrote it.  Without the list of ids a reader could
 * not tell it from a stale file that lies under the same name, so the list is part of what the
 * footer vouches for: a damaged one is a damaged checkpoint, although the pickle is whole.
 *
 * In the image: the ids, 16 bytes each, strictly ascending, without the checkpoint's own.
 *
 * Threads: no state.
 */
#include "metadata_private.h"

#include <stdlib.h>
#include <string.h>

static int
compare_ids(const void *left, const void *right)
{
    return memcmp(left, right, sizeof(struct dcp_save_id));
}

void
dcp_links_clean_up(struct dcp_links *links)
{
    if (links == NULL) {
        return;
    }
    dcp_free(links->files);
    dcp_free(links->records);
    *links = (struct dcp_links){0};
}

/* ---- writing ---- */

static int
refuse(struct dcp_error *err, const char *what, uint64_t index, const char *why)
{
    return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                         "writing metadata: linked %s %llu %s; this is a bug, please report it",
                         what, (unsigned long long)index, why);
}

int
dcp_metadata_check_links(const struct dcp_global_plan *global, const struct dcp_links *links,
                         const struct dcp_save_id *save_id, uint64_t n0, struct dcp_error *err)
{
    static const struct dcp_save_id none = {{0}};
    for (uint32_t i = 0; i < links->files_count; i++) {
        const struct dcp_linked_file *file = &links->files[i];
        const struct dcp_linked_file *last = i == 0 ? NULL : &links->files[i - 1];
        if (file->plan >= global->plans_count ||
            file->n < global->layouts[file->plan].files_count) {
            return refuse(err, "file", i, "takes the name of a file that is written");
        }
        if (last != NULL &&
            (file->plan < last->plan || (file->plan == last->plan && file->n <= last->n))) {
            return refuse(err, "file", i, "is out of order");
        }
        if (compare_ids(&file->save_id, save_id) == 0 || compare_ids(&file->save_id, &none) == 0) {
            return refuse(err, "file", i, "was written by no earlier save");
        }
        uint64_t n;
        if (dcp_add_overflows_u64(n0, file->n, &n) || n > UINT32_MAX) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "file number %llu is over 32 bits: save to a new directory",
                                 (unsigned long long)n);
        }
    }
    for (uint64_t i = 0; i < links->records_count; i++) {
        const struct dcp_linked_record *record = &links->records[i];
        const struct dcp_linked_record *last = i == 0 ? NULL : &links->records[i - 1];
        if (record->plan >= global->plans_count ||
            record->item >= global->plans[record->plan].items_count ||
            record->file >= links->files_count) {
            return refuse(err, "record", i, "is of no item or file");
        }
        if (last != NULL && (record->plan < last->plan ||
                             (record->plan == last->plan && record->item <= last->item))) {
            return refuse(err, "record", i, "is out of order");
        }
    }
    return 0;
}

int
dcp_metadata_collect_accepted(struct dcp_metadata *md, const struct dcp_links *links,
                              struct dcp_error *err)
{
    DCP_ASSERT(md->accepted == NULL && md->accepted_count == 0);
    uint32_t count = 0;
    md->accepted = dcp_malloc_array(links->files_count, sizeof *md->accepted);
    if (md->accepted == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "writing metadata with %u linked files: out of memory",
                             links->files_count);
    }
    for (uint32_t i = 0; i < links->files_count; i++) {
        md->accepted[i] = links->files[i].save_id;
    }
    qsort(md->accepted, links->files_count, sizeof *md->accepted, compare_ids);
    for (uint32_t i = 0; i < links->files_count; i++) {
        if (count == 0 || compare_ids(&md->accepted[count - 1], &md->accepted[i]) != 0) {
            md->accepted[count++] = md->accepted[i];
        }
    }
    md->accepted_count = count;
    if (count > DCP_MAX_ACCEPTED_SAVES) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "the checkpoint would link files of %u saves, %u are allowed; save "
                             "once without base=",
                             count, DCP_MAX_ACCEPTED_SAVES);
    }
    return 0;
}

/* ---- reading ---- */

int
dcp_metadata_read_accepted(struct dcp_metadata *md, const uint8_t *bytes, uint32_t count,
                           struct dcp_error *err)
{
    DCP_ASSERT(md->accepted == NULL && md->accepted_count == 0);
    if (count == 0) {
        return 0;
    }
    md->accepted = dcp_malloc_array(count, sizeof *md->accepted);
    if (md->accepted == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "reading the ids of %u linked saves: out of memory", count);
    }
    memcpy(md->accepted, bytes, count * sizeof *md->accepted);
    md->accepted_count = count;
    for (uint32_t i = 0; i < count; i++) {
        if (compare_ids(&md->accepted[i], &md->save_id) == 0 ||
            (i > 0 && compare_ids(&md->accepted[i - 1], &md->accepted[i]) >= 0)) {
            return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                                 "reading metadata: the ids of linked saves are out of order; the "
                                 "file is damaged, restore it from a copy");
        }
    }
    return 0;
}

bool
dcp_metadata_accepts(const struct dcp_metadata *md, const struct dcp_save_id *id)
{
    return compare_ids(id, &md->save_id) == 0 ||
           (md->accepted_count > 0 && bsearch(id, md->accepted, md->accepted_count,
                                              sizeof *md->accepted, compare_ids) != NULL);
}

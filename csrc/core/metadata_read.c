/*
 * metadata_read.c: an image of `.metadata` as the flat form.
 *
 * Our index is used when the footer is whole and its checksums hold.  A footer that does not hold
 * together says nothing (copies are cut, stock torch rewrites the file without one), and a damaged
 * index is no loss while the pickle's checksum is right: both are read from the pickle.  But a
 * pickle or a list of accepted saves that contradicts the checksum of a whole footer is a damaged
 * file, whatever it parses to.
 *
 * Threads: no state.
 */
#include "metadata_classes.h"

#include "dcp_crc32.h"

static int
check_length(size_t len, struct dcp_error *err)
{
    if (len <= DCP_MAX_METADATA_BYTES) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                         "reading metadata of %zu bytes, %llu are allowed", len,
                         DCP_MAX_METADATA_BYTES);
}

int
dcp_metadata_read_pickle(const uint8_t *image, size_t len, struct dcp_metadata *ret,
                         struct dcp_error *err)
{
    int rc = check_length(len, err);
    if (rc != 0) {
        return rc;
    }
    struct dcp_pickle_vm vm;
    dcp_pickle_vm_init(&vm, image, len, &dcp_metadata_dialect, NULL, NULL, 0, err);
    dcp_pvalue root = DCP_P_UNSET;
    rc = dcp_pickle_vm_run(&vm, &root);
    if (rc == 0) {
        dcp_pickle_vm_finish(&vm);
        rc = dcp_metadata_from_pickle(&vm, root, ret, err);
    }
    dcp_pickle_vm_clean_up(&vm);
    return rc;
}

/* The ids of the saves whose files are linked, into *md; `tail` begins with the index. */
static int
read_accepted(const uint8_t *tail, const struct dcp_metadata_footer *footer,
              struct dcp_metadata *md, struct dcp_error *err)
{
    const uint8_t *ids = tail + footer->index_bytes;
    size_t len = footer->accepted_count * sizeof(struct dcp_save_id);
    if (dcp_crc32(0, ids, len) != footer->accepted_crc) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                             "reading metadata: the checksum of its list of linked saves does not "
                             "match; the file is damaged, restore it from a copy");
    }
    return dcp_metadata_read_accepted(md, ids, footer->accepted_count, err);
}

/* The flat form from a whole footer's index; DCP_E_CORRUPT sends the caller to the pickle. */
static int
read_index(const uint8_t *index, const struct dcp_metadata_footer *footer, struct dcp_metadata *ret,
           struct dcp_error *err)
{
    if (dcp_crc32(0, index, (size_t)footer->index_bytes) != footer->index_crc) {
        return DCP_E_CORRUPT;
    }
    struct dcp_error why = {0};
    struct dcp_metadata md;
    int rc = dcp_metadata_index_decode(index, (size_t)footer->index_bytes, &md, &why);
    if (rc == 0) {
        rc = dcp_metadata_index_names(&md, &why);
        if (rc != 0) {
            dcp_metadata_clean_up(&md);
        }
    }
    if (rc == 0) {
        *ret = md;
        return 0;
    }
    return rc == DCP_E_NOMEM ? dcp_error_set(err, rc, 0, NULL, "%s", why.message) : DCP_E_CORRUPT;
}

/* Transforms of a record are known to its pickle alone. */
static bool
needs_pickle(const struct dcp_metadata *md)
{
    uint32_t transforms = 0;
    for (uint64_t c = 0; c < md->chunks_count; c++) {
        transforms |= md->chunks[c].transforms;
    }
    return transforms != 0;
}

/* Adds what only the trailer knows, and hands *md over. */
static int
finish_native(const uint8_t *tail, const struct dcp_metadata_footer *footer,
              struct dcp_metadata *md, struct dcp_metadata *ret, struct dcp_error *err)
{
    md->is_native = true;
    md->planned_outside = footer->planned_outside;
    md->save_id = footer->save_id;
    int rc = read_accepted(tail, footer, md, err);
    if (rc != 0) {
        dcp_metadata_clean_up(md);
        return rc;
    }
    *ret = *md;
    return 0;
}

int
dcp_metadata_read(const uint8_t *image, size_t len, struct dcp_metadata *ret, struct dcp_error *err)
{
    struct dcp_metadata_footer footer;
    if (check_length(len, NULL) != 0 || !dcp_metadata_footer_parse(image, len, &footer)) {
        return dcp_metadata_read_pickle(image, len, ret, err);
    }
    if (dcp_crc32(0, image, (size_t)footer.pickle_bytes) != footer.pickle_crc) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                             "reading metadata: the checksum of its pickle does not match; the "
                             "file is damaged, restore it from a copy");
    }
    const uint8_t *tail = image + footer.pickle_bytes;
    struct dcp_metadata md;
    int rc = read_index(tail, &footer, &md, err);
    if (rc == 0) {
        md.tail_at = needs_pickle(&md) ? 0 : footer.pickle_bytes;
    } else if (rc == DCP_E_CORRUPT) {
        rc = dcp_metadata_read_pickle(image, (size_t)footer.pickle_bytes, &md, err);
    }
    return rc != 0 ? rc : finish_native(tail, &footer, &md, ret, err);
}

int
dcp_metadata_read_ids(const uint8_t *image, size_t len, struct dcp_metadata *ret,
                      struct dcp_error *err)
{
    struct dcp_metadata_footer footer;
    struct dcp_metadata md = {0};
    if (check_length(len, NULL) != 0 || !dcp_metadata_footer_parse(image, len, &footer)) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL, "the metadata has no footer of ours");
    }
    return finish_native(image + footer.pickle_bytes, &footer, &md, ret, err);
}

int
dcp_metadata_read_tail(const uint8_t *tail, size_t len, struct dcp_metadata *ret,
                       struct dcp_error *err)
{
    struct dcp_metadata_footer footer;
    struct dcp_metadata md;
    int rc = DCP_E_CORRUPT;
    if (check_length(len, NULL) == 0 && dcp_metadata_footer_parse_tail(tail, len, &footer)) {
        rc = read_index(tail, &footer, &md, err);
    }
    if (rc == DCP_E_CORRUPT) {
        return dcp_error_set(err, rc, 0, NULL,
                             "reading the trailer of metadata, %zu bytes: it is not what the rank "
                             "that read the file checked; load again",
                             len);
    }
    return rc != 0 ? rc : finish_native(tail, &footer, &md, ret, err);
}

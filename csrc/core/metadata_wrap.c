/*
 * metadata_wrap.c: a pickle of Metadata that Python made, as a `.metadata` of ours.
 *
 * The pickle goes into the file byte for byte, so whatever a planner hung onto its Metadata
 * survives.  It is read once as a reader would read it: where the flat form says all of it the
 * index is added, and loads are as quick as of our own images; where it does not (classes or
 * attributes of others, more than our reader accepts) there is none and readers go by the pickle,
 * as they do with torch's files.  The footer is there in any case: it names the save.
 *
 * Threads: no state.
 */
#include "metadata_private.h"

/* Appends the index, or nothing where the flat form would leave something out. */
static int
put_index(const struct dcp_span *pickle, struct dcp_buf *buf, struct dcp_error *err)
{
    struct dcp_metadata md;
    struct dcp_error why;
    dcp_error_clear(&why);
    int rc = dcp_metadata_read_pickle(pickle->data, pickle->len, &md, &why);
    if (rc != 0) {
        return rc == DCP_E_NOMEM ? dcp_error_set(err, rc, 0, NULL, "%s", why.message) : 0;
    }
    if (md.foreign[0] == '\0') {
        rc = dcp_metadata_index_encode(&md, buf, err);
    }
    dcp_metadata_clean_up(&md);
    return rc;
}

int
dcp_metadata_wrap(const struct dcp_span *pickle, const struct dcp_save_id *save_id,
                  struct dcp_buf *buf, struct dcp_error *err)
{
    size_t start = buf->len;
    dcp_buf_put(buf, pickle->data, pickle->len);
    int rc = dcp_buf_check(buf, err);
    size_t index_at = buf->len;
    if (rc == 0) {
        rc = put_index(pickle, buf, err);
    }
    if (rc != 0) {
        return rc;
    }
    struct dcp_metadata_footer footer = {.save_id = *save_id, .planned_outside = true};
    return dcp_metadata_seal(buf, start, index_at, NULL, &footer, err);
}

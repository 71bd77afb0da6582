/*
 * claim_references.c: which data files a metadata image names, and whose it is.
 *
 * Kept apart from the protocol so that the protocol can be tested on another format.
 *
 * Threads: no state.
 */
#include "claim_scan.h"

#include "dcp_metadata.h"

int
dcp_claim_references(const uint8_t *image, size_t len, dcp_reference_fn fn, void *fn_ctx,
                     struct dcp_error *err)
{
    struct dcp_metadata md = {0};
    int rc = dcp_metadata_read(image, len, &md, err);

    for (uint32_t i = 0; rc == 0 && i < md.files_count; i++) {
        const struct dcp_md_file *file = &md.files[i];
        rc = fn(fn_ctx, md.strings + file->name, file->name_len);
    }
    dcp_metadata_clean_up(&md);
    return rc;
}

bool
dcp_claim_image_save_id(const uint8_t *image, size_t len, struct dcp_save_id *ret_id)
{
    return dcp_metadata_peek_save_id(image, len, ret_id);
}

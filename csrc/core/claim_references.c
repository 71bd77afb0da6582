/*
 * claim_references.c: which data files a metadata image names, and whose it or a data file is.
 *
 * Kept apart from the protocol so that the protocol can be tested on other formats.
 *
 * Threads: no state.
 */
#include "claim_scan.h"

#include "dcp_metadata.h"
#include "dcp_record.h"

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

bool
dcp_claim_file_save_id(const uint8_t *bytes, size_t len, struct dcp_save_id *ret_id)
{
    struct dcp_file_header header;
    struct dcp_error ignored;

    dcp_error_clear(&ignored);
    if (len < DCP_FILE_HEADER_BYTES || dcp_file_parse_header(bytes, &header, &ignored) != 0) {
        return false;
    }
    *ret_id = header.save_id;
    return true;
}

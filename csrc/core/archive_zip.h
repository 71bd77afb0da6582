/*
 * archive_zip.h: private: the zip structures of a whole torch.save file, as torch writes them.
 */
#ifndef ARCHIVE_ZIP_H
#define ARCHIVE_ZIP_H

#include "dcp_archive.h"

/* Alignment beyond this does not fit the 16 bits that say how long the padding is. */
#define ARCHIVE_MOST_ALIGN_BYTES 32768u

/* Where an entry lies in the file. */
struct archive_place {
    uint64_t header_offset, data_offset;
    uint32_t crc; /* once it was written */
};

/* Behind the last entry, `places` filled. DCP_E_INVALID: an alignment that cannot be; DCP_E_LIMIT:
 * a name or a sum too long. */
int archive_zip_place(const struct dcp_archive_params *params, struct archive_place *places,
                      uint64_t *ret_end_bytes, struct dcp_error *err) DCP_MUST_CHECK;
/* Length of the directory and what follows it. */
uint64_t archive_zip_tail_bytes(const struct dcp_archive_params *params,
                                const struct archive_place *places, uint64_t directory_offset);

/* Append to a buffer, which keeps its own failure. */
void archive_zip_put_local(struct dcp_buf *buf, const struct dcp_archive_params *params,
                           const struct dcp_archive_entry *entry,
                           const struct archive_place *place);
void archive_zip_put_descriptor(struct dcp_buf *buf, const struct dcp_archive_entry *entry,
                                const struct archive_place *place);
void archive_zip_put_central(struct dcp_buf *buf, const struct dcp_archive_params *params,
                             const struct dcp_archive_entry *entry,
                             const struct archive_place *place);
void archive_zip_put_end(struct dcp_buf *buf, uint64_t entries_count, uint64_t directory_offset,
                         uint64_t directory_bytes);

#endif

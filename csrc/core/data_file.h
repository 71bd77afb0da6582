/*
 * data_file.h: private: what every reader of a data file has to ask of it, loads and checks alike.
 */
#ifndef DCP_DATA_FILE_H
#define DCP_DATA_FILE_H

#include "dcp_io.h"
#include "dcp_metadata.h"
#include "dcp_record.h"

enum { DCP_DATA_FILE_NAME_BYTES = 256 };

/* From here on direct reads gain something: below, the page cache's read-ahead serves better than
 * requests of a few pages. */
#define DCP_DATA_FILE_DIRECT_LEAST_BYTES (4u << 20)
/* Percent of a file in the page cache from which copies beat the device. */
#define DCP_DATA_FILE_HOT_PERCENT 50

/* A name of the metadata, which must stay inside the checkpoint's directory `dir_path` (of the
 * error; may be NULL). */
int dcp_data_file_of(const struct dcp_metadata *md, uint32_t index, const char *dir_path,
                     char ret_name[DCP_DATA_FILE_NAME_BYTES], struct dcp_error *err) DCP_MUST_CHECK;
/* For reading: a descriptor or -errno. */
int dcp_data_file_open(const struct dcp_io *io, int dirfd, const char *name);
/* The same for O_DIRECT, where `align` allows it; negative where not. */
int dcp_data_file_open_direct(const struct dcp_io *io, int dirfd, const char *name,
                              const struct dcp_dio_align *align);
/* Whether a file of the metadata's own save has the name that its header says.  A linked file has
 * another, and keeps the header of the save that wrote it. */
bool dcp_data_file_has_own_name(const struct dcp_metadata *md, const struct dcp_file_header *header,
                                const char *name);

#endif

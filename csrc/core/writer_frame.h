/*
 * writer_frame.h: private: lengths of the messages between a trainer and its writer process.
 */
#ifndef WRITER_FRAME_H
#define WRITER_FRAME_H

#include "dcp_error.h"
#include "dcp_limits.h"
#include "trace.h"

#define DCP_WRITER_MAGIC 0x57504344u /* "DCPW" */

enum {
    DCP_WRITER_KIND_AT = 6,
    DCP_WRITER_LENGTH_AT = 8,
    DCP_WRITER_HEADER_BYTES = 16,
    DCP_WRITER_HELLO_BYTES = 8,
    DCP_WRITER_PROGRESS_BYTES = 8,
    DCP_WRITER_PREPARE_BYTES = 8,
    DCP_WRITER_FILE_BYTES = 3 * 8,
    DCP_WRITER_TRACE_MOST_BYTES = DCP_TRACE_PACK_MOST_BYTES,
    /* What does not grow with files and path; a bound, and generous. */
    DCP_WRITER_FIXED_BYTES = 512,
};

#define DCP_WRITER_REQUEST_MOST_BYTES                                                              \
    (DCP_WRITER_FIXED_BYTES + DCP_MAX_WRITER_PATH_BYTES +                                          \
     (uint64_t)DCP_MAX_FILES_PER_RANK * DCP_WRITER_FILE_BYTES + DCP_MAX_METADATA_BYTES)
#define DCP_WRITER_RESULT_MOST_BYTES                                                               \
    (DCP_WRITER_FIXED_BYTES + DCP_ERROR_PATH_BYTES + DCP_ERROR_MESSAGE_BYTES)

#endif

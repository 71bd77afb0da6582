/*
 * writer_outlive.h: private: what a save needs that may lose its trainer.
 */
#ifndef WRITER_OUTLIVE_H
#define WRITER_OUTLIVE_H

#include "dcp_commit.h"
#include "writer_message.h"

/* Takes the headers out of an image, so that what is written from it is not yet a data file of any
 * save.  `ret_headers` (owned) has DCP_FILE_HEADER_BYTES for each file. */
int dcp_seal_take(const struct dcp_image *image, uint8_t *memory, uint8_t **ret_headers,
                  struct dcp_error *err) DCP_MUST_CHECK;
/* Puts them into the files, which are written and durable but for their names: from then on a
 * file's header says that all of it is there. */
int dcp_seal_put(const struct dcp_io *io, int dirfd, const struct dcp_writer_request *request,
                 const uint8_t *headers, struct dcp_error *err) DCP_MUST_CHECK;

/* A save whose trainer is gone. */
struct dcp_orphan {
    const struct dcp_io *io;
    const struct dcp_writer_request *request; /* borrows */
    int dirfd;                                /* borrows */
    int lock_fd;                              /* of the claim; -1: not locked */
};

void dcp_orphan_begin(struct dcp_orphan *orphan, const struct dcp_io *io, int dirfd,
                      const struct dcp_writer_request *request);
/* Shows that the save is alive.  False: its claim is gone, and there is nothing left to do. */
bool dcp_orphan_stands(struct dcp_orphan *orphan);
/* Own files are written (`code` 0), or not: commits when all files are there, gives up when the
 * claim is gone, after `timeout_ns`, or at once after a failure. */
enum dcp_outcome dcp_orphan_finish(struct dcp_orphan *orphan, int code, uint32_t created_files,
                                   uint64_t timeout_ns);
void dcp_orphan_end(struct dcp_orphan *orphan);

#endif

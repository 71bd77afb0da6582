/*
 * io_explain.h: what a failed system call means for the person who reads of it (private to the
 * core).
 */
#ifndef DCP_CORE_IO_EXPLAIN_H
#define DCP_CORE_IO_EXPLAIN_H

#include "dcp_io.h"

struct dcp_io_trouble {
    const struct dcp_io *io; /* borrows */
    int fd;              /* on the file system in question, to ask what is free; -1: do not ask */
    int sys_errno;       /* of the call that failed */
    bool syncing;        /* it was an fsync of any kind */
    uint64_t need_bytes; /* what the caller came to write there; 0: not known */
};

enum { DCP_IO_EXPLAIN_BYTES = 512 };

/* The end of a message: the system's text, what is free where that matters, what to do.  Returns
 * `text`. */
const char *dcp_io_explain(const struct dcp_io_trouble *trouble, char text[DCP_IO_EXPLAIN_BYTES]);

#endif

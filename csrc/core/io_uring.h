/*
 * io_uring.h: private: the queue of the real table; the entries are described in dcp_io.h.
 */
#ifndef DCP_IO_URING_H
#define DCP_IO_URING_H

#include "dcp_io.h"

int dcp_uring_open(void *ctx, unsigned depth, struct dcp_io_queue **ret_queue);
int dcp_uring_write(void *ctx, struct dcp_io_queue *queue, const struct dcp_io_write *write);
int dcp_uring_reap(void *ctx, struct dcp_io_queue *queue, uint64_t timeout_ns,
                   struct dcp_io_done *ret);
void dcp_uring_close(void *ctx, struct dcp_io_queue *queue);

#endif

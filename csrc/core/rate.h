/*
 * rate.h: private: keeps a stream of requests below a number of bytes per second.
 */
#ifndef DCP_RATE_H
#define DCP_RATE_H

#include <stdatomic.h>

#include "dcp_io.h"

struct dcp_rate {
    const struct dcp_io *io; /* its clock */
    uint64_t bytes_s;        /* 0: no limit */
    uint64_t credit_ns;      /* how far the stream may catch up after it was late */
    uint64_t due_ns;         /* when the next request may start; 0: none was made */
    uint64_t slept_ns;
};

/* `credit_bytes`: what a stream that was slower than the limit may send at once later. */
void dcp_rate_init(struct dcp_rate *rate, const struct dcp_io *io, uint64_t bytes_s,
                   uint64_t credit_bytes);
/* Sleeps until a request of `len` bytes, at most DCP_MAX_REQUEST_BYTES, may start.  False when
 * *cancel (may be NULL) became non-zero meanwhile. */
bool dcp_rate_wait(struct dcp_rate *rate, uint64_t len, const atomic_int *cancel) DCP_MUST_CHECK;

#endif

/*
 * dcp_nccl.h: an NCCL communicator as the comm table of dcp_comm.h.
 *
 * Nothing of NCCL is linked: it is found, when it is asked for, in the library that torch has
 * loaded (csrc/cuda/nccl_api.h).
 *
 * What has been written here is compiled and run on stand-ins for CUDA and NCCL, not on a GPU.
 */
#ifndef DCP_NCCL_H
#define DCP_NCCL_H

#include "dcp_comm.h"
#include "dcp_limits.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A communicator that somebody else owns, as dcp_bridge.h finds it. */
struct dcp_nccl_source {
    void *raw; /* ncclComm_t */
    uint32_t rank;
    uint32_t size;
    uint64_t timeout_ns; /* of the group: of every step of a call of the table; 0: none */
};

/* A table over `source`, which lives at least until the first call returns, or as long as the table
 * where it cannot be split.  Makes a stream and the buffers, and looks whether the communicator is
 * well; communicates nothing: the first call of the table splits it, within DCP_NCCL_CONNECT_NS.
 *
 * Every call of the table, and `destroy`, is for any thread, with or without the GIL; each comes
 * after what the stream given to `follow` has been given before it, at first the default stream.
 *
 * DCP_E_UNSUPPORTED: no CUDA or no NCCL in this process; DCP_E_COMM: it is not well, or not of this
 * rank; DCP_E_NOMEM: no room for the buffers. */
int dcp_nccl_comm_make(const struct dcp_nccl_source *source, struct dcp_comm *ret_comm,
                       struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif

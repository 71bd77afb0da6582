/*
 * dcp_cuda.h: the devices of CUDA as tables of dcp_device.h.
 *
 * Nothing of CUDA is linked: all of it is found, when it is asked for, in the libraries that torch
 * has loaded (csrc/cuda/cuda_api.h).  Without them nothing here works, and nothing else needs it.
 *
 * What has been written here is compiled and run on stand-ins for CUDA, not on a GPU.
 */
#ifndef DCP_CUDA_H
#define DCP_CUDA_H

#include "dcp_device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Whether CUDA's runtime is loaded in this process: a cheap question that creates no context. */
bool dcp_cuda_is_there(void);

/* A table of device `index`, with a stream of its own, until it is given back.  Only for a device
 * that holds a tensor: its context is created otherwise.  Streams and kernels are kept and lent
 * again.  The calling thread's current device stays what it is, here and in all calls of the table.
 * DCP_E_UNSUPPORTED: no CUDA in this process, or it was forked off one that used CUDA. */
int dcp_cuda_lend(int32_t index, struct dcp_device **ret, struct dcp_error *err) DCP_MUST_CHECK;

/* Any thread.  Events are forgotten and memory is released before.  NULL is fine. */
void dcp_cuda_give_back(struct dcp_device *device);

/* Asks for direct reads from storage: the table gets DCP_DEVICE_READS_FILES where cuFile can be
 * had.  It stays so for this process.  The first call takes as long as cuFile needs to start. */
int dcp_cuda_use_cufile(struct dcp_device *device, struct dcp_error *err) DCP_MUST_CHECK;

/* Tests: gives up all tables and all that they keep.  None is lent. */
void dcp_cuda_clean_up(void);

#ifdef __cplusplus
}
#endif
#endif

/*
 * cuda_context.h: private: a call's stay on a device, and CUDA's errors as ours.
 */
#ifndef DCP_CUDA_CONTEXT_H
#define DCP_CUDA_CONTEXT_H

#include "cuda_api.h"

enum {
    /* Devices of one process; torch is compiled for fewer. */
    CUDA_MAX_DEVICES = 128,
};

/* Between cuda_enter and cuda_leave, on one thread. */
struct cuda_stay {
    const struct cudart_api *runtime;
    const struct cuda_driver_api *driver;
    int32_t index;
    cuda_enum capture_mode; /* what the thread had */
};

/* Makes the device's primary context the thread's current one until cuda_leave, whatever it had
 * before, and takes the thread out of the captures of others.  DCP_E_UNSUPPORTED: no CUDA, or a
 * forked child. */
int cuda_enter(int32_t index, struct cuda_stay *ret_stay, struct dcp_error *err) DCP_MUST_CHECK;
void cuda_leave(struct cuda_stay *stay);

/* Tests: as before the first entry. */
void cuda_context_forget(void);

/* 0 for success; else fills *err with "cuda:N: cannot <what>: ..." and returns its code, after the
 * runtime has forgotten the error, so that torch does not find it.  Out of memory is DCP_E_NOMEM, a
 * capture in the way is DCP_E_UNSUPPORTED, all else DCP_E_IO. */
int cuda_check(const struct cuda_stay *stay, cuda_status status, const char *what,
               struct dcp_error *err) DCP_MUST_CHECK;
/* The same for what the driver answers. */
int cuda_check_driver(const struct cuda_stay *stay, cuda_status status, const char *what,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* Text of a save or load under a capture, for a caller that has seen one. */
int cuda_refuse_capture(const struct cuda_stay *stay, const char *what, struct dcp_error *err);
/* DCP_E_UNSUPPORTED where a graph is being captured from the stream. */
int cuda_refuse_if_capturing(const struct cuda_stay *stay, cuda_stream stream, const char *what,
                             struct dcp_error *err) DCP_MUST_CHECK;

#endif

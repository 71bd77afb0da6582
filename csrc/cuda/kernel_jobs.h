/*
 * kernel_jobs.h: private: strided boxes as jobs of kernels.
 */
#ifndef DCP_KERNEL_JOBS_H
#define DCP_KERNEL_JOBS_H

#include "dcp_device.h"
#include "kernels.h"

enum {
    /* A thread block moves at least so much, 16 items of 16 bytes for every 2 threads: less, and a
     * large part of its time is the look at its job. */
    KERNEL_JOB_BYTES = 16 << 10,
    /* Most jobs of one box's middle part: four times what the largest device runs at once, and the
     * list of a huge box stays small. */
    KERNEL_JOBS_OF_BOX = 4096,
};

/* A box that is being cut. */
struct kernel_cut {
    struct dcp_kernel_job all; /* the range as one job */
    uint64_t body, body_end;   /* items of the range that can be moved `wide` at a time */
    uint32_t wide;
    uint64_t tile; /* items of one job of the body, a multiple of `wide` */
    uint64_t done; /* items that jobs were made for */
};

/* DCP_E_INVALID: the box is none that a kernel can move. */
int kernel_cut_begin(struct kernel_cut *cut, const struct dcp_device_box *box,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* The next job; false when there is none left. */
bool kernel_cut_next(struct kernel_cut *cut, struct dcp_kernel_job *ret_job);

#endif

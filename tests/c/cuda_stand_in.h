/*
 * cuda_stand_in.h: CUDA's functions on one thread, for tests of the code that calls them.
 *
 * What is put on a stream waits there until the test lets it run.  Every call checks what CUDA
 * would refuse: the context of the device must be current, a copy must lie in one piece of pinned
 * memory or in none, memory may not be freed before its stream is there.  Any call can be made to
 * fail.
 */
#ifndef CUDA_STAND_IN_H
#define CUDA_STAND_IN_H

#include "dcp_cuda.h"

enum { STAND_IN_DEVICE = 3, STAND_IN_SICK = 700 /* an illegal address, says the device */ };

struct stand_in {
    uint64_t calls;      /* that may fail, so far */
    uint64_t fail_at;    /* the number of the one that fails; 0: none */
    uint32_t fail_with;  /* its status */
    uint32_t sick_with;  /* what every question about work answers, if not 0 */
    uint32_t last_error; /* what cudaGetLastError would give */
    uint32_t depth;      /* contexts that were pushed and not popped */
    uint32_t capture_mode;
    uint32_t lists;   /* allocations of pinned memory */
    uint32_t pins;    /* pieces that are pinned now */
    uint32_t unpins;  /* calls of cudaHostUnregister */
    uint32_t objects; /* streams and events that live */
    uint32_t slabs;   /* allocations of device memory that live, or whose free waits in a stream */
    uint32_t waiting; /* things on streams that have not run */
    uint32_t copies;
    const char *order; /* what was put on streams: see below */
    bool has_pools, cufile_fails;
    void *capturing;       /* this stream captures a graph */
    bool legacy_is_caught; /* by the capture of another thread */
    const void *pinned_elsewhere;
};

/* The trainer's stream.  In `order` a lower-case letter is about it, an upper-case one about ours:
 * r record, w wait for an event, c copy, z zeros, k kernel, f free. */
extern void *const stand_in_stream;

extern struct stand_in stand_in;

/* Fresh, in place of what the process has, which is nothing. */
void stand_in_begin(void);
/* Nothing is left of it. */
void stand_in_end(void);
/* Runs all that waits on streams, or its first `count`. */
void stand_in_run(void);
void stand_in_run_some(uint32_t count);

#endif

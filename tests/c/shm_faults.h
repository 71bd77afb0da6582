/*
 * shm_faults.h: shared memory that does something at the n-th call: fails, cancels, kills.
 */
#ifndef SHM_FAULTS_H
#define SHM_FAULTS_H

#include <stdatomic.h>

#include "dcp_shm.h"

enum shm_fault {
    SHM_FINE = 0,
    SHM_FAILS,      /* the call gives -ENOSPC, without its effect; only of calls that can fail */
    SHM_FULL,       /* every allocation from that call on gives -ENOSPC */
    SHM_CANCELS,    /* sets *cancel */
    SHM_KILLS,      /* SIGKILL of the process */
    SHM_SEES_DEATH, /* from that call on no other process is alive */
};

struct shm_faults {
    struct dcp_shm shm; /* the table */
    enum shm_fault fault;
    uint32_t nth; /* 1 is the first; SHM_CANCELS and SHM_KILLS count all calls, the others
                     those that can fail */
    atomic_int *cancel;
    _Atomic uint32_t calls;
    atomic_bool hit;
};

/* A table around dcp_shm_posix(). */
void shm_faults_init(struct shm_faults *faults, enum shm_fault fault, uint32_t nth);
/* Names of segments that a process made and that are still there. */
uint32_t shm_names_of(int64_t pid);

#endif

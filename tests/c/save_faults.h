/*
 * save_faults.h: tables that pass every call on, until the n-th one fails.
 *
 * Of a collective: the rank dies before it takes part, or it takes part and never hears the answer;
 * either way it makes no further call.  Of a system call: it fails before its effect, after it, or
 * it and all later ones fail.
 */
#ifndef SAVE_FAULTS_H
#define SAVE_FAULTS_H

#include <stdatomic.h>

#include "dcp_comm.h"
#include "dcp_io.h"

enum fault_mode {
    FAULT_NONE,
    FAULT_BEFORE, /* without its effect; a rank is dead after that */
    FAULT_AFTER,  /* the reply is lost */
    FAULT_FOR_EVER, /* system calls only */
    FAULT_MODES,
};

struct comm_faults {
    struct dcp_comm inner;    /* owned: destroyed with the table */
    struct dcp_comm_sim *sim; /* borrows */
    enum fault_mode mode;
    uint32_t nth; /* from when it was armed, 1 is the next */
    uint32_t calls; /* since then */
    bool failed;
};

/* `faults` must outlive the table. */
void comm_faults_init(struct comm_faults *faults, struct dcp_comm_sim *sim,
                      const struct dcp_comm *inner, struct dcp_comm *ret_comm);
void comm_faults_arm(struct comm_faults *faults, enum fault_mode mode, uint32_t nth);

struct io_faults {
    struct dcp_io io; /* the table */
    const struct dcp_io *inner;
    enum fault_mode mode;
    int sys_errno;
    uint32_t nth;
    _Atomic uint32_t calls; /* since it was armed; an engine makes them from several threads */
    atomic_bool hit;
};

void io_faults_init(struct io_faults *faults, const struct dcp_io *inner);
void io_faults_arm(struct io_faults *faults, enum fault_mode mode, uint32_t nth, int sys_errno);

#endif

/*
 * load_receive.h: what a load reads and only Python can finish, handed over while it reads.
 */
#ifndef DCP_LOAD_RECEIVE_H
#define DCP_LOAD_RECEIVE_H

#include <stdatomic.h>

#include "load_targets.h"

struct open_overlap;

/* Zero-initialised is valid.  Borrows everything but what it says. */
struct load_receiver {
    const struct native_state *state;
    const struct load_targets *targets;
    atomic_int *cancel; /* set when Python raised, to stop the reader */
    PyObject *receiver; /* owned: the object of _receive.py */
    PyObject *error;    /* owned: the first exception, or NULL */
    PyObject *slab;     /* owned: uint8 tensor of DCP_PIECE_BYTES, or NULL before the first */
    uint8_t *slab_data;
    struct open_overlap *open; /* owned: overlaps of which a part has come */
    size_t open_count, open_cap;
    uint64_t whole_copies; /* overlaps that were copied whole */
};

/* Before reading; needs the GIL, as the three behind it. */
void load_receiver_init(struct load_receiver *self, const struct native_state *state,
                        const struct load_targets *targets, PyObject *receiver, atomic_int *cancel);
/* After it: lets go of Python's object and of the memory. */
void load_receiver_finish(struct load_receiver *self);
/* Raises what Python raised while reading: -1; else 0. */
int load_receiver_raise(struct load_receiver *self);
/* For the garbage collector: what it owns may hold the load. */
int load_receiver_traverse(const struct load_receiver *self, visitproc visit, void *arg);
/* Idempotent. */
void load_receiver_clean_up(struct load_receiver *self);

/* A dcp_piece_fn and a dcp_record_fn; ctx is the receiver.  They take the GIL. */
void load_receive_piece(void *ctx, const struct dcp_piece *piece);
int load_receive_record(void *ctx, const struct dcp_read_plan *plan,
                        const struct dcp_read_item *item, const uint8_t *bytes, size_t len,
                        struct dcp_error *err);

#endif

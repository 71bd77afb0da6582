/*
 * save_object.h: _native.Save and how its steps run (private to save_object.c, save_run.c,
 * save_stage.c and save_upload.c).
 */
#ifndef DCP_PY_SAVE_OBJECT_H
#define DCP_PY_SAVE_OBJECT_H

#include "module.h"

#include <stdatomic.h>

#include "native_run.h"
#include "save_items.h"

#include "dcp_upload.h"

/* Which agreement comes next.  Changed under the GIL and before the call, so that no signal handler
 * can make a rank enter the same one twice. */
enum phase {
    PHASE_PLANNING,
    /* Planned outside of the core (save_outside.c). */
    PHASE_GATHERING,
    PHASE_SCATTERING,
    PHASE_PLACING,
    PHASE_SETTLING,
    PHASE_COMPARING,
    PHASE_AGREED,
    PHASE_OVER,
};

/* What ranks send each other while they plan outside of the core. */
struct save_exchange {
    PyObject *sent;            /* keeps the bytes of `mine` and `parts` */
    struct dcp_span mine;      /* borrows */
    struct dcp_span *parts;    /* owned, per rank, each borrows */
    struct dcp_span *received; /* owned, per rank, or NULL; points into `block` */
    uint8_t *block;            /* owned */
    struct dcp_buf part;       /* of this rank */
};

struct save_object {
    PyObject_HEAD PyObject *group; /* struct group_object */
    struct dcp_save *save;
    enum phase phase;
    bool independent; /* agree is not collective */
    bool left;        /* a step was left running on the group's plan */
    struct save_items items;
    struct save_exchange exchange;
    struct device_set *devices; /* of the sources; NULL: none */
    bool staged;
    bool stage_open; /* staging was begun: the devices are read until it has ended */
    struct dcp_stage_params staging; /* of the step in progress */
    unsigned int arenas;             /* the same */
    uint64_t orphan_timeout_ns;      /* the same */
    /* Of a background save: what it borrows until it has ended. */
    struct dcp_upload *upload;
    PyObject *store, *process, *watch; /* or NULL */
    PyObject *upload_record;           /* keeps the bytes of this rank's failure */
    struct dcp_failure upload_mine;
    struct dcp_failure mine; /* argument of the collective call in progress */
    bool mine_given;
    PyObject *mine_record; /* keeps mine.bytes alive */
    struct dcp_failure_list failures;
    atomic_int cancel;
    _Atomic uint64_t progress_bytes;
    uint64_t planned_bytes; /* of write(); set before it begins */
    PyObject *pending;      /* exception of a signal handler, raised at the next local step */
    PyObject *interrupt;    /* the first one of them, kept to tell it from other errors */
};

static inline struct save_object *
as_save(PyObject *object)
{
    return (struct save_object *)object;
}

/* Idempotent; needs the GIL. */
void save_exchange_clean_up(struct save_exchange *exchange);

/* Before items are built anew, and after it: the devices of their sources are the save's.  0 or -1
 * with an exception. */
void save_drop_sources(struct save_object *self);
int save_take_devices(struct save_object *self);
/* Nothing reads the sources any more: tensors and devices go back. */
void save_end_sources(struct save_object *self);

/* Runs a core step off the GIL; -1 with the exception of the core, of a signal handler, or of the
 * runner. */
int save_run_step(PyObject *object, native_fn fn, bool collective, int *ret_rc);

/* The same for an agreement, with `record`, this rank's failure or None.  Returns None, or the
 * failures of all ranks. */
PyObject *save_run_collective(PyObject *object, native_fn fn, PyObject *record);

/* A short step on the calling thread: nothing to wait for, nothing to interrupt.  Negative with an
 * exception. */
int save_run_here(PyObject *object, native_fn fn);

#endif

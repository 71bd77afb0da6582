/*
 * load_object.h: _native.Load (private to load_object.c, its steps, and load_info.c, what is known
 * of it).
 */
#ifndef DCP_PY_LOAD_OBJECT_H
#define DCP_PY_LOAD_OBJECT_H

#include "module.h"

#include <stdatomic.h>

#include "load_receive.h"

/* Which agreement comes next.  Changed under the GIL and before the call, so that no signal handler
 * can make a rank enter the same one twice. */
enum phase { PHASE_OPENING, PHASE_PLANNING, PHASE_READING, PHASE_OVER };

/* Whether devices read from storage by themselves: Config.gpu_direct. */
enum gpu_direct { GPU_DIRECT_OFF = 0, GPU_DIRECT_AUTO = 1, GPU_DIRECT_ON = 2 };

struct load_object {
    PyObject_HEAD PyObject *group; /* struct group_object */
    struct dcp_load *load;
    enum phase phase;
    struct load_targets targets;
    struct device_set *devices; /* of the targets; NULL: none */
    struct dcp_device_put *put; /* while reading, with devices */
    struct dcp_device_stats put_stats;
    struct dcp_failure mine; /* argument of the collective call in progress */
    bool mine_given;
    PyObject *mine_record;
    struct dcp_failure_list failures;
    int local_code; /* what parsing the metadata gave on this rank */
    struct dcp_error local_err;
    bool strict_coverage;
    enum gpu_direct gpu_direct;
    uint64_t hole_bytes;
    struct dcp_read_stats stats;
    struct load_receiver receiver;
    atomic_int cancel;
    _Atomic uint64_t progress_bytes;
    PyObject *pending;   /* exception of a signal handler, raised at the next local step */
    PyObject *interrupt; /* the first one of them, kept to tell it from other errors */
};

static inline struct load_object *
as_load(PyObject *object)
{
    return (struct load_object *)object;
}

/* ---- load_info.c: methods that change nothing ---- */
extern const char load_results_doc[], load_metadata_doc[], load_info_doc[], load_progress_doc[],
    load_report_doc[], load_outcome_doc[];
PyObject *load_results(PyObject *object, PyObject *unused);
PyObject *load_metadata(PyObject *object, PyObject *unused);
PyObject *load_info(PyObject *object, PyObject *unused);
PyObject *load_progress(PyObject *object, PyObject *unused);
PyObject *load_get_report(PyObject *object, PyObject *unused);
PyObject *load_get_outcome(PyObject *object, PyObject *objects);

#endif

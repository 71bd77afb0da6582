/*
 * load_info.c: what is known of a load, as Python sees it: counts, names, what is left to finish.
 */
#include "load_object.h"

#include <stddef.h>

#include "load_report.h"

#define OF_LOAD(field) {#field, offsetof(struct load_object, field)}
#define OF_READER(field) {#field, offsetof(struct load_object, stats.field)}

static const struct native_number numbers[] = {
    OF_READER(read_bytes),
    OF_READER(hot_bytes),
    OF_READER(shared_bytes),
    OF_READER(wanted_bytes),
    OF_READER(verified_bytes),
    OF_READER(unverified_bytes),
    OF_READER(straight_bytes),
    OF_READER(device_direct_bytes),
    OF_READER(requests_count),
    OF_READER(files_count),
    OF_READER(direct_files_count),
    OF_READER(hot_files_count),
    OF_READER(wall_ns),
    OF_LOAD(hole_bytes),
    {"copies_count", offsetof(struct load_object, targets.copies_count)},
    {"device_targets_count", offsetof(struct load_object, targets.device_count)},
    {"whole_copies", offsetof(struct load_object, receiver.whole_copies)},
};

enum { NUMBERS_COUNT = sizeof numbers / sizeof numbers[0] };

const char load_results_doc[] =
    "results()\n--\n\n"
    "(objects, tensors): (target, fqn, path) of every object that is wanted; "
    "by target, the tensor that it fills, or None.";

PyObject *
load_results(PyObject *object, PyObject *unused)
{
    struct load_object *self = as_load(object);

    (void)unused;
    return Py_BuildValue("(OO)", self->targets.objects, self->targets.tensors);
}

const char load_metadata_doc[] =
    "metadata()\n--\n\nThe metadata image that was read, or its end, as bytes.";

PyObject *
load_metadata(PyObject *object, PyObject *unused)
{
    struct dcp_span image = dcp_load_metadata_image(as_load(object)->load);

    (void)unused;
    return PyBytes_FromStringAndSize((const char *)image.data, (Py_ssize_t)image.len);
}

const char load_info_doc[] = "info()\n--\n\nWhat is known of the load: counts and bytes.";

PyObject *
load_info(PyObject *object, PyObject *unused)
{
    struct load_object *self = as_load(object);
    bool unsupported = self->local_code == DCP_E_UNSUPPORTED;
    const char *foreign = dcp_load_metadata(self->load)->foreign;
    PyObject *dict =
        Py_BuildValue("{szszsOsOsssK}", "unsupported", unsupported ? self->local_err.message : NULL,
                      "foreign", foreign[0] == 0 ? NULL : foreign, "rank_local",
                      dcp_load_rank_local(self->load) ? Py_True : Py_False, "elsewhere",
                      dcp_load_is_elsewhere(self->load) ? Py_True : Py_False, "share_reason",
                      dcp_load_share_reason(self->load), "progress_bytes",
                      (unsigned long long)atomic_load(&self->progress_bytes));

    (void)unused;
    if (dict != NULL && (native_dict_put_numbers(dict, self, numbers, NUMBERS_COUNT) != 0 ||
                         device_set_report(self->devices, &self->put_stats, dict) != 0)) {
        Py_CLEAR(dict);
    }
    return dict;
}

const char load_progress_doc[] = "progress()\n--\n\n"
                                 "(done, total) bytes of a read() that may still run.";

PyObject *
load_progress(PyObject *object, PyObject *unused)
{
    struct load_object *self = as_load(object);

    (void)unused;
    return Py_BuildValue("(KK)", (unsigned long long)atomic_load(&self->progress_bytes),
                         (unsigned long long)self->targets.plan.wanted_bytes);
}

const char load_report_doc[] =
    "report()\n--\n\n"
    "What became of which name, once targets() has planned; lists of names as "
    "bytes (load_report.h).";

PyObject *
load_get_report(PyObject *object, PyObject *unused)
{
    (void)unused;
    return load_report(&as_load(object)->targets);
}

const char load_outcome_doc[] =
    "outcome(objects, /)\n--\n\n"
    "After a failure: the names whose memory was filled, filled partly, or not touched.  "
    "`objects`: what became of these: 0 untouched, 1 partly, 2 filled.";

PyObject *
load_get_outcome(PyObject *object, PyObject *objects)
{
    long state = PyLong_AsLong(objects);

    if (state == -1 && PyErr_Occurred() != NULL) {
        return NULL;
    }
    if (state < DCP_TARGET_UNTOUCHED || state > DCP_TARGET_FILLED) {
        PyErr_SetString(PyExc_ValueError, "objects must be 0, 1 or 2");
        return NULL;
    }
    return load_outcome(&as_load(object)->targets, (enum dcp_target_state)state);
}

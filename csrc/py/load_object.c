/*
 * load_object.c: _native.Load: one load in flight.
 *
 * Order of calls: open (collective), targets, status (collective), read, status (collective).  What
 * only Python can finish is handed over while it is read (load_receive.c).  leave makes whichever
 * agreement the other ranks wait in.
 */
#include "module.h"

#include <stdatomic.h>

#include "errors.h"
#include "key_filter.h"
#include "load_receive.h"
#include "load_report.h"
#include "native_run.h"

/* Which agreement comes next.  Changed under the GIL and before the call, so that no signal handler
 * can make a rank enter the same one twice. */
enum phase { PHASE_OPENING, PHASE_PLANNING, PHASE_READING, PHASE_OVER };

struct load_object {
    PyObject_HEAD PyObject *group; /* struct group_object */
    struct dcp_load *load;
    enum phase phase;
    struct load_targets targets;
    struct dcp_failure mine; /* argument of the collective call in progress */
    bool mine_given;
    PyObject *mine_record;
    struct dcp_failure_list failures;
    int local_code; /* what parsing the metadata gave on this rank */
    struct dcp_error local_err;
    bool strict_coverage;
    uint64_t hole_bytes;
    struct dcp_read_stats stats;
    struct load_receiver receiver;
    atomic_int cancel;
    _Atomic uint64_t progress_bytes;
    PyObject *pending;   /* exception of a signal handler, raised at the next local step */
    PyObject *interrupt; /* the first one of them, kept to tell it from other errors */
};

static struct load_object *
as_load(PyObject *object)
{
    return (struct load_object *)object;
}

/* Runs a core step off the GIL.  False when it had to be left running: the interrupt is raised. */
static bool
run_step(PyObject *object, native_fn fn, int *ret_rc, struct dcp_error *ret_err)
{
    struct load_object *self = as_load(object);
    bool left = native_run(object, fn, self, &self->cancel, &self->pending, ret_rc, ret_err) != 0;

    if (self->interrupt == NULL) {
        self->interrupt = Py_XNewRef(self->pending);
    }
    return !left || native_raise_pending(&self->pending) == 0;
}

static PyObject *
run_collective(PyObject *object, native_fn fn, PyObject *record)
{
    struct load_object *self = as_load(object);
    enum phase next = self->phase + 1;
    struct dcp_group *group = group_object_get(self->group);
    struct dcp_error err;
    PyObject *result;
    int rc = 0;

    if (group == NULL || failure_from_python(record, &self->mine, &self->mine_given) != 0) {
        return NULL;
    }
    Py_XSETREF(self->mine_record, Py_NewRef(record));
    self->mine.rank = dcp_group_comm(group)->rank;
    dcp_failure_list_clean_up(&self->failures);
    self->phase = PHASE_OVER;
    if (!run_step(object, fn, &rc, &err)) {
        dcp_group_poison(group);
        return NULL;
    }
    if (rc == 0) {
        self->phase = next;
        Py_RETURN_NONE;
    }
    if (rc != DCP_E_PEER) {
        return native_set_error(module_error_class(object), &err);
    }
    result = native_failures(module_error_class(object), &self->failures);
    dcp_failure_list_clean_up(&self->failures);
    return result;
}

/* ---- construction ---- */

static PyObject *
load_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"group",           "path",   "rank",      "call_hash", "verify",
                            "strict_coverage", "direct", "read_once", NULL};
    struct module_state *state = module_state_of(type);
    struct dcp_load_params params = {.io = dcp_io_posix(), .shm = dcp_shm_posix()};
    unsigned long long call_hash = 0;
    unsigned int rank = 0;
    int verify = 1, strict = 1, direct = DCP_DIRECT_AUTO, once = DCP_READ_ONCE_HOST;
    struct dcp_group *group;
    struct load_object *self;
    PyObject *group_arg;
    struct dcp_error err;

    if (state == NULL || !PyArg_ParseTupleAndKeywords(
                             args, kwargs, "Os|$IKipii:Load", names, &group_arg, &params.dir_path,
                             &rank, &call_hash, &verify, &strict, &direct, &once)) {
        return NULL;
    }
    if (!Py_IS_TYPE(group_arg, state->group_type)) {
        PyErr_SetString(PyExc_TypeError, "group must be a _native.Group");
        return NULL;
    }
    group = group_object_get(group_arg);
    self = group == NULL ? NULL : (struct load_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->group = Py_NewRef(group_arg);
    self->strict_coverage = strict != 0;
    params.rank = rank;
    params.call_hash = call_hash;
    params.verify = verify != 0;
    params.verify_all = verify == 2;
    params.direct = (enum dcp_direct)direct;
    params.read_once = (enum dcp_read_once)once;
    dcp_error_clear(&err);
    if (dcp_load_new(group, &params, &self->load, &err) != 0) {
        Py_DECREF(self);
        return native_set_error(state->error_class, &err);
    }
    return (PyObject *)self;
}

/* The exceptions that it keeps hold frames that hold it. */
static int
load_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct load_object *self = as_load(object);

    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->pending);
    Py_VISIT(self->interrupt);
    Py_VISIT(self->receiver.error);
    return 0;
}

static int
load_clear(PyObject *object)
{
    struct load_object *self = as_load(object);

    Py_CLEAR(self->pending);
    Py_CLEAR(self->interrupt);
    Py_CLEAR(self->receiver.error);
    return 0;
}

static void
load_dealloc(PyObject *object)
{
    struct load_object *self = as_load(object);
    PyTypeObject *type = Py_TYPE(object);

    PyObject_GC_UnTrack(object);
    load_receiver_clean_up(&self->receiver);
    load_targets_clean_up(&self->targets);
    dcp_load_destroy(self->load);
    dcp_failure_list_clean_up(&self->failures);
    Py_XDECREF(self->mine_record);
    Py_XDECREF(self->pending);
    Py_XDECREF(self->interrupt);
    Py_XDECREF(self->group);
    type->tp_free(object);
    Py_DECREF(type);
}

/* ---- steps ---- */

PyDoc_STRVAR(open_doc, "open(failure, /)\n--\n\n"
                       "Collective: read the metadata once and share it.  None, or the failures of "
                       "all ranks.");

static int
step_open(void *arg, struct dcp_error *err)
{
    struct load_object *self = arg;
    int rc = dcp_load_open(self->load, self->mine_given ? &self->mine : NULL, &self->local_code,
                           &self->failures, err);

    if (rc == 0 && self->local_code != 0) {
        self->local_err = *err;
    }
    return rc;
}

static PyObject *
load_open(PyObject *object, PyObject *record)
{
    if (as_load(object)->phase != PHASE_OPENING) {
        PyErr_SetString(PyExc_RuntimeError, "a load is opened once, at its start");
        return NULL;
    }
    return run_collective(object, step_open, record);
}

PyDoc_STRVAR(targets_doc,
             "targets(state_dict, *, flatten_state_dict=True, "
             "flatten_sharded_tensors=True, allow_partial_load=False, "
             "names=None, predicate=None)\n--\n\n"
             "Plan the reads that fill a state dict.  With `names` (tuple of str: keys "
             "and prefixes of whole components) only the leaves that one of them or "
             "`predicate` selects; then returns (names that selected nothing, "
             "top-level keys with selected leaves).");

/* Targets, their overlaps, and the counting of what arrives in them. */
static int
plan_targets(struct load_object *self, struct module_state *state, PyObject *state_dict,
             const struct load_targets_options *options)
{
    struct dcp_error err;
    int rc;

    load_targets_clean_up(&self->targets);
    if (load_targets_build(&state->native, dcp_load_metadata(self->load), state_dict, options,
                           &self->targets) != 0) {
        return -1;
    }
    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc =
        dcp_read_plan_build(&self->targets.plan, self->strict_coverage, &self->hole_bytes, &err);
    if (rc == 0) {
        rc = dcp_read_plan_track(&self->targets.plan, &err);
    }
    Py_END_ALLOW_THREADS if (rc != 0)
    {
        native_set_error(state->error_class, &err);
    }
    return rc;
}

static PyObject *
load_set_targets(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"state_dict",
                               "flatten_state_dict",
                               "flatten_sharded_tensors",
                               "allow_partial_load",
                               "names",
                               "predicate",
                               NULL};
    struct load_object *self = as_load(object);
    struct module_state *state = module_state_of(Py_TYPE(object));
    struct load_targets_options options = {0};
    struct key_filter filter = {0};
    int flatten = 1, flatten_sharded = 1, partial = 0;
    PyObject *state_dict, *names = Py_None, *predicate = Py_None, *result = NULL;

    if (state == NULL || native_raise_pending(&self->pending) != 0 ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O|$pppOO:targets", keywords, &state_dict,
                                     &flatten, &flatten_sharded, &partial, &names, &predicate)) {
        return NULL;
    }
    if (self->local_code != 0) {
        return native_set_error(state->error_class, &self->local_err);
    }
    if (names != Py_None) {
        if (!PyTuple_Check(names)) {
            PyErr_SetString(PyExc_TypeError, "names must be a tuple of str");
            return NULL;
        }
        if (key_filter_init(&filter, names, predicate == Py_None ? NULL : predicate) != 0) {
            return NULL;
        }
        options.filter = &filter;
    }
    options.flatten_state_dict = flatten != 0;
    options.flatten_sharded_tensors = flatten_sharded != 0;
    options.allow_partial_load = partial != 0;
    if (plan_targets(self, state, state_dict, &options) == 0) {
        result = options.filter != NULL ? key_filter_result(&filter) : Py_NewRef(Py_None);
    }
    key_filter_clean_up(&filter);
    return result;
}

PyDoc_STRVAR(status_doc, "status(failure, /)\n--\n\n"
                         "Collective: None when no rank failed, else the failures of all ranks.");

static int
step_status(void *arg, struct dcp_error *err)
{
    struct load_object *self = arg;

    return dcp_load_status(self->load, self->mine_given ? &self->mine : NULL, &self->failures, err);
}

static PyObject *
load_status(PyObject *object, PyObject *record)
{
    enum phase phase = as_load(object)->phase;

    if (phase != PHASE_PLANNING && phase != PHASE_READING) {
        PyErr_SetString(PyExc_RuntimeError, "a load that is not open has no status");
        return NULL;
    }
    return run_collective(object, step_status, record);
}

PyDoc_STRVAR(leave_doc, "leave(failure, /)\n--\n\n"
                        "Collective where the others wait for this rank: let them fail by name. "
                        "Nothing once the load has ended.");

static PyObject *
load_leave(PyObject *object, PyObject *record)
{
    switch (as_load(object)->phase) {
    case PHASE_OPENING:
        return load_open(object, record);
    case PHASE_PLANNING:
    case PHASE_READING:
        return load_status(object, record);
    default:
        Py_RETURN_NONE;
    }
}

PyDoc_STRVAR(interrupt_doc, "interrupt()\n--\n\n"
                            "The first exception of a signal handler during a step, or None.");

static PyObject *
load_interrupt(PyObject *object, PyObject *unused)
{
    struct load_object *self = as_load(object);

    (void)unused;
    return Py_NewRef(self->interrupt == NULL ? Py_None : self->interrupt);
}

PyDoc_STRVAR(read_doc, "read(receiver, /)\n--\n\n"
                       "Read and verify everything that was planned.  `receiver` is called by the "
                       "reading thread with what only Python can finish; what it raises stops the "
                       "load and is raised here.");

static int
step_read(void *arg, struct dcp_error *err)
{
    struct load_object *self = arg;

    return dcp_load_read(self->load, &self->targets.plan, &self->cancel, &self->progress_bytes,
                         load_receive_record, &self->receiver, &self->stats, err);
}

static PyObject *
load_read(PyObject *object, PyObject *receiver)
{
    struct load_object *self = as_load(object);
    struct module_state *state = module_state_of(Py_TYPE(object));
    struct dcp_error err;
    int rc = 0;

    if (state == NULL || native_raise_pending(&self->pending) != 0) {
        return NULL;
    }
    load_receiver_init(&self->receiver, &state->native, &self->targets, receiver, &self->cancel);
    self->targets.plan.on_piece = load_receive_piece;
    self->targets.plan.on_piece_ctx = &self->receiver;
    if (!run_step(object, step_read, &rc, &err)) {
        return NULL;
    }
    load_receiver_finish(&self->receiver);
    if (native_raise_pending(&self->pending) != 0 || load_receiver_raise(&self->receiver) != 0) {
        return NULL;
    }
    if (rc != 0) {
        return native_set_error(module_error_class(object), &err);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(has_meta_doc, "has_meta(state_dict, /)\n--\n\n"
                           "Whether a state dict holds tensors on the meta device.");

static PyObject *
load_has_meta(PyObject *object, PyObject *state_dict)
{
    struct module_state *state = module_state_of(Py_TYPE(object));
    int found = state == NULL ? -1 : state_dict_has_meta(&state->native, state_dict);

    return found < 0 ? NULL : PyBool_FromLong(found);
}

PyDoc_STRVAR(results_doc, "results()\n--\n\n"
                          "(objects, tensors): (target, fqn, path) of every object that is wanted; "
                          "by target, the tensor that it fills, or None.");

static PyObject *
load_results(PyObject *object, PyObject *unused)
{
    struct load_object *self = as_load(object);

    (void)unused;
    return Py_BuildValue("(OO)", self->targets.objects, self->targets.tensors);
}

PyDoc_STRVAR(metadata_doc,
             "metadata()\n--\n\nThe metadata image that was read, or its end, as bytes.");

static PyObject *
load_metadata(PyObject *object, PyObject *unused)
{
    struct dcp_span image = dcp_load_metadata_image(as_load(object)->load);

    (void)unused;
    return PyBytes_FromStringAndSize((const char *)image.data, (Py_ssize_t)image.len);
}

PyDoc_STRVAR(info_doc, "info()\n--\n\nWhat is known of the load: counts and bytes.");

static PyObject *
load_info(PyObject *object, PyObject *unused)
{
    struct load_object *self = as_load(object);
    const struct dcp_read_stats *stats = &self->stats;
    bool unsupported = self->local_code == DCP_E_UNSUPPORTED;
    const char *foreign = dcp_load_metadata(self->load)->foreign;

    (void)unused;
    return Py_BuildValue(
        "{szszsOsssKsKsKsKsKsKsKsKsKsKsKsKsKsK}", "unsupported",
        unsupported ? self->local_err.message : NULL, "foreign", foreign[0] == 0 ? NULL : foreign,
        "rank_local", dcp_load_rank_local(self->load) ? Py_True : Py_False, "share_reason",
        dcp_load_share_reason(self->load), "read_bytes", (unsigned long long)stats->read_bytes,
        "hot_bytes", (unsigned long long)stats->hot_bytes, "shared_bytes",
        (unsigned long long)stats->shared_bytes, "wanted_bytes",
        (unsigned long long)stats->wanted_bytes, "verified_bytes",
        (unsigned long long)stats->verified_bytes, "unverified_bytes",
        (unsigned long long)stats->unverified_bytes, "straight_bytes",
        (unsigned long long)stats->straight_bytes, "requests_count",
        (unsigned long long)stats->requests_count, "files_count",
        (unsigned long long)stats->files_count, "wall_ns", (unsigned long long)stats->wall_ns,
        "hole_bytes", (unsigned long long)self->hole_bytes, "progress_bytes",
        (unsigned long long)atomic_load(&self->progress_bytes), "copies_count",
        (unsigned long long)self->targets.copies_count, "whole_copies",
        (unsigned long long)self->receiver.whole_copies);
}

PyDoc_STRVAR(report_doc, "report()\n--\n\n"
                         "What became of which name, once targets() has planned; lists of names as "
                         "bytes (load_report.h).");

static PyObject *
load_get_report(PyObject *object, PyObject *unused)
{
    (void)unused;
    return load_report(&as_load(object)->targets);
}

PyDoc_STRVAR(outcome_doc,
             "outcome(objects, /)\n--\n\n"
             "After a failure: the names whose memory was filled, filled partly, or not touched.  "
             "`objects`: what became of these: 0 untouched, 1 partly, 2 filled.");

static PyObject *
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

static PyMethodDef load_methods[] = {
    {"open", load_open, METH_O, open_doc},
    {"has_meta", load_has_meta, METH_O, has_meta_doc},
    {"targets", (PyCFunction)(void (*)(void))load_set_targets, METH_VARARGS | METH_KEYWORDS,
     targets_doc},
    {"status", load_status, METH_O, status_doc},
    {"leave", load_leave, METH_O, leave_doc},
    {"interrupt", load_interrupt, METH_NOARGS, interrupt_doc},
    {"read", load_read, METH_O, read_doc},
    {"results", load_results, METH_NOARGS, results_doc},
    {"metadata", load_metadata, METH_NOARGS, metadata_doc},
    {"info", load_info, METH_NOARGS, info_doc},
    {"report", load_get_report, METH_NOARGS, report_doc},
    {"outcome", load_get_outcome, METH_O, outcome_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(load_doc, "Load(group, path, *, rank=0, call_hash=0, verify=1, strict_coverage=True, "
                       "direct=0, read_once=0)\n--\n\nOne load from the directory `path`.");

static PyType_Slot load_slots[] = {
    {Py_tp_doc, (void *)load_doc},
    {Py_tp_new, load_new},
    {Py_tp_dealloc, load_dealloc},
    {Py_tp_traverse, load_traverse},
    {Py_tp_clear, load_clear},
    {Py_tp_methods, load_methods},
    {0, NULL},
};

PyType_Spec load_type_spec = {
    .name = "dcp_native._native.Load",
    .basicsize = sizeof(struct load_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = load_slots,
};

/*
 * load_object.c: _native.Load: one load in flight.
 *
 * Order of calls: open (collective), targets, status (collective), read, status (collective).  What
 * only Python can finish is handed over while it is read (load_receive.c).  leave makes whichever
 * agreement the other ranks wait in.
 */
#include "load_object.h"

#include "errors.h"
#include "key_filter.h"
#include "native_run.h"

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
    static char *names[] = {
        "group",  "path",      "rank",      "call_hash",  "verify", "strict_coverage",
        "direct", "read_once", "elsewhere", "gpu_direct", NULL};
    struct module_state *state = module_state_of(type);
    struct dcp_load_params params = {.io = dcp_io_posix(), .shm = dcp_shm_posix()};
    unsigned long long call_hash = 0;
    unsigned int rank = 0;
    int verify = 1, strict = 1, direct = DCP_DIRECT_AUTO, once = DCP_READ_ONCE_HOST;
    int elsewhere = 0, gpu_direct = GPU_DIRECT_OFF;
    struct dcp_group *group;
    struct load_object *self;
    PyObject *group_arg;
    struct dcp_error err;

    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "Os|$IKipiipi:Load", names, &group_arg,
                                     &params.dir_path, &rank, &call_hash, &verify, &strict, &direct,
                                     &once, &elsewhere, &gpu_direct)) {
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
    self->gpu_direct = (enum gpu_direct)gpu_direct;
    params.rank = rank;
    params.call_hash = call_hash;
    params.verify = verify != 0;
    params.verify_all = verify == 2;
    params.direct = (enum dcp_direct)direct;
    params.read_once = (enum dcp_read_once)once;
    params.elsewhere = elsewhere != 0;
    dcp_error_clear(&err);
    if (dcp_load_new(group, &params, &self->load, &err) != 0) {
        Py_DECREF(self);
        return native_set_error(state->error_class, &err);
    }
    return (PyObject *)self;
}

/* Everything has arrived or will not.  0, or -1 with an exception. */
static int
end_pieces(struct load_object *self)
{
    struct dcp_device_put *put = self->put;
    int rc;

    self->put = NULL;
    Py_BEGIN_ALLOW_THREADS dcp_device_put_destroy(put); /* it may wait for a device that hangs */
    Py_END_ALLOW_THREADS rc = device_set_lead(self->devices);
    device_set_give_back(self->devices);
    load_receiver_finish(&self->receiver);
    return rc;
}

/* The same for a load whose caller is gone, in whatever state that left Python. */
static void
end_for_nobody(struct load_object *self)
{
    PyObject *type, *value, *traceback;

    if (self->put == NULL) {
        return;
    }
    PyErr_Fetch(&type, &value, &traceback);
    if (end_pieces(self) != 0) {
        PyErr_WriteUnraisable(NULL);
    }
    PyErr_Restore(type, value, traceback);
}

/* The exceptions that it keeps hold frames that hold it. */
static int
load_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct load_object *self = as_load(object);

    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->pending);
    Py_VISIT(self->interrupt);
    return load_receiver_traverse(&self->receiver, visit, arg);
}

static int
load_clear(PyObject *object)
{
    struct load_object *self = as_load(object);

    Py_CLEAR(self->pending);
    Py_CLEAR(self->interrupt);
    load_receiver_clean_up(&self->receiver);
    return 0;
}

static void
load_dealloc(PyObject *object)
{
    struct load_object *self = as_load(object);
    PyTypeObject *type = Py_TYPE(object);

    PyObject_GC_UnTrack(object);
    end_for_nobody(self);
    load_receiver_clean_up(&self->receiver);
    load_targets_clean_up(&self->targets);
    device_set_clean_up(&self->devices);
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
    PyObject *result = run_collective(object, step_open, record);
    if (result == Py_None && dcp_load_is_elsewhere(as_load(object)->load)) {
        as_load(object)->phase = PHASE_OVER;
    }
    return result;
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
    device_set_clean_up(&self->devices);
    if (load_targets_build(&state->native, dcp_load_metadata(self->load), state_dict, options,
                           &self->targets) != 0 ||
        (self->gpu_direct != GPU_DIRECT_OFF &&
         device_set_use_files(self->devices, self->gpu_direct == GPU_DIRECT_ON) != 0) ||
        device_set_follow(self->devices) != 0) { /* torch's code ran while targets were made */
        device_set_give_back(self->devices);
        return -1;
    }
    self->targets.plan.devices = device_set_list(self->devices);
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
    options.devices = &self->devices;
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
    struct dcp_error put_err;
    int rc = dcp_load_read(self->load, &self->targets.plan, &self->cancel, &self->progress_bytes,
                           load_receive_record, &self->receiver, &self->stats, err);
    int put_rc;

    if (self->put == NULL) {
        return rc;
    }
    dcp_error_clear(&put_err);
    put_rc = dcp_device_put_finish(self->put, &self->cancel, &put_err);
    dcp_device_put_get_stats(self->put, &self->put_stats);
    if (rc == 0 && put_rc != 0) {
        *err = put_err;
    }
    return rc != 0 ? rc : put_rc;
}

/* Pieces go to the targets on devices; what is not theirs goes to Python. */
static int
begin_pieces(struct load_object *self, struct module_state *state, PyObject *receiver)
{
    struct dcp_read_plan *plan = &self->targets.plan;
    struct dcp_error err;

    load_receiver_init(&self->receiver, &state->native, &self->targets, receiver, &self->cancel);
    plan->on_piece = load_receive_piece;
    plan->on_piece_ctx = &self->receiver;
    if (self->targets.device_count == 0) {
        return 0;
    }
    dcp_error_clear(&err);
    if (dcp_device_put_new(plan, load_receive_piece, &self->receiver, &self->put, &err) != 0) {
        native_set_error(state->error_class, &err);
        return -1;
    }
    dcp_device_put_set_cancel(self->put, &self->cancel);
    plan->on_piece = dcp_device_put_piece;
    plan->on_range = self->gpu_direct != GPU_DIRECT_OFF ? dcp_device_put_range : NULL;
    plan->on_piece_ctx = self->put;
    return 0;
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
    if (begin_pieces(self, state, receiver) != 0) {
        device_set_give_back(self->devices); /* nothing is on their streams */
        load_receiver_finish(&self->receiver);
        return NULL;
    }
    if (!run_step(object, step_read, &rc, &err)) {
        return NULL;
    }
    if (end_pieces(self) != 0 && rc == 0) {
        return NULL;
    }
    PyErr_Clear();
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

static PyMethodDef load_methods[] = {
    {"open", load_open, METH_O, open_doc},
    {"has_meta", load_has_meta, METH_O, has_meta_doc},
    {"targets", (PyCFunction)(void (*)(void))load_set_targets, METH_VARARGS | METH_KEYWORDS,
     targets_doc},
    {"status", load_status, METH_O, status_doc},
    {"leave", load_leave, METH_O, leave_doc},
    {"interrupt", load_interrupt, METH_NOARGS, interrupt_doc},
    {"read", load_read, METH_O, read_doc},
    {"results", load_results, METH_NOARGS, load_results_doc},
    {"metadata", load_metadata, METH_NOARGS, load_metadata_doc},
    {"info", load_info, METH_NOARGS, load_info_doc},
    {"progress", load_progress, METH_NOARGS, load_progress_doc},
    {"report", load_get_report, METH_NOARGS, load_report_doc},
    {"outcome", load_get_outcome, METH_O, load_outcome_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(load_doc, "Load(group, path, *, rank=0, call_hash=0, verify=1, strict_coverage=True, "
                       "direct=0, read_once=0, elsewhere=False, gpu_direct=0)\n--\n\nOne load from "
                       "the directory `path`.");

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

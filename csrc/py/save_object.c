/*
 * save_object.c: _native.Save: one save in flight.
 *
 * Order of calls: open, claim, add, agree, compare, write, finish; or, in the background, after
 * compare what save_upload.c has.  agree, compare (with a base) and finish are collective and
 * return None, or the failures of all ranks as a list of (rank, pickled exception or exception).
 * leave makes whichever of them the other ranks wait in.
 *
 * What the core touches while the GIL is dropped lives in this object, which native_run keeps
 * alive.
 */
#include "save_object.h"

#include "errors.h"
#include "save_info.h"
#include "save_outside.h"
#include "save_params.h"
#include "save_upload.h"

/* ---- construction ---- */

static PyObject *
save_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    struct module_state *state = module_state_of(type);
    struct dcp_save_params params = {0};
    struct dcp_group *group;
    struct save_object *self;
    PyObject *group_arg;
    struct dcp_error err;

    if (state == NULL || save_params_parse(args, kwargs, &group_arg, &params) != 0) {
        return NULL;
    }
    if (!Py_IS_TYPE(group_arg, state->group_type)) {
        PyErr_SetString(PyExc_TypeError, "group must be a _native.Group");
        return NULL;
    }
    group = group_object_get(group_arg);
    self = group == NULL ? NULL : (struct save_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->group = Py_NewRef(group_arg);
    self->independent = params.independent;
    dcp_error_clear(&err);
    if (dcp_save_new(group, &params, &self->save, &err) != 0) {
        Py_DECREF(self);
        return native_set_error(state->error_class, &err);
    }
    return (PyObject *)self;
}

/* The exceptions that it keeps hold frames that hold it. */
static int
save_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct save_object *self = as_save(object);

    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->pending);
    Py_VISIT(self->interrupt);
    return 0;
}

static int
save_clear(PyObject *object)
{
    struct save_object *self = as_save(object);

    Py_CLEAR(self->pending);
    Py_CLEAR(self->interrupt);
    return 0;
}

static void
save_dealloc(PyObject *object)
{
    struct save_object *self = as_save(object);
    PyTypeObject *type = Py_TYPE(object);

    PyObject_GC_UnTrack(object);
    if (!save_upload_release(self)) {
        return; /* its threads use the object and its group for ever: both stay */
    }
    save_stage_give_up(self);
    dcp_save_destroy(self->save);
    save_drop_sources(self);
    save_exchange_clean_up(&self->exchange);
    dcp_failure_list_clean_up(&self->failures);
    Py_XDECREF(self->mine_record);
    Py_XDECREF(self->pending);
    Py_XDECREF(self->interrupt);
    Py_XDECREF(self->group);
    type->tp_free(object);
    Py_DECREF(type);
}

/* ---- steps ---- */

PyDoc_STRVAR(open_doc, "open()\n--\n\n"
                       "Make and open the directory; True when a committed checkpoint is there.");

static int
step_open(void *arg, struct dcp_error *err)
{
    bool exists = false;
    int rc = dcp_save_open(as_save(arg)->save, &exists, err);

    return rc != 0 ? rc : exists;
}

static PyObject *
save_open(PyObject *object, PyObject *unused)
{
    int rc = save_run_here(object, step_open);

    (void)unused;
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}

PyDoc_STRVAR(claim_doc, "claim()\n--\n\n"
                        "Coordinator: claim the directory and fence older saves.");

static int
step_claim(void *arg, struct dcp_error *err)
{
    return dcp_save_claim(as_save(arg)->save, err);
}

static PyObject *
save_claim(PyObject *object, PyObject *unused)
{
    (void)unused;
    return save_run_here(object, step_claim) < 0 ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(
    add_doc,
    "add(state_dict, *, rank, thread_count=1, single_file_per_rank=True, "
    "flatten_state_dict=True, flatten_sharded_tensors=True)\n--\n\n"
    "Flatten a state dict into this rank's plan.  Tensors are borrowed until the save ends "
    "or is staged.");

static PyObject *
save_add(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"state_dict",
                            "rank",
                            "thread_count",
                            "single_file_per_rank",
                            "flatten_state_dict",
                            "flatten_sharded_tensors",
                            NULL};
    struct save_object *self = as_save(object);
    struct module_state *state = module_state_of(Py_TYPE(object));
    struct save_items_options options = {0};
    unsigned int rank = 0, thread_count = 1;
    int single = 1, flatten = 1, flatten_sharded = 1;
    PyObject *state_dict;

    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O|$IIppp:add", names, &state_dict, &rank,
                                     &thread_count, &single, &flatten, &flatten_sharded)) {
        return NULL;
    }
    options.rank = rank;
    options.thread_count = thread_count;
    options.single_file_per_rank = single != 0;
    options.flatten_state_dict = flatten != 0;
    options.flatten_sharded_tensors = flatten_sharded != 0;
    options.devices = &self->devices;
    save_drop_sources(self);
    if (save_items_build(&state->native, state_dict, &options, &self->items) != 0) {
        save_drop_sources(self);
        return NULL;
    }
    if (save_take_devices(self) != 0) {
        return NULL;
    }
    dcp_save_set_plan(self->save, &self->items.plan);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(agree_doc,
             "agree(failure, /)\n--\n\n"
             "Collective: vote, and plan where needed.  None, or the failures of all ranks.");

static int
step_agree(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;
    int rc =
        dcp_save_agree(self->save, self->mine_given ? &self->mine : NULL, &self->failures, err);

    struct dcp_save_info info;

    dcp_save_get_info(self->save, &info);
    if (rc == 0 && !info.planned_outside && !info.elsewhere) {
        dcp_save_fit_sources(self->save, self->items.sources);
    }
    return rc;
}

static PyObject *
save_agree(PyObject *object, PyObject *record)
{
    struct save_object *self = as_save(object);
    struct dcp_save_info info;
    PyObject *result;

    self->phase = PHASE_OVER;
    result = save_run_collective(object, step_agree, record);
    if (result == Py_None) {
        dcp_save_get_info(self->save, &info);
        self->phase = info.elsewhere         ? PHASE_OVER
                      : self->independent    ? PHASE_AGREED
                      : info.planned_outside ? PHASE_GATHERING
                      : info.incremental     ? PHASE_COMPARING
                                             : PHASE_AGREED;
    }
    return result;
}

PyDoc_STRVAR(compare_doc,
             "compare(failure, /)\n--\n\n"
             "With a base, collective: link what has not changed since.  None, or the failures of "
             "all ranks.");

static int
step_compare(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_compare(self->save, self->mine_given ? &self->mine : NULL, self->items.sources,
                            &self->cancel, &self->failures, err);
}

static PyObject *
save_compare(PyObject *object, PyObject *record)
{
    struct save_object *self = as_save(object);
    struct dcp_save_info info;
    PyObject *result;

    dcp_save_get_info(self->save, &info);
    if (!info.incremental) {
        Py_RETURN_NONE;
    }
    if (self->phase == PHASE_COMPARING) {
        self->phase = PHASE_OVER;
    }
    result = save_run_collective(object, step_compare, record);
    if (result == Py_None) {
        self->phase = PHASE_AGREED;
    }
    return result;
}

PyDoc_STRVAR(write_doc, "write()\n--\n\n"
                        "Write this rank's files, durable on return (with sync_files).");

static int
step_write(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_write(self->save, self->items.sources, &self->cancel, &self->progress_bytes,
                          err);
}

static PyObject *
save_write(PyObject *object, PyObject *unused)
{
    struct save_object *self = as_save(object);
    struct dcp_save_info info;
    int rc;

    (void)unused;
    dcp_save_get_info(self->save, &info);
    self->planned_bytes = info.planned_bytes;
    rc = native_raise_pending(&self->pending) != 0 ? -1
                                                   : save_run_step(object, step_write, false, &rc);
    if (!self->left) {
        save_end_sources(self);
    }
    if (rc != 0 || native_raise_pending(&self->pending) != 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(finish_doc, "finish(failure, /)\n--\n\n"
                         "Collective: commit when every rank is durable.  None, or the failures of "
                         "all ranks; then nothing was committed.");

static int
step_finish(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_finish(self->save, self->mine_given ? &self->mine : NULL, &self->failures, err);
}

static PyObject *
save_finish(PyObject *object, PyObject *record)
{
    PyObject *result;

    as_save(object)->phase = PHASE_OVER;
    result = save_run_collective(object, step_finish, record);
    if (result == Py_None && native_raise_pending(&as_save(object)->pending) != 0) {
        Py_CLEAR(result); /* committed; the interrupt still wants to be heard */
    }
    return result;
}

PyDoc_STRVAR(leave_doc, "leave(failure, /)\n--\n\n"
                        "Collective where the others wait for this rank: let them fail by name. "
                        "Nothing once the save has ended.");

static PyObject *
save_leave(PyObject *object, PyObject *record)
{
    struct save_object *self = as_save(object);

    if (self->phase == PHASE_OVER) {
        Py_RETURN_NONE;
    }
    if (self->phase == PHASE_COMPARING) {
        return save_compare(object, record);
    }
    if (save_is_outside(self)) {
        return save_leave_outside(object, record);
    }
    return self->phase == PHASE_PLANNING && !self->independent ? save_agree(object, record)
                                                               : save_finish(object, record);
}

PyDoc_STRVAR(agreed_doc, "agreed()\n--\n\n"
                         "Whether all ranks are past planning: a background save has no collective "
                         "left, what fails is told over the store.");

static PyObject *
save_agreed(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(as_save(object)->phase == PHASE_AGREED);
}

PyDoc_STRVAR(planned_doc, "planned()\n--\n\n"
                          "Whether all ranks have a plan, and what they agree on next is another "
                          "matter.");

static PyObject *
save_planned(PyObject *object, PyObject *unused)
{
    enum phase phase = as_save(object)->phase;

    (void)unused;
    return PyBool_FromLong(phase == PHASE_COMPARING || phase == PHASE_AGREED);
}

PyDoc_STRVAR(interrupt_doc, "interrupt()\n--\n\n"
                            "The first exception of a signal handler during a step, or None.");

static PyObject *
save_interrupt(PyObject *object, PyObject *unused)
{
    struct save_object *self = as_save(object);

    (void)unused;
    return Py_NewRef(self->interrupt == NULL ? Py_None : self->interrupt);
}

/* ---- what is known about it ---- */

PyDoc_STRVAR(metadata_doc, "metadata()\n--\n\n"
                           "The `.metadata` image as bytes; None on ranks that did not make it.");

static PyObject *
save_metadata(PyObject *object, PyObject *unused)
{
    struct dcp_save_info info;

    (void)unused;
    dcp_save_get_info(as_save(object)->save, &info);
    if (info.metadata.data == NULL) {
        Py_RETURN_NONE;
    }
    return PyBytes_FromStringAndSize((const char *)info.metadata.data,
                                     (Py_ssize_t)info.metadata.len);
}

PyDoc_STRVAR(info_doc, "info()\n--\n\n"
                       "What is known of the save: counts, bytes, nanoseconds per phase.");

static PyObject *
save_info(PyObject *object, PyObject *unused)
{
    struct save_object *self = as_save(object);
    struct dcp_save_info info;
    PyObject *dict;

    (void)unused;
    dcp_save_get_info(self->save, &info);
    dict = save_info_as_dict(&info, atomic_load(&self->progress_bytes));
    if (dict != NULL && device_set_report(self->devices, &info.device, dict) != 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

PyDoc_STRVAR(progress_doc, "progress()\n--\n\n"
                           "(done, total) payload bytes of a write() that may still run.");

static PyObject *
save_progress(PyObject *object, PyObject *unused)
{
    struct save_object *self = as_save(object);

    (void)unused;
    return Py_BuildValue("(KK)", (unsigned long long)atomic_load(&self->progress_bytes),
                         (unsigned long long)self->planned_bytes);
}

PyDoc_STRVAR(files_doc, "files()\n--\n\n"
                        "(number, bytes) of every data file that this rank writes.");

static PyObject *
save_files(PyObject *object, PyObject *unused)
{
    const struct dcp_save *save = as_save(object)->save;
    PyObject *list = PyList_New(0);
    uint64_t n, length_bytes;

    (void)unused;
    for (uint32_t i = 0; list != NULL && dcp_save_get_file(save, i, &n, &length_bytes); i++) {
        PyObject *item =
            Py_BuildValue("(KK)", (unsigned long long)n, (unsigned long long)length_bytes);
        if (item == NULL || PyList_Append(list, item) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(item);
    }
    return list;
}

static PyMethodDef save_methods[] = {
    {"open", save_open, METH_NOARGS, open_doc},
    {"claim", save_claim, METH_NOARGS, claim_doc},
    {"add", (PyCFunction)(void (*)(void))save_add, METH_VARARGS | METH_KEYWORDS, add_doc},
    {"agree", save_agree, METH_O, agree_doc},
    {"compare", save_compare, METH_O, compare_doc},
    {"write", save_write, METH_NOARGS, write_doc},
    {"finish", save_finish, METH_O, finish_doc},
    {"leave", save_leave, METH_O, leave_doc},
    {"agreed", save_agreed, METH_NOARGS, agreed_doc},
    {"planned", save_planned, METH_NOARGS, planned_doc},
    {"interrupt", save_interrupt, METH_NOARGS, interrupt_doc},
    SAVE_OUTSIDE_METHODS,
    SAVE_UPLOAD_METHODS,
    {"metadata", save_metadata, METH_NOARGS, metadata_doc},
    {"info", save_info, METH_NOARGS, info_doc},
    {"progress", save_progress, METH_NOARGS, progress_doc},
    {"files", save_files, METH_NOARGS, files_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(
    save_doc,
    "Save(group, path, *, checkpoint_id=None, checkpoint_id_is_path=False, save_id=None, "
    "version=None, identity=None, call_hash=0, plan_salt=0, use_collectives=True, "
    "dedup_save_to_lowest_rank=False, planned_outside=False, split_bytes=0, sync_files=True, "
    "broadcast_metadata=False, direct=0, base=None, link_mode=0, content_hash=False, "
    "io_uring=0, writer_nice=0, writer_io_priority=0, write_limit_bytes_s=0, mapped_from=0, "
    "mapped_to=0, elsewhere=False)\n--\n\n"
    "One save into the directory `path`.");

static PyType_Slot save_slots[] = {
    {Py_tp_doc, (void *)save_doc},
    {Py_tp_new, save_new},
    {Py_tp_dealloc, save_dealloc},
    {Py_tp_traverse, save_traverse},
    {Py_tp_clear, save_clear},
    {Py_tp_methods, save_methods},
    {0, NULL},
};

PyType_Spec save_type_spec = {
    .name = "dcp_native._native.Save",
    .basicsize = sizeof(struct save_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = save_slots,
};

/*
 * save_stage.c: _native.Save before it goes to the background: who shares the host, whether an
 * orphan still writes, and the copy that is made on the calling thread.
 *
 * Each step runs off the GIL.  A want of memory to stage in is an answer and no error: the caller
 * then writes from the tensors.
 */
#include "save_upload.h"

#include <unistd.h>

#include "errors.h"
#include "upload_parts.h"

const char save_wait_for_orphan_doc[] =
    "wait_for_orphan(timeout_s, /)\n--\n\n"
    "Coordinator: wait for a save of this directory that goes on without its trainer.  False when "
    "it still does: claiming fences it.";

static int
step_look_for_orphan(void *arg, struct dcp_error *err)
{
    return dcp_writer_orphan_wait(dcp_save_dirfd(as_save(arg)->save), NULL, 0, NULL, err);
}

static int
step_wait_for_orphan(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_writer_orphan_wait(dcp_save_dirfd(self->save), NULL, self->orphan_timeout_ns,
                                  &self->cancel, err);
}

PyObject *
save_wait_for_orphan(PyObject *object, PyObject *arg)
{
    struct save_object *self = as_save(object);
    double timeout_s = PyFloat_AsDouble(arg);
    struct dcp_save_info info;
    struct dcp_error err;
    int rc = 0;

    if (timeout_s == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    dcp_save_get_info(self->save, &info);
    if (!info.is_coordinator) {
        Py_RETURN_TRUE;
    }
    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc = step_look_for_orphan(self, &err);
    Py_END_ALLOW_THREADS if (rc == 0)
    {
        Py_RETURN_TRUE; /* nearly always, and no thread was started to find out */
    }
    self->orphan_timeout_ns = (uint64_t)(timeout_s * 1e9);
    if (native_run(object, step_wait_for_orphan, self, &self->cancel, &self->pending, &rc, &err) !=
            0 ||
        native_raise_pending(&self->pending) != 0) {
        (void)native_raise_pending(&self->pending);
        return NULL;
    }
    if (rc != 0 && rc != DCP_E_TIMEOUT) {
        return native_set_error(module_error_class(object), &err);
    }
    return PyBool_FromLong(rc == 0);
}

const char save_meet_doc[] = "meet()\n--\n\n"
                             "Collective, once per group: learn which ranks share this host.";

static int
step_meet(void *arg, struct dcp_error *err)
{
    return dcp_group_meet(group_object_get(as_save(arg)->group), dcp_shm_posix(), err);
}

PyObject *
save_meet(PyObject *object, PyObject *unused)
{
    struct dcp_group *group = group_object_get(as_save(object)->group);
    int rc;

    (void)unused;
    if (group == NULL) {
        return NULL;
    }
    if (dcp_group_peers(group) != NULL) {
        Py_RETURN_NONE;
    }
    return save_run_step(object, step_meet, true, &rc) != 0 ? NULL : Py_NewRef(Py_None);
}

static int
set_staging(struct save_object *self, int shared, uint64_t cap_bytes, PyObject *process)
{
    struct dcp_group *group = group_object_get(self->group);

    if (group == NULL) {
        return -1;
    }
    self->staging = (struct dcp_stage_params){.kind = shared ? DCP_ARENA_SHARED : DCP_ARENA_PRIVATE,
                                              .limits = {.io = dcp_io_posix(),
                                                         .cap_bytes = cap_bytes,
                                                         .sharers = dcp_group_host_ranks(group)},
                                              .cancel = &self->cancel};
    if (process != Py_None) {
        Py_XSETREF(self->process, Py_NewRef(process)); /* a step that was left may still use it */
        self->staging.process = writer_process_object_get(process);
    }
    return 0;
}

/* A step whose want of memory is an answer: None, or the text that says what was missing.  So is
 * `answer`, a code. */
static PyObject *
run_staging(PyObject *object, native_fn fn, int answer)
{
    struct save_object *self = as_save(object);
    struct dcp_group *group = group_object_get(self->group);
    struct dcp_error err;
    int rc = 0;

    if (native_raise_pending(&self->pending) != 0) {
        return NULL;
    }
    self->left =
        native_run(object, fn, self, &self->cancel, &self->pending, &rc, &err) != 0 || self->left;
    if (self->interrupt == NULL) {
        self->interrupt = Py_XNewRef(self->pending);
    }
    if (self->left) {
        dcp_group_poison(group); /* what still runs reads tensors that the caller may free */
    }
    if (native_raise_pending(&self->pending) != 0) {
        return NULL;
    }
    if (rc == DCP_E_LIMIT || rc == DCP_E_NOMEM || (rc != 0 && rc == answer)) {
        return PyUnicode_FromString(err.message);
    }
    return rc != 0 ? native_set_error(module_error_class(object), &err) : Py_NewRef(Py_None);
}

const char save_stage_doc[] =
    "stage(*, shared=False, cap_bytes=0, background=False)\n--\n\n"
    "Build this rank's files in memory; afterwards the tensors may change.  None, or the text that "
    "says which limit left no memory for it: then write().\n\n"
    "`background`: where tensors lie on devices it is only begun (is_staging()): every copy is on "
    "its way, upload() ends it, and upload_staged() says when the tensors may change.";

static int
step_stage(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_stage(self->save, self->items.sources, &self->staging, err);
}

static int
step_stage_begin(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;
    int rc = dcp_save_stage_begin(self->save, self->items.sources, &self->staging, err);

    self->stage_open = rc == 0; /* here: an interrupt may be all that the caller hears of */
    return rc;
}

PyObject *
save_stage(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"shared", "cap_bytes", "background", NULL};
    struct save_object *self = as_save(object);
    unsigned long long cap_bytes = 0;
    int shared = 0, background = 0;
    PyObject *result;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$pKp:stage", names, &shared, &cap_bytes,
                                     &background) ||
        set_staging(self, shared, cap_bytes, Py_None) != 0) {
        return NULL;
    }
    background = background && self->items.device_count > 0;
    result = run_staging(object, background ? step_stage_begin : step_stage, 0);
    if (result != Py_None) {
        return result;
    }
    self->staged = true;
    if (!self->stage_open) {
        save_end_sources(self);
    }
    return result;
}

const char save_is_staging_doc[] = "is_staging()\n--\n\n"
                                   "Whether stage() was only begun, and has not been ended yet.";

PyObject *
save_is_staging(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(as_save(object)->stage_open);
}

void
save_stage_give_up(struct save_object *self)
{
    const struct dcp_stage_end how = {.cancel = &self->cancel};
    struct dcp_error err;
    int rc;

    /* The copies of a parent are not those of a forked child. */
    if (!self->stage_open || ((struct group_object *)self->group)->pid != getpid()) {
        return;
    }
    self->stage_open = self->staged = false;
    atomic_store(&self->cancel, 1);
    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc = dcp_save_stage_end(self->save, self->items.sources, &how, &err);
    Py_END_ALLOW_THREADS(void) rc; /* why the save fails is known */
    save_end_sources(self);
}

const char save_warm_up_doc[] =
    "warm_up(*, shared=False, cap_bytes=0, arenas=1, process=None)\n--\n\n"
    "Touch the memory ahead that staging will use, pin it where tensors lie on devices, and have "
    "the process that will write it map it. "
    "None, or the text that says which limit left no memory for it, or what became of the process.";

static int
step_warm_up(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_warm_up(self->save, &self->staging, self->arenas, err);
}

PyObject *
save_warm_up(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"shared", "cap_bytes", "arenas", "process", NULL};
    const struct module_state *state = module_state_of(Py_TYPE(object));
    struct save_object *self = as_save(object);
    unsigned long long cap_bytes = 0;
    PyObject *process = Py_None, *result;
    int shared = 0;

    self->arenas = 1;
    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "|$pKIO:warm_up", names, &shared, &cap_bytes,
                                     &self->arenas, &process)) {
        return NULL;
    }
    if (process != Py_None && !Py_IS_TYPE(process, state->writer_process_type)) {
        PyErr_SetString(PyExc_TypeError, "warm_up() takes a _native.WriterProcess");
        return NULL;
    }
    if (set_staging(self, shared, cap_bytes, process) != 0) {
        return NULL;
    }
    result = run_staging(object, step_warm_up, DCP_E_IO);
    if (!self->left) {
        save_end_sources(self);
    }
    return result;
}

/*
 * save_upload.c: _native.Save in the background: upload, and what became of it.
 *
 * upload starts the core's threads (csrc/core/upload.c), which borrow from this object: the tensors
 * or the arena, the store, the writer process, the watch. Whoever started an upload keeps the
 * object until its state is "ended".  An object that goes before (the interpreter's end, a forked
 * child) frees none of it.
 */
#include "save_upload.h"

#include <unistd.h>

#include "errors.h"
#include "upload_parts.h"

/* ---- the upload ---- */

const char save_upload_doc[] =
    "upload(watch, *, timeout_s, host_timeout_s, store=None, process=None, prefix='', "
    "failure=None, written=False, survive=False)\n--\n\n"
    "Write, agree over the store and commit, on threads that need no GIL.  `failure`: what failed "
    "on this rank before; `written`: its files are durable already.";

static int
check_parts(PyObject *object, PyObject *watch, PyObject *store, PyObject *process)
{
    const struct module_state *state = module_state_of(Py_TYPE(object));

    if (state == NULL) {
        return -1;
    }
    if (!Py_IS_TYPE(watch, state->watch_type) ||
        (store != Py_None && !Py_IS_TYPE(store, state->store_type)) ||
        (process != Py_None && !Py_IS_TYPE(process, state->writer_process_type))) {
        PyErr_SetString(PyExc_TypeError, "upload() takes a _native.Watch, Store and WriterProcess");
        return -1;
    }
    if (as_save(object)->upload != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the save is in the background already");
        return -1;
    }
    return 0;
}

static void
fill_params(struct save_object *self, struct dcp_upload_params *params)
{
    const struct dcp_group *group = group_object_get(self->group);
    const struct dcp_comm *comm = dcp_group_comm(group);

    params->save = self->save;
    params->staged = self->staged;
    params->staging = self->stage_open;
    params->sources = self->items.sources;
    params->process = self->process == Py_None ? NULL : writer_process_object_get(self->process);
    params->store = self->store == Py_None ? NULL : store_object_get(self->store);
    params->rank = comm->rank;
    params->size = comm->size;
    params->coordinator = dcp_group_coordinator(group);
    params->independent = self->independent;
    params->peers = dcp_group_peers(group);
    params->shm = dcp_shm_posix();
    params->notify = watch_object_notify;
    params->notify_ctx = self->watch;
}

static int
start(PyObject *object, struct dcp_upload_params *params)
{
    struct save_object *self = as_save(object);
    struct dcp_error err;
    int rc;

    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc = dcp_upload_start(params, &self->upload, &err);
    Py_END_ALLOW_THREADS if (rc != 0)
    {
        native_set_error(module_error_class(object), &err);
    }
    return rc;
}

PyObject *
save_upload(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"watch",  "timeout_s", "host_timeout_s", "store",   "process",
                            "prefix", "failure",   "written",        "survive", NULL};
    struct save_object *self = as_save(object);
    PyObject *watch, *store = Py_None, *process = Py_None, *failure = Py_None;
    struct dcp_upload_params params = {0};
    double timeout_s = 0, host_timeout_s = 0;
    const char *prefix = "";
    int written = 0, survive = 0;
    bool given;

    if (group_object_get(self->group) == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O|$ddOOsOpp:upload", names, &watch, &timeout_s,
                                     &host_timeout_s, &store, &process, &prefix, &failure, &written,
                                     &survive) ||
        check_parts(object, watch, store, process) != 0 ||
        failure_from_python(failure, &self->upload_mine, &given) != 0) {
        return NULL;
    }
    if (!(timeout_s > 0 && timeout_s < 1e9 && host_timeout_s > 0 && host_timeout_s < 1e9)) {
        PyErr_SetString(PyExc_ValueError, "timeouts are seconds above 0");
        return NULL;
    }
    self->watch = Py_NewRef(watch);
    self->store = Py_NewRef(store);
    Py_XSETREF(self->process, Py_NewRef(process));
    self->upload_record = Py_NewRef(failure);
    if (given) {
        save_stage_give_up(self); /* nobody will look at what it copies */
    }
    self->phase = PHASE_OVER;
    fill_params(self, &params);
    self->upload_mine.rank = params.rank;
    params.mine = given ? &self->upload_mine : NULL;
    params.prefix = prefix;
    params.written = written != 0;
    params.survive = survive != 0;
    params.timeout_ns = (uint64_t)(timeout_s * 1e9);
    params.host_timeout_ns = (uint64_t)(host_timeout_s * 1e9);
    return start(object, &params) != 0 ? NULL : Py_NewRef(Py_None);
}

bool
save_upload_release(struct save_object *self)
{
    /* A forked child has a copy of a lock that may be held for ever. */
    bool ours = ((struct group_object *)self->group)->pid == getpid();
    bool ended =
        self->upload == NULL || (ours && dcp_upload_state(self->upload) == DCP_UPLOAD_ENDED);

    if (ended) {
        dcp_upload_destroy(self->upload);
        self->upload = NULL;
        Py_CLEAR(self->store);
        Py_CLEAR(self->process);
        Py_CLEAR(self->watch);
        Py_CLEAR(self->upload_record);
    }
    return ended;
}

/* ---- what became of it ---- */

static struct dcp_upload *
upload_of(PyObject *object)
{
    struct dcp_upload *upload = as_save(object)->upload;

    if (upload == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the save is not in the background");
    }
    return upload;
}

const char save_upload_state_doc[] = "upload_state()\n--\n\n"
                                     "\"running\", \"settled\" (there is a result) or \"ended\" "
                                     "(nothing is borrowed any more).";

PyObject *
save_upload_state(PyObject *object, PyObject *unused)
{
    static const char *const names[] = {"running", "settled", "ended"};
    struct dcp_upload *upload = upload_of(object);

    (void)unused;
    return upload == NULL ? NULL : PyUnicode_FromString(names[dcp_upload_state(upload)]);
}

const char save_upload_result_doc[] =
    "upload_result()\n--\n\n"
    "Once settled: None when it was committed, or the failures of the ranks; raises what this rank "
    "alone knows.";

PyObject *
save_upload_result(PyObject *object, PyObject *unused)
{
    struct dcp_upload *upload = upload_of(object);
    const struct dcp_failure_list *failures;
    struct dcp_error err;
    int rc;

    (void)unused;
    if (upload == NULL) {
        return NULL;
    }
    if (dcp_upload_state(upload) == DCP_UPLOAD_RUNNING) {
        PyErr_SetString(PyExc_RuntimeError, "the save has not ended");
        return NULL;
    }
    rc = dcp_upload_result(upload, &failures, &err);
    if (rc == 0) {
        Py_RETURN_NONE;
    }
    return rc == DCP_E_PEER ? native_failures(module_error_class(object), failures)
                            : native_set_error(module_error_class(object), &err);
}

const char save_upload_stats_doc[] =
    "upload_stats()\n--\n\n"
    "`writing`: threads are still at work on the bytes or the outcome; `settle_ns`, from durable "
    "to "
    "the outcome; once ended `store_calls`, of this rank, and `in_touch`: the store answered.";

PyObject *
save_upload_stats(PyObject *object, PyObject *unused)
{
    struct dcp_upload *upload = upload_of(object);
    struct dcp_upload_stats stats;

    (void)unused;
    if (upload == NULL) {
        return NULL;
    }
    dcp_upload_get_stats(upload, &stats);
    return Py_BuildValue("{sOsKsKsO}", "writing", stats.writing ? Py_True : Py_False, "settle_ns",
                         (unsigned long long)stats.settle_ns, "store_calls",
                         (unsigned long long)stats.store_calls, "in_touch",
                         stats.in_touch ? Py_True : Py_False);
}

const char save_upload_staged_doc[] =
    "upload_staged()\n--\n\n"
    "Whether nothing reads the tensors any more.  Once raises why their copy failed, unless it was "
    "the save that ended before it.";

PyObject *
save_upload_staged(PyObject *object, PyObject *unused)
{
    struct save_object *self = as_save(object);
    struct dcp_upload *upload = upload_of(object);
    struct dcp_error err;
    int rc;

    (void)unused;
    if (upload == NULL) {
        return NULL;
    }
    if (!self->stage_open) {
        Py_RETURN_TRUE;
    }
    if (!dcp_upload_staged(upload, &rc, &err)) {
        Py_RETURN_FALSE;
    }
    self->stage_open = false;
    save_end_sources(self);
    if (rc != 0 && rc != DCP_E_CANCELLED) {
        return native_set_error(module_error_class(object), &err);
    }
    Py_RETURN_TRUE;
}

const char save_upload_left_doc[] = "upload_left_s()\n--\n\n"
                                    "Seconds until it is to be expired.";

PyObject *
save_upload_left(PyObject *object, PyObject *unused)
{
    struct dcp_upload *upload = upload_of(object);

    (void)unused;
    return upload == NULL ? NULL : PyFloat_FromDouble((double)dcp_upload_left_ns(upload) / 1e9);
}

const char save_upload_progress_doc[] = "upload_progress()\n--\n\n"
                                        "Payload bytes that were handed to the disk.";

PyObject *
save_upload_progress(PyObject *object, PyObject *unused)
{
    struct dcp_upload *upload = upload_of(object);

    (void)unused;
    return upload == NULL ? NULL : PyLong_FromUnsignedLongLong(dcp_upload_progress(upload));
}

const char save_expire_doc[] = "expire()\n--\n\n"
                               "Behind the deadline: end it, whatever its threads are stuck in.";

PyObject *
save_expire(PyObject *object, PyObject *unused)
{
    struct dcp_upload *upload = upload_of(object);

    (void)unused;
    if (upload == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS dcp_upload_expire(upload);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

const char save_cancel_doc[] = "cancel()\n--\n\n"
                               "Stop writing at the next request.  False when there is nothing "
                               "left to stop.";

PyObject *
save_cancel(PyObject *object, PyObject *unused)
{
    struct save_object *self = as_save(object);

    (void)unused;
    atomic_store(&self->cancel, 1);
    return PyBool_FromLong(self->upload != NULL && dcp_upload_cancel(self->upload));
}

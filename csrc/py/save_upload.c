/*
 * save_upload.c: _native.Save in the background: meet, stage, upload, and what became of it.
 *
 * stage copies, on the calling thread; upload starts the core's threads (csrc/core/upload.c), which
 * borrow from this object: the tensors or the arena, the store, the writer process, the watch.
 * Whoever started an upload keeps the object until its state is "ended".  An object that goes
 * before (the interpreter's end, a forked child) frees none of it.
 */
#include "save_upload.h"

#include <unistd.h>

#include "errors.h"
#include "upload_parts.h"

/* ---- before ---- */

const char save_wait_for_orphan_doc[] =
    "wait_for_orphan(timeout_s, /)\n--\n\n"
    "Coordinator: wait for a save of this directory that goes on without its trainer.  False when "
    "it still does: claiming fences it.";

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
parse_staging(PyObject *object, PyObject *args, PyObject *kwargs, const char *format)
{
    static char *names[] = {"shared", "cap_bytes", "arenas", "process", NULL};
    const struct module_state *state = module_state_of(Py_TYPE(object));
    struct save_object *self = as_save(object);
    struct dcp_group *group = group_object_get(self->group);
    unsigned long long cap_bytes = 0;
    PyObject *process = Py_None;
    int shared = 0;

    self->arenas = 1;
    if (group == NULL || state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &shared, &cap_bytes,
                                     &self->arenas, &process)) {
        return -1;
    }
    if (process != Py_None && !Py_IS_TYPE(process, state->writer_process_type)) {
        PyErr_SetString(PyExc_TypeError, "warm_up() takes a _native.WriterProcess");
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
    self->left = native_run(object, fn, self, &self->cancel, &self->pending, &rc, &err) != 0;
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
    "stage(*, shared=False, cap_bytes=0)\n--\n\n"
    "Build this rank's files in memory; afterwards the tensors may change.  None, or the text that "
    "says which limit left no memory for it: then write().";

static int
step_stage(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_stage(self->save, self->items.sources, &self->staging, err);
}

PyObject *
save_stage(PyObject *object, PyObject *args, PyObject *kwargs)
{
    struct save_object *self = as_save(object);
    PyObject *result;

    if (parse_staging(object, args, kwargs, "|$pKI:stage") != 0) {
        return NULL;
    }
    result = run_staging(object, step_stage, 0);
    if (result == Py_None) {
        self->staged = true;
        save_items_clean_up(&self->items);
    }
    return result;
}

const char save_warm_up_doc[] =
    "warm_up(*, shared=False, cap_bytes=0, arenas=1, process=None)\n--\n\n"
    "Touch the memory ahead that staging will use, and have the process that will write it map it. "
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
    return parse_staging(object, args, kwargs, "|$pKIO:warm_up") != 0
               ? NULL
               : run_staging(object, step_warm_up, DCP_E_IO);
}

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
    self->phase = PHASE_OVER;
    fill_params(self, &params);
    self->upload_mine.rank = params.rank;
    params.mine = given ? &self->upload_mine : NULL;
    params.prefix = prefix;
    params.written = written != 0;
    params.survive = survive != 0;
    /* The death of a trainer fails no save that outlives it. */
    params.peers = survive ? NULL : params.peers;
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
    "`settle_ns`, from durable to the outcome; once ended `store_calls`, of this rank.";

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
    return Py_BuildValue("{sKsKsO}", "settle_ns", (unsigned long long)stats.settle_ns,
                         "store_calls", (unsigned long long)stats.store_calls, "in_touch",
                         stats.in_touch ? Py_True : Py_False);
}

const char save_upload_writing_doc[] = "upload_writing()\n--\n\n"
                                       "Whether bytes are still being written.";

PyObject *
save_upload_writing(PyObject *object, PyObject *unused)
{
    struct dcp_upload *upload = upload_of(object);
    struct dcp_upload_stats stats;

    (void)unused;
    if (upload == NULL) {
        return NULL;
    }
    dcp_upload_get_stats(upload, &stats);
    return PyBool_FromLong(stats.writing);
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

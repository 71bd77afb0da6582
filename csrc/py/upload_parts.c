/*
 * upload_parts.c: what background saves borrow while they run: _native.Store (a client of the
 * group's store), _native.WriterProcess, and _native.Watch, by which they say that something has
 * happened.
 *
 * Each is used by one save at a time, except the watch, which is everybody's.  Python keeps those
 * that are idle.  One that a stuck save never gives back is never freed.
 */
#include "upload_parts.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "errors.h"

/* ---- Store ---- */

struct store_object {
    PyObject_HEAD struct dcp_store store;
    pid_t pid; /* the connection is this process's */
};

const struct dcp_store *
store_object_get(PyObject *object)
{
    return &((struct store_object *)object)->store;
}

static PyObject *
store_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"process_group", NULL};
    struct module_state *state = module_state_of(type);
    struct store_object *self;
    PyObject *process_group;
    struct dcp_error err;

    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O:Store", names, &process_group) ||
        native_state_load(PyType_GetModule(type)) != 0) {
        return NULL;
    }
    self = (struct store_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->pid = getpid();
    dcp_error_clear(&err);
    if (state->native.bridge->store_from_group(process_group, &self->store, &err) != 0) {
        Py_DECREF(self);
        return native_set_error(state->error_class, &err);
    }
    return (PyObject *)self;
}

static void
store_dealloc(PyObject *object)
{
    struct store_object *self = (struct store_object *)object;
    PyTypeObject *type = Py_TYPE(object);

    if (self->store.destroy != NULL && self->pid == getpid()) {
        Py_BEGIN_ALLOW_THREADS; /* it closes connections */
        self->store.destroy(self->store.ctx);
        Py_END_ALLOW_THREADS;
    }
    type->tp_free(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(store_doc, "Store(process_group)\n--\n\n"
                        "A connection of our own to the store of a torch ProcessGroup.");

static PyType_Slot store_slots[] = {
    {Py_tp_doc, (void *)store_doc},
    {Py_tp_new, store_new},
    {Py_tp_dealloc, store_dealloc},
    {0, NULL},
};

PyType_Spec store_type_spec = {
    .name = "dcp_native._native.Store",
    .basicsize = sizeof(struct store_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = store_slots,
};

/* ---- WriterProcess ---- */

struct writer_process_object {
    PyObject_HEAD struct dcp_writer_process *process; /* NULL once stopped */
};

struct dcp_writer_process *
writer_process_object_get(PyObject *object)
{
    return ((struct writer_process_object *)object)->process;
}

static PyObject *
writer_process_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"executable", NULL};
    struct module_state *state = module_state_of(type);
    struct writer_process_object *self;
    const char *executable;
    struct dcp_error err;
    int rc;

    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "s:WriterProcess", names, &executable)) {
        return NULL;
    }
    self = (struct writer_process_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc = dcp_writer_process_start(executable, &self->process, &err);
    Py_END_ALLOW_THREADS if (rc != 0)
    {
        self->process = NULL;
        Py_DECREF(self);
        return native_set_error(state->error_class, &err);
    }
    return (PyObject *)self;
}

static void
stop_process(struct writer_process_object *self)
{
    struct dcp_writer_process *process = self->process;

    self->process = NULL;
    if (process != NULL) {
        Py_BEGIN_ALLOW_THREADS dcp_writer_process_stop(process);
        Py_END_ALLOW_THREADS
    }
}

static void
writer_process_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);

    stop_process((struct writer_process_object *)object);
    type->tp_free(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(stop_doc, "stop()\n--\n\nEnd the process; nothing once it was ended.");

static PyObject *
writer_process_stop(PyObject *object, PyObject *unused)
{
    (void)unused;
    stop_process((struct writer_process_object *)object);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(usable_doc, "usable()\n--\n\nFalse once it has died or was stopped.");

static PyObject *
writer_process_usable(PyObject *object, PyObject *unused)
{
    struct dcp_writer_process *process = writer_process_object_get(object);

    (void)unused;
    return PyBool_FromLong(process != NULL && dcp_writer_process_usable(process));
}

static PyObject *
writer_process_get_pid(PyObject *object, void *unused)
{
    struct dcp_writer_process *process = writer_process_object_get(object);

    (void)unused;
    return PyLong_FromLongLong(process == NULL ? -1 : dcp_writer_process_pid(process));
}

static PyMethodDef writer_process_methods[] = {
    {"stop", writer_process_stop, METH_NOARGS, stop_doc},
    {"usable", writer_process_usable, METH_NOARGS, usable_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef writer_process_getset[] = {
    {"pid", writer_process_get_pid, NULL, "Process id; -1 once stopped.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(writer_process_doc, "WriterProcess(executable)\n--\n\n"
                                 "A process beside this one that writes staged saves.");

static PyType_Slot writer_process_slots[] = {
    {Py_tp_doc, (void *)writer_process_doc}, {Py_tp_new, writer_process_new},
    {Py_tp_dealloc, writer_process_dealloc}, {Py_tp_methods, writer_process_methods},
    {Py_tp_getset, writer_process_getset},   {0, NULL},
};

PyType_Spec writer_process_type_spec = {
    .name = "dcp_native._native.WriterProcess",
    .basicsize = sizeof(struct writer_process_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = writer_process_slots,
};

/* ---- Watch ---- */

struct watch_object {
    PyObject_HEAD pthread_mutex_t lock; /* guards `events` */
    pthread_cond_t happened;
    uint64_t events;
};

void
watch_object_notify(void *object)
{
    struct watch_object *self = object;

    pthread_mutex_lock(&self->lock);
    self->events++;
    pthread_cond_broadcast(&self->happened);
    pthread_mutex_unlock(&self->lock);
}

static PyObject *
watch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    pthread_condattr_t attr;
    struct watch_object *self;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Watch", names)) {
        return NULL;
    }
    self = (struct watch_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    if (pthread_mutex_init(&self->lock, NULL) != 0 || pthread_condattr_init(&attr) != 0) {
        type->tp_free(self);
        Py_DECREF(type);
        return PyErr_NoMemory();
    }
    (void)pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&self->happened, &attr);
    pthread_condattr_destroy(&attr);
    return (PyObject *)self;
}

static void
watch_dealloc(PyObject *object)
{
    struct watch_object *self = (struct watch_object *)object;
    PyTypeObject *type = Py_TYPE(object);

    /* In a forked child they may be held by a thread that is not there: left as they are. */
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(notify_doc, "notify()\n--\n\nWake whoever waits.");

static PyObject *
watch_notify(PyObject *object, PyObject *unused)
{
    (void)unused;
    watch_object_notify(object);
    Py_RETURN_NONE;
}

static void
wait_for_events(struct watch_object *self, uint64_t seen, double timeout_s)
{
    uint64_t timeout_ns = (uint64_t)(timeout_s * 1e9);
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    timeout_ns += (uint64_t)until.tv_nsec;
    until.tv_sec += (time_t)(timeout_ns / 1000000000u);
    until.tv_nsec = (long)(timeout_ns % 1000000000u);
    pthread_mutex_lock(&self->lock);
    while (self->events == seen &&
           pthread_cond_timedwait(&self->happened, &self->lock, &until) == 0) {
    }
    pthread_mutex_unlock(&self->lock);
}

PyDoc_STRVAR(wait_doc, "wait(seen, timeout_s, /)\n--\n\n"
                       "Wait without the GIL until the number of events is not `seen`, or for the "
                       "timeout; returns the number.");

static PyObject *
watch_wait(PyObject *object, PyObject *args)
{
    struct watch_object *self = (struct watch_object *)object;
    unsigned long long seen;
    double timeout_s;

    if (!PyArg_ParseTuple(args, "Kd:wait", &seen, &timeout_s)) {
        return NULL;
    }
    timeout_s = timeout_s < 0 ? 0 : timeout_s > 1e6 ? 1e6 : timeout_s;
    Py_BEGIN_ALLOW_THREADS wait_for_events(self, seen, timeout_s);
    Py_END_ALLOW_THREADS return PyLong_FromUnsignedLongLong(self->events);
}

static PyMethodDef watch_methods[] = {
    {"notify", watch_notify, METH_NOARGS, notify_doc},
    {"wait", watch_wait, METH_VARARGS, wait_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(watch_doc, "Watch()\n--\n\nCounts what happens to background saves.");

static PyType_Slot watch_slots[] = {
    {Py_tp_doc, (void *)watch_doc},
    {Py_tp_new, watch_new},
    {Py_tp_dealloc, watch_dealloc},
    {Py_tp_methods, watch_methods},
    {0, NULL},
};

PyType_Spec watch_type_spec = {
    .name = "dcp_native._native.Watch",
    .basicsize = sizeof(struct watch_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = watch_slots,
};

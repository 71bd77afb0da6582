/*
 * group_object.c: _native.Group: the ranks that save and load together.
 *
 * It holds the comm table and the plan that the ranks installed, and lives as long as Python keeps
 * it beside its ProcessGroup.  A forked child refuses to use it: the connections are the parent's.
 */
#include "module.h"

#include <unistd.h>

#include "errors.h"

struct dcp_group *
group_object_get(PyObject *object)
{
    struct group_object *self = (struct group_object *)object;

    if (self->pid != getpid()) {
        PyErr_SetString(PyExc_RuntimeError,
                        "this process was forked after its process group was made; a forked child "
                        "can not save or load with the parent's group");
        return NULL;
    }
    return self->group;
}

static int
make_comm(struct module_state *state, PyObject *process_group, struct dcp_comm *ret_comm)
{
    struct dcp_error err;

    if (process_group == Py_None) {
        dcp_comm_local(ret_comm);
        return 0;
    }
    dcp_error_clear(&err);
    if (state->native.bridge->comm_from_group(process_group, ret_comm, &err) != 0) {
        native_set_error(state->error_class, &err);
        return -1;
    }
    return 0;
}

static PyObject *
group_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"process_group", "coordinator_rank", NULL};
    struct module_state *state = module_state_of(type);
    PyObject *process_group = Py_None;
    unsigned int coordinator = 0;
    struct group_object *self;
    struct dcp_comm comm = {0};
    struct dcp_error err;

    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "|OI:Group", names, &process_group,
                                     &coordinator) ||
        native_state_load(PyType_GetModule(type)) != 0) {
        return NULL;
    }
    self = (struct group_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->pid = getpid();
    if (make_comm(state, process_group, &comm) != 0) {
        Py_DECREF(self);
        return NULL;
    }
    dcp_error_clear(&err);
    if (dcp_group_new(&comm, coordinator, &self->group, &err) != 0) {
        if (comm.destroy != NULL) {
            comm.destroy(comm.ctx);
        }
        Py_DECREF(self);
        return native_set_error(state->error_class, &err);
    }
    return (PyObject *)self;
}

static void
group_dealloc(PyObject *object)
{
    struct group_object *self = (struct group_object *)object;
    PyTypeObject *type = Py_TYPE(object);

    if (self->pid == getpid()) { /* the parent's connections are not the child's to close */
        /* It may be the last to hold the process group, whose end waits for threads that give
         * tensors back to Python. */
        Py_BEGIN_ALLOW_THREADS;
        dcp_group_destroy(self->group);
        Py_END_ALLOW_THREADS;
    }
    type->tp_free(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(forget_plan_doc, "forget_plan()\n--\n\n"
                              "Drop the installed plan: the next save gathers plans again.");

static PyObject *
group_forget_plan(PyObject *self, PyObject *unused)
{
    struct dcp_group *group = group_object_get(self);

    (void)unused;
    if (group == NULL) {
        return NULL;
    }
    dcp_group_forget_plan(group);
    Py_RETURN_NONE;
}

static PyObject *
group_get_rank(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(dcp_group_comm(((struct group_object *)self)->group)->rank);
}

static PyObject *
group_get_size(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(dcp_group_comm(((struct group_object *)self)->group)->size);
}

static PyObject *
group_get_kind(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(dcp_group_comm(((struct group_object *)self)->group)->kind);
}

static PyObject *
group_get_coordinator_rank(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(dcp_group_coordinator(((struct group_object *)self)->group));
}

PyDoc_STRVAR(comm_stats_doc, "comm_stats()\n--\n\n"
                             "(calls, bytes, nanoseconds) of collectives so far.");

static PyObject *
group_comm_stats(PyObject *self, PyObject *unused)
{
    struct dcp_comm_stats stats = dcp_group_comm_stats(((struct group_object *)self)->group);

    (void)unused;
    return Py_BuildValue("(KKK)", (unsigned long long)stats.calls_count,
                         (unsigned long long)stats.bytes, (unsigned long long)stats.wall_ns);
}

static PyMethodDef group_methods[] = {
    {"forget_plan", group_forget_plan, METH_NOARGS, forget_plan_doc},
    {"comm_stats", group_comm_stats, METH_NOARGS, comm_stats_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef group_getset[] = {
    {"rank", group_get_rank, NULL, "This process's rank in the group.", NULL},
    {"size", group_get_size, NULL, "Number of ranks.", NULL},
    {"kind", group_get_kind, NULL, "The comm table in use: 'local', 'gloo', ...", NULL},
    {"coordinator_rank", group_get_coordinator_rank, NULL, "Group rank of the coordinator.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(group_doc, "Group(process_group=None, coordinator_rank=0)\n--\n\n"
                        "The ranks of a torch ProcessGroup (CPU backend), or this process alone.");

static PyType_Slot group_slots[] = {
    {Py_tp_doc, (void *)group_doc}, {Py_tp_new, group_new},       {Py_tp_dealloc, group_dealloc},
    {Py_tp_methods, group_methods}, {Py_tp_getset, group_getset}, {0, NULL},
};

PyType_Spec group_type_spec = {
    .name = "dcp_native._native.Group",
    .basicsize = sizeof(struct group_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = group_slots,
};

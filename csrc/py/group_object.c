/*
 * group_object.c: _native.Group: the ranks that save and load together.
 *
 * It holds the comm table and the plan that the ranks installed, and lives as long as Python keeps
 * it beside its ProcessGroup.  A forked child refuses to use it: the connections are the parent's.
 */
#include "module.h"

#include <structmember.h>
#include <unistd.h>

#include "dcp_nccl.h"
#include "errors.h"
#include "native_run.h"

/* Numbers in one reduction: those of a vote. */
enum { MAX_LANES = DCP_VOTE_LANES };

/* What a group is made of. */
struct group_args {
    PyObject *process_group; /* borrowed */
    unsigned int coordinator;
    int over_nccl; /* else over the CPU backend */
};

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
make_nccl_comm(const struct dcp_bridge_table *bridge, const struct group_args *args,
               struct dcp_comm *ret_comm, struct dcp_error *err)
{
    struct dcp_bridge_nccl found;
    struct dcp_nccl_source source;
    int rc = bridge->nccl_comm_of_group(args->process_group, &found, err);

    if (rc != 0) {
        return rc;
    }
    source = (struct dcp_nccl_source){
        .raw = found.raw,
        .rank = found.rank,
        .size = found.size,
        .timeout_ns = found.timeout_ns,
    };
    Py_BEGIN_ALLOW_THREADS;
    rc = dcp_nccl_comm_make(&source, ret_comm, err);
    Py_END_ALLOW_THREADS;
    return rc;
}

static int
make_comm(struct module_state *state, const struct group_args *args, struct dcp_comm *ret_comm)
{
    const struct dcp_bridge_table *bridge = state->native.bridge;
    struct dcp_error err;
    int rc;

    if (args->process_group == Py_None) {
        dcp_comm_local(ret_comm);
        return 0;
    }
    dcp_error_clear(&err);
    rc = args->over_nccl ? make_nccl_comm(bridge, args, ret_comm, &err)
                         : bridge->comm_from_group(args->process_group, ret_comm, &err);
    if (rc != 0) {
        native_set_error(state->error_class, &err);
    }
    return rc;
}

static PyObject *
group_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"process_group", "coordinator_rank", "over_nccl", NULL};
    struct module_state *state = module_state_of(type);
    struct group_args made_of = {.process_group = Py_None};
    struct group_object *self;
    struct dcp_comm comm = {0};
    struct dcp_error err;

    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "|OIp:Group", names, &made_of.process_group,
                                     &made_of.coordinator, &made_of.over_nccl) ||
        native_state_load(PyType_GetModule(type)) != 0) {
        return NULL;
    }
    self = (struct group_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->pid = getpid();
    if (make_comm(state, &made_of, &comm) != 0) {
        Py_DECREF(self);
        return NULL;
    }
    dcp_error_clear(&err);
    if (dcp_group_new(&comm, made_of.coordinator, &self->group, &err) != 0) {
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
    Py_XDECREF(self->reason);
    Py_XDECREF(self->error);
    type->tp_free(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(with_coordinator_doc,
             "with_coordinator(coordinator_rank, /)\n--\n\n"
             "The same ranks over the same communicator of NCCL, with a coordinator and plans of "
             "its own.");

static PyObject *
group_with_coordinator(PyObject *object, PyObject *rank)
{
    struct group_object *self = (struct group_object *)object, *other;
    struct dcp_group *group = group_object_get(object);
    unsigned long coordinator = PyLong_AsUnsignedLong(rank);
    struct dcp_error err;

    if (group == NULL || PyErr_Occurred()) {
        return NULL;
    }
    other = (struct group_object *)Py_TYPE(object)->tp_alloc(Py_TYPE(object), 0);
    if (other == NULL) {
        return NULL;
    }
    other->pid = self->pid;
    other->reason = Py_XNewRef(self->reason);
    dcp_error_clear(&err);
    if (coordinator > UINT32_MAX ||
        dcp_group_share(group, (uint32_t)coordinator, &other->group, &err) != 0) {
        Py_DECREF(other);
        return coordinator > UINT32_MAX
                   ? PyErr_Format(PyExc_ValueError, "coordinator_rank %lu", coordinator)
                   : native_set_error(module_error_class(object), &err);
    }
    return (PyObject *)other;
}

PyDoc_STRVAR(follow_doc, "follow(stream, /)\n--\n\n"
                         "From here on collectives come after what this stream of `device_index` "
                         "has been given before them.");

static PyObject *
group_follow(PyObject *self, PyObject *stream)
{
    struct dcp_group *group = group_object_get(self);
    void *handle = PyLong_AsVoidPtr(stream);

    if (group == NULL || PyErr_Occurred()) {
        return NULL;
    }
    dcp_group_follow(group, handle);
    Py_RETURN_NONE;
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

PyDoc_STRVAR(reduce_min_doc,
             "reduce_min(numbers, /)\n--\n\n"
             "Collective: the least of every rank's numbers, at each place; signed, of 64 bits.\n\n"
             "An interrupt meanwhile is kept in `error`, for the other ranks have the result.");

struct reduction {
    const struct dcp_comm *comm;
    size_t count;
    int64_t lanes[MAX_LANES];
    atomic_int cancel; /* there is no way to: the group's timeout ends it */
};

static int
reduce(void *self, struct dcp_error *err)
{
    struct reduction *reduction = self;

    return reduction->comm->all_reduce_min(reduction->comm->ctx, reduction->lanes, reduction->count,
                                           err);
}

static int
fill_lanes(struct reduction *reduction, PyObject *numbers)
{
    PyObject *items = PySequence_Fast(numbers, "reduce_min() takes a sequence of numbers");

    if (items == NULL) {
        return -1;
    }
    if (PySequence_Fast_GET_SIZE(items) > MAX_LANES) {
        PyErr_Format(PyExc_ValueError, "reduce_min() takes %d numbers at most", MAX_LANES);
        Py_DECREF(items);
        return -1;
    }
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items); i++) {
        reduction->lanes[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items, i));
        reduction->count++;
    }
    Py_DECREF(items);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *
list_of_lanes(const struct reduction *reduction)
{
    PyObject *list = PyList_New((Py_ssize_t)reduction->count);

    for (size_t i = 0; list != NULL && i < reduction->count; i++) {
        PyObject *number = PyLong_FromLongLong(reduction->lanes[i]);

        if (number == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, (Py_ssize_t)i, number);
        }
    }
    return list;
}

static PyObject *
group_reduce_min(PyObject *self, PyObject *numbers)
{
    struct dcp_group *group = group_object_get(self);
    PyObject *pending = NULL, *result = NULL;
    struct reduction *reduction;
    struct dcp_error err;
    int rc;

    if (group == NULL) {
        return NULL;
    }
    reduction = dcp_calloc(1, sizeof *reduction);
    if (reduction == NULL) {
        return PyErr_NoMemory();
    }
    reduction->comm = dcp_group_comm(group);
    if (fill_lanes(reduction, numbers) != 0) {
        dcp_free(reduction);
        return NULL;
    }
    if (native_run(self, reduce, reduction, &reduction->cancel, &pending, &rc, &err) != 0) {
        dcp_group_poison(group); /* its thread has `reduction` now */
        native_raise_pending(&pending);
        return NULL;
    }
    if (pending != NULL) {
        Py_XSETREF(((struct group_object *)self)->error, pending);
    }
    if (rc != 0) {
        native_set_error(module_error_class(self), &err);
    } else {
        result = list_of_lanes(reduction);
    }
    dcp_free(reduction);
    return result;
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
group_get_device_index(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(dcp_group_device(((struct group_object *)self)->group));
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
    {"with_coordinator", group_with_coordinator, METH_O, with_coordinator_doc},
    {"follow", group_follow, METH_O, follow_doc},
    {"forget_plan", group_forget_plan, METH_NOARGS, forget_plan_doc},
    {"reduce_min", group_reduce_min, METH_O, reduce_min_doc},
    {"comm_stats", group_comm_stats, METH_NOARGS, comm_stats_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef group_getset[] = {
    {"rank", group_get_rank, NULL, "This process's rank in the group.", NULL},
    {"size", group_get_size, NULL, "Number of ranks.", NULL},
    {"kind", group_get_kind, NULL, "The comm table in use: 'local', 'gloo', ...", NULL},
    {"device_index", group_get_device_index, NULL, "Over which they talk; -1: over none.", NULL},
    {"coordinator_rank", group_get_coordinator_rank, NULL, "Group rank of the coordinator.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef group_members[] = {
    {"reason", T_OBJECT, offsetof(struct group_object, reason), 0,
     "Why its ranks talk over what they do, for reports."},
    {"error", T_OBJECT, offsetof(struct group_object, error), 0,
     "What the next call on it has to tell the other ranks of, and to raise: an exception."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(group_doc, "Group(process_group=None, coordinator_rank=0, over_nccl=False)\n--\n\n"
                        "The ranks of a torch ProcessGroup, or this process alone.\n\n"
                        "They talk over the group's CPU backend, or over its NCCL communicator of "
                        "the current device.");

static PyType_Slot group_slots[] = {
    {Py_tp_doc, (void *)group_doc},
    {Py_tp_new, group_new},
    {Py_tp_dealloc, group_dealloc},
    {Py_tp_methods, group_methods},
    {Py_tp_getset, group_getset},
    {Py_tp_members, group_members},
    {0, NULL},
};

PyType_Spec group_type_spec = {
    .name = "dcp_native._native.Group",
    .basicsize = sizeof(struct group_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = group_slots,
};

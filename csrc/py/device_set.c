/*
 * device_set.c: the devices that tensors of one save or load lie on.
 *
 * A device is lent when the first tensor on it is met, so that a program without CUDA tensors never
 * gets a CUDA context by us, and one that trains on device 1 none on device 0.  The same call puts
 * our stream behind the caller's current one of that device: what torch has launched from this
 * thread is done when we read or write its memory.  Work that the caller put on other streams of
 * its own is the caller's to order before it saves, as with every copy that torch makes.
 *
 * Where a device cannot be used torch copies, and the report says why.  The exception is a graph
 * that is being captured: a copy by torch would become part of it, or spoil it.
 *
 * Threads: the caller's, with the GIL.
 */
#include "device_set.h"

#include <stddef.h>
#include <unistd.h>

#include "dcp_alloc.h"
#include "dcp_cuda.h"
#include "errors.h"

static bool
is_lent(const struct device_set *set)
{
    return set != NULL && !set->given_back && set->pid == getpid();
}

/* ---- the caller's stream ---- */

/* torch's current stream of the calling thread on that device: 0, or -1 with an exception. */
static int
current_stream(const struct device_set *set, int32_t index, void **ret_stream)
{
    PyObject *handle = PyObject_CallFunction(set->state->current_cuda_stream, "i", (int)index);
    void *stream = handle == NULL ? NULL : PyLong_AsVoidPtr(handle);

    Py_XDECREF(handle);
    if (PyErr_Occurred()) {
        return -1;
    }
    *ret_stream = stream; /* NULL is the default stream */
    return 0;
}

typedef int (*order_fn)(void *ctx, void *stream, struct dcp_error *err);

static int
put_in_order(const struct device_set *set, const struct dcp_device *device, order_fn order)
{
    struct dcp_error err;
    void *stream;
    int rc;

    if (current_stream(set, device->index, &stream) != 0) {
        return -1;
    }
    dcp_error_clear(&err);
    rc = order(device->ctx, stream, &err);
    if (rc != 0) {
        native_set_error(set->state->error_class, &err);
        return -1;
    }
    return 0;
}

int
device_set_follow(struct device_set *set)
{
    int rc = 0;

    for (uint32_t i = 0; rc == 0 && is_lent(set) && i < set->list.count; i++) {
        rc = put_in_order(set, set->items[i], set->items[i]->follow);
    }
    return rc;
}

int
device_set_lead(struct device_set *set)
{
    int rc = 0;

    for (uint32_t i = 0; rc == 0 && is_lent(set) && i < set->list.count; i++) {
        rc = put_in_order(set, set->items[i], set->items[i]->lead);
    }
    return rc;
}

/* ---- lending ---- */

static struct device_set *
set_of(struct device_set **set, const struct native_state *state)
{
    if (*set == NULL) {
        *set = dcp_calloc(1, sizeof **set);
        if (*set == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        (*set)->state = state;
        (*set)->pid = getpid();
        (*set)->list.items = (*set)->items;
    }
    return *set;
}

static void
note_reason(struct device_set *set, const char *why)
{
    if (set->reason[0] == '\0') {
        PyOS_snprintf(set->reason, sizeof set->reason, "%s", why);
    }
}

/* 1: it was lent; 0: it is of no use to us; -1. */
static int
lend(struct device_set *set, int32_t index)
{
    struct dcp_device *device = NULL;
    struct dcp_error err;
    int rc;

    if (set->list.count == DEVICE_SET_MAX) {
        note_reason(set, "the state lies on more devices than can be used at a time");
        return 0;
    }
    if (set->state->current_cuda_stream == NULL || !dcp_cuda_is_there()) {
        note_reason(set, "no CUDA runtime is loaded that could be used beside torch");
        return 0;
    }
    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc = dcp_cuda_lend(index, &device, &err);
    Py_END_ALLOW_THREADS if (rc != 0)
    {
        note_reason(set, err.message);
        return 0;
    }
    set->items[set->list.count++] = device; /* given back with the set, whatever comes now */
    return put_in_order(set, device, device->follow) == 0 ? 1 : -1;
}

int
device_set_find(struct device_set **set_at, const struct native_state *state, int32_t index,
                uint32_t *ret_number)
{
    struct device_set *set = set_of(set_at, state);
    int rc = 0;

    if (set == NULL) {
        return -1;
    }
    for (uint32_t i = 0; i < set->list.count; i++) {
        if (set->items[i]->index == index) {
            *ret_number = i + 1;
            return 1;
        }
    }
    if (index < 0 || index >= DEVICE_SET_MAX || (set->refused >> index & 1) != 0) {
        return 0;
    }
    rc = lend(set, index);
    if (rc == 0) {
        set->refused |= UINT64_C(1) << index;
    } else if (rc > 0) {
        *ret_number = set->list.count;
    }
    return rc;
}

int
device_set_use_files(struct device_set *set, bool must)
{
    for (uint32_t i = 0; is_lent(set) && i < set->list.count; i++) {
        struct dcp_error err;
        int rc;

        dcp_error_clear(&err);
        Py_BEGIN_ALLOW_THREADS rc = dcp_cuda_use_cufile(set->items[i], &err);
        Py_END_ALLOW_THREADS if (rc != 0 && must)
        {
            native_set_error(set->state->error_class, &err);
            return -1;
        }
        if (rc != 0) {
            note_reason(set, err.message);
        }
    }
    return 0;
}

void
device_set_refuse(struct device_set *set, uint64_t bytes, const char *why)
{
    if (set == NULL) {
        return;
    }
    set->refused_count++;
    set->refused_bytes += bytes;
    if (why != NULL) {
        note_reason(set, why);
    }
}

const struct dcp_device_list *
device_set_list(const struct device_set *set)
{
    return is_lent(set) && set->list.count > 0 ? &set->list : NULL;
}

/* ["cuda:0", ...]; returns new. */
static PyObject *
names_of(const struct device_set *set)
{
    PyObject *names = PyList_New(0);

    for (uint32_t i = 0; names != NULL && i < set->list.count; i++) {
        const struct dcp_device *device = set->items[i];
        PyObject *name = PyUnicode_FromFormat("%s:%d", device->kind, (int)device->index);

        if (name == NULL || PyList_Append(names, name) != 0) {
            Py_CLEAR(names);
        }
        Py_XDECREF(name);
    }
    return names;
}

#define OF_SET(name, field) {name, offsetof(struct device_set, field)}
#define OF_STATS(field) {"device_" #field, offsetof(struct dcp_device_stats, field)}

int
device_set_report(const struct device_set *set, const struct dcp_device_stats *stats,
                  PyObject *dict)
{
    static const struct native_number of_set[] = {
        OF_SET("device_by_torch_count", refused_count),
        OF_SET("device_by_torch_bytes", refused_bytes),
    };
    static const struct native_number of_stats[] = {
        OF_STATS(copied_bytes), OF_STATS(copies_count), OF_STATS(packed_bytes),
        OF_STATS(packed_count), OF_STATS(slab_bytes),   OF_STATS(wait_ns),
    };
    static const struct device_set none;
    const char *why = set != NULL && set->reason[0] != '\0' ? set->reason : stats->reason;

    set = set == NULL ? &none : set;
    if (native_dict_put(dict, "devices", names_of(set)) != 0 ||
        native_dict_put(dict, "device_reason", Py_BuildValue("z", *why == '\0' ? NULL : why)) !=
            0 ||
        native_dict_put_numbers(dict, set, of_set, sizeof of_set / sizeof of_set[0]) != 0 ||
        native_dict_put_numbers(dict, stats, of_stats, sizeof of_stats / sizeof of_stats[0]) != 0) {
        return -1;
    }
    return 0;
}

void
device_set_give_back(struct device_set *set)
{
    if (!is_lent(set)) {
        return;
    }
    set->given_back = true;
    for (uint32_t i = 0; i < set->list.count; i++) {
        dcp_cuda_give_back(set->items[i]); /* tables are never freed: their names stay readable */
    }
}

void
device_set_clean_up(struct device_set **set_at)
{
    device_set_give_back(*set_at);
    dcp_free(*set_at);
    *set_at = NULL;
}

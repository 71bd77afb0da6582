/*
 * debug_plan.c: shows plans to the tests, so that they can be compared with torch's item by item.
 */
#include "debug_plan.h"

#include "errors.h"
#include "flatten.h"
#include "load_targets.h"
#include "save_items.h"

/* ---- _debug_plan ---- */

static PyObject *
numbers_as_tuple(const uint64_t *numbers, uint32_t count)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)count);

    for (uint32_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(numbers[i]);

        if (number == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, number);
        }
    }
    return tuple;
}

/* Takes `value` (NULL: an exception is set). */
static int
append(PyObject *list, PyObject *value)
{
    int rc = value == NULL ? -1 : PyList_Append(list, value);

    Py_XDECREF(value);
    return rc;
}

static PyObject *
show_name(const struct dcp_name *name)
{
    PyObject *path = name->path == NULL
                         ? Py_NewRef(Py_None)
                         : flatten_path_as_tuple(name->path, name->path_len, name->path_parts);

    return path == NULL ? NULL : Py_BuildValue("(s#N)", name->fqn, (Py_ssize_t)name->fqn_len, path);
}

static PyObject *
show_item(const struct dcp_plan *plan, const struct dcp_item *item)
{
    static const char *const kinds[] = {"?", "tensor", "shard", "bytes"};
    const struct dcp_name *name = &plan->names[item->name];
    PyObject *size = numbers_as_tuple(dcp_item_global_size(plan, item), item->ndim);
    PyObject *offsets = numbers_as_tuple(dcp_item_offsets(plan, item), item->ndim);
    PyObject *sizes = numbers_as_tuple(dcp_item_sizes(plan, item), item->ndim);

    if (size == NULL || offsets == NULL || sizes == NULL) {
        Py_XDECREF(size);
        Py_XDECREF(offsets);
        Py_XDECREF(sizes);
        return NULL;
    }
    return Py_BuildValue("(s#szNNNOK)", name->fqn, (Py_ssize_t)name->fqn_len, kinds[item->kind],
                         item->dtype == DCP_DTYPE_NONE ? NULL : dcp_dtype_name(item->dtype), size,
                         offsets, sizes, item->props & DCP_PROP_REQUIRES_GRAD ? Py_True : Py_False,
                         (unsigned long long)item->slot_bytes);
}

/* What the writer would read: the row-major bytes of a tensor, or the record. */
static PyObject *
show_payload(const struct save_items *items, uint32_t i)
{
    const struct dcp_plan *plan = &items->plan;
    const struct dcp_item *item = &plan->items[i];
    const struct dcp_source *source = &items->sources[i];
    uint64_t bytes = item->slot_bytes != 0 ? item->slot_bytes : dcp_item_payload_bytes(plan, item);
    PyObject *payload;

    if (item->slot_bytes != 0 || source->strides_bytes == NULL) {
        return PyBytes_FromStringAndSize((const char *)source->data, (Py_ssize_t)bytes);
    }
    payload = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)bytes);
    if (payload != NULL) {
        dcp_box_gather((uint8_t *)PyBytes_AS_STRING(payload), source->data, item->ndim,
                       dcp_item_sizes(plan, item), source->strides_bytes,
                       dcp_dtype_bytes(item->dtype), 0, bytes);
    }
    return payload;
}

static PyObject *
show_plan(const struct save_items *items, bool with_data)
{
    PyObject *names = PyList_New(0), *shown = PyList_New(0), *payloads = PyList_New(0);
    int rc = names == NULL || shown == NULL || payloads == NULL ? -1 : 0;
    const struct dcp_plan *plan = &items->plan;

    for (uint32_t i = 0; rc == 0 && i < plan->names_count; i++) {
        rc = append(names, show_name(&plan->names[i]));
    }
    for (uint32_t i = 0; rc == 0 && i < plan->items_count; i++) {
        rc = append(shown, show_item(plan, &plan->items[i]));
        if (rc == 0 && with_data) {
            rc = append(payloads, show_payload(items, i));
        }
    }
    if (rc != 0) {
        Py_XDECREF(names);
        Py_XDECREF(shown);
        Py_XDECREF(payloads);
        return NULL;
    }
    return Py_BuildValue("{sNsNsNsKsKsKsKsKsK}", "names", names, "items", shown, "payloads",
                         payloads, "tensors_count", (unsigned long long)items->tensors_count,
                         "dtensors_count", (unsigned long long)items->dtensors_count,
                         "python_count", (unsigned long long)items->python_count, "copied_count",
                         (unsigned long long)items->copied_count, "records_count",
                         (unsigned long long)items->records_count, "objects_count",
                         (unsigned long long)items->objects_count);
}

PyDoc_STRVAR(debug_plan_doc,
             "_debug_plan(state_dict, *, rank=0, thread_count=1, single_file_per_rank=True, "
             "flatten_state_dict=True, flatten_sharded_tensors=True, with_data=False, "
             "show=True)\n--\n\n"
             "What this rank would plan to write, for tests.");

static PyObject *
debug_plan(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"state_dict",
                               "rank",
                               "thread_count",
                               "single_file_per_rank",
                               "flatten_state_dict",
                               "flatten_sharded_tensors",
                               "with_data",
                               "show",
                               NULL};
    struct save_items_options options = {.thread_count = 1};
    int single = 1, flatten = 1, flatten_sharded = 1, with_data = 0, show = 1;
    struct save_items items = {0};
    PyObject *state_dict, *result;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$IIppppp:_debug_plan", keywords, &state_dict,
                                     &options.rank, &options.thread_count, &single, &flatten,
                                     &flatten_sharded, &with_data, &show) ||
        native_state_load(module) != 0) {
        return NULL;
    }
    options.single_file_per_rank = single != 0;
    options.flatten_state_dict = flatten != 0;
    options.flatten_sharded_tensors = flatten_sharded != 0;
    if (save_items_build(PyModule_GetState(module), state_dict, &options, &items) != 0) {
        return NULL;
    }
    result = show ? show_plan(&items, with_data != 0) : Py_NewRef(Py_None);
    save_items_clean_up(&items);
    return result;
}

/* ---- _debug_targets ---- */

static PyObject *
show_target(const struct load_targets *targets, uint64_t i)
{
    const struct dcp_metadata *md = targets->plan.md;
    const struct dcp_target *target = &targets->plan.targets[i];
    const struct dcp_md_entry *entry = &md->entries[target->entry];
    const uint64_t *dims = targets->plan.dims + target->dims;
    PyObject *offsets = numbers_as_tuple(dims, entry->ndim);
    PyObject *sizes = offsets != NULL ? numbers_as_tuple(dims + entry->ndim, entry->ndim) : NULL;

    if (sizes == NULL) {
        Py_XDECREF(offsets);
        return NULL;
    }
    return Py_BuildValue("(s#NNKOi)", md->strings + entry->name, (Py_ssize_t)entry->name_len,
                         offsets, sizes, (unsigned long long)(uintptr_t)target->data,
                         PyList_GET_ITEM(targets->tensors, (Py_ssize_t)i), (int)target->kind);
}

static PyObject *
show_targets(const struct load_targets *targets)
{
    PyObject *shown = PyList_New(0);
    int rc = shown == NULL ? -1 : 0;

    for (uint64_t i = 0; rc == 0 && i < targets->plan.targets_count; i++) {
        rc = append(shown, show_target(targets, i));
    }
    if (rc != 0) {
        Py_XDECREF(shown);
        return NULL;
    }
    return Py_BuildValue("{sNsOsKsKsKsKsKsO}", "targets", shown, "objects", targets->objects,
                         "straight_count", (unsigned long long)targets->straight_count,
                         "cast_count", (unsigned long long)targets->cast_count, "copies_count",
                         (unsigned long long)targets->copies_count, "missing_count",
                         (unsigned long long)targets->missing_count, "replaced_count",
                         (unsigned long long)targets->replaced_count, "is_v_2_3",
                         targets->is_v_2_3 ? Py_True : Py_False);
}

/* (target, number of the chunk in its tensor, offsets in the chunk, in the target, lengths). */
static PyObject *
show_read_item(const struct dcp_read_plan *plan, const struct dcp_read_item *item)
{
    const struct dcp_md_entry *entry = &plan->md->entries[plan->targets[item->target].entry];
    uint32_t ndim = entry->kind == DCP_ITEM_BYTES ? 0 : entry->ndim;
    const uint64_t *dims = plan->dims + item->dims;

    return Py_BuildValue("(KKNNN)", (unsigned long long)item->target,
                         (unsigned long long)(item->chunk - entry->first_chunk),
                         numbers_as_tuple(dims, ndim), numbers_as_tuple(dims + ndim, ndim),
                         numbers_as_tuple(dims + 2 * (size_t)ndim, ndim));
}

/* Finds the overlaps and adds them as "items", and "hole_bytes", to what is shown. */
static int
show_read_items(const struct native_state *state, struct dcp_read_plan *plan, PyObject *shown)
{
    uint64_t hole_bytes;
    struct dcp_error err;
    PyObject *items;
    int rc = 0;

    dcp_error_clear(&err);
    if (dcp_read_plan_build(plan, false, &hole_bytes, &err) != 0) {
        native_set_error(state->error_class, &err);
        return -1;
    }
    items = PyList_New(0);
    for (uint64_t i = 0; items != NULL && rc == 0 && i < plan->items_count; i++) {
        rc = append(items, show_read_item(plan, &plan->items[i]));
    }
    if (items == NULL || rc != 0) {
        Py_XDECREF(items);
        return -1;
    }
    rc = PyDict_SetItemString(shown, "items", items);
    Py_DECREF(items);
    if (rc == 0) {
        PyObject *holes = PyLong_FromUnsignedLongLong(hole_bytes);
        rc = holes == NULL ? -1 : PyDict_SetItemString(shown, "hole_bytes", holes);
        Py_XDECREF(holes);
    }
    return rc;
}

PyDoc_STRVAR(debug_targets_doc,
             "_debug_targets(metadata, state_dict, *, flatten_state_dict=True, "
             "flatten_sharded_tensors=True, allow_partial_load=False, items=False)\n--\n\n"
             "Where a load of a `.metadata` image into a state dict would put what it reads, and "
             "with `items` from which chunks, for tests.");

static PyObject *
debug_targets(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"metadata",
                               "state_dict",
                               "flatten_state_dict",
                               "flatten_sharded_tensors",
                               "allow_partial_load",
                               "items",
                               NULL};
    int flatten = 1, flatten_sharded = 1, partial = 0, items = 0;
    struct load_targets_options options = {0};
    struct load_targets targets = {0};
    struct dcp_metadata md = {0};
    struct native_state *state = PyModule_GetState(module);
    PyObject *state_dict, *result = NULL;
    const char *image;
    Py_ssize_t len;
    struct dcp_error err;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y#O|$pppp:_debug_targets", keywords, &image,
                                     &len, &state_dict, &flatten, &flatten_sharded, &partial,
                                     &items) ||
        native_state_load(module) != 0) {
        return NULL;
    }
    options.flatten_state_dict = flatten != 0;
    options.flatten_sharded_tensors = flatten_sharded != 0;
    options.allow_partial_load = partial != 0;
    dcp_error_clear(&err);
    if (dcp_metadata_read((const uint8_t *)image, (size_t)len, &md, &err) != 0) {
        native_set_error(state->error_class, &err);
        return NULL;
    }
    if (load_targets_build(state, &md, state_dict, &options, &targets) == 0) {
        result = show_targets(&targets);
    }
    if (result != NULL && items && show_read_items(state, &targets.plan, result) != 0) {
        Py_CLEAR(result);
    }
    load_targets_clean_up(&targets);
    dcp_metadata_clean_up(&md);
    return result;
}

PyDoc_STRVAR(debug_has_meta_doc, "_debug_has_meta(state_dict, /)\n--\n\n"
                                 "Whether a state dict holds tensors without data.");

static PyObject *
debug_has_meta(PyObject *module, PyObject *state_dict)
{
    int found;

    if (native_state_load(module) != 0) {
        return NULL;
    }
    found = state_dict_has_meta(PyModule_GetState(module), state_dict);
    return found < 0 ? NULL : PyBool_FromLong(found);
}

PyDoc_STRVAR(debug_fail_after_doc,
             "_debug_fail_after(n, /)\n--\n\n"
             "The core's allocation number `n` from now on fails, and all after it; 0 switches it "
             "off.");

static PyObject *
debug_fail_after(PyObject *module, PyObject *number)
{
    unsigned long long n = PyLong_AsUnsignedLongLong(number);

    (void)module;
    if (PyErr_Occurred() != NULL) {
        return NULL;
    }
    dcp_alloc_fail_after(n);
    Py_RETURN_NONE;
}

PyMethodDef debug_plan_methods[] = {
    {"_debug_plan", (PyCFunction)(void (*)(void))debug_plan, METH_VARARGS | METH_KEYWORDS,
     debug_plan_doc},
    {"_debug_targets", (PyCFunction)(void (*)(void))debug_targets, METH_VARARGS | METH_KEYWORDS,
     debug_targets_doc},
    {"_debug_fail_after", debug_fail_after, METH_O, debug_fail_after_doc},
    {"_debug_has_meta", debug_has_meta, METH_O, debug_has_meta_doc},
    {NULL, NULL, 0, NULL},
};

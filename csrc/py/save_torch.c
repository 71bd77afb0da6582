/*
 * save_torch.c: write items that torch describes: ShardedTensors, objects with
 * __create_write_items__, DTensors with other placements or locals, tensor subclasses.
 *
 * A WriteItem is read field by field; its data is looked up by torch's find_state_dict_object,
 * which knows the same hooks, and then read natively where it is plain.  All functions need the
 * GIL.
 */
#include <string.h>

#include "save_private.h"

int
save_has_hook(const struct native_state *state, PyObject *tensor)
{
    int rc = native_has_hook(tensor, state->name_write_hook, NULL);

    if (rc == 0 && state->checkpointable_type != NULL) {
        rc = native_has_hook(tensor, state->name_global_shape, NULL);
    }
    return rc;
}

static int
call_for_truth(PyObject *function)
{
    PyObject *result = PyObject_CallNoArgs(function);
    int truth = result == NULL ? -1 : PyObject_IsTrue(result);

    Py_XDECREF(result);
    return truth;
}

int
save_ask_modes(struct save_builder *b)
{
    int grad = call_for_truth(b->state->is_grad_enabled);
    int cuda = grad < 0 ? -1 : call_for_truth(b->state->cuda_is_initialized);
    PyObject *accelerator, *type;

    if (cuda < 0) {
        return -1;
    }
    b->grad_enabled = grad > 0;
    b->ask_pinned = cuda > 0;
    if (b->ask_pinned) {
        return 0;
    }
    accelerator = PyObject_CallNoArgs(b->state->current_accelerator);
    if (accelerator == NULL || accelerator == Py_None) {
        Py_XDECREF(accelerator);
        return accelerator == NULL ? -1 : 0;
    }
    /* Only CUDA says whether it is initialised; asking others is_pinned() is cheap enough. */
    type = PyObject_GetAttr(accelerator, b->state->name_type);
    Py_DECREF(accelerator);
    if (type == NULL) {
        return -1;
    }
    b->ask_pinned = !PyUnicode_Check(type) || PyUnicode_CompareWithASCIIString(type, "cuda") != 0;
    Py_DECREF(type);
    return 0;
}

/* ---- fields of a WriteItem ---- */

/* Numbers of object.name. */
static int
get_numbers(PyObject *object, PyObject *name, uint64_t *ret, uint32_t *ret_ndim)
{
    PyObject *sequence = PyObject_GetAttr(object, name);
    int rc = sequence == NULL ? -1 : native_numbers_from(sequence, ret, ret_ndim);

    Py_XDECREF(sequence);
    return rc;
}

static int
get_truth(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    int truth = value == NULL ? -1 : PyObject_IsTrue(value);

    Py_XDECREF(value);
    return truth;
}

static int
refuse_property(const struct save_builder *b, PyObject *error, const char *what, PyObject *value)
{
    PyObject *fqn = save_fqn(b);

    if (fqn != NULL) {
        PyErr_Format(error, "cannot save %R: %s %R is not supported by dcp_native", fqn, what,
                     value);
        Py_DECREF(fqn);
    }
    return -1;
}

/* TensorProperties. */
static int
read_properties(struct save_builder *b, PyObject *properties, struct dcp_item *item)
{
    const struct native_state *state = b->state;
    PyObject *dtype = PyObject_GetAttr(properties, state->name_dtype);
    PyObject *layout = dtype != NULL ? PyObject_GetAttr(properties, state->name_layout) : NULL;
    PyObject *format =
        layout != NULL ? PyObject_GetAttr(properties, state->name_memory_format) : NULL;
    int grad = format != NULL ? get_truth(properties, state->name_requires_grad) : -1;
    int pin = grad >= 0 ? get_truth(properties, state->name_pin_memory) : -1;
    int rc = -1;

    if (pin >= 0) {
        item->dtype = (uint8_t)native_dtype_of(state, dtype);
        item->props = (uint8_t)((grad > 0 ? DCP_PROP_REQUIRES_GRAD : 0) |
                                (pin > 0 ? DCP_PROP_PIN_MEMORY : 0) |
                                (format == state->channels_last ? DCP_PROP_CHANNELS_LAST : 0) |
                                (format == state->preserve_format ? DCP_PROP_PRESERVE_FORMAT : 0));
        if (item->dtype == DCP_DTYPE_NONE) {
            rc = refuse_property(b, PyExc_TypeError, "dtype", dtype);
        } else if (layout != state->strided) {
            rc = refuse_property(b, PyExc_NotImplementedError, "layout", layout);
        } else {
            rc = 0;
        }
    }
    Py_XDECREF(format);
    Py_XDECREF(layout);
    Py_XDECREF(dtype);
    return rc;
}

/* TensorWriteData: fills the item and b->box. */
static int
read_tensor_data(struct save_builder *b, PyObject *write_item, struct dcp_item *item)
{
    const struct native_state *state = b->state;
    PyObject *data = PyObject_GetAttr(write_item, state->name_tensor_data);
    PyObject *chunk = data != NULL ? PyObject_GetAttr(data, state->name_chunk) : NULL;
    PyObject *properties = chunk != NULL ? PyObject_GetAttr(data, state->name_properties) : NULL;
    uint32_t ndim = 0, offsets_ndim = 0, sizes_ndim = 0;
    int rc = -1;

    if (properties != NULL && read_properties(b, properties, item) == 0 &&
        get_numbers(data, state->name_size, b->box.size, &ndim) == 0 &&
        get_numbers(chunk, state->name_offsets, b->box.offsets, &offsets_ndim) == 0 &&
        get_numbers(chunk, state->name_sizes, b->box.sizes, &sizes_ndim) == 0) {
        if (offsets_ndim != ndim || sizes_ndim != ndim) {
            rc = refuse_property(b, PyExc_ValueError,
                                 "a chunk with other dimensions than its tensor:", chunk);
        } else {
            item->ndim = (uint8_t)ndim;
            rc = 0;
        }
    }
    Py_XDECREF(properties);
    Py_XDECREF(chunk);
    Py_XDECREF(data);
    return rc;
}

/* ---- items ---- */

static int
check_fqn(PyObject *fqn, PyObject *index, const struct native_state *state)
{
    PyObject *own = PyObject_GetAttr(index, state->name_fqn);
    int equal = own == NULL ? -1 : PyObject_RichCompareBool(own, fqn, Py_EQ);

    if (equal == 0) {
        PyErr_Format(PyExc_ValueError,
                     "Could not find FQN: '%S' (__create_write_items__ of '%U' made an item of "
                     "another name)",
                     own, fqn);
    }
    Py_XDECREF(own);
    return equal > 0 ? 0 : -1;
}

static int
add_data(struct save_builder *b, struct dcp_item *item, PyObject *data)
{
    struct dcp_tensor_view view;
    enum dcp_tensor_class tensor_class;
    PyObject *detached = native_call(data, b->state->name_detach);
    int rc;

    if (detached == NULL) {
        return -1;
    }
    tensor_class = (enum dcp_tensor_class)b->state->bridge->tensor_view(detached, &view);
    rc = save_add_tensor(b, item, &b->box, detached, tensor_class, &view);
    Py_DECREF(detached);
    return rc;
}

/* `lookup` is {fqn: object}. */
static int
add_write_item(struct save_builder *b, PyObject *fqn, PyObject *lookup, PyObject *write_item)
{
    const struct native_state *state = b->state;
    struct dcp_item item = {.name = b->name};
    PyObject *index = PyObject_GetAttr(write_item, state->name_index);
    PyObject *type = index != NULL ? PyObject_GetAttr(write_item, state->name_type) : NULL;
    PyObject *data = NULL;
    int rc = -1;

    if (type != NULL && check_fqn(fqn, index, state) == 0) {
        data = PyObject_CallFunctionObjArgs(state->find_state_dict_object, lookup, index, NULL);
    }
    if (data == NULL) {
        rc = -1;
    } else if (type == state->write_item_bytes) {
        rc = save_add_object(b, data);
    } else if (read_tensor_data(b, write_item, &item) == 0) {
        bool whole = type == state->write_item_tensor &&
                     memcmp(b->box.size, b->box.sizes, item.ndim * sizeof(uint64_t)) == 0;

        item.kind = whole ? DCP_ITEM_TENSOR : DCP_ITEM_SHARD;
        rc = add_data(b, &item, data);
    }
    Py_XDECREF(data);
    Py_XDECREF(type);
    Py_XDECREF(index);
    return rc;
}

int
save_add_through_torch(struct save_builder *b, PyObject *object)
{
    PyObject *fqn = save_fqn(b);
    PyObject *lookup = fqn != NULL ? PyDict_New() : NULL;
    PyObject *made = NULL, *write_items = NULL;
    int rc = -1;

    if (lookup != NULL && PyDict_SetItem(lookup, fqn, object) == 0) {
        made = PyObject_CallFunctionObjArgs(b->state->create_write_items, fqn, object, NULL);
    }
    if (made != NULL) {
        write_items = PySequence_Fast(made, "__create_write_items__ must give a list");
    }
    if (write_items != NULL) {
        rc = 0;
        b->items->python_count += (uint64_t)PySequence_Fast_GET_SIZE(write_items);
        for (Py_ssize_t i = 0; rc == 0 && i < PySequence_Fast_GET_SIZE(write_items); i++) {
            rc = add_write_item(b, fqn, lookup, PySequence_Fast_GET_ITEM(write_items, i));
        }
    }
    Py_XDECREF(write_items);
    Py_XDECREF(made);
    Py_XDECREF(lookup);
    Py_XDECREF(fqn);
    return rc;
}

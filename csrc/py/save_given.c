/*
 * save_given.c: a plan of ours from the write items that a planner of the program's own ended with.
 *
 * An item here describes the data that the planner gives for it, not what its WriteItem promises:
 * torch writes whatever `resolve_data` returns (a tensor cast to another dtype, say) and leaves the
 * description to the planner's Metadata, which our layout does not need.  So every plain tensor is
 * framed natively, and a BytesIO is stored as it is.
 *
 * One item after the other: a planner may use the same memory for the next one.  All functions need
 * the GIL; the planner's code runs in between.
 */
#include <string.h>

#include "save_private.h"

#include "errors.h"

/* A record of no bytes still takes a place; who publishes it says that its length is 0. */
static const char nothing[1] = {0};

/* The name of item.index, added when new; sets *leaf and b->name.  *ret_fqn, a new
 * reference, keeps the text. */
static int
take_name(struct save_builder *b, struct flatten_leaf *leaf, PyObject *known, PyObject *write_item,
          PyObject **ret_fqn)
{
    PyObject *index = PyObject_GetAttr(write_item, b->state->name_index);
    PyObject *fqn = index != NULL ? PyObject_GetAttr(index, b->state->name_fqn) : NULL;
    PyObject *number = NULL;
    Py_ssize_t len;
    int rc = -1;

    Py_XDECREF(index);
    leaf->fqn = fqn != NULL ? PyUnicode_AsUTF8AndSize(fqn, &len) : NULL;
    if (leaf->fqn == NULL) {
        Py_XDECREF(fqn);
        return -1;
    }
    leaf->fqn_len = (size_t)len;
    number = PyDict_GetItemWithError(known, fqn);
    if (number != NULL) {
        b->name = (uint32_t)PyLong_AsUnsignedLong(number);
        rc = 0;
    } else if (PyErr_Occurred()) {
        rc = -1;
    } else if (dcp_plan_add_name(&b->items->plan, leaf->fqn, leaf->fqn_len, NULL, 0, 0, &b->name,
                                 &b->err) != 0) {
        native_set_error(b->state->error_class, &b->err);
    } else {
        number = PyLong_FromUnsignedLong(b->name);
        rc = number == NULL ? -1 : PyDict_SetItem(known, fqn, number);
        Py_XDECREF(number);
    }
    *ret_fqn = fqn;
    return rc;
}

static int
add_bytes(struct save_builder *b, PyObject *data)
{
    PyObject *buffer = native_call(data, b->state->name_getbuffer);
    Py_buffer view;
    int rc;

    if (buffer == NULL || PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE) != 0) {
        Py_XDECREF(buffer);
        return -1;
    }
    rc = view.len > 0 ? save_add_bytes(b, view.buf, (size_t)view.len)
                      : save_add_bytes(b, nothing, sizeof nothing);
    PyBuffer_Release(&view);
    Py_DECREF(buffer);
    return rc;
}

static int
add_tensor(struct save_builder *b, PyObject *data)
{
    struct dcp_item item = {.name = b->name, .kind = DCP_ITEM_TENSOR};
    PyObject *detached = native_call(data, b->state->name_detach);
    enum dcp_tensor_class tensor_class;
    struct dcp_tensor_view view;
    int rc;

    if (detached == NULL) {
        return -1;
    }
    tensor_class = (enum dcp_tensor_class)b->state->bridge->tensor_view(detached, &view);
    if (tensor_class == DCP_PLAIN_TENSOR && view.flags & DCP_TENSOR_STRIDED &&
        view.flags & DCP_TENSOR_HAS_TYPE && view.ndim <= DCP_MAX_DIMS) {
        item.ndim = (uint8_t)view.ndim;
        item.dtype = (uint8_t)view.dtype;
        for (uint32_t d = 0; d < view.ndim; d++) {
            b->box.size[d] = b->box.sizes[d] = (uint64_t)view.sizes[d];
            b->box.offsets[d] = 0;
        }
    }
    rc = save_add_tensor(b, &item, &b->box, detached, tensor_class, &view);
    Py_DECREF(detached);
    return rc;
}

static int
add_given(struct save_builder *b, PyObject *known, PyObject *write_item, PyObject *resolve)
{
    struct flatten_leaf leaf = {0};
    PyObject *fqn = NULL, *data = NULL;
    int rc = take_name(b, &leaf, known, write_item, &fqn);

    b->leaf = &leaf;
    if (rc == 0) {
        data = PyObject_CallOneArg(resolve, write_item);
        rc = data == NULL ? -1 : PyObject_IsInstance(data, b->state->bytes_io_type);
        rc = rc < 0 ? -1 : rc > 0 ? add_bytes(b, data) : add_tensor(b, data);
    }
    Py_XDECREF(data);
    Py_XDECREF(fqn);
    b->leaf = NULL;
    return rc;
}

int
save_items_build_given(struct native_state *state, PyObject *write_items, PyObject *resolve,
                       const struct save_items_options *options, struct save_items *ret)
{
    struct save_items items = {.keepalive = PyList_New(0)};
    struct save_builder b = {.state = state, .options = options, .items = &items};
    PyObject *known = PyDict_New();
    PyObject *all = known != NULL ? PySequence_Fast(write_items, "write items are a list") : NULL;
    int rc = items.keepalive == NULL || all == NULL ? -1 : 0;

    dcp_error_clear(&b.err);
    items.plan.rank = options->rank;
    items.plan.thread_count = options->thread_count;
    items.plan.single_file_per_rank = options->single_file_per_rank;
    items.plan.planned_outside = true;
    for (Py_ssize_t i = 0; rc == 0 && i < PySequence_Fast_GET_SIZE(all); i++) {
        PyObject *item = Py_NewRef(PySequence_Fast_GET_ITEM(all, i));

        rc = add_given(&b, known, item, resolve);
        Py_DECREF(item);
    }
    Py_XDECREF(all);
    Py_XDECREF(known);
    if (rc != 0) {
        save_items_clean_up(&items);
        return -1;
    }
    *ret = items;
    return 0;
}

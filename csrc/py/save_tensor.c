/*
 * save_tensor.c: where the bytes of a tensor's write item come from.
 *
 * From its own memory where that is its value: on the host, or on a device of which a table is lent
 * (device_set.c), whose bytes stay there until the save is staged or written.  Else from a copy
 * that torch makes now, or from a record by torch.save.  What is borrowed, the keepalive list
 * holds.
 *
 * All functions need the GIL; torch code runs in between, so nothing borrowed from a tensor is used
 * after such a call without its reference.
 */
#include "save_private.h"

#include "save_record.h"

static int
refuse_data(const struct save_builder *b, PyObject *error, const char *what)
{
    PyObject *fqn = save_fqn(b);

    if (fqn != NULL) {
        PyErr_Format(error, "cannot save %R: %s", fqn, what);
        Py_DECREF(fqn);
    }
    return -1;
}

PyObject *
save_fqn(const struct save_builder *b)
{
    return PyUnicode_DecodeUTF8(b->leaf->fqn, (Py_ssize_t)b->leaf->fqn_len, NULL);
}

static bool
view_has_elements(const struct dcp_tensor_view *view)
{
    for (uint32_t d = 0; view->sizes != NULL && d < view->ndim; d++) {
        if (view->sizes[d] == 0) {
            return false;
        }
    }
    return true;
}

static bool
view_fits(const struct dcp_tensor_view *view, const struct dcp_item *item,
          const struct save_box *box)
{
    if (view->dtype != item->dtype || view->ndim != item->ndim) {
        return false;
    }
    for (uint32_t d = 0; d < view->ndim; d++) {
        if ((uint64_t)view->sizes[d] != box->sizes[d]) {
            return false;
        }
    }
    return true;
}

/* The tensor's own memory is the source: the host's, or that of a device. */
static int
add_memory(struct save_builder *b, const struct dcp_item *item, const struct save_box *box,
           PyObject *tensor, const struct dcp_tensor_view *view, uint32_t device)
{
    struct dcp_source source = {.data = view->data, .device = device};

    if (!(view->flags & DCP_TENSOR_CONTIGUOUS)) {
        int64_t *strides =
            dcp_bump_alloc(&b->items->strides, view->ndim * sizeof(int64_t), sizeof(int64_t));

        if (strides == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (uint32_t d = 0; d < view->ndim; d++) {
            strides[d] = view->strides[d] * (int64_t)view->item_bytes;
        }
        source.strides_bytes = strides;
    }
    if (PyList_Append(b->items->keepalive, tensor) != 0) {
        return -1;
    }
    return save_add_item(b, item, box, &source);
}

/* A record by torch.save, of what torch's own writer would hand to it: detached, on the CPU, and
 * without the rest of a larger storage. */
static int
add_record(struct save_builder *b, struct dcp_item *item, const struct save_box *box,
           PyObject *tensor)
{
    struct dcp_tensor_view view;
    struct dcp_source source = {0};
    PyObject *data = native_call(tensor, b->state->name_detach);
    uint64_t bytes;
    uint8_t *block;
    int rc;

    if (data != NULL) {
        Py_SETREF(data, native_call(data, b->state->name_cpu));
    }
    if (data == NULL) {
        return -1;
    }
    if (b->state->bridge->tensor_view(data, &view) != DCP_NOT_A_TENSOR && view.sizes != NULL) {
        bytes = view.item_bytes;
        for (uint32_t d = 0; d < view.ndim; d++) {
            bytes *= (uint64_t)view.sizes[d];
        }
        if (bytes != view.storage_bytes) {
            Py_SETREF(data, native_call(data, b->state->name_clone));
        }
    }
    rc = data == NULL ? -1 : save_record_tensor(b->state, data, &block, &item->slot_bytes);
    Py_XDECREF(data);
    if (rc != 0) {
        return -1;
    }
    source.data = block;
    if (save_own_block(b, block) != 0) {
        return -1;
    }
    b->items->records_count++;
    return save_add_item(b, item, box, &source);
}

static const char *
why_not_native(const struct dcp_tensor_view *view, const struct dcp_item *item,
               const struct save_box *box)
{
    if (view->flags & (DCP_TENSOR_CONJ | DCP_TENSOR_NEG)) {
        return "the memory of a lazy conjugate or negative is not its value";
    }
    if (!(view->flags & DCP_TENSOR_HAS_MEMORY)) {
        return "a storage has no memory";
    }
    if (!(view->flags & DCP_TENSOR_HAS_TYPE) || !view_fits(view, item, box)) {
        return "a tensor has another shape or dtype than its write item";
    }
    return NULL;
}

/* 1: torch has to copy it; 0; -1. */
static int
add_device_memory(struct save_builder *b, const struct dcp_item *item, const struct save_box *box,
                  PyObject *tensor, const struct dcp_tensor_view *view)
{
    struct device_set **devices = b->options->devices;
    uint64_t bytes = dcp_dtype_bytes(item->dtype);
    const char *why = NULL;
    uint32_t number = 0;
    int rc;

    if (devices == NULL) {
        return 1;
    }
    rc = device_set_find(devices, b->state, view->device_index, &number);
    if (rc < 0) {
        return -1;
    }
    for (uint32_t d = 0; d < item->ndim; d++) {
        bytes *= box->sizes[d]; /* of memory that exists */
    }
    if (rc > 0) {
        why = why_not_native(view, item, box);
    }
    if (rc == 0 || why != NULL) {
        device_set_refuse(*devices, bytes, why);
        return 1;
    }
    b->items->device_count++;
    b->items->device_bytes += bytes;
    return add_memory(b, item, box, tensor, view, number);
}

/* The value of a tensor whose memory is elsewhere or is not the value; returns new. */
static PyObject *
materialise(struct save_builder *b, PyObject *tensor, const struct dcp_tensor_view *view)
{
    PyObject *data = native_call(tensor, b->state->name_detach);

    if (data != NULL && !(view->flags & DCP_TENSOR_CPU)) {
        Py_SETREF(data, native_call(data, b->state->name_cpu));
    }
    if (data != NULL && view->flags & DCP_TENSOR_CONJ) {
        Py_SETREF(data, native_call(data, b->state->name_resolve_conj));
    }
    if (data != NULL && view->flags & DCP_TENSOR_NEG) {
        Py_SETREF(data, native_call(data, b->state->name_resolve_neg));
    }
    return data;
}

static int
add_materialised(struct save_builder *b, struct dcp_item *item, const struct save_box *box,
                 PyObject *tensor, const struct dcp_tensor_view *tensor_view)
{
    struct dcp_tensor_view view;
    PyObject *data = materialise(b, tensor, tensor_view);
    int rc = -1;

    if (data == NULL) {
        return -1;
    }
    if (b->state->bridge->tensor_view(data, &view) == DCP_PLAIN_TENSOR &&
        view.flags & DCP_TENSOR_CPU && view.flags & DCP_TENSOR_HAS_MEMORY &&
        !(view.flags & (DCP_TENSOR_CONJ | DCP_TENSOR_NEG)) && view_fits(&view, item, box)) {
        b->items->copied_count++;
        b->items->copied_bytes += view.storage_bytes;
        rc = add_memory(b, item, box, data, &view, 0);
    } else {
        rc = add_record(b, item, box, data);
    }
    Py_DECREF(data);
    return rc;
}

int
save_add_tensor(struct save_builder *b, struct dcp_item *item, const struct save_box *box,
                PyObject *tensor, enum dcp_tensor_class tensor_class,
                const struct dcp_tensor_view *view)
{
    const uint32_t wants = DCP_TENSOR_STRIDED | DCP_TENSOR_CPU | DCP_TENSOR_HAS_MEMORY;
    bool plain = tensor_class == DCP_PLAIN_TENSOR && view->flags & DCP_TENSOR_STRIDED;

    if (plain && (view->flags & wants) == wants &&
        !(view->flags & (DCP_TENSOR_CONJ | DCP_TENSOR_NEG)) && view_fits(view, item, box)) {
        return add_memory(b, item, box, tensor, view, 0);
    }
    if (plain && !view_has_elements(view) && view_fits(view, item, box)) {
        static const struct dcp_source nothing;

        return save_add_item(b, item, box, &nothing);
    }
    if (tensor_class == DCP_NOT_A_TENSOR) {
        return refuse_data(b, PyExc_TypeError, "its write item is a tensor's, its data is not");
    }
    if (plain && view->flags & DCP_TENSOR_META && view_has_elements(view)) {
        return refuse_data(b, PyExc_NotImplementedError,
                           "Cannot copy out of meta tensor; no data!");
    }
    if (plain && view->flags & DCP_TENSOR_CPU && !(view->flags & DCP_TENSOR_HAS_MEMORY)) {
        return refuse_data(b, PyExc_RuntimeError,
                           "its storage has no memory (it was freed or resized to 0)");
    }
    if (!plain) {
        int fake = PyObject_IsInstance(tensor, b->state->fake_tensor_type);

        if (fake != 0) {
            return fake < 0 ? -1
                            : refuse_data(b, PyExc_NotImplementedError,
                                          "it is a FakeTensor, which has no data");
        }
        return add_record(b, item, box, tensor);
    }
    if (view->flags & DCP_TENSOR_META ||
        (view->flags & DCP_TENSOR_CPU && !(view->flags & (DCP_TENSOR_CONJ | DCP_TENSOR_NEG)))) {
        return add_record(b, item, box, tensor);
    }
    if (view->flags & DCP_TENSOR_CUDA) {
        int rc = add_device_memory(b, item, box, tensor, view);

        if (rc <= 0) {
            return rc;
        }
    }
    return add_materialised(b, item, box, tensor, view);
}

/*
 * load_receive.c: what a load reads and only Python can finish, handed over while it reads.
 *
 * Finished at once and not collected, so that the memory of a load does not grow with what it
 * loads.  Pieces pass through one slab of DCP_PIECE_BYTES; overlaps that have to be copied whole
 * are gathered in tensors of their own, which in a file's order is one at a time; a record is lent
 * to Python for the length of the call.
 *
 * Python runs here on the reading thread.  What it raises is kept and stops the reader; the thread
 * that waits for the load raises it.
 *
 * Threads: everything is guarded by the GIL.
 */
#include "load_receive.h"

#include "native_run.h"

/* An overlap of which a part has come. */
struct open_overlap {
    uint64_t chunk, target;
    PyObject *tensor; /* owned */
    uint8_t *data;
    uint64_t left; /* elements */
};

void
load_receiver_init(struct load_receiver *self, const struct native_state *state,
                   const struct load_targets *targets, PyObject *receiver, atomic_int *cancel)
{
    load_receiver_clean_up(self);
    self->state = state;
    self->targets = targets;
    self->receiver = Py_NewRef(receiver);
    self->cancel = cancel;
}

int
load_receiver_raise(struct load_receiver *self)
{
    if (self->error == NULL) {
        return 0;
    }
    PyErr_SetObject((PyObject *)Py_TYPE(self->error), self->error);
    Py_CLEAR(self->error);
    return -1;
}

void
load_receiver_finish(struct load_receiver *self)
{
    while (self->open_count > 0) {
        self->open_count--; /* first: what it lets go of may run the garbage collector */
        Py_DECREF(self->open[self->open_count].tensor);
    }
    dcp_free(self->open);
    self->open = NULL;
    self->open_cap = 0;
    Py_CLEAR(self->slab);
    Py_CLEAR(self->receiver);
}

int
load_receiver_traverse(const struct load_receiver *self, visitproc visit, void *arg)
{
    Py_VISIT(self->receiver);
    Py_VISIT(self->error);
    Py_VISIT(self->slab);
    for (size_t i = 0; i < self->open_count; i++) {
        Py_VISIT(self->open[i].tensor);
    }
    return 0;
}

void
load_receiver_clean_up(struct load_receiver *self)
{
    load_receiver_finish(self);
    Py_CLEAR(self->error);
    *self = (struct load_receiver){0};
}

/* Keeps the exception for the waiting thread and stops the reader. */
static void
keep_error(struct load_receiver *self)
{
    native_keep_pending(&self->error);
    atomic_store(self->cancel, 1);
}

/* ---- arguments ---- */

static const struct dcp_md_entry *
entry_of(const struct load_receiver *self, const struct dcp_read_item *item)
{
    const struct dcp_read_plan *plan = &self->targets->plan;

    return &plan->md->entries[plan->targets[item->target].entry];
}

static PyObject *
tensor_of(const struct load_receiver *self, const struct dcp_read_item *item)
{
    return PyList_GET_ITEM(self->targets->tensors, (Py_ssize_t)item->target);
}

/* Returns new. */
static PyObject *
tuple_of(const int64_t *numbers, uint32_t count)
{
    PyObject *tuple = PyTuple_New(count);

    for (uint32_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);

        if (number == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, i, number);
        }
    }
    return tuple;
}

/* torch.empty(sizes, dtype=..., device="cpu") and its memory; returns new. */
static PyObject *
empty_tensor(const struct load_receiver *self, int dtype, uint32_t ndim, const uint64_t *sizes,
             uint8_t **ret_data)
{
    PyObject *size = NULL, *args = NULL, *kwargs = NULL, *tensor = NULL;

    if (self->state->dtypes[dtype] == NULL) {
        PyErr_Format(PyExc_TypeError, "the checkpoint holds torch.%s, which this torch has not",
                     dcp_dtype_name(dtype));
        return NULL;
    }
    size = native_size_new(self->state, ndim, sizes);
    if (size != NULL) {
        args = PyTuple_Pack(1, size);
        kwargs = Py_BuildValue("{sOss}", "dtype", self->state->dtypes[dtype], "device", "cpu");
    }
    if (args != NULL && kwargs != NULL) {
        tensor = PyObject_Call(self->state->torch_empty, args, kwargs);
    }
    if (tensor != NULL) {
        *ret_data = self->state->bridge->tensor_mutable_data(tensor);
        if (*ret_data == NULL) {
            PyErr_SetString(PyExc_RuntimeError, "torch.empty gave a tensor without memory: is a "
                                                "fake tensor mode active?");
            Py_CLEAR(tensor);
        }
    }
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    Py_XDECREF(size);
    return tensor;
}

static void
dense_strides(const struct dcp_piece *piece, uint32_t item_bytes, int64_t *ret)
{
    int64_t stride = item_bytes;

    for (uint32_t d = piece->ndim; d > 0; d--) {
        ret[d - 1] = stride;
        stride *= (int64_t)piece->lengths[d - 1];
    }
}

/* ---- pieces ---- */

static int
hand_piece(struct load_receiver *self, const struct dcp_piece *piece)
{
    const struct dcp_md_entry *entry = entry_of(self, piece->item);
    uint32_t item_bytes = dcp_dtype_bytes(entry->dtype);
    const uint64_t slab_size[1] = {DCP_PIECE_BYTES};
    int64_t dense[DCP_MAX_DIMS];
    PyObject *lengths, *strides, *result = NULL;

    if (self->state->dtypes[entry->dtype] == NULL) {
        PyErr_Format(PyExc_TypeError, "the checkpoint holds torch.%s, which this torch has not",
                     dcp_dtype_name(entry->dtype));
        return -1;
    }
    if (self->slab == NULL) {
        self->slab = empty_tensor(self, DCP_DTYPE_UINT8, 1, slab_size, &self->slab_data);
        if (self->slab == NULL) {
            return -1;
        }
    }
    DCP_ASSERT(piece->count * item_bytes <= DCP_PIECE_BYTES);
    dense_strides(piece, item_bytes, dense);
    dcp_box_copy(self->slab_data, dense, piece->bytes, piece->bytes_strides, piece->ndim,
                 piece->lengths, item_bytes);
    lengths = tuple_of((const int64_t *)piece->lengths, piece->ndim);
    strides = lengths != NULL ? tuple_of(piece->strides, piece->ndim) : NULL;
    if (strides != NULL) {
        result = PyObject_CallMethod(
            self->receiver, "piece", "(s#OOOKOOL)", self->targets->plan.md->strings + entry->name,
            (Py_ssize_t)entry->name_len, tensor_of(self, piece->item), self->slab,
            self->state->dtypes[entry->dtype], (unsigned long long)(piece->count * item_bytes),
            lengths, strides, (long long)piece->at);
    }
    Py_XDECREF(strides);
    Py_XDECREF(lengths);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* The overlap's tensor, made when its first piece comes; NULL with an exception. */
static struct open_overlap *
overlap_open(struct load_receiver *self, const struct dcp_read_item *item)
{
    const struct dcp_md_entry *entry = entry_of(self, item);
    const uint64_t *lengths = self->targets->plan.dims + item->dims + 2 * (uint64_t)entry->ndim;
    struct open_overlap *overlap;

    for (size_t i = 0; i < self->open_count; i++) {
        if (self->open[i].chunk == item->chunk && self->open[i].target == item->target) {
            return &self->open[i];
        }
    }
    if (self->open_count == self->open_cap) {
        size_t cap = self->open_cap == 0 ? 4 : 2 * self->open_cap;
        struct open_overlap *grown = dcp_realloc(self->open, cap * sizeof *grown);

        if (grown == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        self->open = grown;
        self->open_cap = cap;
    }
    overlap = &self->open[self->open_count];
    *overlap = (struct open_overlap){.chunk = item->chunk, .target = item->target, .left = 1};
    for (uint32_t d = 0; d < entry->ndim; d++) {
        overlap->left *= lengths[d];
    }
    overlap->tensor = empty_tensor(self, entry->dtype, entry->ndim, lengths, &overlap->data);
    if (overlap->tensor == NULL) {
        return NULL;
    }
    self->open_count++;
    return overlap;
}

/* Gathers an overlap, and has it copied when it is complete. */
static int
gather_overlap(struct load_receiver *self, const struct dcp_piece *piece)
{
    const struct dcp_read_item *item = piece->item;
    const struct dcp_md_entry *entry = entry_of(self, item);
    uint32_t item_bytes = dcp_dtype_bytes(entry->dtype);
    const uint64_t *dims = self->targets->plan.dims + item->dims;
    struct open_overlap *overlap = overlap_open(self, item);
    int64_t strides[DCP_MAX_DIMS];
    PyObject *tensor, *offsets, *lengths, *result = NULL;

    if (overlap == NULL) {
        return -1;
    }
    for (uint32_t d = 0; d < piece->ndim; d++) {
        strides[d] = piece->strides[d] * (int64_t)item_bytes;
    }
    dcp_box_copy(overlap->data + piece->at * (int64_t)item_bytes, strides, piece->bytes,
                 piece->bytes_strides, piece->ndim, piece->lengths, item_bytes);
    DCP_ASSERT(piece->count <= overlap->left);
    overlap->left -= piece->count;
    if (overlap->left > 0) {
        return 0;
    }
    tensor = overlap->tensor;
    *overlap = self->open[--self->open_count];
    self->whole_copies++;
    offsets = tuple_of((const int64_t *)dims + entry->ndim, entry->ndim);
    lengths = tuple_of((const int64_t *)dims + 2 * (size_t)entry->ndim, entry->ndim);
    if (offsets != NULL && lengths != NULL) {
        result = PyObject_CallMethod(
            self->receiver, "overlap", "(s#OOOO)", self->targets->plan.md->strings + entry->name,
            (Py_ssize_t)entry->name_len, tensor_of(self, item), tensor, offsets, lengths);
    }
    Py_XDECREF(lengths);
    Py_XDECREF(offsets);
    Py_DECREF(tensor);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

void
load_receive_piece(void *ctx, const struct dcp_piece *piece)
{
    struct load_receiver *self = ctx;
    PyGILState_STATE gil = PyGILState_Ensure();
    uint8_t kind = self->targets->plan.targets[piece->item->target].kind;

    if (self->error == NULL &&
        (kind == DCP_TARGET_PIECES ? hand_piece : gather_overlap)(self, piece) != 0) {
        keep_error(self);
    }
    if (self->error != NULL) {
        dcp_target_spoil(&self->targets->plan, piece->item->target);
    }
    PyGILState_Release(gil);
}

/* ---- records ---- */

/* (fqn, where the chunk lies in the tensor, transformed, lent bytes, ...); returns new. */
static PyObject *
hand_record(struct load_receiver *self, const struct dcp_read_item *item, PyObject *lent)
{
    const struct dcp_read_plan *plan = &self->targets->plan;
    const struct dcp_md_entry *entry = entry_of(self, item);
    const struct dcp_md_chunk *chunk = &plan->md->chunks[item->chunk];
    const char *fqn = plan->md->strings + entry->name;
    const int64_t *dims = (const int64_t *)plan->dims + item->dims;
    PyObject *transformed = chunk->transforms != 0 ? Py_True : Py_False;
    PyObject *place[4] = {NULL}, *result = NULL;

    if (entry->kind == DCP_ITEM_BYTES) {
        return PyObject_CallMethod(self->receiver, "object", "(s#KOO)", fqn,
                                   (Py_ssize_t)entry->name_len, (unsigned long long)item->target,
                                   lent, transformed);
    }
    place[0] = tuple_of((const int64_t *)plan->md->dims + chunk->dims, entry->ndim);
    for (int i = 1; i < 4; i++) {
        place[i] = tuple_of(dims + (size_t)(i - 1) * entry->ndim, entry->ndim);
    }
    if (place[0] != NULL && place[1] != NULL && place[2] != NULL && place[3] != NULL) {
        result = PyObject_CallMethod(self->receiver, "record", "(s#OOOOOOO)", fqn,
                                     (Py_ssize_t)entry->name_len, tensor_of(self, item), lent,
                                     transformed, place[0], place[1], place[2], place[3]);
    }
    for (int i = 0; i < 4; i++) {
        Py_XDECREF(place[i]);
    }
    return result;
}

int
load_receive_record(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
                    const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    struct load_receiver *self = ctx;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *lent = NULL, *result = NULL, *released = NULL;

    (void)plan;
    if (self->error == NULL) {
        lent = PyMemoryView_FromMemory((char *)(uintptr_t)bytes, (Py_ssize_t)len, PyBUF_READ);
        result = lent == NULL ? NULL : hand_record(self, item, lent);
        if (result == NULL) {
            keep_error(self);
        }
    }
    if (lent != NULL) {
        /* Who kept it shall meet an exception and no foreign memory. */
        released = PyObject_CallMethod(lent, "release", NULL);
        if (released == NULL) {
            keep_error(self);
            Py_CLEAR(result);
        }
    }
    Py_XDECREF(released);
    Py_XDECREF(result);
    Py_XDECREF(lent);
    PyGILState_Release(gil);
    return result != NULL ? 0
                          : dcp_error_set(err, DCP_E_CANCELLED, 0, NULL,
                                          "Python could not take a record of %zu bytes", len);
}

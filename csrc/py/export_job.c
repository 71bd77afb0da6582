/*
 * export_job.c: what Python tells of an export, as the core's structures.
 *
 * Plain tuples of numbers, names and tensors; every shape is checked here, so that the core sees
 * arrays of the right length.  Whether the numbers make sense the core checks.
 */
#include "export_job.h"

static void
job_free(PyObject *capsule)
{
    struct export_job *job = PyCapsule_GetPointer(capsule, NULL);

    dcp_bump_clean_up(&job->memory);
    PyBuffer_Release(&job->progress);
    Py_XDECREF(job->held);
    PyMem_Free(job);
}

PyObject *
export_job_new(struct export_job **ret)
{
    struct export_job *job = PyMem_Calloc(1, sizeof *job);
    PyObject *capsule = job == NULL ? PyErr_NoMemory() : PyCapsule_New(job, NULL, job_free);

    if (capsule == NULL) {
        PyMem_Free(job);
        return NULL;
    }
    job->options.cancel = &job->cancel;
    job->held = PyList_New(0);
    if (job->held == NULL) {
        Py_DECREF(capsule);
        return NULL;
    }
    *ret = job;
    return capsule;
}

/* A tuple of what `object` yields, which the job keeps; borrowed. */
static PyObject *
hold_tuple(struct export_job *job, PyObject *object)
{
    PyObject *tuple = PySequence_Tuple(object);

    if (tuple != NULL && PyList_Append(job->held, tuple) != 0) {
        Py_CLEAR(tuple);
    }
    Py_XDECREF(tuple);
    return tuple;
}

/* The bytes of a path, which the job keeps. */
const char *
export_job_path(struct export_job *job, PyObject *path)
{
    PyObject *bytes;

    if (!PyUnicode_FSConverter(path, &bytes)) {
        return NULL;
    }
    int rc = PyList_Append(job->held, bytes);
    Py_DECREF(bytes);
    return rc != 0 ? NULL : PyBytes_AS_STRING(bytes);
}

void *
export_job_take(struct export_job *job, Py_ssize_t count, size_t size)
{
    uint64_t bytes;
    void *memory = dcp_mul_overflows_u64((uint64_t)count + 1, size, &bytes)
                       ? NULL
                       : dcp_bump_alloc(&job->memory, (size_t)bytes, sizeof(void *));

    if (memory == NULL) {
        PyErr_NoMemory();
    } else {
        memset(memory, 0, (size_t)bytes);
    }
    return memory;
}

/* A tuple of what `object` yields, and an array with an element for each; NULL with an exception.
 */
static void *
take_array(struct export_job *job, PyObject *object, size_t size, PyObject **ret_tuple,
           Py_ssize_t *ret_count)
{
    PyObject *tuple = hold_tuple(job, object);

    *ret_tuple = tuple;
    *ret_count = tuple == NULL ? 0 : PyTuple_GET_SIZE(tuple);
    return tuple == NULL ? NULL : export_job_take(job, *ret_count, size);
}

int
export_job_names(struct export_job *job, PyObject *object, const char ***ret_names,
                 uint32_t *ret_count)
{
    PyObject *tuple;
    Py_ssize_t count;
    const char **names = take_array(job, object, sizeof *names, &tuple, &count);

    if (names == NULL) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        names[i] = export_job_path(job, PyTuple_GET_ITEM(tuple, i));
        if (names[i] == NULL) {
            return -1;
        }
    }
    *ret_names = names;
    *ret_count = (uint32_t)count;
    return 0;
}

/* (name, length) or (name, length, head) */
int
export_job_files(struct export_job *job, PyObject *object)
{
    PyObject *tuple;
    Py_ssize_t count;

    job->files = take_array(job, object, sizeof *job->files, &tuple, &count);
    if (job->files == NULL) {
        return -1;
    }
    job->files_count = (uint32_t)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        struct dcp_export_file *file = &job->files[i];
        PyObject *name, *head = NULL, *item = PyTuple_GET_ITEM(tuple, i);
        unsigned long long length;

        if (!PyTuple_Check(item) ||
            !PyArg_ParseTuple(item, "OK|S;files are (name, length, head)", &name, &length, &head)) {
            if (!PyErr_Occurred()) {
                PyErr_SetString(PyExc_TypeError, "files are (name, length, head)");
            }
            return -1;
        }
        file->name = export_job_path(job, name);
        file->length_bytes = length;
        if (file->name == NULL) {
            return -1;
        }
        if (head != NULL) {
            file->head = native_span(head);
        }
    }
    return 0;
}

static int
numbers_from(struct export_job *job, PyObject *tuple, uint64_t **ret)
{
    Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    uint64_t *numbers = export_job_take(job, count, sizeof *numbers);

    for (Py_ssize_t i = 0; numbers != NULL && i < count; i++) {
        numbers[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, i));
        if (numbers[i] == (uint64_t)-1 && PyErr_Occurred()) {
            return -1;
        }
    }
    *ret = numbers;
    return numbers == NULL ? -1 : 0;
}

/* A tensor's memory and its strides in the file. */
static int
piece_from(struct export_job *job, const struct native_state *state, PyObject *item,
           struct dcp_export_piece *piece)
{
    struct dcp_tensor_view view;
    unsigned long long offset;
    uint64_t *file_strides, *lengths;
    int64_t *strides;
    PyObject *tensor, *tuple;
    const uint32_t wanted = DCP_TENSOR_CPU | DCP_TENSOR_STRIDED | DCP_TENSOR_HAS_MEMORY;

    if (!PyTuple_Check(item) ||
        !PyArg_ParseTuple(item,
                          "IKOO!;pieces are (file, offset, tensor, "
                          "file strides)",
                          &piece->file, &offset, &tensor, &PyTuple_Type, &tuple)) {
        return -1;
    }
    if (state->bridge->tensor_view(tensor, &view) == DCP_NOT_A_TENSOR ||
        (view.flags & wanted) != wanted || (view.flags & (DCP_TENSOR_CONJ | DCP_TENSOR_NEG)) ||
        view.ndim > DCP_MAX_DIMS || PyTuple_GET_SIZE(tuple) != (Py_ssize_t)view.ndim) {
        PyErr_Format(PyExc_ValueError,
                     "%.200s: an export writes plain memory of the CPU, of at most %d dims, with a "
                     "stride for each",
                     Py_TYPE(tensor)->tp_name, DCP_MAX_DIMS);
        return -1;
    }
    lengths = export_job_take(job, view.ndim, sizeof *lengths);
    strides = export_job_take(job, view.ndim, sizeof *strides);
    if (lengths == NULL || strides == NULL || numbers_from(job, tuple, &file_strides) != 0) {
        return -1;
    }
    for (uint32_t d = 0; d < view.ndim; d++) {
        lengths[d] = (uint64_t)view.sizes[d];
        strides[d] = view.strides[d] * (int64_t)view.item_bytes;
    }
    piece->data = view.data;
    piece->lengths = lengths;
    piece->strides_bytes = strides;
    piece->file_strides_bytes = (const int64_t *)file_strides;
    piece->offset_bytes = offset;
    piece->ndim = view.ndim;
    piece->item_bytes = view.item_bytes;
    return 0;
}

int
export_job_pieces(struct export_job *job, const struct native_state *state, PyObject *object)
{
    PyObject *tuple;
    Py_ssize_t count;

    job->pieces = take_array(job, object, sizeof *job->pieces, &tuple, &count);
    if (job->pieces == NULL) {
        return -1;
    }
    job->pieces_count = (uint64_t)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (piece_from(job, state, PyTuple_GET_ITEM(tuple, i), &job->pieces[i]) != 0) {
            if (!PyErr_Occurred()) {
                PyErr_SetString(PyExc_TypeError, "pieces are tuples");
            }
            return -1;
        }
    }
    return 0;
}

static int
chunk_from(struct export_job *job, PyObject *item, uint32_t ndim, struct dcp_export_chunk *chunk)
{
    unsigned long long offset;
    PyObject *box;
    uint64_t *numbers;

    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "IKO!;chunks are (source, offset, box)",
                                                  &chunk->source, &offset, &PyTuple_Type, &box)) {
        return -1;
    }
    if (PyTuple_GET_SIZE(box) != 2 * (Py_ssize_t)ndim) {
        PyErr_SetString(PyExc_ValueError, "a chunk's box has two numbers for each dim");
        return -1;
    }
    if (numbers_from(job, box, &numbers) != 0) {
        return -1;
    }
    chunk->box = numbers;
    chunk->offset_bytes = offset;
    return 0;
}

static int
tensor_from(struct export_job *job, PyObject *item, struct dcp_export_tensor *tensor)
{
    unsigned long long offset;
    PyObject *name, *sizes, *chunks;
    struct dcp_export_chunk *taken;
    uint64_t *numbers;

    if (!PyTuple_Check(item) ||
        !PyArg_ParseTuple(item,
                          "UIKIO!O!;tensors are (name, file, offset, item bytes, sizes, chunks)",
                          &name, &tensor->file, &offset, &tensor->item_bytes, &PyTuple_Type, &sizes,
                          &PyTuple_Type, &chunks)) {
        return -1;
    }
    tensor->name = PyUnicode_AsUTF8(name);
    tensor->offset_bytes = offset;
    tensor->ndim = (uint32_t)PyTuple_GET_SIZE(sizes);
    tensor->chunks_count = (uint64_t)PyTuple_GET_SIZE(chunks);
    taken = export_job_take(job, PyTuple_GET_SIZE(chunks), sizeof *taken);
    if (tensor->name == NULL || taken == NULL || numbers_from(job, sizes, &numbers) != 0) {
        return -1;
    }
    tensor->sizes = numbers;
    tensor->chunks = taken;
    for (uint64_t i = 0; i < tensor->chunks_count; i++) {
        if (chunk_from(job, PyTuple_GET_ITEM(chunks, (Py_ssize_t)i), tensor->ndim, &taken[i]) !=
            0) {
            return -1;
        }
    }
    return 0;
}

int
export_job_tensors(struct export_job *job, PyObject *object)
{
    PyObject *tuple;
    Py_ssize_t count;

    job->tensors = take_array(job, object, sizeof *job->tensors, &tuple, &count);
    if (job->tensors == NULL) {
        return -1;
    }
    job->tensors_count = (uint64_t)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (tensor_from(job, PyTuple_GET_ITEM(tuple, i), &job->tensors[i]) != 0) {
            if (!PyErr_Occurred()) {
                PyErr_SetString(PyExc_TypeError, "tensors and their chunks are tuples");
            }
            return -1;
        }
    }
    return 0;
}

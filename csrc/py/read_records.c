/*
 * read_records.c: records of a checkpoint by where they lie, read into given memory or handed over.
 *
 * The items come from a plan that somebody else made.  Each becomes a tensor of one chunk, or an
 * object, of a checkpoint of nothing but these, so that the reader has one kind of plan; and each
 * is checked as what a file's metadata says is.  Where a record holds another tensor than the
 * checkpoint's metadata says, the record counts: it is handed over (dcp_read_plan.records_decide).
 *
 * The job lies in a capsule, which native_run keeps alive for a thread that has to be left alone;
 * it owns everything that it reads from or into.
 *
 * Threads: what is handed over is taken on the reading thread, under the GIL, one at a time.
 */
#include "read_records.h"

#include "errors.h"
#include "load_targets.h"
#include "module.h"
#include "native_run.h"
#include "read_quant.h"

enum {
    FIELD_FQN,
    FIELD_FILE,
    FIELD_OFFSET,
    FIELD_LENGTH,
    FIELD_TRANSFORMED,
    FIELD_DTYPE,
    FIELD_SIZES,
    FIELD_BOX_OFFSETS,
    FIELD_BOX_LENGTHS,
    FIELD_TENSOR,
    FIELDS_COUNT,
    FIELD_QUANT = FIELDS_COUNT /* of items that have one more */
};

struct records_job {
    struct dcp_metadata md; /* of nothing but the items */
    struct dcp_read_plan plan;
    struct dcp_quant *quants; /* owned, by target; NULL: there are none.  Kind 0: not quantised */
    struct dcp_bump strides;
    struct dcp_engine_options options;
    struct dcp_read_stats stats;
    atomic_int cancel;
    PyObject *path;  /* bytes */
    PyObject *items; /* a tuple of tuples; holds the tensors that are filled */
    PyObject *take;
    PyObject *error; /* what `take` raised, or NULL */
};

static void
job_free(PyObject *capsule)
{
    struct records_job *job = PyCapsule_GetPointer(capsule, NULL);

    dcp_read_plan_clean_up(&job->plan);
    dcp_metadata_clean_up(&job->md);
    dcp_bump_clean_up(&job->strides);
    dcp_free(job->quants);
    Py_XDECREF(job->path);
    Py_XDECREF(job->items);
    Py_XDECREF(job->take);
    Py_XDECREF(job->error);
    PyMem_Free(job);
}

/* ---- metadata of the items ---- */

/* Text and numbers grow in buffers, which the metadata then owns. */
struct md_builder {
    struct dcp_metadata *md;
    struct dcp_buf strings, dims;
};

static uint64_t
dims_count(const struct md_builder *b)
{
    return b->dims.len / sizeof(uint64_t);
}

static void
put_numbers(struct md_builder *b, const uint64_t *numbers, uint32_t count)
{
    dcp_buf_put(&b->dims, numbers, count * sizeof *numbers);
}

/* Appends a str; -1 with an exception. */
static int
put_text(struct md_builder *b, PyObject *text, uint64_t *ret_at, uint32_t *ret_len)
{
    Py_ssize_t len = 0;
    const char *bytes = PyUnicode_Check(text) ? PyUnicode_AsUTF8AndSize(text, &len) : NULL;

    if (bytes == NULL || len > INT32_MAX) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "names of items and files must be str");
        }
        return -1;
    }
    *ret_at = b->strings.len;
    *ret_len = (uint32_t)len;
    dcp_buf_put(&b->strings, bytes, (size_t)len);
    return 0;
}

static bool
get_number(PyObject *item, int field, uint64_t *ret)
{
    *ret = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(item, field));
    return *ret != UINT64_MAX || !PyErr_Occurred();
}

/* Sizes of the saved chunk, which is all of its tensor here. */
static int
put_shape(struct md_builder *b, const struct native_state *state, PyObject *item,
          struct dcp_md_entry *entry, struct dcp_md_chunk *chunk)
{
    static const uint64_t zeros[DCP_MAX_DIMS];
    uint64_t sizes[DCP_MAX_DIMS];
    uint32_t ndim;

    if (native_numbers_from(PyTuple_GET_ITEM(item, FIELD_SIZES), sizes, &ndim) != 0) {
        return -1;
    }
    entry->kind = DCP_ITEM_TENSOR;
    entry->dtype = (uint8_t)native_dtype_of(state, PyTuple_GET_ITEM(item, FIELD_DTYPE));
    entry->ndim = (uint8_t)ndim;
    entry->size = dims_count(b);
    put_numbers(b, sizes, ndim);
    chunk->dims = dims_count(b);
    put_numbers(b, zeros, ndim);
    put_numbers(b, sizes, ndim);
    return 0;
}

static int
put_item(struct md_builder *b, const struct native_state *state, PyObject *item)
{
    struct dcp_metadata *md = b->md;
    struct dcp_md_entry *entry = &md->entries[md->entries_count];
    struct dcp_md_chunk *chunk = &md->chunks[md->chunks_count];
    uint64_t file;

    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) < FIELDS_COUNT ||
        PyTuple_GET_SIZE(item) > FIELD_QUANT + 1) {
        PyErr_Format(PyExc_TypeError, "an item to read is a tuple of %d, or of one more",
                     (int)FIELDS_COUNT);
        return -1;
    }
    *entry = (struct dcp_md_entry){
        .kind = DCP_ITEM_BYTES, .first_chunk = md->chunks_count, .chunks_count = 1};
    *chunk = (struct dcp_md_chunk){
        .transforms = PyTuple_GET_ITEM(item, FIELD_TRANSFORMED) == Py_True ? 1 : 0};
    if (put_text(b, PyTuple_GET_ITEM(item, FIELD_FQN), &entry->name, &entry->name_len) != 0 ||
        !get_number(item, FIELD_FILE, &file) ||
        !get_number(item, FIELD_OFFSET, &chunk->offset_bytes) ||
        !get_number(item, FIELD_LENGTH, &chunk->length_bytes)) {
        return -1;
    }
    if (file >= md->files_count) {
        PyErr_SetString(PyExc_IndexError, "an item to read lies in no file of the list");
        return -1;
    }
    chunk->file = (uint32_t)file;
    if (PyTuple_GET_ITEM(item, FIELD_TENSOR) != Py_None &&
        put_shape(b, state, item, entry, chunk) != 0) {
        return -1;
    }
    md->entries_count++;
    md->chunks_count++;
    return 0;
}

/* Ids of the saves whose data files belong to the checkpoint, its own first, 16 bytes each; none:
 * the files need not be ours. */
static int
take_saves(struct dcp_metadata *md, const char *saves, Py_ssize_t len)
{
    size_t count = (size_t)len / sizeof md->save_id;

    if (count == 0) {
        return 0;
    }
    md->is_native = true;
    memcpy(&md->save_id, saves, sizeof md->save_id);
    md->accepted = dcp_malloc_array(count, sizeof *md->accepted);
    if (md->accepted == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    md->accepted_count = (uint32_t)count - 1;
    memcpy(md->accepted, saves + sizeof md->save_id, (count - 1) * sizeof *md->accepted);
    return 0;
}

static int
describe(struct records_job *job, const struct native_state *state, PyObject *files)
{
    struct md_builder b = {.md = &job->md};
    Py_ssize_t items_count = PyTuple_GET_SIZE(job->items), files_count = PyTuple_GET_SIZE(files);
    int rc = 0;

    job->md.owned = true;
    job->md.entries = dcp_malloc_array((size_t)items_count + 1, sizeof *job->md.entries);
    job->md.chunks = dcp_malloc_array((size_t)items_count + 1, sizeof *job->md.chunks);
    job->md.files = dcp_malloc_array((size_t)files_count + 1, sizeof *job->md.files);
    if (job->md.entries == NULL || job->md.chunks == NULL || job->md.files == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; rc == 0 && i < files_count; i++) {
        struct dcp_md_file *file = &job->md.files[job->md.files_count++];

        *file = (struct dcp_md_file){0};
        rc = put_text(&b, PyTuple_GET_ITEM(files, i), &file->name, &file->name_len);
    }
    for (Py_ssize_t i = 0; rc == 0 && i < items_count; i++) {
        rc = put_item(&b, state, PyTuple_GET_ITEM(job->items, i));
    }
    if (rc == 0 && (b.strings.failed || b.dims.failed)) {
        PyErr_NoMemory();
        rc = -1;
    }
    job->md.strings = (char *)b.strings.data;
    job->md.strings_len = b.strings.len;
    job->md.dims = (uint64_t *)(void *)b.dims.data;
    job->md.dims_count = dims_count(&b);
    return rc;
}

/* ---- targets ---- */

/* The box must be as large as the tensor that is to hold it. */
static bool
has_sizes(const struct dcp_tensor_view *view, const uint64_t *sizes, uint32_t ndim)
{
    bool equal = view->ndim == ndim;

    for (uint32_t d = 0; equal && d < ndim; d++) {
        equal = (uint64_t)view->sizes[d] == sizes[d];
    }
    return equal;
}

/* A target whose values are made of quantised elements; its box was added with no memory. */
static int
add_quant(struct records_job *job, const struct module_state *state, PyObject *item,
          uint64_t target)
{
    struct dcp_target *added = &job->plan.targets[target];
    const struct dcp_md_entry *entry = &job->md.entries[added->entry];
    const uint64_t *lengths = job->plan.dims + added->dims + entry->ndim;

    if (job->quants == NULL) {
        job->quants = dcp_calloc((size_t)job->md.entries_count, sizeof *job->quants);
    }
    if (job->quants == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (!job->md.is_raw || dcp_dtype_bytes(entry->dtype) != 1) {
        PyErr_SetString(PyExc_ValueError, "quantised elements are raw bytes");
        return -1;
    }
    added->kind = DCP_TARGET_OVERLAPS;
    return read_quant_from(&state->native, PyTuple_GET_ITEM(item, FIELD_QUANT),
                           PyTuple_GET_ITEM(item, FIELD_TENSOR), entry->ndim, lengths,
                           &job->quants[target]);
}

static void
take_piece(void *ctx, const struct dcp_piece *piece)
{
    const struct records_job *job = ctx;

    dcp_dequantise_piece(&job->quants[piece->item->target], piece);
}

static int
add_target(struct records_job *job, const struct module_state *state, uint64_t i)
{
    PyObject *item = PyTuple_GET_ITEM(job->items, (Py_ssize_t)i);
    PyObject *tensor = PyTuple_GET_ITEM(item, FIELD_TENSOR);
    const struct dcp_md_entry *entry = &job->md.entries[i];
    uint64_t offsets[DCP_MAX_DIMS], lengths[DCP_MAX_DIMS], target;
    uint32_t offsets_count, lengths_count;
    const int64_t *strides = NULL;
    struct dcp_tensor_view view = {0};
    uint8_t *data = NULL;
    bool quantised = PyTuple_GET_SIZE(item) > FIELD_QUANT;
    struct dcp_error err;

    dcp_error_clear(&err);
    if (tensor != Py_None) {
        enum dcp_tensor_class tensor_class =
            (enum dcp_tensor_class)state->native.bridge->tensor_view(tensor, &view);

        if (native_numbers_from(PyTuple_GET_ITEM(item, FIELD_BOX_OFFSETS), offsets,
                                &offsets_count) != 0 ||
            native_numbers_from(PyTuple_GET_ITEM(item, FIELD_BOX_LENGTHS), lengths,
                                &lengths_count) != 0) {
            return -1;
        }
        if (offsets_count != entry->ndim || lengths_count != entry->ndim ||
            (!quantised && (!load_is_memory(tensor_class, &view, entry->dtype) ||
                            !has_sizes(&view, lengths, entry->ndim) ||
                            (data = state->native.bridge->tensor_mutable_data(tensor)) == NULL))) {
            PyErr_Format(PyExc_ValueError, "%R is no memory for the item to read",
                         PyTuple_GET_ITEM(item, FIELD_FQN));
            return -1;
        }
        if (!quantised && load_strides(&job->strides, &view, view.item_bytes, &strides) != 0) {
            return -1;
        }
    }
    if (dcp_read_plan_add(&job->plan, i, data, strides, offsets, lengths, &target, &err) != 0) {
        native_set_error(state->error_class, &err);
        return -1;
    }
    if (quantised) {
        return add_quant(job, state, item, target);
    }
    if (tensor != Py_None && view.dtype != entry->dtype) {
        job->plan.targets[target].dtype = (uint8_t)view.dtype;
    }
    return 0;
}

static int
plan_reads(struct records_job *job, const struct module_state *state)
{
    struct dcp_error err;
    int rc = 0;

    job->plan.md = &job->md;
    job->plan.records_decide = true;
    job->plan.on_piece = take_piece;
    job->plan.on_piece_ctx = job;
    for (uint64_t i = 0; rc == 0 && i < job->md.entries_count; i++) {
        rc = add_target(job, state, i);
    }
    dcp_error_clear(&err);
    if (rc == 0 && dcp_read_plan_build(&job->plan, true, NULL, &err) != 0) {
        native_set_error(state->error_class, &err);
        rc = -1;
    }
    return rc;
}

/* ---- reading ---- */

static int
take_record(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
            const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    struct records_job *job = ctx;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *record = PyBytes_FromStringAndSize((const char *)bytes, (Py_ssize_t)len);
    PyObject *result = NULL;

    if (record != NULL) {
        result = PyObject_CallFunction(
            job->take, "KO", (unsigned long long)plan->targets[item->target].entry, record);
    }
    if (result == NULL) {
        native_keep_pending(&job->error);
    }
    Py_XDECREF(result);
    Py_XDECREF(record);
    PyGILState_Release(gil);
    return result != NULL ? 0
                          : dcp_error_set(err, DCP_E_CANCELLED, 0, NULL,
                                          "Python could not take a record of %zu bytes", len);
}

static int
job_run(void *self, struct dcp_error *err)
{
    struct records_job *job = self;

    return dcp_reader_run_path(dcp_io_posix(), PyBytes_AS_STRING(job->path), &job->plan,
                               &job->options, take_record, job, &job->stats, err);
}

static PyObject *
stats_of(const struct dcp_read_stats *stats)
{
    return Py_BuildValue("{sK sK sK sK sK sK sK sK sK}", "read_bytes", stats->read_bytes,
                         "hot_bytes", stats->hot_bytes, "wanted_bytes", stats->wanted_bytes,
                         "verified_bytes", stats->verified_bytes, "unverified_bytes",
                         stats->unverified_bytes, "straight_bytes", stats->straight_bytes,
                         "requests_count", stats->requests_count, "files_count", stats->files_count,
                         "wall_ns", stats->wall_ns);
}

PyDoc_STRVAR(read_records_doc,
             "read_records(path, files, items, take, /, *, saves=b'', verify=1, direct=0, "
             "raw=False)\n--\n\n"
             "Read records of data files below `path`; the counts of the reader.\n\n"
             "An item is (name, index in files, offset, length, transformed, dtype, sizes, box "
             "offsets, box lengths, tensor): the box of the saved tensor goes into the tensor's "
             "memory, which tensor_memory knows.  With None for the tensor, and where the record "
             "holds another one than the item says or one that only torch can read, "
             "take(index, bytes) gets the record, on the reading thread.  `saves`: save_ids of "
             "the checkpoint's metadata.  `raw`: payloads alone lie in the files, and an item may "
             "have one field more, by which its values are made (read_quant.c).");

static PyObject *
module_read_records(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"", "", "", "", "saves", "verify", "direct", "raw", NULL};
    struct module_state *state = PyModule_GetState(module);
    struct records_job *job = PyMem_Calloc(1, sizeof *job);
    PyObject *capsule = job == NULL ? NULL : PyCapsule_New(job, NULL, job_free);
    PyObject *files, *items, *take, *result = NULL;
    const char *saves = "";
    Py_ssize_t saves_len = 0;
    int verify = 1, direct = DCP_DIRECT_AUTO, raw = 0;

    if (capsule == NULL) {
        PyMem_Free(job);
        return job == NULL ? PyErr_NoMemory() : NULL;
    }
    if (native_state_load(module) != 0 ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O&O!O!O|$y#iip:read_records", names,
                                     PyUnicode_FSConverter, &job->path, &PyTuple_Type, &files,
                                     &PyTuple_Type, &items, &take, &saves, &saves_len, &verify,
                                     &direct, &raw)) {
        goto done;
    }
    job->items = Py_NewRef(items);
    job->md.is_raw = raw != 0;
    job->take = Py_NewRef(take);
    job->options = (struct dcp_engine_options){.direct = (enum dcp_direct)direct,
                                               .verify = verify != 0,
                                               .verify_all = verify == 2,
                                               .cancel = &job->cancel};
    if (take_saves(&job->md, saves, saves_len) != 0 || describe(job, &state->native, files) != 0 ||
        plan_reads(job, state) != 0) {
        goto done;
    }
    if (native_run_or_raise(capsule, job_run, job, &job->cancel, &job->error, state->error_class) ==
        0) {
        result = stats_of(&job->stats);
    }
done:
    Py_DECREF(capsule);
    return result;
}

PyDoc_STRVAR(tensor_memory_doc,
             "tensor_memory(tensor, dtype, /)\n--\n\n"
             "(start, end, row major) of the memory of a tensor, which the reader can fill with "
             "elements that were saved as `dtype`; None when it can not: another device, another "
             "class, memory that overlaps itself, a dtype that it does not convert to.");

static PyObject *
module_tensor_memory(PyObject *module, PyObject *args)
{
    struct module_state *state = PyModule_GetState(module);
    enum dcp_tensor_class tensor_class;
    struct dcp_tensor_view view;
    PyObject *tensor, *dtype;
    uint64_t last = 0;
    uintptr_t start;
    int saved_dtype;

    if (native_state_load(module) != 0 ||
        !PyArg_ParseTuple(args, "OO:tensor_memory", &tensor, &dtype)) {
        return NULL;
    }
    tensor_class = (enum dcp_tensor_class)state->native.bridge->tensor_view(tensor, &view);
    saved_dtype = native_dtype_of(&state->native, dtype);
    if (saved_dtype == DCP_DTYPE_NONE || !load_is_memory(tensor_class, &view, saved_dtype)) {
        Py_RETURN_NONE;
    }
    start = (uintptr_t)state->native.bridge->tensor_mutable_data(tensor);
    if (start == 0) {
        Py_RETURN_NONE;
    }
    for (uint32_t d = 0; d < view.ndim; d++) {
        last += (uint64_t)Py_MAX(view.sizes[d] - 1, 0) * (uint64_t)view.strides[d];
    }
    return Py_BuildValue("(KKO)", (unsigned long long)start,
                         (unsigned long long)(start + (last + 1) * view.item_bytes),
                         view.flags & DCP_TENSOR_CONTIGUOUS ? Py_True : Py_False);
}

PyDoc_STRVAR(save_ids_doc,
             "save_ids(image, /)\n--\n\n"
             "Ids of the saves whose data files belong to a `.metadata` image that dcp_native "
             "wrote, 16 bytes each, its own first; empty for one of others.");

static PyObject *
module_save_ids(PyObject *module, PyObject *image)
{
    struct dcp_metadata md = {0};
    PyObject *result;
    char *bytes;
    Py_ssize_t len;

    (void)module;
    if (PyBytes_AsStringAndSize(image, &bytes, &len) != 0) {
        return NULL;
    }
    if (dcp_metadata_read_ids((const uint8_t *)bytes, (size_t)len, &md, NULL) != 0) {
        return PyBytes_FromStringAndSize(NULL, 0);
    }
    result = PyBytes_FromStringAndSize(
        NULL, (Py_ssize_t)((1 + (size_t)md.accepted_count) * sizeof md.save_id));
    if (result != NULL) {
        memcpy(PyBytes_AS_STRING(result), &md.save_id, sizeof md.save_id);
        if (md.accepted_count > 0) {
            memcpy(PyBytes_AS_STRING(result) + sizeof md.save_id, md.accepted,
                   md.accepted_count * sizeof *md.accepted);
        }
    }
    dcp_metadata_clean_up(&md);
    return result;
}

PyMethodDef read_records_methods[] = {
    {"read_records", (PyCFunction)(void (*)(void))module_read_records, METH_VARARGS | METH_KEYWORDS,
     read_records_doc},
    {"tensor_memory", module_tensor_memory, METH_VARARGS, tensor_memory_doc},
    {"save_ids", module_save_ids, METH_O, save_ids_doc},
    {NULL, NULL, 0, NULL},
};

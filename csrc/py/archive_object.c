/*
 * archive_object.c: one torch.save file written from a checkpoint, as a function: off the GIL,
 * interruptible.
 *
 * The job lies in a capsule, which native_run keeps alive for a thread that has to be left alone;
 * it owns all that the core borrows.  The core asks for some entries while it writes: then the
 * caller's `fetch` runs on its thread, and what it raises ends the write and is raised again here.
 */
#include "archive_object.h"

#include "dcp_archive.h"
#include "errors.h"
#include "module.h"
#include "native_run.h"

struct archive_job {
    struct dcp_archive_params params;
    struct dcp_engine_options options;
    struct dcp_archive_stats stats;
    atomic_int cancel;
    PyObject *source, *target; /* bytes */
    PyObject *image, *name, *folder, *fetch;
    PyObject *entries; /* tuple of tuples */
    struct dcp_archive_entry *places;
    Py_buffer *views; /* of entries in memory; obj is NULL for all others */
    Py_buffer fetched;
    Py_buffer progress; /* of a 64-bit counter that others look at meanwhile; or nothing */
    PyObject *error;    /* what `fetch` raised */
};

static void
job_free(PyObject *capsule)
{
    struct archive_job *job = PyCapsule_GetPointer(capsule, NULL);

    for (uint64_t i = 0; job->views != NULL && i < job->params.entries_count; i++) {
        PyBuffer_Release(&job->views[i]);
    }
    PyBuffer_Release(&job->fetched);
    PyBuffer_Release(&job->progress);
    PyMem_Free(job->views);
    PyMem_Free(job->places);
    Py_XDECREF(job->source);
    Py_XDECREF(job->target);
    Py_XDECREF(job->image);
    Py_XDECREF(job->name);
    Py_XDECREF(job->folder);
    Py_XDECREF(job->fetch);
    Py_XDECREF(job->entries);
    Py_XDECREF(job->error);
    PyMem_Free(job);
}

static int
job_run(void *self, struct dcp_error *err)
{
    struct archive_job *job = self;

    return dcp_archive_write(&job->params, &job->stats, err);
}

/* The core's question for an entry: fetch(index) gives its bytes. */
static int
job_fetch(void *ctx, uint64_t entry, const uint8_t **ret_data, struct dcp_error *err)
{
    struct archive_job *job = ctx;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *bytes;
    bool given;

    PyBuffer_Release(&job->fetched);
    bytes = PyObject_CallFunction(job->fetch, "K", (unsigned long long)entry);
    given = bytes != NULL && PyObject_GetBuffer(bytes, &job->fetched, PyBUF_SIMPLE) == 0;
    Py_XDECREF(bytes);
    if (given && (uint64_t)job->fetched.len != job->places[entry].bytes) {
        PyErr_Format(PyExc_ValueError, "entry %llu was to have %llu bytes, it has %zd",
                     (unsigned long long)entry, (unsigned long long)job->places[entry].bytes,
                     job->fetched.len);
        given = false;
    }
    if (given) {
        *ret_data = job->fetched.buf;
    } else {
        native_keep_pending(&job->error);
    }
    PyGILState_Release(gil);
    return given ? 0
                 : dcp_error_set(err, DCP_E_CANCELLED, 0, NULL,
                                 "the bytes of an entry could not "
                                 "be had");
}

/* (name, bytes, data or None, fqn or None) */
static int
take_entry(struct archive_job *job, Py_ssize_t i)
{
    struct dcp_archive_entry *entry = &job->places[i];
    PyObject *item = PyTuple_GET_ITEM(job->entries, i), *name, *data;
    unsigned long long bytes;
    const char *fqn;
    Py_ssize_t fqn_len;

    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "entries must be tuples");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "SKOz#", &name, &bytes, &data, &fqn, &fqn_len)) {
        return -1;
    }
    entry->name = native_span(name);
    entry->bytes = bytes;
    if (fqn != NULL) {
        entry->fqn = (struct dcp_span){(const uint8_t *)fqn, (size_t)fqn_len};
    }
    if (data == Py_None) {
        return 0;
    }
    if (PyObject_GetBuffer(data, &job->views[i], PyBUF_SIMPLE) != 0) {
        return -1;
    }
    if ((unsigned long long)job->views[i].len != bytes) {
        PyErr_Format(PyExc_ValueError, "an entry of %llu bytes was given %zd", bytes,
                     job->views[i].len);
        return -1;
    }
    entry->data = job->views[i].buf;
    return 0;
}

static int
take_entries(struct archive_job *job)
{
    size_t count = (size_t)PyTuple_GET_SIZE(job->entries);

    job->places = PyMem_Calloc(count + 1, sizeof *job->places);
    job->views = PyMem_Calloc(count + 1, sizeof *job->views);
    if (job->places == NULL || job->views == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    job->params.entries_count = count;
    for (size_t i = 0; i < count; i++) {
        if (take_entry(job, (Py_ssize_t)i) != 0) {
            return -1;
        }
    }
    return 0;
}

static void
fill_params(struct archive_job *job)
{
    struct dcp_archive_params *params = &job->params;

    params->io = dcp_io_posix();
    params->source_path = PyBytes_AS_STRING(job->source);
    params->image = native_span(job->image);
    params->target_path = PyBytes_AS_STRING(job->target);
    params->target_name = PyBytes_AS_STRING(job->name);
    params->folder = native_span(job->folder);
    params->entries = job->places;
    params->options = &job->options;
    params->fetch = job_fetch;
    params->fetch_ctx = job;
    job->options.sync = true;
    job->options.cancel = &job->cancel;
    job->options.progress_bytes = (_Atomic uint64_t *)job->progress.buf; /* NULL: none */
}

static PyObject *
stats_of(const struct dcp_archive_stats *stats)
{
    return Py_BuildValue("{sK sO sK sK sK}", "file_bytes",
                         (unsigned long long)stats->write.file_bytes, "direct",
                         stats->write.direct_files_count > 0 ? Py_True : Py_False, "read_bytes",
                         (unsigned long long)stats->read.read_bytes, "fetched_bytes",
                         (unsigned long long)stats->fetched_bytes, "wall_ns",
                         (unsigned long long)stats->write.wall_ns);
}

PyDoc_STRVAR(
    write_archive_doc,
    "write_archive(source, image, target, name, folder, entries, fetch, *, align=64, "
    "verify=True, direct=0, io_uring=0, progress=None)\n--\n\n"
    "Write a torch.save file from a checkpoint (dcp_archive.h).  `progress`: an array('Q') of one "
    "number, to which the bytes of entries are added as they are written.");

static PyObject *
module_write_archive(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"source",   "image",    "target", "name",   "folder",
                            "entries",  "fetch",    "align",  "verify", "direct",
                            "io_uring", "progress", NULL};
    struct module_state *state = PyModule_GetState(module);
    PyObject *image, *name, *folder, *entries, *fetch, *progress = Py_None, *result = NULL;
    int verify = 1, direct = DCP_DIRECT_AUTO, queue = DCP_QUEUE_AUTO;
    unsigned long long align = 64;
    struct archive_job *job = PyMem_Calloc(1, sizeof *job);
    PyObject *capsule = job == NULL ? NULL : PyCapsule_New(job, NULL, job_free);

    if (capsule == NULL) {
        PyMem_Free(job);
        return job == NULL ? PyErr_NoMemory() : NULL;
    }
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O&SO&SSO!O|$KpiiO:write_archive", names, PyUnicode_FSConverter,
            &job->source, &image, PyUnicode_FSConverter, &job->target, &name, &folder,
            &PyTuple_Type, &entries, &fetch, &align, &verify, &direct, &queue, &progress)) {
        Py_DECREF(capsule);
        return NULL;
    }
    job->image = Py_NewRef(image);
    job->name = Py_NewRef(name);
    job->folder = Py_NewRef(folder);
    job->entries = Py_NewRef(entries);
    job->fetch = Py_NewRef(fetch);
    job->params.align_bytes = align;
    job->options.verify = verify != 0;
    job->options.direct = (enum dcp_direct)direct;
    job->options.tuning.queue = (enum dcp_queue_use)queue;
    if (take_entries(job) != 0 ||
        (progress != Py_None &&
         native_take_number(progress, sizeof(uint64_t), "progress", &job->progress) != 0)) {
        Py_DECREF(capsule);
        return NULL;
    }
    fill_params(job);
    if (native_run_or_raise(capsule, job_run, job, &job->cancel, &job->error, state->error_class) ==
        0) {
        result = stats_of(&job->stats);
    }
    Py_DECREF(capsule);
    return result;
}

PyMethodDef archive_methods[] = {
    {"write_archive", (PyCFunction)(void (*)(void))module_write_archive,
     METH_VARARGS | METH_KEYWORDS, write_archive_doc},
    {NULL, NULL, 0, NULL},
};

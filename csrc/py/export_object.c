/*
 * export_object.c: exports (dcp_export.h) as functions of the module; writing and joining return a
 * dict of counts.
 *
 * A job lies in a capsule, which native_run keeps alive for a thread that has to be left alone; it
 * holds the caller's arguments, and with them every name and every tensor that the core borrows.
 */
#include "export_object.h"

#include "errors.h"
#include "export_job.h"
#include "native_run.h"

static int
run_create(void *self, struct dcp_error *err)
{
    struct export_job *job = self;

    return dcp_export_create(dcp_io_posix(), job->path, job->files, job->files_count, err);
}

static int
run_sweep(void *self, struct dcp_error *err)
{
    struct export_job *job = self;

    return dcp_export_sweep(dcp_io_posix(), job->path, err);
}

static int
run_write(void *self, struct dcp_error *err)
{
    struct export_job *job = self;

    return dcp_export_write(dcp_io_posix(), job->path, job->files, job->files_count, job->pieces,
                            job->pieces_count, &job->options, &job->stats, err);
}

static int
run_join(void *self, struct dcp_error *err)
{
    struct export_job *job = self;

    return dcp_export_join(dcp_io_posix(), &job->sources, job->path, job->files, job->files_count,
                           job->tensors, job->tensors_count, &job->options, &job->stats, err);
}

static int
run_publish(void *self, struct dcp_error *err)
{
    struct export_job *job = self;

    return dcp_export_publish(dcp_io_posix(), job->path, &job->publication, err);
}

/* Runs and gives the job up.  New reference: the counts. */
static PyObject *
finish(PyObject *module, PyObject *capsule, struct export_job *job, native_fn fn)
{
    struct module_state *state = PyModule_GetState(module);
    PyObject *result = NULL;

    if (native_run_or_raise(capsule, fn, job, &job->cancel, NULL, state->error_class) == 0) {
        const struct dcp_export_stats *stats = &job->stats;
        result = Py_BuildValue("{sK sK sK sK sK sK sK sK}", "payload_bytes", stats->payload_bytes,
                               "direct_bytes", stats->direct_bytes, "requests",
                               stats->requests_count, "read_bytes", stats->read_bytes, "wall_ns",
                               stats->wall_ns, "wait_ns", stats->wait_ns, "sync_ns", stats->sync_ns,
                               "memory_bytes", stats->memory_bytes);
    }
    Py_DECREF(capsule);
    return result;
}

static PyObject *
give_up(PyObject *capsule)
{
    Py_DECREF(capsule);
    return NULL;
}

PyDoc_STRVAR(sweep_doc, "export_sweep(path, /)\n--\n\n"
                        "Remove what exports that were given up or killed left in the directory.");

static PyObject *
module_sweep(PyObject *module, PyObject *path)
{
    struct export_job *job;
    PyObject *capsule = export_job_new(&job);

    if (capsule == NULL || (job->path = export_job_path(job, path)) == NULL) {
        Py_XDECREF(capsule);
        return NULL;
    }
    return finish(module, capsule, job, run_sweep);
}

PyDoc_STRVAR(create_doc, "export_create(path, files, /)\n--\n\n"
                         "Make the directory, and in it the files (name, length, head) of an "
                         "export, which many may then write to.");

static PyObject *
module_create(PyObject *module, PyObject *args)
{
    struct export_job *job;
    PyObject *path, *files, *capsule = export_job_new(&job);

    if (capsule == NULL || !PyArg_ParseTuple(args, "OO:export_create", &path, &files)) {
        Py_XDECREF(capsule);
        return NULL;
    }
    job->path = export_job_path(job, path);
    if (job->path == NULL || export_job_files(job, files) != 0) {
        return give_up(capsule);
    }
    return finish(module, capsule, job, run_create);
}

static int
options_from(struct export_job *job, int sync, int direct, PyObject *progress)
{
    if (direct < DCP_DIRECT_AUTO || direct > DCP_DIRECT_ON) {
        PyErr_SetString(PyExc_ValueError, "direct is 0, 1 or 2");
        return -1;
    }
    if (progress != Py_None) {
        if (native_take_number(progress, sizeof(uint64_t), "progress", &job->progress) != 0) {
            return -1;
        }
        job->options.progress_bytes = (_Atomic uint64_t *)job->progress.buf;
    }
    job->options.sync = sync != 0;
    job->options.direct = (enum dcp_direct)direct;
    return 0;
}

PyDoc_STRVAR(
    write_doc,
    "export_write(path, files, pieces, /, *, sync=True, direct=0, nice=0, io_priority=0, "
    "limit_bytes_s=0, progress=None)\n--\n\n"
    "Write the pieces (file, offset, tensor, file strides; all in bytes) into the files "
    "(name, length) of an export. Returns counts.  `progress`: an array('Q') of one number, "
    "to which bytes are added as they are written.");

static PyObject *
module_write(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {
        "", "", "", "sync", "direct", "nice", "io_priority", "limit_bytes_s", "progress", NULL};
    struct module_state *state = PyModule_GetState(module);
    struct export_job *job;
    PyObject *path, *files, *pieces, *progress = Py_None, *capsule;
    unsigned int priority = 0;
    unsigned long long limit = 0;
    int sync = 1, direct = DCP_DIRECT_AUTO, nice = 0;

    if (native_state_load(module) != 0 || (capsule = export_job_new(&job)) == NULL) {
        return NULL;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|$piiIKO:export_write", names, &path, &files,
                                     &pieces, &sync, &direct, &nice, &priority, &limit,
                                     &progress) ||
        (job->path = export_job_path(job, path)) == NULL || export_job_files(job, files) != 0 ||
        export_job_pieces(job, &state->native, pieces) != 0 ||
        options_from(job, sync, direct, progress) != 0) {
        return give_up(capsule);
    }
    job->options.tuning.nice = nice;
    job->options.tuning.io_priority = priority;
    job->options.tuning.limit_bytes_s = limit;
    return finish(module, capsule, job, run_write);
}

PyDoc_STRVAR(join_doc,
             "export_join(source_path, sources, path, files, tensors, /, *, sync=True, direct=0, "
             "progress=None)\n"
             "--\n\n"
             "Fill the files of an export with tensors (name, file, offset, item bytes, sizes, "
             "chunks) whose chunks (source, offset, box) lie in other files. Returns counts.  "
             "`progress`: as export_write.");

static PyObject *
module_join(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"", "", "", "", "", "sync", "direct", "progress", NULL};
    struct export_job *job;
    PyObject *from, *sources, *path, *files, *tensors, *progress = Py_None;
    PyObject *capsule = export_job_new(&job);
    const char **names;
    int sync = 1, direct = DCP_DIRECT_AUTO;

    if (capsule == NULL) {
        return NULL;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO|$piO:export_join", keywords, &from,
                                     &sources, &path, &files, &tensors, &sync, &direct,
                                     &progress) ||
        (job->sources.dir_path = export_job_path(job, from)) == NULL ||
        export_job_names(job, sources, &names, &job->sources.count) != 0 ||
        (job->path = export_job_path(job, path)) == NULL || export_job_files(job, files) != 0 ||
        export_job_tensors(job, tensors) != 0 || options_from(job, sync, direct, progress) != 0) {
        return give_up(capsule);
    }
    job->sources.names = names;
    return finish(module, capsule, job, run_join);
}

PyDoc_STRVAR(publish_doc,
             "export_publish(path, names, new_names, pattern, /, *, index_name=None, "
             "index_tmp_name=None, index=b'', sync=True)\n--\n\n"
             "Give the files of an export their final names, after files of that pattern are "
             "removed; the index last (dcp_export.h says what is promised).");

static PyObject *
module_publish(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"",      "",     "",  "", "index_name", "index_tmp_name",
                               "index", "sync", NULL};
    struct export_job *job;
    PyObject *path, *from, *to, *index_name = Py_None, *index_tmp = Py_None, *index = NULL;
    PyObject *pattern, *capsule = export_job_new(&job);
    const char **from_names, **to_names;
    struct dcp_export_name *names;
    uint32_t count, to_count;
    int sync = 1;

    if (capsule == NULL) {
        return NULL;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$OOSp:export_publish", keywords, &path,
                                     &from, &to, &pattern, &index_name, &index_tmp, &index,
                                     &sync) ||
        (job->path = export_job_path(job, path)) == NULL ||
        export_job_names(job, from, &from_names, &count) != 0 ||
        export_job_names(job, to, &to_names, &to_count) != 0 ||
        (names = export_job_take(job, count, sizeof *names)) == NULL ||
        (job->publication.replaced_pattern = export_job_path(job, pattern)) == NULL) {
        return give_up(capsule);
    }
    if (count != to_count || (index_name == Py_None) != (index_tmp == Py_None)) {
        PyErr_SetString(PyExc_ValueError, "every file has one name and one new name");
        return give_up(capsule);
    }
    for (uint32_t i = 0; i < count; i++) {
        names[i] = (struct dcp_export_name){from_names[i], to_names[i]};
    }
    job->publication.names = names;
    job->publication.names_count = count;
    job->publication.sync = sync != 0;
    job->publication.cancel = &job->cancel;
    if (index != NULL) {
        if (PyList_Append(job->held, index) != 0) {
            return give_up(capsule);
        }
        job->publication.index = native_span(index);
    }
    if (index_name != Py_None &&
        ((job->publication.index_name = export_job_path(job, index_name)) == NULL ||
         (job->publication.index_tmp_name = export_job_path(job, index_tmp)) == NULL)) {
        return give_up(capsule);
    }
    return finish(module, capsule, job, run_publish);
}

PyDoc_STRVAR(discard_doc, "export_discard(path, names, /)\n--\n\n"
                          "Remove files of an export that is given up, as far as possible.");

static PyObject *
module_discard(PyObject *module, PyObject *args)
{
    struct export_job *job;
    PyObject *path, *list, *capsule = export_job_new(&job);
    const char **names;
    uint32_t count;

    (void)module;
    if (capsule == NULL || !PyArg_ParseTuple(args, "OO:export_discard", &path, &list) ||
        (job->path = export_job_path(job, path)) == NULL ||
        export_job_names(job, list, &names, &count) != 0) {
        Py_XDECREF(capsule);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS dcp_export_discard(dcp_io_posix(), job->path, names, count);
    Py_END_ALLOW_THREADS Py_DECREF(capsule);
    Py_RETURN_NONE;
}

PyMethodDef export_methods[] = {
    {"export_sweep", module_sweep, METH_O, sweep_doc},
    {"export_create", module_create, METH_VARARGS, create_doc},
    {"export_write", (PyCFunction)(void (*)(void))module_write, METH_VARARGS | METH_KEYWORDS,
     write_doc},
    {"export_join", (PyCFunction)(void (*)(void))module_join, METH_VARARGS | METH_KEYWORDS,
     join_doc},
    {"export_publish", (PyCFunction)(void (*)(void))module_publish, METH_VARARGS | METH_KEYWORDS,
     publish_doc},
    {"export_discard", module_discard, METH_VARARGS, discard_doc},
    {NULL, NULL, 0, NULL},
};

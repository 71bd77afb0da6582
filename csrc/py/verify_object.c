/*
 * verify_object.c: one check of a checkpoint as a function: off the GIL, interruptible, its result
 * a dict.
 *
 * The job lies in a capsule, which native_run keeps alive for a thread that has to be left alone;
 * it owns copies of everything the check borrows.
 */
#include "verify_object.h"

#include "dcp_verify.h"
#include "errors.h"
#include "module.h"
#include "native_run.h"

struct verify_job {
    struct dcp_verify_options options;
    struct dcp_verify_result result;
    atomic_int own_cancel;
    atomic_int *cancel;     /* `own_cancel`, or the caller's word, which stops several checks */
    PyObject *path;         /* bytes */
    PyObject *translations; /* a tuple of pairs of bytes */
    Py_buffer progress;     /* of a 64-bit counter that others look at meanwhile; or nothing */
    Py_buffer stop;         /* of the caller's word; or nothing */
};

static void
job_free(PyObject *capsule)
{
    struct verify_job *job = PyCapsule_GetPointer(capsule, NULL);

    dcp_verify_result_clean_up(&job->result);
    Py_XDECREF(job->path);
    Py_XDECREF(job->translations);
    PyBuffer_Release(&job->progress);
    PyBuffer_Release(&job->stop);
    PyMem_Free((void *)job->options.translations);
    PyMem_Free(job);
}

static int
job_run(void *self, struct dcp_error *err)
{
    struct verify_job *job = self;

    return dcp_verify_run(dcp_io_posix(), PyBytes_AS_STRING(job->path), &job->options, &job->result,
                          err);
}

/* File names and keys are UTF-8 as a rule; other bytes come through as surrogates. */
static PyObject *
text_of(const char *text)
{
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "surrogateescape");
}

static PyObject *
problem_of(const struct dcp_verify_problem *problem)
{
    PyObject *offset = problem->offset_bytes == UINT64_MAX
                           ? Py_NewRef(Py_None)
                           : PyLong_FromUnsignedLongLong(problem->offset_bytes);
    PyObject *tensor = text_of(problem->tensor), *file = text_of(problem->file);
    PyObject *what = text_of(problem->what);

    if (offset == NULL || tensor == NULL || file == NULL || what == NULL) {
        Py_XDECREF(offset);
        Py_XDECREF(tensor);
        Py_XDECREF(file);
        Py_XDECREF(what);
        return NULL;
    }
    return Py_BuildValue("(NNNNs)", tensor, file, offset, what, dcp_code_name(problem->code));
}

static PyObject *
problems_of(const struct dcp_verify_result *result)
{
    PyObject *list = PyList_New(0);

    for (uint32_t i = 0; list != NULL && i < result->problems_count; i++) {
        PyObject *problem = problem_of(&result->problems[i]);

        if (problem == NULL || PyList_Append(list, problem) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(problem);
    }
    return list;
}

static PyObject *
ranks_of(const struct dcp_verify_result *result)
{
    PyObject *tuple = PyTuple_New(result->ranks_count);

    for (uint32_t i = 0; tuple != NULL && i < result->ranks_count; i++) {
        PyObject *rank = PyLong_FromUnsignedLong(result->ranks[i]);

        if (rank == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, i, rank);
        }
    }
    return tuple;
}

/* 16 bytes in hex; None when they are zero. */
static PyObject *
id_of(const void *bytes)
{
    static const struct dcp_save_id none;
    const uint8_t *id = bytes;
    char text[2 * sizeof none.bytes + 1];

    if (memcmp(id, none.bytes, sizeof none.bytes) == 0) {
        Py_RETURN_NONE;
    }
    for (size_t i = 0; i < sizeof none.bytes; i++) {
        PyOS_snprintf(text + 2 * i, 3, "%02x", id[i]);
    }
    return PyUnicode_FromString(text);
}

static PyObject *
result_of(const struct dcp_verify_result *result)
{
    PyObject *problems = problems_of(result), *ranks = ranks_of(result);
    PyObject *save_id = id_of(result->save_id.bytes);
    PyObject *metadata_id = id_of(&result->metadata_id);

    if (problems == NULL || ranks == NULL || save_id == NULL || metadata_id == NULL) {
        Py_XDECREF(problems);
        Py_XDECREF(ranks);
        Py_XDECREF(save_id);
        Py_XDECREF(metadata_id);
        return NULL;
    }
    return Py_BuildValue(
        "{sN sK sO sN sN sN sK sK sK sK sK sK sK sK sK sK sK sK sK sI sK}", "problems", problems,
        "problems_found", result->problems_found, "native", result->is_native ? Py_True : Py_False,
        "ranks", ranks, "save_id", save_id, "metadata_id", metadata_id, "tensors",
        result->tensors_count, "objects", result->objects_count, "records", result->records_count,
        "partial_tensors", result->partial_tensors_count, "files", result->files_count,
        "file_bytes", result->file_bytes, "direct_files", result->direct_files_count, "read_bytes",
        result->read_bytes, "checked_bytes", result->checked_bytes, "unverified_bytes",
        result->unverified_bytes, "unverified_records", result->unverified_records_count, "claims",
        result->claims_count, "unreferenced_files", result->unreferenced_files_count, "replaced",
        result->replaced_count, "wall_ns", result->wall_ns);
}

/* Pairs of bytes, which the job keeps. */
static int
take_translations(struct verify_job *job, PyObject *pairs)
{
    Py_ssize_t count = PyTuple_GET_SIZE(pairs);
    struct dcp_verify_translation *taken = PyMem_Calloc((size_t)count + 1, sizeof *taken);

    if (taken == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    job->translations = Py_NewRef(pairs);
    job->options.translations = taken;
    job->options.translations_count = (size_t)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = PyTuple_GET_ITEM(pairs, i);
        if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 ||
            !PyBytes_Check(PyTuple_GET_ITEM(pair, 0)) ||
            !PyBytes_Check(PyTuple_GET_ITEM(pair, 1))) {
            PyErr_SetString(PyExc_TypeError, "translations must be pairs of bytes");
            return -1;
        }
        taken[i].original = native_span(PyTuple_GET_ITEM(pair, 0));
        taken[i].translated = native_span(PyTuple_GET_ITEM(pair, 1));
    }
    return 0;
}

/* Each None, or a number that others look at or change meanwhile. */
static int
take_numbers(struct verify_job *job, PyObject *progress, PyObject *cancel)
{
    if (progress != Py_None) {
        if (native_take_number(progress, sizeof(uint64_t), "progress", &job->progress) != 0) {
            return -1;
        }
        job->options.progress_bytes = (_Atomic uint64_t *)job->progress.buf;
    }
    job->cancel = &job->own_cancel;
    if (cancel != Py_None) {
        if (native_take_number(cancel, sizeof(int), "cancel", &job->stop) != 0) {
            return -1;
        }
        job->cancel = (atomic_int *)job->stop.buf;
    }
    job->options.cancel = job->cancel;
    return 0;
}

PyDoc_STRVAR(verify_doc,
             "verify_checkpoint(path, *, level=2, direct=0, problems_most=100, part=0, parts=0, "
             "translations=(), progress=None, cancel=None)\n--\n\n"
             "Check a checkpoint without loading it (dcp_verify.h).  `progress`: an array('Q') of "
             "one number, to which bytes are added as they are gone through.  `cancel`: an "
             "array('i') of one number, which stops this check, and others that have it, once it "
             "is not 0; an interrupt sets it.");

static PyObject *
module_verify(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"path",  "level",        "direct",   "problems_most", "part",
                            "parts", "translations", "progress", "cancel",        NULL};
    struct module_state *state = PyModule_GetState(module);
    PyObject *translations = NULL, *progress = Py_None, *cancel = Py_None, *result = NULL;
    int level = DCP_VERIFY_FULL, direct = DCP_DIRECT_AUTO;
    unsigned int most = DCP_VERIFY_PROBLEMS, part = 0, parts = 0;
    struct verify_job *job = PyMem_Calloc(1, sizeof *job);
    PyObject *capsule = job == NULL ? NULL : PyCapsule_New(job, NULL, job_free);

    if (capsule == NULL) {
        PyMem_Free(job);
        return job == NULL ? PyErr_NoMemory() : NULL;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|$iiIIIO!OO:verify_checkpoint", names,
                                     PyUnicode_FSConverter, &job->path, &level, &direct, &most,
                                     &part, &parts, &PyTuple_Type, &translations, &progress,
                                     &cancel) ||
        take_numbers(job, progress, cancel) != 0 ||
        (translations != NULL && take_translations(job, translations) != 0)) {
        Py_DECREF(capsule);
        return NULL;
    }
    job->options.level = (enum dcp_verify_level)level;
    job->options.direct = (enum dcp_direct)direct;
    job->options.problems_most = most;
    job->options.part = part;
    job->options.parts = parts;
    if (native_run_or_raise(capsule, job_run, job, job->cancel, NULL, state->error_class) == 0) {
        result = result_of(&job->result);
    }
    Py_DECREF(capsule);
    return result;
}

PyMethodDef verify_methods[] = {
    {"verify_checkpoint", (PyCFunction)(void (*)(void))module_verify, METH_VARARGS | METH_KEYWORDS,
     verify_doc},
    {NULL, NULL, 0, NULL},
};

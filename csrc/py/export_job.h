/*
 * export_job.h: one export call on its way from Python to the core.
 */
#ifndef DCP_PY_EXPORT_JOB_H
#define DCP_PY_EXPORT_JOB_H

#include "module.h"

#include "dcp_export.h"

struct export_job {
    struct dcp_bump memory; /* all arrays below */
    PyObject *held;         /* the arguments, as tuples of our own */
    const char *path;
    struct dcp_export_file *files;
    uint32_t files_count;
    struct dcp_export_piece *pieces;
    uint64_t pieces_count;
    struct dcp_export_tensor *tensors;
    uint64_t tensors_count;
    struct dcp_export_sources sources;
    struct dcp_export_publication publication;
    struct dcp_engine_options options;
    struct dcp_export_stats stats;
    atomic_int cancel;
    Py_buffer progress; /* of a 64-bit counter that others look at meanwhile; or nothing */
};

/* A job in a capsule, which owns it.  Returns new; NULL with an exception. */
PyObject *export_job_new(struct export_job **ret);

/* The rest gives NULL or -1 with an exception.  Memory and references live as long as the job. */

/* Memory for `count` of them and one more, zeroed. */
void *export_job_take(struct export_job *job, Py_ssize_t count, size_t size);
/* The bytes of a path or a name. */
const char *export_job_path(struct export_job *job, PyObject *path);
int export_job_names(struct export_job *job, PyObject *object, const char ***ret_names,
                     uint32_t *ret_count);
/* (name, length) or (name, length, head) */
int export_job_files(struct export_job *job, PyObject *object);
/* (file, offset, tensor, file strides); needs native_state_load. */
int export_job_pieces(struct export_job *job, const struct native_state *state, PyObject *object);
/* (name, file, offset, item bytes, sizes, chunks) with chunks of (source, offset, box) */
int export_job_tensors(struct export_job *job, PyObject *object);

#endif

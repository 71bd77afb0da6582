/*
 * save_upload.h: the methods of _native.Save that are of background saves alone.
 */
#ifndef DCP_PY_SAVE_UPLOAD_H
#define DCP_PY_SAVE_UPLOAD_H

#include "save_object.h"

/* ---- save_stage.c ---- */
PyObject *save_wait_for_orphan(PyObject *object, PyObject *arg);
PyObject *save_meet(PyObject *object, PyObject *unused);
PyObject *save_stage(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *save_warm_up(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *save_is_staging(PyObject *object, PyObject *unused);
/* ---- save_upload.c ---- */
PyObject *save_upload(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *save_upload_state(PyObject *object, PyObject *unused);
PyObject *save_upload_result(PyObject *object, PyObject *unused);
PyObject *save_upload_stats(PyObject *object, PyObject *unused);
PyObject *save_upload_staged(PyObject *object, PyObject *unused);
PyObject *save_upload_left(PyObject *object, PyObject *unused);
PyObject *save_upload_progress(PyObject *object, PyObject *unused);
PyObject *save_expire(PyObject *object, PyObject *unused);
PyObject *save_cancel(PyObject *object, PyObject *unused);
extern const char save_wait_for_orphan_doc[], save_meet_doc[], save_stage_doc[], save_warm_up_doc[],
    save_upload_doc[], save_upload_state_doc[], save_upload_result_doc[], save_upload_stats_doc[],
    save_is_staging_doc[], save_upload_staged_doc[], save_upload_left_doc[],
    save_upload_progress_doc[], save_expire_doc[], save_cancel_doc[];

#define SAVE_WITH_KEYWORDS(fn) (PyCFunction)(void (*)(void))(fn), METH_VARARGS | METH_KEYWORDS

#define SAVE_UPLOAD_METHODS                                                                        \
    {"wait_for_orphan", save_wait_for_orphan, METH_O, save_wait_for_orphan_doc},                   \
        {"meet", save_meet, METH_NOARGS, save_meet_doc},                                           \
        {"stage", SAVE_WITH_KEYWORDS(save_stage), save_stage_doc},                                 \
        {"is_staging", save_is_staging, METH_NOARGS, save_is_staging_doc},                         \
        {"warm_up", SAVE_WITH_KEYWORDS(save_warm_up), save_warm_up_doc},                           \
        {"upload", SAVE_WITH_KEYWORDS(save_upload), save_upload_doc},                              \
        {"upload_state", save_upload_state, METH_NOARGS, save_upload_state_doc},                   \
        {"upload_result", save_upload_result, METH_NOARGS, save_upload_result_doc},                \
        {"upload_stats", save_upload_stats, METH_NOARGS, save_upload_stats_doc},                   \
        {"upload_staged", save_upload_staged, METH_NOARGS, save_upload_staged_doc},                \
        {"upload_left_s", save_upload_left, METH_NOARGS, save_upload_left_doc},                    \
        {"upload_progress", save_upload_progress, METH_NOARGS, save_upload_progress_doc},          \
        {"expire", save_expire, METH_NOARGS, save_expire_doc},                                     \
    {                                                                                              \
        "cancel", save_cancel, METH_NOARGS, save_cancel_doc                                        \
    }

/* Staging that was begun and that nobody will end: waits until its copies are over. */
void save_stage_give_up(struct save_object *self);

/* Frees the upload.  False while it uses what the save has: then nothing of that is freed. */
bool save_upload_release(struct save_object *self);

#endif

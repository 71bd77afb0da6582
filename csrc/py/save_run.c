/*
 * save_run.c: how one step of _native.Save runs: off the GIL, with its failure as an exception or
 * as the list that all ranks agreed on.
 *
 * All functions need the GIL and drop it around exactly one call of the core.
 */
#include "save_object.h"

#include "errors.h"

void
save_drop_sources(struct save_object *self)
{
    save_items_clean_up(&self->items);
    device_set_clean_up(&self->devices);
}

int
save_take_devices(struct save_object *self)
{
    /* Torch's code ran while items were made, and may have launched what fills them. */
    if (device_set_follow(self->devices) != 0) {
        save_drop_sources(self);
        return -1;
    }
    dcp_save_set_devices(self->save, device_set_list(self->devices));
    return 0;
}

void
save_end_sources(struct save_object *self)
{
    save_items_clean_up(&self->items);
    device_set_give_back(self->devices);
}

int
save_run_step(PyObject *object, native_fn fn, bool collective, int *ret_rc)
{
    struct save_object *self = as_save(object);
    struct dcp_group *group = group_object_get(self->group);
    struct dcp_error err;
    int rc = 0;

    if (group == NULL) {
        return -1;
    }
    self->left =
        native_run(object, fn, self, &self->cancel, &self->pending, &rc, &err) != 0 || self->left;
    if (self->interrupt == NULL) {
        self->interrupt = Py_XNewRef(self->pending);
    }
    if (collective && self->left) {
        /* Not before the others heard of it: a step that still runs goes by the group's plan. */
        dcp_group_poison(group);
    }
    if (self->left && self->pending != NULL) {
        return native_raise_pending(&self->pending);
    }
    *ret_rc = rc;
    if (rc == DCP_E_CANCELLED && self->pending != NULL) {
        return native_raise_pending(&self->pending);
    }
    if (rc != 0 && !(collective && rc == DCP_E_PEER)) {
        native_set_error(module_error_class(object), &err);
        return -1;
    }
    return 0;
}

PyObject *
save_run_collective(PyObject *object, native_fn fn, PyObject *record)
{
    struct save_object *self = as_save(object);
    PyObject *result;
    int rc = 0;

    if (failure_from_python(record, &self->mine, &self->mine_given) != 0) {
        return NULL;
    }
    Py_XSETREF(self->mine_record, Py_NewRef(record));
    if (self->mine_given && group_object_get(self->group) != NULL) {
        self->mine.rank = dcp_group_comm(group_object_get(self->group))->rank;
    }
    dcp_failure_list_clean_up(&self->failures);
    if (save_run_step(object, fn, true, &rc) != 0) {
        return NULL;
    }
    if (rc == 0) {
        Py_RETURN_NONE;
    }
    result = native_failures(module_error_class(object), &self->failures);
    dcp_failure_list_clean_up(&self->failures);
    return result;
}

int
save_run_here(PyObject *object, native_fn fn)
{
    struct dcp_error err;
    int rc;

    if (group_object_get(as_save(object)->group) == NULL) {
        return -1;
    }
    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc = fn(object, &err);
    Py_END_ALLOW_THREADS if (rc < 0)
    {
        native_set_error(module_error_class(object), &err);
    }
    return rc;
}

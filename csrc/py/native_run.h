/*
 * native_run.h: one long core call without the GIL, interruptible by signals.
 */
#ifndef DCP_PY_NATIVE_RUN_H
#define DCP_PY_NATIVE_RUN_H

#include <Python.h>
#include <stdatomic.h>

#include "dcp_error.h"

typedef int (*native_fn)(void *self, struct dcp_error *err);

/* Runs fn(self, err) on a helper thread while the calling thread, without the GIL, wakes every 100
 * ms for signals.
 *
 * 0: fn returned; *ret_rc and *ret_err hold its result.  If a signal handler raised meanwhile, the
 * exception is put into *pending (first one wins) and *cancel is set, but fn was waited for: ranks
 * stay in step, and the caller reports the interrupt at its next local step.
 *
 * -1, with *pending set and no exception raised: fn did not return within 10 s of the first
 * interrupt, or a second one came.  The helper thread keeps running on what `owner` (which is never
 * freed then) owns; the caller poisons what it used.
 *
 * Where no thread can be had, fn runs on the calling thread and can not be interrupted. */
int native_run(PyObject *owner, native_fn fn, void *self, atomic_int *cancel, PyObject **pending,
               int *ret_rc, struct dcp_error *ret_err);

/* Raises what native_run left in *pending and forgets it: -1; 0 when there is nothing. */
int native_raise_pending(PyObject **pending);

/* Moves the exception that is set to *pending, with its traceback; drops it when one is there. */
void native_keep_pending(PyObject **pending);

/* For calls that no other rank waits for: 0, or -1 with an exception: the interrupt's, the one in
 * *own (NULL: there is none) that a callback of fn kept, or what fn's error stands for. */
int native_run_or_raise(PyObject *owner, native_fn fn, void *self, atomic_int *cancel,
                        PyObject **own, PyObject *error_class);

/* Takes the memory of exactly one number of `bytes`, which the core changes atomically while others
 * look at it, or they while it looks: -1 with an exception where `number`, called `name`, is none.
 */
int native_take_number(PyObject *number, size_t bytes, const char *name, Py_buffer *view);

#endif

/*
 * native_run.c: core calls on a helper thread, so that Ctrl-C works while bytes move or ranks wait.
 *
 * The job is shared by two threads and freed by the last one.  Everything fn touches belongs to
 * `owner`, to which the job holds a reference; a job that had to be left alone keeps it for ever,
 * on purpose.
 */
#include "native_run.h"

#include "dcp_trace.h"
#include "errors.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <time.h>

enum { WAKE_MS = 100, INTERRUPT_GRACE_MS = 10000, EXIT_WAIT_S = 1 };

struct native_job {
    pthread_mutex_t lock;
    pthread_cond_t finished;
    bool done;      /* under `lock` */
    bool abandoned; /* under `lock`: the caller left */
    native_fn fn;
    void *self;
    uint32_t caller; /* its thread, for the trace; 0 */
    int rc;          /* valid once done */
    struct dcp_error err;
};

static void
job_free(struct native_job *job)
{
    pthread_mutex_destroy(&job->lock);
    pthread_cond_destroy(&job->finished);
    PyMem_RawFree(job);
}

static void *
job_main(void *arg)
{
    struct native_job *job = arg;
    bool abandoned;

    dcp_trace_act_for(job->caller);
    job->rc = job->fn(job->self, &job->err);
    pthread_mutex_lock(&job->lock);
    job->done = true;
    abandoned = job->abandoned;
    pthread_cond_signal(&job->finished);
    pthread_mutex_unlock(&job->lock);
    if (abandoned) {
        job_free(job);
    }
    return NULL;
}

/* True when the job is done; waits at most WAKE_MS. */
static bool
job_wait(struct native_job *job)
{
    struct timespec until;
    bool done;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += WAKE_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_mutex_lock(&job->lock);
    while (!job->done) {
        if (pthread_cond_timedwait(&job->finished, &job->lock, &until) == ETIMEDOUT) {
            break;
        }
    }
    done = job->done;
    pthread_mutex_unlock(&job->lock);
    return done;
}

/* Leaves the job to its thread.  False when it finished at the last moment. */
static bool
job_abandon(struct native_job *job)
{
    bool left;

    pthread_mutex_lock(&job->lock);
    left = !job->done;
    job->abandoned = left;
    pthread_mutex_unlock(&job->lock);
    return left;
}

/* NULL when there is no memory or no thread to be had. */
static struct native_job *
job_start(native_fn fn, void *self, pthread_t *ret_thread)
{
    struct native_job *job = PyMem_RawCalloc(1, sizeof *job);
    pthread_condattr_t attr;
    sigset_t all, before;
    int rc;

    if (job == NULL) {
        return NULL;
    }
    job->fn = fn;
    job->self = self;
    job->caller = dcp_trace_this_thread();
    dcp_error_clear(&job->err);
    pthread_mutex_init(&job->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&job->finished, &attr);
    pthread_condattr_destroy(&attr);
    /* Signals go to the trainer's threads, never to this one. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(ret_thread, NULL, job_main, job);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0) {
        job_free(job);
        return NULL;
    }
    return job;
}

/* The thread is done with the job.  It may yet be held up on its way out, by writes that it left to
 * the kernel; the result is here, so it is not waited for long. */
static void
thread_end(pthread_t thread)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += EXIT_WAIT_S;
    if (pthread_timedjoin_np(thread, NULL, &until) != 0) {
        pthread_detach(thread);
    }
}

int
native_run(PyObject *owner, native_fn fn, void *self, atomic_int *cancel, PyObject **pending,
           int *ret_rc, struct dcp_error *ret_err)
{
    pthread_t thread;
    struct native_job *job = job_start(fn, self, &thread);
    int interrupts = 0, grace_ms = 0;

    if (job == NULL) {
        /* A rank that gave up here would leave the others waiting: do without Ctrl-C instead. */
        dcp_error_clear(ret_err);
        Py_BEGIN_ALLOW_THREADS *ret_rc = fn(self, ret_err);
        Py_END_ALLOW_THREADS return 0;
    }
    Py_INCREF(owner);
    for (;;) {
        bool done;

        Py_BEGIN_ALLOW_THREADS done = job_wait(job);
        Py_END_ALLOW_THREADS if (done)
        {
            break;
        }
        grace_ms += interrupts > 0 ? WAKE_MS : 0;
        if (PyErr_CheckSignals() != 0) {
            interrupts++;
            atomic_store(cancel, 1);
            native_keep_pending(pending);
        }
        if ((interrupts > 1 || grace_ms > INTERRUPT_GRACE_MS) && job_abandon(job)) {
            pthread_detach(thread);
            return -1; /* `owner` keeps its reference: the thread still uses it */
        }
    }
    Py_BEGIN_ALLOW_THREADS thread_end(thread);
    Py_END_ALLOW_THREADS *ret_rc = job->rc;
    *ret_err = job->err;
    job_free(job);
    Py_DECREF(owner);
    return 0;
}

int
native_raise_pending(PyObject **pending)
{
    if (*pending == NULL) {
        return 0;
    }
    PyErr_SetObject((PyObject *)Py_TYPE(*pending), *pending);
    Py_CLEAR(*pending);
    return -1;
}

void
native_keep_pending(PyObject **pending)
{
    PyObject *type, *value, *traceback;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (*pending == NULL && value != NULL) {
        if (traceback != NULL) {
            PyException_SetTraceback(value, traceback);
        }
        *pending = Py_NewRef(value);
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

int
native_run_or_raise(PyObject *owner, native_fn fn, void *self, atomic_int *cancel, PyObject **own,
                    PyObject *error_class)
{
    PyObject *pending = NULL;
    struct dcp_error err;
    int rc = 0;

    dcp_error_clear(&err);
    if (native_run(owner, fn, self, cancel, &pending, &rc, &err) != 0 || pending != NULL) {
        return native_raise_pending(&pending);
    }
    if (own != NULL && native_raise_pending(own) != 0) {
        return -1;
    }
    if (rc != 0) {
        native_set_error(error_class, &err);
        return -1;
    }
    return 0;
}

int
native_take_number(PyObject *number, size_t bytes, const char *name, Py_buffer *view)
{
    if (PyObject_GetBuffer(number, view, PyBUF_WRITABLE) != 0) {
        return -1;
    }
    if ((size_t)view->len != bytes || (uintptr_t)view->buf % bytes != 0) {
        PyErr_Format(PyExc_ValueError, "%s must be one aligned number of %zu bits", name,
                     8 * bytes);
        return -1;
    }
    return 0;
}

/*
 * nccl_wait.c: waiting for what may never come: pauses between looks, and calls on a thread that
 * can be left behind.
 *
 * Threads: any.
 */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include "nccl_link.h"

enum {
    SPIN_LOOKS = 20,        /* more of them take the processor from threads that have work */
    FIRST_PAUSE_NS = 20000, /* then the trainer's threads can have the processor */
    LONGEST_PAUSE_NS = 500000,
};

uint64_t
nccl_now_ns(void)
{
    struct timespec now = {0};
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void
nccl_pause(uint32_t *looks)
{
    uint32_t look = ++*looks;
    if (look < SPIN_LOOKS) {
        (void)sched_yield();
        return;
    }
    uint32_t doublings = (look - SPIN_LOOKS) / 16;
    uint64_t ns = doublings < 5 ? (uint64_t)FIRST_PAUSE_NS << doublings : LONGEST_PAUSE_NS;
    struct timespec pause = {.tv_nsec = (long)dcp_min_u64(ns, LONGEST_PAUSE_NS)};
    (void)nanosleep(&pause, NULL);
}

struct apart {
    void (*run)(void *self);
    void (*late)(void *self);
    void *self;
    pthread_mutex_t mutex;
    pthread_cond_t changed; /* waits on CLOCK_MONOTONIC */
    bool done;              /* guarded by mutex */
    bool left;              /* guarded by mutex: nobody waits any more, the thread frees this */
};

static void
apart_free(struct apart *apart)
{
    (void)pthread_cond_destroy(&apart->changed);
    (void)pthread_mutex_destroy(&apart->mutex);
    dcp_free(apart);
}

static void *
apart_main(void *arg)
{
    struct apart *apart = arg;
    apart->run(apart->self);
    (void)pthread_mutex_lock(&apart->mutex);
    apart->done = true;
    bool left = apart->left;
    (void)pthread_cond_signal(&apart->changed);
    (void)pthread_mutex_unlock(&apart->mutex);
    if (left) {
        apart->late(apart->self);
        apart_free(apart);
    }
    return NULL;
}

static struct apart *
apart_new(void (*run)(void *), void (*late)(void *), void *self)
{
    struct apart *apart = dcp_calloc(1, sizeof *apart);
    pthread_condattr_t attr;
    if (apart == NULL) {
        return NULL;
    }
    if (pthread_condattr_init(&attr) != 0) {
        dcp_free(apart);
        return NULL;
    }
    int rc = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    if (rc == 0) {
        rc = pthread_cond_init(&apart->changed, &attr);
    }
    (void)pthread_condattr_destroy(&attr);
    if (rc == 0 && pthread_mutex_init(&apart->mutex, NULL) != 0) {
        (void)pthread_cond_destroy(&apart->changed);
        rc = -1;
    }
    if (rc != 0) {
        dcp_free(apart);
        return NULL;
    }
    apart->run = run;
    apart->late = late;
    apart->self = self;
    return apart;
}

static int
start(struct apart *apart)
{
    pthread_t thread;
    sigset_t all, before;
    /* Signals go to the trainer's threads, never to this one. */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&thread, NULL, apart_main, apart);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc != 0 ? rc : pthread_detach(thread);
}

bool
nccl_run_apart(void (*run)(void *), void (*late)(void *), void *self, uint64_t deadline_ns)
{
    struct apart *apart = apart_new(run, late, self);
    if (apart == NULL || start(apart) != 0) {
        if (apart != NULL) {
            apart_free(apart);
        }
        run(self);
        return true;
    }
    struct timespec until = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
                             .tv_nsec = (long)(deadline_ns % 1000000000u)};
    int rc = 0;
    (void)pthread_mutex_lock(&apart->mutex);
    while (!apart->done && rc == 0) {
        rc = pthread_cond_timedwait(&apart->changed, &apart->mutex, &until);
    }
    bool done = apart->done;
    apart->left = !done;
    (void)pthread_mutex_unlock(&apart->mutex);
    if (done) {
        apart_free(apart);
    }
    return done;
}

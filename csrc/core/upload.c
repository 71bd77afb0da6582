/*
 * upload.c: one save in the background, on a thread that writes and a thread that agrees (both in
 * upload_run.c).
 *
 * Two threads, because either may be stuck where no deadline helps: the writer in a device that
 * does not answer, the other in a store whose host is frozen.  Each may be given up without the
 * other.  Nothing may be undone under a writer that still runs: what is left to undo then is done
 * by the writer itself when it comes back.  Nobody waits for it before the verdict is told.
 *
 * Order: bytes durable on every rank, publish, the verdict, what is left to undo, the caller's
 * result, leave.  The claim is settled (commit rule 6) before anybody hears of a failure.
 *
 * At the deadline the owner takes over from an agreement that is stuck in the store, and settles
 * the save itself.  One that is stuck in the storage keeps its decision, and ends it when it can.
 *
 * Threads: `lock` guards what both threads and the owner see.  It is never held across a call of
 * the store, the save or the owner.
 */
#include "upload.h"

#include <string.h>
#include <unistd.h>

#include "group.h"
#include "ring.h"

/* Behind the deadline, for an agreement that ends by itself. */
#define EXPIRE_GRACE_NS 5000000000u
/* For the claim, when the owner takes over. */
#define TAKE_OVER_NS 1000000000u

static int
init(struct dcp_upload *upload, const struct dcp_upload_params *params)
{
    pthread_condattr_t attr;
    size_t len = params->prefix == NULL ? 0 : strlen(params->prefix);

    DCP_ASSERT(len < sizeof upload->prefix);
    upload->params = *params;
    memcpy(upload->prefix, params->prefix == NULL ? "" : params->prefix, len + 1);
    upload->pid = getpid();
    upload->starter = pthread_self();
    upload->start_ns = dcp_now_ns();
    upload->deadline_ns = upload->start_ns + params->timeout_ns;
    dcp_error_clear(&upload->write_error);
    dcp_error_clear(&upload->error);
    upload->bytes = params->mine != NULL ? DCP_BYTES_FAILED : DCP_BYTES_WRITING;
    upload->writing = params->mine == NULL;
    upload->staging = upload->writing && params->staging;
    dcp_error_clear(&upload->stage_error);
    int rc = pthread_condattr_init(&attr);
    if (rc != 0) {
        return rc;
    }
    (void)pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    rc = pthread_cond_init(&upload->changed, &attr);
    pthread_condattr_destroy(&attr);
    if (rc == 0) {
        rc = pthread_mutex_init(&upload->lock, NULL);
        if (rc != 0) {
            pthread_cond_destroy(&upload->changed);
        }
    }
    return rc;
}

/* A thread that is not to be had is done without: a rank that gave up here would leave the others
 * waiting. */
static void
start_thread(struct dcp_upload *upload, void *(*run)(void *))
{
    pthread_t thread;

    pthread_mutex_lock(&upload->lock);
    upload->running++;
    pthread_mutex_unlock(&upload->lock);
    if (dcp_engine_thread(&thread, run, upload) == 0) {
        pthread_detach(thread);
    } else {
        (void)run(upload);
    }
}

int
dcp_upload_start(const struct dcp_upload_params *params, struct dcp_upload **ret_upload,
                 struct dcp_error *err)
{
    struct dcp_upload *upload;

    if (params->prefix != NULL && strlen(params->prefix) >= sizeof upload->prefix) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "the prefix \"%s\" is too long",
                             params->prefix);
    }
    upload = dcp_calloc(1, sizeof *upload);
    if (upload == NULL || init(upload, params) != 0) {
        dcp_free(upload);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a background save");
    }
    *ret_upload = upload;
    /* Held until both were started: `ended` must not be true in between. */
    pthread_mutex_lock(&upload->lock);
    upload->running++;
    pthread_mutex_unlock(&upload->lock);
    if (upload->writing) {
        start_thread(upload, dcp_upload_writer_main);
    }
    start_thread(upload, dcp_upload_agreement_main);
    dcp_upload_leave(upload);
    return 0;
}

enum dcp_upload_state
dcp_upload_state(struct dcp_upload *upload)
{
    enum dcp_upload_state state;

    pthread_mutex_lock(&upload->lock);
    state = !upload->settled ? DCP_UPLOAD_RUNNING
            : upload->ended  ? DCP_UPLOAD_ENDED
                             : DCP_UPLOAD_SETTLED;
    pthread_mutex_unlock(&upload->lock);
    return state;
}

int
dcp_upload_result(struct dcp_upload *upload, const struct dcp_failure_list **ret_failures,
                  struct dcp_error *err)
{
    DCP_ASSERT(dcp_upload_state(upload) != DCP_UPLOAD_RUNNING);
    *ret_failures = &upload->failures;
    *err = upload->error;
    return upload->rc;
}

bool
dcp_upload_staged(struct dcp_upload *upload, int *ret_rc, struct dcp_error *err)
{
    bool over;

    pthread_mutex_lock(&upload->lock);
    over = !upload->staging;
    if (over) {
        *ret_rc = upload->stage_rc;
        *err = upload->stage_error;
    }
    pthread_mutex_unlock(&upload->lock);
    return over;
}

bool
dcp_upload_cancel(struct dcp_upload *upload)
{
    bool running;

    pthread_mutex_lock(&upload->lock);
    running = upload->writing && !upload->settled;
    upload->cancelled = upload->cancelled || running;
    pthread_mutex_unlock(&upload->lock);
    if (running) {
        atomic_store(&upload->cancel, 1);
    }
    return running;
}

uint64_t
dcp_upload_progress(struct dcp_upload *upload)
{
    return atomic_load(&upload->progress_bytes);
}

uint64_t
dcp_upload_left_ns(struct dcp_upload *upload)
{
    uint64_t now_ns = dcp_now_ns(), end_ns = upload->deadline_ns + EXPIRE_GRACE_NS;

    return end_ns > now_ns ? end_ns - now_ns : 0;
}

/* In the place of an agreement that is stuck in the store. */
static void *
take_over_main(void *arg)
{
    struct dcp_upload *upload = arg;
    bool ours;

    (void)dcp_save_settle(upload->params.save);
    pthread_mutex_lock(&upload->lock);
    ours = !upload->writing;
    upload->left_to_writer = upload->writing;
    pthread_mutex_unlock(&upload->lock);
    if (ours) {
        dcp_upload_wind_up(upload);
    }
    pthread_mutex_lock(&upload->lock);
    upload->taking_over = false;
    pthread_cond_broadcast(&upload->changed);
    pthread_mutex_unlock(&upload->lock);
    dcp_upload_leave(upload);
    return NULL;
}

/* The storage may be what everybody is stuck in, and the owner has other saves to see to. */
static void
take_over(struct dcp_upload *upload)
{
    uint64_t until_ns = dcp_now_ns() + TAKE_OVER_NS;

    start_thread(upload, take_over_main);
    pthread_mutex_lock(&upload->lock);
    while (upload->taking_over && dcp_now_ns() < until_ns) {
        dcp_upload_wait_until(upload, until_ns);
    }
    pthread_mutex_unlock(&upload->lock);
}

void
dcp_upload_expire(struct dcp_upload *upload)
{
    struct dcp_error err;
    const char *what;
    bool takes_over;

    atomic_store(&upload->cancel, 1);
    pthread_mutex_lock(&upload->lock);
    what = upload->staging                       ? "a device whose memory it copies"
           : upload->deciding || upload->writing ? "the storage"
                                                 : "the store of the process group";
    takes_over = !upload->deciding && !upload->settled && !upload->expired;
    upload->expired = upload->expired || takes_over;
    upload->taking_over = upload->taking_over || takes_over;
    pthread_cond_broadcast(&upload->changed);
    pthread_mutex_unlock(&upload->lock);
    if (takes_over) {
        take_over(upload);
    }
    dcp_error_clear(&err);
    dcp_error_set(&err, DCP_E_TIMEOUT, 0, NULL,
                  "the save had not ended at its deadline (%.0f s), and %s does not answer; it was "
                  "given up, and whether it was committed its .metadata tells",
                  (double)upload->params.timeout_ns / 1e9, what);
    if (dcp_upload_settle(upload, DCP_E_TIMEOUT, NULL, &err)) {
        dcp_upload_notify(upload);
    }
}

void
dcp_upload_get_stats(struct dcp_upload *upload, struct dcp_upload_stats *ret_stats)
{
    pthread_mutex_lock(&upload->lock);
    *ret_stats = (struct dcp_upload_stats){
        .writing = upload->writing || upload->deciding || upload->taking_over,
        .in_touch = upload->params.store == NULL || upload->stats.in_touch,
        .settle_ns = upload->settle_ns,
        .store_calls = upload->stats.store_calls,
    };
    pthread_mutex_unlock(&upload->lock);
}

void
dcp_upload_destroy(struct dcp_upload *upload)
{
    if (upload == NULL || upload->pid != getpid() || dcp_upload_state(upload) != DCP_UPLOAD_ENDED) {
        return;
    }
    pthread_mutex_lock(&upload->lock);
    while (upload->notifying) {
        pthread_cond_wait(&upload->changed, &upload->lock);
    }
    pthread_mutex_unlock(&upload->lock);
    dcp_failure_list_clean_up(&upload->failures);
    pthread_mutex_destroy(&upload->lock);
    pthread_cond_destroy(&upload->changed);
    dcp_free(upload);
}

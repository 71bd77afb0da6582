/*
 * upload_run.c: the two threads of a background save: one writes, one agrees with the other ranks.
 *
 * What either may touch when the other is stuck, or when the owner has taken over at the deadline,
 * is decided under the lock, at once with who undoes what was written: the agreement, the writer
 * when it comes back late, or the owner (upload.c).
 *
 * Threads: `lock` guards what both threads and the owner see.  It is never held across a call of
 * the store, the save or the owner.
 */
#include "upload.h"

#include <string.h>
#include <time.h>

#include "dcp_trace.h"
#include "group.h"

/* A save that is given up waits so long for its writer before it leaves the files to it. */
#define WRITER_GRACE_NS 10000000000u

/* ---- what both threads use ---- */

void
dcp_upload_wait_until(struct dcp_upload *upload, uint64_t until_ns)
{
    struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000u),
                             .tv_nsec = (long)(until_ns % 1000000000u)};

    (void)pthread_cond_timedwait(&upload->changed, &upload->lock, &until);
}

void
dcp_upload_notify(struct dcp_upload *upload)
{
    if (upload->params.notify != NULL) {
        upload->params.notify(upload->params.notify_ctx);
    }
}

/* Once; later calls change nothing.  True when it was this one. */
bool
dcp_upload_settle(struct dcp_upload *upload, int rc, const struct dcp_failure_list *failures,
                  const struct dcp_error *err)
{
    struct dcp_failure_list copy = {0};
    bool first;

    if (failures != NULL && dcp_failure_list_copy(failures, &copy) != 0) {
        rc = rc == 0 ? 0 : DCP_E_NOMEM;
    }
    pthread_mutex_lock(&upload->lock);
    first = !upload->settled;
    if (first) {
        upload->rc = rc;
        upload->failures = copy;
        memset(&copy, 0, sizeof copy);
        if (err != NULL) {
            upload->error = *err;
        }
        if (rc != 0) {
            dcp_error_set(&upload->error, rc, 0, NULL, "the save failed: %s", dcp_code_text(rc));
        }
        upload->settled = true;
        upload->settle_ns = upload->durable_ns == 0 ? 0 : dcp_now_ns() - upload->durable_ns;
    }
    pthread_mutex_unlock(&upload->lock);
    dcp_failure_list_clean_up(&copy);
    return first;
}

/* The last thing a thread does.  Who destroys waits for the end of `notifying`. */
void
dcp_upload_leave(struct dcp_upload *upload)
{
    bool last;

    pthread_mutex_lock(&upload->lock);
    last = --upload->running == 0;
    upload->ended = upload->notifying = last;
    pthread_mutex_unlock(&upload->lock);
    if (last) {
        dcp_upload_notify(upload);
        pthread_mutex_lock(&upload->lock);
        upload->notifying = false;
        pthread_cond_broadcast(&upload->changed);
        pthread_mutex_unlock(&upload->lock);
    }
}

/* What this rank wrote is kept or undone, as the outcome says.  Nobody writes it any more. */
void
dcp_upload_wind_up(struct dcp_upload *upload)
{
    dcp_save_wind_up(upload->params.save);
    if (upload->params.survive && upload->params.process != NULL) {
        dcp_writer_process_settled(upload->params.process);
    }
}

/* ---- the writer ---- */

/* From here on the owner's tensors may change.  Once; what becomes of their checksums is told with
 * the save. */
static void
tell_staged(struct dcp_upload *upload, int rc, const struct dcp_error *err)
{
    bool first;

    pthread_mutex_lock(&upload->lock);
    first = upload->staging;
    if (first) {
        upload->staging = false;
        upload->stage_rc = rc;
        upload->stage_error = *err;
    }
    pthread_mutex_unlock(&upload->lock);
    if (first) {
        dcp_upload_notify(upload);
    }
}

static void
on_brought(void *ctx)
{
    struct dcp_error none;

    dcp_error_clear(&none);
    tell_staged(ctx, 0, &none);
}

static int
end_staging(struct dcp_upload *upload, struct dcp_error *err)
{
    const struct dcp_stage_end how = {
        .cancel = &upload->cancel, .brought = on_brought, .ctx = upload};
    int rc = dcp_save_stage_end(upload->params.save, upload->params.sources, &how, err);

    tell_staged(upload, rc, err);
    return rc;
}

static int
write_bytes(struct dcp_upload *upload, struct dcp_error *err)
{
    const struct dcp_upload_params *params = &upload->params;

    if (params->staging) {
        int rc = end_staging(upload, err);

        if (rc != 0) {
            return rc;
        }
    }
    if (params->written) {
        return 0;
    }
    if (!params->staged) {
        return dcp_save_write(params->save, params->sources, &upload->cancel,
                              &upload->progress_bytes, err);
    }
    return dcp_save_write_staged(params->save, params->process, params->survive, &upload->cancel,
                                 &upload->progress_bytes, err);
}

static void
run_writer(struct dcp_upload *upload)
{
    struct dcp_error err;
    bool left;
    int rc;

    dcp_error_clear(&err);
    rc = write_bytes(upload, &err);
    pthread_mutex_lock(&upload->lock);
    if (rc == 0 && upload->cancelled) {
        rc = dcp_error_set(&err, DCP_E_CANCELLED, 0, NULL, "the save was cancelled");
    }
    upload->write_error = err;
    upload->bytes = rc == 0 ? DCP_BYTES_DURABLE : DCP_BYTES_FAILED;
    upload->durable_ns = dcp_now_ns();
    left = upload->writing = upload->left_to_writer;
    pthread_cond_broadcast(&upload->changed);
    pthread_mutex_unlock(&upload->lock);
    if (left) {
        dcp_upload_wind_up(upload);
        pthread_mutex_lock(&upload->lock);
        upload->writing = false;
        pthread_mutex_unlock(&upload->lock);
    }
}

void *
dcp_upload_writer_main(void *arg)
{
    struct dcp_upload *upload = arg;

    dcp_trace_thread("background save: writing");
    if (!pthread_equal(pthread_self(), upload->starter)) {
        dcp_save_lend_thread(upload->params.save);
    }
    run_writer(upload);
    dcp_upload_leave(upload);
    return NULL;
}

/* ---- the agreement's calls ---- */

static enum dcp_bytes_state
on_bytes(void *ctx, uint64_t wait_ns, struct dcp_failure *ret_failure)
{
    struct dcp_upload *upload = ctx;
    uint64_t until_ns = dcp_now_ns() + wait_ns;
    enum dcp_bytes_state state;

    pthread_mutex_lock(&upload->lock);
    while (upload->expired == upload->told_expired && upload->bytes == upload->told &&
           dcp_now_ns() < until_ns) {
        dcp_upload_wait_until(upload, until_ns);
    }
    upload->told_expired = upload->expired;
    state = upload->told = upload->bytes;
    pthread_mutex_unlock(&upload->lock);
    if (state == DCP_BYTES_FAILED) {
        *ret_failure = upload->params.mine != NULL
                           ? *upload->params.mine
                           : dcp_failure_from_error(&upload->write_error, upload->params.rank);
    }
    return state;
}

/* False once the owner took over: then nothing may be published or undone here any more. */
static bool
begin_decision(struct dcp_upload *upload)
{
    bool may;

    pthread_mutex_lock(&upload->lock);
    may = !upload->expired;
    upload->deciding = may;
    pthread_mutex_unlock(&upload->lock);
    return may;
}

static void
end_decision(struct dcp_upload *upload)
{
    pthread_mutex_lock(&upload->lock);
    upload->deciding = false;
    pthread_mutex_unlock(&upload->lock);
}

static int
on_publish(void *ctx, struct dcp_error *err)
{
    struct dcp_upload *upload = ctx;
    int rc;

    if (!begin_decision(upload)) {
        return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL, "the save was given up at its deadline");
    }
    rc = dcp_save_publish(upload->params.save, err);
    end_decision(upload);
    return rc;
}

static enum dcp_outcome
on_abandon(void *ctx)
{
    struct dcp_upload *upload = ctx;
    enum dcp_outcome outcome;

    atomic_store(&upload->cancel, 1);
    if (!begin_decision(upload)) {
        return DCP_OUTCOME_UNKNOWN;
    }
    outcome = dcp_save_settle(upload->params.save);
    end_decision(upload);
    return outcome;
}

static void
on_conclude(void *ctx, enum dcp_outcome outcome)
{
    struct dcp_upload *upload = ctx;

    if (begin_decision(upload)) {
        dcp_save_hear(upload->params.save, outcome);
        end_decision(upload);
    }
}

/* Stops the writer: nobody waits for its bytes any more.  True: its files are ours, and a decision
 * has begun.  False: they are its own, as it does not come back, or the owner's.  *ret_lent: what
 * was lent is still ours; with a result the owner takes it back for another save. */
static bool
take_files(struct dcp_upload *upload, bool *ret_lent)
{
    uint64_t until_ns = dcp_now_ns() + WRITER_GRACE_NS;
    bool ours;

    pthread_mutex_lock(&upload->lock);
    while (upload->writing && !upload->expired && dcp_now_ns() < until_ns) {
        dcp_upload_wait_until(upload, until_ns);
    }
    if (!upload->expired) {
        upload->left_to_writer = upload->writing;
    }
    ours = upload->deciding = !upload->expired && !upload->writing;
    *ret_lent = !upload->settled;
    pthread_mutex_unlock(&upload->lock);
    return ours;
}

static void
on_settled(void *ctx, int rc, const struct dcp_failure_list *failures, const struct dcp_error *err)
{
    struct dcp_upload *upload = ctx;
    bool lent;

    if (rc != 0) {
        atomic_store(&upload->cancel, 1);
    }
    if (take_files(upload, &lent)) {
        if (rc != 0 && upload->params.survive && dcp_save_was_committed(upload->params.save)) {
            rc = 0; /* the coordinator died, and its process has committed */
            failures = NULL;
            err = NULL;
        }
        if (lent) {
            dcp_upload_wind_up(upload);
            dcp_save_sweep(upload->params.save);
        } else {
            dcp_save_wind_up(upload->params.save);
        }
        end_decision(upload);
    }
    if (dcp_upload_settle(upload, rc, failures, err)) {
        dcp_upload_notify(upload);
    }
}

/* ---- the agreement ---- */

/* One rank: its bytes decide. */
static void
agree_alone(struct dcp_upload *upload)
{
    struct dcp_failure failure = {0};
    struct dcp_failure_list list = {.items = &failure, .count = 1};
    struct dcp_error err;
    enum dcp_bytes_state state;
    bool expired;

    dcp_error_clear(&err);
    do {
        state = on_bytes(upload, 1000000000u, &failure);
        pthread_mutex_lock(&upload->lock);
        expired = upload->expired;
        pthread_mutex_unlock(&upload->lock);
    } while (state == DCP_BYTES_WRITING && !expired);
    if (state == DCP_BYTES_DURABLE && on_publish(upload, &err) == 0) {
        on_settled(upload, 0, NULL, NULL);
        return;
    }
    if (state == DCP_BYTES_DURABLE) {
        failure = dcp_failure_from_error(&err, upload->params.rank);
    }
    if (!expired) {
        (void)on_abandon(upload);
        on_settled(upload, DCP_E_PEER, &list, NULL);
    }
}

static void
run_agreement(struct dcp_upload *upload)
{
    const struct dcp_upload_params *params = &upload->params;
    struct dcp_agreement_stats stats = {0};
    const struct dcp_agreement agreement = {
        .store = params->store,
        .prefix = upload->prefix,
        .rank = params->rank,
        .size = params->size,
        .coordinator = params->coordinator,
        .deadline_ns = upload->deadline_ns,
        .host_timeout_ns = params->host_timeout_ns,
        /* The death of a trainer fails no save that outlives it. */
        .peers = params->survive ? NULL : params->peers,
        .shm = params->shm,
        .independent = params->independent,
        .ctx = upload,
        .bytes = on_bytes,
        .publish = on_publish,
        .abandon = on_abandon,
        .conclude = on_conclude,
        .settled = on_settled,
    };

    if (params->store == NULL) {
        agree_alone(upload);
        return;
    }
    dcp_agreement_run(&agreement, &stats);
    pthread_mutex_lock(&upload->lock);
    upload->stats = stats;
    pthread_mutex_unlock(&upload->lock);
}

void *
dcp_upload_agreement_main(void *arg)
{
    struct dcp_upload *upload = arg;
    uint64_t traced;

    dcp_trace_thread("background save: agreeing");
    traced = dcp_trace_begin();
    run_agreement(upload);
    dcp_trace_end(traced, "agree", "agree over the store", 0);
    dcp_upload_leave(upload);
    return NULL;
}

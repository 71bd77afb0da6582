/*
 * upload.c: one save in the background, on a thread that writes and a thread that agrees.
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
#include "dcp_upload.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

#include "group.h"
#include "ring.h"

/* A save that is given up waits so long for its writer before it leaves the files to it. */
#define WRITER_GRACE_NS 10000000000u
/* Behind the deadline, for an agreement that ends by itself. */
#define EXPIRE_GRACE_NS 5000000000u

struct dcp_upload {
    struct dcp_upload_params params;
    char prefix[96];
    pid_t pid;
    pthread_t starter; /* the trainer's: its priority is not ours to change */
    uint64_t start_ns, deadline_ns;
    atomic_int cancel;
    _Atomic uint64_t progress_bytes;

    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed;
    enum dcp_bytes_state bytes; /* of this rank */
    bool writing;               /* the writer runs */
    bool left_to_writer;        /* what it wrote is its own to undo when it comes back */
    bool deciding;              /* the agreement is in the storage */
    bool cancelled;             /* by the owner, in time: the bytes are of no use, written or not */
    bool expired, told_expired; /* the owner took over: the agreement decides nothing any more */
    uint32_t running;           /* threads */
    bool settled, ended;
    bool notifying;            /* that it has ended */
    enum dcp_bytes_state told; /* to the agreement, last */
    struct dcp_error write_error;
    int rc; /* of the whole; valid once settled */
    struct dcp_error error;
    struct dcp_failure_list failures;
    struct dcp_agreement_stats stats;
    uint64_t settle_ns; /* from durable to settled */
    uint64_t durable_ns;
};

/* ---- what both threads use ---- */

static void
wait_until(struct dcp_upload *upload, uint64_t until_ns)
{
    struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000u),
                             .tv_nsec = (long)(until_ns % 1000000000u)};

    (void)pthread_cond_timedwait(&upload->changed, &upload->lock, &until);
}

static void
notify(struct dcp_upload *upload)
{
    if (upload->params.notify != NULL) {
        upload->params.notify(upload->params.notify_ctx);
    }
}

/* Once; later calls change nothing.  True when it was this one. */
static bool
settle(struct dcp_upload *upload, int rc, const struct dcp_failure_list *failures,
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
static void
leave(struct dcp_upload *upload)
{
    bool last;

    pthread_mutex_lock(&upload->lock);
    last = --upload->running == 0;
    upload->ended = upload->notifying = last;
    pthread_mutex_unlock(&upload->lock);
    if (last) {
        notify(upload);
        pthread_mutex_lock(&upload->lock);
        upload->notifying = false;
        pthread_cond_broadcast(&upload->changed);
        pthread_mutex_unlock(&upload->lock);
    }
}

/* What this rank wrote is kept or undone, as the outcome says.  Nobody writes it any more. */
static void
wind_up(struct dcp_upload *upload)
{
    dcp_save_wind_up(upload->params.save);
    if (upload->params.survive && upload->params.process != NULL) {
        dcp_writer_process_settled(upload->params.process);
    }
}

/* ---- the writer ---- */

static int
write_bytes(struct dcp_upload *upload, struct dcp_error *err)
{
    const struct dcp_upload_params *params = &upload->params;

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
        wind_up(upload);
        pthread_mutex_lock(&upload->lock);
        upload->writing = false;
        pthread_mutex_unlock(&upload->lock);
    }
}

static void *
writer_main(void *arg)
{
    struct dcp_upload *upload = arg;

    if (!pthread_equal(pthread_self(), upload->starter)) {
        dcp_save_lend_thread(upload->params.save);
    }
    run_writer(upload);
    leave(upload);
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
        wait_until(upload, until_ns);
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
        wait_until(upload, until_ns);
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
            wind_up(upload);
            dcp_save_sweep(upload->params.save);
        } else {
            dcp_save_wind_up(upload->params.save);
        }
        end_decision(upload);
    }
    if (settle(upload, rc, failures, err)) {
        notify(upload);
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
        .peers = params->peers,
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

static void *
agreement_main(void *arg)
{
    struct dcp_upload *upload = arg;

    run_agreement(upload);
    leave(upload);
    return NULL;
}

/* ---- the owner's side ---- */

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
        start_thread(upload, writer_main);
    }
    start_thread(upload, agreement_main);
    leave(upload);
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

void
dcp_upload_expire(struct dcp_upload *upload)
{
    struct dcp_error err;
    bool settled, stuck, takes_over, ours = false;

    atomic_store(&upload->cancel, 1);
    pthread_mutex_lock(&upload->lock);
    settled = upload->settled;
    stuck = upload->deciding || upload->writing;
    takes_over = !upload->deciding && !settled;
    upload->expired = upload->expired || takes_over;
    pthread_cond_broadcast(&upload->changed);
    pthread_mutex_unlock(&upload->lock);
    if (takes_over) {
        (void)dcp_save_settle(upload->params.save);
        pthread_mutex_lock(&upload->lock);
        ours = !upload->writing;
        upload->left_to_writer = upload->writing;
        pthread_mutex_unlock(&upload->lock);
    }
    if (ours) {
        wind_up(upload);
    }
    dcp_error_clear(&err);
    dcp_error_set(&err, DCP_E_TIMEOUT, 0, NULL,
                  "the save had not ended at its deadline (%.0f s), and %s does not answer; it was "
                  "given up, and whether it was committed its .metadata tells",
                  (double)upload->params.timeout_ns / 1e9,
                  stuck ? "the storage" : "the store of the process group");
    if (settle(upload, DCP_E_TIMEOUT, NULL, &err)) {
        notify(upload);
    }
}

void
dcp_upload_get_stats(struct dcp_upload *upload, struct dcp_upload_stats *ret_stats)
{
    pthread_mutex_lock(&upload->lock);
    *ret_stats = (struct dcp_upload_stats){
        .writing = upload->writing || upload->deciding,
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

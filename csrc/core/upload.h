/*
 * upload.h: private: what the files of a background save share.
 *
 * upload.c is the owner's side: start, results, the end at the deadline.  upload_run.c has the two
 * threads, one that writes and one that agrees.
 */
#ifndef DCP_CORE_UPLOAD_H
#define DCP_CORE_UPLOAD_H

#include <pthread.h>
#include <sys/types.h>

#include "dcp_upload.h"

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
    bool staging;               /* the writer waits for copies from devices */
    int stage_rc;               /* what became of them, and why */
    struct dcp_error stage_error;
    bool writing;               /* the writer runs */
    bool left_to_writer;        /* what it wrote is its own to undo when it comes back */
    bool deciding;              /* the agreement is in the storage */
    bool cancelled;             /* by the owner, in time: the bytes are of no use, written or not */
    bool taking_over;           /* the owner, on a thread of its own: it may be stuck too */
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

void dcp_upload_wait_until(struct dcp_upload *upload, uint64_t until_ns);
void dcp_upload_notify(struct dcp_upload *upload);
/* The result, once; later calls change nothing.  True when it was this one. */
bool dcp_upload_settle(struct dcp_upload *upload, int rc, const struct dcp_failure_list *failures,
                       const struct dcp_error *err);
/* What this rank wrote is kept or undone, as the outcome says.  Nobody writes it any more. */
void dcp_upload_wind_up(struct dcp_upload *upload);
/* The last thing a thread does. */
void dcp_upload_leave(struct dcp_upload *upload);

/* The threads; `arg` is the upload. */
void *dcp_upload_writer_main(void *arg);
void *dcp_upload_agreement_main(void *arg);

#endif

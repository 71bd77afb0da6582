/*
 * dcp_upload.h: the background half of a save: its bytes to the disk, the agreement of the ranks
 * over the store, the commit.
 *
 * It runs on two threads of its own that need neither the GIL nor a collective: one writes, the
 * other agrees.  Its result is there as soon as the outcome is certain (SETTLED); the threads may
 * stay a little longer, to take leave of the other ranks (ENDED).
 *
 * Thread rule: calls from any thread, by one owner; dcp_upload_destroy by nobody else at the time.
 */
#ifndef DCP_UPLOAD_H
#define DCP_UPLOAD_H

#include "dcp_store.h"
#include "dcp_transfer.h"

struct dcp_upload;

enum dcp_upload_state {
    DCP_UPLOAD_RUNNING = 0,
    DCP_UPLOAD_SETTLED = 1, /* the result is there; what was given to it is still in use */
    DCP_UPLOAD_ENDED = 2,   /* nothing of it runs any more */
};

/* All pointers are borrowed until ENDED. */
struct dcp_upload_params {
    struct dcp_save *save;
    bool staged;  /* else the files are written from `sources` */
    bool staging; /* with `staged`: dcp_save_stage_begin was called, and its end comes first */
    const struct dcp_source *sources;
    struct dcp_writer_process *process; /* writes what was staged; NULL: a thread does */
    const struct dcp_failure *mine;     /* what failed on this rank before; NULL */
    bool survive;                       /* the process finishes the save if this one dies */
    bool written;                       /* the files are durable already */
    /* NULL: this rank alone decides. */
    const struct dcp_store *store;
    const char *prefix; /* copied; as of struct dcp_agreement */
    uint32_t rank, size, coordinator;
    bool independent;
    const struct dcp_peers *peers;
    const struct dcp_shm *shm;
    uint64_t timeout_ns, host_timeout_ns;
    /* Called at SETTLED, at ENDED and when `staging` is over, from a thread of the upload, without
     * any lock of it; must not destroy it.  `notify_ctx` is borrowed until dcp_upload_destroy. */
    void (*notify)(void *ctx);
    void *notify_ctx;
};

/* Where no thread is to be had all of it happens here and now. */
int dcp_upload_start(const struct dcp_upload_params *params, struct dcp_upload **ret_upload,
                     struct dcp_error *err) DCP_MUST_CHECK;
enum dcp_upload_state dcp_upload_state(struct dcp_upload *upload);
/* From SETTLED on: 0, DCP_E_PEER with the failures of the ranks (borrowed), or what `err` says. */
int dcp_upload_result(struct dcp_upload *upload, const struct dcp_failure_list **ret_failures,
                      struct dcp_error *err);
/* Whether nothing reads the sources of params.staging any more; then *ret_rc and `err` say how it
 * went: DCP_E_CANCELLED where the save was over before. */
bool dcp_upload_staged(struct dcp_upload *upload, int *ret_rc, struct dcp_error *err);
/* Stops writing at the next request.  False when there is nothing left to stop. */
bool dcp_upload_cancel(struct dcp_upload *upload);
/* Payload bytes that were handed to the disk. */
uint64_t dcp_upload_progress(struct dcp_upload *upload);
/* Until the deadline has passed and a grace with it. */
uint64_t dcp_upload_left_ns(struct dcp_upload *upload);
/* Ends it when nothing is left: a thread that is stuck in the store, or in the device, is given up
 * and keeps what it uses for ever.  The outcome is settled by looking, unless it is the looking
 * that is stuck.  One that has a result already is left alone. */
void dcp_upload_expire(struct dcp_upload *upload);
struct dcp_upload_stats {
    bool writing;         /* the writer process may still be talked to */
    bool in_touch;        /* the store answered to the end; known at ENDED */
    uint64_t settle_ns;   /* from durable to SETTLED */
    uint64_t store_calls; /* of this rank; known at ENDED */
};
void dcp_upload_get_stats(struct dcp_upload *upload, struct dcp_upload_stats *ret_stats);
/* Of one that has not ENDED, and in a forked child, nothing is freed.  Waits for a call of `notify`
 * to return. */
void dcp_upload_destroy(struct dcp_upload *upload);

#endif

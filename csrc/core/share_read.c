/*
 * share_read.c: reads what several ranks of a host want once, into slots that all of them see.
 *
 * Every rank walks the same units (share_schedule.c).  Its reading threads take this rank's units
 * in turn: read, wait for a free slot, compare checksums on the way there, say that it is full.
 * They read into memory of their own, on huge pages: shared memory lies on small pages all over the
 * place, and a device needs up to twice as long to fill those.  The calling thread walks all units,
 * waits for those of which it wants something, moves its rows to their targets and lets go of the
 * slot.  Checksums are compared once, by the rank that reads: memory that only processes of this
 * user can write is trusted as the rank's own.  Two threads per rank, so that one reads while the
 * other checks.
 *
 * No deadlock: all ranks take units in the same order, and a slot waits only for units before it.
 * No rank is left behind: whoever fails says so in its segment before it does anything else, and
 * everybody who waits looks there.
 *
 * What cannot be shared, or is wanted by this rank alone, is read by dcp_reader_run afterwards,
 * when the slots are given back: memory of the two is never held together.
 *
 * Threads: dcp_share_read on the calling thread; fill_main on its own.
 */
#include "share_run.h"

#include <string.h>

enum { READING_THREADS = 2 };

static void
run_fail(struct dcp_share_run *run, int code, const struct dcp_error *err)
{
    pthread_mutex_lock(&run->lock);
    if (run->code == 0) {
        run->code = code;
        run->error = *err;
        dcp_share_leave(run->share, DCP_SHARE_FAILED);
        atomic_store(&run->stop, 1);
    }
    pthread_mutex_unlock(&run->lock);
}

/* ---- filling slots ---- */

struct filler {
    struct dcp_share_run *run;
    uint8_t *buffer; /* as large as a slot */
    struct dcp_reader reader;
    struct dcp_share_cursor cursor;
    struct dcp_share_unit unit;
};

/* How much is read of the unit's file from here on, which decides how; more than this makes no
 * difference. */
static uint64_t
bytes_ahead(const struct filler *filler)
{
    struct dcp_share_cursor ahead = filler->cursor;
    struct dcp_share_unit unit = filler->unit;
    uint64_t bytes = 0;
    do {
        bytes += unit.end_bytes - unit.from_bytes;
    } while (bytes < DCP_DATA_FILE_DIRECT_LEAST_BYTES && dcp_share_next_unit(&ahead, &unit) &&
             unit.file == filler->unit.file);
    return bytes;
}

static int
fill(struct filler *filler, struct dcp_error *err)
{
    struct dcp_share_run *run = filler->run;
    const struct dcp_share *share = run->share;
    const struct dcp_share_unit *unit = &filler->unit;
    const struct dcp_share_member *own = &share->members[share->self];
    uint32_t slots = own->header->slots_count, at = (uint32_t)(unit->number % slots);
    struct dcp_share_slot *slot = &own->header->slots[at];
    uint8_t *data = own->slots + (uint64_t)at * own->header->slot_bytes;
    uint64_t verified = 0;

    uint64_t wanted = dcp_share_is_open(&filler->reader, unit) ? 0 : bytes_ahead(filler);
    int rc = dcp_share_read_unit(&filler->reader, unit, wanted, filler->buffer, err);
    /* The unit before it in this slot may be another thread's, and still on its way. */
    uint32_t before = unit->number < slots ? 0 : (uint32_t)(unit->number + 1 - slots);
    if (rc == 0) {
        rc = dcp_share_wait(share, &slot->filled, before, run->options->cancel, &run->stop, err);
    }
    if (rc == 0) {
        rc = dcp_share_wait(share, &slot->left, 0, run->options->cancel, &run->stop, err);
    }
    if (rc == 0) {
        rc = dcp_share_check_unit(&filler->reader, unit, filler->buffer, data, &verified, err);
    }
    if (rc == 0) {
        slot->verified = verified;
        atomic_store_explicit(&slot->left, (uint32_t)__builtin_popcountll(unit->users),
                              memory_order_relaxed);
        atomic_store_explicit(&slot->filled, (uint32_t)(unit->number + 1), memory_order_release);
        share->shm->wake(share->shm->ctx, &slot->filled);
    }
    return rc;
}

/* The thread's next unit: one of this rank's that no other thread has taken. */
static bool
next_own(struct filler *filler)
{
    struct dcp_share_run *run = filler->run;
    uint64_t number = atomic_fetch_add(&run->next_number, 1);
    while (dcp_share_next_unit(&filler->cursor, &filler->unit)) {
        if (filler->unit.reader == run->share->self && filler->unit.number == number) {
            return true;
        }
    }
    return false;
}

static void *
fill_main(void *arg)
{
    struct dcp_share_run *run = arg;
    struct dcp_error err;
    struct filler *filler = dcp_calloc(1, sizeof *filler);
    int rc = 0;

    dcp_error_clear(&err);
    if (filler == NULL) {
        rc = dcp_error_set(&err, DCP_E_NOMEM, 0, NULL, "out of memory for a reading thread");
        run_fail(run, rc, &err);
        return NULL;
    }
    filler->run = run;
    filler->buffer = dcp_ring_buffer(run->ring, atomic_fetch_add(&run->threads_count, 1));
    filler->reader = (struct dcp_reader){.io = run->io,
                                         .dirfd = run->dirfd,
                                         .dir_path = run->dir_path,
                                         .plan = run->plan,
                                         .options = run->options};
    dcp_share_cursor_init(&filler->cursor, run->share, run->plan->md);
    while (rc == 0 && atomic_load(&run->stop) == 0 && next_own(filler)) {
        rc = fill(filler, &err);
    }
    if (rc != 0) {
        run_fail(run, rc, &err);
    }
    dcp_read_file_release(&filler->reader, filler->reader.file);
    pthread_mutex_lock(&run->lock);
    dcp_read_stats_add(&run->stats, &filler->reader.stats);
    pthread_mutex_unlock(&run->lock);
    dcp_free(filler);
    return NULL;
}

/* ---- taking what was read ---- */

static int
take_slot(struct dcp_share_run *run, struct dcp_share_taker *taker,
          const struct dcp_share_unit *unit, struct dcp_error *err)
{
    const struct dcp_share *share = run->share;
    const struct dcp_share_member *reader = &share->members[unit->reader];
    uint32_t at = (uint32_t)(unit->number % reader->header->slots_count);
    struct dcp_share_slot *slot = &reader->header->slots[at];
    const uint8_t *data = reader->slots + (uint64_t)at * reader->header->slot_bytes;

    int rc = dcp_share_wait(share, &slot->filled, (uint32_t)(unit->number + 1),
                            run->options->cancel, &run->stop, err);
    if (rc == 0) {
        rc = dcp_share_take_unit(taker, unit, data, slot->verified, unit->reader == share->self,
                                 err);
    }
    if (rc != 0) {
        return rc;
    }
    if (atomic_fetch_sub_explicit(&slot->left, 1, memory_order_acq_rel) == 1) {
        share->shm->wake(share->shm->ctx, &slot->left);
    }
    return dcp_share_check_cancel(run->options->cancel, err);
}

static int
take_all(struct dcp_share_run *run, struct dcp_error *err)
{
    struct dcp_share_taker taker = {.plan = run->plan,
                                    .wants = &run->wants,
                                    .options = run->options,
                                    .member = run->share->self};
    struct dcp_share_cursor cursor;
    struct dcp_share_unit unit;
    int rc = 0;

    dcp_share_cursor_init(&cursor, run->share, run->plan->md);
    while (rc == 0 && dcp_share_next_unit(&cursor, &unit)) {
        if (dcp_share_is_user(unit.users, run->share->self)) {
            rc = take_slot(run, &taker, &unit, err);
        }
    }
    pthread_mutex_lock(&run->lock);
    dcp_read_stats_add(&run->stats, &taker.stats);
    pthread_mutex_unlock(&run->lock);
    return rc;
}

/* Reads all shared units.  The first failure of any thread of this rank is the one that counts. */
static int
read_shared(struct dcp_share_run *run, struct dcp_error *err)
{
    pthread_t threads[READING_THREADS];
    struct dcp_error mine;
    uint32_t count = 0;
    int rc = 0;

    dcp_error_clear(&mine);
    if (run->share->own.header->slots_count > 0) {
        while (count < READING_THREADS && dcp_engine_thread(&threads[count], fill_main, run) == 0) {
            count++;
        }
        if (count == 0) {
            rc = dcp_error_set(&mine, DCP_E_NOMEM, 0, NULL, "no thread could be made that reads");
        }
    }
    if (rc == 0) {
        rc = take_all(run, &mine);
    }
    if (rc != 0) {
        run_fail(run, rc, &mine);
    }
    for (uint32_t i = 0; i < count; i++) {
        pthread_join(threads[i], NULL);
    }
    if (run->code != 0) {
        if (err != NULL && err->code == 0) {
            *err = run->error;
        }
        return run->code;
    }
    dcp_share_leave(run->share, DCP_SHARE_DONE);
    return 0;
}

/* ---- the whole ---- */

static void
run_clean_up(struct dcp_share_run *run)
{
    dcp_share_wants_clean_up(&run->wants);
    dcp_free(run->rest);
    pthread_mutex_destroy(&run->lock);
}

int
dcp_share_read(struct dcp_share *share, const struct dcp_io *io, int dirfd, const char *dir_path,
               const struct dcp_read_plan *plan, const struct dcp_engine_options *options,
               dcp_record_fn on_record, void *on_record_ctx, struct dcp_read_stats *ret_stats,
               struct dcp_error *err)
{
    uint64_t start_ns = dcp_engine_now_ns();
    struct dcp_share_run run = {.share = share,
                                .io = io,
                                .dirfd = dirfd,
                                .dir_path = dir_path,
                                .plan = plan,
                                .options = options};
    struct dcp_read_plan rest = *plan;
    bool ready = false;
    int rc = 0;

    pthread_mutex_init(&run.lock, NULL);
    dcp_error_clear(&run.error);
    if (dcp_share_prepare(&run)) {
        rc = dcp_share_agree(&run, &ready, err);
    }
    if (rc == 0 && ready) {
        rc = read_shared(&run, err);
        run.stats.wall_ns = dcp_engine_now_ns() - start_ns;
        rest.items = run.rest;
        rest.items_count = run.rest_count;
        rest.wanted_bytes -= dcp_min_u64(rest.wanted_bytes, run.stats.wanted_bytes);
    }
    /* The slots are given back before more of the ring is used. */
    dcp_share_end(share);
    dcp_ring_release(run.ring);
    if (rc == 0 && (!ready || rest.items_count > 0)) {
        struct dcp_read_stats stats = {0};
        rc = dcp_reader_run(io, dirfd, dir_path, &rest, options, on_record, on_record_ctx, &stats,
                            err);
        dcp_read_stats_add(&run.stats, &stats);
    }
    if (rc == 0 && ret_stats != NULL) {
        *ret_stats = run.stats;
    }
    run_clean_up(&run);
    return rc;
}

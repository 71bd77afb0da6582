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
#include "share.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>

#include "reader.h"

enum { READING_THREADS = 2 };

struct share_run {
    struct dcp_share *share;
    const struct dcp_io *io;
    int dirfd;
    const char *dir_path;
    const struct dcp_read_plan *plan;
    const struct dcp_engine_options *options;
    struct dcp_share_wants wants;
    struct dcp_read_item *rest; /* owned: items that are not shared */
    uint64_t rest_count;
    bool anything_shared;      /* by whomever */
    struct dcp_ring *ring;     /* a buffer for each reading thread; NULL: this rank reads nothing */
    atomic_uint threads_count; /* that took their buffer */
    _Atomic uint64_t next_number; /* of this rank's units, the next that no thread has taken */
    atomic_int stop;
    pthread_mutex_t lock; /* guards all below */
    struct dcp_read_stats stats;
    int code; /* of the first failure */
    struct dcp_error error;
};

static void
run_fail(struct share_run *run, int code, const struct dcp_error *err)
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
    struct share_run *run;
    uint8_t *buffer; /* as large as a slot */
    struct dcp_reader reader;
    struct dcp_share_cursor cursor;
    struct dcp_share_unit unit;
};

/* Opens the unit's file, which this rank and others read from now on. */
static int
enter_file(struct filler *filler, struct dcp_error *err)
{
    struct dcp_reader *reader = &filler->reader;
    if (reader->file != NULL && reader->file->index == filler->unit.file) {
        return 0;
    }
    dcp_read_file_release(reader, reader->file);
    reader->file = NULL;
    /* How much is read of it decides how it is read; more than this makes no difference. */
    struct dcp_share_cursor ahead = filler->cursor;
    struct dcp_share_unit unit = filler->unit;
    uint64_t bytes = 0;
    do {
        bytes += unit.end_bytes - unit.from_bytes;
    } while (bytes < DCP_READ_DIRECT_LEAST_BYTES && dcp_share_next_unit(&ahead, &unit) &&
             unit.file == filler->unit.file);
    return dcp_read_file_open(reader, filler->unit.file, bytes, &reader->file, err);
}

static int
read_unit(struct filler *filler, uint8_t *data, struct dcp_error *err)
{
    const struct dcp_share_unit *unit = &filler->unit;
    struct dcp_reader *reader = &filler->reader;
    uint64_t len = unit->end_bytes - unit->from_bytes;
    struct dcp_read_span span = {.from_bytes = unit->from_bytes, .to_bytes = unit->end_bytes};
    reader->stats.read_bytes += len;
    reader->stats.hot_bytes += reader->file->hot ? len : 0;
    reader->stats.requests_count++;
    return dcp_read_file_span(reader, reader->file, &span, data, err);
}

static int
fill(struct filler *filler, struct dcp_error *err)
{
    struct share_run *run = filler->run;
    const struct dcp_share *share = run->share;
    const struct dcp_share_unit *unit = &filler->unit;
    const struct dcp_share_member *own = &share->members[share->self];
    uint32_t slots = own->header->slots_count, at = (uint32_t)(unit->number % slots);
    struct dcp_share_slot *slot = &own->header->slots[at];
    uint8_t *data = own->slots + (uint64_t)at * own->header->slot_bytes;
    uint64_t verified = 0;
    bool good;

    int rc = enter_file(filler, err);
    if (rc == 0) {
        rc = read_unit(filler, filler->buffer, err);
    }
    /* The unit before it in this slot may be another thread's, and still on its way. */
    uint32_t before = unit->number < slots ? 0 : (uint32_t)(unit->number + 1 - slots);
    if (rc == 0) {
        rc = dcp_share_wait(share, &slot->filled, before, run->options->cancel, &run->stop, err);
    }
    if (rc == 0) {
        rc = dcp_share_wait(share, &slot->left, 0, run->options->cancel, &run->stop, err);
    }
    for (uint32_t i = 0; rc == 0 && i < unit->pieces_count; i++) {
        const struct dcp_share_piece *piece = &unit->pieces[i];
        uint64_t from = piece->payload_offset_bytes + piece->from - unit->from_bytes;
        rc = dcp_share_check_piece(&filler->reader, piece, filler->buffer + from, data + from,
                                   &good, err);
        verified |= (uint64_t)good << i;
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
    struct share_run *run = filler->run;
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
    struct share_run *run = arg;
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
take_unit(struct share_run *run, const struct dcp_share_unit *unit, uint64_t *visit,
          struct dcp_read_stats *stats, struct dcp_error *err)
{
    const struct dcp_share *share = run->share;
    const struct dcp_share_member *reader = &share->members[unit->reader];
    uint32_t at = (uint32_t)(unit->number % reader->header->slots_count);
    struct dcp_share_slot *slot = &reader->header->slots[at];
    const uint8_t *data = reader->slots + (uint64_t)at * reader->header->slot_bytes;
    uint64_t taken = 0;

    int rc = dcp_share_wait(share, &slot->filled, (uint32_t)(unit->number + 1),
                            run->options->cancel, &run->stop, err);
    for (uint32_t i = 0; rc == 0 && i < unit->pieces_count; i++) {
        const struct dcp_share_piece *piece = &unit->pieces[i];
        uint64_t wanted = 0;
        if (!dcp_share_is_user(piece->users, share->self)) {
            continue;
        }
        rc = dcp_share_take_piece(
            run->plan, &run->wants, piece,
            data + (piece->payload_offset_bytes + piece->from - unit->from_bytes), visit, &wanted,
            err);
        if ((slot->verified >> i) & 1) {
            stats->verified_bytes += wanted;
        } else {
            stats->unverified_bytes += wanted;
        }
        taken += wanted;
    }
    if (rc != 0) {
        return rc;
    }
    if (atomic_fetch_sub_explicit(&slot->left, 1, memory_order_acq_rel) == 1) {
        share->shm->wake(share->shm->ctx, &slot->left);
    }
    stats->wanted_bytes += taken;
    stats->shared_bytes += unit->reader != share->self ? taken : 0;
    if (run->options->progress_bytes != NULL) {
        atomic_fetch_add_explicit(run->options->progress_bytes, taken, memory_order_relaxed);
    }
    return dcp_share_check_cancel(run->options->cancel, err);
}

static int
take_all(struct share_run *run, struct dcp_error *err)
{
    struct dcp_share_cursor cursor;
    struct dcp_share_unit unit;
    struct dcp_read_stats stats = {0};
    uint64_t visit = 0;
    int rc = 0;

    dcp_share_cursor_init(&cursor, run->share, run->plan->md);
    while (rc == 0 && dcp_share_next_unit(&cursor, &unit)) {
        if (dcp_share_is_user(unit.users, run->share->self)) {
            rc = take_unit(run, &unit, &visit, &stats, err);
        }
    }
    pthread_mutex_lock(&run->lock);
    dcp_read_stats_add(&run->stats, &stats);
    pthread_mutex_unlock(&run->lock);
    return rc;
}

static uint32_t
start_threads(struct share_run *run, pthread_t threads[READING_THREADS])
{
    uint32_t count = 0;
    /* Signals are for the threads of the trainer. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (count < READING_THREADS && pthread_create(&threads[count], NULL, fill_main, run) == 0) {
        count++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return count;
}

/* Reads all shared units.  The first failure of any thread of this rank is the one that counts. */
static int
read_shared(struct share_run *run, struct dcp_error *err)
{
    pthread_t threads[READING_THREADS];
    struct dcp_error mine;
    uint32_t count = 0;
    int rc = 0;

    dcp_error_clear(&mine);
    if (run->share->own.header->slots_count > 0) {
        count = start_threads(run, threads);
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

/* ---- who takes part ---- */

/* Splits the plan: what is shared, and `rest`.  False when there is no memory for that. */
static bool
split_items(struct share_run *run)
{
    const struct dcp_share_wants *wants = &run->wants;
    const struct dcp_read_plan *plan = run->plan;
    uint8_t *shared = dcp_calloc(1, dcp_keep_bytes((uint32_t)plan->items_count) + 1);
    struct dcp_share_cursor cursor;
    uint64_t v = 0, shared_count = 0;

    if (shared == NULL) {
        return false;
    }
    dcp_share_cursor_init(&cursor, run->share, plan->md);
    while (dcp_share_next_chunk(&cursor)) {
        run->anything_shared = true;
        if (!dcp_share_is_user(cursor.chunk.users, run->share->self)) {
            continue;
        }
        while (wants->visits[v].chunk != cursor.chunk.chunk) {
            v++;
        }
        for (; v < wants->visits_count && wants->visits[v].chunk == cursor.chunk.chunk; v++) {
            dcp_keep_set(shared, (uint32_t)wants->visits[v].item);
            shared_count++;
        }
    }
    run->rest = dcp_malloc_array(plan->items_count - shared_count, sizeof *run->rest);
    for (uint64_t i = 0; run->rest != NULL && i < plan->items_count; i++) {
        if (!dcp_keep_test(shared, (uint32_t)i)) {
            run->rest[run->rest_count++] = plan->items[i];
        }
    }
    dcp_free(shared);
    return run->rest != NULL;
}

/* Slots of this rank, given the ranks of the host that may take part. */
static void
choose_slots(const struct share_run *run, uint32_t *ret_count, uint32_t *ret_bytes)
{
    uint32_t readers = run->share->members_count < DCP_SHARE_MOST_READERS
                           ? run->share->members_count
                           : DCP_SHARE_MOST_READERS;
    uint32_t bytes = readers * 2 * DCP_SHARE_LARGE_SLOT_BYTES <= DCP_SHARE_HOST_BYTES
                         ? DCP_SHARE_LARGE_SLOT_BYTES
                         : DCP_SHARE_SLOT_BYTES;
    uint64_t count =
        dcp_min_u64(DCP_SHARE_HOST_BYTES / readers / bytes, run->wants.wanted_bytes / bytes + 1);
    if (run->share->slot_bytes != 0) {
        bytes = run->share->slot_bytes;
        count = 2;
    }
    *ret_bytes = bytes;
    *ret_count = run->share->self < DCP_SHARE_MOST_READERS ? (uint32_t)count : 0;
}

/* Whether the first, the middle and the last of what this rank wants lie in the page cache. */
static bool
is_hot(const struct share_run *run)
{
    const struct dcp_share_wants *wants = &run->wants;
    struct dcp_reader reader = {.io = run->io,
                                .dirfd = run->dirfd,
                                .dir_path = run->dir_path,
                                .plan = run->plan,
                                .options = run->options};
    bool hot = true;
    for (uint64_t i = 0; hot && i < 3; i++) {
        struct dcp_error err;
        struct dcp_read_file *file = NULL;
        dcp_error_clear(&err);
        uint32_t index = wants->visits[(wants->visits_count - 1) * i / 2].file;
        /* A file that cannot be opened fails where it is read. */
        hot =
            dcp_read_file_open(&reader, index, wants->wanted_bytes, &file, &err) == 0 && file->hot;
        dcp_read_file_release(&reader, file);
    }
    return hot;
}

/* Finds the ranks of the host, and puts what this one wants into its segment.  False: it reads for
 * itself. */
static bool
prepare(struct share_run *run)
{
    struct dcp_share *share = run->share;
    struct dcp_share_wants *wants = &run->wants;
    uint64_t details_count, wants_bytes;
    uint32_t slots_count, slot_bytes;
    struct dcp_error why;

    dcp_error_clear(&why);
    if (!dcp_share_find(share)) {
        return false;
    }
    if (!run->plan->md->is_native || run->plan->items_count > UINT32_MAX) {
        dcp_share_because(share, "only records that dcp_native wrote are shared");
        return false;
    }
    if (dcp_share_wants_build(run->plan, run->options, wants, &why) != 0) {
        dcp_share_because(share, "%.160s", why.message);
        return false;
    }
    details_count = wants->details.len / sizeof(uint64_t);
    wants_bytes = wants->wants_count * sizeof *wants->wants + wants->details.len;
    if (wants->wanted_bytes < DCP_SHARE_LEAST_WANTED_BYTES) {
        dcp_share_because(share, "tensors of %u KiB and more make up less than %u MiB of the load",
                          DCP_SHARE_LEAST_PAYLOAD_BYTES >> 10, DCP_SHARE_LEAST_WANTED_BYTES >> 20);
        return false;
    }
    if (wants_bytes > DCP_SHARE_MOST_WANTS_BYTES) {
        dcp_share_because(share, "the load reads too many chunks to agree on them");
        return false;
    }
    choose_slots(run, &slots_count, &slot_bytes);
    if (!dcp_share_grow(share, wants->wants_count, details_count, slots_count, slot_bytes)) {
        return false;
    }
    share->own.header->hot = is_hot(run);
    memcpy(dcp_share_own_wants(share), wants->wants, wants->wants_count * sizeof *wants->wants);
    if (wants->details.len > 0) {
        memcpy(dcp_share_own_details(share), wants->details.data, wants->details.len);
    }
    return true;
}

/* Memory for the reading threads, before anybody counts on them. */
static bool
take_ring(struct share_run *run)
{
    struct dcp_error why;
    dcp_error_clear(&why);
    if (run->share->own.header->slots_count > 0 && dcp_ring_acquire(0, 0, &run->ring, &why) != 0) {
        dcp_share_because(run->share, "%.160s", why.message);
        return false;
    }
    return true;
}

/* The two rounds.  *ret_ready: there is something to read together, and all can. */
static int
agree(struct share_run *run, bool *ret_ready, struct dcp_error *err)
{
    struct dcp_share *share = run->share;
    const struct dcp_engine_options *options = run->options;
    uint32_t settings = options->verify ? (options->verify_all ? 2 : 1) : 0;
    bool joined = false;

    *ret_ready = false;
    int rc = dcp_share_join(share, settings, options->cancel, &joined, err);
    if (rc != 0 || !joined) {
        return rc;
    }
    bool able = dcp_share_check_wants(share, run->plan->md) && split_items(run) && take_ring(run);
    if (able && !run->anything_shared) {
        /* So all the others conclude, too. */
        dcp_share_because(share, "no two ranks of this host want the same data");
        dcp_share_leave(share, DCP_SHARE_REFUSED);
        return 0;
    }
    return dcp_share_ready(share, able, options->cancel, ret_ready, err);
}

static void
run_clean_up(struct share_run *run)
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
    struct share_run run = {.share = share,
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
    if (prepare(&run)) {
        rc = agree(&run, &ready, err);
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

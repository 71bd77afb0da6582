/*
 * group_read.c: what every rank of a group wants is read by one of them and broadcast.
 *
 * For state that is replicated over many hosts, whose storage is slower than their network.  Which
 * chunks all ranks want whole is settled first (group_agree.c); every rank then walks the same
 * units (share_schedule.c, as if two members wanted each chunk).  Units are dealt by bytes in turn,
 * so all ranks read the same amount, from front to back.  A rank's reading thread is a unit or two
 * ahead of the broadcasts, in which all take part, in order.
 *
 * Every unit ends with a trailer: whether it could be read, and which pieces were verified.  A unit
 * that could not ends the walk on every rank.  A rank that fails otherwise goes on taking part
 * until it has a unit of its own to say so with, or to the end: nobody waits for it.
 *
 * All memory is there before the ranks agree to read together: after that only a device, a network
 * or a cancelled load can fail.
 *
 * Threads: collectives and targets on the calling thread; read_main on its own.
 */
#include "group_read.h"

#include <pthread.h>
#include <string.h>

#include "reader.h"
#include "share.h"

/* Buffers: two to read ahead into, one to receive in. */
enum { OWN_SLOTS = 2, RECEIVE_SLOT = 2, SLOTS = 3 };

struct trailer {
    uint64_t failed;
    uint64_t verified; /* bit of every piece */
};

struct group_run {
    struct dcp_group_read *read;
    const struct dcp_read_plan *plan;
    const struct dcp_engine_options *options;
    struct dcp_share_visit *chunks; /* owned: that can be shared; `item` is the entry */
    uint64_t chunks_count;
    struct dcp_share_wants wants;
    struct dcp_share_want *agreed; /* owned */
    struct dcp_share *share;       /* owned: two members that want `agreed`, the first with slots */
    struct dcp_share_header headers[2];
    uint32_t unit_bytes;
    struct dcp_ring *ring;
    struct dcp_reader reader; /* of the reading thread */
    struct dcp_read_stats stats;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed_cond;
    uint64_t filled, emptied; /* numbers of this rank's units */
    bool stop;
    int code; /* why the reading thread stopped; 0 */
    struct dcp_error error;
};

static void
fake_members(struct group_run *run, uint64_t count)
{
    run->share->members_count = 2;
    for (uint32_t m = 0; m < 2; m++) {
        run->headers[m].wants_count = count;
        run->share->members[m].header = &run->headers[m];
        run->share->members[m].wants = run->agreed;
    }
    run->headers[0].slots_count = 1;
    run->headers[0].slot_bytes = run->unit_bytes;
}

/* ---- units ---- */

/* The next unit and the rank that reads it. */
static bool
next_unit(const struct group_run *run, struct dcp_share_cursor *cursor,
          struct dcp_share_unit *ret_unit, uint32_t *ret_rank)
{
    uint64_t before = cursor->reader_bytes[0];
    if (!dcp_share_next_unit(cursor, ret_unit)) {
        return false;
    }
    *ret_rank = (uint32_t)(before / run->unit_bytes % run->read->comm->size);
    return true;
}

static uint64_t
unit_bytes(const struct dcp_share_unit *unit)
{
    return unit->end_bytes - unit->from_bytes;
}

static uint8_t *
slot_of(const struct group_run *run, uint64_t number)
{
    return dcp_ring_buffer(run->ring, (uint32_t)(number % OWN_SLOTS));
}

/* ---- reading ---- */

static int
read_unit(struct group_run *run, const struct dcp_share_unit *unit, uint8_t *data,
          struct dcp_error *err)
{
    struct trailer trailer = {0};
    int rc = dcp_share_read_unit(&run->reader, unit, DCP_DATA_FILE_DIRECT_LEAST_BYTES, data, err);
    if (rc == 0) {
        rc = dcp_share_check_unit(&run->reader, unit, data, NULL, &trailer.verified, err);
    }
    memcpy(data + unit_bytes(unit), &trailer, sizeof trailer);
    return rc;
}

/* Waits for a free slot; false: there is nothing more to do. */
static bool
wait_for_slot(struct group_run *run, uint64_t number)
{
    pthread_mutex_lock(&run->lock);
    while (!run->stop && number - run->emptied >= OWN_SLOTS) {
        pthread_cond_wait(&run->changed_cond, &run->lock);
    }
    bool go_on = !run->stop;
    pthread_mutex_unlock(&run->lock);
    return go_on;
}

static void *
read_main(void *arg)
{
    struct group_run *run = arg;
    struct dcp_share_cursor cursor;
    struct dcp_share_unit unit;
    struct dcp_error err;
    uint64_t number = 0;
    uint32_t rank;
    int rc = 0;
    dcp_error_clear(&err);
    dcp_share_cursor_init(&cursor, run->share, run->plan->md);
    while (rc == 0 && next_unit(run, &cursor, &unit, &rank)) {
        if (rank != run->read->comm->rank) {
            continue;
        }
        if (!wait_for_slot(run, number)) {
            break;
        }
        rc = read_unit(run, &unit, slot_of(run, number), &err);
        pthread_mutex_lock(&run->lock);
        run->filled += rc == 0;
        run->code = rc;
        run->error = err;
        pthread_cond_broadcast(&run->changed_cond);
        pthread_mutex_unlock(&run->lock);
        number++;
    }
    dcp_read_file_release(&run->reader, run->reader.file);
    run->reader.file = NULL;
    return NULL;
}

/* Waits until this rank's unit `number` was read, or could not be. */
static int
wait_for_unit(struct group_run *run, uint64_t number, struct dcp_error *err)
{
    pthread_mutex_lock(&run->lock);
    while (run->filled <= number && run->code == 0) {
        pthread_cond_wait(&run->changed_cond, &run->lock);
    }
    int rc = run->filled > number ? 0 : run->code;
    if (rc != 0 && err->code == 0) {
        *err = run->error;
    }
    pthread_mutex_unlock(&run->lock);
    return rc;
}

static void
let_go(struct group_run *run, bool stop)
{
    pthread_mutex_lock(&run->lock);
    run->emptied++;
    run->stop = run->stop || stop;
    pthread_cond_broadcast(&run->changed_cond);
    pthread_mutex_unlock(&run->lock);
}

/* ---- broadcasting ---- */

struct walk {
    struct dcp_share_cursor cursor;
    struct dcp_share_unit unit;
    uint64_t own_number; /* of this rank's next unit */
    struct dcp_share_taker taker;
    int code; /* what failed on this rank; 0 */
};

/* Sends or receives one unit.  *ret_stop: no rank goes on. */
static int
pass_unit(struct group_run *run, struct walk *walk, uint32_t rank, bool *ret_stop,
          struct dcp_error *err)
{
    const struct dcp_comm *comm = run->read->comm;
    bool is_own = rank == comm->rank;
    uint64_t len = unit_bytes(&walk->unit);
    uint8_t *data =
        is_own ? slot_of(run, walk->own_number) : dcp_ring_buffer(run->ring, RECEIVE_SLOT);
    struct trailer trailer;
    if (is_own) {
        int rc = wait_for_unit(run, walk->own_number, err);
        walk->code = walk->code != 0 ? walk->code : rc;
        if (walk->code != 0) {
            trailer = (struct trailer){.failed = 1};
            memcpy(data + len, &trailer, sizeof trailer);
        }
    }
    struct dcp_error lost = {0};
    int rc = comm->broadcast(comm->ctx, rank, data, (size_t)len + sizeof trailer, &lost);
    if (rc != 0) {
        *err = lost;
        return rc;
    }
    memcpy(&trailer, data + len, sizeof trailer);
    *ret_stop = trailer.failed != 0;
    if (*ret_stop && walk->code == 0) {
        walk->code = dcp_error_set(err, DCP_E_PEER, 0, NULL,
                                   "rank %u could not read what it was to send", rank);
    } else if (walk->code == 0) {
        walk->code =
            dcp_share_take_unit(&walk->taker, &walk->unit, data, trailer.verified, is_own, err);
        if (walk->code == 0) {
            walk->code = dcp_share_check_cancel(run->options->cancel, err);
        }
    }
    if (is_own) {
        walk->own_number++;
        let_go(run, *ret_stop);
    }
    return 0;
}

/* All units.  What fails on this rank alone is returned at the end. */
static int
pass_all(struct group_run *run, struct dcp_error *err)
{
    struct walk walk = {
        .taker = {.plan = run->plan, .wants = &run->wants, .options = run->options}};
    uint32_t rank;
    bool stop = false;
    int rc = 0;
    dcp_share_cursor_init(&walk.cursor, run->share, run->plan->md);
    while (rc == 0 && !stop && next_unit(run, &walk.cursor, &walk.unit, &rank)) {
        rc = pass_unit(run, &walk, rank, &stop, err);
    }
    run->stats = walk.taker.stats;
    return rc != 0 ? rc : walk.code;
}

static int
pass_with_thread(struct group_run *run, struct dcp_error *err)
{
    struct dcp_error mine;
    pthread_t thread;
    dcp_error_clear(&mine);
    int made = dcp_engine_thread(&thread, read_main, run);
    if (made != 0) {
        run->code = dcp_error_set(&run->error, DCP_E_NOMEM, made, NULL,
                                  "no thread could be made that reads");
    }
    int rc = pass_all(run, &mine);
    let_go(run, true);
    if (made == 0) {
        pthread_join(thread, NULL);
    }
    if (rc != 0 && err != NULL && err->code == 0) {
        *err = mine;
    }
    return rc;
}

/* ---- the whole ---- */

static int
out_of_memory(struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                         "out of memory for what a group reads together");
}

/* All the memory that reading together takes. */
static int
prepare(struct group_run *run, struct dcp_error *err)
{
    const struct dcp_read_plan *plan = run->plan;
    run->chunks = dcp_malloc_array(run->chunks_count, sizeof *run->chunks);
    run->agreed = dcp_malloc_array(run->chunks_count, sizeof *run->agreed);
    run->share = dcp_calloc(1, sizeof *run->share);
    run->read->rest = dcp_malloc_array(plan->items_count, sizeof *run->read->rest);
    if (run->chunks == NULL || run->agreed == NULL || run->share == NULL ||
        run->read->rest == NULL) {
        return out_of_memory(err);
    }
    dcp_group_chunks(plan->md, run->chunks);
    int rc = dcp_share_wants_build(plan, run->options, &run->wants, err);
    return rc != 0
               ? rc
               : dcp_ring_acquire(SLOTS, run->unit_bytes + DCP_DIRECT_ALIGN_BYTES, &run->ring, err);
}

/* The items whose chunks were not agreed on, into read->rest. */
static void
list_rest(struct group_run *run, uint64_t agreed_count)
{
    const struct dcp_share_wants *wants = &run->wants;
    struct dcp_group_read *read = run->read;
    uint64_t v = 0;
    /* Shared ones are marked by a target that is none. */
    memcpy(read->rest, run->plan->items, run->plan->items_count * sizeof *read->rest);
    for (uint64_t i = 0; i < agreed_count; i++) {
        while (wants->visits[v].chunk != run->agreed[i].chunk) {
            v++;
        }
        for (; v < wants->visits_count && wants->visits[v].chunk == run->agreed[i].chunk; v++) {
            read->rest[wants->visits[v].item].target = UINT64_MAX;
        }
    }
    read->rest_count = 0;
    for (uint64_t i = 0; i < run->plan->items_count; i++) {
        if (read->rest[i].target != UINT64_MAX) {
            read->rest[read->rest_count++] = read->rest[i];
        }
    }
}

int
dcp_group_read_run(struct dcp_group_read *read, const struct dcp_io *io, int dirfd,
                   const char *dir_path, const struct dcp_read_plan *plan,
                   const struct dcp_engine_options *options, struct dcp_read_stats *ret_stats,
                   struct dcp_error *err)
{
    uint64_t start_ns = dcp_engine_now_ns();
    struct group_run run = {
        .read = read,
        .plan = plan,
        .options = options,
        .chunks_count = dcp_group_chunks(plan->md, NULL),
        .unit_bytes = read->unit_bytes != 0 ? read->unit_bytes : DCP_SHARE_LARGE_SLOT_BYTES,
        .reader = {
            .io = io, .dirfd = dirfd, .dir_path = dir_path, .plan = plan, .options = options}};
    struct dcp_error why;
    uint64_t count = 0;
    dcp_error_clear(&why);
    pthread_mutex_init(&run.lock, NULL);
    pthread_cond_init(&run.changed_cond, NULL);
    /* Without memory for it every rank reads for itself. */
    bool able = prepare(&run, &why) == 0;
    int rc = dcp_group_agree(read, run.chunks, run.chunks_count, able ? &run.wants : NULL,
                             run.agreed, &count, err);
    if (rc == 0 && count > 0) {
        fake_members(&run, count);
        list_rest(&run, count);
        rc = pass_with_thread(&run, err);
        dcp_read_stats_add(&run.stats, &run.reader.stats);
    } else {
        dcp_free(read->rest);
        read->rest = NULL;
    }
    run.stats.wall_ns = dcp_engine_now_ns() - start_ns;
    *ret_stats = run.stats;
    dcp_ring_release(run.ring);
    dcp_share_wants_clean_up(&run.wants);
    dcp_free(run.chunks);
    dcp_free(run.agreed);
    dcp_free(run.share);
    pthread_cond_destroy(&run.changed_cond);
    pthread_mutex_destroy(&run.lock);
    return rc;
}

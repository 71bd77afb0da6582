/*
 * arena.c: staging memory that is taken once and kept.
 *
 * An arena whose save is over waits in a slot.  The next save takes the smallest that is large
 * enough, else lets the largest grow where it is: pages that were touched stay so, and what is
 * pinned stays pinned.  What is new, and only that, is asked for: by the user's cap, and by what
 * the machine and the control groups can spare.  Where that fails kept arenas that serve nobody go
 * first.  One that has no address space left to grow into is replaced.
 *
 * No lock: one that another thread holds during a fork stays locked in the child.  Slots are
 * swapped atomically, and the count of bytes carries the process that it counts for: a child starts
 * with no arena and a count of 0, whatever its parent was doing.  Mappings are not inherited, so of
 * a parent's arena a child frees the record alone.  The same goes for pinned memory: it is unpinned
 * before it is unmapped, by the process that pinned it.  Whether memory can be pinned is asked once
 * for every size of an arena: an answer of no costs as much time as one of yes.
 *
 * Invariants: an arena is in one slot or with one save; the count is of all mappings of this
 * process, and of those about to be made.
 */
#include "dcp_arena.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "arena_map.h"
#include "dcp_limits.h"

enum {
    /* Of large arenas: what huge pages and small changes of a save need. */
    STEP_BYTES = 2 << 20,
    /* Between two looks at `cancel`: 60 ms of fresh 4 KiB pages. */
    POPULATE_BYTES = 64 << 20,
    /* The count: pages above, the process below; Linux numbers processes below 2^22. */
    PID_BITS = 23,
    COUNT_PAGE_BYTES = 4096,
};

/* Of one arena; the count has room for eight of them.  No machine has that much. */
#define MOST_BYTES (UINT64_C(1) << 50)

static _Atomic(struct dcp_arena *) kept[DCP_MAX_ARENAS];
static _Atomic uint64_t counted;

static bool
is_ours(const struct dcp_arena *arena)
{
    return arena->pid == (int64_t)getpid();
}

/* ---- how much ---- */

static uint64_t
pages_in(uint64_t count)
{
    uint64_t pid = count & ((UINT64_C(1) << PID_BITS) - 1);
    return pid == (uint64_t)getpid() ? count >> PID_BITS : 0; /* the parent's means nothing */
}

static uint64_t
count_of(uint64_t pages)
{
    return pages << PID_BITS | (uint64_t)getpid();
}

uint64_t
dcp_arena_total_bytes(void)
{
    return pages_in(atomic_load(&counted)) * COUNT_PAGE_BYTES;
}

static void
uncount(uint64_t bytes)
{
    uint64_t old = atomic_load(&counted), pages;
    do {
        pages = pages_in(old);
        DCP_ASSERT(pages >= bytes / COUNT_PAGE_BYTES);
    } while (
        !atomic_compare_exchange_weak(&counted, &old, count_of(pages - bytes / COUNT_PAGE_BYTES)));
}

/* Counts bytes before they are mapped, so that two who ask at a time can't both be below the cap.
 */
static int
count(uint64_t bytes, uint64_t cap_bytes, struct dcp_error *err)
{
    uint64_t old = atomic_load(&counted), pages;
    do {
        pages = pages_in(old);
        uint64_t total = pages * COUNT_PAGE_BYTES;
        if (cap_bytes != 0 && (total > cap_bytes || bytes > cap_bytes - total)) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "staging needs %llu bytes besides the %llu that it has, more than "
                                 "the limit of %llu bytes; raise it, or save less at once",
                                 (unsigned long long)bytes, (unsigned long long)total,
                                 (unsigned long long)cap_bytes);
        }
    } while (
        !atomic_compare_exchange_weak(&counted, &old, count_of(pages + bytes / COUNT_PAGE_BYTES)));
    return 0;
}

/* Asks whether `bytes` more may be taken. */
static int
ask_spare(uint64_t bytes, const struct dcp_arena_limits *limits, struct dcp_error *err)
{
    char name[128];
    uint64_t sharers = dcp_max_u64(limits->sharers, 1);
    if (limits->io == NULL) {
        return 0;
    }
    uint64_t spare = dcp_memory_spare_bytes(limits->io, name);
    uint64_t allowed = spare / 100 * DCP_ARENA_SPARE_PERCENT +
                       spare % 100 * DCP_ARENA_SPARE_PERCENT / 100; /* no product overflows */
    if (spare == UINT64_MAX || bytes <= allowed / sharers) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                         "staging needs %llu bytes more; %s can spare %llu, of which %d percent "
                         "are for the %llu ranks of this host; free memory or raise that limit",
                         (unsigned long long)bytes, name, (unsigned long long)spare,
                         DCP_ARENA_SPARE_PERCENT, (unsigned long long)sharers);
}

/* Reserves `bytes` more, or says why not. */
static int
reserve(uint64_t bytes, const struct dcp_arena_limits *limits, struct dcp_error *err)
{
    int rc = limits != NULL ? ask_spare(bytes, limits, err) : 0;
    return rc == 0 ? count(bytes, limits != NULL ? limits->cap_bytes : 0, err) : rc;
}

/* Of the mapping for `bytes`; 0 when that is no size. */
static uint64_t
mapping_bytes(uint64_t bytes)
{
    uint64_t step = bytes >= STEP_BYTES
                        ? (uint64_t)STEP_BYTES
                        : dcp_max_u64((uint64_t)sysconf(_SC_PAGESIZE), DCP_DIRECT_ALIGN_BYTES);
    return bytes > MOST_BYTES ? 0 : dcp_align_up(dcp_max_u64(bytes, 1), step);
}

/* ---- one arena ---- */

/* Before its memory goes: what a device may write to must be there. */
static void
unpin(struct dcp_arena *arena)
{
    if (arena->pinned_by != NULL) {
        arena->pinned_by->unpin(arena->pinned_by->ctx, arena->memory);
    }
    arena->pinned_by = NULL;
    arena->pinned_bytes = 0;
}

static void
destroy(struct dcp_arena *arena)
{
    if (arena == NULL) {
        return;
    }
    if (is_ours(arena)) {
        unpin(arena);
        dcp_arena_unmap(arena);
        uncount(arena->bytes);
    }
    dcp_free(arena);
}

static int
create(enum dcp_arena_kind kind, uint64_t bytes, const struct dcp_arena_limits *limits,
       struct dcp_arena **ret_arena, struct dcp_error *err)
{
    struct dcp_arena *arena = dcp_calloc(1, sizeof *arena);
    if (arena == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a staging arena");
    }
    *arena = (struct dcp_arena){.bytes = bytes, .fd = -1, .kind = kind, .pid = (int64_t)getpid()};
    int rc = reserve(bytes, limits, err);
    if (rc != 0) {
        dcp_free(arena);
        return rc;
    }
    rc = dcp_arena_map(arena, err);
    if (rc != 0) {
        uncount(bytes);
        dcp_free(arena);
        return rc;
    }
    *ret_arena = arena;
    return 0;
}

static int
grow(struct dcp_arena *arena, uint64_t bytes, const struct dcp_arena_limits *limits,
     struct dcp_error *err)
{
    uint64_t old_bytes = arena->bytes;
    int rc = reserve(bytes - old_bytes, limits, err);
    if (rc != 0) {
        return rc;
    }
    rc = dcp_arena_map_grow(arena, bytes, err);
    if (rc != 0) {
        uncount(bytes - old_bytes);
        return rc;
    }
    arena->pin_refusal[0] = '\0'; /* it is asked for once more */
    return 0;
}

/* ---- those that are kept ---- */

/* Takes the kept arena that serves best: the smallest of those that are large enough, else the
 * largest.  Others go back to their slots. */
static struct dcp_arena *
take_kept(enum dcp_arena_kind kind, uint64_t bytes)
{
    struct dcp_arena *best = NULL;
    for (int i = 0; i < DCP_MAX_ARENAS; i++) {
        struct dcp_arena *arena = atomic_exchange(&kept[i], NULL);
        if (arena == NULL) {
            continue;
        }
        if (!is_ours(arena)) {
            destroy(arena);
            continue;
        }
        bool enough = arena->bytes >= bytes;
        if (arena->kind == kind &&
            (best == NULL || (enough ? best->bytes < bytes || arena->bytes < best->bytes
                                     : arena->bytes > best->bytes))) {
            struct dcp_arena *worse = best;
            best = arena;
            arena = worse;
        }
        dcp_arena_release(arena);
    }
    return best;
}

void
dcp_arena_release(struct dcp_arena *arena)
{
    if (arena != NULL && !is_ours(arena)) {
        destroy(arena);
        return;
    }
    /* Carried from slot to slot: a free one ends it, a smaller arena is carried on instead. */
    for (int i = 0; arena != NULL && i < DCP_MAX_ARENAS; i++) {
        uint64_t bytes = arena->bytes; /* from the exchange on it may be another's, or be freed */
        struct dcp_arena *other = atomic_exchange(&kept[i], arena);
        if (other != NULL && is_ours(other) && other->bytes > bytes) {
            other = atomic_exchange(&kept[i], other);
        }
        if (other != NULL && !is_ours(other)) {
            destroy(other);
            other = NULL;
        }
        arena = other;
    }
    destroy(arena);
}

void
dcp_arena_trim(void)
{
    for (int i = 0; i < DCP_MAX_ARENAS; i++) {
        destroy(atomic_exchange(&kept[i], NULL));
    }
}

static int
grow_or_create(enum dcp_arena_kind kind, uint64_t bytes, const struct dcp_arena_limits *limits,
               struct dcp_arena **arena, struct dcp_error *err)
{
    if (*arena != NULL && bytes <= (*arena)->room_bytes) {
        return grow(*arena, bytes, limits, err);
    }
    destroy(*arena);
    *arena = NULL;
    return create(kind, bytes, limits, arena, err);
}

int
dcp_arena_acquire(enum dcp_arena_kind kind, uint64_t bytes, const struct dcp_arena_limits *limits,
                  struct dcp_arena **ret_arena, struct dcp_error *err)
{
    uint64_t need = mapping_bytes(bytes);
    struct dcp_error refusal;
    if (need == 0) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "staging needs %llu bytes, more than any machine has",
                             (unsigned long long)bytes);
    }
    struct dcp_arena *arena = take_kept(kind, need);
    if (arena != NULL && arena->bytes >= need) {
        *ret_arena = arena;
        return 0;
    }
    dcp_error_clear(&refusal);
    int rc = grow_or_create(kind, need, limits, &arena, &refusal);
    if (rc == DCP_E_LIMIT || rc == DCP_E_NOMEM) {
        /* What others have kept serves nobody now. */
        dcp_arena_trim();
        dcp_error_clear(&refusal);
        rc = grow_or_create(kind, need, limits, &arena, &refusal);
    }
    if (rc != 0) {
        dcp_arena_release(arena);
        if (err != NULL && err->code == 0) {
            *err = refusal;
        }
        return rc;
    }
    *ret_arena = arena;
    return 0;
}

int
dcp_arena_populate(struct dcp_arena *arena, uint64_t bytes, atomic_int *cancel,
                   struct dcp_error *err)
{
    uint64_t end = mapping_bytes(bytes);
    if (!is_ours(arena) || end == 0 || end > arena->bytes) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "%llu bytes of a staging arena of %llu were to be touched, by process "
                             "%lld for process %lld",
                             (unsigned long long)bytes, (unsigned long long)arena->bytes,
                             (long long)getpid(), (long long)arena->pid);
    }
    while (arena->touched_bytes < end) {
        uint64_t step = dcp_min_u64(end - arena->touched_bytes, POPULATE_BYTES);
        if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
            return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL,
                                 "touching staging memory was cancelled");
        }
        int rc = dcp_memory_populate(arena->memory + arena->touched_bytes, step);
        if (rc == 0) {
            arena->touched_bytes += step;
        } else if (rc != -EINTR && rc != -EAGAIN) {
            return dcp_error_set(err, DCP_E_NOMEM, -rc, NULL,
                                 "touching %llu bytes of staging memory failed: %s; free memory, "
                                 "or save less at once",
                                 (unsigned long long)end, strerror(-rc));
        }
    }
    return 0;
}

int
dcp_arena_pin(struct dcp_arena *arena, const struct dcp_device *device, uint64_t bytes,
              struct dcp_error *err)
{
    uint64_t want = dcp_max_u64(mapping_bytes(bytes), arena->touched_bytes);
    struct dcp_error refusal;
    if (!is_ours(arena) || mapping_bytes(bytes) == 0 || want > arena->bytes) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "%llu bytes of a staging arena of %llu were to be pinned, by process "
                             "%lld for process %lld",
                             (unsigned long long)bytes, (unsigned long long)arena->bytes,
                             (long long)getpid(), (long long)arena->pid);
    }
    if (want <= arena->pinned_bytes) {
        return 0;
    }
    if (arena->pin_refusal[0] != '\0') {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "%s", arena->pin_refusal);
    }
    dcp_error_clear(&refusal);
    int rc = device->pin(device->ctx, arena->memory, want, &refusal);
    if (rc != 0) { /* what could not grow may be pinned as far as it was */
        unpin(arena);
    }
    arena->pinned_by = rc == 0 ? device : NULL;
    arena->pinned_bytes = rc == 0 ? want : 0;
    if (rc != 0) {
        (void)snprintf(arena->pin_refusal, sizeof arena->pin_refusal, "%.*s",
                       DCP_DEVICE_REASON_BYTES - 1, refusal.message);
        if (err != NULL && err->code == 0) {
            *err = refusal;
        }
    }
    return rc;
}

/*
 * trace.c: events between the threads that record them and the one that takes them.
 *
 * One bounded queue for the whole process, of slots with turns (after Dmitry Vyukov's bounded MPMC
 * queue): a recording thread claims the next place by one compare-and-swap and publishes its slot
 * by one store.  No lock, no allocation, no registration of threads, and nothing is left behind by
 * a thread that ends.  Events come a few per request of megabytes, so the threads rarely meet.  The
 * slots are zero pages until they are used.
 *
 * Invariants: in lap n the turn of a slot is 2n when it is empty and 2n + 1 when it is filled.  A
 * full queue drops what comes; it never waits.  A thread that is stopped between claim and
 * publication holds back what was recorded after it, until the next taking.
 * Threads: recording by any; taking and forgetting by one at a time.
 */
#include "trace.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

atomic_bool dcp_trace_is_on;

static struct dcp_trace_slot slots[DCP_TRACE_EVENTS];
static _Atomic uint64_t claimed_count, dropped_count;
static uint64_t taken_count; /* of the taking thread */
static _Thread_local uint32_t acts_for, own_number;

void
dcp_trace_switch(bool on)
{
    atomic_store(&dcp_trace_is_on, on);
}

uint64_t
dcp_trace_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t
dcp_trace_dropped(void)
{
    return atomic_load(&dropped_count);
}

void
dcp_trace_act_for(uint32_t thread)
{
    acts_for = thread;
}

/* Asked of the kernel once per thread: every event has it. */
static uint32_t
this_thread(void)
{
    if (own_number == 0) {
        own_number = (uint32_t)gettid();
    }
    return own_number;
}

uint32_t
dcp_trace_this_thread(void)
{
    return dcp_trace_on() ? this_thread() : 0;
}

/* Only what can stand in a JSON string as it is; the last part of a path. */
static void
copy_name(char *to, const char *path)
{
    const char *slash = path == NULL ? NULL : strrchr(path, '/');
    const char *from = path == NULL ? "" : slash != NULL ? slash + 1 : path;
    size_t i = 0;

    for (; i + 1 < DCP_TRACE_FILE_BYTES && from[i] != '\0'; i++) {
        bool plain = from[i] >= ' ' && from[i] <= '~' && from[i] != '"' && from[i] != '\\';
        to[i] = plain ? from[i] : '_';
    }
    to[i] = '\0';
}

void
dcp_trace_record(const struct dcp_trace_event *event)
{
    dcp_trace_record_of(event, acts_for != 0 ? acts_for : this_thread());
}

void
dcp_trace_record_of(const struct dcp_trace_event *event, uint32_t thread)
{
    uint64_t place = atomic_load_explicit(&claimed_count, memory_order_relaxed);

    for (;;) {
        struct dcp_trace_slot *slot = &slots[place % DCP_TRACE_EVENTS];
        uint64_t empty = 2 * (place / DCP_TRACE_EVENTS);
        uint64_t turn = atomic_load_explicit(&slot->turn, memory_order_acquire);

        if (turn == empty) {
            if (atomic_compare_exchange_weak_explicit(&claimed_count, &place, place + 1,
                                                      memory_order_relaxed, memory_order_relaxed)) {
                slot->event = *event;
                slot->thread = thread;
                copy_name(slot->file, event->file);
                atomic_store_explicit(&slot->turn, empty + 1, memory_order_release);
                return;
            }
        } else if (turn < empty) { /* still that of the lap before */
            atomic_fetch_add_explicit(&dropped_count, 1, memory_order_relaxed);
            return;
        } else {
            place = atomic_load_explicit(&claimed_count, memory_order_relaxed);
        }
    }
}

const struct dcp_trace_slot *
dcp_trace_next(void)
{
    const struct dcp_trace_slot *slot = &slots[taken_count % DCP_TRACE_EVENTS];
    uint64_t filled = 2 * (taken_count / DCP_TRACE_EVENTS) + 1;

    return atomic_load_explicit(&slot->turn, memory_order_acquire) == filled ? slot : NULL;
}

void
dcp_trace_release(void)
{
    struct dcp_trace_slot *slot = &slots[taken_count % DCP_TRACE_EVENTS];
    uint64_t next_empty = 2 * (taken_count / DCP_TRACE_EVENTS) + 2;

    taken_count++;
    atomic_store_explicit(&slot->turn, next_empty, memory_order_release);
}

uint64_t
dcp_trace_taken(void)
{
    return taken_count;
}

void
dcp_trace_forget(void)
{
    own_number = 0;
    dcp_trace_forget_names();
    while (taken_count < atomic_load(&claimed_count)) {
        dcp_trace_release();
    }
}

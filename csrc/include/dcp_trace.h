/*
 * dcp_trace.h: what a save or load did when, as events that a viewer draws (Perfetto, Chrome).
 *
 * An event is a span of time on a thread: a phase, a request, a wait, an agreement.  It is recorded
 * when it has ended, so none is ever open.  Where nothing is recorded a span costs one branch that
 * is always taken the same way, and no clock is read.
 *
 * A writer process records into a queue of its own and sends it with its answer.
 *
 * Thread rule: anything may be recorded by any thread at any time; one thread at a time takes.
 */
#ifndef DCP_TRACE_H
#define DCP_TRACE_H

#include <stdatomic.h>

#include "dcp_alloc.h"

enum {
    DCP_TRACE_EVENTS = 1 << 16,      /* recorded and not taken; what comes then is dropped */
    DCP_TRACE_TAKE_EVENTS = 1 << 10, /* at most, in one taking: about a millisecond */
    DCP_TRACE_FILE_BYTES = 40,       /* of a file's name, its end included; longer ones are cut */
};

struct dcp_trace_event {
    const char *category;      /* static: "phase", "io", "cpu", "wait", "agree", "thread" */
    const char *name;          /* static; of category "thread": what the recording thread does */
    uint64_t begin_ns, end_ns; /* CLOCK_MONOTONIC */
    const char *file;          /* that it is about; NULL: none.  Copied */
    uint64_t offset_bytes;     /* in the file */
    uint64_t bytes;            /* that were moved; 0: that is not what it does */
    bool beside; /* the kernel did it beside the thread, maybe with others of its kind */
};

extern atomic_bool dcp_trace_is_on;

/* From now on events are recorded, or no more; what was recorded stays until it is taken. */
void dcp_trace_switch(bool on);
/* Monotonic nanoseconds. */
uint64_t dcp_trace_now_ns(void);
void dcp_trace_record(const struct dcp_trace_event *event);
/* Appends the oldest DCP_TRACE_TAKE_EVENTS that were recorded, or all, as lines ",\n{...}" of JSON
 * in the trace event format: times in microseconds since `base_ns`, of the process `pid`.
 * *ret_count: how many events; 0 when none is left. */
int dcp_trace_take(struct dcp_buf *buf, uint64_t base_ns, uint32_t pid, uint64_t *ret_count,
                   struct dcp_error *err) DCP_MUST_CHECK;
/* What the calling thread records from now on counts as done by `thread`, which waits for it and
 * does nothing meanwhile; 0: by itself. */
void dcp_trace_act_for(uint32_t thread);
/* The number of the calling thread; 0 when nothing is recorded. */
uint32_t dcp_trace_this_thread(void);
/* Forgets what was recorded.  Of a forked child alone, before it has threads: its copy of the
 * parent's events, of which some may never be finished. */
void dcp_trace_forget(void);
/* Events that found no room, since the process began. */
uint64_t dcp_trace_dropped(void);

static inline bool
dcp_trace_on(void)
{
    return __builtin_expect(atomic_load_explicit(&dcp_trace_is_on, memory_order_relaxed), 0);
}

/* When a span begins; 0 when nothing is recorded, and then it has no end. */
static inline uint64_t
dcp_trace_begin(void)
{
    return dcp_trace_on() ? dcp_trace_now_ns() : 0;
}

/* The same of a span whose begin is known anyhow. */
static inline uint64_t
dcp_trace_from(uint64_t begin_ns)
{
    return dcp_trace_on() ? begin_ns : 0;
}

static inline void
dcp_trace_end(uint64_t begin_ns, const char *category, const char *name, uint64_t bytes)
{
    if (__builtin_expect(begin_ns != 0, 0)) {
        const struct dcp_trace_event event = {.category = category,
                                              .name = name,
                                              .begin_ns = begin_ns,
                                              .end_ns = dcp_trace_now_ns(),
                                              .bytes = bytes};
        dcp_trace_record(&event);
    }
}

/* Bytes of a file that were asked for, or brought, by this thread. */
static inline void
dcp_trace_end_io(uint64_t begin_ns, const char *name, const char *file, uint64_t offset_bytes,
                 uint64_t bytes)
{
    if (__builtin_expect(begin_ns != 0, 0)) {
        const struct dcp_trace_event event = {.category = "io",
                                              .name = name,
                                              .begin_ns = begin_ns,
                                              .end_ns = dcp_trace_now_ns(),
                                              .file = file,
                                              .offset_bytes = offset_bytes,
                                              .bytes = bytes};
        dcp_trace_record(&event);
    }
}

/* A thread says what it is there for, first of all. */
static inline void
dcp_trace_thread(const char *name)
{
    dcp_trace_end(dcp_trace_begin(), "thread", name, 0);
}

#endif

/*
 * trace.h: private: what the parts of the trace share: the queue (trace.c), its events as lines of
 * JSON (trace_lines.c), and as they are sent from a writer process to its trainer (trace_pack.c).
 */
#ifndef TRACE_H
#define TRACE_H

#include "dcp_trace.h"

struct dcp_trace_slot {
    _Atomic uint64_t turn;
    struct dcp_trace_event event; /* its file: `file` */
    uint32_t thread;
    char file[DCP_TRACE_FILE_BYTES];
};

enum {
    DCP_TRACE_NAME_BYTES = 40, /* of a category or name that comes from outside, its end included */
    /* Of one event when it is packed. */
    DCP_TRACE_PACKED_BYTES = 3 + 2 * DCP_TRACE_NAME_BYTES + DCP_TRACE_FILE_BYTES + 1 + 4 + 4 * 8,
    DCP_TRACE_PACK_MOST_BYTES = 8 + DCP_TRACE_TAKE_EVENTS * DCP_TRACE_PACKED_BYTES,
};

/* As dcp_trace_record, of another thread. */
void dcp_trace_record_of(const struct dcp_trace_event *event, uint32_t thread);
/* The oldest event that was recorded, or NULL; dcp_trace_release makes room for another.  Of the
 * taking thread. */
const struct dcp_trace_slot *dcp_trace_next(void);
void dcp_trace_release(void);
/* How many have been taken before: the number of the oldest. */
uint64_t dcp_trace_taken(void);

/* Appends the oldest DCP_TRACE_TAKE_EVENTS, or all, as bytes for another process of this build.
 * Returns how many; 0 when none is left.  Of the taking thread. */
uint32_t dcp_trace_pack(struct dcp_buf *buf);
/* Records, where anything is recorded, what another process packed.  False: that is not what it
 * is; some of it may be recorded.  By any thread. */
bool dcp_trace_unpack(struct dcp_span packed);
/* Part of dcp_trace_forget. */
void dcp_trace_forget_names(void);

#endif

/*
 * fake_work.h: one piece of work of a stream of the fake GPU, between fake_gpu.c, which orders and
 * runs it, and fake_copy.c, which decides what a copy is.
 */
#ifndef DCP_FAKE_WORK_H
#define DCP_FAKE_WORK_H

#include "fake_gpu.h"

enum fake_work_kind { WORK_COPY, WORK_FILL, WORK_CALL, WORK_WAIT };

struct fake_work {
    struct fake_work *next;
    enum fake_work_kind kind;
    void *dst;
    const void *src;
    uint64_t bytes;
    int value;
    struct fake_stream *on; /* WORK_WAIT: until it has done `serial` pieces */
    uint64_t serial;
    void (*fn)(void *data);
    void *owned; /* a copy of the source or of the argument */
};

/* Takes `work->owned`.  What a capturing stream is given goes to a graph, and does not run. */
int fake_put(struct fake_stream *stream, const struct fake_work *work);
/* Whether work that has not run may read from there. */
bool fake_is_read_later(const uint8_t *memory, uint64_t bytes);

#endif

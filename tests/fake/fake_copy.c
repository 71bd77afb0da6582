/*
 * fake_copy.c: what a copy, a fill and a call on a stream of the fake GPU are (fake_gpu.h).
 *
 * As the real runtime has it: memory of the host that is not pinned is read before the call
 * returns, and filled before it returns; pinned memory is read and filled when its turn comes.
 */
#include <stdlib.h>
#include <string.h>

#include "fake_work.h"

int
fake_call(struct fake_stream *stream, void (*fn)(void *data), const void *data, uint64_t bytes)
{
    struct fake_work work = {.kind = WORK_CALL, .fn = fn, .owned = malloc(bytes + 1)};

    if (work.owned == NULL) {
        return FAKE_NO_MEMORY;
    }
    if (bytes > 0) {
        memcpy(work.owned, data, bytes);
    }
    return fake_put(stream, &work);
}

int
fake_fill(void *dst, int value, uint64_t bytes, struct fake_stream *stream)
{
    struct fake_work work = {.kind = WORK_FILL, .dst = dst, .value = value, .bytes = bytes};

    return fake_put(stream, &work);
}

/* Does a copy start in registered memory and leave it?  The real runtime refuses that. */
static bool
leaves_range(const struct fake_range *range, const void *address, uint64_t bytes)
{
    return range->kind != FAKE_MEMORY_UNKNOWN &&
           (uintptr_t)address + bytes > range->start + range->bytes;
}

int
fake_copy(void *dst, const void *src, uint64_t bytes, struct fake_stream *stream)
{
    struct fake_work work = {.kind = WORK_COPY, .dst = dst, .src = src, .bytes = bytes};
    struct fake_range to = {0}, from = {0};
    bool to_host, from_host;
    int code;

    (void)fake_range_of(dst, &to);
    (void)fake_range_of(src, &from);
    if (leaves_range(&to, dst, bytes) || leaves_range(&from, src, bytes)) {
        return FAKE_INVALID_VALUE;
    }
    to_host = to.kind != FAKE_MEMORY_DEVICE;
    from_host = from.kind != FAKE_MEMORY_DEVICE;
    if (to_host && !from_host) {
        fake_count("copies_to_host", 1);
        fake_count("copied_to_host_bytes", bytes);
    } else if (from_host && !to_host) {
        fake_count("copies_to_device", 1);
        fake_count("copied_to_device_bytes", bytes);
    }
    if (from.kind == FAKE_MEMORY_UNKNOWN && bytes > 0) { /* read before the call returns */
        work.owned = malloc(bytes);
        if (work.owned == NULL) {
            return FAKE_NO_MEMORY;
        }
        memcpy(work.owned, src, bytes);
        work.src = work.owned;
    }
    if (to.kind == FAKE_MEMORY_PINNED && !fake_stream_capture(stream, -1) &&
        !fake_is_read_later(dst, bytes)) {
        memset(dst, DCP_FAKE_POISON, bytes);
    }
    code = fake_put(stream, &work);
    if (code == FAKE_OK && to.kind == FAKE_MEMORY_UNKNOWN && !fake_stream_capture(stream, -1)) {
        code = fake_stream_wait(stream);
    }
    return code;
}

/*
 * convert.c: conversion of elements: the choice of loops, and the way over a third type.
 *
 * Every type is read as float64, float32 or int64, whichever holds all of its values, and every
 * type is written from each of them: 34 loops in place of 90.  The casts that matter (between
 * float32 and the others) are one loop; the rest pass through a buffer that stays in the cache.
 *
 * Threads: the choice is made once, under pthread_once; then pure functions.
 */
#include "dcp_convert.h"

#include <pthread.h>

#include "convert_impl.h"

#define CONVERT_TARGET
#define CONVERT_TABLE convert_portable
#define CONVERT_LINKAGE
#include "convert_loops.h"

/* Elements of the buffer on the way: 8 KiB, a quarter of the smallest L1 cache. */
enum { ON_THE_WAY = 1024 };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const struct convert_impl *chosen = &convert_portable;

static void
choose(void)
{
    const struct convert_impl *x86 = convert_x86_implementation();
    if (x86 != NULL) {
        chosen = x86;
    }
}

/* CONVERT_VIAS: no type of ours. */
static enum convert_via
via_of(int dtype)
{
    switch (dtype) {
    case DCP_DTYPE_FLOAT64:
        return CONVERT_VIA_F64;
    case DCP_DTYPE_FLOAT32:
    case DCP_DTYPE_FLOAT16:
    case DCP_DTYPE_BFLOAT16:
        return CONVERT_VIA_F32;
    case DCP_DTYPE_INT8:
    case DCP_DTYPE_INT16:
    case DCP_DTYPE_INT32:
    case DCP_DTYPE_INT64:
    case DCP_DTYPE_UINT8:
    case DCP_DTYPE_BOOL:
        return CONVERT_VIA_I64;
    default:
        return CONVERT_VIAS;
    }
}

bool
dcp_can_convert(int from, int to)
{
    return from != to && via_of(from) != CONVERT_VIAS && via_of(to) != CONVERT_VIAS;
}

void
dcp_convert(uint8_t *dst, int to, const uint8_t *src, int from, uint64_t count)
{
    static const uint8_t via_bytes[CONVERT_VIAS] = {
        [CONVERT_VIA_F64] = 8, [CONVERT_VIA_F32] = 4, [CONVERT_VIA_I64] = 8};
    DCP_ASSERT(dcp_can_convert(from, to));
    pthread_once(&once, choose);
    enum convert_via via = via_of(from);
    convert_fn load = chosen->load[from], store = chosen->store[via][to];
    if (load == NULL || store == NULL) {
        (load != NULL ? load : store)(dst, src, count);
        return;
    }
    uint64_t on_the_way[ON_THE_WAY];
    uint64_t step = sizeof on_the_way / via_bytes[via];
    uint32_t from_bytes = dcp_dtype_bytes(from), to_bytes = dcp_dtype_bytes(to);
    for (uint64_t done = 0; done < count; done += step) {
        uint64_t n = dcp_min_u64(step, count - done);
        load((uint8_t *)on_the_way, src + done * from_bytes, n);
        store(dst + done * to_bytes, (const uint8_t *)on_the_way, n);
    }
}

/*
 * convert_x86.c: the loops of all conversions for AVX2.
 *
 * The same text as the portable loops; the compiler makes vectors of 256 bits of it, which is
 * enough to be bound by memory for the casts between float32, float16 and bfloat16.
 *
 * Threads: no state.
 */
#include "convert_impl.h"

#if defined(__x86_64__)

#define CONVERT_TARGET __attribute__((target("avx2")))
#define CONVERT_TABLE avx2_loops
#define CONVERT_LINKAGE static
#include "convert_loops.h"

const struct convert_impl *
convert_x86_implementation(void)
{
    return __builtin_cpu_supports("avx2") ? &avx2_loops : NULL;
}

#else

const struct convert_impl *
convert_x86_implementation(void)
{
    return NULL;
}

#endif

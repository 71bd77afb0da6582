/*
 * dcp_convert.h: elements of one type as elements of another, by the rules of torch's copy_.
 *
 * Among float64, float32, float16, bfloat16, int8 to int64, uint8 and bool.  Floats are rounded to
 * the nearest, ties to even; float16 and bfloat16 are reached through float32, as in torch, also
 * from float64 and int64.  What is not zero is true, NaN too.  Integers wrap.  A float whose whole
 * part the integer cannot hold is undefined in C and in torch: here it becomes what x86 makes of
 * it, as with torch's CPU kernels there (the low bits of the most negative int32, for int64 and
 * uint8 of int64).  A NaN stays a NaN; its other bits are not promised (torch's vary with the
 * memory's layout).
 */
#ifndef DCP_CONVERT_H
#define DCP_CONVERT_H

#include "dcp_dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Whether elements of type `from` can be written as another type `to` (enum dcp_dtype). */
bool dcp_can_convert(int from, int to);
/* Converts `count` elements; no alignment is asked for, the memory must not overlap.  Pure. */
void dcp_convert(uint8_t *dst, int to, const uint8_t *src, int from, uint64_t count);

#ifdef __cplusplus
}
#endif
#endif

/*
 * box.h: private: a strided copy cut to a range of the box's row-major image.
 *
 * The reader needs what the border does not offer: both sides strided, the source given as a buffer
 * that holds only a part of the chunk.  Positions are therefore offsets from a base, and only those
 * of elements in the range are ever turned into addresses.
 */
#ifndef DCP_BOX_H
#define DCP_BOX_H

#include "dcp_common.h"
#include "dcp_limits.h"

struct dcp_box_side {
    int64_t origin_bytes; /* of element 0 from the base pointer; may lie outside the buffer */
    const int64_t *strides_bytes; /* ndim of them */
};

/* Copies elements [from, from + count) of the row-major image of the box `lengths`. */
void dcp_box_copy_range(uint8_t *dst, const struct dcp_box_side *dst_side, const uint8_t *src,
                        const struct dcp_box_side *src_side, uint32_t ndim, const uint64_t *lengths,
                        uint32_t item_bytes, uint64_t from, uint64_t count);

/* Row-major strides of a box, in bytes. */
void dcp_box_row_major(uint32_t ndim, const uint64_t *sizes, uint32_t item_bytes,
                       int64_t *ret_strides_bytes);
/* Whether strides are those of row-major memory (dims of size 1 do not count). */
bool dcp_box_is_row_major(uint32_t ndim, const uint64_t *sizes, uint32_t item_bytes,
                          const int64_t *strides_bytes);

/* box_transpose.c: dst is dense along `na`, src along `nb`: dst[b][a] = src[a][b].  item_bytes is
 * 1, 2, 4, 8 or 16. */
void dcp_box_transpose(uint8_t *dst, int64_t dst_pitch, const uint8_t *src, int64_t src_pitch,
                       uint64_t na, uint64_t nb, uint32_t item_bytes);

#endif

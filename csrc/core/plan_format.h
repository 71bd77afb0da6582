/*
 * plan_format.h: a plan as bytes, small enough that gathering thousands of them is cheap (private
 * to the core; plan_encode.c and plan_decode.c).
 *
 * State dicts repeat themselves: a name shares its head with the one before it, its path is the
 * name cut at dots, items come in the order of names, most boxes are the whole tensor or differ
 * from it in one dimension.  An image says only what is new: about 30 bytes for an FSDP item with
 * its name, where torch's pickle takes 220.  Of the 30, the name takes 20; a gather leaves the
 * names out where the coordinator has them already (save_gather.c).
 *
 *     head of HEAD_BYTES, little endian:
 *         "DCPP" version flags u32 rank, thread_count, names_count, items_count
 *         u64 bytes of the names, u64 0; or, with FLAG_NAMELESS, the 128-bit hash of the names
 *     names, unless FLAG_NAMELESS
 *     items
 *
 * name: varint(bytes shared with the name before), varint(bytes that follow), bytes, path mode
 *     0 no path; 1 cut: varint(parts), then varint(bytes of the part << 1 | is a list index) each;
 *     2 raw: varint(parts), varint(length), bytes.
 * item: head byte (enum head_bits), [varint(name)], [dtype, props, ndim], [global size],
 *     [varint(slot_bytes)], box: nothing | dim, offset, size | all offsets, all sizes.
 */
#ifndef DCP_CORE_PLAN_FORMAT_H
#define DCP_CORE_PLAN_FORMAT_H

#include "plan_private.h"

#define DCP_PLAN_MAGIC "DCPP"

enum {
    MAGIC_BYTES = 4,
    VERSION = 2,
    HEAD_BYTES = MAGIC_BYTES + 2 + 4 * 4 + 2 * 8,
    NAME_MIN_BYTES = 3,
    ITEM_MIN_BYTES = 1,
    /* Bytes that a name may take over from the one before. */
    SHARED_MAX = 255,
    /* Above this many dims an item always spells its global size. */
    SAME_SIZE_DIMS = 8,
};

enum flag_bits {
    FLAG_SINGLE_FILE = 1 << 0,
    FLAG_HAS_PATHS = 1 << 1,
    FLAG_CONTENT_HASH = 1 << 2,
    FLAG_PLANNED_OUTSIDE = 1 << 3,
    /* Counted from the top: what the image is like.  From the bottom: what the plan is like. */
    FLAG_NAMELESS = 1 << 7,
    FLAG_ALL = FLAG_SINGLE_FILE | FLAG_HAS_PATHS | FLAG_CONTENT_HASH | FLAG_PLANNED_OUTSIDE |
               FLAG_NAMELESS,
};

enum path_mode { PATH_NONE = 0, PATH_CUT = 1, PATH_RAW = 2 };

enum head_bits {
    HEAD_KIND = 3 << 0,
    HEAD_SAME_TYPE = 1 << 2, /* dtype, props and ndim of the tensor before */
    HEAD_SAME_SIZE = 1 << 3, /* its global size too */
    HEAD_BOX_SHIFT = 4,
    HEAD_BOX = 3 << HEAD_BOX_SHIFT, /* enum box_mode */
    HEAD_NEXT_NAME = 1 << 6,        /* the name behind the last item's */
    HEAD_SLOT = 1 << 7,             /* slot_bytes is not 0 */
};

enum box_mode { BOX_WHOLE = 0, BOX_ONE_DIM = 1, BOX_ALL_DIMS = 2 };

/* Digits of `number` without leading zeros, as str() gives them; returns how many. */
uint32_t dcp_plan_put_digits(char digits[static 20], uint64_t number);

/* True when the path can be read to its end and has the parts it claims. */
bool dcp_plan_path_is_sound(const uint8_t *path, size_t len, uint32_t parts);

#endif

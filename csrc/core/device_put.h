/*
 * device_put.h: private: what the files that fill targets on devices share.
 *
 * device_put.c takes pieces and says when all has arrived, device_put_aim.c decides in which order
 * the elements of a piece go and makes them dense, device_put_slot.c brings full slots to the
 * device, device_put_range.c has ranges of files read by the device itself.
 */
#ifndef DCP_DEVICE_PUT_H
#define DCP_DEVICE_PUT_H

#include "device.h"

/* Where pieces, and checksums, begin in a slot. */
#define DCP_PUT_ALIGN_BYTES 16u

struct dcp_put_slot {
    uint8_t *memory;
    const struct dcp_device *device;
    dcp_device_event *event; /* of the copies out of it; NULL: it is free */
};

/* What is kept of one device. */
struct dcp_put_lane {
    const struct dcp_device *device;
    struct dcp_device_slab slab;
};

struct dcp_device_put {
    const struct dcp_read_plan *plan; /* borrows */
    dcp_piece_fn host;
    void *host_ctx;
    const struct dcp_device_list *devices;
    atomic_int *cancel;
    struct dcp_put_lane *lanes; /* owned; one per device */
    struct dcp_ring *ring;
    struct dcp_put_slot slots[DCP_RING_MOST_BUFFERS];
    uint32_t slots_count, current; /* the slot that is being filled */
    struct dcp_put_lane *lane;     /* whose pieces are in it; NULL while it is empty */
    uint64_t used_bytes;           /* of the slot */
    /* A run of the slot that goes to a run of the target; 0 bytes: there is none. */
    uint64_t run_from_bytes, run_bytes, run_address;
    /* A range of the slot that is unpacked from the slab: what the boxes lie in. */
    uint64_t packed_from_bytes, packed_to_bytes;
    uint32_t boxes_count;
    struct dcp_device_box boxes[DCP_DEVICE_BOXES];
    int code; /* of the first failure */
    struct dcp_error error;
    struct dcp_device_stats stats;
    int64_t pid;  /* a forked child has no part in what its parent has on its devices */
    bool running; /* something was put on a stream and not waited for */
};

void dcp_put_fail(struct dcp_device_put *put, int code, const struct dcp_error *error);

/* ---- device_put_aim.c ---- */

/* Where the elements of a piece go, and in which order. */
struct dcp_put_aim {
    struct dcp_piece piece; /* its dims in that order */
    uint64_t lengths[DCP_MAX_DIMS];
    int64_t bytes_strides[DCP_MAX_DIMS], strides[DCP_MAX_DIMS];
    uint8_t from, to; /* dtypes */
    uint32_t from_bytes, to_bytes;
    struct dcp_device_form form; /* of the target's memory: by a kernel, or in runs */
};

/* Takes the slab of the lane if it is needed and not there. */
int dcp_put_aim_at(struct dcp_device_put *put, const struct dcp_piece *piece,
                   struct dcp_put_lane *lane, struct dcp_put_aim *ret_aim,
                   struct dcp_error *err) DCP_MUST_CHECK;
/* Elements [first, first + count), dense and of the target's dtype, to `to`. */
void dcp_put_make_dense(const struct dcp_put_aim *aim, uint64_t first, uint64_t count, uint8_t *to);

/* ---- device_put_slot.c ---- */

/* Elements that lie at `from_bytes` of the slot, run by run of the target. */
int dcp_put_runs(struct dcp_device_put *put, const struct dcp_put_aim *aim, uint64_t from_bytes,
                 uint64_t first, uint64_t count, struct dcp_error *err) DCP_MUST_CHECK;
/* The same by a kernel.  The slab has room, and the list of boxes. */
void dcp_put_box(struct dcp_device_put *put, const struct dcp_put_aim *aim, uint64_t from_bytes,
                 uint64_t first, uint64_t count);
/* Puts the boxes there are on the stream. */
int dcp_put_flush_boxes(struct dcp_device_put *put, struct dcp_error *err) DCP_MUST_CHECK;
/* All of the slot is on its way; goes on to the next one, once that is free. */
int dcp_put_end_slot(struct dcp_device_put *put, struct dcp_error *err) DCP_MUST_CHECK;

#endif

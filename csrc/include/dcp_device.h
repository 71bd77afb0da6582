/*
 * dcp_device.h: the table of one device whose memory the host cannot address: copies in stream
 * order, pinned memory, events, and kernels that gather and scatter strided boxes.
 *
 * A table is one device and one stream of ours on it, and a second one for checksums alone.
 * Everything that is put on the stream runs in order, and beside what the trainer's own streams do;
 * `follow` and `lead` are the only two points where they meet.  Checksums are in order among
 * themselves, run beside copies and kernels, and stand like those between `follow` and `lead`; an
 * event, and `wait_idle`, are behind both.  No call waits for the device but `wait_idle`, and none
 * synchronises more than our stream.  Addresses of device memory are uint64_t: the host never
 * follows them.
 *
 * A table is lent to one save or load at a time (dcp_cuda.h lends them) and never freed: memory
 * that was pinned through it may be unpinned long after. Thread rule: one thread at a time, any
 * thread; `pin` and `unpin` by any number of threads.
 */
#ifndef DCP_DEVICE_H
#define DCP_DEVICE_H

#include <stdatomic.h>

#include "dcp_common.h"
#include "dcp_error.h"
#include "dcp_limits.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DCP_DEVICE_REASON_BYTES = 160 };

/* What a kernel of the table moves: `count` elements of the row-major image of a strided box, from
 * element `first` on, to or from `packed` bytes of dense memory. */
struct dcp_device_box {
    uint64_t strided; /* device address of element 0 of the box */
    uint64_t packed;  /* device address of the first of the `count` elements, any alignment */
    uint64_t first, count;
    uint32_t item_bytes; /* 1, 2, 4, 8 or 16 */
    uint32_t ndim;       /* at most DCP_DEVICE_DIMS: dims that are one run are merged */
    uint64_t sizes[DCP_DEVICE_DIMS];
    int64_t strides_bytes[DCP_DEVICE_DIMS];
};

enum dcp_device_features {
    DCP_DEVICE_PACKS = 1 << 0,       /* pack, unpack */
    DCP_DEVICE_CHECKSUMS = 1 << 1,   /* checksum */
    DCP_DEVICE_READS_FILES = 1 << 2, /* read_file */
};

/* All work that was put on the table's streams before dcp_device.record. */
typedef struct dcp_device_event dcp_device_event;

struct dcp_device {
    void *ctx;
    const char *kind; /* "cuda", "simulated": for reports and messages */
    int32_t index;    /* of the device, as in "cuda:0" */
    uint32_t features;

    /* Our stream waits for what `stream`, one of the caller's, has been given so far; and the other
     * way round.  `stream` is the runtime's handle; NULL is its default stream.  DCP_E_UNSUPPORTED
     * while `stream` is capturing a graph. */
    int (*follow)(void *ctx, void *stream, struct dcp_error *err);
    int (*lead)(void *ctx, void *stream, struct dcp_error *err);

    /* Put on the stream.  `host` is pinned, or the call may block as long as the copy takes. */
    int (*to_host)(void *ctx, void *host, uint64_t device, uint64_t bytes, struct dcp_error *err);
    int (*to_device)(void *ctx, uint64_t device, const void *host, uint64_t bytes,
                     struct dcp_error *err);
    /* `rows` rows, dense at `host`; at `device` they begin `pitch_bytes` apart: row_bytes to
     * DCP_DEVICE_PITCH_BYTES. */
    int (*to_device_rows)(void *ctx, uint64_t device, uint64_t pitch_bytes, const void *host,
                          uint64_t row_bytes, uint64_t rows, struct dcp_error *err);
    /* With DCP_DEVICE_PACKS: strided -> packed, packed -> strided.  The list is copied before it
     * returns. */
    int (*pack)(void *ctx, const struct dcp_device_box *boxes, uint32_t count,
                struct dcp_error *err);
    int (*unpack)(void *ctx, const struct dcp_device_box *boxes, uint32_t count,
                  struct dcp_error *err);
    /* With DCP_DEVICE_CHECKSUMS: the CRC32 of every block of DCP_BLOCK_BYTES of [device, device +
     * bytes), the last one shorter, to `crcs`, pinned memory.  Not of what copies or kernels write
     * that were not waited for.  DCP_E_NOMEM is an answer: do without. */
    int (*checksum)(void *ctx, uint64_t device, uint64_t bytes, uint32_t *crcs,
                    struct dcp_error *err);
    /* With DCP_DEVICE_READS_FILES: from an open file straight to the device; returns when the bytes
     * are there.  DCP_E_UNSUPPORTED: not this file, or not now; read it the other way. */
    int (*read_file)(void *ctx, int fd, uint64_t offset_bytes, uint64_t device, uint64_t bytes,
                     struct dcp_error *err);

    /* Memory of the device.  DCP_E_NOMEM is an answer: do without. */
    int (*allocate)(void *ctx, uint64_t bytes, uint64_t *ret_device, struct dcp_error *err);
    void (*release)(void *ctx, uint64_t device); /* after what was put on the stream has run */

    /* Pins memory of the host for all devices of this kind, so that copies run beside everything
     * else.  Of memory that is pinned from the same address on it pins the rest; it is unpinned
     * once.  On failure none of it is pinned, which is not fatal to a copy, only to its speed. */
    int (*pin)(void *ctx, void *memory, uint64_t bytes, struct dcp_error *err);
    void (*unpin)(void *ctx, void *memory); /* of memory that is not pinned: nothing */

    /* An event behind all that was put on the stream so far. */
    int (*record)(void *ctx, dcp_device_event **ret_event, struct dcp_error *err);
    /* 1: it has happened; 0: not yet; negative: an error of the device, of anything before it. */
    int (*poll)(void *ctx, dcp_device_event *event, struct dcp_error *err);
    void (*forget)(void *ctx, dcp_device_event *event); /* NULL is fine */
    /* Waits until nothing of ours is on the stream any more, DCP_DEVICE_GRACE_NS at most: memory
     * that copies read or write may be freed after it.  On failure, which is DCP_E_TIMEOUT or the
     * device's, it may not. */
    int (*wait_idle)(void *ctx, struct dcp_error *err);
};

/* The devices of one save or load.  A source or target names its device by 1 + its index here; 0 is
 * memory of the host. */
struct dcp_device_list {
    struct dcp_device *const *items;
    uint32_t count;
};

/* What the devices of a save or load did, and why not more of it at their best. */
struct dcp_device_stats {
    uint64_t copied_bytes, copies_count;  /* over the bus, and in how many copies */
    uint64_t packed_bytes, packed_count;  /* of payload, and pieces, that kernels moved */
    uint64_t slab_bytes;                  /* of device memory, at most at a time */
    uint64_t wait_ns;                     /* the host waited for a device */
    char reason[DCP_DEVICE_REASON_BYTES]; /* the first thing that made it slower; "" */
};

/* Polls until the event has happened: DCP_E_CANCELLED when `cancel` (may be NULL) is set meanwhile,
 * DCP_E_TIMEOUT after DCP_DEVICE_TIMEOUT_NS without an end.  The copy may still run then. */
int dcp_device_wait(const struct dcp_device *device, dcp_device_event *event, atomic_int *cancel,
                    struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif

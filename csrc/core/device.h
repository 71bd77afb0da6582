/*
 * device.h: private: payloads that lie on devices, on their way to and from memory of the host.
 *
 * device_form.c decides how a payload is copied, device_bring.c puts copies to the host on a
 * device's stream, device_gather.c does what neither copies nor kernels can.  On these stand three
 * ways: device_stage.c brings all payloads of a save to their final places in an image at once,
 * device_stream.c brings them through a few pinned segments ahead of whoever takes them in order,
 * and device_put.c takes the pieces of a load to their targets.
 */
#ifndef DCP_CORE_DEVICE_H
#define DCP_CORE_DEVICE_H

#include "dcp_image.h"
#include "ring.h"

/* ---- device_form.c ---- */

/* One payload: the row-major image of a strided box. */
struct dcp_device_payload {
    const struct dcp_device *device;
    uint64_t address; /* of element 0 */
    uint64_t bytes;
    uint32_t item_bytes, ndim;
    const uint64_t *sizes;
    const int64_t *strides_bytes; /* NULL: row major */
};

enum dcp_device_way {
    DCP_DEVICE_RUNS = 1,   /* dense runs that are worth a copy each; of a row-major one all of it */
    DCP_DEVICE_PACK = 2,   /* by a kernel, through a slab of device memory */
    DCP_DEVICE_GATHER = 3, /* by the host, from the extent of its memory */
};

/* The same, with dims of one element left out and neighbours that are one run merged: at least one
 * dim. */
struct dcp_device_form {
    enum dcp_device_way way;
    uint64_t address, bytes;
    uint64_t run_bytes; /* of the longest dense run; `bytes` when it is all one run */
    uint32_t item_bytes, ndim;
    uint64_t sizes[DCP_MAX_DIMS];
    int64_t strides_bytes[DCP_MAX_DIMS];
};

/* `packs`: the device has kernels, and memory for what they make. */
void dcp_device_form_of(const struct dcp_device_payload *payload, bool packs,
                        struct dcp_device_form *ret);
/* The device address of dense run number `index`. */
uint64_t dcp_device_form_run(const struct dcp_device_form *form, uint64_t index);
/* Elements [first, first + count) for a kernel, dense at the device address `packed`. */
struct dcp_device_box dcp_device_form_box(const struct dcp_device_form *form, uint64_t packed,
                                          uint64_t first, uint64_t count);

/* Memory of a device that kernels pack into and unpack from, taken when it is first needed. */
struct dcp_device_slab {
    bool asked;       /* whether there is one */
    uint64_t address; /* valid with bytes > 0 */
    uint64_t bytes;   /* 0: there is none, and kernels are of no use */
};

/* At most `want_bytes`, less where that cannot be had. */
int dcp_device_slab_need(const struct dcp_device *device, uint64_t want_bytes,
                         struct dcp_device_slab *slab, struct dcp_device_stats *stats,
                         struct dcp_error *err) DCP_MUST_CHECK;
/* After what was put on the stream has run it is free. */
void dcp_device_slab_release(const struct dcp_device *device, struct dcp_device_slab *slab);

/* DCP_E_INVALID when a source, of the host or of a device, has no address, names a device that is
 * not in the list, or lies on one and is a finished record. */
int dcp_device_check_source(const struct dcp_device_list *devices, const struct dcp_plan *plan,
                            const struct dcp_item *item, const struct dcp_source *source,
                            struct dcp_error *err) DCP_MUST_CHECK;
/* Of a checked source on a device. */
struct dcp_device_payload dcp_device_payload_of(const struct dcp_device_list *devices,
                                                const struct dcp_plan *plan,
                                                const struct dcp_item *item,
                                                const struct dcp_source *source);

/* Keeps the first reason. */
void dcp_device_because(struct dcp_device_stats *stats, const char *format, ...) DCP_PRINTF(2, 3);
void dcp_device_stats_add(struct dcp_device_stats *sum, const struct dcp_device_stats *more);
/* dcp_device_wait, with its time counted. */
int dcp_device_await(const struct dcp_device *device, dcp_device_event *event, atomic_int *cancel,
                     struct dcp_device_stats *stats, struct dcp_error *err) DCP_MUST_CHECK;
/* Whether nothing of ours is on the stream of any device of the list any more.  False: memory that
 * copies read or write may be neither freed nor used again; `err`, which may be NULL, says why. */
bool dcp_device_all_idle(const struct dcp_device_list *devices, struct dcp_error *err);

/* ---- device_bring.c ---- */

enum { DCP_DEVICE_BOXES = 256 }; /* to one kernel */

/* Copies from one device, in stream order. */
struct dcp_device_bring {
    const struct dcp_device *device;
    struct dcp_device_stats *stats;
    uint64_t want_bytes; /* of the slab */
    struct dcp_device_slab slab;
    uint64_t calls;         /* that were put on the stream so far */
    uint8_t *host;          /* where the slab's first byte goes, while anything is pending */
    uint64_t pending_bytes; /* of the slab */
    uint32_t boxes_count;   /* pending */
    struct dcp_device_box boxes[DCP_DEVICE_BOXES];
};

/* `slab_bytes`: the most device memory it may take, once it is needed. */
int dcp_device_bring_new(const struct dcp_device *device, uint64_t slab_bytes,
                         struct dcp_device_stats *stats, struct dcp_device_bring **ret_bring,
                         struct dcp_error *err) DCP_MUST_CHECK;
/* After what was put on the stream its slab is free.  NULL is fine. */
void dcp_device_bring_destroy(struct dcp_device_bring *bring);
/* How this payload will be copied; the same answer every time. */
int dcp_device_bring_form(struct dcp_device_bring *bring, const struct dcp_device_payload *payload,
                          struct dcp_device_form *ret_form, struct dcp_error *err) DCP_MUST_CHECK;
/* Bytes [from, from + len) of the payload, whole elements, to `host`; not for DCP_DEVICE_GATHER.
 * Calls rise in `host`: what is packed is brought over with the memory between, which has any
 * content after that. */
int dcp_device_bring_put(struct dcp_device_bring *bring, const struct dcp_device_form *form,
                         uint64_t from, uint64_t len, uint8_t *host,
                         struct dcp_error *err) DCP_MUST_CHECK;
/* Puts what is pending on the stream; before an event is recorded. */
int dcp_device_bring_flush(struct dcp_device_bring *bring, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- device_gather.c ---- */
/* All of a payload to `host`, whatever its strides.  Waits. */
int dcp_device_gather(const struct dcp_device *device, const struct dcp_device_form *form,
                      uint8_t *host, atomic_int *cancel, struct dcp_device_stats *stats,
                      struct dcp_error *err) DCP_MUST_CHECK;

/* ---- device_stage.c ---- */
struct dcp_device_stage;

struct dcp_device_stage_params {
    const struct dcp_device_list *devices;
    const struct dcp_plan *plan;
    const struct dcp_layout *layout;
    const struct dcp_source *sources;
    const struct dcp_image *image;
    uint8_t *memory;    /* of the image */
    uint32_t *crcs;     /* for dcp_image_checksums_bytes of devices that can, pinned; NULL: none */
    atomic_int *cancel; /* may be NULL */
    struct dcp_device_stats *stats;
};

/* Puts the first copies on their devices' streams, as many as they take without holding up the
 * caller; wait and poll put the others.  Of `params` all but `sources` is borrowed until the end;
 * those are read until dcp_device_stage_bring_rest.  *ret_idle false: it failed, and `memory` may
 * still be written to, for ever. */
int dcp_device_stage_begin(const struct dcp_device_stage_params *params,
                           struct dcp_device_stage **ret_stage, bool *ret_idle,
                           struct dcp_error *err) DCP_MUST_CHECK;
/* Waits until memory below and at `at` is not written to any more but by the caller; up to
 * `*ret_to` the same holds.  `at` rises from call to call. */
int dcp_device_stage_wait(struct dcp_device_stage *stage, const uint8_t *at, atomic_int *cancel,
                          const uint8_t **ret_to, struct dcp_error *err) DCP_MUST_CHECK;
/* Without waiting: puts what the streams take by now.  1: everything has landed, and what is not
 * late is where it belongs. */
int dcp_device_stage_poll(struct dcp_device_stage *stage, atomic_int *cancel,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* Once everything has landed: what is late, and what lies on the host, of the records from `first`
 * on to their places.  After it nothing reads the sources, and the devices have nothing to do. */
int dcp_device_stage_bring_rest(struct dcp_device_stage *stage, uint32_t first, atomic_int *cancel,
                                struct dcp_error *err) DCP_MUST_CHECK;
/* Whether a record's payload is not put on a stream, which is known once its place was waited for:
 * the caller then has it gathered. */
bool dcp_device_stage_is_late(const struct dcp_device_stage *stage, uint32_t record);
int dcp_device_stage_gather(struct dcp_device_stage *stage, uint32_t record, atomic_int *cancel,
                            struct dcp_error *err) DCP_MUST_CHECK;
/* The CRCs of the blocks of a record's payload, valid once all of it was waited for; NULL: they
 * were not computed. */
const uint32_t *dcp_device_stage_checksums(const struct dcp_device_stage *stage, uint32_t record);
/* dcp_device_stage_end is of dcp_image.h. */

/* ---- device_stream.c ---- */
struct dcp_device_stream;

/* Gives the next payload that lies on a device and is not empty, in the order in which they are
 * taken; `cursor` is 0 at the start and belongs to the function.  False: there is none. */
typedef bool (*dcp_device_next_fn)(const void *ctx, uint64_t *cursor,
                                   struct dcp_device_payload *ret);

/* Begins to bring the first ones.  `stats` outlives it. */
int dcp_device_stream_new(const struct dcp_device_list *devices, dcp_device_next_fn next,
                          const void *ctx, struct dcp_device_stats *stats,
                          struct dcp_device_stream **ret_stream,
                          struct dcp_error *err) DCP_MUST_CHECK;
/* The next bytes, at most `most`, of the payload whose element 0 is at `address`; never those of
 * two.  They stay until they are taken. */
int dcp_device_stream_peek(struct dcp_device_stream *stream, uint64_t address, uint64_t most,
                           atomic_int *cancel, const uint8_t **ret_at, uint64_t *ret_len,
                           struct dcp_error *err) DCP_MUST_CHECK;
void dcp_device_stream_take(struct dcp_device_stream *stream, uint64_t len);
/* Waits for what was not taken.  NULL is fine. */
void dcp_device_stream_destroy(struct dcp_device_stream *stream);

#endif

/*
 * dcp_engine.h: bytes to files and back: the writer and the reader.
 *
 * Writing: source -> fused copy + CRC -> ring of aligned buffers -> direct writes by a second
 * thread.  On file systems in memory, or without direct I/O: CRC in place and write() from the
 * source.  Reading: sorted, coalesced ranges, straight into the target where dtype, strides and
 * alignment allow, else through a bounded bounce ring.
 */
#ifndef DCP_ENGINE_H
#define DCP_ENGINE_H

#include <stdatomic.h>

#include "dcp_device.h"
#include "dcp_io.h"
#include "dcp_metadata.h"
#include "dcp_plan.h"
#include "dcp_record.h"

/* Where the bytes of an item lie.  Tensors: `data` is element 0; strides in bytes per dim of the
 * item's box, NULL when row major.  Objects: the finished record of slot_bytes. */
struct dcp_source {
    const uint8_t *data; /* on a device: an address there, which is never followed */
    const int64_t *strides_bytes;
    uint32_t device; /* 0: memory of the host; else 1 + an index in the list of devices */
};

enum dcp_direct {
    DCP_DIRECT_AUTO = 0,
    DCP_DIRECT_OFF = 1,
    DCP_DIRECT_ON = 2 /* fail where it can't be */
};

/* Whether requests with O_DIRECT go to the kernel without a thread of ours (io_uring). */
enum dcp_queue_use {
    DCP_QUEUE_AUTO = 0, /* where it can be had and there is more than one request */
    DCP_QUEUE_OFF = 1,
    DCP_QUEUE_ON = 2 /* fail where it can't be had */
};

/* How hard the writer may press on the machine.  All zero: as hard as it can. */
struct dcp_write_tuning {
    enum dcp_queue_use queue;
    int nice;               /* 1 to 19, of threads of the engine; 0: as their creator */
    uint32_t io_priority;   /* of threads and requests of the engine, as ioprio_set(2) takes it */
    uint64_t limit_bytes_s; /* of this rank; saved up and spent at once is at most one buffer */
};

struct dcp_engine_options {
    enum dcp_direct direct;
    struct dcp_write_tuning tuning; /* writing */
    bool own_thread;                /* writing: the calling thread takes the priority too */
    bool sync;                      /* fdatasync each file before its checked close */
    bool verify;                    /* reading: check CRCs */
    bool verify_all;       /* with verify: partial reads bring in whole blocks, however little of
                              one is wanted ("strict") */
    uint32_t ring_buffers; /* 0: DCP_RING_BUFFERS */
    uint32_t ring_buffer_bytes; /* 0: DCP_RING_BUFFER_BYTES */
    atomic_int *cancel; /* non-zero stops with DCP_E_CANCELLED at the next request; may be NULL */
    _Atomic uint64_t *progress_bytes; /* counts payload bytes done; may be NULL */
    /* Writing with plan->content_hash: the content hash of every kept item, parallel to
     * plan->items, where the caller knows them already; NULL: the writer computes them on the way.
     */
    const struct dcp_hash128 *hashes;
    /* Writing: counts files that were created, the first ones of the layout; also filled when the
     * writer fails.  May be NULL. */
    _Atomic uint32_t *created_files;
    /* Writing: sources in this memory are pages of a mapped file that nobody has written to.  They
     * are brought in ahead and given back once they were copied.  NULL: there are none. */
    const uint8_t *mapped_from, *mapped_to;
    /* Writing: set when requests were given up that the kernel may still run: it goes on reading
     * the memory that they write from.  May be NULL. */
    bool *memory_lost;
    /* Writing: those that sources name; NULL: there are none.  What they hold is that of now: our
     * stream follows the trainer's already. */
    const struct dcp_device_list *devices;
    struct dcp_device_stats *device_stats; /* added to; may be NULL */
    /* dcp_image_end with a stage: called once, on its thread, when nothing reads the sources any
     * more; checksums may still be computed.  May be NULL. */
    void (*brought)(void *ctx);
    void *brought_ctx;
    uint32_t *device_crcs; /* dcp_image_begin: pinned, until the stage ends; NULL: devices compute
                              no checksums */
};

/* Frees the buffers that the process keeps between saves and loads (32 MiB each by default). */
void dcp_engine_trim(void);

struct dcp_write_stats {
    uint64_t file_bytes, payload_bytes, files_count;
    uint64_t direct_files_count; /* written with O_DIRECT */
    uint64_t direct_files_mask;  /* which of the first 64 */
    uint64_t queue_writes_count; /* requests that went through the queue; 0: it was not used */
    uint64_t priority_failures;  /* threads whose priority could not be set */
    uint64_t wall_ns, copy_ns, write_ns, wait_ns, sync_ns;
    uint64_t limited_ns; /* slept to keep below limit_bytes_s */
    uint64_t ring_bytes; /* memory the writer used */
};

/* Creates (O_EXCL), fills, syncs and closes every file of the layout.  `sources` is indexed like
 * plan->items; only kept ones are read.  On failure the files that were created stay for
 * dcp_claim_discard; DCP_E_EXISTS names a file that another writer put there.  Payload CRCs go to
 * `ret_crcs` (one per layout record, may be NULL). */
int dcp_writer_run(const struct dcp_io *io, int dirfd, const char *dir_path,
                   const struct dcp_plan *plan, const struct dcp_layout *layout,
                   const struct dcp_source *sources, const struct dcp_save_id *save_id, uint64_t n0,
                   const struct dcp_engine_options *options, uint32_t *ret_crcs,
                   struct dcp_write_stats *ret_stats, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- reading ---- */

/* How the memory of a target is reached. */
enum dcp_target_kind {
    DCP_TARGET_MEMORY = 0, /* written by the reader */
    DCP_TARGET_PIECES = 1, /* handed over in pieces of the box; strides count elements */
    /* Handed over in pieces of one overlap at a time, as if it were row-major memory of its own. */
    DCP_TARGET_OVERLAPS = 2,
};

/* Memory to fill: a box of a global tensor. */
struct dcp_target {
    uint64_t entry; /* index in metadata entries */
    uint8_t
        *data; /* element 0 of the box; handed over, and objects: NULL; an address of `device` */
    const int64_t *strides_bytes; /* per dim; NULL when row major */
    uint64_t dims; /* index in dcp_read_plan.dims of 2 * ndim numbers: box offsets, box sizes */
    uint8_t kind;  /* enum dcp_target_kind */
    uint8_t dtype; /* of the memory, when it is another than saved (dcp_can_convert), else 0 */
    /* 0: memory of the host; else 1 + an index in dcp_read_plan.devices, kind DCP_TARGET_PIECES:
     * the plan's on_piece is dcp_device_put_piece. */
    uint32_t device;
    uint64_t hole_bytes; /* that no saved chunk covers; known once the plan is built */
};

/* One overlap of a saved chunk with a target. */
struct dcp_read_item {
    uint64_t chunk;  /* index in metadata chunks */
    uint64_t target; /* index in targets */
    uint64_t
        dims; /* index in dims of 3 * ndim numbers: offset in chunk, offset in target, lengths */
};

/* Elements on their way to a target that has no memory here: a box of at most DCP_PIECE_BYTES. */
struct dcp_piece {
    const struct dcp_read_item *item;
    uint32_t ndim;
    const uint64_t *lengths;
    const uint8_t *bytes; /* of the saved dtype, at any alignment; valid during the call */
    const int64_t *bytes_strides;
    int64_t at;             /* elements, from element 0 of the box, or of the overlap */
    const int64_t *strides; /* elements */
    uint64_t count;         /* elements */
};

/* Called on the thread that puts what was read where it belongs; every element of an overlap comes
 * once, in any order.  A failure is the receiver's own to keep. */
typedef void (*dcp_piece_fn)(void *ctx, const struct dcp_piece *piece);

/* A range of a payload that lies in a file as it belongs in its target: there it is one run, of the
 * saved dtype. */
struct dcp_file_range {
    const struct dcp_read_item *item;
    int fd; /* maybe of direct I/O */
    uint64_t offset_bytes, bytes;
    uint64_t at_bytes; /* from element 0 of the target's box */
};

/* Reads it; the bytes are there when it returns.  With `ret_crcs`: the CRC32 of each block of
 * DCP_BLOCK_BYTES as it got there, valid until the next call.  DCP_E_UNSUPPORTED: not from this
 * file; the range comes in pieces then.  `err` is given, and holds no error yet. */
typedef int (*dcp_range_fn)(void *ctx, const struct dcp_file_range *range,
                            const uint32_t **ret_crcs, struct dcp_error *err);

struct dcp_read_plan {
    const struct dcp_metadata *md; /* borrows */
    struct dcp_target *targets;    /* owned */
    uint64_t targets_count, targets_cap;
    struct dcp_read_item *items; /* owned */
    uint64_t items_count, items_cap;
    uint64_t *dims; /* owned */
    uint64_t dims_count, dims_cap;
    uint64_t wanted_bytes; /* payload bytes that targets ask for */
    uint64_t objects_count;
    /* A record of another shape than its chunk is handed over, like one that only Python can read
     * (and those of another dtype); false: it is DCP_E_CORRUPT. */
    bool records_decide;
    /* Owned, one word per target: DCP_TARGET_ bits and the bytes delivered.  NULL: nobody counts.
     */
    _Atomic uint64_t *delivered;
    dcp_piece_fn on_piece; /* set by the caller before reading; NULL without targets that need it */
    void *on_piece_ctx;
    dcp_range_fn on_range; /* the same, for targets on devices; NULL: they get pieces only */
    const struct dcp_device_list *devices; /* those that targets name; NULL: there are none */
};

void dcp_read_plan_clean_up(struct dcp_read_plan *plan);
/* Adds a target box (or an object: ndim 0, data NULL, entry of kind DCP_ITEM_BYTES).  Strides are
 * borrowed. */
int dcp_read_plan_add(struct dcp_read_plan *plan, uint64_t entry, uint8_t *data,
                      const int64_t *strides_bytes, const uint64_t *offsets, const uint64_t *sizes,
                      uint64_t *ret_target, struct dcp_error *err) DCP_MUST_CHECK;
/* Finds the overlaps: a tree of boxes per entry, O(log n + hits).  A target that saved chunks do
 * not cover is DCP_E_HOLE, named by tensor and box, or with `strict` false counted in *ret_holes
 * (bytes). */
int dcp_read_plan_build(struct dcp_read_plan *plan, bool strict, uint64_t *ret_hole_bytes,
                        struct dcp_error *err) DCP_MUST_CHECK;

/* ---- what has arrived ---- */

/* Bits of dcp_read_plan.delivered: the target's memory may have been written to; something that
 * counts as delivered did not reach it. */
#define DCP_TARGET_TOUCHED (1ull << 63)
#define DCP_TARGET_SPOILED (1ull << 62)

enum dcp_target_state {
    DCP_TARGET_UNTOUCHED = 0, /* certainly as it was before the load */
    DCP_TARGET_PARTLY = 1,    /* some of its bytes may be new */
    DCP_TARGET_FILLED = 2,    /* all bytes that the checkpoint has are there */
};

/* Counts from now on what arrives in the targets of a plan that is built. */
int dcp_read_plan_track(struct dcp_read_plan *plan, struct dcp_error *err) DCP_MUST_CHECK;

/* Whoever fills targets calls this before the first byte of a target's memory can change. */
static inline void
dcp_target_touch(const struct dcp_read_plan *plan, uint64_t target)
{
    if (plan->delivered != NULL) {
        atomic_fetch_or_explicit(&plan->delivered[target], DCP_TARGET_TOUCHED,
                                 memory_order_relaxed);
    }
}

/* And this when bytes are in place and, where they are verified at all, verified. */
static inline void
dcp_target_deliver(const struct dcp_read_plan *plan, uint64_t target, uint64_t bytes)
{
    if (plan->delivered != NULL) {
        atomic_fetch_add_explicit(&plan->delivered[target], bytes, memory_order_relaxed);
    }
}

/* Whoever takes pieces calls this for one that it could not put into place. */
static inline void
dcp_target_spoil(const struct dcp_read_plan *plan, uint64_t target)
{
    if (plan->delivered != NULL) {
        atomic_fetch_or_explicit(&plan->delivered[target], DCP_TARGET_TOUCHED | DCP_TARGET_SPOILED,
                                 memory_order_relaxed);
    }
}

/* One enum dcp_target_state per target; `objects` stands for all objects, which have no memory
 * here. */
int dcp_read_plan_states(const struct dcp_read_plan *plan, enum dcp_target_state objects,
                         uint8_t *ret_states, struct dcp_error *err) DCP_MUST_CHECK;
/* Payload bytes of an overlap; of an object, its record's. */
uint64_t dcp_read_item_bytes(const struct dcp_read_plan *plan, const struct dcp_read_item *item);
/* The overlap is all of its chunk and all of its target: nothing is resharded. */
bool dcp_read_item_is_whole(const struct dcp_read_plan *plan, const struct dcp_read_item *item);

struct dcp_read_stats {
    uint64_t read_bytes; /* by this rank, from storage or the page cache */
    uint64_t hot_bytes;  /* of them: of files that lay in the page cache */
    uint64_t wanted_bytes, verified_bytes, unverified_bytes; /* delivered to targets */
    uint64_t straight_bytes;      /* read into their target without a buffer between */
    uint64_t device_direct_bytes; /* of them: into the memory of devices */
    uint64_t shared_bytes;        /* delivered from what other ranks read */
    uint64_t requests_count, files_count;
    uint64_t direct_files_count; /* read with O_DIRECT */
    uint64_t hot_files_count;    /* that lay in the page cache; all others were read through it */
    uint64_t wall_ns;
};

/* What the native reader hands back: records that only Python can read (objects always; tensors
 * whose record is DCP_E_UNSUPPORTED; what was stored through transforms, which is not verified).
 * Called on the reading thread, one at a time; `bytes` is valid during the call. */
typedef int (*dcp_record_fn)(void *ctx, const struct dcp_read_plan *plan,
                             const struct dcp_read_item *item, const uint8_t *bytes, size_t len,
                             struct dcp_error *err);

int dcp_reader_run(const struct dcp_io *io, int dirfd, const char *dir_path,
                   const struct dcp_read_plan *plan, const struct dcp_engine_options *options,
                   dcp_record_fn on_record, void *on_record_ctx, struct dcp_read_stats *ret_stats,
                   struct dcp_error *err) DCP_MUST_CHECK;

/* The same, in a directory that is opened for it. */
int dcp_reader_run_path(const struct dcp_io *io, const char *dir_path,
                        const struct dcp_read_plan *plan, const struct dcp_engine_options *options,
                        dcp_record_fn on_record, void *on_record_ctx,
                        struct dcp_read_stats *ret_stats, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- targets on devices (device_put.c) ---- */
struct dcp_device_put;

/* Whether a target of this form can be filled: `from`, the saved dtype, can be converted to `to`
 * (or is it), and the device has kernels for strides, or they leave runs that are worth a copy
 * each.  Otherwise the target is to be filled another way. */
bool dcp_device_put_can(const struct dcp_device *device, uint8_t from, uint8_t to, uint32_t ndim,
                        const uint64_t *sizes, const int64_t *strides);
/* For a plan that is built and whose `devices` are set.  Pieces of targets that name no device go
 * to `host`, which may be NULL when there are none. */
int dcp_device_put_new(const struct dcp_read_plan *plan, dcp_piece_fn host, void *host_ctx,
                       struct dcp_device_put **ret_put, struct dcp_error *err) DCP_MUST_CHECK;
/* The plan's on_piece; `put` is its context. */
void dcp_device_put_piece(void *put, const struct dcp_piece *piece);
/* The plan's on_range, for whoever wants direct reads from storage where devices can
 * (DCP_DEVICE_READS_FILES, and with CRCs DCP_DEVICE_CHECKSUMS). */
int dcp_device_put_range(void *put, const struct dcp_file_range *range, const uint32_t **ret_crcs,
                         struct dcp_error *err) DCP_MUST_CHECK;
/* Ends what pieces wait for a device for; may be NULL, as it is at first. */
void dcp_device_put_set_cancel(struct dcp_device_put *put, atomic_int *cancel);
/* After the reader ran, whether it failed or not, and before anybody asks for states: waits until
 * all has arrived.  The first failure of any piece: then every target on a device that was touched
 * is spoiled.  `cancel` may be NULL. */
int dcp_device_put_finish(struct dcp_device_put *put, atomic_int *cancel,
                          struct dcp_error *err) DCP_MUST_CHECK;
void dcp_device_put_get_stats(const struct dcp_device_put *put, struct dcp_device_stats *ret);
/* Waits for what was not finished.  NULL is fine. */
void dcp_device_put_destroy(struct dcp_device_put *put);

/* ---- strided boxes (shared by writer and reader) ---- */

/* Row-major box `sizes` of elements of `item_bytes`: copies bytes [from, from + len) of its
 * row-major image between a contiguous buffer and strided memory.  gather: strided -> buffer;
 * scatter: buffer -> strided. */
void dcp_box_gather(uint8_t *dst, const uint8_t *src, uint32_t ndim, const uint64_t *sizes,
                    const int64_t *strides_bytes, uint32_t item_bytes, uint64_t from, uint64_t len);
void dcp_box_scatter(uint8_t *dst, const uint8_t *src, uint32_t ndim, const uint64_t *sizes,
                     const int64_t *strides_bytes, uint32_t item_bytes, uint64_t from,
                     uint64_t len);
/* Strided to strided, any strides: `lengths` elements per dim. */
void dcp_box_copy(uint8_t *dst, const int64_t *dst_strides_bytes, const uint8_t *src,
                  const int64_t *src_strides_bytes, uint32_t ndim, const uint64_t *lengths,
                  uint32_t item_bytes);

#endif

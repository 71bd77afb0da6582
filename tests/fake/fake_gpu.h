/*
 * fake_gpu.h: devices that are memory of this process and streams that are threads, under the fake
 * CUDA driver and runtime of the tests.
 *
 * Lives in the fake libcuda.so.1; the fake libcudart.so.13 and the fake NCCL call it, and tests
 * reach the dcp_fake_* hooks through ctypes.  What the real runtime may do, this one does on
 * purpose: work runs late and streams overtake each other; pinned memory that a copy is to fill
 * holds DCP_FAKE_POISON until the copy has run; pinned memory that a copy is to read is read late;
 * an error is found long after the call that caused it and stays.  What the real one does only
 * sometimes, it counts.
 *
 * Environment, read once:
 *   DCP_FAKE_CUDA_DEVICES    how many devices there are (2)
 *   DCP_FAKE_CUDA_MEMORY     bytes of one device (8 GiB)
 *   DCP_FAKE_CUDA_SEED       of the delays (1)
 *   DCP_FAKE_CUDA_DELAY_US   the longest delay of one piece of work; one in eight is delayed (300)
 *   DCP_FAKE_CUDA_FAIL       "NAME:N:CODE,...": the Nth call of function NAME from now answers CODE
 *
 * Not shown here: a host that follows a device address is not caught (tests/c/device_sim.h is).
 * Thread rule: everything may be called by any thread.
 */
#ifndef DCP_FAKE_GPU_H
#define DCP_FAKE_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DCP_FAKE_POISON 0xDB
#define DCP_FAKE_DEVICES 16

/* Numbers that the driver and the runtime share. */
enum fake_code {
    FAKE_OK = 0,
    FAKE_INVALID_VALUE = 1,
    FAKE_NO_MEMORY = 2,
    FAKE_FORKED = 3,
    FAKE_INVALID_DEVICE = 101,
    FAKE_INVALID_HANDLE = 400,
    FAKE_NOT_FOUND = 500,
    FAKE_NOT_READY = 600,
    FAKE_ILLEGAL_ADDRESS = 700,
    FAKE_ALREADY_PINNED = 712,
    FAKE_NOT_PINNED = 713,
    FAKE_NOT_SUPPORTED = 801,
    FAKE_CAPTURE_UNSUPPORTED = 900,
};

struct fake_stream;

/* The work that a stream had been given when the event was recorded. */
struct fake_event {
    uint32_t magic;
    int device;    /* that was current when it was created */
    bool captured; /* recorded on a stream that was capturing */
    struct fake_stream *on;
    uint64_t serial;
};

enum fake_memory_kind { FAKE_MEMORY_UNKNOWN = 0, FAKE_MEMORY_PINNED = 1, FAKE_MEMORY_DEVICE = 2 };

struct fake_range {
    uintptr_t start, bytes;
    enum fake_memory_kind kind;
    int device;
    bool registered; /* cudaHostRegister, not memory of ours */
};

/* ---- the engine, for the two libraries ---- */

/* Counts a call of `name`; the code that a test wants it to answer, else 0. */
int fake_enter(const char *name);
void fake_count(const char *name, uint64_t by);
int fake_device_count(void);
uint64_t fake_device_bytes(void);
uint64_t fake_device_used_bytes(int device);
int *fake_current_device(void); /* of the calling thread */
/* The device has a context from here on; the error that it died of, else 0. */
int fake_context(int device);
bool fake_has_context(int device);

/* What a handle means to the calling thread: NULL, 1 and 2 are its default streams. */
int fake_stream_find(void *handle, struct fake_stream **ret_stream);
int fake_stream_new(bool blocking, struct fake_stream **ret_stream);
int fake_stream_device(const struct fake_stream *stream);
int fake_stream_capture(struct fake_stream *stream, int on); /* -1: asks; the state before */
int fake_stream_wait(struct fake_stream *stream);
bool fake_stream_done(struct fake_stream *stream);
int fake_device_wait(int device);

int fake_record(struct fake_event *event, struct fake_stream *stream);
int fake_wait_event(struct fake_stream *stream, const struct fake_event *event);
bool fake_event_done(const struct fake_event *event);
int fake_event_wait(const struct fake_event *event);

/* Puts work on a stream; `fn` runs on its thread, never after the device has died.  `data` of
 * `bytes` is copied and given to `fn`. */
int fake_call(struct fake_stream *stream, void (*fn)(void *data), const void *data, uint64_t bytes);
int fake_copy(void *dst, const void *src, uint64_t bytes, struct fake_stream *stream);
int fake_fill(void *dst, int value, uint64_t bytes, struct fake_stream *stream);

int fake_allocate(int device, uint64_t bytes, void **ret_memory);
int fake_allocate_pinned(uint64_t bytes, void **ret_memory);
int fake_free(void *memory, enum fake_memory_kind kind);   /* waits for the work that may use it */
int fake_forget(void *memory, enum fake_memory_kind kind); /* without waiting */
int fake_pin(void *memory, uint64_t bytes);
int fake_unpin(void *memory);
void fake_settle(void); /* waits for all work given so far: memory may go after it */
bool fake_range_of(const void *address, struct fake_range *ret_range);

/* ---- for tests ---- */

/* A count by name: of calls of an API function, or "contexts", "copied_to_host_bytes",
 * "copied_to_device_bytes", "copies_to_host", "copies_to_device", "kernels", "captured",
 * "waits_to_free"; "held_up": work for a stream that was full, which waited for room unless all
 * work was held. */
uint64_t dcp_fake_count(const char *name);
/* The Nth call of `name` from now (1: the next) answers `code`; 0 forgets it. */
void dcp_fake_fail(const char *name, uint64_t nth, int code);
/* Allocations of device memory above this size fail as out of memory; 0: all fit. */
void dcp_fake_largest(uint64_t bytes);
/* No work of any stream starts while this is on. */
void dcp_fake_hold(int on);
/* The device dies of `code` when it has done `works` more pieces of work; 0: it lives again, as no
 * real one would. */
void dcp_fake_break(int device, uint64_t works, int code);
/* Sets or ends the capture of a graph on a stream (a handle). */
void dcp_fake_capture(void *handle, int on);

#endif

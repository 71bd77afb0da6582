/*
 * cuda_device.h: private: what the files that implement struct dcp_device over CUDA share.
 *
 * cuda_lend.c makes tables, cuda_stream.c orders them with the trainer's streams, cuda_copy.c
 * copies and allocates, cuda_pin.c pins, cuda_kernels.c packs and sums, cuda_file.c reads files.
 */
#ifndef DCP_CUDA_DEVICE_H
#define DCP_CUDA_DEVICE_H

#include "cuda_context.h"
#include "dcp_cuda.h"
#include "kernels.h"

enum {
    /* Memory is pinned in pieces that end where an address is a multiple of this.  The driver holds
     * its lock while it pins, against launches of the trainer too: some tens of ms for a piece of
     * 4 KiB pages (estimated, not measured).  Smaller ones would cut copies for nothing. */
    CUDA_PIN_BYTES = 256 << 20,
};

struct dcp_device_event {
    cuda_event event;
    cuda_event sums; /* of the second stream; counts with has_sums */
    bool has_sums;
    struct dcp_device_event *next; /* of those that wait to be used again */
};

/* Pinned memory for jobs that kernels read. */
struct cuda_list {
    struct cuda_list *next;
    struct dcp_kernel_job *jobs;
    uint32_t used;    /* jobs that were launched since it was empty */
    cuda_event event; /* behind the last launch; jobs may be overwritten once it has happened */
};

/* What a device's kernels are, in the process.  NULL functions: it has none. */
struct cuda_kernels {
    cuda_function pack, unpack, checksum;
};

/* Checksums: cuda_sums.c. */
struct cuda_sums {
    cuda_stream stream; /* NULL: the device computes none */
    uint32_t *memory;   /* of the device; NULL: not taken */
    uint32_t *host;     /* where the first of its results goes, while there are any */
    uint32_t used;      /* results */
    bool is_used;       /* there was something on the stream, ever */
};

struct cuda_table {
    struct dcp_device device; /* its ctx is this table */
    cuda_stream stream;
    struct cuda_sums sums;
    cuda_event order;               /* recorded and waited for in one call */
    struct dcp_device_event *spare; /* events that were forgotten */
    struct cuda_list *lists;        /* the current one first */
    struct cuda_kernels kernels;
    bool has_pools;
    bool lent;               /* guarded by cuda_lend.c's mutex, like next */
    struct cuda_table *next; /* of all tables */
};

/* cuda_stream.c */
int cuda_stream_follow(void *ctx, void *stream, struct dcp_error *err);
int cuda_stream_lead(void *ctx, void *stream, struct dcp_error *err);
int cuda_stream_record(void *ctx, dcp_device_event **ret_event, struct dcp_error *err);
int cuda_stream_poll(void *ctx, dcp_device_event *event, struct dcp_error *err);
void cuda_stream_forget(void *ctx, dcp_device_event *event);
int cuda_stream_wait_idle(void *ctx, struct dcp_error *err);
/* Destroys what was forgotten; the table's stay. */
void cuda_stream_clean_up(struct cuda_table *table, const struct cuda_stay *stay);

/* cuda_copy.c */
int cuda_copy_to_host(void *ctx, void *host, uint64_t device, uint64_t bytes,
                      struct dcp_error *err);
int cuda_copy_to_device(void *ctx, uint64_t device, const void *host, uint64_t bytes,
                        struct dcp_error *err);
int cuda_copy_rows_to_device(void *ctx, uint64_t device, uint64_t pitch_bytes, const void *host,
                             uint64_t row_bytes, uint64_t rows, struct dcp_error *err);
int cuda_copy_allocate(void *ctx, uint64_t bytes, uint64_t *ret_device, struct dcp_error *err);
void cuda_copy_release(void *ctx, uint64_t device);
/* Of any length; `to_host` says which way. */
int cuda_copy_pieces(const struct cuda_stay *stay, cuda_stream stream, void *host, uint64_t device,
                     uint64_t bytes, bool to_host, struct dcp_error *err) DCP_MUST_CHECK;

/* cuda_pin.c */
int cuda_pin(void *ctx, void *memory, uint64_t bytes, struct dcp_error *err);
void cuda_unpin(void *ctx, void *memory);

/* cuda_kernels.c */
/* Loads the kernels of the stay's device at the first call for it; all NULL where there are none.
 */
struct cuda_kernels cuda_kernels_of(const struct cuda_stay *stay);
int cuda_kernels_pack(void *ctx, const struct dcp_device_box *boxes, uint32_t count,
                      struct dcp_error *err);
int cuda_kernels_unpack(void *ctx, const struct dcp_device_box *boxes, uint32_t count,
                        struct dcp_error *err);
int cuda_kernels_launch(const struct cuda_stay *stay, cuda_stream stream, cuda_function kernel,
                        uint32_t blocks, uint32_t threads, void *params, const char *what,
                        struct dcp_error *err) DCP_MUST_CHECK;
void cuda_kernels_clean_up(struct cuda_table *table, const struct cuda_stay *stay);
/* Tests: forgets what was loaded. */
void cuda_kernels_forget(void);

/* cuda_sums.c */
int cuda_sums_checksum(void *ctx, uint64_t device, uint64_t bytes, uint32_t *crcs,
                       struct dcp_error *err);
/* Puts the copy of all results on the second stream: before an event there. */
int cuda_sums_flush(struct cuda_table *table, const struct cuda_stay *stay,
                    struct dcp_error *err) DCP_MUST_CHECK;
/* Forgets results that nobody waits for, and gives the buffer back. */
void cuda_sums_drop(struct cuda_table *table, const struct cuda_stay *stay);

/* cuda_file.c */
bool cuda_file_is_open(void);
int cuda_file_read(void *ctx, int fd, uint64_t offset_bytes, uint64_t device, uint64_t bytes,
                   struct dcp_error *err);
void cuda_file_forget(void); /* tests */

#endif

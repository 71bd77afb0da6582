/*
 * kernels.h: what a launch of our kernels is given: shared by the host code that launches them, by
 * kernels.cu and by what stands in for a device in tests.
 *
 * Every kernel takes one struct by value.  pack and unpack read a list of jobs, one thread block
 * each: whoever launches them has cut the boxes into jobs of about one size (kernel_jobs.h), so
 * that one huge and 20,000 tiny tensors load the device alike, and no thread has to search for its
 * work. The list lies in pinned memory of the host, which the device reads itself: a job is read
 * once, so a copy of it on the device would save nothing.
 *
 * checksum: the CRC32 of every block (DCP_BLOCK_BYTES) of a range.  A block is divided into slices,
 * one thread block each, which add what they have to its result: of a payload of a few blocks one
 * thread block for each would take longer than the copy that runs beside it.
 */
#ifndef DCP_KERNELS_H
#define DCP_KERNELS_H

#include <stdint.h>

#include "dcp_limits.h"

#define DCP_KERNEL_PACK "dcp_kernel_pack"
#define DCP_KERNEL_UNPACK "dcp_kernel_unpack"
#define DCP_KERNEL_CHECKSUM "dcp_kernel_checksum"

enum {
    /* Threads of a block.  Those of the checksum are a power of two. */
    DCP_KERNEL_MOVE_THREADS = 128,
    DCP_KERNEL_CHECKSUM_THREADS = 256,
    /* Of a block of DCP_BLOCK_BYTES, counted from its end; a power of two. */
    DCP_KERNEL_CRC_SLICES = 8,
    DCP_KERNEL_CRC_SLICE_BYTES = DCP_BLOCK_BYTES / DCP_KERNEL_CRC_SLICES,
    DCP_KERNEL_CRC_LOADS = 8, /* that a thread has under way */
    /* Shifts a CRC by one row of all threads' words: four bytes, 256 values each. */
    DCP_KERNEL_CRC_TABLE_LEN = 4 * 256,
    /* x^(2^k) modulo the CRC's polynomial. */
    DCP_KERNEL_CRC_POWERS_LEN = 32,
};

/* One job: items [first, first + count) of the row-major image of a strided box.  An item is moved
 * by accesses of access_bytes, to which all addresses are aligned. */
struct dcp_kernel_job {
    uint64_t strided; /* address of item 0 of the box */
    uint64_t packed;  /* address of item `first` */
    uint64_t first, count;
    uint32_t item_bytes;   /* 1, 2, 4, 8 or 16 */
    uint32_t access_bytes; /* the same or a smaller power of two */
    uint32_t ndim;
    uint32_t reserved;
    uint64_t sizes[DCP_DEVICE_DIMS]; /* the innermost dim first, unlike in struct dcp_device_box */
    int64_t strides_bytes[DCP_DEVICE_DIMS];
};

/* DCP_KERNEL_PACK, DCP_KERNEL_UNPACK: grid.x is the number of jobs, block.x
 * DCP_KERNEL_MOVE_THREADS. */
struct dcp_kernel_move {
    uint64_t jobs; /* address of struct dcp_kernel_job[] */
};

/* DCP_KERNEL_CHECKSUM: grid.x is the number of blocks times DCP_KERNEL_CRC_SLICES, block.x
 * DCP_KERNEL_CHECKSUM_THREADS. */
struct dcp_kernel_checksum {
    uint64_t data, bytes;
    uint64_t crcs;          /* address of uint32_t[], one for each block, zeros before the launch */
    uint32_t begin_of_full; /* what CRC32's first register becomes in a full block, inverted */
    uint32_t begin_of_last; /* and in the last block of the range */
    uint32_t powers[DCP_KERNEL_CRC_POWERS_LEN];
};

#endif

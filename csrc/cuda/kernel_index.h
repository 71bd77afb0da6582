/*
 * kernel_index.h: the arithmetic of our kernels: what one thread does, for the device and the host.
 *
 * Everything that can be wrong in a kernel but its synchronisation is here, as functions of (job,
 * thread, threads) that gcc compiles as well: tests run them as every thread in turn and compare
 * with the core's own copies and checksums.
 *
 * Moving: a thread turns its first index into digits of the box's sizes, which takes divisions, and
 * from then on adds the digits of the number of threads, which takes none.
 *
 * CRC32: the remainder of a sum is the sum of remainders, so thread t takes the words t, t + T, t +
 * 2T, ... of a slice: neighbours read neighbouring words.  From one of its words to the next its
 * remainder is multiplied by x^(32 T), by a table; at the end it is moved to its place in the slice
 * by x^(32 (T - t)), the slice's sum to its place in the block, and all of them are added.  Slices
 * are counted from the end of the block, so what is behind one is whole slices, and the first bytes
 * of a block are preceded by zeros, which change no remainder, to whole rows of T words.  The
 * register that CRC32 starts with is added as what it becomes in the length of the block.
 * Polynomials are reflected: bit 31 is the coefficient of x^0.
 */
#ifndef DCP_KERNEL_INDEX_H
#define DCP_KERNEL_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels.h"

/* may_alias: memory of any type is moved by words.  The device's compiler never assumes types. */
#ifdef __CUDACC__
#define DCP_KERNEL_FN static __host__ __device__ __forceinline__
#define DCP_KERNEL_UNROLL _Pragma("unroll")
#define DCP_KERNEL_ALIAS
#define DCP_KERNEL_ALIGN(bytes) __align__(bytes)
#else
#define DCP_KERNEL_FN static inline
#define DCP_KERNEL_UNROLL
#define DCP_KERNEL_ALIAS __attribute__((may_alias))
#define DCP_KERNEL_ALIGN(bytes) __attribute__((aligned(bytes), may_alias))
#endif

typedef uint8_t DCP_KERNEL_ALIAS dcp_kernel_word1;
typedef uint16_t DCP_KERNEL_ALIAS dcp_kernel_word2;
typedef uint32_t DCP_KERNEL_ALIAS dcp_kernel_word4;
typedef uint64_t DCP_KERNEL_ALIAS dcp_kernel_word8;
struct DCP_KERNEL_ALIGN(16) dcp_kernel_word16 {
    uint64_t lo, hi;
};

/* Where one thread stands in a box.  Digits beyond the job's dims are not used. */
struct dcp_kernel_at {
    uint64_t digits[DCP_DEVICE_DIMS];
    int64_t offset_bytes; /* from item 0; has no meaning for a step */
};

DCP_KERNEL_FN void
dcp_kernel_at_item(const struct dcp_kernel_job *job, uint64_t item, struct dcp_kernel_at *ret_at)
{
    ret_at->offset_bytes = 0;
    DCP_KERNEL_UNROLL
    for (uint32_t d = 0; d < DCP_DEVICE_DIMS; d++) {
        if (d >= job->ndim) {
            break;
        }
        uint64_t digit = item % job->sizes[d];
        item /= job->sizes[d];
        ret_at->digits[d] = digit;
        ret_at->offset_bytes += (int64_t)digit * job->strides_bytes[d];
    }
}

/* Moves on by `step`, the digits of a number of items; past the box's end it wraps. */
DCP_KERNEL_FN void
dcp_kernel_at_advance(const struct dcp_kernel_job *job, const struct dcp_kernel_at *step,
                      struct dcp_kernel_at *at)
{
    uint64_t carry = 0;
    DCP_KERNEL_UNROLL
    for (uint32_t d = 0; d < DCP_DEVICE_DIMS; d++) {
        if (d >= job->ndim) {
            break;
        }
        uint64_t before = at->digits[d];
        uint64_t digit = before + step->digits[d] + carry;
        carry = digit >= job->sizes[d] ? 1 : 0;
        digit -= carry != 0 ? job->sizes[d] : 0;
        at->digits[d] = digit;
        at->offset_bytes += ((int64_t)digit - (int64_t)before) * job->strides_bytes[d];
    }
}

DCP_KERNEL_FN void
dcp_kernel_copy_item(uint64_t to, uint64_t from, uint32_t item_bytes, uint32_t access_bytes)
{
    for (uint32_t done = 0; done < item_bytes;
         done += access_bytes, to += access_bytes, from += access_bytes) {
        switch (access_bytes) {
        case 16:
            *(struct dcp_kernel_word16 *)(uintptr_t)to =
                *(const struct dcp_kernel_word16 *)(uintptr_t)from;
            break;
        case 8:
            *(dcp_kernel_word8 *)(uintptr_t)to = *(const dcp_kernel_word8 *)(uintptr_t)from;
            break;
        case 4:
            *(dcp_kernel_word4 *)(uintptr_t)to = *(const dcp_kernel_word4 *)(uintptr_t)from;
            break;
        case 2:
            *(dcp_kernel_word2 *)(uintptr_t)to = *(const dcp_kernel_word2 *)(uintptr_t)from;
            break;
        default:
            *(dcp_kernel_word1 *)(uintptr_t)to = *(const dcp_kernel_word1 *)(uintptr_t)from;
            break;
        }
    }
}

/* All that thread `thread` of `threads` does for a job.  `step` has the digits of `threads`. */
DCP_KERNEL_FN void
dcp_kernel_move_thread(const struct dcp_kernel_job *job, const struct dcp_kernel_at *step,
                       uint32_t thread, uint32_t threads, bool to_packed)
{
    struct dcp_kernel_at at;

    if (thread >= job->count) {
        return;
    }
    dcp_kernel_at_item(job, job->first + thread, &at);
    for (uint64_t i = thread; i < job->count; i += threads) {
        uint64_t strided = job->strided + (uint64_t)at.offset_bytes;
        uint64_t packed = job->packed + i * job->item_bytes;
        dcp_kernel_copy_item(to_packed ? packed : strided, to_packed ? strided : packed,
                             job->item_bytes, job->access_bytes);
        dcp_kernel_at_advance(job, step, &at);
    }
}

/* a * b modulo P. */
DCP_KERNEL_FN uint32_t
dcp_kernel_crc_multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (int i = 0; i < 32; i++) {
        product ^= b & (0u - (a >> 31));
        a <<= 1;
        b = (b >> 1) ^ (0xEDB88320u & (0u - (b & 1u)));
    }
    return product;
}

/* value * x^bits modulo P. */
DCP_KERNEL_FN uint32_t
dcp_kernel_crc_shift(const uint32_t *powers, uint32_t value, uint32_t bits)
{
    for (uint32_t k = 0; bits != 0; k++, bits >>= 1) {
        if ((bits & 1u) != 0) {
            value = dcp_kernel_crc_multiply(powers[k], value);
        }
    }
    return value;
}

/* Entry i of the table that shifts by one row of `threads` words. */
DCP_KERNEL_FN uint32_t
dcp_kernel_crc_table_entry(const uint32_t *powers, uint32_t threads, uint32_t i)
{
    return dcp_kernel_crc_shift(powers, (i & 255u) << (8u * (i >> 8)), 32u * threads);
}

/* The last `bytes` bytes of a slice, which may be fewer than it has room for, or none. */
struct dcp_kernel_slice {
    uint64_t data;
    uint32_t bytes;
    uint32_t behind; /* slices of the block behind it */
    bool in_last;    /* block of the range */
};

DCP_KERNEL_FN struct dcp_kernel_slice
dcp_kernel_crc_slice(const struct dcp_kernel_checksum *params, uint32_t index)
{
    uint64_t begin = (uint64_t)(index / DCP_KERNEL_CRC_SLICES) * DCP_BLOCK_BYTES;
    uint64_t left = params->bytes - begin;
    uint32_t block_bytes = left < DCP_BLOCK_BYTES ? (uint32_t)left : DCP_BLOCK_BYTES;
    struct dcp_kernel_slice slice;

    slice.in_last = left <= DCP_BLOCK_BYTES;
    slice.behind = index % DCP_KERNEL_CRC_SLICES;
    uint32_t behind_bytes = slice.behind * DCP_KERNEL_CRC_SLICE_BYTES;
    uint32_t end = block_bytes > behind_bytes ? block_bytes - behind_bytes : 0;
    slice.bytes = end < DCP_KERNEL_CRC_SLICE_BYTES ? end : DCP_KERNEL_CRC_SLICE_BYTES;
    slice.data = params->data + begin + (end - slice.bytes);
    return slice;
}

/* The word at `data` + `at`; bytes before `data` are zeros. */
DCP_KERNEL_FN uint32_t
dcp_kernel_crc_word(uint64_t data, int64_t at)
{
    uint32_t word = 0;
    if (at >= 0 && ((data + (uint64_t)at) & 3u) == 0) {
        return *(const dcp_kernel_word4 *)(uintptr_t)(data + (uint64_t)at);
    }
    for (int i = 0; i < 4; i++) {
        if (at + i >= 0) {
            uint64_t address = data + (uint64_t)(at + i);
            word |= (uint32_t) * (const dcp_kernel_word1 *)(uintptr_t)address << (8 * i);
        }
    }
    return word;
}

/* The register `sum`, one row of words later. */
DCP_KERNEL_FN uint32_t
dcp_kernel_crc_row(const uint32_t *table, uint32_t sum)
{
    return table[sum & 255u] ^ table[256u + ((sum >> 8) & 255u)] ^
           table[512u + ((sum >> 16) & 255u)] ^ table[768u + (sum >> 24)];
}

/* What thread `thread` of `threads` adds to the register of a slice. */
DCP_KERNEL_FN uint32_t
dcp_kernel_crc_thread(const struct dcp_kernel_checksum *params, const uint32_t *table,
                      const struct dcp_kernel_slice *slice, uint32_t thread, uint32_t threads)
{
    uint32_t row_bytes = 4u * threads;
    uint32_t rows = (slice->bytes + row_bytes - 1) / row_bytes;
    int64_t at = (int64_t)slice->bytes - (int64_t)rows * row_bytes + 4 * (int64_t)thread;
    uint32_t sum = 0, row = 0;

    if (rows > 0) {
        sum = dcp_kernel_crc_word(slice->data, at);
        at += row_bytes;
        row = 1;
    }
    /* Several loads are under way before the first of them is needed. */
    bool aligned = ((slice->data + (uint64_t)at) & 3u) == 0;
    for (; aligned && rows - row >= DCP_KERNEL_CRC_LOADS; row += DCP_KERNEL_CRC_LOADS) {
        uint32_t words[DCP_KERNEL_CRC_LOADS];
        DCP_KERNEL_UNROLL
        for (uint32_t i = 0; i < DCP_KERNEL_CRC_LOADS; i++, at += row_bytes) {
            words[i] = *(const dcp_kernel_word4 *)(uintptr_t)(slice->data + (uint64_t)at);
        }
        DCP_KERNEL_UNROLL
        for (uint32_t i = 0; i < DCP_KERNEL_CRC_LOADS; i++) {
            sum = dcp_kernel_crc_row(table, sum) ^ words[i];
        }
    }
    for (; row < rows; row++, at += row_bytes) {
        sum = dcp_kernel_crc_row(table, sum) ^ dcp_kernel_crc_word(slice->data, at);
    }
    return dcp_kernel_crc_shift(params->powers, sum, 32u * (threads - thread));
}

/* What a slice adds to the CRC of its block, from the sum of what its threads gave. */
DCP_KERNEL_FN uint32_t
dcp_kernel_crc_of_slice(const struct dcp_kernel_checksum *params,
                        const struct dcp_kernel_slice *slice, uint32_t sum)
{
    sum =
        dcp_kernel_crc_shift(params->powers, sum, 8u * DCP_KERNEL_CRC_SLICE_BYTES * slice->behind);
    if (slice->behind == 0) {
        sum ^= slice->in_last ? params->begin_of_last : params->begin_of_full;
    }
    return sum;
}

/* For whoever launches it: the blocks of a range, not empty, and all that follows from them but the
 * place of the results. */
DCP_KERNEL_FN struct dcp_kernel_checksum
dcp_kernel_checksum_of(uint64_t data, uint64_t bytes)
{
    struct dcp_kernel_checksum params;
    uint32_t last_bytes = (uint32_t)((bytes - 1) % DCP_BLOCK_BYTES) + 1;

    params.data = data;
    params.bytes = bytes;
    params.crcs = 0;
    params.powers[0] = 1u << 30;
    for (int k = 1; k < DCP_KERNEL_CRC_POWERS_LEN; k++) {
        params.powers[k] = dcp_kernel_crc_multiply(params.powers[k - 1], params.powers[k - 1]);
    }
    params.begin_of_full = ~dcp_kernel_crc_shift(params.powers, 0xFFFFFFFFu, 8u * DCP_BLOCK_BYTES);
    params.begin_of_last = ~dcp_kernel_crc_shift(params.powers, 0xFFFFFFFFu, 8u * last_bytes);
    return params;
}

#endif

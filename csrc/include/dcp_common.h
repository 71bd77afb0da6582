/*
 * dcp_common.h: words that every file of the core shares.
 *
 * Compiler attributes, assertions and checked arithmetic.  The border headers are plain C11 and can
 * be included from C++; the core implements them with libc alone.
 */
#ifndef DCP_COMMON_H
#define DCP_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DCP_MUST_CHECK __attribute__((warn_unused_result))
#define DCP_PRINTF(fmt_index, first_arg) __attribute__((format(printf, fmt_index, first_arg)))

/* Bugs only: active in debug and test builds (-DDCP_DEBUG).  `assert` is not used: Python's build
 * passes -DNDEBUG. */
#ifdef DCP_DEBUG
void dcp_assert_failed(const char *file, int line, const char *what) __attribute__((noreturn));
#define DCP_ASSERT(cond) ((cond) ? (void)0 : dcp_assert_failed(__FILE__, __LINE__, #cond))
#else
#define DCP_ASSERT(cond) ((void)0)
#endif

/* Checked sums and products of sizes.  True when the result does not fit; *ret is then unspecified.
 */
static inline bool
dcp_add_overflows_u64(uint64_t a, uint64_t b, uint64_t *ret)
{
    return __builtin_add_overflow(a, b, ret);
}

static inline bool
dcp_mul_overflows_u64(uint64_t a, uint64_t b, uint64_t *ret)
{
    return __builtin_mul_overflow(a, b, ret);
}

static inline uint64_t
dcp_align_up(uint64_t value, uint64_t power_of_two)
{
    return (value + power_of_two - 1) & ~(power_of_two - 1);
}

static inline uint64_t
dcp_min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t
dcp_max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* 128 random bits that name one save; all zero means "none". */
struct dcp_save_id {
    uint8_t bytes[16];
};

/* A span of memory that somebody else owns. */
struct dcp_span {
    const uint8_t *data;
    size_t len;
};

#ifdef __cplusplus
}
#endif
#endif

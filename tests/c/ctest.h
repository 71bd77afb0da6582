/*
 * ctest.h: the smallest harness that can fail: CHECK, named cases, and a leak check after every case.
 *
 * A test file defines `static void case_x(void)` functions and lists them: CTEST_MAIN(RUN(case_x); RUN(case_y);)
 * Each case must leave dcp_alloc_live_bytes() where it found it.
 */
#ifndef CTEST_H
#define CTEST_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dcp_alloc.h"
#include "dcp_error.h"

static int ctest_failures;
static int ctest_cases;

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            ctest_failures++;                                                                      \
            fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #cond);               \
        }                                                                                          \
    } while (0)

#define CHECK_OK(call, err)                                                                        \
    do {                                                                                           \
        int ctest_rc = (call);                                                                     \
        if (ctest_rc != 0) {                                                                       \
            ctest_failures++;                                                                      \
            fprintf(stderr, "%s:%d: %s = %d: %s\n", __FILE__, __LINE__, #call, ctest_rc,           \
                    (err)->message);                                                               \
        }                                                                                          \
    } while (0)

#define CHECK_EQ(a, b)                                                                             \
    do {                                                                                           \
        long long ctest_a = (long long)(a), ctest_b = (long long)(b);                              \
        if (ctest_a != ctest_b) {                                                                  \
            ctest_failures++;                                                                      \
            fprintf(stderr, "%s:%d: %s = %lld, %s = %lld\n", __FILE__, __LINE__, #a, ctest_a, #b,  \
                    ctest_b);                                                                      \
        }                                                                                          \
    } while (0)

#define RUN(fn)                                                                                    \
    do {                                                                                           \
        uint64_t ctest_live = dcp_alloc_live_bytes();                                              \
        int ctest_before = ctest_failures;                                                         \
        fn();                                                                                      \
        ctest_cases++;                                                                             \
        if (dcp_alloc_live_bytes() != ctest_live) {                                                \
            ctest_failures++;                                                                      \
            fprintf(stderr, "%s: leaked %" PRId64 " bytes\n", #fn,                                 \
                    (int64_t)(dcp_alloc_live_bytes() - ctest_live));                               \
        }                                                                                          \
        printf("%s %s\n", ctest_failures == ctest_before ? "ok  " : "FAIL", #fn);                  \
        fflush(stdout);                                                                            \
    } while (0)

#define CTEST_MAIN(...)                                                                            \
    int main(void)                                                                                 \
    {                                                                                              \
        __VA_ARGS__                                                                                \
        printf("%d passed, %d failed\n", ctest_cases - (ctest_failures ? 1 : 0), ctest_failures);  \
        return ctest_failures ? 1 : 0;                                                             \
    }

#endif

/*
 * measure.h: what programs that measure share: clocks, touched memory, processes side by side, the
 * middle of a few values, and the end of the program where something fails.
 */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dcp_error.h"

enum { MEDIAN_MOST_VALUES = 256 };

static inline int
median_compare(const void *left, const void *right)
{
    const double *a = left, *b = right;
    return *a < *b ? -1 : *a > *b;
}

/* `count`: 1 to MEDIAN_MOST_VALUES. */
static inline double
median(const double *values, int count)
{
    double sorted[MEDIAN_MOST_VALUES];
    memcpy(sorted, values, (size_t)count * sizeof *values);
    qsort(sorted, (size_t)count, sizeof *sorted, median_compare);
    return sorted[count / 2];
}

/* Ends the program, or the process of it that failed. */
static inline void
must(bool ok, const char *what, const struct dcp_error *err)
{
    if (!ok) {
        fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what,
                err != NULL && err->code != 0 ? err->message : strerror(errno));
        _exit(1);
    }
}

static inline double
seconds_of(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Touched memory, on huge pages where the kernel has any. */
static inline uint8_t *
map_touched(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED, "mmap", NULL);
    madvise(memory, bytes, MADV_HUGEPAGE);
    memset(memory, 1, bytes);
    return memory;
}

/* Zeroed memory that the processes of run_processes share. */
static inline void *
map_shared(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED, "memory", NULL);
    return memory;
}

/* For `count` processes, in memory from map_shared. */
static inline void
init_shared_barrier(pthread_barrier_t *barrier, int count)
{
    pthread_barrierattr_t attr;
    pthread_barrierattr_init(&attr);
    pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(barrier, &attr, (unsigned)count);
}

/* Runs run(bench) in `count` processes, *process telling which, and waits for all of them.
 * `barrier` lies in memory from map_shared. */
static inline void
run_processes(int count, pthread_barrier_t *barrier, int *process, void (*run)(void *bench),
              void *bench)
{
    init_shared_barrier(barrier, count);
    for (*process = 0; *process < count; (*process)++) {
        pid_t child = fork();
        must(child >= 0, "fork", NULL);
        if (child == 0) {
            run(bench);
            _exit(0);
        }
    }
    for (int i = 0; i < count; i++) {
        int status = -1;
        must(wait(&status) > 0 && status == 0, "a process failed", NULL);
    }
}

#endif

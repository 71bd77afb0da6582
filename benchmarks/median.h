/*
 * median.h: the middle of a few measurements.
 */
#ifndef BENCH_MEDIAN_H
#define BENCH_MEDIAN_H

#include <stdlib.h>
#include <string.h>

enum { MEDIAN_MOST_VALUES = 256 };

static int
median_compare(const void *left, const void *right)
{
    const double *a = left, *b = right;
    return *a < *b ? -1 : *a > *b;
}

/* `count`: 1 to MEDIAN_MOST_VALUES. */
static double
median(const double *values, int count)
{
    double sorted[MEDIAN_MOST_VALUES];
    memcpy(sorted, values, (size_t)count * sizeof *values);
    qsort(sorted, (size_t)count, sizeof *sorted, median_compare);
    return sorted[count / 2];
}

#endif

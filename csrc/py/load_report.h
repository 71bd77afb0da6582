/*
 * load_report.h: what a load did with each name, in a form that outlives the load and costs next to
 * nothing until somebody looks.
 */
#ifndef DCP_LOAD_REPORT_H
#define DCP_LOAD_REPORT_H

#include "load_targets.h"

/* A dict: for every list X of names, X_count and X, bytes that hold the first of the names (u32
 * length and UTF-8 each); `unexpected_prefixes`, u64 count, u32 length and UTF-8 each.  Needs a
 * plan that is built; returns new. */
PyObject *load_report(const struct load_targets *targets);

/* The same of the lists `filled`, `partly`, `untouched`, with all names.  `objects` says what
 * became of objects. */
PyObject *load_outcome(const struct load_targets *targets, enum dcp_target_state objects);

#endif

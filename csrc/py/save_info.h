/*
 * save_info.h: what is known of a save, as Python sees it.
 */
#ifndef DCP_PY_SAVE_INFO_H
#define DCP_PY_SAVE_INFO_H

#include <Python.h>

#include "dcp_transfer.h"

/* "unknown", "committed", "aborted" or "superseded". */
const char *save_outcome_name(enum dcp_outcome outcome);
/* -1 with ValueError for anything else. */
int save_outcome_parse(PyObject *name, enum dcp_outcome *ret_outcome);

/* Returns new: counts, bytes and nanoseconds per phase. */
PyObject *save_info_as_dict(const struct dcp_save_info *info, uint64_t progress_bytes);

#endif

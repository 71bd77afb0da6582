/*
 * dcp_error.h: the one error record and the one list of codes.
 *
 * A fallible function returns 0 or a negative code and fills the record it was given, once, where
 * the failure happened.  Callers add nothing but context they alone know (rank).  csrc/py/errors.c
 * turns a record into a Python exception; nothing else does.
 */
#ifndef DCP_ERROR_H
#define DCP_ERROR_H

#include "dcp_common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* X(name, value, text).  The text is what a user reads when the place of failure had nothing better
 * to say. */
#define DCP_ERROR_CODES(X)                                                                         \
    X(NOMEM, -1, "out of memory")                                                                  \
    X(IO, -2, "input/output error")                                                                \
    X(INVALID, -3, "invalid argument")                                                             \
    X(LIMIT, -4, "a limit was exceeded")                                                           \
    X(CORRUPT, -5, "the checkpoint is damaged")                                                    \
    X(CHECKSUM, -6, "a checksum does not match")                                                   \
    X(UNSUPPORTED, -7, "not supported by the native path")                                         \
    X(PLAN, -8, "the global plan is not valid")                                                    \
    X(ASSERTION, -9, "an item contradicts another rank's")                                         \
    X(EXISTS, -10, "the checkpoint exists already")                                                \
    X(SUPERSEDED, -11, "another save took over this directory")                                    \
    X(REMOVED, -12, "the directory was removed")                                                   \
    X(COMM, -13, "communication failed")                                                           \
    X(TIMEOUT, -14, "a deadline passed")                                                           \
    X(CANCELLED, -15, "cancelled")                                                                 \
    X(PEER, -16, "another rank failed")                                                            \
    X(MISSING, -17, "not in the checkpoint")                                                       \
    X(MISMATCH, -18, "does not fit what was saved")                                                \
    X(HOLE, -19, "part of the target is not in the checkpoint")                                    \
    X(NOENT, -20, "no such file")                                                                  \
    X(INTERNAL, -21, "internal error")                                                             \
    X(STALE, -22, "the file belongs to another save")

enum dcp_code {
    DCP_OK = 0,
#define X(name, value, text) DCP_E_##name = value,
    DCP_ERROR_CODES(X)
#undef X
};

enum { DCP_ERROR_PATH_BYTES = 512, DCP_ERROR_MESSAGE_BYTES = 1536 };

struct dcp_error {
    int32_t code;      /* enum dcp_code */
    int32_t sys_errno; /* 0 when no system call is to blame */
    int32_t rank;      /* group rank where it happened, -1 when unknown */
    int32_t reserved;
    uint64_t offset_bytes;                 /* in `path`; UINT64_MAX when it has no meaning */
    char path[DCP_ERROR_PATH_BYTES];       /* "" when no file is involved */
    char message[DCP_ERROR_MESSAGE_BYTES]; /* what was tried, on what, what happened, what to do */
};

void dcp_error_clear(struct dcp_error *err);

/* Fills *err (which may be NULL) and returns `code`, so that `return dcp_error_set(...)` reads
 * well.  When the record is filled already the first failure is kept. `path` may be NULL. */
int dcp_error_set(struct dcp_error *err, int code, int sys_errno, const char *path, const char *fmt,
                  ...) DCP_PRINTF(5, 6);

const char *dcp_code_name(int code);
const char *dcp_code_text(int code);

#ifdef __cplusplus
}
#endif
#endif

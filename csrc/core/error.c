/*
 * error.c: the error record: cleared, filled once, named.
 *
 * The first failure is the one a user needs, so a filled record is never overwritten: code that
 * cleans up after an error may call anything that takes the same record.  A path that does not fit
 * keeps its end, which is the part that names the file.
 *
 * Threads: a record belongs to one thread at a time; the functions keep no state.
 */
#include "dcp_error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

static void
copy_text_end(char *dst, size_t cap, const char *src)
{
    static const char dots[] = "...";
    size_t len = strlen(src);
    if (len < cap) {
        memcpy(dst, src, len + 1);
        return;
    }
    size_t keep = cap - sizeof dots;
    memcpy(dst, dots, sizeof dots - 1);
    memcpy(dst + sizeof dots - 1, src + len - keep, keep + 1);
}

void
dcp_error_clear(struct dcp_error *err)
{
    if (err == NULL) {
        return;
    }
    err->code = DCP_OK;
    err->sys_errno = 0;
    err->rank = -1;
    err->reserved = 0;
    err->offset_bytes = UINT64_MAX;
    err->path[0] = '\0';
    err->message[0] = '\0';
}

int
dcp_error_set(struct dcp_error *err, int code, int sys_errno, const char *path, const char *fmt,
              ...)
{
    DCP_ASSERT(code < 0);
    if (err == NULL || err->code != DCP_OK) {
        return code;
    }
    dcp_error_clear(err);
    err->code = code;
    err->sys_errno = sys_errno;
    if (path != NULL) {
        copy_text_end(err->path, sizeof err->path, path);
    }
    if (fmt == NULL) {
        copy_text_end(err->message, sizeof err->message, dcp_code_text(code));
        return code;
    }
    va_list args;
    va_start(args, fmt);
    int written = vsnprintf(err->message, sizeof err->message, fmt, args);
    va_end(args);
    if (written < 0) {
        copy_text_end(err->message, sizeof err->message, dcp_code_text(code));
    }
    return code;
}

const char *
dcp_code_name(int code)
{
    switch (code) {
    case DCP_OK:
        return "OK";
#define X(name, value, text)                                                                       \
    case DCP_E_##name:                                                                             \
        return #name;
        DCP_ERROR_CODES(X)
#undef X
    default:
        return "UNKNOWN";
    }
}

const char *
dcp_code_text(int code)
{
    switch (code) {
    case DCP_OK:
        return "no error";
#define X(name, value, text)                                                                       \
    case DCP_E_##name:                                                                             \
        return text;
        DCP_ERROR_CODES(X)
#undef X
    default:
        return "unknown error";
    }
}

#ifdef DCP_DEBUG
/* The one place of the core that writes to stderr and ends the process; release builds lack it.
 * The text goes out in one unbuffered call, because stdio's lock may be held by a dead thread. */
void
dcp_assert_failed(const char *file, int line, const char *what)
{
    char text[512];
    int len = snprintf(text, sizeof text, "%s:%d: assertion failed: %s\n", file, line, what);
    size_t shown = len < 0 ? 0 : (size_t)len < sizeof text ? (size_t)len : sizeof text - 1;
    struct iovec part = {.iov_base = text, .iov_len = shown};
    ssize_t ignored = writev(2, &part, 1);
    (void)ignored;
    abort();
}
#endif

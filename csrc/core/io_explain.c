/*
 * io_explain.c: the one place that says what to do about a failed system call.
 *
 * A checkpoint that cannot be saved is met by somebody who is paged for it.  The system's text
 * names the symptom; what is added here is what it means for the save and the first thing to look
 * at.  Of a full disk the two numbers are given, as far as the file system tells: quotas and inodes
 * do not show in them, so that "enough bytes are free" is itself the hint to look there.
 *
 * Threads: no state.
 */
#include "io_explain.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* What to do; NULL where nothing can be said in general. */
static const char *
advice(int sys_errno)
{
    switch (sys_errno) {
    case ENOSPC:
        return "the file system is full: free some space there (or inodes, see df -i) or save "
               "elsewhere";
    case EDQUOT:
        return "the disk quota of this user, group or project is used up: remove files that it "
               "counts, have it raised, or save elsewhere";
    case EROFS:
        return "the file system is read-only: mount it for writing, or save elsewhere; a kernel "
               "that met disk errors makes it so by itself (see dmesg)";
    case EACCES:
    case EPERM:
        return "this process may not do that there: check owner and mode of the directory, and the "
               "user that runs the job";
    case EIO:
        return "the device or the server reports an error: check it (see dmesg)";
    case EFBIG:
        return "the file would be larger than this process (see ulimit -f) or the file system "
               "allows: raise the limit, or save from more ranks or with a larger thread_count";
    case EMFILE:
    case ENFILE:
        return "too many files are open: raise the limit (see ulimit -n)";
    case ENOTDIR:
        return "a part of the path is a file, not a directory: remove it or save elsewhere";
    case ENOENT:
    case ESTALE:
        return "it was removed, perhaps with its directory: let nobody else clean up there";
    default:
        return NULL;
    }
}

/* The rest of a buffer; what does not fit is cut. */
struct text {
    char *at;
    size_t left; /* the terminating zero included */
};

static void DCP_PRINTF(2, 3) put(struct text *out, const char *fmt, ...)
{
    va_list args;
    int len;

    va_start(args, fmt);
    len = vsnprintf(out->at, out->left, fmt, args);
    va_end(args);
    if (len > 0) {
        size_t step = (size_t)dcp_min_u64((uint64_t)len, out->left - 1);
        out->at += step;
        out->left -= step;
    }
}

static void
put_numbers(const struct dcp_io_trouble *trouble, struct text *out)
{
    struct dcp_space space;

    if (trouble->fd < 0 || trouble->io->space(trouble->io->ctx, trouble->fd, &space) != 0) {
        return;
    }
    put(out, " (%" PRIu64 " bytes are free now", space.free_bytes);
    if (trouble->need_bytes != 0) {
        put(out, ", this rank writes %" PRIu64, trouble->need_bytes);
    }
    put(out, ")");
}

const char *
dcp_io_explain(const struct dcp_io_trouble *trouble, char text[DCP_IO_EXPLAIN_BYTES])
{
    const char *what_to_do = advice(trouble->sys_errno);
    struct text out = {.at = text, .left = DCP_IO_EXPLAIN_BYTES};

    put(&out, "%s", strerror(trouble->sys_errno));
    if (trouble->sys_errno == ENOSPC || trouble->sys_errno == EDQUOT) {
        put_numbers(trouble, &out);
    }
    if (trouble->syncing) {
        put(&out, "; what was written there must be taken for lost, even where it can be read");
    }
    if (what_to_do != NULL) {
        put(&out, "; %s", what_to_do);
    }
    return text;
}

/*
 * source_pages.c: pages of a mapped file that are saved: in before they are copied, out after.
 *
 * A state dict that torch.load has mapped would come into memory as a whole while it is saved, one
 * fault for every few pages.  Asked for in steps it comes at the speed of the device and takes no
 * more memory than a step; asked for with an answer, a file that was cut short or cannot be read is
 * an error and no crash.  Nobody may have written to the pages: what was written would be lost.
 *
 * Threads: no state.
 */
#include "source_pages.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAW_MADV_POPULATE_READ = 22 };

/* Read ahead of what is copied: two requests of the writer. */
#define AHEAD_BYTES (16u << 20)

/* The first byte of its page. */
static uint8_t *
page_of(const uint8_t *data)
{
    uintptr_t mask = (uintptr_t)sysconf(_SC_PAGESIZE) - 1;
    return (uint8_t *)((uintptr_t)data & ~mask);
}

int
source_pages_need(const struct dcp_engine_options *options, const uint8_t *data, uint64_t len,
                  struct dcp_error *err)
{
    uint8_t *from = page_of(data);
    const uint8_t *end = data + len;
    uint64_t ahead = dcp_min_u64((uint64_t)(options->mapped_to - end), AHEAD_BYTES);
    if (ahead > 0) {
        (void)madvise(page_of(end), (size_t)(end + ahead - page_of(end)), MADV_WILLNEED);
    }
    while (madvise(from, (size_t)(end - from), RAW_MADV_POPULATE_READ) != 0) {
        if (errno == EFAULT || errno == EHWPOISON) {
            return dcp_error_set(err, DCP_E_IO, EIO, NULL,
                                 "reading the mapped file that is saved failed: it was cut short, "
                                 "or its device fails");
        }
        if (errno != EINTR && errno != EAGAIN) {
            break; /* an older kernel: pages come as they are touched */
        }
    }
    return 0;
}

void
source_pages_done(const uint8_t *data, uint64_t len)
{
    /* The last page is done with what lies behind, the first was in part before. */
    uint8_t *from = page_of(data), *to = page_of(data + len);
    if (from < to) {
        (void)madvise(from, (size_t)(to - from), MADV_DONTNEED);
    }
}

/*
 * fake_cufile.c: libcufile.so.0 for tests: reads files into the memory of the fake devices.
 *
 * cuFileRead reads less than it was asked for now and then, as the real one may.  Functions that
 * torch links to and no test needs answer an error.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "fake_gpu.h"

#define CUFILE_ERROR 5001
#define ALIGN_BYTES 4096u

struct status {
    int error, driver;
};

struct description {
    int type;
    union {
        int fd;
        void *handle;
    } handle;
    const void *operations;
};

static struct status
status_of(int code)
{
    return (struct status){.error = code != FAKE_OK ? CUFILE_ERROR : 0, .driver = code};
}

struct status
cuFileDriverOpen(void)
{
    return status_of(fake_enter(__func__));
}

struct status
cuFileDriverClose(void)
{
    return status_of(fake_enter(__func__));
}

struct status
cuFileHandleRegister(void **handle, struct description *description)
{
    int code = fake_enter(__func__), *fd = malloc(sizeof(*fd));

    if (code != FAKE_OK || fd == NULL) {
        free(fd);
        return status_of(code != FAKE_OK ? code : FAKE_NO_MEMORY);
    }
    *fd = description->handle.fd;
    *handle = fd;
    return status_of(FAKE_OK);
}

void
cuFileHandleDeregister(void *handle)
{
    (void)fake_enter(__func__);
    free(handle);
}

/* As the real one it aligns what direct I/O wants aligned. */
static ssize_t
read_anywhere(int fd, char *to, size_t bytes, off_t offset)
{
    size_t skip = (size_t)offset % ALIGN_BYTES;
    size_t room = (skip + bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    char *buffer = aligned_alloc(ALIGN_BYTES, room);
    ssize_t n = buffer == NULL ? -1 : pread(fd, buffer, room, offset - (off_t)skip);

    if (n > (ssize_t)skip) {
        n -= (ssize_t)skip;
        n = n < (ssize_t)bytes ? n : (ssize_t)bytes;
        memcpy(to, buffer + skip, (size_t)n);
    } else if (n >= 0) {
        n = 0;
    }
    free(buffer);
    return n;
}

ssize_t
cuFileRead(void *handle, void *memory, size_t bytes, off_t file_offset, off_t memory_offset)
{
    struct fake_range range;
    char *to = (char *)memory + memory_offset;
    size_t wanted = bytes > 65536 ? bytes / 2 : bytes;

    if (fake_enter(__func__) != FAKE_OK || !fake_range_of(to, &range) ||
        range.kind != FAKE_MEMORY_DEVICE || (uintptr_t)to + bytes > range.start + range.bytes) {
        return -CUFILE_ERROR;
    }
    return read_anywhere(*(int *)handle, to, wanted, file_offset);
}

ssize_t
cuFileWrite(void *handle, const void *memory, size_t bytes, off_t file_offset, off_t memory_offset)
{
    (void)handle;
    (void)memory;
    (void)bytes;
    (void)file_offset;
    (void)memory_offset;
    return -CUFILE_ERROR;
}

struct status
cuFileBufRegister(const void *memory, size_t bytes, int flags)
{
    (void)memory;
    (void)bytes;
    (void)flags;
    return status_of(fake_enter(__func__));
}

struct status
cuFileBufDeregister(const void *memory)
{
    (void)memory;
    return status_of(fake_enter(__func__));
}

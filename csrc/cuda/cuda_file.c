/*
 * cuda_file.c: reads from files straight into device memory, through cuFile.
 *
 * Only for those who ask: starting cuFile takes threads, pinned memory and time.  It has its own
 * opinion on which files it can read; whatever it says, the answer is DCP_E_UNSUPPORTED and the
 * caller reads through the host, where a file that is really broken gets its error.
 *
 * cuFile knows no stream, so what was put on ours, and what ours waits for, has to be over first.
 * A file is registered for the length of a call: calls are few and long, and nobody has to know
 * when a descriptor is closed.
 *
 * Threads: one at a time for a table; a mutex guards the start.  Compiled and run on a stand-in,
 * not on a GPU.
 */
#include "cuda_device.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

/* One call of cuFile: it takes any size_t, and a cancelled load need not wait for all of it. */
#define READ_BYTES (UINT64_C(1) << 30)

static atomic_bool is_open;
static pthread_mutex_t open_mutex = PTHREAD_MUTEX_INITIALIZER;

bool
cuda_file_is_open(void)
{
    return atomic_load(&is_open);
}

void
cuda_file_forget(void)
{
    atomic_store(&is_open, false);
}

static int
refused(const struct cuda_stay *stay, const char *what, unsigned int error, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                         "cuda:%d: cuFile cannot %s (error %u); the file is read through the host",
                         (int)stay->index, what, error);
}

static int
open_locked(const struct cuda_stay *stay, struct dcp_error *err)
{
    const struct cufile_api *api = cufile_api();

    if (api == NULL) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                             "cuda:%d: cuFile (libcufile.so.0) cannot be loaded; files are read "
                             "through the host",
                             (int)stay->index);
    }
    struct cufile_status status = api->cuFileDriverOpen();
    /* torch may have started it. */
    if (status.error != 0 && status.error != DCP_CUFILE_ALREADY_OPEN) {
        return refused(stay, "start", status.error, err);
    }
    atomic_store(&is_open, true);
    return 0;
}

int
dcp_cuda_use_cufile(struct dcp_device *device, struct dcp_error *err)
{
    struct cuda_stay stay;
    int rc = cuda_enter(device->index, &stay, err);

    if (rc != 0) {
        return rc;
    }
    (void)pthread_mutex_lock(&open_mutex);
    if (!cuda_file_is_open()) {
        rc = open_locked(&stay, err);
    }
    (void)pthread_mutex_unlock(&open_mutex);
    cuda_leave(&stay);
    if (rc == 0) {
        device->features |= DCP_DEVICE_READS_FILES;
    }
    return rc;
}

static int
read_all(const struct cuda_stay *stay, void *file, uint64_t offset_bytes, uint64_t device,
         uint64_t bytes, struct dcp_error *err)
{
    uint64_t done = 0;

    while (done < bytes) {
        ssize_t n = cufile_api()->cuFileRead(file, (void *)(uintptr_t)device,
                                             dcp_min_u64(bytes - done, READ_BYTES),
                                             (off_t)(offset_bytes + done), (off_t)done);
        if (n <= 0) {
            /* -1 stands for errno, 0 for a file that ends early. */
            unsigned int error = n == 0 ? 0 : n == -1 ? (unsigned int)errno : (unsigned int)-n;
            return refused(stay, "read the file", error, err);
        }
        done += (uint64_t)n;
    }
    return 0;
}

int
cuda_file_read(void *ctx, int fd, uint64_t offset_bytes, uint64_t device, uint64_t bytes,
               struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    struct cufile_description description = {.type = DCP_CUFILE_HANDLE_FD, .handle = {.fd = fd}};
    struct cuda_stay stay;
    void *file = NULL;
    uint64_t end;
    int rc;

    DCP_ASSERT((table->device.features & DCP_DEVICE_READS_FILES) != 0);
    if (dcp_add_overflows_u64(offset_bytes, bytes, &end) || end > INT64_MAX) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "a read of %" PRIu64 " bytes from offset %" PRIu64
                             " ends behind any file",
                             bytes, offset_bytes);
    }
    rc = cuda_stream_wait_idle(table, err);
    if (rc == 0) {
        rc = cuda_enter(table->device.index, &stay, err);
    }
    if (rc != 0) {
        return rc;
    }
    struct cufile_status status = cufile_api()->cuFileHandleRegister(&file, &description);
    if (status.error != 0) {
        rc = refused(&stay, "use the file", status.error, err);
    } else {
        rc = read_all(&stay, file, offset_bytes, device, bytes, err);
        cufile_api()->cuFileHandleDeregister(file);
    }
    cuda_leave(&stay);
    return rc;
}

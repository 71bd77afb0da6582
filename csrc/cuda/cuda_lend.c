/*
 * cuda_lend.c: makes tables of devices, keeps them and lends them.
 *
 * A table is made when none of its device is free, so there are as many as saves and loads that ran
 * at once.  None is destroyed: what it pinned may have to be unpinned long after, and at the end of
 * a process CUDA may be gone before we are.  A table whose stream still has work, of a save that
 * gave up waiting, is not lent until that is over.
 *
 * The stream is non-blocking: the legacy default stream, on which torch runs by default, neither
 * waits for it nor makes it wait.  Its priority is the default, which is the lowest.
 *
 * Threads: any; a mutex guards the list.
 */
#include "cuda_device.h"

#include <pthread.h>

#include "dcp_alloc.h"

static struct cuda_table *tables;
static pthread_mutex_t tables_mutex = PTHREAD_MUTEX_INITIALIZER;

static const struct dcp_device functions = {
    .kind = "cuda",
    .follow = cuda_stream_follow,
    .lead = cuda_stream_lead,
    .to_host = cuda_copy_to_host,
    .to_device = cuda_copy_to_device,
    .to_device_rows = cuda_copy_rows_to_device,
    .pack = cuda_kernels_pack,
    .unpack = cuda_kernels_unpack,
    .checksum = cuda_sums_checksum,
    .read_file = cuda_file_read,
    .allocate = cuda_copy_allocate,
    .release = cuda_copy_release,
    .pin = cuda_pin,
    .unpin = cuda_unpin,
    .record = cuda_stream_record,
    .poll = cuda_stream_poll,
    .forget = cuda_stream_forget,
    .wait_idle = cuda_stream_wait_idle,
};

static void
table_destroy(struct cuda_table *table, const struct cuda_stay *stay)
{
    cuda_kernels_clean_up(table, stay);
    cuda_sums_drop(table, stay);
    if (table->sums.stream != NULL) {
        (void)stay->runtime->cudaStreamDestroy(table->sums.stream);
    }
    cuda_stream_clean_up(table, stay);
    if (table->order != NULL) {
        (void)stay->runtime->cudaEventDestroy(table->order);
    }
    if (table->stream != NULL) {
        (void)stay->runtime->cudaStreamDestroy(table->stream);
    }
    dcp_free(table);
}

static int
table_new(const struct cuda_stay *stay, struct cuda_table **ret_table, struct dcp_error *err)
{
    struct cuda_table *table = dcp_calloc(1, sizeof *table);
    int pools = 0;
    int rc;

    if (table == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a device's table");
    }
    table->device = functions;
    table->device.ctx = table;
    table->device.index = stay->index;
    rc = cuda_check(
        stay,
        stay->runtime->cudaStreamCreateWithFlags(&table->stream, DCP_CUDA_STREAM_NON_BLOCKING),
        "create a stream", err);
    if (rc == 0) {
        rc = cuda_check(
            stay, stay->runtime->cudaEventCreateWithFlags(&table->order, DCP_CUDA_EVENT_NO_TIMING),
            "create an event", err);
    }
    if (rc == 0) {
        rc = cuda_check(stay,
                        stay->runtime->cudaDeviceGetAttribute(
                            &pools, DCP_CUDA_ATTRIBUTE_MEMORY_POOLS, (int)stay->index),
                        "ask for memory pools", err);
    }
    if (rc == 0) {
        table->has_pools = pools != 0;
        table->kernels = cuda_kernels_of(stay);
        table->device.features |= table->kernels.pack != NULL ? DCP_DEVICE_PACKS : 0;
    }
    if (rc == 0 && table->kernels.pack != NULL && table->has_pools) {
        table->device.features |= DCP_DEVICE_CHECKSUMS;
        rc = cuda_check(stay,
                        stay->runtime->cudaStreamCreateWithFlags(&table->sums.stream,
                                                                 DCP_CUDA_STREAM_NON_BLOCKING),
                        "create a stream", err);
    }
    if (rc != 0) {
        table_destroy(table, stay);
        return rc;
    }
    *ret_table = table;
    return 0;
}

/* Whether a table that was given back has nothing left to do. */
static bool
is_idle(const struct cuda_table *table, const struct cuda_stay *stay)
{
    if (stay->runtime->cudaStreamQuery(table->stream) == 0 &&
        (!table->sums.is_used || stay->runtime->cudaStreamQuery(table->sums.stream) == 0)) {
        return true;
    }
    (void)stay->runtime->cudaGetLastError();
    return false;
}

static int
lend_locked(const struct cuda_stay *stay, struct cuda_table **ret_table, struct dcp_error *err)
{
    struct cuda_table *table = tables;

    while (table != NULL &&
           (table->lent || table->device.index != stay->index || !is_idle(table, stay))) {
        table = table->next;
    }
    if (table == NULL) {
        int rc = table_new(stay, &table, err);
        if (rc != 0) {
            return rc;
        }
        table->next = tables;
        tables = table;
    }
    table->lent = true;
    if (cuda_file_is_open()) {
        table->device.features |= DCP_DEVICE_READS_FILES;
    }
    *ret_table = table;
    return 0;
}

int
dcp_cuda_lend(int32_t index, struct dcp_device **ret, struct dcp_error *err)
{
    struct cuda_table *table = NULL;
    struct cuda_stay stay;
    int rc = cuda_enter(index, &stay, err);

    if (rc != 0) {
        return rc;
    }
    (void)pthread_mutex_lock(&tables_mutex);
    rc = lend_locked(&stay, &table, err);
    (void)pthread_mutex_unlock(&tables_mutex);
    cuda_leave(&stay);
    if (rc == 0) {
        *ret = &table->device;
    }
    return rc;
}

void
dcp_cuda_give_back(struct dcp_device *device)
{
    if (device != NULL) {
        struct cuda_table *table = device->ctx;
        struct cuda_stay stay;
        if (table->sums.memory != NULL && cuda_enter(device->index, &stay, NULL) == 0) {
            cuda_sums_drop(table, &stay);
            cuda_leave(&stay);
        }
        (void)pthread_mutex_lock(&tables_mutex);
        DCP_ASSERT(table->lent);
        table->lent = false;
        (void)pthread_mutex_unlock(&tables_mutex);
    }
}

void
dcp_cuda_clean_up(void)
{
    struct cuda_stay stay;

    (void)pthread_mutex_lock(&tables_mutex);
    while (tables != NULL) {
        struct cuda_table *table = tables;
        tables = table->next;
        if (cuda_enter(table->device.index, &stay, NULL) == 0) {
            table_destroy(table, &stay);
            cuda_leave(&stay);
        }
    }
    (void)pthread_mutex_unlock(&tables_mutex);
    cuda_kernels_forget();
    cuda_file_forget();
    cuda_context_forget();
}

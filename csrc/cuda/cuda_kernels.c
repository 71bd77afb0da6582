/*
 * cuda_kernels.c: loads the kernels, and launches those that move boxes: pack, unpack.
 *
 * The image is loaded once per device of the process, when its first table is made.  A device that
 * none of its parts fits, or a driver that is older than the image, has no kernels: the table then
 * lacks the features, and its users copy another way.
 *
 * Jobs are written to pinned memory that the kernels read while they run.  Lists of them are kept
 * with their table; launches fill the current one up, and it is begun anew once the event behind
 * its last launch has happened.  No call waits for that: while all lists are in use there is one
 * more. What a list costs is proportional to the boxes in flight.
 *
 * Compiled and run on stand-ins for CUDA, not on a GPU. Threads: one at a time for a table; a mutex
 * guards loading.
 */
#include "cuda_device.h"

#include <pthread.h>
#include <string.h>

#include "cuda_image.h"
#include "dcp_alloc.h"
#include "kernel_jobs.h"

enum {
    /* One list: 1 MiB, jobs of some 6,000 small tensors. */
    LIST_JOBS = (1 << 20) / sizeof(struct dcp_kernel_job),
};

struct loaded {
    bool tried;
    struct cuda_kernels kernels;
};

static struct loaded loaded[CUDA_MAX_DEVICES];
static pthread_mutex_t load_mutex = PTHREAD_MUTEX_INITIALIZER;

/* All of them or none. */
static struct cuda_kernels
load(const struct cuda_stay *stay)
{
    const struct cuda_driver_api *driver = stay->driver;
    struct cuda_kernels kernels = {NULL, NULL, NULL};
    cuda_module module = NULL;

    if (cuda_image() == NULL || driver->cuModuleLoadData(&module, cuda_image()) != 0 ||
        driver->cuModuleGetFunction(&kernels.pack, module, DCP_KERNEL_PACK) != 0 ||
        driver->cuModuleGetFunction(&kernels.unpack, module, DCP_KERNEL_UNPACK) != 0 ||
        driver->cuModuleGetFunction(&kernels.checksum, module, DCP_KERNEL_CHECKSUM) != 0) {
        return (struct cuda_kernels){NULL, NULL, NULL};
    }
    return kernels;
}

struct cuda_kernels
cuda_kernels_of(const struct cuda_stay *stay)
{
    struct loaded *of_device = &loaded[stay->index];

    (void)pthread_mutex_lock(&load_mutex);
    if (!of_device->tried) {
        of_device->kernels = load(stay);
        of_device->tried = true;
    }
    struct cuda_kernels kernels = of_device->kernels;
    (void)pthread_mutex_unlock(&load_mutex);
    return kernels;
}

void
cuda_kernels_forget(void)
{
    (void)pthread_mutex_lock(&load_mutex);
    memset(loaded, 0, sizeof loaded);
    (void)pthread_mutex_unlock(&load_mutex);
}

/* 1: all its launches are done; 0: not yet; negative: an error of the device. */
static int
list_is_free(const struct cuda_list *list, const struct cuda_stay *stay, struct dcp_error *err)
{
    cuda_status status = list->used == 0 ? 0 : stay->runtime->cudaEventQuery(list->event);

    if (status == DCP_CUDA_ERROR_NOT_READY) {
        (void)stay->runtime->cudaGetLastError();
        return 0;
    }
    int rc = cuda_check(stay, status, "run kernels that gather or scatter tensors", err);
    return rc == 0 ? 1 : rc;
}

static int
list_new(const struct cuda_stay *stay, struct cuda_list **ret_list, struct dcp_error *err)
{
    struct cuda_list *list = dcp_calloc(1, sizeof *list);
    void *jobs = NULL;

    if (list == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a list of jobs");
    }
    int rc = cuda_check(
        stay, stay->runtime->cudaEventCreateWithFlags(&list->event, DCP_CUDA_EVENT_NO_TIMING),
        "create an event", err);
    if (rc != 0) {
        dcp_free(list);
        return rc;
    }
    rc = cuda_check(stay,
                    stay->runtime->cudaHostAlloc(&jobs, LIST_JOBS * sizeof list->jobs[0],
                                                 DCP_CUDA_HOST_PORTABLE | DCP_CUDA_HOST_MAPPED),
                    "allocate pinned memory for a list of jobs", err);
    if (rc != 0) {
        (void)stay->runtime->cudaEventDestroy(list->event);
        dcp_free(list);
        return rc;
    }
    list->jobs = jobs;
    *ret_list = list;
    return 0;
}

/* Makes a list with room the table's first. */
static int
make_room(struct cuda_table *table, const struct cuda_stay *stay, struct dcp_error *err)
{
    struct cuda_list *list = NULL;

    for (struct cuda_list **at = &table->lists; *at != NULL; at = &(*at)->next) {
        int rc = list_is_free(*at, stay, err);
        if (rc < 0) {
            return rc;
        }
        if (rc > 0) {
            list = *at;
            *at = list->next;
            list->used = 0;
            break;
        }
        if (at == &table->lists && (*at)->used < LIST_JOBS) {
            return 0;
        }
    }
    if (list == NULL) {
        int rc = list_new(stay, &list, err);
        if (rc != 0) {
            return rc;
        }
    }
    list->next = table->lists;
    table->lists = list;
    return 0;
}

int
cuda_kernels_launch(const struct cuda_stay *stay, cuda_stream stream, cuda_function kernel,
                    uint32_t blocks, uint32_t threads, void *params, const char *what,
                    struct dcp_error *err)
{
    void *list[] = {params};
    return cuda_check_driver(
        stay,
        stay->driver->cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, list, NULL),
        what, err);
}

/* Launches the jobs [from, list->used + count) that were written to the first list. */
static int
launch_jobs(struct cuda_table *table, const struct cuda_stay *stay, cuda_function kernel,
            uint32_t count, struct dcp_error *err)
{
    struct cuda_list *list = table->lists;
    struct dcp_kernel_move params = {.jobs = (uint64_t)(uintptr_t)(list->jobs + list->used)};

    if (count == 0) {
        return 0;
    }
    int rc = cuda_kernels_launch(stay, table->stream, kernel, count, DCP_KERNEL_MOVE_THREADS,
                                 &params, "gather or scatter tensors", err);
    if (rc != 0) {
        return rc;
    }
    list->used += count;
    return cuda_check(stay, stay->runtime->cudaEventRecord(list->event, table->stream),
                      "record an event", err);
}

static int
move_boxes(struct cuda_table *table, const struct cuda_stay *stay, cuda_function kernel,
           const struct dcp_device_box *boxes, uint32_t count, struct dcp_error *err)
{
    struct kernel_cut cut;
    uint32_t jobs = 0;
    int rc = make_room(table, stay, err);

    for (uint32_t i = 0; rc == 0 && i < count; i++) {
        rc = kernel_cut_begin(&cut, &boxes[i], err);
        while (rc == 0) {
            struct cuda_list *list = table->lists;
            if (list->used + jobs == LIST_JOBS) {
                rc = launch_jobs(table, stay, kernel, jobs, err);
                jobs = 0;
                rc = rc == 0 ? make_room(table, stay, err) : rc;
                continue;
            }
            if (!kernel_cut_next(&cut, &list->jobs[list->used + jobs])) {
                break;
            }
            jobs++;
        }
    }
    return rc == 0 ? launch_jobs(table, stay, kernel, jobs, err) : rc;
}

static int
move(struct cuda_table *table, cuda_function kernel, const struct dcp_device_box *boxes,
     uint32_t count, struct dcp_error *err)
{
    struct cuda_stay stay;
    int rc;

    DCP_ASSERT((table->device.features & DCP_DEVICE_PACKS) != 0);
    rc = cuda_enter(table->device.index, &stay, err);
    if (rc == 0) {
        rc = move_boxes(table, &stay, kernel, boxes, count, err);
        cuda_leave(&stay);
    }
    return rc;
}

int
cuda_kernels_pack(void *ctx, const struct dcp_device_box *boxes, uint32_t count,
                  struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    return move(table, table->kernels.pack, boxes, count, err);
}

int
cuda_kernels_unpack(void *ctx, const struct dcp_device_box *boxes, uint32_t count,
                    struct dcp_error *err)
{
    struct cuda_table *table = ctx;
    return move(table, table->kernels.unpack, boxes, count, err);
}

void
cuda_kernels_clean_up(struct cuda_table *table, const struct cuda_stay *stay)
{
    while (table->lists != NULL) {
        struct cuda_list *list = table->lists;
        table->lists = list->next;
        (void)stay->runtime->cudaEventDestroy(list->event);
        (void)stay->runtime->cudaFreeHost(list->jobs);
        dcp_free(list);
    }
}

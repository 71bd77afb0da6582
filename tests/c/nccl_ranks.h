/*
 * nccl_ranks.h: ranks of the tests of the table over NCCL: processes with the fake libraries of
 * tests/fake.
 *
 * The process of the test stays without them, for one that has used CUDA cannot fork.  A case runs
 * on every rank and tells its failures by its exit status, so all of this is a part of the test.
 */
#ifndef DCP_TEST_NCCL_RANKS_H
#define DCP_TEST_NCCL_RANKS_H

#include <dlfcn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ctest.h"
#include "dcp_nccl.h"
#include "nccl_api.h"

enum { MAX_RANKS = 8, TIMEOUT_S = 100, SHORT_TIMEOUT_MS = 6000, SOON_S = 40 };

struct rank {
    uint32_t rank, size;
    nccl_comm group_comm; /* as torch would have it */
    void (*set_faults)(const char *text);
    struct dcp_nccl_source source;
};

typedef void case_fn(struct rank *self);

typedef struct {
    char internal[128];
} unique_id;

typedef nccl_status init_fn(nccl_comm *comm, int count, unique_id id, int rank,
                            const nccl_config *config);

static inline void *
function_of(const char *name)
{
    void *found = dlsym(RTLD_DEFAULT, name);
    if (found == NULL) {
        fprintf(stderr, "no %s\n", name);
        _exit(98);
    }
    return found;
}

static inline void
load_fakes(void)
{
    static const char *const names[] = {"libcuda.so.1", "libcudart.so.13", "libnccl.so.2"};
    for (int i = 0; i < 3; i++) {
        char path[64];
        (void)snprintf(path, sizeof path, "build/fake/%s", names[i]);
        if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == NULL) {
            fprintf(stderr, "%s\n", dlerror());
            _exit(98);
        }
    }
}

static inline void
become_rank(struct rank *self, uint32_t rank, uint32_t size, bool blocks, const unique_id *id)
{
    load_fakes();
    init_fn *init = (init_fn *)function_of("ncclCommInitRankConfig");
    nccl_config config = {.size = sizeof config,
                          .magic = DCP_NCCL_CONFIG_MAGIC,
                          .version = DCP_NCCL_CONFIG_VERSION,
                          .blocking = blocks};
    unsigned (*set_device)(int) = (unsigned (*)(int))function_of("cudaSetDevice");
    self->rank = rank;
    self->size = size;
    self->set_faults = (void (*)(const char *))function_of("fake_nccl_set_faults");
    if (set_device((int)(rank % 2)) != 0) {
        _exit(98);
    }
    nccl_status status = init(&self->group_comm, (int)size, *id, (int)rank, &config);
    while (status == DCP_NCCL_IN_PROGRESS) {
        (void)nccl_api()->ncclCommGetAsyncError(self->group_comm, &status);
    }
    if (status != 0) {
        _exit(98);
    }
    self->source = (struct dcp_nccl_source){
        .raw = self->group_comm,
        .rank = rank,
        .size = size,
        .timeout_ns = TIMEOUT_S * UINT64_C(1000000000),
    };
}

/* What each rank's process ended with.  The group's communicators block, or do not. */
static inline void
run_ranks(uint32_t size, bool blocks, case_fn *fn, int *ret_status)
{
    pid_t pids[MAX_RANKS];
    unique_id id = {{0}};
    static unsigned number;
    (void)snprintf(id.internal, sizeof id.internal, "test-%d-%u", (int)getpid(), ++number);
    (void)fflush(NULL);
    for (uint32_t r = 0; r < size; r++) {
        pids[r] = fork();
        if (pids[r] == 0) {
            struct rank self;
            ctest_failures = 0;
            become_rank(&self, r, size, blocks, &id);
            fn(&self);
            _exit(ctest_failures == 0 ? 0 : 1);
        }
    }
    for (uint32_t r = 0; r < size; r++) {
        CHECK_EQ(waitpid(pids[r], &ret_status[r], 0), pids[r]);
    }
}

static inline void
hold_on_ranks(uint32_t size, case_fn *fn)
{
    int status[MAX_RANKS];
    run_ranks(size, true, fn, status);
    for (uint32_t r = 0; r < size; r++) {
        CHECK_EQ(status[r], 0);
    }
}

static inline double
now_s(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* For cases that wait for a call's end. */
static inline void
be_impatient(struct rank *self)
{
    self->source.timeout_ns = SHORT_TIMEOUT_MS * UINT64_C(1000000);
}

static inline void
make(struct rank *self, struct dcp_comm *ret_comm)
{
    struct dcp_error err;
    dcp_error_clear(&err);
    CHECK_OK(dcp_nccl_comm_make(&self->source, ret_comm, &err), &err);
    if (ctest_failures != 0) {
        _exit(1);
    }
}

/* A call that every rank makes. */
static inline void
meet(const struct dcp_comm *comm)
{
    struct dcp_error err;
    int64_t lane = 0;
    dcp_error_clear(&err);
    CHECK_OK(comm->all_reduce_min(comm->ctx, &lane, 1, &err), &err);
}

/* The group's own communicator, as the trainer goes on with it. */
static inline void
check_group_comm(struct rank *self)
{
    const struct nccl_api *nccl = nccl_api();
    unsigned (*synchronize)(void *) = (unsigned (*)(void *))function_of("cudaStreamSynchronize");
    static int64_t lanes[2];
    nccl_status state = 0;
    lanes[0] = (int64_t)self->rank + 7;
    CHECK_EQ(
        nccl->ncclAllReduce(lanes, lanes, 1, DCP_NCCL_INT64, DCP_NCCL_MIN, self->group_comm, NULL),
        0);
    CHECK_EQ(synchronize(NULL), 0);
    CHECK_EQ(lanes[0], 7);
    CHECK_EQ(nccl->ncclCommGetAsyncError(self->group_comm, &state), 0);
    CHECK_EQ(state, 0);
}

#endif

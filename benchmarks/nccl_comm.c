/*
 * nccl_comm.c: what the table over NCCL costs beside the bare operations of the library.
 *
 *   make build/bench/nccl_comm && build/bench/nccl_comm [--quick]
 *
 * Two processes over the fake libraries of tests/fake, which say nothing of a GPU's times: what is
 * compared is our rounds (copies, waits, checks) with the same operations called on the same
 * communicator and waited for by the runtime.  Both move bytes of the host to bytes of the host.
 * Every result is verified.  Prints one line per exchange: microseconds of both, the best of some
 * rounds.
 */
#include "dcp_nccl.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "nccl_api.h"

enum { RANKS = 2, ROUNDS = 7, QUICK_ROUNDS = 2, DIE = 98 };

typedef struct {
    char internal[128];
} unique_id;

struct bench {
    uint32_t rank;
    int repeats, rounds;
    nccl_comm raw;
    cuda_stream stream;
    uint8_t *device; /* what the bare operations work on */
    uint8_t *pinned;
    cuda_status (*synchronize)(cuda_stream stream);
    struct dcp_comm comm;
};

static void
need(int ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "nccl_comm: %s\n", what);
        _exit(DIE);
    }
}

static void *
function_of(const char *name)
{
    void *found = dlsym(RTLD_DEFAULT, name);
    need(found != NULL, name);
    return found;
}

static double
now_us(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e6 * (double)now.tv_sec + 1e-3 * (double)now.tv_nsec;
}

static void
load_fakes(void)
{
    static const char *const paths[] = {"build/fake/libcuda.so.1", "build/fake/libcudart.so.13",
                                        "build/fake/libnccl.so.2"};
    (void)setenv("DCP_FAKE_CUDA_DELAY_US", "0", 1);
    for (int i = 0; i < 3; i++) {
        need(dlopen(paths[i], RTLD_NOW | RTLD_GLOBAL) != NULL, paths[i]);
    }
}

static void
set_up(struct bench *bench, const unique_id *id)
{
    load_fakes();
    nccl_status (*init)(nccl_comm *, int, unique_id, int) =
        (nccl_status(*)(nccl_comm *, int, unique_id, int))function_of("ncclCommInitRank");
    const struct cudart_api *cuda = cudart_api();
    struct dcp_error err;
    void *device = NULL;
    void *pinned = NULL;
    dcp_error_clear(&err);
    need(cuda != NULL && nccl_api() != NULL, "no tables");
    bench->synchronize = (cuda_status(*)(cuda_stream))function_of("cudaStreamSynchronize");
    need(init(&bench->raw, RANKS, *id, (int)bench->rank) == 0, "no communicator");
    need(cuda->cudaStreamCreateWithFlags(&bench->stream, DCP_CUDA_STREAM_NON_BLOCKING) == 0 &&
             cuda->cudaMallocAsync(&device, DCP_NCCL_SCRATCH_BYTES, bench->stream) == 0 &&
             cuda->cudaHostAlloc(&pinned, DCP_NCCL_SCRATCH_BYTES, 0) == 0,
         "no memory");
    bench->device = device;
    bench->pinned = pinned;
    struct dcp_nccl_source source = {
        .raw = bench->raw, .rank = bench->rank, .size = RANKS, .timeout_ns = UINT64_C(60000000000)};
    need(dcp_nccl_comm_make(&source, &bench->comm, &err) == 0, err.message);
}

/* The same bytes as the table's, from the host to the host. */
static void
bare(struct bench *bench, uint8_t *mine, uint8_t *all, size_t bytes, int reduces)
{
    const struct cudart_api *cuda = cudart_api();
    const struct nccl_api *nccl = nccl_api();
    size_t own = reduces ? 0 : bytes * bench->rank;
    size_t back = reduces ? bytes : bytes * RANKS;
    memcpy(bench->pinned + own, mine, bytes);
    need(cuda->cudaMemcpyAsync(bench->device + own, bench->pinned + own, bytes,
                               DCP_CUDA_COPY_HOST_TO_DEVICE, bench->stream) == 0,
         "copy");
    need((reduces ? nccl->ncclAllReduce(bench->device, bench->device, bytes / 8, DCP_NCCL_INT64,
                                        DCP_NCCL_MIN, bench->raw, bench->stream)
                  : nccl->ncclAllGather(bench->device + own, bench->device, bytes, DCP_NCCL_UINT8,
                                        bench->raw, bench->stream)) == 0,
         "operation");
    need(cuda->cudaMemcpyAsync(bench->pinned, bench->device, back, DCP_CUDA_COPY_DEVICE_TO_HOST,
                               bench->stream) == 0 &&
             bench->synchronize(bench->stream) == 0,
         "copy back");
    memcpy(reduces ? mine : all, bench->pinned, back);
}

static void
ours(struct bench *bench, uint8_t *mine, uint8_t *all, size_t bytes, int reduces)
{
    struct dcp_comm *comm = &bench->comm;
    struct dcp_error err;
    dcp_error_clear(&err);
    int rc = reduces ? comm->all_reduce_min(comm->ctx, (int64_t *)(void *)mine, bytes / 8, &err)
                     : comm->all_gather(comm->ctx, mine, all, bytes, &err);
    need(rc == 0, err.message);
}

typedef void exchange_fn(struct bench *bench, uint8_t *mine, uint8_t *all, size_t bytes,
                         int reduces);

static double
time_of(struct bench *bench, exchange_fn *exchange, size_t bytes, int reduces)
{
    double start, spent;
    uint8_t *mine = malloc(bytes);
    uint8_t *all = calloc(RANKS, bytes);
    need(mine != NULL && all != NULL, "no memory");
    memset(mine, (int)bench->rank + 1, bytes);
    start = now_us();
    for (int i = 0; i < bench->repeats; i++) {
        exchange(bench, mine, all, bytes, reduces);
    }
    spent = (now_us() - start) / bench->repeats;
    if (reduces) {
        need(mine[0] == 1 && mine[bytes - 1] == 1, "wrong least numbers");
    } else {
        need(all[0] == 1 && all[bytes] == 2 && all[2 * bytes - 1] == 2, "wrong parts");
    }
    free(all);
    free(mine);
    return spent;
}

/* The two take turns, so that what else runs on the machine meets both. */
static void
compare(struct bench *bench, const char *name, size_t bytes, int reduces)
{
    double best_bare = 1e30;
    double best_ours = 1e30;
    for (int round = 0; round < bench->rounds; round++) {
        double spent = time_of(bench, bare, bytes, reduces);
        best_bare = spent < best_bare ? spent : best_bare;
        spent = time_of(bench, ours, bytes, reduces);
        best_ours = spent < best_ours ? spent : best_ours;
    }
    if (bench->rank == 0) {
        (void)printf("%-10s %8zu bytes: bare %8.1f us, table %8.1f us, %+6.1f%%\n", name, bytes,
                     best_bare, best_ours, 100 * (best_ours / best_bare - 1));
        (void)fflush(stdout);
    }
}

static void
run_rank(uint32_t rank, const unique_id *id, int is_quick)
{
    struct bench bench = {
        .rank = rank, .repeats = is_quick ? 20 : 300, .rounds = is_quick ? QUICK_ROUNDS : ROUNDS};
    set_up(&bench, id);
    compare(&bench, "vote", 128, 1);
    compare(&bench, "all_gather", 64 << 10, 0);
    bench.repeats = is_quick ? 2 : 30;
    compare(&bench, "all_gather", 4 << 20, 0);
    bench.comm.destroy(bench.comm.ctx);
}

int
main(int argc, char **argv)
{
    int is_quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    int failed = 0;
    unique_id id = {{0}};
    (void)snprintf(id.internal, sizeof id.internal, "bench-%d", (int)getpid());
    for (uint32_t r = 0; r < RANKS; r++) {
        pid_t pid = fork();
        if (pid == 0) {
            run_rank(r, &id, is_quick);
            _exit(0);
        }
        need(pid > 0, "no process");
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        int status = 0;
        failed |= wait(&status) < 0 || status != 0;
    }
    return failed;
}

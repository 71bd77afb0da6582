/*
 * fake_nccl.c: a libnccl.so.2 for tests: communicators between processes of one machine without a
 * GPU, over shared memory.
 *
 * "Device" memory is whatever the CUDA runtime in the process hands out; with the fake one beside
 * this file that is memory of the host.  Operations run in the order of their stream: they are
 * given to cudaLaunchHostFunc of that runtime, and without one they run inside the call.  It has
 * what torch's process groups need; functions of other parts of NCCL are there, for the linker, and
 * say that they are not.
 *
 * Here are faults and what belongs to no communicator.  Communicators are in fake_nccl_comm.c and
 * fake_nccl_world.c, operations in fake_nccl_call.c and fake_nccl_op.c.
 *
 * Faults, from FAKE_NCCL_FAULTS or fake_nccl_set_faults, separated by commas; operations are
 * counted from 1, in this process, since the faults were set:
 * - fail=C@N: the N-th operation is refused with the result C.
 * - async=C@N: the N-th operation never ends, and its communicator's asynchronous error is C.
 * - hang@N: the N-th operation never ends until its communicator is aborted.
 * - split=C: ncclCommSplit is refused with the result C.
 * - slow=S: a communicator that is not blocking takes S seconds more to be joined.
 * - prompt: it is joined before the call that makes it returns.
 *
 * FAKE_NCCL_VERSION is what ncclGetVersion says; FAKE_NCCL_DEBUG=1 prints why something failed;
 * FAKE_NCCL_TIMEOUT_S, 120, ends what waits for ever.  Compiled with FAKE_NCCL_NO_SPLIT the library
 * has no ncclCommSplit, as before 2.18.
 */
#include "fake_nccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FAKE_VERSION = 23007 };

/* ---- faults ---- */

static pthread_mutex_t faults_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct {
    bool is_read;
    int fail, async, split; /* results */
    uint64_t fail_at, async_at, hang_at;
    double slow_s;
    bool prompt;
    uint64_t ops; /* so far */
} faults;
static _Atomic uint64_t ops_ever;

static void
read_faults_locked(const char *text)
{
    memset(&faults, 0, sizeof faults);
    faults.is_read = true;
    while (text != NULL && *text != '\0') {
        int result = 0;
        unsigned long long at = 0;
        if (sscanf(text, "fail=%d@%llu", &result, &at) == 2) {
            faults.fail = result;
            faults.fail_at = at;
        } else if (sscanf(text, "async=%d@%llu", &result, &at) == 2) {
            faults.async = result;
            faults.async_at = at;
        } else if (sscanf(text, "hang@%llu", &at) == 1) {
            faults.hang_at = at;
        } else if (strncmp(text, "prompt", 6) == 0) {
            faults.prompt = true;
        } else if (sscanf(text, "slow=%lf", &faults.slow_s) != 1 &&
                   sscanf(text, "split=%d", &faults.split) != 1) {
            (void)fprintf(stderr, "fake nccl: no such fault: %s\n", text);
            _exit(97);
        }
        text = strchr(text, ',');
        text = text == NULL ? NULL : text + 1;
    }
}

static void
lock_faults(void)
{
    (void)pthread_mutex_lock(&faults_mutex);
    if (!faults.is_read) {
        read_faults_locked(getenv("FAKE_NCCL_FAULTS"));
    }
}

EXPORT void fake_nccl_set_faults(const char *text);
EXPORT void
fake_nccl_set_faults(const char *text)
{
    (void)pthread_mutex_lock(&faults_mutex);
    read_faults_locked(text);
    (void)pthread_mutex_unlock(&faults_mutex);
}

/* Operations that this process ever called: whether NCCL was used at all. */
EXPORT unsigned long long fake_nccl_operations(void);
EXPORT unsigned long long
fake_nccl_operations(void)
{
    return atomic_load(&ops_ever);
}

ncclResult_t
fake_count_op(int *ret_fault)
{
    lock_faults();
    atomic_fetch_add(&ops_ever, 1);
    uint64_t at = ++faults.ops;
    ncclResult_t rc = at == faults.fail_at ? faults.fail : FAKE_SUCCESS;
    *ret_fault = at == faults.async_at ? faults.async : at == faults.hang_at ? -1 : 0;
    (void)pthread_mutex_unlock(&faults_mutex);
    if (rc != FAKE_SUCCESS) {
        fake_note("operation %llu refused, as asked for", (unsigned long long)at);
    }
    return rc;
}

ncclResult_t
fake_split_fault(void)
{
    lock_faults();
    ncclResult_t rc = faults.split;
    (void)pthread_mutex_unlock(&faults_mutex);
    return rc;
}

double
fake_join_delay_s(void)
{
    lock_faults();
    double delay_s = faults.slow_s;
    (void)pthread_mutex_unlock(&faults_mutex);
    return delay_s;
}

bool
fake_joins_promptly(void)
{
    lock_faults();
    bool prompt = faults.prompt;
    (void)pthread_mutex_unlock(&faults_mutex);
    return prompt;
}

/* ---- the rest ---- */

EXPORT ncclResult_t
ncclGetVersion(int *ret)
{
    const char *text = getenv("FAKE_NCCL_VERSION");
    *ret = text != NULL ? atoi(text) : FAKE_VERSION;
    return FAKE_SUCCESS;
}

EXPORT const char *
ncclGetErrorString(ncclResult_t result)
{
    static const char *const texts[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited or there was a network error",
                                        "NCCL operation in progress"};
    return result >= 0 && result < (int)(sizeof texts / sizeof texts[0]) ? texts[result]
                                                                         : "unknown result code";
}

EXPORT const char *
ncclGetLastError(ncclComm_t comm)
{
    (void)comm;
    return fake_noted();
}

/* torch registers memory for speed alone. */
EXPORT ncclResult_t
ncclCommRegister(ncclComm_t comm, void *memory, size_t bytes, void **ret_handle)
{
    (void)comm;
    (void)bytes;
    *ret_handle = memory;
    return FAKE_SUCCESS;
}

EXPORT ncclResult_t
ncclCommDeregister(ncclComm_t comm, void *handle)
{
    (void)comm;
    (void)handle;
    return FAKE_SUCCESS;
}

#define NOT_HERE(name)                                                                             \
    EXPORT ncclResult_t name(void);                                                                \
    EXPORT ncclResult_t name(void)                                                                 \
    {                                                                                              \
        fake_note(#name " is not part of the fake");                                               \
        return FAKE_INVALID_USAGE;                                                                 \
    }

NOT_HERE(ncclCommGetUniqueId)
NOT_HERE(ncclCommGrow)
NOT_HERE(ncclCommInitAll)
NOT_HERE(ncclCommMemStats)
NOT_HERE(ncclCommResume)
NOT_HERE(ncclCommRevoke)
NOT_HERE(ncclCommShrink)
NOT_HERE(ncclCommSuspend)
NOT_HERE(ncclCommWindowDeregister)
NOT_HERE(ncclCommWindowRegister)
NOT_HERE(ncclDevCommCreate)
NOT_HERE(ncclDevCommDestroy)
NOT_HERE(ncclGetLsaMultimemDevicePointer)
NOT_HERE(ncclGetPeerDevicePointer)
NOT_HERE(ncclGroupSimulateEnd)
NOT_HERE(ncclMemAlloc)
NOT_HERE(ncclMemFree)
NOT_HERE(ncclPutSignal)
NOT_HERE(ncclRedOpCreatePreMulSum)
NOT_HERE(ncclRedOpDestroy)
NOT_HERE(ncclSignal)
NOT_HERE(ncclWaitSignal)
NOT_HERE(ncclWinGetUserPtr)

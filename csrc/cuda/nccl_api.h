/*
 * nccl_api.h: the functions of NCCL that we call, as a table.
 *
 * As cuda_api.h: own prototypes, filled by dlsym from the library that torch has loaded, so that a
 * communicator of torch's is one of ours.  check_nccl.c compares the list with nccl.h where that is
 * present.
 *
 * Threads: any.
 */
#ifndef DCP_NCCL_API_H
#define DCP_NCCL_API_H

#include "cuda_api.h"

typedef unsigned int nccl_enum;
typedef nccl_enum nccl_status; /* enum ncclResult_t: 0 is success */
typedef struct ncclComm *nccl_comm;

/* The fields that ncclConfig_t has had since communicators can be split, 2.18.  Newer releases
 * append to them, and take what a struct of an older size and version lacks for not set. */
struct nccl_config {
    size_t size;
    unsigned int magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share;
};

typedef struct nccl_config nccl_config;

/* Checked like the prototypes. */
enum {
    DCP_NCCL_IN_PROGRESS = 7,
    DCP_NCCL_MIN = 3,   /* ncclRedOp_t */
    DCP_NCCL_UINT8 = 1, /* ncclDataType_t */
    DCP_NCCL_INT64 = 4,
    DCP_NCCL_CONFIG_VERSION = 21800,
    DCP_NCCL_CONFIG_UNSET = -2147483647 - 1,
};
#define DCP_NCCL_CONFIG_MAGIC 0xcafebeefu

/* X(result, name, parameters): what every NCCL has that torch can use. */
#define NCCL_FUNCTIONS(X)                                                                          \
    X(nccl_status, ncclGetVersion, (int *version))                                                 \
    X(const char *, ncclGetErrorString, (nccl_status status))                                      \
    X(nccl_status, ncclCommGetAsyncError, (nccl_comm comm, nccl_status * status))                  \
    X(nccl_status, ncclCommCount, (const nccl_comm comm, int *count))                              \
    X(nccl_status, ncclCommUserRank, (const nccl_comm comm, int *rank))                            \
    X(nccl_status, ncclCommCuDevice, (const nccl_comm comm, int *device))                          \
    X(nccl_status, ncclCommDestroy, (nccl_comm comm))                                              \
    X(nccl_status, ncclCommAbort, (nccl_comm comm))                                                \
    X(nccl_status, ncclGroupStart, (void))                                                         \
    X(nccl_status, ncclGroupEnd, (void))                                                           \
    X(nccl_status, ncclAllReduce,                                                                  \
      (const void *send, void *recv, size_t count, nccl_enum type, nccl_enum reduction,            \
       nccl_comm comm, cuda_stream stream))                                                        \
    X(nccl_status, ncclAllGather,                                                                  \
      (const void *send, void *recv, size_t count, nccl_enum type, nccl_comm comm,                 \
       cuda_stream stream))                                                                        \
    X(nccl_status, ncclBroadcast,                                                                  \
      (const void *send, void *recv, size_t count, nccl_enum type, int root, nccl_comm comm,       \
       cuda_stream stream))                                                                        \
    X(nccl_status, ncclSend,                                                                       \
      (const void *send, size_t count, nccl_enum type, int peer, nccl_comm comm,                   \
       cuda_stream stream))                                                                        \
    X(nccl_status, ncclRecv,                                                                       \
      (void *recv, size_t count, nccl_enum type, int peer, nccl_comm comm, cuda_stream stream))

/* What older ones lack: NULL there. */
#define NCCL_NEWER_FUNCTIONS(X)                                                                    \
    X(const char *, ncclGetLastError, (nccl_comm comm))                                            \
    X(nccl_status, ncclCommFinalize, (nccl_comm comm))                                             \
    X(nccl_status, ncclCommSplit,                                                                  \
      (nccl_comm comm, int color, int key, nccl_comm *ret_comm, nccl_config *config))

#define NCCL_API_FIELD(result, name, parameters) result(*name) parameters;

struct nccl_api {
    NCCL_FUNCTIONS(NCCL_API_FIELD)
    NCCL_NEWER_FUNCTIONS(NCCL_API_FIELD)
};

#undef NCCL_API_FIELD

/* NULL while the library is not in this process, or lacks what all have. */
const struct nccl_api *nccl_api(void);

/* Tests: this one instead of what the process has; NULL gives up the choice.  Not beside other
 * calls. */
void nccl_api_replace(const struct nccl_api *api);

#endif

/*
 * comm_local.c: the comm table of a group of one, for saves without a process group.
 *
 * Every collective of one rank is a copy onto itself, so the transfers need no second path for
 * `no_dist`.  There is no state to own and nothing to fail but a root that does not exist.
 *
 * Threads: any.
 */
#include "dcp_comm.h"

#include <string.h>

static int
check_root(uint32_t root, const char *what, struct dcp_error *err)
{
    if (root == 0) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                         "%s with root %u in a group of one rank: the only root is rank 0", what,
                         root);
}

static void
copy_onto(void *recv, const void *send, size_t bytes)
{
    if (bytes != 0 && recv != send) {
        memmove(recv, send, bytes);
    }
}

static int
local_all_reduce_min(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err)
{
    (void)ctx;
    (void)lanes;
    (void)count;
    (void)err;
    return 0;
}

static int
local_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
             struct dcp_error *err)
{
    (void)ctx;
    int rc = check_root(root, "gather", err);
    if (rc == 0) {
        copy_onto(recv, send, bytes);
    }
    return rc;
}

static int
local_all_gather(void *ctx, const void *send, void *recv, size_t bytes, struct dcp_error *err)
{
    (void)ctx;
    (void)err;
    copy_onto(recv, send, bytes);
    return 0;
}

static int
local_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
              struct dcp_error *err)
{
    (void)ctx;
    int rc = check_root(root, "scatter", err);
    if (rc == 0) {
        copy_onto(recv, send, bytes);
    }
    return rc;
}

static int
local_broadcast(void *ctx, uint32_t root, void *buf, size_t bytes, struct dcp_error *err)
{
    (void)ctx;
    (void)buf;
    (void)bytes;
    return check_root(root, "broadcast", err);
}

static void
local_destroy(void *ctx)
{
    (void)ctx;
}

void
dcp_comm_local(struct dcp_comm *ret_comm)
{
    *ret_comm = (struct dcp_comm){
        .kind = "local",
        .rank = 0,
        .size = 1,
        .all_reduce_min = local_all_reduce_min,
        .gather = local_gather,
        .all_gather = local_all_gather,
        .scatter = local_scatter,
        .broadcast = local_broadcast,
        .destroy = local_destroy,
    };
}

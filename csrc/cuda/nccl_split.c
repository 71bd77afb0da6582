/*
 * nccl_split.c: one communicator of ours, split off the group's, with a deadline.
 *
 * All ranks of the group take the same color, in the same order, so ranks stay what they are.  Ours
 * does not block.  Whether the call itself does is up to the group's communicator, and torch's do:
 * it returns when all ranks have come.  So it runs on a thread that can be left behind; what it
 * makes after all is aborted then.
 *
 * Resources: whether a split communicator shares its parent's is decided by the parent's
 * configuration alone (split_share in the options of torch's group).  Where it does, aborting ours
 * can take the group's with it; a save that failed has lost a rank then anyway.
 *
 * One group of threads on the device does for messages of kilobytes, and leaves the rest of it to
 * the trainer.
 *
 * A communicator of the group's that does not block either may be at work when the deadline has
 * passed, and store ours where it was told to.  That memory is left to it, for good: nothing tells
 * when it is done, for torch may end it at any time.  A group is split once, so it is some hundred
 * bytes per group whose ranks do not come.
 *
 * Threads: one at a time for a link.
 */
#include <stdatomic.h>

#include "nccl_link.h"

struct splitting {
    const struct nccl_api *nccl;
    nccl_comm parent;
    int rank;
    int32_t device_index;
    uint64_t deadline_ns;
    nccl_comm comm; /* NULL until it is made */
    bool goes_on;   /* NCCL may store `comm` at any time: this is never freed */
    struct splitting *next_left;
    int rc;
    struct dcp_error err;
};

/* What was left to NCCL.  Nobody looks for it here, except tools that look for lost memory. */
static _Atomic(struct splitting *) left;

static void
free_or_leave(struct splitting *splitting)
{
    if (!splitting->goes_on) {
        dcp_free(splitting);
        return;
    }
    splitting->next_left = atomic_load(&left);
    while (!atomic_compare_exchange_weak(&left, &splitting->next_left, splitting)) {
        /* it holds what is first now */
    }
}

static int
wait_until_made(struct splitting *splitting, nccl_comm asked)
{
    static const char what[] = "splitting the group's NCCL communicator";
    struct nccl_link link = {.nccl = splitting->nccl, .comm = asked};
    return nccl_link_check(&link, DCP_NCCL_IN_PROGRESS, what, splitting->deadline_ns,
                           &splitting->err);
}

static int
split(struct splitting *splitting)
{
    nccl_config config = {
        .size = sizeof config,
        .magic = DCP_NCCL_CONFIG_MAGIC,
        .version = DCP_NCCL_CONFIG_VERSION,
        .blocking = 0,
        .cga_cluster_size = DCP_NCCL_CONFIG_UNSET,
        .min_ctas = 1,
        .max_ctas = 1,
        .split_share = DCP_NCCL_CONFIG_UNSET,
    };
    nccl_status status = splitting->nccl->ncclCommSplit(splitting->parent, 0, splitting->rank,
                                                        &splitting->comm, &config);
    if (status != 0 && status != DCP_NCCL_IN_PROGRESS) {
        return nccl_error(splitting->nccl, splitting->parent, status,
                          "splitting the group's NCCL communicator", &splitting->err);
    }
    /* One that does not block gives ours only when it has come to its end. */
    int rc = wait_until_made(splitting, splitting->parent);
    splitting->goes_on = rc == DCP_E_TIMEOUT;
    if (rc == 0 && splitting->comm == NULL) {
        rc = dcp_error_set(&splitting->err, DCP_E_INTERNAL, 0, NULL,
                           "splitting the group's NCCL communicator gave none");
    }
    return rc != 0 ? rc : wait_until_made(splitting, splitting->comm);
}

/* On the device.  What still goes on may give one at any time: it is let alone. */
static void
abort_made(struct splitting *splitting)
{
    if (!splitting->goes_on && splitting->comm != NULL) {
        (void)splitting->nccl->ncclCommAbort(splitting->comm);
        splitting->comm = NULL;
    }
}

static void
split_on_device(void *self)
{
    struct splitting *splitting = self;
    struct cuda_stay stay;
    splitting->rc = cuda_enter(splitting->device_index, &stay, &splitting->err);
    if (splitting->rc == 0) {
        splitting->rc = split(splitting);
        if (splitting->rc != 0) {
            abort_made(splitting);
        }
        cuda_leave(&stay);
    }
}

static void
come_late(void *self)
{
    struct splitting *splitting = self;
    struct cuda_stay stay;
    if (cuda_enter(splitting->device_index, &stay, &splitting->err) == 0) {
        abort_made(splitting);
        cuda_leave(&stay);
    }
    free_or_leave(splitting);
}

int
nccl_split(const struct nccl_link *link, uint64_t deadline_ns, nccl_comm *ret_comm,
           struct dcp_error *err)
{
    struct splitting *splitting = dcp_calloc(1, sizeof *splitting);
    if (splitting == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory to split a communicator");
    }
    splitting->nccl = link->nccl;
    splitting->parent = link->source.raw;
    splitting->rank = (int)link->source.rank;
    splitting->device_index = link->device_index;
    splitting->deadline_ns = deadline_ns;
    if (!nccl_run_apart(split_on_device, come_late, splitting, deadline_ns)) {
        return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL,
                             "splitting the group's NCCL communicator: timed out: not all ranks "
                             "came in time");
    }
    int rc = splitting->rc;
    if (rc == 0) {
        *ret_comm = splitting->comm;
    } else {
        (void)dcp_error_set(err, rc, 0, NULL, "%s", splitting->err.message);
    }
    free_or_leave(splitting);
    return rc;
}

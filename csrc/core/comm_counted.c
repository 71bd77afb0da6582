/*
 * comm_counted.c: a comm table that passes every call on and counts it.
 *
 * A group keeps its table behind this one, so that a report can tell what the ranks waited for each
 * other, and a trace when, whatever table it is.  Two readings of the clock are nothing beside a
 * collective.
 *
 * Threads: the comm table's rule, one caller at a time.
 */
#include "comm_counted.h"

#include "dcp_trace.h"

static void
count(struct dcp_comm_counted *counted, const char *name, uint64_t start_ns, uint64_t bytes)
{
    counted->stats.calls_count++;
    counted->stats.bytes += bytes;
    counted->stats.wall_ns += dcp_trace_now_ns() - start_ns;
    dcp_trace_end(dcp_trace_from(start_ns), "agree", name, bytes);
}

static int
counted_all_reduce_min(void *ctx, int64_t *lanes, size_t lanes_count, struct dcp_error *err)
{
    struct dcp_comm_counted *counted = ctx;
    uint64_t start_ns = dcp_trace_now_ns();
    int rc = counted->inner.all_reduce_min(counted->inner.ctx, lanes, lanes_count, err);

    count(counted, "all_reduce", start_ns, lanes_count * sizeof *lanes);
    return rc;
}

static int
counted_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
               struct dcp_error *err)
{
    struct dcp_comm_counted *counted = ctx;
    uint64_t start_ns = dcp_trace_now_ns();
    int rc = counted->inner.gather(counted->inner.ctx, root, send, recv, bytes, err);

    count(counted, "gather", start_ns, bytes);
    return rc;
}

static int
counted_all_gather(void *ctx, const void *send, void *recv, size_t bytes, struct dcp_error *err)
{
    struct dcp_comm_counted *counted = ctx;
    uint64_t start_ns = dcp_trace_now_ns();
    int rc = counted->inner.all_gather(counted->inner.ctx, send, recv, bytes, err);

    count(counted, "all_gather", start_ns, bytes);
    return rc;
}

static int
counted_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
                struct dcp_error *err)
{
    struct dcp_comm_counted *counted = ctx;
    uint64_t start_ns = dcp_trace_now_ns();
    int rc = counted->inner.scatter(counted->inner.ctx, root, send, recv, bytes, err);

    count(counted, "scatter", start_ns, bytes);
    return rc;
}

static int
counted_broadcast(void *ctx, uint32_t root, void *buf, size_t bytes, struct dcp_error *err)
{
    struct dcp_comm_counted *counted = ctx;
    uint64_t start_ns = dcp_trace_now_ns();
    int rc = counted->inner.broadcast(counted->inner.ctx, root, buf, bytes, err);

    count(counted, "broadcast", start_ns, bytes);
    return rc;
}

static void
counted_destroy(void *ctx)
{
    struct dcp_comm_counted *counted = ctx;

    if (counted->inner.destroy != NULL) {
        counted->inner.destroy(counted->inner.ctx);
    }
    counted->inner = (struct dcp_comm){0};
}

struct dcp_comm
dcp_comm_count(struct dcp_comm_counted *counted, const struct dcp_comm *inner)
{
    *counted = (struct dcp_comm_counted){.inner = *inner};
    return (struct dcp_comm){.ctx = counted,
                             .kind = inner->kind,
                             .rank = inner->rank,
                             .size = inner->size,
                             .all_reduce_min = counted_all_reduce_min,
                             .gather = counted_gather,
                             .all_gather = counted_all_gather,
                             .scatter = counted_scatter,
                             .broadcast = counted_broadcast,
                             .destroy = counted_destroy};
}

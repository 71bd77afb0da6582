/*
 * rate.c: a limit of bytes per second, as the time at which the next request is due.
 *
 * A request makes the next one due by its length divided by the rate.  Sleeps end late by what the
 * scheduler likes; the time a request was due, not the time it started, decides about the next, so
 * lateness does not add up.  What a stream may catch up that way is bounded by the credit: after a
 * pause it does not send for all of the pause.
 *
 * In any span of t seconds at most t * rate + credit + one request start.
 * Threads: a rate belongs to one thread.
 */
#include "rate.h"

#include "dcp_limits.h"

#define NS_PER_S 1000000000u

/* Rounded up; len is at most 2^30, so the product has room. */
static uint64_t
cost_ns(const struct dcp_rate *rate, uint64_t len)
{
    DCP_ASSERT(len <= DCP_MAX_REQUEST_BYTES);
    return (len * NS_PER_S + rate->bytes_s - 1) / rate->bytes_s;
}

void
dcp_rate_init(struct dcp_rate *rate, const struct dcp_io *io, uint64_t bytes_s,
              uint64_t credit_bytes)
{
    /* Products and sums stay far from 2^64; no device comes near. */
    *rate = (struct dcp_rate){.io = io, .bytes_s = dcp_min_u64(bytes_s, UINT64_C(1) << 60)};
    rate->credit_ns = rate->bytes_s == 0 ? 0 : cost_ns(rate, credit_bytes);
}

bool
dcp_rate_wait(struct dcp_rate *rate, uint64_t len, const atomic_int *cancel)
{
    if (rate->bytes_s == 0) {
        return true;
    }
    uint64_t now_ns = rate->io->now_ns(rate->io->ctx);
    if (rate->due_ns == 0) {
        rate->due_ns = now_ns;
    } else if (now_ns > rate->credit_ns) {
        rate->due_ns = dcp_max_u64(rate->due_ns, now_ns - rate->credit_ns);
    }
    while (now_ns < rate->due_ns) {
        if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
            return false;
        }
        rate->io->sleep_ns(rate->io->ctx, dcp_min_u64(rate->due_ns - now_ns, DCP_LIMIT_SLICE_NS));
        uint64_t woken_ns = rate->io->now_ns(rate->io->ctx);
        rate->slept_ns += woken_ns - now_ns;
        now_ns = woken_ns;
    }
    rate->due_ns += cost_ns(rate, len);
    return true;
}

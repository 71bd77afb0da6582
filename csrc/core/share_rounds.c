/*
 * share_rounds.c: how the ranks of a host agree to share, and how they wait for each other.
 *
 * Two rounds decide who shares.  First everybody waits until nobody is NEW any more: those that
 * are not OUT are the members, on every rank alike, because OUT is final and JOINED never goes back
 * to it.  Then each maps what the members published and says READY or REFUSED; one REFUSED and all
 * read for themselves.  After that the names are removed: what is left dies with the processes.
 * A process that is killed before leaves one page behind its name, or its slots when it is killed
 * within the two rounds; the next load on the host removes names of dead processes.
 *
 * Waits are futexes in slices, and a rank that waits looks whether the others still live, so that
 * no way to end leaves a rank behind.
 *
 * Threads: the rounds on the calling thread.  dcp_share_wait: any.
 */
#include "share.h"

#include <errno.h>
#include <string.h>

#include "ring.h"

/* DCP_E_PEER when another rank broke off, or, with `look`, when its process is gone. */
static int
check_members(const struct dcp_share *share, bool look, struct dcp_error *err)
{
    for (uint32_t i = 0; i < share->members_count; i++) {
        const struct dcp_share_member *member = &share->members[i];
        if (i == share->self || member->header == NULL) {
            continue;
        }
        uint32_t state = dcp_share_state_of(member);
        if (state == DCP_SHARE_FAILED) {
            return dcp_error_set(err, DCP_E_PEER, 0, NULL,
                                 "rank %u of this host broke off while it shared what it reads",
                                 member->rank);
        }
        bool over = state == DCP_SHARE_OUT || state == DCP_SHARE_REFUSED || state == DCP_SHARE_DONE;
        if (look && !over && !share->shm->alive(share->shm->ctx, member->header->host.pid) &&
            dcp_share_state_of(member) == state) {
            return dcp_error_set(err, DCP_E_PEER, 0, NULL,
                                 "rank %u of this host died while it shared what it reads",
                                 member->rank);
        }
    }
    return 0;
}

int
dcp_share_check_cancel(const atomic_int *cancel, struct dcp_error *err)
{
    if (cancel != NULL && atomic_load_explicit(cancel, memory_order_relaxed) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL, "the load was cancelled");
    }
    return 0;
}

/* Waits until *word is `goal`, or with `leave` until it is something else. */
static int
wait_word(const struct dcp_share *share, const _Atomic uint32_t *word, uint32_t goal, bool leave,
          const atomic_int *cancel, const atomic_int *stop, struct dcp_error *err)
{
    uint64_t start_ns = 0, looked_ns = 0;

    for (;;) {
        uint32_t seen = atomic_load_explicit(word, memory_order_acquire);
        if ((seen == goal) != leave) {
            return 0;
        }
        int rc = dcp_share_check_cancel(cancel, err);
        if (rc == 0) {
            rc = dcp_share_check_cancel(stop, err);
        }
        if (rc != 0) {
            return rc;
        }
        uint64_t now_ns = dcp_engine_now_ns();
        start_ns = start_ns == 0 ? now_ns : start_ns;
        looked_ns = looked_ns == 0 ? now_ns : looked_ns;
        bool look = now_ns - looked_ns >= DCP_SHARE_SLICE_NS;
        looked_ns = look ? now_ns : looked_ns;
        rc = check_members(share, look, err);
        if (rc != 0) {
            /* What the others did before one of them ended may be all that was waited for. */
            seen = atomic_load_explicit(word, memory_order_acquire);
            if ((seen == goal) != leave) {
                dcp_error_clear(err);
                return 0;
            }
            return rc;
        }
        if (now_ns - start_ns >= DCP_SHARE_DEADLINE_NS) {
            return dcp_error_set(err, DCP_E_TIMEOUT, 0, NULL,
                                 "another rank of this host has not gone on for %llu s while it "
                                 "shared what it reads; load with read_once off to read alone",
                                 DCP_SHARE_DEADLINE_NS / 1000000000ull);
        }
        share->shm->wait(share->shm->ctx, word, seen, DCP_SHARE_SLICE_NS);
    }
}

int
dcp_share_wait(const struct dcp_share *share, const _Atomic uint32_t *word, uint32_t goal,
               const atomic_int *cancel, const atomic_int *stop, struct dcp_error *err)
{
    return wait_word(share, word, goal, false, cancel, stop, err);
}

/* Every other rank has left `state`. */
static int
wait_for_all(const struct dcp_share *share, enum dcp_share_state state, const atomic_int *cancel,
             struct dcp_error *err)
{
    int rc = 0;

    for (uint32_t i = 0; rc == 0 && i < share->members_count; i++) {
        if (i != share->self) {
            rc = wait_word(share, &share->members[i].header->state, state, true, cancel, NULL, err);
        }
    }
    return rc;
}

/* Keeps those that joined.  False when one of them is another kind of reader. */
static bool
keep_joined(struct dcp_share *share)
{
    bool alike = true, hot = false, refused = false;
    uint32_t kept = 0;

    for (uint32_t i = 0; i < share->members_count; i++) {
        struct dcp_share_member *member = &share->members[i];
        uint32_t state = dcp_share_state_of(member);
        if (state == DCP_SHARE_OUT) {
            dcp_share_release(share, member);
            continue;
        }
        hot = hot || member->header->hot != 0;
        refused = refused || state == DCP_SHARE_REFUSED;
        alike = alike && member->header->options == share->own.header->options;
        if (i == share->self) {
            share->self = kept;
        }
        share->members[kept++] = *member;
    }
    share->members_count = kept;
    if (kept < 2) {
        dcp_share_because(share, "no other rank of this host has data to share");
    } else if (hot) {
        dcp_share_because(share, "it lies in the page cache, from where every rank takes its own");
    } else if (!alike) {
        dcp_share_because(share, "ranks of this host load with different settings");
    } else if (refused) {
        dcp_share_because(share, "another rank of this host found nothing to share, or could not");
    }
    return alike && !hot && !refused && kept >= 2;
}

/* Maps whole segments. */
static bool
map_members(struct dcp_share *share)
{
    int rc = 0;

    for (uint32_t i = 0; rc == 0 && i < share->members_count; i++) {
        struct dcp_share_member *member = &share->members[i];
        if (i == share->self) {
            member->header = share->own.header;
        } else {
            rc = dcp_share_map(share, member, member->header->segment_bytes);
        }
        if (rc == 0) {
            dcp_share_set_parts(member);
        }
    }
    if (rc != 0) {
        dcp_share_because(share, "shared memory of another rank could not be mapped: %s",
                          strerror(-rc));
    }
    return rc == 0;
}

int
dcp_share_join(struct dcp_share *share, uint32_t options, const atomic_int *cancel,
               bool *ret_joined, struct dcp_error *err)
{
    share->own.header->options = options;
    dcp_share_set_state(share, DCP_SHARE_JOINED);
    int rc = wait_for_all(share, DCP_SHARE_NEW, cancel, err);
    if (rc == 0) {
        *ret_joined = keep_joined(share) && map_members(share);
        if (!*ret_joined) {
            dcp_share_leave(share, DCP_SHARE_REFUSED);
        }
    }
    return rc;
}

/* Of the numbers of all members.  Each rank lists the names by itself, and a name may be gone
 * between two listings: only ranks that found the same others walk the same units. */
static uint64_t
hash_members(const struct dcp_share *share)
{
    uint32_t ranks[DCP_SHARE_MOST_RANKS];
    for (uint32_t i = 0; i < share->members_count; i++) {
        ranks[i] = share->members[i].rank;
    }
    return dcp_hash128(ranks, share->members_count * sizeof ranks[0], 0).lo;
}

int
dcp_share_ready(struct dcp_share *share, bool able, const atomic_int *cancel, bool *ret_ready,
                struct dcp_error *err)
{
    const struct dcp_share_header *header = share->own.header;
    uint64_t slots_bytes = header->segment_bytes - header->slots_offset;

    if (able && slots_bytes > 0) {
        int no =
            share->shm->allocate(share->shm->ctx, share->own.fd, header->slots_offset, slots_bytes);
        able = no == 0;
        if (!able) {
            dcp_share_no_room(share, slots_bytes, no);
        }
    }
    share->own.header->members_hash = hash_members(share);
    dcp_share_set_state(share, able ? DCP_SHARE_READY : DCP_SHARE_REFUSED);
    int rc = able ? wait_for_all(share, DCP_SHARE_JOINED, cancel, err) : 0;
    for (uint32_t i = 0; rc == 0 && i < share->members_count; i++) {
        able = able && dcp_share_state_of(&share->members[i]) != DCP_SHARE_REFUSED &&
               share->members[i].header->members_hash == header->members_hash;
    }
    if (rc == 0 && !able) {
        dcp_share_because(share,
                          "another rank of this host had no room for shared memory, or found "
                          "other ranks");
        dcp_share_leave(share, DCP_SHARE_REFUSED);
    }
    if (rc == 0 && share->linked) {
        (void)share->shm->unlink(share->shm->ctx, share->name);
        share->linked = false;
    }
    *ret_ready = able;
    return rc;
}

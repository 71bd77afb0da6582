/*
 * agreement_liveness.c: who is still there while a save is in flight.
 *
 * Processes of one host look at each other's process ids: at the coordinator's, whose death hides
 * behind no other, and at those of the next few ranks of the host, in a ring: whichever of them
 * end, the first living one before them sees it.
 *
 * Hosts are watched by beats: counters in the store, one for each host, which its leader adds to.
 * The coordinator watches all of them, every leader the coordinator's.  A host is watched from its
 * first beat on: before that its ranks may still be staging, for as long as that takes.  A leader
 * that turns to the file system cannot beat; it says so before, by a leap of its counter, and is
 * given several times the timeout.
 *
 * A call to the store that fails here is not an error: the agreement's own calls find out.
 */
#include "agreement.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "group.h"

/* A beat that announces a pause.  No save lasts for so many beats. */
#define LEAP (INT64_C(1) << 32)

enum {
    /* A machine that slept itself must not take the first look for the last. */
    LEAST_LOOKS = 3,
    BEATS_PER_TIMEOUT = 4,
    RANKS_TEXT_BYTES = 192,
};

static bool
share_a_host(const struct agreement *run, uint32_t a, uint32_t b)
{
    const struct dcp_peers *peers = run->with->peers;
    return peers->leaders[a] == peers->leaders[b];
}

uint32_t
agreement_leader_of(const struct agreement *run, uint32_t rank)
{
    return share_a_host(run, rank, run->with->coordinator) ? run->with->coordinator
                                                           : run->with->peers->leaders[rank];
}

static void
choose_peers(struct agreement *run)
{
    struct agreement_liveness *live = &run->liveness;
    uint32_t size = run->with->size, rank = run->with->rank, coordinator = run->with->coordinator;

    if (rank != coordinator && share_a_host(run, coordinator, rank)) {
        live->peers[live->peers_count++] = coordinator;
    }
    for (uint32_t i = 1; i < size && live->peers_count < DCP_WATCHED_PEERS; i++) {
        uint32_t other = (rank + i) % size;
        if (other != coordinator && share_a_host(run, other, rank)) {
            live->peers[live->peers_count++] = other;
        }
    }
}

/* Without memory for it no host is watched, and the deadline ends what a dead one leaves. */
static void
choose_hosts(struct agreement *run, uint64_t now_ns)
{
    struct agreement_liveness *live = &run->liveness;
    uint32_t coordinator = run->with->coordinator, rank = run->with->rank;
    uint32_t count = 0;

    for (uint32_t i = 0; i < run->with->size; i++) {
        count += agreement_leader_of(run, i) == i;
    }
    if (count < 2 || agreement_leader_of(run, rank) != rank) {
        return;
    }
    live->beats = true;
    live->hosts = dcp_calloc(run->is_coordinator ? count : 1, sizeof *live->hosts);
    for (uint32_t i = 0; live->hosts != NULL && i < run->with->size; i++) {
        bool wanted = run->is_coordinator ? i != coordinator : i == coordinator;
        if (wanted && agreement_leader_of(run, i) == i) {
            live->hosts[live->hosts_count++] =
                (struct watched_host){.leader = i, .changed_ns = now_ns};
        }
    }
}

void
agreement_liveness_begin(struct agreement *run)
{
    struct agreement_liveness *live = &run->liveness;
    uint64_t now_ns = agreement_now_ns(run);

    if (run->with->peers == NULL) {
        return;
    }
    DCP_ASSERT(run->with->peers->count == run->with->size);
    live->beat_every_ns =
        dcp_min_u64(DCP_HOST_BEAT_NS, run->with->host_timeout_ns / BEATS_PER_TIMEOUT);
    live->next_look_ns = now_ns + DCP_PEER_LOOK_NS;
    live->next_beat_ns = now_ns;
    live->next_hosts_ns = now_ns + live->beat_every_ns;
    if (run->with->shm != NULL) {
        choose_peers(run);
    }
    choose_hosts(run, now_ns);
}

void
agreement_liveness_clean_up(struct agreement *run)
{
    dcp_free(run->liveness.hosts);
    run->liveness = (struct agreement_liveness){0};
}

static const char *
role_of(const struct agreement *run, uint32_t rank)
{
    return rank == run->with->coordinator
               ? ", the coordinator; whether the checkpoint was committed, its .metadata tells"
               : "";
}

static void
look_at_processes(struct agreement *run, struct agreement_loss *ret_loss)
{
    const struct dcp_shm *shm = run->with->shm;

    for (uint32_t i = 0; i < run->liveness.peers_count && !ret_loss->there; i++) {
        uint32_t rank = run->liveness.peers[i];
        int64_t pid = run->with->peers->hosts[rank].pid;

        if (shm->alive(shm->ctx, pid)) {
            continue;
        }
        *ret_loss = (struct agreement_loss){.there = true, .rank = rank, .certain = true};
        (void)dcp_error_set(&ret_loss->what, DCP_E_PEER, 0, NULL,
                            "the process of rank %" PRIu32 " (pid %" PRId64
                            ") died during the save%s",
                            rank, pid, role_of(run, rank));
        ret_loss->what.rank = (int32_t)rank;
    }
}

bool
agreement_all_others_died(const struct agreement *run)
{
    const struct dcp_shm *shm = run->with->shm;
    const struct agreement_liveness *live = &run->liveness;

    for (uint32_t i = 0; i < live->peers_count; i++) {
        if (shm->alive(shm->ctx, run->with->peers->hosts[live->peers[i]].pid)) {
            return false;
        }
    }
    return live->peers_count > 0 && live->peers_count == run->with->size - 1;
}

/* "8, 9, 10 and 5 more" */
static void
name_ranks(const struct agreement *run, uint32_t leader, char text[RANKS_TEXT_BYTES])
{
    enum { MOST_NAMED = 8, MOST_DIGITS = 16 };
    uint32_t named = 0, more = 0;
    size_t len = 0;

    for (uint32_t i = 0; i < run->with->size; i++) {
        if (!share_a_host(run, i, leader)) {
            continue;
        }
        if (named == MOST_NAMED) {
            more++;
            continue;
        }
        len += (size_t)snprintf(text + len, MOST_DIGITS, named == 0 ? "%" PRIu32 : ", %" PRIu32, i);
        named++;
    }
    if (more > 0) {
        snprintf(text + len, RANKS_TEXT_BYTES - len, " and %" PRIu32 " more", more);
    }
}

static void
lose_host(const struct agreement *run, const struct watched_host *host, uint64_t silent_ns,
          struct agreement_loss *ret_loss)
{
    char ranks[RANKS_TEXT_BYTES];

    name_ranks(run, host->leader, ranks);
    *ret_loss = (struct agreement_loss){.there = true, .rank = host->leader};
    (void)dcp_error_set(&ret_loss->what, DCP_E_PEER, 0, NULL,
                        "nothing was heard for %.1f s of the host of ranks %s, for which rank "
                        "%" PRIu32 " beats: the machine, its network or that process died or "
                        "froze during the save%s",
                        (double)silent_ns / 1e9, ranks, host->leader, role_of(run, host->leader));
    ret_loss->what.rank = (int32_t)host->leader;
}

static void
look_at_hosts(struct agreement *run, uint64_t now_ns, struct agreement_loss *ret_loss)
{
    for (uint32_t i = 0; i < run->liveness.hosts_count && !ret_loss->there; i++) {
        struct watched_host *host = &run->liveness.hosts[i];
        struct dcp_error ignored;
        int64_t value = 0;
        uint64_t most_ns = run->with->host_timeout_ns * (host->busy ? DCP_HOST_BUSY_TIMES : 1);

        dcp_error_clear(&ignored);
        if (agreement_beat(run, host->leader, 0, &value, &ignored) != 0) {
            continue;
        }
        if (value != host->value) {
            host->busy = value - host->value >= LEAP;
            host->value = value;
            host->changed_ns = now_ns;
            host->looks = 0;
        } else if (value != 0 && ++host->looks >= LEAST_LOOKS &&
                   now_ns - host->changed_ns >= most_ns) {
            lose_host(run, host, now_ns - host->changed_ns, ret_loss);
        }
    }
}

static void
beat(struct agreement *run, int64_t delta)
{
    struct dcp_error ignored;
    int64_t value;

    dcp_error_clear(&ignored);
    (void)!agreement_beat(run, run->with->rank, delta, &value, &ignored);
}

void
agreement_look_around(struct agreement *run, struct agreement_loss *ret_loss)
{
    struct agreement_liveness *live = &run->liveness;
    uint64_t now_ns = agreement_now_ns(run);

    ret_loss->there = false;
    if (live->beats && now_ns >= live->next_beat_ns) {
        live->next_beat_ns = now_ns + live->beat_every_ns;
        beat(run, 1);
    }
    if (live->peers_count > 0 && now_ns >= live->next_look_ns) {
        live->next_look_ns = now_ns + DCP_PEER_LOOK_NS;
        look_at_processes(run, ret_loss);
    }
    if (live->hosts_count > 0 && now_ns >= live->next_hosts_ns && !ret_loss->there) {
        live->next_hosts_ns = now_ns + live->beat_every_ns;
        look_at_hosts(run, now_ns, ret_loss);
    }
}

uint64_t
agreement_next_look_ns(const struct agreement *run)
{
    const struct agreement_liveness *live = &run->liveness;
    uint64_t next_ns = UINT64_MAX;

    if (live->beats) {
        next_ns = live->next_beat_ns;
    }
    if (live->peers_count > 0) {
        next_ns = dcp_min_u64(next_ns, live->next_look_ns);
    }
    if (live->hosts_count > 0) {
        next_ns = dcp_min_u64(next_ns, live->next_hosts_ns);
    }
    return next_ns;
}

void
agreement_announce_pause(struct agreement *run)
{
    if (run->liveness.beats) {
        beat(run, LEAP);
    }
}

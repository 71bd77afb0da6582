/*
 * peers.c: who is on which host, exchanged once per group.
 *
 * A process whose host cannot be told (no /proc, no shared memory) counts as a host of its own:
 * nobody looks at its process, but its beats are watched as those of a host are.
 *
 * Threads: collective; the comm table's rule.
 */
#include "dcp_store.h"

#include <stdlib.h>
#include <string.h>

struct place {
    uint8_t id[16];
    uint32_t rank;
};

static int
compare_places(const void *a, const void *b)
{
    const struct place *left = a, *right = b;
    int order = memcmp(left->id, right->id, sizeof left->id);
    return order != 0 ? order : (left->rank > right->rank) - (left->rank < right->rank);
}

static bool
is_known(const struct place *place)
{
    static const uint8_t none[16];
    return memcmp(place->id, none, sizeof none) != 0;
}

static int
find_leaders(struct dcp_peers *peers, struct dcp_error *err)
{
    struct place *places = dcp_malloc_array(peers->count, sizeof *places);
    uint32_t first = 0;

    if (places == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the hosts of %u ranks",
                             peers->count);
    }
    for (uint32_t i = 0; i < peers->count; i++) {
        memcpy(places[i].id, peers->hosts[i].id, sizeof places[i].id);
        places[i].rank = i;
    }
    qsort(places, peers->count, sizeof *places, compare_places);
    for (uint32_t i = 0; i < peers->count; i++) {
        if (!is_known(&places[i]) ||
            memcmp(places[i].id, places[first].id, sizeof places[i].id) != 0) {
            first = i;
        }
        peers->leaders[places[i].rank] = places[first].rank;
    }
    dcp_free(places);
    return 0;
}

int
dcp_peers_exchange(const struct dcp_comm *comm, const struct dcp_shm *shm,
                   struct dcp_peers *ret_peers, struct dcp_error *err)
{
    struct dcp_peers peers = {.count = comm->size, .rank = comm->rank};
    struct dcp_shm_host mine = {0};
    int rc;

    peers.hosts = dcp_malloc_array(comm->size, sizeof *peers.hosts);
    peers.leaders = dcp_malloc_array(comm->size, sizeof *peers.leaders);
    if (peers.hosts == NULL || peers.leaders == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the hosts of %u ranks",
                           comm->size);
        goto out;
    }
    if (shm == NULL || shm->host(shm->ctx, &mine) != 0) {
        mine = (struct dcp_shm_host){0};
    }
    rc = comm->all_gather(comm->ctx, &mine, peers.hosts, sizeof mine, err);
    if (rc == 0) {
        rc = find_leaders(&peers, err);
    }
    if (rc == 0) {
        *ret_peers = peers;
        return 0;
    }
out:
    dcp_peers_clean_up(&peers);
    return rc;
}

void
dcp_peers_clean_up(struct dcp_peers *peers)
{
    if (peers == NULL) {
        return;
    }
    dcp_free(peers->hosts);
    dcp_free(peers->leaders);
    *peers = (struct dcp_peers){0};
}

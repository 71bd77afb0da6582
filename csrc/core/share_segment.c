/*
 * share_segment.c: the shared memory of a load: one segment per rank, found by its name.
 *
 * Every rank makes a segment of its own, named by the load's random id, which the vote brought to
 * all.  The agreement that ends planning is a barrier, so behind it each rank lists the names and
 * knows the ranks of its host: no collective is spent on it, and a rank that shares nothing (by its
 * settings, or because it could make no segment) is simply not there.  A segment of its own also
 * means that a rank can always tell the others how it is: only its owner writes a state, and a rank
 * that could not reach another's memory still reaches its own.
 *
 * Threads: the calling thread.
 */
#include "share.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ring.h"

#define NAME_PREFIX "dcp_native-"

enum {
    HEX_BYTES = 32,
    LOAD_AT = sizeof NAME_PREFIX - 1,
    HOST_AT = LOAD_AT + HEX_BYTES + 1,
    PID_AT = HOST_AT + HEX_BYTES + 1
};

static void
put_hex(const uint8_t bytes[16], char text[HEX_BYTES + 1])
{
    for (int i = 0; i < 16; i++) {
        snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    }
}

/* prefix, load id, host id, process id, rank */
static void
make_name(const struct dcp_share *share, char name[DCP_SHARE_NAME_BYTES])
{
    char load[HEX_BYTES + 1], host[HEX_BYTES + 1];

    put_hex(share->load_id.bytes, load);
    put_hex(share->host.id, host);
    snprintf(name, DCP_SHARE_NAME_BYTES, NAME_PREFIX "%s-%s-%lld-%u", load, host,
             (long long)share->host.pid, share->own.rank);
}

/* Process and rank of a name of this host; false for all other names. */
static bool
parse_name(const struct dcp_share *share, const char *name, int64_t *ret_pid, uint32_t *ret_rank)
{
    char host[HEX_BYTES + 1];
    char *end;

    put_hex(share->host.id, host);
    if (strlen(name) <= PID_AT || strncmp(name, NAME_PREFIX, LOAD_AT) != 0 ||
        strncmp(name + HOST_AT, host, HEX_BYTES) != 0) {
        return false;
    }
    *ret_pid = strtoll(name + PID_AT, &end, 10);
    if (*ret_pid <= 0 || *end != '-') {
        return false;
    }
    *ret_rank = (uint32_t)strtoul(end + 1, &end, 10);
    return *end == '\0';
}

void
dcp_share_because(struct dcp_share *share, const char *fmt, ...)
{
    va_list args;

    if (share->reason[0] == '\0') {
        va_start(args, fmt);
        vsnprintf(share->reason, sizeof share->reason, fmt, args);
        va_end(args);
    }
}

void
dcp_share_set_state(struct dcp_share *share, enum dcp_share_state state)
{
    atomic_store_explicit(&share->own.header->state, state, memory_order_release);
    share->shm->wake(share->shm->ctx, &share->own.header->state);
}

void
dcp_share_release(const struct dcp_share *share, struct dcp_share_member *member)
{
    if (member->header != NULL) {
        share->shm->unmap(share->shm->ctx, member->header, member->mapped_bytes);
    }
    if (member->fd >= 0) {
        share->shm->close(share->shm->ctx, member->fd);
    }
    *member = (struct dcp_share_member){.fd = -1};
}

int
dcp_share_map(const struct dcp_share *share, struct dcp_share_member *member, uint64_t bytes)
{
    void *memory;
    int rc = share->shm->map(share->shm->ctx, member->fd, bytes, &memory);

    if (rc != 0) {
        return rc;
    }
    if (member->header != NULL) {
        share->shm->unmap(share->shm->ctx, member->header, member->mapped_bytes);
    }
    member->header = memory;
    member->mapped_bytes = bytes;
    return 0;
}

/* Makes this rank's segment that long, and its first bytes there.  0 or -errno. */
static int
resize(const struct dcp_share *share, uint64_t bytes, uint64_t allocated_bytes)
{
    int rc = share->shm->resize(share->shm->ctx, share->own.fd, bytes);
    return rc != 0 ? rc : share->shm->allocate(share->shm->ctx, share->own.fd, 0, allocated_bytes);
}

/* ---- begin ---- */

static int
sweep_name(void *ctx, const char *name)
{
    const struct dcp_share *share = ctx;
    uint32_t rank;
    int64_t pid;

    if (parse_name(share, name, &pid, &rank) && !share->shm->alive(share->shm->ctx, pid)) {
        (void)share->shm->unlink(share->shm->ctx, name); /* of another user: stays */
    }
    return 0;
}

void
dcp_share_begin(struct dcp_share *share, const struct dcp_shm *shm,
                const struct dcp_save_id *load_id, uint32_t rank)
{
    int rc;

    share->shm = shm;
    share->load_id = *load_id;
    share->own = (struct dcp_share_member){.rank = rank, .fd = -1};
    rc = shm->host(shm->ctx, &share->host);
    if (rc != 0) {
        dcp_share_because(share, "this host has no shared memory: %s", strerror(-rc));
        return;
    }
    (void)shm->list(shm->ctx, sweep_name, share);
    make_name(share, share->name);
    share->own.fd = shm->create(shm->ctx, share->name);
    share->linked = share->own.fd >= 0;
    rc = share->linked ? resize(share, DCP_SHARE_HEADER_BYTES, DCP_SHARE_HEADER_BYTES)
                       : share->own.fd;
    if (rc == 0) {
        rc = dcp_share_map(share, &share->own, DCP_SHARE_HEADER_BYTES);
    }
    if (rc != 0) {
        dcp_share_because(share, "shared memory could not be made: %s", strerror(-rc));
        dcp_share_end(share);
        return;
    }
    _Static_assert(sizeof(struct dcp_share_header) <= DCP_SHARE_HEADER_BYTES, "header");
    share->own.header->rank = rank;
    share->own.header->host = share->host;
}

/* ---- find ---- */

struct found {
    char name[DCP_SHARE_NAME_BYTES];
    uint32_t rank;
};

struct finding {
    const struct dcp_share *share;
    struct found *found; /* ascending by rank: the lowest ones */
    uint32_t count;
};

static int
find_name(void *ctx, const char *name)
{
    struct finding *finding = ctx;
    const struct dcp_share *share = finding->share;
    uint32_t rank, at = finding->count;
    int64_t pid;

    if (strlen(name) >= DCP_SHARE_NAME_BYTES || strncmp(name, share->name, HOST_AT) != 0 ||
        !parse_name(share, name, &pid, &rank)) {
        return 0;
    }
    while (at > 0 && finding->found[at - 1].rank > rank) {
        at--;
    }
    if (at == DCP_SHARE_MOST_RANKS) {
        return 0;
    }
    finding->count += finding->count < DCP_SHARE_MOST_RANKS;
    memmove(finding->found + at + 1, finding->found + at,
            (finding->count - 1 - at) * sizeof *finding->found);
    finding->found[at].rank = rank;
    memcpy(finding->found[at].name, name, strlen(name) + 1);
    return 0;
}

/* Maps the headers of what was found.  A name that is gone was a rank that is OUT. */
static int
open_members(struct dcp_share *share, const struct finding *finding)
{
    int rc = 0;

    for (uint32_t i = 0; rc == 0 && i < finding->count; i++) {
        struct dcp_share_member *member = &share->members[share->members_count];
        *member = (struct dcp_share_member){.rank = finding->found[i].rank, .fd = -1};
        if (strcmp(finding->found[i].name, share->name) == 0) {
            share->self = share->members_count++;
            member->header = share->own.header;
            continue;
        }
        if (member->rank == share->own.rank) {
            return -EEXIST; /* not ours: somebody else made it */
        }
        member->fd = share->shm->open(share->shm->ctx, finding->found[i].name);
        if (member->fd == -ENOENT) {
            continue;
        }
        rc = member->fd < 0 ? member->fd : dcp_share_map(share, member, DCP_SHARE_HEADER_BYTES);
        share->members_count++;
    }
    return rc;
}

bool
dcp_share_find(struct dcp_share *share)
{
    struct finding finding = {.share = share};
    int rc = -ENOMEM;

    if (share->own.header == NULL) {
        return false;
    }
    share->self = DCP_SHARE_MOST_RANKS;
    finding.found = dcp_calloc(DCP_SHARE_MOST_RANKS, sizeof *finding.found);
    if (finding.found != NULL) {
        rc = share->shm->list(share->shm->ctx, find_name, &finding);
    }
    if (rc == 0) {
        rc = open_members(share, &finding);
    }
    dcp_free(finding.found);
    if (rc != 0) {
        dcp_share_because(share, "shared memory of another rank could not be opened: %s",
                          strerror(-rc));
    } else if (share->self == DCP_SHARE_MOST_RANKS) {
        dcp_share_because(share, "%d other ranks of this host share already", DCP_SHARE_MOST_RANKS);
        rc = -EUSERS;
    } else if (share->members_count < 2) {
        dcp_share_because(share, "no other rank of this host shares");
        rc = -EUSERS;
    }
    return rc == 0;
}

/* ---- join ---- */

void
dcp_share_set_parts(struct dcp_share_member *member)
{
    const struct dcp_share_header *header = member->header;
    uint8_t *base = (uint8_t *)header;

    member->wants = (const struct dcp_share_want *)(base + DCP_SHARE_HEADER_BYTES);
    member->details = (const uint64_t *)(base + header->details_offset);
    member->slots = base + header->slots_offset;
}

void
dcp_share_no_room(struct dcp_share *share, uint64_t bytes, int rc)
{
    dcp_share_because(share, "no room for %llu bytes of shared memory: %s",
                      (unsigned long long)bytes, strerror(-rc));
}

bool
dcp_share_grow(struct dcp_share *share, uint64_t wants_count, uint64_t details_count,
               uint32_t slots_count, uint32_t slot_bytes)
{
    struct dcp_share_header *header = share->own.header;

    DCP_ASSERT(slots_count <= DCP_SHARE_MOST_SLOTS);
    header->details_offset = DCP_SHARE_HEADER_BYTES + wants_count * sizeof(struct dcp_share_want);
    header->slots_offset = dcp_align_up(header->details_offset + details_count * sizeof(uint64_t),
                                        DCP_DIRECT_ALIGN_BYTES);
    header->segment_bytes = header->slots_offset + (uint64_t)slots_count * slot_bytes;
    header->wants_count = wants_count;
    header->details_count = details_count;
    header->slots_count = slots_count;
    header->slot_bytes = slot_bytes;
    int rc = resize(share, header->segment_bytes, header->slots_offset);
    if (rc == 0) {
        rc = dcp_share_map(share, &share->own, header->segment_bytes);
    }
    if (rc != 0) {
        dcp_share_no_room(share, header->slots_offset, rc);
        return false;
    }
    share->members[share->self].header = share->own.header;
    dcp_share_set_parts(&share->own);
    return true;
}

/* ---- end ---- */

void
dcp_share_leave(struct dcp_share *share, enum dcp_share_state how)
{
    if (share->own.header != NULL) {
        uint32_t state = dcp_share_state_of(&share->own);
        if (state == DCP_SHARE_NEW) {
            dcp_share_set_state(share, DCP_SHARE_OUT);
        } else if (state == DCP_SHARE_JOINED || state == DCP_SHARE_READY) {
            dcp_share_set_state(share, how);
        }
    }
    if (share->linked) {
        (void)share->shm->unlink(share->shm->ctx, share->name);
        share->linked = false;
    }
}

void
dcp_share_end(struct dcp_share *share)
{
    if (share->shm == NULL) {
        return;
    }
    /* A forked child has copies of the descriptors and nothing else. */
    bool ours = share->host.pid == getpid();
    if (ours) {
        dcp_share_leave(share, DCP_SHARE_FAILED);
    }
    for (uint32_t i = 0; i < share->members_count; i++) {
        struct dcp_share_member *member = &share->members[i];
        member->header = !ours || i == share->self ? NULL : member->header;
        dcp_share_release(share, member);
    }
    share->own.header = ours ? share->own.header : NULL;
    dcp_share_release(share, &share->own);
    share->members_count = 0;
    share->shm = NULL;
}

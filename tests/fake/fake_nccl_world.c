/*
 * fake_nccl_world.c: communicators of the fake NCCL as shared memory between processes.
 *
 * A communicator is a file in /dev/shm that its ranks map and that goes away when the last has
 * come. Every pair of ranks has a ring in each direction.  What travels in it has a header with the
 * kind and the length, so that ranks that call different things hear of it: the real library hangs
 * or moves garbage.
 *
 * A peer that died is noticed by its process id, and becomes the asynchronous error that NCCL gives
 * for a lost connection.
 */
#include "fake_nccl.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t note_mutex = PTHREAD_MUTEX_INITIALIZER;
static char note[512];
static char note_read[512];

void
fake_note(const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    (void)pthread_mutex_lock(&note_mutex);
    (void)vsnprintf(note, sizeof note, fmt, args);
    if (getenv("FAKE_NCCL_DEBUG") != NULL) {
        (void)fprintf(stderr, "fake nccl, pid %d: %s\n", (int)getpid(), note);
    }
    (void)pthread_mutex_unlock(&note_mutex);
    va_end(args);
}

const char *
fake_noted(void)
{
    (void)pthread_mutex_lock(&note_mutex);
    memcpy(note_read, note, sizeof note);
    (void)pthread_mutex_unlock(&note_mutex);
    return note_read;
}

double
fake_now_s(void)
{
    struct timespec now = {0};
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

double
fake_patience_s(void)
{
    const char *text = getenv("FAKE_NCCL_TIMEOUT_S");
    return text != NULL ? atof(text) : 120.0;
}

void
fake_pause(unsigned *idle)
{
    if (++*idle < 64) {
        (void)sched_yield();
        return;
    }
    struct timespec nap = {.tv_nsec = *idle < 256 ? 20000 : 200000};
    (void)nanosleep(&nap, NULL);
}

static bool
is_alive(int pid)
{
    if (pid == 0 || pid == (int)getpid()) {
        return true;
    }
    char path[32];
    char text[256];
    (void)snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    ssize_t n = read(fd, text, sizeof text - 1);
    (void)close(fd);
    text[n > 0 ? n : 0] = '\0';
    const char *state = strrchr(text, ')');
    return state != NULL && state[1] == ' ' && state[2] != 'Z' && state[2] != 'X';
}

/* ---- joining ---- */

static enum fake_result
map_world(struct fake_comm *comm, const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) {
        fake_note("cannot open %s: %s", path, strerror(errno));
        return FAKE_SYSTEM;
    }
    uint64_t pairs = (uint64_t)comm->count * (uint64_t)comm->count;
    comm->world_bytes = sizeof(struct fake_world) + pairs * sizeof(struct fake_channel);
    void *at = MAP_FAILED;
    if (ftruncate(fd, (off_t)comm->world_bytes) == 0) {
        at = mmap(NULL, comm->world_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    (void)close(fd);
    if (at == MAP_FAILED) {
        fake_note("cannot map %s: %s", path, strerror(errno));
        return FAKE_SYSTEM;
    }
    comm->world = at;
    return FAKE_SUCCESS;
}

static enum fake_result
wait_for_all(struct fake_comm *comm)
{
    unsigned idle = 0;
    double deadline = fake_now_s() + fake_patience_s();
    while (atomic_load(&comm->world->joined) < (uint32_t)comm->count) {
        if (atomic_load(&comm->aborted)) {
            fake_note("aborted while %s was being joined", comm->name);
            return FAKE_SYSTEM;
        }
        if (fake_now_s() > deadline) {
            fake_note("%u of %d ranks came to %s", atomic_load(&comm->world->joined), comm->count,
                      comm->name);
            return FAKE_SYSTEM;
        }
        fake_pause(&idle);
    }
    return FAKE_SUCCESS;
}

enum fake_result
fake_world_join(struct fake_comm *comm)
{
    char path[FAKE_NAME_BYTES + 32];
    (void)snprintf(path, sizeof path, "/dev/shm/fake_nccl-%s", comm->name);
    enum fake_result rc = map_world(comm, path);
    if (rc != FAKE_SUCCESS) {
        return rc;
    }
    uint32_t expected = 0;
    if (!atomic_compare_exchange_strong(&comm->world->ranks_count, &expected,
                                        (uint32_t)comm->count) &&
        expected != (uint32_t)comm->count) {
        fake_note("rank %d joins %s as one of %d, others as one of %u", comm->rank, comm->name,
                  comm->count, expected);
        return FAKE_INVALID_ARGUMENT;
    }
    int32_t nobody = 0;
    if (!atomic_compare_exchange_strong(&comm->world->pids[comm->rank], &nobody,
                                        (int32_t)getpid())) {
        fake_note("rank %d is in %s twice", comm->rank, comm->name);
        return FAKE_INVALID_ARGUMENT;
    }
    bool last = atomic_fetch_add(&comm->world->joined, 1) + 1 == (uint32_t)comm->count;
    if (last) {
        (void)unlink(path);
    }
    return wait_for_all(comm);
}

void
fake_world_leave(struct fake_comm *comm)
{
    if (comm->world != NULL) {
        (void)munmap(comm->world, comm->world_bytes);
    }
    comm->world = NULL;
}

/* ---- moving bytes ---- */

struct header {
    uint32_t kind, what;
    uint64_t bytes;
};

static uint64_t
ring_write(struct fake_channel *ring, const uint8_t *data, uint64_t bytes)
{
    uint64_t at = atomic_load_explicit(&ring->sent, memory_order_relaxed);
    uint64_t space =
        FAKE_CHANNEL_BYTES - (at - atomic_load_explicit(&ring->received, memory_order_acquire));
    uint64_t n = bytes < space ? bytes : space;
    uint64_t first = FAKE_CHANNEL_BYTES - at % FAKE_CHANNEL_BYTES;
    first = first < n ? first : n;
    memcpy(ring->data + at % FAKE_CHANNEL_BYTES, data, first);
    memcpy(ring->data, data + first, n - first);
    atomic_store_explicit(&ring->sent, at + n, memory_order_release);
    return n;
}

static uint64_t
ring_read(struct fake_channel *ring, uint8_t *data, uint64_t bytes)
{
    uint64_t at = atomic_load_explicit(&ring->received, memory_order_relaxed);
    uint64_t there = atomic_load_explicit(&ring->sent, memory_order_acquire) - at;
    uint64_t n = bytes < there ? bytes : there;
    uint64_t first = FAKE_CHANNEL_BYTES - at % FAKE_CHANNEL_BYTES;
    first = first < n ? first : n;
    memcpy(data, ring->data + at % FAKE_CHANNEL_BYTES, first);
    memcpy(data + first, ring->data, n - first);
    atomic_store_explicit(&ring->received, at + n, memory_order_release);
    return n;
}

/* The header is moved whole: the rings never hold a part of one at their end for long. */
static int
move_header(struct fake_comm *comm, struct fake_transfer *t, struct fake_channel *ring,
            bool *ret_moved)
{
    struct header header = {t->kind, t->what, t->bytes};
    uint64_t sent = atomic_load_explicit(&ring->sent, memory_order_acquire);
    uint64_t received = atomic_load_explicit(&ring->received, memory_order_acquire);
    if (t->sends) {
        if (FAKE_CHANNEL_BYTES - (sent - received) >= sizeof header) {
            t->done = ring_write(ring, (const uint8_t *)&header, sizeof header);
            *ret_moved = true;
        }
        return 0;
    }
    if (sent - received < sizeof header) {
        return 0;
    }
    struct header got;
    t->done = ring_read(ring, (uint8_t *)&got, sizeof got);
    *ret_moved = true;
    if (got.kind != header.kind || got.what != header.what || got.bytes != header.bytes) {
        fake_note(
            "rank %d of %s expects kind %u (%#x) of %llu bytes, rank %d sent kind %u (%#x) of "
            "%llu",
            comm->rank, comm->name, header.kind, header.what, (unsigned long long)header.bytes,
            t->peer, got.kind, got.what, (unsigned long long)got.bytes);
        return FAKE_INVALID_USAGE;
    }
    return 0;
}

static int
move(struct fake_comm *comm, struct fake_transfer *t, bool *ret_moved)
{
    int from = t->sends ? comm->rank : t->peer;
    int to = t->sends ? t->peer : comm->rank;
    struct fake_channel *ring = &comm->world->channels[from * comm->count + to];
    uint64_t head = sizeof(struct header);
    if (t->done < head) {
        int rc = move_header(comm, t, ring, ret_moved);
        if (rc != 0 || t->done < head) {
            return rc;
        }
    }
    uint8_t *at = t->data + (t->done - head);
    uint64_t left = t->bytes - (t->done - head);
    uint64_t n = left == 0 ? 0 : t->sends ? ring_write(ring, at, left) : ring_read(ring, at, left);
    t->done += n;
    *ret_moved = *ret_moved || n != 0;
    return 0;
}

/* One attempt at each; a ring carries its transfers one after another.  Negative: all are done. */
static int
pass(struct fake_comm *comm, struct fake_transfer *items, size_t count, bool *ret_moved)
{
    uint64_t busy[2] = {0, 0};
    bool left = false;
    for (size_t i = 0; i < count; i++) {
        struct fake_transfer *t = &items[i];
        uint64_t bit = UINT64_C(1) << t->peer;
        uint64_t end = t->bytes + sizeof(struct header);
        if (t->done == end || (busy[t->sends] & bit) != 0) {
            left = left || t->done != end;
            continue;
        }
        int rc = move(comm, t, ret_moved);
        if (rc != 0) {
            return rc;
        }
        if (t->done != end) {
            busy[t->sends] |= bit;
            left = true;
        }
    }
    return left ? 0 : -1;
}

static int
find_trouble(const struct fake_comm *comm, const struct fake_transfer *items, size_t count,
             double deadline)
{
    for (size_t i = 0; i < count; i++) {
        int pid = atomic_load(&comm->world->pids[items[i].peer]);
        bool over = items[i].done == items[i].bytes + sizeof(struct header);
        if (!over && !is_alive(pid)) {
            fake_note("rank %d of %s (pid %d) is gone", items[i].peer, comm->name, pid);
            return FAKE_REMOTE;
        }
    }
    if (fake_now_s() > deadline) {
        fake_note("nothing moves in %s", comm->name);
        return FAKE_SYSTEM;
    }
    return 0;
}

int
fake_run_transfers(struct fake_comm *comm, struct fake_transfer *items, size_t count)
{
    unsigned idle = 0;
    double look = 0;
    double deadline = fake_now_s() + fake_patience_s();
    for (;;) {
        bool moved = false;
        int rc = pass(comm, items, count, &moved);
        if (rc < 0) {
            return 0;
        }
        if (rc == 0 && atomic_load(&comm->aborted)) {
            return FAKE_SYSTEM;
        }
        if (rc == 0 && !moved && idle > 64 && fake_now_s() > look) {
            rc = find_trouble(comm, items, count, deadline);
            look = fake_now_s() + 0.02;
        }
        if (rc != 0) {
            atomic_store(&comm->async_error, rc);
            return rc;
        }
        if (moved) {
            idle = 0;
            deadline = fake_now_s() + fake_patience_s();
        } else {
            fake_pause(&idle);
        }
    }
}

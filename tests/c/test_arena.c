/*
 * test_arena.c: staging memory is taken once, kept, grown, limited, and never another process's.
 */
#include "ctest.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "arena_map.h"
#include "dcp_limits.h"
#include "io_memory.h"

#define MIB (UINT64_C(1) << 20)

static const enum dcp_arena_kind kinds[] = {DCP_ARENA_PRIVATE, DCP_ARENA_SHARED};
enum { KINDS = 2 };

static struct dcp_arena *
acquire(enum dcp_arena_kind kind, uint64_t bytes)
{
    struct dcp_arena *arena = NULL;
    struct dcp_error err = {0};
    CHECK_OK(dcp_arena_acquire(kind, bytes, NULL, &arena, &err), &err);
    return arena;
}

static uint64_t
resident_bytes(const struct dcp_arena *arena, uint64_t bytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), count = 0;
    unsigned char *in = dcp_malloc(bytes / page);
    CHECK_EQ(mincore(arena->memory, bytes, in), 0);
    for (uint64_t i = 0; i < bytes / page; i++) {
        count += in[i] & 1;
    }
    dcp_free(in);
    return count * page;
}

/* A machine that can spare `mib`. */
static struct io_memory *
host_make(uint64_t mib, struct dcp_arena_limits *ret_limits)
{
    char text[64];
    struct io_memory *fs = io_memory_new(1);
    struct dcp_io *io = &io_memory_process(fs, 0)->io;
    int len = snprintf(text, sizeof text, "MemAvailable: %" PRIu64 " kB\n", mib << 10);
    CHECK_EQ(io->mkdirs(io->ctx, "/proc"), 0);
    io_memory_put_file(fs, "/proc", "meminfo", text, (size_t)len);
    *ret_limits = (struct dcp_arena_limits){.io = io};
    return fs;
}

static void
an_arena_is_memory_of_that_size_and_all_of_it_is_given_back(void)
{
    for (int k = 0; k < KINDS; k++) {
        static const uint64_t sizes[] = {0, 1, 4096, 5000, 2 << 20, (5 << 20) + 1};
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            uint64_t live = dcp_alloc_live_bytes();
            struct dcp_arena *arena = acquire(kinds[k], sizes[i]);
            CHECK(arena->bytes >= sizes[i] && arena->bytes < sizes[i] + (2 << 20) + 1);
            CHECK_EQ((uintptr_t)arena->memory % DCP_DIRECT_ALIGN_BYTES, 0);
            CHECK_EQ(arena->fd >= 0, kinds[k] == DCP_ARENA_SHARED);
            CHECK_EQ(arena->pid, getpid());
            CHECK_EQ(dcp_arena_total_bytes(), arena->bytes);
            CHECK(dcp_alloc_live_bytes() >= live + arena->bytes);
            memset(arena->memory, 3, arena->bytes);
            dcp_arena_release(arena);
            dcp_arena_trim();
            CHECK_EQ(dcp_arena_total_bytes(), 0);
            CHECK_EQ(dcp_alloc_live_bytes(), live);
        }
    }
    dcp_arena_release(NULL);
}

static void
a_kept_arena_is_used_again_and_takes_nothing_new(void)
{
    struct dcp_arena_limits none;
    struct io_memory *fs = host_make(0, &none);
    none.cap_bytes = 1;
    for (int k = 0; k < KINDS; k++) {
        struct dcp_error err = {0};
        struct dcp_arena *arena = acquire(kinds[k], 8 * MIB), *again = NULL;
        uint8_t *memory = arena->memory;
        memory[12345] = 77;
        dcp_arena_release(arena);
        CHECK_OK(dcp_arena_acquire(kinds[k], 7 * MIB, &none, &again, &err), &err);
        CHECK(again->memory == memory && memory[12345] == 77);
        CHECK_EQ(dcp_arena_total_bytes(), 8 * MIB);
        dcp_arena_release(again);
        dcp_arena_trim();
    }
    io_memory_free(fs);
}

static void
the_smallest_that_is_large_enough_is_taken_and_kinds_are_not_mixed(void)
{
    struct dcp_arena *made[] = {
        acquire(DCP_ARENA_PRIVATE, 6 * MIB), acquire(DCP_ARENA_PRIVATE, 20 * MIB),
        acquire(DCP_ARENA_PRIVATE, 10 * MIB), acquire(DCP_ARENA_SHARED, 8 * MIB)};
    for (int i = 0; i < 4; i++) {
        made[i]->memory[0] = (uint8_t)(i + 1);
        dcp_arena_release(made[i]);
    }
    struct dcp_arena *middle = acquire(DCP_ARENA_PRIVATE, 8 * MIB);
    CHECK_EQ(middle->memory[0], 3);
    struct dcp_arena *large = acquire(DCP_ARENA_PRIVATE, 8 * MIB);
    CHECK_EQ(large->memory[0], 2);
    struct dcp_arena *shared = acquire(DCP_ARENA_SHARED, 2 * MIB);
    CHECK_EQ(shared->memory[0], 4);
    CHECK_EQ(dcp_arena_total_bytes(), 44 * MIB);
    struct dcp_arena *grown = acquire(DCP_ARENA_PRIVATE, 12 * MIB); /* the small one */
    CHECK_EQ(grown->memory[0], 1);
    CHECK_EQ(dcp_arena_total_bytes(), 50 * MIB);
    dcp_arena_release(middle);
    dcp_arena_release(large);
    dcp_arena_release(shared);
    dcp_arena_release(grown);
    dcp_arena_trim();
    CHECK_EQ(dcp_arena_total_bytes(), 0);
}

static void
a_growing_arena_keeps_what_was_touched_and_asks_for_the_difference(void)
{
    for (int k = 0; k < KINDS; k++) {
        struct dcp_arena_limits limits;
        struct io_memory *fs = host_make(10, &limits);
        struct dcp_error err = {0};
        struct dcp_arena *arena = acquire(kinds[k], 32 * MIB), *grown = NULL;
        for (uint64_t at = 0; at < 32 * MIB; at += 4096) {
            arena->memory[at] = (uint8_t)(at >> 12);
        }
        dcp_arena_release(arena);
        CHECK_EQ(dcp_arena_acquire(kinds[k], 42 * MIB, &limits, &grown, &err), DCP_E_LIMIT);
        CHECK(strstr(err.message, "MemAvailable") != NULL);
        dcp_error_clear(&err);
        limits.cap_bytes = 39 * MIB;
        CHECK_EQ(dcp_arena_acquire(kinds[k], 40 * MIB, &limits, &grown, &err), DCP_E_LIMIT);
        dcp_error_clear(&err);
        limits.cap_bytes = 40 * MIB;
        CHECK_OK(dcp_arena_acquire(kinds[k], 40 * MIB, &limits, &grown, &err), &err);
        CHECK_EQ(grown->bytes, 40 * MIB);
        CHECK_EQ(resident_bytes(grown, 32 * MIB), 32 * MIB);
        bool same = true;
        for (uint64_t at = 0; at < 32 * MIB; at += 4096) {
            same = same && grown->memory[at] == (uint8_t)(at >> 12);
        }
        CHECK(same);
        memset(grown->memory, 1, grown->bytes);
        dcp_arena_release(grown);
        dcp_arena_trim();
        io_memory_free(fs);
    }
}

static void
what_the_machine_can_not_spare_is_not_taken(void)
{
    struct dcp_arena_limits limits;
    struct io_memory *fs = host_make(100, &limits);
    struct dcp_arena *arena = NULL;
    for (int k = 0; k < KINDS; k++) {
        struct dcp_error err = {0};
        limits.sharers = 0;
        CHECK_EQ(dcp_arena_acquire(kinds[k], 82 * MIB, &limits, &arena, &err), DCP_E_LIMIT);
        CHECK(strstr(err.message, "MemAvailable") != NULL);
        dcp_error_clear(&err);
        limits.sharers = 4;
        CHECK_EQ(dcp_arena_acquire(kinds[k], 22 * MIB, &limits, &arena, &err), DCP_E_LIMIT);
        dcp_error_clear(&err);
        CHECK_EQ(dcp_arena_total_bytes(), 0);
        CHECK_OK(dcp_arena_acquire(kinds[k], 18 * MIB, &limits, &arena, &err), &err);
        dcp_arena_release(arena);
        dcp_arena_trim();
        CHECK_EQ(dcp_arena_acquire(kinds[k], UINT64_MAX, &limits, &arena, &err), DCP_E_LIMIT);
        dcp_error_clear(&err);
        CHECK_EQ(dcp_arena_acquire(kinds[k], UINT64_C(1) << 49, NULL, &arena, &err), DCP_E_NOMEM);
        dcp_error_clear(&err);
        CHECK_EQ(dcp_arena_total_bytes(), 0);
    }
    io_memory_free(fs);
}

static void
the_cap_is_of_all_arenas_and_those_of_no_use_make_room(void)
{
    struct dcp_arena_limits limits = {.cap_bytes = 24 * MIB};
    struct dcp_arena *first = NULL, *second = NULL;
    struct dcp_error err = {0};
    CHECK_OK(dcp_arena_acquire(DCP_ARENA_PRIVATE, 16 * MIB, &limits, &first, &err), &err);
    CHECK_EQ(dcp_arena_acquire(DCP_ARENA_SHARED, 10 * MIB, &limits, &second, &err), DCP_E_LIMIT);
    CHECK(strstr(err.message, "limit of 25165824") != NULL);
    dcp_error_clear(&err);
    dcp_arena_release(first);
    CHECK_OK(dcp_arena_acquire(DCP_ARENA_SHARED, 10 * MIB, &limits, &second, &err), &err);
    CHECK_EQ(dcp_arena_total_bytes(), 10 * MIB);
    dcp_arena_release(second);
    dcp_arena_trim();
}

static void
of_too_many_the_smallest_goes(void)
{
    struct dcp_arena *made[DCP_MAX_ARENAS + 2];
    for (int order = 0; order < 2; order++) {
        uint64_t kept = 0;
        for (int i = 0; i < DCP_MAX_ARENAS + 2; i++) {
            made[i] = acquire(DCP_ARENA_PRIVATE, (uint64_t)(i + 1) * 2 * MIB);
            kept += i >= 2 ? made[i]->bytes : 0;
        }
        for (int i = 0; i < DCP_MAX_ARENAS + 2; i++) {
            dcp_arena_release(made[order == 0 ? i : DCP_MAX_ARENAS + 1 - i]);
        }
        CHECK_EQ(dcp_arena_total_bytes(), kept);
        dcp_arena_trim();
    }
}

static void
populated_memory_is_there_and_keeps_what_it_held(void)
{
    for (int k = 0; k < KINDS; k++) {
        struct dcp_arena *arena = acquire(kinds[k], 100 * MIB);
        struct dcp_error err = {0};
        atomic_int cancel = 0;
        arena->memory[5000] = 9;
        CHECK_OK(dcp_arena_populate(arena, 70 * MIB, &cancel, &err), &err);
        CHECK_EQ(resident_bytes(arena, 70 * MIB), 70 * MIB);
        CHECK_EQ(resident_bytes(arena, 100 * MIB), 70 * MIB);
        CHECK_EQ(arena->memory[5000], 9);
        cancel = 1;
        CHECK_OK(dcp_arena_populate(arena, 70 * MIB, &cancel, &err), &err); /* nothing to do */
        CHECK_EQ(dcp_arena_populate(arena, 100 * MIB, &cancel, &err), DCP_E_CANCELLED);
        dcp_error_clear(&err);
        CHECK_EQ(dcp_arena_populate(arena, 101 * MIB, NULL, &err), DCP_E_INVALID);
        dcp_memory_touch(arena->memory, 100 * MIB);
        CHECK_EQ(resident_bytes(arena, 100 * MIB), 100 * MIB);
        CHECK_EQ(arena->memory[5000], 9);
        dcp_arena_release(arena);
        dcp_arena_trim();
    }
}

/* ---- other processes ---- */

static int
run_in_child(bool (*fn)(void *arg), void *arg)
{
    int status = -1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        _exit(fn(arg) ? 0 : 1);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    return status;
}

static bool
maps_and_answers(void *arg)
{
    const struct dcp_arena *arena = arg;
    uint8_t *memory = mmap(NULL, arena->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, arena->fd, 0);
    bool good = memory != MAP_FAILED && memory[7 * MIB] == 42;
    if (good) {
        memory[0] = 43;
    }
    return good && ftruncate(arena->fd, 4096) != 0 && errno == EPERM;
}

static void
whoever_has_the_descriptor_sees_the_same_bytes_and_cannot_cut_them(void)
{
    struct dcp_arena *arena = acquire(DCP_ARENA_SHARED, 8 * MIB);
    arena->memory[7 * MIB] = 42;
    CHECK_EQ(run_in_child(maps_and_answers, arena), 0);
    CHECK_EQ(arena->memory[0], 43);
    CHECK_EQ(fcntl(arena->fd, F_GETFD), FD_CLOEXEC);
    dcp_arena_release(arena);
    dcp_arena_trim();
}

static void
a_descriptor_that_others_keep_holds_no_memory(void)
{
    struct dcp_arena *arena = acquire(DCP_ARENA_SHARED, 8 * MIB);
    struct dcp_stat stat;
    uint8_t byte = 1;
    arena->memory[5] = 42;
    int fd = dup(arena->fd); /* as a forked child has it */
    CHECK(fd >= 0);
    dcp_arena_release(arena);
    dcp_arena_trim();
    CHECK_EQ(pread(fd, &byte, 1, 5), 1);
    CHECK_EQ(byte, 0);
    CHECK_EQ(dcp_io_posix()->fstat(NULL, fd, &stat), 0);
    close(fd);
}

struct family {
    struct dcp_arena *in_use[KINDS];
    uint8_t *kept_memory[KINDS];
};

static bool
is_mapped(const uint8_t *memory)
{
    unsigned char in;
    return mincore((void *)(uintptr_t)memory, 4096, &in) == 0;
}

/* Nothing of the parent's is there, nothing of it is counted, and nothing is unmapped twice: what
 * lies at those addresses in the child is the child's. */
static bool
starts_with_nothing(void *arg)
{
    const struct family *family = arg;
    struct dcp_error err = {0};
    bool good = dcp_arena_total_bytes() == 0;
    for (int k = 0; k < KINDS; k++) {
        uint8_t *theirs[] = {family->in_use[k]->memory, family->kept_memory[k]};
        for (int i = 0; i < 2; i++) {
            good = good && !is_mapped(theirs[i]) &&
                   mmap(theirs[i], 4096, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == theirs[i];
        }
        good = good && dcp_arena_populate(family->in_use[k], 4096, NULL, &err) == DCP_E_INVALID;
        dcp_error_clear(&err);
        dcp_arena_release(family->in_use[k]);
        struct dcp_arena_limits limits = {.cap_bytes = 8 * MIB};
        struct dcp_arena *own = NULL;
        good = good && dcp_arena_acquire(kinds[k], 8 * MIB, &limits, &own, &err) == 0;
        good = good && own->memory != family->kept_memory[k] && own->pid == getpid();
        memset(own->memory, 1, own->bytes);
        good = good && dcp_arena_total_bytes() == 8 * MIB;
        dcp_arena_release(own);
        dcp_arena_trim();
        good = good && dcp_arena_total_bytes() == 0;
        good = good && is_mapped(theirs[0]) && is_mapped(theirs[1]);
    }
    return good;
}

static void
a_forked_child_starts_with_no_arena_and_leaves_the_parents_alone(void)
{
    struct family family;
    for (int k = 0; k < KINDS; k++) {
        family.in_use[k] = acquire(kinds[k], 8 * MIB);
        struct dcp_arena *kept = acquire(kinds[k], 8 * MIB);
        family.kept_memory[k] = kept->memory;
        memset(kept->memory, 5, kept->bytes);
        memset(family.in_use[k]->memory, 6, family.in_use[k]->bytes);
        dcp_arena_release(kept);
    }
    CHECK_EQ(run_in_child(starts_with_nothing, &family), 0);
    CHECK_EQ(dcp_arena_total_bytes(), 32 * MIB);
    for (int k = 0; k < KINDS; k++) {
        CHECK_EQ(family.in_use[k]->memory[8 * MIB - 1], 6);
        CHECK_EQ(family.kept_memory[k][8 * MIB - 1], 5);
        dcp_arena_release(family.in_use[k]);
    }
    dcp_arena_trim();
    CHECK_EQ(dcp_arena_total_bytes(), 0);
}

/* ---- pinned memory ---- */

/* A device that counts what it is asked. */
struct pinner {
    struct dcp_device device;
    uint8_t *memory;
    uint64_t bytes; /* that are pinned */
    int pins, unpins;
    int code; /* of pins to come */
};

static int
count_pin(void *ctx, void *memory, uint64_t bytes, struct dcp_error *err)
{
    struct pinner *pinner = ctx;
    pinner->pins++;
    pinner->memory = memory;
    pinner->bytes = pinner->code == 0 ? bytes : 0;
    return pinner->code == 0 ? 0 : dcp_error_set(err, pinner->code, 0, NULL, "no pins here");
}

static void
count_unpin(void *ctx, void *memory)
{
    struct pinner *pinner = ctx;
    CHECK(memory == pinner->memory);
    pinner->unpins++;
    pinner->bytes = 0;
}

static void
pinner_make(struct pinner *pinner)
{
    *pinner = (struct pinner){
        .device = {.ctx = pinner, .kind = "counted", .pin = count_pin, .unpin = count_unpin}};
}

static void
what_grows_stays_where_it_is_and_pinned(void)
{
    for (int k = 0; k < KINDS; k++) {
        struct pinner pinner;
        struct dcp_error err = {0};
        struct dcp_arena *arena = acquire(kinds[k], 8 * MIB);
        uint8_t *memory = arena->memory;
        pinner_make(&pinner);
        CHECK_OK(dcp_arena_pin(arena, &pinner.device, 8 * MIB, &err), &err);
        CHECK_OK(dcp_arena_pin(arena, &pinner.device, 6 * MIB, &err), &err);
        CHECK_EQ(pinner.pins, 1);
        for (uint64_t mib = 10; mib <= 8 * DCP_ARENA_ROOM; mib += 18) {
            dcp_arena_release(arena);
            arena = acquire(kinds[k], mib * MIB);
            CHECK(arena->memory == memory);
            memset(arena->memory, 1, arena->bytes);
            CHECK_OK(dcp_arena_pin(arena, &pinner.device, mib * MIB, &err), &err);
            CHECK_EQ(pinner.bytes, mib * MIB);
        }
        CHECK_EQ(pinner.pins, 5);
        CHECK_EQ(pinner.unpins, 0);
        dcp_arena_release(arena);
        arena = acquire(kinds[k], 8 * DCP_ARENA_ROOM * MIB + 1); /* no room any more: another one */
        CHECK_EQ(pinner.unpins, 1);
        CHECK(arena->pinned_by == NULL && arena->touched_bytes == 0);
        memset(arena->memory, 1, arena->bytes);
        CHECK_EQ(dcp_arena_total_bytes(), arena->bytes);
        dcp_arena_release(arena);
        dcp_arena_trim();
        CHECK_EQ(dcp_arena_total_bytes(), 0);
        CHECK_EQ(pinner.unpins, 1);
    }
}

static void
a_refusal_to_pin_is_told_again_without_asking_until_the_arena_grows(void)
{
    struct pinner pinner;
    struct dcp_error err = {0};
    struct dcp_arena *arena = acquire(DCP_ARENA_PRIVATE, 4 * MIB);
    pinner_make(&pinner);
    pinner.code = DCP_E_NOMEM;
    for (int i = 0; i < 3; i++) {
        dcp_error_clear(&err);
        CHECK_EQ(dcp_arena_pin(arena, &pinner.device, 4 * MIB, &err), DCP_E_NOMEM);
        CHECK(strstr(err.message, "no pins here") != NULL);
        dcp_arena_release(arena);
        arena = acquire(DCP_ARENA_PRIVATE, 4 * MIB);
    }
    CHECK_EQ(pinner.pins, 1);
    dcp_arena_release(arena);
    arena = acquire(DCP_ARENA_PRIVATE, 6 * MIB);
    pinner.code = 0;
    CHECK_OK(dcp_arena_pin(arena, &pinner.device, 6 * MIB, &err), &err);
    CHECK_EQ(pinner.pins, 2);
    dcp_arena_release(arena);
    arena = acquire(DCP_ARENA_PRIVATE, 8 * MIB); /* what was pinned is not any more */
    pinner.code = DCP_E_NOMEM;
    CHECK_EQ(dcp_arena_pin(arena, &pinner.device, 8 * MIB, NULL), DCP_E_NOMEM);
    CHECK_EQ(pinner.unpins, 1); /* whether or not the device had let go of it */
    dcp_arena_release(arena);
    dcp_arena_trim();
    CHECK_EQ(pinner.unpins, 1);
}

struct pinned_family {
    struct pinner *pinner;
    struct dcp_arena *in_use;
};

static bool
unpins_nothing(void *arg)
{
    const struct pinned_family *family = arg;
    int pins = family->pinner->pins;
    dcp_arena_release(family->in_use);
    struct dcp_arena *own = acquire(DCP_ARENA_PRIVATE, 8 * MIB);
    bool good = own->pinned_by == NULL && own->pinned_bytes == 0;
    memset(own->memory, 1, own->bytes);
    dcp_arena_release(own);
    dcp_arena_trim();
    return good && family->pinner->pins == pins && family->pinner->unpins == 0;
}

static void
a_forked_child_leaves_what_is_pinned_to_its_parent(void)
{
    for (int k = 0; k < KINDS; k++) {
        struct pinner pinner;
        struct dcp_error err = {0};
        struct dcp_arena *kept = acquire(kinds[k], 8 * MIB);
        pinner_make(&pinner);
        struct pinned_family family = {&pinner, acquire(kinds[k], 8 * MIB)};
        CHECK_OK(dcp_arena_pin(kept, &pinner.device, 8 * MIB, &err), &err);
        dcp_arena_release(kept);
        CHECK_EQ(run_in_child(unpins_nothing, &family), 0);
        CHECK_EQ(pinner.bytes, 8 * MIB);
        dcp_arena_release(family.in_use);
        dcp_arena_trim();
        CHECK_EQ(pinner.unpins, 1);
    }
}

/* A process whose address space is limited reserves none of it. */
static bool
reserves_nothing(void *arg)
{
    struct rlimit limit = {(rlim_t)1 << 60, (rlim_t)1 << 60};
    bool good = setrlimit(RLIMIT_AS, &limit) == 0;
    (void)arg;
    for (int k = 0; k < KINDS; k++) {
        struct dcp_arena *arena = acquire(kinds[k], 4 * MIB);
        good = good && arena->room_bytes == 4 * MIB;
        memset(arena->memory, 1, arena->bytes);
        dcp_arena_release(arena);
        arena = acquire(kinds[k], 6 * MIB);
        memset(arena->memory, 1, arena->bytes);
        good = good && dcp_arena_total_bytes() == 6 * MIB;
        dcp_arena_release(arena);
        dcp_arena_trim();
    }
    return good;
}

static void
where_address_space_is_limited_none_is_reserved(void)
{
    CHECK_EQ(run_in_child(reserves_nothing, NULL), 0);
}

/* ---- threads, and no memory ---- */

enum { HAMMER_ROUNDS = 400, HAMMER_THREADS = 4 };
#define HAMMER_CAP (24 * MIB)

static void *
hammer(void *arg)
{
    uint64_t seed = (uint64_t)(uintptr_t)arg * 0x9E3779B97F4A7C15u + 1, wrong = 0;
    for (int i = 0; i < HAMMER_ROUNDS; i++) {
        struct dcp_arena_limits limits = {.cap_bytes = HAMMER_CAP};
        struct dcp_arena *arena;
        struct dcp_error err = {0};
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t bytes = 4096 + (seed >> 33) % (5 * MIB);
        if (dcp_arena_acquire(kinds[seed >> 60 & 1], bytes, &limits, &arena, &err) == 0) {
            arena->memory[0] = (uint8_t)(uintptr_t)arg;
            arena->memory[bytes - 1] = (uint8_t)(uintptr_t)arg;
            wrong += dcp_arena_total_bytes() > HAMMER_CAP;
            sched_yield();
            wrong += arena->memory[0] != (uint8_t)(uintptr_t)arg ||
                     arena->memory[bytes - 1] != (uint8_t)(uintptr_t)arg;
            dcp_arena_release(arena);
        } else {
            wrong += err.code != DCP_E_LIMIT;
        }
        if (i % 50 == 0) {
            dcp_arena_trim();
        }
    }
    return (void *)(uintptr_t)wrong;
}

static void
threads_never_share_an_arena_and_stay_below_the_cap_together(void)
{
    pthread_t threads[HAMMER_THREADS];
    for (uintptr_t i = 0; i < HAMMER_THREADS; i++) {
        CHECK_EQ(pthread_create(&threads[i], NULL, hammer, (void *)(i + 1)), 0);
    }
    for (int i = 0; i < HAMMER_THREADS; i++) {
        void *wrong = (void *)1;
        pthread_join(threads[i], &wrong);
        CHECK(wrong == NULL);
    }
    dcp_arena_trim();
    CHECK_EQ(dcp_arena_total_bytes(), 0);
}

static void
running_out_of_memory_anywhere_takes_nothing(void)
{
    for (int k = 0; k < KINDS; k++) {
        for (int growing = 0; growing < 2; growing++) {
            int rc = DCP_E_NOMEM;
            for (uint64_t nth = 1; rc != 0 && nth < 10; nth++) {
                struct dcp_arena *arena = NULL;
                struct dcp_error err = {0};
                if (growing) {
                    dcp_arena_release(acquire(kinds[k], 4 * MIB));
                }
                uint64_t before = dcp_arena_total_bytes();
                dcp_alloc_fail_after(nth);
                rc = dcp_arena_acquire(kinds[k], 16 * MIB, NULL, &arena, &err);
                dcp_alloc_fail_after(0);
                CHECK(rc == 0 || rc == DCP_E_NOMEM);
                CHECK_EQ(dcp_arena_total_bytes(), rc == 0 ? 16 * MIB : before);
                dcp_arena_release(arena);
                dcp_arena_trim();
            }
            CHECK_EQ(rc, 0);
        }
    }
}

CTEST_MAIN(RUN(an_arena_is_memory_of_that_size_and_all_of_it_is_given_back);
           RUN(a_kept_arena_is_used_again_and_takes_nothing_new);
           RUN(the_smallest_that_is_large_enough_is_taken_and_kinds_are_not_mixed);
           RUN(a_growing_arena_keeps_what_was_touched_and_asks_for_the_difference);
           RUN(what_the_machine_can_not_spare_is_not_taken);
           RUN(the_cap_is_of_all_arenas_and_those_of_no_use_make_room);
           RUN(of_too_many_the_smallest_goes);
           RUN(populated_memory_is_there_and_keeps_what_it_held);
           RUN(whoever_has_the_descriptor_sees_the_same_bytes_and_cannot_cut_them);
           RUN(a_descriptor_that_others_keep_holds_no_memory);
           RUN(a_forked_child_starts_with_no_arena_and_leaves_the_parents_alone);
           RUN(what_grows_stays_where_it_is_and_pinned);
           RUN(a_refusal_to_pin_is_told_again_without_asking_until_the_arena_grows);
           RUN(a_forked_child_leaves_what_is_pinned_to_its_parent);
           RUN(where_address_space_is_limited_none_is_reserved);
           RUN(threads_never_share_an_arena_and_stay_below_the_cap_together);
           RUN(running_out_of_memory_anywhere_takes_nothing);)

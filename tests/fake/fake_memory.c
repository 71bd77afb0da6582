/*
 * fake_memory.c: memory of the fake devices, pinned memory of the host, counts and wanted faults
 * (fake_gpu.h).
 *
 * Ranges are a sorted array: every copy looks up both of its ends.  Counts and faults share one
 * table by name, so that every function of the API can be counted and made to fail by its own name
 * without a line for it.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fake_gpu.h"

#define NAMES_MAX 512
#define FRESH_FILL_BYTES ((uint64_t)64 << 20) /* memory above this is not filled with poison */

struct named {
    char name[64];
    uint64_t count;
    uint64_t fails_at; /* the count of calls at which it fails; 0: never */
    int code;
};

static pthread_mutex_t names_lock = PTHREAD_MUTEX_INITIALIZER;
static struct named names[NAMES_MAX];
static uint32_t names_count;
static pthread_once_t faults_once = PTHREAD_ONCE_INIT;

static pthread_mutex_t ranges_lock = PTHREAD_MUTEX_INITIALIZER;
static struct fake_range *ranges;
static uint32_t ranges_count, ranges_room;
static uint64_t used_bytes[DCP_FAKE_DEVICES], largest_bytes;

/* ---- counts and faults ---- */

static struct named *
named_locked(const char *name)
{
    for (uint32_t i = 0; i < names_count; i++) {
        if (strcmp(names[i].name, name) == 0) {
            return &names[i];
        }
    }
    if (names_count == NAMES_MAX || strlen(name) >= sizeof(names[0].name)) {
        abort(); /* a count that is lost is a test that shows nothing */
    }
    strcpy(names[names_count].name, name);
    return &names[names_count++];
}

static void
read_faults(void)
{
    const char *text = getenv("DCP_FAKE_CUDA_FAIL");
    unsigned long long nth;
    char name[64];
    int code, used;

    while (text != NULL && sscanf(text, "%63[^:]:%llu:%d%n", name, &nth, &code, &used) == 3) {
        dcp_fake_fail(name, nth, code);
        text += used;
        text = *text == ',' ? text + 1 : NULL;
    }
}

int
fake_enter(const char *name)
{
    struct named *named;
    int code = FAKE_OK;

    pthread_once(&faults_once, read_faults);
    pthread_mutex_lock(&names_lock);
    named = named_locked(name);
    named->count++;
    if (named->fails_at == named->count) {
        code = named->code;
    }
    pthread_mutex_unlock(&names_lock);
    return code;
}

void
fake_count(const char *name, uint64_t by)
{
    pthread_mutex_lock(&names_lock);
    named_locked(name)->count += by;
    pthread_mutex_unlock(&names_lock);
}

uint64_t
dcp_fake_count(const char *name)
{
    uint64_t count;

    pthread_mutex_lock(&names_lock);
    count = named_locked(name)->count;
    pthread_mutex_unlock(&names_lock);
    return count;
}

void
dcp_fake_fail(const char *name, uint64_t nth, int code)
{
    struct named *named;

    pthread_mutex_lock(&names_lock);
    named = named_locked(name);
    named->fails_at = nth > 0 ? named->count + nth : 0;
    named->code = code;
    pthread_mutex_unlock(&names_lock);
}

/* ---- ranges ---- */

/* The first range that ends above the address. */
static uint32_t
place_locked(uintptr_t address)
{
    uint32_t low = 0, high = ranges_count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (ranges[middle].start + ranges[middle].bytes <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static int
insert_locked(const struct fake_range *range)
{
    uint32_t at = place_locked(range->start);

    if (at < ranges_count && ranges[at].start < range->start + range->bytes) {
        return FAKE_ALREADY_PINNED;
    }
    if (ranges_count == ranges_room) {
        uint32_t room = ranges_room * 2 + 64;
        struct fake_range *more = realloc(ranges, room * sizeof(*more));

        if (more == NULL) {
            return FAKE_NO_MEMORY;
        }
        ranges = more;
        ranges_room = room;
    }
    memmove(&ranges[at + 1], &ranges[at], (ranges_count - at) * sizeof(*ranges));
    ranges[at] = *range;
    ranges_count++;
    return FAKE_OK;
}

/* Takes the range that starts there out of the table. */
static bool
take_locked(const void *memory, enum fake_memory_kind kind, bool registered,
            struct fake_range *ret_range)
{
    uint32_t at = place_locked((uintptr_t)memory);

    if (at == ranges_count || ranges[at].start != (uintptr_t)memory || ranges[at].kind != kind ||
        ranges[at].registered != registered) {
        return false;
    }
    *ret_range = ranges[at];
    memmove(&ranges[at], &ranges[at + 1], (ranges_count - at - 1) * sizeof(*ranges));
    ranges_count--;
    return true;
}

bool
fake_range_of(const void *address, struct fake_range *ret_range)
{
    uint32_t at;
    bool found;

    pthread_mutex_lock(&ranges_lock);
    at = place_locked((uintptr_t)address);
    found = at < ranges_count && ranges[at].start <= (uintptr_t)address;
    if (found) {
        *ret_range = ranges[at];
    }
    pthread_mutex_unlock(&ranges_lock);
    return found;
}

static uint64_t
whole_pages(uint64_t bytes)
{
    return (bytes > 0 ? bytes + 4095 : 4096) / 4096 * 4096;
}

static int
map(struct fake_range *range, void **ret_memory)
{
    void *memory;
    int code;

    memory = mmap(NULL, range->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return FAKE_NO_MEMORY;
    }
    if (range->bytes <= FRESH_FILL_BYTES) {
        memset(memory, DCP_FAKE_POISON, range->bytes);
    }
    range->start = (uintptr_t)memory;
    pthread_mutex_lock(&ranges_lock);
    code = insert_locked(range);
    pthread_mutex_unlock(&ranges_lock);
    if (code != FAKE_OK) {
        (void)munmap(memory, range->bytes);
        return code;
    }
    *ret_memory = memory;
    return FAKE_OK;
}

int
fake_allocate(int device, uint64_t bytes, void **ret_memory)
{
    struct fake_range range = {
        .bytes = whole_pages(bytes), .kind = FAKE_MEMORY_DEVICE, .device = device};
    int code = FAKE_OK;

    pthread_mutex_lock(&ranges_lock);
    if ((largest_bytes > 0 && bytes > largest_bytes) ||
        range.bytes > fake_device_bytes() - used_bytes[device]) {
        code = FAKE_NO_MEMORY;
    } else {
        used_bytes[device] += range.bytes;
    }
    pthread_mutex_unlock(&ranges_lock);
    if (code == FAKE_OK) {
        code = map(&range, ret_memory);
    }
    return code;
}

int
fake_allocate_pinned(uint64_t bytes, void **ret_memory)
{
    struct fake_range range = {
        .bytes = whole_pages(bytes), .kind = FAKE_MEMORY_PINNED, .device = *fake_current_device()};

    return map(&range, ret_memory);
}

int
fake_free(void *memory, enum fake_memory_kind kind)
{
    if (memory == NULL) {
        return FAKE_OK;
    }
    fake_settle();
    return fake_forget(memory, kind);
}

int
fake_forget(void *memory, enum fake_memory_kind kind)
{
    struct fake_range range;
    bool found;

    pthread_mutex_lock(&ranges_lock);
    found = take_locked(memory, kind, false, &range);
    if (found && kind == FAKE_MEMORY_DEVICE) {
        used_bytes[range.device] -= range.bytes;
    }
    pthread_mutex_unlock(&ranges_lock);
    if (!found) {
        return FAKE_INVALID_VALUE;
    }
    (void)munmap(memory, range.bytes);
    return FAKE_OK;
}

int
fake_pin(void *memory, uint64_t bytes)
{
    struct fake_range range = {.start = (uintptr_t)memory,
                               .bytes = bytes,
                               .kind = FAKE_MEMORY_PINNED,
                               .device = *fake_current_device(),
                               .registered = true};
    int code;

    if (memory == NULL || bytes == 0) {
        return FAKE_INVALID_VALUE;
    }
    pthread_mutex_lock(&ranges_lock);
    code = insert_locked(&range);
    pthread_mutex_unlock(&ranges_lock);
    return code;
}

int
fake_unpin(void *memory)
{
    struct fake_range range;
    bool found;

    fake_settle();
    pthread_mutex_lock(&ranges_lock);
    found = take_locked(memory, FAKE_MEMORY_PINNED, true, &range);
    pthread_mutex_unlock(&ranges_lock);
    return found ? FAKE_OK : FAKE_NOT_PINNED;
}

uint64_t
fake_device_used_bytes(int device)
{
    return used_bytes[device];
}

void
dcp_fake_largest(uint64_t bytes)
{
    largest_bytes = bytes;
}

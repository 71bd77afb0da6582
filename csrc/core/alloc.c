/*
 * alloc.c: counted blocks, huge-page mappings and bump arenas.
 *
 * Every block carries its size in a 16-byte header in front of it, which keeps malloc's alignment
 * and lets one relaxed counter say how many bytes are alive.  Tests read that counter around every
 * case and switch on failures; both cost production one atomic add and one relaxed load.
 *
 * Mappings serve staging memory.  First touch decides their speed: 8-9 GB/s with MADV_HUGEPAGE
 * against 1.0-1.5 with 4 KiB pages, so blocks of 2 MiB and more start on a huge-page border.  They
 * are not inherited by fork (a child of a data loader would double the memory of a training job on
 * the first write) and not dumped.
 *
 * Threads: all functions are thread safe, but a bump arena belongs to one thread at a time.
 */
#include "dcp_alloc.h"

#include <errno.h>
#include <inttypes.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    HUGE_PAGE_BYTES = 2 << 20,
    /* Blocks from here on are advised to lie on huge pages: malloc maps them one by one. */
    HUGE_BLOCK_BYTES = 4 << 20,
    /* Bump blocks double from the first size to the last: small arenas stay small, large ones make
     * few allocations. */
    BUMP_FIRST_BYTES = 4 << 10,
    BUMP_LAST_BYTES = 1 << 20,
};

struct block_header {
    alignas(16) size_t size; /* bytes asked for, without this header */
};

struct dcp_bump_block {
    struct dcp_bump_block *next;
    size_t used; /* bytes of data[] */
    size_t cap;
    alignas(16) uint8_t data[];
};

static _Atomic uint64_t live_bytes;
/* The most that was alive since the last reset. */
static _Atomic uint64_t peak_bytes;
/* Allocations left before they fail, plus one; 0: never fail. */
static _Atomic uint64_t fail_countdown;

static bool
should_fail(void)
{
    uint64_t left = atomic_load_explicit(&fail_countdown, memory_order_relaxed);
    while (left > 1) {
        if (atomic_compare_exchange_weak_explicit(&fail_countdown, &left, left - 1,
                                                  memory_order_relaxed, memory_order_relaxed)) {
            return false;
        }
    }
    return left == 1;
}

static void
count_live(uint64_t delta)
{
    uint64_t live = atomic_fetch_add_explicit(&live_bytes, delta, memory_order_relaxed) + delta;
    uint64_t peak = atomic_load_explicit(&peak_bytes, memory_order_relaxed);
    while (live > peak &&
           !atomic_compare_exchange_weak_explicit(&peak_bytes, &peak, live, memory_order_relaxed,
                                                  memory_order_relaxed)) {
    }
}

/* The first touch of a large block costs as much as using it, on small pages.  Advice only. */
static void
advise_huge(void *block, size_t size)
{
    if (size < HUGE_BLOCK_BYTES) {
        return;
    }
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = dcp_align_up((uintptr_t)block, page);
    uintptr_t end = ((uintptr_t)block + size) & ~(page - 1);
    int sys_errno = errno;
    (void)madvise((void *)first, end - first, MADV_HUGEPAGE);
    errno = sys_errno;
}

static void *
adopt(struct block_header *header, size_t size)
{
    if (header == NULL) {
        return NULL;
    }
    header->size = size;
    count_live(size);
    advise_huge(header + 1, size);
    return header + 1;
}

static bool
total_bytes(size_t size, size_t *ret)
{
    return !__builtin_add_overflow(size, sizeof(struct block_header), ret);
}

void *
dcp_malloc(size_t size)
{
    size_t total;
    if (should_fail() || !total_bytes(size, &total)) {
        return NULL;
    }
    return adopt(malloc(total), size);
}

void *
dcp_calloc(size_t count, size_t size)
{
    size_t bytes, total;
    if (should_fail() || __builtin_mul_overflow(count, size, &bytes) ||
        !total_bytes(bytes, &total)) {
        return NULL;
    }
    return adopt(calloc(1, total), bytes);
}

void *
dcp_malloc_array(size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        return NULL;
    }
    return dcp_malloc(bytes);
}

void *
dcp_realloc(void *block, size_t size)
{
    if (block == NULL) {
        return dcp_malloc(size);
    }
    size_t total;
    if (should_fail() || !total_bytes(size, &total)) {
        return NULL;
    }
    struct block_header *old = (struct block_header *)block - 1;
    size_t old_size = old->size;
    struct block_header *header = realloc(old, total);
    if (header == NULL) {
        return NULL;
    }
    count_live(0 - (uint64_t)old_size);
    return adopt(header, size);
}

void
dcp_free(void *block)
{
    if (block == NULL) {
        return;
    }
    struct block_header *header = (struct block_header *)block - 1;
    count_live(0 - (uint64_t)header->size);
    free(header);
}

uint64_t
dcp_alloc_live_bytes(void)
{
    return atomic_load_explicit(&live_bytes, memory_order_relaxed);
}

uint64_t
dcp_alloc_peak_bytes(void)
{
    return atomic_load_explicit(&peak_bytes, memory_order_relaxed);
}

void
dcp_alloc_reset_peak(void)
{
    atomic_store_explicit(&peak_bytes, dcp_alloc_live_bytes(), memory_order_relaxed);
}

void
dcp_alloc_fail_after(uint64_t n)
{
    atomic_store_explicit(&fail_countdown, n, memory_order_relaxed);
}

bool
dcp_alloc_count(uint64_t bytes)
{
    if (should_fail()) {
        return false;
    }
    count_live(bytes);
    return true;
}

void
dcp_alloc_uncount(uint64_t bytes)
{
    count_live(0 - bytes);
}

/* ---- bump arena ---- */

static void *
bump_take(struct dcp_bump_block *block, size_t size, size_t align)
{
    uintptr_t base = (uintptr_t)block->data;
    size_t at = (size_t)(dcp_align_up(base + block->used, align) - base);
    if (at > block->cap || size > block->cap - at) {
        return NULL;
    }
    block->used = at + size;
    return block->data + at;
}

void *
dcp_bump_alloc(struct dcp_bump *bump, size_t size, size_t align)
{
    DCP_ASSERT(align != 0 && (align & (align - 1)) == 0 && align <= BUMP_FIRST_BYTES);
    struct dcp_bump_block *first = bump->first;
    if (first != NULL) {
        void *found = bump_take(first, size, align);
        if (found != NULL) {
            return found;
        }
    }
    size_t cap =
        first == NULL ? BUMP_FIRST_BYTES : (size_t)dcp_min_u64(first->cap * 2, BUMP_LAST_BYTES);
    /* A large request gets a block of its own behind the current one, whose rest stays in use. */
    bool alone = first != NULL && size > cap / 4;
    size_t need;
    if (__builtin_add_overflow(size, align, &need)) {
        return NULL;
    }
    if (alone || need > cap) {
        cap = need;
    }
    size_t total;
    if (__builtin_add_overflow(cap, sizeof(struct dcp_bump_block), &total)) {
        return NULL;
    }
    struct dcp_bump_block *block = dcp_malloc(total);
    if (block == NULL) {
        return NULL;
    }
    block->used = 0;
    block->cap = cap;
    if (alone) {
        block->next = first->next;
        first->next = block;
    } else {
        block->next = first;
        bump->first = block;
    }
    return bump_take(block, size, align);
}

void
dcp_bump_clean_up(struct dcp_bump *bump)
{
    if (bump == NULL) {
        return;
    }
    while (bump->first != NULL) {
        struct dcp_bump_block *next = bump->first->next;
        dcp_free(bump->first);
        bump->first = next;
    }
}

/* ---- huge pages ---- */

/* The length of the mapping for `size` bytes; 0 when it does not fit an address space. */
static size_t
mapping_bytes(size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (size > SIZE_MAX / 2) {
        return 0;
    }
    return (size_t)dcp_align_up(size == 0 ? 1 : size, page);
}

static int
map_failed(struct dcp_error *err, size_t size, int sys_errno)
{
    return dcp_error_set(err, DCP_E_NOMEM, sys_errno, NULL,
                         "mapping %zu bytes of staging memory failed; free memory, raise the "
                         "memory limit of the process, or save less at once",
                         size);
}

void *
dcp_map_huge(size_t size, struct dcp_error *err)
{
    size_t length = mapping_bytes(size);
    if (length == 0 || should_fail()) {
        (void)map_failed(err, size, ENOMEM);
        return NULL;
    }
    size_t slack = length >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 0;
    uint8_t *base =
        mmap(NULL, length + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        (void)map_failed(err, size, errno);
        return NULL;
    }
    uint8_t *block = base;
    if (slack != 0) {
        /* The kernel aligns mappings to 4 KiB only: reserve one huge page more, give back the
         * ends. */
        size_t head = (size_t)(dcp_align_up((uintptr_t)base, HUGE_PAGE_BYTES) - (uintptr_t)base);
        block = base + head;
        if ((head != 0 && munmap(base, head) != 0) ||
            (head != slack && munmap(block + length, slack - head) != 0)) {
            int sys_errno = errno;
            (void)munmap(base, length + slack);
            (void)map_failed(err, size, sys_errno);
            return NULL;
        }
    }
    /* Advice only: a kernel without huge pages or dump control still gives working memory. */
    (void)madvise(block, length, MADV_HUGEPAGE);
    (void)madvise(block, length, MADV_DONTDUMP);
    if (madvise(block, length, MADV_DONTFORK) != 0) {
        int sys_errno = errno;
        (void)munmap(block, length);
        (void)map_failed(err, size, sys_errno);
        return NULL;
    }
    count_live(length);
    return block;
}

void
dcp_unmap_huge(void *block, size_t size)
{
    if (block == NULL) {
        return;
    }
    size_t length = mapping_bytes(size);
    int rc = munmap(block, length);
    DCP_ASSERT(rc == 0);
    if (rc == 0) {
        count_live(0 - (uint64_t)length);
    }
}

void *
dcp_remap_huge(void *block, size_t old_size, size_t size, struct dcp_error *err)
{
    size_t old_length = mapping_bytes(old_size);
    size_t length = mapping_bytes(size);
    if (length == 0 || should_fail()) {
        (void)map_failed(err, size, ENOMEM);
        return NULL;
    }
    void *moved = mremap(block, old_length, length, MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) {
        (void)map_failed(err, size, errno);
        return NULL;
    }
    count_live((uint64_t)length - (uint64_t)old_length);
    return moved;
}

/*
 * test_alloc.c: memory is counted to the byte, fails on demand, and buffers and cursors keep their
 * promises at their edges; with error records, element types and hashes, which share this layer.
 */
#include <sys/wait.h>
#include <unistd.h>

#include "ctest.h"
#include "dcp_dtype.h"
#include "dcp_hash.h"

static void
every_block_is_counted_until_it_is_freed(void)
{
    uint64_t before = dcp_alloc_live_bytes();
    void *a = dcp_malloc(100), *b = dcp_calloc(7, 9), *empty = dcp_malloc(0);
    CHECK(a != NULL && b != NULL && empty != NULL);
    CHECK_EQ(dcp_alloc_live_bytes() - before, 163);
    for (int i = 0; i < 63; i++) {
        CHECK(((uint8_t *)b)[i] == 0);
    }
    memset(a, 1, 100);
    a = dcp_realloc(a, 1000);
    CHECK(((uint8_t *)a)[99] == 1);
    CHECK_EQ(dcp_alloc_live_bytes() - before, 1063);
    a = dcp_realloc(a, 10);
    CHECK_EQ(dcp_alloc_live_bytes() - before, 73);
    CHECK((uintptr_t)a % 16 == 0);
    dcp_free(a);
    dcp_free(b);
    dcp_free(empty);
    dcp_free(NULL);
    CHECK_EQ(dcp_alloc_live_bytes(), before);
}

static void
sizes_that_do_not_fit_fail_without_a_block(void)
{
    volatile size_t huge = SIZE_MAX;
    CHECK(dcp_malloc(huge) == NULL);
    CHECK(dcp_calloc(huge / 2, 3) == NULL);
    CHECK(dcp_malloc_array(huge / 2, 3) == NULL);
    void *block = dcp_malloc(8);
    CHECK(dcp_realloc(block, huge) == NULL);
    dcp_free(block);
    struct dcp_error err = {0};
    CHECK(dcp_map_huge(huge, &err) == NULL);
    CHECK_EQ(err.code, DCP_E_NOMEM);
}

static void
the_nth_allocation_fails_and_all_after_it(void)
{
    dcp_alloc_fail_after(3);
    void *a = dcp_malloc(1), *b = dcp_calloc(1, 1);
    CHECK(a != NULL && b != NULL);
    CHECK(dcp_malloc(1) == NULL);
    CHECK(dcp_realloc(a, 2) == NULL);
    struct dcp_error err = {0};
    CHECK(dcp_map_huge(4096, &err) == NULL);
    CHECK_EQ(err.code, DCP_E_NOMEM);
    dcp_alloc_fail_after(0);
    void *c = dcp_malloc(1);
    CHECK(c != NULL);
    dcp_free(a);
    dcp_free(b);
    dcp_free(c);
}

static void
mappings_are_counted_aligned_and_zero(void)
{
    static const size_t sizes[] = {0, 1, 4096, 4097, 2 << 20, (2 << 20) + 1, 9 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        struct dcp_error err = {0};
        uint64_t before = dcp_alloc_live_bytes();
        uint8_t *block = dcp_map_huge(sizes[i], &err);
        CHECK(block != NULL);
        CHECK(dcp_alloc_live_bytes() - before >= sizes[i]);
        CHECK((uintptr_t)block % (sizes[i] >= 2 << 20 ? 2 << 20 : 4096) == 0);
        for (size_t at = 0; at < sizes[i]; at += 1000) {
            CHECK(block[at] == 0);
            block[at] = 1;
        }
        if (sizes[i] > 0) {
            block[sizes[i] - 1] = 1;
        }
        dcp_unmap_huge(block, sizes[i]);
        CHECK_EQ(dcp_alloc_live_bytes(), before);
    }
    dcp_unmap_huge(NULL, 5);
}

static void
a_forked_child_does_not_inherit_a_mapping(void)
{
    struct dcp_error err = {0};
    uint8_t *block = dcp_map_huge(4096, &err);
    CHECK(block != NULL);
    block[0] = 1;
    pid_t child = fork();
    if (child == 0) {
        /* A pipe refuses bytes from an unmapped page with EFAULT. */
        int ends[2];
        _exit(pipe(ends) == 0 && write(ends[1], block, 1) < 0 ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    dcp_unmap_huge(block, 4096);
}

static void
bump_blocks_are_aligned_disjoint_and_stay(void)
{
    struct dcp_bump bump = {0};
    uint8_t *blocks[500];
    size_t sizes[500];
    for (int i = 0; i < 500; i++) {
        size_t align = (size_t)1 << (i % 8);
        sizes[i] = i % 97 == 0 ? 100000 : (size_t)(i * 7 % 300);
        blocks[i] = dcp_bump_alloc(&bump, sizes[i], align);
        CHECK(blocks[i] != NULL && (uintptr_t)blocks[i] % align == 0);
        memset(blocks[i], i & 0xff, sizes[i]);
    }
    for (int i = 0; i < 500; i++) {
        for (size_t k = 0; k < sizes[i]; k++) {
            if (blocks[i][k] != (i & 0xff)) {
                CHECK(!"a block was overwritten");
                break;
            }
        }
    }
    volatile size_t huge = SIZE_MAX;
    CHECK(dcp_bump_alloc(&bump, huge - 8, 8) == NULL);
    dcp_bump_clean_up(&bump);
    CHECK(bump.first == NULL);
    dcp_bump_clean_up(&bump);
    dcp_alloc_fail_after(1);
    CHECK(dcp_bump_alloc(&bump, 1, 1) == NULL);
    dcp_alloc_fail_after(0);
}

static void
what_a_buffer_wrote_a_cursor_reads(void)
{
    static const uint64_t numbers[] = {0, 1, 127, 128, 300, UINT32_MAX, INT64_MAX, UINT64_MAX};
    struct dcp_buf buf = {0};
    dcp_buf_put_u8(&buf, 0xfe);
    dcp_buf_put_u16(&buf, 0x1234);
    dcp_buf_put_u32(&buf, 0x89abcdef);
    dcp_buf_put_u64(&buf, 0x0123456789abcdefull);
    for (int i = 0; i < 8; i++) {
        dcp_buf_put_varint(&buf, numbers[i]);
    }
    dcp_buf_put(&buf, "end", 3);
    CHECK(buf.data[1] == 0x34 && buf.data[3] == 0xef);

    struct dcp_cursor c = {.data = buf.data, .len = buf.len};
    CHECK(dcp_cursor_u8(&c) == 0xfe);
    CHECK(dcp_cursor_u16(&c) == 0x1234);
    CHECK(dcp_cursor_u32(&c) == 0x89abcdef);
    CHECK(dcp_cursor_u64(&c) == 0x0123456789abcdefull);
    for (int i = 0; i < 8; i++) {
        CHECK(dcp_cursor_varint(&c) == numbers[i]);
    }
    CHECK(memcmp(dcp_cursor_bytes(&c, 3), "end", 3) == 0);
    CHECK(!c.failed && c.pos == c.len);
    CHECK(dcp_cursor_u8(&c) == 0 && c.failed);
    dcp_buf_clean_up(&buf);
    dcp_buf_clean_up(&buf);
}

static void
a_cursor_never_passes_its_end(void)
{
    uint8_t bytes[3] = {1, 2, 3};
    struct dcp_cursor c = {.data = bytes, .len = 3};
    CHECK(dcp_cursor_u32(&c) == 0 && c.failed);
    c.failed = false;
    CHECK(dcp_cursor_u8(&c) == 1);
    CHECK(dcp_cursor_bytes(&c, UINT64_MAX) == NULL && c.failed);
    CHECK(dcp_cursor_u8(&c) == 0);
    uint8_t endless[11];
    memset(endless, 0xff, sizeof endless);
    struct dcp_cursor v = {.data = endless, .len = sizeof endless};
    CHECK(dcp_cursor_varint(&v) == 0 && v.failed);
    uint8_t too_large[10] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02};
    v = (struct dcp_cursor){.data = too_large, .len = sizeof too_large};
    CHECK(dcp_cursor_varint(&v) == 0 && v.failed);
}

static void
a_failed_buffer_takes_nothing_and_says_so_once_asked(void)
{
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    CHECK_OK(dcp_buf_reserve(&buf, 10), &err);
    dcp_buf_put_u8(&buf, 1);
    dcp_alloc_fail_after(1);
    CHECK(dcp_buf_extend(&buf, 100000) == NULL);
    dcp_alloc_fail_after(0);
    dcp_buf_put_u8(&buf, 2);
    CHECK_EQ(buf.len, 1);
    CHECK_EQ(dcp_buf_check(&buf, &err), DCP_E_NOMEM);
    CHECK_EQ(err.code, DCP_E_NOMEM);
    dcp_buf_clear(&buf);
    dcp_buf_put_u8(&buf, 3);
    CHECK(buf.len == 1 && buf.data[0] == 3);
    CHECK_EQ(dcp_buf_check(&buf, &err), 0);
    dcp_buf_clean_up(&buf);
    CHECK(dcp_buf_extend(&buf, 0) != NULL);
    dcp_buf_clean_up(&buf);
}

static void
the_first_error_is_kept_and_a_long_path_keeps_its_end(void)
{
    char path[2000];
    memset(path, 'd', sizeof path);
    memcpy(path + sizeof path - 8, "/name.x", 8);
    struct dcp_error err;
    dcp_error_clear(&err);
    CHECK(err.code == 0 && err.rank == -1 && err.offset_bytes == UINT64_MAX);
    CHECK_EQ(dcp_error_set(&err, DCP_E_IO, 5, path, "n=%d", 42), DCP_E_IO);
    CHECK(strcmp(err.message, "n=42") == 0 && err.sys_errno == 5);
    CHECK_EQ(strlen(err.path), DCP_ERROR_PATH_BYTES - 1);
    CHECK(strcmp(err.path + DCP_ERROR_PATH_BYTES - 8, "/name.x") == 0);
    CHECK(memcmp(err.path, "...d", 4) == 0);
    CHECK_EQ(dcp_error_set(&err, DCP_E_NOMEM, 0, NULL, "second"), DCP_E_NOMEM);
    CHECK_EQ(err.code, DCP_E_IO);
    CHECK_EQ(dcp_error_set(NULL, DCP_E_NOMEM, 0, NULL, "nobody listens"), DCP_E_NOMEM);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_error_set(&err, DCP_E_IO, 0, "short", NULL), DCP_E_IO);
    CHECK(strcmp(err.path, "short") == 0);
    CHECK(strcmp(err.message, dcp_code_text(DCP_E_IO)) == 0);
    CHECK(strcmp(dcp_code_name(DCP_E_HOLE), "HOLE") == 0);
    CHECK(strcmp(dcp_code_name(-9999), "UNKNOWN") == 0);
    dcp_error_clear(NULL);
}

static void
every_dtype_is_found_by_its_own_name_only(void)
{
    for (int dtype = 1; dtype < DCP_DTYPE_COUNT; dtype++) {
        const char *name = dcp_dtype_name(dtype);
        CHECK(name != NULL && dcp_dtype_bytes(dtype) > 0 && dcp_dtype_storage(dtype) != NULL);
        CHECK_EQ(dcp_dtype_from_name(name, strlen(name)), dtype);
        CHECK(dcp_dtype_from_name(name, strlen(name) - 1) != dtype);
    }
    CHECK_EQ(dcp_dtype_from_name("float31", 7), DCP_DTYPE_NONE);
    CHECK_EQ(dcp_dtype_from_name("", 0), DCP_DTYPE_NONE);
    static const int outside[] = {-1, 0, DCP_DTYPE_COUNT, 255};
    for (int i = 0; i < 4; i++) {
        CHECK(dcp_dtype_name(outside[i]) == NULL && dcp_dtype_storage(outside[i]) == NULL);
        CHECK(dcp_dtype_bytes(outside[i]) == 0);
    }
}

/* Each input bit flips each output bit in half of the trials: 6 standard deviations of slack.
 * (Inputs of one byte are too few for 4000 independent trials.) */
static void
hashes_spread_every_bit(void)
{
    enum { TRIALS = 4000 };
    static const size_t lengths[] = {3, 4, 8, 15, 16, 17, 32, 33, 100};
    for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
        static int flips[3][64];
        memset(flips, 0, sizeof flips);
        uint64_t seed = 99 + l;
        for (int trial = 0; trial < TRIALS; trial++) {
            uint8_t data[100];
            for (size_t i = 0; i < lengths[l]; i++) {
                seed = seed * 6364136223846793005u + 1442695040888963407u;
                data[i] = (uint8_t)(seed >> 56);
            }
            uint64_t h = dcp_hash64(data, lengths[l], 0);
            struct dcp_hash128 w = dcp_hash128(data, lengths[l], 0);
            size_t bit = (size_t)(seed >> 20) % (lengths[l] * 8);
            data[bit / 8] ^= (uint8_t)(1 << bit % 8);
            uint64_t dh = h ^ dcp_hash64(data, lengths[l], 0);
            struct dcp_hash128 v = dcp_hash128(data, lengths[l], 0);
            for (int b = 0; b < 64; b++) {
                flips[0][b] += (int)(dh >> b & 1);
                flips[1][b] += (int)((w.lo ^ v.lo) >> b & 1);
                flips[2][b] += (int)((w.hi ^ v.hi) >> b & 1);
            }
        }
        for (int k = 0; k < 3 * 64; k++) {
            int n = flips[k / 64][k % 64];
            CHECK(n > TRIALS / 2 - 190 && n < TRIALS / 2 + 190);
        }
    }
}

static int
compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void
similar_names_never_collide(void)
{
    enum { NAMES = 200000 };
    uint64_t *hashes = dcp_malloc(NAMES * sizeof *hashes);
    for (int i = 0; i < NAMES; i++) {
        char name[64];
        int len = snprintf(name, sizeof name, "model.layers.%d.mlp.w%d.weight", i / 10, i % 10);
        hashes[i] = dcp_hash64(name, (size_t)len, 1);
    }
    qsort(hashes, NAMES, sizeof *hashes, compare_u64);
    for (int i = 1; i < NAMES; i++) {
        CHECK(hashes[i] != hashes[i - 1]);
    }
    dcp_free(hashes);
    uint8_t zeros[64] = {0};
    for (size_t a = 0; a < 64; a++) {
        for (size_t b = a + 1; b < 64; b++) {
            CHECK(dcp_hash64(zeros, a, 0) != dcp_hash64(zeros, b, 0));
        }
    }
    CHECK(dcp_hash64("x", 1, 1) != dcp_hash64("x", 1, 2));
    struct dcp_hash128 x = dcp_hash128("x", 1, 1), y = dcp_hash128("x", 1, 2);
    CHECK(x.lo != y.lo && x.hi != y.hi && x.lo != x.hi);
}

/* Stored fingerprints outlive a build: the function may not change unnoticed. */
static void
hashes_are_the_same_on_every_machine(void)
{
    CHECK(dcp_hash64("dcp_native", 10, 7) == 0x50bea58df9140772ull);
    struct dcp_hash128 h = dcp_hash128("the quick brown fox jumps over", 30, 0);
    CHECK(h.lo == 0x6384ad19cb88e05aull && h.hi == 0x5e1d3d0ae84db64aull);
}

static void
random_bytes_differ(void)
{
    uint8_t a[16] = {0}, b[16] = {0};
    CHECK_EQ(dcp_random_bytes(a, sizeof a), 0);
    CHECK_EQ(dcp_random_bytes(b, sizeof b), 0);
    CHECK(memcmp(a, b, sizeof a) != 0);
    CHECK_EQ(dcp_random_bytes(a, 0), 0);
}

CTEST_MAIN(RUN(every_block_is_counted_until_it_is_freed);
           RUN(sizes_that_do_not_fit_fail_without_a_block);
           RUN(the_nth_allocation_fails_and_all_after_it);
           RUN(mappings_are_counted_aligned_and_zero);
           RUN(a_forked_child_does_not_inherit_a_mapping);
           RUN(bump_blocks_are_aligned_disjoint_and_stay); RUN(what_a_buffer_wrote_a_cursor_reads);
           RUN(a_cursor_never_passes_its_end);
           RUN(a_failed_buffer_takes_nothing_and_says_so_once_asked);
           RUN(the_first_error_is_kept_and_a_long_path_keeps_its_end);
           RUN(every_dtype_is_found_by_its_own_name_only); RUN(hashes_spread_every_bit);
           RUN(similar_names_never_collide); RUN(hashes_are_the_same_on_every_machine);
           RUN(random_bytes_differ);)

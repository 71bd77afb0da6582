/*
 * test_box.c: strided copies against a naive element loop.
 */
#include "ctest.h"

#include "box.h"
#include "dcp_engine.h"

enum { MAX_NDIM = 6, MEMORY_BYTES = 1 << 20 };

static uint64_t state = 1;

static uint64_t
below(uint64_t n)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % n;
}

struct sample {
    uint32_t ndim, item_bytes;
    uint64_t sizes[MAX_NDIM];
    int64_t strides[MAX_NDIM];
    uint64_t image_bytes, origin; /* origin of element 0 in the memory */
};

/* Strides of a box whose dims lie in memory in a random order, some cut from larger ones. */
static void
sample_make(struct sample *s, uint64_t largest)
{
    static const uint32_t items[] = {1, 2, 4, 8, 16};
    s->ndim = (uint32_t)below(MAX_NDIM);
    s->item_bytes = items[below(5)];
    uint32_t order[MAX_NDIM];
    for (uint32_t d = 0; d < s->ndim; d++) {
        uint64_t top = s->ndim <= 2 ? largest : s->ndim <= 3 ? 20 : 6;
        s->sizes[d] = 1 + below(top);
        order[d] = d;
    }
    for (uint32_t d = s->ndim; d > 1; d--) {
        uint32_t other = (uint32_t)below(d), keep = order[d - 1];
        order[d - 1] = order[other];
        order[other] = keep;
    }
    int64_t stride = (int64_t)s->item_bytes * (below(4) == 0 ? 3 : 1);
    s->image_bytes = s->item_bytes;
    for (uint32_t i = 0; i < s->ndim; i++) {
        uint32_t d = order[i];
        s->strides[d] = stride;
        stride *= (int64_t)(s->sizes[d] + (below(3) == 0 ? below(3) : 0));
        s->image_bytes *= s->sizes[d];
    }
    s->origin = 0;
    for (uint32_t d = 0; d < s->ndim; d++) {
        if (below(8) == 0) { /* walks backwards */
            s->origin += (s->sizes[d] - 1) * (uint64_t)s->strides[d];
            s->strides[d] = -s->strides[d];
        }
    }
    CHECK(stride < MEMORY_BYTES);
}

static int64_t
naive_at(const struct sample *s, uint64_t element)
{
    int64_t at = (int64_t)s->origin;
    for (uint32_t d = s->ndim; d > 0; d--) {
        at += (int64_t)(element % s->sizes[d - 1]) * s->strides[d - 1];
        element /= s->sizes[d - 1];
    }
    return at;
}

static uint8_t *
noise(uint64_t bytes)
{
    uint8_t *memory = dcp_malloc(bytes);
    for (uint64_t i = 0; i < bytes; i++) {
        memory[i] = (uint8_t)below(256);
    }
    return memory;
}

static void
naive_gather(uint8_t *image, const uint8_t *memory, const struct sample *s)
{
    for (uint64_t e = 0; e < s->image_bytes / s->item_bytes; e++) {
        memcpy(image + e * s->item_bytes, memory + naive_at(s, e), s->item_bytes);
    }
}

static void
gather_and_scatter_equal_naive_copies_for_any_range(void)
{
    uint8_t *memory = noise(MEMORY_BYTES), *back = dcp_malloc(MEMORY_BYTES);
    uint8_t *image = dcp_malloc(MEMORY_BYTES), *got = dcp_malloc(MEMORY_BYTES);
    for (int round = 0; round < 3000; round++) {
        struct sample s;
        sample_make(&s, 90);
        naive_gather(image, memory, &s);
        uint64_t from = below(s.image_bytes + 1);
        uint64_t len = below(4) == 0 ? s.image_bytes - from : below(s.image_bytes - from + 1);
        memset(got, 0xAB, len + 1);
        dcp_box_gather(got, memory + s.origin, s.ndim, s.sizes, s.strides, s.item_bytes, from, len);
        CHECK(memcmp(got, image + from, len) == 0 && got[len] == 0xAB);
        memcpy(back, memory, MEMORY_BYTES);
        for (uint64_t i = 0; i < len; i++) {
            got[i] = (uint8_t)~got[i];
        }
        dcp_box_scatter(back + s.origin, got, s.ndim, s.sizes, s.strides, s.item_bytes, from, len);
        for (uint64_t i = 0; i < len; i++) {
            uint64_t e = (from + i) / s.item_bytes, skip = (from + i) % s.item_bytes;
            int64_t at = naive_at(&s, e) + (int64_t)skip;
            back[at] = (uint8_t)~back[at];
        }
        CHECK(memcmp(back, memory, MEMORY_BYTES) == 0);
    }
    dcp_free(memory);
    dcp_free(back);
    dcp_free(image);
    dcp_free(got);
}

static void
copy_between_any_strides_equals_naive_copy(void)
{
    uint8_t *src = noise(MEMORY_BYTES), *dst = noise(MEMORY_BYTES);
    uint8_t *want = dcp_malloc(MEMORY_BYTES);
    for (int round = 0; round < 1500; round++) {
        struct sample a, b;
        sample_make(&a, 120);
        do {
            sample_make(&b, 120);
        } while (b.ndim != a.ndim);
        for (uint32_t d = 0; d < a.ndim; d++) { /* the same box in both */
            uint64_t n = a.sizes[d] < b.sizes[d] ? a.sizes[d] : b.sizes[d];
            a.sizes[d] = b.sizes[d] = n;
        }
        b.item_bytes = a.item_bytes = a.item_bytes < b.item_bytes ? a.item_bytes : b.item_bytes;
        uint64_t elements = 1;
        for (uint32_t d = 0; d < a.ndim; d++) {
            elements *= a.sizes[d];
        }
        memcpy(want, dst, MEMORY_BYTES);
        for (uint64_t e = 0; e < elements; e++) {
            memcpy(want + naive_at(&b, e), src + naive_at(&a, e), a.item_bytes);
        }
        dcp_box_copy(dst + b.origin, b.strides, src + a.origin, a.strides, a.ndim, a.sizes,
                     a.item_bytes);
        CHECK(memcmp(want, dst, MEMORY_BYTES) == 0);
    }
    dcp_free(src);
    dcp_free(dst);
    dcp_free(want);
}

static void
an_element_of_any_size_is_copied(void)
{
    uint8_t *src = noise(4096), *dst = dcp_calloc(1, 4096);
    uint64_t lengths[] = {7, 5};
    int64_t src_strides[] = {12, 100}, dst_strides[] = {60, 12};
    dcp_box_copy(dst, dst_strides, src, src_strides, 2, lengths, 12);
    for (int i = 0; i < 7; i++) {
        for (int j = 0; j < 5; j++) {
            CHECK(memcmp(dst + i * 60 + j * 12, src + i * 12 + j * 100, 12) == 0);
        }
    }
    dcp_free(src);
    dcp_free(dst);
}

static void
expanded_sources_repeat_their_elements(void)
{
    uint16_t src[4] = {1, 2, 3, 4}, dst[12];
    uint64_t sizes[] = {3, 4};
    int64_t strides[] = {0, 2};
    dcp_box_gather((uint8_t *)dst, (uint8_t *)src, 2, sizes, strides, 2, 0, sizeof dst);
    for (int i = 0; i < 12; i++) {
        CHECK_EQ(dst[i], src[i % 4]);
    }
}

static void
row_major_is_recognised_whatever_dims_of_one_say(void)
{
    uint64_t sizes[] = {3, 1, 4};
    int64_t dense[] = {16, -5, 4}, transposed[] = {4, 4, 12};
    CHECK(dcp_box_is_row_major(3, sizes, 4, dense));
    CHECK(dcp_box_is_row_major(3, sizes, 4, NULL));
    CHECK(!dcp_box_is_row_major(3, sizes, 4, transposed));
    CHECK(dcp_box_is_row_major(0, NULL, 4, NULL));
}

CTEST_MAIN(RUN(gather_and_scatter_equal_naive_copies_for_any_range);
           RUN(copy_between_any_strides_equals_naive_copy);
           RUN(an_element_of_any_size_is_copied); RUN(expanded_sources_repeat_their_elements);
           RUN(row_major_is_recognised_whatever_dims_of_one_say);)

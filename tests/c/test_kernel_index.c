/*
 * test_kernel_index.c: the arithmetic of the kernels, run as every thread on the host, against the
 * core's own copies and checksums.
 */
#include "ctest.h"

#include "dcp_crc32.h"
#include "dcp_engine.h"
#include "kernel_jobs.h"
#include "kernels_host.h"

enum { MEMORY_BYTES = 1 << 20, ROUNDS = 1500 };

static uint64_t state = 1;

static uint64_t
below(uint64_t n)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % n;
}

static void
fill(uint8_t *memory, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        memory[i] = (uint8_t)below(256);
    }
}

struct sample {
    struct dcp_device_box box;
    uint64_t items; /* of the whole box */
    uint64_t place; /* of element 0 in the memory */
};

/* A box whose dims lie in memory in a random order, some cut from larger ones, some of one element,
 * now and then at an address that its items are not aligned to. */
static void
sample_make(struct sample *s, uint32_t item_bytes)
{
    uint32_t ndim = (uint32_t)below(DCP_DEVICE_DIMS + 1), order[DCP_DEVICE_DIMS];
    static const uint64_t largest[] = {1, 20000, 300, 40, 12, 6, 5, 4, 3};
    bool in_order = below(2) == 0;

    *s = (struct sample){.items = 1, .box = {.item_bytes = item_bytes, .ndim = ndim}};
    for (uint32_t d = 0; d < ndim; d++) {
        s->box.sizes[d] = 1 + below(largest[ndim]);
        if (below(2) == 0) {
            s->box.sizes[d] = (s->box.sizes[d] + 7) / 8 * 8 % (2 * largest[ndim]) + 1;
            s->box.sizes[d] -= s->box.sizes[d] > 1 ? 1 : 0;
        }
        order[d] = ndim - 1 - d;
        s->items *= s->box.sizes[d];
    }
    for (uint32_t d = ndim; d > 1 && !in_order; d--) {
        uint32_t other = (uint32_t)below(d), keep = order[d - 1];
        order[d - 1] = order[other];
        order[other] = keep;
    }
    int64_t stride = (int64_t)item_bytes * (below(5) == 0 ? 3 : 1);
    for (uint32_t i = 0; i < ndim; i++) {
        s->box.strides_bytes[order[i]] = stride;
        stride *= (int64_t)(s->box.sizes[order[i]] + (below(4) == 0 ? below(9) : 0));
    }
    s->place = below(4) == 0 ? below(40) : 16 * below(4);
    if (s->place + (uint64_t)stride > MEMORY_BYTES) {
        sample_make(s, item_bytes);
    }
}

/* Runs `name` over the box, cut into jobs; every job moves at least one item. */
static uint64_t
run_box(const char *name, const struct dcp_device_box *box)
{
    struct kernel_cut cut;
    struct dcp_kernel_job job;
    struct dcp_error err = {0};
    uint64_t moved = 0, jobs = 0;

    CHECK_OK(kernel_cut_begin(&cut, box, &err), &err);
    while (kernel_cut_next(&cut, &job)) {
        struct dcp_kernel_move move = {.jobs = (uint64_t)(uintptr_t)&job};
        void *params[] = {&move};
        CHECK(job.count > 0);
        CHECK(dcp_kernel_run_on_host(name, 1, DCP_KERNEL_MOVE_THREADS, params));
        moved += job.count * job.item_bytes;
        jobs++;
    }
    CHECK_EQ(moved, box->count * box->item_bytes);
    CHECK(jobs <= KERNEL_JOBS_OF_BOX + 2);
    return jobs;
}

static void
give_range(struct sample *s)
{
    s->box.first = below(2) == 0 ? 0 : below(s->items);
    s->box.count = below(2) == 0 ? s->items - s->box.first : below(s->items - s->box.first + 1);
}

static void
pack_gathers_what_the_core_gathers(void)
{
    static const uint32_t items[] = {1, 2, 4, 8, 16};
    uint8_t *memory = dcp_malloc(MEMORY_BYTES), *got = dcp_malloc(MEMORY_BYTES + 64);
    uint8_t *want = dcp_malloc(MEMORY_BYTES + 64);
    struct sample s;

    fill(memory, MEMORY_BYTES);
    for (int round = 0; round < ROUNDS; round++) {
        sample_make(&s, items[round % 5]);
        give_range(&s);
        uint64_t at = below(3) == 0 ? below(33) : 16;
        uint64_t bytes = s.box.count * s.box.item_bytes;
        memset(got, 0xAA, bytes + 64);
        memset(want, 0xAA, bytes + 64);
        s.box.strided = (uint64_t)(uintptr_t)(memory + s.place);
        s.box.packed = (uint64_t)(uintptr_t)(got + at);
        run_box(DCP_KERNEL_PACK, &s.box);
        dcp_box_gather(want + at, memory + s.place, s.box.ndim, s.box.sizes, s.box.strides_bytes,
                       s.box.item_bytes, s.box.first * s.box.item_bytes, bytes);
        CHECK(memcmp(got, want, bytes + 64) == 0);
    }
    dcp_free(memory);
    dcp_free(got);
    dcp_free(want);
}

static void
unpack_scatters_what_the_core_scatters_and_touches_nothing_else(void)
{
    static const uint32_t items[] = {1, 2, 4, 8, 16};
    uint8_t *packed = dcp_malloc(MEMORY_BYTES + 64);
    uint8_t *got = dcp_malloc(MEMORY_BYTES), *want = dcp_malloc(MEMORY_BYTES);
    struct sample s;

    fill(packed, MEMORY_BYTES + 64);
    fill(got, MEMORY_BYTES);
    memcpy(want, got, MEMORY_BYTES);
    for (int round = 0; round < ROUNDS / 3; round++) {
        sample_make(&s, items[round % 5]);
        give_range(&s);
        uint64_t at = below(3) == 0 ? below(33) : 16;
        s.box.strided = (uint64_t)(uintptr_t)(got + s.place);
        s.box.packed = (uint64_t)(uintptr_t)(packed + at);
        run_box(DCP_KERNEL_UNPACK, &s.box);
        dcp_box_scatter(want + s.place, packed + at, s.box.ndim, s.box.sizes, s.box.strides_bytes,
                        s.box.item_bytes, s.box.first * s.box.item_bytes,
                        s.box.count * s.box.item_bytes);
        CHECK(memcmp(got, want, MEMORY_BYTES) == 0);
    }
    dcp_free(packed);
    dcp_free(got);
    dcp_free(want);
}

static void
channels_last_is_gathered_in_the_order_of_its_dims(void)
{
    struct dcp_device_box box = {.item_bytes = 2, .ndim = 4, .sizes = {2, 3, 4, 5}, .count = 120};
    uint16_t memory[120], got[120];

    box.strides_bytes[0] = 3 * 4 * 5 * 2;
    box.strides_bytes[1] = 2;
    box.strides_bytes[2] = 5 * 3 * 2;
    box.strides_bytes[3] = 3 * 2;
    for (uint16_t i = 0; i < 120; i++) {
        memory[i] = i;
    }
    box.strided = (uint64_t)(uintptr_t)memory;
    box.packed = (uint64_t)(uintptr_t)got;
    run_box(DCP_KERNEL_PACK, &box);
    for (uint32_t n = 0, i = 0; n < 2; n++) {
        for (uint32_t c = 0; c < 3; c++) {
            for (uint32_t hw = 0; hw < 20; hw++, i++) {
                CHECK_EQ(got[i], (n * 20 + hw) * 3 + c);
            }
        }
    }
}

static struct dcp_kernel_job
middle_job(struct dcp_device_box box, uint64_t *ret_jobs)
{
    struct kernel_cut cut;
    struct dcp_kernel_job job, widest = {0};
    struct dcp_error err = {0};

    *ret_jobs = 0;
    CHECK_OK(kernel_cut_begin(&cut, &box, &err), &err);
    while (kernel_cut_next(&cut, &job)) {
        widest = job.count * job.item_bytes > widest.count * widest.item_bytes ? job : widest;
        (*ret_jobs)++;
    }
    return widest;
}

/* Nothing follows the addresses here. */
static void
aligned_rows_are_moved_16_bytes_at_a_time(void)
{
    uint64_t jobs;
    struct dcp_device_box dense = {.strided = 6, .packed = 4102, .count = 1001, .item_bytes = 2};
    dense.ndim = 1;
    dense.sizes[0] = 1001;
    dense.strides_bytes[0] = 2;
    CHECK_EQ(middle_job(dense, &jobs).access_bytes, 16);
    CHECK_EQ(jobs, 3);
    dense.packed = 4104;
    CHECK_EQ(middle_job(dense, &jobs).access_bytes, 2);
    dense.packed = 4105;
    CHECK_EQ(middle_job(dense, &jobs).access_bytes, 1);

    struct dcp_device_box rows = {.packed = 32, .count = 640, .item_bytes = 4, .ndim = 2};
    rows.sizes[0] = 20;
    rows.sizes[1] = 32;
    rows.strides_bytes[0] = 160;
    rows.strides_bytes[1] = 4;
    CHECK_EQ(middle_job(rows, &jobs).item_bytes, 16);
    rows.strides_bytes[0] = 168;
    CHECK_EQ(middle_job(rows, &jobs).item_bytes, 8);
    rows.sizes[1] = 31;
    rows.count = 620;
    CHECK_EQ(middle_job(rows, &jobs).item_bytes, 4);
}

static void
one_huge_box_is_cut_into_many_jobs_of_one_size(void)
{
    uint64_t jobs;
    struct dcp_device_box box = {.count = UINT64_C(1) << 36, .item_bytes = 2, .ndim = 1};
    box.sizes[0] = box.count;
    box.strides_bytes[0] = 2;
    struct dcp_kernel_job job = middle_job(box, &jobs);
    CHECK_EQ(jobs, KERNEL_JOBS_OF_BOX);
    CHECK_EQ(job.count * job.item_bytes, box.count * 2 / KERNEL_JOBS_OF_BOX);
}

static void
boxes_that_are_none_are_refused(void)
{
    struct kernel_cut cut;
    struct dcp_device_box box = {.count = 1, .item_bytes = 3};
    struct dcp_error err = {0};

    CHECK_EQ(kernel_cut_begin(&cut, &box, &err), DCP_E_INVALID);
    box.item_bytes = 4;
    box.count = 2;
    CHECK_EQ(kernel_cut_begin(&cut, &box, NULL), DCP_E_INVALID);
    box.ndim = 2;
    box.sizes[0] = box.sizes[1] = UINT64_C(1) << 33;
    CHECK_EQ(kernel_cut_begin(&cut, &box, NULL), DCP_E_INVALID);
    box.ndim = DCP_DEVICE_DIMS + 1;
    CHECK_EQ(kernel_cut_begin(&cut, &box, NULL), DCP_E_INVALID);
}

static void
check_crcs(const uint8_t *data, uint64_t bytes)
{
    enum { MOST_BLOCKS = 4 };
    uint32_t crcs[MOST_BLOCKS + 1] = {0};
    uint32_t blocks = (uint32_t)((bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES);
    struct dcp_kernel_checksum checksum = dcp_kernel_checksum_of((uint64_t)(uintptr_t)data, bytes);
    void *params[] = {&checksum};

    CHECK(blocks <= MOST_BLOCKS);
    checksum.crcs = (uint64_t)(uintptr_t)crcs;
    CHECK(dcp_kernel_run_on_host(DCP_KERNEL_CHECKSUM, blocks * DCP_KERNEL_CRC_SLICES,
                                 DCP_KERNEL_CHECKSUM_THREADS, params));
    for (uint32_t block = 0; block < blocks; block++) {
        uint64_t from = (uint64_t)block * DCP_BLOCK_BYTES;
        CHECK_EQ(crcs[block],
                 dcp_crc32(0, data + from, dcp_min_u64(DCP_BLOCK_BYTES, bytes - from)));
    }
    CHECK_EQ(crcs[blocks], 0);
}

static void
checksums_are_those_of_the_core(void)
{
    uint64_t cap = 3 * DCP_BLOCK_BYTES + 4096;
    uint8_t *data = dcp_malloc(cap);

    fill(data, cap);
    for (uint64_t bytes = 1; bytes < 70; bytes++) {
        check_crcs(data + bytes % 5, bytes);
    }
    for (int round = 0; round < 60; round++) {
        check_crcs(data + below(64), 1 + below(8192));
    }
    check_crcs(data, DCP_BLOCK_BYTES);
    check_crcs(data, DCP_BLOCK_BYTES - 1);
    check_crcs(data, DCP_KERNEL_CRC_SLICE_BYTES);
    check_crcs(data + 1, DCP_KERNEL_CRC_SLICE_BYTES + 1);
    check_crcs(data + 4, 3 * DCP_KERNEL_CRC_SLICE_BYTES - 8);
    check_crcs(data + 3, DCP_BLOCK_BYTES + 1);
    check_crcs(data + 8, 3 * DCP_BLOCK_BYTES + 777);
    memset(data, 0, cap);
    check_crcs(data, 2 * DCP_BLOCK_BYTES);
    dcp_free(data);
}

static void
only_our_kernels_have_a_stand_in(void)
{
    CHECK(!dcp_kernel_run_on_host("dcp_kernel_packs", 1, 1, NULL));
}

CTEST_MAIN(RUN(pack_gathers_what_the_core_gathers);
           RUN(unpack_scatters_what_the_core_scatters_and_touches_nothing_else);
           RUN(channels_last_is_gathered_in_the_order_of_its_dims);
           RUN(aligned_rows_are_moved_16_bytes_at_a_time);
           RUN(one_huge_box_is_cut_into_many_jobs_of_one_size);
           RUN(boxes_that_are_none_are_refused); RUN(checksums_are_those_of_the_core);
           RUN(only_our_kernels_have_a_stand_in);)

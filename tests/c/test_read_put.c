/*
 * test_read_put.c: what is read of a payload arrives where it belongs, element by element: in
 * memory of the saved dtype, in memory of another, and through pieces that are handed over.
 */
#include "box.h"
#include "ctest.h"
#include "dcp_convert.h"
#include "read_box.h"

enum { MOST_DIMS = 4, MEMORY_BYTES = 1 << 18 };

static uint64_t seed = 77;

static uint64_t
below(uint64_t n)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % n;
}

/* One tensor, one chunk of it, one target and their overlap. */
struct scene {
    struct dcp_metadata md;
    struct dcp_md_entry entry;
    struct dcp_md_chunk chunk;
    struct dcp_read_plan plan;
    struct dcp_target target;
    struct dcp_read_item item;
    uint64_t md_dims[2 * MOST_DIMS], plan_dims[5 * MOST_DIMS];
    int64_t target_strides[MOST_DIMS]; /* bytes, or elements when handed over */
    uint64_t order[MOST_DIMS];         /* of the target's dims in its memory */
    uint64_t chunk_elements, overlap_elements, pieces;
    uint8_t *payload, *memory, *want; /* owned */
    bool failed;
};

/* Where an element of the overlap lies: index `i` of its row-major image. */
static void
place(const struct scene *s, uint64_t i, uint64_t *ret_chunk, int64_t *ret_target)
{
    uint32_t ndim = s->entry.ndim;
    const uint64_t *sizes = s->md_dims + ndim, *in_chunk = s->plan_dims + 2 * ndim;
    const uint64_t *in_target = in_chunk + ndim, *lengths = in_target + ndim;
    bool alone = s->target.kind == DCP_TARGET_OVERLAPS;
    uint64_t index[MOST_DIMS], at = 0;
    int64_t to = 0;
    for (uint32_t d = ndim; d > 0; d--) {
        index[d - 1] = i % lengths[d - 1];
        i /= lengths[d - 1];
    }
    for (uint32_t d = 0; d < ndim; d++) {
        at = at * sizes[d] + in_chunk[d] + index[d];
        to += alone ? 0 : (int64_t)(in_target[d] + index[d]) * s->target_strides[d];
    }
    for (uint32_t d = 0; alone && d < ndim; d++) {
        to = to * (int64_t)lengths[d] + (int64_t)index[d];
    }
    *ret_chunk = at;
    *ret_target = to;
}

static void
on_piece(void *ctx, const struct dcp_piece *piece)
{
    struct scene *s = ctx;
    uint32_t bytes = dcp_dtype_bytes(s->entry.dtype);
    uint64_t count = 1;
    CHECK(piece->item == &s->item);
    for (uint32_t d = 0; d < piece->ndim; d++) {
        count *= piece->lengths[d];
    }
    CHECK_EQ(count, piece->count);
    CHECK(count * bytes <= DCP_PIECE_BYTES);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t rest = i;
        int64_t from = 0, to = piece->at;
        for (uint32_t d = piece->ndim; d > 0; d--) {
            int64_t index = (int64_t)(rest % piece->lengths[d - 1]);
            rest /= piece->lengths[d - 1];
            from += index * piece->bytes_strides[d - 1];
            to += index * piece->strides[d - 1];
        }
        uint8_t *at = s->memory + to * bytes;
        s->failed = s->failed || at < s->memory || at + bytes > s->memory + MEMORY_BYTES;
        if (!s->failed) {
            memcpy(at, piece->bytes + from, bytes);
        }
    }
    s->pieces++;
}

static void
scene_dims(struct scene *s, uint64_t largest)
{
    uint32_t ndim = (uint32_t)below(MOST_DIMS + 1);
    uint64_t *sizes = s->md_dims + ndim, *box = s->plan_dims + ndim,
             *item = s->plan_dims + 2 * ndim;
    s->entry.ndim = (uint8_t)ndim;
    s->chunk_elements = s->overlap_elements = 1;
    for (uint32_t d = 0; d < ndim; d++) {
        sizes[d] = 1 + below(ndim <= 2 ? largest : 9);
        item[d] = below(3) == 0 ? below(sizes[d]) : 0;
        item[2 * ndim + d] = below(2) == 0 ? 1 + below(sizes[d] - item[d]) : sizes[d] - item[d];
        item[ndim + d] = below(3);
        box[d] = item[ndim + d] + item[2 * ndim + d] + below(2);
        s->chunk_elements *= sizes[d];
        s->overlap_elements *= item[2 * ndim + d];
        s->order[d] = d;
    }
}

static void
scene_make(struct scene *s, uint64_t largest)
{
    static const uint8_t saved[] = {DCP_DTYPE_FLOAT32, DCP_DTYPE_BFLOAT16, DCP_DTYPE_INT64,
                                    DCP_DTYPE_UINT8};
    static const uint8_t made[] = {DCP_DTYPE_FLOAT64, DCP_DTYPE_FLOAT16, DCP_DTYPE_INT8,
                                   DCP_DTYPE_FLOAT32};
    memset(s, 0, sizeof *s);
    scene_dims(s, largest);
    uint32_t ndim = s->entry.ndim;
    s->entry.dtype = saved[below(4)];
    s->target.kind = (uint8_t)below(3);
    if (s->target.kind == DCP_TARGET_MEMORY && below(3) > 0) {
        uint8_t dtype = made[below(4)];
        s->target.dtype = dtype == s->entry.dtype ? 0 : dtype;
    }
    uint32_t target_bytes =
        dcp_dtype_bytes(s->target.dtype != 0 ? s->target.dtype : s->entry.dtype);
    int64_t stride = s->target.kind == DCP_TARGET_MEMORY ? (int64_t)target_bytes : 1;
    bool strided = below(2) == 0;
    for (uint32_t d = ndim; strided && d > 1; d--) {
        uint64_t other = below(d), keep = s->order[d - 1];
        s->order[d - 1] = s->order[other];
        s->order[other] = keep;
    }
    for (uint32_t i = ndim; i > 0; i--) {
        uint64_t d = s->order[i - 1];
        s->target_strides[d] = stride;
        stride *= (int64_t)(s->plan_dims[ndim + d] + (strided ? below(2) : 0));
    }
    CHECK(stride * (s->target.kind == DCP_TARGET_MEMORY ? 1 : (int64_t)target_bytes) <=
          MEMORY_BYTES);
    s->payload = dcp_malloc(MEMORY_BYTES);
    s->memory = dcp_calloc(1, MEMORY_BYTES);
    s->want = dcp_calloc(1, MEMORY_BYTES);
    for (uint64_t i = 0; i < MEMORY_BYTES; i++) {
        s->payload[i] = (uint8_t)below(256);
    }
    s->target.strides_bytes = strided ? s->target_strides : NULL;
    s->target.data = s->target.kind == DCP_TARGET_MEMORY ? s->memory : NULL;
    s->item.dims = 2 * ndim;
    s->md = (struct dcp_metadata){.entries = &s->entry,
                                  .entries_count = 1,
                                  .chunks = &s->chunk,
                                  .chunks_count = 1,
                                  .dims = s->md_dims,
                                  .strings = "t"};
    s->plan = (struct dcp_read_plan){.md = &s->md,
                                     .targets = &s->target,
                                     .items = &s->item,
                                     .dims = s->plan_dims,
                                     .on_piece = on_piece,
                                     .on_piece_ctx = s};
}

/* What the target must hold when element `i` of the overlap is `bytes`. */
static void
expect(struct scene *s, uint64_t i, const uint8_t *bytes)
{
    uint64_t from;
    int64_t to;
    uint32_t item = dcp_dtype_bytes(s->entry.dtype);
    place(s, i, &from, &to);
    to *= s->target.kind == DCP_TARGET_MEMORY ? 1 : (int64_t)item;
    if (s->target.dtype != 0) {
        dcp_convert(s->want + to, s->target.dtype, bytes, s->entry.dtype, 1);
    } else {
        memcpy(s->want + to, bytes, item);
    }
}

static void
scene_clean_up(struct scene *s)
{
    CHECK(!s->failed);
    CHECK(memcmp(s->memory, s->want, MEMORY_BYTES) == 0);
    dcp_free(s->payload);
    dcp_free(s->memory);
    dcp_free(s->want);
}

static void
ranges_in_any_order_fill_every_kind_of_target(void)
{
    for (int round = 0; round < 3000; round++) {
        struct scene s;
        struct dcp_read_box box;
        struct dcp_error err = {0};
        scene_make(&s, 60);
        uint32_t item = dcp_dtype_bytes(s.entry.dtype);
        for (uint64_t i = 0; i < s.overlap_elements; i++) {
            uint64_t from;
            int64_t to;
            place(&s, i, &from, &to);
            expect(&s, i, s.payload + from * item);
        }
        CHECK_OK(dcp_read_box_init(&box, &s.plan, &s.item, below(3) * 64, &err), &err);
        CHECK_EQ(box.wanted_bytes, s.overlap_elements * item);
        uint64_t cuts[5] = {0, 0, 0, 0, box.payload_bytes};
        for (int c = 1; c < 4; c++) {
            cuts[c] = below(s.chunk_elements + 1) * item;
            for (int k = c; k > 1 && cuts[k] < cuts[k - 1]; k--) {
                uint64_t keep = cuts[k];
                cuts[k] = cuts[k - 1];
                cuts[k - 1] = keep;
            }
        }
        /* At an odd address: stock torch's records lie anywhere. */
        uint8_t *read = dcp_malloc(box.payload_bytes + 1);
        for (int c = 4; c > 0; c--) {
            memcpy(read + 1, s.payload + cuts[c - 1], cuts[c] - cuts[c - 1]);
            dcp_read_box_put(&box, read + 1, cuts[c - 1], cuts[c]);
            memset(read, 0xEE, box.payload_bytes + 1);
        }
        dcp_free(read);
        CHECK_EQ(s.pieces > 0, s.target.kind != DCP_TARGET_MEMORY);
        scene_clean_up(&s);
    }
}

static void
strided_records_fill_every_kind_of_target(void)
{
    for (int round = 0; round < 1000; round++) {
        struct scene s;
        scene_make(&s, 40);
        uint32_t ndim = s.entry.ndim, item = dcp_dtype_bytes(s.entry.dtype);
        struct dcp_record_view view = {.dtype = s.entry.dtype, .ndim = (uint8_t)ndim};
        const uint64_t *dims = s.plan_dims + s.item.dims;
        int64_t stride = 1 + (int64_t)below(3);
        view.storage_offset = below(5);
        for (uint32_t d = 0; d < ndim; d++) { /* the first dim is the fastest; some stand still */
            view.sizes[d] = s.md_dims[ndim + d];
            view.strides[d] = below(5) == 0 ? 0 : stride;
            stride *= (int64_t)view.sizes[d];
        }
        if ((view.storage_offset + (uint64_t)stride) * item > MEMORY_BYTES) {
            s.overlap_elements = 0;
        }
        for (uint64_t i = 0; i < s.overlap_elements; i++) {
            uint64_t rest = i, at = view.storage_offset;
            for (uint32_t d = ndim; d > 0; d--) {
                uint64_t length = dims[2 * ndim + d - 1];
                at += (dims[d - 1] + rest % length) * (uint64_t)view.strides[d - 1];
                rest /= length;
            }
            expect(&s, i, s.payload + at * item);
        }
        if (s.overlap_elements > 0) {
            dcp_read_put_strided(&s.plan, &s.item, &view, s.payload);
        }
        scene_clean_up(&s);
    }
}

/* One range of many MiB, as a record that is read whole gives it. */
static void
pieces_are_few_and_never_larger_than_the_limit(void)
{
    uint64_t widths[3] = {1000, 300000, 1}; /* rows of 4 KB, of 1.2 MB, one column */
    for (int c = 0; c < 3; c++) {
        struct scene s;
        struct dcp_read_box box;
        struct dcp_error err = {0};
        do {
            scene_make(&s, 8);
            if (s.target.kind == DCP_TARGET_MEMORY || s.entry.ndim != 2) {
                dcp_free(s.payload);
                dcp_free(s.memory);
                dcp_free(s.want);
                s.payload = NULL;
            }
        } while (s.payload == NULL);
        uint64_t rows = (8u << 20) / 4 / widths[c];
        uint64_t numbers[14] = {0, 0, rows, widths[c], 0, 0, 0, 0, rows, widths[c]};
        s.entry.dtype = DCP_DTYPE_FLOAT32;
        s.target.strides_bytes = NULL;
        memcpy(s.md_dims, numbers, 4 * sizeof numbers[0]);
        memcpy(s.plan_dims, numbers, 4 * sizeof numbers[0]);
        memcpy(s.plan_dims + 4, numbers + 4, 6 * sizeof numbers[0]);
        dcp_free(s.payload);
        dcp_free(s.memory);
        s.payload = dcp_calloc(1, 8u << 20);
        s.memory = dcp_calloc(1, MEMORY_BYTES);
        s.failed = true; /* the memory is too small: only shapes are looked at */
        CHECK_OK(dcp_read_box_init(&box, &s.plan, &s.item, 0, &err), &err);
        dcp_read_box_put(&box, s.payload, 0, box.payload_bytes);
        CHECK(s.pieces >= box.payload_bytes / DCP_PIECE_BYTES && s.pieces <= 16);
        s.failed = false;
        scene_clean_up(&s);
    }
}

CTEST_MAIN(RUN(ranges_in_any_order_fill_every_kind_of_target);
           RUN(strided_records_fill_every_kind_of_target);
           RUN(pieces_are_few_and_never_larger_than_the_limit);)

/*
 * test_pickle_tensor.c: data.pkl of one tensor: ours and torch's are read, what does not fit its
 * storage or is no plain tensor is refused, damage is survived.
 */
#include "ctest.h"

#include "dcp_dtype.h"
#include "dcp_metadata.h"
#include "plan_maker.h"

static struct dcp_error err;
static struct dcp_buf p;

static int
read_copy(const uint8_t *data, size_t len, struct dcp_tensor_pickle *ret)
{
    uint8_t *copy = malloc(len == 0 ? 1 : len);
    memcpy(copy, data, len);
    dcp_error_clear(&err);
    int rc = dcp_pickle_read_tensor(copy, len, ret, &err);
    free(copy);
    CHECK_EQ(rc, err.code);
    CHECK(rc == 0 || err.message[0] != 0);
    return rc;
}

static void
op(const char *bytes)
{
    dcp_buf_put(&p, bytes, strlen(bytes));
}

static void
byte(uint8_t v)
{
    dcp_buf_put_u8(&p, v);
}

static void
text(const char *t)
{
    op("X");
    dcp_buf_put_u32(&p, (uint32_t)strlen(t));
    op(t);
}

/* PROTO, the function, and its storage. */
static void
begin(const char *function, const char *storage, const char *key, uint8_t count)
{
    dcp_buf_clear(&p);
    op("\x80\x02" "ctorch._utils\n");
    op(function);
    op("\n((");
    text("storage");
    op("c");
    op(storage);
    op("\n");
    text(key);
    text("cuda:7");
    op("K");
    byte(count);
    op("tQ");
}

static void
number(uint8_t n)
{
    op("K");
    byte(n);
}

/* Offset, sizes, strides, requires_grad and no hooks. */
static void
shape(uint8_t offset, uint8_t rows, uint8_t columns, uint8_t row_stride, uint8_t column_stride)
{
    number(offset);
    number(rows);
    number(columns);
    op("\x86");
    number(row_stride);
    number(column_stride);
    op("\x86\x89" "ccollections\nOrderedDict\n)R");
}

static void
case_what_we_write_is_read(void)
{
    struct maker_rng rng = {1};
    for (int dtype = 1; dtype < DCP_DTYPE_COUNT; dtype++) {
        if (dtype >= DCP_DTYPE_QINT8) {
            continue; /* quantised tensors have records of torch's own */
        }
        for (uint32_t ndim = 0; ndim <= 6; ndim++) {
            uint64_t sizes[6];
            uint64_t volume = 1;
            for (uint32_t i = 0; i < ndim; i++) {
                sizes[i] = maker_below(&rng, i == 1 ? 3000000 : 5);
                volume *= sizes[i];
            }
            dcp_buf_clear(&p);
            dcp_pickle_put_tensor(&p, dtype, ndim, sizes);
            struct dcp_tensor_pickle t;
            CHECK_EQ(read_copy(p.data, p.len, &t), 0);
            CHECK_EQ(t.dtype, dtype);
            CHECK_EQ(t.ndim, ndim);
            CHECK(memcmp(t.sizes, sizes, ndim * sizeof *sizes) == 0);
            CHECK_EQ(t.storage_offset, 0);
            CHECK_EQ(t.storage_bytes, volume * dcp_dtype_bytes(dtype));
            CHECK(t.storage_key_len == 1 && strcmp(t.storage_key, "0") == 0);
            uint64_t stride = 1;
            for (uint32_t i = ndim; volume != 0 && i > 0; i--) {
                CHECK_EQ(t.strides[i - 1], stride);
                stride *= sizes[i - 1];
            }
        }
    }
    dcp_buf_clean_up(&p);
}

static void
case_strides_offsets_and_parameters_are_read(void)
{
    struct dcp_tensor_pickle t;
    begin("_rebuild_tensor_v2", "torch\nHalfStorage", "123", 30);
    shape(5, 3, 4, 1, 6);
    op("tR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), 0);
    CHECK_EQ(t.dtype, DCP_DTYPE_FLOAT16);
    CHECK_EQ(t.storage_offset, 5);
    CHECK_EQ(t.strides[0], 1);
    CHECK_EQ(t.strides[1], 6);
    CHECK_EQ(t.storage_bytes, 60);
    CHECK(strcmp(t.storage_key, "123") == 0);

    begin("_rebuild_tensor_v3", "torch.storage\nUntypedStorage", "0", 24);
    shape(0, 3, 4, 4, 1);
    op("ctorch\nuint16\ntR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), 0);
    CHECK_EQ(t.dtype, DCP_DTYPE_UINT16);
    CHECK_EQ(t.storage_bytes, 24);

    struct dcp_buf inner = {0};
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 12);
    shape(0, 3, 4, 4, 1);
    dcp_buf_put(&inner, p.data + 2, p.len - 2);
    dcp_buf_clear(&p);
    op("\x80\x02" "ctorch._utils\n_rebuild_parameter\n(");
    dcp_buf_put(&p, inner.data, inner.len);
    op("tR\x88" "ccollections\nOrderedDict\n)RtR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), 0);
    CHECK_EQ(t.dtype, DCP_DTYPE_FLOAT32);
    CHECK_EQ(t.sizes[1], 4);
    dcp_buf_clean_up(&inner);
    dcp_buf_clean_up(&p);
}

static void
case_a_tensor_lies_inside_its_storage(void)
{
    struct dcp_tensor_pickle t;
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 12);
    shape(0, 3, 4, 4, 1);
    op("tR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), 0);
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 11);
    shape(0, 3, 4, 4, 1);
    op("tR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_CORRUPT);
    CHECK(strstr(err.message, "beyond its storage") != NULL);
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 12);
    shape(1, 3, 4, 4, 1);
    op("tR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_CORRUPT);
    begin("_rebuild_tensor_v3", "torch.storage\nUntypedStorage", "0", 23);
    shape(0, 3, 4, 4, 1);
    op("ctorch\nuint16\ntR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_CORRUPT);
    /* An empty one needs none. */
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 0);
    shape(200, 3, 0, 4, 1);
    op("tR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), 0);
    /* Sums and products that wrap around. */
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 12);
    op("K");
    byte(1);
    op("\x8A\x07\xFF\xFF\xFF\xFF\xFF\xFF\x0F\x8A\x07\xFF\xFF\xFF\xFF\xFF\xFF\x0F\x86"
       "\x8A\x07\xFF\xFF\xFF\xFF\xFF\xFF\x0F\x8A\x07\xFF\xFF\xFF\xFF\xFF\xFF\x0F\x86\x89NtR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_CORRUPT);
    dcp_buf_clean_up(&p);
}

static void
case_what_is_no_plain_tensor_is_left_to_torch(void)
{
    struct dcp_tensor_pickle t;
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 12);
    shape(0, 3, 4, 4, 1);
    op("}");
    text("conj");
    op("\x88stR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_UNSUPPORTED);
    CHECK(strstr(err.message, "conj") != NULL);
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 12);
    shape(0, 3, 4, 4, 1);
    op("tR\x85.");
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_UNSUPPORTED);
    begin("_rebuild_qtensor", "torch\nQInt8Storage", "0", 12);
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_UNSUPPORTED);
    CHECK(strstr(err.message, "_rebuild_qtensor") != NULL);
    begin("_rebuild_tensor_v2", "os\nsystem", "0", 12);
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_UNSUPPORTED);
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "a key of more than thirty-one bytes", 12);
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_UNSUPPORTED);
    /* Two storages, of which the machine must not take the second for the first. */
    begin("_rebuild_tensor_v2", "torch\nFloatStorage", "0", 12);
    op("0(");
    text("storage");
    op("ctorch\nFloatStorage\n");
    text("1");
    text("cpu");
    op("K\xFFtQ");
    shape(0, 3, 4, 4, 1);
    op("tR.");
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_UNSUPPORTED);
    CHECK(strstr(err.message, "second storage") != NULL);
    dcp_buf_clear(&p);
    op("\x80\x02K\x07.");
    CHECK_EQ(read_copy(p.data, p.len, &t), DCP_E_UNSUPPORTED);
    dcp_buf_clean_up(&p);
}

static void
case_truncations_and_flipped_bits_are_survived(void)
{
    struct dcp_buf good = {0};
    uint64_t sizes[2] = {300, 70000};
    struct dcp_tensor_pickle t;
    for (int dtype = 1; dtype < DCP_DTYPE_QINT8; dtype += 6) {
        dcp_buf_clear(&good);
        dcp_pickle_put_tensor(&good, dtype, 2, sizes);
        for (size_t len = 0; len < good.len; len++) {
            CHECK_EQ(read_copy(good.data, len, &t), DCP_E_CORRUPT);
        }
        for (size_t bit = 0; bit < 8 * good.len; bit++) {
            good.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            int rc = read_copy(good.data, good.len, &t);
            CHECK(rc == 0 || rc == DCP_E_CORRUPT || rc == DCP_E_UNSUPPORTED);
            good.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        }
    }
    dcp_buf_clean_up(&good);
}

static void
case_reading_one_allocates_nothing(void)
{
    uint64_t sizes[3] = {300, 2, 70000};
    struct dcp_tensor_pickle t;
    dcp_pickle_put_tensor(&p, DCP_DTYPE_FLOAT32, 3, sizes);
    dcp_error_clear(&err);
    dcp_alloc_fail_after(1);
    CHECK_EQ(dcp_pickle_read_tensor(p.data, p.len, &t, &err), 0);
    dcp_alloc_fail_after(0);
    dcp_buf_clean_up(&p);
}

CTEST_MAIN(RUN(case_what_we_write_is_read); RUN(case_strides_offsets_and_parameters_are_read);
           RUN(case_a_tensor_lies_inside_its_storage);
           RUN(case_what_is_no_plain_tensor_is_left_to_torch);
           RUN(case_truncations_and_flipped_bits_are_survived);
           RUN(case_reading_one_allocates_nothing);)

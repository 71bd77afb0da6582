/*
 * pickle_put.c: data.pkl of a contiguous tensor, as torch.save pickles it (protocol 2), without
 * memo entries.
 *
 * Everything but the numbers is fixed per element type, so a pickle is one copied prefix, the
 * numbers, one copied suffix; its length has a closed form, which lets a layout place records
 * before any of them exists.  Types with a typed storage go through _rebuild_tensor_v2 and count
 * elements, the others through _rebuild_tensor_v3 with an untyped storage and count bytes.
 *
 * Threads: no state.
 */
#include "pickle_put.h"

#include "dcp_dtype.h"
#include "dcp_limits.h"
#include "dcp_metadata.h"
#include "le_bytes.h"
#include "pickle_op.h"

/* PROTO 2, GLOBAL rebuild function, MARK (its arguments), MARK (the persistent id: storage) */
#define OPEN(rebuild)                                                                              \
    "\x80\x02"                                                                                     \
    "ctorch._utils\n" rebuild "\n((X\7\0\0\0"                                                      \
    "storage"
/* storage class, key "0", location "cpu" */
#define STORAGE(global)                                                                            \
    "c" global "\nX\1\0\0\0"                                                                       \
    "0X\3\0\0\0"                                                                                   \
    "cpu"
#define PREFIX_V2(storage) OPEN("_rebuild_tensor_v2") STORAGE("torch\n" storage)
#define PREFIX_V3 OPEN("_rebuild_tensor_v3") STORAGE("torch.storage\nUntypedStorage")
/* NEWFALSE (requires_grad), OrderedDict() (backward hooks), [dtype], TUPLE, REDUCE, STOP */
#define HOOKS                                                                                      \
    "\x89"                                                                                         \
    "ccollections\nOrderedDict\n)R"
#define SUFFIX_V2 HOOKS "tR."
#define SUFFIX_V3(text) HOOKS "ctorch\n" text "\ntR."

#define IS_V3(storage) (sizeof(storage) == 1)

struct pickle_template {
    const char *prefix, *suffix;
    uint8_t prefix_len, suffix_len;
    uint8_t count_unit; /* what numel counts: 1 element, or bytes per element */
};

static const struct pickle_template templates[DCP_DTYPE_COUNT] = {
#define X(name, value, text, bytes, storage)                                                       \
    [value] = {                                                                                    \
        IS_V3(storage) ? PREFIX_V3 : PREFIX_V2(storage),                                           \
        IS_V3(storage) ? SUFFIX_V3(text) : SUFFIX_V2,                                              \
        IS_V3(storage) ? sizeof(PREFIX_V3) - 1 : sizeof(PREFIX_V2(storage)) - 1,                   \
        IS_V3(storage) ? sizeof(SUFFIX_V3(text)) - 1 : sizeof(SUFFIX_V2) - 1,                      \
        IS_V3(storage) ? bytes : 1,                                                                \
    },
    DCP_DTYPES(X)
#undef X
};

/* Bytes of a LONG1 body: two's complement, so the top bit stays free. */
static inline unsigned
long_body_bytes(uint64_t v)
{
    unsigned bits = 64 - (unsigned)__builtin_clzll(v);
    return bits / 8 + 1;
}

static inline uint64_t
int_bytes(uint64_t v)
{
    if (v <= UINT16_MAX) {
        return v <= UINT8_MAX ? 2 : 3;
    }
    return v <= INT32_MAX ? 5 : 2 + long_body_bytes(v);
}

static inline uint8_t *
put_int(uint8_t *at, uint64_t v)
{
    if (v <= UINT8_MAX) {
        return le_put8(le_put8(at, DCP_OP_BININT1), (uint8_t)v);
    }
    if (v <= UINT16_MAX) {
        return le_put16(le_put8(at, DCP_OP_BININT2), (uint16_t)v);
    }
    if (v <= INT32_MAX) {
        return le_put32(le_put8(at, DCP_OP_BININT), (uint32_t)v);
    }
    unsigned n = long_body_bytes(v);
    at = le_put8(le_put8(at, DCP_OP_LONG1), (uint8_t)n);
    for (unsigned i = 0; i < n; i++) {
        at = le_put8(at, (uint8_t)(i < 8 ? v >> (8 * i) : 0));
    }
    return at;
}

static inline uint64_t
tuple_frame_bytes(uint32_t ndim)
{
    return ndim <= 3 ? 1 : 2;
}

static uint8_t *
put_tuple(uint8_t *at, uint32_t n, const uint64_t *values)
{
    if (n == 0) {
        return le_put8(at, DCP_OP_EMPTY_TUPLE);
    }
    if (n > 3) {
        at = le_put8(at, DCP_OP_MARK);
    }
    for (uint32_t i = 0; i < n; i++) {
        at = put_int(at, values[i]);
    }
    return le_put8(at, n > 3 ? DCP_OP_TUPLE : (uint8_t)(DCP_OP_TUPLE1 + n - 1));
}

/* One more dimension in front of `stride`.  An empty dimension counts as one, as in torch; strides
 * of an empty tensor may then grow without limit and mean nothing, so they stop at 2^62. */
static inline uint64_t
next_stride(uint64_t stride, uint64_t size)
{
    uint64_t product;
    if (dcp_mul_overflows_u64(stride, size == 0 ? 1 : size, &product) || product >> 62 != 0) {
        return UINT64_C(1) << 62;
    }
    return product;
}

static inline uint64_t
storage_count(const struct pickle_template *form, uint32_t ndim, const uint64_t *sizes)
{
    uint64_t count = form->count_unit;
    for (uint32_t i = 0; i < ndim; i++) {
        if (sizes[i] == 0) {
            return 0;
        }
        count = next_stride(count, sizes[i]);
    }
    return count;
}

uint64_t
pickle_tensor_bytes(int dtype, uint32_t ndim, const uint64_t *sizes)
{
    DCP_ASSERT(dtype > DCP_DTYPE_NONE && dtype < DCP_DTYPE_COUNT && ndim <= DCP_MAX_DIMS);
    const struct pickle_template *form = &templates[dtype];
    uint64_t total = (uint64_t)form->prefix_len + form->suffix_len + 2; /* TUPLE, BINPERSID */
    total += int_bytes(storage_count(form, ndim, sizes)) + int_bytes(0);
    total += 2 * tuple_frame_bytes(ndim);
    uint64_t stride = 1;
    for (uint32_t i = ndim; i-- > 0;) {
        total += int_bytes(sizes[i]) + int_bytes(stride);
        stride = next_stride(stride, sizes[i]);
    }
    return total;
}

uint8_t *
pickle_tensor_write(uint8_t *at, int dtype, uint32_t ndim, const uint64_t *sizes)
{
    DCP_ASSERT(dtype > DCP_DTYPE_NONE && dtype < DCP_DTYPE_COUNT && ndim <= DCP_MAX_DIMS);
    const struct pickle_template *form = &templates[dtype];
    uint64_t strides[DCP_MAX_DIMS];
    uint64_t stride = 1;
    for (uint32_t i = ndim; i-- > 0;) {
        strides[i] = stride;
        stride = next_stride(stride, sizes[i]);
    }
    at = le_put_bytes(at, form->prefix, form->prefix_len);
    at = put_int(at, storage_count(form, ndim, sizes));
    at = le_put8(le_put8(at, DCP_OP_TUPLE), DCP_OP_BINPERSID);
    at = put_int(at, 0); /* storage offset */
    at = put_tuple(at, ndim, sizes);
    at = put_tuple(at, ndim, strides);
    return le_put_bytes(at, form->suffix, form->suffix_len);
}

void
dcp_pickle_put_tensor(struct dcp_buf *buf, int dtype, uint32_t ndim, const uint64_t *sizes)
{
    uint64_t total = pickle_tensor_bytes(dtype, ndim, sizes);
    uint8_t *at = dcp_buf_extend(buf, total);
    if (at != NULL) {
        uint8_t *end = pickle_tensor_write(at, dtype, ndim, sizes);
        DCP_ASSERT(end == at + total);
        (void)end;
    }
}

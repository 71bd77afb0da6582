/*
 * dtype.c: element types: name, size and storage class, from the one list in dcp_dtype.h.
 *
 * Threads: constant tables only.
 */
#include "dcp_dtype.h"

#include <string.h>

struct dtype_row {
    const char *name;
    const char *storage;
    uint8_t name_len;
    uint8_t bytes;
};

static const struct dtype_row rows[DCP_DTYPE_COUNT] = {
#define X(name, value, text, size, storage) [value] = {text, storage, sizeof(text) - 1, size},
    DCP_DTYPES(X)
#undef X
};

static const struct dtype_row *
row_of(int dtype)
{
    if (dtype <= DCP_DTYPE_NONE || dtype >= DCP_DTYPE_COUNT) {
        return NULL;
    }
    return &rows[dtype];
}

const char *
dcp_dtype_name(int dtype)
{
    const struct dtype_row *row = row_of(dtype);
    return row == NULL ? NULL : row->name;
}

uint32_t
dcp_dtype_bytes(int dtype)
{
    const struct dtype_row *row = row_of(dtype);
    return row == NULL ? 0 : row->bytes;
}

const char *
dcp_dtype_storage(int dtype)
{
    const struct dtype_row *row = row_of(dtype);
    return row == NULL ? NULL : row->storage;
}

int
dcp_dtype_from_name(const char *name, size_t len)
{
    for (int dtype = 1; dtype < DCP_DTYPE_COUNT; dtype++) {
        if (rows[dtype].name_len == len && memcmp(rows[dtype].name, name, len) == 0) {
            return dtype;
        }
    }
    return DCP_DTYPE_NONE;
}

/*
 * dcp_safetensors.h: headers of safetensors files, checked before they are believed.
 *
 * A file is [length of the header, 8 bytes little endian][header, JSON][data].  The header maps
 * names to {"dtype", "shape", "data_offsets"}, offsets from the start of the data, row major
 * elements in little endian, and `__metadata__` to texts.  What the safetensors package refuses is
 * refused here: tensors must cover the data without a gap, an overlap or a rest.  Beyond it, a name
 * may not come twice and a tensor has at most DCP_MAX_DIMS dimensions.
 */
#ifndef DCP_SAFETENSORS_H
#define DCP_SAFETENSORS_H

#include "dcp_dtype.h"
#include "dcp_io.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DCP_SAFETENSORS_PREFIX_BYTES = 8 };

/* X(name in files, bits of an element, enum dcp_dtype or NONE where torch has no such type). */
#define DCP_SAFETENSORS_TYPES(X)                                                                   \
    X(BOOL, 8, BOOL)                                                                               \
    X(F4, 4, NONE)                                                                                 \
    X(F6_E2M3, 6, NONE)                                                                            \
    X(F6_E3M2, 6, NONE)                                                                            \
    X(U8, 8, UINT8)                                                                                \
    X(I8, 8, INT8)                                                                                 \
    X(F8_E5M2, 8, FLOAT8_E5M2)                                                                     \
    X(F8_E4M3, 8, FLOAT8_E4M3FN)                                                                   \
    X(F8_E8M0, 8, FLOAT8_E8M0FNU)                                                                  \
    X(F8_E4M3FNUZ, 8, FLOAT8_E4M3FNUZ)                                                             \
    X(F8_E5M2FNUZ, 8, FLOAT8_E5M2FNUZ)                                                             \
    X(I16, 16, INT16)                                                                              \
    X(U16, 16, UINT16)                                                                             \
    X(F16, 16, FLOAT16)                                                                            \
    X(BF16, 16, BFLOAT16)                                                                          \
    X(I32, 32, INT32)                                                                              \
    X(U32, 32, UINT32)                                                                             \
    X(F32, 32, FLOAT32)                                                                            \
    X(C64, 64, COMPLEX64)                                                                          \
    X(F64, 64, FLOAT64)                                                                            \
    X(I64, 64, INT64)                                                                              \
    X(U64, 64, UINT64)

struct dcp_safetensor {
    const char *name; /* UTF-8, not terminated; of the header, as `sizes` */
    size_t name_len;
    const char *type; /* as in the file: "BF16" */
    uint8_t dtype;    /* enum dcp_dtype; NONE: of a type that torch has not */
    uint8_t ndim;
    const uint64_t *sizes;
    uint64_t offset_bytes, length_bytes; /* in the file */
};

struct dcp_safetensors_text {
    const char *key, *value; /* UTF-8, not terminated */
    size_t key_len, value_len;
};

/* Zero-initialised is a valid empty one. */
struct dcp_safetensors_header {
    struct dcp_safetensor *tensors; /* owned; ascending by name, bytewise */
    uint64_t tensors_count;
    struct dcp_safetensors_text *texts; /* owned: `__metadata__`, in the file's order */
    uint64_t texts_count;
    bool has_texts;        /* there is a `__metadata__`, maybe an empty one */
    uint64_t header_bytes; /* where the data begins */
    uint64_t file_bytes;
    struct dcp_bump memory; /* owned: names, sizes, texts */
};

/* Idempotent; NULL is fine. */
void dcp_safetensors_header_clean_up(struct dcp_safetensors_header *header);

/* Bytes of the header, its prefix included, of a file of `file_bytes`.  `path` is for messages. */
int dcp_safetensors_header_bytes(const uint8_t prefix[DCP_SAFETENSORS_PREFIX_BYTES],
                                 uint64_t file_bytes, const char *path, uint64_t *ret_bytes,
                                 struct dcp_error *err) DCP_MUST_CHECK;
/* Parses a header, prefix included.  DCP_E_CORRUPT says what is wrong at which byte of the file. */
int dcp_safetensors_parse(const uint8_t *bytes, size_t len, uint64_t file_bytes, const char *path,
                          struct dcp_safetensors_header *ret, struct dcp_error *err) DCP_MUST_CHECK;
/* Reads the header of a file, and nothing else of it. */
int dcp_safetensors_read(const struct dcp_io *io, const char *dir_path, const char *name,
                         struct dcp_safetensors_header *ret, struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif

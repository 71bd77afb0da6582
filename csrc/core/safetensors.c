/*
 * safetensors.c: headers of safetensors files.
 *
 * Nothing is believed: the length is compared with the file before memory is taken for it, numbers
 * go through checked arithmetic, and a header is accepted only when its tensors, in the order of
 * their offsets, cover the data from its first byte to its last.  So a tensor's range lies inside
 * the file and in no other tensor's, whoever wrote the header.
 *
 * Sorting finds names that come twice as well: no hash table that names could be made to collide
 * in.  Time is n log n in the tensors, memory a small multiple of the header.
 *
 * Threads: no state.
 */
#include "dcp_safetensors.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dcp_limits.h"
#include "json.h"
#include "le_bytes.h"
#include "utf8.h"

static const struct {
    const char *name;
    uint8_t bits, dtype;
} types[] = {
#define X(name, bits, dtype) {#name, bits, DCP_DTYPE_##dtype},
    DCP_SAFETENSORS_TYPES(X)
#undef X
};

enum { TYPES_COUNT = sizeof types / sizeof types[0] };

/* Of a name in a message. */
enum { SHOWN_NAME_BYTES = 256 };

struct parser {
    struct dcp_json json;
    const char *path;
    struct dcp_safetensors_header header;
    uint64_t tensors_cap, texts_cap;
    struct dcp_error *err;
};

/* ---- types ---- */

static int
find_type(const char *name, size_t len)
{
    for (int i = 0; i < TYPES_COUNT; i++) {
        if (strlen(types[i].name) == len && memcmp(types[i].name, name, len) == 0) {
            return i;
        }
    }
    return -1;
}

/* ---- errors ---- */

static int refuse_file(const char *path, uint64_t offset_bytes, struct dcp_error *err,
                       const char *fmt, ...) DCP_PRINTF(4, 5);

static int
refuse_file(const char *path, uint64_t offset_bytes, struct dcp_error *err, const char *fmt, ...)
{
    char what[512];
    bool first = err != NULL && err->code == 0;
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    int code = dcp_error_set(err, DCP_E_CORRUPT, 0, path,
                             "%s is no whole safetensors file: %s (byte %" PRIu64
                             "); download or export it again",
                             path, what, offset_bytes);
    if (first) {
        err->offset_bytes = offset_bytes;
    }
    return code;
}

static int
fail_memory(const struct parser *p)
{
    return dcp_error_set(p->err, DCP_E_NOMEM, 0, p->path, "out of memory for the header of %s",
                         p->path);
}

/* What the JSON reader met. */
static int
refuse_json(const struct parser *p)
{
    if (p->json.no_memory) {
        return fail_memory(p);
    }
    return refuse_file(p->path, DCP_SAFETENSORS_PREFIX_BYTES + p->json.pos, p->err,
                       "its header is not what it must be: %s", p->json.failed);
}

static int
refuse_tensor(const struct parser *p, const struct dcp_safetensor *tensor, const char *what)
{
    return refuse_file(p->path, DCP_SAFETENSORS_PREFIX_BYTES + p->json.pos, p->err,
                       "tensor %.*s: %s", (int)dcp_min_u64(tensor->name_len, SHOWN_NAME_BYTES),
                       tensor->name, what);
}

/* ---- members of a tensor ---- */

static bool
is_word(const char *text, size_t len, const char *word)
{
    return len == strlen(word) && memcmp(text, word, len) == 0;
}

static int
parse_shape(struct parser *p, struct dcp_safetensor *tensor)
{
    uint64_t sizes[DCP_MAX_DIMS];
    uint32_t ndim = 0;
    bool first = true;
    if (!dcp_json_open(&p->json, '[')) {
        return refuse_json(p);
    }
    while (dcp_json_more(&p->json, ']', &first)) {
        if (ndim == DCP_MAX_DIMS) {
            return refuse_tensor(p, tensor, "it has more than 64 dimensions");
        }
        if (!dcp_json_u64(&p->json, &sizes[ndim])) {
            return refuse_json(p);
        }
        if (sizes[ndim++] > INT64_MAX) {
            return refuse_tensor(p, tensor, "a dimension does not fit into 63 bits");
        }
    }
    if (p->json.failed != NULL) {
        return refuse_json(p);
    }
    uint64_t *kept = dcp_bump_alloc(&p->header.memory, (ndim + 1) * sizeof *kept, sizeof(uint64_t));
    if (kept == NULL) {
        return fail_memory(p);
    }
    memcpy(kept, sizes, ndim * sizeof *kept);
    tensor->sizes = kept;
    tensor->ndim = (uint8_t)ndim;
    return 0;
}

static int
parse_offsets(struct parser *p, uint64_t ret[2])
{
    bool first = true;
    uint32_t count = 0;
    if (!dcp_json_open(&p->json, '[')) {
        return refuse_json(p);
    }
    while (dcp_json_more(&p->json, ']', &first)) {
        if (count == 2) {
            (void)dcp_json_fail(&p->json, "data_offsets are two numbers");
        } else {
            (void)dcp_json_u64(&p->json, &ret[count++]);
        }
    }
    if (p->json.failed == NULL && count != 2) {
        (void)dcp_json_fail(&p->json, "data_offsets are two numbers");
    }
    return p->json.failed == NULL ? 0 : refuse_json(p);
}

/* Bytes that elements of a shape take; -1: the header lies. */
static int
count_bytes(const struct parser *p, const struct dcp_safetensor *tensor, uint32_t bits,
            uint64_t *ret_bytes)
{
    uint64_t count = 1;
    for (uint32_t d = 0; d < tensor->ndim; d++) {
        if (dcp_mul_overflows_u64(count, tensor->sizes[d], &count)) {
            return refuse_tensor(p, tensor, "its shape has more elements than 64 bits can count");
        }
    }
    if (dcp_mul_overflows_u64(count, bits, &count)) {
        return refuse_tensor(p, tensor, "its shape has more bits than 64 bits can count");
    }
    if (count % 8 != 0) {
        return refuse_tensor(p, tensor, "its elements do not fill whole bytes");
    }
    *ret_bytes = count / 8;
    return 0;
}

enum member { MEMBER_DTYPE = 1, MEMBER_SHAPE = 2, MEMBER_OFFSETS = 4, MEMBERS_ALL = 7 };

static int
parse_member(struct parser *p, struct dcp_safetensor *tensor, int *type, uint64_t offsets[2],
             uint32_t *seen)
{
    const char *key, *text;
    size_t key_len, len;
    if (!dcp_json_key(&p->json, &p->header.memory, &key, &key_len)) {
        return refuse_json(p);
    }
    uint32_t member = is_word(key, key_len, "dtype")          ? MEMBER_DTYPE
                      : is_word(key, key_len, "shape")        ? MEMBER_SHAPE
                      : is_word(key, key_len, "data_offsets") ? MEMBER_OFFSETS
                                                              : 0;
    if (*seen & member) {
        return refuse_tensor(p, tensor, "one of its members comes twice");
    }
    *seen |= member;
    switch (member) {
    case MEMBER_SHAPE:
        return parse_shape(p, tensor);
    case MEMBER_OFFSETS:
        return parse_offsets(p, offsets);
    case MEMBER_DTYPE:
        break;
    default:
        return dcp_json_skip(&p->json) ? 0 : refuse_json(p);
    }
    if (!dcp_json_string(&p->json, &p->header.memory, &text, &len)) {
        return refuse_json(p);
    }
    *type = find_type(text, len);
    return *type >= 0 ? 0 : refuse_tensor(p, tensor, "its dtype is none that the format knows");
}

static int
parse_tensor(struct parser *p, struct dcp_safetensor *tensor)
{
    uint64_t offsets[2] = {0}, bytes = 0, end;
    uint32_t seen = 0;
    int type = 0, rc = 0;
    bool first = true;
    if (!dcp_json_open(&p->json, '{')) {
        return refuse_json(p);
    }
    while (rc == 0 && dcp_json_more(&p->json, '}', &first)) {
        rc = parse_member(p, tensor, &type, offsets, &seen);
    }
    if (rc != 0 || p->json.failed != NULL) {
        return rc != 0 ? rc : refuse_json(p);
    }
    if (seen != MEMBERS_ALL) {
        return refuse_tensor(p, tensor, "dtype, shape or data_offsets is missing");
    }
    rc = count_bytes(p, tensor, types[type].bits, &bytes);
    if (rc != 0) {
        return rc;
    }
    if (offsets[1] < offsets[0] || offsets[1] - offsets[0] != bytes) {
        return refuse_tensor(p, tensor,
                             "its data_offsets do not hold what its shape and dtype say");
    }
    if (dcp_add_overflows_u64(p->header.header_bytes, offsets[1], &end) ||
        end > p->header.file_bytes) {
        return refuse_tensor(p, tensor,
                             "its data end behind the end of the file, "
                             "which was cut short");
    }
    tensor->type = types[type].name;
    tensor->dtype = types[type].dtype;
    tensor->offset_bytes = p->header.header_bytes + offsets[0];
    tensor->length_bytes = bytes;
    return 0;
}

/* ---- the whole ---- */

/* Room for one more item in an array; NULL when there is no memory. */
static void *
grown(void *array, uint64_t *cap, uint64_t count, size_t item_bytes)
{
    if (count < *cap) {
        return array;
    }
    uint64_t more = *cap > 0 ? *cap * 2 : 64;
    void *larger = dcp_realloc(array, more * item_bytes);
    if (larger != NULL) {
        *cap = more;
    }
    return larger;
}

static int
parse_texts(struct parser *p)
{
    struct dcp_safetensors_header *header = &p->header;
    bool first = true;
    if (header->has_texts) {
        (void)dcp_json_fail(&p->json, "__metadata__ comes twice");
        return refuse_json(p);
    }
    if (dcp_json_null(&p->json)) {
        return 0;
    }
    header->has_texts = true;
    if (!dcp_json_open(&p->json, '{')) {
        return refuse_json(p);
    }
    while (dcp_json_more(&p->json, '}', &first)) {
        struct dcp_safetensors_text *texts =
            grown(header->texts, &p->texts_cap, header->texts_count, sizeof *texts);
        if (texts == NULL) {
            return fail_memory(p);
        }
        header->texts = texts;
        struct dcp_safetensors_text *text = &texts[header->texts_count];
        if (!dcp_json_key(&p->json, &header->memory, &text->key, &text->key_len) ||
            !dcp_json_string(&p->json, &header->memory, &text->value, &text->value_len)) {
            return refuse_json(p);
        }
        header->texts_count++;
    }
    return p->json.failed == NULL ? 0 : refuse_json(p);
}

static int
parse_entry(struct parser *p)
{
    struct dcp_safetensors_header *header = &p->header;
    struct dcp_safetensor *tensors =
        grown(header->tensors, &p->tensors_cap, header->tensors_count, sizeof *tensors);
    if (tensors == NULL) {
        return fail_memory(p);
    }
    header->tensors = tensors;
    struct dcp_safetensor *tensor = &tensors[header->tensors_count];
    memset(tensor, 0, sizeof *tensor);
    if (!dcp_json_key(&p->json, &header->memory, &tensor->name, &tensor->name_len)) {
        return refuse_json(p);
    }
    if (is_word(tensor->name, tensor->name_len, "__metadata__")) {
        return parse_texts(p);
    }
    int rc = parse_tensor(p, tensor);
    if (rc == 0) {
        header->tensors_count++;
    }
    return rc;
}

static int
compare_names(const void *left, const void *right)
{
    const struct dcp_safetensor *a = left, *b = right;
    size_t len = a->name_len < b->name_len ? a->name_len : b->name_len;
    int order = memcmp(a->name, b->name, len);
    return order != 0 ? order : (a->name_len > b->name_len) - (a->name_len < b->name_len);
}

static int
compare_offsets(const void *left, const void *right)
{
    const struct dcp_safetensor *a = *(const struct dcp_safetensor *const *)left;
    const struct dcp_safetensor *b = *(const struct dcp_safetensor *const *)right;
    if (a->offset_bytes != b->offset_bytes) {
        return a->offset_bytes < b->offset_bytes ? -1 : 1;
    }
    return (a->length_bytes > b->length_bytes) - (a->length_bytes < b->length_bytes);
}

/* Tensors in the order of their offsets follow each other from the first byte of the data to the
 * last. */
static int
check_cover(const struct parser *p)
{
    const struct dcp_safetensors_header *header = &p->header;
    const struct dcp_safetensor **order =
        dcp_malloc_array((size_t)header->tensors_count, sizeof *order);
    if (order == NULL) {
        return fail_memory(p);
    }
    for (uint64_t i = 0; i < header->tensors_count; i++) {
        order[i] = &header->tensors[i];
    }
    if (header->tensors_count > 0) {
        qsort(order, (size_t)header->tensors_count, sizeof(void *), compare_offsets);
    }
    uint64_t at = header->header_bytes;
    int rc = 0;
    for (uint64_t i = 0; rc == 0 && i < header->tensors_count; i++) {
        if (order[i]->offset_bytes != at) {
            rc = refuse_tensor(p, order[i],
                               order[i]->offset_bytes < at
                                   ? "its data overlap those of another tensor"
                                   : "before its data is a gap that belongs to no tensor");
        }
        at += order[i]->length_bytes;
    }
    if (rc == 0 && at != header->file_bytes) {
        rc = refuse_file(p->path, at, p->err,
                         "%" PRIu64 " bytes behind its last tensor belong to none",
                         header->file_bytes - at);
    }
    dcp_free(order);
    return rc;
}

static int
parse_all(struct parser *p)
{
    struct dcp_safetensors_header *header = &p->header;
    bool first = true;
    int rc = 0;
    if (!dcp_json_open(&p->json, '{')) {
        return refuse_json(p);
    }
    while (rc == 0 && dcp_json_more(&p->json, '}', &first)) {
        rc = parse_entry(p);
    }
    if (rc == 0 && (p->json.failed != NULL || !dcp_json_end(&p->json))) {
        rc = refuse_json(p);
    }
    if (rc != 0) {
        return rc;
    }
    if (header->tensors_count > 0) {
        qsort(header->tensors, (size_t)header->tensors_count, sizeof *header->tensors,
              compare_names);
    }
    for (uint64_t i = 1; i < header->tensors_count; i++) {
        if (compare_names(&header->tensors[i - 1], &header->tensors[i]) == 0) {
            return refuse_tensor(p, &header->tensors[i], "its name comes twice");
        }
    }
    return check_cover(p);
}

void
dcp_safetensors_header_clean_up(struct dcp_safetensors_header *header)
{
    if (header == NULL) {
        return;
    }
    dcp_free(header->tensors);
    dcp_free(header->texts);
    dcp_bump_clean_up(&header->memory);
    memset(header, 0, sizeof *header);
}

int
dcp_safetensors_header_bytes(const uint8_t prefix[DCP_SAFETENSORS_PREFIX_BYTES],
                             uint64_t file_bytes, const char *path, uint64_t *ret_bytes,
                             struct dcp_error *err)
{
    if (file_bytes < DCP_SAFETENSORS_PREFIX_BYTES) {
        return refuse_file(path, 0, err, "it has %" PRIu64 " bytes, too few for a header",
                           file_bytes);
    }
    uint64_t bytes = le_get64(prefix);
    if (bytes > DCP_MAX_SAFETENSORS_HEADER_BYTES) {
        return refuse_file(path, 0, err,
                           "its header would have %" PRIu64 " bytes, more than the format allows",
                           bytes);
    }
    if (bytes > file_bytes - DCP_SAFETENSORS_PREFIX_BYTES) {
        return refuse_file(path, 0, err,
                           "its header would have %" PRIu64 " bytes, and the file has %" PRIu64,
                           bytes, file_bytes);
    }
    *ret_bytes = DCP_SAFETENSORS_PREFIX_BYTES + bytes;
    return 0;
}

int
dcp_safetensors_parse(const uint8_t *bytes, size_t len, uint64_t file_bytes, const char *path,
                      struct dcp_safetensors_header *ret, struct dcp_error *err)
{
    uint64_t header_bytes = 0;
    int rc = len < DCP_SAFETENSORS_PREFIX_BYTES
                 ? refuse_file(path, 0, err, "it has %zu bytes, too few for a header", len)
                 : dcp_safetensors_header_bytes(bytes, file_bytes, path, &header_bytes, err);
    if (rc != 0) {
        return rc;
    }
    if (header_bytes > len) {
        return refuse_file(path, len, err, "its header is cut short");
    }
    struct parser p = {
        .json = {.text = bytes + DCP_SAFETENSORS_PREFIX_BYTES,
                 .len = (size_t)header_bytes - DCP_SAFETENSORS_PREFIX_BYTES},
        .path = path,
        .header = {.header_bytes = header_bytes, .file_bytes = file_bytes},
        .err = err,
    };
    if (dcp_utf8_check(p.json.text, p.json.len) != DCP_UTF8_VALID) {
        return refuse_file(path, DCP_SAFETENSORS_PREFIX_BYTES, err, "its header is not UTF-8");
    }
    rc = parse_all(&p);
    if (rc != 0) {
        dcp_safetensors_header_clean_up(&p.header);
        return rc;
    }
    *ret = p.header;
    return 0;
}

/*
 * record_read.c: where the tensor of a record lies and what shape it has; CRCs of a whole record.
 *
 * Parsing reads the end of the record (which in ours holds everything but one local header), the
 * pickle and the local header of the payload; the payload itself is the reader's business.  All
 * input is untrusted: the shape is accepted only when every element lies inside the payload.
 *
 * A writer with CRCs switched off (torch.serialization.set_crc32_options) leaves all of them zero.
 * So a zero counts as "none" only when every entry of the record has it; one that is merely zero
 * by chance is checked.
 *
 * Threads: no state.
 */
#include "dcp_record.h"

#include <string.h>

#include "dcp_crc32.h"
#include "dcp_metadata.h"
#include "le_bytes.h"
#include "zip_format.h"

enum {
    /* Ends, directory and pickle of one tensor fit in the first; a comment may need the second. */
    TAIL_BYTES = 4096,
    TAIL_MAX_BYTES = 68 << 10,
    /* More than any record of one tensor has; larger ones are for torch.load. */
    DIRECTORY_MAX_BYTES = 1 << 20,
    PICKLE_MAX_BYTES = 64 << 10,
    NAME_MAX_BYTES = 300, /* a file name of 255 bytes, and /data.pkl */
    BYTEORDER_LITTLE_BYTES = 6,
    BYTEORDER_BIG_BYTES = 3,
    SAFETENSORS_HEADER_MAX_BYTES = 100000000, /* the format's own limit */
};

#define BYTEORDER_LITTLE_CRC 0x19e33d85u

/* The bytes that the last read gave, so that neighbours are not read again. */
struct window {
    const struct dcp_record_input *input;
    const uint8_t *data;
    uint64_t offset;
    uint64_t len;
};

/* A directory entry that outlives the window. */
struct kept_entry {
    struct zip_entry entry;
    char name[NAME_MAX_BYTES];
    bool found;
};

struct contents {
    struct zip_end end;
    struct kept_entry pickle, data;
    uint64_t storages_count;
    bool any_crc;
};

static int
damaged(struct dcp_error *err, const char *what)
{
    return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                         "reading a tensor's record failed: %s; the file is damaged", what);
}

static int
unsupported(struct dcp_error *err, const char *what)
{
    return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                         "the native reader does not read this record: %s; torch.load may", what);
}

static int
fetch(struct window *w, uint64_t offset, uint64_t len, const uint8_t **ret, struct dcp_error *err)
{
    if (offset > w->input->length_bytes || len > w->input->length_bytes - offset) {
        return damaged(err, "it is shorter than its directory says");
    }
    bool inside = w->data != NULL && offset >= w->offset && offset - w->offset <= w->len &&
                  len <= w->len - (offset - w->offset);
    if (!inside) {
        w->data = NULL;
        int rc = w->input->read(w->input->ctx, offset, len, &w->data, err);
        if (rc != 0) {
            w->data = NULL;
            return rc;
        }
        w->offset = offset;
        w->len = len;
    }
    *ret = w->data + (offset - w->offset);
    return 0;
}

/* A safetensors file begins with the length of its header, and that with a brace: what torch's
 * writer leaves when its serialization_format is SAFETENSORS. */
static int
no_zip(struct window *w, struct dcp_error *err)
{
    const uint8_t *head = NULL;
    struct dcp_error none = {.code = 0};
    if (w->input->length_bytes > 8 && fetch(w, 0, 9, &head, &none) == 0 && head[8] == '{' &&
        le_get64(head) <= SAFETENSORS_HEADER_MAX_BYTES) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL,
                             "reading a tensor's record failed: it begins a file in safetensors "
                             "format, which FileSystemReader does not read; load it with torch's "
                             "HuggingFaceStorageReader or with safetensors");
    }
    return damaged(err, "it has no zip end record");
}

static int
find_end(struct window *w, struct zip_end *ret_end, struct dcp_error *err)
{
    uint64_t length = w->input->length_bytes;
    for (uint64_t want = TAIL_BYTES;; want = TAIL_MAX_BYTES) {
        const uint8_t *tail = NULL;
        uint64_t len = dcp_min_u64(length, want);
        int rc = fetch(w, length - len, len, &tail, err);
        if (rc == 0) {
            rc = zip_find_end(tail, len, length, ret_end, err);
        }
        if (rc != DCP_E_MISSING || want == TAIL_MAX_BYTES) {
            return rc != DCP_E_MISSING ? rc : no_zip(w, err);
        }
    }
}

static bool
has_suffix(const struct zip_entry *entry, uint32_t prefix_len, const char *suffix)
{
    size_t len = strlen(suffix);
    return entry->name_len - prefix_len == len &&
           memcmp(entry->name + prefix_len, suffix, len) == 0;
}

static int
keep_entry(const struct zip_entry *entry, struct kept_entry *ret, struct dcp_error *err)
{
    if (ret->found) {
        return damaged(err, "an entry is there twice");
    }
    if (entry->name_len > sizeof ret->name) {
        return unsupported(err, "its archive name is too long");
    }
    memcpy(ret->name, entry->name, entry->name_len);
    ret->entry = *entry;
    ret->entry.name = ret->name;
    ret->found = true;
    return 0;
}

static int
check_byteorder(const struct zip_entry *entry, struct dcp_error *err)
{
    if (entry->bytes == BYTEORDER_BIG_BYTES) {
        return damaged(err, "it was written on a big-endian machine");
    }
    if (entry->bytes != BYTEORDER_LITTLE_BYTES ||
        (entry->crc != 0 && entry->crc != BYTEORDER_LITTLE_CRC)) {
        return damaged(err, "its byteorder entry is neither little nor big");
    }
    return 0;
}

static int
read_directory(struct window *w, struct contents *ret, struct dcp_error *err)
{
    const struct zip_end *end = &ret->end;
    if (end->directory_bytes > DIRECTORY_MAX_BYTES) {
        return unsupported(err, "it holds too many entries for one tensor");
    }
    const uint8_t *directory;
    int rc = fetch(w, end->directory_offset, end->directory_bytes, &directory, err);
    size_t pos = 0;
    for (uint64_t i = 0; i < end->entries_count && rc == 0; i++) {
        struct zip_entry entry;
        rc = zip_next_entry(directory, end, &pos, &entry, err);
        if (rc != 0) {
            break;
        }
        const char *slash = memchr(entry.name, '/', entry.name_len);
        if (slash == NULL) {
            return damaged(err, "an entry lies outside the archive's folder");
        }
        uint32_t prefix_len = (uint32_t)(slash - entry.name) + 1;
        ret->any_crc = ret->any_crc || entry.crc != 0;
        if (has_suffix(&entry, prefix_len, "data.pkl")) {
            rc = keep_entry(&entry, &ret->pickle, err);
        } else if (has_suffix(&entry, prefix_len, "byteorder")) {
            rc = check_byteorder(&entry, err);
        } else if (entry.name_len - prefix_len > 5 &&
                   memcmp(entry.name + prefix_len, "data/", 5) == 0) {
            ret->storages_count++;
            rc = ret->storages_count > 1 ? unsupported(err, "it holds several storages")
                                         : keep_entry(&entry, &ret->data, err);
        }
    }
    if (rc != 0) {
        return rc;
    }
    if (pos != end->directory_bytes) {
        return damaged(err, "its directory has bytes that belong to no entry");
    }
    if (!ret->pickle.found) {
        return damaged(err, "it has no data.pkl");
    }
    return ret->data.found ? 0 : unsupported(err, "it holds no tensor data");
}

/* Offset of an entry's data, by its local header. */
static int
locate(struct window *w, const struct zip_end *end, const struct zip_entry *entry,
       uint64_t *ret_offset, struct dcp_error *err)
{
    const uint8_t *header;
    int rc = fetch(w, entry->header_offset, ZIP_LOCAL_BYTES + entry->name_len, &header, err);
    return rc != 0 ? rc : zip_data_offset(header, end, entry, ret_offset, err);
}

static int
read_pickle(struct window *w, const struct contents *contents, struct dcp_tensor_pickle *ret,
            struct dcp_error *err)
{
    const struct zip_entry *entry = &contents->pickle.entry;
    const uint8_t *pickle;
    uint64_t offset;
    if (entry->bytes > PICKLE_MAX_BYTES) {
        return unsupported(err, "its data.pkl is too long for a plain tensor");
    }
    int rc = locate(w, &contents->end, entry, &offset, err);
    if (rc == 0) {
        rc = fetch(w, offset, entry->bytes, &pickle, err);
    }
    if (rc != 0) {
        return rc;
    }
    if (contents->any_crc && dcp_crc32(0, pickle, entry->bytes) != entry->crc) {
        return dcp_error_set(err, DCP_E_CHECKSUM, 0, NULL,
                             "reading a tensor's record failed: the CRC of its data.pkl does not "
                             "match; the file is damaged");
    }
    return dcp_pickle_read_tensor(pickle, entry->bytes, ret, err);
}

/* Row major without gaps; sizes of 1 may have any stride. */
static bool
is_row_major(const struct dcp_record_view *view)
{
    uint64_t expected = 1;
    for (uint32_t i = view->ndim; i-- > 0;) {
        if (view->sizes[i] != 1 && (uint64_t)view->strides[i] != expected) {
            return false;
        }
        expected *= view->sizes[i];
    }
    return true;
}

/* Every element inside the payload; sets `contiguous`. */
static int
check_geometry(struct dcp_record_view *view, struct dcp_error *err)
{
    uint32_t item_bytes = dcp_dtype_bytes(view->dtype);
    if (item_bytes == 0 || view->ndim > DCP_MAX_DIMS || view->payload_bytes % item_bytes != 0) {
        return damaged(err, "its storage is not a whole number of elements");
    }
    uint64_t stored_count = view->payload_bytes / item_bytes;
    uint64_t numel = 1, last = view->storage_offset;
    bool overflow = false, is_empty = false;
    for (uint32_t i = 0; i < view->ndim; i++) {
        is_empty = is_empty || view->sizes[i] == 0;
    }
    for (uint32_t i = 0; i < view->ndim && !is_empty; i++) {
        uint64_t reach;
        if (view->strides[i] < 0) {
            return damaged(err, "a stride is negative");
        }
        overflow = overflow || dcp_mul_overflows_u64(numel, view->sizes[i], &numel);
        overflow = overflow ||
                   dcp_mul_overflows_u64(view->sizes[i] - 1, (uint64_t)view->strides[i], &reach);
        overflow = overflow || dcp_add_overflows_u64(last, reach, &last);
    }
    if (is_empty) {
        view->contiguous = view->storage_offset == 0 && stored_count == 0;
        return 0;
    }
    if (overflow || last >= stored_count) {
        return damaged(err, "its shape reaches beyond its storage");
    }
    view->contiguous = view->storage_offset == 0 && numel == stored_count && is_row_major(view);
    return 0;
}

static int
check_storage(const struct contents *contents, const struct dcp_tensor_pickle *pickle,
              struct dcp_error *err)
{
    const struct zip_entry *data = &contents->data.entry;
    uint32_t key_len = pickle->storage_key_len;
    bool is_named =
        data->name_len > key_len + 5 && key_len <= sizeof pickle->storage_key &&
        memcmp(data->name + data->name_len - key_len, pickle->storage_key, key_len) == 0 &&
        memcmp(data->name + data->name_len - key_len - 5, "data/", 5) == 0;
    if (!is_named) {
        return damaged(err, "data.pkl names a storage that is not there");
    }
    if (data->bytes != pickle->storage_bytes) {
        return damaged(err, "data.pkl and the directory disagree about the size of its storage");
    }
    return 0;
}

int
dcp_record_parse(const struct dcp_record_input *input, struct dcp_record_view *ret_view,
                 struct dcp_error *err)
{
    struct window w = {.input = input};
    struct contents contents = {.storages_count = 0};
    struct dcp_tensor_pickle pickle = {.dtype = DCP_DTYPE_NONE};
    int rc = find_end(&w, &contents.end, err);
    if (rc == 0) {
        rc = read_directory(&w, &contents, err);
    }
    if (rc == 0) {
        rc = read_pickle(&w, &contents, &pickle, err);
    }
    if (rc == 0) {
        rc = check_storage(&contents, &pickle, err);
    }
    struct dcp_record_view view = {.dtype = pickle.dtype, .ndim = pickle.ndim};
    if (rc == 0) {
        rc = locate(&w, &contents.end, &contents.data.entry, &view.payload_offset_bytes, err);
    }
    if (rc != 0) {
        return rc;
    }
    memcpy(view.sizes, pickle.sizes, sizeof view.sizes);
    memcpy(view.strides, pickle.strides, sizeof view.strides);
    view.storage_offset = pickle.storage_offset;
    view.payload_bytes = contents.data.entry.bytes;
    view.payload_crc = contents.data.entry.crc;
    view.has_crc = contents.any_crc;
    rc = check_geometry(&view, err);
    if (rc == 0) {
        *ret_view = view;
    }
    return rc;
}

/* ---- verification ---- */

static int
verify_entry(const uint8_t *record, const struct zip_end *end, const struct zip_entry *entry,
             struct dcp_error *err)
{
    uint64_t offset;
    int rc = zip_data_offset(record + entry->header_offset, end, entry, &offset, err);
    if (rc != 0) {
        return rc;
    }
    uint32_t crc = dcp_crc32(0, record + offset, entry->bytes);
    if (crc != entry->crc) {
        int name_len = entry->name_len < 200 ? (int)entry->name_len : 200;
        return dcp_error_set(err, DCP_E_CHECKSUM, 0, NULL,
                             "checking a record failed: entry %.*s has CRC %08x, its directory "
                             "says %08x; the file is damaged",
                             name_len, entry->name, crc, entry->crc);
    }
    return 0;
}

int
dcp_record_verify(const uint8_t *record, size_t len, struct dcp_error *err)
{
    size_t tail_len = (size_t)dcp_min_u64(len, TAIL_MAX_BYTES);
    struct zip_end end;
    int rc = zip_find_end(record + len - tail_len, tail_len, len, &end, err);
    if (rc != 0) {
        return rc == DCP_E_MISSING ? damaged(err, "it has no zip end record") : rc;
    }
    const uint8_t *directory = record + end.directory_offset;
    bool any_crc = false;
    for (int pass = 0; pass < 2; pass++) {
        size_t pos = 0;
        for (uint64_t i = 0; i < end.entries_count; i++) {
            struct zip_entry entry;
            rc = zip_next_entry(directory, &end, &pos, &entry, err);
            if (rc != 0) {
                return rc;
            }
            any_crc = any_crc || entry.crc != 0;
            if (pass == 1 && any_crc) {
                rc = verify_entry(record, &end, &entry, err);
            }
            if (rc != 0) {
                return rc;
            }
        }
        if (pos != end.directory_bytes) {
            return damaged(err, "its directory has bytes that belong to no entry");
        }
    }
    return 0;
}

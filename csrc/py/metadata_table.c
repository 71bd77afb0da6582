/*
 * metadata_table.c: a `.metadata` image as plain Python values, without torch.
 *
 * For those who look at checkpoints and load nothing.  Keys are few and become tuples; chunks can
 * be many (256k of 1000 tensors) and stay columns of numbers, one bytes object each, of which
 * Python takes views.
 *
 * Threads: the image is read without the GIL.
 */
#include "metadata_table.h"

#include "dcp_dtype.h"
#include "dcp_metadata.h"
#include "errors.h"
#include "module.h"

static PyObject *
text_of(const struct dcp_metadata *md, uint64_t at, uint32_t len)
{
    return PyUnicode_DecodeUTF8(md->strings + at, (Py_ssize_t)len, "surrogateescape");
}

/* None for objects, which have no shape. */
static PyObject *
shape_of(const struct dcp_metadata *md, const struct dcp_md_entry *entry)
{
    PyObject *tuple;

    if (entry->kind == DCP_ITEM_BYTES) {
        Py_RETURN_NONE;
    }
    tuple = PyTuple_New(entry->ndim);
    for (uint32_t d = 0; tuple != NULL && d < entry->ndim; d++) {
        PyObject *number = PyLong_FromUnsignedLongLong(md->dims[entry->size + d]);

        if (number == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, d, number);
        }
    }
    return tuple;
}

/* Bytes of an entry's records; what a metadata file claims may be more than 64 bits can count. */
static uint64_t
stored_bytes(const struct dcp_metadata *md, const struct dcp_md_entry *entry)
{
    uint64_t total = 0;

    for (uint64_t i = 0; i < entry->chunks_count; i++) {
        if (dcp_add_overflows_u64(total, md->chunks[entry->first_chunk + i].length_bytes, &total)) {
            return UINT64_MAX;
        }
    }
    return total;
}

/* Bytes of a tensor's values; of its records where only torch knows its type, and of objects. */
static uint64_t
size_bytes(const struct dcp_metadata *md, const struct dcp_md_entry *entry, uint64_t stored)
{
    uint64_t total = dcp_dtype_bytes(entry->dtype);

    if (entry->kind == DCP_ITEM_BYTES || total == 0) {
        return stored;
    }
    for (uint32_t d = 0; d < entry->ndim; d++) {
        if (dcp_mul_overflows_u64(total, md->dims[entry->size + d], &total)) {
            return UINT64_MAX;
        }
    }
    return total;
}

static PyObject *
entries_of(const struct dcp_metadata *md)
{
    PyObject *list = PyList_New((Py_ssize_t)md->entries_count);

    for (uint64_t i = 0; list != NULL && i < md->entries_count; i++) {
        const struct dcp_md_entry *entry = &md->entries[i];
        uint64_t stored = stored_bytes(md, entry);
        PyObject *item = Py_BuildValue(
            "(NzNIKKKK)", text_of(md, entry->name, entry->name_len), dcp_dtype_name(entry->dtype),
            shape_of(md, entry), (unsigned int)dcp_dtype_bytes(entry->dtype),
            (unsigned long long)size_bytes(md, entry, stored), (unsigned long long)stored,
            (unsigned long long)entry->first_chunk, (unsigned long long)entry->chunks_count);

        if (item == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
        }
    }
    return list;
}

static PyObject *
files_of(const struct dcp_metadata *md)
{
    PyObject *list = PyList_New(md->files_count);

    for (uint32_t i = 0; list != NULL && i < md->files_count; i++) {
        PyObject *name = text_of(md, md->files[i].name, md->files[i].name_len);

        if (name == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, i, name);
        }
    }
    return list;
}

enum column { COLUMN_DIMS, COLUMN_OFFSET, COLUMN_LENGTH, COLUMN_FILE, COLUMN_TRANSFORMS };

static uint64_t
chunk_value(const struct dcp_md_chunk *chunk, enum column column)
{
    switch (column) {
    case COLUMN_DIMS:
        return chunk->dims;
    case COLUMN_OFFSET:
        return chunk->offset_bytes;
    case COLUMN_LENGTH:
        return chunk->length_bytes;
    case COLUMN_FILE:
        return chunk->file;
    default:
        return chunk->transforms;
    }
}

/* One number of every chunk, 8 bytes each in the machine's order. */
static PyObject *
column_of(const struct dcp_metadata *md, enum column column)
{
    PyObject *bytes =
        PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(md->chunks_count * sizeof(uint64_t)));

    for (uint64_t i = 0; bytes != NULL && i < md->chunks_count; i++) {
        uint64_t value = chunk_value(&md->chunks[i], column);

        memcpy(PyBytes_AS_STRING(bytes) + i * sizeof value, &value, sizeof value);
    }
    return bytes;
}

static PyObject *
table_of(const struct dcp_metadata *md)
{
    return Py_BuildValue(
        "{sNsNsNsNsNsNsNsNsOsNsz}", "entries", entries_of(md), "files", files_of(md), "dims",
        PyBytes_FromStringAndSize((const char *)md->dims,
                                  (Py_ssize_t)(md->dims_count * sizeof *md->dims)),
        "chunk_dims", column_of(md, COLUMN_DIMS), "chunk_offset", column_of(md, COLUMN_OFFSET),
        "chunk_length", column_of(md, COLUMN_LENGTH), "chunk_file", column_of(md, COLUMN_FILE),
        "chunk_transforms", column_of(md, COLUMN_TRANSFORMS), "native",
        md->is_native ? Py_True : Py_False, "linked_saves",
        PyLong_FromUnsignedLong(md->accepted_count), "foreign",
        md->foreign[0] == 0 ? NULL : md->foreign);
}

PyDoc_STRVAR(
    table_doc,
    "metadata_table(image, /)\n--\n\n"
    "What a `.metadata` image says, as plain values.\n\n"
    "`entries`: (key, dtype or None, shape or None for objects, bytes per element, bytes of "
    "the values or else of the records, bytes of the records, first chunk, number of "
    "chunks) in the file's order; `files`: names.  Of every chunk a "
    "column of 64-bit numbers in bytes: `chunk_file` (index in files, 0xFFFFFFFF when no "
    "record is listed), `chunk_offset`, `chunk_length` (bytes of the record), "
    "`chunk_transforms` (1: stored transformed), `chunk_dims`: where in the column `dims` "
    "its offsets begin, its sizes behind them.  `native`: dcp_native wrote it; "
    "`linked_saves`: other saves whose files it links; `foreign`: what of it only Python "
    "could rebuild.  NativeError as check_metadata.");

static PyObject *
module_metadata_table(PyObject *module, PyObject *image)
{
    struct module_state *state = PyModule_GetState(module);
    struct dcp_metadata md = {0};
    struct dcp_error err;
    Py_buffer view;
    PyObject *result;
    int rc;

    if (PyObject_GetBuffer(image, &view, PyBUF_SIMPLE) != 0) {
        return NULL;
    }
    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc = dcp_metadata_read(view.buf, (size_t)view.len, &md, &err);
    Py_END_ALLOW_THREADS if (rc != 0)
    {
        PyBuffer_Release(&view);
        return native_set_error(state->error_class, &err);
    }
    result = table_of(&md); /* the image may be what its arrays lie in */
    dcp_metadata_clean_up(&md);
    PyBuffer_Release(&view);
    return result;
}

PyMethodDef metadata_table_methods[] = {
    {"metadata_table", module_metadata_table, METH_O, table_doc},
    {NULL, NULL, 0, NULL},
};

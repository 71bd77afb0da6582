/*
 * key_tree.c: the tree of keys (dcp_key_tree.h) from tuples, as tuples: one for each row that shows
 * it, so that a tree of merged layers is a few objects, whatever it was grown from.
 */
#include "key_tree.h"

#include "dcp_alloc.h"
#include "dcp_key_tree.h"
#include "errors.h"
#include "module.h"

struct key_tree_job {
    PyObject *entries; /* list or tuple; borrowed */
    PyObject *looks;   /* dict: (dtype, shape) -> number */
    PyObject *encoded; /* list: bytes of keys that are no UTF-8 */
    struct dcp_tree_key *keys;
    struct dcp_key_tree tree;
};

static void
job_clean_up(struct key_tree_job *job)
{
    dcp_key_tree_clean_up(&job->tree);
    PyMem_Free(job->keys);
    Py_XDECREF(job->looks);
    Py_XDECREF(job->encoded);
    Py_XDECREF(job->entries);
}

/* ---- in ---- */

/* The text lives as long as the entries, or as `encoded`. */
static int
take_text(struct key_tree_job *job, PyObject *key, struct dcp_span *ret_text)
{
    Py_ssize_t len;
    const char *text = PyUnicode_AsUTF8AndSize(key, &len);

    if (text == NULL && PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) {
        PyErr_Clear();
        PyObject *bytes = PyUnicode_AsEncodedString(key, "utf-8", "surrogateescape");
        int rc = bytes == NULL ? -1 : PyList_Append(job->encoded, bytes);

        Py_XDECREF(bytes); /* the list has it */
        if (rc == 0) {
            text = PyBytes_AS_STRING(bytes);
            len = PyBytes_GET_SIZE(bytes);
        }
    }
    if (text == NULL) {
        return -1;
    }
    *ret_text = (struct dcp_span){(const uint8_t *)text, (size_t)len};
    return 0;
}

/* Numbers what (dtype, shape) there are. */
static int
take_look(struct key_tree_job *job, PyObject *dtype, PyObject *shape, uint32_t *ret_look)
{
    PyObject *pair = PyTuple_Pack(2, dtype, shape), *number;

    if (pair == NULL) {
        return -1;
    }
    number = PyDict_GetItemWithError(job->looks, pair);
    if (number != NULL) {
        *ret_look = (uint32_t)PyLong_AsUnsignedLong(number);
        Py_DECREF(pair);
        return 0;
    }
    *ret_look = (uint32_t)PyDict_GET_SIZE(job->looks);
    number = PyErr_Occurred() ? NULL : PyLong_FromUnsignedLong(*ret_look);
    int rc = number == NULL ? -1 : PyDict_SetItem(job->looks, pair, number);
    Py_XDECREF(number);
    Py_DECREF(pair);
    return rc;
}

/* Fields of an entry, as metadata_table gives them. */
enum { FIELD_KEY = 0, FIELD_DTYPE = 1, FIELD_SHAPE = 2, FIELD_SIZE = 4, FIELDS_LEAST = 5 };

static int
take_entry(struct key_tree_job *job, PyObject *entry, struct dcp_tree_key *ret_key)
{
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) < FIELDS_LEAST) {
        PyErr_SetString(PyExc_TypeError, "entries must be those of metadata_table");
        return -1;
    }
    ret_key->bytes = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(entry, FIELD_SIZE));
    if (ret_key->bytes == UINT64_MAX && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
            return -1;
        }
        PyErr_Clear(); /* sums of what several ranks claim: as many as can be counted */
    }
    if (take_look(job, PyTuple_GET_ITEM(entry, FIELD_DTYPE), PyTuple_GET_ITEM(entry, FIELD_SHAPE),
                  &ret_key->look) != 0) {
        return -1;
    }
    return take_text(job, PyTuple_GET_ITEM(entry, FIELD_KEY), &ret_key->text);
}

static int
take_entries(struct key_tree_job *job, PyObject *entries)
{
    Py_ssize_t count;

    job->looks = PyDict_New();
    job->encoded = PyList_New(0);
    job->entries = PySequence_Fast(entries, "entries must be a sequence");
    if (job->looks == NULL || job->encoded == NULL || job->entries == NULL) {
        return -1;
    }
    count = PySequence_Fast_GET_SIZE(job->entries);
    if ((uint64_t)count >= DCP_TREE_NONE) {
        PyErr_SetString(PyExc_OverflowError, "too many entries for a tree");
        return -1;
    }
    job->keys = PyMem_Calloc((size_t)count + 1, sizeof *job->keys);
    if (job->keys == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (take_entry(job, PySequence_Fast_GET_ITEM(job->entries, i), &job->keys[i]) != 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- out ---- */

static PyObject *
text_of(struct dcp_span name)
{
    return PyUnicode_DecodeUTF8((const char *)name.data, (Py_ssize_t)name.len, "surrogateescape");
}

/* A name, or a tuple of those that are merged. */
static PyObject *
part_of(const struct dcp_tree_node *nodes, uint32_t node)
{
    Py_ssize_t count = 0, i = 0;
    PyObject *names;

    if (nodes[node].next_alike == DCP_TREE_NONE) {
        return text_of(nodes[node].name);
    }
    for (uint32_t n = node; n != DCP_TREE_NONE; n = nodes[n].next_alike) {
        count++;
    }
    names = PyTuple_New(count);
    for (uint32_t n = node; names != NULL && n != DCP_TREE_NONE; n = nodes[n].next_alike) {
        PyObject *name = text_of(nodes[n].name);

        if (name == NULL) {
            Py_CLEAR(names);
        } else {
            PyTuple_SET_ITEM(names, i++, name);
        }
    }
    return names;
}

/* The names of a chain of single children, and its last node. */
static PyObject *
chain_of(const struct dcp_tree_node *nodes, uint32_t node, uint32_t *ret_last)
{
    PyObject *parts = PyList_New(0);

    while (parts != NULL) {
        PyObject *part = part_of(nodes, node);
        int rc = part == NULL ? -1 : PyList_Append(parts, part);

        Py_XDECREF(part);
        if (rc != 0) {
            Py_CLEAR(parts);
        } else if (!dcp_tree_is_link(&nodes[node])) {
            *ret_last = node;
            break;
        } else {
            node = nodes[node].first_child;
        }
    }
    return parts;
}

static PyObject *children_of(const struct key_tree_job *job, uint32_t node);

static PyObject *
row_of(const struct key_tree_job *job, uint32_t node)
{
    const struct dcp_tree_node *nodes = job->tree.nodes;
    uint32_t last = node;
    PyObject *parts = chain_of(nodes, node, &last), *children, *entry;

    children = parts == NULL ? NULL : children_of(job, last);
    if (children == NULL) {
        Py_XDECREF(parts);
        return NULL;
    }
    entry = nodes[last].key == DCP_TREE_NONE
                ? Py_None
                : PySequence_Fast_GET_ITEM(job->entries, (Py_ssize_t)nodes[last].key);
    return Py_BuildValue("(NOKIN)", parts, entry, (unsigned long long)nodes[node].bytes,
                         (unsigned int)nodes[last].rows_below, children);
}

static PyObject *
children_of(const struct key_tree_job *job, uint32_t node)
{
    const struct dcp_tree_node *nodes = job->tree.nodes;
    PyObject *rows = PyTuple_New((Py_ssize_t)nodes[node].children_count);
    Py_ssize_t i = 0;

    if (rows == NULL || Py_EnterRecursiveCall(" in a tree of keys") != 0) {
        Py_XDECREF(rows);
        return NULL;
    }
    for (uint32_t c = nodes[node].first_child; rows != NULL && c != DCP_TREE_NONE;
         c = nodes[c].next) {
        PyObject *row = row_of(job, c);

        if (row == NULL) {
            Py_CLEAR(rows);
        } else {
            PyTuple_SET_ITEM(rows, i++, row);
        }
    }
    Py_LeaveRecursiveCall();
    return rows;
}

PyDoc_STRVAR(
    key_tree_doc,
    "key_tree(entries, merge, /)\n--\n\n"
    "The keys of `entries`, as metadata_table gives these, as a tree: rows in the order of the "
    "keys, each (parts, entry, bytes, rows below, children).\n\n"
    "`parts`: what lies between dots, of a chain of single children; a tuple in place of a name "
    "stands for all whose names are in it: with `merge`, siblings with decimal numbers for names "
    "that agree in dtype, shape and all that is below them.  `entry`: that ends here, or None.  "
    "`bytes`: of all entries that the row stands for.  `rows below`: how many there are under it, "
    "at any depth.  NativeError with LIMIT for 16 million parts.");

static PyObject *
module_key_tree(PyObject *module, PyObject *args)
{
    struct module_state *state = PyModule_GetState(module);
    struct key_tree_job job = {0};
    PyObject *entries, *rows = NULL;
    struct dcp_error err;
    int merge;

    if (!PyArg_ParseTuple(args, "Op:key_tree", &entries, &merge)) {
        return NULL;
    }
    dcp_error_clear(&err);
    if (take_entries(&job, entries) == 0) {
        uint32_t count = (uint32_t)PySequence_Fast_GET_SIZE(job.entries);

        if (dcp_key_tree_build(job.keys, count, merge != 0, &job.tree, &err) != 0) {
            native_set_error(state->error_class, &err);
        } else {
            rows = children_of(&job, 0);
        }
    }
    job_clean_up(&job);
    return rows;
}

PyMethodDef key_tree_methods[] = {
    {"key_tree", module_key_tree, METH_VARARGS, key_tree_doc},
    {NULL, NULL, 0, NULL},
};

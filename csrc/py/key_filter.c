/*
 * key_filter.c: a leaf is selected when its name, or a part of it from the start to a dot, is one
 * of the names wanted, or when the predicate says so.
 *
 * Every such part is looked up in a hash set, so the cost per leaf is that of its components,
 * whatever the number of names.  None of the look-ups and no call of the predicate is left out when
 * the answer is known: each name has to learn whether it matches anything, for one that does not is
 * a typing error.
 */
#include "key_filter.h"

#include <string.h>

#include "dcp_plan.h"

int
key_filter_init(struct key_filter *filter, PyObject *names, PyObject *predicate)
{
    *filter = (struct key_filter){.names = names, .predicate = predicate};
    filter->touched = PyList_New(0);
    if (filter->touched == NULL) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++) {
        Py_ssize_t len;
        const char *name = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(names, i), &len);

        if (name == NULL || name_set_add(&filter->wanted, name, (size_t)len) < 0) {
            key_filter_clean_up(filter);
            return -1;
        }
    }
    return 0;
}

/* 1: the name, or a leading part of whole components, is wanted; 0; -1. */
static int
matches_names(struct key_filter *filter, const char *name, size_t len)
{
    int found = 0;

    for (size_t end = 0; end <= len; end++) {
        if ((end == len || name[end] == '.') && name_set_has(&filter->wanted, name, end)) {
            if (name_set_add(&filter->matched, name, end) < 0) {
                return -1;
            }
            found = 1;
        }
    }
    return found;
}

static int
ask_predicate(const struct key_filter *filter, const struct flatten_leaf *leaf)
{
    PyObject *name = PyUnicode_DecodeUTF8(leaf->fqn, (Py_ssize_t)leaf->fqn_len, NULL);
    PyObject *answer = name != NULL ? PyObject_CallOneArg(filter->predicate, name) : NULL;
    int is = answer != NULL ? PyObject_IsTrue(answer) : -1;

    Py_XDECREF(answer);
    Py_XDECREF(name);
    return is;
}

/* Notes the top-level key that a selected leaf lies under. */
static int
touch_top(struct key_filter *filter, const struct flatten_leaf *leaf)
{
    struct dcp_span top = {(const uint8_t *)leaf->fqn, leaf->fqn_len};
    PyObject *key;
    int rc;

    if (leaf->path != NULL) {
        struct dcp_cursor cursor = {.data = leaf->path, .len = leaf->path_len};
        uint64_t index;
        bool is_int;

        if (!dcp_path_next(&cursor, &is_int, &index, &top) || is_int) {
            PyErr_SetString(PyExc_SystemError, "a path of a state dict starts without a key");
            return -1;
        }
    }
    rc = name_set_add(&filter->tops, (const char *)top.data, top.len);
    if (rc <= 0) {
        return rc;
    }
    key = PyUnicode_DecodeUTF8((const char *)top.data, (Py_ssize_t)top.len, NULL);
    rc = key != NULL ? PyList_Append(filter->touched, key) : -1;
    Py_XDECREF(key);
    return rc;
}

int
key_filter_selects(struct key_filter *filter, const struct flatten_leaf *leaf)
{
    int selected = matches_names(filter, leaf->fqn, leaf->fqn_len);

    if (selected >= 0 && filter->predicate != NULL) {
        int is = ask_predicate(filter, leaf);

        selected = is < 0 ? -1 : selected | is;
    }
    if (selected > 0 && touch_top(filter, leaf) != 0) {
        return -1;
    }
    return selected;
}

PyObject *
key_filter_result(const struct key_filter *filter)
{
    PyObject *unmatched = PyList_New(0);

    for (Py_ssize_t i = 0; unmatched != NULL && i < PyTuple_GET_SIZE(filter->names); i++) {
        PyObject *item = PyTuple_GET_ITEM(filter->names, i);
        Py_ssize_t len;
        const char *name = PyUnicode_AsUTF8AndSize(item, &len);

        if (name == NULL || (!name_set_has(&filter->matched, name, (size_t)len) &&
                             PyList_Append(unmatched, item) != 0)) {
            Py_CLEAR(unmatched);
        }
    }
    return unmatched == NULL ? NULL : Py_BuildValue("(NO)", unmatched, filter->touched);
}

void
key_filter_clean_up(struct key_filter *filter)
{
    if (filter == NULL) {
        return;
    }
    name_set_clean_up(&filter->wanted);
    name_set_clean_up(&filter->matched);
    name_set_clean_up(&filter->tops);
    Py_XDECREF(filter->touched);
    memset(filter, 0, sizeof(*filter));
}

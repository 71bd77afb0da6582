/*
 * key_filter.h: which leaves of a state dict a load fills: names and prefixes of whole path
 * components, and a Python predicate.
 *
 * Thread rule: all functions need the GIL.
 */
#ifndef DCP_KEY_FILTER_H
#define DCP_KEY_FILTER_H

#include "flatten.h"
#include "name_set.h"

/* Zero-initialised is a valid filter that selects nothing. */
struct key_filter {
    PyObject *names;         /* borrows: tuple of str */
    PyObject *predicate;     /* borrows: called with every name; NULL: none */
    struct name_set wanted;  /* of names */
    struct name_set matched; /* those of wanted that a leaf was selected by */
    struct name_set tops;    /* top-level keys with selected leaves */
    PyObject *touched;       /* owned: list of the same */
};

/* 0 or -1 with an exception. */
int key_filter_init(struct key_filter *filter, PyObject *names, PyObject *predicate);
/* 1, 0, or -1 with an exception. */
int key_filter_selects(struct key_filter *filter, const struct flatten_leaf *leaf);
/* (list of names that matched no leaf, list of top-level keys with selected leaves); returns new.
 */
PyObject *key_filter_result(const struct key_filter *filter);
/* Idempotent. */
void key_filter_clean_up(struct key_filter *filter);

#endif

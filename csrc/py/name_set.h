/*
 * name_set.h: a set of names, to find duplicates and to ask which names were seen.
 *
 * Thread rule: one thread at a time; name_set_add needs the GIL to raise.
 */
#ifndef DCP_NAME_SET_H
#define DCP_NAME_SET_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dcp_alloc.h"

struct name_slot;

/* A set of names.  Zero-initialised is a valid empty one. */
struct name_set {
    struct dcp_buf text;
    struct name_slot *slots;
    size_t slots_count; /* power of two, 0 when empty */
    size_t names_count;
};

/* Makes room for about so many names; a hint, so running out of memory is no error here. */
void name_set_expect(struct name_set *set, size_t names_count);
/* 1 added, 0 was there, -1 with MemoryError. */
int name_set_add(struct name_set *set, const char *name, size_t len);
bool name_set_has(const struct name_set *set, const char *name, size_t len);
void name_set_clean_up(struct name_set *set);

#endif

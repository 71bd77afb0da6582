/*
 * load_report.c: which names were missing, unexpected, cast, resharded and so on.
 *
 * While targets are made a load sets one bit per entry of the metadata (load_targets.h); here those
 * bits become lists.  The names are copied as bytes, at most LISTED_NAMES of each list, because the
 * load, which holds tensors, must not live as long as its report, and because 20,000 Python strings
 * would cost more than the load.  All functions need the GIL.
 */
#include "load_report.h"

#include <string.h>

#include "dcp_alloc.h"

/* Names that a list shows; its count is always true. */
#define LISTED_NAMES 1000

static void
put_text(struct dcp_buf *buf, const char *text, size_t len)
{
    dcp_buf_put_u32(buf, (uint32_t)len);
    dcp_buf_put(buf, text, len);
}

void
load_names_add(struct load_names *names, const char *name, size_t len, uint64_t limit)
{
    if (names->count++ < limit) {
        put_text(&names->text, name, len);
    }
}

void
load_names_note(struct load_names *names, const char *name, size_t len)
{
    load_names_add(names, name, len, LISTED_NAMES);
}

static int
put_text_of(PyObject *dict, const char *name, const struct dcp_buf *buf)
{
    if (buf->failed) {
        PyErr_NoMemory();
        return -1;
    }
    return native_dict_put(
        dict, name, PyBytes_FromStringAndSize((const char *)buf->data, (Py_ssize_t)buf->len));
}

static int
put_names(PyObject *dict, const char *list, const char *count, const struct load_names *names)
{
    int rc = native_dict_put(dict, count, PyLong_FromUnsignedLongLong(names->count));

    return rc == 0 ? put_text_of(dict, list, &names->text) : rc;
}

/* Entries whose marks, under `mask`, are `marks`. */
static int
put_marked(PyObject *dict, const char *list, const char *count, const struct dcp_metadata *md,
           const uint16_t *entry_marks, uint16_t mask, uint16_t marks, uint64_t limit)
{
    struct load_names names = {0};
    int rc;

    for (uint64_t i = 0; i < md->entries_count; i++) {
        if ((entry_marks[i] & mask) == marks) {
            load_names_add(&names, md->strings + md->entries[i].name, md->entries[i].name_len,
                           limit);
        }
    }
    rc = put_names(dict, list, count, &names);
    dcp_buf_clean_up(&names.text);
    return rc;
}

static size_t
first_part_len(const char *name, size_t len)
{
    const char *dot = memchr(name, '.', len);

    return dot == NULL ? len : (size_t)(dot - name);
}

/* Runs of unexpected entries under the same top-level key; one key may have several runs. */
static int
put_unexpected_prefixes(PyObject *dict, const struct dcp_metadata *md, const uint16_t *entry_marks)
{
    struct dcp_buf text = {0};
    const char *prefix = NULL;
    size_t prefix_len = 0;
    uint64_t run = 0, runs = 0;
    int rc;

    for (uint64_t i = 0; i <= md->entries_count && runs < LISTED_NAMES; i++) {
        const struct dcp_md_entry *entry = i < md->entries_count ? &md->entries[i] : NULL;
        const char *name = entry != NULL ? md->strings + entry->name : NULL;
        size_t len = entry != NULL ? first_part_len(name, entry->name_len) : 0;

        if (entry != NULL && entry_marks[i] & LOAD_WANTED) {
            continue;
        }
        if (run > 0 &&
            (entry == NULL || len != prefix_len || memcmp(name, prefix, prefix_len) != 0)) {
            dcp_buf_put_u64(&text, run);
            put_text(&text, prefix, prefix_len);
            run = 0;
            runs++;
        }
        prefix = name;
        prefix_len = len;
        run++;
    }
    rc = put_text_of(dict, "unexpected_prefixes", &text);
    dcp_buf_clean_up(&text);
    return rc;
}

/* What only the finished plan knows. */
static void
mark_plan(const struct dcp_read_plan *plan, uint16_t *marks)
{
    for (uint64_t i = 0; i < plan->items_count; i++) {
        const struct dcp_read_item *item = &plan->items[i];
        uint16_t *mark = &marks[plan->targets[item->target].entry];

        if (!dcp_read_item_is_whole(plan, item)) {
            *mark |= LOAD_RESHARDED;
        }
        if (plan->md->chunks[item->chunk].transforms != 0) {
            *mark |= LOAD_TRANSFORMED;
        }
    }
    for (uint64_t i = 0; i < plan->targets_count; i++) {
        if (plan->targets[i].hole_bytes > 0) {
            marks[plan->targets[i].entry] |= LOAD_HOLED;
        }
    }
}

PyObject *
load_report(const struct load_targets *targets)
{
    static const struct {
        const char *list, *count;
        uint16_t mask, marks;
    } lists[] = {
        {"unexpected", "unexpected_count", LOAD_WANTED, 0},
        {"cast", "cast_count", LOAD_CAST, LOAD_CAST},
        {"replaced", "replaced_count", LOAD_REPLACED, LOAD_REPLACED},
        {"resharded", "resharded_count", LOAD_RESHARDED, LOAD_RESHARDED},
        {"transformed", "transformed_count", LOAD_TRANSFORMED, LOAD_TRANSFORMED},
        {"holes", "holes_count", LOAD_HOLED, LOAD_HOLED},
    };
    const struct dcp_metadata *md = targets->plan.md;
    PyObject *dict = PyDict_New();
    int rc = dict == NULL ? -1 : 0;

    if (rc == 0 && md != NULL) {
        mark_plan(&targets->plan, targets->marks);
        rc = put_names(dict, "missing", "missing_count", &targets->missing);
        rc = rc == 0 ? put_names(dict, "skipped", "skipped_count", &targets->skipped) : rc;
        for (size_t i = 0; rc == 0 && i < sizeof lists / sizeof lists[0]; i++) {
            rc = put_marked(dict, lists[i].list, lists[i].count, md, targets->marks, lists[i].mask,
                            lists[i].marks, LISTED_NAMES);
        }
        rc = rc == 0 ? put_unexpected_prefixes(dict, md, targets->marks) : rc;
        rc = rc == 0 ? native_dict_put(dict, "objects_count",
                                       PyLong_FromUnsignedLongLong(targets->plan.objects_count))
                     : rc;
    }
    if (rc != 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

static int
put_outcome(PyObject *dict, const struct load_targets *targets, const uint8_t *states,
            uint16_t *marks)
{
    enum { IS_FILLED = 1, IS_UNTOUCHED = 2, BOTH = IS_FILLED | IS_UNTOUCHED };
    const struct dcp_read_plan *plan = &targets->plan;
    int rc;

    for (uint64_t i = 0; i < plan->targets_count; i++) {
        marks[plan->targets[i].entry] |= states[i] == DCP_TARGET_FILLED      ? IS_FILLED
                                         : states[i] == DCP_TARGET_UNTOUCHED ? IS_UNTOUCHED
                                                                             : BOTH;
    }
    rc = put_marked(dict, "filled", "filled_count", plan->md, marks, BOTH, IS_FILLED, UINT64_MAX);
    if (rc == 0) {
        rc = put_marked(dict, "partly", "partly_count", plan->md, marks, BOTH, BOTH, UINT64_MAX);
    }
    if (rc == 0) {
        rc = put_marked(dict, "untouched", "untouched_count", plan->md, marks, BOTH, IS_UNTOUCHED,
                        UINT64_MAX);
    }
    return rc;
}

PyObject *
load_outcome(const struct load_targets *targets, enum dcp_target_state objects)
{
    const struct dcp_read_plan *plan = &targets->plan;
    uint8_t *states = dcp_calloc(dcp_max_u64(plan->targets_count, 1), sizeof *states);
    uint16_t *marks =
        dcp_calloc(plan->md != NULL ? dcp_max_u64(plan->md->entries_count, 1) : 1, sizeof *marks);
    PyObject *dict = PyDict_New();
    struct dcp_error err;
    int rc = -1;

    dcp_error_clear(&err);
    if (states == NULL || marks == NULL || dict == NULL ||
        dcp_read_plan_states(plan, objects, states, &err) != 0) {
        PyErr_NoMemory();
    } else {
        rc = plan->md != NULL ? put_outcome(dict, targets, states, marks) : 0;
    }
    dcp_free(marks);
    dcp_free(states);
    if (rc != 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

/*
 * save_info.c: what is known of a save, as Python sees it: the names of its outcomes, and a dict.
 *
 * Outcomes travel between the ranks of a background save by these names.
 */
#include "save_info.h"

#include <stddef.h>

#include "native_state.h"

static const char *const outcome_names[] = {
    [DCP_OUTCOME_UNKNOWN] = "unknown",
    [DCP_OUTCOME_COMMITTED] = "committed",
    [DCP_OUTCOME_ABORTED] = "aborted",
    [DCP_OUTCOME_SUPERSEDED] = "superseded",
};

const char *
save_outcome_name(enum dcp_outcome outcome)
{
    return outcome_names[outcome];
}

int
save_outcome_parse(PyObject *name, enum dcp_outcome *ret_outcome)
{
    for (int i = DCP_OUTCOME_UNKNOWN; i <= DCP_OUTCOME_SUPERSEDED; i++) {
        if (PyUnicode_Check(name) &&
            PyUnicode_CompareWithASCIIString(name, outcome_names[i]) == 0) {
            *ret_outcome = (enum dcp_outcome)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "%R is not the outcome of a save", name);
    return -1;
}

#define OF_SAVE(field) {#field, offsetof(struct dcp_save_info, field)}
#define OF_WRITER(field) {#field, offsetof(struct dcp_save_info, write.field)}

static const struct native_number numbers[] = {
    OF_SAVE(n0),
    {"metadata_bytes", offsetof(struct dcp_save_info, metadata.len)},
    OF_SAVE(kept_items),
    OF_SAVE(kept_bytes),
    OF_SAVE(cut_items),
    OF_SAVE(dropped_items),
    OF_SAVE(dropped_bytes),
    OF_SAVE(swept_files),
    OF_SAVE(reused_items),
    OF_SAVE(reused_bytes),
    OF_SAVE(linked_files),
    OF_SAVE(compared_items),
    OF_SAVE(unchanged_items),
    OF_SAVE(unchanged_bytes),
    OF_SAVE(trainable_items),
    OF_SAVE(trainable_bytes),
    OF_SAVE(trainable_unchanged),
    OF_SAVE(vote_ns),
    OF_SAVE(plan_ns),
    OF_SAVE(hash_ns),
    OF_SAVE(compare_ns),
    OF_SAVE(metadata_ns),
    OF_SAVE(write_ns),
    OF_SAVE(commit_ns),
    OF_SAVE(stage_ns),
    OF_SAVE(stage_begin_ns),
    OF_SAVE(staged_bytes),
    OF_SAVE(arena_bytes),
    OF_SAVE(planned_bytes),
    OF_SAVE(ranks_bytes),
    OF_WRITER(file_bytes),
    OF_WRITER(payload_bytes),
    OF_WRITER(files_count),
    OF_WRITER(direct_files_count),
    OF_WRITER(direct_files_mask),
    OF_WRITER(queue_writes_count),
    OF_WRITER(copy_ns),
    OF_WRITER(sync_ns),
    OF_WRITER(limited_ns),
    OF_WRITER(ring_bytes),
    OF_WRITER(priority_failures),
};

PyObject *
save_info_as_dict(const struct dcp_save_info *info, uint64_t progress_bytes)
{
    const char *reason = info->base_reason[0] == '\0' ? NULL : info->base_reason;
    char id[2 * sizeof info->save_id.bytes + 1];
    PyObject *dict;

    for (size_t i = 0; i < sizeof info->save_id.bytes; i++) {
        PyOS_snprintf(id + 2 * i, 3, "%02x", info->save_id.bytes[i]);
    }
    dict = Py_BuildValue("{sssssOsOsOsOsOsOsz}", "save_id", id, "outcome",
                         save_outcome_name(info->outcome), "fast", info->fast ? Py_True : Py_False,
                         "call_agrees", info->call_agrees ? Py_True : Py_False, "is_coordinator",
                         info->is_coordinator ? Py_True : Py_False, "incremental",
                         info->incremental ? Py_True : Py_False, "planned_outside",
                         info->planned_outside ? Py_True : Py_False, "elsewhere",
                         info->elsewhere ? Py_True : Py_False, "base_reason", reason);
    if (dict != NULL &&
        (native_dict_put(dict, "progress_bytes", PyLong_FromUnsignedLongLong(progress_bytes)) !=
             0 ||
         native_dict_put_numbers(dict, info, numbers, sizeof numbers / sizeof numbers[0]) != 0)) {
        Py_CLEAR(dict);
    }
    return dict;
}

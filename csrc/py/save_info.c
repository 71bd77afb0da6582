/*
 * save_info.c: what is known of a save, as Python sees it: the names of its outcomes, and a dict.
 *
 * Outcomes travel between the ranks of a background save by these names.
 */
#include "save_info.h"

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

PyObject *
save_info_as_dict(const struct dcp_save_info *info, uint64_t progress_bytes)
{
    char id[2 * sizeof info->save_id.bytes + 1];

    for (size_t i = 0; i < sizeof info->save_id.bytes; i++) {
        PyOS_snprintf(id + 2 * i, 3, "%02x", info->save_id.bytes[i]);
    }
    return Py_BuildValue(
        "{sssKsssOsOsOsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsK}", "save_id", id, "n0",
        (unsigned long long)info->n0, "outcome", save_outcome_name(info->outcome), "fast",
        info->fast ? Py_True : Py_False, "call_agrees", info->call_agrees ? Py_True : Py_False,
        "is_coordinator", info->is_coordinator ? Py_True : Py_False, "kept_items",
        (unsigned long long)info->kept_items, "kept_bytes", (unsigned long long)info->kept_bytes,
        "cut_items", (unsigned long long)info->cut_items, "dropped_items",
        (unsigned long long)info->dropped_items, "dropped_bytes",
        (unsigned long long)info->dropped_bytes, "swept_files",
        (unsigned long long)info->swept_files, "vote_ns", (unsigned long long)info->vote_ns,
        "plan_ns", (unsigned long long)info->plan_ns, "metadata_ns",
        (unsigned long long)info->metadata_ns, "write_ns", (unsigned long long)info->write_ns,
        "commit_ns", (unsigned long long)info->commit_ns, "file_bytes",
        (unsigned long long)info->write.file_bytes, "payload_bytes",
        (unsigned long long)info->write.payload_bytes, "files_count",
        (unsigned long long)info->write.files_count, "direct_files_count",
        (unsigned long long)info->write.direct_files_count, "copy_ns",
        (unsigned long long)info->write.copy_ns, "sync_ns", (unsigned long long)info->write.sync_ns,
        "ring_bytes", (unsigned long long)info->write.ring_bytes, "progress_bytes",
        (unsigned long long)progress_bytes);
}

/*
 * load_targets.h: where a load puts what it reads: the targets of a read plan, from the target
 * state dict and the checkpoint's metadata.
 */
#ifndef DCP_LOAD_TARGETS_H
#define DCP_LOAD_TARGETS_H

#include "device_set.h"
#include "native_state.h"

#include "dcp_engine.h"

struct key_filter;

struct load_targets_options {
    bool flatten_state_dict;
    bool flatten_sharded_tensors;
    bool allow_partial_load;
    struct key_filter *filter;   /* borrows; NULL: every leaf is loaded */
    struct device_set **devices; /* of targets that are filled there; NULL: torch fills them */
};

/* What a load wants of an entry of the metadata; bits of load_targets.marks. */
enum load_mark {
    LOAD_WANTED = 1, /* a leaf has its name, be it selected or not */
    LOAD_CAST = 2,
    LOAD_REPLACED = 4, /* a tensor target that a saved object replaces */
    LOAD_RESHARDED = 8,
    LOAD_TRANSFORMED = 16,
    LOAD_HOLED = 32,
};

/* Names for a report: the first ones, u32 length and UTF-8 each, and how many there are. */
struct load_names {
    struct dcp_buf text;
    uint64_t count;
};

/* Failure to find memory stays in text.failed. */
void load_names_add(struct load_names *names, const char *name, size_t len, uint64_t limit);
/* The same with the limit of reports. */
void load_names_note(struct load_names *names, const char *name, size_t len);

/* Zero-initialised is valid. */
struct load_targets {
    struct dcp_read_plan plan; /* targets are added, overlaps not yet looked for */
    /* Parallel to plan.targets: the tensor of exactly the target's box, or None for objects.  Keeps
     * memory alive; what is handed over, and records that only torch can read, are copied there. */
    PyObject *tensors;
    PyObject *objects; /* list of (target index, fqn, path tuple or None without flattening) */
    struct dcp_bump strides;
    /* For reports. */
    uint64_t straight_count; /* targets read straight into the caller's memory */
    uint64_t cast_count;     /* targets of another dtype than saved */
    uint64_t copies_count;   /* targets filled by torch's copy_ */
    uint64_t device_count;   /* targets on devices, filled without torch */
    uint64_t missing_count;  /* wanted, not in the checkpoint (allow_partial_load) */
    uint64_t replaced_count; /* tensor targets that a saved object replaces */
    uint16_t *marks;         /* owned: enum load_mark bits of each entry */
    struct load_names missing;
    struct load_names skipped; /* leaves that the filter did not select */
    bool is_v_2_3;             /* the checkpoint's keys are those of torch 2.3's flattening */
};

/* As torch's create_default_local_load_plan, with its exceptions and texts.  Meta tensors have been
 * materialised by the caller (state_dict_has_meta).  `md` must outlive the targets. */
int load_targets_build(struct native_state *state, const struct dcp_metadata *md,
                       PyObject *state_dict, const struct load_targets_options *options,
                       struct load_targets *ret);
/* Idempotent; needs the GIL. */
void load_targets_clean_up(struct load_targets *targets);

/* 0 and the strides in `unit_bytes` per element (NULL when row major), from `bump`; or -1. */
int load_strides(struct dcp_bump *bump, const struct dcp_tensor_view *view, uint32_t unit_bytes,
                 const int64_t **ret);
/* Whether the reader can write a tensor's memory itself, of elements saved as `saved_dtype`. */
bool load_is_memory(enum dcp_tensor_class tensor_class, const struct dcp_tensor_view *view,
                    int saved_dtype);

/* Whether torch's _init_state_dict has something to do: 1, 0, or -1 with an exception. */
int state_dict_has_meta(struct native_state *state, PyObject *state_dict);

#endif

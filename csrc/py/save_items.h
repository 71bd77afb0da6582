/*
 * save_items.h: what this rank would write for a state dict: the plan's items and, parallel to
 * them, where their bytes lie.
 */
#ifndef DCP_SAVE_ITEMS_H
#define DCP_SAVE_ITEMS_H

#include "device_set.h"
#include "native_state.h"

#include "dcp_engine.h"
#include "dcp_plan.h"

struct save_items_options {
    uint32_t rank;         /* group rank */
    uint32_t thread_count; /* of the writer */
    bool single_file_per_rank;
    bool flatten_state_dict;
    bool flatten_sharded_tensors;
    /* Where to note the devices of sources that stay on one; NULL: torch copies those to the host.
     */
    struct device_set **devices;
};

/* Zero-initialised is valid.  Sources borrow from `keepalive`, `strides` and `blocks`; they stay
 * valid until clean-up even when `plan` was moved away (dcp_save_set_plan takes a copy of the
 * struct: zero `plan` afterwards). */
struct save_items {
    struct dcp_plan plan;
    struct dcp_source *sources; /* owned; parallel to plan.items */
    uint32_t sources_count, sources_cap;
    PyObject *keepalive;     /* list of tensors whose memory is read */
    struct dcp_bump strides; /* byte strides of sources */
    uint8_t **blocks;        /* owned dcp_malloc blocks: finished records */
    uint32_t blocks_count, blocks_cap;
    /* For reports. */
    uint64_t tensors_count, dtensors_count; /* read straight from their memory */
    uint64_t python_count;                  /* items that torch's own functions described */
    uint64_t copied_count, copied_bytes;    /* by torch, first: other devices, lazy conjugates */
    uint64_t device_count, device_bytes; /* stay on their device until they are staged or written */
    uint64_t records_count;              /* tensors serialised by torch.save */
    uint64_t objects_count, objects_bytes;
};

/* -1 with a Python exception, the one that torch's planner raises where it refuses too; *ret is
 * then empty. */
int save_items_build(struct native_state *state, PyObject *state_dict,
                     const struct save_items_options *options, struct save_items *ret);
/* The same of torch's WriteItems: resolve(item) gives the data of each, in their order.  The plan
 * has neither boxes nor paths; what an item is to be called is the caller's to say. */
int save_items_build_given(struct native_state *state, PyObject *write_items, PyObject *resolve,
                           const struct save_items_options *options, struct save_items *ret);
/* Idempotent; needs the GIL. */
void save_items_clean_up(struct save_items *items);

#endif

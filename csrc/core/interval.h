/*
 * interval.h: private: which chunks of one saved tensor may overlap a box, and how much of a box a
 * set of boxes covers.
 */
#ifndef DCP_INTERVAL_H
#define DCP_INTERVAL_H

#include "dcp_metadata.h"

/* Chunks of one entry, sorted by where they start in the dim that tells them apart best. */
struct dcp_interval_index {
    struct dcp_interval_key {
        uint64_t start;
        uint64_t max_end; /* greatest end of this and all earlier keys: grows with the position */
        uint64_t chunk;   /* index in metadata chunks */
    } *keys;              /* owned */
    uint64_t keys_count, keys_cap;
    uint64_t entry; /* index in metadata entries that the keys belong to */
    uint32_t dim;   /* the sweep dim; 0 for 0-d tensors, whose keys are all [0, 1) */
    bool built;
};

/* Replaces the index by that of `entry`; nothing to do when it is there.  DCP_E_CORRUPT when a
 * chunk's end overflows. */
int dcp_interval_build(struct dcp_interval_index *index, const struct dcp_metadata *md,
                       uint64_t entry, struct dcp_error *err) DCP_MUST_CHECK;
/* Keys [*ret_first, *ret_last) hold every chunk that meets [start, end) in the sweep dim. */
void dcp_interval_query(const struct dcp_interval_index *index, uint64_t start, uint64_t end,
                        uint64_t *ret_first, uint64_t *ret_last);
void dcp_interval_clean_up(struct dcp_interval_index *index);

/* `boxes_count` boxes of 2 * ndim numbers each: offsets, then sizes; none is empty. */
struct dcp_box_list {
    const uint64_t *numbers;
    uint64_t boxes_count;
    uint32_t ndim;
};

/* Whether no two of the boxes share an element.  Boxes are sorted by their start in `dim`. */
bool dcp_boxes_are_disjoint(const struct dcp_box_list *list, uint32_t dim);
/* Elements in at least one of the boxes.  For boxes that do overlap: slab by slab, dim by dim. */
int dcp_boxes_union_volume(const struct dcp_box_list *list, uint64_t *ret_volume,
                           struct dcp_error *err) DCP_MUST_CHECK;

#endif

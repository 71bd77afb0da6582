/*
 * device_set.h: the devices that tensors of one save or load lie on: lent, and in step with the
 * caller's streams.
 */
#ifndef DCP_PY_DEVICE_SET_H
#define DCP_PY_DEVICE_SET_H

#include <sys/types.h>

#include "native_state.h"

#include "dcp_device.h"

/* A host has 16 at most; of more the rest is copied by torch. */
enum { DEVICE_SET_MAX = 64, DEVICE_SET_REASON_BYTES = 256 };

/* Made by the first tensor that lies on a device; NULL stands for none, in every function. */
struct device_set {
    const struct native_state *state; /* borrows */
    struct dcp_device *items[DEVICE_SET_MAX];
    struct dcp_device_list list; /* of items */
    bool given_back;
    uint64_t refused; /* bit i: device i can not be used */
    pid_t pid;        /* a forked child gives nothing back */
    /* Of tensors that torch copied for want of a better way. */
    uint64_t refused_count, refused_bytes;
    char reason[DEVICE_SET_REASON_BYTES]; /* why, the first one; "" */
};

/* For memory on CUDA device `index`: 1 and its number, 1 + index in the list, when it was lent and
 * follows the caller's current stream; 0 when torch has to copy, and why is noted; -1 with an
 * exception, as while a CUDA graph is captured. */
int device_set_find(struct device_set **set, const struct native_state *state, int32_t index,
                    uint32_t *ret_number);
/* Notes a tensor that torch has to copy; `why` where that is not known yet, or NULL. */
void device_set_refuse(struct device_set *set, uint64_t bytes, const char *why);

/* Asks the devices for direct reads from storage.  Where one cannot: noted, or with `must` an
 * exception; 0 or -1. */
int device_set_use_files(struct device_set *set, bool must);

/* Our streams wait for what the caller's current streams hold by now, and the other way round.  0
 * or -1 with an exception.  On the caller's thread. */
int device_set_follow(struct device_set *set);
int device_set_lead(struct device_set *set);

/* The list; NULL without devices, and once they were given back. */
const struct dcp_device_list *device_set_list(const struct device_set *set);

/* Puts what is known of the devices, and what they did, into a dict for a report: 0 or -1. */
int device_set_report(const struct device_set *set, const struct dcp_device_stats *stats,
                      PyObject *dict);

/* When nothing of ours is on their streams any more.  What is known of them stays.  Idempotent. */
void device_set_give_back(struct device_set *set);
/* Idempotent. */
void device_set_clean_up(struct device_set **set);

#endif

/*
 * save_record.h: ready-made records: objects, and tensors that only torch.save can write.
 */
#ifndef DCP_SAVE_RECORD_H
#define DCP_SAVE_RECORD_H

#include "native_state.h"

#include "dcp_alloc.h"

/* The record of an object, padded to its slot.  *ret_block is a dcp_malloc block of
 * *ret_slot_bytes. */
int save_record_object(const struct native_state *state, PyObject *object, uint8_t **ret_block,
                       uint64_t *ret_slot_bytes);

/* The record that torch.save makes of a tensor on the CPU, as it is. */
int save_record_tensor(const struct native_state *state, PyObject *tensor, uint8_t **ret_block,
                       uint64_t *ret_bytes);

#endif

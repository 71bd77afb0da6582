/*
 * comm_bytes.h: the variable-size all-gather, private to the core (the failure exchange uses it).
 */
#ifndef DCP_CORE_COMM_BYTES_H
#define DCP_CORE_COMM_BYTES_H

#include "dcp_comm.h"

/* As dcp_comm_gather_bytes, with the result on every rank. */
int dcp_comm_all_gather_bytes(const struct dcp_comm *comm, const uint8_t *data, size_t len,
                              uint8_t **ret_block, struct dcp_span **ret_spans,
                              struct dcp_error *err) DCP_MUST_CHECK;

#endif

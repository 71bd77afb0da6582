/*
 * comm_bytes.h: messages between ranks that more than one file of the core reads: the variable-size
 * all-gather, and the record of a failure.
 */
#ifndef DCP_CORE_COMM_BYTES_H
#define DCP_CORE_COMM_BYTES_H

#include "dcp_comm.h"

/* As dcp_comm_gather_bytes, with the result on every rank. */
int dcp_comm_all_gather_bytes(const struct dcp_comm *comm, const uint8_t *data, size_t len,
                              uint8_t **ret_block, struct dcp_span **ret_spans,
                              struct dcp_error *err) DCP_MUST_CHECK;

/* A failure as it travels: its kind (one byte), then its bytes.  ECHO stays in the kind. */
int dcp_failure_decode(uint32_t rank, const struct dcp_span *record,
                       struct dcp_failure *ret_failure, struct dcp_error *err) DCP_MUST_CHECK;

#endif

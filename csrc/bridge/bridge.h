/*
 * bridge.h: what the sources of `_bridge` share: the functions that its table holds.
 *
 * The contracts are in dcp_bridge.h.
 */
#ifndef DCP_BRIDGE_PRIVATE_H
#define DCP_BRIDGE_PRIVATE_H

#include "dcp_bridge.h"

namespace dcp_bridge
{

int tensor_view(void *object, struct dcp_tensor_view *ret) noexcept;
uint8_t *tensor_mutable_data(void *object) noexcept;
int comm_from_group(void *process_group, struct dcp_comm *ret_comm, struct dcp_error *err) noexcept;
int store_from_group(void *process_group, struct dcp_store *ret_store,
                     struct dcp_error *err) noexcept;
int nccl_comm_of_group(void *process_group, struct dcp_bridge_nccl *ret,
                       struct dcp_error *err) noexcept;

} // namespace dcp_bridge

#endif

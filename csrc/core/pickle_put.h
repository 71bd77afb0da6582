/*
 * pickle_put.h: data.pkl of a tensor at a raw address; shared by pickle_put.c and record_write.c.
 */
#ifndef PICKLE_PUT_H
#define PICKLE_PUT_H

#include "dcp_common.h"

/* Exactly what pickle_tensor_write writes.  A few additions and products per dimension. */
uint64_t pickle_tensor_bytes(int dtype, uint32_t ndim, const uint64_t *sizes);
/* Returns the address behind the last byte. */
uint8_t *pickle_tensor_write(uint8_t *at, int dtype, uint32_t ndim, const uint64_t *sizes);

#endif

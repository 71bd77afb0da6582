/*
 * io_map.h: private: bytes of the page cache lent to their reader; the calls of dcp_io's table.
 */
#ifndef DCP_IO_MAP_H
#define DCP_IO_MAP_H

#include "dcp_io.h"

int dcp_map_lend(void *ctx, int fd, uint64_t offset, size_t len, const uint8_t **ret);
int dcp_map_return(void *ctx, const uint8_t *bytes, size_t len);

#endif

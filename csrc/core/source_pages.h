/*
 * source_pages.h: private: sources that are pages of a mapped file.
 */
#ifndef SOURCE_PAGES_H
#define SOURCE_PAGES_H

#include "dcp_engine.h"

static inline bool
source_is_mapped(const struct dcp_engine_options *options, const uint8_t *data, uint64_t len)
{
    return data >= options->mapped_from && data < options->mapped_to &&
           len <= (uint64_t)(options->mapped_to - data);
}

/* Brings `len` bytes in, and has those behind them read ahead.  DCP_E_IO where the file does not
 * give them: touching them would be SIGBUS. */
int source_pages_need(const struct dcp_engine_options *options, const uint8_t *data, uint64_t len,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* Takes pages that were copied off the process: those of the file stay in the page cache, and come
 * back when they are touched. */
void source_pages_done(const uint8_t *data, uint64_t len);

#endif

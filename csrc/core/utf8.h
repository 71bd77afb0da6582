/*
 * utf8.h: is a text what Python accepts as one?
 */
#ifndef DCP_UTF8_H
#define DCP_UTF8_H

#include "dcp_common.h"

enum dcp_utf8 {
    DCP_UTF8_VALID,
    DCP_UTF8_SURROGATES, /* otherwise valid: pickle allows it, strict UTF-8 does not */
    DCP_UTF8_INVALID,
};

enum dcp_utf8 dcp_utf8_check(const void *text, size_t len);

#endif

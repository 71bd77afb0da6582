/*
 * json.h: a bounded pull reader of JSON text (private to the core).
 *
 * The caller says what it expects next, so nothing is built that nobody asked for and no nesting
 * but that of skipped values is followed.  RFC 8259 to the letter: no comments, no trailing commas,
 * no NaN, no lone surrogates.
 */
#ifndef DCP_CORE_JSON_H
#define DCP_CORE_JSON_H

#include "dcp_alloc.h"

struct dcp_json {
    const uint8_t *text; /* borrows; checked to be UTF-8 by the caller */
    size_t len, pos;
    const char *failed; /* what was wrong at `pos`; NULL: nothing so far.  The first one stays. */
    bool no_memory;     /* `failed`, and not for anything in the text */
};

/* Takes an opening bracket, '{' or '['. */
bool dcp_json_open(struct dcp_json *json, char bracket);
/* Whether another member follows, before which its comma is taken; false: `close` was taken, or
 * `failed` is set.  *first starts true. */
bool dcp_json_more(struct dcp_json *json, char close, bool *first);
/* A decoded copy in `bump`, not terminated. */
bool dcp_json_string(struct dcp_json *json, struct dcp_bump *bump, const char **ret,
                     size_t *ret_len);
/* The same and the colon behind it. */
bool dcp_json_key(struct dcp_json *json, struct dcp_bump *bump, const char **ret, size_t *ret_len);
/* A number that is written as a whole one and fits. */
bool dcp_json_u64(struct dcp_json *json, uint64_t *ret);
/* Takes a `null` if one follows. */
bool dcp_json_null(struct dcp_json *json);
/* Steps over a value of any kind, nested at most DCP_MAX_JSON_DEPTH deep. */
bool dcp_json_skip(struct dcp_json *json);
/* Nothing but white space is left. */
bool dcp_json_end(struct dcp_json *json);
/* Fails where the reader stands; returns false. */
bool dcp_json_fail(struct dcp_json *json, const char *what);

#endif

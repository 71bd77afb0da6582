/*
 * utf8.c: one pass over a text, eight bytes at a time while they are ASCII.
 *
 * Overlong forms, numbers above U+10FFFF and cut sequences are invalid, as in Python's decoder.
 *
 * Threads: no state.
 */
#include "utf8.h"

#include <string.h>

#define HIGH_BITS UINT64_C(0x8080808080808080)

/* Length of the sequence that starts with this byte and the least number it may stand for; 0 when
 * no sequence starts so. */
static size_t
sequence(uint8_t first, uint32_t *ret_least)
{
    if (first < 0xC2 || first > 0xF4) {
        return 0;
    }
    size_t len = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    *ret_least = len == 2 ? 0x80 : len == 3 ? 0x800 : 0x10000;
    return len;
}

enum dcp_utf8
dcp_utf8_check(const void *text, size_t len)
{
    const uint8_t *at = text;
    const uint8_t *end = at + len;
    enum dcp_utf8 result = DCP_UTF8_VALID;
    while (at < end) {
        uint64_t word;
        if (end - at >= (ptrdiff_t)sizeof word) {
            memcpy(&word, at, sizeof word);
            if ((word & HIGH_BITS) == 0) {
                at += sizeof word;
                continue;
            }
        }
        if (*at < 0x80) {
            at++;
            continue;
        }
        uint32_t least = 0;
        size_t n = sequence(*at, &least);
        if (n == 0 || (size_t)(end - at) < n) {
            return DCP_UTF8_INVALID;
        }
        uint32_t number = *at & (0x7Fu >> n);
        for (size_t i = 1; i < n; i++) {
            if ((at[i] & 0xC0) != 0x80) {
                return DCP_UTF8_INVALID;
            }
            number = number << 6 | (at[i] & 0x3Fu);
        }
        if (number < least || number > 0x10FFFF) {
            return DCP_UTF8_INVALID;
        }
        if (number >= 0xD800 && number <= 0xDFFF) {
            result = DCP_UTF8_SURROGATES;
        }
        at += n;
    }
    return result;
}

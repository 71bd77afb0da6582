/*
 * json.c: a bounded pull reader of JSON text.
 *
 * Memory is what decoded strings take, at most the text's length; time is linear.  Only skipping
 * recurses, and counts how deep.
 *
 * Invariant: pos <= len.  Threads: no state but the reader's own.
 */
#include "json.h"

#include <string.h>

#include "dcp_limits.h"

bool
dcp_json_fail(struct dcp_json *json, const char *what)
{
    if (json->failed == NULL) {
        json->failed = what;
    }
    return false;
}

static void
skip_space(struct dcp_json *json)
{
    while (json->pos < json->len) {
        uint8_t c = json->text[json->pos];
        if (c != ' ' && c != '\t' && c != '\n' && c != '\r') {
            break;
        }
        json->pos++;
    }
}

/* The next byte, or 0 at the end. */
static uint8_t
peek(const struct dcp_json *json)
{
    return json->pos < json->len ? json->text[json->pos] : 0;
}

static bool
is_digit(uint8_t c)
{
    return c >= '0' && c <= '9';
}

static bool
take_word(struct dcp_json *json, const char *word)
{
    size_t n = strlen(word);
    if (json->len - json->pos < n || memcmp(json->text + json->pos, word, n) != 0) {
        return false;
    }
    json->pos += n;
    return true;
}

/* ---- strings ---- */

/* Four hex digits; UINT32_MAX when they are none. */
static uint32_t
take_hex(struct dcp_json *json)
{
    uint32_t value = 0;
    if (json->len - json->pos < 4) {
        return UINT32_MAX;
    }
    for (size_t i = 0; i < 4; i++) {
        uint8_t c = json->text[json->pos + i];
        uint8_t lower = c | 0x20;
        if (!is_digit(c) && (lower < 'a' || lower > 'f')) {
            return UINT32_MAX;
        }
        value = value << 4 | (is_digit(c) ? c - (uint32_t)'0' : lower - (uint32_t)'a' + 10);
    }
    json->pos += 4;
    return value;
}

/* What stands behind \u, a pair of surrogates included. */
static bool
take_unicode(struct dcp_json *json, uint32_t *ret)
{
    uint32_t number = take_hex(json);
    if (number >= 0xD800 && number <= 0xDBFF) {
        uint32_t low = take_word(json, "\\u") ? take_hex(json) : UINT32_MAX;
        if (low < 0xDC00 || low > 0xDFFF) {
            return dcp_json_fail(json, "half a surrogate pair");
        }
        number = 0x10000 + ((number - 0xD800) << 10) + (low - 0xDC00);
    } else if (number > 0xFFFF || (number >= 0xDC00 && number <= 0xDFFF)) {
        return dcp_json_fail(json, "a \\u escape that stands for no character");
    }
    *ret = number;
    return true;
}

/* At most 4 bytes; fewer than the escape took. */
static size_t
put_utf8(char *at, uint32_t number)
{
    if (number < 0x80) {
        at[0] = (char)number;
        return 1;
    }
    size_t n = number < 0x800 ? 2 : number < 0x10000 ? 3 : 4;
    for (size_t i = n; i > 1; i--) {
        at[i - 1] = (char)(0x80 | (number & 0x3F));
        number >>= 6;
    }
    at[0] = (char)((0xF00u >> n) | number);
    return n;
}

/* The character behind a backslash; puts what it stands for. */
static bool
take_escape(struct dcp_json *json, char *at, size_t *ret_bytes)
{
    static const char escapes[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    uint8_t c = peek(json);
    const char *found = c == 0 ? NULL : strchr(escapes, c);
    if (found != NULL) {
        json->pos++;
        *at = values[found - escapes];
        *ret_bytes = 1;
        return true;
    }
    uint32_t number;
    if (c != 'u') {
        return dcp_json_fail(json, "an unknown escape in a string");
    }
    json->pos++;
    if (!take_unicode(json, &number)) {
        return false;
    }
    *ret_bytes = put_utf8(at, number);
    return true;
}

/* The position of the quote that ends the string which begins at `pos`; `len` when there is none.
 */
static size_t
find_quote(const struct dcp_json *json)
{
    size_t at = json->pos;
    while (at < json->len && json->text[at] != '"') {
        at += json->text[at] == '\\' ? 2 : 1;
    }
    return at < json->len ? at : json->len;
}

bool
dcp_json_string(struct dcp_json *json, struct dcp_bump *bump, const char **ret, size_t *ret_len)
{
    skip_space(json);
    if (peek(json) != '"') {
        return dcp_json_fail(json, "a string was expected");
    }
    json->pos++;
    size_t end = find_quote(json);
    if (end == json->len) {
        return dcp_json_fail(json, "a string does not end");
    }
    char *text = dcp_bump_alloc(bump, end - json->pos + 1, 1);
    if (text == NULL) {
        json->no_memory = true;
        return dcp_json_fail(json, "out of memory for a string");
    }
    size_t len = 0;
    while (json->pos < end) {
        uint8_t c = json->text[json->pos];
        size_t n = 1;
        if (c < 0x20) {
            return dcp_json_fail(json, "a control character in a string");
        }
        json->pos++;
        if (c != '\\') {
            text[len] = (char)c;
        } else if (!take_escape(json, text + len, &n)) {
            return false;
        }
        len += n;
    }
    json->pos++;
    *ret = text;
    *ret_len = len;
    return true;
}

bool
dcp_json_key(struct dcp_json *json, struct dcp_bump *bump, const char **ret, size_t *ret_len)
{
    if (!dcp_json_string(json, bump, ret, ret_len)) {
        return false;
    }
    skip_space(json);
    if (peek(json) != ':') {
        return dcp_json_fail(json, "a colon was expected");
    }
    json->pos++;
    return true;
}

/* ---- containers ---- */

bool
dcp_json_open(struct dcp_json *json, char bracket)
{
    skip_space(json);
    if (peek(json) != (uint8_t)bracket) {
        return dcp_json_fail(json,
                             bracket == '{' ? "an object was expected" : "a list was expected");
    }
    json->pos++;
    return true;
}

bool
dcp_json_more(struct dcp_json *json, char close, bool *first)
{
    if (json->failed != NULL) {
        return false;
    }
    skip_space(json);
    if (peek(json) == (uint8_t)close) {
        json->pos++;
        return false;
    }
    if (!*first && peek(json) != ',') {
        return dcp_json_fail(json, "a comma or a closing bracket was expected");
    }
    json->pos += *first ? 0 : 1;
    *first = false;
    return true;
}

/* ---- numbers and other values ---- */

bool
dcp_json_u64(struct dcp_json *json, uint64_t *ret)
{
    uint64_t value = 0;
    skip_space(json);
    size_t start = json->pos;
    while (is_digit(peek(json))) {
        if (dcp_mul_overflows_u64(value, 10, &value) ||
            dcp_add_overflows_u64(value, (uint64_t)(peek(json) - '0'), &value)) {
            return dcp_json_fail(json, "a number does not fit into 64 bits");
        }
        json->pos++;
    }
    uint8_t next = peek(json);
    bool zeros = json->pos - start > 1 && json->text[start] == '0';
    if (json->pos == start || zeros || next == '.' || next == 'e' || next == 'E') {
        return dcp_json_fail(json, "a whole number was expected");
    }
    *ret = value;
    return true;
}

static bool
skip_digits(struct dcp_json *json)
{
    size_t start = json->pos;
    while (is_digit(peek(json))) {
        json->pos++;
    }
    return json->pos > start || dcp_json_fail(json, "a digit was expected");
}

static bool
skip_number(struct dcp_json *json)
{
    json->pos += peek(json) == '-' ? 1 : 0;
    if (peek(json) == '0') {
        json->pos++;
    } else if (!skip_digits(json)) {
        return false;
    }
    if (peek(json) == '.') {
        json->pos++;
        if (!skip_digits(json)) {
            return false;
        }
    }
    if (peek(json) == 'e' || peek(json) == 'E') {
        json->pos++;
        json->pos += peek(json) == '+' || peek(json) == '-' ? 1 : 0;
        return skip_digits(json);
    }
    return true;
}

bool
dcp_json_null(struct dcp_json *json)
{
    skip_space(json);
    return take_word(json, "null");
}

static bool
skip_value(struct dcp_json *json, struct dcp_bump *scratch, int depth)
{
    const char *text;
    size_t len;
    bool first = true;
    skip_space(json);
    switch (peek(json)) {
    case '"':
        return dcp_json_string(json, scratch, &text, &len);
    case '{':
    case '[':
        break;
    default:
        return take_word(json, "null") || take_word(json, "true") || take_word(json, "false") ||
               skip_number(json);
    }
    if (depth == DCP_MAX_JSON_DEPTH) {
        return dcp_json_fail(json, "values are nested too deep");
    }
    bool object = peek(json) == '{';
    json->pos++;
    while (dcp_json_more(json, object ? '}' : ']', &first)) {
        if ((object && !dcp_json_key(json, scratch, &text, &len)) ||
            !skip_value(json, scratch, depth + 1)) {
            return false;
        }
    }
    return json->failed == NULL;
}

bool
dcp_json_skip(struct dcp_json *json)
{
    struct dcp_bump scratch = {0};
    bool done = skip_value(json, &scratch, 0);
    dcp_bump_clean_up(&scratch);
    return done;
}

bool
dcp_json_end(struct dcp_json *json)
{
    skip_space(json);
    return json->pos == json->len || dcp_json_fail(json, "something follows its end");
}

/*
 * metadata_footer.c: the last 64 bytes of a `.metadata` of ours.
 *
 *     magic 8 | version u16 | flags u16 | accepted_count u32 | pickle_bytes u64 | index_bytes u64 |
 *     pickle_crc u32 | index_crc u32 | save id 16 | accepted_crc u32 | crc u32 of the 60 bytes
 *     before
 *
 * The accepted save ids stand between index and footer, 16 bytes each.  Without any, both their
 * numbers are zero; readers that do not know them take only such a footer for one.
 *
 * It stands at the end because whoever appends to, cuts or rewrites the file then loses it as a
 * whole, and the pickle in front of it remains what every reader understands.
 *
 * Threads: no state.
 */
#include "metadata_private.h"

#include <string.h>

#include "dcp_crc32.h"

enum {
    FOOTER_VERSION = 2,
    FLAG_PLANNED_OUTSIDE = 1 << 0,
    CRC_AT = DCP_METADATA_FOOTER_BYTES - 4,
};

static const uint8_t magic[8] = {0x89, 'D', 'C', 'P', 'N', 'M', 'D', '\n'};

void
dcp_metadata_footer_put(struct dcp_buf *buf, const struct dcp_metadata_footer *footer)
{
    size_t start = buf->len;
    dcp_buf_put(buf, magic, sizeof magic);
    dcp_buf_put_u16(buf, FOOTER_VERSION);
    dcp_buf_put_u16(buf, footer->planned_outside ? FLAG_PLANNED_OUTSIDE : 0);
    dcp_buf_put_u32(buf, footer->accepted_count);
    dcp_buf_put_u64(buf, footer->pickle_bytes);
    dcp_buf_put_u64(buf, footer->index_bytes);
    dcp_buf_put_u32(buf, footer->pickle_crc);
    dcp_buf_put_u32(buf, footer->index_crc);
    dcp_buf_put(buf, footer->save_id.bytes, sizeof footer->save_id.bytes);
    dcp_buf_put_u32(buf, footer->accepted_crc);
    if (!buf->failed) {
        DCP_ASSERT(buf->len - start == CRC_AT);
        dcp_buf_put_u32(buf, dcp_crc32(0, buf->data + start, CRC_AT));
    }
}

int
dcp_metadata_seal(struct dcp_buf *buf, size_t start, size_t index_at,
                  const struct dcp_save_id *accepted, struct dcp_metadata_footer *footer,
                  struct dcp_error *err)
{
    size_t accepted_bytes = footer->accepted_count * sizeof *accepted;
    footer->pickle_bytes = index_at - start;
    footer->index_bytes = buf->len - index_at;
    footer->pickle_crc = dcp_crc32(0, buf->data + start, index_at - start);
    footer->index_crc = dcp_crc32(0, buf->data + index_at, buf->len - index_at);
    footer->accepted_crc = dcp_crc32(0, accepted, accepted_bytes);
    dcp_buf_put(buf, accepted, accepted_bytes);
    dcp_metadata_footer_put(buf, footer);
    int rc = dcp_buf_check(buf, err);
    if (rc == 0 && buf->len - start > DCP_MAX_METADATA_BYTES) {
        rc = dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                           "the metadata takes %zu bytes, %llu are allowed; save in parts",
                           buf->len - start, DCP_MAX_METADATA_BYTES);
    }
    return rc;
}

/* `has_pickle`: the image begins with it; else with the index. */
static bool
parse(const uint8_t *image, size_t len, bool has_pickle, struct dcp_metadata_footer *ret)
{
    if (len < DCP_METADATA_FOOTER_BYTES) {
        return false;
    }
    size_t body_bytes = len - DCP_METADATA_FOOTER_BYTES;
    const uint8_t *bytes = image + body_bytes;
    if (memcmp(bytes, magic, sizeof magic) != 0) {
        return false;
    }
    struct dcp_cursor c = {.data = bytes, .len = DCP_METADATA_FOOTER_BYTES, .pos = sizeof magic};
    struct dcp_metadata_footer footer;
    uint32_t version = dcp_cursor_u16(&c), flags = dcp_cursor_u16(&c);
    footer.accepted_count = dcp_cursor_u32(&c);
    footer.pickle_bytes = dcp_cursor_u64(&c);
    footer.index_bytes = dcp_cursor_u64(&c);
    footer.pickle_crc = dcp_cursor_u32(&c);
    footer.index_crc = dcp_cursor_u32(&c);
    const uint8_t *save_id = dcp_cursor_bytes(&c, sizeof footer.save_id.bytes);
    footer.accepted_crc = dcp_cursor_u32(&c);
    uint32_t crc = dcp_cursor_u32(&c);
    if (c.failed || save_id == NULL || version != FOOTER_VERSION ||
        (flags & ~(uint32_t)FLAG_PLANNED_OUTSIDE) != 0 ||
        footer.accepted_count > DCP_MAX_ACCEPTED_SAVES ||
        (footer.accepted_count == 0 && footer.accepted_crc != 0) ||
        crc != dcp_crc32(0, bytes, CRC_AT)) {
        return false;
    }
    uint64_t accepted_bytes = (uint64_t)footer.accepted_count * sizeof(struct dcp_save_id);
    uint64_t before_bytes = has_pickle ? footer.pickle_bytes : 0;
    if (before_bytes > body_bytes || accepted_bytes > body_bytes - before_bytes ||
        footer.index_bytes != body_bytes - before_bytes - accepted_bytes) {
        return false;
    }
    memcpy(footer.save_id.bytes, save_id, sizeof footer.save_id.bytes);
    footer.planned_outside = flags != 0;
    *ret = footer;
    return true;
}

bool
dcp_metadata_footer_parse(const uint8_t *image, size_t len, struct dcp_metadata_footer *ret)
{
    return parse(image, len, true, ret);
}

bool
dcp_metadata_footer_parse_tail(const uint8_t *tail, size_t len, struct dcp_metadata_footer *ret)
{
    return parse(tail, len, false, ret);
}

bool
dcp_metadata_peek_save_id(const uint8_t *image, size_t len, struct dcp_save_id *ret)
{
    struct dcp_metadata_footer footer;
    if (!dcp_metadata_footer_parse(image, len, &footer)) {
        return false;
    }
    *ret = footer.save_id;
    return true;
}

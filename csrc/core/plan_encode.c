/*
 * plan_encode.c: a plan into its image (plan_format.h).
 *
 * One pass over names and one over items; each says what differs from the one before.  Equal names
 * give equal bytes, so that a receiver need not decode them again to see that they are equal.
 *
 * Threads: no state.
 */
#include "plan_format.h"

#include <string.h>

uint32_t
dcp_plan_put_digits(char digits[static 20], uint64_t number)
{
    char reversed[20];
    uint32_t n = 0;
    do {
        reversed[n++] = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    for (uint32_t i = 0; i < n; i++) {
        digits[i] = reversed[n - 1 - i];
    }
    return n;
}

bool
dcp_plan_path_is_sound(const uint8_t *path, size_t len, uint32_t parts)
{
    struct dcp_cursor c = {.data = path, .len = len};
    bool is_int;
    uint64_t index;
    struct dcp_span text;
    uint32_t n = 0;
    while (dcp_path_next(&c, &is_int, &index, &text)) {
        n++;
    }
    return !c.failed && n == parts;
}

static uint32_t
shared_bytes(const struct dcp_name *a, const struct dcp_name *b)
{
    uint32_t limit = a->fqn_len < b->fqn_len ? a->fqn_len : b->fqn_len;
    limit = limit < SHARED_MAX ? limit : SHARED_MAX;
    uint32_t n = 0;
    while (n < limit && a->fqn[n] == b->fqn[n]) {
        n++;
    }
    return n;
}

/* Appends where the name is cut into the path's parts; false (and nothing lasting) when the name is
 * not its parts joined by dots. */
static bool
put_cuts(struct dcp_buf *buf, const struct dcp_name *name)
{
    size_t start = buf->len;
    struct dcp_cursor c = {.data = name->path, .len = name->path_len};
    uint32_t at = 0;
    bool is_int;
    uint64_t index;
    struct dcp_span text;
    char digits[20];
    dcp_buf_put_varint(buf, name->path_parts);
    for (uint32_t part = 0; dcp_path_next(&c, &is_int, &index, &text); part++) {
        if (is_int) {
            text = (struct dcp_span){(const uint8_t *)digits, dcp_plan_put_digits(digits, index)};
        }
        bool dot = part != 0;
        uint32_t left = name->fqn_len - at;
        if (text.len + dot > left || (dot && name->fqn[at] != '.') ||
            (text.len != 0 && memcmp(name->fqn + at + dot, text.data, text.len) != 0)) {
            goto different;
        }
        at += (uint32_t)text.len + dot;
        dcp_buf_put_varint(buf, (uint64_t)text.len << 1 | is_int);
    }
    if (at == name->fqn_len) {
        return true;
    }
different:
    if (!buf->failed) {
        buf->len = start;
    }
    return false;
}

static int
put_name(struct dcp_buf *buf, const struct dcp_name *before, const struct dcp_name *name,
         struct dcp_error *err)
{
    uint32_t shared = shared_bytes(before, name);
    dcp_buf_put_varint(buf, shared);
    dcp_buf_put_varint(buf, name->fqn_len - shared);
    dcp_buf_put(buf, name->fqn + shared, name->fqn_len - shared);
    if (name->path == NULL) {
        dcp_buf_put_u8(buf, PATH_NONE);
        return 0;
    }
    if (!dcp_plan_path_is_sound(name->path, name->path_len, name->path_parts)) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL, "the path of %.*s is malformed",
                             dcp_name_clip(name), name->fqn);
    }
    size_t mode_at = buf->len;
    dcp_buf_put_u8(buf, PATH_CUT);
    if (put_cuts(buf, name) || buf->failed) {
        return 0;
    }
    buf->data[mode_at] = PATH_RAW;
    dcp_buf_put_varint(buf, name->path_parts);
    dcp_buf_put_varint(buf, name->path_len);
    dcp_buf_put(buf, name->path, name->path_len);
    return 0;
}

static void
put_numbers(struct dcp_buf *buf, const uint64_t *numbers, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        dcp_buf_put_varint(buf, numbers[i]);
    }
}

/* How the box is told; for BOX_ONE_DIM *ret_dim is the dimension that is cut. */
static enum box_mode
box_mode(uint32_t ndim, const uint64_t *global_size, const uint64_t *offsets, const uint64_t *sizes,
         uint32_t *ret_dim)
{
    uint32_t cut = 0;
    for (uint32_t d = 0; d < ndim; d++) {
        if (offsets[d] != 0 || sizes[d] != global_size[d]) {
            cut++;
            *ret_dim = d;
        }
    }
    return cut == 0 ? BOX_WHOLE : cut == 1 ? BOX_ONE_DIM : BOX_ALL_DIMS;
}

static void
put_item(struct dcp_buf *buf, const struct dcp_plan *plan, const struct dcp_item *item,
         uint32_t next_name, const struct dcp_item *before)
{
    uint32_t ndim = item->ndim;
    const uint64_t *global_size = dcp_item_global_size(plan, item);
    const uint64_t *offsets = dcp_item_offsets(plan, item);
    const uint64_t *sizes = dcp_item_sizes(plan, item);
    unsigned head = item->kind;
    uint32_t cut_dim = 0;
    enum box_mode mode = BOX_WHOLE;
    if (item->kind != DCP_ITEM_BYTES) {
        mode = box_mode(ndim, global_size, offsets, sizes, &cut_dim);
        head |= (unsigned)mode << HEAD_BOX_SHIFT;
        if (before != NULL && before->dtype == item->dtype && before->props == item->props &&
            before->ndim == ndim) {
            head |= HEAD_SAME_TYPE;
            if (ndim == 0 ||
                (ndim <= SAME_SIZE_DIMS && memcmp(dcp_item_global_size(plan, before), global_size,
                                                  ndim * sizeof *global_size) == 0)) {
                head |= HEAD_SAME_SIZE;
            }
        }
    }
    head |= item->name == next_name ? HEAD_NEXT_NAME : 0;
    head |= item->slot_bytes != 0 ? HEAD_SLOT : 0;
    dcp_buf_put_u8(buf, (uint8_t)head);
    if ((head & HEAD_NEXT_NAME) == 0) {
        dcp_buf_put_varint(buf, item->name);
    }
    if (item->kind != DCP_ITEM_BYTES && (head & HEAD_SAME_TYPE) == 0) {
        uint8_t type[] = {item->dtype, item->props, item->ndim};
        dcp_buf_put(buf, type, sizeof type);
    }
    if (item->kind != DCP_ITEM_BYTES && (head & HEAD_SAME_SIZE) == 0) {
        put_numbers(buf, global_size, ndim);
    }
    if (item->slot_bytes != 0) {
        dcp_buf_put_varint(buf, item->slot_bytes);
    }
    if (mode == BOX_ONE_DIM) {
        uint64_t cut[] = {cut_dim, offsets[cut_dim], sizes[cut_dim]};
        put_numbers(buf, cut, 3);
    } else if (mode == BOX_ALL_DIMS) {
        put_numbers(buf, offsets, 2 * ndim);
    }
}

/* The last two numbers say where the names are: `names[0]` bytes long, or known by their hash. */
static void
put_head(struct dcp_buf *buf, const struct dcp_plan *plan, unsigned more_flags,
         const uint64_t names[2])
{
    unsigned flags = more_flags | (plan->single_file_per_rank ? FLAG_SINGLE_FILE : 0u) |
                     (plan->has_paths ? FLAG_HAS_PATHS : 0u) |
                     (plan->content_hash ? FLAG_CONTENT_HASH : 0u) |
                     (plan->planned_outside ? FLAG_PLANNED_OUTSIDE : 0u);
    dcp_buf_put(buf, DCP_PLAN_MAGIC, MAGIC_BYTES);
    dcp_buf_put_u8(buf, VERSION);
    dcp_buf_put_u8(buf, (uint8_t)flags);
    dcp_buf_put_u32(buf, plan->rank);
    dcp_buf_put_u32(buf, plan->thread_count);
    dcp_buf_put_u32(buf, plan->names_count);
    dcp_buf_put_u32(buf, plan->items_count);
    dcp_buf_put_u64(buf, names[0]);
    dcp_buf_put_u64(buf, names[1]);
}

static int
put_names(struct dcp_buf *buf, const struct dcp_plan *plan, struct dcp_error *err)
{
    static const struct dcp_name empty = {.fqn = ""};
    const struct dcp_name *before = &empty;
    for (uint32_t i = 0; i < plan->names_count; i++) {
        int rc = put_name(buf, before, &plan->names[i], err);
        if (rc != 0) {
            return rc;
        }
        before = &plan->names[i];
    }
    return 0;
}

static int
put_items(struct dcp_buf *buf, const struct dcp_plan *plan, struct dcp_error *err)
{
    uint32_t next_name = 0;
    const struct dcp_item *before = NULL;
    for (uint32_t i = 0; i < plan->items_count; i++) {
        const struct dcp_item *item = &plan->items[i];
        if (item->kind == DCP_ITEM_BYTES && item->slot_bytes == 0) {
            return dcp_error_set(
                err, DCP_E_INVALID, 0, NULL, "the object %.*s has no record length yet",
                dcp_name_clip(&plan->names[item->name]), plan->names[item->name].fqn);
        }
        put_item(buf, plan, item, next_name, before);
        next_name = item->name + 1;
        before = item->kind == DCP_ITEM_BYTES ? before : item;
    }
    return dcp_buf_check(buf, err);
}

int
dcp_plan_encode(const struct dcp_plan *plan, struct dcp_buf *buf, struct dcp_error *err)
{
    struct dcp_buf names = {0};
    int rc = put_names(&names, plan, err);
    if (rc == 0) {
        rc = dcp_buf_check(&names, err);
    }
    if (rc == 0) {
        put_head(buf, plan, 0, (uint64_t[]){names.len, 0});
        dcp_buf_put(buf, names.data, names.len);
        rc = put_items(buf, plan, err);
    }
    dcp_buf_clean_up(&names);
    return rc;
}

int
dcp_plan_encode_nameless(const struct dcp_plan *plan, const struct dcp_hash128 *names_hash,
                         struct dcp_buf *buf, struct dcp_error *err)
{
    put_head(buf, plan, FLAG_NAMELESS, (uint64_t[]){names_hash->lo, names_hash->hi});
    return put_items(buf, plan, err);
}

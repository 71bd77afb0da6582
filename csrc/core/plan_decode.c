/*
 * plan_decode.c: a plan from its image (plan_format.h).
 *
 * Decoding trusts nothing.  Each name takes 3 bytes at least and each item 1, which bounds the
 * counts by the input's length; what may be left out is bounded too (SHARED_MAX, SAME_SIZE_DIMS),
 * so memory is a fixed multiple of the input.  Values are checked by dcp_plan_add_name and _item,
 * the same gate that local plans pass.  Names that are left out are found by their hash among those
 * the receiver has; names that lie there already, byte for byte, are not decoded again.
 *
 * Threads: no state.
 */
#include "plan_format.h"

#include <string.h>

#include "name_table.h"

/* What decoding carries from one name or item to the next. */
struct decoder {
    struct dcp_cursor in;
    struct dcp_plan *plan;
    struct dcp_buf fqn;                  /* the name being put together */
    struct dcp_buf path;                 /* its path */
    const struct dcp_name_table *lender; /* names that are likely to come, or NULL */
    uint32_t lender_next;                /* the one that is expected next */
    uint32_t next_name;
    bool has_before;                    /* there was a tensor */
    struct dcp_item before;             /* its dtype, props and ndim */
    uint64_t global_size[DCP_MAX_DIMS]; /* and its global size */
    struct dcp_error *err;
};

static int
damaged(const struct decoder *d, const char *what)
{
    return dcp_error_set(d->err, DCP_E_CORRUPT, 0, NULL,
                         "reading a plan of %zu bytes: %s near byte %zu; ranks run different "
                         "releases, or the message was damaged",
                         d->in.len, what, d->in.pos);
}

/* The path from the name and its cuts, into d->path. */
static bool
take_cuts(struct decoder *d, uint64_t parts)
{
    const uint8_t *fqn = d->fqn.data;
    size_t at = 0;
    for (uint64_t part = 0; part < parts; part++) {
        uint64_t cut = dcp_cursor_varint(&d->in);
        uint64_t len = cut >> 1;
        at += part != 0;
        if (d->in.failed || at > d->fqn.len || len > d->fqn.len - at ||
            (part != 0 && fqn[at - 1] != '.')) {
            return false;
        }
        if ((cut & 1) == 0) {
            dcp_path_put_str(&d->path, (const char *)fqn + at, (size_t)len);
        } else {
            uint64_t index = 0;
            for (size_t i = at; i < at + len; i++) {
                uint64_t digit = (uint64_t)fqn[i] - '0';
                if (digit > 9 || dcp_mul_overflows_u64(index, 10, &index) ||
                    dcp_add_overflows_u64(index, digit, &index)) {
                    return false;
                }
            }
            char digits[20];
            if (dcp_plan_put_digits(digits, index) != len) {
                return false;
            }
            dcp_path_put_int(&d->path, index);
        }
        at += (size_t)len;
    }
    return at == d->fqn.len;
}

static bool
take_raw_path(struct decoder *d, uint64_t parts)
{
    uint64_t len = dcp_cursor_varint(&d->in);
    const uint8_t *bytes = dcp_cursor_bytes(&d->in, len);
    if (bytes == NULL || len > DCP_MAX_PATH_BYTES ||
        !dcp_plan_path_is_sound(bytes, (size_t)len, (uint32_t)parts)) {
        return false;
    }
    dcp_buf_put(&d->path, bytes, (size_t)len);
    return true;
}

static bool
is_lent(const struct decoder *d, uint32_t n, bool has_path, uint32_t parts)
{
    if (d->lender == NULL || n >= d->lender->names_count) {
        return false;
    }
    const struct dcp_name *name = &d->lender->names[n];
    return name->fqn_len == d->fqn.len && (name->path != NULL) == has_path &&
           name->path_len == d->path.len && name->path_parts == parts &&
           (d->fqn.len == 0 || memcmp(name->fqn, d->fqn.data, d->fqn.len) == 0) &&
           (d->path.len == 0 || memcmp(name->path, d->path.data, d->path.len) == 0);
}

/* The name that has been put together.  One that the rank has beyond the lender's is skipped by
 * waiting, one that the lender has beyond the rank's by looking one further. */
static int
add_name(struct decoder *d, bool has_path, uint32_t parts)
{
    for (uint32_t skip = 0; skip < 2; skip++) {
        if (is_lent(d, d->lender_next + skip, has_path, parts)) {
            d->lender_next += skip + 1;
            return dcp_plan_borrow_name(d->plan, d->lender, d->lender_next - 1, d->err);
        }
    }
    static const uint8_t no_bytes;
    const uint8_t *path = d->path.len == 0 ? &no_bytes : d->path.data;
    uint32_t name;
    return dcp_plan_add_name(d->plan, (const char *)d->fqn.data, d->fqn.len, has_path ? path : NULL,
                             d->path.len, parts, &name, d->err);
}

static int
take_name(struct decoder *d)
{
    uint64_t shared = dcp_cursor_varint(&d->in);
    uint64_t more = dcp_cursor_varint(&d->in);
    const uint8_t *bytes = dcp_cursor_bytes(&d->in, more);
    uint8_t mode = dcp_cursor_u8(&d->in);
    if (d->in.failed || shared > d->fqn.len || shared > SHARED_MAX || mode > PATH_RAW) {
        return damaged(d, "a malformed name");
    }
    d->fqn.len = (size_t)shared;
    dcp_buf_put(&d->fqn, bytes, (size_t)more);
    dcp_buf_clear(&d->path);
    int rc = dcp_buf_check(&d->fqn, d->err);
    if (rc != 0) {
        return rc;
    }
    uint64_t parts = 0;
    if (mode != PATH_NONE) {
        parts = dcp_cursor_varint(&d->in);
        if (parts > DCP_MAX_PATH_PARTS ||
            !(mode == PATH_CUT ? take_cuts(d, parts) : take_raw_path(d, parts))) {
            return damaged(d, "a malformed path");
        }
    }
    rc = dcp_buf_check(&d->path, d->err);
    if (rc != 0) {
        return rc;
    }
    return add_name(d, mode != PATH_NONE, (uint32_t)parts);
}

static void
take_numbers(struct dcp_cursor *in, uint64_t *numbers, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        numbers[i] = dcp_cursor_varint(in);
    }
}

/* Type and global size of a tensor, told or taken over from the one before. */
static int
take_type(struct decoder *d, uint8_t head, struct dcp_item *item)
{
    if ((head & HEAD_SAME_TYPE) != 0) {
        if (!d->has_before) {
            return damaged(d, "an item like the one before, but it is the first");
        }
        item->dtype = d->before.dtype;
        item->props = d->before.props;
        item->ndim = d->before.ndim;
    } else {
        item->dtype = dcp_cursor_u8(&d->in);
        item->props = dcp_cursor_u8(&d->in);
        item->ndim = dcp_cursor_u8(&d->in);
    }
    if (item->ndim > DCP_MAX_DIMS) {
        return damaged(d, "a tensor with too many dimensions");
    }
    if ((head & HEAD_SAME_SIZE) == 0) {
        take_numbers(&d->in, d->global_size, item->ndim);
    } else if ((head & HEAD_SAME_TYPE) == 0 || item->ndim > SAME_SIZE_DIMS) {
        return damaged(d, "a global size that is not told");
    }
    d->has_before = true;
    d->before = *item;
    return 0;
}

static int
take_box(struct decoder *d, unsigned mode, uint32_t ndim, uint64_t *offsets, uint64_t *sizes)
{
    if (mode > BOX_ALL_DIMS) {
        return damaged(d, "a box of unknown form");
    }
    if (mode == BOX_ALL_DIMS) {
        take_numbers(&d->in, offsets, ndim);
        take_numbers(&d->in, sizes, ndim);
        return 0;
    }
    for (uint32_t i = 0; i < ndim; i++) {
        offsets[i] = 0;
        sizes[i] = d->global_size[i];
    }
    if (mode == BOX_ONE_DIM) {
        uint64_t dim = dcp_cursor_varint(&d->in);
        if (dim >= ndim) {
            return damaged(d, "a box cut in a dimension that is not there");
        }
        offsets[dim] = dcp_cursor_varint(&d->in);
        sizes[dim] = dcp_cursor_varint(&d->in);
    }
    return 0;
}

static int
take_item(struct decoder *d)
{
    uint64_t offsets[DCP_MAX_DIMS], sizes[DCP_MAX_DIMS];
    uint8_t head = dcp_cursor_u8(&d->in);
    struct dcp_item item = {.kind = head & HEAD_KIND, .name = d->next_name};
    if ((head & HEAD_NEXT_NAME) == 0) {
        uint64_t name = dcp_cursor_varint(&d->in);
        item.name = name < d->plan->names_count ? (uint32_t)name : UINT32_MAX;
    }
    if (d->in.failed || item.name >= d->plan->names_count) {
        return damaged(d, "an item of no name");
    }
    bool is_object = item.kind == DCP_ITEM_BYTES;
    if (is_object &&
        ((head & (HEAD_SAME_TYPE | HEAD_SAME_SIZE | HEAD_BOX)) != 0 || (head & HEAD_SLOT) == 0)) {
        return damaged(d, "a malformed object");
    }
    int rc = is_object ? 0 : take_type(d, head, &item);
    if (rc == 0 && (head & HEAD_SLOT) != 0) {
        item.slot_bytes = dcp_cursor_varint(&d->in);
        if (item.slot_bytes == 0) {
            rc = damaged(d, "a record without length");
        }
    }
    if (rc == 0 && !is_object) {
        rc = take_box(d, (head & HEAD_BOX) >> HEAD_BOX_SHIFT, item.ndim, offsets, sizes);
    }
    if (rc != 0) {
        return rc;
    }
    if (d->in.failed) {
        return damaged(d, "an item that ends early");
    }
    d->next_name = item.name + 1;
    return dcp_plan_add_item(d->plan, &item, d->global_size, offsets, sizes, d->err);
}

/* What the head says besides the plan's own numbers. */
struct head {
    uint32_t names_count, items_count;
    bool nameless;
    struct dcp_span names;         /* of an image with names */
    struct dcp_hash128 names_hash; /* of a nameless one */
};

static int
take_head(struct decoder *d, struct head *ret_head)
{
    const uint8_t *magic = dcp_cursor_bytes(&d->in, MAGIC_BYTES);
    if (magic == NULL || memcmp(magic, DCP_PLAN_MAGIC, MAGIC_BYTES) != 0) {
        return damaged(d, "this is not a plan");
    }
    if (dcp_cursor_u8(&d->in) != VERSION) {
        return damaged(d, "a plan of another version");
    }
    uint8_t flags = dcp_cursor_u8(&d->in);
    uint32_t rank = dcp_cursor_u32(&d->in);
    uint32_t thread_count = dcp_cursor_u32(&d->in);
    struct head head = {.nameless = (flags & FLAG_NAMELESS) != 0};
    head.names_count = dcp_cursor_u32(&d->in);
    head.items_count = dcp_cursor_u32(&d->in);
    head.names_hash.lo = dcp_cursor_u64(&d->in);
    head.names_hash.hi = dcp_cursor_u64(&d->in);
    if (!head.nameless) {
        uint64_t len = head.names_hash.lo;
        head.names = (struct dcp_span){dcp_cursor_bytes(&d->in, len), (size_t)len};
    }
    size_t left = d->in.len - d->in.pos;
    if (d->in.failed || (flags & ~(unsigned)FLAG_ALL) != 0 || rank >= DCP_MAX_RANKS ||
        thread_count > DCP_MAX_FILES_PER_RANK || head.names_count > DCP_MAX_ITEMS_PER_RANK ||
        (!head.nameless &&
         (head.names_hash.hi != 0 || head.names_count > head.names.len / NAME_MIN_BYTES)) ||
        head.items_count > left / ITEM_MIN_BYTES || head.items_count > DCP_MAX_ITEMS_PER_RANK) {
        return damaged(d, "a malformed head");
    }
    d->plan->rank = rank;
    d->plan->thread_count = thread_count;
    d->plan->single_file_per_rank = (flags & FLAG_SINGLE_FILE) != 0;
    d->plan->has_paths = (flags & FLAG_HAS_PATHS) != 0;
    d->plan->content_hash = (flags & FLAG_CONTENT_HASH) != 0;
    d->plan->planned_outside = (flags & FLAG_PLANNED_OUTSIDE) != 0;
    *ret_head = head;
    return 0;
}

/* Names that came with the image: the bytes before the items. */
static int
take_names(struct decoder *d, const struct head *head)
{
    size_t len = d->in.len, items_at = d->in.pos;
    int rc = 0;
    d->in.pos = items_at - head->names.len;
    d->in.len = items_at;
    for (uint32_t i = 0; rc == 0 && i < head->names_count; i++) {
        rc = take_name(d);
    }
    if (rc == 0 && d->in.pos != d->in.len) {
        rc = damaged(d, "bytes behind the last name");
    }
    d->in.len = len;
    return rc;
}

/* Names of a table that the receiver has. */
static int
take_known_names(struct decoder *d, const struct head *head, struct dcp_name_table *table)
{
    if (table == NULL) {
        return dcp_error_set(d->err, DCP_E_MISSING, 0, NULL,
                             "rank %u left out names that the coordinator does not have; this "
                             "should not happen, save again with a new process group",
                             d->plan->rank);
    }
    if (table->names_count != head->names_count) {
        return damaged(d, "another number of names than their hash stands for");
    }
    dcp_plan_use_table(d->plan, table);
    return 0;
}

static int
take_shared_names(struct decoder *d, const struct head *head, struct dcp_name_tables *tables)
{
    struct dcp_name_table *known = head->nameless
                                       ? dcp_name_tables_by_hash(tables, &head->names_hash)
                                       : dcp_name_tables_by_image(tables, head->names);
    if (head->nameless || known != NULL) {
        return take_known_names(d, head, known);
    }
    d->lender = tables->lender;
    int rc = take_names(d, head);
    return rc != 0 ? rc : dcp_name_tables_intern(tables, d->plan, head->names, d->err);
}

/* `tables` NULL: the plan owns its names. */
static int
decode(const uint8_t *data, size_t len, struct dcp_name_tables *tables, struct dcp_plan *ret_plan,
       struct dcp_error *err)
{
    struct dcp_plan plan = {0};
    struct decoder d = {.in = {.data = data, .len = len}, .plan = &plan, .err = err};
    struct head head;
    int rc = take_head(&d, &head);
    if (rc == 0 && tables != NULL) {
        rc = take_shared_names(&d, &head, tables);
    } else if (rc == 0) {
        rc = head.nameless ? damaged(&d, "names are left out") : take_names(&d, &head);
    }
    if (rc == 0) {
        rc = dcp_plan_reserve_items(&plan, head.items_count, err);
    }
    for (uint32_t i = 0; rc == 0 && i < head.items_count; i++) {
        rc = take_item(&d);
    }
    if (rc == 0 && d.in.pos != len) {
        rc = damaged(&d, "bytes behind its end");
    }
    dcp_buf_clean_up(&d.fqn);
    dcp_buf_clean_up(&d.path);
    if (rc != 0) {
        dcp_plan_clean_up(&plan);
        return rc;
    }
    dcp_plan_trim(&plan);
    *ret_plan = plan;
    return 0;
}

int
dcp_plan_decode(const uint8_t *data, size_t len, struct dcp_plan *ret_plan, struct dcp_error *err)
{
    return decode(data, len, NULL, ret_plan, err);
}

int
dcp_plan_decode_shared(const uint8_t *data, size_t len, struct dcp_name_tables *tables,
                       struct dcp_plan *ret_plan, struct dcp_error *err)
{
    return decode(data, len, tables, ret_plan, err);
}

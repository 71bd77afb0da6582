/*
 * plan.c: one rank's plan: names, items, paths, fingerprint.
 *
 * A plan is four flat arrays, so that building it costs a few appends per item and hashing it is
 * one pass over memory.  Everything that later steps multiply or add is checked here, once, when an
 * item comes in: volumes and payloads of a plan that exists always fit 64 bits.  A box that leaves
 * its tensor is not refused here; validation reports it with torch's text on the coordinator.
 *
 * Threads: a plan belongs to one thread at a time while it is built, afterwards it is read only.
 */
#include "plan_private.h"

#include <string.h>

#include "name_table.h"

enum {
    FIRST_CAP = 64,
    PATH_STR = 's',
    PATH_INT = 'i',
    HASH_BLOCK_BYTES = 4096,
    /* Ranks compare these hashes: a change of what is hashed, or how, takes a new number. */
    NAMES_HASH_VERSION = 1,
};

_Static_assert(sizeof(struct dcp_item) == 24, "the fingerprint hashes items as they lie in memory");

void
dcp_plan_clean_up(struct dcp_plan *plan)
{
    if (plan == NULL) {
        return;
    }
    if (plan->table != NULL) {
        dcp_name_table_release(plan->table);
    } else {
        dcp_free(plan->names);
        dcp_bump_clean_up(&plan->strings);
    }
    dcp_free(plan->items);
    dcp_free(plan->dims);
    *plan = (struct dcp_plan){0};
}

/* ---- growing ---- */

static int
out_of_memory(struct dcp_error *err, const char *what, uint64_t count)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "a plan of %llu %s: out of memory",
                         (unsigned long long)count, what);
}

static int
make_room_for_name(struct dcp_plan *plan, struct dcp_error *err)
{
    if (plan->names_count < plan->names_cap) {
        return 0;
    }
    if (plan->names_count >= DCP_MAX_ITEMS_PER_RANK) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "a state dict has more than %u keys; save it in parts",
                             DCP_MAX_ITEMS_PER_RANK);
    }
    uint32_t cap = plan->names_cap == 0 ? FIRST_CAP : 2 * plan->names_cap;
    struct dcp_name *names = dcp_realloc(plan->names, (size_t)cap * sizeof *names);
    if (names == NULL) {
        return out_of_memory(err, "names", cap);
    }
    plan->names = names;
    plan->names_cap = cap;
    return 0;
}

static int
make_room_for_item(struct dcp_plan *plan, uint32_t dims_more, struct dcp_error *err)
{
    if (plan->items_count >= plan->items_cap) {
        if (plan->items_count >= DCP_MAX_ITEMS_PER_RANK) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "rank %u wants to save more than %u items; save them in parts",
                                 plan->rank, DCP_MAX_ITEMS_PER_RANK);
        }
        uint32_t cap = plan->items_cap == 0 ? FIRST_CAP : 2 * plan->items_cap;
        struct dcp_item *items = dcp_realloc(plan->items, (size_t)cap * sizeof *items);
        if (items == NULL) {
            return out_of_memory(err, "items", cap);
        }
        plan->items = items;
        plan->items_cap = cap;
    }
    if (dims_more > plan->dims_cap - plan->dims_count) {
        /* At most DCP_MAX_ITEMS_PER_RANK * 3 * DCP_MAX_DIMS numbers: no overflow in sight. */
        uint64_t cap = dcp_max_u64(2 * plan->dims_cap, plan->dims_count + dims_more);
        cap = dcp_max_u64(cap, FIRST_CAP);
        uint64_t *dims = dcp_realloc(plan->dims, (size_t)cap * sizeof *dims);
        if (dims == NULL) {
            return out_of_memory(err, "dimensions", cap);
        }
        plan->dims = dims;
        plan->dims_cap = cap;
    }
    return 0;
}

int
dcp_plan_add_name(struct dcp_plan *plan, const char *fqn, size_t fqn_len, const uint8_t *path,
                  size_t path_len, uint32_t path_parts, uint32_t *ret_name, struct dcp_error *err)
{
    if (fqn_len > DCP_MAX_FQN_BYTES || path_len > DCP_MAX_PATH_BYTES ||
        path_parts > DCP_MAX_PATH_PARTS) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "a key of the state dict has %zu bytes of name, %zu of path and %u "
                             "path parts; %u, %u and %u are allowed; nest it less deeply",
                             fqn_len, path_len, path_parts, DCP_MAX_FQN_BYTES, DCP_MAX_PATH_BYTES,
                             DCP_MAX_PATH_PARTS);
    }
    DCP_ASSERT(plan->table == NULL); /* shared names do not change */
    int rc = make_room_for_name(plan, err);
    if (rc != 0) {
        return rc;
    }
    size_t bytes = fqn_len + (path == NULL ? 0 : path_len);
    char *text = dcp_bump_alloc(&plan->strings, bytes == 0 ? 1 : bytes, 1);
    if (text == NULL) {
        return out_of_memory(err, "names", plan->names_count);
    }
    if (fqn_len != 0) {
        memcpy(text, fqn, fqn_len);
    }
    struct dcp_name *name = &plan->names[plan->names_count];
    *name = (struct dcp_name){.fqn = text, .fqn_len = (uint32_t)fqn_len};
    if (path != NULL) {
        memcpy(text + fqn_len, path, path_len);
        name->path = (const uint8_t *)text + fqn_len;
        name->path_len = (uint32_t)path_len;
        name->path_parts = path_parts;
    }
    *ret_name = plan->names_count++;
    return 0;
}

int
dcp_plan_borrow_name(struct dcp_plan *plan, const struct dcp_name_table *lender, uint32_t n,
                     struct dcp_error *err)
{
    DCP_ASSERT(plan->table == NULL && n < lender->names_count);
    int rc = make_room_for_name(plan, err);
    if (rc == 0) {
        plan->names[plan->names_count++] = lender->names[n];
    }
    return rc;
}

/* ---- items ---- */

static int
refuse(const struct dcp_plan *plan, const struct dcp_item *item, int code, const char *why,
       struct dcp_error *err)
{
    static const struct dcp_name unnamed = {.fqn = "?", .fqn_len = 1};
    const struct dcp_name *name =
        item->name < plan->names_count ? &plan->names[item->name] : &unnamed;
    return dcp_error_set(err, code, 0, NULL, "planning to save %.*s on rank %u: %s",
                         dcp_name_clip(name), name->fqn, plan->rank, why);
}

static const char *
item_fault(const struct dcp_plan *plan, const struct dcp_item *item)
{
    if (item->name >= plan->names_count) {
        return "the item's name is not in the plan";
    }
    if (item->kind < DCP_ITEM_TENSOR || item->kind > DCP_ITEM_BYTES) {
        return "the item's kind is unknown";
    }
    if (item->kind == DCP_ITEM_BYTES) {
        return item->ndim != 0 || item->dtype != DCP_DTYPE_NONE || item->props != 0
                   ? "an object cannot have dimensions, an element type or properties"
                   : NULL;
    }
    if (item->dtype >= DCP_DTYPE_COUNT) {
        return "the element type is unknown";
    }
    if (item->dtype == DCP_DTYPE_NONE && item->slot_bytes == 0) {
        return "a tensor of an element type that only torch.save knows needs a ready-made record";
    }
    unsigned known = DCP_PROP_REQUIRES_GRAD | DCP_PROP_PIN_MEMORY | DCP_PROP_CHANNELS_LAST |
                     DCP_PROP_PRESERVE_FORMAT;
    return (item->props & ~known) != 0 ? "the tensor's properties are unknown" : NULL;
}

static const char *
box_excess(const struct dcp_item *item, const uint64_t *global_size, const uint64_t *offsets,
           const uint64_t *sizes)
{
    if (item->ndim > DCP_MAX_DIMS) {
        return "the tensor has too many dimensions";
    }
    for (uint32_t d = 0; d < item->ndim; d++) {
        if (global_size[d] > DCP_DIM_MAX || offsets[d] > DCP_DIM_MAX || sizes[d] > DCP_DIM_MAX) {
            return "a size or offset is negative or does not fit 63 bits";
        }
    }
    uint64_t volume, bytes;
    if (dcp_volume_overflows(global_size, item->ndim, &volume) || volume > DCP_DIM_MAX) {
        return "the tensor has more elements than 63 bits can count";
    }
    if (dcp_volume_overflows(sizes, item->ndim, &volume) ||
        dcp_mul_overflows_u64(volume, dcp_dtype_bytes(item->dtype), &bytes) ||
        bytes > DCP_MAX_PAYLOAD_BYTES) {
        return "the shard has more than 2^56 bytes";
    }
    return item->slot_bytes > DCP_MAX_OBJECT_BYTES ? "the record has more than 2^40 bytes" : NULL;
}

int
dcp_plan_add_item(struct dcp_plan *plan, const struct dcp_item *item, const uint64_t *global_size,
                  const uint64_t *offsets, const uint64_t *sizes, struct dcp_error *err)
{
    const char *why = item_fault(plan, item);
    if (why != NULL) {
        return refuse(plan, item, DCP_E_INVALID, why, err);
    }
    why = box_excess(item, global_size, offsets, sizes);
    if (why != NULL) {
        return refuse(plan, item, DCP_E_LIMIT, why, err);
    }
    uint32_t ndim = item->ndim;
    int rc = make_room_for_item(plan, 3 * ndim, err);
    if (rc != 0) {
        return rc;
    }
    struct dcp_item *added = &plan->items[plan->items_count++];
    *added = *item;
    added->dims = plan->dims_count;
    uint64_t *dims = plan->dims + plan->dims_count;
    for (uint32_t d = 0; d < ndim; d++) {
        dims[d] = global_size[d];
        dims[ndim + d] = offsets[d];
        dims[2 * ndim + d] = sizes[d];
    }
    plan->dims_count += 3 * ndim;
    return 0;
}

int
dcp_plan_reserve_items(struct dcp_plan *plan, uint32_t count, struct dcp_error *err)
{
    DCP_ASSERT(plan->items == NULL && count <= DCP_MAX_ITEMS_PER_RANK);
    plan->items = dcp_malloc_array(count, sizeof *plan->items);
    if (plan->items == NULL) {
        return out_of_memory(err, "items", count);
    }
    plan->items_cap = count;
    return 0;
}

void
dcp_plan_trim(struct dcp_plan *plan)
{
    uint64_t *dims = plan->dims;
    if (plan->dims_cap > plan->dims_count) {
        dims = dcp_realloc(plan->dims, (size_t)plan->dims_count * sizeof *dims);
    }
    if (dims != NULL) {
        plan->dims = dims;
        plan->dims_cap = plan->dims_count;
    }
}

uint64_t
dcp_item_payload_bytes(const struct dcp_plan *plan, const struct dcp_item *item)
{
    if (item->kind == DCP_ITEM_BYTES) {
        return 0;
    }
    uint64_t volume;
    bool overflow = dcp_volume_overflows(dcp_item_sizes(plan, item), item->ndim, &volume);
    DCP_ASSERT(!overflow);
    (void)overflow;
    return volume * dcp_dtype_bytes(item->dtype);
}

/* ---- paths ---- */

void
dcp_path_put_str(struct dcp_buf *buf, const char *text, size_t len)
{
    dcp_buf_put_u8(buf, PATH_STR);
    dcp_buf_put_varint(buf, len);
    dcp_buf_put(buf, text, len);
}

void
dcp_path_put_int(struct dcp_buf *buf, uint64_t index)
{
    dcp_buf_put_u8(buf, PATH_INT);
    dcp_buf_put_varint(buf, index);
}

bool
dcp_path_next(struct dcp_cursor *c, bool *ret_is_int, uint64_t *ret_int, struct dcp_span *ret_text)
{
    if (c->failed || c->pos == c->len) {
        return false;
    }
    uint8_t type = dcp_cursor_u8(c);
    uint64_t number = dcp_cursor_varint(c);
    if (c->failed || (type != PATH_STR && type != PATH_INT)) {
        c->failed = true;
        return false;
    }
    if (type == PATH_INT) {
        *ret_is_int = true;
        *ret_int = number;
        return true;
    }
    const uint8_t *text = dcp_cursor_bytes(c, number);
    if (text == NULL) {
        return false;
    }
    *ret_is_int = false;
    *ret_text = (struct dcp_span){.data = text, .len = (size_t)number};
    return true;
}

/* ---- fingerprint ---- */

/* Hashes a stream in blocks; the hash so far is the head of the next block, so both order and
 * content of all bytes decide the result. */
struct hasher {
    uint64_t salt;
    size_t len; /* bytes of `block` in use */
    uint8_t block[HASH_BLOCK_BYTES];
};

static void
hasher_turn(struct hasher *h)
{
    struct dcp_hash128 chain = dcp_hash128(h->block, h->len, h->salt);
    memcpy(h->block, &chain, sizeof chain);
    h->len = sizeof chain;
}

static void
hasher_add(struct hasher *h, const void *data, size_t len)
{
    const uint8_t *bytes = data;
    while (len != 0) {
        if (h->len == sizeof h->block) {
            hasher_turn(h);
        }
        size_t room = sizeof h->block - h->len;
        size_t n = len < room ? len : room;
        memcpy(h->block + h->len, bytes, n);
        h->len += n;
        bytes += n;
        len -= n;
    }
}

static struct dcp_hash128
hasher_end(struct hasher *h)
{
    return dcp_hash128(h->block, h->len, h->salt ^ 1);
}

struct dcp_hash128
dcp_plan_names_hash(const struct dcp_plan *plan)
{
    struct hasher h;
    h.salt = NAMES_HASH_VERSION;
    h.len = 0;
    hasher_add(&h, &plan->names_count, sizeof plan->names_count);
    for (uint32_t i = 0; i < plan->names_count; i++) {
        const struct dcp_name *name = &plan->names[i];
        uint32_t lens[] = {name->fqn_len, name->path_len, name->path_parts, name->path != NULL};
        hasher_add(&h, lens, sizeof lens);
        hasher_add(&h, name->fqn, name->fqn_len);
        if (name->path != NULL) {
            hasher_add(&h, name->path, name->path_len);
        }
    }
    return hasher_end(&h);
}

struct dcp_hash128
dcp_plan_fingerprint_named(const struct dcp_plan *plan, const struct dcp_hash128 *names_hash,
                           uint64_t salt)
{
    struct hasher h;
    h.salt = salt;
    h.len = 0;
    uint32_t head[] = {plan->rank,       plan->thread_count, plan->single_file_per_rank,
                       plan->has_paths,  plan->content_hash, plan->planned_outside,
                       plan->items_count};
    hasher_add(&h, head, sizeof head);
    hasher_add(&h, names_hash, sizeof *names_hash);
    hasher_add(&h, plan->items, plan->items_count * sizeof *plan->items);
    hasher_add(&h, plan->dims, (size_t)plan->dims_count * sizeof *plan->dims);
    return hasher_end(&h);
}

struct dcp_hash128
dcp_plan_fingerprint(const struct dcp_plan *plan, uint64_t salt)
{
    struct dcp_hash128 names_hash = dcp_plan_names_hash(plan);
    return dcp_plan_fingerprint_named(plan, &names_hash, salt);
}

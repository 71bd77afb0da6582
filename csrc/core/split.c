/*
 * split.c: replicated tensors divided by rows over their holders, so that no rank writes much more
 * than the others.
 *
 * Under DDP every rank holds everything, and whole tensors balance well until one of them is
 * larger than a rank's share: an embedding of 8 GiB is then written by one rank while seven wait.
 * Such a tensor is cut: each of several holders keeps a range of its rows, which is a shard as good
 * as any for metadata and readers.  Whatever balances whole stays whole, because every part costs a
 * chunk of metadata and a request of each reader.
 *
 * A tensor is divided when its lightest holder would come to more than a tenth above the fair
 * share: the most that any rank would write if every replicated key were divided evenly over its
 * holders, or the largest key that cannot be.  Divided ones are decided last: like water they even
 * out what the others left, in as few parts as reach the level of the ranks' mean.  All holders
 * must hold the same box of the same type, else nothing is divided.
 *
 * Sorting the holders of what is divided apart, everything is linear; where nothing is large, it
 * costs nothing.  Ties are broken by rank: equal plans give equal cuts.
 *
 * Threads: no state.
 */
#include "split.h"

#include <stdlib.h>
#include <string.h>

enum {
    /* Bytes that parts are a multiple of where rows allow it: what direct I/O asks for. */
    PART_STEP_BYTES = DCP_LARGE_ALIGN_BYTES,
    /* A dimension is long enough when a row more or less is little of a part. */
    ROWS_PER_PART = 16,
    LIMIT_TOLERANCE = 10, /* one part in ten */
    LEVEL_TOLERANCE = 64,
};

typedef unsigned __int128 wide;

void
split_clean_up(struct split *s)
{
    dcp_free(s->candidates);
    dcp_free(s->shares);
    dcp_free(s->cuts);
    *s = (struct split){0};
}

static int
out_of_memory(struct dcp_error *err, uint64_t count)
{
    return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                         "dividing replicated tensors among %llu holders: out of memory",
                         (unsigned long long)count);
}

/* ---- what can be divided ---- */

static bool
same_box(const struct dcp_plan *a, const struct dcp_item *x, const struct dcp_plan *b,
         const struct dcp_item *y)
{
    return x->kind == y->kind && x->dtype == y->dtype && x->props == y->props &&
           x->ndim == y->ndim && y->slot_bytes == 0 &&
           memcmp(a->dims + x->dims, b->dims + y->dims, 3 * x->ndim * sizeof *a->dims) == 0;
}

static bool
is_whole(const struct dcp_plan *plan, const struct dcp_item *item)
{
    const uint64_t *size = dcp_item_global_size(plan, item);
    const uint64_t *offsets = dcp_item_offsets(plan, item);
    const uint64_t *sizes = dcp_item_sizes(plan, item);
    for (uint32_t d = 0; d < item->ndim; d++) {
        if (offsets[d] != 0 || sizes[d] != size[d]) {
            return false;
        }
    }
    return true;
}

/* `keys_of_name`: a whole tensor that shares its name contradicts another rank, which has to be
 * said of the whole. */
static bool
can_be_divided(const struct dedup *d, uint32_t k, const uint32_t *keys_of_name)
{
    const struct dedup_key *key = &d->keys[k];
    const struct dcp_plan *plan = &d->plans[key->plan];
    const struct dcp_item *item = &plan->items[key->item];
    if (item->kind == DCP_ITEM_BYTES || item->slot_bytes != 0 || item->ndim == 0 ||
        dcp_item_payload_bytes(plan, item) == 0) {
        return false;
    }
    if (item->kind == DCP_ITEM_TENSOR &&
        (keys_of_name[key->name_id] != 1 || !is_whole(plan, item))) {
        return false;
    }
    const struct dedup_holder *holders = dedup_holders(d, k);
    for (uint32_t h = 1; h < key->holders_count; h++) {
        const struct dcp_plan *other = &d->plans[holders[h].plan];
        if (holders[h].plan == holders[h - 1].plan ||
            !same_box(plan, item, other, &other->items[holders[h].item])) {
            return false;
        }
    }
    return true;
}

/* Candidates and room for their holders.  *ret_whole_bytes: the largest shared key that is none. */
static int
find_candidates(struct split *s, const struct dedup *d, uint64_t least_bytes,
                uint64_t *ret_whole_bytes, struct dcp_error *err)
{
    uint32_t *keys_of_name = dcp_calloc(d->names_count, sizeof *keys_of_name);
    uint32_t most_holders = 0;
    s->candidates = dcp_malloc_array(d->order_count, sizeof *s->candidates);
    if (keys_of_name == NULL || s->candidates == NULL) {
        dcp_free(keys_of_name);
        return out_of_memory(err, d->order_count);
    }
    for (uint32_t k = 0; k < d->keys_count; k++) {
        keys_of_name[d->keys[k].name_id]++;
    }
    *ret_whole_bytes = 0;
    for (uint32_t i = 0; i < d->order_count; i++) {
        const struct dedup_key *key = &d->keys[d->order[i]];
        if (key->weight_bytes >= least_bytes && can_be_divided(d, d->order[i], keys_of_name)) {
            s->candidates[s->candidates_count++] = d->order[i];
            most_holders = key->holders_count > most_holders ? key->holders_count : most_holders;
        } else {
            *ret_whole_bytes = dcp_max_u64(*ret_whole_bytes, key->weight_bytes);
        }
    }
    dcp_free(keys_of_name);
    s->shares = dcp_malloc_array(most_holders, sizeof *s->shares);
    return s->shares == NULL ? out_of_memory(err, most_holders) : 0;
}

/* ---- which of them are ---- */

/* The most that a rank would write if every key were divided evenly over its holders. */
static int
fair_share(const struct dedup *d, uint64_t *ret_bytes, struct dcp_error *err)
{
    uint64_t *fair = dcp_malloc_array(d->plans_count, sizeof *fair);
    if (fair == NULL) {
        return out_of_memory(err, d->plans_count);
    }
    memcpy(fair, d->loads_bytes, d->plans_count * sizeof *fair);
    for (uint32_t i = 0; i < d->order_count; i++) {
        const struct dedup_key *key = &d->keys[d->order[i]];
        const struct dedup_holder *holders = dedup_holders(d, d->order[i]);
        for (uint32_t h = 0; h < key->holders_count; h++) {
            fair[holders[h].plan] += key->weight_bytes / key->holders_count;
        }
    }
    uint64_t most = 0;
    for (uint32_t p = 0; p < d->plans_count; p++) {
        most = dcp_max_u64(most, fair[p]);
    }
    dcp_free(fair);
    *ret_bytes = most;
    return 0;
}

static uint64_t
mean_bytes(const struct dedup *d)
{
    wide total = 0;
    for (uint32_t k = 0; k < d->keys_count; k++) {
        total += d->keys[k].weight_bytes;
    }
    return (uint64_t)(total / d->plans_count);
}

int
split_prepare(struct split *s, const struct dedup *d, uint64_t split_bytes, struct dcp_error *err)
{
    bool is_auto = split_bytes == DCP_SPLIT_AUTO;
    uint64_t least_bytes = is_auto ? DCP_SPLIT_BYTES : split_bytes;
    uint64_t whole_bytes = 0, fair_bytes = 0;
    if (split_bytes == DCP_SPLIT_OFF || d->largest_bytes < least_bytes) {
        return 0;
    }
    s->part_bytes = dcp_max_u64(dcp_min_u64(DCP_SPLIT_PART_BYTES, least_bytes / 8), 1);
    int rc = find_candidates(s, d, least_bytes, &whole_bytes, err);
    if (rc == 0 && is_auto && s->candidates_count != 0) {
        rc = fair_share(d, &fair_bytes, err);
        if (rc == 0) {
            s->limit_bytes = dcp_max_u64(whole_bytes, fair_bytes);
            s->limit_bytes += s->limit_bytes / LIMIT_TOLERANCE;
            s->mean_bytes = mean_bytes(d);
        }
    }
    return rc;
}

bool
split_defers(struct split *s, const struct dedup *d, uint32_t key, uint64_t load_bytes)
{
    if (s->looked_at_count == s->candidates_count || s->candidates[s->looked_at_count] != key) {
        return false;
    }
    s->looked_at_count++;
    if (load_bytes + d->keys[key].weight_bytes <= s->limit_bytes) {
        return false;
    }
    s->candidates[s->deferred_count++] = key;
    return true;
}

/* ---- dividing ---- */

static int
compare_loads(const void *left, const void *right)
{
    const struct split_share *a = left, *b = right;
    if (a->load_bytes != b->load_bytes) {
        return a->load_bytes < b->load_bytes ? -1 : 1;
    }
    return a->holder < b->holder ? -1 : a->holder > b->holder;
}

static int
compare_holders(const void *left, const void *right)
{
    const struct split_share *a = left, *b = right;
    return a->holder < b->holder ? -1 : a->holder > b->holder;
}

/* How many of the lightest holders share `weight_bytes`, and the level that they all reach.  Fewest
 * parts that keep it at `target_bytes`, or what comes closest with no part below part_bytes. */
static uint32_t
choose_parts(const struct split *s, uint32_t most_parts, uint64_t weight_bytes,
             uint64_t target_bytes, wide *ret_level)
{
    wide sum = (wide)weight_bytes + s->shares[0].load_bytes;
    wide level = sum;
    uint32_t parts = 1;
    while (parts < most_parts && level > target_bytes) {
        wide next_sum = sum + s->shares[parts].load_bytes;
        wide next_level = (next_sum + parts) / (parts + 1);
        if (next_level < (wide)s->shares[parts].load_bytes + s->part_bytes) {
            break; /* loads ascend: the newest part is the smallest */
        }
        sum = next_sum;
        level = next_level;
        parts++;
    }
    *ret_level = level;
    return parts;
}

/* The first dimension that is long enough, else the longest. */
static uint32_t
choose_dim(const uint64_t *sizes, uint32_t ndim, uint32_t parts)
{
    uint32_t longest = 0;
    for (uint32_t d = 0; d < ndim; d++) {
        if (sizes[d] >= (uint64_t)ROWS_PER_PART * parts) {
            return d;
        }
        longest = sizes[d] > sizes[longest] ? d : longest;
    }
    return longest;
}

/* Rows of PART_STEP_BYTES, or 1 where so many are too much of a part. */
static uint64_t
choose_step(uint64_t row_bytes, uint64_t rows, uint32_t parts)
{
    uint64_t twos = row_bytes & (~row_bytes + 1); /* the largest power of two that divides it */
    uint64_t step = twos >= PART_STEP_BYTES ? 1 : PART_STEP_BYTES / twos;
    return step <= rows / ((uint64_t)ROWS_PER_PART * parts) ? step : 1;
}

static int
add_cut(struct split *s, const struct dedup_holder *holder, uint32_t dim, uint64_t first_row,
        uint64_t rows_count, struct dcp_error *err)
{
    if (s->cuts_count == s->cuts_cap) {
        uint32_t cap = s->cuts_cap == 0 ? 64 : 2 * s->cuts_cap;
        struct split_cut *cuts = dcp_realloc(s->cuts, (size_t)cap * sizeof *cuts);
        if (cuts == NULL) {
            return out_of_memory(err, cap);
        }
        s->cuts = cuts;
        s->cuts_cap = cap;
    }
    s->cuts[s->cuts_count++] = (struct split_cut){
        .plan = holder->plan,
        .cut = {.item = holder->item, .dim = dim, .first_row = first_row, .rows_count = rows_count},
    };
    return 0;
}

/* Gives shares[0 .. parts) their rows: ascending by rank, in proportion to what each lacks of
 * `level`. */
static int
divide_rows(struct split *s, struct dedup *d, struct dcp_keep *keep, uint32_t k, uint32_t parts,
            wide level, struct dcp_error *err)
{
    const struct dedup_key *key = &d->keys[k];
    const struct dcp_plan *plan = &d->plans[key->plan];
    const struct dcp_item *item = &plan->items[key->item];
    const uint64_t *sizes = dcp_item_sizes(plan, item);
    uint32_t dim = choose_dim(sizes, item->ndim, parts);
    uint64_t rows = sizes[dim], row_bytes = key->weight_bytes / rows;
    uint64_t step = choose_step(row_bytes, rows, parts);
    uint64_t at = 0;
    uint32_t kept = 0;
    wide total = 0, sum = 0;
    int rc = 0;
    qsort(s->shares, parts, sizeof *s->shares, compare_holders);
    for (uint32_t i = 0; i < parts; i++) {
        total += level - s->shares[i].load_bytes;
    }
    for (uint32_t i = 0; rc == 0 && i < parts; i++) {
        const struct dedup_holder *holder = &dedup_holders(d, k)[s->shares[i].holder];
        sum += level - s->shares[i].load_bytes;
        uint64_t end = (uint64_t)((rows * sum + total * step / 2) / (total * step)) * step;
        end = i + 1 == parts ? rows : dcp_min_u64(end, rows);
        if (end <= at) {
            continue; /* fewer rows than parts */
        }
        dedup_keep(d, keep, holder, (end - at) * row_bytes);
        rc = end - at == rows ? 0 : add_cut(s, holder, dim, at, end - at, err);
        at = end;
        kept++;
    }
    keep->dropped_items += key->holders_count - kept;
    keep->dropped_bytes += key->weight_bytes * (key->holders_count - 1);
    return rc;
}

static int
pour(struct split *s, struct dedup *d, struct dcp_keep *keep, uint32_t k, struct dcp_error *err)
{
    const struct dedup_key *key = &d->keys[k];
    const struct dcp_plan *plan = &d->plans[key->plan];
    const struct dcp_item *item = &plan->items[key->item];
    const uint64_t *sizes = dcp_item_sizes(plan, item);
    const struct dedup_holder *holders = dedup_holders(d, k);
    uint64_t target_bytes = s->mean_bytes == 0 ? 0 : dcp_max_u64(s->mean_bytes, d->most_bytes);
    uint64_t most_rows = sizes[choose_dim(sizes, item->ndim, UINT32_MAX)];
    wide level;
    for (uint32_t h = 0; h < key->holders_count; h++) {
        s->shares[h] =
            (struct split_share){.load_bytes = d->loads_bytes[holders[h].plan], .holder = h};
    }
    qsort(s->shares, key->holders_count, sizeof *s->shares, compare_loads);
    uint32_t parts =
        choose_parts(s, (uint32_t)dcp_min_u64(key->holders_count, most_rows), key->weight_bytes,
                     target_bytes + target_bytes / LEVEL_TOLERANCE, &level);
    return divide_rows(s, d, keep, k, parts, level, err);
}

/* ---- the lists ---- */

static int
compare_cuts(const void *left, const void *right)
{
    const struct split_cut *a = left, *b = right;
    if (a->plan != b->plan) {
        return a->plan < b->plan ? -1 : 1;
    }
    return a->cut.item < b->cut.item ? -1 : a->cut.item > b->cut.item;
}

int
split_pour(struct split *s, struct dedup *d, struct dcp_keep *keep, struct dcp_error *err)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < s->deferred_count; i++) {
        rc = pour(s, d, keep, s->candidates[i], err);
    }
    if (rc != 0 || s->cuts_count == 0) {
        return rc;
    }
    keep->cuts = dcp_calloc(1, d->plans_count * sizeof *keep->cuts +
                                   s->cuts_count * sizeof *keep->cuts->cuts);
    if (keep->cuts == NULL) {
        return out_of_memory(err, s->cuts_count);
    }
    struct dcp_cut *cuts = (struct dcp_cut *)(keep->cuts + d->plans_count);
    qsort(s->cuts, s->cuts_count, sizeof *s->cuts, compare_cuts);
    for (uint32_t i = 0; i < s->cuts_count; i++) {
        keep->cuts[s->cuts[i].plan].count++;
        cuts[i] = s->cuts[i].cut;
    }
    for (uint32_t p = 0; p < d->plans_count; p++) {
        keep->cuts[p].cuts = cuts;
        cuts += keep->cuts[p].count;
    }
    return 0;
}
